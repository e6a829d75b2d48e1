"""The train and evaluation steps: pure, donated, compiled once. Everything that changes is `TrainState`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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

from mtx.layers import Context
from mtx.layout import BoundLayout, Weight
from mtx.losses import CrossEntropy, cross_entropy, pair_loss
from mtx.model import Batch, Model
from mtx.optim import Counter, Optimizer, Progress
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
    map_weights,
)
from pallas_kernels.masks import Mask, Prefix
from pallas_kernels.threefry import Words, threefry2x32

T = TypeVar("T")


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the seed that it never does."""

    step: jax.Array
    params: Params
    moments: Any
    """optax's state, a tree of arrays."""
    samples: Counter
    tokens: Counter
    skipped: jax.Array
    """Steps whose gradients were not finite; they moved the counters and nothing else."""
    seed: jax.Array


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

    # Shardings.

    @property
    def weights(self) -> Params:
        return self.model.weights

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
        """Where each array of the state lives, moments like their weights."""
        whole = self.sharding(P())
        shape = jax.eval_shape(self._init, jax.ShapeDtypeStruct((), jnp.uint32))
        optimizer = self.shardings("optimizer")
        moments = optax.tree_map_params(
            self.transformation,  # pyrefly: ignore[bad-argument-type]: optax accepts one, its annotation does not
            lambda _, s: s,
            shape.moments,
            optimizer,
            transform_non_params=lambda _: whole,
        )
        rest = jax.tree.map(lambda _: whole, shape)
        return dataclasses.replace(rest, params=self.shardings("weights"), moments=moments)

    # State.

    @property
    def transformation(self) -> optax.GradientTransformation:
        return self.optimizer.build(map_weights(lambda w: w.is_matrix, self.weights))

    def _init(self, seed: jax.Array) -> TrainState:
        params = self.model.init(jax.random.fold_in(jax.random.key(seed), 0))
        zero = jnp.zeros((), jnp.uint32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=map_weights(lambda w, x: x.astype(self.stored) if w.is_matrix else x, self.weights, params),
            moments=self.transformation.init(params),
            samples=Counter(zero, zero),
            tokens=Counter(zero, zero),
            skipped=zero,
            seed=seed,
        )

    def init(self, seed: int) -> TrainState:
        """A new state, made where it stays: no device and no host ever holds more than its part."""
        # Not under jax.set_mesh: there every intermediate would be typed as whole on each device.
        return jax.jit(self._init, out_shardings=self.state_shardings)(np.uint32(seed))

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
        """The inverse of `ordered`, which frees what it was given: a whole state, or its `params` alone."""
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
        """f(weight, x) of every x of a state, or of params alone, that is a weight or has a weight's shape."""
        if not isinstance(state, TrainState):
            return map_weights(f, self.weights, state)
        moments = optax.tree_map_params(
            self.transformation,  # pyrefly: ignore[bad-argument-type]: as above
            lambda x, weight: f(weight, x),
            state.moments,
            self.weights,
        )
        return dataclasses.replace(state, params=map_weights(f, self.weights, state.params), moments=moments)

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

    def gradients(self, state: TrainState, batch: Batch, count: jax.Array) -> tuple[Params, jax.Array]:
        """Sums over the first `count` microbatches: gradients_f32, stored as the weights are, and
        (objective, cross entropy, label weight) in float32."""
        doors = self.doors()
        M, B, _ = batch.tokens.shape
        row = jnp.arange(M * B, dtype=jnp.uint32).reshape(M, B)
        samples = P(None, *self.layout.activation("B"))
        sample_MB = jax.tree.map(lambda x: self._place(x, samples), state.samples.plus(row))

        def run(params: Params, batch: Batch, sample_MB: Counter, seed: jax.Array, count: jax.Array):
            used, accumulate = self.use(doors, params), self._pipelined if self.stages > 1 else self._accumulate
            return self._reduce(doors, *accumulate(doors, used, batch, sample_MB, seed, count))

        specs = (self.stored_specs, self.batch_spec, samples, P(), P())
        run = self.mapped(run, specs, (self.stored_specs, P()))
        with self.exact():
            return run(state.params, batch, sample_MB, state.seed, count)

    @property
    def stored_specs(self) -> Params:
        return map_weights(lambda w: self.layout.spec(w, "weights"), self.weights)

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

    def _accumulate(self, doors, params, batch: Batch, sample_MB: Counter, seed, count) -> tuple[Params, jax.Array]:
        def microbatch(i: jax.Array | int) -> tuple[Params, jax.Array]:
            part, sample = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), (batch, sample_MB))
            key_B = sequence_keys(seed, sample)

            def objective(params: Params) -> tuple[jax.Array, jax.Array]:
                sums = self._sums(doors, params, part, key_B)
                return sums[0], sums

            gradients, sums = jax.grad(objective, has_aux=True)(params)
            gradients = map_weights(doors.storage.scatter_microbatch, self.weights, gradients)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

        if batch.tokens.shape[0] == 1:
            return microbatch(0)
        shapes = jax.eval_shape(microbatch, 0)
        zeros = jax.tree.map(partial(_zeros, doors.global_shapes), shapes)
        return lax.fori_loop(0, count, lambda i, total: jax.tree.map(jnp.add, total, microbatch(i)), zeros)

    def _sums(self, doors: Activations, params: Params, batch: Batch, key_B: Words | None) -> jax.Array:
        """(objective, cross entropy, label weight) of this rank's rows."""
        return self._loss(doors, params["ends"], self.model.hidden(params, batch, doors, self.masks, key_B), batch)

    def _loss(self, doors: Activations, ends: Params, h_BTD: jax.Array, batch: Batch) -> jax.Array:
        head, vocab = self.model.head(ends), self.model.config.vocab_size
        objective, nll = cross_entropy(doors, self.loss, h_BTD, head, batch.targets, batch.weights, vocab)
        if self.model.config.pairs:
            assert batch.label is not None
            answer = partial(self.model.answer, ends, doors=doors)
            pairs = pair_loss(doors, answer, h_BTD, batch.label, batch.weights)
            objective, nll = objective + pairs[0], nll + pairs[1]
        return jnp.stack([objective, nll, jnp.sum(batch.weights)])

    def _reduce(self, doors: Activations, gradients: Params, sums: jax.Array) -> tuple[Params, jax.Array]:
        return map_weights(doors.storage.reduce_gradient, self.weights, gradients), doors.sum_over("BT", sums)

    # Pipelines.

    @property
    def stages(self) -> int:
        return self.model.placement.stages

    def _pipelined(self, doors, params, batch: Batch, sample_MB: Counter, seed, count) -> tuple[Params, jax.Array]:
        """`_accumulate` over the stages of a pipeline: its microbatches are the step's."""
        feed_M, engine = (batch, sequence_keys(seed, sample_MB)), self._engine(doors, batch.tokens.shape[0])
        gradients, sums = engine.gradients(self._of_engine(params), feed_M, count)
        return {"ends": gradients["ends"], "stacks": self.model.by_kind(lambda _: gradients["layers"])}, sums

    def _of_engine(self, params: Params) -> Params:
        """A tree like the parameters' as the engine takes it, whose layers are of one kind."""
        (kind,) = self.model.kinds
        return {"ends": params["ends"], "layers": kind.of(params["stacks"])}

    def _engine(self, doors: Activations, microbatches: int, forward: bool = False) -> Engine:
        model, config, (kind,) = self.model, self.model.config, self.model.kinds
        schedule = self._forward_only if forward else self.schedule

        def context(feed: Any) -> Context:
            return model.context(feed[0], doors, self.masks[0], feed[1])

        def layer(weights: Params, x_BTD: jax.Array, feed: Any, number: jax.Array) -> jax.Array:
            return model.layer(kind, weights, x_BTD, context(feed), number)

        if config.remat in ("full", "stage") and not forward:
            layer = jax.checkpoint(layer, prevent_cse=doors.unrolled)
        return Engine(
            parts=Parts(
                embed=lambda ends, feed: model.embed(ends, feed[0].tokens, context(feed)),
                layer=layer,
                finish=lambda ends, x_BTD, feed: self._loss(doors, ends, model.norm(ends, x_BTD), feed[0]),
            ),
            placement=model.placement,
            table=schedule.table(self.stages, microbatches, keeps=forward or config.remat != "stage"),
            weights=self._of_engine(self.weights),
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

        A step whose gradients are not finite changes the counters and `skipped`, nothing else.
        """
        gradients, (objective, nll, labels) = self.gradients(state, batch, count)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(labels, 1e-9), gradients)
        norm = optax.tree.norm(gradients)
        if (limit := self.optimizer.clip_norm) is not None:
            scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-9))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(objective)

        _, B, T = batch.tokens.shape
        steps, sequences = state.step + 1, count.astype(jnp.uint32) * np.uint32(B)
        samples, tokens = state.samples.plus(sequences), state.tokens.plus(sequences * np.uint32(T))
        progress = Progress(
            steps.astype(jnp.float32), samples.as_float(), tokens.as_float(), steps.astype(jnp.float32) / self.steps
        )
        rate = self.optimizer.schedule.rate(progress)
        updates, moments = self.transformation.update(gradients, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new, old).astype(old.dtype)

        state = TrainState(
            step=steps,
            params=jax.tree.map(keep, params, state.params),
            moments=jax.tree.map(keep, moments, state.moments),
            samples=samples,
            tokens=tokens,
            skipped=state.skipped + (~finite).astype(jnp.uint32),
            seed=state.seed,
        )
        metrics = {
            "train/loss": nll / jnp.maximum(labels, 1e-9),
            "train/grad_norm": norm,
            "lr": rate,
            "skipped": state.skipped,
        }
        return state, metrics

    def compile_train_step(self):
        """`train_step` jitted, its state donated; call it under `jax.set_mesh(mesh)`."""
        out = (self.state_shardings, None)
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=out)

    def eval_sums(self, params: Params, batch: Batch) -> jax.Array:
        """(cross entropy in nats, label weight), each summed over a Batch_MBT, which streams through a pipeline."""
        doors, (count, _, _) = self.doors(), batch.tokens.shape

        def run(params: Params, batch: Batch) -> jax.Array:
            used = self.use(doors, params)
            if self.stages > 1:
                sums = self._engine(doors, count, forward=True).sums(self._of_engine(used), (batch, None))
            else:
                parts = [jax.tree.map(lambda x: x[i], batch) for i in range(count)]  # noqa: B023 (used at once)
                sums = sum((self._sums(doors, used, part, None) for part in parts), start=jnp.zeros(3))
            return doors.sum_over("BT", sums[1:])

        with self.exact():
            return self.mapped(run, (self.stored_specs, self.batch_spec), P())(params, batch)

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


def _zeros(sharded: bool, shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=shape.sharding if sharded else None)
