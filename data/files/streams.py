"""Files as streams of bytes: hashed and counted while they are read, unpacked, and bad ones named."""

import contextlib
import gzip
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from data.documents import UNREADABLE, Bad, BadFile

BLOCK_BYTES = 1 << 20
"""Read at once."""
UTF8_MARK = b"\xef\xbb\xbf"
PACKED = {".gz": "gzip", ".zst": "zst"}
"""What a file's name ends with, and how it is packed."""
ZST_STEP_BYTES = 256
"""Unpacked at once: at the most, of zeros, they become 8 MB."""
ZST_WINDOW_BYTES = 2**31
"""The most that a file may ask for (zst --long=31); what it does not use costs no memory."""


class Raw(io.RawIOBase):
    """A file, or the bytes of one from `start` to `stop`: hashes and counts what is read of it, once, to its end."""

    def __init__(self, path: str, count: Callable[[int], None], start: int = 0, stop: int | None = None) -> None:
        self._file, self._count = open(path, "rb", buffering=0), count  # noqa: SIM115
        self._file.seek(start)
        self._left = None if stop is None else stop - start
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        found = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left = None if self._left is None else self._left - found
        self.sha256.update(memoryview(buffer)[:found])
        self._count(found)
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def opened(path: str, count: Callable[[int], None], start: int = 0, stop: int | None = None) -> Iterator[Raw]:
    """Raises: BadFile if it cannot be opened, or is empty."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(Bad(path, "", "not a file", "is not a regular file."))
        if status.st_size == 0:
            raise BadFile(Bad(path, "line 0", "empty file", "the file is empty."))
        raw = Raw(path, count, start, stop)
    except OSError as error:
        raise BadFile(Bad(path, "", UNREADABLE, f"cannot be read: {error.strerror}.")) from error
    with raw:
        yield raw


class Zst(io.RawIOBase):
    """The content of a .zst, of one frame or several. (The package's own reader takes a cut file for a whole one.)

    Reading raises: EOFError where the file ends within a frame, OSError where it is damaged.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        import zstandard

        self._unpacker, self._error = zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW_BYTES), zstandard.ZstdError
        self._file = file
        self._frame: Any = None  # between frames
        self._packed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._content:
            self._packed = self._packed or self._file.read(ZST_STEP_BYTES)
            if not self._packed and self._frame is None:
                return 0
            if not self._packed:
                raise EOFError
            self._unpack()
        found = min(len(buffer), len(self._content))
        memoryview(buffer)[:found] = self._content[:found]
        self._content = self._content[found:]
        return found

    def _unpack(self) -> None:
        self._frame = self._frame or self._unpacker.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise OSError(str(error)) from error
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None


class Stream:
    """A file's text, unpacked, from its start to its end, with errors that name it and the place."""

    def __init__(self, path: str, file: io.BufferedIOBase, byte: int = 0, lines: int = 0) -> None:
        """`file` begins at this byte, behind so many lines."""
        self.path = path
        self._packed = PACKED.get(os.path.splitext(path.lower())[1])
        if self._packed == "gzip":
            self._file = gzip.GzipFile(fileobj=file, mode="rb")
        else:
            self._file = io.BufferedReader(Zst(file), BLOCK_BYTES) if self._packed else file
        self.byte, self.lines = byte, lines
        """Bytes and line ends that were read; of the text, where it is packed."""

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
            what = f"the {self._packed} stream breaks off after this line; the file was cut."
            raise BadFile(Bad(self.path, f"line {self.lines}", f"cut {self._packed}", what)) from error
        except (OSError, zlib.error) as error:
            damaged = self._packed and not getattr(error, "errno", None)
            reason = f"damaged {self._packed}" if damaged else UNREADABLE
            what = f"{f'is no intact {self._packed} file' if damaged else 'cannot be read'} after this line: {error}."
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
