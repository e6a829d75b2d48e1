"""Reads a compiled program: which collectives it runs, over which mesh axes, how often, and its dot FLOPs.

The input is `jax.jit(f).lower(...).compile().as_text()`, the optimized per-device HLO of the CPU, TPU or CUDA
compiler (jax 0.10 to 0.12). The grammar was taken from those compilers' output; what this module cannot read
it refuses, because a census that skips an instruction proves nothing.

Limits: every branch of a conditional is listed; work inside opaque custom calls (Pallas, cuDNN, the TPU
compiler's ragged dot) is not seen; dtypes are the program's own (the CPU compiler promotes bf16 reductions).
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, NoReturn

import numpy as np

UNKNOWN_AXES = ("?",)

Loops = tuple[int | None, ...]


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
    program = _parse(text)
    mesh = _MeshAxes(mesh_shape)
    if mesh.size != program.partitions:
        raise ValueError(
            f"the program has {program.partitions} partitions, mesh {dict(mesh_shape)} has {mesh.size}"
            " devices; give the shape of the mesh that it was compiled for"
        )
    found: list[Collective] = []
    reached: set[str] = set()

    def visit(frame: _Frame, loops: Loops, fused: bool, chains: set[str]) -> None:
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


def census(text: str, mesh_shape: Mapping[str, int], *, trips: int = 1) -> list[Row]:
    """`collectives`, summed over equal (loops, kind, axes, dtype), outermost loops first.

    `trips` is the trip count of loops that have none in the program (a traced accumulation count).
    """
    groups: dict[tuple[Loops, str, tuple[str, ...], str], list[Collective]] = {}
    for c in collectives(text, mesh_shape):
        groups.setdefault((c.loops, c.kind, c.axes, c.dtype), []).append(c)
    rows = [
        Row(*key, len(cs), sum(c.fused for c in cs), sum(c.bytes for c in cs), _times(key[0], trips))
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


def dot_flops(text: str, *, trips: int = 1) -> int:
    """FLOPs of all matrix products on one device, 2 per multiply-add, trip counts multiplied in.

    Counts dot, convolution (the TPU compiler's form of a dot; only positions that meet data, like XLA's
    HloCostAnalysis) and GEMM custom calls; of a conditional, the costliest branch. `trips`: see `census`.
    Raises ValueError on a product that cannot be read.
    """
    program = _parse(text)
    reached: set[str] = set()

    def flops(frame: _Frame) -> int:
        reached.add(frame.name)
        total = 0
        for op in frame.ops.values():
            parts = [flops(child) * _times(loops, trips) for child, loops in frame.children(op)]
            total += max(parts, default=0) if op.opcode == "conditional" else sum(parts)
            total += _op_flops(frame, op)
        return total

    total = flops(program.entry)
    program.check_reached(reached, lambda op: op.opcode in ("dot", "convolution"))
    return total


def _times(loops: Loops, trips: int) -> int:
    return math.prod(trips if n is None else n for n in loops)


# --- the text ---------------------------------------------------------------------------------------------

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(?:-start)?"
)
_MENTION = re.compile(rf" (?:{_COLLECTIVE.pattern}|dot|convolution|while)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


class _Op(NamedTuple):
    name: str
    type: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def collective(self) -> str | None:
        match = _COLLECTIVE.fullmatch(self.opcode)
        return match[1] if match else None

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def computation(self, key: str) -> str:
        return self.attribute(rf"\b{key}=%?([\w.\-]+)") or _refuse(key, self)

    def tensors(self) -> list[tuple[str, list[int]]]:
        """(dtype, dimensions) of every tensor in the result."""
        return [(t, _ints(dims)) for t, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", self.type)]


def _refuse(what: str, op: _Op) -> NoReturn:
    line = f"%{op.name} = {op.type} {op.opcode}({op.arguments}){op.attributes}"
    raise ValueError(f"cannot read the {what} of: {line[:400]}")


def _ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


class _Program(NamedTuple):
    computations: dict[str, dict[str, _Op]]
    roots: dict[str, _Op]
    entry_name: str
    partitions: int

    @property
    def entry(self) -> "_Frame":
        return _Frame(self, self.entry_name, lambda n: None)

    def check_reached(self, reached: set[str], matters: Callable[[_Op], bool]) -> None:
        for name in self.computations.keys() - reached:
            for op in filter(matters, self.computations[name].values()):
                _refuse(f"callers of %{name}, which runs the {op.opcode}", op)


def _parse(text: str) -> _Program:
    computations: dict[str, dict[str, _Op]] = {}
    roots: dict[str, _Op] = {}
    entry = current = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif line == "}":
            current = ""
        elif current and (match := _INSTRUCTION.match(line)):
            root, name, type_, opcode, rest = match.groups()
            arguments, attributes = _split_arguments(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            op = computations[current][name] = _Op(name, type_, opcode, arguments, operands, attributes)
            if root:
                roots[current] = op
        elif _MENTION.search(line):
            raise ValueError(f"cannot read the instruction: {line.strip()[:400]}")
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled program, compiled.as_text()")
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text, re.MULTILINE)
    return _Program(computations, roots, entry, int(partitions[1]) if partitions else 1)


def _split_arguments(rest: str) -> tuple[str, str]:
    """`a, b), key=...` -> (`a, b`, `, key=...`)."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


# --- collectives ------------------------------------------------------------------------------------------


class _MeshAxes:
    """Names sets of device groups by mesh axes."""

    def __init__(self, shape: Mapping[str, int]):
        self.names, self.sizes = tuple(shape), tuple(shape.values())
        self.size = math.prod(self.sizes)
        ids = np.arange(self.size).reshape(self.sizes)
        wide = [i for i, n in enumerate(self.sizes) if n > 1]
        subsets = [axes for n in range(1, len(wide) + 1) for axes in combinations(wide, n)]
        self._axes = {_as_sets(_groups_along(ids, axes)): axes for axes in subsets}

    def of_groups(self, groups: list[list[int]]) -> tuple[str, ...]:
        axes = self._axes.get(_as_sets(groups))
        return UNKNOWN_AXES if axes is None else tuple(self.names[i] for i in axes)

    def of_pairs(self, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
        """The axes along which some source differs from its target."""
        ends = np.array(np.unravel_index(np.array(pairs), self.sizes))
        moved = (ends[..., 0] != ends[..., 1]).any(axis=1)
        return tuple(name for name, m in zip(self.names, moved, strict=True) if m)


def _as_sets(groups: list[list[int]]) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, groups))


def _groups_along(ids: np.ndarray, axes: Iterable[int]) -> list[list[int]]:
    axes = tuple(axes)
    rest = [i for i in range(ids.ndim) if i not in axes]
    return ids.transpose(*rest, *axes).reshape(-1, math.prod(ids.shape[i] for i in axes)).tolist()


def _device_groups(op: _Op, devices: int) -> list[list[int]]:
    """The three forms of `replica_groups`: a mesh with names of its axes, an iota, a list."""
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^)]*\))*)\))? \{([^}():]*)\}"
    if match := re.search(mesh, op.attributes):
        return _mesh_groups(*match.groups())
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", op.attributes):
        return _iota(match[2]).reshape(_ints(match[1])).tolist()
    if match := re.search(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}", op.attributes):
        return [_ints(group) for group in re.findall(r"\{([^}]*)\}", match[1])] or [list(range(devices))]
    _refuse("replica groups", op)


def _iota(form: str) -> np.ndarray:
    """`[4,2]T(1,0)`: consecutive numbers of shape [4, 2], transposed; also a plain list `0,2,1,3`."""
    if not form.startswith("["):
        return np.array(_ints(form))
    shape, _, permutation = form.partition("T")
    ids = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """`'a'=2,'b'=4`, `[4,2]T(1,0)` or nothing, `'a','b'` -> groups."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _iota(device_ids or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
    return _groups_along(ids, [list(sizes).index(name) for name in re.findall(r"'([^']+)'", axes)])


def _read_collective(frame: "_Frame", op: _Op, loops: Loops, fused: bool, mesh: _MeshAxes) -> Iterator[Collective]:
    kind, scale = op.collective or "", 1
    if kind == "collective-permute":
        listed = op.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
        ends = _ints(_refuse("source-target pairs", op) if listed is None else listed)
        pairs = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a != b]
        if not pairs:
            return
        axes = mesh.of_pairs(pairs)
    else:
        groups = _device_groups(op, mesh.size)
        if max(map(len, groups)) == 1:
            return
        axes = mesh.of_groups(groups)
        scale = len(groups[0]) if kind == "all-gather" else 1
    operands = op.operands[:1] if kind == "ragged-all-to-all" else op.operands
    if not operands:
        _refuse("operands", op)
    tensors = [(dtype, _bytes(dtype, dims, op) * scale) for dtype, dims in map(frame.tensor, operands)]
    if kind == "all-to-all":  # its operands are the slices of one tensor
        tensors = [(tensors[0][0], sum(size for _, size in tensors))]
    kind, op_name = "reduce-scatter" if fused else kind, op.attribute(r'op_name="([^"]*)"') or ""
    for dtype, size in tensors:
        yield Collective(kind, axes, dtype, size, loops, fused, op_name, op.name)


def _bytes(dtype: str, dims: list[int], op: _Op) -> int:
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", "u8" if dtype == "pred" else dtype)
    bits = int(match[1]) if match else _refuse(f"element size of {dtype}", op)
    return -(-math.prod(dims) * bits // 8)


# --- calls and loops --------------------------------------------------------------------------------------


class _Carried(NamedTuple):
    """Element `index` of a loop's carry at the start of an iteration, plus `offset`."""

    index: int
    offset: int


_Value = int | _Carried | dict[int, "_Value"] | None


class _Frame(NamedTuple):
    """A computation at one place in the program; `env` says what is known of each parameter there."""

    program: _Program
    name: str
    env: Callable[[int], _Value]

    @property
    def ops(self) -> dict[str, _Op]:
        return self.program.computations[self.name]

    @property
    def root(self) -> _Op:
        return self.program.roots[self.name]

    def tensor(self, name: str) -> tuple[str, list[int]]:
        tensors = self.ops[name].tensors()
        if len(tensors) != 1:
            _refuse("single tensor", self.ops[name])
        return tensors[0]

    def called(self, computation: str, operands: tuple[str, ...]) -> "_Frame":
        def env(n: int) -> _Value:
            return self.value(operands[n]) if n < len(operands) else None

        return _Frame(self.program, computation, env)

    def children(self, op: _Op) -> Iterator[tuple["_Frame", Loops]]:
        """The computations that an instruction executes (a reduction's scalar function is none)."""
        if op.opcode.endswith(("-done", "-update")):
            return
        if op.opcode == "while":
            count, carry = self.loop(op)
            for key, more in (("body", 0), ("condition", 1)):
                frame = _Frame(self.program, op.computation(key), lambda n: carry)
                yield frame, (None if count is None else count + more,)
            return
        keys = "calls|branch_computations|called_computations|true_computation|false_computation"
        keys += "|to_apply" if op.opcode.startswith("call") else ""
        named = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", op.attributes)
        for i, computation in enumerate(re.findall(r"[\w.\-]+", " ".join(named))):
            operands = op.operands[i + 1 : i + 2] if op.opcode == "conditional" else op.operands
            yield self.called(computation, operands), ()

    def loop(self, op: _Op) -> tuple[int | None, dict[int, _Value]]:
        """(trip count or None, the constant elements of the carry). The count is the compiler's annotation;
        the TPU compiler writes none, there it follows from the start, the step and the bound."""
        result = self.program.roots[op.computation("body")].operands
        at_start: dict[int, _Value] = {i: _Carried(i, 0) for i in range(len(result))}
        body = _Frame(self.program, op.computation("body"), lambda n: at_start)
        before = {i: self.element(op.operands[0], i) for i in at_start}
        after = {i: body.element(body.root.name, i) for i in at_start}
        constant: dict[int, _Value] = {
            i: v for i, v in before.items() if isinstance(v, int) and after[i] == at_start[i]
        }
        if known := op.attribute(r'"known_trip_count":\{"n":"?(\d+)'):
            return int(known), constant
        condition = _Frame(self.program, op.computation("condition"), lambda n: at_start | constant)
        left, right, direction = condition.comparison(condition.root)
        if not (isinstance(left, _Carried) and isinstance(right, int)):
            return None, constant
        start, end = before[left.index], after[left.index]
        if not (isinstance(start, int) and isinstance(end, _Carried) and end.index == left.index):
            return None, constant
        sign = {"LT": 1, "LE": 1, "GT": -1, "GE": -1}.get(direction, 0)
        distance, step = sign * (right - start - left.offset), sign * end.offset
        distance += direction in ("LE", "GE")
        return (max(0, -(-distance // step)) if step > 0 else None), constant

    def comparison(self, op: _Op) -> tuple[_Value, _Value, str]:
        if op.opcode == "compare":
            left, right = map(self.value, op.operands)
            return left, right, op.attribute(r"direction=(\w+)") or ""
        if op.opcode == "fusion":
            frame = self.called(op.computation("calls"), op.operands)
            return frame.comparison(frame.root)
        return None, None, ""

    def value(self, name: str) -> _Value:
        """What is known of an integer scalar, or of a tuple that came in as a parameter."""
        op = self.ops[name]
        if not re.match(r"[su]\d+\[\]|\(", op.type):
            return None
        if op.opcode == "parameter":
            return self.env(int(op.arguments))
        if op.opcode == "constant":
            return int(op.arguments) if re.fullmatch(r"-?\d+", op.arguments) else None
        if op.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done", "opt-barrier"):
            return self.value(op.operands[0])
        if op.opcode == "get-tuple-element":
            return self.element(op.operands[0], int(op.attribute(r"index=(\d+)") or _refuse("index", op)))
        if op.opcode == "fusion":
            frame = self.called(op.computation("calls"), op.operands)
            return frame.value(frame.root.name)
        if op.opcode in ("add", "subtract"):
            left, right = map(self.value, op.operands)
            if op.opcode == "add" and isinstance(left, int):
                left, right = right, left
            if isinstance(right, int):
                right = -right if op.opcode == "subtract" else right
                if isinstance(left, _Carried):
                    return _Carried(left.index, left.offset + right)
                return left + right if isinstance(left, int) else None
        return None

    def element(self, name: str, index: int) -> _Value:
        if self.ops[name].opcode == "tuple":
            return self.value(self.ops[name].operands[index])
        whole = self.value(name)
        return whole.get(index) if isinstance(whole, dict) else None


# --- FLOPs ------------------------------------------------------------------------------------------------


def _op_flops(frame: _Frame, op: _Op) -> int:
    if op.opcode == "convolution":
        return _convolution_flops(frame, op)
    gemm = op.opcode == "custom-call" and op.attribute(r'custom_call_target="([^"]*(?:matmul|gemm)[^"]*)"')
    if op.opcode not in ("dot", "ragged-dot") and not gemm:
        return 0
    contracted = op.attribute(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)[}\]]')
    if contracted is None or op.opcode == "ragged-dot":
        _refuse("contracted dimensions", op)
    lhs = frame.tensor(op.operands[0])[1]
    return 2 * math.prod(op.tensors()[0][1]) * math.prod(lhs[i] for i in _ints(contracted))


def _convolution_flops(frame: _Frame, op: _Op) -> int:
    labels = re.split(r"_|->", op.attribute(r"dim_labels=([^\s,]+)") or _refuse("dim_labels", op))
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
