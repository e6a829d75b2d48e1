"""Zero bubble beside other parallelism: two stages, two data shards with ZeRO 1, two tensor-parallel ranks.

Quickstart's model at half its width, two layers on each stage, and eight microbatches of one sequence for each data
shard. Weight gradients wait for ticks in which a stage would be idle. Sequence parallelism halves what the permutes
send; ZeRO 1 keeps its one gather and one reduction per step, however many microbatches there are.

    python main.py --config configs/debug/zero_bubble.py --devices 8
"""

from dataclasses import replace

from configs.quickstart import get_config as quickstart
from mtx.config import BatchConfig, Config
from mtx.layers import SwiGLU
from mtx.layout import Layout
from mtx.mesh import MeshConfig
from mtx.pipeline import ZeroBubble


def get_config() -> Config:
    base = quickstart()
    return replace(
        base,
        model=replace(base.model, layers=4, width=64, mlp=SwiGLU(width=128)),
        batch=BatchConfig(global_size=16, micro_size=1, sequence_length=64),
        mesh=MeshConfig(pipeline=2, data=2, model=2),
        layout=Layout(zero=1, sequence_parallel=True),
        pipeline=ZeroBubble(),
        steps=40,
        log_every=10,
        eval_every=0,
        eval_sequences=32,
        sample_tokens=16,
    )
