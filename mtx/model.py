"""The transformer, from typed parts: GPT-2, Llama 3 and what lies between are configs of it.

`Model` is static: the abstract modules, their weights' declarations, and pure functions over a plain
dict of arrays. Layers are one module with a leading L on every weight, run by `lax.scan`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from mtx.attention import Attention, AttentionConfig, Cache
from mtx.errors import Problem
from mtx.layers import (
    Context,
    Gelu,
    LayerNorm,
    Learned,
    Mlp,
    RMSNorm,
    Rotary,
    SwiGLU,
    add_bias,
    dropout,
    vector,
    weight,
)
from mtx.layout import Placement
from mtx.spmd import Doors, Params, relay, this_stage
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
    """Number of layers L."""
    width: int
    """Model width D."""
    attention: AttentionConfig
    """Self-attention of every layer."""
    mlp: Gelu | SwiGLU
    """Feed-forward part of every layer."""
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
    """Layers per iteration of the layer loop: more compile time for fewer iterations."""

    def check(self) -> Iterator[Problem]:
        for field in ("vocab_size", "layers", "width", "vocab_multiple", "unroll"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        for field in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, field) < 1.0:
                yield field, "must be at least 0 and below 1"
        if self.init_std <= 0:
            yield "init_std", "must be positive"
        heads = self.attention.heads
        if self.attention.head_size is None and heads > 0 and self.width % heads:
            legal = [n for n in range(1, self.width + 1) if self.width % n == 0]
            nearest = sorted(legal, key=lambda n: abs(n - heads))[:2]
            why = f"does not divide width={self.width}; try {' or '.join(map(str, sorted(nearest)))}, or set head_size"
            yield "attention.heads", why
        elif isinstance(self.positions, Rotary) and heads > 0 and self.head_size % 2:
            yield "attention.head_size", "must be even for rotary positions"
        if self.layers > 0 and self.unroll > 0 and self.layers % self.unroll:
            yield "unroll", f"must divide layers={self.layers}"

    @property
    def head_size(self) -> int:
        return self.attention.head_size or self.width // self.attention.heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


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
            self.pool_DQ = weight(rngs, "DQ", (D, D), init)
            self.pool_bias_Q = vector(rngs, "Q", (D,), 0.0)
            self.answer_QA = weight(rngs, "QA", (D, 2), init)
            self.answer_bias_A = vector(rngs, "A", (2,), 0.0)
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

    def answer(self, x_BTD: jax.Array, doors: Doors) -> jax.Array:
        """Float32 logits_BTA of whether a pair belongs together (0) or not (1), from the final norm's output."""
        pooled_BTQ = jnp.tanh(add_bias(doors.project("BTD,DQ->BTQ", x_BTD, self.pool_DQ), self.pool_bias_Q))
        logits_BTA = add_bias(doors.project("BTQ,QA->BTA", pooled_BTQ, self.answer_QA), self.answer_bias_A)
        return logits_BTA.astype(jnp.float32)

    @property
    def head(self) -> nnx.Param:
        return self.token_VD if self.config.tied_head else self.head_VD


class Block(nnx.Module):
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
        self.mlp = Mlp(config.mlp, config.width, config.bias, std, out_std, rngs)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        y_BTD, cache = self.attention(self.norm_attention(x_BTD), context, cache)
        x_BTD = x_BTD + dropout(y_BTD, self.dropout, context, "attention_out")
        y_BTD = self.mlp(self.norm_mlp(x_BTD), context)
        return x_BTD + dropout(y_BTD, self.dropout, context, "mlp_out"), cache


class Model:
    """A config's modules, built abstractly once, as pure functions over a dict of arrays.

    `placement` is where a pipeline has its layers; by default there is none.
    """

    def __init__(self, config: Transformer, placement: Placement | None = None):
        self.config, self.placement = config, placement or Placement.even(config.layers)
        assert sum(self.placement.counts) == config.layers
        self._ends = nnx.split(nnx.eval_shape(lambda: Ends(config, nnx.Rngs(params=0))))
        self._block = nnx.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(params=0))))

    @cached_property
    def weights(self) -> Params:
        """The declaration of every weight, as a nested dict; layers' have a leading L, the rows of `placement`."""
        return self._declared(self.placement.rows)

    @cached_property
    def ordered_weights(self) -> Params:
        """The same with the layers in their own order, as checkpoints have them."""
        return self._declared(self.config.layers)

    def _declared(self, layers: int) -> Params:
        stack = partial(_map, lambda w: replace(w, dims="L" + w.dims, shape=(layers, *w.shape)))
        return {"ends": _declarations(self._ends[1]), "layers": stack(_declarations(self._block[1]))}

    def init(self, key: jax.Array) -> Params:
        """Initial weights in float32: pure, to be jitted with out_shardings; equal on every mesh."""

        def block(i: jax.Array) -> Params:
            arrays = _arrays(Block(self.config, nnx.Rngs(params=jax.random.fold_in(key, jnp.maximum(i, 0)))))
            return arrays if self.placement.is_even else _map(lambda x: jnp.where(i < 0, 0.0, x), arrays)

        ends = _arrays(Ends(self.config, nnx.Rngs(params=jax.random.fold_in(key, self.config.layers))))
        return {"ends": ends, "layers": jax.vmap(block)(jnp.asarray(self.placement.layer_of_row))}

    def context(self, batch: Batch, doors: Doors, mask: Mask, key_B: Words | None) -> Context:
        """What the layers share. `key_B` turns dropout on."""
        config = self.config
        dropped = config.dropout > 0 or config.attention_dropout > 0
        key_B = key_B if dropped else None
        return Context(doors, mask, batch.segments, batch.positions, key_B, batch.prefix, batch.types)

    def embed(self, ends: Params, token_BT: jax.Array, context: Context) -> jax.Array:
        """x_BTD, which the first layer reads."""
        return _merge(self._ends, ends).embed(token_BT, context)

    def layer(self, weights: Params, x_BTD: jax.Array, context: Context, number: jax.Array | int) -> jax.Array:
        """x_BTD after one layer; `weights` are that layer's, without L."""
        return _merge(self._block, weights)(x_BTD, replace(context, layer=number))[0]

    def norm(self, ends: Params, x_BTD: jax.Array) -> jax.Array:
        """What head and loss read of the last layer's x_BTD."""
        return _merge(self._ends, ends).norm(x_BTD)

    def hidden(self, params: Params, batch: Batch, doors: Doors, mask: Mask, key_B: Words | None) -> jax.Array:
        """x_BTD of the residual stream after the final norm. `key_B` turns dropout on."""
        context = self.context(batch, doors, mask, key_B)

        def layer(x_BTD: jax.Array, weights: Params, number: jax.Array) -> jax.Array:
            return self.layer(weights, x_BTD, context, number)

        if self.config.remat in ("full", "stage"):
            layer = jax.checkpoint(layer, prevent_cse=doors.unrolled)

        def step(x_BTD: jax.Array, own: None, weights: Params, number: Any, row: Any) -> tuple[jax.Array, None]:
            return layer(x_BTD, weights, number), own

        x_BTD, _ = self._through(params, step, self.embed(params["ends"], batch.tokens, context), None)
        return self.norm(params["ends"], x_BTD)

    def _through(self, params: Params, step: Callable[..., tuple[jax.Array, Any]], x: jax.Array, own: Any) -> Any:
        """(x, own) through all layers: `step(x, own, a layer's weights, its number, its row on this stage)`.

        `own` stays where it is; x goes from stage to stage of a pipeline, where this is not differentiated.
        """
        place = self.placement
        if place.stages == 1:

            def layer(now: tuple[jax.Array, Any], xs: tuple[Params, jax.Array]) -> tuple[Any, None]:
                weights, number = xs
                return step(*now, weights, number, number), None

            xs = (params["layers"], jnp.arange(self.config.layers))
            return jax.lax.scan(layer, (x, own), xs, unroll=self.config.unroll)[0]

        def chunk(i: jax.Array, now: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            at = this_stage(place, i)

            def layer(now: tuple[jax.Array, Any], j: jax.Array) -> tuple[Any, None]:
                def run() -> tuple[jax.Array, Any]:
                    weights = jax.tree.map(lambda w: w[at.row + j], params["layers"])
                    return step(*now, weights, at.layer + j, at.row + j)

                return (run() if place.is_even else jax.lax.cond(j < at.count, run, lambda: now)), None

            return jax.lax.scan(layer, now, jnp.arange(place.size), unroll=self.config.unroll)[0]

        return relay(place, chunk, x, own)

    def answer(self, ends: Params, h_BTD: jax.Array, doors: Doors) -> jax.Array:
        """Float32 logits_BTA for pairs, of `hidden`'s result."""
        return _merge(self._ends, ends).answer(h_BTD, doors)

    def head(self, ends: Params) -> nnx.Param:
        """The output projection, token_VD or its own."""
        return _merge(self._ends, ends).head

    def logits(self, params: Params, batch: Batch, doors: Doors, mask: Mask) -> jax.Array:
        """Float32 logits_BTV over the padded vocabulary (V is this rank's part of it)."""
        return self.unembed(params, self.hidden(params, batch, doors, mask, None), doors)

    def unembed(self, params: Params, h_BTD: jax.Array, doors: Doors) -> jax.Array:
        """Float32 logits_BTV of `hidden`'s result."""
        if doors.split("V"):
            h_BTD = doors.enter(h_BTD)
        return doors.local_einsum("BTD,VD->BTV", h_BTD, doors.gather_for_use(self.head(params["ends"])), jnp.float32)

    def cache(self, rows: int, slots: int, doors: Doors) -> Cache:
        """An empty cache for B rows, of all batch shards together, and S slots."""
        attention = self.config.attention
        shape = (self.placement.rows, rows, slots, attention.kv_heads or attention.heads, self.config.head_size)
        return Cache(*(doors.zeros("LBSKH", shape, doors.compute) for _ in Cache._fields))

    def cached(
        self,
        params: Params,
        token_BT: jax.Array,
        position_BT: jax.Array,
        seen_BTS: jax.Array,
        slot: jax.Array | int,
        cache: Cache,
        doors: Doors,
    ) -> tuple[jax.Array, Cache]:
        """`hidden` of T more tokens, which go into the cache from `slot` on and see `seen_BTS` of its slots."""
        mask = self.mask(documents=False)
        context = Context(doors, mask, token_BT, position_BT, None, seen_BTS=seen_BTS, slot=slot)
        ends = _merge(self._ends, params["ends"])

        def step(x_BTD: jax.Array, cache: Cache, weights: Params, number: Any, row: Any) -> tuple[Any, Any]:
            return _merge(self._block, weights)(x_BTD, replace(context, layer=number, row=row), cache)

        x_BTD, cache = self._through(params, step, ends.embed(token_BT, context), cache)
        return ends.norm(x_BTD), cache

    def mask(self, documents: bool, prefix: bool = False) -> Mask:
        """What a token of every layer sees."""
        return self.config.attention.mask(causal=self.config.causal, documents=documents, prefix=prefix)


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"layers/mlp/in_DF": leaf}`."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


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
