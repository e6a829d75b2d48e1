"""Tokenizers: every text comes back, special tokens in a text stay text, and files are read with suspicion."""

import json
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import Bpe, Bytes, TokenizerFile
from data.tokenizer import ByteTokenizer, JsonTokenizer
from data.tokenizer.interface import threads
from data.workers import cores

TEXTS = [
    "plain words, and more words\n",
    "  spaces\t\ttabs\r\n\n\n and ends  ",
    "h\u00e9 \u4f60\u597d \U0001f600 \u202e e\u0301",
    "<|endoftext|> </s> <s> [PAD] <|eot_id|>",
    "def f(x):\n    return x['<|endoftext|>'] + 1e-5\n",
    "\x01\x7f\ufeff\ufffd",
    "a",
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
LEARNED = ["the quick brown fox jumps over the lazy dog " * 3, "def f(x):\n    return x\n" * 5, *TEXTS]


@pytest.fixture(scope="module")
def bpe() -> bytes:
    return Bpe(vocab_size=300).learn(LEARNED)


def unigram(**changes: object) -> bytes:
    """A model that holds its special tokens as pieces, as T5's does; letters and a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581", -2.0)]
    pieces += [(chr(letter), -4.0) for letter in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyrefly: ignore
    tokenizer.decoder = decoders.Metaspace()  # pyrefly: ignore
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return json.dumps(json.loads(tokenizer.to_str()) | changes).encode()


def changed(definition: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(definition) | changes).encode()


def write(path: Path, definition: bytes) -> str:
    path.write_bytes(definition)
    return str(path)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(text: str, bpe: bytes) -> None:
    for tokenizer in ByteTokenizer(), JsonTokenizer(bpe):
        tokens = tokenizer.encode(text)
        assert tokenizer.end_of_document not in tokens
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.encode_batch([text.encode()] * 2)[1].tolist() == tokens
        end = tokenizer.end_of_document
        assert tokenizer.decode([*tokens, end, *tokens, end]) == f"{text}\n{text}\n"


@hypothesis.given(st.text() | st.text("<|endoftext|>\u0120 \n"))
def test_any_text_comes_back(bpe: bytes, text: str) -> None:
    tokenizer = JsonTokenizer(bpe)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text.encode(errors="replace").decode()
    assert tokenizer.end_of_document not in tokens


def test_special_tokens_by_name(bpe: bytes) -> None:
    added = [{"content": text} | FLAGS for text in ("<|endoftext|>", "[MASK]", "<extra_id_7>", "<fim_middle>", "<sep>")]
    added = [token | {"id": 300 * (i > 0) + i, "special": i < 4} for i, token in enumerate(added)]
    tokenizer = JsonTokenizer(changed(bpe, added_tokens=added))
    names = ["mask", "sentinel_7", "fim_middle", "sep", "cls", "sentinel_0"]
    assert [tokenizer.special(name) for name in names] == [301, 302, 303, None, None, None]
    assert {301, 302, 303}.isdisjoint(tokenizer.encode("[MASK]<extra_id_7> <fim_middle>"))
    assert ByteTokenizer().special("mask") is None
    for either in tokenizer, ByteTokenizer():
        with pytest.raises(KeyError):
            either.special("msak")


def test_a_learned_bpe_is_a_bpe(bpe: bytes) -> None:
    tokenizer = JsonTokenizer(bpe)
    assert tokenizer.vocab_size == Bpe(vocab_size=300).vocab_size == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) == len(ByteTokenizer().encode(TEXTS[0]))
    assert Bpe(vocab_size=300).learn(LEARNED) == bpe
    with pytest.raises(ValueError, match=r"vocab_size=5000 is more than the 3\d\d tokens .* try data\.tokenizer\.vo"):
        Bpe(vocab_size=5000).learn(LEARNED)


def test_special_tokens_of_a_model_that_holds_them_as_pieces_stay_text() -> None:
    plain = Tokenizer.from_str(unigram().decode())
    plain.encode_special_tokens = True
    assert 1 in plain.encode("the </s>", add_special_tokens=False).ids  # what must not happen
    tokenizer = JsonTokenizer(unigram())
    assert tokenizer.end_of_document == 1
    for text in "the </s> the", "</s></s>", "<pad>the", "</</s>s>":
        tokens = tokenizer.encode(text)
        assert not {0, 1} & set(tokens)
        assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")


def test_special_tokens_in_a_text_have_the_tokens_that_their_letters_have(bpe: bytes) -> None:
    plain = Tokenizer.from_str(changed(bpe, added_tokens=[]).decode())
    for text in "a<|endoftext|>b", "<|endoftext|>", "x <|endoftext|>\n":
        assert JsonTokenizer(bpe).encode(text) == plain.encode(text).ids


def test_a_token_that_ends_documents_is_special_whatever_the_file_says(bpe: bytes) -> None:
    parsed = json.loads(bpe)
    parsed["added_tokens"][0]["special"] = False
    tokenizer = JsonTokenizer(json.dumps(parsed).encode())
    assert tokenizer.end_of_document not in tokenizer.encode("a<|endoftext|>b")


def test_what_depends_on_luck_or_drops_text_is_taken_out(bpe: bytes) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    model = json.loads(bpe)["model"] | {"dropout": 0.9}
    wild = JsonTokenizer(changed(bpe, truncation=cut, padding=pad | {"pad_type_id": 0, "pad_token": "x"}, model=model))
    assert wild.encode(TEXTS[0]) == JsonTokenizer(bpe).encode(TEXTS[0])


def test_the_digest_is_of_the_file_and_the_end_of_document() -> None:
    one = unigram()
    digests = [JsonTokenizer(one), JsonTokenizer(one, "<pad>"), JsonTokenizer(one + b" ")]
    assert len({tokenizer.digest for tokenizer in digests} | {ByteTokenizer.digest}) == 4
    assert JsonTokenizer(one, "</s>").digest == JsonTokenizer(one).digest
    assert JsonTokenizer(one, "<pad>").end_of_document == 0


def test_tokens_outside_the_vocabulary_are_refused(bpe: bytes) -> None:
    for tokenizer in ByteTokenizer(), JsonTokenizer(bpe):
        for token in (tokenizer.vocab_size, -1):
            with pytest.raises(ValueError, match=rf"0\.\.{tokenizer.vocab_size - 1}"):
                tokenizer.decode([token])


def test_lone_surrogates_in_a_prompt_become_question_marks(bpe: bytes) -> None:
    for tokenizer in ByteTokenizer(), JsonTokenizer(bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_the_size_is_known_from_the_file(tmp_path: Path, bpe: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    assert TokenizerFile(path=write(path, bpe)).vocab_size == 300
    assert TokenizerFile(path=write(path, unigram() + b" ")).vocab_size == 99  # a list of pieces; the file is new
    far = [{"id": 500, "content": "<eos>", "special": True}]
    assert TokenizerFile(path=write(path, changed(bpe, added_tokens=far))).vocab_size == 501
    assert Bytes().vocab_size == ByteTokenizer.vocab_size == 257


@pytest.mark.parametrize(
    ("content", "end", "message"),
    [
        (b"{", None, "is not valid JSON"),
        (b"[]", None, "it has no model with a vocabulary"),
        (b'{"model": {"vocab": {}}}', None, "it has no model with a vocabulary"),
        (
            b'{"model": {"vocab": {"a": ""}}, "added_tokens": [{"id": 0, "content": "</s>"}]}',
            None,
            "tokens that are no",
        ),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0}]}', None, "lack content or id"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "[X]"}]}', None, r"\(\[X\]\); name"),
        (b'{"model": {"vocab": {"a": 0}}}', "</s>", "no token '</s>' among its added tokens \\(none\\)"),
    ],
)
def test_files_that_are_none_are_refused_by_name(content: bytes, end: str | None, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tok.json", content)
    with pytest.raises(ValueError, match=rf"tok\.json .*{message}"):
        assert TokenizerFile(path=path, end_of_document=end).vocab_size
    with pytest.raises(ValueError, match=message):
        JsonTokenizer(content, end)


def test_what_the_library_refuses_is_refused(bpe: bytes) -> None:
    with pytest.raises(ValueError, match=r"is no tokenizer that tokenizers .* can read"):
        JsonTokenizer(changed(bpe, model={"type": "Unheard", "vocab": {"a": 0}}))


def test_text_that_a_tokenizer_does_not_know_is_refused() -> None:
    parsed = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).to_str())
    tokenizer = JsonTokenizer(json.dumps(parsed | {"added_tokens": [{"id": 1, "content": "</s>"} | FLAGS]}).encode())
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=r"cannot encode all of the text: .*\[?UNK"):
        tokenizer.encode("b")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        assert TokenizerFile(path=str(tmp_path / "none.json")).vocab_size


def test_a_bpe_holds_the_bytes() -> None:
    assert [field for field, _ in Bpe(vocab_size=256).check()] == ["vocab_size"]
    assert not list(Bpe(vocab_size=257).check())
    with pytest.raises(TypeError):
        Bpe(300)  # pyrefly: ignore


def test_workers_of_prepare_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    assert threads() == cores() >= 1
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert threads() == 3
