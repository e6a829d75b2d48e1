"""Attention and its gradients from the definition, in float64 NumPy: what every backend is compared with."""

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    out_BTNU: np.ndarray
    lse_BNT: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsinks_N: np.ndarray


def attend(
    q_BTNH: np.ndarray,
    k_BSKH: np.ndarray,
    v_BSKU: np.ndarray,
    seen_BTS: np.ndarray,
    dout_BTNU: np.ndarray,
    dlse_BNT: np.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: np.ndarray | None = None,
    keep_BNTS: np.ndarray | None = None,
    dropout: float = 0.0,
) -> Answer:
    """Keys and values are repeated over their group; a softmax over nothing is 0, its lse -inf."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKU, dout_BTNU, dlse_BNT))
    groups = q.shape[2] // k.shape[2]
    k_BSNH, v_BSNU = (np.repeat(x, groups, axis=2) for x in (k, v))
    s = np.einsum("BTNH,BSNH->BNTS", q, k_BSNH) * scale
    slope = np.full(s.shape, scale)
    if softcap is not None:
        bent = np.tanh(s / softcap)
        s, slope = softcap * bent, slope * (1 - bent**2)
    seen = np.broadcast_to(seen_BTS[:, None], s.shape)
    s = np.where(seen, s, -np.inf)
    sink = np.full(q.shape[2], -np.inf) if sinks_N is None else np.asarray(sinks_N, np.float64)
    everything = np.concatenate([s, np.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], axis=-1)
    top = everything.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    powers = np.exp(everything - top)
    total = powers.sum(-1, keepdims=True)
    p = powers[..., :-1] / np.where(total > 0, total, 1)
    p_sink = powers[..., -1:] / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    thinned = p if keep_BNTS is None else np.where(keep_BNTS, p / (1 - dropout), 0.0)
    out = np.einsum("BNTS,BSNU->BTNU", thinned, v_BSNU)
    dthinned = np.einsum("BTNU,BSNU->BNTS", dout, v_BSNU)
    dp = dthinned if keep_BNTS is None else np.where(keep_BNTS, dthinned / (1 - dropout), 0.0)
    inner = (dp * p).sum(-1, keepdims=True)
    ds = p * (dp - inner + dlse[..., None])
    dsink = (p_sink * (dlse[..., None] - inner)).sum((0, 2, 3))
    ds = ds * slope
    dq = np.einsum("BNTS,BSNH->BTNH", ds, k_BSNH)
    dk = np.einsum("BNTS,BTNH->BSNH", ds, q)
    dv = np.einsum("BNTS,BTNU->BSNU", thinned, dout)
    dk, dv = (x.reshape(*x.shape[:2], -1, groups, x.shape[3]).sum(3) for x in (dk, dv))
    return Answer(out, lse, dq, dk, dv, dsink)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative Frobenius distance; where `wanted` is infinite, `found` must be so too."""
    found = np.asarray(found, np.float64)
    finite = np.isfinite(wanted)
    assert np.array_equal(found[~finite], wanted[~finite]), "infinite in other places"
    assert np.isfinite(found[finite]).all(), "not finite"
    return float(np.linalg.norm(found[finite] - wanted[finite]) / max(np.linalg.norm(wanted[finite]), 1e-30))
