"""A Llama-shaped model over bytes that learns to write like Python's documentation in three minutes on two CPU cores.

Nothing is published with these sizes; they are chosen so that, by overrides alone, it trains on every
replica x data x model mesh of eight devices: 8 heads, 8 sequences, a vocabulary of 257 padded to 384.
Small batches win at this length: at equal time, 8 sequences of 128 reach 2.05 bits per byte, 16 reach 2.33;
sequences of 256 cost 1.6 times as much per token.

    python main.py --config configs/quickstart.py
    python main.py --config configs/quickstart.py --devices 8 mesh.data=4 mesh.model=2
"""

from data import PythonDocs
from mtx.attention import AttentionConfig
from mtx.checkpoint import Checkpoints
from mtx.config import BatchConfig, Config
from mtx.layers import RMSNorm, Rotary, SwiGLU
from mtx.losses import CrossEntropy
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
            mlp=SwiGLU(width=352),
            norm=RMSNorm(),
            positions=Rotary(),
            bias=False,
        ),
        data=PythonDocs(),
        batch=BatchConfig(global_size=8, sequence_length=128),
        optimizer=AdamW(b2=0.98, schedule=Cosine(peak_lr=4e-3, warmup=Fraction(share=0.05), final_share=0.05)),
        loss=CrossEntropy(chunk_tokens=512),
        mesh=MeshConfig(data=-1),
        steps=1100,
        checkpoints=Checkpoints(every_steps=100),
        log_every=100,
        eval_every=550,
    )
