"""The TPU kernels without a TPU: interpreted against the definition, and compiled for chips that are not here."""

import functools
import itertools
import operator
import re
from dataclasses import dataclass, replace
from functools import partial

import aot
import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import patterns
from pallas_kernels.attention import chunked, plain_attention, splash, tpu
from pallas_kernels.attention.flash import Noise, Scores, flash
from pallas_kernels.attention.question import Chip, Question
from pallas_kernels.attention.ring import Ring, merge, ring_attention, straight_positions, zigzag_positions
from pallas_kernels.attention.tpu_kernels import random_bits
from pallas_kernels.attention.tpu_tiles import MOST_TERMS, list_plan, range_plan, vmem_limit_bytes
from pallas_kernels.masks import Blocks, Causal, Documents, Full, Mask, Prefix, Window, bind
from pallas_kernels.threefry import threefry2x32

SMALL = tpu.Sizes(
    forward_query=128,
    forward_key=256,
    dq_query=256,
    dq_key=128,
    dkv_query=128,
    dkv_key=256,
    interpret=True,
)
STRIDED = Blocks(patterns.Strided(block=256, stride=2))
FAR = Blocks(patterns.Chosen(block=256, rows=((False, True), (False, False))))
DIAGONAL = Blocks(patterns.Chosen(block=256, rows=tuple(tuple(i == j for j in range(4)) for i in range(4))))
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(40, 3),
    "documents": Documents(),
    "causal documents": Causal() & Documents(),
    "prefix": (Causal() | Prefix()) & Documents(),
    "blocks": STRIDED & Causal(),
    "two terms": (DIAGONAL | Window(100)) & Documents(),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention call; documents end on an edge of tiles, beside one, and after one token."""

    mask: str = "causal documents"
    queries: int = 129
    keys: int | None = None
    heads: tuple[int, int] = (2, 1)
    sizes: tuple[int, int] = (64, 64)
    dtype: str = "float32"
    softcap: float | None = None
    dropout: float = 0.0

    def __str__(self) -> str:
        return ", ".join(str(value) for value in vars(self).values() if value)

    @property
    def scores(self) -> Scores:
        return Scores(self.sizes[0] ** -0.5, self.softcap, self.dropout)

    def bound(self, rows: int = 2):
        T, S = self.queries, self.keys or self.queries
        edges = np.array([1, 2, 60, 128, 129, 300, 590])
        shift = np.arange(rows)[:, None]
        query_BT, key_BS = (np.searchsorted(edges, np.arange(n)[None] + shift, side="right") + 1 for n in (T, S))
        segments = {"segments": jnp.asarray(query_BT, jnp.int32)}
        if S != T:
            segments["key_segments"] = jnp.asarray(key_BS, jnp.int32)
        prefix_BT = np.where(query_BT == query_BT[:, :1], 3, 0)
        prefix_BT = np.maximum.accumulate(prefix_BT, axis=1)
        return bind(MASKS[self.mask], T, S, **segments, prefix=jnp.asarray(prefix_BT, jnp.int32))

    def arrays(self, rows: int = 2) -> dict[str, jax.Array]:
        (N, K), (H, U), T, S = self.heads, self.sizes, self.queries, self.keys or self.queries
        shapes = {"q": (rows, T, N, H), "k": (rows, S, K, H), "v": (rows, S, K, U), "dout": (rows, T, N, U)}
        rng = np.random.default_rng(7)
        arrays = {name: jnp.asarray(rng.normal(size=shape), self.dtype) for name, shape in shapes.items()}
        return arrays | {"dlse": jnp.asarray(rng.normal(size=(rows, N, T)), jnp.float32)}

    def noise(self, rows: int = 2) -> Noise | None:
        if not self.dropout:
            return None
        words = tuple(jnp.arange(rows, dtype=jnp.uint32) + np.uint32(i) for i in (3, 2**31))
        S = self.keys or self.queries
        return Noise(words, jnp.arange(self.heads[0]) + 5, jnp.arange(self.queries) + 100, jnp.arange(S) + 1000)


NAMES = ("out", "lse", "dq", "dk", "dv")


def by_definition(case: Case, arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """In float64, of the same rounded inputs."""
    q, k, v, dout, dlse = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "v", "dout", "dlse"))
    rows, T, N, _ = q.shape
    bound, noise, keep = case.bound(rows), case.noise(rows), None
    dense = bound.dense()
    seen_BTS = np.ones((1, T, k.shape[1]), bool) if dense is None else np.asarray(dense)
    if noise is not None:
        keep_BKGTS = noise.keep(case.dropout, noise.query_T, noise.key_S, N // k.shape[2])
        keep = np.asarray(keep_BKGTS).reshape(rows, N, T, -1)
    dlse = np.where(np.any(seen_BTS, axis=-1, keepdims=True)[:, None, :, 0], dlse, 0.0)
    asked = case.scores
    settings = {"scale": asked.scale, "softcap": asked.softcap, "dropout": asked.dropout}
    found = attention_oracle.attend(q, k, v, seen_BTS, dout, dlse, keep_BNTS=keep, **settings)
    return dict(zip(NAMES, found, strict=False))


def of(attend, arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Values and gradients of attend(q, k, v) -> (out, lse)."""

    def run(q, k, v, dout, dlse):
        (out, lse), vjp = jax.vjp(attend, q, k, v)
        return (out, lse, *vjp((dout, jnp.where(jnp.isneginf(lse), 0.0, dlse))))

    return {n: np.asarray(x, np.float64) for n, x in zip(NAMES, jax.jit(run)(**arrays), strict=True)}


def kernels(case: Case, arrays: dict[str, jax.Array], sizes: tpu.Sizes = SMALL) -> dict[str, np.ndarray]:
    rows = arrays["q"].shape[0]
    visible, noise = case.bound(rows).visible(), case.noise(rows)
    return of(lambda q, k, v: flash(tpu, case.scores, sizes, q, k, v, visible, noise), arrays)


def plain(case: Case, arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    rows = arrays["q"].shape[0]
    return of(lambda q, k, v: plain_attention(q, k, v, case.bound(rows), case.noise(rows), case.scores), arrays)


def errors(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, float]:
    def largest(a: np.ndarray, b: np.ndarray) -> float:
        both = np.isneginf(a) & np.isneginf(b)
        return float(np.abs(np.where(both, 0.0, a) - np.where(both, 0.0, b)).max())

    return {name: largest(found[name], truth[name]) for name in found}


def check(case: Case, found: dict[str, np.ndarray], arrays: dict[str, jax.Array], few: bool = False) -> None:
    """few: allow also for what flash attention rounds and plain attention does not, where queries see a few keys only.

    That is out, of which delta is made (the exact gradient of a single key is close to 0), and the operands p and ds of
    products that then sum a single term, so that their errors do not average out.
    """
    truth = by_definition(case, arrays)
    allowed = errors(plain(case, arrays), truth)
    if few:
        change_BTNU = np.asarray(jnp.asarray(truth["out"], case.dtype), np.float64) - truth["out"]
        change_BNT = np.einsum("BTNU,BTNU->BNT", change_BTNU, np.asarray(arrays["dout"], np.float64))
        shifted = by_definition(case, arrays | {"dlse": np.asarray(arrays["dlse"], np.float64) - change_BNT})
        shift, eps = errors(shifted, truth), float(jnp.finfo(case.dtype).eps)
        terms = truth["lse"].shape[2] * case.heads[0]  # of a sum in dk and dv, each rounded to float32
        roundings = 0.5 if case.dtype == "bfloat16" else terms**0.5
        for name in ("dq", "dk", "dv"):
            allowed[name] += shift[name] + roundings * eps * np.abs(truth[name]).max()
    for name, error in errors(found, truth).items():
        assert error <= 2 * allowed[name] + 1e-5, (name, error, allowed[name])


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=1, heads=(4, 1), dtype="bfloat16"),
        Case(mask="causal", queries=63, keys=129, sizes=(80, 80)),
        Case(mask="window", queries=127, heads=(4, 2), sizes=(96, 32), dtype="bfloat16", softcap=3.0),
        Case(mask="window", queries=300, keys=65),
        Case(mask="documents", queries=65, heads=(2, 2), sizes=(192, 128)),
        Case(queries=1000, heads=(2, 1), dtype="bfloat16"),
        Case(mask="prefix", queries=129, sizes=(128, 128), dtype="bfloat16"),
        Case(mask="full", queries=64, keys=1000, heads=(1, 1), softcap=2.0),
        Case(mask="full", queries=1, keys=64, sizes=(256, 256), dtype="bfloat16"),
        Case(mask="blocks", queries=1000, heads=(1, 1)),
        Case(mask="two terms", queries=600, dtype="bfloat16", softcap=5.0),
        Case(queries=257, dropout=0.3),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(case: Case):
    arrays = case.arrays()
    check(case, kernels(case, arrays), arrays)


def _pairs() -> list[Case]:
    """Every two values of two settings together, in few cases."""
    settings = {
        "mask": list(MASKS),
        "queries": [1, 63, 64, 65, 127, 129, 1000],
        "keys": [None, 1, 65, 300],
        "heads": [(1, 1), (4, 1), (8, 2)],
        "sizes": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)],
        "dtype": ["float32", "bfloat16"],
        "softcap": [None, 2.0],
        "dropout": [0.0, 0.3],
    }
    wanted = {
        ((a, x), (b, y)) for a, b in itertools.combinations(settings, 2) for x in settings[a] for y in settings[b]
    }
    rng, cases = np.random.default_rng(0), []
    while wanted:
        tries = []
        for seed in sorted(wanted, key=repr)[:20]:
            chosen = {name: values[rng.integers(len(values))] for name, values in settings.items()} | dict(seed)
            covered = set(itertools.combinations(chosen.items(), 2)) & wanted
            tries.append((len(covered), len(tries), chosen, covered))
        *_, chosen, covered = max(tries)
        wanted -= covered
        cases.append(Case(**chosen))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("case", _pairs(), ids=str)
def test_all_pairs_of_settings(case: Case):
    arrays = case.arrays()
    check(case, kernels(case, arrays), arrays, few=True)


def test_memory_that_nobody_wrote_is_never_read_and_nothing_races():
    """The TPU interpreter fills it with NaN, and follows every copy."""
    case = Case(queries=300, heads=(2, 1))
    arrays = case.arrays()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(case, kernels(case, arrays, replace(SMALL, interpret=params)), arrays)


def test_a_query_that_sees_nothing_gives_zeros():
    case = Case(mask="window", queries=300, keys=65)
    found = kernels(case, case.arrays())
    blind = np.arange(300) > 64 + 40
    assert np.isneginf(found["lse"][:, :, blind]).all() and np.isfinite(found["lse"][:, :, ~blind]).all()
    assert not found["out"][:, blind].any() and not found["dq"][:, blind].any()
    assert all(np.isfinite(found[name]).all() for name in ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("listed", [False, True])
def test_tiles_outside_of_the_mask_are_not_visited(listed: bool):
    """There NaN would spread even from a product with 0."""
    case = Case(mask="blocks" if listed else "causal", queries=256, keys=1024, heads=(1, 1))
    arrays = case.arrays(1)
    poisoned = arrays | {name: arrays[name].at[:, 256:].set(jnp.nan) for name in ("k", "v")}
    clean, found = kernels(case, arrays), kernels(case, poisoned)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], clean[name], err_msg=name)
    assert not found["dk"][:, 256:].any() and not found["dv"][:, 256:].any()


def test_a_document_does_not_feel_another():
    case = Case(queries=300)
    arrays = case.arrays(1)
    changed = arrays | {name: x.at[:, 60:128].multiply(3) for name, x in arrays.items() if name != "dlse"}
    one, other = kernels(case, arrays), kernels(case, changed)
    outside = np.r_[0:60, 128:300]
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(one[name][:, outside], other[name][:, outside], err_msg=name)
        assert (one[name][:, 60:128] != other[name][:, 60:128]).any()


def test_dropout_keeps_the_elements_that_the_twin_keeps():
    """With the unit matrix as values, out is the probabilities after dropout."""
    case = Case(mask="full", queries=130, keys=256, heads=(2, 1), sizes=(64, 256), dropout=0.4)
    arrays = case.arrays() | {"v": jnp.broadcast_to(jnp.eye(256)[None, :, None], (2, 256, 1, 256))}
    noise = case.noise()
    assert noise is not None
    keep_BKGTS = np.asarray(noise.keep(case.dropout, noise.query_T, noise.key_S, 2))
    found = kernels(case, arrays)["out"]
    np.testing.assert_array_equal(np.moveaxis(found != 0, 2, 1), keep_BKGTS[:, 0])


@pytest.mark.parametrize("rolled", [False, True])
def test_random_bits_are_those_of_threefry(rolled: bool):
    key = tuple(np.array([[1], [2**32 - 1], [77]], np.uint32) * i for i in (1, 3))
    counter = (np.arange(5, dtype=np.uint32), np.arange(5, dtype=np.uint32) + 2**31)
    words = (jnp.broadcast_to(x, (3, 5)) for x in (*key, *counter))
    k0, k1, c0, c1 = words
    wanted, _ = threefry2x32((k0, k1), (c0, c1))
    np.testing.assert_array_equal(random_bits((k0, k1), (c0, c1), rolled), wanted)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents", "causal documents", "blocks", "two terms"])
@pytest.mark.parametrize("by_key", [False, True])
def test_plans_visit_what_is_seen_and_stay_at_the_last_tile(mask: str, by_key: bool):
    case = Case(mask=mask, queries=600, keys=None if "doc" in mask or "terms" in mask else 500)
    bound, tile_q, tile_k = case.bound(), 256, 128
    visible, dense = bound.visible(), bound.dense()
    seen = np.ones((1, 600, case.keys or 600), bool) if dense is None else np.asarray(dense)
    B, T, S = seen.shape
    padding = ((0, 0), (0, -T % tile_q), (0, -S % tile_k))
    tiled = np.pad(seen, padding).reshape(B, -(-T // tile_q), tile_q, -(-S // tile_k), tile_k)
    real = np.pad(np.ones_like(seen), padding).reshape(tiled.shape)
    some, every = (
        np.swapaxes(x, 1, 2) if by_key else x for x in (np.any(tiled, axis=(2, 4)), np.all(tiled | ~real, axis=(2, 4)))
    )
    inner = some.shape[2]
    if visible.is_interval:
        plan = range_plan(visible.ranges_by_key(tile_q, tile_k) if by_key else visible.ranges(tile_q, tile_k), inner)
    else:
        plan = list_plan(visible.tiles_by_key(tile_q, tile_k) if by_key else visible.tiles(tile_q, tile_k))
    words, longest = np.asarray(plan.words), 0
    for b, i in itertools.product(range(B), range(plan.outer)):
        visits = [[int(x) for x in plan.visit(words, b, i, j)] for j in range(inner + 1)]
        tiles = [tile for active, tile, _ in visits if active]
        longest = max(longest, len(tiles))
        assert tiles == sorted(set(tiles)) and set(tiles) == set(np.flatnonzero(some[b, i])), (b, i)
        assert all(every[b, i, tile] for active, tile, code in visits if active and code >> 30 & 1)
        assert all(tile == tiles[-1] for active, tile, _ in visits if tiles and not active)
        assert all(0 <= tile < inner for _, tile, _ in visits)
    assert int(plan.steps) == max(longest, 1)


def question(**changes) -> Question:
    asked = {
        "chip": Chip("tpu", "TPU v5 lite"), "dtype": "bfloat16", "mask": Causal() & Documents(), "rows": 4,
        "queries": 4096, "keys": 4096, "heads": 8, "kv_heads": 2, "head_size": 128, "value_size": 128,
    }  # fmt: skip
    return Question(**(asked | changes))


def terms(count: int) -> Mask:
    """A mask of so many."""
    shown = (Blocks(patterns.LocalGlobal(block=256, window=n, globals=0)) for n in range(count - 1))
    return functools.reduce(operator.or_, shown, Window(0) & Documents())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"mask": terms(MOST_TERMS)}, None),
        ({"mask": terms(MOST_TERMS + 1)}, "tell 10 terms apart, and the mask has 11"),
        ({"dropout": True, "softcap": True, "lse": True, "head_size": 80, "queries": 17, "dtype": "float32"}, None),
        ({"mask": STRIDED & Causal() & Documents()}, None),
        ({"chip": Chip("gpu")}, "needs a TPU"),
        ({"dtype": "float16"}, "bfloat16 or float32, not float16"),
        ({"mask": Blocks(patterns.Strided(block=192, stride=2))}, "multiple of 128, not 192"),
        ({"mask": STRIDED, "queries": 1 << 17, "keys": 1 << 17}, "scalar memory"),
        ({"mask": STRIDED & Documents(), "queries": 1 << 15, "keys": 1 << 15, "rows": 16}, "scalar memory"),
    ],
)
def test_what_the_kernels_cannot_do(changes, why):
    reason = tpu.cannot(question(**changes))
    assert reason is None if why is None else why in reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"softcap": True, "queries": 17, "keys": 17, "head_size": 192}, None),
        ({"mask": (STRIDED | Window(9)) & Causal() & Documents()}, None),
        ({"chip": Chip("cpu")}, "needs a TPU"),
        ({"dtype": "float32"}, "bfloat16, not float32"),
        ({"dropout": True}, "no dropout"),
        ({"lse": True}, "no gradient"),
        ({"keys": 17}, "same tokens"),
        ({"positions": True}, "same tokens"),
        ({"mask": Causal() | Prefix()}, "no Prefix"),
        ({"mask": Causal() | Documents()}, "Documents only beside"),
        ({"mask": FAR, "queries": 512, "keys": 512}, "sees itself"),
    ],
)
def test_what_splash_cannot_do(changes, why):
    reason = splash.cannot(question(**changes))
    assert reason is None if why is None else why in reason


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=300, heads=(4, 2)),
        Case(mask="full", queries=130, softcap=2.0, sizes=(64, 32)),
        Case(mask="window", queries=256, dtype="bfloat16"),
        Case(mask="two terms", queries=600, heads=(1, 1)),
    ],
    ids=str,
)
def test_splash_is_attention_by_definition(case: Case):
    arrays = case.arrays()
    sizes = splash.Sizes(query=128, key=256, interpret=True)

    def attend(q, k, v):
        return splash.attend(q, k, v, case.bound(), case.scores, sizes), jnp.zeros(())

    def run(q, k, v, dout, dlse):
        (out, _), vjp = jax.vjp(attend, q, k, v)
        return (out, *vjp((dout, jnp.zeros(()))))

    names = ("out", "dq", "dk", "dv")
    found = {n: np.asarray(x, np.float64) for n, x in zip(names, jax.jit(run)(**arrays), strict=True)}
    check(case, found, arrays | {"dlse": jnp.zeros_like(arrays["dlse"])})


# The ring.


def test_zigzag_positions_cover_the_sequence_once():
    ranks = [np.asarray(zigzag_positions(rank, 4, 6)) for rank in range(4)]
    assert sorted(np.concatenate(ranks)) == list(range(24))
    assert list(ranks[1]) == [3, 4, 5, 18, 19, 20] and all((np.diff(rank) > 0).all() for rank in ranks)
    with pytest.raises(ValueError, match="even length per device, not 5"):
        zigzag_positions(0, 2, 5)


def test_merged_halves_are_the_whole():
    case = Case(mask="window", queries=120, keys=65)  # some queries see nothing, or only one half
    arrays = case.arrays()
    mask, T, S = MASKS["window"], 120, 65
    position_S = jnp.arange(S)

    def half(q, k, v, part):
        bound = bind(mask, T, part.size, positions=jnp.arange(T), key_positions=position_S[part])
        return plain_attention(q, k[:, part], v[:, part], bound, None, case.scores)

    def merged(q, k, v):
        return merge(*half(q, k, v, np.arange(30)), *half(q, k, v, np.arange(30, 65)))

    wanted = plain(case, arrays)
    assert np.isneginf(wanted["lse"]).any()
    for name, error in errors(of(merged, arrays), wanted).items():
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("mask", "kernel", "positions", "ranks", "dropout"),
    [
        (Causal(), chunked, zigzag_positions, 4, 0.0),
        (Causal() & Documents(), chunked, zigzag_positions, 4, 0.0),
        (Window(70, 20) & Documents(), chunked, straight_positions, 4, 0.0),
        (Causal() & Documents(), chunked, zigzag_positions, 2, 0.3),
        (Causal(), chunked, zigzag_positions, 1, 0.0),
        (Causal() & Documents(), tpu, zigzag_positions, 4, 0.0),
    ],
)
def test_a_ring_is_attention_on_one_device(mask, kernel, positions, ranks: int, dropout: float):
    case = Case(queries=256, heads=(2, 1), sizes=(32, 16), dropout=dropout)
    arrays, noise = case.arrays(), case.noise()
    if noise is not None:  # positions are the ring's
        noise = noise._replace(query_T=jnp.arange(256), key_S=jnp.arange(256))
    segment_BT = case.bound().query_segment_BT
    bound = bind(mask, 256, segments=segment_BT)
    wanted = of(lambda q, k, v: plain_attention(q, k, v, bound, noise, case.scores), arrays)

    sizes = SMALL if kernel is tpu else chunked.Sizes(32, 48)
    ring = Ring("c", mask, case.scores, kernel, sizes, positions)
    order = np.concatenate([np.asarray(positions(rank, ranks, 256 // ranks)) for rank in range(ranks)])
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("c",))
    time, rows = P(None, "c"), P(None, None, "c")

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(time,) * 4, out_specs=(time, rows), check_vma=False
    )  # interpreters know no manual axes
    def sharded(q, k, v, segment_BT):
        return ring_attention(ring, q, k, v, segment_BT=segment_BT, noise=noise)

    def attend(q, k, v):
        out, lse = sharded(*(x[:, order] for x in (q, k, v, segment_BT)))
        return out[:, np.argsort(order)], lse[:, :, np.argsort(order)]

    for name, error in errors(of(attend, arrays), wanted).items():
        assert error < 1e-5, (name, error)


# Compiled for chips that are not here.

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
USUAL = [("v5e", 64), ("v5e", 256), ("v5p", 128), ("v6e", 128)]
COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def compiled(chip: str, asked: Question, attend, out_specs, axis: int = 0, check_vma: bool = True) -> str:
    """The program of attend(q, k, v, segments) and its gradient, on four chips, sharded along an axis of q."""
    mesh = Mesh(np.array(aot.tpu_devices(CHIPS[chip])).reshape(4), ("d",))
    along = P(*(None,) * axis, "d")

    def both(q, k, v, segments):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
        return out, *vjp(jax.tree.map(lambda x: x * 2, out))

    def shape(heads: int, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((asked.rows, asked.queries, heads, size), asked.dtype, sharding=sharding)

    sharding = NamedSharding(mesh, along)
    outs = (out_specs, along, along, along)
    program = jax.shard_map(both, mesh=mesh, in_specs=(along,) * 4, out_specs=outs, check_vma=check_vma)
    q, k = shape(asked.heads, asked.head_size), shape(asked.kv_heads, asked.head_size)
    segments = jax.ShapeDtypeStruct((asked.rows, asked.queries), jnp.int32, sharding=sharding)
    v = shape(asked.kv_heads, asked.value_size)
    text = jax.jit(program).lower(q, k, v, segments).compile().as_text()
    assert text is not None
    return text


def compiled_kernels(chip: str, sizes: tpu.Sizes | None = None, softcap: float | None = None, **changes) -> str:
    changes["softcap"] = softcap is not None
    asked = question(chip=Chip("tpu", aot.tpu_devices(CHIPS[chip])[0].device_kind), queries=2048, keys=2048, **changes)
    scores = Scores(0.1, softcap, 0.1 if asked.dropout else 0.0)
    assert tpu.cannot(asked) is None

    def attend(q, k, v, segments):
        visible = bind(asked.mask, asked.queries, segments=segments).visible()
        words = tuple(segments[:, i].astype(jnp.uint32) for i in (0, 1))
        noise = Noise(words, jnp.arange(asked.heads), jnp.arange(2048), jnp.arange(2048)) if asked.dropout else None
        return flash(tpu, scores, sizes or tpu.default_sizes(asked), q, k, v, visible, noise)

    return compiled(chip, asked, attend, (P("d"), P("d")))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("chip", "head"),
    [
        pytest.param(chip, head, marks=() if (chip, head) in USUAL else pytest.mark.slow)
        for chip in CHIPS
        for head in (64, 128, 256)
    ],
)
def test_forward_and_backward_compile_within_the_vmem_of_every_chip(chip: str, head: int):
    text = compiled_kernels(chip, head_size=head, value_size=head)
    assert text.count('custom_call_target="tpu_custom_call"') == 3 and not COLLECTIVE.findall(text)


@pytest.mark.aot
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": (STRIDED | Window(100)) & Documents(), "softcap": 30.0, "head_size": 80, "value_size": 96},
        pytest.param({"dropout": True, "mask": Causal()}, marks=pytest.mark.slow),
        pytest.param(
            {"dtype": "float32", "head_size": 256, "value_size": 256, "softcap": 30.0}, marks=pytest.mark.slow
        ),
    ],
    ids=["lists", "dropout", "float32"],
)
def test_every_feature_compiles_for_the_smallest_chip(changes):
    text = compiled_kernels("v5e", **changes)
    assert text.count('custom_call_target="tpu_custom_call"') == 3 and not COLLECTIVE.findall(text)


@pytest.mark.aot
def test_the_compiler_enforces_the_vmem_limit_that_sizes_respect():
    kinds = ("TPU v5 lite", "TPU v5", "TPU v6 lite")
    assert [vmem_limit_bytes(kind) >> 20 for kind in kinds] == [16, 16, 32]
    smaller = tpu.default_sizes(question(head_size=256, value_size=256, softcap=True, dtype="float32"))
    assert smaller.dkv_query * smaller.dkv_key < 1024 * 1024
    small = dict.fromkeys(("forward_query", "forward_key", "dq_query", "dq_key"), 128)
    with pytest.raises(Exception, match=r"memory space vmem"):
        compiled_kernels("v5e", sizes=tpu.Sizes(dkv_query=2048, dkv_key=2048, **small))


@pytest.mark.aot
@pytest.mark.parametrize(
    "mask", [Causal() & Documents(), (STRIDED | Window(100)) & Causal()], ids=["documents", "blocks"]
)
def test_splash_compiles_on_four_chips(mask):
    asked = question(queries=2000, keys=2000, mask=mask, head_size=192)

    def attend(q, k, v, segments):
        return splash.attend(q, k, v, bind(mask, 2000, segments=segments), Scores(0.1, 20.0))

    text = compiled("v5e", asked, attend, P("d"), check_vma=False)  # splash does not say over which axes it varies
    assert text.count('custom_call_target="tpu_custom_call"') == 3 and not COLLECTIVE.findall(text)


@pytest.mark.slow
@pytest.mark.aot
def test_a_ring_on_four_chips_only_passes_on():
    asked = question(chip=Chip("tpu", "TPU v5"), queries=4096, keys=4096)
    ring = Ring("d", asked.mask, Scores(0.1), tpu, tpu.default_sizes(asked))

    def attend(q, k, v, segments):
        return ring_attention(ring, q, k, v, segment_BT=segments)

    text = compiled("v5p", asked, attend, (P(None, "d"), P(None, None, "d")), axis=1)
    assert set(COLLECTIVE.findall(text)) == {"collective-permute"}
