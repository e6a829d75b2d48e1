"""A GPT over bytes that learns to write like Python's documentation in a few minutes on two CPU cores.

Nothing is published with these sizes; they are chosen so that, by overrides alone, it trains on every
replica x data x model mesh of eight devices: 8 heads, 16 sequences, a vocabulary of 257 padded to 384.

    python main.py --config configs/quickstart.py
    python main.py --config configs/quickstart.py --devices 8 mesh.data=4 mesh.model=2
"""

from data import PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import Gelu, Learned
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Fraction


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=257,
            layers=4,
            width=128,
            attention=AttentionConfig(heads=8),
            mlp=Gelu(width=512),
            positions=Learned(length=256),
        ),
        data=PythonDocs(),
        batch=BatchConfig(global_size=16, sequence_length=256),
        optimizer=AdamW(schedule=Cosine(peak_lr=3e-3, warmup=Fraction(share=0.1))),
        mesh=MeshConfig(data=-1),
        steps=300,
    )
