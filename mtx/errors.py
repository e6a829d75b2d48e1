"""What a user can do wrong, as exceptions that say what to type, and how a run can end: the exit code of each.

0 is a run that came to its end. Codes above 63 leave those of shells and signals alone (sysexits.h where it fits).
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

Problem = tuple[str, str]  # (field, what is wrong with its value and what is legal)


@runtime_checkable
class Checked(Protocol):
    """A config dataclass that checks its own values. `mtx.config` calls it and prefixes the path."""

    def check(self) -> Iterator[Problem]: ...


class UserError(ValueError):
    """A mistake that the user can mend; `main.py` prints it in one line, without a traceback."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration is wrong: nothing ran, no device was touched."""

    exit_code = 64


class DataError(UserError):
    """The data cannot be read, or does not hold what the configuration asks of it."""

    exit_code = 65


class CheckpointError(UserError):
    """No checkpoint verifies, or the one there is does not fit: nothing was trained, nothing deleted."""

    exit_code = 66


class NumericsError(UserError):
    """Too many steps whose gradients were not finite; nothing that is not finite was saved."""

    exit_code = 67


class DeviceError(UserError):
    """The machine's devices do not fit the configuration."""

    exit_code = 69


class StorageError(UserError):
    """Checkpoints cannot be written; those that were verified before are as they were."""

    exit_code = 73


class Stopped(Exception):
    """A signal or the clock ended the run early, and what it had done is saved: the same command goes on."""

    exit_code = 75


class StoppedUnsaved(Stopped):
    """Ended early with steps that no checkpoint holds."""

    exit_code = 76
