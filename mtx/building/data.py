"""From a config to the rows that it trains on and is evaluated on."""

import logging
import subprocess
import sys
from pathlib import Path

from data import LiveLoader, LiveText, Loader, Text
from mtx.config import Config, Loaded
from mtx.errors import DataError

log = logging.getLogger("mtx")
ROOT = Path(__file__).resolve().parents[2]


def make_loader(config: Config, corpus: Text) -> Loader:
    """A loader of the rows that a config makes of a text. Raises: ValueError if the text has none."""
    live = isinstance(corpus, LiveText)
    if live and config.epochs is not None:
        raise ValueError(
            f"epochs={config.epochs}: nobody counted a live reader's epoch; say steps= or tokens= instead."
        )
    return (LiveLoader if live else Loader)(
        corpus=corpus,
        sequence_length=config.batch.sequence_length,
        objective=config.objective,
        packing=config.packing,
        curriculum=config.curriculum,
        global_size=config.batch.global_size,
        seed=config.seed,
    ).check()


def prepare_data(loaded: Loaded, children: list[subprocess.Popen], *, alone: bool) -> None:
    """Makes shards that are missing by the verb `prepare`, in a process of its own, which it adds to `children`.

    Raises: DataError if they cannot be made, or several processes would have to.
    """
    if loaded.config.data.is_prepared():
        return
    command = [sys.executable, str(ROOT / "main.py"), "prepare", "--config", str(loaded.path)]
    command += [f"{path}={value}" for path, value in loaded.overrides.items()]
    if not alone:
        raise DataError(
            "the data are not prepared, and several processes do not do it together; run "
            f"`python main.py prepare {' '.join(command[3:])}` once, on a file system that all of them see."
        )
    log.info("data: preparing (once; `python main.py prepare` does it beforehand)")
    children.append(child := subprocess.Popen(command))
    if code := child.wait():
        raise DataError(f"the data could not be prepared: `prepare` ended with exit code {code}, see above.")


def load_data(config: Config) -> Loader:
    """Opens the data of a config, which must be prepared, as a loader of its rows. Raises: DataError."""
    try:
        return make_loader(config, config.data.load())
    except ValueError as error:
        raise DataError(str(error)) from error


def refuse_too_long(loader: Loader, samples: int) -> None:
    """Raises: DataError if the sources of a blend have no more to give before the end of a run of so many samples."""
    if (end := loader.blend.end) is not None and end < samples:
        raise DataError(
            f"every source of the blend has reached its max_epochs after {end:,} samples, and the run is {samples:,} "
            "samples long; make it shorter, or raise a max_epochs of data.sources."
        )
