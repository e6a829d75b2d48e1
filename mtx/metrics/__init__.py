"""What a run reports: FLOPs and MFU, throughput, the console, metrics.jsonl, TensorBoard and trackers."""

from mtx.metrics.clock import Clock, Pace, duration
from mtx.metrics.console import Console, line
from mtx.metrics.flops import CONVENTION, flops_per_token
from mtx.metrics.machine import Machine, memory, peak_flops
from mtx.metrics.writers import Metrics, Reporting

__all__ = [
    "CONVENTION",
    "Clock",
    "Console",
    "Machine",
    "Metrics",
    "Pace",
    "Reporting",
    "duration",
    "flops_per_token",
    "line",
    "memory",
    "peak_flops",
]
