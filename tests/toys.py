"""Small models, meshes and batches that the tests of many modules share."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtx import mesh as meshes
from mtx import model as models
from mtx.attention import AttentionConfig
from mtx.layers import Gelu, Learned, Llama3Scaling, RMSNorm, Rotary, SwiGLU
from mtx.layout import BoundLayout, Layout, Placement, Row
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.model import Batch, Model, Transformer, flatten
from mtx.optim import Counter, Optimizer, Sgd
from mtx.pipeline import OneFOneB, Schedule
from mtx.spmd import Compiled, Manual
from mtx.stacks import Block, Stack
from mtx.state import Part, TrainState
from mtx.step import Program
from pallas_kernels.patterns import LocalGlobal

GPT = Transformer(
    vocab_size=250,
    vocab_multiple=64,
    layers=2,
    width=32,
    attention=AttentionConfig(heads=8),
    mlp=Gelu(width=64),
    positions=Learned(length=16),
)
LLAMA = Transformer(
    vocab_size=250,
    vocab_multiple=64,
    layers=2,
    width=32,
    attention=AttentionConfig(heads=16, kv_heads=8),
    mlp=SwiGLU(width=64),
    norm=RMSNorm(),
    positions=Rotary(scaling=Llama3Scaling(original_length=8)),
    bias=False,
    tied_head=False,
    init_scale_residual=False,
)
ODD = dataclasses.replace(
    LLAMA,
    attention=AttentionConfig(
        heads=16,
        kv_heads=8,
        window=7,
        pattern=LocalGlobal(block=4, window=0),
        softcap=2.0,
        sinks=True,
        backend="chunked",
    ),
)
"""What attention can be told at once, by tiles."""
ALTERNATING = dataclasses.replace(
    LLAMA,
    layers=4,
    attention=AttentionConfig(heads=16, kv_heads=8, softcap=5.0),
    stacks=(
        Stack(
            name="main",
            count=2,
            pattern=(
                Block(name="local", attention=AttentionConfig(heads=16, kv_heads=8, softcap=5.0, window=5)),
                Block(name="full"),
            ),
        ),
    ),
)
"""A window in every other layer, as Gemma 2 has it."""
WIDE_FIRST = dataclasses.replace(
    GPT,
    layers=4,
    stacks=(
        Stack(name="first", count=3, pattern=(Block(mlp=Gelu(width=128)),)),
        Stack(name="rest", count=1, pattern=(Block(attention=AttentionConfig(heads=8, head_size=6), norm=RMSNorm()),)),
    ),
)
"""Three layers with wider feed-forward before one with larger heads and another norm."""
MESHES = [(r, d, 8 // r // d) for r in (1, 2, 4, 8) for d in (1, 2, 4, 8) if r * d <= 8]
"""Every (replica, data, model) of eight devices."""


def dropped(model: Transformer, rate: float) -> Transformer:
    return dataclasses.replace(model, dropout=rate, attention_dropout=rate)


def program(
    model: Transformer,
    mesh: tuple[int, int, int] = (1, 1, 1),
    *,
    zero: int = 0,
    sequence_parallel: bool = False,
    rows: tuple[Row, ...] | None = None,
    partition: Manual | Compiled = Manual(),
    optimizer: Optimizer = Sgd(clip_norm=None),
    loss: CrossEntropy = CrossEntropy(chunk_tokens=16, z_loss=1e-3),
    documents: bool = True,
    prefix: bool = False,
    compute=jnp.float32,
    stored=jnp.float32,
    devices=None,
    steps: int = 10,
    stages: int = 1,
    context: int = 1,
    schedule: Schedule = OneFOneB(),
    vocabulary: Literal["sharded", "replicated"] = "sharded",
    more_parts: tuple[Part, ...] = (),
) -> Program:
    replica, data, tensor = mesh
    devices = jax.devices()[: stages * context * math.prod(mesh)] if devices is None else devices
    made = meshes.make(MeshConfig(pipeline=stages, replica=replica, data=data, context=context, model=tensor), devices)
    wanted = Layout(zero=zero, sequence_parallel=sequence_parallel, vocabulary=vocabulary, rows=rows)
    layout = BoundLayout.of(wanted, dict(made.shape))
    built = Model(model, Placement.even(model.layers, stages, schedule.per_stage() if stages > 1 else 1))
    layout.check(flatten(built.weights))
    return Program(
        model=built,
        mesh=made,
        layout=layout,
        optimizer=optimizer,
        loss=loss,
        partition=partition,
        compute=jnp.dtype(compute),
        stored=jnp.dtype(stored),
        masks=built.masks(documents, prefix),
        steps=steps,
        schedule=schedule,
        more_parts=more_parts,
    )


def batch(sequences: int = 32, time: int = 16, vocab: int = 250, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed documents with ignored targets and rows that are mostly padding."""
    random = np.random.default_rng(seed)
    shape = (sequences, time)
    segments = np.sort(random.integers(1, 4, shape), axis=-1).astype(np.int32)
    positions = np.zeros(shape, np.int32)
    for t in range(1, time):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    weights = (random.random(shape) > 0.2).astype(np.float32)
    weights[:3, 2:] = 0.0  # so that a mean of means over rows or shards is wrong
    return {
        "tokens": random.integers(0, vocab, shape, dtype=np.int32),
        "targets": random.integers(0, vocab, shape, dtype=np.int32),
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }


def place(p: Program, arrays: Mapping[str, np.ndarray], microbatches: int) -> Batch:
    return p.place({name: x.reshape(microbatches, -1, x.shape[-1]) for name, x in arrays.items()}, p.batch_spec)


def rows_of(p: Program, params: dict) -> dict:
    """Weights with their layers in order (host arrays) as a pipeline's stages have them."""
    layers = p.model.placement.layer_of_row

    def one(x: np.ndarray) -> np.ndarray:
        rows = x[np.maximum(layers, 0)]
        rows[layers < 0] = 0
        return rows

    return params if p.model.placement.in_order else {**params, "stacks": jax.tree.map(one, params["stacks"])}


def layers_of(p: Program, params: dict) -> dict:
    """The inverse of `rows_of`; rows without a layer must be zeros."""
    place = p.model.placement
    if place.in_order:
        return params
    for name, x in flatten(params["stacks"]).items():
        assert not np.asarray(x)[place.layer_of_row < 0].any(), f"{name} has something where no layer is"
    return {**params, "stacks": jax.tree.map(lambda x: np.asarray(x)[place.row_of_layer], params["stacks"])}


def state_of(p: Program, params: dict) -> TrainState:
    """A new state with these weights (host arrays, layers in order)."""
    whole = p.sharding(jax.P())

    def zero(dtype=np.uint32) -> jax.Array:  # never one array in two places: the step donates them
        return jax.device_put(dtype(0), whole)

    return p.started(
        TrainState(
            step=zero(np.int32),
            params=jax.tree.map(jax.device_put, rows_of(p, params), p.shardings("weights")),
            parts={},
            samples=Counter(zero(), zero()),
            tokens=Counter(zero(), zero()),
            skipped=zero(),
            seed=zero(),
        )
    )


@functools.cache
def _initial(model: Transformer, modules: tuple[type, ...]) -> dict:
    """`modules` are what the model is built of, which some tests replace for a while."""
    return jax.tree.map(np.asarray, program(model).init(0).params)


def weights_of(model: Transformer) -> dict:
    """Host arrays of one initialisation, with biases and gains moved off their special values; the caller's own."""
    random, modules = np.random.default_rng(1), (models.Attention, models.Layer)
    return jax.tree.map(
        lambda x: x + 0.02 * random.standard_normal(x.shape).astype(np.float32), _initial(model, modules)
    )


def gradients(
    p: Program, params: dict, arrays: Mapping[str, np.ndarray], microbatches: int = 1
) -> tuple[dict, np.ndarray]:
    """(gradients of the mean loss, its sums: objective, cross entropy and labels), on the host."""
    found, sums = gradients_and_sums(p, params, arrays, microbatches)
    return found, np.array([sums[name] for name in ("objective", "cross_entropy", "labels")])


def gradients_and_sums(
    p: Program, params: dict, arrays: Mapping[str, np.ndarray], microbatches: int = 1
) -> tuple[dict, dict[str, np.ndarray]]:
    """(gradients of the mean loss, all sums by name), on the host; every copy of a replicated shard must agree."""
    state, placed = state_of(p, params), place(p, arrays, microbatches)
    with jax.set_mesh(p.mesh):
        found, sums = jax.jit(p.gradients)(state, placed, jnp.int32(microbatches))
    for name, array in (flatten(found) | sums).items():
        check_copies(name, array)
    found, sums = layers_of(p, jax.tree.map(np.asarray, found)), jax.tree.map(np.asarray, sums)
    return jax.tree.map(lambda g: g / float(sums["labels"]), found), sums


def eval_sums(p: Program, params: dict, placed: Batch) -> np.ndarray:
    """The cross entropy of placed rows, in nats, and the weight of their labels."""
    with jax.set_mesh(p.mesh):
        sums = jax.jit(p.eval_sums)(params, placed)
    return np.array([sums["cross_entropy"], sums["labels"]])


def check_copies(name: str, array: jax.Array) -> None:
    """Devices that should hold the same part hold the same bits."""
    seen: dict[str, np.ndarray] = {}
    for shard in array.addressable_shards:
        key = str(shard.index)
        part = np.asarray(shard.data)
        np.testing.assert_array_equal(part, seen.setdefault(key, part), err_msg=f"copies of {name} differ")


def check_close(found: dict, wanted: dict, bound: float) -> None:
    """||difference|| <= bound max(||tensor||, 1e-4 ||all||), tensor by tensor."""
    wanted, found = flatten(wanted), flatten(found)
    assert wanted.keys() == found.keys()
    everything = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in wanted.values()))
    for name, x in wanted.items():
        error = np.linalg.norm((np.asarray(found[name], np.float64) - x).ravel())
        scale = max(np.linalg.norm(x.ravel().astype(np.float64)), 1e-4 * everything)
        assert error <= bound * scale, f"{name}: off by {error / scale:.2e} of its norm, more than {bound:.0e}"
