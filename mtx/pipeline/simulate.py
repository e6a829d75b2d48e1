"""Runs a table on paper: refuses one that would compute the wrong thing, and measures one that would not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mtx.pipeline.schedules import NOTHING, Row, Table


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Times of one microbatch on a whole stage (all its chunks together), in any unit."""

    forward: float = 1.0
    backward: float = 1.0
    """Gradient of the input. A B that computes its stage anew has the forward in it too."""
    weight: float = 1.0
    """Gradient of the weights; part of B in a table without W."""
    layers: tuple[int, ...] | None = None
    """Of each virtual stage, where they differ: the times are then of one with the most. None: all alike."""

    def of(self, table: Table) -> np.ndarray:
        """How long each stage works in each tick, float [ticks, stages]."""
        at, stage = table.columns, np.arange(table.stages)
        layers = np.reshape(self.layers or (1,) * (table.chunks * table.stages), (table.chunks, table.stages))
        share = layers / layers.max() / table.chunks
        backward = self.backward if table.has_weight_jobs else self.backward + self.weight
        jobs = (self.forward, at.f_chunk), (backward, at.b_chunk), (self.weight, at.w_chunk)
        return np.sum([cost * np.where(chunk == NOTHING, 0.0, share[chunk, stage]) for cost, chunk in jobs], axis=0)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a table costs."""

    ticks: int
    time: float
    """In lock step: every tick takes as long as its slowest stage."""
    ideal: float
    """Of stages that never wait: their work alone, on average."""
    stash: tuple[int, ...]
    """The most inputs that each stage holds at once."""
    gradients: tuple[int, ...]
    """The most gradients of outputs that each stage holds at once."""
    weights: tuple[int, ...]
    """The most Ws for which each stage holds operands at once."""
    kept: tuple[int, ...]
    """The most Bs for which each stage holds operands at once; 0 where Bs compute their stage anew."""

    @property
    def bubble(self) -> float:
        """The share of the time in which stages wait, on average, 0 to 1."""
        return 1.0 - self.ideal / self.time


def simulate(table: Table, costs: Costs = Costs()) -> Figures:
    """What a table costs, once it is found legal by the clock of `mtx.pipeline.schedules`.

    Every microbatch goes once forward and once backward through every virtual stage (and has its weight gradients
    computed there once, if any has); each job finds its own input and gradient in the slots that it names; whatever
    arrives has a slot, and none is written over before its value was used for the last time.
    Raises: ValueError that names the first tick, stage and job of which this is not so.
    """
    _check_shape(table)
    stages = [_Stage(table, stage) for stage in range(table.stages)]
    for tick in range(table.ticks):
        jobs = [Row(*row) for row in table.rows[tick].tolist()]
        for phase in (_Stage.open, _Stage.forward, _Stage.backward, _Stage.weight, _Stage.close):
            for stage, row in zip(stages, jobs, strict=True):
                before, after = stages[stage.index - 1], stages[(stage.index + 1) % table.stages]
                if problem := phase(stage, row, before, after):
                    raise ValueError(f"tick {tick}, stage {stage.index}: {problem}")
        for stage in stages:
            stage.gradient_sent, stage.gradient_made = stage.gradient_made, None
    for stage in stages:
        if problem := next(stage.undone(), None):
            raise ValueError(f"after the last tick {table.ticks - 1}, stage {stage.index}: {problem}")
    work = costs.of(table)
    return Figures(
        ticks=table.ticks,
        time=float(work.max(axis=1).sum()),
        ideal=float(work.sum(axis=0).mean()),
        stash=tuple(stage.stash.peak for stage in stages),
        gradients=tuple(stage.gradients.peak for stage in stages),
        weights=tuple(stage.weights.peak for stage in stages),
        kept=tuple(stage.kept.peak for stage in stages),
    )


def _check_shape(table: Table) -> None:
    rows = table.rows
    if rows.ndim != 3 or rows.shape[2] != len(Row._fields) or rows.dtype != np.int32 or not rows.size:
        raise ValueError(
            f"a table is int32 [ticks, stages, {len(Row._fields)} columns], not {rows.dtype} {list(rows.shape)}"
        )


class _Job(NamedTuple):
    """What is computed for one microbatch on one virtual stage; also the name of its input and of its gradient."""

    mb: int
    chunk: int
    stage: int

    def __str__(self) -> str:
        return f"microbatch {self.mb}, chunk {self.chunk}"


@dataclass
class _Buffer:
    """Numbered slots, each with the job whose value it holds."""

    what: str
    held: dict[int, _Job] = field(default_factory=dict)
    peak: int = 0

    def put(self, slot: int, job: _Job) -> str | None:
        if slot < 0:
            return f"no slot for the {self.what} of {job}"
        if slot in self.held:
            return f"the {self.what} of {job} is written over that of {self.held[slot]} in slot {slot}, still needed"
        self.held[slot] = job
        self.peak = max(self.peak, len(self.held))
        return None

    def miss(self, slot: int, job: _Job, *, needed: bool) -> str | None:
        """Why a slot does not hold what the job needs, if it needs anything."""
        if not needed:
            return f"has no {self.what} to read, yet names slot {slot}" if slot != NOTHING else None
        if slot in self.held and self.held[slot] == job:
            return None
        return f"its {self.what} is not in slot {slot}, which holds {self.held.get(slot, 'nothing')}"


class _Stage:
    """One stage while a table runs. Each phase of a tick returns what is wrong, if anything."""

    def __init__(self, table: Table, index: int):
        self.table, self.index, self.splits, self.keeps = table, index, table.has_weight_jobs, table.keeps
        self.stash, self.gradients, self.weights = _Buffer("input"), _Buffer("gradient"), _Buffer("operand of W")
        self.kept = _Buffer("operand of B")
        self.done: dict[str, set[_Job]] = {"F": set(), "B": set()}
        if self.splits:
            self.done["W"] = set()
        self.activation: _Job | None = None  # of the next virtual stage, made in this tick
        self.gradient_made: _Job | None = None  # of the virtual stage before, made in this tick
        self.gradient_sent: _Job | None = None  # made in the tick before

    def first(self, job: _Job) -> bool:
        return job.stage == 0 and job.chunk == 0

    def last(self, job: _Job) -> bool:
        return job.stage == self.table.stages - 1 and job.chunk == self.table.chunks - 1

    def open(self, row: Row, before: "_Stage", after: "_Stage") -> str | None:
        return self._arrive(self.gradients, after.gradient_sent, row.g_arrival)

    def close(self, row: Row, before: "_Stage", after: "_Stage") -> str | None:
        return self._arrive(self.stash, before.activation, row.y_arrival)

    def forward(self, row: Row, before: "_Stage", after: "_Stage") -> str | None:
        self.activation = None
        job = _Job(row.f_mb, row.f_chunk, self.index)
        if row.f_mb == NOTHING:
            return _not_empty("F", row.f_chunk, row.f_slot, row.f_keep)
        problem = (
            self._once("F", job)
            or self.stash.miss(row.f_slot, job, needed=not self.first(job))
            or self._leave(self.kept, row.f_keep, job, needed=self.keeps)
        )
        if problem:
            return f"F of {job}: {problem}"
        if self.keeps:
            self.stash.held.pop(row.f_slot, None)
        if not self.last(job):
            wrapped = self.index == self.table.stages - 1
            self.activation = _Job(job.mb, job.chunk + wrapped, (self.index + 1) % self.table.stages)
        return None

    def backward(self, row: Row, before: "_Stage", after: "_Stage") -> str | None:
        job = _Job(row.b_mb, row.b_chunk, self.index)
        if row.b_mb == NOTHING:
            return _not_empty("B", row.b_chunk, row.b_slot, row.b_keep, row.b_gslot, row.b_wslot)
        problem = (
            self._once("B", job)
            or (None if job in self.done["F"] else "its F has not run")
            or self.stash.miss(row.b_slot, job, needed=not self.first(job) and not self.keeps)
            or self.kept.miss(row.b_keep, job, needed=self.keeps)
            or self.gradients.miss(row.b_gslot, job, needed=not self.last(job))
            or self._leave(self.weights, row.b_wslot, job, needed=self.splits)
        )
        if problem:
            return f"B of {job}: {problem}"
        self.stash.held.pop(row.b_slot, None)
        self.kept.held.pop(row.b_keep, None)
        self.gradients.held.pop(row.b_gslot, None)
        if not self.first(job):
            wrapped = self.index == 0
            self.gradient_made = _Job(job.mb, job.chunk - wrapped, (self.index - 1) % self.table.stages)
        return None

    def weight(self, row: Row, before: "_Stage", after: "_Stage") -> str | None:
        job = _Job(row.w_mb, row.w_chunk, self.index)
        if row.w_mb == NOTHING:
            return _not_empty("W", row.w_chunk, row.w_slot)
        if problem := self._once("W", job) or self.weights.miss(row.w_slot, job, needed=True):
            return f"W of {job}: {problem}"
        del self.weights.held[row.w_slot]
        return None

    @staticmethod
    def _leave(buffer: "_Buffer", slot: int, job: _Job, *, needed: bool) -> str | None:
        return buffer.put(slot, job) if needed else buffer.miss(slot, job, needed=False)

    def undone(self) -> Iterator[str]:
        """What is missing when all ticks are over."""
        for kind, done in self.done.items():
            for chunk in range(self.table.chunks):
                for mb in range(self.table.microbatches):
                    if (job := _Job(mb, chunk, self.index)) not in done:
                        yield f"{kind} of {job} never ran"

    def _once(self, kind: str, job: _Job) -> str | None:
        """Notes that a job runs; why it may not."""
        if not (0 <= job.mb < self.table.microbatches and 0 <= job.chunk < self.table.chunks):
            return f"there are {self.table.microbatches} microbatches and {self.table.chunks} chunks"
        if job in self.done[kind]:
            return "it has run before"
        self.done[kind].add(job)
        return None

    @staticmethod
    def _arrive(buffer: _Buffer, job: _Job | None, slot: int) -> str | None:
        if job is None:
            return f"slot {slot} waits for an {buffer.what}, and none arrives" if slot != NOTHING else None
        return buffer.put(slot, job)


def _not_empty(kind: str, *rest: int) -> str | None:
    return f"an idle {kind} has {NOTHING} in all its columns" if set(rest) != {NOTHING} else None
