"""Sentences: nothing of a text is lost between them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data.files.sentences import sentences

PARTS = [
    "Mr. Smith",
    " said",
    ".",
    "! ",
    "? ",
    "\n\n",
    " ",
    "3.14",
    '"',
    "\u00e9",
    " e.g. ",
    "U.S.",
    "The end",
    "\u3002",
]


def test_sentences_end_where_a_reader_would_say() -> None:
    text = 'Dr. Who came at 3.30 p.m. on Monday.  "Who?" asked Mr. Smith. Nobody knew!\n'
    assert [one.decode() for one in sentences(text.encode())] == [
        "Dr. Who came at 3.30 p.m. on Monday.  ",
        '"Who?" asked Mr. Smith. ',
        "Nobody knew!\n",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=30).map("".join))
def test_end_to_end_they_are_the_text(text: str) -> None:
    utf8 = text.encode(errors="replace")
    found = sentences(utf8)
    assert b"".join(found) == utf8
    assert all(found) or not utf8
