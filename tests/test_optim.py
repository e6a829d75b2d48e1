"""Schedules against their definitions, counters, decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx.optim import (
    AdamW,
    Constant,
    Cosine,
    Counter,
    Fraction,
    Linear,
    Lion,
    Progress,
    Samples,
    Schedule,
    Sgd,
    Steps,
    Tokens,
)


def at(schedule: Schedule, step: int, of: int = 1000, batch: int = 4, time: int = 8) -> float:
    numbers = (step, step * batch, step * batch * time, step / of)
    return float(schedule.rate(Progress(*(jnp.float32(x) for x in numbers))))


@pytest.mark.parametrize(
    "warmup", [Steps(count=100), Samples(count=400), Tokens(count=3200), Fraction(share=0.1)], ids=str
)
def test_warmup_in_every_unit(warmup):
    schedule = Constant(peak_lr=2.0, warmup=warmup)
    for step in (1, 50, 100, 500):
        assert at(schedule, step) == pytest.approx(2.0 * min(1, step / 100), rel=1e-6)


def test_lengths_beyond_32_bits():
    schedule = Cosine(peak_lr=1.0, warmup=Tokens(count=10**10), end=Tokens(count=10**12), final_share=0.0)
    progress = Progress(*(jnp.float32(x) for x in (1, 1, 505 * 10**9, 0.5)))
    assert float(jax.jit(schedule.rate)(progress)) == pytest.approx(0.5, abs=1e-3)


def test_warmup_and_decay_may_count_in_different_units():
    kw = {"peak_lr": 1.0, "final_share": 0.0}
    one = Linear(**kw, warmup=Steps(count=100), end=Fraction(share=1.0))
    other = Linear(**kw, warmup=Steps(count=100), end=Steps(count=1000))
    for step in (1, 50, 100, 101, 500, 1000, 1500):
        assert at(one, step) == pytest.approx(at(other, step), abs=1e-5)
    assert at(one, 100) == pytest.approx(1.0, abs=1e-5)


def test_cosine_and_linear():
    kw = {"peak_lr": 1.0, "warmup": Fraction(share=0.1), "final_share": 0.2}
    for step in (100, 325, 550, 1000, 2000):
        fallen = min(1.0, (step / 1000 - 0.1) / 0.9)
        assert at(Linear(**kw), step) == pytest.approx(1 - 0.8 * fallen, rel=1e-5)
        assert at(Cosine(**kw), step) == pytest.approx(0.2 + 0.8 * (1 + np.cos(np.pi * fallen)) / 2, rel=1e-5)


def test_decay_may_end_before_the_run():
    schedule = Linear(peak_lr=1.0, warmup=Steps(count=10), end=Steps(count=110), final_share=0.0)
    assert at(schedule, 60) == pytest.approx(0.5)
    assert at(schedule, 111) == 0.0


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1, 2**32, 10**12, 2**63 + 5])
def test_counters_carry(value: int):
    counter = Counter.of(value)
    assert int(counter) == value
    more = jax.jit(Counter.plus)(counter, jnp.uint32(2**32 - 1))
    assert int(more) == value + 2**32 - 1
    assert float(more.as_float()) == pytest.approx(value + 2**32 - 1, rel=1e-6)


@pytest.mark.parametrize(
    "optimizer", [AdamW(), Lion(), Sgd(momentum=0.9, weight_decay=0.1)], ids=lambda o: type(o).__name__
)
def test_decay_is_for_matrices_alone(optimizer):
    p = toys.program(toys.GPT, optimizer=optimizer)
    state = toys.state_of(p, toys.weights_of(toys.GPT))
    updated, _ = p.updated(state, jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0.5))
    for (name, w), x, new in zip(
        toys.flatten(p.weights).items(),
        toys.flatten(state.params).values(),
        toys.flatten(updated).values(),
        strict=True,
    ):
        wanted = x if w.role == "vector" else (1 - 0.5 * 0.1) * x
        np.testing.assert_allclose(new, wanted, rtol=1e-6, err_msg=name)


def test_moments_are_split_like_their_weights():
    p = toys.program(toys.GPT, (1, 4, 2), zero=1, optimizer=AdamW())
    state = p.init(0)
    moments = toys.flatten(state.parts["moments"])
    for name, x in toys.flatten(state.params).items():
        assert moments[f"{name}/mu"].sharding == moments[f"{name}/nu"].sharding == x.sharding, name
    name = "stacks/main/block/mlp/out_FD/mu"
    assert str(jax.typeof(moments[name])) == "float32[2,64@(model,data),32]"
