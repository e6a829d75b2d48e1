"""The verb `generate`: its flags, and what it prints."""

import argparse
from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from data import Concatenate, Corpus, Loader
from mtx import decode, generate
from mtx.decode import Sampling
from mtx.errors import ConfigError
from mtx.model import Transformer

END = 256
MODEL = Transformer(**{**toys.LLAMA.__dict__, "vocab_size": 300})


def loader(isolate_documents: bool = True) -> Loader:
    documents = {f"document {i}": "some text\n" for i in range(20)}
    corpus = Corpus.from_documents(documents, source="a test", validation_fraction=0.3)
    return Loader(corpus=corpus, sequence_length=8, packing=Concatenate(isolate_documents=isolate_documents))


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_flags(parser)
    return parser.parse_args(words)


def test_flags(tmp_path: Path):
    (tmp_path / "one").write_text("first line\nsecond\n\n")
    asked = generate.check(flags("--prompt", "a", "--prompt-file", str(tmp_path / "one"), "--prompt", ""))
    assert asked == (["a", "first line\nsecond\n", ""], 128, Sampling(), 0)
    words = ["--tokens", "3", "--temperature", "0", "--top-k", "5", "--top-p", "0.5", "--seed", "9"]
    asked = generate.check(flags("--prompt", "a", *words))
    assert asked[1:] == (3, Sampling(temperature=0.0, top_k=5, top_p=0.5), 9)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "generate needs --prompt TEXT or --prompt-file FILE"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0 must be a finite number and at least 0"),
        (["--temperature", "nan"], "--temperature nan must be"),
        (["--top-k", "0"], "--top-k 0 must be at least 1"),
        (["--top-p", "0"], "--top-p 0.0 must be above 0 and at most 1"),
        (["--top-p", "1.1"], "--top-p 1.1 must be"),
        (["--seed", "-1"], "--seed -1 must lie in 0..4294967295"),
        (["--prompt-file", "nowhere/a"], "--prompt-file nowhere/a cannot be read: No such file or directory"),
    ],
)
def test_wrong_flags_are_refused_before_the_model_is_opened(words: list[str], why: str):
    def opened() -> tuple:
        raise AssertionError("opened")

    given = flags(*words, *(["--prompt", "a"] if words else []))
    with pytest.raises(ConfigError) as error:
        generate.run(given, opened)
    assert str(error.value).startswith(why)


def test_a_prompt_that_is_no_text(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read: is not UTF-8"):
        generate.check(flags("--prompt-file", str(tmp_path / "one")))


def params(p) -> dict:
    return jax.tree.map(jax.device_put, toys.weights_of(p.model.config), p.shardings("weights"))


def test_answers_are_texts_up_to_the_end_of_document():
    p, text = toys.program(MODEL), loader()
    weights = params(p)
    prompts, kw = ["abc", "", "é\n"], {"tokens": 150, "sampling": Sampling(temperature=1.0), "seed": 2}
    starts = [[97, 98, 99], [END], [0xC3, 0xA9, 10]]
    free = decode.generate(p, weights, starts, vocab_size=257, **kw)
    assert any(END in row for row in free) and not all(END in row for row in free), "choose another seed"
    wanted = [row[: row.index(END)] if END in row else row for row in free]
    assert generate.answers(p, weights, text, prompts, **kw) == [bytes(row).decode(errors="replace") for row in wanted]


def test_only_tokens_of_the_tokenizer_are_made():
    """The model knows 300 tokens, the tokenizer 257: the others have no text."""
    p, text = toys.program(MODEL), loader()
    weights = toys.weights_of(MODEL)
    weights["ends"]["head_VD"][257:] = 1e4 * np.resize([1, -1], (len(weights["ends"]["head_VD"]) - 257, 1))
    placed = jax.tree.map(jax.device_put, weights, p.shardings("weights"))
    assert generate.answers(p, placed, text, ["a"], tokens=10)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]):
    p, text = toys.program(MODEL), loader()
    weights = params(p)

    def opened() -> tuple:
        return p, weights, text

    generate.run(flags("--prompt", "abc", "--tokens", "5"), opened)
    (one,) = generate.answers(p, weights, text, ["abc"], tokens=5)
    assert capsys.readouterr() == (f"abc{one}\n", "")
    generate.run(flags("--prompt", "abc", "--prompt", "d", "--tokens", "5"), opened)
    first, second = generate.answers(p, weights, text, ["abc", "d"], tokens=5)
    assert first == one
    assert capsys.readouterr() == (f"--- 1/2 ---\nabc{first}\n\n--- 2/2 ---\nd{second}\n", "")


@pytest.mark.parametrize("isolated", [True, False])
def test_an_empty_prompt_is_said_where_it_means_little(isolated: bool, caplog: pytest.LogCaptureFixture):
    p = toys.program(MODEL)
    generate.answers(p, params(p), loader(isolated), [""], tokens=1)
    assert ["empty prompt" in record.message for record in caplog.records] == [True] * isolated
