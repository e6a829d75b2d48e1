"""Text from a model: the prompts in one pass, then a token at a time with a cache of keys and values.

Slots of the cache: the prompts but for their last tokens, padded on the right to a common length, then one
slot per step that all rows write together. A row's positions are its own, so slots and positions differ;
which slots a row sees is said explicitly. Layers with a window keep a row's last tokens alone: the slot of a
token is its position modulo the window.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.errors import ConfigError, Problem
from mtx.layers import Learned, Slots
from mtx.layout import RESIDUAL_TIME, BoundLayout, Layout
from mtx.model import Kind
from mtx.spmd import Activations, Params
from mtx.step import Program
from pallas_kernels.masks import sees
from pallas_kernels.threefry import threefry2x32

NEVER = -1e30
"""Logit of a token that must not be sampled: finite, so that no NaN can come of it."""
SAMPLING = np.uint32(2)
"""Keeps these random words apart from dropout's (`step.sequence_keys`) at an equal seed."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: logits divided by the temperature, then top_k, then top_p of what is left."""

    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int | None = None
    """Only the k most probable tokens."""
    top_p: float | None = None
    """Only the most probable tokens that together reach this probability (Holtzman et al. 2020)."""

    def check(self) -> Iterator[Problem]:
        if not 0.0 <= self.temperature < float("inf"):
            yield "temperature", "must be a finite number and at least 0; 0 takes the most probable token"
        if self.top_k is not None and self.top_k < 1:
            yield "top_k", "must be at least 1"
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            yield "top_p", "must be above 0 and at most 1"


class Prompts(NamedTuple):
    """What a compiled call reads: rows of right-padded tokens, of all batch shards together."""

    tokens_BT: jax.Array
    """Prompts without their last tokens."""
    last_B: jax.Array
    length_B: jax.Array
    """Tokens of each prompt, the last one included; 0 is a row without a prompt."""
    number_B: jax.Array
    """uint32: which prompt of the call this is."""


def generate(
    program: Program,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Up to `tokens` new tokens after each prompt, which is one document; they end before a `stop`.

    Only tokens below `vocab_size` are made: those of a tokenizer that has fewer than the model (None: the model's).
    A token's randomness depends on (seed, number of the prompt, position) alone: mesh, padding and the other
    prompts change it by rounding at most. Compiled once per program, sampling and power of two of each of rows
    per batch shard, prompt length and new tokens.

    Raises: ConfigError if the model is no decoder, if its table of positions is too short, or for `sampling`.
    """
    refuse(program, [len(prompt) for prompt in prompts], tokens, sampling)
    known = program.model.config.vocab_size
    assert all(0 <= token < known for prompt in prompts for token in prompt)
    if not prompts:
        return []
    arrays = _arrange(prompts, program.layout.size(*program.layout.batch_axes))
    with jax.set_mesh(program.mesh):
        placed = Prompts(*(_put(program, x) for x in arrays))
        count, end = np.int32(tokens), np.int32(-1 if stop is None else stop)
        decode = compiled(program, sampling, power_of_two(tokens), min(vocab_size or known, known))
        out_BT = decode(params, placed, count, np.uint32(seed), end)
        rows = np.asarray(out_BT)[: len(prompts), :tokens].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def refuse(program: Program, lengths: Sequence[int], tokens: int, sampling: Sampling) -> None:
    """Raises: ConfigError for what `generate` cannot do."""
    config = program.model.config
    for field, why in sampling.check():
        raise ConfigError(f"{field}={getattr(sampling, field)} {why}.")
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be at least 1.")
    if not config.causal:
        raise ConfigError(
            "model.causal=false is an encoder, which cannot continue a text; train with model.causal=true."
        )
    assert all(lengths), "a prompt has at least one token"
    longest = max(lengths, default=0)
    if isinstance(config.positions, Learned) and longest + tokens > (table := config.positions.length):
        fits = f"at most {table - longest} tokens" if longest < table else f"a prompt below {table} tokens"
        raise ConfigError(
            f"a prompt of {longest} tokens and {tokens} new ones do not fit the table of positions "
            f"(model.positions.length={table}); try {fits}."
        )
    if longest + tokens > (reach := min(mask.reach() for mask in program.model.masks(False))):
        raise ConfigError(
            f"a prompt of {longest} tokens and {tokens} new ones do not fit the {reach} positions of "
            "model.attention.pattern.rows; try fewer tokens, or a shorter prompt."
        )


def power_of_two(size: int) -> int:
    """The least power of two that holds `size`; 0 holds 0."""
    return 1 << (size - 1).bit_length() if size else 0


def _arrange(prompts: Sequence[Sequence[int]], shards: int) -> tuple[np.ndarray, ...]:
    """`Prompts` on the host, each size a power of two (rows: for each batch shard)."""
    rows = shards * power_of_two(-(-len(prompts) // shards))
    length_B, last_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    tokens_BT = np.zeros((rows, power_of_two(max(map(len, prompts)) - 1)), np.int32)
    for row, prompt in enumerate(prompts):
        length_B[row], last_B[row] = len(prompt), prompt[-1]
        tokens_BT[row, : len(prompt) - 1] = prompt[:-1]
    return tokens_BT, last_B, length_B, np.arange(rows, dtype=np.uint32)


def _put(program: Program, x: np.ndarray) -> jax.Array:
    """A host array, alike on every process, split by its rows."""
    rows = program.layout.activation("B" if x.ndim == 1 else "BT")
    return jax.make_array_from_callback(x.shape, program.sharding(rows), lambda index: x[index])


Decode: TypeAlias = Callable[[Params, Prompts, np.int32, np.uint32, np.int32], jax.Array]
"""(params, prompts, new tokens, seed, stop or -1) -> tokens_BT, whole on every device."""


@functools.lru_cache(maxsize=16)
def compiled(program: Program, sampling: Sampling, most: int, vocab_size: int) -> Decode:
    """The jitted call for up to `most` new tokens, all below `vocab_size`; call it under `jax.set_mesh`."""
    program = replace(program, layout=whole_time(program.layout))
    specs: list[Any] = [program.layout.activation(letters) for letters in ("BT", "B", "B", "B")]
    specs = [program.stored_specs, Prompts(*specs), P(), P(), P()]

    def decode(params: Params, prompts: Prompts, count: jax.Array, seed: jax.Array, stop: jax.Array) -> jax.Array:
        run = functools.partial(_decode, program, sampling, most, vocab_size)
        with program.exact():
            out_BT = program.mapped(run, tuple(specs), program.rows_spec)(params, prompts, count, seed, stop)
        return jax.reshard(out_BT, P(None, None))

    return jax.jit(decode)


def whole_time(layout: BoundLayout) -> BoundLayout:
    """The layout that splits no time: the same stored weights, but one token cannot be split."""
    rows = tuple(
        replace(row, activations=()) if row.dimension in ("time", RESIDUAL_TIME) else row
        for row in layout.layout.table()
    )
    return replace(layout, layout=Layout(rows=rows, scatter=layout.layout.scatter))


class Loop(NamedTuple):
    """What a step changes."""

    step: jax.Array
    token_B: jax.Array
    """The newest token of each row, not in the cache yet."""
    cache: Any
    """A Cache by stack and block."""
    out_BT: jax.Array
    done_B: jax.Array
    running: jax.Array
    """How many rows, on every mesh rank alike, are not done: all must leave the loop together."""


def _decode(
    program: Program,
    sampling: Sampling,
    most: int,
    vocab_size: int,
    params: Params,
    prompts: Prompts,
    count: jax.Array,
    seed: jax.Array,
    stop: jax.Array,
) -> jax.Array:
    """out_BT of this rank's rows, inside the Manual region where there is one."""
    doors, model = program.doors(), program.model
    params = program.use(doors, params)
    shards = 1 if doors.global_shapes else program.layout.size(*program.layout.batch_axes)
    rows, filled = prompts.tokens_BT.shape[0] * shards, prompts.tokens_BT.shape[1]

    def step(now: Loop) -> Loop:
        position_B = jnp.maximum(prompts.length_B - 1, 0) + now.step
        slots = functools.partial(_next_slots, prompts.length_B, filled, now.step, most, doors)
        token_B1, position_B1 = now.token_B[:, None], position_B[:, None]
        h_BTD, cache = model.cached(params, token_B1, position_B1, slots, now.cache, doors)
        logits_BV = _next_logits(program, params, h_BTD, doors)[:, :vocab_size]
        token_B = draw(sampling, logits_BV, seed, prompts.number_B, position_B + 1)
        out_BT = lax.dynamic_update_slice_in_dim(now.out_BT, token_B[:, None], now.step, axis=1)
        done_B = now.done_B | (token_B == stop)
        return Loop(now.step + 1, token_B, cache, out_BT, done_B, _count(doors, ~done_B))

    cache = _prefill(program, params, prompts, model.cache(rows, filled + most, doors), filled + most, doors)
    done_B = prompts.length_B == 0
    start = Loop(
        step=jnp.zeros((), jnp.int32),
        token_B=prompts.last_B,
        cache=cache,
        out_BT=doors.zeros("BT", (rows, most), jnp.int32),
        done_B=done_B,
        running=_count(doors, ~done_B),
    )
    return lax.while_loop(lambda now: (now.step < count) & (now.running > 0), step, start).out_BT


def _count(doors: Activations, where_B: jax.Array) -> jax.Array:
    return doors.sum_over("B", jnp.sum(where_B, dtype=jnp.int32))


def _prefill(program: Program, params: Params, prompts: Prompts, cache: Any, size: int, doors: Activations) -> Any:
    """The cache with all of the prompts but their last tokens. Padding is computed and never seen."""
    time = prompts.tokens_BT.shape[1]
    if time == 0:
        return cache
    last_B1 = jnp.maximum(prompts.length_B - 1, 0)[:, None]
    position_BT = jnp.minimum(jnp.arange(time)[None], last_B1)  # padding may reach beyond a learned table
    slots = functools.partial(_prompt_slots, prompts.length_B, time, size, doors)
    return program.model.cached(params, prompts.tokens_BT, position_BT, slots, cache, doors)[1]


def _prompt_slots(length_B: jax.Array, time: int, size: int, doors: Activations, kind: Kind) -> Slots:
    """Slots of the prompts but for their last tokens, in an empty cache for `size` tokens."""
    mask, ring = kind.mask(documents=False), kind.ring(size)
    i_T, s_S = jnp.arange(time), jnp.arange(size if ring is None else time)
    shape = (min(size, mask.reach()),) * 2  # padding may reach beyond a pattern
    seen_BTS = ((i_T[:, None] >= s_S) & sees(mask, i_T[:, None], s_S, shape))[None]
    if ring is None:
        return Slots(seen_BTS)

    def taken(length_B: jax.Array) -> jax.Array:
        return jnp.maximum(_held(jnp.maximum(length_B - 1, 0) - 1, ring), -1)

    return Slots(seen_BTS, token_BS=doors.local(taken, ("B",), "BS", length_B), alone=True)


def _held(newest_B: jax.Array, ring: int) -> jax.Array:
    """position_BS of the token in each slot of a ring, the newest one at `newest_B`; below 0 there is none yet."""
    newest_B1 = newest_B[:, None]
    return newest_B1 - (newest_B1 - jnp.arange(ring)) % ring


def _next_slots(length_B: jax.Array, filled: int, step: jax.Array, most: int, doors: Activations, kind: Kind) -> Slots:
    """The slot of a row's new token, and what it sees: of the prompt, of what was made of it, and itself."""
    mask, size = kind.mask(documents=False), filled + most
    ring, shape = kind.ring(size), (min(size, mask.reach()),) * 2

    def held(length_B: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its position_B1, and position_BS of all slots: below 0 where nothing is."""
        own_B, s_S = jnp.maximum(length_B - 1, 0), jnp.arange(size)  # own_B: where what is made of a row begins
        if ring is not None:
            return (own_B + step)[:, None], _held(own_B + step, ring)
        own_B1 = own_B[:, None]
        written_BS = (s_S < jnp.minimum(own_B1, filled)) | ((s_S >= filled) & (s_S <= filled + step))
        return own_B1 + step, jnp.where(written_BS, jnp.where(s_S < filled, s_S, own_B1 + s_S - filled), -1)

    def seen(length_B: jax.Array, step: jax.Array) -> jax.Array:
        position_B1, held_BS = held(length_B, step)
        return ((held_BS >= 0) & sees(mask, position_B1, jnp.maximum(held_BS, 0), shape))[:, None]

    def taken(length_B: jax.Array, step: jax.Array) -> jax.Array:
        position_B1, held_BS = held(length_B, step)
        return jnp.where(held_BS == position_B1, 0, -1)

    step = jnp.asarray(step)
    seen_BTS = doors.local(seen, ("B", ""), "BTS", length_B, step)
    if ring is None:
        return Slots(seen_BTS, first=filled + step)
    return Slots(seen_BTS, token_BS=doors.local(taken, ("B", ""), "BS", length_B, step))


def _next_logits(program: Program, params: Params, h_BTD: jax.Array, doors: Activations) -> jax.Array:
    """Logits_BV of the one token of each row, over the padded vocabulary, alike on all ranks that split it."""
    return doors.whole("BTV", "V", program.model.unembed(params, h_BTD, doors))[:, 0]


def draw(
    sampling: Sampling, logits_BV: jax.Array, seed: jax.Array, number_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """token_B at these positions: the largest logit plus Gumbel noise, which is a sample of the softmax."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep(sampling, logits_BV / sampling.temperature)
    return jnp.argmax(logits_BV + gumbel(logits_BV, seed, number_B, position_B), axis=-1).astype(jnp.int32)


def keep(sampling: Sampling, logits_BV: jax.Array) -> jax.Array:
    """Logits with those that top_k and top_p refuse at `NEVER`. What equals the last kept one is kept."""
    V = logits_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < V:
        least_B1 = jnp.sort(logits_BV, axis=-1)[:, V - sampling.top_k, None]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, NEVER)
    if sampling.top_p is not None and sampling.top_p < 1:
        falling_BV = -jnp.sort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        kept_BV = jnp.where(before_BV < sampling.top_p, falling_BV, jnp.inf)  # the first always: 0 is before it
        least_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, NEVER)
    return logits_BV


def gumbel(logits_BV: jax.Array, seed: jax.Array, number_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Standard Gumbel noise_BV, each a function of (seed, prompt number, position, token) alone."""
    key = threefry2x32((seed, SAMPLING), (number_B, position_B.astype(jnp.uint32)))
    v_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.uint32)
    high, low = threefry2x32((key[0][:, None], key[1][:, None]), (v_V, jnp.zeros_like(v_V)))
    # Small numbers decide who wins, so they get their 24 bits too: 64 random bits, read as a fraction in (0, 1).
    fraction = (high.astype(jnp.float32) + (low.astype(jnp.float32) + 0.5) * 2.0**-32) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(fraction, 1 - 2.0**-24)))
