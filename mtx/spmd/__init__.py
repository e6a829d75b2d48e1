"""The doors: the few functions through which layers and steps touch the mesh.

They come in two kinds. `Activations` are the doors of layers and losses, which speak in an einsum's letters; the layout
says which axes split a letter, and the doors turn that into communication. `Storage` are the doors of weights: from
stored shards to the arrays in use, and gradients back. Both have two lowerings:

* `Manual`: the code runs inside one `jax.shard_map` over every axis and sees local shapes; each door
  writes its collective and, as a custom VJP, the collective of its gradient (Megatron-LM's f and g).
  A cotangent of a value that several ranks hold alike is held alike by them, whole.
* `Compiled`: the code sees global shapes; each door states the sharding of its result and XLA's
  partitioner finds the communication.

On one device both do nothing but multiply.
"""

from mtx.spmd.compiled import CompiledActivations, CompiledStorage
from mtx.spmd.doors import Activations, Compiled, Manual, Params, Precision, Storage, map_weights, replaced
from mtx.spmd.manual import ManualActivations, ManualStorage
from mtx.spmd.stages import VirtualStage, after, all_layers, relay, this_stage, to_next_stage, to_stage_before

__all__ = [
    "Activations",
    "Compiled",
    "CompiledActivations",
    "CompiledStorage",
    "Manual",
    "ManualActivations",
    "ManualStorage",
    "Params",
    "Precision",
    "Storage",
    "VirtualStage",
    "after",
    "all_layers",
    "map_weights",
    "relay",
    "replaced",
    "this_stage",
    "to_next_stage",
    "to_stage_before",
]
