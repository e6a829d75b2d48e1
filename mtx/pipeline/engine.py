"""Runs a table of ticks inside the Manual region: the gradients of one step, or what the last stage makes of its rows.

One `lax.scan` over ticks, which is never differentiated: each tick calls `jax.vjp` itself, and gradients are carried.
So nothing is saved per tick, and what a schedule stashes is all that it holds. The clock of a tick is that of
`mtx.pipeline.schedules`. A stage that has nothing to do in a slot does nothing: its work is behind `lax.cond`, whose
predicate all ranks of a stage share, so that they may still talk to one another inside; between stages only the two
permutes talk, in every tick.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mtx.layout import STAGES, Placement, Weight
from mtx.pipeline.residuals import Form, Split, Used, used, zeros_of
from mtx.pipeline.schedules import NOTHING, Row, Table
from mtx.pipeline.split import halves
from mtx.spmd import Params, VirtualStage, after, map_weights, replaced, this_stage, to_next_stage, to_stage_before
from mtx.sums import Statistics, Sums, both

Feed = Any
"""What the model reads of a microbatch, besides activations: a tree of arrays."""


@dataclass(frozen=True)
class Parts:
    """A model, cut where pipelines cut it."""

    embed: Callable[[Params, Feed], jax.Array]
    """(ends, feed) -> x_BTD, which the first layer reads."""
    layer: Callable[[Params, jax.Array, Feed, jax.Array], tuple[jax.Array, Sums]]
    """(one layer's weights, x_BTD, feed, the layer's number) -> (x_BTD, sums)."""
    finish: Callable[[Params, jax.Array, Feed], Any]
    """(ends, x_BTD, feed) -> (what is minimised, sums); forward only, any tree of arrays."""


class Carry(NamedTuple):
    """What a tick changes, on each stage."""

    stash: jax.Array
    """Inputs of virtual stages, [slots, B, T, D]."""
    gradients: jax.Array
    """Gradients of their outputs, [slots, B, T, D]."""
    sent: jax.Array
    """The gradient that leaves when the next tick opens."""
    kept: list[jax.Array]
    """What Fs keep for Bs, [slots, rows of a virtual stage, ...]."""
    outputs: jax.Array
    """The last virtual stage's outputs, by the slots of `kept`."""
    waiting: list[jax.Array]
    """What Bs leave for Ws, [slots, rows of a virtual stage, ...]."""
    layers: Params
    """Sums of weights' gradients, float32, in the accumulator's sharding."""
    ends: Params
    sums: Sums
    """Sums of `finish`."""
    layer_sums: Sums
    """Sums of this stage's layers, [rows of the stage, ...]."""


@dataclass(frozen=True)
class Engine:
    """One table for one model. Called where shapes are one device's."""

    parts: Parts
    placement: Placement
    table: Table
    weights: Params
    """Declarations of the weights that are trained: `ends` and stacked `layers`."""
    scatter: Callable[[Weight, jax.Array], jax.Array]
    """What of a microbatch's gradient of a weight is accumulated."""
    statistics: Statistics
    """Declarations of the layers' sums."""
    unroll: int = 1
    """Layers per iteration of the loop over a virtual stage's layers."""

    # The step.

    def gradients(self, params: Params, feed_M: Feed, count: jax.Array, seeds: Sums) -> tuple[Params, Sums, Sums]:
        """(gradients of the weights that are trained, sums of `finish`, sums of this stage's layers, stacked as its
        rows are) of the first `count` of M microbatches: what this stage has of them. `feed_M` has a leading M, the
        table's; `seeds` are the cotangents of those of the layers' sums that are a part of the objective."""
        run = _Run(self, params, feed_M, seeds)
        rows = lax.dynamic_index_in_dim(jnp.asarray(self.table.rows), run.stage, axis=1, keepdims=False)
        carry, _ = lax.scan(lambda carry, row: (run.tick(carry, Row(*row), count), None), run.start(), rows)
        return {"ends": carry.ends, "layers": carry.layers}, carry.sums, carry.layer_sums

    def forward(self, params: Params, feed_M: Feed) -> Any:
        """What `finish` gives of each microbatch, with a leading M, on the last stage, and zeros on the others; the
        table must be one that `keeps`."""
        run = _Run(self, params, feed_M, {})
        last = 1 + int((self.table.columns.f_mb > NOTHING).any(axis=1).nonzero()[0].max())
        rows = lax.dynamic_index_in_dim(jnp.asarray(self.table.rows[:last]), run.stage, axis=1, keepdims=False)
        microbatches = jax.tree.leaves(feed_M)[0].shape[0]
        found = jax.tree.map(lambda x: jnp.zeros((microbatches, *x.shape), x.dtype), run.finish_shape)
        start = run.empty(self.table.stash_slots), found
        (_, found), _ = lax.scan(lambda carry, row: (run.forward_tick(*carry, Row(*row)), None), start, rows)
        return found


class _Run:
    """An engine at work on given arrays."""

    def __init__(self, engine: Engine, params: Params, feed_M: Feed, seeds: Sums):
        self.engine, self.parts, self.placement, self.table = engine, engine.parts, engine.placement, engine.table
        self.layers, self.ends, self.feed_M = params["layers"], params["ends"], feed_M
        self.keeps, self.splits = self.table.keeps, self.table.has_weight_jobs
        self.stage, self.seeds = lax.axis_index(STAGES), seeds
        feed = jax.eval_shape(self.feed, jnp.zeros((), jnp.int32))
        self.x_shape = jax.eval_shape(self.parts.embed, self.ends, feed)
        self.finish_shape = jax.eval_shape(self.parts.finish, self.ends, self.x_shape, feed)
        self.trained_ends = self._trained("ends", self.ends)
        self.embeds = used(lambda some: self.parts.embed(replaced(self.ends, some), zeros_of(feed)), self.trained_ends)
        self.finishes = used(
            lambda some: self.parts.finish(replaced(self.ends, some), zeros_of(self.x_shape), zeros_of(feed)),
            self.trained_ends,
        )

    def _trained(self, part: Literal["ends", "layers"], values: Params) -> Params:
        """Returns those of a part's values that belong to weights that are trained."""
        return map_weights(lambda _, value: value, self.engine.weights[part], values)

    def _ends(self, used: Used, some: list[jax.Array]) -> Params:
        """All ends, with these instead of those that are trained and used."""
        return replaced(self.ends, used.put(self.trained_ends, some))

    def feed(self, microbatch: jax.Array) -> Feed:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, microbatch, keepdims=False), self.feed_M)

    def place(self, chunk: jax.Array) -> VirtualStage:
        return this_stage(self.placement, chunk)

    def empty(self, slots: int) -> jax.Array:
        return jnp.zeros((slots, *self.x_shape.shape), self.x_shape.dtype)

    def start(self) -> Carry:
        engine, table, size = self.engine, self.table, self.placement.size

        def buffers(slots: int, shapes: list[Any]) -> list[jax.Array]:
            return [jnp.zeros((slots, size, *x.shape), x.dtype) for x in shapes] if slots else []

        def sums(weights: Params, values: Params) -> Params:
            shapes = jax.eval_shape(lambda p: map_weights(engine.scatter, weights, p), values)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

        return Carry(
            stash=self.empty(table.stash_slots),
            gradients=self.empty(table.gradient_slots),
            sent=self._nothing(),
            kept=buffers(table.kept_slots, self.form.kept),
            outputs=self.empty(table.output_slots),
            waiting=buffers(table.weight_slots, self.split.left if table.weight_slots else []),
            layers=sums(engine.weights["layers"], self.layers),
            ends=sums(engine.weights["ends"], self.ends),
            sums=zeros_of(self.finish_shape[1]),
            layer_sums={
                name: jnp.full((self.placement.chunks * size, *x.shape), engine.statistics[name].empty, x.dtype)
                for name, x in self.sums_shape.items()
            },
        )

    # A tick.

    def tick(self, carry: Carry, row: Row, count: jax.Array) -> Carry:
        carry = carry._replace(gradients=_put(carry.gradients, row.g_arrival, to_stage_before(carry.sent)))
        with jax.named_scope("forward"):
            carry, y_BTD = self._forward(carry, row, count)
        arriving = to_next_stage(y_BTD)
        with jax.named_scope("backward"):
            carry = self._backward(carry, row, count)
        if self.splits:
            with jax.named_scope("weights"):
                carry = self._weights(carry, row, count)
        return carry._replace(stash=_put(carry.stash, row.y_arrival, arriving))

    def _forward(self, carry: Carry, row: Row, count: jax.Array) -> tuple[Carry, jax.Array]:
        place, runs = self.place(row.f_chunk), _is_job(row.f_mb, count)

        def run() -> tuple[list[jax.Array], jax.Array, Sums, jax.Array]:
            feed = self.feed(row.f_mb)
            x_BTD = self._input(carry.stash, row.f_slot, place, feed)
            if not self.keeps:
                return carry.kept, carry.outputs, carry.layer_sums, self.through(x_BTD, place, feed)
            y_BTD, kept, sums = self.through_keeping(x_BTD, place, feed, carry.layer_sums, carry.kept, row.f_keep)
            write = partial(_write, carry.outputs, y_BTD, row.f_keep)
            return kept, lax.cond(place.is_last, write, lambda: carry.outputs), sums, y_BTD

        def idle() -> tuple[list[jax.Array], jax.Array, Sums, jax.Array]:
            return carry.kept, carry.outputs, carry.layer_sums, self._nothing()

        if not self.keeps:
            runs &= ~place.is_last  # B computes it
        kept, outputs, sums, y_BTD = lax.cond(runs, run, idle)
        return carry._replace(kept=kept, outputs=outputs, layer_sums=sums), y_BTD

    def forward_tick(self, stash: jax.Array, found: Any, row: Row) -> tuple[jax.Array, Any]:
        place = self.place(row.f_chunk)

        def run() -> tuple[jax.Array, Any]:
            feed = self.feed(row.f_mb)
            y_BTD = self.through(self._input(stash, row.f_slot, place, feed), place, feed)

            def finish() -> Any:
                new = self.parts.finish(self.ends, y_BTD, feed)
                return jax.tree.map(lambda x, value: _write(x, value, row.f_mb), found, new)

            return y_BTD, lax.cond(place.is_last, finish, lambda: found)

        y_BTD, found = lax.cond(row.f_mb > NOTHING, run, lambda: (self._nothing(), found))
        return _put(stash, row.y_arrival, to_next_stage(y_BTD)), found

    def _backward(self, carry: Carry, row: Row, count: jax.Array) -> Carry:
        place = self.place(row.b_chunk)

        def run() -> Carry:
            feed, sums = self.feed(row.b_mb), carry.layer_sums
            if self.keeps:
                y_BTD, kept, slot = _read(carry.outputs, row.b_keep), carry.kept, row.b_keep  # y_BTD on the last
            else:
                x_BTD = self._input(carry.stash, row.b_slot, place, feed)
                y_BTD, stacked, sums = self.through_keeping(x_BTD, place, feed, sums)
                kept, slot = [x[None] for x in stacked], jnp.zeros((), jnp.int32)
            new, gy_BTD = self._turn(carry._replace(layer_sums=sums), row, place, y_BTD, feed)
            new, gx_BTD = self._back(new, row, place, gy_BTD, kept, slot)
            return self._unembed(new, place, gx_BTD, feed)._replace(sent=gx_BTD)

        idle = carry._replace(sent=self._nothing())
        return lax.cond(_is_job(row.b_mb, count), run, lambda: idle)

    def _turn(
        self, carry: Carry, row: Row, place: VirtualStage, y_BTD: jax.Array, feed: Feed
    ) -> tuple[Carry, jax.Array]:
        """The gradient of a virtual stage's output: the loss's on the last, elsewhere what has arrived."""

        def loss() -> tuple[Params, Sums, jax.Array]:
            def objective(some: list[jax.Array], y_BTD: jax.Array) -> tuple[jax.Array, Sums]:
                return self.parts.finish(self._ends(self.finishes, some), y_BTD, feed)

            some = self.finishes.take(self.trained_ends)
            (found, gy_BTD), sums = jax.grad(objective, (0, 1), has_aux=True)(some, y_BTD)
            return self._plus(carry.ends, self.finishes, found), jax.tree.map(jnp.add, carry.sums, sums), gy_BTD

        ends, sums, gy_BTD = lax.cond(
            place.is_last, loss, lambda: (carry.ends, carry.sums, _read(carry.gradients, row.b_gslot))
        )
        return carry._replace(ends=ends, sums=sums), gy_BTD

    def _unembed(self, carry: Carry, place: VirtualStage, gx_BTD: jax.Array, feed: Feed) -> Carry:
        """On the first virtual stage, the gradients of what embeds tokens."""

        def run() -> Params:
            def embed(some: list[jax.Array]) -> jax.Array:
                return self.parts.embed(self._ends(self.embeds, some), feed)

            (found,) = jax.vjp(embed, self.embeds.take(self.trained_ends))[1](gx_BTD)
            return self._plus(carry.ends, self.embeds, found)

        if not any(self.embeds.flags):
            return carry
        is_first = after(carry.layers, place.is_first)  # both may scatter gradients, which must not meet
        return carry._replace(ends=lax.cond(is_first, run, lambda: carry.ends))

    def _plus(self, ends: Params, used: Used, found: list[jax.Array]) -> Params:
        weights = used.take(self.engine.weights["ends"])
        found = [self.engine.scatter(w, g).astype(jnp.float32) for w, g in zip(weights, found, strict=True)]
        return used.put(ends, [old + new for old, new in zip(used.take(ends), found, strict=True)])

    def _input(self, stash: jax.Array, slot: jax.Array, place: VirtualStage, feed: Feed) -> jax.Array:
        return lax.cond(place.is_first, lambda: self.parts.embed(self.ends, feed), lambda: _read(stash, slot))

    def _nothing(self) -> jax.Array:
        return zeros_of(self.x_shape)

    # The layers of a virtual stage.

    def layer_weights(self, row: jax.Array) -> Params:
        return jax.tree.map(lambda w: _read(w, row), self.layers)

    def if_there(self, place: VirtualStage, i: jax.Array, run: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """`run()` if the virtual stage has an i-th layer, as all have where they are even."""
        return run() if self.placement.is_even else lax.cond(i < place.count, run, otherwise)

    def through(self, x_BTD: jax.Array, place: VirtualStage, feed: Feed) -> jax.Array:
        """x_BTD after the layers of a virtual stage."""

        def layer(x_BTD: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            def run() -> jax.Array:
                return self.parts.layer(self.layer_weights(place.row + i), x_BTD, feed, place.layer + i)[0]

            return self.if_there(place, i, run, lambda: x_BTD), None

        return self._scan(layer, x_BTD)[0]

    def through_keeping(
        self,
        x_BTD: jax.Array,
        place: VirtualStage,
        feed: Feed,
        sums: Sums,
        kept: list[jax.Array] | None = None,
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array], Sums]:
        """The same, and what the backward pass needs of every layer, in a slot of buffers or stacked; `sums` with those
        of the layers."""

        def layer(now: tuple[jax.Array, Any, Sums], i: jax.Array) -> tuple[tuple[jax.Array, Any, Sums], Any]:
            x_BTD, kept, sums = now

            def run() -> tuple[jax.Array, list[jax.Array], Sums]:
                y_BTD, more, left = self._keep(self.layer_weights(place.row + i), x_BTD, feed, place.layer + i)
                new = self._sum(sums, more, place.row + i)
                if kept is None:
                    return y_BTD, left, new
                assert slot is not None
                return y_BTD, _write_all(kept, left, slot, i), new

            def skip() -> tuple[jax.Array, list[jax.Array], Sums]:
                return x_BTD, [jnp.zeros(x.shape, x.dtype) for x in self.form.kept] if kept is None else kept, sums

            y_BTD, left, sums = self.if_there(place, i, run, skip)
            return ((y_BTD, None, sums), left) if kept is None else ((y_BTD, left, sums), None)

        (y_BTD, kept, sums), stacked = self._scan(layer, (x_BTD, kept, sums))
        return y_BTD, stacked if kept is None else kept, sums

    def _sum(self, sums_R: Sums, more: Sums, row: jax.Array) -> Sums:
        """Sums of all rows with one layer's."""
        rows = {name: _read(x, row) for name, x in sums_R.items()}
        return {name: _write(sums_R[name], x, row) for name, x in both(self.engine.statistics, rows, more).items()}

    def _keep(
        self, weights: Params, x_BTD: jax.Array, feed: Feed, number: jax.Array
    ) -> tuple[jax.Array, Sums, list[jax.Array]]:
        """A layer's results and the residuals of its vjp, but for the weights among them."""
        (y_BTD, sums), vjp = self._vjp(weights, x_BTD, feed, number)
        return y_BTD, sums, Form.of(vjp, weights).without(vjp)

    def _vjp(
        self, weights: Params, x_BTD: jax.Array, feed: Feed, number: jax.Array
    ) -> tuple[tuple[jax.Array, Sums], Any]:
        def layer(some: Params, x_BTD: jax.Array) -> tuple[jax.Array, Sums]:
            return self.parts.layer(replaced(weights, some), x_BTD, feed, number)

        return jax.vjp(layer, self._trained("layers", weights), x_BTD)

    @property
    def cotangents(self) -> Sums:
        """Cotangents of a layer's sums, alike for all layers and microbatches."""
        return {name: jnp.full(x.shape, self.seeds.get(name, 0.0), x.dtype) for name, x in self.sums_shape.items()}

    @property
    def sums_shape(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a layer's sums."""
        return self._traced[1]

    @property
    def form(self) -> Form:
        """What a layer's vjp is made of."""
        return self._traced[0]

    @cached_property
    def _traced(self) -> tuple[Form, dict[str, jax.ShapeDtypeStruct]]:
        """(what a layer's vjp is made of, shapes of a layer's sums)."""
        found: list[Form] = []

        def trace(
            weights: Params, x_BTD: jax.Array, feed: Feed, number: jax.Array
        ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
            (_, sums), vjp = self._vjp(weights, x_BTD, feed, number)
            found.append(Form.of(vjp, weights))
            return found[0].without(vjp), sums

        number = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = jax.eval_shape(lambda i: (self.layer_weights(i), self.feed(i)), number)
        kept, sums = jax.eval_shape(trace, shapes[0], self.x_shape, shapes[1], number)
        return found[0]._replace(kept=kept), sums

    def _back(
        self,
        carry: Carry,
        row: Row,
        place: VirtualStage,
        gy_BTD: jax.Array,
        kept: list[jax.Array],
        slot: jax.Array,
    ) -> tuple[Carry, jax.Array]:
        """The gradient of a virtual stage's input; those of its weights are summed, or left for W."""

        def layer(now: tuple[jax.Array, Params, list[jax.Array]], i: jax.Array) -> tuple[Any, None]:
            gy_BTD, sums, waiting = now

            def run() -> tuple[jax.Array, Params, list[jax.Array]]:
                weights, given = self.layer_weights(place.row + i), [_read(x, slot, i) for x in kept]
                if self.splits:
                    rest = [*given, *jax.tree.leaves((gy_BTD, self.cotangents))]
                    found, (gx_BTD,), left = self.split.halves.now(jax.tree.leaves(weights), rest)
                    written = _write_all(waiting, left, row.b_wslot, i)
                else:
                    found, gx_BTD = self.form.vjp(weights, given)((gy_BTD, self.cotangents))
                    found, written = jax.tree.leaves(found), waiting
                return gx_BTD, self._add(sums, found, place.row + i), written

            return self.if_there(place, i, run, lambda: now), None

        start = gy_BTD, carry.layers, carry.waiting
        (gx_BTD, sums, waiting), _ = self._scan(layer, start, reverse=True)
        return carry._replace(layers=sums, waiting=waiting), gx_BTD

    def _weights(self, carry: Carry, row: Row, count: jax.Array) -> Carry:
        """W: the weights' gradients that a B has put off."""
        place = self.place(row.w_chunk)

        def layer(sums: Params, i: jax.Array) -> tuple[Params, None]:
            def run() -> Params:
                left = [_read(x, row.w_slot, i) for x in carry.waiting]
                found = self.split.halves.later(jax.tree.leaves(self.layer_weights(place.row + i)), left)
                return self._add(sums, found, place.row + i)

            return self.if_there(place, i, run, lambda: sums), None

        def run() -> Params:
            return self._scan(layer, carry.layers)[0]

        return carry._replace(layers=lax.cond(_is_job(row.w_mb, count), run, lambda: carry.layers))

    @cached_property
    def split(self) -> Split:
        """A layer's backward pass in its two halves."""
        results = self.x_shape, self.sums_shape

        def back(weights: list[jax.Array], rest: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            given, cotangents = rest[: len(self.form.kept)], rest[len(self.form.kept) :]
            vjp = self.form.vjp(jax.tree.unflatten(jax.tree.structure(self.layers), weights), given)
            found, gx_BTD = vjp(jax.tree.unflatten(jax.tree.structure(results), cotangents))
            return jax.tree.leaves(found), [gx_BTD]

        weights = jax.tree.leaves(jax.eval_shape(self.layer_weights, jax.ShapeDtypeStruct((), jnp.int32)))
        rest = [*self.form.kept, *jax.tree.leaves(results)]
        cut = halves(back, weights, rest)
        return Split(cut, jax.eval_shape(cut.now, weights, rest)[2])

    def _add(self, sums: Params, found: list[jax.Array | None], row: jax.Array) -> Params:
        """Sums of stacked gradients with one layer's; None leaves a weight's as it is."""
        weights = jax.tree.leaves(self.engine.weights["layers"])
        old, structure = jax.tree.flatten(sums)

        def one(weight: Weight, total: jax.Array, gradient: jax.Array | None) -> jax.Array:
            if gradient is None:
                return total
            new = self.engine.scatter(weight, gradient[None]).astype(jnp.float32)
            return _write(total, _read(total, row) + new[0], row)

        return jax.tree.unflatten(structure, [one(*each) for each in zip(weights, old, found, strict=True)])

    def _scan(self, layer: Callable[..., Any], start: Any, reverse: bool = False) -> Any:
        steps = jnp.arange(self.placement.size, dtype=jnp.int32)
        return lax.scan(layer, start, steps, reverse=reverse, unroll=min(self.engine.unroll, self.placement.size))


def _is_job(microbatch: jax.Array, count: jax.Array) -> jax.Array:
    return (microbatch > NOTHING) & (microbatch < count)


def _read(x: jax.Array, *index: jax.Array) -> jax.Array:
    """x[index], leading dimensions only."""
    rest = x.shape[len(index) :]
    return lax.dynamic_slice(x, (*index, *(0,) * len(rest)), (*(1,) * len(index), *rest)).reshape(rest)


def _write(x: jax.Array, value: jax.Array, *index: jax.Array) -> jax.Array:
    """x with `value` at x[index]."""
    rest = (0,) * value.ndim
    return lax.dynamic_update_slice(x, value.reshape((*(1,) * len(index), *value.shape)), (*index, *rest))


def _write_all(buffers: list[jax.Array], values: list[jax.Array], *index: jax.Array) -> list[jax.Array]:
    return [_write(buffer, value, *index) for buffer, value in zip(buffers, values, strict=True)]


def _put(buffer: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """The buffer with `value` in a slot; unchanged if there is none."""
    if buffer.shape[0] == 0:
        return buffer
    at = jnp.maximum(slot, 0)
    return _write(buffer, jnp.where(slot > NOTHING, value, _read(buffer, at)), at)
