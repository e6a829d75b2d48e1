"""The reader of .idx files: what Megatron may write, and what damage is found."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import Split
from data.shards.format import Writer
from data.shards.index import DTYPES, Index, open_index

HEADER = 34
"""Bytes before the lengths."""


def lengths(index: Index) -> np.ndarray:
    """Tokens of each document."""
    split = Split(tokens_N=index.map_tokens(), lengths_S=index.lengths_S, documents_D=index.documents_D, bytes=None)
    return np.diff(split.document_starts())


def megatron(folder: Path, documents: list[list[list[int]]], code: int = 8, extra: bytes = b"") -> Path:
    """Documents of sequences of tokens, written as the format's description says, with nothing of ours."""
    sequences = [sequence for document in documents for sequence in document]
    size = np.dtype(DTYPES[code]).itemsize
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.array([0, *np.cumsum(lengths[:-1], dtype="<i8")], "<i8")[: len(lengths)] * size
    firsts = np.array([0, *np.cumsum([len(document) for document in documents])], "<i8")
    path = folder / "a_text_document.idx"
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(firsts))
    path.write_bytes(head + lengths.tobytes() + pointers.tobytes() + firsts.tobytes() + extra)
    flat = np.array([token for sequence in sequences for token in sequence], DTYPES[code])
    path.with_suffix(".bin").write_bytes(flat.astype(flat.dtype.newbyteorder("<")).tobytes())
    return path


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_documents_of_several_sequences_in_every_type(code: int, tmp_path: Path) -> None:
    path = megatron(tmp_path, [[[1, 2, 3], [4]], [[5, 6]], [[], [7, 8], [9]]], code)
    index = open_index(path)
    assert index.dtype == DTYPES[code]
    assert index.lengths_S.dtype == np.int32 and index.lengths_S.tolist() == [3, 1, 2, 0, 2, 1]
    assert index.documents_D.dtype == np.int64 and index.documents_D.tolist() == [0, 2, 3, 6]
    assert (index.documents, index.tokens) == (3, 9)
    assert lengths(index).tolist() == [4, 2, 3]
    assert index.map_tokens().tolist() == list(range(1, 10))
    assert isinstance(index.lengths_S, np.memmap) and isinstance(index.map_tokens(), np.memmap)
    assert open_index(path, scan=False).lengths_S.tolist() == index.lengths_S.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), max_size=6), st.sampled_from([1, 2, 99])
)
def test_any_documents_in_any_chunks(tmp_path_factory, documents: list[list[list[int]]], chunk: int) -> None:
    path = megatron(tmp_path_factory.mktemp("shards"), documents, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.shards.index.CHUNK", chunk)
        index = open_index(path)
    assert lengths(index).tolist() == [sum(map(len, document)) for document in documents]
    assert index.map_tokens().tolist() == [t for document in documents for sequence in document for t in sequence]


def test_it_reads_what_prepare_writes(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "train", "uint16", 7)
    for document in ([1, 2, 3], [4], [65499] * 5):
        writer.add([np.array(document)], text_bytes=10)
    writer.finish()
    writer.publish()
    index = open_index(tmp_path / "train.idx")
    assert lengths(index).tolist() == [4, 2, 6]
    assert index.documents_D.tolist() == [0, 1, 2, 3]
    assert index.map_tokens().tolist() == [1, 2, 3, 7, 4, 7, *[65499] * 5, 7]


def put(path: Path, at: int, form: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# Of [[1, 2, 3], [4]], [[5, 6]] in uint16: lengths at 34, pointers at 46, documents at 70, 94 bytes.
DAMAGE = {
    "no idx": (lambda p: p.unlink(), r"document\.idx cannot be read: No such file"),
    "no bin": (lambda p: p.with_suffix(".bin").unlink(), r"document\.bin cannot be read: No such file"),
    "empty": (lambda p: cut(p, 0), r"is no Megatron index: it begins with b''"),
    "half a header": (lambda p: cut(p, 20), "is no Megatron index"),
    "other magic": (lambda p: put(p, 0, "<B", 84), r"is no Megatron index: it begins with b'TMIDIDX"),
    "version": (lambda p: put(p, 9, "<Q", 2), "has version 2 of Megatron's format; this program reads version 1"),
    "code 0": (lambda p: put(p, 17, "<B", 0), r"has the type code 0, which is none of Megatron's \(1 to 8\)"),
    "floats": (lambda p: put(p, 17, "<B", 6), "is of float64 numbers; tokens are integers"),
    "other type": (lambda p: put(p, 17, "<B", 4), "covers 16 bytes; .*bin has 12: they are no pair"),
    "cut": (lambda p: cut(p, 93), r"has 93 bytes, and 3 sequences in 2 documents, as it says, take 94\."),
    "modes": (lambda p: p.write_bytes(p.read_bytes() + bytes(3)), "is of a multimodal data set"),
    "more": (lambda p: p.write_bytes(p.read_bytes() + bytes(4)), "has 98 bytes, and 3 sequences in 2 documents"),
    "short bin": (lambda p: cut(p.with_suffix(".bin"), 10), r"covers 12 bytes; .*bin has 10: they are no pair"),
    "last length": (lambda p: put(p, 42, "<i", 3), r"covers 14 bytes; .*bin has 12: they are no pair"),
    "last document": (lambda p: put(p, 86, "<q", 2), r"documents go from sequence 0 to 2, not from 0 to 3"),
}
SCANNED = {
    "length": (lambda p: put(p, 34, "<i", 2), r"sequence 1 begins at byte 6 of the \.bin, and the lengths.* say 4"),
    "pointer": (lambda p: put(p, 54, "<q", 4), r"sequence 1 begins at byte 4 of the \.bin, and the lengths.* say 6"),
    "negative": (lambda p: put(p, 38, "<i", -1), r"sequence 1 has the length -1"),
    "order": (lambda p: put(p, 78, "<q", 9), r"document 2 begins before document 1"),
}


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("name", [*DAMAGE, *SCANNED])
def test_damage_is_named(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.index.CHUNK", chunk)
    path = megatron(tmp_path, [[[1, 2, 3], [4]], [[5, 6]]])
    assert path.stat().st_size == 94
    damage, message = {**DAMAGE, **SCANNED}[name]
    damage(path)
    with pytest.raises(ValueError, match=message):
        open_index(path)
    if name in SCANNED:
        open_index(path, scan=False)
