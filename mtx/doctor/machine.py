"""Disks, limits and libraries: what the machine gives to a run besides its accelerators."""

import os
import stat
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mtx.doctor.finding import Finding, Request

WRITE_BYTES = 64 * 2**20
SLOW_BYTES_PER_S = 10e6  # a checkpoint of 124 million parameters, 1.5 GB, would take minutes
OPEN_FILES = 1024
LIBRARIES = ("libcudart.so*", "libcudnn*.so*", "libcublas*.so*", "libnccl.so*", "libcusolver.so*")


def check(request: Request) -> Iterator[Finding]:
    yield from _folder(request)
    yield from _compile_cache()
    yield from _cores()
    yield _open_files()
    yield from _library_path()
    yield from _clock()


# The run folder


def _folder(request: Request) -> Iterator[Finding]:
    """Writes and removes a file where the run folder is, or would be made."""
    wanted = Path(request.folder).absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.exists())
    if not there.is_dir():
        fix = f"rm {there}, or choose another folder: workdir=FOLDER"
        yield Finding("run folder", f"{there} is a file", "FAIL", fix)
        return
    try:
        speed = _write_speed(there)
    except OSError as error:
        fix = f"sudo chown $USER {there}, or choose another folder: workdir=FOLDER"
        yield Finding("run folder", f"{there}: {error.strerror}", "FAIL", fix)
        return
    kind, found = _file_system(there), f"{wanted} writes {speed / 1e6:,.0f} MB/s"
    if kind in ("tmpfs", "ramfs"):
        fix = "choose a folder on a disk: workdir=FOLDER"
        yield Finding("run folder", f"{found}, in memory ({kind}): a reboot loses it", "WARN", fix)
    elif speed < SLOW_BYTES_PER_S:
        fix = "choose a local disk (workdir=FOLDER), or save less often"
        yield Finding("run folder", f"{found} ({kind}): checkpoints will wait", "WARN", fix)
    else:
        yield Finding("run folder", f"{found} ({kind})")
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize / 1e9
    if free < request.need_gb:
        fix = f"du -xh {there} | sort -h | tail (what fills it?), or choose another disk: workdir=FOLDER"
        yield Finding("free disk", f"{free:.1f} GB, a run needs {request.need_gb:g}", "WARN", fix)
    else:
        yield Finding("free disk", f"{free:.1f} GB")


def _write_speed(folder: Path) -> float:
    """Bytes per second until the disk has them."""
    block = os.urandom(2**20)  # what some file systems cannot compress away
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        start = time.perf_counter()
        for _ in range(WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_BYTES / (time.perf_counter() - start)


def _file_system(path: Path) -> str:
    """Its type, such as ext4, nfs4 or fuse.gcsfuse, from the longest mount point above the path."""
    found = ("", "unknown file system")
    try:
        mounts = Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return found[1]
    for line in mounts:
        _, point, kind, *_ = line.split()
        if path.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


# The compile cache


def _compile_cache() -> Iterator[Finding]:
    """Who can write there runs code in our process (JAX: a cache is trusted)."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    text = os.environ.get("JAX_COMPILATION_CACHE_DIR") or f"{home}/mtx/compile"
    if "://" in text:
        yield Finding("compile cache", f"{text}, remote: whoever can write there runs code here")
        return
    path = Path(text).expanduser()
    other = "or choose another: export JAX_COMPILATION_CACHE_DIR=~/.cache/mtx/compile"
    if not path.exists():
        yield Finding("compile cache", f"{path}, not made yet")
        return
    about = path.stat()
    mode = stat.S_IMODE(about.st_mode)
    if not path.is_dir():
        yield Finding("compile cache", f"{path} is a file", "FAIL", f"rm {path}, {other}")
    elif about.st_uid != os.geteuid():
        found = f"{path} belongs to user {about.st_uid}, who can run code in this process"
        yield Finding("compile cache", found, "FAIL", f"sudo chown -R $USER {path}, {other}")
    elif mode & 0o022:
        found = f"{path} can be written by others (mode {mode:04o}), who can so run code in this process"
        yield Finding("compile cache", found, "FAIL", f"rm -r {path} && mkdir -m 700 {path}")
    elif not os.access(path, os.W_OK | os.X_OK):
        yield Finding("compile cache", f"{path} cannot be written", "WARN", f"chmod u+rwx {path}, {other}")
    else:
        yield Finding("compile cache", str(path))


# Limits


def _cores() -> Iterator[Finding]:
    count, allowed, quota = os.cpu_count() or 1, _affinity(), _cgroup_cores()
    usable = min(allowed, quota or allowed)
    if usable > count / 4 and (usable > 1 or count == 1):
        yield Finding("cores", f"{usable:g} of {count}")
        return
    why = "the cgroup's quota" if quota and quota < allowed else "this process's affinity"
    fix = "srun --cpus-per-task=N, docker run --cpus=N, or taskset -c 0-N: the data loader needs them"
    yield Finding("cores", f"{usable:g} of {count}, by {why}", "WARN", fix)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("open files", "unknown on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return Finding("open files", f"up to {soft:,}" if soft != resource.RLIM_INFINITY else "unlimited")
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    fix = f"ulimit -n {most}" + ("" if most >= OPEN_FILES else " (as root: raise nofile in /etc/security/limits.conf)")
    return Finding("open files", f"up to {soft:,}: data shards, checkpoints and sockets need more", "WARN", fix)


# What else decides


def _library_path() -> Iterator[Finding]:
    """CUDA of the system shadows the one that JAX's wheels bring."""
    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    shadows = [str(path) for folder in folders for pattern in LIBRARIES for path in sorted(folder.glob(pattern))[:1]]
    if shadows:
        fix = "unset LD_LIBRARY_PATH: JAX's CUDA wheels bring their own"
        yield Finding("LD_LIBRARY_PATH", f"shadows with {', '.join(shadows[:3])}", "WARN", fix)
    elif folders:
        yield Finding("LD_LIBRARY_PATH", "holds no CUDA")


def _clock() -> Iterator[Finding]:
    """A clock behind the installation breaks TLS, caches and the order of event files."""
    try:
        file = next(iter(metadata.files("jax") or []), None)
        made = Path(str(file.locate())).stat().st_mtime if file else 0.0
    except (metadata.PackageNotFoundError, OSError):
        return
    if time.time() < made - 24 * 3600:
        fix = "sudo timedatectl set-ntp true"
        yield Finding("clock", f"{time.ctime()}, which is before jax was installed", "FAIL", fix)
    else:
        yield Finding("clock", time.strftime("%Y-%m-%d %H:%M %Z"))
