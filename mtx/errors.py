"""What a user can do wrong, as exceptions that say what to type, and the exit code of each."""

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

    exit_code = 2


class DeviceError(UserError):
    """The machine's devices do not fit the configuration."""

    exit_code = 3


class DataError(UserError):
    """The data cannot be read, or does not hold what the configuration asks of it."""

    exit_code = 4
