"""Token shards in Megatron-LM's indexed format (MMIDIDX, version 1): tokens in a .bin, their borders in a .idx.

The .bin is the tokens end to end. The .idx is, little-endian: the magic; uint64 1; uint8 code of the tokens'
type; uint64 sequences; uint64 documents + 1; int32 length in tokens of each sequence; int64 byte in the .bin of
each sequence; int64 number of the first sequence of each document, and the number of sequences (Megatron-LM,
core/datasets/indexed_dataset.py). The token that ends a document belongs to its last sequence. Beside the two, a .crc
says where they are damaged.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES = {"uint16": 8, "int32": 4}
"""Megatron's codes of the two types that are written here."""
UINT16_VOCABULARY = 65500
"""Megatron stores a vocabulary below this as uint16."""
TEMPORARY = ".tmp"
PIECE = (".bin", ".lengths", ".counts")
"""Files of a piece: tokens; int32 tokens of each sequence; int32 sequences of each document."""
BLOCK_BYTES = 1 << 20
"""A .crc holds the CRC-32 (uint32, little-endian) of each block of the .bin, then of the .idx; the last are short."""
CHUNK = 1 << 20
"""Numbers held at once while an index is written; bytes while a file is hashed."""


@dataclass(frozen=True)
class Shard:
    """One split's pair of files, as the manifest lists it."""

    documents: int
    sequences: int
    """At least as many: a document is one or several."""
    tokens: int
    bytes: int
    """Of text, ends of documents not counted."""
    dtype: str
    """uint16 or int32."""
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    crc_sha256: str


def dtype_of(vocab_size: int) -> str:
    """The type that Megatron stores such tokens in."""
    return "uint16" if vocab_size < UINT16_VOCABULARY else "int32"


@dataclass(frozen=True)
class Piece:
    """Some documents of a shard, in three files."""

    documents: int
    sequences: int
    tokens: int
    bytes: int


class _Hashed:
    """A file that is written once, from start to end."""

    def __init__(self, path: Path) -> None:
        self._file, self._sha256, self.bytes = open(path, "wb", buffering=CHUNK), hashlib.sha256(), 0  # noqa: SIM115
        self._sum, self.sums = 0, []
        """CRC-32 of each whole `BLOCK_BYTES`."""

    def write(self, content: Any) -> None:
        view = memoryview(content).cast("B")
        self._file.write(view)
        self._sha256.update(view)
        while len(view):
            part = view[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self._sum, view = zlib.crc32(part, self._sum), view[len(part) :]
            self.bytes += len(part)
            if self.bytes % BLOCK_BYTES == 0:
                self.sums.append(self._sum)
                self._sum = 0

    def finish(self) -> str:
        """On the disk, even if the power goes; returns the SHA-256."""
        if self.bytes % BLOCK_BYTES:
            self.sums.append(self._sum)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        self._file.close()


class Writer:
    """Writes a shard, or a piece of one, under temporary names. Memory does not grow with it."""

    def __init__(self, folder: Path, name: str, dtype: str, end_of_document: int) -> None:
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype).newbyteorder("<")
        self._end = np.array([end_of_document], self._dtype).tobytes()
        self._bin = _Hashed(self._temporary(".bin"))
        self._lengths = open(self._temporary(".lengths"), "w+b", buffering=CHUNK)  # noqa: SIM115
        self._counts = open(self._temporary(".counts"), "w+b", buffering=CHUNK)  # noqa: SIM115
        self.documents, self.sequences, self.tokens, self.bytes = 0, 0, 0, 0

    def add(self, sequences: Sequence[np.ndarray], text_bytes: int) -> None:
        """A document: the tokens of its sequences without the end, and how many bytes of text they are."""
        lengths = [len(tokens) for tokens in sequences]
        lengths[-1] += 1
        self._bin.write(b"".join([*(tokens.astype(self._dtype).tobytes() for tokens in sequences), self._end]))
        self._lengths.write(b"".join(length.to_bytes(4, "little") for length in lengths))
        self._counts.write(len(sequences).to_bytes(4, "little"))
        self._count(1, len(sequences), sum(lengths), text_bytes)

    def append(self, piece: Piece, folder: Path) -> None:
        """All documents of a piece that was kept under this name."""
        sizes = (piece.tokens * self._dtype.itemsize, 4 * piece.sequences, 4 * piece.documents)
        for suffix, size, write in zip(
            PIECE, sizes, (self._bin.write, self._lengths.write, self._counts.write), strict=True
        ):
            with open(folder / f"{self._name}{suffix}", "rb") as file:
                while block := file.read(CHUNK):
                    write(block)
                assert file.tell() == size
        self._count(piece.documents, piece.sequences, piece.tokens, piece.bytes)

    def _count(self, documents: int, sequences: int, tokens: int, text_bytes: int) -> None:
        self.documents, self.sequences = self.documents + documents, self.sequences + sequences
        self.tokens, self.bytes = self.tokens + tokens, self.bytes + text_bytes

    def keep(self) -> Piece:
        """Ends it as a piece."""
        self.close()
        self._rename(*PIECE)
        return Piece(self.documents, self.sequences, self.tokens, self.bytes)

    def finish(self) -> Shard:
        """Writes the index and the sums: all is on the disk."""
        bin_sha256 = self._bin.finish()
        index = _Hashed(self._temporary(".idx"))
        index.write(HEADER.pack(MAGIC, 1, CODES[self._dtype.name], self.sequences, self.documents + 1))
        for lengths in _numbers(self._lengths):
            index.write(lengths)
        byte = 0
        for lengths in _numbers(self._lengths):
            ends = byte + np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
            index.write(np.concatenate([np.array([byte], "<i8"), ends[:-1]]))
            byte = int(ends[-1])
        sequence = 0
        index.write(np.array([sequence], "<i8"))
        for counts in _numbers(self._counts):
            firsts = sequence + np.cumsum(counts, dtype="<i8")
            index.write(firsts)
            sequence = int(firsts[-1])
        idx_sha256 = index.finish()
        sums = _Hashed(self._temporary(".crc"))
        sums.write(np.array([*self._bin.sums, *index.sums], "<u4"))
        self.close()
        for suffix in PIECE[1:]:
            self._temporary(suffix).unlink()
        assert self._bin.bytes == self.tokens * self._dtype.itemsize == byte and sequence == self.sequences
        return Shard(
            documents=self.documents,
            sequences=self.sequences,
            tokens=self.tokens,
            bytes=self.bytes,
            dtype=self._dtype.name,
            bin_bytes=self._bin.bytes,
            bin_sha256=bin_sha256,
            idx_bytes=index.bytes,
            idx_sha256=idx_sha256,
            crc_sha256=sums.finish(),
        )

    def publish(self) -> None:
        """Gives a finished shard its names, which another may have now."""
        self._rename(".bin", ".idx", ".crc")

    def close(self) -> None:
        """Ends writing, finished or not."""
        self._bin.abandon()
        self._lengths.close()
        self._counts.close()

    def _rename(self, *suffixes: str) -> None:
        for suffix in suffixes:
            self._temporary(suffix).rename(self._folder / f"{self._name}{suffix}")

    def _temporary(self, suffix: str) -> Path:
        return self._folder / f"{self._name}{suffix}{TEMPORARY}"


def _numbers(file: IO[bytes]) -> Iterator[np.ndarray]:
    """A file of int32, in chunks."""
    file.seek(0)
    while block := file.read(4 * CHUNK):
        yield np.frombuffer(block, "<i4")


def open_tokens(folder: Path, name: str, shard: Shard) -> np.ndarray:
    """A split's tokens as a memory map, after checks that cost the same for any size.

    Raises:
      ValueError: a file is missing, of another size than it was written with, or the two are no pair.
    """
    paths = folder / f"{name}.bin", folder / f"{name}.idx"
    for path, size in zip(paths, (shard.bin_bytes, shard.idx_bytes), strict=True):
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        if found != size:
            raise ValueError(f"{path} has {found:,} bytes; the manifest says {size:,}.")
    _check_index(*paths, shard)
    return np.memmap(paths[0], np.dtype(shard.dtype).newbyteorder("<"), mode="r")


def _check_index(tokens: Path, index: Path, shard: Shard) -> None:
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{index} is no Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}.")
        _, version, code, sequences, documents = HEADER.unpack(header)
        said = (version, code, sequences, documents)
        wanted = (1, CODES[shard.dtype], shard.sequences, shard.documents + 1)
        if said != wanted:
            raise ValueError(f"{index} says (version, type, sequences, documents + 1) {said}; the manifest {wanted}.")
        file.seek(HEADER.size + 4 * (sequences - 1))
        length = int.from_bytes(file.read(4), "little")
        file.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        pointer = int.from_bytes(file.read(8), "little")
    ends = pointer + length * np.dtype(shard.dtype).itemsize
    if ends != shard.bin_bytes:
        raise ValueError(f"{index} covers {ends:,} bytes; {tokens} has {shard.bin_bytes:,}: they are no pair.")


def verify(folder: Path, name: str, shard: Shard) -> None:
    """Reads every byte. Raises: ValueError that names a file with other contents than were written, and the place."""
    open_tokens(folder, name, shard)
    sums = folder / f"{name}.crc"
    sums_N = np.frombuffer(sums.read_bytes(), "<u4") if sha256_of(sums) == shard.crc_sha256 else None
    blocks = -(-shard.bin_bytes // BLOCK_BYTES)
    for suffix, wanted, start, stop in (
        (".bin", shard.bin_sha256, 0, blocks),
        (".idx", shard.idx_sha256, blocks, None),
    ):
        path = folder / f"{name}{suffix}"
        if (found := sha256_of(path)) != wanted:
            where = "" if sums_N is None else _damaged(path, sums_N[start:stop])
            raise ValueError(f"{path} has SHA-256 {found[:12]}...; the manifest says {wanted[:12]}...{where}")
    if sums_N is None:
        raise ValueError(f"{sums} is not as it was written.")


def _damaged(path: Path, sums_N: np.ndarray) -> str:
    """The first and the number of the blocks that are other than they were written."""
    with open(path, "rb") as file:
        found = [i for i, wanted in enumerate(sums_N) if zlib.crc32(file.read(BLOCK_BYTES)) != wanted]
    if not found:
        return ""
    first, last = found[0] * BLOCK_BYTES, min((found[0] + 1) * BLOCK_BYTES, path.stat().st_size) - 1
    more = f" (and {len(found) - 1} blocks more)" if len(found) > 1 else ""
    return f" Bytes {first:,} to {last:,} are not what was written{more}."


def sha256_of(path: Path) -> str:
    """Of a whole file. Raises: ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
