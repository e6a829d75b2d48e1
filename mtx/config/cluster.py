"""Which processes make one run: not part of its config, since a run may go on with others."""

import re
from dataclasses import dataclass

from mtx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """This process among those of a run."""

    coordinator: str
    """host:port of process 0."""
    processes: int
    """How many there are."""
    process: int
    """Which one this is, from 0."""

    @staticmethod
    def of(coordinator: str | None, processes: int | None, process: int | None) -> "Cluster | None":
        """From the flags of a command line; None if none is given.

        Raises: ConfigError if only some are given, or one is wrong.
        """
        if coordinator is None and processes is None and process is None:
            return None
        if coordinator is None or processes is None or process is None:
            raise ConfigError("--coordinator, --processes and --process go together; give all three or none.")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"--coordinator {coordinator} must be host:port, such as 10.0.0.1:1234.")
        if processes < 1:
            raise ConfigError(f"--processes {processes} must be at least 1.")
        if not 0 <= process < processes:
            raise ConfigError(f"--process {process} must be at least 0 and below --processes {processes}.")
        return Cluster(coordinator=coordinator, processes=processes, process=process)
