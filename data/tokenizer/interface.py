"""What a tokenizer is, what a config of one is, and the plainest of both: bytes."""

import abc
import contextlib
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from data.workers import cores

ENDS_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Names that published tokenizers give to it, in the order of trust."""
SPECIALS = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    **{f"fim_{part}": (f"<|fim_{part}|>", f"<fim_{part}>") for part in ("prefix", "middle", "suffix")},
}
"""Names that published tokenizers give to other special tokens."""
SENTINEL = "sentinel_"


def spellings(special: str) -> tuple[str, ...]:
    """How tokenizers write a special token: pad, mask, cls, sep, fim_prefix, sentinel_0, sentinel_1 ..."""
    if special.startswith(SENTINEL):
        return (f"<extra_id_{int(special.removeprefix(SENTINEL))}>",)
    return SPECIALS[special]


class Tokenizer(Protocol):
    """What a corpus needs. `digest` is a SHA-256 of all that decides which tokens a text has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def special(self, name: str) -> int | None:
        """The token of this name (see `spellings`), which no text gives; None: it has none."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...


class Defined(abc.ABC):
    """Base of configs whose tokenizer has a definition, of which a copy lies beside the shards."""

    copy_name: ClassVar[str]
    """The copy's file name."""

    @abc.abstractmethod
    def read(self, definition: bytes) -> Tokenizer:
        """Raises: ValueError that says what is wrong with the definition, without its file's name."""

    @abc.abstractmethod
    def has_special(self, name: str) -> bool:
        """Whether the tokenizer will have this special token (see `spellings`). Raises: ValueError."""


class Learned(Defined):
    """Base of configs whose definition is learned from the training text."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, all special ones included: a field of each kind."""

    def training_bytes(self) -> int:
        """Text that it learns from, at most: more changes little, and needs more time and memory."""
        return 64_000_000

    def has_special(self, name: str) -> bool:
        """See `Defined`: none, unless a kind says so."""
        return False

    @abc.abstractmethod
    def learn(self, texts: Iterable[str]) -> bytes:
        """The definition, equal for equal texts. Raises: ValueError if they do not do for this vocabulary."""


class Given(Defined):
    """Base of configs that name a file which is there before."""

    named_by: ClassVar[str] = "path"
    """The field that names it."""

    @abc.abstractmethod
    def original(self) -> Path:
        """The file. Raises: ValueError if it is not to be found."""

    def exists(self) -> bool:
        """Whether something is where the config says, be it right or wrong."""
        return self.original().exists()

    @abc.abstractmethod
    def measure(self, definition: bytes) -> int:
        """Number of tokens, after checks that cost less than `read`. Raises: see there."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens. Raises: ValueError that names the file."""
        return self.size_of(self.original())

    def has_special(self, name: str) -> bool:
        """See `Defined`. Raises: ValueError that names the file."""
        return read_file(self, self.original()).special(name) is not None

    def size_of(self, path: Path) -> int:
        """The same of a copy. Raises: ValueError that names the file."""
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        return _size_of(self, path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _size_of(config: Given, path: Path, mtime_ns: int, size_bytes: int) -> int:
    """The last two say whether the file is the one that was read before: reading takes up to a second."""
    with _named(path):
        return config.measure(path.read_bytes())


def read_file(config: Defined, path: Path) -> Tokenizer:
    """The tokenizer of a definition's file. Raises: ValueError that names it."""
    with _named(path):
        return config.read(path.read_bytes())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors get the file's name."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, and the end of document."""

    end_of_document: int = 256
    vocab_size: int = 257
    digest: str = hashlib.sha256(b"mtx bytes, end of document 256").hexdigest()

    def special(self, name: str) -> int | None:
        """None: it has no special token but the end of document."""
        spellings(name)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return list(text.encode(errors="replace"))

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays."""
        return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in documents]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        tokens = within(tokens, self.vocab_size)
        text = bytes(ord("\n") if token == self.end_of_document else token for token in tokens)
        return text.decode(errors="replace")


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes as tokens: nothing to train, any text."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return ByteTokenizer.vocab_size

    def has_special(self, name: str) -> bool:
        """Whether the tokenizer has this special token: none but the end of document."""
        return False


def too_many(vocab_size: int, reached: int, least: int) -> ValueError:
    """The error of a vocabulary that is larger than what the text yields; `least` is the smallest legal one."""
    hint = f"try data.tokenizer.vocab_size={reached} or less, or more text" if reached >= least else "give more text"
    return ValueError(
        f"data.tokenizer.vocab_size={vocab_size} is more than the {reached} tokens that the training text yields; "
        f"{hint}."
    )


def threads() -> int:
    """How many may encode at once: RAYON_NUM_THREADS, which `tokenizers` obeys, or as many as there are cores."""
    return int(os.environ.get("RAYON_NUM_THREADS") or cores())


def within(tokens: Iterable[int], vocab_size: int) -> list[int]:
    """The tokens to decode. Raises: ValueError for one outside the vocabulary."""
    tokens = [int(token) for token in tokens]
    if any(not 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"tokens to decode must lie in 0..{vocab_size - 1}.")
    return tokens


def by_document(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Cut at the ends of documents, which are left out. Raises: ValueError for a token outside the vocabulary."""
    document: list[int] = []
    for token in within(tokens, tokenizer.vocab_size):
        if token == tokenizer.end_of_document:
            yield document
            document = []
        else:
            document.append(token)
    yield document
