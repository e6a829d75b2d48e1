"""Masks: what is lowered for kernels says what the definition says, for any expression, packing and shape."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.masks import (
    FAR,
    Blocks,
    BoundMask,
    Causal,
    Documents,
    Full,
    Mask,
    Prefix,
    Window,
    bind,
    misfit,
)
from pallas_kernels.patterns import BigBird, Chosen, Fixed, LocalGlobal, Longformer, Pattern, Strided
from pallas_kernels.visible import FULL, MOST_TERMS, Ranges, Tiles, Visible

PATTERNS = [
    Fixed(block=4, stride=2),
    Strided(block=4, stride=2),
    LocalGlobal(block=4, window=0),
    Longformer(block=4, dilation=2),
    BigBird(block=8, random=1),
    Chosen(block=8, rows=tuple(tuple(bool((i * j) % 3) for j in range(5)) for i in range(5))),
]
PARTS = [
    Full(),
    Causal(),
    Window(0),
    Window(3),
    Window(2, 3),
    Window(99, 99),
    Documents(),
    Prefix(),
    *map(Blocks, PATTERNS),
]
MASKS = st.recursive(
    st.sampled_from(PARTS),
    lambda masks: st.tuples(st.booleans(), masks, masks).map(lambda x: x[1] & x[2] if x[0] else x[1] | x[2]),
    max_leaves=4,
)


def bound(mask: Mask, T: int, S: int, explicit: bool, random: np.random.Generator) -> BoundMask:
    """Two rows of packed documents with padding behind, and prefixes."""
    segments, key_segments = (np.sort(random.integers(1, 4, (2, n)), 1) for n in (T, S))
    segments[:, T - T // 5 :] = 0
    given = {"prefix": jnp.asarray(np.sort(random.integers(0, T + 1, (2, T)), 1))}
    if S != T or explicit:
        given["key_segments"] = jnp.asarray(key_segments)
    if explicit and not mask.has(Blocks):
        given["positions"], given["key_positions"] = (
            jnp.asarray(np.sort(random.choice(60, n, replace=False))) for n in (T, S)
        )
    return bind(mask, T, S, segments=jnp.asarray(segments), **given)


SHOWN = ((3, 5), (8, 16))
"""Tiles of any size, unlike a pattern's."""


class Asked(NamedTuple):
    """What kernels ask of a mask, and its definition."""

    defined: np.ndarray
    visible: Visible
    dense: np.ndarray
    seen_keys: np.ndarray
    tiles: Tiles
    tiles_by_key: Tiles
    shown: list[np.ndarray]
    ranges: list[Ranges]


@jax.jit
def ask(mask: BoundMask) -> Asked:
    """In one program, as kernels do."""
    visible, dense = mask.visible(), mask.dense()
    shape = (2, mask.queries, mask.keys)
    return Asked(
        defined=jnp.ones(shape, bool) if dense is None else jnp.broadcast_to(dense, shape),
        visible=visible,
        dense=jnp.broadcast_to(visible.dense(), shape),
        seen_keys=jnp.broadcast_to(visible.seen_keys(), (2, mask.keys)),
        tiles=visible.tiles(4, 2),
        tiles_by_key=visible.tiles_by_key(2, 4),
        shown=[visible.shown(*tiles) for tiles in SHOWN],
        ranges=[visible.ranges(4, 2), visible.ranges_by_key(4, 2)] if visible.is_interval else [],
    )


CASES = {
    "mask": MASKS,
    "T": st.sampled_from([1, 7, 16, 33]),
    "S": st.sampled_from([None, 1, 5, 20]),
    "explicit": st.booleans(),
    "seed": st.integers(0, 99),
}


@settings(max_examples=24, deadline=None, derandomize=True, database=None)
@given(**CASES)
def test_lowered_is_as_defined(mask, T, S, explicit, seed):
    one = bound(mask, T, S or T, explicit, np.random.default_rng(seed))
    found = jax.device_get(ask(one))
    dense = found.defined
    np.testing.assert_array_equal(found.dense, dense)
    check_by_key(found.visible)
    check_tiles(found, dense)
    check_shown(found, dense)
    if found.visible.is_interval:
        check_ranges(found, dense)
    if not one.unseen_keys():
        assert dense.any(axis=1).all()
    if not one.may_be_blind():
        assert dense.any(axis=2).all()
    np.testing.assert_array_equal(found.seen_keys, dense.any(axis=1))


def check_by_key(visible: Visible) -> None:
    """Both views of each term are one relation, and no end ever goes back."""
    t, s = (np.arange(x.shape[2]) for x in (visible.first_RBT, visible.qfirst_RBS))
    by_query = (np.asarray(visible.first_RBT)[..., None] <= s) & (s <= np.asarray(visible.last_RBT)[..., None])
    first, last = (np.asarray(x)[:, :, None, :] for x in (visible.qfirst_RBS, visible.qlast_RBS))
    np.testing.assert_array_equal(by_query, (first <= t[:, None]) & (t[:, None] <= last))
    for end in (visible.first_RBT, visible.last_RBT, visible.qfirst_RBS, visible.qlast_RBS):
        assert (np.diff(end, axis=-1) >= 0).all()


def check_tiles(found: Asked, dense: np.ndarray) -> None:
    tile, other = 4, 2
    for (index, code, count), seen in ((found.tiles, dense), (found.tiles_by_key, dense.swapaxes(1, 2))):
        for b, q in np.ndindex(2, index.shape[1]):
            row = min(b, index.shape[0] - 1)
            listed = {int(j): int(c) for j, c in zip(index[row, q, : count[row, q]], code[row, q], strict=False)}
            assert len(listed) == count[row, q]
            rows = seen[b, q * tile : (q + 1) * tile]
            for j in range(-(-seen.shape[2] // other)):
                part = rows[:, j * other : (j + 1) * other]
                assert j in listed or not part.any(), "a tile that shows something is not listed"
                assert not listed.get(j, 0) & FULL or (part.all() and part.shape == (tile, other)), "not full"


def check_shown(found: Asked, dense: np.ndarray) -> None:
    """No tile that shows something is left out, nor much visited in vain."""
    for (tile, other), shown in zip(SHOWN, found.shown, strict=True):
        seen = np.any(dense, axis=0)
        for q, j in np.ndindex(*shown.shape):
            assert shown[q, j] or not seen[q * tile : (q + 1) * tile, j * other : (j + 1) * other].any()
        assert shown.any() or not seen.any()


def check_ranges(found: Asked, dense: np.ndarray) -> None:
    by_query, by_key = found.ranges
    for ranges, seen, tile, other in ((by_query, dense, 4, 2), (by_key, dense.swapaxes(1, 2), 2, 4)):
        for b, q in np.ndindex(2, ranges.start.shape[1]):
            start, full_start, full_stop, stop = (int(x[min(b, x.shape[0] - 1), q]) for x in ranges)
            assert start <= full_start <= full_stop <= stop
            rows = seen[b, q * tile : (q + 1) * tile]
            assert not rows[:, : start * other].any() and not rows[:, stop * other :].any()
            assert full_start == full_stop or full_stop * other <= rows.shape[1]
            assert rows[:, full_start * other : full_stop * other].all()


@pytest.mark.parametrize(
    ("mask", "terms"),
    [
        (Causal() & Documents() & Window(7), 1),
        ((Causal() | Prefix()) & Documents(), 1),
        (Causal() | Documents(), 1),
        (Window(3) | Window(0, 5), 1),
        (Blocks(Fixed()) & Causal(), 1),
        (Window(3) | Prefix(), 2),
        (Causal() & Window(4) | Blocks(Fixed()), 2),
        ((Window(3) | Prefix()) & (Causal() | Blocks(Fixed())), 4),
    ],
    ids=str,
)
def test_few_terms_are_needed(mask: Mask, terms: int):
    assert len(mask.conjunctions()) == terms


def test_whole_tiles_are_skipped():
    """Of 8 tiles each way, what a causal window of one tile leaves: two per row but the first."""
    visible = bind(Causal() & Window(3), 32).visible()
    ranges = visible.ranges(4, 4)
    assert np.asarray(ranges.stop - ranges.start).tolist() == [[1] + [2] * 7]
    causal = bind(Causal(), 32).visible().ranges(4, 4)
    assert np.asarray(causal.full_stop - causal.full_start).tolist() == [list(range(8))]
    shown = bind(Blocks(LocalGlobal(block=4, window=0, globals=1)), 32).visible().shown(8, 2)
    assert np.asarray(shown.sum(1)).tolist() == [16, 6, 6, 6]
    listed = bind(Blocks(LocalGlobal(block=4, window=0, globals=1)), 32).visible().tiles(4, 4)
    assert np.asarray(listed.count_BQ).tolist() == [[8] + [2] * 7]
    assert (np.asarray(listed.code_BQJ) & FULL).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)
def test_a_pattern_does_not_depend_on_the_length(pattern: Pattern):
    """So that a token at a time sees what a whole sequence saw."""
    long = pattern.matrix(40, 40)
    for length in (8, 24):
        short = pattern.matrix(length, length)
        np.testing.assert_array_equal(short, long[: short.shape[0], : short.shape[1]])


def test_patterns_by_hand():
    def rows(pattern: Pattern, n: int) -> list[str]:
        return ["".join(".#"[int(x)] for x in row) for row in pattern.matrix(n, n)]

    assert rows(Fixed(block=1, stride=2), 4) == ["##.#", "##.#", ".###", ".###"]
    assert rows(Strided(block=1, stride=2), 5) == ["###.#", "####.", "#####", ".####", "#.###"]
    assert rows(LocalGlobal(block=1, window=1), 4) == ["####", "###.", "####", "#.##"]
    assert rows(Longformer(block=1, window=1, dilation=2, globals=0), 5) == [
        "#.#..",
        ".#.#.",
        "#.#.#",
        ".#.#.",
        "..#.#",
    ]
    found = BigBird(block=1, window=0, globals=0, random=2, seed=1).matrix(64, 64)
    assert np.triu(found, 1).sum() == 0
    assert set(found.sum(1).tolist()) == {1, 2, 3} and (found != np.roll(found, 1, (0, 1)))[8:].any(1).mean() > 0.9


@pytest.mark.parametrize(
    ("mask", "given", "why"),
    [
        (Documents(), {}, "needs segments"),
        (Causal() & Prefix(), {}, "needs prefix"),
        (Documents(), {"keys": 5, "segments": jnp.ones((1, 4))}, "needs key_segments"),
        (Documents(), {"positions": jnp.arange(4), "segments": jnp.ones((1, 4))}, "needs key_segments"),
        (Blocks(Fixed()), {"positions": jnp.arange(4)}, "goes by index"),
    ],
    ids=str,
)
def test_what_cannot_be_bound_is_refused(mask: Mask, given: dict, why: str):
    with pytest.raises(ValueError, match=why):
        bind(mask, 4, **given)


def test_what_cannot_be_is_refused():
    for wrong in (-1, FAR):
        with pytest.raises(ValueError, match=r"at least 0, below 1073741824"):
            Window(wrong)
    with pytest.raises(ValueError, match=r"Chosen.rows has 2 x 2 blocks of 4; 3 x 3 are needed"):
        bind(Blocks(Chosen(block=4, rows=((True, True), (True, False)))), 9).dense()
    assert dict(BigBird(block=0, random=-1).check()) == {"block": "must be at least 1", "random": "must be at least 0"}
    assert dict(BigBird(seed=1 << 48).check()) == {"seed": "must be below 2**48"} and not dict(BigBird().check())
    assert dict(Fixed(stride=2, summary=3).check()) == {"summary": "must be at most stride=2"}
    for rows in ((), ((),), ((True, True), (True,))):
        assert "equal length" in dict(Chosen(rows=rows).check())["rows"]
    assert not dict(Chosen(rows=((True, False),)).check())


def test_a_misfit_of_block_and_tile_is_seen():
    mask = Blocks(Fixed(block=96)) & Causal()
    assert misfit(mask, 128) == 96 and misfit(mask, 32, 96) is None and misfit(Causal(), 128) is None


def test_the_widest_window_sees_all():
    """Its ends are far outside of int32's middle, and must not come back around."""
    visible = bind(Window(FAR - 1, FAR - 1), 9).visible()
    assert visible.dense().all()
    check_by_key(visible)


def test_what_tiles_cannot_say_is_not_lowered_to_them():
    mask = Window(0) | Prefix()
    for start in range(MOST_TERMS):
        mask = mask | Blocks(LocalGlobal(block=4, window=start, globals=0))
    found = bind(mask, 8, prefix=jnp.zeros((1, 8), jnp.int32)).visible()
    assert len(found.patterns) == MOST_TERMS + 2 and found.dense().any()
    with pytest.raises(AssertionError, match="cannot be said by tiles"):
        found.tiles(4, 4)
    with pytest.raises(AssertionError, match="cannot be said by tiles"):
        bind(Blocks(Fixed(block=6)), 12).visible().tiles(4, 4)


def test_a_mask_reads_as_it_is_written():
    assert (
        str((Causal() | Prefix()) & Documents() & Window(3))
        == "(Causal() | Prefix()) & Documents() & Window(before=3, after=0)"
    )
