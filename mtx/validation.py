"""The loss over held-out text: in nats per token, as perplexity and in bits per byte, of each source and of all."""

import math
from collections.abc import Callable

import jax
import numpy as np

from data import CausalLm, Loader, Pick, Rows
from mtx.config import Config
from mtx.errors import DataError
from mtx.model import Batch
from mtx.spmd import Params
from mtx.step import Program


def validate(
    config: Config,
    program: Program,
    loader: Loader,
    eval_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    *,
    split: str = "validation",
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`val/loss`, `val/perplexity` and, where they mean something, `val/bits_per_byte` of a split.

    Of a blend also `val/<source>/loss` and so on; `val/loss` then is the mean by the last phase's weights. Bits per
    byte divide by the bytes of the text, whatever the tokenizer; of `eval_sequences` sequences, by their share of them.
    `between` is called before each batch. Raises: DataError if the data have no such split.
    """
    found = loader.held_out(split)
    if not found:
        have = sorted({name for part in loader.corpus.parts.values() for name in part.splits})
        raise DataError(f"the data have no {split} split; they have {', '.join(have)} (data.split).")
    values, losses, weights = {}, [], []
    for weight, name in zip(loader.corpus.weights, loader.corpus.parts, strict=True):
        if name not in found:
            continue
        rows, source = found[name]
        nats, tokens, share = _sums(config, program, rows, eval_fn, params, between)
        text_bytes = source.bytes if isinstance(config.objective, CausalLm) else None
        bits_per_byte = nats / math.log(2) / (text_bytes * share) if text_bytes else None
        losses.append(nats / max(tokens, 1e-9))
        weights.append(weight)
        values |= _named(f"val/{name}/" if name else "val/", losses[-1], bits_per_byte)
    if "val/loss" not in values:
        mean = np.average(losses, weights=weights if any(weights) else None)
        values |= _named("val/", float(mean), None)
    return values


def _named(prefix: str, loss: float, bits_per_byte: float | None) -> dict[str, float]:
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    values |= {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
    return {f"{prefix}{name}": value for name, value in values.items()}


def _sums(
    config: Config,
    program: Program,
    source: Rows,
    eval_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    between: Callable[[], None],
) -> tuple[float, float, float]:
    """Nats and target tokens of as many of a source's rows as the config says, and their share of all rows."""
    length, whole = config.batch.sequence_length, len(source)
    count = min(config.eval_sequences or whole, whole)
    chosen = np.arange(count, dtype=np.int64) * whole // count
    shards = program.layout.size(*program.layout.batch_axes)
    rows = (config.batch.micro_size or config.batch.global_size // shards) * shards
    together = min(4 * program.stages, -(-count // rows)) if program.stages > 1 else 1  # they follow one another
    rows *= together
    total = np.zeros(2, np.float64)
    for start in range(0, count, rows):
        between()

        def load(numbers: np.ndarray, start: int = start) -> dict[str, np.ndarray]:
            number = start + numbers
            arrays = source.batch([Pick(0, int(row)) for row in chosen[np.minimum(number, count - 1)]])
            arrays["weights"] = arrays["weights"] * (number < count)[:, None].astype(np.float32)
            return arrays

        batch = program.place_rows(load, (together, rows // together, length), program.batch_spec)
        total += np.asarray(eval_fn(params, batch), np.float64)
    return float(total[0]), float(total[1]), count / whole
