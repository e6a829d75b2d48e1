"""Bibles in SWORD's zText form: zlib blocks, each a book.

Of each testament, .bzs has 12 bytes a block: where it begins in .bzz, its length there, its length unpacked; .bzv has
10 bytes a verse: its block, where it begins in the unpacked block, its length (all little-endian; libsword,
rawverse and zverse).
"""

import struct
import zlib
from collections.abc import Iterator

from data.get.markup import strip_osis

BLOCK, VERSE = struct.Struct("<III"), struct.Struct("<IIH")


def books(blocks: bytes, verses: bytes, content: bytes) -> Iterator[list[str]]:
    """The verses that have text, of each block that has any."""
    of_block: dict[int, list[tuple[int, int]]] = {}
    for block, start, length in VERSE.iter_unpack(verses):
        if length:
            of_block.setdefault(block, []).append((start, length))
    for number, (start, length, _) in enumerate(BLOCK.iter_unpack(blocks)):
        unpacked = zlib.decompress(content[start : start + length]) if number in of_block else b""
        found = [strip_osis(unpacked[at : at + size].decode()) for at, size in of_block.get(number, [])]
        if found := [verse for verse in found if verse]:
            yield found
