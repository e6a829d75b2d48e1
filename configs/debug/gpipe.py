"""GPipe over four stages: every microbatch goes forward before the first goes backward.

Quickstart's model at half its width, one layer on each stage, and eight microbatches of one sequence for each of two
data shards. As in the paper, backward computes each stage anew (`remat="stage"`), so that only stage inputs are held.
Long enough to see the loss fall, too short to write anything.

    python main.py --config configs/debug/gpipe.py --devices 8
"""

from dataclasses import replace

from configs.quickstart import get_config as quickstart
from mtx.config import BatchConfig, Config
from mtx.layers import SwiGLU
from mtx.mesh import MeshConfig
from mtx.pipeline import GPipe


def get_config() -> Config:
    base = quickstart()
    return replace(
        base,
        model=replace(base.model, layers=4, width=64, mlp=SwiGLU(width=128), remat="stage"),
        batch=BatchConfig(global_size=16, micro_size=1, sequence_length=64),
        mesh=MeshConfig(pipeline=4, data=2),
        pipeline=GPipe(),
        steps=40,
        log_every=10,
        eval_every=0,
        eval_sequences=32,
        sample_tokens=16,
    )
