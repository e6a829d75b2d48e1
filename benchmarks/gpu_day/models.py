"""The models that the day trains, and batches of random tokens for them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np

from configs import gpt2_124m, gpt2_345m, llama3_8b, quickstart
from data import Concatenate
from mtx.attention import AttentionConfig
from mtx.building import build
from mtx.config import BatchConfig, Config
from mtx.layers import Gelu, Learned
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.model import Batch
from mtx.spmd import Precision
from mtx.step import Program
from pallas_kernels.attention import BackendName


def megatron_1_7b() -> Config:
    """24 layers of width 2048 with 16 heads and sequences of 4,096: head size 128, where attention is a large share."""
    base = gpt2_345m.get_config()
    attention, mlp, positions = AttentionConfig(heads=16), Gelu(width=8192), Learned(length=4096)
    model = replace(base.model, width=2048, attention=attention, mlp=mlp, positions=positions)
    return replace(base, model=model, batch=BatchConfig(global_size=512, sequence_length=4096))


def llama3_8b_slice() -> Config:
    """Four of the 32 layers of Llama 3 8B."""
    base = llama3_8b.get_config()
    return replace(base, model=replace(base.model, layers=4))


CONFIGS = {
    "quickstart": quickstart.get_config,
    "gpt2_124m": gpt2_124m.get_config,
    "gpt2_345m": gpt2_345m.get_config,
    "megatron_1_7b": megatron_1_7b,
    "llama3_8b, 4 layers": llama3_8b_slice,
}


def config_of(
    name: str,
    *,
    rows: int,
    time: int | None = None,
    backend: BackendName = "auto",
    compute: Literal["float32", "bfloat16"] = "bfloat16",
    remat: Literal["none", "selective", "full"] = "none",
    mesh: MeshConfig = MeshConfig(),
) -> Config:
    """One of `CONFIGS` on `rows` sequences a step, without dropout, attending across documents."""
    base = CONFIGS[name]()
    attention = replace(base.model.attention, backend=backend)
    return replace(
        base,
        model=replace(base.model, dropout=0.0, attention_dropout=0.0, attention=attention, remat=remat),
        packing=Concatenate(isolate_documents=False),
        batch=BatchConfig(global_size=rows, sequence_length=time or base.batch.sequence_length),
        loss=CrossEntropy(chunk_tokens=8192),
        precision=Precision(compute=compute),
        mesh=mesh,
    )


def program_of(config: Config, devices: list[jax.Device] | None = None) -> Program:
    """The program of a config on these devices; by default on the first."""
    return build(config, devices or jax.devices()[:1])


def batches(config: Config, program: Program, microbatches: int = 1) -> Iterator[Batch]:
    """Yields Batch_MBT after Batch_MBT of tokens that are drawn from a Zipf law, with seed 0."""
    random = np.random.default_rng(0)
    vocab, B, T = config.model.vocab_size, config.batch.global_size, config.batch.sequence_length
    chance = 1.0 / (np.arange(vocab) + 10.0)
    bounds = np.cumsum(chance / chance.sum())
    shape = (microbatches, B // microbatches, T)
    rest: dict[str, Any] = {"weights": np.ones(shape, np.float32), "segments": np.ones(shape, np.int32)}
    rest["positions"] = np.broadcast_to(np.arange(T, dtype=np.int32), shape)
    while True:
        drawn = np.searchsorted(bounds, random.random((*shape[:2], T + 1))).clip(max=vocab - 1).astype(np.int32)
        yield program.place({"tokens": drawn[..., :-1], "targets": drawn[..., 1:], **rest}, program.batch_spec)
