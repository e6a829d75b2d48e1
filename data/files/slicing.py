"""Large files in slices, for several processes to read: the documents of all slices are those of the file.

JSON lines are cut between lines, plain text between documents, parquet between row groups. What is compressed has to be
read from its start: it stays whole.
"""

import io
import itertools
from collections.abc import Iterator

from data.documents import Part, Reading, Slice
from data.files.find import kind
from data.files.records import Limits, group_bytes, text_borders
from data.files.streams import BLOCK_BYTES, PACKED, Stream, opened


def cut(part: Part, most_bytes: int, reading: Reading, limits: Limits) -> list[Slice]:
    """Slices of about so many bytes; sets the reading's SHA-256 where it reads the whole file for them.

    Raises: BadFile.
    """
    path, form = part.name, kind(part.name)
    if form == "parquet":
        return _row_groups(part, most_bytes)
    if path.lower().endswith(tuple(PACKED)) or (form == "text" and not limits.cut_text_bytes):
        return [Slice(part)]
    starts = [(0, 0)]
    with opened(path, reading.count) as raw:
        stream = Stream(path, io.BufferedReader(raw, BLOCK_BYTES))
        for byte, lines in text_borders(stream, limits) if form == "text" else _lines(stream):
            if byte - starts[-1][0] >= most_bytes:
                starts.append((byte, lines))
        reading.sha256 = raw.sha256.hexdigest()
    if starts[-1][0] == stream.byte:  # nothing follows
        starts.pop()
    stops = [*(byte for byte, _ in starts[1:]), stream.byte]
    return [Slice(part, byte, stop, lines, stop - byte) for (byte, lines), stop in zip(starts, stops, strict=True)]


def _lines(stream: Stream) -> Iterator[tuple[int, int]]:
    """The first line that begins in each block: its byte, and the lines before it."""
    while True:
        byte, lines = stream.byte, stream.lines
        block = stream.block(BLOCK_BYTES)
        if not block:
            return
        if byte and b"\n" in block:
            yield byte + block.index(b"\n") + 1, lines + 1


def _row_groups(part: Part, most_bytes: int) -> list[Slice]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part.name) as file:
            sizes = [group_bytes(file.metadata, group) for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError):
        return [Slice(part)]  # who reads it says what is wrong
    starts, size = [0], 0
    for group, more in enumerate(sizes):
        if size and size + more > most_bytes:
            starts.append(group)
            size = 0
        size += more
    if len(starts) == 1:
        return [Slice(part)]
    return [
        Slice(part, start, stop, bytes=sum(sizes[start:stop]))
        for start, stop in itertools.pairwise([*starts, len(sizes)])
    ]
