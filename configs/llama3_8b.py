"""Llama 3 8B (Llama Team 2024, "The Llama 3 Herd of Models", table 3): the architecture, exactly.

32 layers of width 4096, 32 query heads of size 128 over 8 key and value heads, SwiGLU of 14,336, RMSNorm
1e-5, rotary base 500,000, 128,256 tokens, an output projection of its own, no biases, sequences of 8192 in
which attention stays inside documents. Peak learning rate 3e-4 is table 3's. The paper gives no schedule or
batch for this size: warm-up of 8000 steps and a cosine to 1 % at step 1,200,000 are its 405B's (section
3.4.1), four million tokens a step where its batch began. Betas 0.9 and 0.95, decay 0.1 and clipping at 1
are Llama 2's (Touvron et al. 2023, section 2.2). Llama 3.1 adds `model.positions.scaling=Llama3Scaling`.

Not reproduced: the text (15T tokens). The only data here are Python's documentation as bytes, which
leave most of the vocabulary unused. ZeRO-3 over every device unless mesh says otherwise; initial weights
are N(0, 0.02) throughout, since Meta published none.
"""

from data import PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import RMSNorm, Rotary, SwiGLU
from mtx.layout import Layout
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Steps


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=128_256,
            layers=32,
            width=4096,
            attention=AttentionConfig(heads=32, kv_heads=8, head_size=128),
            mlp=SwiGLU(width=14_336),
            norm=RMSNorm(epsilon=1e-5),
            positions=Rotary(theta=500_000.0),
            bias=False,
            tied_head=False,
            init_scale_residual=False,
            remat="full",
        ),
        data=PythonDocs(),
        batch=BatchConfig(global_size=512, micro_size=1, sequence_length=8192),
        optimizer=AdamW(
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule=Cosine(peak_lr=3e-4, warmup=Steps(count=8000), end=Steps(count=1_200_000), final_share=0.01),
        ),
        mesh=MeshConfig(data=-1),
        layout=Layout(zero=3),
        steps=1_200_000,
        eval_every=5000,
    )
