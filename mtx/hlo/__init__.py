"""Reads a compiled program: which collectives it runs, over which mesh axes, how often, and its dot FLOPs.

The input is `jax.jit(f).lower(...).compile().as_text()`, the optimized per-device HLO of the CPU, TPU or CUDA
compiler (jax 0.10 to 0.12). The grammar was taken from those compilers' output; what this module cannot read
it refuses, because a census that skips an instruction proves nothing.

Limits: every branch of a conditional is listed; work inside opaque custom calls (Pallas, cuDNN, the TPU
compiler's ragged dot) is not seen; dtypes are the program's own (the CPU compiler promotes bf16 reductions).
"""

from mtx.hlo.axes import UNKNOWN_AXES
from mtx.hlo.flops import dot_flops
from mtx.hlo.program import Loops
from mtx.hlo.traffic import Collective, Row, census, collectives, show

__all__ = ["UNKNOWN_AXES", "Collective", "Loops", "Row", "census", "collectives", "dot_flops", "show"]
