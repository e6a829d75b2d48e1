"""Eight CPU devices and a compile cache for every test; what counts as skipped, and what fails instead."""

import os
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

# JAX reads these when it is first imported; tests' child processes inherit them.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtx" / "test-compile-cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("NPROC", "32")  # see mtx.command.simulate
XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # Eight device threads on two busy cores may wait for one another longer than XLA's 40 s, which ends the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
    # Compile faster; the programs are small and run once. What is partitioned stays the same.
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
if version("jaxlib") < "0.11":
    # Its newer way from fusions to machine code takes four times as long; later ones have no other, and take less.
    XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"{k}={v}" for k, v in XLA_FLAGS.items() if k not in given)]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

CACHE_LIFE_S = 14 * 24 * 3600


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # an xdist worker; its controller has done it
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds machine code that will be run
    for entry in CACHE.iterdir():
        if time.time() - max(entry.stat().st_mtime, entry.stat().st_atime) > CACHE_LIFE_S:
            entry.unlink(missing_ok=True)


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, compile cache {os.environ['JAX_COMPILATION_CACHE_DIR']}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where MTX_REQUIRE_AOT=1 says that the compilers are there, a skipped `aot` test has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("aot") and os.environ.get("MTX_REQUIRE_AOT") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped in spite of MTX_REQUIRE_AOT=1: {report.longrepr}"
    return report
