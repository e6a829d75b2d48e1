"""The train step: compiled once, non-finite steps skipped, counters that never overflow, memory of ZeRO-3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sums
import toys

from mtx.layers import Gelu
from mtx.model import flatten
from mtx.optim import AdamW, Constant, Counter, Sgd, Steps
from mtx.spmd import Compiled, Manual
from mtx.state import TrainState

OPTIMIZER = AdamW(schedule=Constant(peak_lr=1e-2, warmup=Steps(count=0)))


def one_step(p, state: TrainState, arrays, microbatches: int = 1) -> tuple[TrainState, dict]:
    with jax.set_mesh(p.mesh):
        state, metrics = p.compile_train_step()(state, toys.place(p, arrays, microbatches), np.int32(microbatches))
    return state, jax.device_get(metrics)


@pytest.mark.parametrize(("mesh", "stages"), [((1, 1, 1), 1), ((1, 4, 2), 1), ((1, 2, 1), 2)], ids=str)
def test_non_finite_gradients_change_only_the_counters(mesh: tuple[int, int, int], stages: int):
    p = toys.program(toys.GPT, mesh, optimizer=OPTIMIZER, zero=2 if mesh[1] > 1 else 0, stages=stages)
    arrays = toys.batch()
    params = toys.weights_of(toys.GPT)
    params["ends"]["norm"]["gain_D"][3] = np.inf
    before = jax.device_get(toys.state_of(p, params))
    after, metrics = one_step(p, toys.state_of(p, params), arrays)
    assert not np.isfinite(metrics["train/grad_norm"])
    for (name, x), y in zip(flatten(before.params).items(), flatten(after.params).values(), strict=True):
        np.testing.assert_array_equal(x, np.asarray(y), err_msg=name)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y)), before.parts["moments"], after.parts["moments"]
    )
    assert (int(after.step), int(after.skipped), int(after.samples)) == (1, 1, 32)
    params["ends"]["norm"]["gain_D"][3] = 1.0
    after, _ = one_step(p, toys.state_of(p, params), arrays)
    assert int(after.skipped) == 0


def test_a_skipped_step_is_no_update_for_the_optimizer():
    """Adam's bias correction counts updates: the step after a skipped one is the first."""
    p, params, arrays = toys.program(toys.GPT, optimizer=OPTIMIZER), toys.weights_of(toys.GPT), toys.batch()
    bad = {**params, "ends": {**params["ends"], "token_VD": np.full_like(params["ends"]["token_VD"], np.inf)}}
    after, _ = one_step(p, toys.state_of(p, bad), arrays)
    assert int(after.skipped) == 1
    again, _ = one_step(p, dataclasses.replace(after, params=toys.state_of(p, params).params), arrays)
    first, _ = one_step(p, toys.state_of(p, params), arrays)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), again.params, first.params)


def test_a_step_at_ten_to_the_twelve_tokens():
    p = toys.program(toys.dropped(toys.GPT, 0.1), optimizer=OPTIMIZER)
    state = toys.state_of(p, toys.weights_of(toys.GPT))
    tokens, samples = 10**12 + 2**32 - 100, 2**32 - 7
    state = dataclasses.replace(state, tokens=Counter.of(tokens), samples=Counter.of(samples))
    state, metrics = one_step(p, state, toys.batch(), 4)
    assert int(state.tokens) == tokens + 32 * 16
    assert int(state.samples) == samples + 32
    assert np.isfinite(metrics["train/loss"])


def test_fewer_microbatches_than_the_batch_holds_without_compiling_again():
    """A batch-size ramp: the count is traced, rows beyond it are not read."""
    p = toys.program(toys.GPT, (1, 2, 1))
    params, arrays = toys.weights_of(toys.GPT), toys.batch()
    step = jax.jit(p.gradients)
    with jax.set_mesh(p.mesh):
        state, placed = toys.state_of(p, params), toys.place(p, arrays, 4)
        part, sums = step(state, placed, np.int32(2))
        step(state, placed, np.int32(4))
    assert step._cache_size() == 1
    half = {name: x[:16] for name, x in arrays.items()}
    wanted, wanted_sums = toys.gradients_and_sums(toys.program(toys.GPT), params, half)
    for name, value in wanted_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    toys.check_close(jax.tree.map(lambda g: np.asarray(g) / float(sums["labels"]), part), wanted, 1e-5)


def test_clipping_is_by_the_global_norm():
    params, arrays = toys.weights_of(toys.GPT), toys.batch()
    found, _ = toys.gradients(toys.program(toys.GPT), params, arrays)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in flatten(found).values()))
    rate, limit = 0.1, 0.5 * float(norm)
    optimizer = Sgd(schedule=Constant(peak_lr=rate, warmup=Steps(count=0)), clip_norm=limit)
    p = toys.program(toys.GPT, (1, 2, 4), zero=1, optimizer=optimizer)
    state, metrics = one_step(p, toys.state_of(p, params), arrays)
    np.testing.assert_allclose(metrics["train/grad_norm"], norm, rtol=1e-5)
    moved = jax.tree.map(lambda old, new: (old - np.asarray(new)) / rate, params, state.params)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in flatten(moved).values()))
    np.testing.assert_allclose(length, limit, rtol=1e-4)


def test_bfloat16_keeps_float32_masters_and_sums():
    p = toys.program(toys.GPT, (1, 4, 2), zero=2, compute=jnp.bfloat16, optimizer=OPTIMIZER)
    params, arrays = toys.weights_of(toys.GPT), toys.batch()
    found, _ = toys.gradients(p, params, arrays, 4)
    wanted, _ = toys.gradients(toys.program(toys.GPT), params, arrays)
    assert {str(g.dtype) for g in flatten(found).values()} == {"float32"}
    toys.check_close(found, wanted, 0.05)
    state, _ = one_step(p, toys.state_of(p, params), arrays, 4)
    assert {str(x.dtype) for x in flatten(state.params).values()} == {"float32"}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_step_keeps_every_shape_dtype_and_sharding(stored: str):
    p = toys.program(toys.GPT, (1, 4, 2), zero=1, compute=jnp.bfloat16, stored=stored, optimizer=OPTIMIZER)
    state = p.init(0)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    after, _ = one_step(p, state, toys.batch())
    assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), after)
    assert str(after.params["stacks"]["main"]["block"]["mlp"]["in_DF"].dtype) == stored
    assert {str(x.dtype) for x in flatten(after.parts["moments"]).values()} == {"float32"}


def test_no_device_holds_the_model_while_it_is_made():
    model = dataclasses.replace(toys.GPT, width=256, mlp=Gelu(width=1024), layers=4)
    p = toys.program(model, (1, 8, 1), zero=3, optimizer=OPTIMIZER)
    made = jax.jit(p._init, out_shardings=p.state_shardings).lower(np.uint32(0)).compile().memory_analysis()
    assert made.temp_size_in_bytes < 0.5 * 4 * 12 * 256 * 256 * 4, "the layers' weights, whole, are 1.0"


@pytest.mark.parametrize("partition", [Manual(), Compiled()], ids=["manual", "compiled"])
def test_gathered_weights_are_not_saved_for_the_backward_pass(partition: Manual | Compiled):
    """Without remat, stage 3's temporaries must not grow by a layer's gathered weights per layer."""

    def temporaries(layers: int, zero: int) -> int:
        model = dataclasses.replace(toys.GPT, layers=layers, width=256, mlp=Gelu(width=1024))
        p = toys.program(model, (1, 8, 1), zero=zero, optimizer=OPTIMIZER, partition=partition)
        return p.lower_train_step(1, 8, 16).compile().memory_analysis().temp_size_in_bytes

    layer = 4 * 12 * 256 * 256
    per_layer = (temporaries(8, 3) - temporaries(4, 3)) / 4
    assert per_layer < 0.8 * layer, "a gathered layer is 1.0; shards of weights, moments and gradients are below 0.6"
    assert (temporaries(8, 1) - temporaries(4, 1)) / 4 > layer, "the control: stage 1 holds whole weights"


def test_statistics_of_the_layers_that_are_one_number_are_metrics():
    p = toys.program(test_sums.MODEL, optimizer=OPTIMIZER)
    _, metrics = one_step(p, toys.state_of(p, toys.weights_of(test_sums.MODEL)), test_sums.arrays(), 4)
    _, found = test_sums.reference(test_sums.MODEL)
    tokens = (test_sums.arrays()["segments"] > 0).sum()
    np.testing.assert_allclose(metrics["train/router"], found["router"] / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/energy"], found["energy"] / found["labels"], rtol=1e-5)
    np.testing.assert_allclose(metrics["train/peak"], found["peak"], rtol=1e-5)
    own = {name for name in metrics if name.startswith("train/")}
    assert own == {f"train/{name}" for name in ("loss", "grad_norm", "router", "energy", "peak")}
