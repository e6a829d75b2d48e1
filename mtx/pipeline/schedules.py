"""Pipeline schedules as data: for every tick and stage, which microbatch goes forward and which backward.

The model's layers are cut into `stages * chunks` virtual stages; virtual stage `chunk * stages + stage` lies on
stage `stage`. In a tick each stage has one forward slot (F), one backward slot (B: gradient of the input, and of
the weights where the table has no W) and one weight-gradient slot (W), each filled or idle.

The clock of a tick, on all stages at once:

1. The gradient permute: what the Bs of the *previous* tick made of their inputs moves one stage back and is
   written to slot `g_arrival` of the gradients' buffer.
2. F reads its input from slot `f_slot` of the stash.
3. The activation permute sets out: what the Fs of *this* tick made moves one stage on. It may overlap 4 and 5.
4. B reads its input again from slot `b_slot` of the stash, and the gradient of its output from slot `b_gslot`; both
   slots are free from here on. What a W will need is written to slot `b_wslot`.
5. W reads slot `w_slot`, which is free from here on.
6. The activations that travelled since 3 are written to slot `y_arrival` of the stash.

So a value sent in tick t can be used from tick t + 1 on, in either direction. A gradient takes its slot when tick
t + 1 opens, so that slot must have been read by tick t; an activation takes its slot when tick t closes, so that
slot may still be read by a B of tick t. Within one tick, B may follow the F of its own microbatch, and W its own B.
The two permutes are rings: the last stage is followed by the first, one chunk on.

The first virtual stage has no slot for its input (it embeds the tokens again), the last none for the gradient of
its output (it has the loss), and nothing keeps the last one's output: a B that computes its stage anew can do
without that F altogether.

So far of tables whose Bs compute their stage anew. In one laid out with `keeps`, F writes what its B will need to slot
`f_keep`, and the slot of its input is free from then on; B reads that in slot `b_keep`, free from then on, and has no
`b_slot`.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mtx.errors import ConfigError, Problem

NOTHING = -1
"""In every column: no job, no slot."""


class Row(NamedTuple):
    """The columns of a table in their order, each a number for one stage in one tick, or an array of them."""

    f_mb: Any
    """Microbatch that goes forward."""
    f_chunk: Any
    """Its virtual stage's chunk."""
    f_slot: Any
    """Stash slot that holds its input; nothing on the first virtual stage."""
    b_mb: Any
    """Microbatch that goes backward."""
    b_chunk: Any
    """Its virtual stage's chunk."""
    b_slot: Any
    """Stash slot that holds its input; nothing on the first virtual stage."""
    b_gslot: Any
    """Gradient slot that holds its output's gradient; nothing on the last virtual stage."""
    w_mb: Any
    """Microbatch whose weight gradients are computed."""
    w_chunk: Any
    """Its virtual stage's chunk."""
    w_slot: Any
    """Weight slot with what its B left for it."""
    b_wslot: Any
    """Weight slot to which B writes what its W will need; nothing in a table without W."""
    f_keep: Any
    """Kept slot to which F writes what its B will need; nothing in a table whose Bs compute their stage anew."""
    b_keep: Any
    """Kept slot with what its F left for B."""
    y_arrival: Any
    """Stash slot for the activation that arrives as the tick closes."""
    g_arrival: Any
    """Gradient slot for the gradient that arrives as the tick opens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What every stage does in every tick: the program of a pipeline."""

    rows: np.ndarray
    """int32 [ticks, stages, columns of `Row`]; `NOTHING` where there is nothing."""
    microbatches: int
    """How many go through."""
    chunks: int
    """Virtual stages on each stage."""

    @property
    def ticks(self) -> int:
        return self.rows.shape[0]

    @property
    def stages(self) -> int:
        return self.rows.shape[1]

    @property
    def columns(self) -> Row:
        """Every column, int32 [ticks, stages]: views of `rows`."""
        return Row(*np.moveaxis(self.rows, -1, 0))

    @property
    def has_weight_jobs(self) -> bool:
        """Whether weight gradients have slots of their own, apart from B."""
        at = self.columns
        return bool(max(at.w_mb.max(), at.b_wslot.max()) > NOTHING)

    @property
    def keeps(self) -> bool:
        """Whether Fs keep for their Bs what those need, so that nothing is computed anew."""
        return bool(self.columns.b_keep.max() > NOTHING)

    @property
    def kept_slots(self) -> int:
        """Slots of the buffer of what Fs keep for their Bs; 0 in a table whose Bs compute their stage anew."""
        at = self.columns
        return 1 + int(max(at.f_keep.max(), at.b_keep.max()))

    @property
    def output_slots(self) -> int:
        """Of the kept slots, how many the last virtual stage uses: it keeps its output too, for the loss."""
        at = self.columns
        return 1 + int(at.f_keep[:, -1][at.f_chunk[:, -1] == self.chunks - 1].max(initial=NOTHING))

    @property
    def stash_slots(self) -> int:
        """Slots of the buffer of stage inputs, the same on all stages."""
        at = self.columns
        return 1 + int(max(at.f_slot.max(), at.b_slot.max(), at.y_arrival.max()))

    @property
    def gradient_slots(self) -> int:
        """Slots of the buffer of gradients that have arrived."""
        at = self.columns
        return 1 + int(max(at.b_gslot.max(), at.g_arrival.max()))

    @property
    def weight_slots(self) -> int:
        """Slots of the buffer of what Bs leave for their Ws; 0 in a table without W."""
        at = self.columns
        return 1 + int(max(at.w_slot.max(), at.b_wslot.max()))


class Ticks(NamedTuple):
    """When each job runs: ticks, int [virtual stages, microbatches]. All that a schedule decides."""

    forward: np.ndarray
    backward: np.ndarray
    weight: np.ndarray | None = None
    """None: B computes the weight gradients too."""


def lay_out(stages: int, ticks: Ticks, *, keeps: bool = False) -> Table:
    """The table of jobs at given ticks, with the fewest slots on every stage. Dependencies are `simulate`'s to check.

    keeps: whether Fs keep for their Bs what those need; else Bs compute their stage anew from its input. On the last
    stage the kept slots of the last virtual stage come first, and other chunks use none of them: see `output_slots`.

    Raises: ValueError for jobs that do not fit into a table: two in one place, or before tick 0.
    """
    forward, backward, weight = ticks
    virtual, microbatches = forward.shape
    if virtual % stages:
        raise ValueError(f"{virtual} virtual stages do not divide over {stages} stages")
    k, mb = np.indices(forward.shape)
    chunk, stage = np.divmod(k, stages)
    for kind, tick in zip("FBW", ticks, strict=True):
        if tick is not None:
            _refuse_collisions(kind, tick, stage)

    end = max(int(tick.max()) for tick in ticks if tick is not None)
    rows = np.full((end + 2, stages, len(Row._fields)), NOTHING, np.int32)
    table = Table(rows=rows, microbatches=microbatches, chunks=virtual // stages)
    at = table.columns
    slot = np.full(forward.shape, NOTHING)
    slot[1:] = _slots(stage[1:], forward[:-1] + 1, (forward if keeps else backward)[1:] + 1)
    gslot = np.full(forward.shape, NOTHING)
    gslot[:-1] = _slots(stage[:-1], backward[1:] + 1, backward[:-1] + 1)

    at.f_mb[forward, stage], at.f_chunk[forward, stage], at.f_slot[forward, stage] = mb, chunk, slot
    at.b_mb[backward, stage], at.b_chunk[backward, stage] = mb, chunk
    at.b_gslot[backward, stage] = gslot
    if keeps:
        last, others = (_slots(stage[v], forward[v], backward[v] + 1) for v in (slice(-1, None), slice(-1)))
        others[stage[:-1] == stages - 1] += 1 + last.max()  # the last virtual stage's come first, for `output_slots`
        kept = np.concatenate([others, last])
        at.f_keep[forward, stage], at.b_keep[backward, stage] = kept, kept
    else:
        at.b_slot[backward, stage] = slot
    at.y_arrival[forward[:-1], stage[1:]] = slot[1:]
    at.g_arrival[backward[1:] + 1, stage[:-1]] = gslot[:-1]
    if weight is not None:
        wslot = _slots(stage, backward, weight + 1)
        at.w_mb[weight, stage], at.w_chunk[weight, stage], at.w_slot[weight, stage] = mb, chunk, wslot
        at.b_wslot[backward, stage] = wslot
    if (rows[-1] == NOTHING).all():  # else a gradient is sent that nobody can use: simulate says which
        rows = rows[:-1]
    rows.flags.writeable = False
    return Table(rows=rows, microbatches=microbatches, chunks=virtual // stages)


def _refuse_collisions(kind: str, tick: np.ndarray, stage: np.ndarray) -> None:
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    for job, t in np.ndenumerate(tick):
        place = int(t), int(stage[job])
        if t < 0 or place in taken:
            other = f"that of microbatch {taken[place][1]} stands there" if t >= 0 else "ticks count from 0"
            raise ValueError(f"tick {place[0]}, stage {place[1]}: no room for {kind} of microbatch {job[1]}: {other}")
        taken[place] = job


def _slots(stage: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Slots for values in use in ticks start <= t < end, on each stage the lowest that is free (which is optimal)."""
    slots = np.empty(start.shape, int)
    free: dict[int, list[int]] = {}  # of each stage, a heap; its last entry is the first slot that was never used
    busy: dict[int, list[tuple[int, int]]] = {}  # (free from, slot), a heap
    for job in np.argsort(start, axis=None, kind="stable"):
        mine, held = free.setdefault(int(stage.flat[job]), [0]), busy.setdefault(int(stage.flat[job]), [])
        while held and held[0][0] <= start.flat[job]:
            heapq.heappush(mine, heapq.heappop(held)[1])
        slot = heapq.heappop(mine)
        if not mine:
            mine.append(slot + 1)
        heapq.heappush(held, (int(end.flat[job]), slot))
        slots.flat[job] = slot
    return slots


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """In which order microbatches go through the stages. A subclass defines `ticks`, and is a new schedule."""

    def check(self) -> Iterator[Problem]:
        yield from ()

    def per_stage(self) -> int:
        """Virtual stages on each stage."""
        return 1

    def ticks(self, stages: int, microbatches: int) -> Ticks:
        """When each job runs, by the clock of this module's docstring. Pure."""
        raise AssertionError("a subclass defines it")

    def fits(self, stages: int, microbatches: int) -> bool:
        """Whether the schedule can take that many microbatches."""
        return microbatches >= 1

    def nearest(self, microbatches: int, stages: int) -> tuple[int, ...]:
        """The counts of microbatches nearest to `microbatches`, one from each side, that the schedule can take."""
        start = max(microbatches, 1)
        ways = range(start, 0, -1), range(start, start + 10_000)  # a schedule may fit nowhere
        found = {next((n for n in way if self.fits(stages, n)), None) for way in ways}
        return tuple(sorted(n for n in found if n is not None))

    def table(self, stages: int, microbatches: int, *, keeps: bool = False) -> Table:
        """The schedule's table; `keeps` as in `lay_out`.

        Raises: ConfigError for a count of microbatches that it cannot take.
        """
        if not self.fits(stages, microbatches):
            tries = " or ".join(map(str, self.nearest(microbatches, stages)))
            name = type(self).__name__
            raise ConfigError(f"{name} cannot take {microbatches} microbatches over {stages} stages; try {tries}.")
        return _table(self, stages, microbatches, keeps)


@lru_cache(maxsize=16)
def _table(schedule: Schedule, stages: int, microbatches: int, keeps: bool) -> Table:
    return lay_out(stages, schedule.ticks(stages, microbatches), keeps=keeps)


@dataclass(frozen=True, kw_only=True)
class GPipe(Schedule):
    """Every microbatch forward, then every one backward, first in first out (Huang et al. 2019, section 2.3).

    With P stages and M microbatches: 2(M + P) - 3 ticks, one fewer than the paper's 2(M + P - 1), as the last stage
    turns round within a tick. Idle (P - 1) / (M + P - 1) of the time. Every stage but the first stashes M inputs.
    Where Fs keep for Bs, every stage keeps M microbatches.
    """

    def ticks(self, stages: int, microbatches: int) -> Ticks:
        k, mb = np.indices((stages, microbatches))
        return Ticks(k + mb, microbatches + 2 * stages - 3 - k + mb)


@dataclass(frozen=True, kw_only=True)
class OneFOneB(Schedule):
    """One forward, one backward: PipeDream-flush (Narayanan et al. 2021, Megatron-LM, section 2.2.1).

    With P stages and M microbatches: M + 2(P - 1) ticks. Idle (P - 1) / (M + P - 1) of the time, as GPipe, for any
    costs. Stage s > 0 stashes min(M, 2(P - s) - 1) inputs; the paper's P - s is for one job per tick, which lock step
    makes slower. Where Fs keep for Bs, every stage s keeps min(M, 2(P - s) - 1) microbatches.
    """

    def ticks(self, stages: int, microbatches: int) -> Ticks:
        k, mb = np.indices((stages, microbatches))
        return Ticks(k + mb, 2 * (stages - 1) - k + mb)


@dataclass(frozen=True, kw_only=True)
class Interleaved(Schedule):
    """1F1B over several chunks of layers per stage (Narayanan et al. 2021, Megatron-LM, section 2.2.2).

    Microbatches go in groups of P through chunk after chunk. Where P does not divide M, the first group takes the
    remainder in, so that no tick is lost; its size is G = min(M, P + M mod P). With P stages and v chunks: for M >= P
    Mv + 2(P - 1) + (v - 1)G ticks, each 1/v as long as without chunks, idle (P - 1) / (Mv + P - 1) of the time. Fewer
    microbatches leave gaps: M + 2(Pv - 1) ticks, idle (Pv + M - 1 - Mv) / (Pv + M - 1). Stage s > 0 stashes
    min(Mv, (v - 1)G + 2(P - s) - 1) inputs, stage 0 (v - 1)G; where P divides M, (v - 1)G is (v - 1)P. Where Fs keep
    for Bs, every stage s keeps min(Mv, (v - 1)G + 2(P - s) - 1) microbatches, each of one chunk.
    """

    chunks: int = 2
    """Virtual stages on each stage: the bubble is divided by it, permutes are multiplied."""

    def check(self) -> Iterator[Problem]:
        if self.chunks < 2:
            yield "chunks", "must be at least 2; one chunk per stage is OneFOneB"

    def per_stage(self) -> int:
        return self.chunks

    def ticks(self, stages: int, microbatches: int) -> Ticks:
        k, mb = np.indices((stages * self.chunks, microbatches))
        chunk, stage = np.divmod(k, stages)
        # Each group's first microbatch, and the ticks from one of its chunks to the next: no fewer than P, after
        # which the first of the group is round.
        first = stages + microbatches % stages if microbatches >= stages else stages
        start = np.where(mb < first, 0, mb - (mb - first) % stages)
        pace = np.where(mb < first, first, stages)
        turn = stages - 1 + (self.chunks - 1) * first  # the last virtual stage's first F, and B
        forward = stage + self.chunks * start + chunk * pace + mb - start
        back = (stages - 1 - stage) + self.chunks * start + (self.chunks - 1 - chunk) * pace + mb - start
        return Ticks(forward, turn + back)


@dataclass(frozen=True, kw_only=True)
class ZeroBubble(Schedule):
    """ZB-H1: 1F1B whose weight gradients fill the bubble (Qi et al. 2023, section 2.1).

    F and B run as in 1F1B. A W waits where it would make its tick longer: until the first stage has a B, and while
    the last stages still have Fs and the first none. Behind the last stage's last B every B is followed by a tick for
    Ws alone, so that the B on its way to the first stage is never held up by one.

    With P stages, M >= 2(P - 1) microbatches and costs f, b, w (w at most f and b): M + 3(P - 1) ticks, idle for
    (P - 1)(f + b - w) beside M(f + b + w) of work, as in the paper; 1F1B's is (P - 1)(f + b + w). For any M,
    M + 2(P - 1) + min(M, P - 1) ticks, idle for (P - 1)(f + b) - w min(max(M - P + 1, 0), P - 1).
    Stashes and keeps as 1F1B; stage s < P - 1 holds what at most 2s + 1 Ws need, the last 2(P - 1).
    """

    def ticks(self, stages: int, microbatches: int) -> Ticks:
        forward, backward, _ = OneFOneB().ticks(stages, microbatches)
        turned = microbatches + stages - 2  # the last stage's last B
        pauses = min(microbatches, stages - 1)
        backward = backward + np.maximum(backward - turned - stages + pauses, 0)
        weight = np.empty_like(backward)
        for stage in range(stages):
            waiting: list[int] = []
            for tick in range(turned + stages + pauses):
                backs = np.flatnonzero(backward[stage] == tick)
                waiting += [int(mb) for mb in backs]
                steady = 2 * (stages - 1) <= tick < microbatches
                idle = backs.size == 0 if tick > turned else tick not in forward[stage]
                if waiting and (steady or idle):
                    weight[stage, waiting.pop(0)] = tick
        return Ticks(forward, backward, weight)


AnySchedule: TypeAlias = GPipe | OneFOneB | Interleaved | ZeroBubble
"""Those that a config can name."""
