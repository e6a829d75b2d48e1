"""What a folder of shards holds, and of what it was made: manifest.json, written last."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.shards.format import TEMPORARY, Shard

FORMAT = "mtx prepared text 2"
NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """A part of the text, as it was read."""

    name: str
    """A file's path, a slice of a data set."""
    fingerprint: str
    """Another one says that it may have changed."""
    bytes: int
    sha256: str | None
    """Of a file, or of the documents that were read. None: a bad file, of which nothing was used."""
    documents: dict[str, int]
    """Given to each split."""
    empty: int
    """Documents without text, or without tokens, left out."""
    bad: dict[str, int]
    """Bad records by reason, left out."""


@dataclass(frozen=True)
class Manifest:
    """See the fields; the file also holds the format, and the SHA-256 of all the rest."""

    recipe: dict[str, Any]
    """The config as plain data."""
    sources: list[Source]
    ignored: list[str]
    """What was found and not read: files that are hidden, or of no known kind."""
    tokenizer: str
    """Its digest."""
    vocab_size: int
    end_of_document: int
    splits: dict[str, Shard]
    gzip_bits_per_byte: float | None
    """What `gzip -9` needs for the validation text; None: none, or too much."""

    def write(self, folder: Path) -> None:
        """Under a temporary name first, so that there is a whole one or none."""
        rest = {"format": FORMAT, **asdict(self)}
        text = json.dumps(rest | {"sha256": _digest(rest)}, indent=1) + "\n"
        temporary = folder / (NAME + TEMPORARY)
        with open(temporary, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / NAME)
        sync(folder)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises: ValueError if it is not there, or is not as it was written."""
        path = folder / NAME
        try:
            rest = json.loads(path.read_bytes())
            said, form = rest.pop("sha256"), rest.pop("format")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no manifest of prepared text ({error}).") from error
        if form != FORMAT:
            raise ValueError(f"{path} has the format {form!r}; this program reads {FORMAT!r}.")
        if said != _digest({"format": form, **rest}):
            raise ValueError(f"{path} was changed after it was written: its SHA-256 is not its own.")
        rest["sources"] = [Source(**source) for source in rest["sources"]]
        rest["splits"] = {name: Shard(**shard) for name, shard in rest["splits"].items()}
        return Manifest(**rest)


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON data, with its class's name."""
    inner = {name: _plain(getattr(config, name)) for name in type(config).__dataclass_fields__}
    return {"class": type(config).__name__, **inner}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return plain(value) if hasattr(value, "__dataclass_fields__") else value


def sync(folder: Path) -> None:
    """Makes the names in a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical(content: Any) -> bytes:
    """One spelling of plain data."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(rest: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(rest)).hexdigest()
