"""Whole matrices of weights that are split over the mesh: devices exchange parts of matrices for layers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from mtx.layout import BoundLayout, Placement, Weight


def each_whole(
    mesh: Mesh,
    layout: BoundLayout,
    placement: Placement,
    weight: Weight,
    f: Callable[[jax.Array], jax.Array],
    u: jax.Array,
) -> jax.Array:
    """f of each layer's u, which has the weight's shape and sharding, as the result has; zeros where no layer is.

    For each split dimension one all-to-all gives every device whole matrices of some layers (rows of zeros where there
    are fewer layers than devices), and one back returns its part of all. A weight that is not stacked is one layer.
    """
    spec = layout.spec(weight, "optimizer")
    split = [(i, (e,) if isinstance(e, str) else tuple(e)) for i, e in enumerate(spec) if e and i >= weight.layers]
    parts = math.prod(layout.size(*axes) for _, axes in split)

    def local(u: jax.Array) -> jax.Array:
        u_L = u if weight.layers else u[None]
        here = u_L.shape[0]
        u_L = jnp.pad(u_L, [(0, -here % parts), *[(0, 0)] * (u_L.ndim - 1)])
        for i, axes in split:
            u_L = lax.all_to_all(u_L, axes, split_axis=0, concat_axis=i + 1 - weight.layers, tiled=True)
        u_L = jax.vmap(f)(u_L)
        for i, axes in reversed(split):
            u_L = lax.all_to_all(u_L, axes, split_axis=i + 1 - weight.layers, concat_axis=0, tiled=True)
        return u_L[:here] if weight.layers else u_L[0]

    if mesh.size > 1:
        local = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = local(u)
    return where_layers(placement, found, jnp.zeros_like(found)) if weight.layers else found


def where_layers(placement: Placement, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the rows that hold a layer, `old` in the others."""
    if placement.is_even:
        return new
    there = np.asarray(placement.layer_of_row >= 0).reshape(-1, *(1,) * (new.ndim - 1))
    return jnp.where(there, new, old)
