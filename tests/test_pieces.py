"""Finished pieces: found again as they were written, or not at all."""

import os
from pathlib import Path

import pytest

from data.prepare.pieces import Draft, Pieces, name_of


def make(pieces: Pieces, name: str, content: bytes = b"tokens") -> None:
    draft = Draft(pieces.folder, name)
    (draft.folder / "train.bin").write_bytes(content)
    assert pieces.find(name) is None
    draft.finish({"documents": 3})


def test_a_piece_is_found_once_it_is_finished(tmp_path: Path) -> None:
    pieces, name = Pieces(tmp_path), name_of("write", ["a", 1])
    make(pieces, name)
    assert pieces.find(name) == {"documents": 3}
    assert (pieces.path(name) / "train.bin").read_bytes() == b"tokens"
    draft = Draft(pieces.folder, name)  # of somebody whose preparation was killed
    draft.finish({"documents": 4})
    assert pieces.find(name) == {"documents": 3}
    pieces.remove_temporaries()
    assert [path.name for path in pieces.folder.iterdir()] == [name]
    pieces.remove_all()
    assert not pieces.folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda piece: (piece / "train.bin").write_bytes(b"tokenS"),
        lambda piece: (piece / "train.bin").unlink(),
        lambda piece: (piece / "piece.json").write_bytes(b""),
        lambda piece: (piece / "piece.json").write_text("{}"),
        lambda piece: (piece / "piece.json").unlink(),
    ],
    ids=["flipped", "file gone", "empty", "another", "gone"],
)
def test_a_damaged_piece_is_made_again(damage, tmp_path: Path) -> None:
    """As a power cut may leave it: nobody waited for the disk."""
    pieces = Pieces(tmp_path)
    make(pieces, "write-0")
    damage(pieces.path("write-0"))
    assert pieces.find("write-0") is None
    pieces.remove("write-0")
    make(pieces, "write-0")
    assert pieces.find("write-0") == {"documents": 3}


def test_names_depend_on_all_that_decides_and_others_are_removed(tmp_path: Path) -> None:
    names = {name_of(kind, *content) for kind in ("survey", "write") for content in ([1], [1, None], ["1"], [[1]])}
    assert len(names) == 8 and name_of("write", 1) in names
    pieces = Pieces(tmp_path)
    for name in sorted(names):
        make(pieces, name)
    assert pieces.keep("write", {name_of("write", 1), "write-none"}) == 3
    left = {path.name for path in pieces.folder.iterdir()}
    assert left == {name for name in names if name.startswith("survey")} | {name_of("write", 1)}


def test_drafts_of_two_processes_do_not_meet(tmp_path: Path) -> None:
    draft = Draft(tmp_path, "write-0")
    assert str(os.getpid()) in draft.folder.name
    with pytest.raises(FileExistsError):
        Draft(tmp_path, "write-0")
