"""What the engine computes, how often and on which stage: parts of a small model that count how often they run."""

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_pipeline
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtx.layout import STAGES, Placement, Weight
from mtx.pipeline import Engine, GPipe, Interleaved, OneFOneB, Parts, Schedule, ZeroBubble
from mtx.spmd import Params
from mtx.sums import Sums

B, D, LAYERS = 2, 4, 7
"""Of two, three or four stages, with chunks or without, none is even: some rows have no layer."""
SCHEDULES = (GPipe(), OneFOneB(), Interleaved(), ZeroBubble(), test_pipeline.Improvised())
WEIGHTS = {"ends": {"gain_D": Weight("D", (D,), False)}, "layers": {"w_DF": Weight("LDF", (LAYERS, D, D))}}

Product = Callable[[jax.Array, jax.Array], jax.Array]


def embed(ends: Params, feed_BD: jax.Array) -> jax.Array:
    return feed_BD * ends["gain_D"]


def layer(
    weights: Params, x_BD: jax.Array, feed_BD: jax.Array, number, product: Product = jnp.matmul
) -> tuple[jax.Array, Sums]:
    return x_BD + product(jnp.tanh(x_BD + number + feed_BD), weights["w_DF"]), {}


def finish(ends: Params, x_BD: jax.Array, feed_BD: jax.Array) -> tuple[jax.Array, Sums]:
    objective = jnp.sum(jnp.square(x_BD * ends["gain_D"]))
    return objective, {"objective": objective, "fed": jnp.sum(feed_BD)}


class Counted:
    """The parts, and how often each ran on each stage."""

    def __init__(self, stages: int):
        self.stages, self._found, self._lock = stages, Counter(), threading.Lock()

    def of(self, what: str) -> list[int]:
        jax.effects_barrier()
        return [self._found[what, stage] for stage in range(self.stages)]

    def parts(self) -> Parts:
        def embedded(ends, feed_BD):
            return self._at("embed", embed(ends, feed_BD))

        def finished(ends, x_BD, feed_BD):
            objective, sums = finish(ends, x_BD, feed_BD)
            return self._at("finish", objective), sums

        return Parts(embedded, partial(layer, product=self._product()), finished)

    def _at(self, what: str, x: jax.Array) -> jax.Array:
        def one(stage: np.ndarray, _: np.ndarray) -> None:
            with self._lock:  # each device calls from a thread of its own
                self._found[what, int(stage)] += 1

        jax.debug.callback(one, lax.axis_index(STAGES), x.ravel()[0])
        return x

    def _product(self) -> Product:
        """x w, as F; its gradients, as B and W."""

        @jax.custom_vjp
        def product(x_BD, w_DF):
            return self._at("F", x_BD @ w_DF)

        def backward(kept, g_BF):
            x_BD, w_DF = kept
            return self._at("B", g_BF @ w_DF.T), self._at("W", x_BD.T @ g_BF)

        product.defvjp(lambda x_BD, w_DF: (product(x_BD, w_DF), (x_BD, w_DF)), backward)
        return product


class Run:
    """An engine on as many devices as it has stages, and the arrays that it is given."""

    def __init__(self, schedule: Schedule, stages: int, microbatches: int, keeps: bool = True):
        random = np.random.default_rng(0)
        self.place, self.counted = Placement.even(LAYERS, stages, schedule.per_stage()), Counted(stages)
        self.w_LDF = jnp.asarray(random.standard_normal((LAYERS, D, D)) / D, jnp.float32)
        self.ends = {"gain_D": jnp.asarray(random.standard_normal(D), jnp.float32)}
        self.feed_MBD = jnp.asarray(random.standard_normal((microbatches, B, D)), jnp.float32)
        self.layers = [sum(self.place.counts[stage::stages]) for stage in range(stages)]
        self.engine = Engine(
            parts=self.counted.parts(),
            placement=self.place,
            table=schedule.table(stages, microbatches, keeps=keeps),
            weights=WEIGHTS,
            statistics={},
            scatter=lambda weight, gradient: gradient,
        )
        self.gradients = self._mapped(self._gradients, (P(), P(STAGES), P()))
        self.forward = self._mapped(self._forward, P())
        self.plain = jax.jit(self._plain)

    def _gradients(self, params: Params, feed_MBD: jax.Array, count: jax.Array):
        found, sums, _ = self.engine.gradients(params, feed_MBD, count, {})
        return lax.psum(found["ends"]["gain_D"], STAGES), found["layers"]["w_DF"], lax.psum(sums, STAGES)

    def _forward(self, params: Params, feed_MBD: jax.Array, count: jax.Array) -> Sums:
        """The sums of each microbatch."""
        return lax.psum(self.engine.forward(params, feed_MBD)[1], STAGES)

    def _mapped(self, run: Callable, out: Any) -> Callable:
        mesh, params = Mesh(jax.devices()[: self.place.stages], (STAGES,)), {"ends": P(), "layers": P(STAGES)}
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(params, P(), P()), out_specs=out, check_vma=False))
        there = jnp.asarray(self.place.layer_of_row >= 0)[:, None, None]
        w_RDF = jnp.where(there, self.w_LDF[np.maximum(self.place.layer_of_row, 0)], 0)
        return lambda count: run({"ends": self.ends, "layers": {"w_DF": w_RDF}}, self.feed_MBD, jnp.int32(count))

    def _plain(self, count: jax.Array | int) -> tuple[Params, Sums]:
        """(gradients, sums) of the first `count` microbatches without an engine, the layers in their own order."""

        def one(params: Params, feed_BD: jax.Array) -> tuple[jax.Array, Sums]:
            def step(x_BD: jax.Array, xs: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
                weights, number = xs
                return layer(weights, x_BD, feed_BD, number)[0], None

            x_BD, _ = lax.scan(step, embed(params["ends"], feed_BD), (params["layers"], jnp.arange(LAYERS)))
            return finish(params["ends"], x_BD, feed_BD)

        def objective(params: Params) -> tuple[jax.Array, Sums]:
            counts_M = jnp.arange(len(self.feed_MBD)) < count
            _, sums_M = jax.vmap(partial(one, params))(self.feed_MBD)
            sums = {name: counts_M @ x_M for name, x_M in sums_M.items()}
            return sums["objective"], sums

        return jax.grad(objective, has_aux=True)({"ends": self.ends, "layers": {"w_DF": self.w_LDF}})


def close(found: jax.Array, wanted: jax.Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


SIZES = [(3, 5, True), (3, 5, False), (4, 2, True), (2, 1, False)]
"""(stages, microbatches, keeps)"""


@pytest.mark.parametrize(("stages", "microbatches", "keeps"), SIZES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_stage_does_its_own_jobs_for_the_microbatches_that_count(schedule, stages, microbatches, keeps):
    """And nothing else: no layer where there is none, no head but on the last stage, no idle work."""
    run = Run(schedule, stages, microbatches, keeps)
    past = dict.fromkeys(("F", "B", "W", "embed", "finish"), [0] * stages)
    for count in sorted({0, 1, microbatches - 1, microbatches}):
        gain_D, w_RDF, sums = run.gradients(count)
        wanted, wanted_sums = run.plain(count)
        close(jnp.stack([*sums.values()]), jnp.stack([*wanted_sums.values()]))
        close(gain_D, wanted["ends"]["gain_D"])
        close(w_RDF[run.place.row_of_layer], wanted["layers"]["w_DF"])
        assert not np.asarray(w_RDF)[run.place.layer_of_row < 0].any()

        now = {what: run.counted.of(what) for what in past}
        ran = {what: [new - old for new, old in zip(now[what], past[what], strict=True)] for what in past}
        each, others, past = [count * n for n in run.layers], [0] * (stages - 1), now
        anew = 0 if keeps else count
        # What B computes anew, the last virtual stage does not compute before.
        forward = each if keeps else [2 * n for n in each[:-1]] + [2 * each[-1] - count * run.place.counts[-1]]
        assert ran == {
            "F": forward,
            "B": each,
            "W": each,
            "embed": [2 * count + anew, *others],  # for x, and for the gradient
            "finish": [*others, count],
        }


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_evaluation_is_forward_only(schedule: Schedule):
    run = Run(schedule, 3, 5)
    close(jnp.stack([jnp.sum(x_M) for x_M in run.forward(5).values()]), jnp.stack([*run.plain(5)[1].values()]))
    ran = {what: run.counted.of(what) for what in ("F", "B", "W", "embed", "finish")}
    none = [0, 0, 0]
    assert ran == {"F": [5 * n for n in run.layers], "B": none, "W": none, "embed": [5, 0, 0], "finish": [0, 0, 5]}
