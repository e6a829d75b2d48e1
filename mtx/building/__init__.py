"""From a config, or from a run folder, to what runs: the program, the rows that it reads, and weights.

Everything that trains, evaluates, generates, plans or measures begins here; nothing here trains.
"""

from mtx.building.compile_cache import keep_compiled
from mtx.building.data import load_data, make_loader, prepare_data, refuse_too_long
from mtx.building.opening import CHECKPOINTS, Opened, open_run, open_weights
from mtx.building.program import build

__all__ = [
    "CHECKPOINTS",
    "Opened",
    "build",
    "keep_compiled",
    "load_data",
    "make_loader",
    "open_run",
    "open_weights",
    "prepare_data",
    "refuse_too_long",
]
