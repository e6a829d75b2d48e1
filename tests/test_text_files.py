"""Text files as a corpus: what the config says, what a change of text or settings does, and damage to the shards."""

import dataclasses
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import megatron
from test_tokenizer import LEARNED, unigram

from data import (
    Bpe,
    Bytes,
    Loader,
    SentencePiece,
    SentencePieceFile,
    Skip,
    TextFiles,
    TokenizerFile,
    WordPieceFile,
)
from data.shards.manifest import Manifest
from data.tokenizer import Defined, Given

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps"]


def write_text(folder: Path, documents: int = 120, seed: int = 0) -> list[str]:
    """Three files of JSON lines, different documents; returns their texts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    texts = [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) for i in range(documents)]
    third = -(-documents // 3)
    for i in range(3):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[third * i : third * i + third]]
        (folder / f"{i}.jsonl").write_text("".join(rows))
    return texts


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextFiles:
    """Prepared shards, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    made = TextFiles(paths="text", split="8,1,1")
    made.prepare(lambda line: None)
    return made


def refused(config: TextFiles, message: str) -> None:
    """Both ways to open it say so, and what to type."""
    for use in config.load, config.verify:
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


# Opening


SIZES = {
    Bytes(): 257,
    Bpe(vocab_size=300): 300,
    SentencePiece(vocab_size=310): 310,
    SentencePiece(vocab_size=320, kind="bpe"): 320,
    TokenizerFile(path="tok.json"): 310,
    SentencePieceFile(path="tok.model"): 330,
    WordPieceFile(path="vocab.txt", lowercase=False): 49,
}
VOCABULARY = "".join(f"{piece}\n" for piece in ("[UNK]", "[SEP]", *WORDS, *map(str, range(10)), "##0"))
VOCABULARY += "".join(f"##{i}\n" for i in range(1, 10)) + "".join(f"[unused{i}]\n" for i in range(15))


def write_files() -> None:
    """What the configs of `SIZES` name."""
    Path("tok.json").write_bytes(Bpe(vocab_size=310).learn(LEARNED))
    draw = random.Random(0)
    words = [" ".join(draw.choices([*WORDS, *map(str, range(200))], k=50)) for _ in range(50)]
    Path("tok.model").write_bytes(SentencePiece(vocab_size=330).learn(words))
    Path("vocab.txt").write_text(VOCABULARY)


@pytest.mark.parametrize("tokenizer", SIZES, ids=lambda config: type(config).__name__)
def test_what_is_prepared_is_what_is_read(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files()
    texts = write_text(tmp_path / "text")
    config = TextFiles(paths="text", tokenizer=tokenizer, split="8,1,1")
    assert not list(config.check()) and not config.is_prepared()
    config.prepare(lambda line: None)
    assert config.is_prepared()
    config.verify()
    corpus = config.load()
    assert corpus.tokenizer.vocab_size == config.vocab_size == SIZES[tokenizer]
    copies = {path.name for path in config.prepared_folder().iterdir()} & {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
    }
    assert copies == ({tokenizer.copy_name} if isinstance(tokenizer, Defined) else set())
    found = {name: corpus.tokenizer.decode(split.tokens_N).splitlines() for name, split in corpus.splits.items()}
    assert {name: len(lines) for name, lines in found.items()} == {"train": 96, "validation": 12, "test": 12}
    assert sorted(line for lines in found.values() for line in lines) == sorted(texts)
    for name, split in corpus.splits.items():
        assert split.documents == len(found[name])
        assert split.bytes == sum(map(len, found[name]))
        assert found[name] == [text for text in texts if text in set(found[name])]  # in the order of files
        assert isinstance(split.tokens_N, np.memmap)
    assert 0.5 < corpus.gzip_bits_per_byte < 4
    assert "96 documents" in corpus.describe() and "\n" not in corpus.describe()


def test_an_epoch_of_shards_holds_each_token_once(config: TextFiles) -> None:
    corpus = config.load()
    rows = Loader(corpus=corpus, sequence_length=32)
    windows = rows.epoch_samples[""]
    batch = rows.train(np.arange(windows, 2 * windows))
    real = batch["segments"] > 0
    assert sorted(batch["targets"][real]) == sorted(corpus.splits["train"].tokens_N[1:])


FILES = [config for config in SIZES if isinstance(config, Given)]


@pytest.mark.parametrize("tokenizer", FILES, ids=lambda config: type(config).__name__)
def test_shards_do_without_the_text_and_the_tokenizers_file(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    write_files()
    config = TextFiles(paths="text", tokenizer=tokenizer)
    config.prepare(lambda line: None)
    before = config.load()
    shutil.rmtree("text")
    Path(tokenizer.path).unlink()
    assert not list(config.check()) and config.vocab_size == SIZES[tokenizer]
    assert config.load().digest == before.digest
    config.verify()


def test_a_folder_that_gets_another_tokenizer_keeps_no_old_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    write_files()
    for tokenizer in [*FILES, Bytes()]:
        config = TextFiles(paths="text", tokenizer=tokenizer, folder="shards")
        config.prepare(lambda line: None)
        others = {"tokenizer.json", "tokenizer.model", "vocab.txt"} - {getattr(tokenizer, "copy_name", None)}
        assert others.isdisjoint(path.name for path in Path("shards").iterdir())
        config.verify()


def test_before_it_is_prepared_it_says_what_to_type(tmp_path: Path) -> None:
    refused(TextFiles(paths="x", folder=str(tmp_path)), r"data\.paths=x has no shards in .*python main\.py prepare")


# What changed


def test_changed_text_is_named(config: TextFiles) -> None:
    row = json.dumps({"text": "another"}) + "\n"
    with open("text/1.jsonl", "a") as file:
        file.write(row)
    refused(config, r"text/1\.jsonl has changed since the text was prepared; .*verb prepare.*replaces")
    config.prepare(lambda line: None)
    config.verify()
    Path("text/3.jsonl").write_text(row)
    Path("text/0.jsonl").rename("text/0.md")
    refused(config, r"text/0\.jsonl is gone since the text was prepared \(and 2 more\)")
    config.prepare(lambda line: None)
    os.utime("text/2.jsonl")
    refused(config, r"text/2\.jsonl has changed")


def test_ignored_files_do_not_matter_but_are_listed(config: TextFiles, capsys: pytest.CaptureFixture) -> None:
    for name in "readme.rst", ".hidden.jsonl":
        Path("text", name).write_text("x")
    assert config.load()
    lines: list[str] = []
    again = dataclasses.replace(config, folder="elsewhere")
    again.prepare(lines.append)
    assert lines[0] == "ignores 2 hidden files or files of no known kind: text/.hidden.jsonl, text/readme.rst"
    assert again.manifest().ignored == ["text/.hidden.jsonl", "text/readme.rst"]


@pytest.mark.parametrize(
    "change",
    [
        {"split": "7,2,1"},
        {"tokenizer": Bpe(vocab_size=300)},
        {"text_key": "body"},
        {"prompt_key": "title"},
        {"sentences": True},
        {"bad_records": Skip()},
        {"cut_text_bytes": 5},
        {"max_record_bytes": 5000},
        {"paths": "text/"},
    ],
)
def test_another_recipe_has_another_folder(change: dict, config: TextFiles) -> None:
    other = dataclasses.replace(config, **change)
    assert other.prepared_folder() != config.prepared_folder()
    assert config.prepared_folder().parent == Path("prepared") and len(config.prepared_folder().name) == 12
    (name,) = change
    here = dataclasses.replace(other, folder=str(config.prepared_folder()))
    refused(here, rf"was prepared with data\.{name}=.*, not .*; .*verb prepare .* or name another data\.folder")


def test_a_changed_tokenizer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    Path("tok.json").write_bytes(unigram())
    config = TextFiles(paths="text", tokenizer=TokenizerFile(path="tok.json"))
    config.prepare(lambda line: None)
    digest = config.load().digest
    Path("tok.json").write_bytes(unigram() + b"\n")
    refused(config, r"tok\.json has changed since the shards")
    config.prepare(lambda line: None)
    assert config.load().digest != digest
    Path(config.prepared_folder(), "tokenizer.json").write_bytes(unigram())
    refused(config, r"tokenizer\.json is not the tokenizer of the shards")


@pytest.mark.parametrize("tokenizer", FILES, ids=lambda config: type(config).__name__)
def test_another_tokenizer_beside_the_shards_or_where_it_came_from_is_refused(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    write_files()
    config = TextFiles(paths="text", tokenizer=tokenizer)
    config.prepare(lambda line: None)
    other = {
        TokenizerFile: Bpe(vocab_size=310).learn([text.replace("fox", "cat") for text in LEARNED]),
        SentencePieceFile: SentencePiece(vocab_size=330, kind="bpe").learn(write_text(tmp_path / "more")),
        WordPieceFile: VOCABULARY.replace("fox", "cat").encode(),
    }[type(tokenizer)]
    original = Path(tokenizer.path)
    before = original.read_bytes()
    original.write_bytes(other)
    assert config.vocab_size == SIZES[tokenizer]  # nothing but the hash tells them apart
    refused(config, rf"{tokenizer.path} has changed since the shards in .* were written")
    original.write_bytes(before)
    (config.prepared_folder() / tokenizer.copy_name).write_bytes(other)
    refused(config, rf"{tokenizer.copy_name} is not the tokenizer of the shards beside it\.")


@pytest.mark.parametrize(
    ("most", "said"),
    [(10**6, "the training text"), (3000, "0 MB of the training text, spread over it")],
)
def test_a_tokenizer_learns_from_all_parts_of_the_training_text_alone(
    most: int, said: str, config: TextFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def learn(tokenizer: Bpe, texts, whole=Bpe.learn) -> bytes:
        seen.extend(texts)
        return whole(tokenizer, seen)

    corpus = config.load()
    train = corpus.tokenizer.decode(corpus.splits["train"].tokens_N).splitlines()
    monkeypatch.setattr(Bpe, "learn", learn)
    monkeypatch.setattr(Bpe, "training_bytes", lambda self: most)
    lines: list[str] = []
    dataclasses.replace(config, tokenizer=Bpe(vocab_size=270), folder="other").prepare(lines.append)
    assert f"learning 270 tokens from {said}" in lines
    if most == 10**6:
        assert seen == train
        return
    assert len("".join(seen)) <= most < len("".join(train)) / 3
    places = [next(i for i, text in enumerate(train) if text.startswith(part)) for part in seen]  # the last one is cut
    assert places == sorted(places)
    assert all(sum(third <= place < third + 32 for place in places) > 4 for third in (0, 32, 64))


def test_the_digest_is_of_the_tokens(config: TextFiles) -> None:
    digest = config.load().digest
    same = dataclasses.replace(config, folder="same", max_record_bytes=10_000)
    same.prepare(lambda line: None)
    assert same.load().digest == digest and len(digest) == 16
    write_text(Path("text"), seed=1)
    config.prepare(lambda line: None)
    assert config.load().digest != digest


# Damage


def test_damaged_shards_are_named_and_written_again(config: TextFiles) -> None:
    folder = config.prepared_folder()
    for name, damage in {
        "train.bin": lambda raw: raw[:-2],
        "train.idx": lambda raw: raw + b"x",
        "validation.idx": lambda raw: b"x" + raw[1:],
    }.items():
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(raw))
        refused(config, rf"{name} ")
        lines: list[str] = []
        config.prepare(lines.append)
        assert "prepares" in lines[0] and name in lines[0]
        assert (folder / name).read_bytes() == raw


def test_a_flipped_bit_is_found_and_mended_by_prepare(config: TextFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config.prepared_folder() / "train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    refused(config, rf"train\.bin has SHA-256 .* Bytes 0 to {len(raw) - 1:,} are not what was written\.")
    monkeypatch.setattr("data.prepare.prepared.HASHED_BYTES", len(raw) - 1)
    config.load()  # of what is larger, the size and the ends of the index are looked at
    with pytest.raises(ValueError, match=r"train\.bin has SHA-256"):
        config.verify()
    config.prepare(lambda line: None)
    config.verify()
    assert path.read_bytes() == raw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"documents": 96', '"documents": 97'), "was changed after it was written"),
        (lambda text: text[:-20], "is no manifest of prepared text"),
        (lambda text: "[]", "is no manifest of prepared text"),
        (lambda text: '{"a": 1}', "is no manifest of prepared text"),
        (lambda text: text.replace("text 2", "text 3"), "has the format 'mtx prepared text 3'; this program reads"),
    ],
)
def test_a_damaged_manifest_is_named(change, message: str, config: TextFiles) -> None:
    path = config.prepared_folder() / "manifest.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    refused(config, rf"manifest\.json {message}")
    config.prepare(lambda line: None)
    assert path.read_text() == before


def test_the_manifest_says_where_all_comes_from(config: TextFiles) -> None:
    import hashlib

    folder = config.prepared_folder()
    manifest = Manifest.read(folder)
    for source in manifest.sources:
        raw = Path(source.name).read_bytes()
        assert source.sha256 == hashlib.sha256(raw).hexdigest()
        assert (source.bytes, sum(source.documents.values()), source.empty, source.bad) == (len(raw), 40, 0, {})
    assert list(manifest.splits) == ["train", "validation", "test"]
    for name, shard in manifest.splits.items():
        for suffix, size, sha256 in (
            (".bin", shard.bin_bytes, shard.bin_sha256),
            (".idx", shard.idx_bytes, shard.idx_sha256),
        ):
            raw = (folder / f"{name}{suffix}").read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, sha256)
    assert manifest.recipe["tokenizer"] == {"class": "Bytes"}
    names = {"manifest.json", "prepare.lock"} | {f"{s}{e}" for s in manifest.splits for e in (".bin", ".idx", ".crc")}
    assert {path.name for path in folder.iterdir()} == names


# Documents of several sequences


def sequences(config: TextFiles, split: str) -> list[list[str]]:
    """The text of each sequence of a split, by document, read with nothing of ours but the tokenizer."""
    corpus = config.load()
    return [
        [corpus.tokenizer.decode(tokens) for tokens in document]
        for document in megatron(config.prepared_folder(), split)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompt_and_text_are_two_sequences(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"answer {i}", "q": f"question {i}? \u00e9" if i % 3 else ""} for i in range(60)]
    rows += [{"text": "", "q": "no answer"}, {"text": " \n", "q": "none"}]
    if kind == "jsonl":
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), "a.parquet", row_group_size=7)
    config = TextFiles(paths=f"a.{kind}", prompt_key="q", split="1,0")
    config.prepare(lambda line: None)
    assert sequences(config, "train") == [[row["q"], row["text"] + "\n"] for row in rows[:60]]
    shard = config.manifest().splits["train"]
    assert (shard.documents, shard.sequences) == (60, 120)
    assert shard.bytes == sum(len((row["q"] + row["text"]).encode()) for row in rows[:60])
    assert shard.tokens == shard.bytes + 60
    assert config.manifest().sources[0].empty == 2


def test_a_copy_of_prompt_and_text_falls_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"{i % 40}", "q": "same"}) + "\n" for i in range(200)]
    Path("a.jsonl").write_text("".join(rows))
    config = TextFiles(paths="a.jsonl", prompt_key="q", split="1,1")
    config.prepare(lambda line: None)
    train, validation = ({text for _, text in sequences(config, split)} for split in ("train", "validation"))
    assert len(train) == len(validation) == 20 and not train & validation


def test_sentences_are_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "Mr. Smith went home.  He slept.\n\nThen? Nothing."
    Path("a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "One alone"}) + "\n")
    config = TextFiles(paths="a.jsonl", sentences=True, split="1,0")
    config.prepare(lambda line: None)
    parts = ["Mr. Smith went home.  ", "He slept.\n\n", "Then? ", "Nothing.\n"]
    assert sequences(config, "train") == [parts, ["One alone\n"]]
    whole = dataclasses.replace(config, sentences=False)
    whole.prepare(lambda line: None)
    assert sequences(whole, "train") == [["".join(parts)], ["One alone\n"]]
    shard, other = config.manifest().splits["train"], whole.manifest().splits["train"]
    assert (shard.documents, shard.sequences, shard.bytes) == (2, 5, other.bytes)
    assert config.load().splits["train"].tokens_N.tolist() == whole.load().splits["train"].tokens_N.tolist()


def test_plain_text_has_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    Path("text/a.md").write_text("text")
    with pytest.raises(
        ValueError, match=r"data\.prompt_key=q: text/a\.md is plain text, which has no keys; name files"
    ):
        TextFiles(paths="text", prompt_key="q").prepare(lambda line: None)


# The config


@pytest.mark.parametrize(
    ("change", "field", "why"),
    [
        ({"paths": " ,"}, "paths", "is empty"),
        ({"text_key": ""}, "text_key", "is empty"),
        ({"prompt_key": ""}, "prompt_key", "another key than text_key"),
        ({"prompt_key": "text"}, "prompt_key", "another key than text_key"),
        ({"prompt_key": "q", "sentences": True}, "sentences", "cannot be true with a prompt_key"),
        ({"split": "1"}, "split", "two or three numbers"),
        ({"split": "1,1,1,1"}, "split", "two or three numbers"),
        ({"split": "0,1"}, "split", "the first above 0"),
        ({"split": "1,-1"}, "split", "none below"),
        ({"split": "a,b"}, "split", "two or three numbers"),
        ({"split": "nan,1"}, "split", "two or three numbers"),
        ({"split": "1/0,1"}, "split", "two or three numbers"),
        ({"cut_text_bytes": -1}, "cut_text_bytes", "at least 0"),
        ({"cut_text_bytes": 100, "max_record_bytes": 100}, "cut_text_bytes", "at most half"),
        ({"max_record_bytes": 0}, "max_record_bytes", "must lie in"),
        ({"max_record_bytes": 2**31}, "max_record_bytes", "must lie in"),
        ({"folder": ""}, "folder", "is empty"),
        ({"tokenizer": TokenizerFile(path="no.json")}, "tokenizer.path", r"no\.json cannot be read: No such file"),
    ],
)
def test_check_names_the_field(change: dict, field: str, why: str) -> None:
    import re

    assert not list(TextFiles(paths="x").check())
    ((found, said),) = TextFiles(**({"paths": "x"} | change)).check()
    assert found == field and re.search(why, said)
    assert [name for name, _ in Skip(budget=0).check()] == ["budget"] and not list(Skip().check())


def test_loading_needs_no_heavy_package_and_little_time(config: TextFiles) -> None:
    """A million documents cost no more than three: nothing of the index is read but its ends."""
    from data.shards.format import Writer

    folder = config.prepared_folder()
    writer = Writer(folder, "train", "uint16", 256)
    for tokens in [np.arange(3)] * 300_000:
        writer.add([tokens], 3)
    splits = Manifest.read(folder).splits | {"train": writer.finish()}
    writer.publish()
    dataclasses.replace(Manifest.read(folder), splits=splits).write(folder)
    started = time.process_time()
    assert config.load().splits["train"].documents == 300_000
    assert time.process_time() - started < 0.1
