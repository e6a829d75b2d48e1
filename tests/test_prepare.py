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
from data import Bpe, Bytes, Fail, Gpt2, SentencePiece, Skip, TextFiles, TokenizerFile
from data.shards.format import verify
from data.shards.manifest import Manifest
from mtx import config as configs
from mtx import prepare
from mtx.config import Loaded
from mtx.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, what is kept to go on from left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "prepare.lock"}


def pieces(folder: Path) -> dict[str, int]:
    """The finished pieces, and which folder each is in the file system."""
    return {path.name: path.stat().st_ino for path in folder.glob("pieces/*") if not path.name.endswith(".tmp")}


UNIT = 30_000
"""Bytes of a unit in tests of several."""


def child(config: TextFiles, *, stop_at: str = "", wait_s: float = 60.0, workers: int = 1) -> subprocess.Popen:
    """A process that prepares; with `stop_at`, it sleeps at the first progress line that begins so. Several workers
    read small units."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from data import *
from data.prepare import run

def progress(line):
    print(line, flush=True)
    if {stop_at!r} and line.startswith({stop_at!r}):
        time.sleep({wait_s})

if {workers} > 1:
    run.UNIT_BYTES, run.ALONE_BYTES = {UNIT}, 0
{config!r}.prepare(progress, workers={workers or None})
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


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small texts are shared out too."""
    monkeypatch.setattr("data.prepare.run.UNIT_BYTES", UNIT)
    monkeypatch.setattr("data.prepare.run.ALONE_BYTES", 0)


def every_kind(folder: Path) -> None:
    """Text of each kind, some in files of several units, one record bad in many."""
    write_text(folder)
    texts = [json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(write_text(folder / "more", 900))]
    (folder / "long.jsonl").write_text("".join(texts[:300]) + "no JSON\n" + "".join(texts[300:]))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("".join(texts[::3]).encode()))
    (folder / "empty.jsonl").write_text("")
    (folder / "prose.txt").write_text("".join(f"{text}\n" + "\n" * (i % 5 == 0) for i, text in enumerate(texts)))
    table = pa.table({"id": range(900), "text": [f"row {text}" for text in texts]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=40, compression="none")


# Several workers


SLOWLY = [pytest.param(one, marks=pytest.mark.slow) for one in (Bytes(), SentencePiece(vocab_size=310))]


@pytest.mark.parametrize("tokenizer", [Gpt2(), *SLOWLY], ids=lambda config: type(config).__name__)
def test_the_number_of_workers_changes_nothing(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    every_kind(Path("text"))
    config = TextFiles(paths="text", tokenizer=tokenizer, split="8,1,1", cut_text_bytes=500, bad_records=Skip(budget=9))
    whole = dataclasses.replace(config, folder="whole")
    whole.prepare(lambda line: None, workers=1)
    monkeypatch.setattr("data.prepare.run.UNIT_BYTES", UNIT)
    monkeypatch.setattr("data.prepare.run.ALONE_BYTES", 0)
    found = []
    for workers in 1, 2, 3:
        one = dataclasses.replace(config, folder=str(workers))
        lines: list[str] = []
        one.prepare(lines.append, workers=workers)
        found.append(contents(Path(one.folder)))
        (reading,) = (line for line in lines if line.startswith("reading"))
        assert f" {sum(sum(source.documents.values()) for source in one.manifest().sources):,} documents" in reading
        assert not Path(one.folder, "pieces").exists()
    assert found[0] == found[1] == found[2]
    manifests = found[0].pop("manifest.json"), contents(Path("whole")).pop("manifest.json")
    assert found[0] == {name: raw for name, raw in contents(Path("whole")).items() if name != "manifest.json"}
    for here, there in zip(*(json.loads(raw)["sources"] for raw in manifests), strict=True):
        assert here == there or here["name"].endswith("parquet")  # of several units: a hash of hashes
    assert [source["bad"] for source in json.loads(manifests[0])["sources"]].count({"invalid JSON": 1}) == 1


@pytest.mark.parametrize("policy", [Fail(), Skip(budget=3)])
def test_the_first_bad_record_is_the_same_for_any_number_of_workers(policy, small_units: None) -> None:
    rows = [json.dumps({"text": f"{i} " + "word " * 50}) + "\n" for i in range(1000)]
    for i in 250, 251, 600, 610, 999:
        rows[i] = f"bad {i}\n"
    Path("a.jsonl").write_text("".join(rows))
    config = TextFiles(paths="a.jsonl", bad_records=policy)
    errors = []
    for workers in 1, 3:
        with pytest.raises(ValueError, match=f"line {251 if policy == Fail() else 611} ") as error:
            config.prepare(lambda line: None, workers=workers)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_file_of_several_units_that_breaks_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(Path("text"))
    rows = [None if i % 100 == 7 else f"{i} {os.urandom(40).hex()}" for i in range(2000)]
    table = pa.table({"id": range(2000), "text": rows})
    pq.write_table(table, "text/1.broken.parquet", row_group_size=200, compression="none", use_dictionary=False)
    raw = bytearray(Path("text/1.broken.parquet").read_bytes())
    at = raw.index(rows[1000].encode())
    raw[at - 200 : at] = bytes(200)  # a page and its head
    Path("text/1.broken.parquet").write_bytes(raw)
    config = TextFiles(paths="text", split="8,1,1", bad_records=Skip(), folder="whole")
    config.prepare(lambda line: None)
    (broken,) = (source for source in config.manifest().sources if source.name.endswith("parquet"))
    assert broken.bad == {"damaged parquet": 1, "null": 10} and not broken.documents and broken.sha256 is None
    monkeypatch.setattr("data.prepare.run.UNIT_BYTES", UNIT)
    monkeypatch.setattr("data.prepare.run.ALONE_BYTES", 0)
    for workers in 1, 3:
        one = dataclasses.replace(config, folder=str(workers))
        one.prepare(lambda line: None, workers=workers)
        assert contents(Path(one.folder)) == contents(Path("whole"))


def test_a_worker_that_dies_is_named_and_what_is_finished_stays(small_units: None) -> None:
    every_kind(Path("text"))
    config = TextFiles(paths="text", bad_records=Skip(), cut_text_bytes=500, folder="shards")
    dataclasses.replace(config, folder="whole").prepare(lambda line: None, workers=1)

    def kill(line: str) -> None:
        if line.startswith("reading"):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in children:  # tests that this process ran before may have left others
                if b"data.workers" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    with pytest.raises(ValueError, match=r"a worker process was killed by signal 9; .*--workers 1"):
        config.prepare(kill, workers=2)
    before = pieces(Path("shards"))
    assert sum(name.startswith("survey") for name in before) > 5
    lines: list[str] = []
    config.prepare(lines.append, workers=2)
    assert any(line.startswith("reading  finds ") for line in lines)
    assert contents(Path("shards")) == contents(Path("whole"))


def memory_of(number: int) -> int:
    """Bytes of a process and those below it, what they share divided among them."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        below = [path.read_text().split() for path in Path(f"/proc/{number}/task").glob("*/children")]
    except OSError:  # it has ended
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return own + sum(memory_of(int(one)) for some in below for one in some)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_text(name: str) -> None:
    draw, peaks = random.Random(0), []
    words = [f"{draw.choice('abcdefgh')}{i}" for i in range(5000)]
    for megabytes in 50, 120:
        with gzip.open(name, "wt", compresslevel=1) if name.endswith("gz") else open(name, "w") as file:
            for _ in range(100 * megabytes):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=1700))}) + "\n")
        config = TextFiles(paths=name, tokenizer=Gpt2(), folder=f"shards{megabytes}")
        process, peak = child(config, workers=0), 0
        assert process.stdout is not None
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.05)
        process.stdout.close()
        assert process.returncode == 0
        peaks.append(peak)
    assert peaks[0] < 500e6 and peaks[1] < 1.3 * peaks[0]


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
    there = {name.partition("-")[0] for name in pieces(Path("shards"))}
    assert "survey" in there and ("write" in there) == (moment == "writing")
    assert not config.is_prepared()
    with pytest.raises(ValueError, match="has no shards in shards"):
        config.load()
    config.prepare(lambda line: None)
    assert contents(Path("shards")) == contents(Path("whole"))


@pytest.mark.parametrize(
    "moment", ["survey", "write", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cut", "tokenizer"))]
)
def test_pieces_that_were_finished_are_not_made_again(moment: str, small_units: None) -> None:
    every_kind(Path("text"))
    config = TextFiles(
        paths="text", tokenizer=Bpe(vocab_size=300), cut_text_bytes=500, bad_records=Skip(), folder="shards"
    )
    dataclasses.replace(config, folder="whole").prepare(lambda line: None, workers=1)
    process = child(config, workers=2)
    while not any(name.startswith(moment) for name in pieces(Path("shards"))):
        assert process.poll() is None, "it was too fast"
        time.sleep(0.001)
    end(process)
    time.sleep(0.3)  # workers find out
    before, seen = pieces(Path("shards")), {}

    def progress(line: str) -> None:
        assert seen or not list(Path("shards/pieces").glob("*.tmp"))
        seen.update(pieces(Path("shards")))

    config.prepare(progress, workers=2)
    assert before and before.items() <= seen.items()
    assert contents(Path("shards")) == contents(Path("whole"))


def test_pieces_of_another_text_are_removed(small_units: None) -> None:
    """What did not change is kept, and what a change does not reach."""

    def row(i: int) -> str:
        return json.dumps({"text": f"{i} " + "x" * (UNIT * 2 // 3)}) + "\n"

    for i in range(6):
        Path(f"{i}.jsonl").write_text(row(i) + "x")  # the last line is bad
    config = TextFiles(paths="*.jsonl", folder="shards", bad_records=Fail(), split="1,0")
    for i in range(6):
        with pytest.raises(ValueError, match=rf"{i}\.jsonl, line 2"):
            config.prepare(lambda line: None, workers=1)
        Path(f"{i}.jsonl").write_text(row(i))
    before = pieces(Path("shards"))
    assert len(before) == 5
    os.utime("0.jsonl")
    lines: list[str] = []
    config.prepare(lines.append, workers=1)
    assert lines[0] == "removes 1 pieces from shards/pieces: the text or the settings have changed"
    assert lines[1] == "reading  finds 4 of 6 pieces in shards/pieces"


def test_a_file_that_may_be_read_by_now_is_read(tmp_path: Path) -> None:
    """Its rights are in no fingerprint."""
    write_text(Path("text"))
    Path("text/1.jsonl").chmod(0)
    config = TextFiles(paths="text", bad_records=Skip(), folder="shards")
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("writing"):
            raise KeyboardInterrupt

    me = os.geteuid()
    if me == 0:  # who may read all
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o777)
        os.seteuid(65534)
    try:
        with pytest.raises(KeyboardInterrupt):
            config.prepare(stop)
    finally:
        os.seteuid(me)
    assert "leaves out 1 bad records of text/1.jsonl: cannot be read 1" in lines
    Path("text/1.jsonl").chmod(0o644)
    config.prepare(lambda line: None)
    assert [source.bad for source in config.manifest().sources] == [{}] * 3


def test_kills_at_any_time_leave_nothing_half() -> None:
    """Old shards or none, then new ones: there is always a whole set or no manifest."""
    write_text(Path("text"), documents=3000)
    config = TextFiles(paths="text", split="8,1,1", folder="shards")
    draw = random.Random(0)
    for i in range(4):
        process = child(config, workers=1 + i % 2)
        time.sleep(draw.uniform(0.2, 1.6))
        end(process)
        if config.is_prepared():
            for name, shard in Manifest.read(Path("shards")).splits.items():
                verify(Path("shards"), name, shard)
        if i % 2:
            os.utime("text/0.jsonl", (i, i))  # so that the next one has work to do
    config.prepare(lambda line: None)
    config.verify()
    assert not list(Path("shards").glob("*.tmp")) and not Path("shards/pieces").exists()


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
from data.shards.format import Writer

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
    assert pieces(Path("shards"))  # the first one's are left alone
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
    found = [corpus.tokenizer.decode(split.tokens_N) for split in corpus.splits.values()]
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
        splits.append(
            {name: set(corpus.tokenizer.decode(s.tokens_N).splitlines()) for name, s in corpus.splits.items()}
        )
    assert splits[0] == splits[1] == splits[2]
    assert (Path("one/train.bin").read_bytes()) == Path("two/train.bin").read_bytes()


def test_empty_documents_are_counted_and_left_out() -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "", "b", " \n ", "c", "d")))
    config = TextFiles(paths="a.jsonl", split="2,1,1")
    config.prepare(lambda line: None)
    (source,) = config.manifest().sources
    assert (sum(source.documents.values()), source.empty, source.bad) == (4, 2, {})
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


@pytest.mark.parametrize("change", [lambda: os.utime("text/2.jsonl"), lambda: Path("text/0.txt").write_text("new")])
def test_text_that_changes_once_it_was_read_is_refused(change) -> None:
    """Its shards would be out of date when they are first opened."""
    write_text(Path("text"))
    config = TextFiles(paths="text")
    with pytest.raises(ValueError, match=r"text/(2\.jsonl|0\.txt) changed while it was read; prepare it when"):
        config.prepare(lambda line: change() if line.startswith("writing") else None)
    assert not config.is_prepared()
    config.prepare(lambda line: None)
    config.load()


def test_the_yardstick_is_gzip_of_the_validation_text() -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", split="1,1")
    config.prepare(lambda line: None)
    corpus = config.load()
    tokens_N = corpus.splits["validation"].tokens_N
    text = tokens_N[tokens_N != 256].astype("u1").tobytes()
    assert corpus.gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / corpus.splits["validation"].bytes


def test_a_large_vocabulary_is_stored_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.format.UINT16_VOCABULARY", 200)
    write_text(Path("text"))
    config = TextFiles(paths="text")
    config.prepare(lambda line: None)
    assert config.load().splits["train"].tokens_N.dtype == "int32"
    assert Path(config.prepared_folder(), "train.idx").read_bytes()[17] == 4


FULL = """
import os, subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from data import *
from data.prepare import run

run.UNIT_BYTES, run.ALONE_BYTES = {unit}, 0
os.mkdir("disk")
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size={size}k", "tmpfs", "disk"]).returncode:
    sys.exit(77)
config = {config!r}
try:
    config.prepare(lambda line: None, workers={workers})
except ValueError as error:
    print(error)
kept = {{path.name: path.stat().st_ino for path in Path("disk/shards/pieces").iterdir()}}
assert kept and not any(name.endswith(".tmp") for name in kept), kept
assert not list(Path("disk/shards").glob("*.tmp"))
print(sum(name.startswith("write") for name in kept))
subprocess.run(["mount", "-o", "remount,size=10m", "disk"], check=True)
seen = {{}}
config.prepare(
    lambda line: seen.update((path.name, path.stat().st_ino) for path in Path("disk/shards/pieces").glob("*")),
    workers={workers},
)
assert kept.items() <= seen.items()
subprocess.run(["cp", "-r", "disk/shards", "shards"], check=True)
"""


@pytest.mark.parametrize(("size", "workers"), [(200, 2), (1600, 1)], ids=["writing", "joining"])
def test_a_full_disk_says_what_to_do_and_the_same_command_goes_on(size: int, workers: int) -> None:
    every_kind(Path("text"))
    config = TextFiles(paths="text", bad_records=Skip(), cut_text_bytes=500, folder="disk/shards")
    whole = dataclasses.replace(config, folder="whole")
    whole.prepare(lambda line: None)
    program = FULL.format(root=str(ROOT), unit=UNIT, config=config, workers=workers, size=size)
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for part in "disk/shards", "cannot be written: No space left on device. Free some, or set data.folder", "goes on":
        assert part in said
    assert len(said.splitlines()) == 2
    assert (int(said.splitlines()[1]) > 10) == (size == 1600)
    for name in "train.bin", "train.idx", "validation.bin", "validation.idx":
        assert Path("shards", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_file_that_may_not_grow_is_a_full_disk() -> None:
    write_text(Path("text"))
    config = TextFiles(paths="text", folder="shards")
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from data import *
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    {config!r}.prepare(lambda line: None)
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "cannot be written: File too large. Free some" in said
    assert not list(Path("shards").rglob("*.tmp")) and not config.is_prepared()
    config.prepare(lambda line: None)


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
