"""Bad input: each kind is named by file and place, or left out and counted, and never changes what is around it."""

import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import Fail, Skip, TextFiles
from data.documents import BadFile, Reading
from data.files.records import Limits, documents

GOOD = [f"document {i}: \u00e9 and more\n" for i in range(4)]
MOST = 4_000_000
"""Bytes of a record in these tests."""


def row(text: Any) -> bytes:
    return json.dumps({"id": 7, "text": text}, ensure_ascii=False).encode() + b"\n"


def jsonl(*bad: bytes) -> bytes:
    """Two good lines, a bad one or more, two good lines."""
    return row(GOOD[0]) + row(GOOD[1]) + b"".join(bad) + row(GOOD[2]) + row(GOOD[3])


def table(path: Path, column: Any, name: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path)


def strings(*values: bytes | None) -> pa.Array:
    """A string column whose bytes nobody checks."""
    return pa.array(values, pa.binary()).view(pa.string())


def texts(path: Path, **limits: Any) -> tuple[list[str], list[str]]:
    """The documents of a file, and the bad records with places and reasons."""
    bad: list[str] = []
    reading = Reading(str(path), lambda found: bad.append(f"{found.where}: {found.reason}"), lambda count: None)
    known = {"text_key": "text", "cut_text_bytes": 0, "max_record_bytes": MOST}
    found = [text.decode() for (text,) in documents(reading, Limits(**known | limits))]
    assert reading.sha256 is not None
    return found, bad


# A table of bad input


@dataclass(frozen=True)
class Case:
    """How a bad file is made, what the error says of it, and by which reason it is counted."""

    make: Callable[[Path], Any]
    says: str
    reason: str
    name: str = "bad.jsonl"
    kept: int = 4
    """Of the good documents in the bad file, those that Skip keeps."""


def content(raw: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(raw)


FOUR = jsonl()
LINE3 = len(row(GOOD[0]) + row(GOOD[1]))
"""The byte that the third line begins at."""
ZIPPED = gzip.compress(b"".join(row(f"{i} {os.urandom(64).hex()}") for i in range(5000)), mtime=0)
PACKED = zstandard.ZstdCompressor(write_checksum=True).compress(
    b"".join(row(os.urandom(64).hex()) for _ in range(5000))
)
ROWS: dict[str, Case] = {
    "no JSON": Case(content(jsonl(b"hello\n")), rf"line 3 \(byte {LINE3}\): is not valid JSON", "invalid JSON"),
    "open string": Case(content(jsonl(b'{"text": "abc\n')), r"line 3 .*: is not valid JSON", "invalid JSON"),
    "two objects": Case(content(jsonl(row("a")[:-1] + row("b"))), r"line 3 .*Extra data", "invalid JSON"),
    "single quotes": Case(content(jsonl(b"{'text': 'a'}\n")), r"line 3 .*double quotes", "invalid JSON"),
    "nested deeply": Case(content(jsonl(b"[" * 200_000 + b"\n")), r"line 3 .*nested too deeply", "invalid JSON"),
    "huge number": Case(content(jsonl(b'{"n": 1' + b"0" * 5000 + b"}\n")), r"line 3 .*is not valid", "invalid JSON"),
    "half last line": Case(content(FOUR + row("lost")[:-6]), r"line 5 .*ends inside this line", "cut last line"),
    "mark in the middle": Case(content(jsonl(b"\xef\xbb\xbf" + row("a"))), r"line 3 .*BOM", "invalid JSON"),
    "NUL in JSON": Case(content(jsonl(b'{"text": "a\0b"}\n')), rf"line 3 .*NUL at byte {LINE3 + 11}", "NUL"),
    "NUL escaped": Case(
        content(jsonl(b'{"text": "ab\\u0000"}\n')), r"line 3 .*'text' holds a NUL at character 2", "NUL"
    ),
    "hole of zeros": Case(
        content(jsonl(bytes(4096) + b"\n")), r"line 3 .*NUL at byte \d+; was the file damaged", "NUL"
    ),
    "bad UTF-8": Case(content(jsonl(b'{"text": "\xff"}\n')), rf"line 3 .*not UTF-8 at byte {LINE3 + 10}", "not UTF-8"),
    "Latin-1": Case(content(jsonl('{"text": "\u00e9t\u00e9"}\n'.encode("latin-1"))), "line 3 .*not UTF-8", "not UTF-8"),
    "cut UTF-8": Case(content(FOUR + b'{"text": "\xc3'), r"line 5 .*is not UTF-8", "not UTF-8"),
    "CESU surrogates": Case(content(jsonl(b'{"text": "\xed\xa0\x80"}\n')), r"line 3 .*is not UTF-8", "not UTF-8"),
    "lone surrogate": Case(content(jsonl(b'{"text": "ab\\ud800"}\n')), r"line 3 .*U\+D800, at char", "lone surrogate"),
    "array": Case(content(jsonl(b'["text"]\n')), r"line 3 .*is an array, not an object", "not an object"),
    "string": Case(content(jsonl(b'"text"\n')), r"line 3 .*is a string, not an object", "not an object"),
    "number": Case(content(jsonl(b"17\n")), r"line 3 .*is a number, not an object", "not an object"),
    "text is a number": Case(content(jsonl(row(17))), r"line 3 .*'text' is a number, not a string", "not a string"),
    "text is a list": Case(content(jsonl(row(["a"]))), r"line 3 .*'text' is an array, not a str", "not a string"),
    "text is true": Case(content(jsonl(row(True))), r"line 3 .*'text' is true, not a string", "not a string"),
    "text is null": Case(content(jsonl(row(None))), r"line 3 .*'text' is null, not a string", "null"),
    "no such key": Case(
        content(jsonl(b'{"Text": "a"}\n')), r"line 3 .*did you mean data\.text_key=Text", "missing key"
    ),
    "no key": Case(content(jsonl(b"{}\n")), r"line 3 .*no key 'text', nor any other", "missing key"),
    "long line": Case(
        lambda path: path.write_bytes(jsonl(row("x" * 50_000_000))), r"line 3 .*is 50,000,021 bytes long", "too long"
    ),
    "long last line": Case(content(FOUR + row("x" * MOST)[:-1]), r"line 5 .*bytes long, more than", "too long"),
    "indented JSON": Case(content(b'{\n "text": "a"\n}\n'), r"line 1 \(byte 0\): is not valid", "invalid JSON", kept=0),
    "bad UTF-8 in text": Case(
        content(b"ok\nfine \xff\n\nmore\n"), r"line 2 \(byte 3\): is not UTF-8 at byte 8", "not UTF-8", "bad.txt", 0
    ),
    "NUL in text": Case(content(b"ok\n\nto\0\n"), r"line 3 .*holds a NUL at byte 6; is it text", "NUL", "bad.md", 0),
    "long text": Case(content(b"x" * (MOST + 1)), "line 1 .*has more than data", "too long", "bad.txt", 0),
    "long document": Case(
        content(b"line\n" * (MOST // 4)), r"line 1 .*more than data\.max_record_bytes=4000000", "too long", "bad.txt", 0
    ),
    "null in parquet": Case(
        lambda path: table(path, [*GOOD[:2], None, *GOOD[2:]]), r"row 3: its 'text' is null", "null", "bad.parquet"
    ),
    "NUL in parquet": Case(lambda path: table(path, [*GOOD, "a\0"]), r"row 5: .*a NUL", "NUL", "bad.parquet"),
    "bad UTF-8 in parquet": Case(
        lambda path: table(path, strings(*(text.encode() for text in GOOD), b"ab\xff")),
        r"row 5: its 'text' is not UTF-8 at byte 2",
        "not UTF-8",
        "bad.parquet",
    ),
}
FILES: dict[str, Case] = {
    "empty": Case(content(b""), r"line 0: the file is empty", "empty file"),
    "empty text": Case(content(b""), r"line 0: the file is empty", "empty file", "bad.txt"),
    "empty gzip": Case(content(gzip.compress(b"")), r"line 0: the file is empty", "empty file", "bad.jsonl.gz"),
    "UTF-16": Case(content(FOUR.decode().encode("utf-16")), r"line 1 .*UTF-16.*iconv -f UTF-16", "not UTF-8"),
    "UTF-16 BE": Case(content(b"\xfe\xff" + FOUR.decode().encode("utf-16-be")), r"line 1 .*UTF-16", "not UTF-8"),
    "no gzip": Case(content(FOUR), r"line 0: is no intact gzip file.*Not a gzipped", "damaged gzip", "bad.jsonl.gz"),
    "cut gzip": Case(
        content(ZIPPED[: len(ZIPPED) // 2]), r"line \d+: the gzip stream breaks off", "cut gzip", "bad.jsonl.gz"
    ),
    "cut checksum": Case(content(ZIPPED[:-4]), r"line \d+: the gzip stream breaks off", "cut gzip", "bad.jsonl.gz"),
    "wrong checksum": Case(
        content(ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:]), r"no intact gzip.*CRC", "damaged gzip", "bad.jsonl.gz"
    ),
    "damaged gzip": Case(
        content(ZIPPED[:10] + b"\xff" + ZIPPED[11:]), r"no intact gzip", "damaged gzip", "bad.jsonl.gz"
    ),
    "empty zst": Case(content(zstandard.compress(b"")), r"line 0: the file is empty", "empty file", "bad.jsonl.zst"),
    "no zst": Case(content(FOUR), r"line 0: is no intact zst file.*: zstd.*error", "damaged zst", "bad.jsonl.zst"),
    "cut zst": Case(
        content(PACKED[: len(PACKED) // 2]), r"line \d+: the zst stream breaks off", "cut zst", "bad.jsonl.zst"
    ),
    "zst cut in its head": Case(
        content(PACKED[:3]), r"line 0: the zst stream breaks off", "cut zst", "bad.txt.zst"
    ),
    "zst without its last byte": Case(
        content(PACKED[:-1]), r"line \d+: the zst stream breaks off", "cut zst", "bad.jsonl.zst"
    ),
    "zst cut between frames": Case(
        content(PACKED + PACKED[:9]), r"line \d+: the zst stream breaks off", "cut zst", "bad.json.zst"
    ),
    "zst with a wrong checksum": Case(
        content(PACKED[:-4] + bytes(4)), r"line \d+: is no intact zst file.*checksum", "damaged zst", "bad.jsonl.zst"
    ),
    "damaged zst": Case(
        content(PACKED[:4] + b"\xff" + PACKED[5:]), r"line 0: is no intact zst", "damaged zst", "bad.jsonl.zst"
    ),
    "zst and more": Case(content(PACKED + b"more"), r"line \d+: is no intact zst", "damaged zst", "bad.jsonl.zst"),
    "no parquet": Case(content(FOUR), r": is no intact parquet file", "damaged parquet", "bad.parquet"),
    "cut parquet": Case(
        lambda path: (table(path, GOOD), path.write_bytes(path.read_bytes()[:-9])),
        r": is no intact parquet file",
        "damaged parquet",
        "bad.parquet",
    ),
    "no column": Case(
        lambda path: table(path, GOOD, "texts"), r"no column 'text'; did you mean data\.text_key=texts",
        "missing column", "bad.parquet",
    ),
    "column of numbers": Case(
        lambda path: table(path, [1, 2, 3]), r"column 'text' holds int64, not strings", "not a string", "bad.parquet"
    ),
    "column of bytes": Case(
        lambda path: table(path, [b"a", b"b"]), r"column 'text' holds binary, not", "not a string", "bad.parquet"
    ),
    "pipe": Case(os.mkfifo, r": is not a regular file", "not a file"),
    "dangling link": Case(lambda path: path.symlink_to("nowhere"), r": cannot be read: No such", "cannot be read"),
}  # fmt: skip


def prepared(folder: Path, case: Case, policy: Fail | Skip) -> TextFiles:
    """A config for two files, the bad one and a good one."""
    source = folder / "text"
    source.mkdir()
    case.make(source / case.name)
    (source / "good.jsonl").write_bytes(FOUR)
    return TextFiles(
        paths=str(source),
        bad_records=policy,
        split="1,0",
        cut_text_bytes=0,
        max_record_bytes=MOST,
        folder=str(folder / "shards"),
    )


@pytest.mark.parametrize("name", [*ROWS, *FILES])
def test_fail_names_file_and_place(name: str, tmp_path: Path) -> None:
    case = (ROWS | FILES)[name]
    config = prepared(tmp_path, case, Fail())
    with pytest.raises(ValueError, match=rf"(?s)/text/{case.name}.*{case.says}.*data\.bad_records=Skip") as error:
        config.prepare(lambda line: None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not config.is_prepared()
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["pieces", "prepare.lock"]


@pytest.mark.parametrize("name", [*ROWS, *FILES])
def test_skip_counts_and_keeps_the_rest(name: str, tmp_path: Path) -> None:
    case = (ROWS | FILES)[name]
    config = prepared(tmp_path, case, Skip(budget=3))
    lines: list[str] = []
    config.prepare(lines.append)
    bad, good = config.manifest().sources
    assert bad.bad.keys() == {case.reason} and good.bad == {}
    assert any(f"{case.name}: {case.reason} " in line for line in lines)
    corpus = config.load()
    whole = corpus.tokenizer.decode(corpus.splits["train"].tokens_N)
    kept = case.kept if name in ROWS else 0
    assert (bad.documents, good.documents) == ({"train": kept} if kept else {}, {"train": 4})
    assert whole == "".join(f"{text}\n" for text in [*GOOD[:kept], *GOOD])
    assert (bad.sha256 is None) == (name in FILES)


def test_the_table_is_as_long_as_was_asked() -> None:
    assert len(ROWS) + len(FILES) >= 30 and len(ROWS) >= 20


# Prompts


@pytest.mark.parametrize(
    ("record", "says", "reason"),
    [
        ({"text": "a"}, "has no key 'question', only 'text'", "missing key"),
        ({"text": "a", "Question": "b"}, r"did you mean data\.prompt_key=Question\?", "missing key"),
        ({"question": "a", "txt": "b"}, r"has no key 'text'; did you mean data\.text_key=txt\?", "missing key"),
        ({"text": "a", "question": None}, "its 'question' is null, not a string", "null"),
        ({"text": "a", "question": "b\0"}, "its 'question' holds a NUL at character 1", "NUL"),
        ({"text": "a", "question": "b" * (MOST + 1)}, "bytes long, more than", "too long"),
    ],
)
def test_a_bad_prompt_is_named(record: dict, says: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        json.dumps({"text": "t", "question": "q"}).encode() + b"\n" + json.dumps(record).encode()
    )
    config = TextFiles(
        paths=str(tmp_path), prompt_key="question", split="1,0", max_record_bytes=MOST, folder=str(tmp_path / "s")
    )
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2 .*{says}.*data\.bad_records=Skip"):
        config.prepare(lambda line: None)
    skips = dataclasses.replace(config, bad_records=Skip())
    skips.prepare(lambda line: None)
    assert skips.manifest().sources[0].bad == {reason: 1}


def test_a_missing_prompt_column_is_named(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", GOOD)
    config = TextFiles(paths=str(tmp_path), prompt_key="ids", split="1,0", folder=str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"a\.parquet: has no column 'ids'; did you mean data\.prompt_key=id\?"):
        config.prepare(lambda line: None)


# The budget


def test_a_budget_that_does_not_do_names_the_last_and_counts(tmp_path: Path) -> None:
    case = Case(content(jsonl(b"x\n", row(None), b"y\n")), "", "")
    config = prepared(tmp_path, case, Skip(budget=2))
    with pytest.raises(ValueError, match=r"3 bad records \(invalid JSON 2, null 1\) .*budget=2; .*bad\.jsonl, line 5"):
        config.prepare(lambda line: None)
    assert not config.is_prepared()


def test_a_budget_holds_over_all_files(tmp_path: Path) -> None:
    for name in "a", "b":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(b"x\n"))
    config = TextFiles(paths=str(tmp_path), split="1,0", folder=str(tmp_path / "s"), bad_records=Skip(budget=1))
    with pytest.raises(ValueError, match=r"2 bad records .*b\.jsonl, line 3"):
        config.prepare(lambda line: None)


# Input that is good


@pytest.mark.parametrize(
    "raw",
    [
        FOUR,
        b"\xef\xbb\xbf" + FOUR,
        FOUR.replace(b"\n", b"\r\n"),
        FOUR.replace(b"}\n", b"}\n\n  \t\r\n"),
        FOUR.removesuffix(b"\n"),
        b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD),
    ],
    ids=["plain", "mark", "CRLF", "blank lines", "no last end", "escapes"],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL", "a.jsonl.gz", "a.jsonl.zst", "A.JSON.ZST"])
def test_good_lines(raw: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.lower().rpartition(".")[2], bytes)
    path.write_bytes(pack(raw))
    assert texts(path) == (GOOD, [])


def test_a_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(FOUR) + gzip.compress(FOUR))
    assert texts(tmp_path / "a.jsonl.gz") == (GOOD * 2, [])


def test_a_zst_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    """As pzstd and `cat` make them: some may be empty, or hold no content but a note."""
    note = b"\x50\x2a\x4d\x18\x04\0\0\0note"
    frames = [note, zstandard.compress(FOUR), zstandard.compress(b""), note, zstandard.compress(FOUR)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts(tmp_path / "a.jsonl.zst") == (GOOD * 2, [])


def test_a_zst_may_be_cut_nowhere(tmp_path: Path) -> None:
    """The library's own reader takes the end of a file for the end of a frame."""
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(FOUR)
    for length in range(1, len(whole)):
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:length])
        with pytest.raises(BadFile, match="the zst stream breaks off"):
            texts(tmp_path / "a.jsonl.zst")


def test_a_zst_with_a_window_of_two_gigabytes_is_read(tmp_path: Path) -> None:
    long = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(FOUR) + packer.flush())
    assert texts(tmp_path / "a.jsonl.zst") == (GOOD, [])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_good_parquet(kind: pa.DataType, tmp_path: Path) -> None:
    many = [f"{i}\n" for i in range(1000)]
    table(tmp_path / "a.parquet", pa.array(many, pa.string()).cast(kind))
    assert texts(tmp_path / "a.parquet") == (many, [])


def test_a_record_may_be_as_long_as_allowed(tmp_path: Path) -> None:
    for name, raw in ("a.jsonl", b'{"text": "abc"}'), ("a.txt", b"0123456789abcde"):
        for end in b"", b"\n":
            (tmp_path / name).write_bytes(raw + end)
            assert texts(tmp_path / name, max_record_bytes=15)[1] == []
            assert texts(tmp_path / name, max_record_bytes=14)[1] == ["line 1 (byte 0): too long"]


def test_text_is_cut_at_blank_lines_and_lost_nowhere(tmp_path: Path) -> None:
    paragraphs = [f"{'word ' * (i % 30)}{i}\n" * (i % 4 + 1) + "\n" * (i % 3) for i in range(300)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    pieces, bad = texts(tmp_path / "a.txt", cut_text_bytes=200)
    assert "".join(pieces) == "".join(paragraphs) and bad == []
    assert all(200 <= len(piece) < 400 + 160 for piece in pieces[:-1])
    assert all(piece.endswith("\n\n") or len(piece) >= 400 for piece in pieces[:-1])
    assert texts(tmp_path / "a.txt") == (["".join(paragraphs)], [])


def test_a_bad_line_costs_its_own_piece_of_text(tmp_path: Path) -> None:
    raw = b"one\n\ntwo\n\n" + b"ab\xff\n\n" + b"x" * 99 + b"\n" + b"four\n\nfive"
    (tmp_path / "a.txt").write_bytes(raw)
    found, bad = texts(tmp_path / "a.txt", cut_text_bytes=4, max_record_bytes=20)
    assert found == ["one\n\n", "two\n\n", "four\n\n", "five"]
    assert bad == ["line 5 (byte 10): not UTF-8", "line 7 (byte 15): too long"]


def test_a_long_line_within_text(tmp_path: Path) -> None:
    for size, bad in (30, []), (31, ["line 2 (byte 3): too long"]):
        (tmp_path / "a.txt").write_bytes(b"ab\n" + b"x" * size + b"\n" + b"cd\n\nef\n")
        found, said = texts(tmp_path / "a.txt", cut_text_bytes=15, max_record_bytes=30)
        assert said == bad
        assert "".join(found) == "ab\n" + ("" if bad else "x" * size + "\n") + "cd\n\nef\n"


def test_memory_does_not_grow_with_a_line(tmp_path: Path) -> None:
    import tracemalloc

    long = row("x" * 50_000_000)
    for name, raw, most in ("a.jsonl", long, 6_000_000), ("a.jsonl.zst", zstandard.compress(long), 25_000_000):
        (tmp_path / name).write_bytes(raw)
        tracemalloc.start()
        assert texts(tmp_path / name, max_record_bytes=100_000)[1] == ["line 1 (byte 0): too long"]
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(FOUR)
    path.chmod(0)
    me = os.geteuid()
    if me == 0:
        for folder in (tmp_path, *tmp_path.parents[:2]):  # pytest's own, closed to others
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(BadFile, match=r"a\.jsonl: cannot be read: Permission denied"):
            texts(path)
    finally:
        os.seteuid(me)
