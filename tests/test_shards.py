"""Shards: what Megatron reads, and what damage is found."""

import itertools
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import format
from data.shards.format import Shard, Writer, dtype_of, open_tokens, verify

E = 7


def megatron(path: Path, name: str) -> list[list[list[int]]]:
    """The sequences of each document of a shard, read as Megatron-LM does, with nothing of ours."""
    index = (path / f"{name}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    dtype = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    starts = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert (starts[0], starts[-1]) == (0, sequences)
    tokens = (path / f"{name}.bin").read_bytes()
    found = [np.frombuffer(tokens, dtype, n, at).tolist() for n, at in zip(lengths, pointers, strict=True)]
    return [found[start:stop] for start, stop in itertools.pairwise(starts)]


def write(folder: Path, name: str, documents: list[list[list[int]]], dtype: str = "uint16") -> Shard:
    """Of documents of sequences."""
    writer = Writer(folder, name, dtype, E)
    for document in documents:
        writer.add([np.array(sequence) for sequence in document], text_bytes=10)
    shard = writer.finish()
    writer.publish()
    return shard


def closed(documents: list[list[list[int]]]) -> list[list[list[int]]]:
    """With the token that ends a document."""
    return [[*document[:-1], [*document[-1], E]] for document in documents]


DOCUMENTS = [[[1, 2, 3]], [[65499]], [[4, 4], [], [5] * 100], [[], [0, 0]], [[9], [8], [7]]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("chunk", [2, 3, 1 << 20])
def test_an_independent_reader_reads_them(
    dtype: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format, "CHUNK", chunk)
    shard = write(tmp_path, "train", DOCUMENTS, dtype)
    assert megatron(tmp_path, "train") == closed(DOCUMENTS)
    assert (shard.documents, shard.sequences, shard.tokens, shard.bytes) == (5, 10, 116, 50)
    tokens_N = open_tokens(tmp_path, "train", shard)
    assert isinstance(tokens_N, np.memmap) and tokens_N.dtype == dtype
    assert tokens_N.tolist() == [token for document in closed(DOCUMENTS) for part in document for token in part]
    verify(tmp_path, "train", shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.crc", "train.idx"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(DOCUMENTS), max_size=4), max_size=5), st.integers(2, 40))
def test_pieces_end_to_end_are_the_shard(pieces: list[list[list[list[int]]]], chunk: int) -> None:
    if not any(pieces):
        return  # of nothing there is no shard
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "CHUNK", chunk)
        patch.setattr(format, "BLOCK_BYTES", 16)
        folder, whole = Path(name), write(Path(name), "train", [document for piece in pieces for document in piece])
        (folder / "joined").mkdir()
        joined = Writer(folder / "joined", "train", "uint16", E)
        for i, documents in enumerate(pieces):
            (folder / str(i)).mkdir()
            writer = Writer(folder / str(i), "train", "uint16", E)
            for document in documents:
                writer.add([np.array(sequence, np.int64) for sequence in document], text_bytes=10)
            joined.append(writer.keep(), folder / str(i))
        assert joined.finish() == whole
        joined.publish()
        for suffix in ".bin", ".idx", ".crc":
            assert (folder / "joined" / f"train{suffix}").read_bytes() == (folder / f"train{suffix}").read_bytes()


def test_types_are_megatrons() -> None:
    assert [dtype_of(size) for size in (257, 65499, 65500, 65536, 128256)] == ["uint16"] * 2 + ["int32"] * 3


def test_nothing_has_its_name_before_it_is_published(tmp_path: Path) -> None:
    write(tmp_path, "train", [[[1]]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = Writer(tmp_path, "train", "uint16", E)
    writer.add([np.array([2, 3])], 2)
    writer.finish()
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()
    writer.publish()
    assert megatron(tmp_path, "train") == [[[2, 3, E]]]


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
    shard = write(tmp_path, "a", [[[1, 2, 3]], [[4, 5]]])
    write(tmp_path, "b", [[[1]], [[2, 3]]])
    write(tmp_path, "c", [[[1]], [[2, 3]]], "int32")
    open_tokens(tmp_path, "a", shard)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_tokens(tmp_path, "a", shard)


@pytest.mark.parametrize(("name", "at"), [("a.bin", 0), ("a.bin", 13), ("a.idx", 36), ("a.idx", 65)])
def test_a_flipped_bit_is_found(name: str, at: int, tmp_path: Path) -> None:
    shard = write(tmp_path, "a", [[[1, 2, 3]], [[4, 5]]])
    flip(tmp_path / name, at)
    open_tokens(tmp_path, "a", shard)  # which looks at sizes
    with pytest.raises(ValueError, match=rf"{name} has SHA-256"):
        verify(tmp_path, "a", shard)


def test_the_bytes_that_are_damaged_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "BLOCK_BYTES", 16)
    shard = write(tmp_path, "a", [[[i] * 9] for i in range(10)])  # 200 bytes of tokens
    flip(tmp_path / "a.bin", 35)
    with pytest.raises(ValueError, match=r"a\.bin has .*\. Bytes 32 to 47 are not what was written\.$"):
        verify(tmp_path, "a", shard)
    flip(tmp_path / "a.bin", 199)
    with pytest.raises(ValueError, match=r"Bytes 32 to 47 are not what was written \(and 1 blocks more\)\.$"):
        verify(tmp_path, "a", shard)
    flip(tmp_path / "a.bin", 35)
    with pytest.raises(ValueError, match=r"Bytes 192 to 199 are not what was written\.$"):
        verify(tmp_path, "a", shard)
    flip(tmp_path / "a.bin", 199)
    flip(tmp_path / "a.idx", 100)
    with pytest.raises(ValueError, match=r"a\.idx has .*\. Bytes 96 to 111 are not what was written\.$"):
        verify(tmp_path, "a", shard)
    flip(tmp_path / "a.crc", 3)
    with pytest.raises(ValueError, match=r"a\.idx has .*\.\.\.$"):
        verify(tmp_path, "a", shard)
    flip(tmp_path / "a.idx", 100)
    with pytest.raises(ValueError, match=r"a\.crc is not as it was written"):
        verify(tmp_path, "a", shard)
    (tmp_path / "a.crc").unlink()
    with pytest.raises(ValueError, match=r"a\.crc cannot be read: No such file"):
        verify(tmp_path, "a", shard)
