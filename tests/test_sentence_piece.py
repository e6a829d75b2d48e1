"""SentencePiece: models learned here bring every text back, and published ones are read with suspicion."""

import dataclasses
import io
import re
import sysconfig
from pathlib import Path

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st
from test_tokenizer import LEARNED as FEW
from test_tokenizer import TEXTS

from data import SentencePiece, SentencePieceFile
from data.sources.python_docs import topic_documents
from data.tokenizer import SentencePieceTokenizer, read_file

NAMES = ["<pad>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>", "<extra_id_0>", "<extra_id_1>"]
LEARNED = FEW + list(topic_documents(Path(sysconfig.get_path("stdlib"))).values())[:8]
KINDS = [SentencePiece(vocab_size=500, kind=kind, sentinels=2) for kind in ("unigram", "bpe")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda config: config.kind)
def config(request: pytest.FixtureRequest) -> SentencePiece:
    return request.param


@pytest.fixture(scope="module")
def model(config: SentencePiece) -> bytes:
    return config.learn(LEARNED)


@pytest.fixture(scope="module")
def tokenizer(config: SentencePiece, model: bytes) -> SentencePieceTokenizer:
    return config.read(model)


def trained(**settings: object) -> bytes:
    """A model with the library's own settings, as others publish them."""
    model = io.BytesIO()
    usual = {"model_type": "bpe", "vocab_size": 200, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LEARNED), model_writer=model, **usual | settings)
    return model.getvalue()


# Every text


@hypothesis.given(st.text() | st.text("\u2581 a\n\u2585<>s/0x\t"))
def test_any_text_comes_back(tokenizer: SentencePieceTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode(errors="replace").decode()
    assert min(tokens, default=99) >= len(NAMES)


@pytest.mark.parametrize(
    "text", [*TEXTS, "\u2581", " \u2581 a\u2581\u2581", "".join(NAMES), "<0x0A><unk>\u2047 \u2585"]
)
def test_texts_come_back_between_ends_of_documents(tokenizer: SentencePieceTokenizer, text: str) -> None:
    tokens, end = tokenizer.encode(text), tokenizer.end_of_document
    assert not set(range(len(NAMES))) & set(tokens)
    assert tokenizer.decode([*tokens, end, *tokens, end]) == f"{text}\n{text}\n"
    assert [found.tolist() for found in tokenizer.encode_batch([text.encode()] * 3)] == [tokens] * 3
    assert tokenizer.encode_batch([]) == []


def test_pieces_are_longer_than_bytes(tokenizer: SentencePieceTokenizer) -> None:
    assert len(tokenizer.encode(LEARNED[-1])) < len(LEARNED[-1]) / 1.5


# What is learned


def test_a_model_is_what_was_asked_for(config: SentencePiece, model: bytes, tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.end_of_document == 1
    assert config.learn(LEARNED) == model
    names = ["pad", "mask", "cls", "sep", "sentinel_0", "sentinel_1", "sentinel_2"]
    assert [tokenizer.special(name) for name in names] == [0, 3, 4, 5, 6, 7, None]
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [plain.id_to_piece(i) for i in range(len(NAMES))] == NAMES
    assert "\u2581" * 3 in {plain.id_to_piece(i) for i in range(tokenizer.vocab_size)}
    assert any("\n" in plain.id_to_piece(i) for i in range(tokenizer.vocab_size))  # documents are learned whole


def test_too_large_or_too_small_a_vocabulary_says_what_to_type(config: SentencePiece) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=9000 is more than the \d+ tokens .*; try data\.t") as error:
        dataclasses.replace(config, vocab_size=9000).learn(LEARNED)
    (fitting,) = re.findall(r"try data.tokenizer.vocab_size=(\d+) or less", str(error.value))
    dataclasses.replace(config, vocab_size=int(fitting)).learn(LEARNED)
    with pytest.raises(ValueError, match=r"vocab_size=270 is less than the bytes, special tokens and letters of the"):
        dataclasses.replace(config, vocab_size=270).learn(LEARNED)
    with pytest.raises(ValueError, match=r"sentencepiece cannot learn from the training text: .*sentences_"):
        config.learn([])


@pytest.mark.parametrize(
    ("config", "field", "why"),
    [
        (SentencePiece(vocab_size=262), "vocab_size", "above 262: 256 bytes and 6 special tokens; try 8192"),
        (SentencePiece(vocab_size=362, sentinels=100), "vocab_size", "above 362: 256 bytes and 106 special tokens"),
        (SentencePiece(sentinels=-1), "sentinels", "at least 0"),
    ],
)
def test_check_names_the_field(config: SentencePiece, field: str, why: str) -> None:
    ((found, said),) = config.check()
    assert found == field and why in said
    assert not list(SentencePiece(vocab_size=263).check())


def test_unigram_learns_from_less_text() -> None:
    assert SentencePiece().training_bytes() < SentencePiece(kind="bpe").training_bytes() == 64_000_000


# Published models


def test_a_published_model_is_read_as_its_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "spiece.model"
    path.write_bytes(trained())
    config = SentencePieceFile(path=str(path))
    tokenizer = read_file(config, path)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert config.vocab_size == tokenizer.vocab_size == plain.get_piece_size()
    assert tokenizer.end_of_document == plain.eos_id() == 2
    for text in "the quick fox", "\u2581 the  </s>", "</s>":
        assert tokenizer.encode(text) == plain.encode(text)
        assert 2 not in tokenizer.encode(text)
    tokens = tokenizer.encode("the fox")
    assert tokenizer.decode([*tokens, 2, *tokens]) == "the fox\nthe fox"
    assert tokenizer.special("mask") is None


def test_the_end_of_a_document_is_a_piece_that_no_text_gives() -> None:
    model = trained(eos_id=-1, control_symbols=["<eod>", "<mask>"], user_defined_symbols=["<sep>"])
    with pytest.raises(ValueError, match=r"no usual end of document among .*\(<s>, <eod>, <mask>\); name one of them"):
        SentencePieceFile(path="x").read(model)
    for name in "<sep>", "<nope>", "<unk>", "the":
        with pytest.raises(ValueError, match=rf"no piece '{name}' among its control pieces, .*\(<s>, <eod>, <mask>\)"):
            SentencePieceFile(path="x", end_of_document=name).measure(model)
    tokenizer = SentencePieceFile(path="x", end_of_document="<eod>").read(model)
    assert tokenizer.end_of_document not in tokenizer.encode("the <eod> fox<eod>")
    assert tokenizer.special("mask") == tokenizer.end_of_document + 1
    assert tokenizer.special("sep") is None  # typed in a text, it would be the token


def test_the_digest_is_of_the_model_the_end_of_a_document_and_how_it_is_read() -> None:
    model = trained(control_symbols=["<eod>"])
    read = [SentencePieceFile(path="x").read(model), SentencePieceFile(path="y", end_of_document="<eod>").read(model)]
    other = SentencePieceFile(path="x").read(trained(vocab_size=201))
    own = KINDS[0].learn(LEARNED)
    exact = [KINDS[0].read(own), SentencePieceFile(path="x").read(own)]
    assert len({tokenizer.digest for tokenizer in [*read, other, *exact]}) == 5
    assert SentencePieceFile(path="z", end_of_document="</s>").read(model).digest == read[0].digest


@pytest.mark.parametrize("content", [b"", b"hello world", b"\0" * 100, "cut", "flipped"])
def test_files_that_are_none_are_refused_by_name(content: bytes | str, tmp_path: Path) -> None:
    model = trained()
    damaged = {"cut": model[: len(model) // 2], "flipped": model[:50] + b"\xff" * 20 + model[70:]}
    path = tmp_path / "x.model"
    path.write_bytes(content if isinstance(content, bytes) else damaged[content])
    config = SentencePieceFile(path=str(path))
    for use in (lambda: config.vocab_size, lambda: read_file(config, path)):
        with pytest.raises(ValueError, match=r"x\.model is no model that sentencepiece [\d.]+ can read\.$"):
            use()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.model cannot be read: No such file"):
        assert SentencePieceFile(path=str(tmp_path / "none.model")).vocab_size


def test_lone_surrogates_become_question_marks(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_tokens_outside_the_vocabulary_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    for token in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=rf"0\.\.{tokenizer.vocab_size - 1}"):
            tokenizer.decode([token])
