"""The contract of attention, by every backend that runs anywhere; which backend is taken, and what is refused."""

import dataclasses
import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import aot
import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

from benchmarks import kernel_table
from mtx import decode, hlo
from mtx.attention import AttentionConfig, choose_backend
from mtx.config import checks, loading
from mtx.errors import ConfigError
from mtx.spmd import Compiled, Manual
from pallas_kernels import attention as door
from pallas_kernels.attention import LSE, OUT, Chip, Dropout, Unable, chunked, cudnn, flash_attention, sizes
from pallas_kernels.attention.flash import Noise
from pallas_kernels.masks import FAR, Blocks, BoundMask, Causal, Documents, Full, Mask, Prefix, Window, bind
from pallas_kernels.patterns import BigBird, Chosen, LocalGlobal
from pallas_kernels.visible import MOST_TERMS

CPU = Chip("cpu")
H200, A100, T4 = (
    Chip("gpu", "NVIDIA H200", 9.0),
    Chip("gpu", "NVIDIA A100-SXM4-80GB", 8.0),
    Chip("gpu", "Tesla T4", 7.5),
)
V5P = Chip("tpu", "TPU v5")
PACKED = Causal() & Documents()
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Window(5, 2),
    "causal window": Causal() & Window(100),
    "packed": PACKED,
    "bidirectional": Documents(),
    "prefix": (Causal() | Prefix()) & Documents(),
    "blocks": Blocks(LocalGlobal(block=32, window=0)) & Causal(),
    "either": Window(3) | Prefix(),
    "bigbird packed": Blocks(BigBird(block=16, random=1)) & PACKED,
}


class Case(NamedTuple):
    backend: str
    mask: str
    lengths: tuple[int, int]
    sizes: tuple[int, int]
    """H, U"""
    heads: tuple[int, int]
    """N, K"""
    extra: str
    dtype: str

    def __str__(self) -> str:
        return "-".join(str(x).replace(" ", "") for x in self)


def pairwise(factors: tuple[tuple, ...]) -> list[Case]:
    """A greedy cover of all pairs of values."""
    cases = [Case(*values) for values in itertools.product(*factors)]
    missing = {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}
    chosen, random = [], np.random.default_rng(0)
    while missing:
        some = [cases[i] for i in random.integers(0, len(cases), 300)]
        best = max(some, key=lambda case: len(missing & {*itertools.combinations(enumerate(case), 2)}))
        chosen.append(best)
        missing -= {*itertools.combinations(enumerate(best), 2)}
    return chosen


FACTORS = (
    ("chunked",),
    tuple(MASKS),
    ((1, 1), (63, 63), (64, 64), (65, 65), (127, 127), (129, 129), (129, 65), (1, 63), (64, 129)),
    ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)),
    ((2, 2), (4, 1), (6, 2)),
    ("", "softcap", "sinks", "dropout"),
    ("float32", "bfloat16"),
)


def cover(lengths: tuple[tuple[int, int], ...]) -> list[Case]:
    """All pairs of these lengths and the other factors.

    Of one token plain attention is almost exact in bfloat16 too, and delta from a rounded `out` is not: float32.
    """
    cases = pairwise((*FACTORS[:2], lengths, *FACTORS[3:]))
    return [case._replace(dtype="float32") if 1 in case.lengths else case for case in cases]


DEFAULT = cover(((1, 1), (64, 64), (65, 65), (127, 127), (129, 65), (1, 63), (64, 129)))
EVERY_LENGTH = [case for case in cover(FACTORS[2]) if case not in DEFAULT]
PLAIN = [case._replace(backend="plain", dtype="float32") for case in DEFAULT[::6]]


def inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    (T, S), (H, U), (N, K), B = case.lengths, case.sizes, case.heads, 2
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, U), "dout": (B, T, N, U), "dlse": (B, N, T)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["sinks"] = random.standard_normal(N).astype(np.float32)
    return arrays


def bound(case: Case, seed: int = 0):
    """Documents of every length from 1, borders anywhere; padding at the end of the first row."""
    random, (T, S) = np.random.default_rng(seed), case.lengths
    segments, key_segments = (1 + np.cumsum(random.random((2, n)) < 0.1, axis=1) for n in (T, S))
    segments[0, T - T // 4 :] = 0
    prefix = np.maximum.accumulate(np.where(random.random((2, T)) < 0.1, np.minimum(np.arange(T) + 9, S), 0), axis=1)
    given = {} if T == S else {"key_segments": jnp.asarray(key_segments)}
    return bind(MASKS[case.mask], T, S, segments=jnp.asarray(segments), prefix=jnp.asarray(prefix), **given)


SOFTCAP, RATE = 3.0, 0.3


BFLOAT16 = 2e-2
"""What plain attention in bfloat16 may be off by, at most: else it could excuse anything."""


def check(case: Case) -> None:
    given, mask = inputs(case), bound(case)
    dtype, N, (T, S) = jnp.dtype(case.dtype), case.heads[0], case.lengths
    rounded = {name: jnp.asarray(x, dtype if name in ("q", "k", "v", "dout") else None) for name, x in given.items()}
    words = (jnp.asarray([3, 4], jnp.uint32), jnp.asarray([5, 6], jnp.uint32))
    dropout = Dropout(RATE, words, jnp.arange(N)) if case.extra == "dropout" else None
    softcap = SOFTCAP if case.extra == "softcap" else None
    keep = None
    if dropout is not None:
        noise = Noise(words, jnp.arange(N), jnp.arange(T), jnp.arange(S))
        keeps = jax.jit(Noise.keep, static_argnums=(1, 4))
        keep = np.asarray(keeps(noise, RATE, np.arange(T), np.arange(S), N // case.heads[1])).reshape(2, N, T, S)
    dense = jax.jit(BoundMask.dense)(mask)
    wanted = oracle.attend(
        rounded["q"],
        rounded["k"],
        rounded["v"],
        np.ones((1, T, S), bool) if dense is None else np.asarray(dense),
        rounded["dout"],
        given["dlse"],
        scale=case.sizes[0] ** -0.5,
        softcap=softcap,
        sinks_N=given["sinks"] if case.extra == "sinks" else None,
        keep_BNTS=keep,
        dropout=RATE if keep is not None else 0.0,
    )

    def run(backend: str, dtype) -> list[np.ndarray]:
        def attend(q, k, v, sinks):
            return flash_attention(
                q,
                k,
                v,
                mask,
                softcap=softcap,
                sinks_N=sinks if case.extra == "sinks" else None,
                dropout=dropout,
                backend=backend,
                sizes=chunked.Sizes(32, 48) if backend == "chunked" else None,
                with_lse=True,
            )

        @jax.jit
        def whole(q, k, v, sinks, dout, dlse):
            found, back = jax.vjp(attend, q, k, v, sinks)
            return *found, *back((dout, dlse))

        cast = [rounded[name].astype(dtype) for name in ("q", "k", "v")]
        with jax.default_matmul_precision("highest"):
            out = whole(*cast, rounded["sinks"], rounded["dout"].astype(dtype), rounded["dlse"])
        return [np.asarray(x, np.float64) for x in out]

    wanted_lse = np.where(np.isfinite(wanted.lse_BNT), wanted.lse_BNT, -np.inf)
    found = run(case.backend, dtype)
    simple = run("plain", dtype) if case.dtype == "bfloat16" and case.backend != "plain" else found
    for name, x, y, z in zip(wanted._fields, found, simple, wanted._replace(lse_BNT=wanted_lse), strict=True):
        if name == "dsinks_N" and case.extra != "sinks":
            continue
        allowed = 1e-5
        if case.dtype == "bfloat16":
            assert oracle.error(y, z) <= BFLOAT16, f"{name}: plain itself is off by {oracle.error(y, z):.1e}"
            allowed += 2 * oracle.error(y, z)
            if name == "dsinks_N":  # a sum over all queries of terms that cancel, made of an `out` that is rounded
                allowed = BFLOAT16
        assert oracle.error(x, z) <= allowed, f"{name}: off by {oracle.error(x, z):.1e}, more than {allowed:.1e}"


@pytest.mark.parametrize("case", [*DEFAULT, *PLAIN], ids=str)
def test_contract(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_LENGTH, ids=str)
def test_contract_of_every_length(case: Case):
    check(case)


@pytest.mark.parametrize(
    "mask",
    [
        "packed",
        "bigbird packed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MASKS if "packed" not in name),
    ],
)
def test_contract_of_a_thousand(mask: str):
    check(Case("chunked", mask, (1000, 1000), (64, 64), (2, 1), "", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_contract_at_random(seed: int):
    random = np.random.default_rng(seed)
    check(Case(*(values[random.integers(len(values))] for values in FACTORS)))


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given_by(
    borders=st.lists(st.lists(st.integers(1, 47), max_size=6), min_size=2, max_size=2),
    blocks=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=6, max_size=6),
)
def test_any_packing_and_any_blocks(borders: list[list[int]], blocks: list[list[bool]]):
    """Documents of any lengths, and any matrix of blocks of 8, by tiles of 12 x 20."""
    case = LONG._replace(lengths=(48, 48), sizes=(8, 8))
    given, segments = inputs(case), 1 + np.stack([np.sum(np.arange(48)[:, None] >= sorted(row), 1) for row in borders])
    pattern = Chosen(block=8, rows=tuple(map(tuple, blocks)))
    mask = bind(PACKED & Blocks(pattern), 48, segments=jnp.asarray(segments))
    seen = (segments[:, :, None] == segments[:, None]) & np.tri(48, dtype=bool) & np.kron(blocks, np.ones((8, 8), bool))
    arrays = [given[name] for name in ("q", "k", "v", "dout", "dlse")]
    q, k, v, dout, dlse = arrays
    wanted = oracle.attend(q, k, v, seen, dout, dlse, scale=8**-0.5)
    attend = partial(flash_attention, mask=mask, backend="chunked", sizes=chunked.Sizes(12, 20), with_lse=True)
    found, back = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    for x, y in zip((*found, *back((dout, dlse))), wanted, strict=False):
        assert oracle.error(np.asarray(x), y) <= 1e-5


LONG = Case("chunked", "packed", (96, 96), (64, 64), (4, 2), "", "float32")


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_no_document_touches_another(backend: str):
    """Bit by bit: tokens of the second document change, those of the first and third do not."""
    given = {name: jnp.asarray(x) for name, x in inputs(LONG).items()}
    segments = jnp.asarray(np.repeat([[1, 2, 3]], [40, 30, 26], axis=1).repeat(2, 0))
    mask, sizes = bind(PACKED, 96, segments=segments), chunked.Sizes(32, 32) if backend == "chunked" else None

    @jax.jit
    def run(q, k, v, dout):
        attend = partial(flash_attention, mask=mask, backend=backend, sizes=sizes)
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(dout)

    arrays = [given[name] for name in ("q", "k", "v", "dout")]
    before = run(*arrays)
    after = run(*(x.at[:, 40:70].multiply(3.0) for x in arrays))
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x[:, :40], y[:, :40])
        np.testing.assert_array_equal(x[:, 70:], y[:, 70:])
        assert (x[:, 40:70] != y[:, 40:70]).any()


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_keys_that_nobody_sees_may_hold_anything(backend: str):
    given = {name: jnp.asarray(x) for name, x in inputs(LONG._replace(lengths=(64, 96))).items()}
    mask, sizes = bind(Causal(), 64, 96), chunked.Sizes(32, 40) if backend == "chunked" else None

    def run(k, v):
        attend = partial(flash_attention, mask=mask, backend=backend, sizes=sizes, with_lse=True)
        found, back = jax.vjp(attend, given["q"], k, v)
        return *found, *back((given["dout"], given["dlse"]))

    clean = run(given["k"], given["v"])
    spoiled = run(*(given[name].at[:, 64:].set(jnp.nan) for name in ("k", "v")))
    for x, y in zip(clean, spoiled, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (spoiled[3][:, 64:] == 0).all() and (spoiled[4][:, 64:] == 0).all()


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_keys_that_a_pattern_hides_may_hold_anything(backend: str):
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))
    mask = bind(Blocks(Chosen(block=32, rows=((True, False, True),) * 3)), 96)
    clean = flash_attention(q, k, v, mask, backend=backend)
    k, v = (x.at[:, 32:64].set(jnp.nan) for x in (k, v))
    spoiled = flash_attention(q, k, v, mask, backend=backend)
    np.testing.assert_array_equal(clean, spoiled)


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_a_sink_of_minus_infinity_is_none(backend: str):
    """Queries that see nothing among them."""
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))
    mask = bind(Blocks(Chosen(block=32, rows=((False,) * 3, (True,) * 3, (True,) * 3))), 96)

    def attend(q, k, v, *sinks):
        sinks_N = sinks[0] if sinks else None
        return flash_attention(q, k, v, mask, backend=backend, sinks_N=sinks_N, with_lse=True)

    def run(*arrays):
        found, back = jax.vjp(attend, *arrays)
        return *found, *back((jnp.ones_like(found[0]), jnp.zeros_like(found[1])))

    wanted, (*found, dsinks_N) = run(q, k, v), run(q, k, v, jnp.full(4, -jnp.inf))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert (found[0][:, :32] == 0).all() and (dsinks_N == 0).all()


def test_a_cached_query_that_sees_nothing_gets_nothing():
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))
    mask = bind(Blocks(Chosen(block=32, rows=((False,) * 3, (True,) * 3, (True, True, False)))), 96)
    seen_BTS, scores = mask.dense(), door.Scores(0.125)
    assert seen_BTS is not None
    wanted = flash_attention(q, k, v, mask, scale=0.125, backend="plain", with_lse=True)
    for x, y in zip(door.cached_attention(q, k, v, seen_BTS, scores), wanted, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (wanted[0][:, :32] == 0).all()


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_large_and_equal_scores(backend: str):
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))
    mask = bind(Causal(), 96)
    huge = flash_attention(500 * q, k, v, mask, backend=backend)
    assert np.isfinite(huge).all()
    same = flash_attention(q, jnp.zeros_like(k), v, mask, backend=backend)
    mean = np.cumsum(v, axis=1) / np.arange(1, 97)[:, None, None]
    np.testing.assert_allclose(same, np.repeat(mean, 2, axis=2), atol=1e-5)


def test_explicit_positions_are_shards_of_a_ring():
    """Two shards of queries and keys, zig-zag, merged by their lse, are the whole."""
    given = {name: jnp.asarray(x) for name, x in inputs(LONG).items()}
    segments = jnp.asarray(np.repeat([[1, 2]], [50, 46], axis=1).repeat(2, 0))
    whole = flash_attention(given["q"], given["k"], given["v"], bind(PACKED, 96, segments=segments))
    shards = [np.r_[0:24, 72:96], np.r_[24:72]]
    for mine in shards:
        parts = []
        for theirs in shards:
            mask = bind(
                PACKED,
                48,
                segments=segments[:, mine],
                key_segments=segments[:, theirs],
                positions=jnp.asarray(mine),
                key_positions=jnp.asarray(theirs),
            )
            q, k, v = given["q"][:, mine], given["k"][:, theirs], given["v"][:, theirs]
            parts.append(flash_attention(q, k, v, mask, backend="chunked", with_lse=True))
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        merged = sum(out * jnp.swapaxes(jnp.exp(part - lse), 1, 2)[..., None] for out, part in parts)
        np.testing.assert_allclose(merged, whole[:, mine], atol=2e-6)


def test_a_policy_that_saves_both_runs_no_kernel_twice():
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))

    def loss(q, k, v):
        return jnp.sum(flash_attention(q, k, v, bind(Causal(), 96), backend="chunked") ** 2)

    def loops(*saved: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        return (
            jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy)))
            .lower(q, k, v)
            .as_text()
            .count("stablehlo.while")
        )

    each = jax.jit(loss).lower(q, k, v).as_text().count("stablehlo.while")
    assert each == 2
    assert loops(OUT, LSE) == 2 * each
    assert loops(OUT) == loops(LSE) == loops() == 3 * each


# The choice.


def asked(**changes) -> door.Question:
    given = {
        "chip": CPU,
        "dtype": "bfloat16",
        "mask": Causal(),
        "rows": 1,
        "queries": 1024,
        "keys": 1024,
        "heads": 8,
        "kv_heads": 8,
        "head_size": 128,
        "value_size": 128,
    }
    return door.Question(**given | changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"queries": 256, "keys": 256}, "plain"),
        ({}, "chunked"),
        ({"chip": H200}, "cudnn"),
        ({"chip": A100}, "cudnn"),
        ({"chip": T4}, "chunked"),
        ({"chip": H200, "mask": Causal() & Window(99)}, "cudnn"),
        ({"chip": H200, "mask": Window(99)}, "cudnn"),
        ({"chip": H200, "mask": Window(99, 99)}, "hopper"),
        ({"chip": H200, "mask": PACKED}, "hopper"),
        ({"chip": H200, "softcap": True}, "hopper"),
        ({"chip": H200, "lse": True}, "hopper"),
        ({"chip": A100, "mask": PACKED}, "chunked"),
        ({"chip": H200, "dtype": "float32"}, "chunked"),
        ({"chip": V5P}, "splash"),
        ({"chip": V5P, "mask": PACKED}, "tpu"),
        ({"chip": V5P, "dropout": True}, "tpu"),
        ({"chip": V5P, "mask": Causal() | Prefix()}, "tpu"),
        ({"chip": V5P, "lse": True}, "tpu"),
    ],
    ids=str,
)
def test_the_first_able_backend_is_taken(changes: dict, wanted: str):
    assert door.choose("auto", asked(**changes)) == wanted


@pytest.mark.parametrize(
    ("backend", "changes", "why"),
    [
        ("cudnn", {}, "NVIDIA GPU; use backend=chunked"),
        ("cudnn", {"chip": T4}, "compute capability 8.0, and Tesla T4 has 7.5"),
        ("cudnn", {"chip": H200, "mask": PACKED}, "of masks it knows Full, Causal and Window.*; use backend=hopper"),
        ("cudnn", {"chip": H200, "dropout": True}, "no dropout"),
        ("cudnn", {"chip": A100, "head_size": 192, "value_size": 192}, "multiple of 8 up to 128"),
        ("hopper", {"chip": A100}, "Hopper"),
        ("hopper", {"chip": H200, "dtype": "float32"}, "bfloat16"),
        ("splash", {"chip": H200}, "TPU"),
        ("splash", {"chip": V5P, "dropout": True}, "dropout.*; use backend=tpu"),
        ("tpu", {}, "TPU"),
    ],
    ids=str,
)
def test_a_demanded_backend_refuses_what_it_cannot_do(backend: str, changes: dict, why: str):
    with pytest.raises(Unable, match=rf"backend={backend} cannot do this: .*{why}"):
        door.choose(backend, asked(**changes))


@pytest.mark.parametrize("mask", [Window(9), Causal() & Window(9), Window(9, 2) & Causal()], ids=str)
def test_cudnn_gets_windows_beside_its_causal_mask(mask: Mask, monkeypatch: pytest.MonkeyPatch):
    """Without it, it has no windows; what it is given is what plain JAX needs for the same mask."""
    as_xla, given = jax.nn.dot_product_attention, []

    def recorded(*arrays, implementation: str, **options):
        assert implementation == "cudnn"
        given.append(options)
        return as_xla(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q, k, v = (jnp.asarray(inputs(LONG)[name]) for name in ("q", "k", "v"))
    found = cudnn.attend(q, k, v, bind(mask, 96), door.Scores(0.125))
    assert given == [{"scale": 0.125, "is_causal": True, "local_window_size": (9, 0)}]
    np.testing.assert_allclose(found, flash_attention(q, k, v, bind(mask, 96), scale=0.125), atol=1e-5)


def test_too_many_terms_are_refused_where_they_would_be_bits():
    mask = Window(0) | Prefix()
    for window in range(MOST_TERMS):
        mask = mask | Blocks(LocalGlobal(window=window, globals=0))
    for chip, backend, most in ((H200, "hopper", 30), (V5P, "tpu", 10)):
        with pytest.raises(Unable, match=f"tell {most} terms apart, and the mask has 32; use backend=chunked"):
            door.choose(backend, asked(chip=chip, mask=mask))


def test_sizes_are_the_nearest_tuned_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the same kind, dtype and heads; never where dropout or a soft-cap needs room that was not tuned for."""
    entry = {"backend": "chunked", "dtype": "bfloat16", "head_size": 128, "value_size": 128}
    rows = [entry | {"queries": n, "sizes": {"q": n, "k": 64}} for n in (512, 2048)]
    (tmp_path / "sizes.json").write_text(json.dumps({"cpu": rows}))
    monkeypatch.setattr(sizes, "TABLE", tmp_path / "sizes.json")
    sizes._table.cache_clear()
    chip, default = Chip("cpu", "cpu"), chunked.default_sizes(asked())
    for changes, wanted in (
        ({"queries": 256}, default),
        ({"queries": 1024}, chunked.Sizes(512, 64)),
        ({"queries": 4096}, chunked.Sizes(2048, 64)),
        ({"head_size": 64}, default),
        ({"dtype": "float32"}, default),
        ({"dropout": True}, default),
        ({"softcap": True}, default),
    ):
        assert sizes.sizes_for(chunked, asked(chip=chip, **changes)) == wanted, changes
    sizes._table.cache_clear()


def test_a_refusal_names_the_field():
    config = AttentionConfig(heads=8, backend="cudnn")
    with pytest.raises(ConfigError, match=r"model.attention.backend=cudnn cannot do this: .*, or auto."):
        choose_backend(config, H200, "bfloat16", 128, PACKED, rows=1, time=256, dropout=0.0)


def test_a_slow_backend_is_said_loudly_on_accelerators(caplog: pytest.LogCaptureFixture):
    door.choose.cache_clear()
    door._say_once.cache_clear()
    with caplog.at_level("INFO", "mtx"):
        for _ in range(2):
            door.choose("auto", asked(chip=A100, mask=PACKED))
        door.choose("auto", asked(chip=H200))
    slow, quick = caplog.records
    assert slow.levelname == "WARNING" and quick.levelname == "INFO"
    assert "attention: chunked (not cudnn: of masks it knows" in slow.message and "not hopper: " in slow.message
    assert quick.message == "attention: cudnn"


def test_what_nothing_can_do_is_refused():
    q, words = jnp.zeros((1, 4, 4, 8)), (jnp.zeros(1, jnp.uint32),) * 2
    for softcap in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"softcap=.* must be positive"):
            flash_attention(q, q, q, bind(Full(), 4), softcap=softcap)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"rate=.* must be at least 0 and below 1"):
            flash_attention(q, q, q, bind(Full(), 4), dropout=Dropout(rate, words, jnp.arange(4)))


def test_shapes_that_do_not_fit_are_refused():
    q = jnp.zeros((1, 4, 4, 8))
    with pytest.raises(ValueError, match="K divide N"):
        flash_attention(q, q[:, :, :3], q[:, :, :3], bind(Causal(), 4))
    with pytest.raises(ValueError, match=r"scale=0\.0 must be positive"):
        flash_attention(q, q, q, bind(Causal(), 4), scale=0.0)
    with pytest.raises(ValueError, match="bound to 5 queries and 5 keys; q has 4, k has 4"):
        flash_attention(q, q, q, bind(Causal(), 5))


# In the train step.


def test_what_a_config_says_is_the_mask():
    config = AttentionConfig(heads=1, window=4)
    assert config.mask(causal=True, documents=False) == Window(3)
    assert config.mask(causal=False, documents=True) == Window(3, 3) & Documents()
    both = AttentionConfig(heads=1, pattern=LocalGlobal())
    assert both.mask(causal=False, documents=False) == Blocks(LocalGlobal())
    assert both.mask(causal=True, documents=True) == Causal() & Documents() & Blocks(LocalGlobal())
    assert AttentionConfig(heads=1).mask(causal=False, documents=False) == Full()


def test_a_window_that_is_too_wide_is_refused():
    assert not list(AttentionConfig(heads=1, window=FAR).check())
    assert dict(AttentionConfig(heads=1, window=FAR + 1).check()) == {
        "window": "must be at most 1073741824; None sees all"
    }


def test_a_pattern_that_ends_is_decoded_to_its_end_and_not_beyond():
    """Slots are powers of two: more than there are positions. A matrix of all blocks is no pattern at all."""
    whole = dataclasses.replace(toys.LLAMA, attention=AttentionConfig(heads=16, kv_heads=8))
    rows = ((True,) * 3,) * 3
    ends = dataclasses.replace(
        whole, attention=dataclasses.replace(whole.attention, pattern=Chosen(block=4, rows=rows))
    )
    found, wanted = (
        decode.generate(p, p.init(0).params, [[1, 2, 3, 4, 5, 6]], tokens=6, sampling=decode.Sampling(temperature=0))
        for p in map(toys.program, (ends, whole))
    )
    assert found == wanted and len(found[0]) == 6
    with pytest.raises(ConfigError, match=r"a prompt of 6 tokens and 7 new ones do not fit the 12 positions"):
        decode.refuse(toys.program(ends), [6], 7, decode.Sampling())


def test_a_pattern_that_ends_before_the_sequence_is_refused():
    config = loading.load(Path(__file__).parent.parent / "configs" / "quickstart.py").config
    pattern = Chosen(block=32, rows=((True,) * 3,) * 3)
    attention = dataclasses.replace(config.model.attention, pattern=pattern)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
    with pytest.raises(ConfigError, match=r"sequence_length=128 is longer than the 96 .*=96, or .*pattern.block=43"):
        checks.check(config)


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        pytest.param((1, 2, 4), {"zero": 1}, marks=pytest.mark.slow),
        ((2, 2, 2), {"zero": 3, "sequence_parallel": True}),
        pytest.param((1, 4, 2), {"zero": 2, "partition": Compiled()}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_kernel_in_the_train_step_equals_plain_attention(mesh, how: dict, monkeypatch: pytest.MonkeyPatch):
    """The TPU kernels, interpreted, where a run has them: in shard_map, scanned, rematerialised, with dropout."""
    from pallas_kernels.attention import tpu

    monkeypatch.setattr(tpu, "cannot", lambda asked: None)
    monkeypatch.setattr(tpu, "default_sizes", lambda asked: INTERPRETED)
    INTERPRETED = tpu.Sizes(
        **{f"{kernel}_{side}": 128 for kernel in ("forward", "dq", "dkv") for side in ("query", "key")}
    )
    INTERPRETED = dataclasses.replace(INTERPRETED, interpret=True)
    door.choose.cache_clear()
    attention = dataclasses.replace(toys.ODD.attention, pattern=None)
    model = toys.dropped(dataclasses.replace(toys.ODD, attention=attention, remat="full"), 0.2)
    of = lambda backend: dataclasses.replace(model, attention=dataclasses.replace(attention, backend=backend))  # noqa: E731
    weights, arrays = toys.weights_of(model), toys.batch(8)  # interpreted, each row takes its time
    wanted, sums = toys.gradients(toys.program(of("plain")), weights, arrays)
    found, found_sums = toys.gradients(toys.program(of("tpu"), mesh, **how), weights, arrays, 2)
    np.testing.assert_allclose(found_sums, sums, rtol=1e-5)
    toys.check_close(found, wanted, 1e-5)
    door.choose.cache_clear()


def collectives(backend: str, devices: list, mesh: tuple[int, int, int], partition, dtype=jnp.bfloat16) -> Counter:
    attention = AttentionConfig(heads=8, kv_heads=4, head_size=128, backend=backend)
    model = dataclasses.replace(toys.LLAMA, attention=attention, width=256)
    p = toys.program(model, mesh, compute=dtype, devices=devices, partition=partition)
    text = p.lower_train_step(2, 8, 256).compile().as_text()
    found = hlo.collectives(text, dict(p.mesh.shape))
    return Counter((c.kind, c.axes, c.dtype, c.bytes, len(c.loops)) for c in found)


@pytest.mark.parametrize(
    ("backend", "partition"),
    [
        ("chunked", Manual()),
        ("chunked", Compiled()),
        *(
            pytest.param(backend, partition, marks=[pytest.mark.aot, *([pytest.mark.slow] if again else [])])
            for backend, partition, again in (
                ("hopper", Manual(), False),
                ("hopper", Compiled(), True),
                ("tpu", Manual(), True),
                ("tpu", Compiled(), False),
                ("splash", Manual(), False),
                ("splash", Compiled(), True),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_kernel_gathers_what_it_is_given(backend: str, partition):
    """The train step communicates what it does with plain attention, tensor by tensor, on the chip's own compiler."""
    where = {"hopper": lambda: aot.cuda_devices(8), "chunked": jax.devices}
    devices = where.get(backend, lambda: aot.tpu_devices("v5e:2x4"))()
    dtype = jnp.float32 if backend == "chunked" else jnp.bfloat16
    found, wanted = (collectives(name, devices, (1, 2, 4), partition, dtype) for name in (backend, "plain"))
    assert found == wanted


COMPILED = [*itertools.product([(1, 8, 1), (1, 2, 4)], [False, True], ["splash", "tpu"])]
USUAL = [((1, 8, 1), False, "splash"), ((1, 2, 4), True, "tpu")]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("mesh", "documents", "backend"),
    [pytest.param(*case, marks=() if case in USUAL else pytest.mark.slow) for case in COMPILED],
    ids=str,
)
def test_kernels_compile_in_the_train_step_for_a_tpu(mesh: tuple[int, int, int], documents: bool, backend: str):
    """Forward and backward, under remat, with grouped keys, on the chips that are not here."""
    attention = AttentionConfig(heads=8, kv_heads=4, head_size=128, backend=backend)
    model = dataclasses.replace(toys.LLAMA, attention=attention, width=256, remat="full")
    chips = aot.tpu_devices("v5e:2x4")
    p = toys.program(model, mesh, zero=1, documents=documents, compute=jnp.bfloat16, devices=chips)
    text = p.lower_train_step(2, 8, 256).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4, "forward, forward again, and two backward"


def test_the_table_of_the_docs_is_what_backends_say():
    docs = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text()
    assert kernel_table.table() in docs, (
        "docs/kernels.md is stale: paste the output of python -m benchmarks.kernel_table"
    )
