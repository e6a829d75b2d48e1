"""Variables of launchers that mean several processes, and proxies that would stand between them."""

import ipaddress
import os
from collections.abc import Iterator

from mtx.doctor.finding import Finding, Request

# gRPC's order (grpc/doc/environment_variables.md); it reads lower case alone.
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
# Launcher, its variable for the number of processes, its variable for this one, where process 0 is.
LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK", "$MASTER_ADDR:${MASTER_PORT:-1234}"),
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1):1234'),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "HOST:1234"),
)
JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def check(request: Request) -> Iterator[Finding]:
    found = [*_launchers(request), *_jax_variables(request)]
    yield from found or [Finding("cluster", request.coordinator or "no launcher: one process")]
    yield from _proxies(request, several=any(finding.state != "ok" for finding in found))


def _launchers(request: Request) -> Iterator[Finding]:
    for launcher, size, rank, coordinator in LAUNCHERS:
        count = os.environ.get(size, "")
        if not count.isdigit() or int(count) < 2:
            continue
        said = f"{launcher} starts {count} processes ({size}={count})"
        if request.coordinator:
            yield Finding("cluster", f"{said}, coordinator {request.coordinator}")
            continue
        start = "srun " if launcher == "SLURM" and rank not in os.environ else ""
        flags = f"--coordinator {coordinator} --processes ${size} --process ${rank}"
        fix = f"{start}python main.py --config FILE {flags}"
        yield Finding("cluster", f"{said}, which mtx does not read: each would train alone", "WARN", fix)


def _jax_variables(request: Request) -> Iterator[Finding]:
    given = [name for name in JAX_VARIABLES if name in os.environ]
    if not given or request.coordinator:
        return
    missing = [name for name in JAX_VARIABLES if name not in given]
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "HOST:1234")
    why = f"{' and '.join(given)} without {' and '.join(missing)}" if missing else ", ".join(given)
    count = os.environ.get("JAX_NUM_PROCESSES", "N")
    index = os.environ.get("JAX_PROCESS_ID", "I")
    fix = f"python main.py --config FILE --coordinator {address} --processes {count} --process {index}"
    fix += f", or unset {' '.join(given)} for one process"
    yield Finding("cluster", f"{why}: mtx takes flags", "WARN", fix)


def _proxies(request: Request, several: bool) -> Iterator[Finding]:
    """A proxy swallows what processes say to the coordinator, who then waits until all give up."""
    name = next((name for name in PROXIES if os.environ.get(name)), None)
    if name is None:
        return
    address = request.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MASTER_ADDR")
    host = address.rpartition(":")[0] or address if address else None
    exceptions = next((text for n in EXCEPTIONS if (text := os.environ.get(n))), "")
    if host is None and (exceptions or not several):
        yield Finding(
            "proxy", f"{name} is set" + (f", but for {exceptions}" if exceptions else "; one process: no harm")
        )
    elif host is not None and _excepted(host, exceptions):
        yield Finding("proxy", f"{name} is set, but not for {host}")
    else:
        host = host or "HOST_OF_PROCESS_0"
        fix = f"export no_proxy=localhost,127.0.0.1,{host}"
        yield Finding("proxy", f"{name} catches what goes to the coordinator {host}", "WARN", fix)


def _excepted(host: str, exceptions: str) -> bool:
    for part in (part.strip() for part in exceptions.split(",")):
        if part and (part == "*" or host.endswith(part.lstrip("*"))):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(part, strict=False):
                return True
        except ValueError:
            continue
    return False
