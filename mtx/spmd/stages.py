"""The stages of a pipeline, from inside the Manual region."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtx.layout import STAGES, Placement


class VirtualStage(NamedTuple):
    """One of this stage's, as traced numbers."""

    row: jax.Array
    """Its first row in the stage's stacked weights."""
    layer: jax.Array
    """Its first layer."""
    count: jax.Array
    """How many it has."""
    is_first: jax.Array
    is_last: jax.Array


def this_stage(place: Placement, chunk: jax.Array) -> VirtualStage:
    """This pipeline stage's chunk of this number; inside the Manual region."""
    virtual = chunk * place.stages + lax.axis_index(STAGES)
    return VirtualStage(
        row=chunk * place.size,
        layer=jnp.asarray(place.first)[virtual],
        count=jnp.asarray(place.counts)[virtual],
        is_first=virtual == 0,
        is_last=virtual == len(place.counts) - 1,
    )


def relay(place: Placement, run: Callable[[jax.Array, tuple[Any, Any]], Any], moving: Any, own: Any) -> Any:
    """(moving, own) through all virtual stages, one after the other; `moving` ends on every stage, `own` stays.

    `run(chunk, (moving, own))` is one of this stage's chunks. Not differentiated; inside the Manual region.
    """
    here = lax.axis_index(STAGES)

    def hop(k: jax.Array, now: Any) -> Any:
        moving, own = lax.cond(k % place.stages == here, lambda: run(k // place.stages, now), lambda: now)
        return jax.tree.map(to_next_stage, moving), own

    moving, own = lax.fori_loop(0, len(place.counts), hop, (moving, own))
    return jax.tree.map(lambda x: lax.psum(jnp.where(here == 0, x, jnp.zeros_like(x)), STAGES), moving), own


def all_layers(place: Placement, x_R: jax.Array) -> jax.Array:
    """x_L of all layers in their own order, on every stage, from a value of each of a stage's rows."""
    return lax.all_gather(x_R, STAGES, tiled=True)[place.row_of_layer]


def to_next_stage(x: jax.Array) -> jax.Array:
    """What each stage holds, moved one stage on; the last stage's goes to the first."""
    stages = lax.axis_size(STAGES)
    return lax.ppermute(x, STAGES, [(i, (i + 1) % stages) for i in range(stages)])


def to_stage_before(x: jax.Array) -> jax.Array:
    """What each stage holds, moved one stage back; the first stage's goes to the last."""
    stages = lax.axis_size(STAGES)
    return lax.ppermute(x, STAGES, [(i, (i - 1) % stages) for i in range(stages)])


def after(done: Any, predicate: jax.Array) -> jax.Array:
    """`predicate`, which a CPU knows only once it has the float arrays of `done`.

    XLA's CPU runtime may start collectives behind a condition while others beside it go on, and takes one for the other
    if both are of a kind, over the same devices. It drops `lax.optimization_barrier` before it orders anything; what a
    value is needed for, it must compute.
    """

    def wait(predicate: jax.Array, *done: jax.Array) -> jax.Array:
        some = sum(x.reshape(-1)[0] for x in done)
        return predicate & ((some == some) | (some != some))

    return lax.platform_dependent(predicate, *jax.tree.leaves(done), cpu=wait, default=lambda predicate, *_: predicate)
