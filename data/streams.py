"""Files as streams of bytes: hashed and counted while they are read, unzipped, and bad ones named."""

import contextlib
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 1 << 20
"""Read at once."""
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Bad:
    """One bad record, or a whole bad file."""

    path: str
    where: str
    """line 3 (byte 120), row 5; nothing for a file."""
    reason: str
    """A few words, by which bad records are counted."""
    what: str
    """What is wrong, as the rest of a sentence."""

    def __str__(self) -> str:
        return f"{self.path}{', ' if self.where else ''}{self.where}: {self.what}"


class BadFile(Exception):
    """The file breaks off, or was never one of its kind: nothing of it is to be used."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(str(bad))
        self.bad = bad


class Raw(io.RawIOBase):
    """A file that hashes and counts what is read of it, once, from its start to its end."""

    def __init__(self, path: str, count: Callable[[int], None]) -> None:
        self._file, self._count = open(path, "rb", buffering=0), count  # noqa: SIM115
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        found = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:found])
        self._count(found)
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def opened(path: str, count: Callable[[int], None]) -> Iterator[Raw]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(Bad(path, "", "not a file", "is not a regular file."))
        if status.st_size == 0:
            raise BadFile(Bad(path, "line 0", "empty file", "the file is empty."))
        raw = Raw(path, count)
    except OSError as error:
        raise BadFile(Bad(path, "", "cannot be read", f"cannot be read: {error.strerror}.")) from error
    with raw:
        yield raw


class Stream:
    """A file's text, unzipped, from its start to its end, with errors that name it and the place."""

    def __init__(self, path: str, file: io.BufferedIOBase) -> None:
        self.path = path
        self._zipped = path.lower().endswith(".gz")
        self._file = gzip.GzipFile(fileobj=file, mode="rb") if self._zipped else file
        self.byte, self.lines = 0, 0
        """Bytes and line ends that were read; in a .gz, of the text."""

    def line(self, most: int) -> bytes:
        """The next line with its end, or its first `most` bytes; nothing at the file's end."""
        return self._count(self._named(self._file.readline, most))

    def block(self, most: int) -> bytes:
        """The next `most` bytes, fewer only at the file's end."""
        parts, size = [], 0
        while size < most and (part := self._count(self._named(self._file.read, most - size))):
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def _count(self, found: bytes) -> bytes:
        if self.byte == 0:
            found = self._without_mark(found)
        self.byte += len(found)
        self.lines += found.count(b"\n")
        return found

    def _named(self, read: Callable[[int], bytes], most: int) -> bytes:
        try:
            return read(most)
        except EOFError as error:
            what = "the gzip stream breaks off after this line; the file was cut."
            raise BadFile(Bad(self.path, f"line {self.lines}", "cut gzip", what)) from error
        except (OSError, zlib.error) as error:
            damaged = self._zipped and not getattr(error, "errno", None)
            reason = "damaged gzip" if damaged else "cannot be read"
            what = f"{'is no intact gzip file' if damaged else 'cannot be read'} after this line: {error}."
            raise BadFile(Bad(self.path, f"line {self.lines}", reason, what)) from error

    def _without_mark(self, first: bytes) -> bytes:
        """Windows' UTF-8 mark goes; other encodings are refused by their mark."""
        if not first:
            raise BadFile(Bad(self.path, "line 0", "empty file", "the file is empty."))
        if first.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
            what = f"is UTF-16 or UTF-32, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {self.path}."
            raise BadFile(Bad(self.path, "line 1 (byte 0)", "not UTF-8", what))
        if first.startswith(UTF8_MARK):
            self.byte = len(UTF8_MARK)
        return first.removeprefix(UTF8_MARK)
