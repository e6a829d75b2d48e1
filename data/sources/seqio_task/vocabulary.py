"""seqio's vocabularies without seqio: what trains and samples has the ids, the end of a document, and the text back.

The definition is JSON: its kind, and what `describe` took from the vocabulary where seqio is.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tokenizer.interface import SENTINEL, by_document, spellings, within
from data.tokenizer.sentence_piece import SPACE, SentencePieceTokenizer

BYTES = 256
BEFORE_BYTES = 3
"""Padding, end and unknown: `ByteVocabulary` has them before its bytes."""


class SeqioPieces(SentencePieceTokenizer):
    """`SentencePieceVocabulary`: its model as seqio extends it, extra ids behind the pieces."""

    def special(self, name: str) -> int | None:
        """See `Tokenizer`."""
        if (found := super().special(name)) is None and name.startswith(SENTINEL):
            number = self._model.piece_to_id(SPACE + spellings(name)[0])
            return None if self._model.is_unknown(number) else number
        return found

    def text_bytes(self, tokens: np.ndarray) -> int:
        """Of the text in UTF-8 that tokens stand for."""
        return len(self._model.decode(tokens.tolist()).encode())


@dataclass(frozen=True)
class SeqioBytes:
    """`ByteVocabulary`: bytes behind three special ids, extra ids behind the bytes, the first of them the last id."""

    extra_ids: int
    end_of_document: int = 1

    @property
    def vocab_size(self) -> int:
        return BEFORE_BYTES + BYTES + self.extra_ids

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"seqio bytes, {self.extra_ids} extra ids".encode()).hexdigest()

    def special(self, name: str) -> int | None:
        """See `Tokenizer`."""
        if name.startswith(SENTINEL):
            number = int(name.removeprefix(SENTINEL))
            return self.vocab_size - 1 - number if number < self.extra_ids else None
        return 0 if name == "pad" else None

    def text_bytes(self, tokens: np.ndarray) -> int:
        """Of the text in UTF-8 that tokens stand for."""
        return int(((tokens >= BEFORE_BYTES) & (tokens < BEFORE_BYTES + BYTES)).sum())

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return [byte + BEFORE_BYTES for byte in text.encode(errors="replace")]

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) + BEFORE_BYTES for text in documents]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, special ids left out. Raises: ValueError."""
        return "\n".join(
            bytes(t - BEFORE_BYTES for t in part if 0 <= t - BEFORE_BYTES < BYTES).decode(errors="replace")
            for part in by_document(tokens, self)
        )


@dataclass(frozen=True)
class SeqioNumbers:
    """`PassThroughVocabulary`: its tokens have no text, and are written as their numbers: "12 7 99"."""

    vocab_size: int
    end_of_document: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"seqio numbers below {self.vocab_size}, end {self.end_of_document}".encode()).hexdigest()

    def special(self, name: str) -> int | None:
        """None: nothing is known of it."""
        spellings(name)

    def text_bytes(self, tokens: np.ndarray) -> int:
        """There is no text: one for each token."""
        return len(tokens)

    def encode(self, text: str) -> list[int]:
        """Numbers with spaces between them. Raises: ValueError for other text."""
        try:
            return within(map(int, text.split()), self.vocab_size)
        except ValueError as error:
            raise ValueError(
                f"{text[:40]!r} is no text of this vocabulary, which has numbers such as '12 7'."
            ) from error

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays."""
        return [np.array(self.encode(text.decode()), np.int32) for text in documents]

    def decode(self, tokens: Iterable[int]) -> str:
        """The numbers, a line for each document. Raises: ValueError."""
        return "\n".join(" ".join(map(str, part)) for part in by_document(tokens, self))


Vocabulary = SeqioPieces | SeqioBytes | SeqioNumbers


@functools.lru_cache(maxsize=8)
def read(definition: bytes) -> Vocabulary:
    """The tokenizer of a definition. Raises: ValueError that says what is wrong with it."""
    try:
        said = json.loads(definition)
        make = KINDS[said.pop("kind")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"is no definition of a seqio vocabulary ({error}).") from error
    return make(**said)


def _pieces(model: str) -> SeqioPieces:
    return SeqioPieces(base64.b64decode(model))


KINDS: dict[str, Callable[..., Vocabulary]] = {
    "SentencePieceVocabulary": _pieces,
    "ByteVocabulary": SeqioBytes,
    "PassThroughVocabulary": SeqioNumbers,
}
"""Which of seqio's classes are known, by name."""


def describe(vocabulary: Any) -> bytes:
    """The definition of a vocabulary of seqio's. Raises: ValueError, a sentence's end, for one that is not known."""
    kind = type(vocabulary).__name__
    if not type(vocabulary).__module__.startswith("seqio.") or kind not in KINDS:
        raise ValueError(
            f"has the vocabulary {type(vocabulary).__module__}.{kind}, which training does not know without seqio; "
            f"known are {', '.join(KINDS)}. With any other, PassThroughVocabulary(size=..., eos_id=...) keeps the "
            "tokens, though not their text"
        )
    if vocabulary.eos_id is None or vocabulary.eos_id < 0:
        raise ValueError("has a vocabulary without an end (eos_id), which separates documents; give it one")
    said: dict[str, Any] = {"kind": kind} | _content(kind, vocabulary)
    definition = json.dumps(said, sort_keys=True).encode()
    assert read(definition).end_of_document == vocabulary.eos_id
    return definition


def _content(kind: str, vocabulary: Any) -> dict[str, Any]:
    if kind == "SentencePieceVocabulary":
        return {"model": base64.b64encode(vocabulary.sp_model).decode()}
    if kind == "ByteVocabulary":
        return {"extra_ids": vocabulary.extra_ids}
    return {"vocab_size": vocabulary.vocab_size, "end_of_document": vocabulary.eos_id}


def holds(tokenizer: Vocabulary, tokens: np.ndarray) -> bool:
    """Whether all tokens are of the vocabulary."""
    return not len(tokens) or bool(0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size)
