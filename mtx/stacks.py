"""Configs of models whose layers are of several kinds: named stacks, each a pattern of blocks that repeats."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mtx.attention import AttentionConfig
from mtx.errors import Problem
from mtx.layers import Gelu, LayerNorm, RMSNorm, SwiGLU

PARTS = ("attention", "mlp", "norm")
"""What a block may say instead of the model."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A layer of a pattern. A part that is None is the model's."""

    name: str = "block"
    """Its name in checkpoints; no other block of the pattern has it."""
    attention: AttentionConfig | None = None
    """Self-attention of these layers, their window or pattern included."""
    mlp: Gelu | SwiGLU | None = None
    """Feed-forward part of these layers."""
    norm: LayerNorm | RMSNorm | None = None
    """Before attention and before feed-forward of these layers."""

    def check(self) -> Iterator[Problem]:
        yield from _name(self.name)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that repeat a pattern. Compile time does not depend on how often."""

    name: str
    """Its name in checkpoints; no other stack of the model has it."""
    count: int
    """Repetitions of the pattern."""
    pattern: tuple[Block, ...] = (Block(),)
    """The layers of one repetition, in their order."""

    def check(self) -> Iterator[Problem]:
        yield from _name(self.name)
        if self.count < 1:
            yield "count", "must be at least 1"
        if not self.pattern:
            yield "pattern", "holds no block; leave it out for one block that is as the model says"
        if twice := repeated_name([block.name for block in self.pattern]):
            yield "pattern", f"names two blocks {twice!r}; give each a name of its own"


def repeated_name(names: list[str]) -> str | None:
    """The first name that occurs twice, if one does."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def _name(name: str) -> Iterator[Problem]:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        yield "name", "must be lower-case letters, digits and _, such as local"
