"""WordPiece: BERT's pieces of words, what is lost, and a vocab.txt that is read with suspicion."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from test_tokenizer import LEARNED as FEW

from data import TextFiles, WordPiece, WordPieceFile
from data.sources.python_docs import topic_documents
from data.tokenizer import WordPieceTokenizer, read_file, word_piece

ROOT = Path(__file__).resolve().parent.parent
LEARNED = FEW + list(topic_documents(Path(sysconfig.get_path("stdlib"))).values())[:8]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIAL,
    "un",
    "##aff",
    "##able",
    "a",
    "##a",
    "cafe",
    "Caf\u00e9",
    "!",
    "\u4f60",
    "[",
    "]",
    "sep",
    "SEP",
    "##b",
]
VOCABULARY = "".join(f"{piece}\n" for piece in PIECES).encode()


def tokens(text: str, lowercase: bool = True) -> list[str]:
    return [PIECES[token] for token in WordPieceTokenizer(VOCABULARY, lowercase).encode(text)]


@pytest.fixture(scope="module")
def learned() -> WordPieceTokenizer:
    config = WordPiece(vocab_size=500)
    return config.read(config.learn(LEARNED))


# Pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("unaffable", ["un", "##aff", "##able"]),  # Wu et al. 2016's
        ("UnAffAble!  a\n", ["un", "##aff", "##able", "!", "a"]),
        ("Caf\u00e9 CAFE\u0301", ["cafe", "cafe"]),
        ("a\u4f60a", ["a", "\u4f60", "a"]),
        ("aab unb", ["a", "##a", "##b", "un", "##b"]),
        ("xyz a", ["[UNK]", "a"]),
        ("a" * 100, ["a", *["##a"] * 99]),
        ("a" * 101, ["[UNK]"]),
        ("\x01 \u200b \t", []),
        ("[SEP]", ["[", "sep", "]"]),
        ("a[SEP]a[UNK][MASK]", ["a", "[", "sep", "]", "a", "[", "[UNK]", "]", "[", "[UNK]", "]"]),
    ],
)
def test_uncased_pieces_are_bert_s(text: str, pieces: list[str]) -> None:
    assert tokens(text) == pieces


def test_cased_pieces_keep_case_and_accents() -> None:
    assert tokens("Caf\u00e9 cafe Un [SEP]", lowercase=False) == ["Caf\u00e9", "cafe", "[UNK]", "[", "SEP", "]"]


def test_specials_by_name() -> None:
    tokenizer = WordPieceTokenizer(VOCABULARY, True)
    assert [tokenizer.special(name) for name in ("pad", "cls", "sep", "mask", "sentinel_0")] == [0, 2, 3, 4, None]
    assert tokenizer.end_of_document == 3
    small = WordPieceTokenizer(b"[UNK]\r\n[SEP]\r\na", True)
    assert (small.vocab_size, small.special("mask"), small.encode("a b")) == (3, None, [2, 0])


def test_decoding_joins_pieces_and_is_lossy() -> None:
    tokenizer = WordPieceTokenizer(VOCABULARY, True)
    found = tokenizer.encode("Unaffable!\n\n  Caf\u00e9")
    assert tokenizer.decode([*found, 3, *found]) == "unaffable ! cafe\nunaffable ! cafe"


@hypothesis.given(st.text() | st.text("[SEP]CLMAK# a"))
def test_no_text_gives_a_special_token_but_the_unknown(learned: WordPieceTokenizer, text: str) -> None:
    found = learned.encode(text)
    assert not {0, 2, 3, 4} & set(found)
    assert learned.encode_batch([text.encode(errors="replace")] * 2)[1].tolist() == found
    again = learned.decode(found)
    if 1 not in found:
        assert learned.encode(again) == found or "##" in again  # what is lost is lost once


# What is learned


def test_a_vocabulary_is_what_was_asked_for(learned: WordPieceTokenizer) -> None:
    assert learned.vocab_size == 500 and learned.end_of_document == 3
    assert len(learned.encode(LEARNED[-1])) < len(LEARNED[-1]) / 2
    cased = WordPiece(vocab_size=300, lowercase=False).learn(["The THE the"] * 30 + LEARNED)
    assert b"\nT\n" in cased and b"\n##H\n" in cased
    assert b"T" not in WordPiece(vocab_size=300).learn(LEARNED).split(b"[MASK]")[1]
    with pytest.raises(ValueError, match=r"than the \d+ tokens that the training text yields; give more text\."):
        WordPiece(vocab_size=128).learn(["a"])
    with pytest.raises(
        ValueError, match=r"vocab_size=20000 is more than the \d+ tokens .*; try data\.tokenizer\.vocab"
    ):
        WordPiece(vocab_size=20000).learn(LEARNED)


def test_letters_beyond_a_quarter_of_the_vocabulary_are_left_out() -> None:
    """The most common stay, so that a vocabulary is never larger than it was asked for."""
    texts = [chr(0x3400 + i) + " " + chr(0x3401 + i) for i in range(2000)] + LEARNED
    found = WordPiece(vocab_size=128).learn(texts).decode().split("\n")
    assert len(found) == 129 and set("thequickbrownfox") <= set(found)


def test_a_vocabulary_does_not_depend_on_the_process() -> None:
    """The library's own order of letters does."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data import WordPiece
from data.sources.python_docs import topic_documents
import hashlib, pathlib, sysconfig
texts = list(topic_documents(pathlib.Path(sysconfig.get_path("stdlib"))).values())
print(hashlib.sha256(WordPiece(vocab_size=600).learn(texts)).hexdigest())
"""
    environment = os.environ | {"PYTHONHASHSEED": "random"}
    found = {subprocess.check_output([sys.executable, "-c", program], env=environment) for _ in range(3)}
    assert len(found) == 1


def test_check_names_the_field() -> None:
    assert [field for field, _ in WordPiece(vocab_size=127).check()] == ["vocab_size"]
    assert not list(WordPiece(vocab_size=128).check())


def test_a_learned_vocabulary_makes_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(LEARNED))
    config = TextFiles(paths="text.txt", tokenizer=WordPiece(vocab_size=500), split="8,1,1", cut_text_bytes=1000)
    config.prepare(lambda line: None)
    corpus = config.load()
    assert corpus.tokenizer.vocab_size == config.vocab_size == 500
    for split in corpus.splits.values():
        assert (split.tokens_N == corpus.tokenizer.special("sep")).sum() == split.documents
        assert split.tokens_N[-1] == 3 and not np.isin(split.tokens_N, [0, 2, 4]).any()
    vocabulary = config.prepared_folder() / "vocab.txt"
    pieces = vocabulary.read_text().splitlines()
    assert pieces[:5] == SPECIAL and len(pieces) == 500
    vocabulary.write_text("\n".join([*pieces[:-1], "other"]) + "\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not the tokenizer of the shards beside it"):
        config.load()


# Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[UNK]\n[SEP]\n\xff", r"is no vocab\.txt: it is not UTF-8 at byte 12"),
        (b"", r"is no vocab\.txt: none of its 1 lines is \[UNK\]"),
        (b"[UNK]\na\n", r"is no vocab\.txt: none of its 2 lines is \[SEP\]"),
        (b"[UNK]\n[SEP]\na\nb\na\n", "has 'a' twice, on lines 3 and 5"),
        (b'{"model": {}}', r"is no vocab\.txt"),
    ],
)
def test_files_that_are_none_are_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    config = WordPieceFile(path=str(path), lowercase=True)
    for use in (lambda: config.vocab_size, lambda: read_file(config, path)):
        with pytest.raises(ValueError, match=rf"/vocab\.txt {message}"):
            use()


def test_the_size_is_known_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(VOCABULARY)
    assert WordPieceFile(path=str(path), lowercase=False).vocab_size == len(PIECES)
    with pytest.raises(ValueError, match=r"none\.txt cannot be read: No such file"):
        assert WordPieceFile(path=str(tmp_path / "none.txt"), lowercase=False).vocab_size


def test_case_is_known_of_a_published_vocabulary_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"say whether case is dropped: data\.tokenizer\.lowercase=true or"):
        WordPieceFile(path="x").measure(VOCABULARY)
    monkeypatch.setitem(word_piece.LOWERCASE, hashlib.sha256(VOCABULARY).hexdigest(), True)
    dropped = WordPieceFile(path="x").read(VOCABULARY)
    assert dropped.digest == WordPieceFile(path="x", lowercase=True).read(VOCABULARY).digest
    assert dropped.encode("CAFE") == [PIECES.index("cafe")]
    with pytest.raises(
        ValueError, match=r"is BERT's published vocabulary, which goes with data\.tokenizer\.lowercase=t"
    ):
        WordPieceFile(path="x", lowercase=False).measure(VOCABULARY)


def test_the_digest_is_of_the_file_and_of_case() -> None:
    digests = {WordPieceTokenizer(VOCABULARY, lowercase).digest for lowercase in (True, False)}
    assert len(digests | {WordPieceTokenizer(VOCABULARY + b"b\n", True).digest}) == 3
