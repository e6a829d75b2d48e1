"""Preparation as a process: killed and run again, run twice at once, and what it prints."""

import dataclasses
import gzip
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_text_files import write_text

import main
from data import Bpe, Bytes, SentencePiece, Skip, TextFiles, TokenizerFile, shards
from data.manifest import Manifest
from mtx import config as configs
from mtx import prepare
from mtx.config import Loaded
from mtx.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prepare.lock"}


def child(config: TextFiles, *, stop_at: str = "", wait_s: float = 60.0) -> subprocess.Popen:
    """A process that prepares; with `stop_at`, it sleeps at the first progress line that begins so."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from data import *

def progress(line):
    print(line, flush=True)
    if {stop_at!r} and line.startswith({stop_at!r}):
        time.sleep({wait_s})

{config!r}.prepare(progress)
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, start: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the process ended before it said {start!r}")


def end(process: subprocess.Popen, sign: int = signal.SIGKILL) -> None:
    process.send_signal(sign)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


# Killed


@pytest.mark.parametrize("tokenizer", [Bytes(), Bpe(vocab_size=300), SentencePiece(vocab_size=310)])
@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_a_killed_preparation_is_made_again_byte_for_byte(tokenizer, moment: str) -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", tokenizer=tokenizer, split="8,1,1", folder="shards")
    whole = dataclasses.replace(config, folder="whole")
    whole.prepare(lambda line: None)
    process = child(config, stop_at=moment)
    wait_for(process, moment)
    end(process)
    left = {path.name for path in Path("shards").iterdir()}
    assert any(name.endswith(".tmp") for name in left) and "manifest.json" not in left
    assert not config.is_prepared()
    with pytest.raises(ValueError, match="has no shards in shards"):
        config.load()
    config.prepare(lambda line: None)
    assert contents(Path("shards")) == contents(Path("whole"))


def test_kills_at_any_time_leave_nothing_half(tmp_path: Path) -> None:
    """Old shards or none, then new ones: there is always a whole set or no manifest."""
    write_text(Path("text"), documents=3000)
    config = TextFiles(paths="text", split="8,1,1", folder="shards")
    draw, opened = random.Random(0), 0
    for i in range(8):
        process = child(config)
        time.sleep(draw.uniform(0.2, 1.2))
        end(process)
        if config.is_prepared():
            for name, shard in Manifest.read(Path("shards")).splits.items():
                shards.verify(Path("shards"), name, shard)
            opened += 1
        os.utime("text/0.jsonl", (i, i))  # so that the next one has work to do
    assert opened  # or the test has tested nothing
    config.prepare(lambda line: None)
    config.verify()
    assert not list(Path("shards").glob("*.tmp"))


def test_a_kill_among_the_renames_leaves_no_manifest() -> None:
    """The old one must not stand for a mixture of old and new shards."""
    write_text(Path("text"))
    config = TextFiles(paths="text", folder="shards")
    config.prepare(lambda line: None)
    write_text(Path("text"), seed=1)
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from data import *
from data.shards import Writer

def publish(writer, whole=Writer.publish):
    whole(writer)
    os.kill(os.getpid(), {int(signal.SIGKILL)})

Writer.publish = publish
{config!r}.prepare(print)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -signal.SIGKILL
    assert not config.is_prepared()
    config.prepare(lambda line: None)
    config.verify()


def test_an_error_leaves_the_old_shards_and_nothing_else() -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", folder="shards")
    config.prepare(lambda line: None)
    before = contents(Path("shards"))
    Path("text/bad.jsonl").write_text("x")
    with pytest.raises(ValueError, match=r"text/bad\.jsonl, line 1"):
        config.prepare(lambda line: None)
    assert contents(Path("shards")) == before
    Path("text/bad.jsonl").unlink()
    config.load()


# Twice at once


def test_two_preparations_of_one_folder_are_one_too_many() -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", folder="shards")
    process = child(config, stop_at="reading")
    wait_for(process, "reading")
    with pytest.raises(ValueError, match=rf"shards is being prepared by process {process.pid} on .*; wait for it"):
        config.prepare(lambda line: None)
    assert list(Path("shards").glob("*.tmp"))  # the first one's are left alone
    dataclasses.replace(config, folder="other").prepare(lambda line: None)
    end(process)
    config.prepare(lambda line: None)  # a dead process holds nothing
    config.verify()


# What it does


def test_all_kinds_of_files_give_one_text() -> None:
    texts = [f"document {i} \u00e9\n" for i in range(30)]
    Path("text").mkdir()
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    Path("text/a.jsonl").write_bytes(b"".join(rows[:8]))
    Path("text/b.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[8:10])))
    Path("text/b.jsonl.zst").write_bytes(zstandard.compress(b"".join(rows[10:12])))
    pq.write_table(pa.table({"text": texts[12:20]}), "text/c.parquet")
    for i in range(20, 25):
        Path(f"text/d{i}.txt").write_text(texts[i])
    for i in range(25, 30):
        Path(f"text/e{i}.txt.gz").write_bytes(gzip.compress(texts[i].encode()))
    config = TextFiles(paths="text", split="28,1,1")
    config.prepare(lambda line: None)
    corpus = config.load()
    found = [corpus.decode(split.tokens_N) for split in corpus.splits.values()]
    assert sorted("".join(found).replace("\n\n", "\n").splitlines()) == sorted(text.strip() for text in texts)
    assert [split.documents for split in corpus.splits.values()] == [28, 1, 1]


def test_the_order_of_paths_moves_no_document() -> None:
    write_text(Path("text"))
    one = TextFiles(paths="text/0.jsonl,text/1.jsonl,text/2.jsonl", folder="one", split="8,1,1")
    two = TextFiles(paths="text/2.jsonl,text/0.jsonl,text/1.jsonl", folder="two", split="8,1,1")
    Path("merged").mkdir()
    Path("merged/z.jsonl").write_text("".join(Path(f"text/{i}.jsonl").read_text() for i in (2, 0, 1)))
    three = TextFiles(paths="merged", folder="three", split="8,1,1")
    splits = []
    for config in one, two, three:
        config.prepare(lambda line: None)
        corpus = config.load()
        splits.append({name: set(corpus.decode(s.tokens_N).splitlines()) for name, s in corpus.splits.items()})
    assert splits[0] == splits[1] == splits[2]
    assert (Path("one/train.bin").read_bytes()) == Path("two/train.bin").read_bytes()


def test_empty_documents_are_counted_and_left_out() -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "", "b", " \n ", "c", "d")))
    config = TextFiles(paths="a.jsonl", split="2,1,1")
    config.prepare(lambda line: None)
    (source,) = config.manifest().sources
    assert (source.documents, source.empty, source.bad) == (4, 2, {})
    assert sum(shard.documents for shard in config.manifest().splits.values()) == 4


def test_a_file_that_breaks_off_leaves_no_trace_in_the_split() -> None:
    write_text(Path("text"))
    rows = b"".join(json.dumps({"text": os.urandom(99).hex()}).encode() + b"\n" for _ in range(5000))
    Path("text/1.cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-100_000])
    config = TextFiles(paths="text", split="8,1,1", bad_records=Skip())
    config.prepare(lambda line: None)
    assert [split.documents for split in config.load().splits.values()] == [96, 12, 12]


def test_a_wrong_tokenizer_is_refused_before_the_text_is_read() -> None:
    write_text(Path("text"))
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        TextFiles(paths="text", tokenizer=TokenizerFile(path="none.json")).prepare(lines.append)
    assert lines == []


def test_too_few_documents_say_what_to_type() -> None:
    Path("a.txt").write_text("word " * 1000)
    config = TextFiles(paths="a.txt")
    with pytest.raises(
        ValueError, match=r"data\.split=949,50,1: 3 splits need 3 .* has 1\. .*cut_text_bytes=1024.*data\.split=1,0"
    ):
        config.prepare(lambda line: None)
    alone = dataclasses.replace(config, split="1,0")
    alone.prepare(lambda line: None)
    corpus = alone.load()
    assert list(corpus.splits) == ["train"] and corpus.gzip_bits_per_byte is None
    assert "none held out" in corpus.describe()


def test_text_that_changes_meanwhile_is_refused() -> None:
    write_text(Path("text"))

    def progress(line: str) -> None:
        if line.startswith("reading"):
            with open("text/1.jsonl", "a") as file:
                file.write('{"text": "late"}\n')

    config = TextFiles(paths="text")
    with pytest.raises(ValueError, match=r"text/1\.jsonl changed while it was read"):
        config.prepare(progress)
    assert not config.is_prepared()


def test_the_yardstick_is_gzip_of_the_validation_text() -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", split="1,1")
    config.prepare(lambda line: None)
    corpus = config.load()
    tokens_N = corpus.splits["validation"].tokens_N
    text = tokens_N[tokens_N != 256].astype("u1").tobytes()
    assert corpus.gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / corpus.splits["validation"].bytes


def test_a_large_vocabulary_is_stored_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.UINT16_VOCABULARY", 200)
    write_text(Path("text"))
    config = TextFiles(paths="text")
    config.prepare(lambda line: None)
    assert config.load().splits["train"].tokens_N.dtype == "int32"
    assert Path(config.prepared_folder(), "train.idx").read_bytes()[17] == 4


def test_a_full_disk_is_an_error_of_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("text"))

    def full(*_) -> None:
        raise OSError(28, "No space left on device", "train.bin.tmp")

    monkeypatch.setattr("data.shards._Hashed.write", full)
    config = TextFiles(paths="text")
    with pytest.raises(ValueError, match=r"train\.bin\.tmp: cannot be written: No space left on device\."):
        config.prepare(lambda line: None)
    assert contents(config.prepared_folder()) == {}


def test_preparing_loads_neither_jax_nor_what_it_does_not_need() -> None:
    Path("a.txt").write_text("".join(f"word {i}\n\n" for i in range(20000)))
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data import *
TextFiles(paths="a.txt", cut_text_bytes=100).prepare(lambda line: None)
heavy = ("jax", "grain", "tokenizers", "tiktoken", "sentencepiece", "zstandard", "pyarrow")
print([name for name in heavy if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# The verb


def loaded(*overrides: str) -> Loaded:
    return configs.load(str(ROOT / "configs" / "quickstart.py"), list(overrides))


def test_the_verb_prints_progress_and_a_table(capsys: pytest.CaptureFixture) -> None:
    write_text(Path("text"))
    with open("text/0.jsonl", "a") as file:
        file.write("x\n")
    config = TextFiles(paths="text", split="8,1,1", bad_records=Skip())
    told = loaded("data=TextFiles", "data.paths=text", "data.split=8,1,1", "data.bad_records=Skip")
    assert told.config.data == config
    prepare.run(told, argv=["main.py"], verbose=False, devices=None)
    out = capsys.readouterr().out
    for part in (
        "reading  0.0 of 0.0 MB",
        "leaves out 1 bad records of text/0.jsonl: invalid JSON 1",
        "left out: 1 bad",
    ):
        assert part in out
    train = next(line for line in out.splitlines() if line.startswith("train ")).split()
    shard = config.manifest().splits["train"]
    assert train == ["train", "96", f"{shard.tokens:,}", f"{shard.bytes:,}", "1.000"]
    assert [line.split()[0] for line in out.splitlines() if line.split()[0] in ("train", "validation", "test")]
    prepare.run(told)
    again = capsys.readouterr().out
    assert "is up to date" in again and "reading" not in again and out.splitlines()[-3:] == again.splitlines()[-3:]


def test_the_verb_raises_what_train_raises() -> None:
    with pytest.raises(DataError, match=r"none\.jsonl matches no file"):
        prepare.run(loaded("data=TextFiles", "data.paths=none.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.split=1 must be two or three numbers"):
        prepare.run(loaded("data=TextFiles", "data.paths=none.jsonl", "data.split=1"))


# --train-tokenizer

OWN_TEXT = ["--config", str(ROOT / "configs" / "own_text.py"), "data.paths=text", "data.split=8,1,1"]


@pytest.mark.parametrize(
    ("short", "tokenizer"),
    [
        ("bpe:300", Bpe(vocab_size=300)),
        ("unigram:310", SentencePiece(vocab_size=310)),
        ("bpe:1_100", None),
        ("wordpiece:2000", None),
    ],
)
def test_a_tokenizer_in_short_is_learned_and_what_training_needs_is_said(
    short: str, tokenizer, capsys: pytest.CaptureFixture
) -> None:
    write_text(Path("text"))
    code = main.main(["main.py", "prepare", "--train-tokenizer", short, *OWN_TEXT])
    out, err = capsys.readouterr()
    if tokenizer is None:  # the text is too short, or the number no number
        assert code == (65 if "wordpiece" in short else 64)
        assert ("did you mean bpe:16384?" if "_" in short else "vocab_size=2000 is more than the ") in err
        return
    assert (code, err) == (0, "")
    said = out.splitlines()[-1]
    start = f"to train on it, set data.tokenizer={type(tokenizer).__name__} "
    assert said.startswith(start) and f"data.tokenizer.vocab_size={tokenizer.vocab_size} in the config or say: " in said
    program, script, *words = shlex.split(said.partition(" say: ")[2])
    assert (program, script, words[:2]) == ("python", "main.py", OWN_TEXT[:2])
    later = configs.load(words[1], words[2:]).config
    assert later.data.tokenizer == tokenizer and later.data.is_prepared()
    assert later.model.vocab_size == 1024  # the config file's: enough
    configs.check(later, 1)


def test_a_model_that_is_too_small_for_the_tokenizer_grows_unless_it_was_given(capsys: pytest.CaptureFixture) -> None:
    write_text(Path("text"))
    quickstart = ["--config", str(ROOT / "configs" / "quickstart.py"), "data=TextFiles", *OWN_TEXT[2:]]
    assert main.main(["main.py", "prepare", "--train-tokenizer", "bpe:300", *quickstart]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert " data.tokenizer.vocab_size=300 model.vocab_size=300 in the config" in said
    assert main.main(["main.py", "prepare", "--train-tokenizer", "bpe:300", *quickstart, "model.vocab_size=299"]) == 64
    assert "error: model.vocab_size=299 is smaller than the 300 tokens" in capsys.readouterr().err


def test_the_verb_has_nothing_to_do_for_documentation(capsys: pytest.CaptureFixture) -> None:
    prepare.run(loaded())
    assert capsys.readouterr().out == "data=PythonDocs needs no preparation.\n"
