"""WordPiece as BERT has it (Devlin et al. 2019): words in pieces, without the spaces between them.

A text does not come back: spaces, what is no letter, and (where `lowercase`) case and accents are lost.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer.interface import Given, Learned, spellings, too_many
from data.tokenizer.json_file import JsonTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "[SEP]"
UNKNOWN = "[UNK]"
WITHIN = "##"
"""Begins a piece that goes on with a word."""
LETTERS = 1000
"""That a learned vocabulary knows at most, the most common ones, as BERT's did."""
LEAST = 128
"""Pieces of a learned vocabulary: Latin letters and digits, and the same within words, are 72."""
WORD_LETTERS = 100
"""Of a word; a longer one is unknown."""
LOWERCASE = {"07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3": True}
"""Published vocabularies by SHA-256: that of bert-base-uncased, whose 30,522 lines many repositories pin by it."""


class WordPieceTokenizer(JsonTokenizer):
    """A vocab.txt (its bytes), one piece a line, with [SEP] as end of document."""

    def __init__(self, definition: bytes, lowercase: bool) -> None:
        """Raises: ValueError that says what is wrong with the file, without its name."""
        from tokenizers import decoders, models

        pieces = _pieces(definition)
        numbers = {piece: number for number, piece in enumerate(pieces)}
        model = models.WordPiece(numbers, unk_token=UNKNOWN, max_input_chars_per_word=WORD_LETTERS)
        tokenizer = _words(model, lowercase)
        tokenizer.decoder = decoders.WordPiece(prefix=WITHIN, cleanup=False)
        tokenizer.add_special_tokens([piece for piece in SPECIAL if piece in numbers])
        super().__init__(tokenizer.to_str().encode(), END)
        kind = f"mtx WordPiece, lowercase {lowercase}"
        self.digest = hashlib.sha256(kind.encode() + b"\0" + definition).hexdigest()


@dataclass(frozen=True, kw_only=True)
class WordPiece(Learned):
    """WordPiece vocabulary learned from the training text, with BERT's special tokens; a text does not come back."""

    copy_name = "vocab.txt"

    vocab_size: int = 8192
    """Number of tokens, the five special ones included."""
    lowercase: bool = True
    """Whether case and accents are dropped."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.vocab_size < LEAST:
            why = "5 special tokens, letters, and letters within words"
            yield "vocab_size", f"must be at least {LEAST}: {why}; try 8192"

    def read(self, definition: bytes) -> WordPieceTokenizer:
        """See `Defined`."""
        return WordPieceTokenizer(definition, self.lowercase)

    def has_special(self, name: str) -> bool:
        """See `Defined`."""
        return any(spelling in SPECIAL for spelling in spellings(name))

    def learn(self, texts: Iterable[str]) -> bytes:
        """The vocab.txt for these texts. Raises: ValueError if they do not hold so many tokens."""
        from tokenizers import models, trainers

        # The library numbers letters as a random hash orders them, and merges by these numbers where counts are
        # equal: it is given all letters, in order, which takes the words first.
        texts = list(texts)
        words = _words(models.WordLevel(unk_token=UNKNOWN), self.lowercase)
        words.train_from_iterator(
            texts, trainers.WordLevelTrainer(vocab_size=2**31 - 1, special_tokens=[], show_progress=False)
        )
        letters, inner = _letters(words.get_vocab(), min(LETTERS, self.vocab_size // 4))
        tokenizer = _words(models.WordPiece(unk_token=UNKNOWN), self.lowercase)
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[*SPECIAL, *letters, *(WITHIN + letter for letter in inner)],
            limit_alphabet=0,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        found = tokenizer.get_vocab()
        if len(found) < self.vocab_size:
            raise too_many(self.vocab_size, len(found), LEAST)
        return "".join(f"{piece}\n" for piece in sorted(found, key=lambda piece: found[piece])).encode()


@dataclass(frozen=True, kw_only=True)
class WordPieceFile(Given):
    """A WordPiece vocabulary, BERT's vocab.txt or one like it; a text does not come back. [SEP] ends a document."""

    copy_name = "vocab.txt"

    path: str
    """The file, a piece on each line. It is copied to the shards, so that who trains needs it no more."""
    lowercase: bool | None = None
    """Whether case and accents are dropped; None: as is known of BERT's published vocabulary."""

    def original(self) -> Path:
        """See `Given`."""
        return Path(self.path)

    def read(self, definition: bytes) -> WordPieceTokenizer:
        """See `Defined`."""
        return WordPieceTokenizer(definition, self._lowercase(definition))

    def measure(self, definition: bytes) -> int:
        """See `Given`."""
        self._lowercase(definition)
        return len(_pieces(definition))

    def _lowercase(self, definition: bytes) -> bool:
        known = LOWERCASE.get(hashlib.sha256(definition).hexdigest())
        if self.lowercase is None and known is None:
            raise ValueError(
                "is no published vocabulary that is known here; say whether case is dropped: "
                "data.tokenizer.lowercase=true or data.tokenizer.lowercase=false."
            )
        if known is not None and self.lowercase not in (None, known):
            raise ValueError(
                f"is BERT's published vocabulary, which goes with data.tokenizer.lowercase={str(known).lower()}."
            )
        return bool(known if self.lowercase is None else self.lowercase)


def _words(model: Any, lowercase: bool) -> Any:
    """A tokenizer that cuts text into words as BERT does, for a model of the library."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # pyrefly: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyrefly: ignore
    return tokenizer


def _letters(words: Iterable[str], most: int) -> tuple[list[str], list[str]]:
    """The letters that most different words have, sorted, and those of them that words go on with."""
    words = list(words)
    counts = Counter(letter for word in words for letter in set(word))
    kept = sorted(sorted(counts), key=lambda letter: -counts[letter])[:most]
    return sorted(kept), sorted({letter for word in words for letter in word[1:]} & set(kept))


def _pieces(definition: bytes) -> list[str]:
    """A vocab.txt's lines. Raises: ValueError, without the file's name."""
    try:
        text = definition.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is no vocab.txt: it is not UTF-8 at byte {error.start}.") from error
    pieces = text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # other marks of Unicode end no line
    for needed in (UNKNOWN, END):
        if needed not in pieces:
            raise ValueError(f"is no vocab.txt: none of its {len(pieces)} lines is {needed}.")
    seen: dict[str, int] = {}
    for line, piece in enumerate(pieces, 1):
        if seen.setdefault(piece, line) != line:
            raise ValueError(f"has {piece!r} twice, on lines {seen[piece]} and {line}.")
    return pieces
