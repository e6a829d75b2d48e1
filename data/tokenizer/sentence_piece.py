"""SentencePiece (Kudo and Richardson 2018): models that others published, and unigram or BPE models learned here."""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.tokenizer.interface import (
    ENDS_OF_DOCUMENT,
    SENTINEL,
    Given,
    Learned,
    by_document,
    spellings,
    threads,
    too_many,
)

SPACE = "\u2581"
"""What models write for a space."""
OWN = ("pad", "mask", "cls", "sep")
"""Special tokens of models that are learned here."""
UNKNOWN = "<unk>"
THREADS = 4
"""Of training: the model depends on it."""


class SentencePieceTokenizer:
    """A model (its bytes), with one of its control pieces as end of document."""

    def __init__(self, definition: bytes, end_of_document: str | None = None, *, exact: bool = False) -> None:
        """`exact`: the letter U+2581 comes back as itself, not as a space; for models with all bytes as pieces.

        Raises: ValueError that says what is wrong with the file, without its name.
        """
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(definition)
            self.vocab_size = int(self._model.get_piece_size())
        except Exception as error:  # the library raises several kinds, with the lines of its source
            version = sentencepiece.__version__
            raise ValueError(f"is no model that sentencepiece {version} can read.") from error
        self.end_of_document = self._end(end_of_document)
        space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()] if exact else []
        assert all(map(self._model.is_byte, space)), "exact needs bytes as pieces"
        self._space = np.array(space, np.int32)
        kind = f"mtx SentencePiece{', exact' if exact else ''}, end of document {self.end_of_document}"
        self.digest = hashlib.sha256(kind.encode() + b"\0" + definition).hexdigest()

    def _end(self, name: str | None) -> int:
        said = self._model.eos_id()
        usual = ([self._model.id_to_piece(said)] if said >= 0 else []) + list(ENDS_OF_DOCUMENT)
        for piece in [name] if name else usual:
            if (found := self._control(piece)) is not None:
                return found
        control = [self._model.id_to_piece(i) for i in range(self.vocab_size) if self._model.is_control(i)]
        names = ", ".join(control[:20]) + (", ..." if len(control) > 20 else "")
        wanted = f"no piece {name!r}" if name else "no usual end of document"
        raise ValueError(
            f"has {wanted} among its control pieces, which no text gives ({names or 'none'}); name one of them: "
            "data.tokenizer.end_of_document=..."
        )

    def _control(self, piece: str) -> int | None:
        number = self._model.piece_to_id(piece)  # of <unk>, which is none, for what is no piece
        return number if self._model.is_control(number) else None

    def special(self, name: str) -> int | None:
        """See `Tokenizer`."""
        return next((found for text in spellings(name) if (found := self._control(text)) is not None), None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return self.encode_batch([text.encode(errors="replace")])[0].tolist()

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays, on all cores."""
        texts = [document.decode() for document in documents]
        encoded = self._model.encode(texts, out_type=int, num_threads=threads()) if texts else []
        found = [np.array(tokens, np.int32) for tokens in encoded]
        return [
            self._around_spaces(text) if len(self._space) and SPACE in text else tokens
            for text, tokens in zip(texts, found, strict=True)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        return "\n".join(self._model.decode(part) for part in by_document(tokens, self))

    def pieces(self) -> list[str]:
        """The text of each token, as the model writes it."""
        return [self._model.id_to_piece(number) for number in range(self.vocab_size)]

    def _around_spaces(self, text: str) -> np.ndarray:
        parts = self._model.encode(text.split(SPACE), out_type=int)
        pieces = [np.array(part, np.int32) for part in parts]
        return np.concatenate([pieces[0], *itertools.chain(*((self._space, piece) for piece in pieces[1:]))])


@dataclass(frozen=True, kw_only=True)
class SentencePiece(Learned):
    """SentencePiece model learned from the training text, from which any text comes back; `</s>` ends a document."""

    copy_name = "tokenizer.model"

    vocab_size: int = 8192
    """Number of tokens, the 256 bytes and all special tokens included."""
    kind: Literal["unigram", "bpe"] = "unigram"
    """unigram (Kudo 2018; training it is slow) or bpe."""
    sentinels: int = 0
    """How many special tokens <extra_id_0>, <extra_id_1>, ... it has, for the corruption of spans; T5 has 100."""

    def training_bytes(self) -> int:
        """See `Learned`. Unigram takes seconds of a core for a megabyte."""
        return 10_000_000 if self.kind == "unigram" else super().training_bytes()

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.sentinels < 0:
            yield "sentinels", "must be at least 0"
            return
        if self.vocab_size <= self._fixed():
            special = f"{self._fixed() - 256} special tokens"
            yield "vocab_size", f"must be above {self._fixed()}: 256 bytes and {special}; try {8192 + self.sentinels}"

    def _fixed(self) -> int:
        """Number of tokens that are not learned: bytes, ours, </s>, <unk> and sentinels."""
        return 256 + len(OWN) + 2 + self.sentinels

    def read(self, definition: bytes) -> SentencePieceTokenizer:
        """See `Defined`."""
        return SentencePieceTokenizer(definition, exact=True)

    def has_special(self, name: str) -> bool:
        """See `Defined`."""
        return name in (*OWN, *(f"{SENTINEL}{i}" for i in range(self.sentinels)))

    def learn(self, texts: Iterable[str]) -> bytes:
        """The model for these texts. Raises: ValueError if they do not do for so many tokens."""
        import sentencepiece

        names = [*OWN[1:], *(f"{SENTINEL}{i}" for i in range(self.sentinels))]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab_size,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                control_symbols=[spellings(name)[0] for name in names],
                # These four bring every text back.
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,  # an indentation in one token
                max_sentence_length=2**30,  # documents whole, so that pieces may hold ends of lines
                num_threads=THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise self._refused(str(error)) from error
        return model.getvalue()

    def _refused(self, said: str) -> ValueError:
        if found := re.search(r"value <= (\d+)", said):
            return too_many(self.vocab_size, int(found[1]), self._fixed() + 1)
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
            return ValueError(
                f"data.tokenizer.vocab_size={self.vocab_size} is less than the bytes, special tokens and letters of "
                f"the training text, {found[1]} in all; try data.tokenizer.vocab_size={2 * int(found[1])}."
            )
        return ValueError(f"sentencepiece cannot learn from the training text: {said.strip()}")


@dataclass(frozen=True, kw_only=True)
class SentencePieceFile(Given):
    """A SentencePiece model, as T5, Llama 2 or Gemma have it."""

    copy_name = "tokenizer.model"

    path: str
    """The .model file. It is copied to the shards, so that who trains needs it no more."""
    end_of_document: str | None = None
    """Which of its control pieces ends a document; None: the one that the model says ends a sentence (</s>)."""

    def original(self) -> Path:
        """See `Given`."""
        return Path(self.path)

    def read(self, definition: bytes) -> SentencePieceTokenizer:
        """See `Defined`."""
        return SentencePieceTokenizer(definition, self.end_of_document)

    def measure(self, definition: bytes) -> int:
        """See `Given`."""
        return self.read(definition).vocab_size
