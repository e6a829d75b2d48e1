"""Documents, end to end, cut into windows: a pure function over an array of tokens.

A stream is one token array in which every document is followed by its end-of-document token. Window w
predicts stream[w*T + 1 : w*T + T + 1] from stream[w*T : w*T + T], so that every token but the stream's first
is a target in exactly one window. The last window is padded.
"""

import numpy as np

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segments`, `positions`: int32 [B, T]; `weights`: float32 [B, T]."""


def window_count(stream_tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length` targets that cover a stream, a padded last one included."""
    return -(-(stream_tokens - 1) // sequence_length)


def pack(
    stream_N: np.ndarray,
    windows_B: np.ndarray,
    *,
    sequence_length: int,
    end_of_document: int,
    isolate_documents: bool,
) -> Batch:
    """Cuts the windows numbered `windows_B` (int [B], below `window_count`) out of a stream (int [N]).

    With `isolate_documents`, `segments` counts the documents of a window from 1, `positions` restarts at 0
    with each of them (a document that began in an earlier window goes on at 0), and a document's first token,
    which nothing in its own segment precedes, is a target of weight 0. Without (GPT-2's recipe), a window is
    one segment with positions 0..T-1, attention crosses documents, and every target weighs 1.

    Padding, behind the stream's last target, has segment 0, position 0, weight 0 and end-of-document tokens.
    """
    assert len(stream_N) > 1 and stream_N[-1] == end_of_document, "a stream ends with an end of document"
    times_T = np.arange(sequence_length)
    index_BT = windows_B.astype(np.int64)[:, None] * sequence_length + times_T
    last = len(stream_N) - 1
    tokens_BT = stream_N[np.minimum(index_BT, last)]
    targets_BT = stream_N[np.minimum(index_BT + 1, last)]
    real_BT = index_BT < last

    if isolate_documents:
        ends_BT = tokens_BT == end_of_document
        starts_BT = np.zeros_like(ends_BT)
        starts_BT[:, 1:] = ends_BT[:, :-1]
        segments_BT = 1 + np.cumsum(starts_BT, axis=1)
        positions_BT = times_T - np.maximum.accumulate(np.where(starts_BT, times_T, 0), axis=1)
        weights_BT = real_BT & ~ends_BT
    else:
        segments_BT = np.ones_like(index_BT)
        positions_BT = np.broadcast_to(times_T, index_BT.shape)
        weights_BT = real_BT
    return {
        "tokens": tokens_BT.astype(np.int32),
        "targets": targets_BT.astype(np.int32),
        "weights": weights_BT.astype(np.float32),
        "segments": np.where(real_BT, segments_BT, 0).astype(np.int32),
        "positions": np.where(real_BT, positions_BT, 0).astype(np.int32),
    }
