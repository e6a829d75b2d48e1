"""Special tokens for objectives: those that a tokenizer has, and behind its vocabulary those that it lacks."""

from typing import Protocol

import numpy as np

from data.batches.objectives import AnyObjective, Frame, Specials
from data.batches.packing import BestFit, Concatenate
from data.tokenizer import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, Tokenizer

NAMES = ("mask", "cls", "sep", "fim_prefix", "fim_middle", "fim_suffix")
"""In the order in which they get numbers where a tokenizer lacks them, so that objectives can follow one another."""

SPACES = ("\u0120", "\u010a", "\u0109")
"""A space, a line's end and a tab, as byte-level vocabularies write them: as letters."""


class Knows(Protocol):
    """A tokenizer's config."""

    def has_special(self, name: str) -> bool: ...


def needed(objective: AnyObjective, sequence_length: int) -> list[str]:
    """The special tokens that must be there, by name; none, where an objective needs none."""
    if not objective.needs:
        return []
    return [*NAMES, *(f"sentinel_{i}" for i in range(objective.sentinels(sequence_length)))]


def lacking(config: Knows, objective: AnyObjective, sequence_length: int) -> int:
    """How many tokens the vocabulary grows by. Raises: ValueError if the tokenizer's file cannot be read."""
    return sum(not config.has_special(name) for name in needed(objective, sequence_length))


def specials(tokenizer: Tokenizer, objective: AnyObjective, sequence_length: int) -> Specials:
    """The special tokens' numbers."""
    found, size = {}, tokenizer.vocab_size
    for name in needed(objective, sequence_length):
        found[name] = tokenizer.special(name)
        if found[name] is None:
            found[name], size = size, size + 1
    sentinels = tuple(found.pop(name) for name in list(found) if name.startswith("sentinel_"))
    return Specials(**found, sentinels=sentinels, pad=tokenizer.special("pad"))


def frame_of(
    tokenizer: Tokenizer, objective: AnyObjective, packing: Concatenate | BestFit, sequence_length: int
) -> Frame:
    """What all rows have in common."""
    return Frame(
        sequence_length=sequence_length,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        isolate_documents=packing.isolate_documents,
        specials=specials(tokenizer, objective, sequence_length),
        codec=tokenizer,
        starts_word_V=starts_word(tokenizer) if objective.by_word else None,
    )


def starts_word(tokenizer: Tokenizer) -> np.ndarray:
    """Whether a token starts a word: bool [vocab_size]. What is neither letter nor digit is a word of its own."""
    if isinstance(tokenizer, ByteTokenizer):
        pieces = [chr(token) if token < 128 else "x" for token in range(tokenizer.vocab_size)]
    elif isinstance(tokenizer, JsonTokenizer | SentencePieceTokenizer):
        pieces = tokenizer.pieces()
    else:
        pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    if isinstance(tokenizer, JsonTokenizer) and tokenizer.within:
        return np.array([not piece.startswith(tokenizer.within) for piece in pieces])
    return np.array([piece[:1] in SPACES or not piece[:1].isalnum() for piece in pieces])
