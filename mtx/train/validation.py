"""The loss over the validation split, in nats per token, perplexity and bits per byte."""

import math
from collections.abc import Callable

import jax
import numpy as np

from data import Corpus
from mtx.config import Config
from mtx.errors import DataError
from mtx.model import Batch
from mtx.spmd import Params
from mtx.step import Program


def validate(
    config: Config,
    program: Program,
    corpus: Corpus,
    eval_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    *,
    split: str = "validation",
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val/loss`, `val/perplexity`, `val/bits_per_byte` of a split; `between` is called before each batch.

    Bits per byte divide by the bytes of the text, whatever the tokenizer; of `eval_sequences` sequences, by
    their share of them. Raises: DataError if the data have no such split.
    """
    if split not in corpus.splits:
        raise DataError(f"the data have no {split} split; they have {', '.join(corpus.splits)} (data.split).")
    length, source = config.batch.sequence_length, corpus.splits[split]
    windows = source.windows(length)
    count = min(config.eval_sequences or windows, windows)
    chosen = np.arange(count, dtype=np.int64) * windows // count
    shards = program.layout.size(*program.layout.batch_axes)
    rows = (config.batch.micro_size or config.batch.global_size // shards) * shards
    together = min(4 * program.stages, -(-count // rows)) if program.stages > 1 else 1  # they follow one another
    rows *= together
    total = np.zeros(2, np.float64)
    for start in range(0, count, rows):
        between()

        def load(numbers: np.ndarray, start: int = start) -> dict[str, np.ndarray]:
            number = start + numbers
            arrays = source.batch(chosen[np.minimum(number, count - 1)], length)
            arrays["weights"] = arrays["weights"] * (number < count)[:, None].astype(np.float32)
            return arrays

        batch = program.place_rows(load, (together, rows // together, length), program.batch_spec)
        total += np.asarray(eval_fn(params, batch), np.float64)
    loss = total[0] / total[1]
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bits_per_byte": total[0] / math.log(2) / (source.bytes * count / windows),
    }
