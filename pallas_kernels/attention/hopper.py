"""Flash attention kernels for NVIDIA Hopper (Pallas Mosaic GPU): bfloat16 and float16, float32 statistics.

Interval masks are walked as ranges, all others as lists of tiles. What is hidden as a whole is never visited.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import shim
from pallas_kernels.attention import hopper_backward, hopper_forward, hopper_fused, hopper_tiles
from pallas_kernels.attention.flash import Grads, Noise, Scores
from pallas_kernels.attention.hopper_tiles import GROUP
from pallas_kernels.attention.question import Question
from pallas_kernels.masks import misfit
from pallas_kernels.threefry import threefry2x32
from pallas_kernels.visible import MOST_TERMS, Visible

WIDE = 320  # H + U up to which one warpgroup can hold dk and dv of 64 keys in registers


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tiles of the Hopper kernels. Queries and keys that a block owns are always 128."""

    forward_keys: int = 128
    """Keys of one forward step; a multiple of 64."""
    forward_stages: int = 2
    """Steps whose K and V shared memory holds."""
    dq_keys: int = 64
    """Keys of one step of the kernel of dq; 64 or 128."""
    dkv_queries: int = 64
    """Queries of one step of the kernel of dk and dv; 64 or 128."""
    backward_stages: int = 2
    fused: bool = False
    """One backward kernel of five matrix products in place of two with seven, for heads of 128; dq then differs in
    its last bits from call to call."""
    staged: bool = False
    """P and dS go through shared memory, slower: the form that the interpreter of jax 0.12 can run."""
    interpret: Any = None
    """`shim.gpu_interpreter(...)`: run on the CPU."""

    def __post_init__(self) -> None:
        if not {self.dq_keys, self.dkv_queries} <= {64, 128}:  # a length below it would get more tiles than its walk
            raise ValueError(f"dq_keys and dkv_queries must be 64 or 128, not {self.dq_keys} and {self.dkv_queries}")


def cannot(asked: Question) -> str | None:
    """Why these kernels cannot do exactly this; None if they can."""
    sizes = default_sizes(asked)
    if asked.chip.platform != "gpu" or asked.chip.capability != 9.0:
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), not {asked.chip.kind or asked.chip.platform}"
    if asked.dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16 or float16, not {asked.dtype}"
    if max(asked.head_size, asked.value_size) > 256:
        return f"it needs head sizes up to 256, not {asked.head_size} and {asked.value_size}"
    if asked.rows > 65535:
        return f"it needs at most 65535 rows, as many as a CUDA grid has, not {asked.rows}"
    terms = len(asked.mask.conjunctions(own=not asked.key_segments))
    if terms > MOST_TERMS:
        return f"its lists of tiles tell {MOST_TERMS} terms apart, and the mask has {terms}"
    block = misfit(asked.mask, hopper_tiles.TILE, sizes.forward_keys, sizes.dq_keys, sizes.dkv_queries)
    if block is not None:
        return f"it needs patterns with blocks that are multiples of {hopper_tiles.TILE}, not {block}"
    return None


def default_sizes(asked: Question) -> Sizes:
    """Sizes that fit shared memory and registers, not tuned."""
    head = max(asked.head_size, asked.value_size)
    return Sizes(
        forward_keys=128 if head <= 128 else 64,
        dq_keys=128 if head <= 128 and not asked.dropout else 64,
        dkv_queries=128 if head <= 64 and not asked.dropout else 64,
    )


def candidates(asked: Question) -> list[Sizes]:
    """What `benchmarks.tune_attention` tries; what does not fit fails there, by name. All are deterministic."""
    choices = itertools.product((64, 128), (2, 3), (64, 128), (64, 128), (1, 2))
    return [
        Sizes(forward_keys=f, forward_stages=n, dq_keys=dq, dkv_queries=dkv, backward_stages=m)
        for f, n, dq, dkv, m in choices
    ]


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: Visible,
    noise: Noise | None,
    scores: Scores,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """out_BTNU in q's dtype and lse_BNT in float32: natural logarithm, -inf where a query sees nothing.

    Head sizes are padded with zeros to multiples of 64, lengths to multiples of 8 and at least one tile.
    """
    T, U = q_BTNH.shape[1], v_BSKU.shape[3]
    q, k, v = _fit(q_BTNH, GROUP), _fit(k_BSKH, sizes.forward_keys), _fit(v_BSKU, sizes.forward_keys)
    how = hopper_forward.Forward(
        scale=scores.scale,
        softcap=scores.softcap,
        dropout=scores.dropout,
        listed=not mask.is_interval,
        tile_k=sizes.forward_keys,
        stages=sizes.forward_stages,
        staged=sizes.staged,
        interpret=sizes.interpret,
    )
    out_BTNU, lse_BNT = hopper_forward.run(q, k, v, _walk_keys(mask, noise, sizes.forward_keys), how)
    return shim.varying_like((q_BTNH, k_BSKH, v_BSKU), out_BTNU[:, :T, :, :U], lse_BNT[:, :, :T])


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: Visible,
    noise: Noise | None,
    scores: Scores,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    dout_BTNU: jax.Array,
    sizes: Sizes,
) -> Grads:
    """dq_BTNH, dk_BSKH, dv_BSKU in the inputs' dtypes, bit for bit the same at every call. Padded as in `forward`."""
    T, S, H, U = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3], v_BSKU.shape[3]
    q, dout = (_fit(x, sizes.dkv_queries) for x in (q_BTNH, dout_BTNU.astype(q_BTNH.dtype)))
    k, v = (_fit(x, sizes.dq_keys) for x in (k_BSKH, v_BSKU))
    stats_BN2P = hopper_backward.statistics(lse_BNT, delta_BNT)
    how = hopper_backward.Backward(
        scale=scores.scale,
        softcap=scores.softcap,
        dropout=scores.dropout,
        listed=not mask.is_interval,
        columns=sizes.dq_keys,
        stages=sizes.backward_stages,
        staged=sizes.staged,
        interpret=sizes.interpret,
    )
    if sizes.fused and scores.dropout:
        raise ValueError("fused=True has no dropout; try fused=False")
    if sizes.fused:
        shim.require_refs_in_gpu_kernels("fused=True")
        if (k.shape[3], v.shape[3]) != (hopper_fused.HEAD, hopper_fused.HEAD):
            raise ValueError(f"fused=True needs heads of {hopper_fused.HEAD}, not {H} and {U}; try fused=False")
        how = replace(how, columns=hopper_fused.COLUMNS)
        walk = _walk_queries(mask, noise, how.columns, whole=True)
        dq_BTNH, dk_BSKH, dv_BSKU = hopper_fused.run(q, k, v, dout, stats_BN2P, walk, how)
        found = dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKU[:, :S, :, :U]
        return shim.varying_like((q_BTNH, k_BSKH, v_BSKU), *found)
    dq_BTNH = hopper_backward.run_queries(q, k, v, dout, stats_BN2P, _walk_keys(mask, noise, sizes.dq_keys), how)
    how = replace(how, columns=sizes.dkv_queries)
    walk = _walk_queries(mask, noise, sizes.dkv_queries)
    passes = [("dk", "dv")] if k.shape[3] + v.shape[3] <= WIDE else [("dk",), ("dv",)]
    dk_BSKH, dv_BSKU = (
        x for some in passes for x in hopper_backward.run_keys(q, k, v, dout, stats_BN2P, walk, how, some)
    )
    found = dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKU[:, :S, :, :U]
    return shim.varying_like((q_BTNH, k_BSKH, v_BSKU), *found)


def _walk_queries(mask: Visible, noise: Noise | None, tile_q: int, whole: bool = False) -> hopper_tiles.Walk:
    """The walk of the kernels that own keys, over the queries."""
    tile = hopper_tiles.TILE
    if mask.is_interval:
        ranges = mask.ranges_by_key(tile_q, tile)
        walk = hopper_tiles.walk_ranges(mask.qfirst_RBS[0], mask.qlast_RBS[0], ranges, tile, whole)
    else:
        walk = hopper_tiles.walk_list(mask.qfirst_RBS, mask.qlast_RBS, mask.tiles_by_key(tile_q, tile), tile)
    return walk if noise is None else hopper_tiles.with_dice(walk, _seeds(noise), noise.key_S, noise.query_T, tile_q)


def _walk_keys(mask: Visible, noise: Noise | None, tile_k: int) -> hopper_tiles.Walk:
    """The walk of the kernels that own queries, over the keys."""
    tile = hopper_tiles.TILE
    if mask.is_interval:
        walk = hopper_tiles.walk_ranges(mask.first_RBT[0], mask.last_RBT[0], mask.ranges(tile, tile_k), tile)
    else:
        walk = hopper_tiles.walk_list(mask.first_RBT, mask.last_RBT, mask.tiles(tile, tile_k), tile)
    return walk if noise is None else hopper_tiles.with_dice(walk, _seeds(noise), noise.query_T, noise.key_S, tile_k)


def _seeds(noise: Noise) -> jax.Array:
    """uint32_BN2: what Threefry makes of a sequence's words and a head; it then counts by query and key."""
    word0, word1 = (word[:, None] for word in noise.words_2B)
    return jnp.stack(threefry2x32((word0, word1), (noise.head_N.astype(jnp.uint32), np.uint32(0))), axis=-1)


def _fit(x_BTNH: jax.Array, length: int) -> jax.Array:
    """Zeros added so that TMA, which copies pieces of 8 x 64, and wgmma can take it."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    return jnp.pad(x_BTNH, ((0, 0), (0, max(length - T, -T % 8)), (0, 0), (0, -H % 64)))
