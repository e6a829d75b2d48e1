"""The transformer, from typed parts: GPT-2, Llama 3 and what lies between are configs of it.

`Model` is static: the abstract modules, their weights' declarations, and pure functions over a plain
dict of arrays. Layers of a kind are one module with a leading L on every weight; `lax.scan` runs them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mtx.attention import Attention, AttentionConfig, Cache
from mtx.errors import Problem
from mtx.layers import (
    Context,
    Gelu,
    LayerNorm,
    Learned,
    RMSNorm,
    Rotary,
    Slots,
    SwiGLU,
    add_bias,
    dropout,
    vector,
    weight,
)
from mtx.layout import Placement
from mtx.spmd import Activations, Params, relay, this_stage
from mtx.stacks import PARTS, Block, Stack, repeated_name
from mtx.sums import Sums, as_declared, in_order, of_kinds, over_layers
from pallas_kernels.masks import Mask
from pallas_kernels.threefry import Words


class Batch(NamedTuple):
    """What the model reads: rows of tokens; all arrays are _BT, int32 but for `weights`."""

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    """float32 weight of each target in the loss; 0 for padding."""
    segments: jax.Array
    """Which document of the row a token belongs to, from 1; 0 is padding."""
    positions: jax.Array
    """Position within the document (or the row)."""
    prefix: jax.Array | None = None
    """Where in the row a token's prefix ends, which it sees; only with an objective that has prefixes."""
    types: jax.Array | None = None
    """Which of two texts a token is of, 0 or 1; only for models that read pairs."""
    label: jax.Array | None = None
    """Whether the two do not belong together, 0 or 1, the same in all of a row."""


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A pre-norm transformer; the defaults are GPT-2's choices."""

    vocab_size: int
    """Tokens that exist. The table is padded to vocab_multiple, and the padding is masked."""
    layers: int
    """Number of layers L, of all stacks together."""
    width: int
    """Model width D."""
    attention: AttentionConfig
    """Self-attention of every layer whose block has none of its own."""
    mlp: Gelu | SwiGLU
    """Feed-forward part of every layer whose block has none of its own: a type that builds it."""
    stacks: tuple[Stack, ...] | None = None
    """Layers of several kinds, stack after stack; None: all layers are alike, one stack `main` of one `block`."""
    norm: LayerNorm | RMSNorm = LayerNorm()
    """Before attention, before feed-forward, and at the end."""
    positions: Learned | Rotary = Learned()
    """How a token knows its place."""
    causal: bool = True
    """A token sees only what is before it; False: an encoder."""
    pairs: bool = False
    """Reads pairs of texts: an embedding for each of the two, and a head that tells from the first token whether they
    belong together (Devlin et al. 2018)."""
    bias: bool = True
    """Biases on the projections."""
    tied_head: bool = True
    """The output projection is the embedding table."""
    dropout: float = 0.0
    """On the embedding and on each residual branch."""
    attention_dropout: float = 0.0
    """On attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    init_scale_residual: bool = True
    """Divide init_std of the residual projections by sqrt(2 layers) (Radford et al. 2019, section 2.3)."""
    vocab_multiple: int = 128
    """The padded vocabulary is a multiple of this."""
    remat: Literal["none", "selective", "full", "stage"] = "none"
    """What the backward pass computes again: nothing, attention's inside, or whole layers. stage, for the least memory:
    of a pipeline's stages only inputs are kept, and their layers computed twice again; without a pipeline, as full."""
    unroll: int = 1
    """Repetitions of a stack's pattern per iteration of its loop: more compile time for fewer iterations."""

    def check(self) -> Iterator[Problem]:
        for field in ("vocab_size", "layers", "width", "vocab_multiple", "unroll"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        for field in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                yield field, "must be at least 0 and below 1"
        if self.init_std <= 0:
            yield "init_std", "must be positive"
        for path, config in {kind.path("attention"): kind.config for kind in self.kinds}.items():
            heads = config.attention.heads
            if config.attention.head_size is None and heads > 0 and self.width % heads:
                legal = [n for n in range(1, self.width + 1) if self.width % n == 0]
                nearest = " or ".join(map(str, sorted(sorted(legal, key=lambda n: abs(n - heads))[:2])))
                yield f"{path}.heads", f"does not divide width={self.width}; try {nearest}, or set head_size"
            elif isinstance(self.positions, Rotary) and heads > 0 and config.head_size % 2:
                yield f"{path}.head_size", "must be even for rotary positions"
        if self.stacks is None and self.layers > 0 and self.unroll > 0 and self.layers % self.unroll:
            yield "unroll", f"must divide layers={self.layers}"
        if self.stacks is not None:
            yield from self._check_stacks(self.stacks)

    def _check_stacks(self, stacks: tuple[Stack, ...]) -> Iterator[Problem]:
        if not stacks:
            yield "stacks", "holds no stack; None means layers that are all alike"
        elif twice := repeated_name([stack.name for stack in stacks]):
            yield "stacks", f"names two stacks {twice!r}; give each a name of its own"
        elif self.layers != (total := sum(stack.count * len(stack.pattern) for stack in stacks)):
            yield "layers", f"must be {total}, the layers of all stacks"
        for stack in stacks:
            if self.unroll > 0 and stack.count % self.unroll:
                yield "unroll", f"must divide the {stack.count} repetitions of stack {stack.name!r}"

    @property
    def head_size(self) -> int:
        return self.attention.head_size or self.width // self.attention.heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kinds(self) -> "tuple[Kind, ...]":
        """The kinds of its layers, stack by stack."""
        return tuple(kind for kinds in self.repeated for kind in kinds)

    @property
    def repeated(self) -> "tuple[tuple[Kind, ...], ...]":
        """The kinds of layer of each stack, in the order in which a repetition of its pattern runs them."""
        found, first = [], 0
        for i, stack in enumerate((Stack(name="main", count=self.layers),) if self.stacks is None else self.stacks):
            kinds = []
            for j, block in enumerate(stack.pattern):
                own = {part: value for part in PARTS if (value := getattr(block, part)) is not None}
                config, at = replace(self, stacks=None, **own), f"stacks[{i}].pattern[{j}]"
                kinds.append(Kind(config, stack.name, block, at, first + j, len(stack.pattern), stack.count))
            found.append(tuple(kinds))
            first += stack.count * len(stack.pattern)
        return tuple(found)


@dataclass(frozen=True)
class Kind:
    """The layers that one block of a stack's pattern describes: one in each of its repetitions."""

    config: Transformer
    """The model's, with the block's parts in place of the model's own."""
    stack: str
    block: Block
    at: str
    """Where the model's config has the block."""
    first: int
    """Number, among all of the model's layers, of the first one."""
    step: int
    """Layers from one to the next: the blocks of the pattern."""
    count: int

    @property
    def name(self) -> str:
        return f"{self.stack}/{self.block.name}"

    @property
    def numbers(self) -> np.ndarray:
        """int [count]: the numbers of its layers among all of the model's."""
        return self.first + self.step * np.arange(self.count)

    def of(self, tree: Mapping[str, Mapping[str, Any]]) -> Any:
        """Returns the entry of this kind in a tree by stack and block."""
        return tree[self.stack][self.block.name]

    def path(self, part: str) -> str:
        """Where the model's config says this part of the layers: in the block, or for all."""
        return part if getattr(self.block, part) is None else f"{self.at}.{part}"

    def ring(self, slots: int) -> int | None:
        """Slots of a cache of each row's last tokens, which a window sees; None if it keeps so many tokens anyway."""
        window = self.config.attention.window
        return window if window is not None and window < slots else None

    def mask(self, documents: bool, prefix: bool = False) -> Mask:
        """Returns the mask of these layers: what a token sees."""
        return self.config.attention.mask(causal=self.config.causal, documents=documents, prefix=prefix)


class Ends(nnx.Module):
    """What is not in the layer stack: embeddings, final norm, head."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        V, D, init = config.padded_vocab, config.width, initializers.normal(config.init_std)
        self.config = config
        self.token_VD = weight(rngs, "VD", (V, D), init, role="embedding")
        if isinstance(config.positions, Learned):
            self.position_CD = weight(rngs, "CD", (config.positions.length, D), init, role="embedding")
        if config.pairs:
            self.type_CD = weight(rngs, "CD", (2, D), init, role="embedding")
            self.pool_DQ = weight(rngs, "DQ", (D, D), init, meets="BD")
            self.pool_bias_Q = vector(rngs, "Q", (D,), 0.0, meets="BQ")
            self.answer_QA = weight(rngs, "QA", (D, 2), init, meets="BQ")
            self.answer_bias_A = vector(rngs, "A", (2,), 0.0, meets="BA")
        self.norm = config.norm.build(D, rngs)
        if not config.tied_head:
            self.head_VD = weight(rngs, "VD", (V, D), init, role="head")

    def embed(self, token_BT: jax.Array, context: Context) -> jax.Array:
        x_BTD = context.doors.embed(token_BT, self.token_VD)
        if isinstance(self.config.positions, Learned):
            x_BTD = x_BTD + context.doors.embed(context.position_BT, self.position_CD)
        if self.config.pairs:
            assert context.type_BT is not None
            x_BTD = x_BTD + context.doors.embed(context.type_BT, self.type_CD)
        return dropout(x_BTD, self.config.dropout, context, "embedding")

    def answer(self, first_BD: jax.Array, doors: Activations) -> jax.Array:
        """Float32 logits_BA of whether a pair belongs together (0) or not (1), from the first token's final norm."""
        pooled_BQ = jnp.tanh(add_bias(doors.project("BD,DQ->BQ", first_BD, self.pool_DQ), self.pool_bias_Q))
        logits_BA = add_bias(doors.project("BQ,QA->BA", pooled_BQ, self.answer_QA), self.answer_bias_A)
        return logits_BA.astype(jnp.float32)

    @property
    def head(self) -> nnx.Param:
        return self.token_VD if self.config.tied_head else self.head_VD


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    def __init__(self, config: Transformer, rngs: nnx.Rngs):
        self.dropout = config.dropout
        scale = 1 / math.sqrt(2 * config.layers) if config.init_scale_residual else 1.0
        std, out_std = config.init_std, config.init_std * scale
        rotary = config.positions if isinstance(config.positions, Rotary) else None
        self.norm_attention = config.norm.build(config.width, rngs)
        self.attention = Attention(
            config.attention,
            config.width,
            config.bias,
            rotary,
            config.attention_dropout,
            config.remat == "selective",
            std,
            out_std,
            rngs,
        )
        self.norm_mlp = config.norm.build(config.width, rngs)
        self.mlp = config.mlp.build(config.width, config.bias, std, out_std, rngs)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Sums, Cache | None]:
        y_BTD, cache = self.attention(self.norm_attention(x_BTD), context, cache)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, context, "attention_out")
        y_BTD, sums = self.mlp(self.norm_mlp(x_BTD), context)
        return x_BTD + dropout(y_BTD, self.dropout, context, "mlp_out"), sums, cache


Step: TypeAlias = Callable[[jax.Array, Any, Params, Any, Any], tuple[jax.Array, Any, Sums]]
"""(x, own, a layer's weights, its number, its row in its kind's weights on this stage) -> (x, own, sums)."""


class Model:
    """A config's modules, built abstractly once, as pure functions over a dict of arrays.

    `placement` is where a pipeline has its layers, which are of one kind; by default there is none.
    """

    def __init__(self, config: Transformer, placement: Placement | None = None):
        self.config, self.placement = config, placement or Placement.even(config.layers)
        self.kinds = config.kinds
        assert sum(self.placement.counts) == config.layers == sum(kind.count for kind in self.kinds)
        assert len(self.kinds) == 1 or self.placement.stages == 1, "a pipeline places layers of one kind"
        self._ends = nnx.split(nnx.eval_shape(lambda: Ends(config, nnx.Rngs(params=0))))
        layers = self.by_kind(lambda kind: nnx.eval_shape(partial(_layer, kind)))
        self._layers = self.by_kind(lambda kind: nnx.split(kind.of(layers)))
        self._statistics = self.by_kind(lambda kind: kind.of(layers).mlp.statistics)
        self.statistics = of_kinds({kind.name: kind.of(self._statistics) for kind in self.kinds})

    def by_kind(self, f: Callable[[Kind], Any]) -> dict[str, dict[str, Any]]:
        """{stack: {block: f(kind)}}."""
        return {kinds[0].stack: {kind.block.name: f(kind) for kind in kinds} for kinds in self.config.repeated}

    @cached_property
    def weights(self) -> Params:
        """The declaration of every weight, as a nested dict; layers' have a leading L, the rows of `placement`."""
        return self._declared(lambda kind: len(self._layer_of_row(kind)))

    @cached_property
    def ordered_weights(self) -> Params:
        """The same with the layers in their own order, as checkpoints have them."""
        return self._declared(lambda kind: kind.count)

    def _declared(self, rows: Callable[[Kind], int]) -> Params:
        def stacked(kind: Kind) -> Params:
            declared = _declarations(kind.of(self._layers)[1])
            return _map(lambda w: replace(w, dims="L" + w.dims, shape=(rows(kind), *w.shape)), declared)

        return {"ends": _declarations(self._ends[1]), "stacks": self.by_kind(stacked)}

    def _layer_of_row(self, kind: Kind) -> np.ndarray:
        """int [rows]: the number of the layer in each row of a kind's weights; -1 for a row without one."""
        return self.placement.layer_of_row if len(self.kinds) == 1 else kind.numbers

    def init(self, key: jax.Array) -> Params:
        """Initial weights in float32: pure, to be jitted with out_shardings; equal on every mesh."""

        def layer(kind: Kind, i: jax.Array) -> Params:
            arrays = _arrays(_layer(kind, jax.random.fold_in(key, jnp.maximum(i, 0))))
            return arrays if self.placement.is_even else _map(lambda x: jnp.where(i < 0, 0.0, x), arrays)

        ends = _arrays(Ends(self.config, nnx.Rngs(params=jax.random.fold_in(key, self.config.layers))))
        stacks = self.by_kind(lambda kind: jax.vmap(partial(layer, kind))(jnp.asarray(self._layer_of_row(kind))))
        return {"ends": ends, "stacks": stacks}

    def context(self, batch: Batch, doors: Activations, mask: Mask, key_B: Words | None) -> Context:
        """What the layers share. `key_B` turns dropout on."""
        config = self.config
        dropped = config.dropout > 0 or config.attention_dropout > 0
        key_B = key_B if dropped else None
        return Context(doors, mask, batch.segments, batch.positions, key_B, batch.prefix, batch.types)

    def embed(self, ends: Params, token_BT: jax.Array, context: Context) -> jax.Array:
        """x_BTD, which the first layer reads."""
        return _merge(self._ends, ends).embed(token_BT, context)

    def layer(
        self, kind: Kind, weights: Params, x_BTD: jax.Array, context: Context, number: jax.Array | int
    ) -> tuple[jax.Array, Sums]:
        """x_BTD after one layer, and the values of its kind's statistics; `weights` are that layer's, without L."""
        x_BTD, sums, _ = _merge(kind.of(self._layers), weights)(x_BTD, replace(context, layer=number))
        return x_BTD, as_declared(kind.of(self._statistics), sums)

    def norm(self, ends: Params, x_BTD: jax.Array) -> jax.Array:
        """What head and loss read of the last layer's x_BTD."""
        return _merge(self._ends, ends).norm(x_BTD)

    def hidden(
        self, params: Params, batch: Batch, doors: Activations, masks: Sequence[Mask], key_B: Words | None
    ) -> tuple[jax.Array, Sums]:
        """x_BTD of the residual stream after the final norm, and the sums of all layers. `masks` are those of `kinds`;
        `key_B` turns dropout on.

        With several pipeline stages there are no sums: the engine puts them together.
        """
        context = self.context(batch, doors, masks[0], key_B)

        def step(kind: Kind, context: Context) -> Step:
            context = replace(context, mask=masks[self.kinds.index(kind)])

            def layer(x_BTD: jax.Array, weights: Params, number: jax.Array) -> tuple[jax.Array, Sums]:
                return self.layer(kind, weights, x_BTD, context, number)

            if self.config.remat in ("full", "stage"):
                layer = jax.checkpoint(layer, prevent_cse=context.doors.unrolled)

            def run(x_BTD: jax.Array, own: None, weights: Params, number: Any, row: Any) -> tuple[Any, None, Sums]:
                x_BTD, sums = layer(x_BTD, weights, number)
                return x_BTD, own, sums

            return run

        x_BTD = self.embed(params["ends"], batch.tokens, context)
        x_BTD, _, sums = self._through(params, context, step, x_BTD, self.by_kind(lambda kind: None))
        return self.norm(params["ends"], x_BTD), over_layers(self.statistics, sums)

    def _through(
        self, params: Params, context: Context, make: Callable[[Kind, Context], Step], x: jax.Array, own: Any
    ) -> tuple[jax.Array, Any, Sums]:
        """(x, own, sums) through all layers, each kind's by the step that `make` gives; sums are stacked, and there
        are none with several pipeline stages.

        `own`, by stack and block, stays where it is; x goes from stage to stage of a pipeline, where this is not
        differentiated.
        """
        place = self.placement
        if place.stages == 1:
            found = []
            for kinds in self.config.repeated:
                stack = kinds[0].stack
                x, there, sums = self._repeat(kinds, params["stacks"][stack], context, make, x, own[stack])
                own = {**own, stack: there}
                found.append(sums)
            return x, own, in_order(found)

        (kind,) = self.kinds
        weights_R, step = kind.of(params["stacks"]), make(kind, context)

        def chunk(i: jax.Array, now: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            at = this_stage(place, i)

            def layer(now: tuple[jax.Array, Any], j: jax.Array) -> tuple[Any, None]:
                def run() -> tuple[jax.Array, Any]:
                    weights = jax.tree.map(lambda w: w[at.row + j], weights_R)
                    return step(*now, weights, at.layer + j, at.row + j)[:2]

                return (run() if place.is_even else jax.lax.cond(j < at.count, run, lambda: now)), None

            return jax.lax.scan(layer, now, jnp.arange(place.size), unroll=self.config.unroll)[0]

        x, there = relay(place, chunk, x, kind.of(own))
        return x, self.by_kind(lambda _: there), {}

    def _repeat(
        self,
        kinds: tuple[Kind, ...],
        weights: Params,
        context: Context,
        make: Callable[[Kind, Context], Step],
        x: jax.Array,
        own: dict[str, Any],
    ) -> tuple[jax.Array, dict[str, Any], list[Sums]]:
        """(x, own, sums_L of each kind) through a stack: one loop over the repetitions of its pattern, whatever their
        count."""
        unroll, count = self.config.unroll, kinds[0].count
        context = replace(context, doors=replace(context.doors, unrolled=unroll >= count))
        steps = [(kind, make(kind, context)) for kind in kinds]

        def pattern(now: tuple[jax.Array, dict], xs: tuple[Params, list, jax.Array]) -> tuple[tuple, list[Sums]]:
            (x, own), (weights, numbers, row), each = now, xs, []
            for (kind, step), number in zip(steps, numbers, strict=True):
                name = kind.block.name
                x, there, sums = step(x, own[name], weights[name], number, row)
                own = {**own, name: there}
                each.append(sums)
            return (x, own), each

        numbers_L = [jnp.arange(kind.first, kind.first + kind.step * count, kind.step) for kind in kinds]
        xs = (weights, numbers_L, jnp.arange(count))
        (x, own), sums = jax.lax.scan(pattern, (x, own), xs, unroll=unroll)
        return x, own, sums

    def answer(self, ends: Params, first_BD: jax.Array, doors: Activations) -> jax.Array:
        """Float32 logits_BA for pairs, from the first token of `hidden`'s result."""
        return _merge(self._ends, ends).answer(first_BD, doors)

    def head(self, ends: Params) -> nnx.Param:
        """The output projection, token_VD or its own."""
        return _merge(self._ends, ends).head

    def logits(self, params: Params, batch: Batch, doors: Activations, masks: Sequence[Mask]) -> jax.Array:
        """Float32 logits_BTV over the padded vocabulary (V is this rank's part of it)."""
        return self.unembed(params, self.hidden(params, batch, doors, masks, None)[0], doors)

    def unembed(self, params: Params, h_BTD: jax.Array, doors: Activations) -> jax.Array:
        """Float32 logits_BTV of `hidden`'s result."""
        w_VD = doors.storage.for_use(self.head(params["ends"]))
        return doors.local_einsum("BTD,VD->BTV", doors.enter(h_BTD, "V"), w_VD, jnp.float32)

    def cache(self, rows: int, slots: int, doors: Activations) -> dict[str, dict[str, Cache]]:
        """An empty cache of each kind, for B rows, of all batch shards together, and S tokens, or those of a window."""

        def one(kind: Kind) -> Cache:
            attention, layers = kind.config.attention, len(self._layer_of_row(kind))
            shape = (
                layers,
                rows,
                kind.ring(slots) or slots,
                attention.kv_heads or attention.heads,
                kind.config.head_size,
            )
            return Cache(*(doors.zeros("LBSKH", shape, doors.compute) for _ in Cache._fields))

        return self.by_kind(one)

    def cached(
        self,
        params: Params,
        token_BT: jax.Array,
        position_BT: jax.Array,
        slots: Callable[[Kind], Slots],
        cache: dict[str, dict[str, Cache]],
        doors: Activations,
    ) -> tuple[jax.Array, dict[str, dict[str, Cache]]]:
        """`hidden` of T more tokens, which go into these slots of each kind's cache."""
        context = Context(doors, self.masks(documents=False)[0], token_BT, position_BT, None)
        ends = _merge(self._ends, params["ends"])

        def step(kind: Kind, context: Context) -> Step:
            context = replace(context, slots=slots(kind))

            def layer(x_BTD: jax.Array, cache: Cache, weights: Params, number: Any, row: Any) -> tuple[Any, Any, Sums]:
                own = replace(context, layer=number, row=row)
                x_BTD, _, cache = _merge(kind.of(self._layers), weights)(x_BTD, own, cache)
                return x_BTD, cache, {}

            return layer

        x_BTD, cache, _ = self._through(params, context, step, ends.embed(token_BT, context), cache)
        return ends.norm(x_BTD), cache

    def masks(self, documents: bool, prefix: bool = False) -> tuple[Mask, ...]:
        """Returns the masks of `kinds`: what a token sees in their layers."""
        return tuple(kind.mask(documents, prefix) for kind in self.kinds)


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"stacks/main/block/mlp/in_DF": leaf}`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def _layer(kind: Kind, key: jax.Array | int = 0) -> Layer:
    return Layer(kind.config, nnx.Rngs(params=key))


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def _map(f, tree: Params) -> Params:
    return {name: _map(f, value) if isinstance(value, dict) else f(value) for name, value in tree.items()}


def _declarations(state: nnx.State) -> Params:
    return unflatten(
        {"/".join(map(str, path)): variable.get_metadata()["weight"] for path, variable in nnx.to_flat_state(state)}
    )


def _arrays(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(module)[1])


def _merge(split: tuple, params: Params):
    graph, state = split
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)
