"""Objectives: rows are functions of their draws, prefixes tell no target, and middles go back where they were."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import CASES, SPECIALS, TEXTS, E, draws, equally_likely, frame, is_row, likely, same, stream, windows

from data.batches.objectives import (
    CausalLm,
    Completion,
    FillInTheMiddle,
    MaskedLm,
    PrefixLm,
    Row,
    SentencePairs,
    SpanCorruption,
    Specials,
    WindowObjective,
    generator,
    stack,
)
from data.batches.objectives.draws import permuted
from data.batches.objectives.fim import invert
from data.batches.objectives.row import documents
from data.batches.packing import pack
from data.tokenizer import Bpe, JsonTokenizer
from pallas_kernels.masks import Causal, Documents, Prefix, bind

WINDOW_OBJECTIVES = [CausalLm(), PrefixLm(), FillInTheMiddle(), MaskedLm(), SpanCorruption()]


# Draws


def test_draws_have_not_moved() -> None:
    """If these move, all runs get other samples: undo it, or say so in CHANGELOG.md."""
    found = generator(1, "fill in the middle", "web", 2, 3)
    assert found.bits(2).tolist() == [342188218595520256, 7521979587375379704]
    assert found.uniform(1).tolist() == [0.6662436390378264]
    assert found.below(1000, 4).tolist() == [174, 189, 906, 111]
    assert found.permutation(6).tolist() == [2, 3, 4, 5, 0, 1]
    assert [permuted(draws(), i, 9) for i in range(9)] == [0, 8, 2, 4, 1, 5, 6, 7, 3]


def test_draws_are_of_their_name_alone() -> None:
    names = [
        (1, "a", "bc", 2, 3),
        (1, "ab", "c", 2, 3),
        (1, "a", "bc", 23, 0),
        (12, "a", "bc", 0, 3),
        (1, 'a", "b', "c", 2, 3),
    ]
    assert len({generator(*name).bits(1)[0] for name in names}) == len(names)
    numpys = generator(np.int64(1), "a", "bc", np.int32(2), np.uint8(3))
    assert np.array_equal(numpys.bits(5), generator(*names[0]).bits(5))


def test_draws_are_uniform() -> None:
    many = draws().uniform(40_000)
    assert many.min() >= 0 and many.max() < 1
    assert equally_likely(Counter((many * 8).astype(int).tolist()), 8)
    assert equally_likely(Counter(draws(1).below(5, 20_000).tolist()), 5)
    assert equally_likely(Counter(tuple(draws(i).permutation(3).tolist()) for i in range(1500)), 6)
    assert equally_likely(Counter(permuted(draws(i), i % 2, 5) for i in range(1500)), 5)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 300])
def test_permuted_is_a_permutation(count: int) -> None:
    assert sorted(permuted(draws(1), i, count) for i in range(count)) == list(range(count))


@pytest.mark.parametrize("objective", WINDOW_OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_a_row_is_a_function_of_its_name(objective: WindowObjective) -> None:
    window = windows(stream(["one sentence", "another, which is longer", "x" * 290]), objective.window_length(256))[0]
    name = (0, objective.purpose, "web", 0, 0)
    others = [(1, *name[1:]), (0, "other", *name[2:]), (*name[:2], "books", 0, 0), (*name[:3], 1, 0), (*name[:4], 1)]
    row, again, *rows = (objective.row(window, frame(256), generator(*key)) for key in (name, name, *others))
    assert same(row, again)
    assert all(same(row, other) == isinstance(objective, CausalLm) for other in rows)
    for each in row, *rows:
        is_row(each, 256)
    assert {key: array.shape for key, array in stack([row, *rows]).items()} == dict.fromkeys(row, (6, 256))


# Causal and prefix


@CASES
@given(texts=TEXTS, length=st.integers(1, 40), isolate=st.booleans())
def test_causal_rows_are_those_of_pack(texts: list[str], length: int, isolate: bool) -> None:
    found = windows(stream(["start", *texts]), length)
    expected = pack(found, end_of_document=E, isolate_documents=isolate)
    assert same(stack([CausalLm().row(w, frame(length, isolate), draws()) for w in found]), expected)
    untouched = frame(length, isolate, specials=Specials())
    assert same(stack([FillInTheMiddle(rate=0).row(w, untouched, draws()) for w in found]), expected)


@CASES
@given(texts=TEXTS, length=st.integers(1, 40), isolate=st.booleans(), index=st.integers(0, 99))
def test_prefixes_lie_in_their_documents(texts: list[str], length: int, isolate: bool, index: int) -> None:
    window = windows(stream(["start", *texts]), length)[-1]
    row, plain = (o.row(window, frame(length, isolate), draws(index)) for o in (PrefixLm(), CausalLm()))
    is_row(row, length)
    for segment in range(1, row["segments"].max() + 1):
        here = np.flatnonzero(row["segments"] == segment)
        (end,) = set(row["prefix"][here].tolist())
        assert here[0] < end <= here[-1] + 1
        kept = np.where(here >= end - 1, plain["weights"][here], 0)  # the last token of a prefix tells the first behind
        assert np.array_equal(row["weights"][here], kept)
        assert kept.any() == plain["weights"][here].any()
    assert all(np.array_equal(row[name], plain[name]) for name in plain if name != "weights")


def test_prefixes_have_any_length() -> None:
    window = np.array([1, 2, 3, 4, 5, E, 1], np.int32), 6  # five targets are left: a prefix has 1 to 5 tokens
    lengths = Counter(int(PrefixLm().row(window, frame(6), draws(i))["prefix"][0]) for i in range(800))
    assert equally_likely(lengths, 5)


def test_no_target_is_seen() -> None:
    """By the mask of prefix models, as attention understands the rows; and what precedes it always is."""
    found = windows(stream([str(10**18 + i * 7) for i in range(20)]), 60)
    rows = [PrefixLm().row(window, frame(60), draws(3)) for window in found]
    short = SpanCorruption().window_length(60)
    rows += [SpanCorruption().row((tokens, min(real, short)), frame(60), draws(3)) for tokens, real in found]
    pairs = [(np.arange(5), np.arange(9)), (np.arange(20), np.arange(3))]
    rows += [Completion(prefix=True).row(pairs, frame(60))]
    batch = stack(rows)
    mask = bind(
        (Causal() | Prefix()) & Documents(),
        60,
        60,
        segments=jnp.asarray(batch["segments"]),
        prefix=jnp.asarray(batch["prefix"]),
    )
    sees_BTS = np.asarray(mask.dense())
    for weights_T, sees_TS in zip(batch["weights"], sees_BTS, strict=True):
        at = np.flatnonzero(weights_T)
        at = at[at < 59]
        assert len(at) > 5 and not sees_TS[at, at + 1].any() and sees_TS[at, at].all()
    assert sees_BTS[-1, 0, 4] and not sees_BTS[-1, 0, 5]


# Fill in the middle


def inverted(row: Row) -> list[int]:
    """The stream that a row of `FillInTheMiddle` was made from."""
    real = int((row["segments"] > 0).sum())
    tokens = np.append(row["tokens"][:real], row["targets"][real - 1 : real])
    return [token for part in documents(tokens, E) for token in (*invert(part, SPECIALS).tolist(), E)][:-1]


@CASES
@given(
    texts=TEXTS,
    length=st.integers(2, 60),
    rate=st.sampled_from([0.5, 1.0]),
    characters=st.booleans(),
    isolate=st.booleans(),
)
def test_the_middle_goes_back(texts: list[str], length: int, rate: float, characters: bool, isolate: bool) -> None:
    fim = FillInTheMiddle(rate=rate, characters=characters)
    for index, (tokens, real) in enumerate(windows(stream(["start", *texts]), length)):
        row = fim.row((tokens, real), frame(length, isolate), draws(index))
        is_row(row, length)
        back, given_up = inverted(row), length - int((row["segments"] > 0).sum())
        assert back == tokens[: len(back)].tolist()
        assert len(back) == real + 1 or given_up <= 3  # only what does not fit is left out


def test_both_orders_have_their_rates() -> None:
    fim, found = FillInTheMiddle(rate=0.7, spm_rate=0.3), Counter()
    text = np.frombuffer(b"0123456789" * 2, np.uint8).astype(np.int32)
    for chance in draws().uniform(4 * 4000).reshape(-1, 4):
        new = fim.transform(text, chance, frame(9))
        assert np.array_equal(invert(new, SPECIALS), text)
        found["plain" if new[0] != 260 else "spm" if new[1] == 262 else "psm"] += 1
    empty = 1 - (20 / 21) ** 2  # a prefix of nothing looks like SPM
    assert likely(found["plain"], 4000, 0.3)
    assert likely(found["spm"], 4000 - found["plain"], 0.3 + 0.7 * empty)


def test_cuts_fall_anywhere() -> None:
    p, m, s = 260, 261, 262
    fim, text = FillInTheMiddle(rate=1, spm_rate=0), np.array([1, 2], np.int32)
    found = Counter(tuple(fim.transform(text, c, frame(9)).tolist()) for c in draws().uniform(12_000).reshape(-1, 4))
    once = {(p, s, 1, 2, m), (p, 1, s, 2, m), (p, 1, 2, s, m)}  # both cuts at one of three places
    twice = {(p, s, 2, m, 1), (p, s, m, 1, 2), (p, 1, s, m, 2)}
    assert found.keys() == once | twice
    assert all(likely(count, 3000, 1 / 9 if key in once else 2 / 9) for key, count in found.items())


def test_cuts_between_characters_of_bpe_tokens() -> None:
    text = "the cat sat on the m\u00e4t; the \u20ac and the caf\u00e9 " * 3
    bpe = JsonTokenizer(Bpe(vocab_size=270).learn([text * 9]))
    specials = Specials(fim_prefix=300, fim_middle=301, fim_suffix=302)
    whole = np.array(bpe.encode(text), np.int32)
    for chance in draws().uniform(4 * 100).reshape(-1, 4):
        new = FillInTheMiddle(rate=1, spm_rate=0).transform(whole, chance, frame(9, codec=bpe, specials=specials))
        end, mid = new.tolist().index(302), new.tolist().index(301)
        parts = [bpe.decode(part) for part in (new[1:end], new[mid + 1 :], new[end + 1 : mid])]
        first, second = sorted(int(cut * (len(text) + 1)) for cut in chance[2:])
        assert parts == [text[:first], text[first:second], text[second:]]
        assert bpe.decode(invert(new, specials)) == text
    cut_off = whole[np.flatnonzero(whole == bpe.encode("\u20ac")[0])[0] + 1 :]  # begins inside a character
    for chance in draws(1).uniform(4 * 50).reshape(-1, 4):
        new = FillInTheMiddle(rate=1).transform(cut_off, chance, frame(9, codec=bpe, specials=specials))
        assert new[0] == 300 and np.array_equal(invert(new, specials), cut_off)


# What is refused


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FillInTheMiddle(rate=1.5), "rate"),
        (FillInTheMiddle(spm_rate=-0.1), "spm_rate"),
        (MaskedLm(rate=0.0), "rate"),
        (MaskedLm(mask_rate=0.95), "random_rate"),
        (MaskedLm(max_predictions=0), "max_predictions"),
        (SpanCorruption(noise_density=1.0), "noise_density"),
        (SpanCorruption(mean_span_tokens=0.5), "mean_span_tokens"),
        (SentencePairs(short_rate=2), "short_rate"),
        (Specials(mask=5, sentinels=(5, -1)), "sentinels sentinels"),
    ],
)
def test_check_names_the_field(config: object, field: str) -> None:
    assert [name for name, _ in config.check()] == field.split()
    assert all("must" in what or "token" in what for _, what in config.check())
    assert not list(type(config)().check())


def test_what_is_missing_is_named() -> None:
    window = windows(stream(["some text to learn"]), 10)[0]
    bare = frame(10, specials=Specials(), codec=None)
    for objective, message in (
        (MaskedLm(), "special token mask is missing"),
        (FillInTheMiddle(rate=1), "try characters=false"),
        (FillInTheMiddle(rate=1, characters=False), "special token fim_prefix is missing"),
        (MaskedLm(whole_words=True), "try whole_words=false"),
    ):
        with pytest.raises(ValueError, match=message):
            objective.row(window, bare, draws())
    with pytest.raises(ValueError, match=r"sequence_length=4 is too short"):
        SentencePairs().chunks([[2, 2]], 4)
    with pytest.raises(ValueError, match=r"sequence_length=4 is too short"):
        SpanCorruption().window_length(4)


def test_objectives_need_numpy_alone() -> None:
    program = (
        "import sys, data.batches.objectives; print(sorted({'jax', 'grain', 'tokenizers', 'mtx'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parent.parent
    child = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
