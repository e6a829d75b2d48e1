"""Which files are read: sorted, once each, and a path that is wrong says which was meant."""

from pathlib import Path

import pytest

from data.files.find import KINDS, find, kind


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "c/b.jsonl",
        "c/a.TXT",
        "c/deep/er/z.parquet",
        "c/deep/m.md",
        "c/x.jsonl.bz2",
        "c/noise",
        "c/.git/a.txt",
        "c/.b.txt",
        "c/part.jsonl/0.jsonl",
        "c/shards/manifest.json",
        "c/shards/prepare.lock",
        "none/x.csv",
        "one.json",
        "c/deep/manifest.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


ALL = ["c/a.TXT", "c/b.jsonl", "c/deep/er/z.parquet", "c/deep/m.md", "c/part.jsonl/0.jsonl"]


@pytest.mark.parametrize(
    ("paths", "files"),
    [
        ("c", ALL),
        ("c/", ALL),
        ("c,c/deep", ALL),
        ("c/deep, c ,c/b.jsonl", ALL),
        ("c/part.jsonl", ["c/part.jsonl/0.jsonl"]),
        ("one.json,c/deep", ["c/deep/er/z.parquet", "c/deep/m.md", "one.json"]),
        ("c/*.jsonl", ["c/b.jsonl", "c/part.jsonl/0.jsonl"]),
        ("c/**/m.*", ["c/deep/m.md"]),
        ("./one.json", ["one.json"]),
        ("c/.b.txt", ["c/.b.txt"]),
        ("c/deep/manifest.json", ["c/deep/manifest.json"]),
    ],
)
def test_paths_name_files(paths: str, files: list[str], tree: Path) -> None:
    assert find(paths).files == files


def test_what_is_not_read_is_listed(tree: Path) -> None:
    assert find("c").ignored == ["c/.b.txt", "c/.git", "c/deep/manifest.json", "c/noise", "c/x.jsonl.bz2"]
    assert find("c/*.jsonl*").ignored == ["c/x.jsonl.bz2"]


def test_links_are_followed_once(tree: Path) -> None:
    (tree / "c" / "again.jsonl").symlink_to("b.jsonl")
    (tree / "c" / "deep" / "circle").symlink_to(tree / "c")
    (tree / "elsewhere").mkdir()
    (tree / "elsewhere" / "e.txt").write_text("x")
    (tree / "c" / "link").symlink_to(tree / "elsewhere")
    assert find("c").files == ["c/a.TXT", "c/again.jsonl", *ALL[2:4], "c/link/e.txt", ALL[4]]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("c,d.jsonl", r"d\.jsonl matches no file"),
        ("one.jso", r"one\.jso matches no file; did you mean one\.json\?"),
        ("c/dep/m.md", r"c/dep/m\.md matches no file; did you mean c/deep\?"),
        ("c/deep/*.jsonl", r"c/deep/\*\.jsonl matches no file"),
        ("none", r"none holds no text: no file ends in \.jsonl"),
        ("c/shards", r"c/shards holds no text"),
        ("c/noise", r"c/noise is of no kind that is read here; these are: \.jsonl"),
    ],
)
def test_a_wrong_path_is_named(paths: str, message: str, tree: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find(paths)


def test_kinds_go_by_the_longest_ending() -> None:
    assert [kind(f"a{suffix}") for suffix in KINDS] == list(KINDS.values())
    unknown = ("a.gz", "a.zst", "jsonl", "a.md.gz", "a.txt.bak")
    assert [kind(name) for name in ("A.JSONL.GZ", "A.Json.ZST", *unknown)] == ["jsonl"] * 2 + [None] * 5
