"""Which collectives a compiled program runs, over which mesh axes, and how often."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mtx.hlo.axes import MeshAxes, device_groups
from mtx.hlo.program import Frame, Loops, Op, ints, parse, refuse, times


@dataclass(frozen=True)
class Collective:
    """One tensor that one collective instruction moves between two or more devices.

    `bytes` is the whole tensor per participating group: an all-reduce's tensor, an all-gather's output, a
    reduce-scatter's input; for permutes and all-to-alls, the tensor that one device sends. A combined
    instruction gives one Collective per tensor, all with its `name`. `axes` are the mesh axes of size > 1, in
    mesh order, or `UNKNOWN_AXES` if the device groups are no set of mesh axes. `loops` are the trip counts of
    the enclosing loops, outermost first, None where not static; a loop's condition runs once more than its
    body. `fused`: the TPU compiler's all-reduce-scatter fusion, a real reduce-scatter.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    loops: Loops
    fused: bool
    op_name: str
    name: str


@dataclass(frozen=True)
class Row:
    """Collectives alike in loops, kind, axes and dtype: `count` tensors of together `pass_bytes` in one pass
    of the innermost loop's body, which runs `times` times; `fused` of them are all-reduce-scatter fusions."""

    loops: Loops
    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int
    fused: int
    pass_bytes: int
    times: int

    @property
    def bytes(self) -> int:
        """Bytes over the whole program: one pass times all enclosing trip counts."""
        return self.pass_bytes * self.times


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective that the program runs, in program order.

    `mesh_shape` is the ordered `jax.sharding.Mesh.shape` that the program was jitted on: its row-major
    positions are the partition numbers in the text. Raises ValueError on a mesh of another size, and on a
    collective that cannot be read or is in a computation that nothing seems to call.
    """
    program = parse(text)
    mesh = MeshAxes(mesh_shape)
    if mesh.size != program.partitions:
        raise ValueError(
            f"the program has {program.partitions} partitions, mesh {dict(mesh_shape)} has {mesh.size}"
            " devices; give the shape of the mesh that it was compiled for"
        )
    found: list[Collective] = []
    reached: set[str] = set()

    def visit(frame: Frame, loops: Loops, fused: bool, chains: set[str]) -> None:
        reached.add(frame.name)
        fused = fused or "all-reduce-scatter" in frame.name
        for op in frame.ops.values():
            if op.collective:
                # The TPU compiler splits one collective over several fusions, clones that share a chain_id.
                chain = op.attribute(r'chain_id="(\d+)"')
                if chain is None or chain not in chains:
                    chains.update({chain} if chain else ())
                    found.extend(_read_collective(frame, op, loops, fused, mesh))
            for child, more_loops in frame.children(op):
                visit(child, loops + more_loops, fused, chains if op.opcode.startswith("fusion") else set())

    visit(program.entry, (), False, set())
    program.check_reached(reached, lambda op: op.collective is not None)
    return found


def _read_collective(frame: "Frame", op: Op, loops: Loops, fused: bool, mesh: MeshAxes) -> Iterator[Collective]:
    kind, scale = op.collective or "", 1
    if kind == "collective-permute":
        listed = op.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
        ends = ints(refuse("source-target pairs", op) if listed is None else listed)
        pairs = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a != b]
        if not pairs:
            return
        axes = mesh.of_pairs(pairs)
    else:
        groups = device_groups(op, mesh.size)
        if max(map(len, groups)) == 1:
            return
        axes = mesh.of_groups(groups)
        scale = len(groups[0]) if kind == "all-gather" else 1
    operands = op.operands[:1] if kind == "ragged-all-to-all" else op.operands
    if not operands:
        refuse("operands", op)
    tensors = [(dtype, _bytes(dtype, dims, op) * scale) for dtype, dims in map(frame.tensor, operands)]
    if kind == "all-to-all":  # its operands are the slices of one tensor
        tensors = [(tensors[0][0], sum(size for _, size in tensors))]
    kind, op_name = "reduce-scatter" if fused else kind, op.attribute(r'op_name="([^"]*)"') or ""
    for dtype, size in tensors:
        yield Collective(kind, axes, dtype, size, loops, fused, op_name, op.name)


def _bytes(dtype: str, dims: list[int], op: Op) -> int:
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", "u8" if dtype == "pred" else dtype)
    bits = int(match[1]) if match else refuse(f"element size of {dtype}", op)
    return -(-math.prod(dims) * bits // 8)


def census(text: str, mesh_shape: Mapping[str, int], *, trips: int = 1) -> list[Row]:
    """`collectives`, summed over equal (loops, kind, axes, dtype), outermost loops first.

    `trips` is the trip count of loops that have none in the program (a traced accumulation count).
    """
    groups: dict[tuple[Loops, str, tuple[str, ...], str], list[Collective]] = {}
    for c in collectives(text, mesh_shape):
        groups.setdefault((c.loops, c.kind, c.axes, c.dtype), []).append(c)
    rows = [
        Row(*key, len(cs), sum(c.fused for c in cs), sum(c.bytes for c in cs), times(key[0], trips))
        for key, cs in groups.items()
    ]
    return sorted(rows, key=lambda r: (len(r.loops), str(r.loops), r.axes, r.kind, r.dtype))


def show(rows: Iterable[Row]) -> str:
    """The census as a table. MB is 1e6 bytes; MB/pass is one pass of the innermost loop's body."""
    table = [("loops", "kind", "axes", "dtype", "count", "MB/pass", "times", "MB")]
    for r in rows:
        loops = "x".join("?" if n is None else str(n) for n in r.loops) or "top"
        kind = r.kind + (f" ({r.fused} fused)" if r.fused else "")
        mb = (f"{r.pass_bytes / 1e6:.6g}", str(r.times), f"{r.bytes / 1e6:.6g}")
        table.append((loops, kind, "+".join(r.axes), r.dtype, str(r.count), *mb))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pad = [str.ljust] * 4 + [str.rjust] * 4
    return "\n".join("  ".join(p(s, w) for p, s, w in zip(pad, line, widths, strict=True)) for line in table)
