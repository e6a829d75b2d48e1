"""Losses over a vocabulary that may be split: logits are never gathered, and never whole in time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtx.errors import Problem
from mtx.spmd import Activations
from mtx.sums import Statistics, Sum

HIDDEN = -1e30
STATISTICS: Statistics = {"objective": Sum("BT->"), "cross_entropy": Sum("BT->"), "labels": Sum("BT->")}
"""Statistics of a loss: what is minimised, the cross entropy in nats, and the labels' weight, which divides both."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Next-token cross entropy, normalised by the sum of label weights over the global batch."""

    chunk_tokens: int = 1024
    """Tokens per device whose logits exist at once."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser (PaLM, Chowdhery et al. 2022, section 5, uses 1e-4)."""

    def check(self) -> Iterator[Problem]:
        if self.chunk_tokens < 1:
            yield "chunk_tokens", "must be at least 1"
        if self.z_loss < 0:
            yield "z_loss", "must not be negative"


def cross_entropy(
    doors: Activations,
    config: CrossEntropy,
    h_BTD: jax.Array,
    table_VD: nnx.Param,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums over this rank's tokens, in float32 nats: the objective (with z-loss), and the loss alone.

    h_BTD is the residual stream after the last norm; table_VD holds at least `vocab_size` rows, and the
    rest are padding that no token can be. The objective alone has a gradient, written by hand: the backward
    pass makes each chunk's logits again from the saved log-normaliser, so that no collective runs twice.
    """
    parts, span = doors.parts("T"), _span(doors, config, target_BT)

    def sums(h_BTD: jax.Array, w_VD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def chunk(totals, xs):
            h_BtD, target_Bt, weight_Bt = xs
            logits_BtV, v = _logits(doors, h_BtD, w_VD, vocab_size)
            nll_Bt, lse_Bt, _ = _nll(doors, logits_BtV, v, target_Bt)
            nll = jnp.sum(nll_Bt * weight_Bt)
            z = config.z_loss * jnp.sum(jnp.square(lse_Bt) * weight_Bt)
            return (totals[0] + nll + z, totals[1] + nll), lse_Bt

        zero = jnp.zeros((), jnp.float32)
        xs = tuple(split_time(x, span, parts) for x in (h_BTD, target_BT, weight_BT))
        (objective, nll), lse_xBt = jax.lax.scan(chunk, (zero, zero), xs)
        return objective, nll, lse_xBt

    @jax.custom_vjp
    def loss(h_BTD: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sums(doors.enter(h_BTD, "V"), doors.storage.for_use(table_VD.replace(table)))[:2]

    def forward(h_BTD, table):
        h_BTD = doors.enter(h_BTD, "V")
        objective, nll, lse_xBt = sums(h_BTD, doors.storage.for_use(table_VD.replace(table)))
        return (objective, nll), (h_BTD, table, lse_xBt)

    def backward(saved, cotangents):
        h_BTD, table, lse_xBt = saved
        w_VD = doors.storage.for_use(table_VD.replace(table))

        def chunk(dw_VD, xs):
            h_BtD, target_Bt, weight_Bt, lse_Bt = xs
            logits_BtV, v = _logits(doors, h_BtD, w_VD, vocab_size)
            p_BtV = jnp.exp(logits_BtV - lse_Bt[..., None])
            slope_Bt = 1.0 + 2.0 * config.z_loss * lse_Bt
            d_BtV = p_BtV * slope_Bt[..., None] - (v == target_Bt[..., None]).astype(jnp.float32)
            d_BtV = (d_BtV * (weight_Bt * cotangents[0])[..., None]).astype(w_VD.dtype)
            dw_VD = dw_VD + doors.local_einsum("BTV,BTD->VD", d_BtV, h_BtD, jnp.float32)
            return dw_VD, doors.local_einsum("BTV,VD->BTD", d_BtV, w_VD)

        xs = (*(split_time(x, span, parts) for x in (h_BTD, target_BT, weight_BT)), lse_xBt)
        dw_VD, dh_xBtD = jax.lax.scan(chunk, jnp.zeros_like(w_VD, jnp.float32), xs)
        dh_BTD = doors.leave(join_time(dh_xBtD, target_BT.shape[1] // parts, parts), "V")
        return dh_BTD.astype(h_BTD.dtype), doors.storage.scatter_gradient(table_VD.weight, dw_VD).astype(table.dtype)

    loss.defvjp(forward, backward)
    objective, nll = loss(h_BTD, table_VD[...])
    return objective, jax.lax.stop_gradient(nll)


def _span(doors: Activations, config: CrossEntropy, target_BT: jax.Array) -> int:
    """Length of a chunk in each device's part of time."""
    B, T = -(-target_BT.shape[0] // doors.parts("B")), target_BT.shape[1] // doors.parts("T")
    span = max(1, config.chunk_tokens // B)
    return -(-T // -(-T // span))  # as many chunks, evenly filled


def _logits(doors: Activations, h_BtD: jax.Array, w_VD: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """(float32 logits_BtV of this rank's part of the vocabulary, its tokens' numbers); padding is hidden."""
    logits_BtV = doors.local_einsum("BTD,VD->BTV", h_BtD, w_VD, jnp.float32)
    v = doors.index("BTV", "V", logits_BtV)
    return jnp.where(v < vocab_size, logits_BtV, HIDDEN), v


def _nll(
    doors: Activations, logits_BtV: jax.Array, v: jax.Array, target_Bt: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(-log p of the targets, log-normaliser, largest logit), each _Bt, over the whole vocabulary."""
    top_Bt = doors.max_over("V", jnp.max(logits_BtV, axis=-1))
    normaliser_Bt = doors.sum_over("V", jnp.sum(jnp.exp(logits_BtV - top_Bt[..., None]), axis=-1))
    lse_Bt = jnp.log(normaliser_Bt) + top_Bt
    hit_BtV = v == target_Bt[..., None]
    nll_Bt = lse_Bt - doors.sum_over("V", jnp.sum(jnp.where(hit_BtV, logits_BtV, 0.0), axis=-1))
    return nll_Bt, lse_Bt, top_Bt


class RowScores(NamedTuple):
    """Scores of each row in evaluation."""

    log_probability: jax.Array
    """float32: log-probability of its targets, in nats, each times its weight, summed."""
    targets: jax.Array
    """int32: its targets with a weight."""
    greedy: jax.Array
    """int32: those of them that were the most probable token, the first of equals."""


def score_rows(
    doors: Activations,
    config: CrossEntropy,
    h_BTD: jax.Array,
    table_VD: nnx.Param,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    vocab_size: int,
) -> RowScores:
    """Scores_B of rows, whose time may be split over ranks; operands as in `cross_entropy`. Not differentiated."""
    w_VD, h_BTD = doors.storage.for_use(table_VD), doors.enter(h_BTD, "V")

    def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, RowScores]:
        h_BtD, target_Bt, weight_Bt = xs
        logits_BtV, v = _logits(doors, h_BtD, w_VD, vocab_size)
        nll_Bt, _lse_Bt, top_Bt = _nll(doors, logits_BtV, v, target_Bt)
        tied_BtV = jnp.where(logits_BtV == top_Bt[..., None], v, vocab_size)
        first_Bt = -doors.max_over("V", jnp.max(-tied_BtV, axis=-1))
        counts_Bt = weight_Bt > 0
        greedy_Bt = counts_Bt & (first_Bt == target_Bt)
        dtypes = (jnp.float32, jnp.int32, jnp.int32)
        each = (-nll_Bt * weight_Bt, counts_Bt, greedy_Bt)
        return None, RowScores(*(jnp.sum(x, axis=1, dtype=t) for x, t in zip(each, dtypes, strict=True)))

    parts, span = doors.parts("T"), _span(doors, config, target_BT)
    xs = tuple(split_time(x, span, parts) for x in (h_BTD, target_BT, weight_BT))
    _, scores_xB = jax.lax.scan(chunk, None, xs)
    return RowScores(*(doors.sum_over("T", jnp.sum(x, axis=0)) for x in scores_xB))


def pair_loss(
    doors: Activations,
    answer: Callable[[jax.Array], jax.Array],
    h_BTD: jax.Array,
    label_BT: jax.Array,
    weight_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The same sums of whether pairs belong together, which the first token tells; `answer` gives its logits_BA.

    A pair weighs as much as the targets of its row together, so that over a batch the loss is the tokens' mean and the
    pairs' mean, added, as in BERT, if rows have equally many targets.
    """
    logits_BA = answer(doors.first("BTD", h_BTD))
    said_B = jnp.where(doors.first("BT", label_BT) == 1, logits_BA[:, 1], logits_BA[:, 0])
    nll_B = jax.nn.logsumexp(logits_BA, axis=-1) - said_B
    nll = jnp.sum(nll_B * doors.sum_over("T", jnp.sum(weight_BT, axis=1)))
    whole = jax.lax.stop_gradient(nll)
    # Ranks that split T all have the pairs' loss, and its gradient; the sum over them must count it once.
    part = whole if doors.global_shapes else whole / doors.layout.size(*doors.layout.splits("T"))
    return nll + (part - whole), part


def split_time(x_BT: jax.Array, span: int, parts: int = 1) -> jax.Array:
    """(B, T, ...) -> (chunks, B, parts * span, ...): `span` tokens of each part of time, the last padded with zeros."""
    B, T, *rest = x_BT.shape
    lead, T = (B, parts) if parts > 1 else (B,), T // parts
    span = min(span, T)
    chunks = -(-T // span)
    x = x_BT.reshape(*lead, T, *rest)
    if chunks * span != T:
        x = jnp.pad(x, (*((0, 0) for _ in lead), (0, chunks * span - T), *((0, 0) for _ in rest)))
    x_xBt = jnp.moveaxis(x.reshape(*lead, chunks, span, *rest), len(lead), 0)
    return x_xBt.reshape(chunks, B, parts * span, *rest)


def join_time(y_xBt: jax.Array, time: int, parts: int = 1) -> jax.Array:
    """The inverse of `split_time`; `time` is the length of a part."""
    chunks, B, _, *rest = y_xBt.shape
    lead = (B, parts) if parts > 1 else (B,)
    y = jnp.moveaxis(y_xBt.reshape(chunks, *lead, -1, *rest), 0, len(lead))
    y = jax.lax.slice_in_dim(y.reshape(*lead, -1, *rest), 0, time, axis=len(lead))
    return y.reshape(B, parts * time, *rest)
