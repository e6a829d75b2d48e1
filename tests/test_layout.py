"""The layout: specs from letters, the ZeRO dimension, refusals, the table."""

import dataclasses

import pytest
import toys
from jax.sharding import PartitionSpec as P

from mtx.errors import ConfigError
from mtx.layout import ZERO, BoundLayout, Layout, Row, Weight, megatron
from mtx.mesh import AXES
from mtx.model import Model, flatten


def bound(layout: Layout = Layout(), **sizes: int) -> BoundLayout:
    return BoundLayout.of(layout, {axis: sizes.get(axis, 1) for axis in AXES})


def test_megatron_splits_columns_then_rows():
    layout = bound(model=4, data=2)
    assert layout.spec(Weight("LDKGH", (3, 32, 8, 3, 4)), "weights") == P(None, None, "model", None, None)
    assert layout.spec(Weight("FD", (64, 32)), "weights") == P("model", None)
    assert layout.spec(Weight("VD", (256, 32)), "weights") == P("model", None)
    assert layout.activation("BTD") == P("data", None, None)
    assert layout.activation("BTF") == P("data", None, "model")


def test_axes_of_size_one_never_appear():
    layout = bound(Layout(zero=3, sequence_parallel=True))
    assert layout.spec(Weight("FD", (64, 32)), "weights") == P(None, None)
    assert layout.activation("BTD") == P(None, None, None)
    assert not layout.sequence_axes


def test_sequence_parallel_splits_time_of_the_residual_stream_alone():
    layout = bound(Layout(sequence_parallel=True), model=4, replica=2, data=2)
    assert layout.activation("BTD") == P(("replica", "data"), "model", None)
    assert layout.activation("BTNH") == P(("replica", "data"), None, "model", None)


@pytest.mark.parametrize(
    ("dims", "shape", "model", "spec"),
    [
        ("DF", (32, 64), 1, P("data", None)),  # F is larger but minor-most
        ("FD", (64, 32), 2, P(("model", "data"), None)),
        ("LFD", (8, 64, 32), 1, P(None, "data", None)),  # never the layer dimension
        ("NHD", (2, 16, 32), 1, P(None, "data", None)),
        ("NHD", (2, 3, 32), 1, P(None, None, "data")),  # nothing else divides
        ("DF", (3, 5), 1, P(None, None)),  # whole, and the table says so
    ],
)
def test_zero_dimension(dims: str, shape: tuple[int, ...], model: int, spec: P):
    assert bound(Layout(zero=1), data=8, model=model).spec(Weight(dims, shape), "weights") == spec


def test_gains_and_biases_stay_whole():
    assert bound(Layout(zero=3), data=2).spec(Weight("LD", (2, 32), role="vector"), "weights") == P(None, None)


@pytest.mark.parametrize(("zero", "columns"), [(0, ""), (1, "wo"), (2, "wgo"), (3, "wgo")])
def test_zero_stages_are_one_row(zero: int, columns: str):
    (row,) = [row for row in megatron(zero, False) if row.dimension == ZERO]
    found = {name[0] for name in ("weights", "gradients", "optimizer") if getattr(row, name)}
    assert found == set(columns)
    assert not row.activations
    assert row.gathered == ("use" if zero == 3 else "step")
    assert Layout(zero=zero).zero_stage == Layout(rows=megatron(zero, False)).zero_stage == zero


def test_a_table_says_what_the_fields_of_its_preset_do():
    preset, table = Layout(zero=3, sequence_parallel=True), Layout(rows=megatron(3, True), scatter="compute")
    assert (table.zero_stage, table.sequence_axes) == (preset.zero_stage, preset.sequence_axes) == (3, ("model",))
    assert not list(table.check())
    assert Layout().sequence_axes == ()
    problems = dict(Layout(zero=2, sequence_parallel=True, rows=megatron(3, True)).check())
    assert problems["zero"] == "has no effect: layout.rows replaces the preset; its row `zero` decides"
    assert problems["sequence_parallel"].endswith("; its row `residual_time` decides")
    assert "scatter" in dict(Layout(rows=megatron(2, True), scatter="compute").check())


@pytest.mark.parametrize(
    ("letters", "time"),
    [("BTD", "model"), ("BTQ", "model"), ("BTNH", None), ("BTJF", None), ("BTV", None), ("BT", None), ("BTS", None)],
)
def test_time_of_the_residual_stream(letters: str, time: str | None):
    assert bound(Layout(sequence_parallel=True), model=2).activation(letters)[1] == time


@pytest.mark.parametrize(
    ("weight", "axes"),
    [
        (Weight("LH", (3, 16), meets="BTNH"), ("data", "context", "model")),
        (Weight("LD", (3, 32)), ("data", "context", "model")),
        (Weight("LF", (3, 64), meets="BTF"), ("data", "context")),
        (Weight("LDF", (3, 32, 64)), ("data", "context")),
        (Weight("D", (32,)), ("data", "context", "model", "pipeline")),
        (Weight("VD", (256, 32)), ("data", "context", "pipeline")),
        (Weight("DQ", (32, 32), meets="BD"), ("data", "pipeline")),
    ],
    ids=lambda x: f"{x.dims} meets {x.meets}" if isinstance(x, Weight) else "",
)
def test_a_gradient_is_summed_over_what_splits_the_activation_and_not_the_weight(weight: Weight, axes: tuple):
    layout = bound(Layout(zero=1, sequence_parallel=True), pipeline=2, data=2, context=2, model=2)
    assert layout.reduce_axes(weight) == axes


def test_indivisible_dimensions_name_weight_dimension_axis_and_legal_sizes():
    model = dataclasses.replace(toys.LLAMA, attention=dataclasses.replace(toys.LLAMA.attention, kv_heads=2))
    with pytest.raises(
        ConfigError, match=r"kv_heads=2 of weight stacks/main/block/attention/qkv_DKGH .*mesh.model=8.*: 1, 2\."
    ):
        bound(model=8).check(flatten(Model(model).weights))


def test_two_dimensions_on_one_axis_are_refused():
    rows = (*megatron(0, False), Row(dimension="embed", weights=("model",), gradients=("model",), optimizer=("model",)))
    with pytest.raises(ConfigError, match=r"both (ff|embed|vocab|kv_heads|heads) and .* to mesh axis model"):
        bound(Layout(rows=rows), model=2).check(flatten(Model(toys.GPT).weights))


def test_a_replaced_table_is_used():
    rows = tuple(row for row in megatron(0, False) if row.dimension != "vocab")
    layout = bound(Layout(rows=rows), model=2)
    assert layout.spec(Weight("VD", (256, 32)), "weights") == P(None, None)
    assert layout.spec(Weight("FD", (64, 32)), "weights") == P("model", None)


D, M, MC = ("data",), ("model",), ("model", "context")
HEADS_AND_VOCAB = ("heads", "kv_heads", "vocab")
TABLES = {
    "must split all four columns of vocab": [Row(dimension="vocab", weights=M, gradients=M, optimizer=M)],
    "splits head;": [Row(dimension="head", weights=M, gradients=M, optimizer=M, activations=M)],
    "splits one of heads and kv_heads": [Row(dimension="heads")],
    "must split the activations of batch over replica, data, expert": [Row(dimension="batch", activations=("data",))],
    "splits residual_time over context, model, which needs heads, kv_heads, vocab": [
        Row(dimension="time"),
        Row(dimension="residual_time", activations=("context", "model")),
        Row(dimension="vocab"),
    ],
    "splits residual_time over model, context and ff over a part of them": [
        Row(dimension="time"),
        Row(dimension="residual_time", activations=MC),
        *(Row(dimension=d, weights=MC, gradients=MC, optimizer=MC, activations=MC) for d in HEADS_AND_VOCAB),
    ],
    "must split weights and optimizer state of zero over data": [Row(dimension="zero", weights=("data",))],
    "must split all four columns of ff over the same axes": [
        Row(
            dimension="ff",
            weights=("pipeline",),
            gradients=("pipeline",),
            optimizer=("pipeline",),
            activations=("pipeline",),
        )
    ],
    "maps both batch and ff to data": [Row(dimension="ff", weights=D, gradients=D, optimizer=D, activations=D)],
    "splits heads over model, context and kv_heads over model; split both alike": [
        Row(dimension="time"),
        Row(dimension="heads", weights=MC, gradients=MC, optimizer=MC, activations=MC),
    ],
    "splits time over model, of which attention sees only a part; legal: context": [
        Row(dimension="time", activations=M)
    ],
    "splits time over context; residual_time must begin with the same axes": [
        Row(dimension="residual_time", activations=("model", "context"))
    ],
    "gathers ff at its use": [Row(dimension="ff", gathered="use")],
    "gathers zero at its use, which is for zero with weights and gradients split alike": [
        Row(dimension="zero", weights=D, optimizer=D, gathered="use")
    ],
    "maps heads to model twice": [Row(dimension="heads", weights=M * 2)],
    "maps ff to 'tensor', not a mesh axis": [Row(dimension="ff", weights=("tensor",))],
    "names no dimension 'mlp'": [Row(dimension="mlp")],
}


@pytest.mark.parametrize("why", TABLES)
def test_tables_that_no_door_could_make_right_are_refused(why: str):
    own = {row.dimension: row for row in TABLES[why]}
    rows = {row.dimension: row for row in megatron(0, False)} | own
    problems = [text for _, text in Layout(rows=tuple(rows.values())).check()]
    assert [text for text in problems if why in text], problems


def test_table_shows_every_weight_and_the_largest_whole_one():
    weights = flatten(Model(toys.GPT).weights)
    layout = bound(Layout(zero=1), data=2, model=2)
    whole, short = layout.show(weights, 4, True), layout.show(weights, 4, False)
    assert all(name in whole for name in weights)
    assert "ff:model*data" in whole
    assert "every device holds whole: " in whole
    assert "smaller ones: -v shows them" in short
    megabytes = sum(layout.bytes_per_device(w, "weights", 4) for w in weights.values()) / 2**20
    column = [float(line.split()[-1]) for line in whole.splitlines()[1:] if line.split()[0] in weights]
    assert sum(column) == pytest.approx(megabytes, abs=0.001 * len(weights))


def test_a_leaf_of_the_optimizer_s_state_is_split_as_its_weight():
    """Letter by letter; it never chooses a ZeRO dimension of its own."""
    layout = bound(Layout(zero=1), data=4, model=2)
    weight = Weight("LDF", (2, 32, 64))
    assert layout.spec(weight, "optimizer") == P(None, "data", "model")

    def leaf(dims: str, *shape: int) -> P:
        return layout.spec(Weight(dims, shape, of=weight), "optimizer")

    assert leaf("LDF", 2, 32, 64) == P(None, "data", "model")
    assert leaf("LF", 2, 64) == P(None, "model")
    assert leaf("LD", 2, 32) == P(None, "data")
    assert leaf("LD", 2, 2) == P(None, None)  # blocks of 16, too few to be split
    assert leaf("L", 2) == P(None)
