"""mtx: one model text, any mesh. Language models trained with JAX, partitioned by XLA.

The shape legend. A name's suffix is its shape, an einsum's letters are the same letters, and a
weight's dimensions are declared with them (`DIMENSIONS` maps a letter to the name that layouts use):

    B batch          T query time     S key time      D model width
    N heads          K kv heads       G heads per kv head (plus key and value in a fused projection)
    H head size      F feed-forward   J gate and up   V vocabulary
    E experts        L layers         M microbatches  P pipeline stages
    C positions of a learned table
    t time of one chunk (x: the chunks)

Modules may import only those before them: errors, command, processes, mesh, layout, spmd, sums, hlo, layers, attention,
model, losses, optim, pipeline, step, decode, checkpoint, metrics, config, train, then the verbs. That is
also the reading order.
"""

import sys
from importlib import metadata

DIMENSIONS = {
    "B": "batch",
    "T": "time",
    "S": "key_time",
    "D": "embed",
    "N": "heads",
    "K": "kv_heads",
    "G": "group",
    "H": "head",
    "F": "ff",
    "J": "gate_up",
    "V": "vocab",
    "E": "experts",
    "L": "layer",
    "M": "microbatch",
    "P": "stage",
    "C": "position",
    "Q": "pooled",
    "A": "answer",
}

FLAX_MINIMUM = (0, 12, 8)


def _refuse_old_flax() -> None:
    try:
        found = metadata.version("flax")
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"error: flax is not installed in {sys.executable}; activate the environment (. .venv/bin/activate) "
            "or make one (make install)."
        ) from None
    numbers = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if numbers < FLAX_MINIMUM:
        raise ImportError(
            f"flax {found} silently drops sharding metadata; mtx needs flax >= 0.12.8: pip install -U 'flax>=0.12.8'"
        )


_refuse_old_flax()
