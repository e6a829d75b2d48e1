"""Stacked weights between the rows of a pipeline's stages and the layers' own order, as checkpoints have it.

Each stage sends every other a part of another dimension of its layers, in one all-to-all, so that a device holds its
share of the ordered layers too (all of them, where the number of stages divides no dimension of a weight), and a run
goes on from a checkpoint on any mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from mtx.layout import STAGES, BoundLayout, Placement, Weight


def to_order(mesh: Mesh, layout: BoundLayout, placement: Placement, x: jax.Array, *, weight: Weight) -> jax.Array:
    """From rows, split as `weight` is, to layers, split as `BoundLayout.ordered_spec`."""
    dim, rows = layout.exchange_dim(weight), placement.row_of_layer

    def local(x: jax.Array) -> jax.Array:
        if dim is None:
            return lax.all_gather(x, STAGES, axis=0, tiled=True)[rows]
        return lax.all_to_all(x, STAGES, split_axis=dim, concat_axis=0, tiled=True)[rows]

    specs = layout.spec(weight, "weights"), layout.ordered_spec(weight, "weights")
    return jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x)


def to_rows(mesh: Mesh, layout: BoundLayout, placement: Placement, x: jax.Array, *, weight: Weight) -> jax.Array:
    """The inverse of `to_order`; rows without a layer are zeros."""
    dim, layers = layout.exchange_dim(weight), placement.layer_of_row

    def local(x: jax.Array) -> jax.Array:
        there = (layers >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        x = jnp.where(there, x[np.maximum(layers, 0)], jnp.zeros((), x.dtype))
        if dim is None:
            own = placement.rows // placement.stages
            return lax.dynamic_slice_in_dim(x, lax.axis_index(STAGES) * own, own)
        return lax.all_to_all(x, STAGES, split_axis=0, concat_axis=dim, tiled=True)

    specs = layout.ordered_spec(weight, "weights"), layout.spec(weight, "weights")
    return jax.shard_map(local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x)
