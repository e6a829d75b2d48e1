"""Text in sentences, by nupunkt (Kiss and Strunk 2006, "Unsupervised multilingual sentence boundary detection")."""


def sentences(text: bytes) -> list[bytes]:
    """The sentences of a text in UTF-8, each with the white space behind it: end to end they are the text."""
    from nupunkt import sent_spans

    letters = text.decode()
    starts = [start for start, _ in sent_spans(letters)][1:]
    return [letters[start:end].encode() for start, end in zip([0, *starts], [*starts, len(letters)], strict=True)]
