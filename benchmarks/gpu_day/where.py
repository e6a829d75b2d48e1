"""Part 1: the device, its software, and the two rates that every other number is held against."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.attention import matmul_flops, seconds
from benchmarks.gpu_day.cases import Case, Day, Row
from pallas_kernels.attention import Chip, flash_attention
from pallas_kernels.masks import Causal, bind

PACKAGES = ("jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax", "numpy", "torch", "triton")


def cases(day: Day) -> Iterator[Case]:
    yield Case(name="machine", run=machine, expected_s=2)
    yield Case(name="rates", run=lambda: rates(256 if day.is_toy else 8192), expected_s=8)
    if day.chip.capability == 9.0:
        yield Case(name="linker", run=linker, expected_s=6)


def machine() -> Row:
    devices = jax.devices()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    row: Row = {"device": devices[0].device_kind, "count": len(devices), "python": platform.python_version()}
    row |= {"jax": jax.__version__, **versions}
    if Chip.of(devices[0]).platform == "gpu":
        query = "name,driver_version,memory.total,clocks.sm,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with contextlib.suppress(FileNotFoundError):
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            row["notes"] = [f"nvidia-smi, {query}: {answer.stdout.strip() or answer.stderr.strip()}"]
    return row


def rates(n: int) -> Row:
    """Rates of a product of two n x n matrices of random bfloat16 numbers, and of a copy of 4 n^2 float32 numbers."""
    flops = matmul_flops(jnp.bfloat16, n, 0.5)
    x = jax.random.normal(jax.random.key(0), (4 * n, n), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    took = seconds(lambda: copy(x), 0.3)
    return {"matmul TFLOP/s": flops / 1e12, "copy TB/s": 2 * x.nbytes / took / 1e12}


def linker() -> Row:
    """Says whether ptxas compiles Mosaic kernels, or nvJitLink, which ignores `setmaxnreg` (message C7504)."""
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of the cache leaves no dumps
    compilation_cache.reset_cache()  # it remembers that it was in use
    q = jax.random.normal(jax.random.key(0), (1, 1024, 4, 128), jnp.bfloat16)
    attend = jax.jit(lambda q: flash_attention(q, q, q, bind(Causal(), 1024), backend="hopper"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            attend.lower(q).compile()
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        logs = [path.read_text() for path in Path(folder).glob("*.ptxas")]
    if not logs:
        return {"failed": "the compiler wrote no log of its registers"}
    (log,) = logs
    registers, spilled = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill", log)
    ignored = "C7504" in log
    row: Row = {"linker": "nvJitLink" if ignored else "ptxas", "setmaxnreg": "ignored" if ignored else "honoured"}
    row |= {"registers": ", ".join(registers), "bytes spilled": max(map(int, spilled), default=0)}
    return row | {"products serialised": "C7512" in log}
