"""Text in files as a corpus: read once by `prepare`, which writes token shards; trained from by `load`."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from data.documents import Document, Part, Reading, Slice
from data.files.find import find, kind
from data.files.records import Limits, documents
from data.files.sentences import sentences
from data.files.slicing import cut
from data.prepare.prepared import Prepared
from data.prepare.source import SPLITS, Fail, Skip
from data.tokenizer import AnyTokenizer, Bytes


@dataclass(frozen=True, kw_only=True)
class TextFiles(Prepared):
    """Your own text: JSON lines, plain text or parquet, tokenized once into shards that training reads."""

    paths: str
    """Files, folders or globs, separated by commas: .jsonl, .json (one object per line), .txt, each also .gz or .zst,
    .md and .parquet. Folders are read with all below them. UTF-8; a mark at a file's start is left out."""
    text_key: str = "text"
    """Key of a JSON object, or column of a parquet table, that holds a document's text."""
    prompt_key: str | None = None
    """Key or column of what precedes the text and is only read, never predicted; None: nothing does. It and the text
    become two sequences of one document."""
    sentences: bool = False
    """Each sentence becomes a sequence of its own, as masked language models need it that tell whether two follow one
    another."""
    tokenizer: AnyTokenizer = Bytes()
    """Text to tokens."""
    split: str = "949,50,1"
    """Shares of the documents for training, validation and test: two or three numbers, divided by their sum. A
    hash of its text decides where a document goes, so that copies fall on one side."""
    bad_records: Fail | Skip = Fail()
    """What happens at a record that cannot be used."""
    cut_text_bytes: int = 16384
    """Plain text is cut into documents behind the first blank line after so many bytes (behind a line, if there is
    none for as many again); 0: each file is one document."""
    max_record_bytes: int = 32 * 2**20
    """A longer line, or a longer document that is not cut, is a bad record. While a document is tokenized it takes
    some 140 times its size in memory (4 times as bytes)."""
    folder: str | None = None
    """Where the shards are; None: prepared/ and a hash of the fields above that decide what is in them."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not self.paths.strip(" ,"):
            yield "paths", "is empty; name files, folders or globs"
        if not self.text_key:
            yield "text_key", "is empty; name the key that holds the text"
        if self.prompt_key in ("", self.text_key):
            yield "prompt_key", "must name another key than text_key; None: there is no prompt"
        if self.sentences and self.prompt_key is not None:
            yield "sentences", "cannot be true with a prompt_key: prompt and text are one sequence each"
        if self.cut_text_bytes < 0:
            yield "cut_text_bytes", "must be at least 0; 0 makes each file one document"
        if not 1 <= self.max_record_bytes <= 2**30:
            yield "max_record_bytes", f"must lie in 1..{2**30}; try {32 * 2**20}"
        elif self.cut_text_bytes > self.max_record_bytes // 2:
            yield "cut_text_bytes", f"must be at most half of max_record_bytes={self.max_record_bytes}"
        if re.match(r"\w+://", self.paths):
            yield "paths", "is not on a file system; copy the files, or mount the bucket"
        try:
            self.shares()
        except ValueError as error:
            yield "split", str(error)
        yield from super().check()

    def shares(self) -> dict[str, Fraction]:
        """The split's parts by name, of 1, without those of 0. Raises: ValueError."""
        try:
            numbers = [Fraction(part.strip()) for part in self.split.split(",")]
        except (ValueError, ZeroDivisionError):
            numbers = []
        if len(numbers) not in (2, 3) or min(numbers) < 0 or numbers[0] == 0:
            raise ValueError("must be two or three numbers, the first above 0, none below; try 949,50,1 or 1,0")
        named = zip(SPLITS, numbers, strict=False)
        return {name: number / sum(numbers) for name, number in named if number}

    def limits(self) -> Limits:
        """How files are read."""
        return Limits(
            text_key=self.text_key,
            prompt_key=self.prompt_key,
            cut_text_bytes=self.cut_text_bytes,
            max_record_bytes=self.max_record_bytes,
        )

    # What `Prepared` asks for

    @property
    def described(self) -> str:
        """See `Prepared`."""
        return f"data.paths={self.paths}"

    def parts(self) -> list[Part]:
        """The files."""
        files = find(self.paths).files
        plain = [path for path in files if kind(path) == "text"]
        if plain and self.prompt_key is not None:
            raise ValueError(
                f"data.prompt_key={self.prompt_key}: {plain[0]} is plain text, which has no keys; name files of JSON "
                "lines or parquet alone."
            )
        return [Part(path, *_state(path)) for path in files]

    def slices(self, part: Part, most_bytes: int, reading: Reading) -> list[Slice]:
        """See `Prepared`."""
        return cut(part, most_bytes, reading, self.limits())

    def read(self, piece: Slice, reading: Reading) -> Iterator[Document]:
        """See `Prepared`."""
        yield from documents(reading, self.limits(), piece)

    def sequences(self, document: Sequence[bytes]) -> Sequence[bytes]:
        """See `Prepared`."""
        return sentences(document[0]) if self.sentences else document

    def ignored(self) -> list[str]:
        """Files in the folders that are hidden, or of no known kind."""
        return find(self.paths).ignored

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether one of the files is."""
        return any(map(os.path.lexists, names))

    def too_few(self, why: str) -> ValueError:
        """See `Prepared`."""
        plain = any(kind(path) == "text" for path in find(self.paths).files)
        cut = ", cut it finer (data.cut_text_bytes=1024)" if plain else ""
        return ValueError(f"data.split={self.split}: {why} Give more text{cut}, or hold none out: data.split=1,0.")


def _state(path: str) -> tuple[str, int]:
    """Fingerprint and size of a file; of nothing for one that cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return "", 0
    return f"{status.st_size} bytes, changed {status.st_mtime_ns} ns", status.st_size
