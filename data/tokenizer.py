"""Text to tokens and back: bytes, a byte-level BPE trained here, or any tokenizer.json of Hugging Face's format.

A tokenizer gives every document's text as plain text: `<|endoftext|>` typed in a web page never becomes the end
of a document, which only the writer of a stream adds.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ENDS_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Names that published tokenizers give to it, in the order of trust."""
BPE_TRAINING_BYTES = 64_000_000
"""Text that a BPE learns from, the first of the training split: more changes few merges and needs more memory."""


class Tokenizer(Protocol):
    """What a corpus needs. `digest` is a SHA-256 of all that decides which tokens a text has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]: ...
    def decode(self, tokens: Iterable[int]) -> str: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """The 256 bytes of UTF-8, and the end of document."""

    end_of_document: int = 256
    vocab_size: int = 257
    digest: str = hashlib.sha256(b"mtx bytes, end of document 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return list(text.encode(errors="replace"))

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays."""
        return [np.frombuffer(text, np.uint8).astype(np.uint16) for text in documents]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        tokens = _within(tokens, self.vocab_size)
        text = bytes(ord("\n") if token == self.end_of_document else token for token in tokens)
        return text.decode(errors="replace")


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
        added: list[dict[str, Any]] = parsed["added_tokens"]
        special = {str(token["content"]): int(token["id"]) for token in added if token["special"]}
        unknown = parsed["model"].get("unk_token")
        self._special = np.array([number for text, number in special.items() if text != unknown])
        self._literal = re.compile("|".join(re.escape(text) for text in sorted(special, key=len, reverse=True)))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return self.encode_batch([text.encode(errors="replace")])[0].tolist()

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays, on all cores."""
        texts = [document.decode() for document in documents]
        encoded = self._encode(texts)
        return [
            self._as_plain_text(text) if np.isin(tokens, self._special).any() else tokens
            for text, tokens in zip(texts, encoded, strict=True)
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        documents: list[list[int]] = [[]]
        for token in _within(tokens, self.vocab_size):
            if token == self.end_of_document:
                documents.append([])
            else:
                documents[-1].append(token)
        return "\n".join(self._tokenizer.decode(part, skip_special_tokens=False) for part in documents)

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
class Bytes:
    """Bytes as tokens: nothing to train, any text."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return ByteTokenizer.vocab_size


@dataclass(frozen=True, kw_only=True)
class Bpe:
    """Byte-level BPE learned from the training text, with `<|endoftext|>` as end of document."""

    vocab_size: int = 8192
    """Number of tokens, the end of document and the 256 bytes included."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.vocab_size < 257:
            yield "vocab_size", "must be at least 257: 256 bytes and the end of document; try 8192"

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
            raise ValueError(
                f"data.tokenizer.vocab_size={self.vocab_size} is more than the {reached} tokens that the training "
                f"text yields; try data.tokenizer.vocab_size={reached} or less, or more text."
            )
        return tokenizer.to_str(pretty=True).encode()


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer.json, as `tokenizers` and Hugging Face models save it."""

    path: str
    """The file. It is copied to the shards, so that who trains needs it no more."""
    end_of_document: str | None = None
    """Which of its added tokens ends a document; None: <|endoftext|>, </s> or another usual one."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token's number. Raises: ValueError that names the file."""
        return self.size_of(Path(self.path))

    def size_of(self, path: Path) -> int:
        """The same of a copy. Raises: ValueError that names the file."""
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        return _size_and_check(str(path), self.end_of_document, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _size_and_check(path: str, end_of_document: str | None, mtime_ns: int, bytes: int) -> int:
    """The last two say whether the file is the one that was read before: parsing takes up to a second."""
    try:
        parsed = _parse(Path(path).read_bytes())
        _end_of_document(parsed, end_of_document)
        return _vocab_size(parsed)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


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


def _within(tokens: Iterable[int], vocab_size: int) -> list[int]:
    tokens = [int(token) for token in tokens]
    if any(not 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"tokens to decode must lie in 0..{vocab_size - 1}.")
    return tokens
