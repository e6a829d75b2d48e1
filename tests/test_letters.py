"""What letters decide: a test's own weights, and a test's own axis, give what one device gives, in float32.

Gradients are summed over the axes that split what a weight meets and not the weight. Time split everywhere (the mesh
axis `context`, refused in configs until attention gathers keys) needs attention of a test's own.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx import DIMENSIONS
from mtx import model as models
from mtx.attention import Attention
from mtx.layers import Context, Gelu, Mlp, add_bias, vector, weight
from mtx.layout import ZERO, BoundLayout, Row, megatron
from mtx.losses import RowScores
from mtx.model import flatten
from mtx.pipeline import ZeroBubble
from mtx.spmd import Compiled, ManualActivations
from mtx.sums import Sums
from pallas_kernels.masks import Causal, Documents

BOUND = 1e-5
SP = {"sequence_parallel": True}


def check(p, model, arrays, reference: tuple[dict, np.ndarray], microbatches: int = 4) -> None:
    assert not list(p.layout.layout.check())
    found, sums = toys.gradients(p, toys.weights_of(model), arrays, microbatches)
    np.testing.assert_allclose(sums, reference[1], rtol=BOUND)
    toys.check_close(found, reference[0], BOUND)


# A gain per head size, shared by the heads: it meets activations that are split over heads.


class GainedAttention(Attention):
    """Queries and keys normed over H, each with a gain (Henry et al. 2020)."""

    def __init__(self, config, width, *rest):
        super().__init__(config, width, *rest)
        H, rngs = config.head_size or width // config.heads, rest[-1]
        self.query_gain_H = vector(rngs, "H", (H,), 1.0, meets="BTNH")
        self.key_gain_H = vector(rngs, "H", (H,), 1.0, meets="BTKH")

    def _heads(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTNH, k_BTKH, v_BTKH = super()._heads(x_BTD, context)
        return normed(q_BTNH) * self.query_gain_H[...], normed(k_BTKH) * self.key_gain_H[...], v_BTKH


def normed(x_BTNH: jax.Array) -> jax.Array:
    return x_BTNH * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTNH), axis=-1, keepdims=True) + 1e-5)


GAINED = replace(toys.LLAMA, layers=3)
GAINS = {f"stacks/main/block/attention/{name}_gain_H" for name in ("query", "key")}
GAIN_CASES = [
    ((1, 1, 8), {}),
    ((2, 2, 2), {"zero": 1}),
    ((1, 2, 4), {"zero": 2, **SP}),
    ((1, 4, 2), {"zero": 3, **SP}),
    ((1, 2, 4), {"zero": 1, "partition": Compiled()}),
    ((2, 2, 2), {"zero": 3, **SP, "partition": Compiled()}),
    ((1, 1, 4), {"stages": 2, "schedule": ZeroBubble()}),
    ((1, 2, 2), {"stages": 2, "zero": 3, **SP}),
]


@pytest.fixture
def gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Attention", GainedAttention)


@functools.cache
def gained_reference() -> tuple[dict, np.ndarray]:
    found = toys.gradients(toys.program(GAINED), toys.weights_of(GAINED), toys.batch())
    sizes = {name: np.linalg.norm(g) for name, g in flatten(found[0]).items()}
    assert min(sizes[name] for name in GAINS) > 1e-3 * np.linalg.norm(list(sizes.values()))
    return found


@pytest.mark.parametrize(("mesh", "words"), GAIN_CASES, ids=str)
def test_a_gain_of_every_head(mesh: tuple[int, int, int], words: dict, gained: None):
    check(toys.program(GAINED, mesh, **words), GAINED, toys.batch(), gained_reference())


def test_what_splits_the_data_is_not_what_splits_the_activation(gained: None, monkeypatch: pytest.MonkeyPatch):
    """Control: summed over what splits rows and time of the data alone, a gain misses the other ranks' heads."""
    p, reference = toys.program(GAINED, (1, 1, 8)), gained_reference()

    def data_axes(self: BoundLayout, weight) -> tuple[str, ...]:
        own = {axis for axes in self._in_use(weight) for axis in axes}
        return tuple(axis for axis in self.splits("BTDL") if axis not in own)

    monkeypatch.setattr(BoundLayout, "reduce_axes", data_axes)
    with pytest.raises(AssertionError, match=r"copies of stacks/main/block/attention/\w+_gain_H differ"):
        check(p, GAINED, toys.batch(), reference)


# Features that tensor parallelism does not split: low-rank adapters, beside column and row projections.


class Adapted(Gelu):
    def build(self, width, bias, std, out_std, rngs) -> "AdaptedMlp":
        return AdaptedMlp(self, width, bias, std, out_std, rngs)


class AdaptedMlp(Mlp):
    """With low-rank adapters of both projections (Hu et al. 2021); the second one's R is of the residual stream."""

    def __init__(self, config, width, bias, std, out_std, rngs):
        super().__init__(config, width, bias, std, out_std, rngs)
        D, F, R, init = width, config.width, 4, jax.nn.initializers.normal(0.2)
        self.in_down_DR = weight(rngs, "DR", (D, R), init)
        self.in_up_RF = weight(rngs, "RF", (R, F), init, meets="BTR")
        self.out_down_FR = weight(rngs, "FR", (F, R), init, meets="BTF")
        self.out_up_RD = weight(rngs, "RD", (R, D), init, meets="BTR")
        self.scale_R = vector(rngs, "R", (R,), 1.0, meets="BTR")

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        project = context.doors.project
        h_BTF = project("BTD,DF->BTF", x_BTD, self.in_DF)
        low_BTR = project("BTD,DR->BTR", x_BTD, self.in_down_DR) * self.scale_R[...]
        h_BTF = jax.nn.gelu(add_bias(h_BTF + project("BTR,RF->BTF", low_BTR, self.in_up_RF), self.bias_F))
        low_BTR = project("BTF,FR->BTR", h_BTF, self.out_down_FR) * self.scale_R[...]
        return project("BTF,FD->BTD", h_BTF, self.out_FD) + project("BTR,RD->BTD", low_BTR, self.out_up_RD), {}


ADAPTED = replace(toys.GPT, layers=3, mlp=Adapted(width=64))


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIMENSIONS, "R", "rank")


@functools.cache
def adapted_reference() -> tuple[dict, np.ndarray]:
    return toys.gradients(toys.program(ADAPTED), toys.weights_of(ADAPTED), toys.batch())


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ((2, 1, 4), {}),
        ((1, 2, 4), {"zero": 1, **SP}),
        ((1, 4, 2), {"zero": 3, **SP}),
        ((1, 2, 4), {"zero": 1, **SP, "partition": Compiled()}),
        ((1, 2, 2), {"stages": 2, **SP}),
    ],
    ids=str,
)
def test_low_rank_adapters(mesh: tuple[int, int, int], words: dict, adapted: None):
    check(toys.program(ADAPTED, mesh, **words), ADAPTED, toys.batch(), adapted_reference())


def test_an_einsum_that_meets_what_its_weight_does_not_declare(monkeypatch: pytest.MonkeyPatch):
    class Undeclared(Attention):
        def __init__(self, *args):
            super().__init__(*args)
            self.out_NHD = weight(args[-1], "NHD", self.out_NHD.shape, jax.nn.initializers.zeros)

    monkeypatch.setattr(models, "Attention", Undeclared)
    with pytest.raises(AssertionError, match="declare it with meets='BTNH'"):
        toys.program(GAINED).lower_train_step(1, 8, 8)


# Time split everywhere, over an axis that splits nothing else.


class GatheringAttention(Attention):
    """Every rank attends from its own part of time to all keys."""

    def _attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: Context) -> jax.Array:
        doors, causal = context.doors, context.mask.has(Causal)
        k_BSKH, v_BSKH = (doors.whole("BTKH", "T", x) for x in (k_BTKH, v_BTKH))
        segment_BS = doors.whole("BT", "T", context.segment_BT)
        t_T = doors.index("BTNH", "T", q_BTNH)
        assert context.mask.has(Documents)

        def attend(q_BTNH, k_BSKH, v_BSKH, segment_BT, segment_BS, t_T):
            B, T, N, H = q_BTNH.shape
            q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
            seen_BTS = segment_BT[:, :, None] == segment_BS[:, None]
            seen_BTS &= (t_T[:, None] >= jnp.arange(segment_BS.shape[1])) | (not causal)
            scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * H**-0.5
            p_BKGTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -1e30), axis=-1)
            return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH).reshape(B, T, N, H)

        letters = ("BTNH", "BSKH", "BSKH", "BT", "BS", "T")
        return doors.local(attend, letters, "BTNH", q_BTNH, k_BSKH, v_BSKH, context.segment_BT, segment_BS, t_T)


GPT, LLAMA = replace(toys.GPT, dropout=0.2), toys.LLAMA
PAIRS = replace(toys.GPT, causal=False, pairs=True)
TIME_CASES = [
    (LLAMA, 2, (1, 1, 1), {}),
    (GPT, 4, (1, 1, 2), SP),
    (LLAMA, 2, (1, 2, 2), {"zero": 3, **SP}),
    (GPT, 2, (2, 2, 1), {"zero": 2}),
    (PAIRS, 2, (1, 1, 4), SP),
    (GPT, 2, (1, 2, 2), {"zero": 1, **SP, "partition": Compiled()}),
    (PAIRS, 2, (1, 2, 2), {"zero": 3, "partition": Compiled()}),
    (GPT, 2, (1, 1, 2), {"stages": 2, **SP}),
    (replace(LLAMA, layers=4), 2, (1, 2, 1), {"stages": 2, "zero": 3}),
]


@pytest.fixture
def gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Attention", GatheringAttention)


def rows_of(model) -> dict[str, np.ndarray]:
    arrays = toys.batch()
    if not model.pairs:
        return arrays
    label = np.random.default_rng(6).integers(0, 2, (len(arrays["tokens"]), 1), np.int32)
    return arrays | {"types": arrays["segments"] % 2, "label": np.broadcast_to(label, arrays["tokens"].shape)}


@functools.cache
def reference(model) -> tuple[dict, np.ndarray]:
    """Without a test's own attention, on one device."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(models, "Attention", Attention)
        return toys.gradients(toys.program(model), toys.weights_of(model), rows_of(model))


@pytest.mark.parametrize(("model", "context", "mesh", "words"), TIME_CASES, ids=lambda x: getattr(x, "name", None))
def test_time_split_everywhere(model, context: int, mesh: tuple[int, int, int], words: dict, gathering: None):
    p = toys.program(model, mesh, context=context, **words)
    assert p.batch_spec[-1] == "context"
    check(p, model, rows_of(model), reference(model))


def test_labels_are_counted_over_rows_and_time(gathering: None, monkeypatch: pytest.MonkeyPatch):
    """Control: each rank's labels over its rows alone are a part of them."""
    p, wanted = toys.program(LLAMA, context=2), reference(LLAMA)
    sum_over = ManualActivations.sum_over
    monkeypatch.setattr(
        ManualActivations, "sum_over", lambda self, letters, x: sum_over(self, letters.replace("T", ""), x)
    )
    with pytest.raises(AssertionError):
        check(p, LLAMA, toys.batch(), wanted)


def test_evaluation_counts_over_rows_and_time(gathering: None):
    def sums(p) -> np.ndarray:
        state, batch = toys.state_of(p, toys.weights_of(LLAMA)), toys.place(p, toys.batch(), 1)
        return toys.eval_sums(p, state.params, batch)

    np.testing.assert_allclose(
        sums(toys.program(LLAMA, (1, 2, 2), context=2, **SP)), reference(LLAMA)[1][1:], rtol=BOUND
    )


def test_rows_are_scored_over_time(gathering: None):
    def scores(p) -> RowScores:
        state, batch = toys.state_of(p, toys.weights_of(LLAMA)), toys.place(p, toys.batch(), 1)
        with jax.set_mesh(p.mesh):
            return jax.tree.map(np.asarray, jax.jit(p.eval_rows)(state.params, batch))

    found, wanted = scores(toys.program(LLAMA, (1, 2, 2), context=2, **SP)), scores(toys.program(LLAMA))
    np.testing.assert_allclose(found.log_probability, wanted.log_probability, rtol=BOUND)
    np.testing.assert_array_equal(found.targets, wanted.targets)
    np.testing.assert_array_equal(found.greedy, wanted.greedy)


# Several axes for one letter: offsets count through all of them.

TWO = ("context", "model")


def over_two_axes(sequence_parallel: bool) -> tuple[Row, ...]:
    """Heads, feed-forward and vocabulary over two axes, and time in the residual stream over them or not at all."""
    rows = {row.dimension: row for row in megatron(1, False)}
    for name in ("heads", "kv_heads", "ff", "vocab"):
        rows[name] = Row(dimension=name, weights=TWO, gradients=TWO, optimizer=TWO, activations=TWO)
    rows["time"] = Row(dimension="time")
    rows["residual_time"] = Row(dimension="residual_time", activations=TWO if sequence_parallel else ())
    return tuple(rows.values())


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("partition", [None, Compiled()], ids=str)
def test_a_letter_over_two_axes(sequence_parallel: bool, partition: Compiled | None):
    words = {"partition": partition} if partition else {}
    model = replace(toys.dropped(toys.GPT, 0.2), layers=1)
    p = toys.program(model, (1, 2, 2), context=2, rows=over_two_axes(sequence_parallel), **words)
    check(p, model, toys.batch(), reference(model))


# The table is the one truth of what its preset's fields say.


@pytest.mark.parametrize("words", [{}, {"partition": Compiled()}, {"stages": 2}], ids=["manual", "compiled", "stages"])
def test_a_table_lowers_as_its_preset(words: dict):
    def text(**layout) -> str:
        return toys.program(replace(LLAMA, layers=4), (1, 2, 2), **layout, **words).lower_train_step(2, 8, 8).as_text()

    presets = {zero: text(zero=zero, sequence_parallel=True) for zero in range(4)}
    assert presets == {zero: text(rows=megatron(zero, True)) for zero in range(4)}
    assert len(set(presets.values())) == 4, "two ZeRO stages do the same"
    assert presets[3] != text(rows=megatron(3, False))


@pytest.mark.parametrize("words", [{}, {"partition": Compiled()}], ids=["manual", "compiled"])
@pytest.mark.parametrize("gated", [False, True])
def test_sequence_parallel_beside_a_whole_feed_forward_layer(gated: bool, words: dict):
    """The layer's T stays the residual stream's: each rank computes it for its own part of time."""
    model = LLAMA if gated else GPT
    p = toys.program(model, (1, 2, 4), rows=tuple(row for row in megatron(1, True) if row.dimension != "ff"), **words)
    check(p, model, toys.batch(), reference(model))


@pytest.mark.parametrize("gathered", ["step", "use"])
def test_zero_over_replicas_too(gathered: str):
    rows = [row for row in megatron(2, False) if row.dimension != ZERO]
    both = ("replica", "data")
    rows.append(Row(dimension=ZERO, weights=both, gradients=both, optimizer=both, gathered=gathered))
    p = toys.program(LLAMA, (2, 2, 2), rows=tuple(rows))
    spec = p.layout.spec(flatten(p.weights)["stacks/main/block/mlp/out_FD"], "weights")
    assert spec == jax.P(None, ("model", "replica", "data"), None)
    check(p, LLAMA, toys.batch(), reference(LLAMA))
