"""A corpus: token streams, one per split, and what their tokens mean; and several, trained on together."""

import contextlib
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.mixing import Order, capped
from data.tokenizer import ByteTokenizer, Tokenizer

GZIP_BYTES = 16_000_000
"""The most text that is compressed as a yardstick: `gzip -9` takes about a second for it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One stream of tokens, each document followed by an end of document."""

    tokens_N: np.ndarray
    """The stream, an integer array or memory map [N]."""
    lengths_S: np.ndarray
    """int32 [S]: tokens of each sequence, a document's end in its last one. Most documents are one sequence; sentences,
    or a prompt and its completion, are several."""
    documents_D: np.ndarray
    """int64 [documents + 1]: the first sequence of each document, and the number of sequences."""
    bytes: int | None
    """Bytes of text in UTF-8, ends of documents not counted: what bits per byte are divided by. None: unknown."""

    @classmethod
    def of_documents(cls, documents: Iterable[np.ndarray], end_of_document: int, text_bytes: int) -> "Split":
        """A stream in memory, of documents' tokens without their ends."""
        pieces = [np.append(tokens, tokens.dtype.type(end_of_document)) for tokens in documents]
        return cls(
            tokens_N=np.concatenate(pieces),
            lengths_S=np.array([len(piece) for piece in pieces], np.int32),
            documents_D=np.arange(len(pieces) + 1),
            bytes=text_bytes,
        )

    @property
    def documents(self) -> int:
        """How many it holds."""
        return len(self.documents_D) - 1

    def sequence_starts(self) -> np.ndarray:
        """The token at which each sequence starts, and the number of tokens: int64 [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths_S, dtype=np.int64)])

    def document_starts(self) -> np.ndarray:
        """The token at which each document starts, and the number of tokens: int64 [documents + 1]."""
        return self.sequence_starts()[self.documents_D]


class OneSource:
    """Blend of one source."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources."""
        return (1.0,)

    def order(self, rows: Mapping[str, int]) -> Order:
        """Which source each sample of training comes from."""
        return Order((0,), ((1.0,),))


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus(OneSource):
    """Tokens to train on and to measure with, of one source: `Loader` makes batches of them."""

    source: str
    """Description of the text, for people."""
    tokenizer: Tokenizer
    """Text to tokens and back."""
    splits: Mapping[str, Split]
    """"train" and, where there is one, "validation" and "test"."""
    digest: str
    """16 hexadecimal digits that change with any token of any split, and with the tokenizer."""
    gzip_bits_per_byte: float | None
    """What `gzip -9` needs for the validation text: a model that does worse has learned little. None: too much text."""

    @classmethod
    def from_documents(
        cls,
        documents: Mapping[str, str],
        *,
        source: str,
        validation_fraction: float,
    ) -> "Corpus":
        """Splits `documents` (name -> text) and concatenates each split in the order of names, bytes as tokens.

        A hash of its name alone decides where a document goes, so that adding others moves none. Characters
        that UTF-8 cannot hold (lone surrogates) become "?".

        Raises:
          ValueError: one of the two splits is empty.
        """
        texts: dict[str, list[bytes]] = {"train": [], "validation": []}
        for name in sorted(documents):
            split = "validation" if _unit_hash(name) < validation_fraction else "train"
            texts[split].append(documents[name].encode(errors="replace"))
        for split, change in (("train", "smaller"), ("validation", "larger")):
            if not texts[split]:
                raise ValueError(
                    f"data.validation_fraction={validation_fraction} leaves one side of the split of "
                    f"{len(documents)} documents empty; try a {change} one, such as "
                    "data.validation_fraction=0.05."
                )
        tokenizer = ByteTokenizer()
        splits = {
            name: Split.of_documents(
                tokenizer.encode_batch(parts), tokenizer.end_of_document, text_bytes=sum(map(len, parts))
            )
            for name, parts in texts.items()
        }
        contents = {
            name: hashlib.sha256(split.tokens_N.astype("<u2").tobytes()).hexdigest() for name, split in splits.items()
        }
        yardstick = Gzip()
        for text in texts["validation"]:
            yardstick.add(text)
        return cls(
            source=source,
            tokenizer=tokenizer,
            splits=splits,
            digest=digest(tokenizer, contents),
            gzip_bits_per_byte=yardstick.bits_per_byte(),
        )

    @property
    def parts(self) -> Mapping[str, "Corpus"]:
        """The sources by name, as a blend has them: this one, without a name."""
        return {"": self}

    def describe(self) -> str:
        """One line for the banner."""
        held_out = [
            f"{split.documents:,}{_megabytes(split)} {'held out' if name == 'validation' else f'to {name}'}"
            for name, split in self.splits.items()
            if name != "train"
        ]
        train = self.splits["train"]
        return (
            f"{self.source}: {train.documents:,} documents{_megabytes(train)} to train on, "
            f"{', '.join(held_out) or 'none held out'}; {self._tokens()}; digest {self.digest}"
        )

    def _tokens(self) -> str:
        if isinstance(self.tokenizer, ByteTokenizer):
            return "bytes as tokens"
        train = self.splits["train"]
        tokens = len(train.tokens_N) - train.documents
        if train.bytes is None:
            return f"{tokens:,} tokens of {self.tokenizer.vocab_size:,}"
        return f"{train.bytes / max(tokens, 1):.2f} bytes per token of {self.tokenizer.vocab_size:,}"


def _megabytes(split: Split) -> str:
    return "" if split.bytes is None else f", {split.bytes / 1e6:.2f} MB"


class Blended:
    """Several corpora that are trained on together."""

    gzip_bits_per_byte = None

    def __init__(
        self,
        parts: Mapping[str, Corpus],
        weights: Sequence[float],
        *,
        phases: Sequence[tuple[int, Sequence[float]]] = (),
        max_epochs: Mapping[str, float | None] | None = None,
        temperature: float | None = None,
    ) -> None:
        """`weights`, those of `phases` from their first samples on, `max_epochs` and `temperature`: see `Blend`.

        Raises: ValueError if the tokenizers are not one.
        """
        self.parts, self._max_epochs, self._temperature = parts, max_epochs or {}, temperature
        self._given = [(0, weights), *phases]
        first, *others = parts
        for name in others:
            if parts[name].tokenizer.digest != parts[first].tokenizer.digest:
                raise ValueError(
                    f"sources {first} and {name} have different tokenizers, so that a token means two things; give all "
                    "the same, such as the file that one of them learned: tokenizer=TokenizerFile(path=...)."
                )

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        return next(iter(self.parts.values())).tokenizer

    @property
    def source(self) -> str:
        """Description of the text, for people."""
        return " + ".join(f"{name} ({part.source})" for name, part in self.parts.items())

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any token of any source, and with their names."""
        lines = [f"{name} {part.digest}" for name, part in self.parts.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def order(self, rows: Mapping[str, int]) -> Order:
        """Which source each sample of training comes from, of sources with so many rows."""
        starts, weights = zip(*self._phases(), strict=True)
        limits = [
            None if (most := self._max_epochs.get(name)) is None else int(Fraction(str(most)) * rows[name])
            for name in self.parts
        ]
        return capped(Order(starts, weights), limits)

    def _phases(self) -> list[tuple[int, tuple[float, ...]]]:
        """The first sample and the weights of each."""
        sizes = [len(part.splits["train"].tokens_N) for part in self.parts.values()]
        factors = [1.0 if self._temperature is None else size ** (1 / self._temperature) for size in sizes]
        return [(start, tuple(w * f for w, f in zip(each, factors, strict=True))) for start, each in self._given]

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the sources, in the last phase."""
        return self._phases()[-1][1]

    def describe(self) -> str:
        """For the banner."""
        parts = "".join(f"\n              {name}: {part.describe()}" for name, part in self.parts.items())
        return f"a blend of {len(self.parts)} sources, digest {self.digest}{parts}"


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """Errors get the source's name, if it has one."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"source {source}: {error}" if source else str(error)) from error


class Gzip:
    """What `gzip -9` needs for a text that comes in parts, up to `GZIP_BYTES`."""

    def __init__(self) -> None:
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._text_bytes, self._zipped_bytes = 0, 0

    def add(self, text: bytes) -> None:
        self._text_bytes += len(text)
        if self._text_bytes <= GZIP_BYTES:
            self._zipped_bytes += len(self._gzip.compress(text))

    def bits_per_byte(self) -> float | None:
        """None: no text, or too much."""
        if not 0 < self._text_bytes <= GZIP_BYTES:
            return None
        return 8 * (self._zipped_bytes + len(self._gzip.flush())) / self._text_bytes


def digest(tokenizer: Tokenizer, contents: Mapping[str, str]) -> str:
    """16 hexadecimal digits of a tokenizer and of the splits' contents (split name -> a hash)."""
    lines = [f"tokenizer {tokenizer.digest}", *(f"{name} {content}" for name, content in sorted(contents.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _unit_hash(name: str) -> float:
    """A hash of a name, uniform in [0, 1); equal in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
