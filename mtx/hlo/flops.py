"""The matrix products of a compiled program."""

import math
import re

import numpy as np

from mtx.hlo.program import Frame, Op, ints, parse, refuse, times


def dot_flops(text: str, *, trips: int = 1) -> int:
    """FLOPs of all matrix products on one device, 2 per multiply-add, trip counts multiplied in.

    Counts dot, convolution (the TPU compiler's form of a dot; only positions that meet data, like XLA's
    HloCostAnalysis) and GEMM custom calls; of a conditional, the costliest branch. `trips`: see `census`.
    Raises ValueError on a product that cannot be read.
    """
    program = parse(text)
    reached: set[str] = set()

    def flops(frame: Frame) -> int:
        reached.add(frame.name)
        total = 0
        for op in frame.ops.values():
            parts = [flops(child) * times(loops, trips) for child, loops in frame.children(op)]
            total += max(parts, default=0) if op.opcode == "conditional" else sum(parts)
            total += _op_flops(frame, op)
        return total

    total = flops(program.entry)
    program.check_reached(reached, lambda op: op.opcode in ("dot", "convolution"))
    return total


def _op_flops(frame: Frame, op: Op) -> int:
    if op.opcode == "convolution":
        return _convolution_flops(frame, op)
    gemm = op.opcode == "custom-call" and op.attribute(r'custom_call_target="([^"]*(?:matmul|gemm)[^"]*)"')
    if op.opcode not in ("dot", "ragged-dot") and not gemm:
        return 0
    contracted = op.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)[}\]]')
    if contracted is None or op.opcode == "ragged-dot":
        refuse("contracted dimensions", op)
    lhs = frame.tensor(op.operands[0])[1]
    return 2 * math.prod(op.tensors()[0][1]) * math.prod(lhs[i] for i in ints(contracted))


def _convolution_flops(frame: Frame, op: Op) -> int:
    labels = re.split(r"_|->", op.attribute(r"dim_labels=([^\s,]+)") or refuse("dim_labels", op))
    shapes = [frame.tensor(op.operands[0])[1], frame.tensor(op.operands[1])[1], op.tensors()[0][1]]
    lhs, rhs, out = (dict(zip(names, dims, strict=True)) for names, dims in zip(labels, shapes, strict=True))
    window = dict(re.findall(r"(\w+)=(\S+)", op.attribute(r"window=\{([^}]*)\}") or ""))
    spatial = [name for name in labels[0] if name.isdigit()]

    def along(key: str, name: str, default: str) -> int:
        return int((window[key].split("x")[int(name)] if key in window else default).split("_")[0])

    positions = 1
    for name in spatial:
        spread, start = along("lhs_dilate", name, "1"), -along("pad", name, "0_0")
        first = start + along("stride", name, "1") * np.arange(out[name])
        last = (lhs[name] - 1) * spread
        taps = (first + k * along("rhs_dilate", name, "1") for k in range(rhs[name]))
        positions *= sum(int(((at >= 0) & (at <= last) & (at % spread == 0)).sum()) for at in taps)
    return 2 * out["b"] * out["f"] * rhs["i"] * positions
