"""The day with a GPU where there is none: parts at toy sizes, what a broken case costs, and ahead-of-time compiles."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import aot
import jax
import numpy as np
import pytest
from test_house import LAZY, run_python

from benchmarks.gpu_day import cases, kernels_fast, kernels_right, meshes, step_fast, step_right, tuning, where
from benchmarks.gpu_day.__main__ import SHARES, Run, run_part
from benchmarks.gpu_day.tables import markdown
from pallas_kernels import shim
from pallas_kernels.attention import Chip

ROOT = Path(__file__).resolve().parent.parent
TOY = cases.Day(chip=Chip("cpu", "cpu"))
NEEDS_INTERPRETER = "hopper, interpreted"


def toy_cases(part) -> dict[str, cases.Case]:
    return {case.name: case for case in part.cases(TOY) if isinstance(case, cases.Case)}


def left_out(part, day=TOY) -> dict[str, str]:
    return {case.name: case.why for case in part.cases(day) if isinstance(case, cases.LeftOut)}


# The parts


@pytest.mark.parametrize(
    ("part", "name", "columns"),
    [
        (where, "machine", {"device", "jax", "jaxlib", "numpy"}),
        (where, "rates", {"matmul TFLOP/s", "copy TB/s"}),
        (kernels_right, "chunked 64, Causal, T 65, heads 8:2", {"error of dq_BTNH (of plain)"}),
        (kernels_right, "chunked 64, 3 repeats are bit-equal, T 65, heads 8:2", {"elements that changed"}),
        (kernels_fast, "causal 128, chunked", {"forward TFLOP/s", "backward % of matmul"}),
        (step_right, "quickstart, float32, plain", {"worst difference"}),
        (step_fast, "quickstart, 2 x 64, mtx, chunked", {"tokens/s", "host ms", "compile s", "MFU, causal halved"}),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                (
                    kernels_right,
                    "chunked 64, NaN in the next row changes nothing, T 65, heads 8:2",
                    {"elements that changed"},
                ),
                (
                    kernels_right,
                    "chunked 64 documents, Causal & Documents, T 64, heads 8:2",
                    {"error of dq_BTNH (of plain)"},
                ),
                (kernels_right, "tpu 64, Causal, T 128, heads 8:2", {"error of dq_BTNH (of plain)"}),
                (step_right, "quickstart, bfloat16, chunked", {"plain's last", "notes"}),
                *((meshes, f"{kind} over 8 devices", {"tokens/s", "GB/s by axis"}) for kind in meshes.KINDS),
            ]
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_part_runs_at_toy_size(part, name, columns):
    row = toy_cases(part)[name].run()
    assert "failed" not in row
    assert columns <= row.keys()


@pytest.mark.slow
@pytest.mark.skipif(shim.JAX_VERSION < (0, 12), reason="the GPU interpreter needs jax 0.12")
def test_the_hopper_kernels_are_checked_in_the_interpreter():
    (case,) = (case for name, case in toy_cases(kernels_right).items() if name.startswith("hopper"))
    assert "failed" not in case.run()


@pytest.mark.skipif(shim.JAX_VERSION >= (0, 12), reason="this jax has the GPU interpreter")
def test_the_interpreter_is_left_out_by_name():
    assert "jax 0.12" in left_out(kernels_right)[NEEDS_INTERPRETER]


def test_a_wrong_kernel_is_found_with_its_worst_element():
    """A control: a call whose kernel sees another window than plain attention does."""

    class Wrong(kernels_right.Call):
        def bound(self):
            return kernels_right.bind(kernels_right.Window(9), *self.shape[1:3])

    row = kernels_right.compare(Wrong(backend="chunked", queries=65, head_size=64))
    assert "out_BTNU is off" in row["failed"] and "in place of" in row["failed"] and "queries=65" in row["failed"]


def test_a_moved_loss_is_found(monkeypatch):
    """A control: the stored losses, and those of a run whose loss moves by 2e-4 of itself."""
    stored = json.loads(step_right.LOSSES.read_text())["quickstart"]
    moved = [x * (1 + 2e-4 * (i == 3)) for i, x in enumerate(stored)]
    monkeypatch.setattr(step_right, "losses", lambda *_: moved)
    assert "step 4" in step_right.as_on_the_cpu("quickstart", "plain")["failed"]


def test_tuning_keeps_the_quickest_of_this_process_and_of_those_before():
    """The first process measured two choices, of which the second is quicker than anything can be."""
    first, second = list(toy_cases(tuning))[:2]
    results = {first: {tuning.TIME: 5.0}, second: {tuning.TIME: 1e-9}}
    row, measured = {}, []
    for last in tuning.cases(dataclasses.replace(TOY, results=results)):
        measured.append(last.name)
        row = last.run()
    assert first not in measured and second not in measured and len(measured) > 2
    (entry,) = json.loads(row["notes"][0])["cpu"]
    assert f"q={entry['sizes']['q']}, k={entry['sizes']['k']}" in second


def test_forms_that_failed_are_left_out_of_the_later_parts():
    day = cases.Day(chip=kernels_right.HOPPER, broken=frozenset({"hopper 128", "hopper 64"}))
    assert "hopper 128 failed before" in left_out(kernels_fast, day).values()
    cudnn, hopper = step_right.backends(day, 64)
    assert cudnn == "cudnn" and isinstance(hopper, cases.LeftOut) and "hopper 64 failed" in hopper.why
    assert "hopper 64 failed before" in left_out(step_fast, day).values()
    assert list(step_right.backends(cases.Day(chip=kernels_right.HOPPER), 128)) == ["cudnn", "hopper"]


@pytest.mark.parametrize(
    ("chip", "forms"),
    [
        (Chip("gpu", "NVIDIA H200", 9.0), {"hopper 128", "hopper 192/128", "hopper 128 fused", "cudnn 64"}),
        (Chip("gpu", "NVIDIA A100-SXM4-80GB", 8.0), {"cudnn 128", "chunked 128"}),
        (Chip("gpu", "Tesla T4", 7.5), {"chunked 128"}),
        (Chip("tpu", "TPU v5 lite"), {"splash 128", "tpu 128", "tpu 128 dropout"}),
    ],
    ids=lambda x: x.kind if isinstance(x, Chip) else None,
)
def test_each_chip_has_its_kernels(chip, forms):
    found = {case.form for case in kernels_right.cases(cases.Day(chip=chip)) if isinstance(case, cases.Case)}
    assert forms <= found
    assert not any(form and form.startswith("hopper") for form in found) or chip.capability == 9.0


def test_no_part_imports_what_an_accelerator_image_lacks():
    refused = (*(name for name in LAZY if name != "rich"), "transformers")
    run_python(f"""
        import sys

        class Refuse:
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] in {refused} and name != "zstandard":
                    raise ImportError(f"{{name}} is not installed here")

        sys.meta_path.insert(0, Refuse)
        import importlib
        from benchmarks.gpu_day.__main__ import SHARES
        from benchmarks.gpu_day.cases import Day
        from pallas_kernels.attention import Chip
        for part in SHARES:
            module = importlib.import_module(f"benchmarks.gpu_day.{{part}}")
            assert list(module.cases(Day(chip=Chip("cpu", "cpu")))), part
    """)


# What a broken case costs


def test_a_hang_a_death_and_an_error_cost_one_case_each(tmp_path):
    day = Run(tmp_path, time.monotonic() + 120, cache=str(tmp_path))
    run_part(day, "tests.day_that_breaks", 100)
    results = {entry["case"]: entry for entry in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert [results[name]["answer"] for name in ("first",)] == [1]
    assert "hangs" in results["hangs"]["failed"]
    assert "kernel a failed before" in results["after the hang"]["left_out"]
    assert "code 7" in results["dies"]["failed"]
    assert results["wrong"]["value"] == 5 and results["wrong"]["failed"] == "it is not 4"
    assert "ValueError" in results["raises"]["failed"]
    assert "kernel b failed before" in results["after the error"]["left_out"]
    assert results["elsewhere"]["left_out"] == "another chip's"
    assert "long" not in results and "no time" in day.waiting["day_that_breaks"]["long"]
    assert results["alone"]["process"] != results["last"]["process"]
    assert set(day.broken) == {"kernel a", "kernel b"}
    assert "not an event" in (tmp_path / "log.txt").read_text()


def test_the_whole_command_and_its_abrupt_end(tmp_path):
    """Killed in its second part, it leaves the first part's results in both forms."""
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--minutes", "2", "--out", str(tmp_path)]
    day = subprocess.Popen(
        [*command, "--only", "where", "--only", "tuning"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert day.stdout is not None
    with day.stdout:
        next(line for line in day.stdout if "tuning" in line)
        day.send_signal(signal.SIGKILL)
    day.wait()
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert first["part"] == "where" and first["jax"] == jax.__version__
    assert f"jax {jax.__version__}" in (tmp_path / "results.md").read_text()


def test_a_second_run_adds_to_the_folder(tmp_path):
    first = Run(tmp_path, time.monotonic() + 9, cache="", began="2026-01-01T00:00:00")
    first.record("where", "machine", {"device": "H", "seconds": 1})
    first.record("tuning", "a", {"failed": "wrong"})
    second = Run(tmp_path, time.monotonic() + 9, cache="", began="2026-01-02T00:00:00")
    (tmp_path / "log.txt").touch()
    second.read()
    second.record("tuning", "a", {"ms": 1.0, "seconds": 2})
    second.write_tables()
    text = (tmp_path / "results.md").read_text()
    assert "A day with H" in text and "| a | 1 | 2 |" in text and "wrong" not in text
    assert second.results("tuning").keys() == {"a"} and not second.results("where")


def test_another_device_than_the_day_began_with_is_refused(tmp_path):
    day = Run(tmp_path, time.monotonic() + 60, cache=str(tmp_path), device="NVIDIA H200")
    run_part(day, "tests.day_that_breaks", 50)
    assert {record["case"] for record in day.records} == {"its start"}
    assert "began with NVIDIA H200" in (tmp_path / "log.txt").read_text()


def test_tables_show_failures_notes_and_what_was_left_out():
    text = markdown(
        [
            {"part": "where", "case": "machine", "device": "H", "jax": "1", "seconds": 1},
            {"part": "tuning", "case": "a", "ms": 1.23456, "seconds": 2, "notes": ["best: x|y"]},
            {"part": "tuning", "case": "b", "failed": "wrong"},
            {"part": "tuning", "case": "c", "left_out": "no time"},
        ],
        "2026-01-01",
    )
    assert "### A day with H, 2026-01-01, jax 1" in text
    assert "| a | 1.235 | 2 |" in text and "* a: best: x|y" in text
    assert "* **failed** b: wrong" in text and "* left out c: no time" in text


def test_only_takes_the_names_of_parts():
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--only", "steps"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 2 and all(part in child.stderr for part in SHARES)


# The rival


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "gpt2_124m"])
def test_torch_trains_the_same_number_of_parameters(name):
    pytest.importorskip("torch")
    row = step_fast.rival(step_fast.Setup(name, 64, 1, 0), is_toy=True)
    assert "failed" not in row and np.isfinite(row["first loss"])


# Compiled for an H200


@pytest.mark.aot
def test_a_step_with_the_hopper_kernels_compiles_for_an_h200():
    aot.require_aot("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    from benchmarks.gpu_day import ahead

    compiled = ahead.compile_step(step_fast.Setup("quickstart", 128, 8, 0))
    assert compiled.as_text().count("mosaic_gpu") >= 3


@pytest.mark.aot
@pytest.mark.slow
def test_everything_compiles_for_an_h200():
    aot.require_aot("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    from benchmarks.gpu_day import ahead

    for _, compile_program in ahead.programs():
        compile_program()
