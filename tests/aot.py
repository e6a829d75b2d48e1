"""Devices of machines that are not here, for compiling with the real TPU and CUDA compilers.

Their arrays hold no data: lower with `jax.ShapeDtypeStruct`s and compile, never run. A test that asks for a
compiler which is not installed is skipped, or fails where MTX_REQUIRE_AOT=1 says that it must be there.
"""

import functools
import importlib.util
import os
from pathlib import Path

# libtpu reads these when it loads: no metadata server, no host to describe, several processes at once.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import pytest
from jax.experimental import topologies


def require_aot(*modules: str) -> None:
    """Skips the calling test (MTX_REQUIRE_AOT=1: fails it) unless one of the plugin modules is installed."""
    if any(_installed(module) for module in modules):
        return
    reason = f"needs an ahead-of-time compiler, the Python module {' or '.join(modules)}"
    if os.environ.get("MTX_REQUIRE_AOT") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def tpu_devices(topology: str = "v5e:2x4") -> list[jax.Device]:
    """The devices of a TPU slice, e.g. v5e:2x4 (8 chips), v5p:2x2x1 (4), v6e:4x4 (16)."""
    require_aot("libtpu")
    return _devices("tpu", topology)


def cuda_devices(count: int = 8) -> list[jax.Device]:
    """`count` H200 GPUs, eight to a host and process."""
    require_aot("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    hosts, gpus = (1, count) if count <= 8 else (count // 8, 8)
    if hosts * gpus != count:
        raise ValueError(f"count={count} GPUs do not fill hosts of 8; try count={hosts * gpus}")
    return _devices("cuda", f"1x{hosts}x{gpus}")


@functools.cache
def _devices(platform: str, topology: str) -> list[jax.Device]:
    # Cached because devices of two descriptions of the same machine do not mix in one program.
    if platform == "cuda":
        config = Path(__file__).with_name("h200.txtpb").read_text()
        machine = topologies.get_topology_desc(platform=platform, topology=topology, target_config=config)
    else:
        machine = topologies.get_topology_desc(topology, platform=platform)
    return machine.devices
