"""XLA_FLAGS and LIBTPU_INIT_ARGS: one flag that XLA no longer knows, or a slip of the pen, ends the process."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mtx.doctor.finding import Answer, Finding, Request, ask
from mtx.doctor.versions import installed

START_CPU = "import jax; jax.devices()"
# The TPU compiler without a TPU: it reads its flags when it is loaded.
LOAD_LIBTPU = (
    "from jax.experimental import topologies as t; t.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
)
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
SECONDS = 60


def check(request: Request, started: bool) -> Iterator[Finding]:
    """`started`: JAX came up with the flags as they are, so that XLA knows them all."""
    if text := os.environ.get("XLA_FLAGS", "").strip():
        yield from _xla_flags(text, started)
    if text := os.environ.get("LIBTPU_INIT_ARGS", "").strip():
        yield from _libtpu_flags(text)


def _xla_flags(text: str, started: bool) -> Iterator[Finding]:
    flags, name = _split(text), "XLA_FLAGS"
    if not flags[0].startswith("-"):
        if not started:
            fix = f"export XLA_FLAGS='{' '.join(_dashed(flag) for flag in flags)}' (or name a file that is there)"
            yield Finding(name, f"{flags[0]} has no -- before it, so XLA takes it for a file of flags", "FAIL", fix)
        else:
            yield Finding(name, f"read from the file {flags[0]}")
        return
    if bare := [flag for flag in flags if not flag.startswith("-")]:
        fix = f"export XLA_FLAGS='{' '.join(_dashed(flag) for flag in flags)}'"
        yield Finding(name, f"{', '.join(bare)}: without -- XLA ignores it, silently", "FAIL", fix)
    dashed = [flag for flag in flags if flag not in bare]
    wrong = [] if started else _each(dashed, lambda flag: ask_cpu(flag).code != 0)
    if wrong:
        yield Finding(name, _why(wrong), "FAIL", _without(name, dashed, wrong))
    elif not bare:
        yield Finding(name, f"{len(flags)} flag{'s' * (len(flags) > 1)}, all known to jaxlib {installed('jaxlib')}")


def _libtpu_flags(text: str) -> Iterator[Finding]:
    flags, name = _split(text), "LIBTPU_INIT_ARGS"
    if installed("libtpu") is None:
        yield Finding(name, "set, and read by nobody: libtpu is not installed")
        return

    def refused(flag: str) -> bool:
        return "Unknown command line flag" in ask_libtpu(flag)

    wrong = _each(flags, refused) if refused(text) else []
    if wrong:
        fix = _without(name, flags, wrong)
        yield Finding(name, f"libtpu {installed('libtpu')} does not know {', '.join(wrong)}", "FAIL", fix)
    else:
        yield Finding(name, f"{len(flags)} flag{'s' * (len(flags) > 1)}, none unknown to libtpu {installed('libtpu')}")


def ask_cpu(flags: str) -> Answer:
    return ask([sys.executable, "-c", START_CPU], SECONDS, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})


def ask_libtpu(flags: str) -> str:
    answer = ask([sys.executable, "-c", LOAD_LIBTPU], SECONDS, WITHOUT_TPU | {"LIBTPU_INIT_ARGS": flags})
    return answer.error + answer.out


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark without its partner
        return text.split()


def _dashed(flag: str) -> str:
    return flag if flag.startswith("--") else f"--{flag.lstrip('-')}"


def _each(flags: list[str], refused: Callable[[str], bool]) -> list[str]:
    """The flags that are refused when they come alone."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [flag for flag, bad in zip(flags, pool.map(refused, flags), strict=True) if bad]


def _why(wrong: list[str]) -> str:
    """`--xla_x is unknown to jaxlib 0.12.0 (nearest: --xla_y)`, for each."""
    known = _known()
    said = []
    for flag in wrong:
        name = flag.lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if name in known:
            said.append(f"{flag}: jaxlib cannot read its value")
        elif name.startswith("xla_tpu_"):
            said.append(f"{flag} is libtpu's and belongs in LIBTPU_INIT_ARGS")
        else:
            hint = f" (nearest: --{near[0]})" if near else ""
            said.append(f"{flag} is unknown to jaxlib {installed('jaxlib')}{hint}")
    return "; ".join(said)


def _known() -> set[str]:
    """Every flag of the installed XLA: it lists them when it cannot read the value of one."""
    return set(re.findall(r"^\s*--(xla_\w+)", ask_cpu("--xla_cpu_enable_fast_math=unreadable").error, re.MULTILINE))


def _without(variable: str, flags: list[str], wrong: list[str]) -> str:
    rest = " ".join(flag for flag in flags if flag not in wrong)
    return f"export {variable}='{rest}'" if rest else f"unset {variable}"
