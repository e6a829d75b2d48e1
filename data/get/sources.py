"""The sources of the recipes: which package holds each, where in it, in which format, and under which licence."""

import re
from dataclasses import dataclass

from data.get import formats
from data.get.formats import Format, Html

KERNEL_PAGE = Html(begin=r'role="main"[^>]*>', end=r'<footer|<div class="sphinxsidebar|<div class="clearer')
HANDBOOK_PAGE = Html(begin=r'<ul class="docnav top">.*?</ul>', end=r'<ul class="docnav">')
POSTGRES_PAGE = Html(begin=r'<div class="navheader">.*?<hr />', end=r'<div class="navfooter">')
ANARCHISM_PAGE = Html(end=r'<div id="book-navigation')
DOC = "usr/share/doc/"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of documents in a Debian package."""

    name: str
    """Of its file, and the value of `source` in its records."""
    package: str
    """The package's name, or a pattern such as `linux-doc-*`."""
    newest: int = 0
    """Of the packages that match, this one, counted from the newest."""
    files: re.Pattern[str]
    """Which files, by their whole path; the first group is the name that the format reads."""
    format: Format
    """How documents lie in them."""
    licence: str
    """As Debian's copyright file has it."""


def _source(
    name: str, package: str, files: str, form: Format, licence: str, *, newest: int = 0, under: str = DOC
) -> Source:
    where = re.compile(under + files)
    return Source(name=name, package=package, files=where, format=form, licence=licence, newest=newest)


AUSTEN = _source(
    "austen",
    "r-cran-janeaustenr",
    r"R/site-library/janeaustenr/data/(Rdata\.rd[bx])",
    formats.r_chapters,
    "public domain (packaging: MIT)",
    under="usr/lib/",
)
KERNEL, GPL, DICTIONARY = "linux-doc-[0-9]*", "GPL-2", "usr/share/dictd/"
REST, TREE = r"[^/]+/html/_sources/(.+\.rst)\.txt", r"[^/]+/Documentation/(.+\.gz)"
DEBIAN = (
    AUSTEN,
    _source("anarchism", "anarchism", r"anarchism/html/(.+\.html)", ANARCHISM_PAGE, GPL),
    _source("handbook", "debian-handbook", r"[^/]+/html/(.+\.html)", HANDBOOK_PAGE, "GPL-2+ or CC-BY-SA-3.0"),
    _source("python", "python3.[0-9]*-doc", r"[^/]+/html/_sources/(.+\.rst)\.txt", formats.text, "PSF-2"),
    _source(
        "perl", "perl-doc", r"perl/[0-9.]+/(?:pod/)?(.+\.pod)", formats.text, "GPL-1+ or Artistic", under="usr/share/"
    ),
    _source("postgres", "postgresql-doc-[0-9]*", r"[^/]+/html/(.+\.html)", POSTGRES_PAGE, "PostgreSQL"),
    _source("git", "git-doc", r"git-doc/(.+\.txt)", formats.text, GPL),
    _source("jargon", "jargon-text", r"jargon-text/(jargon\.txt\.gz)", formats.jargon, "public domain"),
    _source("foldoc", "dict-foldoc", r"(foldoc\.(?:index|dict\.dz))", formats.dictd, "GFDL-1.1+", under=DICTIONARY),
    _source("kernel", KERNEL, REST, formats.text, GPL),
    _source(
        "bible",
        "sword-text-web",
        r"[^/]+/([on]t\.bz[svz])",
        formats.ztext,
        "public domain",
        under="usr/share/sword/modules/texts/ztext/",
    ),
    _source("gcide", "dict-gcide", r"(gcide\.(?:index|dict\.dz))", formats.dictd, "GPL-2+", under=DICTIONARY),
    _source("wordnet", "dict-wn", r"(wn\.(?:index|dict\.dz))", formats.dictd, "WordNet-3.0", under=DICTIONARY),
    _source("fortunes", "fortunes", r"([^/.]+)", formats.fortunes, "mixed, free", under="usr/share/games/fortunes/"),
    _source("kernel_old", KERNEL, REST, formats.text, GPL, newest=1),
    _source("kernel_tree", KERNEL, TREE, formats.text, GPL),
    _source("kernel_tree_old", KERNEL, TREE, formats.text, GPL, newest=1),
    _source("kernel_pages_old", KERNEL, r"[^/]+/html/(?!_)(.+\.html)", KERNEL_PAGE, GPL, newest=1),
)
"""Best first: a source's place is its priority, by which one of two like documents is kept."""

RECIPES = {"austen": (AUSTEN,), "debian": DEBIAN}
