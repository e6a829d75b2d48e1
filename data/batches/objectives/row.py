"""A row: one sample of a batch, and what all objectives share."""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from data.batches.objectives.draws import Draws
from data.batches.packing import Batch, Window, pack

Row = dict[str, np.ndarray]
"""`tokens`, `targets`, `segments`, `positions`: int32 [T]; `weights`: float32 [T].

With prefixes also `prefix`, int32 [T]: where in the row the query's prefix ends. It never decreases along the row.
With sentence pairs also `types` and `label`, int32 [T]; the label is the same everywhere.
"""


class Codec(Protocol):
    """What cuts between characters need of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Specials:
    """Tokens that no text has, None where a vocabulary lacks them."""

    mask: int | None = None
    """Stands where a token is to be guessed."""
    cls: int | None = None
    """Begins a pair of sentences."""
    sep: int | None = None
    """Ends each sentence of a pair."""
    fim_prefix: int | None = None
    """Before what precedes the middle."""
    fim_middle: int | None = None
    """Before the middle."""
    fim_suffix: int | None = None
    """Before what follows the middle."""
    sentinels: tuple[int, ...] = ()
    """Each stands for one span that was taken out, in this order."""
    pad: int | None = None
    """Fills a row; None: the end of document."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        seen: set[int] = set()
        for field in fields(self):
            for token in self._tokens(field.name):
                if token < 0:
                    yield field.name, f"holds {token}; tokens are at least 0"
                elif token in seen:
                    yield field.name, f"holds token {token}, which is special already; give each a number of its own"
                seen.add(token)

    def names(self) -> dict[int, str]:
        """What each of them is called: mask, fim_prefix, sentinel 3 ..."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found |= dict.fromkeys(self._tokens(field.name), field.name)
            if isinstance(value, tuple):
                found |= {token: f"sentinel {i}" for i, token in enumerate(value)}
        return found

    def tokens(self) -> list[int]:
        """All of them."""
        return [token for field in fields(self) for token in self._tokens(field.name)]

    def _tokens(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """What all rows of a run have in common: their length, and what tokens mean."""

    sequence_length: int
    """Positions in a row, T."""
    vocab_size: int
    """Random tokens are below it."""
    end_of_document: int
    """The token behind each document."""
    isolate_documents: bool
    """Whether positions restart and attention stays inside a document."""
    specials: Specials = Specials()
    """Tokens that no text has."""
    codec: Codec | None = None
    """The tokenizer, for cuts between characters."""
    starts_word_V: np.ndarray | None = None
    """Whether a token starts a word, bool [vocab_size], to mask whole words."""

    @property
    def pad(self) -> int:
        """What fills a row."""
        return self.end_of_document if self.specials.pad is None else self.specials.pad

    def special(self, name: str) -> int:
        """A special token. Raises: ValueError if the vocabulary lacks it."""
        token = getattr(self.specials, name)
        if token is None:
            raise ValueError(f"the special token {name} is missing, and this objective needs it.")
        return token


class Objective:
    """Base of objectives, with what the plainest one says."""

    purpose: ClassVar[str]
    """Of its random numbers: `generator(seed, purpose, source, epoch, index)`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The special tokens that it uses, as fields of `Specials`."""

    @property
    def attention(self) -> Literal["causal", "prefix", "both"]:
        """What a token must see: those before it; these and its prefix, which the rows name; all of its segment."""
        return "causal"

    @property
    def by_word(self) -> bool:
        """Whether it must know which tokens start a word."""
        return False

    def sentinels(self, sequence_length: int) -> int:
        """How many it uses, of rows so long."""
        return 0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from ()


class WindowObjective(Objective, abc.ABC):
    """An objective over windows of a stream."""

    def window_length(self, sequence_length: int) -> int:
        """Targets of the window that makes a row of `sequence_length` positions."""
        return sequence_length

    @abc.abstractmethod
    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """A window as a row."""


class Example(NamedTuple):
    """Tokens to learn from, which something may precede that is only read."""

    tokens: np.ndarray
    """int32 [n]: n - 1 positions of a row, the last token being only a target."""
    given: int
    """How many tokens at the start are no targets. The first never is one."""


def stack(rows: Sequence[Row]) -> Batch:
    """Rows of one objective as a batch [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def window_row(window: Window, frame: Frame) -> Row:
    """The row of a window, as `packing.pack` makes it."""
    batch = pack([window], end_of_document=frame.end_of_document, isolate_documents=frame.isolate_documents)
    return {name: array[0] for name, array in batch.items()}


def examples_row(examples: Sequence[Example], frame: Frame, *, prefix: bool) -> Row:
    """Examples side by side, each a segment with positions from 0; padding behind as `packing.pack` has it.

    prefix: whether given tokens see one another, so that the row has `prefix`.
    """
    length = frame.sequence_length
    row: Row = {name: np.zeros(length, np.int32) for name in ("segments", "positions", "prefix")}
    row |= {name: np.full(length, frame.pad, np.int32) for name in ("tokens", "targets")}
    row["weights"] = np.zeros(length, np.float32)
    at = 0
    for segment, (tokens, given) in enumerate(examples, start=1):
        here = slice(at, at + len(tokens) - 1)
        assert here.stop <= length, "the examples do not fit into the row"
        row["tokens"][here], row["targets"][here] = tokens[:-1], tokens[1:]
        row["weights"][here] = np.arange(1, len(tokens)) >= given
        row["segments"][here], row["positions"][here] = segment, np.arange(len(tokens) - 1)
        row["prefix"][at:] = at + given
        at = here.stop
    if not prefix:
        del row["prefix"]
    return row


def documents(stream_N: np.ndarray, end_of_document: int) -> list[np.ndarray]:
    """The documents in tokens of a stream, without their ends; the last one, possibly empty, does not end in it."""
    ends = np.flatnonzero(stream_N == end_of_document)
    return [part[1:] if i else part for i, part in enumerate(np.split(stream_N, ends))]


def check_shares(config: object, *names: str, strictly: bool = False) -> Iterator[tuple[str, str]]:
    """What `check` says of fields that are shares of a whole; strictly: neither none nor all of it."""
    for name in names:
        value = getattr(config, name)
        if not (0 < value < 1 if strictly else 0 <= value <= 1):
            place = "strictly between 0 and 1" if strictly else "in 0..1"
            yield name, f"must lie {place}; try {getattr(type(config), name)}"
