"""How documents share rows; and the usual way, end to end, as pure functions over an array of tokens.

A stream is one token array in which every document is followed by its end-of-document token. Window w
predicts stream[w*T + 1 : w*T + T + 1] from stream[w*T : w*T + T], so that every token but the stream's first
is a target in exactly one window. The last window is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segments`, `positions`: int32 [B, T]; `weights`: float32 [B, T]."""

Window = tuple[np.ndarray, int]
"""T + 1 tokens of a stream (int32), of which the first T are inputs, and how many of its T targets are real."""


@dataclass(frozen=True, kw_only=True)
class Concatenate:
    """Documents end to end, cut into windows: no token is lost, and documents are cut where a row ends."""

    isolate_documents: bool = True
    """Positions restart and attention stays inside a document. False: GPT-2's recipe, where both cross."""


@dataclass(frozen=True, kw_only=True)
class BestFit:
    """Whole documents side by side, each into the fullest row that takes it; only those longer than a row are cut."""

    isolate_documents: ClassVar[bool] = True


def window_count(stream_tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length` targets that cover a stream, a padded last one included."""
    return -(-(stream_tokens - 1) // sequence_length)


def cut(stream_N: np.ndarray, window: int, sequence_length: int) -> Window:
    """The window of this number. It reads nothing else of the stream, which may be a memory map."""
    start = window * sequence_length
    tokens = np.asarray(stream_N[start : start + sequence_length + 1], np.int32)
    assert len(tokens) > 1, "the window lies behind the stream's end"
    missing = sequence_length + 1 - len(tokens)
    if missing:
        assert tokens[-1] == stream_N[-1], "only the last window is short"
        tokens = np.concatenate([tokens, np.full(missing, tokens[-1])])
    return tokens, sequence_length - missing


def pack(windows: Sequence[Window], *, end_of_document: int, isolate_documents: bool) -> Batch:
    """Windows of one length T as a batch [B, T].

    With `isolate_documents`, `segments` counts the documents of a window from 1, `positions` restarts at 0
    with each of them (a document that began in an earlier window goes on at 0), and a document's first token,
    which nothing in its own segment precedes, is a target of weight 0. Without (GPT-2's recipe), a window is
    one segment with positions 0..T-1, attention crosses documents, and every target weighs 1.

    Padding, behind the stream's last target, has segment 0, position 0, weight 0 and end-of-document tokens.
    """
    stream_BS = np.stack([tokens for tokens, _ in windows])  # S = T + 1
    tokens_BT, targets_BT = stream_BS[:, :-1], stream_BS[:, 1:]
    times_T = np.arange(tokens_BT.shape[1])
    real_BT = times_T < np.array([real for _, real in windows])[:, None]

    if isolate_documents:
        ends_BT = tokens_BT == end_of_document
        starts_BT = np.zeros_like(ends_BT)
        starts_BT[:, 1:] = ends_BT[:, :-1]
        segments_BT = 1 + np.cumsum(starts_BT, axis=1)
        positions_BT = times_T - np.maximum.accumulate(np.where(starts_BT, times_T, 0), axis=1)
        weights_BT = real_BT & ~ends_BT
    else:
        segments_BT = np.ones_like(tokens_BT)
        positions_BT = np.broadcast_to(times_T, tokens_BT.shape)
        weights_BT = real_BT
    return {
        "tokens": np.ascontiguousarray(tokens_BT),
        "targets": np.ascontiguousarray(targets_BT),
        "weights": weights_BT.astype(np.float32),
        "segments": np.where(real_BT, segments_BT, 0).astype(np.int32),
        "positions": np.where(real_BT, positions_BT, 0).astype(np.int32),
    }
