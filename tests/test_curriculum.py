"""Curricula: DeepSpeed's pacing tables, pools that no sample escapes, and an exact account of dropped tokens."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.curriculum import Curriculum, FixedDiscrete, FixedLinear, FixedRoot, LengthWarmup, easiest_first

CASES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def deepspeed(step: int, first: int, last: int, steps: int, multiple: int, degree: int) -> set[int]:
    """What its `CurriculumScheduler` computes in floats; two values where rounding decides."""
    exact = (step / steps) ** (1 / degree) * (last - first) + first
    reached = [math.floor(exact + error) // multiple * multiple for error in (-1e-9, 1e-9)]
    return {min(max(value, -(-first // multiple) * multiple), last) for value in reached}


@CASES
@given(
    first=st.integers(1, 90),
    rise=st.integers(0, 2000),
    steps=st.integers(1, 400),
    multiple=st.sampled_from([1, 8, 64]),
    degree=st.integers(1, 4),
)
def test_pacing_is_that_of_deepspeed(first: int, rise: int, steps: int, multiple: int, degree: int) -> None:
    last = first + rise
    root = FixedRoot(first=first, last=last, steps=steps, degree=degree, multiple=multiple)
    found = [root.difficulty(step) for step in range(steps + 2)]
    assert all(d in deepspeed(step, first, last, steps, multiple, degree) for step, d in enumerate(found[:steps]))
    assert found == sorted(found) and found[-2:] == [last, last]
    linear = FixedLinear(first=first, last=last, steps=steps, multiple=multiple)
    assert degree > 1 or [linear.difficulty(step) for step in range(steps + 2)] == found


def test_published_recipes() -> None:
    """Li et al. 2022's for 1.3B parameters: vocabulary rarity in percent, and lengths."""
    rarity, length = (
        FixedRoot(first=1, last=100, steps=110_000),
        FixedLinear(first=80, last=2048, steps=110_000, multiple=8),
    )
    assert [rarity.difficulty(t) for t in (0, 12, 1100, 27_500, 109_999, 110_000)] == [1, 2, 10, 50, 99, 100]
    assert [length.difficulty(t) for t in (0, 446, 448, 55_000, 109_999, 10**9)] == [80, 80, 88, 1064, 2040, 2048]
    discrete = FixedDiscrete(difficulties=(1, 2, 3), until_steps=(5, 10))  # the example in DeepSpeed's code
    assert [discrete.difficulty(t) for t in (0, 5, 6, 10, 11, 99)] == [1, 1, 2, 2, 3, 3]
    assert FixedRoot(first=8, last=64, steps=10, degree=3, multiple=16).difficulty(0) == 16  # never below first


METRIC_N = np.sort(np.arange(37) * 7 % 10)
CURRICULA = [
    Curriculum(pacing=FixedLinear(first=5, last=100, steps=30)),
    Curriculum(pacing=FixedRoot(first=1, last=100, steps=30, degree=3)),
    Curriculum(pacing=FixedDiscrete(difficulties=(10, 50, 100), until_steps=(19, 44))),
    Curriculum(pacing=FixedLinear(first=1, last=9, steps=30), by="value"),
]


def draw(curriculum: Curriculum, seed: int, source: str, sample: int, global_size: int) -> int:
    """Of a run with one source."""
    pool, since_step = curriculum.pool(sample // global_size, METRIC_N)
    return curriculum.draw(seed, source, pool, sample - since_step * global_size)


@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("global_size", [1, 4])
def test_only_the_easiest_are_drawn_each_in_its_turn(curriculum: Curriculum, global_size: int) -> None:
    pools: dict[int, list[int]] = {}
    for sample in range(90 * global_size):
        step = sample // global_size
        pool = curriculum.permitted(step, METRIC_N)
        rank = draw(curriculum, 3, "web", sample, global_size)
        assert 0 <= rank < pool
        difficulty = curriculum.pacing.difficulty(step)
        if curriculum.by == "value":
            assert METRIC_N[rank] <= difficulty and pool == sum(m <= difficulty for m in METRIC_N)
        else:
            assert pool == max(1, difficulty * 37 // 100)
        pools.setdefault(pool, []).append(rank)
    assert list(pools) == sorted(pools) and max(pools) == 37
    for pool, ranks in pools.items():
        turns = [ranks[i : i + pool] for i in range(0, len(ranks), pool)]
        assert all(len(set(turn)) == len(turn) for turn in turns)
    assert pools[37][:23] != pools[37][37:60]  # each turn has an order of its own


def test_a_draw_is_a_function_of_seed_source_and_sample() -> None:
    def drawn(seed: int, source: str) -> list[int]:
        return [draw(CURRICULA[0], seed, source, i, 2) for i in range(60, 90)]

    assert drawn(0, "web") == drawn(0, "web")
    assert len({tuple(drawn(seed, source)) for seed in (0, 1) for source in ("web", "books")}) == 4
    firsts = Counter(draw(CURRICULA[0], seed, "web", 60, 2) for seed in range(740))
    assert len(firsts) == 37 and max(firsts.values()) < 20 + 5 * math.sqrt(20)


def test_equal_samples_keep_their_order() -> None:
    assert easiest_first([3, 1, 2, 1, 1, 3]).tolist() == [1, 3, 4, 2, 0, 5]


@CASES
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4, unique=True).map(sorted),
    steps=st.integers(1, 50),
    at=st.integers(0, 70),
    degree=st.integers(1, 2),
)
def test_dropped_tokens_are_counted(lengths: list[int], steps: int, at: int, degree: int) -> None:
    pacing = FixedRoot(first=1, last=lengths[-1], steps=steps, degree=degree)
    warmup = LengthWarmup(lengths=tuple(lengths), pacing=pacing)
    assert not list(warmup.check())
    each = [warmup.length(step) for step in range(at)]
    assert each == [max([n for n in lengths if n <= pacing.difficulty(t)], default=lengths[0]) for t in range(at)]
    assert warmup.tokens(at, 6) == (6 * sum(each), 6 * sum(lengths[-1] - length for length in each))
    many = [warmup.length(step) for step in range(steps + 2)]
    assert warmup.first_steps() == [next(t for t, have in enumerate(many) if have >= length) for length in lengths]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FixedRoot(first=0, last=0, steps=0, degree=0, multiple=0), "first steps degree multiple"),
        (FixedLinear(first=9, last=8, steps=1), "last"),
        (FixedDiscrete(difficulties=(2, 1), until_steps=()), "difficulties until_steps"),
        (FixedDiscrete(difficulties=(1, 2, 3), until_steps=(5, 4)), "until_steps"),
        (Curriculum(pacing=FixedLinear(first=1, last=50, steps=9)), "pacing"),
        (LengthWarmup(lengths=(), pacing=FixedLinear(first=1, last=8, steps=9)), "lengths"),
        (LengthWarmup(lengths=(8, 4), pacing=FixedLinear(first=1, last=8, steps=9)), "lengths"),
        (LengthWarmup(lengths=(4, 16), pacing=FixedLinear(first=1, last=8, steps=9)), "pacing"),
    ],
)
def test_check_names_the_field(config: object, field: str) -> None:
    assert [name for name, _ in config.check()] == field.split()
    assert all("must" in what for _, what in config.check())
    assert not [problem for good in CURRICULA for problem in good.check()]
