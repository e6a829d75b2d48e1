"""Tokenizers of Hugging Face's format, tokenizer.json: any that there is, and a byte-level BPE learned here."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer.interface import ENDS_OF_DOCUMENT, Given, Learned, by_document, spellings, too_many


class JsonTokenizer:
    """A tokenizer.json (its bytes), with one of its added tokens as end of document."""

    def __init__(self, definition: bytes, end_of_document: str | None = None) -> None:
        """Raises: ValueError that says what is wrong with the file, without its name."""
        import tokenizers

        parsed = _parse(definition)
        name, self.end_of_document = _end_of_document(parsed, end_of_document)
        self.vocab_size = _vocab_size(parsed)
        self.digest = hashlib.sha256(name.encode() + b"\0" + definition).hexdigest()
        # What depends on luck or drops text has no place in a corpus.
        parsed |= {"truncation": None, "padding": None}
        if "dropout" in parsed["model"]:
            parsed["model"]["dropout"] = None
        for token in parsed["added_tokens"]:
            token["special"] = token["special"] or token["content"] == name
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"is no tokenizer that tokenizers {tokenizers.__version__} can read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # as plain text
        model = parsed["model"]
        self.within: str | None = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None
        """What pieces inside a word begin with, in WordPiece vocabularies."""
        added: list[dict[str, Any]] = parsed["added_tokens"]
        self._special = {str(token["content"]): int(token["id"]) for token in added if token["special"]}
        unknown = parsed["model"].get("unk_token")
        self._never = np.array([number for text, number in self._special.items() if text != unknown])
        self._literal = re.compile("|".join(re.escape(text) for text in sorted(self._special, key=len, reverse=True)))

    def special(self, name: str) -> int | None:
        """See `Tokenizer`."""
        return next((self._special[text] for text in spellings(name) if text in self._special), None)

    def pieces(self) -> list[str]:
        """The text of each token, as the vocabulary writes it."""
        return [self._tokenizer.id_to_token(number) or "" for number in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return self.encode_batch([text.encode(errors="replace")])[0].tolist()

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays, on all cores."""
        texts = [document.decode() for document in documents]
        encoded = self._encode(texts)
        return [
            self._as_plain_text(text) if np.isin(tokens, self._never).any() else tokens
            for text, tokens in zip(texts, encoded, strict=True)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        parts = by_document(tokens, self)
        return "\n".join(self._tokenizer.decode(part, skip_special_tokens=False) for part in parts)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"the tokenizer cannot encode all of the text: {error}.") from error
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _as_plain_text(self, text: str) -> np.ndarray:
        """Some models (Unigram) hold special tokens as pieces of their own: break these before they are found."""
        borders = [0, *(match.start() + 1 for match in self._literal.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(borders)]
        tokens = np.concatenate(self._encode(parts))
        if self.end_of_document in tokens:
            raise ValueError(
                f"the tokenizer gives its own end of document for text that begins {text[:40]!r}; "
                "choose another token, data.tokenizer.end_of_document=..., or another tokenizer."
            )
        return tokens


@dataclass(frozen=True, kw_only=True)
class Bpe(Learned):
    """Byte-level BPE learned from the training text, with `<|endoftext|>` as end of document."""

    copy_name = "tokenizer.json"

    vocab_size: int = 8192
    """Number of tokens, the end of document and the 256 bytes included."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.vocab_size < 257:
            yield "vocab_size", "must be at least 257: 256 bytes and the end of document; try 8192"

    def read(self, definition: bytes) -> JsonTokenizer:
        """See `Defined`."""
        return JsonTokenizer(definition)

    def learn(self, texts: Iterable[str]) -> bytes:
        """The tokenizer.json for these texts. Raises: ValueError if they do not hold so many tokens."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyrefly: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=list(ENDS_OF_DOCUMENT[:1]),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer=trainer)
        reached = tokenizer.get_vocab_size()
        if reached < self.vocab_size:
            raise too_many(self.vocab_size, reached, 257)
        return tokenizer.to_str(pretty=True).encode()


@dataclass(frozen=True, kw_only=True)
class TokenizerFile(Given):
    """A tokenizer.json, as `tokenizers` and Hugging Face models save it."""

    copy_name = "tokenizer.json"

    path: str
    """The file. It is copied to the shards, so that who trains needs it no more."""
    end_of_document: str | None = None
    """Which of its added tokens ends a document; None: <|endoftext|>, </s> or another usual one."""

    def original(self) -> Path:
        """See `Given`."""
        return Path(self.path)

    def read(self, definition: bytes) -> JsonTokenizer:
        """See `Defined`."""
        return JsonTokenizer(definition, self.end_of_document)

    def measure(self, definition: bytes) -> int:
        """One more than the largest token's number. See `Given`."""
        parsed = _parse(definition)
        _end_of_document(parsed, self.end_of_document)
        return _vocab_size(parsed)


def _parse(definition: bytes) -> dict[str, Any]:
    """A tokenizer.json as plain data, with the parts that are read here."""
    try:
        parsed = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON ({error}).") from error
    model = parsed.get("model") if isinstance(parsed, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
        raise ValueError("is no tokenizer.json: it has no model with a vocabulary.")
    added = [{"special": False} | token for token in parsed.get("added_tokens") or [] if isinstance(token, dict)]
    if not all(isinstance(token.get("content"), str) and type(token.get("id")) is int for token in added):
        raise ValueError("is no tokenizer.json: its added tokens lack content or id.")
    return parsed | {"added_tokens": added}


def _vocab_size(parsed: dict[str, Any]) -> int:
    vocabulary = parsed["model"]["vocab"]
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("is no tokenizer.json: its vocabulary gives tokens that are no numbers.")
    largest = max(numbers)
    return 1 + max([largest, *(token["id"] for token in parsed["added_tokens"])])


def _end_of_document(parsed: dict[str, Any], name: str | None) -> tuple[str, int]:
    added = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    known = [known for known in ([name] if name else ENDS_OF_DOCUMENT) if known in added]
    if not known:
        names = ", ".join(list(added)[:20]) + (", ..." if len(added) > 20 else "")
        wanted = f"no token {name!r}" if name else "no usual end of document"
        raise ValueError(
            f"has {wanted} among its added tokens ({names or 'none'}); name one of them: "
            "data.tokenizer.end_of_document=..."
        )
    return known[0], added[known[0]]
