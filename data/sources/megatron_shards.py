"""Token shards that another program wrote, trained on as they are: Megatron-LM's preprocess_data.py, datatrove's
MegatronDocumentTokenizer, or `prepare` elsewhere."""

import dataclasses
import difflib
import glob
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np

from data.corpus import Corpus, Gzip, Split, digest
from data.shards.index import Index, open_index
from data.tokenizer import (
    Bytes,
    ByteTokenizer,
    Given,
    Gpt2,
    SentencePieceFile,
    Tokenizer,
    TokenizerFile,
    WordPieceFile,
    read_file,
)

SPLITS = ("train", "validation", "test")
BLOCK = 1 << 20
"""Tokens that are checked at once."""
BLOCKS = 128
"""Of a longer split so many blocks are checked, spread over it; all of a shorter one."""
DECODED_TOKENS = 1 << 21
"""A longer validation split is not decoded: it would take seconds."""


@dataclass(frozen=True, kw_only=True)
class MegatronShards:
    """Pairs of .bin and .idx files in Megatron-LM's format, as they are: no text, and nothing to prepare.

    Documents must end with the tokenizer's end of document (Megatron-LM: --append-eod). Bits per byte divide by what
    the validation tokens decode to, if they are few enough to be decoded at every start.
    """

    train: str
    """Pairs without their endings (`corpus_text_document`), separated by commas; several are one stream, in order."""
    tokenizer: Bytes | Gpt2 | TokenizerFile | WordPieceFile | SentencePieceFile
    """What the tokens mean. Shards do not say: with another one that has as many tokens, nothing is noticed."""
    validation: str | None = None
    """Pairs to measure with; None: a share of the training documents."""
    test: str | None = None
    """Pairs for eval --split test."""
    split: str = "949,50,1"
    """Without `validation`: shares of the documents for training, validation and test, as Megatron-LM takes them: the
    first documents, those that follow, the last. What lies beside each other may be alike, or the same in two
    versions, so that a border can leak. A share that is less than half a document is left out."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens. Raises: ValueError that names the tokenizer's file."""
        return self.tokenizer.vocab_size

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        for field in SPLITS:
            value = getattr(self, field)
            if value is not None and not _prefixes(value):
                yield field, "is empty; name a pair of files without .bin and .idx"
        if self.test is not None and self.validation is None:
            yield "test", "needs validation, for without it split gives both; name validation, or leave out test"
        try:
            self._shares()
        except ValueError as error:
            yield "split", str(error)
        if isinstance(self.tokenizer, Given):
            try:
                self.vocab_size  # noqa: B018 (it raises)
            except ValueError as error:
                yield f"tokenizer.{self.tokenizer.named_by}", f"cannot be used: {error}"

    def is_prepared(self) -> bool:
        """Whether `load` will do: always, there is nothing to write first."""
        return True

    def load(self) -> Corpus:
        """Opens the shards, after checks of the whole .idx and of up to 128 M tokens of each split.

        Raises: ValueError for damaged shards, tokens outside the vocabulary, or documents without their end.
        """
        splits = {"train": self._open("train")}
        if self.validation is None:
            splits = self._cut(splits["train"])
        else:
            splits |= {name: self._open(name) for name in ("validation", "test") if getattr(self, name) is not None}
        tokenizer = self._tokenizer()
        contents = {}
        for name, split in splits.items():
            whose = f"data.{name if self.validation else 'train'}={getattr(self, name) or self.train}"
            contents[name] = _checked(split, tokenizer, whose)
        yardstick = None
        if "validation" in splits:
            splits["validation"], yardstick = _measured(splits["validation"], tokenizer)
        return Corpus(
            source=self.train,
            tokenizer=tokenizer,
            splits=splits,
            digest=digest(tokenizer, contents),
            gzip_bits_per_byte=yardstick,
        )

    def _open(self, field: str) -> Split:
        indexes = []
        for prefix in _prefixes(getattr(self, field)):
            path = Path(f"{prefix}.idx").expanduser()
            try:
                indexes.append(open_index(path))
            except ValueError as error:
                raise ValueError(f"data.{field}: {error}{'' if path.exists() else _nearest(path)}") from error
        return _joined(indexes)

    def _shares(self) -> list[Fraction]:
        """Where each split ends, of 1. Raises: ValueError."""
        try:
            numbers = [Fraction(part.strip()) for part in self.split.split(",")]
        except (ValueError, ZeroDivisionError):
            numbers = []
        if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or numbers[0] == 0:
            raise ValueError("must be one to three numbers, the first above 0, none below; try 949,50,1")
        return [sum(numbers[: i + 1], Fraction(0)) / sum(numbers) for i in range(len(numbers))]

    def _cut(self, whole: Split) -> dict[str, Split]:
        borders = [0, *(round(share * whole.documents) for share in self._shares())]
        found = zip(SPLITS, borders, borders[1:], strict=False)
        splits = {name: _documents(whole, start, stop) for name, start, stop in found if stop > start}
        if "train" not in splits:
            raise ValueError(f"data.split={self.split} leaves none of {whole.documents:,} documents to train on.")
        return splits

    def _tokenizer(self) -> Tokenizer:
        if isinstance(self.tokenizer, Bytes):
            return ByteTokenizer()
        return read_file(self.tokenizer, self.tokenizer.original())


class _Joined:
    """Token streams end to end, as one of which slices and single tokens are read."""

    def __init__(self, streams: Sequence[np.ndarray]) -> None:
        self._streams, self._starts = streams, np.cumsum([0, *(len(stream) for stream in streams)])
        self.dtype = np.result_type(*streams)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: slice | int) -> np.ndarray | np.integer:
        if not isinstance(key, slice):
            key = int(key) % len(self)
            at = int(np.searchsorted(self._starts, key, side="right")) - 1
            return self._streams[at][key - self._starts[at]]
        start, stop, step = key.indices(len(self))
        assert step == 1, "streams are read forwards"
        parts = self.views(start, stop)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def views(self, start: int, stop: int) -> list[np.ndarray]:
        """What of each stream lies in [start, stop)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        return [
            stream[max(start - begin, 0) : max(stop - begin, 0)]
            for stream, begin in zip(self._streams[first:], self._starts[first:].tolist(), strict=False)
            if begin < stop
        ]


def _view(tokens_N: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) of a stream, of which nothing is read."""
    if not isinstance(tokens_N, _Joined):
        return tokens_N[start:stop]
    return cast(np.ndarray, _Joined(tokens_N.views(start, stop)))


def _prefixes(value: str) -> list[str]:
    """Pairs by name, without their endings, whether or not they were given with one."""
    names = [name.strip() for name in value.split(",")]
    return [name.removesuffix(".idx").removesuffix(".bin") for name in names if name]


def _nearest(path: Path) -> str:
    """A hint with the pair nearest to one that is not there."""
    here = sorted(glob.glob(f"{glob.escape(str(path.parent))}/*.idx"))
    near = difflib.get_close_matches(path.name, [Path(name).name for name in here], n=1, cutoff=0.5)
    return f" Did you mean {(path.parent / near[0]).with_suffix('')}?" if near else ""


def _joined(indexes: Sequence[Index]) -> Split:
    streams = [index.map_tokens() for index in indexes]
    if len(indexes) == 1:
        (index,) = indexes
        return Split(tokens_N=streams[0], lengths_S=index.lengths_S, documents_D=index.documents_D, bytes=None)
    starts = np.cumsum([0, *(len(index.lengths_S) for index in indexes)])
    documents = [index.documents_D[:-1] + start for index, start in zip(indexes, starts, strict=False)]
    return Split(
        tokens_N=cast(np.ndarray, _Joined(streams)),
        lengths_S=np.concatenate([index.lengths_S for index in indexes]),
        documents_D=np.concatenate([*documents, starts[-1:]]),
        bytes=None,
    )


def _documents(whole: Split, start: int, stop: int) -> Split:
    """Some of the documents, which follow one another."""
    first, last = int(whole.documents_D[start]), int(whole.documents_D[stop])
    before = int(whole.lengths_S[:first].sum(dtype=np.int64))
    tokens = int(whole.lengths_S[first:last].sum(dtype=np.int64))
    return Split(
        tokens_N=_view(whole.tokens_N, before, before + tokens),
        lengths_S=whole.lengths_S[first:last],
        documents_D=whole.documents_D[start : stop + 1] - first,
        bytes=None,
    )


def _checked(split: Split, tokenizer: Tokenizer, whose: str) -> str:
    """A hash of the lengths and of the tokens that are looked at. Raises: ValueError for what cannot be trained on."""
    ends_D = split.document_starts()[1:]
    if not len(split.tokens_N):
        raise ValueError(f"{whose} holds no tokens.")
    blocks = -(-len(split.tokens_N) // BLOCK)
    content = hashlib.sha256(np.ascontiguousarray(split.lengths_S, "<i4").tobytes())
    for block in np.unique(np.linspace(0, blocks - 1, min(blocks, BLOCKS)).astype(np.int64)).tolist():
        start = block * BLOCK
        tokens = np.asarray(split.tokens_N[start : start + BLOCK])
        content.update(tokens.astype("<i4").tobytes())
        if (outside := (tokens < 0) | (tokens >= tokenizer.vocab_size)).any():
            at = int(outside.argmax())
            raise ValueError(
                f"{whose}: token {start + at:,} is {tokens[at]}, and the tokenizer has {tokenizer.vocab_size:,}; the "
                "shards were written with another one (data.tokenizer)."
            )
        first, last = np.searchsorted(ends_D, [start, start + len(tokens)], side="right").tolist()
        last_tokens = tokens[ends_D[first:last] - 1 - start]
        if (open_ended := last_tokens != tokenizer.end_of_document).any():
            at = int(open_ended.argmax())
            raise ValueError(
                f"{whose}: document {first + at:,} ends with token {last_tokens[at]}, not with the end of document "
                f"{tokenizer.end_of_document}; write the shards with one (Megatron-LM: --append-eod; datatrove: "
                "eos_token), or name what ends them (data.tokenizer.end_of_document)."
            )
    return content.hexdigest()


def _measured(split: Split, tokenizer: Tokenizer) -> tuple[Split, float | None]:
    """The split with the bytes of the text that its tokens decode to, and what `gzip -9` needs for it."""
    if len(split.tokens_N) > DECODED_TOKENS:
        return split, None
    yardstick, text_bytes = Gzip(), 0
    for start, end in itertools.pairwise(split.document_starts().tolist()):
        text = tokenizer.decode(split.tokens_N[start : max(end - 1, start)].tolist()).encode(errors="replace")
        yardstick.add(text)
        text_bytes += len(text)
    return dataclasses.replace(split, bytes=text_bytes or None), yardstick.bits_per_byte()
