"""GPT-2 small, 124M parameters (Radford et al. 2019, table 2, where its size is misprinted as 117M).

The architecture is openai/gpt-2's; dropout 0.1 and N(0, 0.02) everywhere are those of Hugging Face's `gpt2`
config, and residual projections start smaller, as the paper says (section 2.3). Its optimizer was never
published; batch and schedule here are those that the community reproduces it with (nanoGPT's
config/train_gpt2.py, after GPT-3: Brown et al. 2020, table 2.1 and appendix B): half a million tokens a step,
peak 6e-4, 2000 steps of warm-up, cosine to a tenth at step 600k. nanoGPT trains without dropout.

Not reproduced: the text. The only data here are Python's documentation as bytes; a vocabulary of 50,257
holds them, but most of the table is never used, and losses say nothing about GPT-2's.
"""

from data import Concatenate, PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import Gelu, LayerNorm, Learned
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Steps


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=50_257,
            layers=12,
            width=768,
            attention=AttentionConfig(heads=12),
            mlp=Gelu(width=3072),
            norm=LayerNorm(epsilon=1e-5),
            positions=Learned(length=1024),
            dropout=0.1,
            attention_dropout=0.1,
            remat="selective",
        ),
        data=PythonDocs(),
        packing=Concatenate(isolate_documents=False),
        batch=BatchConfig(global_size=512, micro_size=8, sequence_length=1024),
        optimizer=AdamW(
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule=Cosine(peak_lr=6e-4, warmup=Steps(count=2000), end=Steps(count=600_000), final_share=0.1),
        ),
        mesh=MeshConfig(data=-1),
        steps=600_000,
        eval_every=1000,
    )
