"""Reads the .idx of token shards in Megatron-LM's format, whoever wrote them: us, Megatron-LM or datatrove.

`shards` has the layout. Here a document may be several sequences: shards of split sentences have one a sentence.
Mapped, not read: what is looked at is loaded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards.format import CHUNK, HEADER, MAGIC

DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
"""Megatron's codes of a .bin's type (core/datasets/indexed_dataset.py, `DType`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """What an .idx says of the .bin beside it. `open_index` makes one."""

    path: Path
    """The .idx."""
    dtype: np.dtype
    """Of the tokens, little-endian."""
    tokens: int
    """In the .bin."""
    lengths_S: np.ndarray
    """int32 memory map [S]: tokens in each sequence. They lie end to end in the .bin."""
    documents_D: np.ndarray
    """int64 memory map [documents + 1]: the first sequence of each document, and the number of sequences."""

    @property
    def documents(self) -> int:
        """How many."""
        return len(self.documents_D) - 1

    @property
    def tokens_path(self) -> Path:
        """The .bin."""
        return self.path.with_suffix(".bin")

    def map_tokens(self) -> np.ndarray:
        """The .bin as a memory map [tokens]."""
        return np.memmap(self.tokens_path, self.dtype, mode="r") if self.tokens else np.empty(0, self.dtype)


def open_index(path: Path, *, scan: bool = True) -> Index:
    """Opens an .idx and checks it against its own size and the size of the .bin beside it.

    `scan` also reads all its numbers: lengths that are not negative and fill the .bin, pointers that are where the
    lengths end, documents that cover the sequences in order. Without it, the time does not depend on the size.

    Raises:
      ValueError: a file is missing or damaged, the two are no pair, or they hold something other than tokens.
    """
    tokens_path = path.with_suffix(".bin")
    size, tokens_bytes = _size(path), _size(tokens_path)
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is no Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}.")
    _, version, code, sequences, documents = HEADER.unpack(header)
    dtype = _dtype(path, version, code)
    _check_size(path, size, sequences, documents)
    content = np.memmap(path, np.uint8, mode="r")
    pointers_at = HEADER.size + 4 * sequences
    documents_at = pointers_at + 8 * sequences
    lengths_S = content[HEADER.size : pointers_at].view("<i4")
    pointers_S = content[pointers_at:documents_at].view("<i8")
    documents_D = content[documents_at:].view("<i8")
    ends = int(pointers_S[-1]) + int(lengths_S[-1]) * dtype.itemsize if sequences else 0
    if ends != tokens_bytes:
        raise ValueError(f"{path} covers {ends:,} bytes; {tokens_path} has {tokens_bytes:,}: they are no pair.")
    if (int(documents_D[0]), int(documents_D[-1])) != (0, sequences):
        said = f"{documents_D[0]:,} to {documents_D[-1]:,}"
        raise ValueError(f"{path} is damaged: its documents go from sequence {said}, not from 0 to {sequences:,}.")
    if scan:
        _scan(path, dtype.itemsize, lengths_S, pointers_S, documents_D)
    return Index(
        path=path,
        dtype=dtype,
        tokens=tokens_bytes // dtype.itemsize,
        lengths_S=lengths_S,
        documents_D=documents_D,
    )


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _dtype(path: Path, version: int, code: int) -> np.dtype:
    if version != 1:
        raise ValueError(f"{path} has version {version} of Megatron's format; this program reads version 1.")
    if code not in DTYPES:
        raise ValueError(f"{path} has the type code {code}, which is none of Megatron's (1 to {max(DTYPES)}).")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    if dtype.kind == "f":
        raise ValueError(f"{path} is of {dtype.name} numbers; tokens are integers.")
    return dtype


def _check_size(path: Path, size: int, sequences: int, documents: int) -> None:
    wanted = HEADER.size + 12 * sequences + 8 * documents
    if size == wanted and documents:
        return
    if size == wanted + sequences and sequences:
        raise ValueError(
            f"{path} is of a multimodal data set (it has a mode for each sequence); only text is read here."
        )
    raise ValueError(
        f"{path} is damaged: it has {size:,} bytes, and {sequences:,} sequences in {documents - 1:,} documents, as it "
        f"says, take {wanted:,}."
    )


def _scan(path: Path, itemsize: int, lengths_S: np.ndarray, pointers_S: np.ndarray, documents_D: np.ndarray) -> None:
    byte = 0
    for start in range(0, len(lengths_S), CHUNK):
        lengths = lengths_S[start : start + CHUNK]
        if (negative := lengths < 0).any():
            at = int(negative.argmax())
            raise ValueError(f"{path} is damaged: sequence {start + at:,} has the length {lengths[at]:,}.")
        ends = byte + np.cumsum(lengths, dtype=np.int64) * itemsize
        wanted = np.concatenate([[byte], ends[:-1]])
        if (elsewhere := pointers_S[start : start + CHUNK] != wanted).any():
            at = int(elsewhere.argmax())
            raise ValueError(
                f"{path}: sequence {start + at:,} begins at byte {pointers_S[start + at]:,} of the .bin, and the "
                f"lengths before it say {wanted[at]:,}; only sequences that lie end to end are read here."
            )
        byte = int(ends[-1])
    for start in range(0, len(documents_D) - 1, CHUNK):
        steps = np.diff(documents_D[start : start + CHUNK + 1])
        if (backwards := steps < 0).any():
            at = start + int(backwards.argmax())
            raise ValueError(f"{path} is damaged: document {at + 1:,} begins before document {at:,}.")
