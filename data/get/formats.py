"""How documents lie in a package's files. Each format: files by name -> (name, text) of every document, in order.

The names are unique in what a format returns.
"""

import base64
import gzip
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from data.get import r_data, sword
from data.get.markup import decode, strip_html, tidy

Documents = Iterator[tuple[str, str]]
Format = Callable[[Mapping[str, bytes]], Documents]
"""Files by name, as the recipe names them."""


def text(files: Mapping[str, bytes]) -> Documents:
    """A document a file; files whose name ends in .gz are unpacked."""
    for name in sorted(files):
        content = gzip.decompress(files[name]) if name.endswith(".gz") else files[name]
        yield name.removesuffix(".gz"), decode(content)


@dataclass(frozen=True, kw_only=True)
class Html:
    """A document a page: what is between two marks."""

    begin: str = r"<body\b[^>]*>"
    """Pattern of the mark before the text."""
    end: str = r"</body\s*>"
    """Pattern of the mark behind it."""

    def __call__(self, files: Mapping[str, bytes]) -> Documents:
        for name in sorted(files):
            yield name, strip_html(decode(files[name]), self.begin, self.end)


def dictd(files: Mapping[str, bytes]) -> Documents:
    """A document an entry of a dictionary: NAME.index beside NAME.dict.dz, which is gzip.

    A line of the index: headword, tab, where its entry begins, tab, how long it is, both in base 64 (RFC 2229's
    dictd; `A` is 0). Several headwords may lead to one entry; headwords that begin with 00 are about the dictionary.
    """
    for index in sorted(name for name in files if name.endswith(".index")):
        content = gzip.decompress(files[index.removesuffix(".index") + ".dict.dz"])
        entries: dict[tuple[int, int], str] = {}
        for line in decode(files[index]).splitlines():
            word, start, length, *_ = line.split("\t")
            if not word.startswith("00"):
                entries.setdefault((_base64(start), _base64(length)), word)
        names = _Unique()
        for (start, length), word in sorted(entries.items()):
            yield names(word), decode(content[start : start + length])


def _base64(digits: str) -> int:
    """A number whose digits are those of base 64, the last one for ones."""
    packed = base64.b64decode("A" * (-len(digits) % 4) + digits)
    return int.from_bytes(packed, "big")


def fortunes(files: Mapping[str, bytes]) -> Documents:
    """A document a saying, which a line with a % ends."""
    for name in sorted(files):
        for number, saying in enumerate(re.split(r"^%$", decode(files[name]), flags=re.MULTILINE), 1):
            yield f"{name}/{number}", saying.strip("\n")


def jargon(files: Mapping[str, bytes]) -> Documents:
    """A document an entry, `   :headword: ...`, of the Jargon File; the essays before the entries are one."""
    names = _Unique()
    for _, whole in text(files):
        before, *entries = re.split(r"^ {3}:(?=[^\s:])", whole, flags=re.MULTILINE)
        yield names("introduction"), tidy(before)
        for entry in entries:
            yield names(entry.partition(":")[0]), tidy(f":{entry}")


def r_chapters(files: Mapping[str, bytes]) -> Documents:
    """A document a chapter of each book in an R package: a vector of lines in NAME.rdx and NAME.rdb."""
    for index in sorted(name for name in files if name.endswith(".rdx")):
        store = files[index.removesuffix("x") + "b"]
        for book, lines in sorted(r_data.vectors(files[index], store).items()):
            yield from chapters(book, lines)


def chapters(book: str, lines: list[str]) -> Documents:
    """A book cut at its lines `CHAPTER I`, `Chapter 1`; a VOLUME above belongs to the chapter below."""
    heading = re.compile(r"chapter [0-9IVXLC]+\.?\s*$", re.IGNORECASE)
    starts = [i for i, line in enumerate(lines) if heading.match(line)]
    for i, start in enumerate(starts):
        while start and (not lines[start - 1].strip() or lines[start - 1].startswith("VOLUME ")):
            start -= 1
        starts[i] = start
    borders = [0, *starts[1:], len(lines)]  # the title is part of the first chapter
    for number, (start, stop) in enumerate(itertools.pairwise(borders), 1):
        yield f"{book}/{number}", tidy("\n".join(lines[start:stop]))


def ztext(files: Mapping[str, bytes]) -> Documents:
    """A document a book of a Bible in SWORD's compressed form: NAME.bzs, NAME.bzv and NAME.bzz."""
    for index in sorted((name for name in files if name.endswith(".bzs")), reverse=True):  # ot before nt
        stem = index.removesuffix(".bzs")
        books = sword.books(files[index], files[f"{stem}.bzv"], files[f"{stem}.bzz"])
        for number, verses in enumerate(books):
            yield f"{stem}/{number}", "\n".join(verses)


class _Unique:
    """Counts names that came before: word, word (2), word (3)."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name} ({self._seen[name]})"


CORRUPT = (KeyError, IndexError, ValueError, EOFError, OSError, zlib.error)
"""What a format raises for files that are not as it expects."""
