"""Text out of HTML and OSIS, without a parser: fast, and enough for pages that programs wrote."""

import html
import re

DROPPED = re.compile(
    r'<!--.*?-->|<(head|script|style)\b.*?</\1\s*>|<a [^>]*class="headerlink".*?</a>', re.DOTALL | re.IGNORECASE
)
"""What is no text: and the sign behind a heading with which Sphinx links to it."""
PREFORMATTED = re.compile(r"(<pre\b.*?</pre\s*>)", re.DOTALL | re.IGNORECASE)
BREAK = re.compile(
    r"<(?:br|/?(?:address|article|aside|blockquote|caption|dd|div|dl|dt|figcaption|figure|footer|h[1-6]|header|hr|li|"
    r"main|nav|ol|p|pre|section|table|tbody|thead|title|tr|ul))\b[^>]*>",
    re.IGNORECASE,
)
CELL = re.compile(r"</t[dh]\s*>", re.IGNORECASE)
TAG = re.compile(r"<[!/?a-zA-Z][^>]*>")
OSIS_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)


def decode(content: bytes) -> str:
    """UTF-8, or Latin-1 where it is not; lines end in a newline, and a byte order mark is left out."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def strip_html(page: str, begin: str = r"<body\b[^>]*>", end: str = r"</body\s*>") -> str:
    """The text between two marks (patterns; the page's start and end where one is not found).

    Blocks become lines, cells are separated by spaces, and what is preformatted stays as it is.
    """
    start = re.search(begin, page, re.DOTALL)
    page = page[start.end() :] if start else page
    stop = re.search(end, page, re.DOTALL)
    page = DROPPED.sub("", page[: stop.start()] if stop else page)
    parts = PREFORMATTED.split(page)
    parts[::2] = [re.sub(r"\s+", " ", part) for part in parts[::2]]
    text = TAG.sub("", CELL.sub(" ", BREAK.sub("\n", "".join(parts))))
    return tidy(html.unescape(text).replace("\xa0", " "))


def strip_osis(text: str) -> str:
    """A verse or more of OSIS, the XML of Bibles, without foot notes."""
    text = re.sub(r"\s+", " ", OSIS_NOTE.sub(" ", text))
    return html.unescape(re.sub(r"\s+", " ", TAG.sub("", BREAK.sub(" ", text)))).strip()


def tidy(text: str) -> str:
    """Without blanks at the ends of lines, and with one empty line at most between others."""
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"\n (?! )", "\n", text)).strip()
