"""The doors: the few functions through which layers touch the mesh.

Layers speak in an einsum's letters; the layout says which letters are split, and the doors turn that
into communication. Two lowerings of the same doors:

* `Manual`: the code runs inside one `jax.shard_map` over every axis and sees local shapes; each door
  writes its collective and, as a custom VJP, the collective of its gradient (Megatron-LM's f and g).
  A cotangent of a value that `model` ranks hold alike is held alike by them, whole.
* `Compiled`: the code sees global shapes; each door states the sharding of its result and XLA's
  partitioner finds the communication.

On one device both do nothing but multiply.
"""

from mtx.spmd.compiled import CompiledDoors
from mtx.spmd.doors import Compiled, Doors, Manual, Params, Precision, map_weights, replaced
from mtx.spmd.manual import ManualDoors
from mtx.spmd.stages import VirtualStage, after, relay, this_stage, to_next_stage, to_stage_before

__all__ = [
    "Compiled",
    "CompiledDoors",
    "Doors",
    "Manual",
    "ManualDoors",
    "Params",
    "Precision",
    "VirtualStage",
    "after",
    "map_weights",
    "relay",
    "replaced",
    "this_stage",
    "to_next_stage",
    "to_stage_before",
]
