"""1F1B, the default, over four stages of uneven size: six layers lie 2-2-1-1.

Quickstart's model at half its width, and eight microbatches of one sequence for each of two data shards. The first
stages have more layers, as the last has the head to compute. Rows of zeros pad the short stages; the checkpoint at the
end has six layers in their own order, so that the run goes on with `mesh.pipeline=2 mesh.data=4 steps=60` too.

    python main.py --config configs/debug/one_f_one_b.py --devices 8
"""

from dataclasses import replace

from configs.quickstart import get_config as quickstart
from mtx.config import BatchConfig, Config
from mtx.layers import SwiGLU
from mtx.mesh import MeshConfig
from mtx.pipeline import OneFOneB


def get_config() -> Config:
    base = quickstart()
    return replace(
        base,
        model=replace(base.model, layers=6, width=64, mlp=SwiGLU(width=128)),
        batch=BatchConfig(global_size=16, micro_size=1, sequence_length=64),
        mesh=MeshConfig(pipeline=4, data=2),
        pipeline=OneFOneB(),
        steps=40,
        log_every=10,
        eval_every=0,
        eval_sequences=32,
        sample_tokens=16,
    )
