"""Checkpoints that are verified: Orbax writes the arrays, sharded and asynchronously; what Orbax lacks is ours.

That is a manifest, written last, with the SHA-256 of every file and a digest of every array that does not depend
on the mesh. Only a step whose files agree with it is resumed from. No other module knows Orbax.
"""

from mtx.checkpoint.digest import digests
from mtx.checkpoint.manifest import Manifest, tree_of
from mtx.checkpoint.store import Checkpoints, DigestError, Found, Store, kept, named

__all__ = ["Checkpoints", "DigestError", "Found", "Manifest", "Store", "digests", "kept", "named", "tree_of"]
