"""Shards: what Megatron reads, and what damage is found."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data import shards
from data.shards import Shard, Writer, dtype_of, open_tokens, verify

E = 7


def megatron(path: Path, name: str) -> list[list[int]]:
    """The documents of a shard, read as Megatron-LM does, with nothing of ours."""
    index = (path / f"{name}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    starts = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert starts.tolist() == list(range(sequences + 1))
    tokens = (path / f"{name}.bin").read_bytes()
    return [np.frombuffer(tokens, dtype, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]


def write(folder: Path, name: str, documents: list[list[int]], dtype: str = "uint16") -> Shard:
    writer = Writer(folder, name, dtype, E)
    for document in documents:
        writer.add([np.array(document)], text_bytes=10)
    shard = writer.finish()
    writer.publish()
    return shard


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("chunk", [2, 3, 1 << 20])
def test_an_independent_reader_reads_them(
    dtype: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    documents = [[1, 2, 3], [65499], [5] * 100, [0, 0]]
    shard = write(tmp_path, "train", documents, dtype)
    assert megatron(tmp_path, "train") == [[*document, E] for document in documents]
    assert (shard.documents, shard.tokens, shard.bytes) == (4, 110, 40)
    tokens_N = open_tokens(tmp_path, "train", shard)
    assert isinstance(tokens_N, np.memmap) and tokens_N.dtype == dtype
    assert tokens_N.tolist() == [token for document in documents for token in (*document, E)]
    verify(tmp_path, "train", shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.crc", "train.idx"]


def test_types_are_megatrons() -> None:
    assert [dtype_of(size) for size in (257, 65499, 65500, 65536, 128256)] == ["uint16"] * 2 + ["int32"] * 3


def test_nothing_has_its_name_before_it_is_published(tmp_path: Path) -> None:
    write(tmp_path, "train", [[1]])
    before = (tmp_path / "train.bin").read_bytes(), (tmp_path / "train.idx").read_bytes()
    writer = Writer(tmp_path, "train", "uint16", E)
    writer.add([np.array([2, 3])], 2)
    writer.finish()
    assert before == ((tmp_path / "train.bin").read_bytes(), (tmp_path / "train.idx").read_bytes())
    writer.publish()
    assert megatron(tmp_path, "train") == [[2, 3, E]]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"x" * 7), r"a\.bin has 7 bytes; the manifest says 14"),
        (lambda f: (f / "a.bin").write_bytes(b"x" * 15), r"a\.bin has 15 bytes; the manifest says 14"),
        (lambda f: (f / "a.bin").unlink(), r"a\.bin cannot be read: No such file"),
        (lambda f: (f / "a.idx").unlink(), r"a\.idx cannot be read: No such file"),
        (lambda f: (f / "a.idx").write_bytes(b""), r"a\.idx has 0 bytes; the manifest says 82"),
        (lambda f: (f / "a.idx").write_bytes(bytes(82)), r"a\.idx is no Megatron index"),
        (lambda f: (f / "b.idx").rename(f / "a.idx"), r"a\.idx covers 10 bytes; .*a\.bin has 14"),
        (lambda f: (f / "c.idx").rename(f / "a.idx"), r"a\.idx says .*\(1, 4, 2, 3\); the manifest \(1, 8, 2, 3\)"),
        (lambda f: flip(f / "a.idx", 9), r"a\.idx says .*\(0, 8, 2, 3\)"),
    ],
    ids=["cut", "grown", "no bin", "no idx", "empty idx", "zeros", "other idx", "other dtype", "version"],
)
def test_damage_is_named_when_opened(damage, message: str, tmp_path: Path) -> None:
    shard = write(tmp_path, "a", [[1, 2, 3], [4, 5]])
    write(tmp_path, "b", [[1], [2, 3]])
    write(tmp_path, "c", [[1], [2, 3]], "int32")
    open_tokens(tmp_path, "a", shard)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_tokens(tmp_path, "a", shard)


@pytest.mark.parametrize(("name", "at"), [("a.bin", 0), ("a.bin", 13), ("a.idx", 36), ("a.idx", 65)])
def test_a_flipped_bit_is_found(name: str, at: int, tmp_path: Path) -> None:
    shard = write(tmp_path, "a", [[1, 2, 3], [4, 5]])
    flip(tmp_path / name, at)
    open_tokens(tmp_path, "a", shard)  # which looks at sizes
    with pytest.raises(ValueError, match=rf"{name} has SHA-256"):
        verify(tmp_path, "a", shard)
