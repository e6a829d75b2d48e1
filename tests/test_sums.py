"""What layers give beside their results: a test's own statistics have plain JAX's values and gradients, in float32.

The reference runs the layers on one device, in a Python loop, makes whole logits, and differentiates the objective as
it is written down there: without scan, engine or seeds.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from jax import lax

from mtx import decode, step
from mtx.errors import ConfigError
from mtx.layers import Context, Gelu, Mlp, add_bias, weight
from mtx.model import Batch, Transformer
from mtx.pipeline import GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble, engine
from mtx.spmd import Compiled, Manual
from mtx.stacks import Block, Stack
from mtx.sums import Max, Statistics, Sum, Sums

BOUND = 1e-5
EXPERTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(Gelu):
    """A feed-forward part with a router, of which nothing but statistics comes."""

    def build(self, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs) -> "RoutedMlp":
        return RoutedMlp(self, width, bias, std, out_std, rngs)


class RoutedMlp(Mlp):
    def __init__(self, config: Routed, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs):
        super().__init__(config, width, bias, std, out_std, rngs)
        self.router_DE = weight(rngs, "DE", (width, EXPERTS), nnx.initializers.normal(0.2))

    @property
    def statistics(self) -> Statistics:
        return {
            "router": Sum("BTE->", coefficient=0.3, per="token"),
            "energy": Sum("BTF->", coefficient=0.02),
            "units": Sum("BTF->F", per_layer=True, coefficient=-0.01, per="row"),
            "load": Sum("BTE->E", per_layer=True),
            "features": Sum("BTD->D"),
            "peak": Max("BTF->"),
            "peaks": Max("BTE->E", per_layer=True),
        }

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        project = context.doors.project
        logits_BTE = project("BTD,DE->BTE", x_BTD, self.router_DE)
        h_BTF = jax.nn.gelu(add_bias(project("BTD,DF->BTF", x_BTD, self.in_DF), self.bias_F))
        y_BTD = add_bias(project("BTF,FD->BTD", h_BTF, self.out_FD), self.out_bias_D)
        first_BTE = logits_BTE == jnp.max(logits_BTE, axis=-1, keepdims=True)
        return y_BTD, {
            "router": jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
            "energy": jnp.sum(jnp.square(h_BTF)),
            "units": jnp.sum(jnp.abs(h_BTF), axis=(0, 1)),
            "load": jnp.sum(first_BTE, axis=(0, 1)),
            "features": jnp.sum(x_BTD, axis=(0, 1)),
            "peak": jnp.max(h_BTF),
            "peaks": jnp.max(logits_BTE, axis=(0, 1)),
        }


MODEL = dataclasses.replace(toys.GPT, mlp=Routed(width=64), layers=5, tied_head=False)
"""Five layers are even on no pipeline."""
SEVERAL = dataclasses.replace(
    MODEL,
    layers=7,
    stacks=(
        Stack(
            name="main",
            count=2,
            pattern=(
                Block(name="full"),
                Block(name="plain", mlp=Gelu(width=96)),
                Block(name="local", attention=dataclasses.replace(MODEL.attention, window=3)),
            ),
        ),
        Stack(name="last", count=1),
    ),
)
"""Layers of four kinds, of which three have statistics: 0, 2, 3, 5 and 6."""


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Rows with padding at their ends, so that labels, tokens and rows are three counts."""
    made = toys.batch()
    for name in ("segments", "positions", "weights"):
        made[name][5:11, 12:] = 0
    return made


@functools.cache
def reference(model: Transformer) -> tuple[dict, dict[str, np.ndarray]]:
    """Gradients of the objective, and its parts and all statistics by name."""
    p = toys.program(model)
    layers = sorted((n, row, k) for k, kind in enumerate(p.model.kinds) for row, n in enumerate(kind.numbers.tolist()))
    batch = jax.tree.map(lambda x: x[0], toys.place(p, arrays(), 1))
    labels, tokens, rows = jnp.sum(batch.weights), jnp.sum(batch.segments > 0), len(batch.tokens)

    def objective(params: dict) -> tuple[jax.Array, dict]:
        context = p.model.context(batch, p.doors(), p.masks[0], None)
        x_BTD, each = p.model.embed(params["ends"], batch.tokens, context), []
        for number, row, k in layers:
            kind, seen = p.model.kinds[k], dataclasses.replace(context, mask=p.masks[k])
            own = jax.tree.map(lambda w, row=row: w[row], kind.of(params["stacks"]))
            x_BTD, found = p.model.layer(kind, own, x_BTD, seen, number)
            each.append(found)
        logits = p.model.unembed(params, p.model.norm(params["ends"], x_BTD), p.doors())[..., : model.vocab_size]
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        all_of = {name: jnp.stack([found[name] for found in each if name in found]) for name in each[0]}
        found = {
            "router": jnp.sum(all_of["router"]),
            "energy": jnp.sum(all_of["energy"]),
            "units": all_of["units"],
            "load": all_of["load"],
            "features": jnp.sum(all_of["features"], axis=0),
            "peak": jnp.max(all_of["peak"]),
            "peaks": all_of["peaks"],
            "cross_entropy": jnp.sum(nll * batch.weights),
            "labels": labels,
        }
        loss = jnp.sum((nll + 1e-3 * jnp.square(lse)) * batch.weights) / labels
        loss += 0.3 * found["router"] / tokens + 0.02 * found["energy"] / labels - 0.01 * jnp.sum(found["units"]) / rows
        return loss, found | {"objective": loss * labels}

    gradients, found = jax.jit(jax.grad(objective, has_aux=True))(toys.weights_of(model))
    return jax.tree.map(np.asarray, gradients), jax.tree.map(np.asarray, found)


def test_the_reference_knows_its_statistics():
    """Each part of the objective moves weights, and none is alike for labels, tokens and rows."""
    gradients, found = reference(MODEL)
    assert np.linalg.norm(gradients["stacks"]["main"]["block"]["mlp"]["router_DE"]) > 1e-3
    assert found["load"].shape == found["peaks"].shape == (5, EXPERTS) and found["units"].shape == (5, 64)
    np.testing.assert_array_equal(found["load"].sum(axis=1), arrays()["tokens"].size)
    plain, _ = toys.gradients(toys.program(dataclasses.replace(MODEL, mlp=Gelu(width=64))), without_routers(), arrays())
    del (mine := jax.tree.map(lambda x: x, gradients))["stacks"]["main"]["block"]["mlp"]["router_DE"]
    with pytest.raises(AssertionError, match="off by"):
        toys.check_close(mine, plain, 1e-2)


def without_routers() -> dict:
    params = toys.weights_of(MODEL)
    del params["stacks"]["main"]["block"]["mlp"]["router_DE"]
    return params


class Case(NamedTuple):
    mesh: tuple[int, int, int] = (1, 1, 1)
    stages: int = 1
    schedule: Schedule = OneFOneB()
    zero: int = 0
    sequence_parallel: bool = False
    remat: str = "none"
    partition: Manual | Compiled = Manual()
    microbatches: int = 4

    def __str__(self) -> str:
        words = [type(self.schedule).__name__ if self.stages > 1 else type(self.partition).__name__]
        words += [f"p{self.stages}", "r{}d{}m{}".format(*self.mesh), f"zero{self.zero}", self.remat]
        return "-".join([*words, "sp" * self.sequence_parallel, f"M{self.microbatches}"])

    def program(self, model: Transformer = MODEL):
        return toys.program(
            dataclasses.replace(model, remat=self.remat),
            self.mesh,
            stages=self.stages,
            schedule=self.schedule,
            zero=self.zero,
            sequence_parallel=self.sequence_parallel,
            partition=self.partition,
        )


DEFAULT = [
    Case(microbatches=1),
    Case((1, 8, 1), zero=1, remat="selective"),
    Case((2, 2, 2), zero=2, sequence_parallel=True),
    Case((1, 2, 4), zero=3, sequence_parallel=True, remat="full", microbatches=1),
    Case((2, 2, 2), zero=3, sequence_parallel=True, partition=Compiled()),
    Case((1, 2, 2), stages=2, zero=3, sequence_parallel=True, remat="stage"),
    Case((1, 2, 1), stages=4, schedule=GPipe(), zero=2, remat="full"),
    Case((1, 1, 2), stages=2, schedule=Interleaved(), sequence_parallel=True, remat="selective"),
    Case((1, 2, 2), stages=2, schedule=ZeroBubble(), sequence_parallel=True, zero=1),
]
SLOW = [
    Case((1, 1, 8), remat="stage"),
    Case((8, 1, 1), remat="full", microbatches=2),
    Case((2, 4, 1), zero=3, remat="selective"),
    Case((1, 4, 2), zero=1, partition=Compiled(), microbatches=1),
    Case((1, 1, 8), sequence_parallel=True, partition=Compiled(), remat="full"),
    *(
        Case(mesh, stages, schedule, zero if mesh[1] > 1 else 0, mesh[2] > 1 and zero % 2 == 1, remat)
        for (mesh, stages), zero in zip((((1, 2, 2), 2), ((1, 1, 2), 4), ((1, 4, 1), 2)), (3, 0, 2), strict=True)
        for schedule in (GPipe(), OneFOneB(), Interleaved(chunks=2 if stages == 2 else 1), ZeroBubble())
        for remat in ("none", "full", "stage")
    ),
]


def check(case: Case, model: Transformer = MODEL) -> None:
    found, values = toys.gradients_and_sums(case.program(model), toys.weights_of(model), arrays(), case.microbatches)
    wanted, wanted_values = reference(model)
    toys.check_close(found, wanted, BOUND)
    assert values.keys() == wanted_values.keys()
    for name, value in wanted_values.items():
        np.testing.assert_allclose(values[name], value, rtol=BOUND, atol=BOUND * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_gradients_and_values(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SLOW if case not in DEFAULT], ids=str)
def test_gradients_and_values_of_more(case: Case):
    check(case)


# Layers of several kinds.


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2, 2), zero=3, sequence_parallel=True, remat="full"),
        Case((1, 2, 4), zero=1, partition=Compiled(), microbatches=1),
    ],
    ids=str,
)
def test_layers_of_several_kinds(case: Case):
    """Totals are of all kinds; values per layer are in the layers' own order, without those of kinds that have none."""
    check(case, SEVERAL)


class OtherMlp(RoutedMlp):
    @property
    def statistics(self) -> Statistics:
        return {**super().statistics, "energy": Sum("BTF->")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Routed):
    """One that declares a name of `Routed` differently."""

    def build(self, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs) -> RoutedMlp:
        return OtherMlp(self, width, bias, std, out_std, rngs)


@pytest.mark.parametrize(
    ("mlp", "said"),
    [
        (
            Other(width=64),
            r"layers of main/full declare statistic energy as Sum\(.*\), and those of main/plain as Sum\(",
        ),
        (
            Routed(width=96),
            r"statistic units has values of shapes \(64,\) and \(96,\) in layers of several kinds; give",
        ),
    ],
)
def test_kinds_that_do_not_agree_are_refused(mlp: Routed, said: str):
    main, last = SEVERAL.stacks or ()
    full, plain, local = main.pattern
    pattern = (full, dataclasses.replace(plain, mlp=mlp), local)
    model = dataclasses.replace(SEVERAL, stacks=(dataclasses.replace(main, pattern=pattern), last))
    with pytest.raises(ConfigError, match=said):
        toys.program(model).lower_train_step(1, 8, 16)


# Controls: each breaks one thing, and a case must see it.

EXCHANGED = Case((1, 1, 2), sequence_parallel=True)
UNEVEN = Case(stages=2, schedule=Interleaved())
SPLIT = Case(stages=2, schedule=ZeroBubble())
BREAKS = {
    "no seeds": ("off by", EXCHANGED, step, "seeds_of", lambda *_: {}),
    "seeds by labels alone": (
        "off by",
        EXCHANGED,
        step.Program,
        "denominator",
        lambda self, batch, *_: labels_of(batch),
    ),
    "no seeds in the engine": ("off by", UNEVEN, engine._Run, "cotangents", property(lambda self: nothing(self))),
    "no seeds in the split": ("off by", SPLIT, engine._Run, "cotangents", property(lambda self: nothing(self))),
    "values of one rank": ("copies of", EXCHANGED, step, "over_ranks", lambda declared, values, doors: values),
    "values of other units": (
        "objective",
        EXCHANGED,
        Sum,
        "reduced",
        property(lambda self: "L" + self.letters.split("->")[0]),
    ),
    "maxima summed": ("peak", EXCHANGED, Max, "both", lambda self, x, y: x + y),
    "layers in the order of rows": ("load", UNEVEN, step, "all_layers", lambda place, x: of_rows(x)),
    "one microbatch": ("energy", UNEVEN, engine, "both", lambda declared, x, y: y),
}


def labels_of(batch: Batch) -> jax.Array:
    return jnp.sum(batch.weights)


def nothing(run: engine._Run) -> Sums:
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in run.sums_shape.items()}


def of_rows(x_R: jax.Array) -> jax.Array:
    return lax.all_gather(x_R, "pipeline", tiled=True)[: MODEL.layers]


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_seen(what: str, monkeypatch: pytest.MonkeyPatch):
    reference(MODEL)
    why, case, *broken = BREAKS[what]
    monkeypatch.setattr(*broken)
    with pytest.raises(AssertionError, match=why):
        check(case)


def test_evaluation_and_generation_leave_them_out():
    p = toys.program(MODEL, (1, 1, 2), stages=2)
    params = toys.state_of(p, toys.weights_of(MODEL)).params
    nats, labels = toys.eval_sums(p, params, toys.place(p, arrays(), 4))
    _, found = reference(MODEL)
    np.testing.assert_allclose([nats, labels], [found["cross_entropy"], found["labels"]], rtol=BOUND)
    alone = toys.program(MODEL)
    made = [
        decode.generate(q, own, [[1, 2, 3]], tokens=4, sampling=decode.Sampling(temperature=0.0))
        for q, own in ((p, params), (alone, toys.weights_of(MODEL)))
    ]
    assert made[0] == made[1]
