"""Which devices are in the machine, which of them JAX uses, and what keeps it from the others."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtx.doctor.finding import Finding, Request, ask
from mtx.doctor.versions import installed

# Drivers that CUDA's wheels need (jax/docs/installation.md).
DRIVER = {"cuda13": 580, "cuda12": 525}
BFLOAT16_SINCE = 8.0  # compute capability
PROBE = """
import json, jax
def memory(d):
    stats = d.memory_stats()
    return stats.get("bytes_limit") if stats else None
print(json.dumps([
    [d.platform, d.device_kind, memory(d), getattr(d, "compute_capability", None)] for d in jax.local_devices()
]))
"""
SECONDS = 120
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_NAME", "TPU_CHIPS_PER_HOST_BOUNDS")


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi."""

    name: str
    driver: str
    used_mib: float
    total_mib: float


@dataclass(frozen=True)
class Seen:
    """What JAX says in a process of its own, and what the machine says without it."""

    started: bool
    devices: list[list]
    """[platform, kind, bytes or None, compute capability or None]"""
    error: str
    gpus: list[Gpu]
    gpu_error: str
    gpu_files: list[str]
    tpu_files: list[str]
    tpu_signs: list[str]

    @property
    def platform(self) -> str:
        return self.devices[0][0] if self.devices else ""


def look(request: Request) -> Seen:
    # Without preallocation the probe takes no memory from a run that goes on beside it.
    answer = ask([sys.executable, "-c", PROBE], SECONDS, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    lines = answer.out.strip().splitlines()
    gpus, gpu_error = _nvidia_smi()
    dev = Path(request.dev)

    def files(pattern: str) -> list[str]:
        return sorted(str(path) for path in dev.glob(pattern))

    return Seen(
        started=answer.code == 0 and bool(lines),
        devices=json.loads(lines[-1]) if answer.code == 0 and lines else [],
        error=_last_words(answer.error) or f"it ended with status {answer.code}",
        gpus=gpus,
        gpu_error=gpu_error,
        gpu_files=files("nvidia[0-9]*"),
        tpu_files=files("accel[0-9]*"),
        tpu_signs=files("vfio/[0-9]*") + [name for name in TPU_VARIABLES if name in os.environ],
    )


def check(request: Request, seen: Seen) -> Iterator[Finding]:
    yield from _environment()
    yield from _driver(seen)
    yield _devices(seen)
    yield from _bfloat16(seen)
    yield from _crowded(seen)


def wheel(gpus: list[Gpu]) -> str:
    """The extra for this driver."""
    return "cuda13" if gpus and _major(gpus[0].driver) >= DRIVER["cuda13"] else "cuda12"


def _nvidia_smi() -> tuple[list[Gpu], str]:
    query = "--query-gpu=name,driver_version,memory.used,memory.total"
    answer = ask(["nvidia-smi", query, "--format=csv,noheader,nounits"], 30)
    if answer.code == 0:
        rows = [[part.strip() for part in line.split(",")] for line in answer.out.splitlines() if line.count(",") == 3]
        return [Gpu(name, driver, _number(used), _number(total)) for name, driver, used, total in rows], ""
    missing = "No such file" in answer.error or "not found" in answer.error
    return [], "" if missing else (answer.out + answer.error).strip().replace("\n", " ")[:200] or "it ended badly"


def _environment() -> Iterator[Finding]:
    """The variables by which JAX takes GPU memory; it reads most mistakes in them as something else, silently."""
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        if (text := os.environ.get(name)) is not None:
            value = _number(text)
            if not 0 < value <= 1:
                fix = f"export {name}=0.9, or unset {name} (then it is 0.75)"
                yield Finding(name, f"{text!r} is no fraction above 0 and up to 1", "FAIL", fix)
            elif value > 0.97:
                fix = f"export {name}=0.92: CUDA, cuDNN and NCCL need memory of their own"
                yield Finding(name, f"{text} leaves nothing beside JAX", "WARN", fix)
            else:
                yield Finding(name, text)
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    if (text := os.environ.get(name)) is not None:
        if text.lower() in ("true", "false", "1", "0"):
            yield Finding(name, text)
        else:
            yield Finding(name, f"{text!r} is neither true nor false", "FAIL", f"export {name}=false, or unset {name}")


def _driver(seen: Seen) -> Iterator[Finding]:
    if seen.gpu_error or (seen.gpu_files and not seen.gpus and seen.platform in ("", "cpu")):
        why = f"nvidia-smi fails: {seen.gpu_error}" if seen.gpu_error else f"{seen.gpu_files[0]} but no nvidia-smi"
        fix = "load the driver (sudo modprobe nvidia) or reboot after its update; in a container: docker run --gpus all"
        yield Finding("nvidia driver", why, "FAIL", fix)
    if not seen.gpus:
        return
    version = seen.gpus[0].driver
    kind = next((kind for kind in DRIVER if installed(f"jax-{kind}-plugin")), None)
    if _major(version) < DRIVER["cuda12"]:
        fix = f"install an NVIDIA driver of at least {DRIVER['cuda12']} (better {DRIVER['cuda13']})"
        yield Finding("nvidia driver", f"{version}: too old for any CUDA wheel of JAX", "FAIL", fix)
    elif kind and _major(version) < DRIVER[kind]:
        fix = f"pip uninstall -y jax-{kind}-plugin jax-{kind}-pjrt && pip install -e '.[cuda12]'"
        yield Finding("nvidia driver", f"{version}: {kind} needs {DRIVER[kind]}", "FAIL", fix)
    else:
        yield Finding("nvidia driver", version)


def _devices(seen: Seen) -> Finding:
    forced = os.environ.get("JAX_PLATFORMS", "")
    if not seen.started:
        if forced not in ("", "cpu"):
            found = f"JAX_PLATFORMS={forced} cannot be had: {seen.error}"
            return Finding("devices", found, "FAIL", f"unset JAX_PLATFORMS{_or_install(seen)}")
        fix = "mend what failed above, then: python -c 'import jax; print(jax.devices())'"
        if "in use" in seen.error:
            fix = "end the process that holds the device: sudo lsof -w /dev/accel* /dev/vfio/* /dev/nvidia*"
        return Finding("devices", f"JAX does not start: {seen.error}", "FAIL", fix)
    kind, memory = seen.devices[0][1], seen.devices[0][2]
    found = f"{len(seen.devices)} x {kind}" + (f", {memory / 1e9:.1f} GB each" if memory else "")
    return (_idle(seen, found) if seen.platform == "cpu" else None) or Finding("devices", found)


def _idle(seen: Seen, found: str) -> Finding | None:
    """An accelerator that JAX leaves alone, if there is one."""
    gpu = f"{len(seen.gpus)} x {seen.gpus[0].name}" if seen.gpus else ", ".join(seen.gpu_files)
    present = gpu or ", ".join([*seen.tpu_files, *seen.tpu_signs])
    if not present:
        return None
    found = f"{found}; idle: {present if gpu else f'a TPU ({present})'}"
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return Finding("devices", found, "WARN", "unset JAX_PLATFORMS: it forces the CPU")
    if not gpu:  # variables, and files that other drivers make too, only hint at a TPU
        return Finding("devices", found, "FAIL" if seen.tpu_files else "WARN", "pip install -e '.[tpu]'")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("devices", found, "WARN", "unset CUDA_VISIBLE_DEVICES: it hides every GPU")
    plugin = next((kind for kind in DRIVER if installed(f"jax-{kind}-plugin")), None)
    if plugin is None or (seen.gpus and _major(seen.gpus[0].driver) < DRIVER[plugin]):
        return Finding("devices", found, "FAIL", f"pip install -e '.[{wheel(seen.gpus)}]'")
    fix = f"pip install -U --force-reinstall 'jax[{plugin}]=={installed('jax')}'"
    return Finding("devices", f"{found}, though {plugin} is installed: {seen.error}", "FAIL", fix)


def _or_install(seen: Seen) -> str:
    if seen.gpus or seen.gpu_files:
        return f", or pip install -e '.[{wheel(seen.gpus)}]'"
    return ", or pip install -e '.[tpu]'" if seen.tpu_files or seen.tpu_signs else ""


def _bfloat16(seen: Seen) -> Iterator[Finding]:
    if not seen.devices:
        return
    platform, kind, _, capability = seen.devices[0]
    if platform == "cpu":
        yield Finding("bfloat16", "no gain on a CPU; precision.compute=auto computes in float32")
    elif capability is not None and _number(str(capability)) < BFLOAT16_SINCE:
        fix = "leave precision.compute=auto, which computes in float32 here"
        yield Finding("bfloat16", f"{kind} (compute capability {capability}) does not multiply it", "WARN", fix)
    else:
        yield Finding("bfloat16", f"{kind} multiplies it natively")


def _crowded(seen: Seen) -> Iterator[Finding]:
    full = [gpu for gpu in seen.gpus if gpu.used_mib > 0.1 * gpu.total_mib]
    if full:
        found = f"{full[0].used_mib / 1024:.0f} of {full[0].total_mib / 1024:.0f} GiB of {full[0].name} are taken"
        yield Finding("gpu memory", found, "WARN", "nvidia-smi (who is it?), or choose others: CUDA_VISIBLE_DEVICES=1")


def _last_words(text: str) -> str:
    """The line that says what went wrong, without its time stamp."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"F\d{4} |\w*(Error|Exception)\b", line)]
    return re.sub(r"^[FE]\d{4} \S+ +\d+ ", "", (telling or lines or [""])[-1])[:300]


def _major(version: str) -> int:
    return int(_number(version.partition(".")[0]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
