"""The mask language: what a query may see, as an expression that no attention backend may ignore.

`(Causal() | Prefix()) & Documents()` is a mask; masks are hashable and belong to configs. `bind` joins one to the
arrays that it speaks of. A bound mask can be spelled out (`dense`, by definition, for the plain twins), or lowered for
kernels (`visible`): most masks are then, for every query, one interval of keys whose two ends never go back as the
query goes on, so that kernels visit a contiguous range of tiles and mask only at its ends. What is no interval becomes
a list of tiles.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.patterns import Pattern
from pallas_kernels.visible import Visible, misfit_of

FAR = 1 << 30
"""Positions and widths of windows are below it, so that their sums are int32."""
_LAST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Mask(abc.ABC):
    """What all masks share: `&` (both hold) and `|` (either holds)."""

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)

    def parts(self) -> "tuple[Mask, ...]":
        """The masks that this one is made of; itself, if of none."""
        return (self,)

    def has(self, kind: "type[Mask]") -> bool:
        return any(isinstance(part, kind) for part in self.parts())

    def reach(self) -> int:
        """How many positions it can speak of: only a `Chosen` pattern ends."""
        return min((part.pattern.reach() for part in self.parts() if isinstance(part, Blocks)), default=FAR)

    @abc.abstractmethod
    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        """The same mask as an `or` of as few intervals with patterns as the rules of `Conjunction` find.

        own: whether keys have the segments of the queries at their positions, so that a query's document holds its key.
        """


@dataclass(frozen=True)
class Full(Mask):
    """Everything is seen."""

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(START, END, frozenset(), True),)


@dataclass(frozen=True)
class Causal(Mask):
    """A key at or before the query's position; without explicit positions, query 0 is beside key 0."""

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(START, ("self", 0), frozenset(), True),)


@dataclass(frozen=True)
class Window(Mask):
    """A key from `before` positions back to `after` positions ahead."""

    before: int
    after: int = 0

    def __post_init__(self):
        if not (0 <= self.before < FAR and 0 <= self.after < FAR):
            raise ValueError(f"Window(before={self.before}, after={self.after}): both must be at least 0, below {FAR}")

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(("self", -self.before), ("self", self.after), frozenset(), True),)


@dataclass(frozen=True)
class Documents(Mask):
    """A key of the same document: equal segment ids, which never decrease along the row; 0 is padding, at its end."""

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(("document",), ("document",), frozenset(), own),)


@dataclass(frozen=True)
class Prefix(Mask):
    """A key before the end of the query's prefix: position < prefix_BT, which never decreases along the row."""

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(START, ("prefix",), frozenset(), False),)


@dataclass(frozen=True)
class Blocks(Mask):
    """A key whose block the pattern shows to the query's block (Child et al. 2019 and later)."""

    pattern: Pattern

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return (Conjunction(START, END, frozenset([self.pattern]), False),)


@dataclass(frozen=True)
class Both(Mask):
    """`left & right`."""

    left: Mask
    right: Mask

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Either) else str(part) for part in (self.left, self.right))

    def parts(self) -> tuple[Mask, ...]:
        return self.left.parts() + self.right.parts()

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return _fewest([a.both(b) for a in self.left.conjunctions(own) for b in self.right.conjunctions(own)])


@dataclass(frozen=True)
class Either(Mask):
    """`left | right`."""

    left: Mask
    right: Mask

    def __str__(self) -> str:
        return f"{self.left} | {self.right}"

    def parts(self) -> tuple[Mask, ...]:
        return self.left.parts() + self.right.parts()

    def conjunctions(self, own: bool = True) -> "tuple[Conjunction, ...]":
        return _fewest([*self.left.conjunctions(own), *self.right.conjunctions(own)])


# Intervals, in symbols: an end is an atom, or ("max" or "min", the ends it is taken of).

End: TypeAlias = tuple[Any, ...]
START, END = ("start",), ("end",)


@dataclass(frozen=True)
class Conjunction:
    """Keys from `first` to `last`, both included, in blocks that all `patterns` show."""

    first: End
    last: End
    patterns: frozenset[Pattern]
    has_self: bool
    """Whether a key at the query's own position is always in the interval."""

    def both(self, other: "Conjunction") -> "Conjunction":
        return Conjunction(
            _outer("max", self.first, other.first),
            _outer("min", self.last, other.last),
            self.patterns | other.patterns,
            self.has_self and other.has_self,
        )

    def either(self, other: "Conjunction") -> "Conjunction | None":
        """One conjunction that says `self or other`; None where there is none: a gap may lie between them."""
        touching = (self.has_self and other.has_self) or self.first == other.first or self.last == other.last
        if self.patterns != other.patterns or not touching:
            return None
        return Conjunction(
            _outer("min", self.first, other.first),
            _outer("max", self.last, other.last),
            self.patterns,
            self.has_self or other.has_self,
        )


def _fewest(found: list[Conjunction]) -> tuple[Conjunction, ...]:
    kept: list[Conjunction] = []
    for new in found:
        for i, old in enumerate(kept):
            if (one := old.either(new)) is not None:
                kept[i] = one
                break
        else:
            kept.append(new)
    return tuple(kept) if len(kept) == len(found) else _fewest(kept)


def _outer(op: str, a: End, b: End) -> End:
    """max or min of two ends, without what cannot matter."""
    neutral = {"max": START, "min": END}[op]
    absorbing = {"max": END, "min": START}[op]
    members = frozenset().union(*(end[1] if end[0] == op else {end} for end in (a, b))) - {neutral}
    if absorbing in members:
        return absorbing
    shifts = [end[1] for end in members if end[0] == "self"]
    if len(shifts) > 1:
        members = frozenset(end for end in members if end[0] != "self") | {
            ("self", (max if op == "max" else min)(shifts))
        }
    return (op, members) if len(members) > 1 else next(iter(members), neutral)


def sees(
    mask: Mask,
    query: jax.Array,
    key: jax.Array,
    shape: tuple[int, int],
    *,
    segments: tuple[jax.Array | None, jax.Array | None] = (None, None),
    prefix: jax.Array | None = None,
) -> jax.Array:
    """The definition: whether queries at these positions see keys at those; all arrays broadcast against each other.

    `shape`: how many query and key positions there are, for patterns.
    """
    again = partial(sees, query=query, key=key, shape=shape, segments=segments, prefix=prefix)
    match mask:
        case Both(left, right):
            return again(left) & again(right)
        case Either(left, right):
            return again(left) | again(right)
        case Causal():
            return key <= query
        case Window(before, after):
            return (query - before <= key) & (key <= query + after)
        case Documents():
            assert segments[0] is not None and segments[1] is not None
            return segments[0] == segments[1]
        case Prefix():
            assert prefix is not None
            return key < prefix
        case Blocks(pattern):
            return jnp.asarray(pattern.matrix(*shape))[query // pattern.block, key // pattern.block]
    return jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)


# Bound to arrays.


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("query_T", "key_S", "query_segment_BT", "key_segment_BS", "prefix_BT"),
    meta_fields=("mask", "queries", "keys"),
)
@dataclass(frozen=True)
class BoundMask:
    """A mask and what it speaks of. Made by `bind`."""

    mask: Mask
    queries: int
    keys: int
    query_T: jax.Array | None
    key_S: jax.Array | None
    query_segment_BT: jax.Array | None
    key_segment_BS: jax.Array | None
    """None: the queries' segments are the keys'."""
    prefix_BT: jax.Array | None

    def dense(self) -> jax.Array | None:
        """bool_BTS by definition (B is 1 where it does not matter); None if nothing is hidden."""
        if isinstance(self.mask, Full):
            return None
        segment_BT1, segment_B1S, prefix_BT1 = None, None, None
        if self.query_segment_BT is not None:
            keys_BS = self.query_segment_BT if self.key_segment_BS is None else self.key_segment_BS
            segment_BT1, segment_B1S = self.query_segment_BT[:, :, None], keys_BS[:, None, :]
        if self.prefix_BT is not None:
            prefix_BT1 = self.prefix_BT[:, :, None]
        t, s = self._query_position()[None, :, None], self._key_position()[None, None, :]
        shape = (self.queries, self.keys)
        seen = sees(self.mask, t, s, shape, segments=(segment_BT1, segment_B1S), prefix=prefix_BT1)
        return jnp.broadcast_to(seen, (seen.shape[0], *shape))

    def visible(self) -> "Visible":
        """Lowered for kernels. To be called where arrays are local: inside shard_map, not before it."""
        found = self.mask.conjunctions(own=self.key_segment_BS is None)
        ends = [[self._first(c.first), self._last(c.last), self._reached(c.last), self._left(c.first)] for c in found]
        stacked = []
        for arrays, size in zip(
            zip(*ends, strict=True), (self.queries, self.queries, self.keys, self.keys), strict=True
        ):
            rows = max(x.shape[0] for x in arrays)
            stacked.append(jnp.stack([jnp.broadcast_to(x, (rows, size)) for x in arrays]).astype(jnp.int32))
        rows = max(x.shape[1] for x in stacked)
        stacked = [jnp.broadcast_to(x, (x.shape[0], rows, x.shape[2])) for x in stacked]
        return Visible(*stacked, patterns=tuple(c.patterns for c in found))

    def unseen_keys(self) -> bool:
        """Whether some key may be seen by no query; decided without looking at arrays."""
        (one, *more) = self.mask.conjunctions(own=self.key_segment_BS is None)
        aligned = self.queries >= self.keys and self.query_T is None and self.key_S is None
        return not (aligned and not more and one.has_self and not one.patterns)

    def may_be_blind(self) -> bool:
        """Whether some query may see no key; decided without looking at arrays."""
        found = self.mask.conjunctions(own=self.key_segment_BS is None)
        aligned = self.queries <= self.keys and self.query_T is None and self.key_S is None
        return not (aligned and any(one.has_self and not one.patterns for one in found))

    # The first and last key of every query, and the first and last query of every key: each end of an interval, and its
    # inverse, from the atoms up. Taking the inverse swaps max and min, because no end ever goes back.

    def _first(self, end: End) -> jax.Array:
        """The first key that is not before an end, per query, in [0, S]."""
        match end:
            case ("start",):
                return jnp.zeros((1, self.queries), jnp.int32)
            case ("self", shift):
                return self._keys_before(self._query_position() + shift)[None]
            case ("document",):
                return self._document("first", "query")
        return self._taken(self._first, end)

    def _last(self, end: End) -> jax.Array:
        """The last key that is not after an end, per query, in [-1, S - 1]."""
        match end:
            case ("end",):
                return jnp.full((1, self.queries), self.keys - 1)
            case ("self", shift):
                return self._keys_before(self._query_position() + (shift + 1))[None] - 1
            case ("document",):
                return self._document("last", "query")
            case ("prefix",):
                assert self.prefix_BT is not None
                return self._keys_before(self.prefix_BT) - 1
        return self._taken(self._last, end)

    def _reached(self, end: End) -> jax.Array:
        """The first query whose end is not before a key, per key, in [0, T]: the inverse of `_last`."""
        match end:
            case ("end",):
                return jnp.zeros((1, self.keys), jnp.int32)
            case ("self", shift):
                return self._queries_before(self._key_position() - shift)[None]
            case ("document",):
                return self._document("first", "key")
            case ("prefix",):
                assert self.prefix_BT is not None
                search = partial(jnp.searchsorted, side="right")
                return jax.vmap(search, in_axes=(0, None))(self.prefix_BT, self._key_position())
        return self._taken(self._reached, end, swap=True)

    def _left(self, end: End) -> jax.Array:
        """The last query whose end is not after a key, per key, in [-1, T - 1]: the inverse of `_first`."""
        match end:
            case ("start",):
                return jnp.full((1, self.keys), self.queries - 1)
            case ("self", shift):
                return self._queries_before(self._key_position() - (shift - 1))[None] - 1
            case ("document",):
                return self._document("last", "key")
        return self._taken(self._left, end, swap=True)

    @staticmethod
    def _taken(of: Callable[[End], jax.Array], end: End, swap: bool = False) -> jax.Array:
        op, members = end[0], sorted(end[1], key=str)
        take = jnp.maximum if (op == "max") != swap else jnp.minimum
        return reduce(take, (of(member) for member in members))

    def _query_position(self) -> jax.Array:
        return jnp.arange(self.queries) if self.query_T is None else self.query_T

    def _key_position(self) -> jax.Array:
        return jnp.arange(self.keys) if self.key_S is None else self.key_S

    def _keys_before(self, position: jax.Array) -> jax.Array:
        """How many keys lie before each position."""
        return jnp.clip(position, 0, self.keys) if self.key_S is None else jnp.searchsorted(self.key_S, position)

    def _queries_before(self, position: jax.Array) -> jax.Array:
        return jnp.clip(position, 0, self.queries) if self.query_T is None else jnp.searchsorted(self.query_T, position)

    def _document(self, which: str, of: str) -> jax.Array:
        """Of every query (key): the first or last key (query) of its document."""
        assert self.query_segment_BT is not None
        if self.key_segment_BS is None:
            return _runs(self.query_segment_BT, which)
        sorted_BT, sorted_BS = (jnp.where(x == 0, _LAST, x) for x in (self.query_segment_BT, self.key_segment_BS))
        here, there = (sorted_BT, sorted_BS) if of == "query" else (sorted_BS, sorted_BT)
        side = "left" if which == "first" else "right"
        found = jax.vmap(partial(jnp.searchsorted, side=side))(there, here)
        return found if which == "first" else found - 1


def bind(
    mask: Mask,
    queries: int,
    keys: int | None = None,
    *,
    segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    prefix: jax.Array | None = None,
) -> BoundMask:
    """A mask with what it needs to know.

    Args:
        queries, keys: T and S; S is T if it is not given.
        segments, key_segments: int32 _BT, _BS for `Documents`; the keys' are the queries' if not given (then T = S).
        positions, key_positions: int32 _T, _S, rising, where index and position differ (shards, zig-zag rings).
        prefix: int32 _BT for `Prefix`: where each query's prefix ends.

    Raises: ValueError for what the mask needs and is not given, or what cannot be said together.
    """
    keys = queries if keys is None else keys
    if mask.has(Documents) and segments is None:
        raise ValueError("Documents() needs segments: bind(mask, T, segments=segments_BT)")
    if mask.has(Documents) and key_segments is None and keys != queries:
        raise ValueError(f"Documents() of {queries} queries and {keys} keys needs key_segments, the keys' own")
    if mask.has(Documents) and key_segments is None and (positions is not None or key_positions is not None):
        raise ValueError("Documents() with explicit positions needs key_segments, the keys' own")
    if mask.has(Prefix) and prefix is None:
        raise ValueError("Prefix() needs prefix: bind(mask, T, prefix=prefix_BT)")
    if mask.has(Blocks) and (positions is not None or key_positions is not None):
        raise ValueError("Blocks(...) goes by index: it cannot be combined with explicit positions")
    needs_segments, needs_prefix = mask.has(Documents), mask.has(Prefix)
    return BoundMask(
        mask=mask,
        queries=queries,
        keys=keys,
        query_T=positions,
        key_S=key_positions,
        query_segment_BT=segments if needs_segments else None,
        key_segment_BS=key_segments if needs_segments else None,
        prefix_BT=prefix if needs_prefix else None,
    )


def _runs(segment_BT: jax.Array, which: str) -> jax.Array:
    """The first or last index of the run of equal ids that each index is in."""
    T = segment_BT.shape[1]
    i = jnp.arange(T)
    changes = segment_BT[:, 1:] != segment_BT[:, :-1]
    edge = jnp.ones((segment_BT.shape[0], 1), bool)
    if which == "first":
        return lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), i, 0), axis=1)
    return lax.cummin(jnp.where(jnp.concatenate([changes, edge], axis=1), i, T - 1), axis=1, reverse=True)


def misfit(mask: Mask, *tiles: int) -> int | None:
    """A block size of the mask's patterns that is not a multiple of some tile size, so that tiles cannot say it."""
    return misfit_of(tuple(c.patterns for c in mask.conjunctions()), tiles)
