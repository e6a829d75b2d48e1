"""Loose JSON as a TFDS dataset: what is in it, its slices, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from data.export.loose_json import LooseJson
from data.export.loose_json.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tfds.disable_progress_bar()


def write(path: str, documents: int) -> list[str]:
    texts = [f"{path} {i} héron" for i in range(documents)]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps({"text": text, "more": i}) + "\n" for i, text in enumerate(texts)))
    return texts


def read(name: str, split: str) -> list[str]:
    source: Any = tfds.builder(name, data_dir="tfds").as_data_source(split=split)
    return [example["text"].decode() for example in source]


def test_all_documents_are_there_in_an_order_of_their_own() -> None:
    texts = write("text/a.jsonl", 300) + write("text/b.jsonl", 100)
    (Path("text") / "c.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    LooseJson(name="toy", paths="text", data_dir="tfds").download_and_prepare()
    found = read("toy", "train")
    assert sorted(found) == sorted(texts) and found != texts
    train, validation = (read("toy", split) for split in ("train[:94.9%]", "train[94.9%:99.9%]"))
    assert train + validation == found and (len(train), len(validation)) == (380, 20)
    held_out = [text.startswith("text/b") for text in validation]
    assert any(held_out) and not all(held_out)  # a slice is no run of the files


def test_the_command_writes_it_without_tensorflow() -> None:
    texts = write("text/a.jsonl", 20)
    program = """
import sys
from data.export.loose_json.__main__ import main
assert main(["text", "--name", "toy", "--data-dir", "tfds"]) == 0
assert main(["text", "--name", "toy", "--data-dir", "tfds"]) == 65
assert main(["text", "--name", "toy", "--data-dir", "tfds", "--version", "1.0.1"]) == 0
assert "tensorflow" not in sys.modules
"""
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"],
        text=True,
        capture_output=True,
    )
    assert child.returncode == 0, child.stderr
    assert "toy/1.0.0: 20 documents in tfds/toy/1.0.0\n" in child.stdout
    assert "to train on it: data=TfdsText data.name=toy data.data_dir=tfds\n" in child.stdout
    assert "error: tfds/toy/1.0.0 is there already; remove it, or give another --version or --name." in child.stderr
    assert sorted(read("toy", "train")) == sorted(texts) == sorted(read("toy:1.0.0", "train"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["texts", "--name", "toy"], "data.paths: texts matches no file; did you mean text?"),
        (["text", "--name", "Toy"], "name='Toy' must be small letters, digits and _, as TFDS has them; try my_corpus."),
        (["text", "--name", "toy", "--version", "1"], "version='1' must be three numbers; try 1.0.0."),
        (
            ["text", "--name", "toy", "--text-key", "txt"],
            "text/a.jsonl, line 1 (byte 0): has no key 'txt'; did you mean",
        ),
        (["bad.jsonl", "--name", "toy"], "bad.jsonl, line 2 (byte 14): the file ends inside this line"),
        (["empty.jsonl", "--name", "toy"], "empty.jsonl, line 0: the file is empty. Mend it first."),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    write("text/a.jsonl", 3)
    Path("bad.jsonl").write_text('{"text": "x"}\n{"text": "y')
    Path("empty.jsonl").write_text("")
    assert main([*words, "--data-dir", "tfds"]) == 65
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(Path("tfds").glob("toy/*"))
