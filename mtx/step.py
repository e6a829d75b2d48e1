"""The train and evaluation steps: pure, donated, compiled once. Everything that changes is `mtx.state.TrainState`."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtx.errors import ConfigError
from mtx.layers import Context
from mtx.layout import BoundLayout, Weight
from mtx.losses import STATISTICS, CrossEntropy, RowScores, cross_entropy, pair_loss, score_rows
from mtx.model import Batch, Model, flatten
from mtx.optim import Counter, Optimizer, Progress, trained
from mtx.pipeline import Engine, Interleaved, OneFOneB, Parts, Schedule, to_order, to_rows
from mtx.spmd import (
    Activations,
    Compiled,
    CompiledActivations,
    CompiledStorage,
    Manual,
    ManualActivations,
    ManualStorage,
    Params,
    all_layers,
    map_weights,
    replaced,
)
from mtx.state import OptimizerState, Part, TrainState, Update
from mtx.sums import Denominator, Statistics, Sum, Sums, added, both, over_layers, over_ranks, seeds_of
from pallas_kernels.masks import Mask, Prefix
from pallas_kernels.threefry import Words, threefry2x32

T = TypeVar("T")


@dataclass(frozen=True)
class Program:
    """One model on one mesh: the functions that a run compiles.

    Batches are a `Batch` of arrays_MBT: M microbatches, each of B sequences over all batch shards.
    """

    model: Model
    mesh: Mesh
    layout: BoundLayout
    optimizer: Optimizer
    loss: CrossEntropy
    partition: Manual | Compiled
    compute: Any
    stored: Any
    masks: tuple[Mask, ...]
    """What a token sees in the layers of each of the model's kinds."""
    steps: int
    schedule: Schedule = OneFOneB()
    """Of the mesh's pipeline stages, if there are several."""
    more_parts: tuple[Part, ...] = ()
    """Parts of the state behind the optimizer's, in the order in which they see a step."""

    def __post_init__(self):
        """Builds the optimizer's rules, so that what cannot be is refused before anything is compiled."""
        for name in self.parts:
            self.layout.check(flatten(self.declared[name]))
        if len(read := [name for name, part in self.parts.items() if part.is_evaluated]) > 1:
            optimizer, more = type(self.optimizer).__name__, read[-1]
            raise ConfigError(
                f"optimizer={optimizer} has weights of its own for evaluation, and {more}.evaluate=True would read "
                f"others; set {more}=None, or {more}.evaluate=False."
            )

    # Shardings.

    @property
    def weights(self) -> Params:
        return self.model.weights

    @cached_property
    def trained(self) -> Params:
        """How each weight that the optimizer changes is trained, as a nested dict of `Trained`."""
        return trained(self.optimizer, self.weights)

    @cached_property
    def trained_weights(self) -> Params:
        """Their declarations: of gradients, too."""
        return map_weights(lambda t: t.weight, self.trained)

    @property
    def frozen(self) -> set[str]:
        """Names of the other weights."""
        return flatten(self.weights).keys() - flatten(self.trained).keys()

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The parts of the state by name, in the order in which they see a step: the optimizer's, then others."""
        own = OptimizerState(self.trained, self.mesh, self.layout, self.model.placement)
        return {part.name: part for part in (own, *self.more_parts)}

    @cached_property
    def declared(self) -> dict[str, Params]:
        """Declarations of the arrays of the weights, as `params`, and of each part."""
        return {"params": self.weights} | {n: part.leaves(self.trained_weights) for n, part in self.parts.items()}

    def trained_of(self, params: Params) -> Params:
        """The weights that are trained, of all."""
        return map_weights(lambda _, x: x, self.trained, params)

    def shardings(self, column) -> Params:
        return map_weights(lambda w: self.sharding(self.layout.spec(w, column)), self.weights)

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    @property
    def batch_spec(self) -> P:
        return P(None, *self.rows_spec)

    @property
    def rows_spec(self) -> P:
        """PartitionSpec of a Batch_BT."""
        return self.layout.activation("BT")

    @cached_property
    def state_shardings(self) -> TrainState:
        """Where each array of the state lives."""
        shape = jax.eval_shape(self._init, jax.ShapeDtypeStruct((), jnp.uint32))
        rest = jax.tree.map(lambda _: self.sharding(P()), shape)

        def at(weight: Weight, x: jax.ShapeDtypeStruct) -> NamedSharding:
            assert weight.shape == x.shape, f"{weight} is declared, and starts with shape {x.shape}"
            return self.sharding(self.layout.spec(weight, "optimizer"))

        parts = {name: map_weights(at, self.declared[name], tree) for name, tree in shape.parts.items()}
        return dataclasses.replace(rest, params=self.shardings("weights"), parts=parts)

    # State.

    def _init(self, seed: jax.Array) -> TrainState:
        params = self.model.init(jax.random.fold_in(jax.random.key(seed), 0))
        params = map_weights(lambda w, x: x.astype(self.stored) if w.treatment.reduced else x, self.weights, params)
        zero = jnp.zeros((), jnp.uint32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            parts=self._start(self.parts, params, seed),
            samples=Counter(zero, zero),
            tokens=Counter(zero, zero),
            skipped=zero,
            seed=seed,
        )

    def _start(self, names: Iterable[str], params: Params, seed: jax.Array) -> dict[str, Params]:
        return {name: self.parts[name].start(self.trained_of(params), seed) for name in names}

    def init(self, seed: int) -> TrainState:
        """A new state, made where it stays: no device and no host ever holds more than its part."""
        # Not under jax.set_mesh: there every intermediate would be typed as whole on each device.
        return jax.jit(self._init, out_shardings=self.state_shardings)(np.uint32(seed))

    def started(self, state: TrainState) -> TrainState:
        """A state with the parts that it lacks, as they start from its weights."""
        if not (lacking := [name for name in self.parts if name not in state.parts]):
            return state
        shardings = {name: self.state_shardings.parts[name] for name in lacking}
        start = jax.jit(partial(self._start, lacking), out_shardings=shardings)
        return dataclasses.replace(state, parts=state.parts | start(state.params, state.seed))

    def abstract_state(self) -> TrainState:
        """The state's shapes and shardings, for compiling without devices."""

        def at(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        shapes = jax.eval_shape(self._init, jax.ShapeDtypeStruct((), jnp.uint32))
        return jax.tree.map(at, shapes, self.state_shardings)

    # The state with the layers in their own order: what checkpoints hold, alike on all meshes.

    def abstract_ordered(self) -> TrainState:
        """Its shapes and shardings."""
        if self.model.placement.in_order:
            return self.abstract_state()
        layers = self.model.config.layers

        def one(weight: Weight, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if not weight.layers:
                return x
            at = self.sharding(self.layout.ordered_spec(weight, "weights"))
            return jax.ShapeDtypeStruct((layers, *x.shape[1:]), x.dtype, sharding=at)

        return self._each_weight(one, self.abstract_state())

    def ordered(self, state: TrainState) -> TrainState:
        """A state of this program, its layers in their own order. The state itself stays."""
        return state if self.model.placement.in_order else self._each_weight(self._ordered, state)

    def placed(self, state: T) -> T:
        """The inverse of `ordered`, which frees what it was given: a state, or some of its trees by name."""
        return state if self.model.placement.in_order else self._each_weight(self._placed, state)

    def _ordered(self, weight: Weight, x: jax.Array) -> jax.Array:
        return self._to_order(x, weight=weight) if weight.layers else x

    def _placed(self, weight: Weight, x: jax.Array) -> jax.Array:
        if not weight.layers:
            return x
        moved = self._to_rows(x, weight=weight)
        jax.block_until_ready(moved)
        x.delete()  # an array at a time: there is no room for all twice
        return moved

    @cached_property
    def _to_order(self) -> Callable[..., jax.Array]:
        return jax.jit(partial(to_order, self.mesh, self.layout, self.model.placement), static_argnames="weight")

    @cached_property
    def _to_rows(self) -> Callable[..., jax.Array]:
        return jax.jit(partial(to_rows, self.mesh, self.layout, self.model.placement), static_argnames="weight")

    def _each_weight(self, f: Callable, state: Any) -> Any:
        """f(declaration, x) of every x of a state, or of some of its trees by name, that is declared as weights are."""
        if isinstance(state, TrainState):
            params, *parts = self._each_weight(f, {"params": state.params, **state.parts}).values()
            return dataclasses.replace(state, params=params, parts=dict(zip(state.parts, parts, strict=True)))
        return {name: map_weights(f, self.declared[name], tree) for name, tree in state.items()}

    def abstract_batch(self, microbatches: int, rows: int, time: int) -> Batch:
        """A Batch_MBT's shapes and shardings; `rows` is B, over all batch shards."""
        at = self.sharding(self.batch_spec)
        dtypes: dict[str, Any] = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {
            "weights": jnp.float32
        }
        if any(mask.has(Prefix) for mask in self.masks):
            dtypes["prefix"] = jnp.int32
        if self.model.config.pairs:
            dtypes |= {"types": jnp.int32, "label": jnp.int32}
        shape = (microbatches, rows, time)
        arrays: Any = {name: jax.ShapeDtypeStruct(shape, d, sharding=at) for name, d in dtypes.items()}
        return Batch(**arrays)

    def lower_train_step(self, microbatches: int, rows: int, time: int) -> jax.stages.Lowered:
        """The real train step, lowered for the mesh's devices, present or not."""
        step, count = self.compile_train_step(), jax.ShapeDtypeStruct((), jnp.int32)
        state, batch = self.abstract_state(), self.abstract_batch(microbatches, rows, time)
        with jax.set_mesh(self.mesh):
            return step.lower(state, batch, count)

    # Gradients.

    def doors(self) -> Activations:
        compiled = isinstance(self.partition, Compiled)
        storage = CompiledStorage if compiled else ManualStorage
        activations = CompiledActivations if compiled else ManualActivations
        return activations(
            storage=storage(self.layout, self.compute),
            device=self.mesh.devices.flat[0],
            unrolled=self.model.config.unroll >= self.model.placement.size,
        )

    def exact(self) -> contextlib.AbstractContextManager:
        """Where float32 means float32: accelerators multiply it in fewer bits unless told not to."""
        if self.compute == jnp.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()

    @cached_property
    def statistics(self) -> Statistics:
        """Declarations of what a step sums: the loss's own and the layers' statistics."""
        assert not STATISTICS.keys() & self.model.statistics.keys()
        return {**STATISTICS, **self.model.statistics}

    def denominator(self, batch: Batch, count: jax.Array, per: Denominator) -> jax.Array:
        """What a sum over the first `count` microbatches of a Batch_MBT is divided by; never 0."""
        if per == "row":
            return jnp.maximum(count * batch.tokens.shape[1], 1).astype(jnp.float32)
        x_MBT = batch.weights if per == "label" else batch.segments > 0
        x_M = jnp.sum(x_MBT, axis=(1, 2), dtype=jnp.float32)
        return jnp.maximum(jnp.sum(jnp.where(jnp.arange(len(x_M)) < count, x_M, 0.0)), 1e-9)

    def gradients(self, state: TrainState, batch: Batch, count: jax.Array) -> tuple[Params, Sums]:
        """Sums over the first `count` microbatches: gradients_f32 of the weights that are trained, stored as they are,
        and the values of `statistics`. Dividing the gradients, as the objective, by the labels is left to the step."""
        doors = self.doors()
        M, B, _ = batch.tokens.shape
        row = jnp.arange(M * B, dtype=jnp.uint32).reshape(M, B)
        samples = P(None, *self.layout.activation("B"))
        sample_MB = jax.tree.map(lambda x: self._place(x, samples), state.samples.plus(row))
        seeds = seeds_of(self.model.statistics, partial(self.denominator, batch, count))

        def run(params: Params, batch: Batch, sample_MB: Counter, seed: jax.Array, count: jax.Array, seeds: Sums):
            used, accumulate = self.use(doors, params), self._pipelined if self.stages > 1 else self._accumulate
            gradients, sums = accumulate(doors, used, batch, sample_MB, seed, count, seeds)
            gradients = map_weights(doors.storage.reduce_gradient, self.trained_weights, gradients)
            return gradients, over_ranks(self.statistics, sums, doors)

        specs = (self.stored_specs, self.batch_spec, samples, P(), P(), P())
        results = {name: self.layout.activation(s.kept) for name, s in self.statistics.items()}
        results |= {name: P(None, *results[name]) for name, s in self.statistics.items() if s.per_layer}
        trained_specs = map_weights(self._stored_spec, self.trained_weights)
        with self.exact():
            run = self.mapped(run, specs, (trained_specs, results))
            gradients, sums = run(state.params, batch, sample_MB, state.seed, count, seeds)
        return gradients, sums | {"objective": added(sums["objective"], seeds, sums)}

    @property
    def stored_specs(self) -> Params:
        return map_weights(self._stored_spec, self.weights)

    def _stored_spec(self, weight: Weight) -> P:
        return self.layout.spec(weight, "weights")

    def mapped(self, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`run` inside the Manual region, where there is one."""
        if isinstance(self.partition, Compiled) or self.mesh.size == 1:
            return run
        return jax.shard_map(run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def place(self, arrays: Mapping[str, np.ndarray], spec: P) -> Batch:
        """Host arrays, alike on every process, as global ones: a process keeps only its devices' part."""
        shape = arrays["tokens"].shape
        rows = {name: x.reshape(-1, x.shape[-1]) for name, x in arrays.items()}
        return self.place_rows(lambda numbers: {name: x[numbers] for name, x in rows.items()}, shape, spec)

    def place_rows(
        self, load: Callable[[np.ndarray], Mapping[str, np.ndarray]], shape: Sequence[int], spec: P
    ) -> Batch:
        """A global Batch of a shape (..., B, T) of which each process loads only its own rows.

        `load` takes row numbers (int64, counted through the leading dimensions) and returns arrays [rows, T].
        """
        sharding, (*lead, B, T) = self.sharding(spec), shape
        indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
        held = {index[-2].indices(B)[:2] for index in indices if index is not None}
        own_B = np.unique(np.concatenate([np.arange(*bounds) for bounds in held]))
        at_B = np.full(B, -1)
        at_B[own_B] = np.arange(len(own_B))
        before = np.arange(math.prod(lead))[:, None] * B
        arrays = {name: x.reshape(*lead, len(own_B), T) for name, x in load((before + own_B).reshape(-1)).items()}

        def one(x: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[-2].indices(B)
                return x[*index[:-2], slice(at_B[start], at_B[stop - 1] + 1), index[-1]]

            return jax.make_array_from_callback(tuple(shape), sharding, part)

        return Batch(**{name: one(arrays[name]) for name in Batch._fields if name in arrays})

    def share_of_rows(self) -> tuple[int, int]:
        """(which, of how many): the part of every batch's rows that this process loads; others may load the same."""
        shape = (math.prod(self.mesh.shape.values()),)
        rows: dict[int, set[int]] = {}
        for device, index in self.sharding(P(*self.layout.activation("B"))).devices_indices_map(shape).items():
            rows.setdefault(device.process_index, set()).update(range(*index[0].indices(shape[0])))
        parts = sorted({tuple(sorted(held)) for held in rows.values()})
        return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)

    def _place(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.reshard(x, spec) if self.mesh.size > 1 else x

    def use(self, doors: Activations, params: Params) -> Params:
        """Weights as the layers take them. ZeRO 1 and 2 gather here, once per step; ZeRO 3 gathers in each layer."""
        storage = doors.storage
        if self.stages > 1:
            params = map_weights(storage.gather_stages, self.weights, params)
        return params if storage.at_use else map_weights(storage.gather, self.weights, params)

    def _accumulate(self, doors, params, batch: Batch, sample_MB: Counter, seed, count, seeds) -> tuple[Params, Sums]:
        def microbatch(i: jax.Array | int) -> tuple[Params, Sums]:
            part, sample = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), (batch, sample_MB))
            key_B = sequence_keys(seed, sample)

            def objective(some: Params) -> tuple[jax.Array, Sums]:
                all_params = replaced(params, some)
                h_BTD, sums = self.model.hidden(all_params, part, doors, self.masks, key_B)
                loss, own = self._loss(doors, all_params["ends"], h_BTD, part)
                return added(loss, seeds, sums), own | sums

            some = map_weights(lambda _, x: x, self.trained, params)
            gradients, sums = jax.grad(objective, has_aux=True)(some)
            gradients = map_weights(doors.storage.scatter_microbatch, self.trained_weights, gradients)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

        if batch.tokens.shape[0] == 1:
            return microbatch(0)

        def add(i: jax.Array, total: tuple[Params, Sums]) -> tuple[Params, Sums]:
            gradients, sums = microbatch(i)
            return jax.tree.map(jnp.add, total[0], gradients), both(self.statistics, total[1], sums)

        full = partial(_full, doors.global_shapes)
        gradients, sums = jax.eval_shape(microbatch, 0)
        nothing = {name: full(x, self.statistics[name].empty) for name, x in sums.items()}
        return lax.fori_loop(0, count, add, (jax.tree.map(full, gradients), nothing))

    def _loss(self, doors: Activations, ends: Params, h_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """What is minimised, and the loss's sums, of this rank's rows."""
        head, vocab = self.model.head(ends), self.model.config.vocab_size
        objective, nll = cross_entropy(doors, self.loss, h_BTD, head, batch.targets, batch.weights, vocab)
        if self.model.config.pairs:
            assert batch.label is not None
            answer = partial(self.model.answer, ends, doors=doors)
            pairs = pair_loss(doors, answer, h_BTD, batch.label, batch.weights)
            objective, nll = objective + pairs[0], nll + pairs[1]
        return objective, {"objective": objective, "cross_entropy": nll, "labels": jnp.sum(batch.weights)}

    def _score(self, doors: Activations, ends: Params, h_BTD: jax.Array, batch: Batch) -> RowScores:
        head, vocab = self.model.head(ends), self.model.config.vocab_size
        return score_rows(doors, self.loss, h_BTD, head, batch.targets, batch.weights, vocab)

    # Pipelines.

    @property
    def stages(self) -> int:
        return self.model.placement.stages

    def _pipelined(self, doors, params, batch: Batch, sample_MB: Counter, seed, count, seeds) -> tuple[Params, Sums]:
        """`_accumulate` over the stages of a pipeline: its microbatches are the step's."""
        feed_M, engine = (batch, sequence_keys(seed, sample_MB)), self._engine(doors, batch.tokens.shape[0], self._loss)
        gradients, own, sums_R = engine.gradients(self._of_engine(params), feed_M, count, seeds)
        gradients = {"ends": gradients["ends"], "stacks": self.model.by_kind(lambda _: gradients["layers"])}
        declared, place = self.model.statistics, self.model.placement
        sums_R = {name: all_layers(place, x) if declared[name].per_layer else x for name, x in sums_R.items()}
        return gradients, own | over_layers(declared, sums_R)

    def _of_engine(self, tree: Params) -> Params:
        """A tree of all weights, or of those that are trained, as the engine takes it, whose layers are of one kind."""
        (kind,) = self.model.kinds
        return {"ends": tree.get("ends", {}), "layers": kind.of(tree["stacks"]) if "stacks" in tree else {}}

    def _engine(self, doors: Activations, microbatches: int, finish: Callable, forward: bool = False) -> Engine:
        model, config, (kind,) = self.model, self.model.config, self.model.kinds
        schedule = self._forward_only if forward else self.schedule

        def context(feed: Any) -> Context:
            return model.context(feed[0], doors, self.masks[0], feed[1])

        def layer(weights: Params, x_BTD: jax.Array, feed: Any, number: jax.Array) -> tuple[jax.Array, Sums]:
            return model.layer(kind, weights, x_BTD, context(feed), number)

        if config.remat in ("full", "stage") and not forward:
            layer = jax.checkpoint(layer, prevent_cse=doors.unrolled)
        return Engine(
            parts=Parts(
                embed=lambda ends, feed: model.embed(ends, feed[0].tokens, context(feed)),
                layer=layer,
                finish=lambda ends, x_BTD, feed: finish(doors, ends, model.norm(ends, x_BTD), feed[0]),
            ),
            placement=model.placement,
            table=schedule.table(self.stages, microbatches, keeps=forward or config.remat != "stage"),
            weights=self._of_engine(self.trained_weights),
            statistics=model.statistics,
            scatter=doors.storage.scatter_microbatch,
            unroll=config.unroll,
        )

    @property
    def _forward_only(self) -> Schedule:
        """For evaluation: it takes any count of microbatches, which the run's own schedule need not."""
        chunks = self.model.placement.chunks
        return Interleaved(chunks=chunks) if chunks > 1 else OneFOneB()

    # Steps.

    def train_step(self, state: TrainState, batch: Batch, count: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from the first `count` microbatches. Metrics are scalars.

        A step whose gradients are not finite changes the counters, `skipped`, and what `Part.skipped` says.
        """
        gradients, sums = self.gradients(state, batch, count)
        labels = sums["labels"]
        gradients = jax.tree.map(lambda g: g / jnp.maximum(labels, 1e-9), gradients)
        norm = optax.tree.norm(gradients)
        if (limit := self.optimizer.clip_norm) is not None:
            scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-9))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["objective"])

        _, B, T = batch.tokens.shape
        steps, sequences = state.step + 1, count.astype(jnp.uint32) * np.uint32(B)
        samples, tokens = state.samples.plus(sequences), state.tokens.plus(sequences * np.uint32(T))
        progress = Progress(
            steps.astype(jnp.float32), samples.as_float(), tokens.as_float(), steps.astype(jnp.float32) / self.steps
        )
        rate = self.optimizer.schedule.rate(progress)
        skipped = {name: part.skipped(state.parts[name]) for name, part in self.parts.items()}
        old = self.trained_of(state.params), skipped

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old).astype(old.dtype)

        params, parts = jax.tree.map(keep, self.updated(state, gradients, rate), old)
        state = TrainState(
            step=steps,
            params=replaced(state.params, params),
            parts=parts,
            samples=samples,
            tokens=tokens,
            skipped=state.skipped + (~finite).astype(jnp.uint32),
            seed=state.seed,
        )
        metrics = {
            "train/loss": sums["cross_entropy"] / jnp.maximum(labels, 1e-9),
            "train/grad_norm": norm,
            "lr": rate,
            "skipped": state.skipped,
        }
        for name, s in self.model.statistics.items():
            assert f"train/{name}" not in metrics, f"a metric has the name of the statistic {name}"
            if not s.per_layer and not s.kept:
                denominator = self.denominator(batch, count, s.per) if isinstance(s, Sum) else 1.0
                metrics[f"train/{name}"] = sums[name] / denominator
        return state, metrics

    def updated(self, state: TrainState, gradients: Params, rate: jax.Array) -> tuple[Params, dict[str, Params]]:
        """New values of the weights that are trained, and of the parts."""
        params, parts = self.trained_of(state.params), {}
        updates = state.step - state.skipped.astype(jnp.int32)
        with self.exact():
            for name, part in self.parts.items():
                params, parts[name] = part.step(Update(gradients, params, updates, rate), state.parts[name])
        return params, parts

    def compile_train_step(self):
        """`train_step` jitted, its state donated; call it under `jax.set_mesh(mesh)`."""
        out = (self.state_shardings, None)
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=out)

    @property
    def evaluated_part(self) -> Part | None:
        """The part that says which weights evaluation reads; None: those that are trained."""
        return next((part for part in self.parts.values() if part.is_evaluated), None)

    def evaluated(self, params: Params, parts: Mapping[str, Params]) -> Params:
        """The weights that evaluation and generation read: the state's own, unless a part says otherwise."""
        if (part := self.evaluated_part) is None:
            return params
        return replaced(params, part.evaluated(self.trained_of(params), parts[part.name]))

    def eval_sums(self, params: Params, batch: Batch) -> Sums:
        """`cross_entropy` in nats and the weight of the `labels`, each summed over a Batch_MBT, which streams through a
        pipeline."""
        doors = self.doors()

        def run(params: Params, batch: Batch) -> Sums:
            _, sums_M = self._forward(doors, params, batch, self._loss)
            sums = {name: functools.reduce(jnp.add, sums_M[name]) for name in ("cross_entropy", "labels")}
            return over_ranks(self.statistics, sums, doors)

        with self.exact():
            return self.mapped(run, (self.stored_specs, self.batch_spec), P())(params, batch)

    def eval_rows(self, params: Params, batch: Batch) -> RowScores:
        """Scores_MB of each row of a Batch_MBT, which streams through a pipeline; whole on every device."""
        doors = self.doors()

        def run(params: Params, batch: Batch) -> RowScores:
            scores_MB = self._forward(doors, params, batch, self._score)
            return jax.tree.map(lambda x: doors.sum_over("L", x), scores_MB)

        rows = P(None, *self.layout.activation("B"))
        with self.exact():
            scores_MB = self.mapped(run, (self.stored_specs, self.batch_spec), rows)(params, batch)
        return jax.tree.map(lambda x: self._place(x, P(None, None)), scores_MB)

    def _forward(self, doors: Activations, params: Params, batch: Batch, finish: Callable) -> Any:
        """`finish` of each microbatch, stacked; with several pipeline stages on the last, and zeros on the others."""
        used, (count, _, _) = self.use(doors, params), batch.tokens.shape
        if self.stages > 1:
            return self._engine(doors, count, finish, forward=True).forward(self._of_engine(used), (batch, None))

        def one(part: Batch) -> Any:
            h_BTD, _ = self.model.hidden(used, part, doors, self.masks, None)
            return finish(doors, used["ends"], h_BTD, part)

        parts = [one(jax.tree.map(lambda x: x[i], batch)) for i in range(count)]  # noqa: B023 (used at once)
        return jax.tree.map(lambda *each: jnp.stack(each), *parts)

    def logits(self, state: TrainState, batch: Batch) -> jax.Array:
        """Float32 logits_BTV of a Batch_BT over the padded vocabulary."""
        doors = self.doors()

        def run(params: Params, batch: Batch) -> jax.Array:
            return self.model.logits(self.use(doors, params), batch, doors, self.masks)

        specs = (self.stored_specs, self.rows_spec)
        with self.exact():
            return self.mapped(run, specs, self.layout.activation("BTV"))(state.params, batch)


def sequence_keys(seed: jax.Array, sample_B: Counter) -> Words:
    """Two words per sequence, from the seed and the global sample index alone."""
    return threefry2x32((seed, np.uint32(1)), (sample_B.high, sample_B.low))


def _full(sharded: bool, shape: jax.ShapeDtypeStruct, value: float = 0.0) -> jax.Array:
    return jnp.full(shape.shape, value, shape.dtype, out_sharding=shape.sharding if sharded else None)
