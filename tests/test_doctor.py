"""The doctor against planted problems: each is really there, and found through the verb in a process of its own."""

import os
import resource
import stat
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from mtx.doctor import cluster, versions
from mtx.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# What the tests' own environment, or the machine's, says about things that the doctor looks at.
OURS = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "SLURM_", "OMPI_", "CUDA_", "LD_LIBRARY_PATH")
OURS += ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
SAYS_H100 = "echo 'NVIDIA H100 80GB HBM3, {driver}, {used}, 81559'"


class Report(NamedTuple):
    code: int
    lines: dict[str, str]
    """Name of a check -> its line."""

    def state(self, name: str) -> str:
        return self.lines[name].split()[0]


class Doctor:
    """Runs the verb on a healthy machine, but for what a test plants."""

    def __init__(self, home: Path):
        self.home, self.bin, self.dev = home, home / "bin", home / "dev"
        self.bin.mkdir()
        self.dev.mkdir()
        self.packages = home / "packages"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(OURS) and "proxy" not in k.lower()}
        self.env = clean | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "JAX_PLATFORMS": "cpu"}
        # nvidia-smi of this machine, if any, must not be found; nothing else is looked up.
        self.env["PATH"] = str(self.bin)

    def nvidia_smi(self, script: str) -> None:
        path = self.bin / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def package(self, name: str, version: str) -> None:
        """A version that importlib.metadata finds before the real one."""
        folder = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.env["PYTHONPATH"] = str(self.packages)

    def run(self, *words: str, before: str = "", **env: str) -> Report:
        """`before`: what the process does to itself before it becomes the doctor."""
        shim = f"import os, resource, sys; {before}; os.execv(sys.argv[1], sys.argv[1:])"
        argv = [sys.executable, "main.py", "doctor", "--dev", str(self.dev), "--need-gb", "0.1", *words]
        argv = [sys.executable, "-c", shim, *argv] if before else argv
        child = subprocess.run(argv, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=120)
        assert child.stderr == "", child.stderr
        *lines, last = child.stdout.splitlines()
        assert last.startswith("doctor: ")
        name_at = len("FAIL  ")
        return Report(child.returncode, {line[name_at:].split("  ")[0]: line for line in lines})


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


def check_found(report: Report, name: str, state: str, *words: str) -> None:
    line = report.lines[name]
    assert report.state(name) == state, line
    assert "  ->  " in line
    for word in words:
        assert word in line
    others = {other: said for other, said in report.lines.items() if other != name and not said.startswith("ok")}
    assert not others, "what is planted is all that is found"
    assert report.code == (state == "FAIL")


def test_a_healthy_machine(doctor: Doctor):
    report = doctor.run()
    assert report.code == 0
    assert not [line for line in report.lines.values() if not line.startswith("ok") or "->" in line]
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "devices", "bfloat16"} <= set(report.lines)
    assert {"run folder", "free disk", "compile cache", "cores", "open files", "cluster"} <= set(report.lines)
    assert "1 x cpu" in report.lines["devices"]


def test_the_run_folder_is_left_as_it_was(doctor: Doctor):
    assert doctor.run("--folder", str(doctor.home / "runs" / "a")).code == 0
    assert sorted(path.name for path in doctor.home.iterdir()) == ["bin", "dev"]


# Flags


def test_a_stale_xla_flag_among_good_ones(doctor: Doctor):
    flags = "--xla_cpu_enable_fast_math=false --xla_gpu_enable_triton_softmax_fusion=true --xla_gpu_autotune_level=4"
    report = doctor.run(XLA_FLAGS=flags)
    assert report.code == 1
    assert "--xla_gpu_enable_triton_softmax_fusion=true is unknown to jaxlib" in report.lines["XLA_FLAGS"]
    fix = "->  export XLA_FLAGS='--xla_cpu_enable_fast_math=false --xla_gpu_autotune_level=4'"
    assert report.lines["XLA_FLAGS"].endswith(fix)
    assert report.state("devices") == "FAIL", "it keeps JAX from starting"


@pytest.mark.parametrize(
    ("flags", "said", "fix"),
    [
        ("--xla_cpu_enable_fastmath=true", "(nearest: --xla_cpu_enable_fast_math)", "unset XLA_FLAGS"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("--xla_cpu_enable_fast_math=maybe", "jaxlib cannot read its value", "unset XLA_FLAGS"),
                ("--xla_tpu_x=1", "belongs in LIBTPU_INIT_ARGS", "unset XLA_FLAGS"),
            )
        ),
        ("xla_gpu_autotune_level=4", "has no -- before it", "export XLA_FLAGS='--xla_gpu_autotune_level=4'"),
    ],
)
def test_a_misspelt_xla_flag(doctor: Doctor, flags: str, said: str, fix: str):
    report = doctor.run(XLA_FLAGS=flags)
    assert (report.code, report.state("XLA_FLAGS")) == (1, "FAIL")
    assert said in report.lines["XLA_FLAGS"]
    assert fix in report.lines["XLA_FLAGS"]


def test_an_xla_flag_that_is_silently_ignored(doctor: Doctor):
    report = doctor.run(XLA_FLAGS="--xla_gpu_autotune_level=4 xla_cpu_enable_fast_math=true")
    fix = "export XLA_FLAGS='--xla_gpu_autotune_level=4 --xla_cpu_enable_fast_math=true'"
    check_found(report, "XLA_FLAGS", "FAIL", "xla_cpu_enable_fast_math=true: without -- XLA ignores it", fix)


@pytest.mark.aot
def test_a_stale_libtpu_flag(doctor: Doctor):
    import aot

    aot.require_aot("libtpu")
    flags = "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_of_yesterday=1"
    fix = "export LIBTPU_INIT_ARGS='--xla_tpu_enable_async_collective_fusion=true'"
    check_found(
        doctor.run(LIBTPU_INIT_ARGS=flags), "LIBTPU_INIT_ARGS", "FAIL", "not know --xla_tpu_of_yesterday=1", fix
    )


# Devices


without_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="JAX would use the real GPU of this machine")


def has_plugin() -> str | None:
    return next((kind for kind in ("cuda12", "cuda13") if versions.installed(f"jax-{kind}-plugin")), None)


@without_gpu
@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("570.172.08", "cuda12")])
def test_a_gpu_that_jax_does_not_use(doctor: Doctor, driver: str, extra: str):
    """Where a plugin is installed that the driver suits, it is installed again; else the extra that suits."""
    doctor.nvidia_smi(SAYS_H100.format(driver=driver, used=1))
    report = doctor.run(JAX_PLATFORMS="")
    line, plugin = report.lines["devices"], has_plugin()
    assert (report.code, report.state("devices")) == (1, "FAIL")
    assert "1 x cpu; idle: 1 x NVIDIA H100 80GB HBM3" in line
    again = plugin == "cuda12" or (plugin == "cuda13" and extra == "cuda13")
    assert (f"'jax[{plugin}]==" if again else f"pip install -e '.[{extra}]'") in line


@without_gpu
def test_device_files_without_a_driver(doctor: Doctor):
    (doctor.dev / "nvidia0").touch()
    report = doctor.run(JAX_PLATFORMS="")
    assert report.state("nvidia driver") == report.state("devices") == "FAIL"
    assert "modprobe nvidia" in report.lines["nvidia driver"]


def test_a_driver_that_fails(doctor: Doctor):
    doctor.nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18")
    check_found(doctor.run(), "nvidia driver", "FAIL", "Driver/library version mismatch", "reboot after its update")


@without_gpu
def test_a_driver_that_is_too_old(doctor: Doctor):
    doctor.nvidia_smi(SAYS_H100.format(driver="470.82.01", used=1))
    report = doctor.run(JAX_PLATFORMS="")
    assert report.state("nvidia driver") == "FAIL"
    assert "470.82.01: too old for any CUDA wheel" in report.lines["nvidia driver"]
    assert "at least 525" in report.lines["nvidia driver"]


@without_gpu
def test_a_driver_older_than_the_plugin(doctor: Doctor):
    doctor.package("jax-cuda13-plugin", metadata.version("jaxlib"))
    doctor.nvidia_smi(SAYS_H100.format(driver="570.172.08", used=1))
    report = doctor.run(JAX_PLATFORMS="")
    assert "570.172.08: cuda13 needs 580" in report.lines["nvidia driver"]
    assert "pip install -e '.[cuda12]'" in report.lines["nvidia driver"]
    assert "pip install -e '.[cuda12]'" in report.lines["devices"]


def test_jax_platforms_hides_the_gpu(doctor: Doctor):
    doctor.nvidia_smi(SAYS_H100.format(driver="580.65.06", used=1))
    check_found(doctor.run(), "devices", "WARN", "idle: 1 x NVIDIA H100", "unset JAX_PLATFORMS")


def test_a_gpu_that_others_fill(doctor: Doctor):
    doctor.nvidia_smi(SAYS_H100.format(driver="580.65.06", used=71000))
    report = doctor.run()
    assert report.state("gpu memory") == "WARN"
    assert "69 of 80 GiB" in report.lines["gpu memory"]


def test_jax_platforms_asks_for_what_is_not_there(doctor: Doctor):
    report = doctor.run(JAX_PLATFORMS="cpuu")
    check_found(report, "devices", "FAIL", "JAX_PLATFORMS=cpuu cannot be had", "unset JAX_PLATFORMS")


def test_a_tpu_that_jax_does_not_use(doctor: Doctor):
    (doctor.dev / "accel0").touch()
    check_found(doctor.run(), "devices", "WARN", "idle: a TPU", "unset JAX_PLATFORMS")


@pytest.mark.parametrize(
    ("name", "value", "state", "fix"),
    [
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "90", "FAIL", "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.99", "WARN", "export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "off", "FAIL", "export XLA_PYTHON_CLIENT_PREALLOCATE=false"),
    ],
)
def test_memory_variables(doctor: Doctor, name: str, value: str, state: str, fix: str):
    check_found(doctor.run(**{name: value}), name, state, value, fix)


# Packages


def test_a_package_out_of_range(doctor: Doctor):
    doctor.package("optax", "0.1.9")
    check_found(doctor.run(), "optax", "FAIL", "0.1.9, mtx needs >=0.2.8,<0.3", "pip install -U 'optax>=0.2.8,<0.3'")


def test_a_jaxlib_that_jax_does_not_take(doctor: Doctor):
    doctor.package("jaxlib", "0.12.99")
    report = doctor.run()
    jax = metadata.version("jax")
    assert report.state("jax and jaxlib") == "FAIL"
    assert "found jaxlib 0.12.99" in report.lines["jax and jaxlib"]
    assert f"pip install -U 'jax=={jax}' 'jaxlib=={jax}'" in report.lines["jax and jaxlib"]


def test_a_plugin_of_another_version(doctor: Doctor):
    kind = has_plugin() or "cuda13"
    for part in ("plugin", "pjrt"):
        doctor.package(f"jax-{kind}-{part}", "0.9.0")
    fix = f"pip install -U 'jax[{kind}]=={metadata.version('jax')}'"
    check_found(doctor.run(), "gpu plugin", "FAIL", f"jax-{kind}-plugin 0.9.0", fix)


def test_versions_within_ranges():
    for version, inside in (("0.10.2", True), ("0.12.0.1", True), ("0.13", False), ("0.10.1", False), ("0.9", False)):
        assert versions.within(version, ">=0.10.2,<0.13") is inside
    assert versions.within("0.12.0", "jaxlib<=0.12.0.0,>=0.12.0")
    assert versions.within("1.0rc1", ">=1.0")


# The machine


def test_a_file_where_the_run_folder_should_be(doctor: Doctor):
    (doctor.home / "runs").write_text("")
    report = doctor.run("--folder", str(doctor.home / "runs" / "a"))
    check_found(report, "run folder", "FAIL", "is a file", f"rm {doctor.home / 'runs'}")


def test_a_run_folder_that_cannot_be_written(doctor: Doctor):
    """Not by permissions, which root does not feel."""
    check_found(doctor.run("--folder", "/proc/runs"), "run folder", "FAIL", "/proc", "workdir=FOLDER")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a tmpfs at /dev/shm")
def test_a_run_folder_in_memory(doctor: Doctor):
    report = doctor.run("--folder", "/dev/shm/runs")
    check_found(report, "run folder", "WARN", "a reboot loses it", "workdir=FOLDER")


def test_a_full_disk(doctor: Doctor):
    check_found(doctor.run("--need-gb", "1e9"), "free disk", "WARN", "a run needs 1e+09", "workdir=FOLDER")


@pytest.mark.parametrize("mode", [0o770, pytest.param(0o702, marks=pytest.mark.slow)])
def test_a_compile_cache_that_others_can_write(doctor: Doctor, mode: int):
    cache = doctor.home / "cache" / "mtx" / "compile"
    cache.mkdir(parents=True)
    cache.chmod(mode)
    check_found(doctor.run(), "compile cache", "FAIL", f"(mode {mode:04o})", f"rm -r {cache} && mkdir -m 700 {cache}")
    cache.chmod(stat.S_IRWXU)
    assert doctor.run().state("compile cache") == "ok"


def test_a_compile_cache_that_is_a_file(doctor: Doctor):
    (doctor.home / "cache").write_text("")
    env = {"JAX_COMPILATION_CACHE_DIR": str(doctor.home / "cache")}
    check_found(doctor.run(**env), "compile cache", "FAIL", "is a file", "export JAX_COMPILATION_CACHE_DIR=")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_compile_cache_of_somebody_else(doctor: Doctor):
    cache = doctor.home / "cache" / "mtx" / "compile"
    cache.mkdir(parents=True, mode=0o700)
    os.chown(cache, 12345, 12345)
    check_found(doctor.run(), "compile cache", "FAIL", "belongs to user 12345", "chown -R $USER")


def test_few_open_files(doctor: Doctor):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    report = doctor.run(before=f"resource.setrlimit(resource.RLIMIT_NOFILE, (200, {hard}))")
    check_found(report, "open files", "WARN", "up to 200", "ulimit -n")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, to take one away")
def test_one_core_of_many(doctor: Doctor):
    first = min(os.sched_getaffinity(0))
    report = doctor.run(before=f"os.sched_setaffinity(0, {{{first}}})")
    check_found(report, "cores", "WARN", f"1 of {os.cpu_count()}, by this process's affinity", "srun --cpus-per-task=N")


def test_cuda_of_the_system(doctor: Doctor):
    (doctor.home / "libcudnn.so.9").touch()
    report = doctor.run(LD_LIBRARY_PATH=f"/nowhere:{doctor.home}")
    check_found(report, "LD_LIBRARY_PATH", "WARN", "libcudnn.so.9", "unset LD_LIBRARY_PATH")


def test_a_clock_that_is_behind(doctor: Doctor):
    """Behind the installation of jax: a file of it is of tomorrow's tomorrow."""
    folder = doctor.packages / f"jax-{metadata.version('jax')}.dist-info"
    doctor.package("jax", metadata.version("jax"))
    requires = "".join(f"Requires-Dist: {line}\n" for line in metadata.requires("jax") or [])
    with (folder / "METADATA").open("a") as file:
        file.write(requires)
    (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n")
    os.utime(folder / "METADATA", (4e9, 4e9))
    check_found(doctor.run(), "clock", "FAIL", "before jax was installed", "timedatectl set-ntp true")


# The cluster


@pytest.mark.parametrize(
    ("env", "said", "fix"),
    [
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"},
            "SLURM starts 4 processes",
            "->  python main.py --config FILE --coordinator $(scontrol show hostnames",
        ),
        ({"SLURM_NTASKS": "4"}, "SLURM starts 4 processes", "->  srun python main.py --config FILE"),
        (
            {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1"},
            "torchrun starts 8 processes",
            "--coordinator $MASTER_ADDR:${MASTER_PORT:-1234} --processes $WORLD_SIZE --process $RANK",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:99"},
            "JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES and JAX_PROCESS_ID",
            "--coordinator 10.0.0.1:99 --processes N --process I, or unset JAX_COORDINATOR_ADDRESS",
        ),
    ],
    ids=["slurm", "slurm without srun", "torchrun", "jax"],
)
def test_a_launcher_that_mtx_does_not_read(doctor: Doctor, env: Mapping[str, str], said: str, fix: str):
    check_found(doctor.run(**env), "cluster", "WARN", said, fix)


def test_one_task_is_no_cluster(doctor: Doctor):
    assert doctor.run(SLURM_NTASKS="1", WORLD_SIZE="1", RANK="0").state("cluster") == "ok"


def test_a_proxy_before_the_coordinator(doctor: Doctor):
    env = {"http_proxy": "http://proxy:3128", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "10.0.0.1"}
    report = doctor.run(**env)
    assert report.state("proxy") == "WARN"
    assert "catches what goes to the coordinator 10.0.0.1" in report.lines["proxy"]
    assert "export no_proxy=localhost,127.0.0.1,10.0.0.1" in report.lines["proxy"]
    assert doctor.run(**env, no_proxy="localhost,10.0.0.0/8").state("proxy") == "ok"


def test_hosts_that_no_proxy_names():
    for host, exceptions, excepted in (
        ("node1.lan", "localhost,.lan", True),
        ("node1.lan", "*", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "192.168.0.0/16", False),
        ("node1", "", False),
    ):
        assert cluster._excepted(host, exceptions) is excepted


# The verb


def test_it_imports_neither_jax_nor_what_needs_it():
    program = "import sys, mtx.doctor; print(*{name.partition('.')[0] for name in sys.modules})"
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"jax", "jaxlib", "numpy", "flax", "rich"}.isdisjoint(child.stdout.split())


def test_as_a_verb_of_main(doctor: Doctor):
    """With the flags of a cluster beside its own, a folder without its flag, and what it does not know."""

    def main(*words: str, **env: str) -> subprocess.CompletedProcess:
        argv = [sys.executable, "main.py", "doctor", *words]
        return subprocess.run(argv, cwd=ROOT, env=doctor.env | env, capture_output=True, text=True)

    file = doctor.home / "file"
    file.touch()
    child = main(str(file), "--coordinator", "10.0.0.1:99", "--need-gb", "0.1", RANK="0", WORLD_SIZE="8")
    assert child.returncode == 1
    assert "torchrun starts 8 processes (WORLD_SIZE=8), coordinator 10.0.0.1:99" in child.stdout
    assert f"{file} is a file" in child.stdout
    child = main("steps=3")
    assert child.returncode == ConfigError.exit_code
    assert "error: doctor takes no steps=3" in child.stderr
    assert "--need-gb" in main("--help").stdout
