"""The text of a compiled program as computations and instructions, and what is known of its loops."""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

Loops = tuple[int | None, ...]
"""Trip counts of enclosing loops, outermost first; None where not static."""

_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(?:-start)?"
)
_MENTION = re.compile(rf" (?:{_COLLECTIVE.pattern}|dot|convolution|while)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")


class Op(NamedTuple):
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
        return self.attribute(rf"\b{key}=%?([\w.\-]+)") or refuse(key, self)

    def tensors(self) -> list[tuple[str, list[int]]]:
        """(dtype, dimensions) of every tensor in the result."""
        return [(t, ints(dims)) for t, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", self.type)]


def refuse(what: str, op: Op) -> NoReturn:
    line = f"%{op.name} = {op.type} {op.opcode}({op.arguments}){op.attributes}"
    raise ValueError(f"cannot read the {what} of: {line[:400]}")


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


class Program(NamedTuple):
    computations: dict[str, dict[str, Op]]
    roots: dict[str, Op]
    entry_name: str
    partitions: int

    @property
    def entry(self) -> "Frame":
        return Frame(self, self.entry_name, lambda n: None)

    def check_reached(self, reached: set[str], matters: Callable[[Op], bool]) -> None:
        for name in self.computations.keys() - reached:
            for op in filter(matters, self.computations[name].values()):
                refuse(f"callers of %{name}, which runs the {op.opcode}", op)


def parse(text: str) -> Program:
    computations: dict[str, dict[str, Op]] = {}
    roots: dict[str, Op] = {}
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
            op = computations[current][name] = Op(name, type_, opcode, arguments, operands, attributes)
            if root:
                roots[current] = op
        elif _MENTION.search(line):
            raise ValueError(f"cannot read the instruction: {line.strip()[:400]}")
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled program, compiled.as_text()")
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text, re.MULTILINE)
    return Program(computations, roots, entry, int(partitions[1]) if partitions else 1)


def _split_arguments(rest: str) -> tuple[str, str]:
    """`a, b), key=...` -> (`a, b`, `, key=...`)."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


# Calls and loops.


class Carried(NamedTuple):
    """Element `index` of a loop's carry at the start of an iteration, plus `offset`."""

    index: int
    offset: int


Value = int | Carried | dict[int, "Value"] | None


class Frame(NamedTuple):
    """A computation at one place in the program; `env` says what is known of each parameter there."""

    program: Program
    name: str
    env: Callable[[int], Value]

    @property
    def ops(self) -> dict[str, Op]:
        return self.program.computations[self.name]

    @property
    def root(self) -> Op:
        return self.program.roots[self.name]

    def tensor(self, name: str) -> tuple[str, list[int]]:
        tensors = self.ops[name].tensors()
        if len(tensors) != 1:
            refuse("single tensor", self.ops[name])
        return tensors[0]

    def called(self, computation: str, operands: tuple[str, ...]) -> "Frame":
        def env(n: int) -> Value:
            return self.value(operands[n]) if n < len(operands) else None

        return Frame(self.program, computation, env)

    def children(self, op: Op) -> Iterator[tuple["Frame", Loops]]:
        """The computations that an instruction executes (a reduction's scalar function is none)."""
        if op.opcode.endswith(("-done", "-update")):
            return
        if op.opcode == "while":
            count, carry = self.loop(op)
            for key, more in (("body", 0), ("condition", 1)):
                frame = Frame(self.program, op.computation(key), lambda n: carry)
                yield frame, (None if count is None else count + more,)
            return
        keys = "calls|branch_computations|called_computations|true_computation|false_computation"
        keys += "|to_apply" if op.opcode.startswith("call") else ""
        named = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", op.attributes)
        for i, computation in enumerate(re.findall(r"[\w.\-]+", " ".join(named))):
            operands = op.operands[i + 1 : i + 2] if op.opcode == "conditional" else op.operands
            yield self.called(computation, operands), ()

    def loop(self, op: Op) -> tuple[int | None, dict[int, Value]]:
        """(trip count or None, the constant elements of the carry). The count is the compiler's annotation;
        the TPU compiler writes none, there it follows from the start, the step and the bound."""
        result = self.program.roots[op.computation("body")].operands
        at_start: dict[int, Value] = {i: Carried(i, 0) for i in range(len(result))}
        body = Frame(self.program, op.computation("body"), lambda n: at_start)
        before = {i: self.element(op.operands[0], i) for i in at_start}
        after = {i: body.element(body.root.name, i) for i in at_start}
        constant: dict[int, Value] = {i: v for i, v in before.items() if isinstance(v, int) and after[i] == at_start[i]}
        if known := op.attribute(r'"known_trip_count":\{"n":"?(\d+)'):
            return int(known), constant
        condition = Frame(self.program, op.computation("condition"), lambda n: at_start | constant)
        left, right, direction = condition.comparison(condition.root)
        if not (isinstance(left, Carried) and isinstance(right, int)):
            return None, constant
        start, end = before[left.index], after[left.index]
        if not (isinstance(start, int) and isinstance(end, Carried) and end.index == left.index):
            return None, constant
        sign = {"LT": 1, "LE": 1, "GT": -1, "GE": -1}.get(direction, 0)
        distance, step = sign * (right - start - left.offset), sign * end.offset
        distance += direction in ("LE", "GE")
        return (max(0, -(-distance // step)) if step > 0 else None), constant

    def comparison(self, op: Op) -> tuple[Value, Value, str]:
        if op.opcode == "compare":
            left, right = map(self.value, op.operands)
            return left, right, op.attribute(r"direction=(\w+)") or ""
        if op.opcode == "fusion":
            frame = self.called(op.computation("calls"), op.operands)
            return frame.comparison(frame.root)
        return None, None, ""

    def value(self, name: str) -> Value:
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
            return self.element(op.operands[0], int(op.attribute(r"index=(\d+)") or refuse("index", op)))
        if op.opcode == "fusion":
            frame = self.called(op.computation("calls"), op.operands)
            return frame.value(frame.root.name)
        if op.opcode in ("add", "subtract"):
            left, right = map(self.value, op.operands)
            if op.opcode == "add" and isinstance(left, int):
                left, right = right, left
            if isinstance(right, int):
                right = -right if op.opcode == "subtract" else right
                if isinstance(left, Carried):
                    return Carried(left.index, left.offset + right)
                return left + right if isinstance(left, int) else None
        return None

    def element(self, name: str, index: int) -> Value:
        if self.ops[name].opcode == "tuple":
            return self.value(self.ops[name].operands[index])
        whole = self.value(name)
        return whole.get(index) if isinstance(whole, dict) else None


def times(loops: Loops, trips: int) -> int:
    return math.prod(trips if n is None else n for n in loops)
