"""Character vectors out of an R package's lazy-load database.

NAME.rdx is an R list, gzip-compressed, that says where in NAME.rdb each variable lies. A variable is a block there:
its length unpacked in four bytes, then zlib data. Both hold R's serialization in XDR, big-endian (R Internals,
section 1.8): an item is flags, whose lowest byte is the type, and what the type demands.
"""

import struct
import zlib
from typing import Any

NULL, SYMBOL, PAIRLIST, CHARS, LOGICALS, INTEGERS, STRINGS, LIST = 254, 1, 2, 9, 10, 13, 16, 19
REFERENCE = 255
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10


def vectors(index: bytes, store: bytes) -> dict[str, list[str]]:
    """The variables that are character vectors, by name. Raises: ValueError for what is not read here."""
    listed, names = _Reader(zlib.decompress(index, 16 + zlib.MAX_WBITS)).item()
    variables, variable_names = listed[names["names"].index("variables")]
    found = {}
    for name, ((start, length), _) in zip(variable_names["names"], variables, strict=True):
        value, _ = _Reader(zlib.decompress(store[start + 4 : start + length])).item()
        if value and all(isinstance(line, str) for line in value):
            found[name] = value
    return found


class _Reader:
    """Reads items one after another; an item is (value, attributes)."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at, self._symbols = content, 0, []
        if self._take(2) != b"X\n":
            raise ValueError(f"R data begin with {content[:2]!r}, not with b'X\\n' (XDR)")
        version = self._int()
        self._take(8)  # the versions of R that wrote it, and that can read it
        if version == 3:
            self._take(self._int())  # its encoding
        elif version != 2:
            raise ValueError(f"R data have version {version}; 2 and 3 are read here")

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > len(self._content):
            raise ValueError("R data end too soon")
        return self._content[self._at - count : self._at]

    def _int(self) -> int:
        return int.from_bytes(self._take(4), "big", signed=True)

    def item(self) -> tuple[Any, dict[str, Any]]:
        flags = self._int()
        kind = flags & 255
        if kind == NULL:
            return None, {}
        if kind == SYMBOL:
            self._symbols.append(self.item()[0])
            return self._symbols[-1], {}
        if kind == REFERENCE:
            return self._symbols[((flags >> 8) or self._int()) - 1], {}
        if kind == PAIRLIST:
            return self._pairs(flags), {}
        if kind == CHARS:
            length = self._int()
            return self._take(max(length, 0)).decode(), {}  # -1 is R's NA, which becomes an empty line
        value = self._vector(kind)
        attributes = self.item()[0] if flags & HAS_ATTRIBUTES else {}
        return value, attributes or {}

    def _vector(self, kind: int) -> list[Any]:
        count = self._int()
        if kind in (LOGICALS, INTEGERS):
            return list(struct.unpack(f">{count}i", self._take(4 * count)))
        if kind == STRINGS:
            return [self.item()[0] for _ in range(count)]
        if kind == LIST:
            return [self.item() for _ in range(count)]
        raise ValueError(f"R data of type {kind} are not read here")

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A pair list, which is what attributes are: a tag and a value, and the rest of the list."""
        pairs = {}
        while flags & 255 == PAIRLIST:
            if flags & HAS_ATTRIBUTES:
                self.item()
            tag = self.item()[0] if flags & HAS_TAG else ""
            pairs[tag] = self.item()[0]
            flags = self._int()
        return pairs
