"""The mask language: what a query may see, as data that every attention backend reads."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Mask:
    """All conditions hold together. The default hides nothing."""

    causal: bool = False
    """A query sees itself and what is before it (by index in the row, not by position)."""
    documents: bool = False
    """A query sees only keys of its own document: equal segment ids."""

    def visible(self, segments_BT: jax.Array, time: int) -> jax.Array | None:
        """The mask spelled out: bool_BTS (B is 1 where it does not matter), None if nothing is hidden."""
        seen = None
        if self.causal:
            i = jnp.arange(time)
            seen = (i[:, None] >= i[None, :])[None]
        if self.documents:
            same = segments_BT[:, :, None] == segments_BT[:, None, :]
            seen = same if seen is None else same & seen
        return seen
