"""Interleaved 1F1B over four stages of two chunks: layers 0 and 4 lie on the first stage, 3 and 7 on the last.

Quickstart's model at half its width and twice its depth, and eight microbatches of one sequence for each of two data
shards. Each microbatch goes round the ring of stages twice: half the bubble of 1F1B, about twice its permutes. In the
checkpoint at the end the layers lie in their own order, not in that of the stages.

    python main.py --config configs/debug/interleaved.py --devices 8
"""

from dataclasses import replace

from configs.quickstart import get_config as quickstart
from mtx.config import BatchConfig, Config
from mtx.layers import SwiGLU
from mtx.mesh import MeshConfig
from mtx.pipeline import Interleaved


def get_config() -> Config:
    base = quickstart()
    return replace(
        base,
        model=replace(base.model, layers=8, width=64, mlp=SwiGLU(width=128)),
        batch=BatchConfig(global_size=16, micro_size=1, sequence_length=64),
        mesh=MeshConfig(pipeline=4, data=2),
        pipeline=Interleaved(chunks=2),
        steps=40,
        log_every=10,
        eval_every=0,
        eval_sequences=32,
        sample_tokens=16,
    )
