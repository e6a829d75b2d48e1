"""Documents out of files, strictly: a record that is not what it should be is named, by file and line.

Every reader gives the texts of a document (a prompt, where there is one, and what follows) as UTF-8 bytes, checked:
valid, without NUL, no longer than allowed. An empty document is given too (as whitespace or nothing), for the caller to
count. Nothing longer than a record is held.
"""

import difflib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.documents import Bad, BadFile, Part, Reading, Slice
from data.files.find import kind
from data.files.streams import BLOCK_BYTES, Stream, opened

Report = Callable[[Bad], None]
"""Is told of a bad record: counts it or raises."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How files are read, from the config."""

    text_key: str
    """Of a JSON object or a parquet table."""
    prompt_key: str | None = None
    """Of what precedes the text, a sequence of its own; None: nothing does."""
    cut_text_bytes: int
    """Where plain text is cut into documents; 0: nowhere."""
    max_record_bytes: int
    """Of a line, and of a document."""

    @property
    def keys(self) -> dict[str, str]:
        """The keys in the order of a document's sequences, with the fields that name them."""
        prompt = {self.prompt_key: "prompt_key"} if self.prompt_key is not None else {}
        return prompt | {self.text_key: "text_key"}


def documents(reading: Reading, limits: Limits, piece: Slice | None = None) -> Iterator[list[bytes]]:
    """The documents of a file, or of a slice of it, in order: the texts of their sequences.

    Raises:
      BadFile: see there; what was given of the file before is to be forgotten.
    """
    path, report = reading.name, reading.report
    piece = piece or Slice(Part(path, "", 0))
    if kind(path) == "parquet":
        yield from _parquet(piece, limits, reading)
        return
    with opened(path, reading.count, piece.start, piece.stop) as raw:
        reader = _jsonl if kind(path) == "jsonl" else _text
        stream = Stream(path, io.BufferedReader(raw, BLOCK_BYTES), piece.start, piece.lines)
        yield from reader(stream, limits, report)
        while raw.read(BLOCK_BYTES):
            pass
        reading.sha256 = raw.sha256.hexdigest()


# JSON lines


class Line(NamedTuple):
    """A line with its end."""

    number: int
    """From 1."""
    byte: int
    """The byte that it begins at, from 0; of the text, where that is packed."""
    content: bytes | None
    """None: longer than allowed."""
    length: int
    """In bytes, its end not included."""


def _lines(stream: Stream, most: int) -> Iterator[Line]:
    """A file's lines, none held that is longer than `most`."""
    while content := stream.line(most + 1):
        length = len(content)
        number, byte = stream.lines + (not content.endswith(b"\n")), stream.byte - length
        if length > most and not content.endswith(b"\n"):
            yield Line(number, byte, None, length + _rest(stream))
        else:
            yield Line(number, byte, content, length - content.endswith(b"\n"))


def _rest(stream: Stream) -> int:
    """Reads to the end of the line; returns its bytes, the end not included."""
    length = 0
    while part := stream.line(BLOCK_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            return length - 1
    return length


def _too_long(path: str, number: int, byte: int, length: int, most: int) -> Bad:
    what = f"is {length:,} bytes long, more than data.max_record_bytes={most}."
    return Bad(path, _place(number, byte), "too long", what)


def _place(number: int, byte: int) -> str:
    return f"line {number} (byte {byte})"


class _Wrong(Exception):
    """(reason, what): see Bad."""


def _jsonl(stream: Stream, limits: Limits, report: Report) -> Iterator[list[bytes]]:
    path, most = stream.path, limits.max_record_bytes
    for line in _lines(stream, most):
        if line.content is None:
            report(_too_long(path, line.number, line.byte, line.length, most))
        elif line.content.strip(b" \t\r\n"):
            try:
                document = _texts_of(line, limits)
            except _Wrong as wrong:
                report(Bad(path, _place(line.number, line.byte), *wrong.args))
                continue
            yield document


def _texts_of(line: Line, limits: Limits) -> list[bytes]:
    assert line.content is not None
    try:
        record = json.loads(line.content.decode())
    except UnicodeDecodeError as error:
        byte = line.byte + error.start
        raise _Wrong("not UTF-8", f"is not UTF-8 at byte {byte} ({error.reason}).") from error
    except RecursionError as error:
        raise _Wrong("invalid JSON", "is JSON nested too deeply.") from error
    except ValueError as error:
        if b"\0" in line.content:
            at = line.byte + line.content.index(b"\0")
            raise _Wrong("NUL", f"holds a NUL at byte {at}; was the file damaged?") from error
        if not line.content.endswith(b"\n"):
            raise _Wrong("cut last line", f"the file ends inside this line ({error}); it was cut.") from error
        raise _Wrong("invalid JSON", f"is not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise _Wrong("not an object", f"is {_type(record)}, not an object; a file holds one object per line.")
    for key, field in limits.keys.items():
        if key not in record:
            raise _Wrong("missing key", f"has no key {key!r}{_near_key(key, field, record)}.")
    return [_checked(record[key], key, limits) for key in limits.keys]


def _near_key(key: str, field: str, names: Any) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    keys = ", ".join(map(repr, list(names)[:8]))
    return f"; did you mean data.{field}={near[0]}?" if near else f", only {keys}" if keys else ", nor any other"


def _checked(text: Any, key: str, limits: Limits) -> bytes:
    """A value of a record as UTF-8. Raises: _Wrong."""
    name = f"its {key!r}"
    if not isinstance(text, str):
        reason = "null" if text is None else "not a string"
        raise _Wrong(reason, f"{name} is {_type(text)}, not a string.")
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        what = f"{name} holds half a surrogate pair, U+{ord(text[error.start]):04X}, at character {error.start}."
        raise _Wrong("lone surrogate", what) from error
    if b"\0" in utf8:
        raise _Wrong("NUL", f"{name} holds a NUL at character {text.index(chr(0))}.")
    if len(utf8) > limits.max_record_bytes:
        what = f"{name} has {len(utf8):,} bytes, more than data.max_record_bytes={limits.max_record_bytes}."
        raise _Wrong("too long", what)
    return utf8


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


# Plain text


def _text(stream: Stream, limits: Limits, report: Report) -> Iterator[list[bytes]]:
    """Documents that, end to end, are the file: cut behind the first blank line after `cut_text_bytes` bytes, or,
    where none comes within as many again, behind a line."""
    path, most = stream.path, limits.max_record_bytes
    if limits.cut_text_bytes == 0:
        text = stream.block(most + 2)
        if len(text) - text.endswith(b"\n") > most:
            what = (
                f"has more than data.max_record_bytes={most} bytes; cut it into documents: data.cut_text_bytes=16384."
            )
            report(Bad(path, _place(1, 0), "too long", what))
            while stream.block(BLOCK_BYTES):
                pass
        else:
            yield from _piece(path, text, 1, 0, report)
        return
    while True:
        number, byte = stream.lines + 1, stream.byte
        text, whole = _cut(stream, limits.cut_text_bytes, most)
        if not text:
            return
        if not whole:  # the last line is too long: what is before it stays
            border = text.rfind(b"\n") + 1
            length = len(text) - border + _rest(stream)
            report(_too_long(path, number + text.count(b"\n"), byte + border, length, most))
            text = text[:border]
        yield from _piece(path, text, number, byte, report)


def text_borders(stream: Stream, limits: Limits) -> Iterator[tuple[int, int]]:
    """Where plain text may be cut so that its documents stay the same: byte, and lines before it."""
    while True:
        text, whole = _cut(stream, limits.cut_text_bytes, limits.max_record_bytes)
        if not text:
            return
        if not whole:
            _rest(stream)
        yield stream.byte, stream.lines


def _cut(stream: Stream, cut: int, most: int) -> tuple[bytes, bool]:
    """The next document, and whether it ends with a line (or the file), not inside one that is too long."""
    parts = [stream.block(cut)]
    size = len(parts[0])
    unfinished = size - (parts[0].rfind(b"\n") + 1)  # bytes of a line that the block ends in
    while size < 2 * cut or unfinished:
        line = stream.line(most + 1 - unfinished)
        parts.append(line)
        size += len(line)
        if not line or (not unfinished and not line.strip()):
            break
        if not line.endswith(b"\n") and unfinished + len(line) > most:
            return b"".join(parts), False
        unfinished = 0
    return b"".join(parts), True


def _piece(path: str, text: bytes, number: int, byte: int, report: Report) -> Iterator[list[bytes]]:
    """A document that begins at this line and byte, if it is one."""
    try:
        text.decode()
        at, reason, what = text.find(b"\0"), "NUL", "holds a NUL at byte {}; is it text?"
    except UnicodeDecodeError as error:
        at, reason, what = error.start, "not UTF-8", f"is not UTF-8 at byte {{}} ({error.reason})."
    if at >= 0:
        line = _place(number + text.count(b"\n", 0, at), byte + text.rfind(b"\n", 0, at) + 1)
        report(Bad(path, line, reason, what.format(byte + at)))
    elif text:
        yield [text]


# Parquet


def _parquet(piece: Slice, limits: Limits, reading: Reading) -> Iterator[list[bytes]]:
    """Of a whole file, or of row groups, by number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, row, sha256 = reading.name, 0, None
    if piece.stop is None:
        with opened(path, lambda found: None) as raw:
            while raw.read(BLOCK_BYTES):
                pass
            sha256 = raw.sha256.hexdigest()
    try:
        with pq.ParquetFile(path) as file:
            groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            for key, field in limits.keys.items():
                _check_column(path, file.schema_arrow, key, field)
            columns = list(limits.keys)
            for group in groups:
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                    for values in zip(*(batch.column(key) for key in columns), strict=True):
                        row += 1
                        try:
                            pairs = zip(values, columns, strict=True)
                            yield [_parquet_text(value, key, limits) for value, key in pairs]
                        except _Wrong as wrong:
                            reading.report(Bad(path, f"row {row}", *wrong.args))
                reading.count(group_bytes(file.metadata, group))
    except (pa.ArrowException, OSError) as error:
        where = f"row {row}" if row else ""
        what = f"is no intact parquet file{' after this row' if row else ''}: {str(error).splitlines()[0]}"
        raise BadFile(Bad(path, where, "damaged parquet", what)) from error
    reading.sha256 = sha256


def _check_column(path: str, schema: Any, key: str, field: str) -> None:
    """Raises: BadFile, for a column that is not there or holds no strings."""
    import pyarrow as pa

    if key not in schema.names:
        raise BadFile(Bad(path, "", "missing column", f"has no column {key!r}{_near_key(key, field, schema.names)}."))
    found = schema.field(key).type
    inner = found.value_type if pa.types.is_dictionary(found) else found
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise BadFile(Bad(path, "", "not a string", f"column {key!r} holds {found}, not strings."))


def group_bytes(metadata: Any, group: int) -> int:
    """Of a row group in the file, all columns."""
    columns = metadata.row_group(group)
    return sum(columns.column(i).total_compressed_size for i in range(columns.num_columns))


def _parquet_text(value: Any, key: str, limits: Limits) -> bytes:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        what = f"its {key!r} is not UTF-8 at byte {error.start} ({error.reason})."
        raise _Wrong("not UTF-8", what) from error
    return _checked(text, key, limits)
