"""Quickstart's model on your own text: two passes over the folder notes/, byte-level BPE learned from it.

Half a megabyte of prose gives about 160,000 tokens of 1,024 kinds; a larger text deserves a larger vocabulary (8,192
from about 50 MB on) and a larger model. Learning rate and batch are quickstart's.

    python main.py prepare --config configs/own_text.py data.paths=my/folder
    python main.py --config configs/own_text.py data.paths=my/folder
"""

from data import Bpe, TextFiles
from mtx.attention import AttentionConfig
from mtx.checkpoint import Checkpoints
from mtx.config import BatchConfig, Config
from mtx.layers import RMSNorm, Rotary, SwiGLU
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Fraction


def get_config() -> Config:
    tokenizer = Bpe(vocab_size=1024)
    return Config(
        model=Transformer(
            vocab_size=tokenizer.vocab_size,
            layers=4,
            width=128,
            attention=AttentionConfig(heads=8),
            mlp=SwiGLU(width=352),
            norm=RMSNorm(),
            positions=Rotary(),
            bias=False,
        ),
        data=TextFiles(paths="notes", tokenizer=tokenizer),
        batch=BatchConfig(global_size=8, sequence_length=128),
        optimizer=AdamW(b2=0.98, schedule=Cosine(peak_lr=4e-3, warmup=Fraction(share=0.05), final_share=0.05)),
        loss=CrossEntropy(chunk_tokens=512),
        mesh=MeshConfig(data=-1),
        epochs=2.0,
        checkpoints=Checkpoints(every_steps=100),
        log_every=50,
        eval_every=100,
        sample_tokens=40,
    )
