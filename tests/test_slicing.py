"""Slices of a file: end to end their documents, bad records and places are those of the file read whole."""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import BadFile, Part, Reading, Slice
from data.files.records import Limits, documents
from data.files.slicing import cut

LINES = st.sampled_from(
    [
        '{"text": "abc"}',
        '{"text": "\u00e9' + "x" * 30 + '"}',
        "not JSON",
        "",
        "  ",
        '{"text": 7}',
        '{"text": "' + "y" * 200 + '"}',
        "word word word",
        "\r",
        "\x00",
    ]
)
"""One of them is longer than is allowed."""


def read(path: Path, limits: Limits, slices: list[Slice]) -> tuple[list[list[bytes]], list[str]]:
    """Documents and bad records of slices, in order."""
    bad: list[str] = []
    reading = Reading(str(path), lambda found: bad.append(str(found)), lambda count: None)
    return [document for piece in slices for document in documents(reading, limits, piece)], bad


def check(path: Path, limits: Limits, most_bytes: int) -> list[Slice]:
    """Compares; returns the slices."""
    part, counted = Part(str(path), "", path.stat().st_size), []
    reading = Reading(str(path), lambda bad: None, counted.append)
    slices = cut(part, most_bytes, reading, limits)
    assert read(path, limits, slices) == read(path, limits, [Slice(part)])
    if len(slices) > 1 and path.suffix != ".parquet":
        assert reading.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sum(counted) == part.bytes
        assert [piece.stop for piece in slices[:-1]] == [piece.start for piece in slices[1:]]
        assert all(piece.start < (piece.stop or 0) for piece in slices)
        assert slices[-1].stop == part.bytes and sum(piece.bytes or 0 for piece in slices) == part.bytes
    return slices


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(LINES, min_size=1, max_size=40),
    last=st.sampled_from(["", "\n"]),
    mark=st.booleans(),
    most=st.integers(1, 300),
    block=st.integers(1, 64),
    name=st.sampled_from(["a.jsonl", "a.txt"]),
    cut_bytes=st.integers(1, 40),
)
def test_slices_are_the_file(lines, last, mark, most, block, name, cut_bytes) -> None:
    content = (b"\xef\xbb\xbf" if mark else b"") + ("\n".join(lines) + last).encode()
    if not content.removeprefix(b"\xef\xbb\xbf"):
        return
    limits = Limits(text_key="text", cut_text_bytes=cut_bytes, max_record_bytes=100)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.files.slicing.BLOCK_BYTES", block)
        path = Path(folder, name)
        path.write_bytes(content)
        slices = check(path, limits, most)
    if name == "a.jsonl" and most + block < len(content) // 2 and max(map(len, lines)) < most:
        assert len(slices) > 1


def test_large_files_are_cut_into_slices_of_about_the_size_that_was_asked(tmp_path: Path) -> None:
    limits = Limits(text_key="text", cut_text_bytes=1000, max_record_bytes=10**6)
    rows = [json.dumps({"text": f"{i} " + "word " * 400}) + "\n" for i in range(4000)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "a.txt").write_text("".join(f"{i} {'word ' * 15}\n" + "\n" * (i % 9 == 0) for i in range(100_000)))
    for name in "a.jsonl", "a.txt":
        slices = check(tmp_path / name, limits, 1_500_000)
        assert len(slices) > 3
        assert all(1_500_000 <= (piece.bytes or 0) < 1_500_000 + (2 << 20) for piece in slices[:-1])


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    limits = Limits(text_key="text", cut_text_bytes=0, max_record_bytes=1000, prompt_key="prompt")
    rows = [f"{i} " + "x" * 50 for i in range(1000)] + [None, "bad\0"] * 20
    table = pa.table({"text": rows, "id": range(1040), "prompt": [f"prompt {i}" for i in range(1040)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=64, compression="none")
    slices = check(tmp_path / "a.parquet", limits, 20_000)
    assert 3 < len(slices) < 17 and slices[-1].stop == 17
    found, bad = read(tmp_path / "a.parquet", limits, slices)
    counted: list[int] = []
    list(documents(Reading(slices[0].part.name, lambda bad: None, counted.append), limits))
    assert sum(counted) == sum(piece.bytes or 0 for piece in slices) and len(counted) == 17
    assert found[500] == [b"prompt 500", rows[500].encode()]
    assert bad[-1].endswith("row 1040: its 'text' holds a NUL at character 3.") and len(bad) == 40
    assert check(tmp_path / "a.parquet", limits, 10**6) == [
        Slice(Part(str(tmp_path / "a.parquet"), "", slices[0].part.bytes))
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "whole.txt"])
def test_what_cannot_be_cut_stays_whole(name: str, tmp_path: Path) -> None:
    content = b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(1000))
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    limits = Limits(text_key="text", cut_text_bytes=0, max_record_bytes=100_000)
    (piece,) = check(tmp_path / name, limits, 10)
    assert (piece.start, piece.stop, piece.bytes) == (0, None, None)


def test_what_is_bad_as_a_whole_is_not_cut(tmp_path: Path) -> None:
    limits = Limits(text_key="text", cut_text_bytes=10, max_record_bytes=1000)
    for name in "a.jsonl", "a.txt":
        (tmp_path / name).write_bytes('{"text": "a"}\n'.encode("utf-16") * 100)
        with pytest.raises(BadFile, match="UTF-16"):
            check(tmp_path / name, limits, 10)
    (tmp_path / "a.parquet").write_bytes(b"none")
    part = Part(str(tmp_path / "a.parquet"), "", 4)
    assert cut(part, 1, Reading("", lambda bad: None, lambda count: None), limits) == [Slice(part)]
