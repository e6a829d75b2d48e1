"""Pipeline parallelism: schedules as data, a simulator that checks and measures them, drawings.

A schedule is a type whose `table` says what each stage does in each tick (`mtx.pipeline.schedules`, which also
holds the clock of a tick); `simulate` refuses a table that would compute something else than the plain step.
`python -m mtx.pipeline --stages 4 --microbatches 8 --schedule OneFOneB --draw out.svg` shows one.
"""

from mtx.pipeline.engine import Engine, Parts
from mtx.pipeline.order import to_order, to_rows
from mtx.pipeline.schedules import (
    NOTHING,
    AnySchedule,
    GPipe,
    Interleaved,
    OneFOneB,
    Row,
    Schedule,
    Table,
    Ticks,
    ZeroBubble,
    lay_out,
)
from mtx.pipeline.simulate import Costs, Figures, simulate

__all__ = [
    "NOTHING",
    "AnySchedule",
    "Costs",
    "Engine",
    "Figures",
    "GPipe",
    "Interleaved",
    "OneFOneB",
    "Parts",
    "Row",
    "Schedule",
    "Table",
    "Ticks",
    "ZeroBubble",
    "lay_out",
    "simulate",
    "to_order",
    "to_rows",
]
