"""Real processes on loopback, devices shared out among them, against one process with all of them."""

import signal
from pathlib import Path

import pytest
import runs

pytestmark = pytest.mark.multiprocess

MESH = [
    *("mesh.data=4", "mesh.model=2", "layout.zero=2", "layout.sequence_parallel=true", "batch.global_size=16"),
    *("batch.micro_size=2", "sample_tokens=8"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("one")
    runs.train(workdir, "--devices", "8", *MESH)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two processes with four devices each."""
    workdir = tmp_path_factory.mktemp("two")
    said = [runs.end(child) for child in runs.begin_together(workdir, 2, *MESH)]
    assert "step 12/12" in said[0]
    assert "step" not in said[1], "only process 0 reports"
    return workdir


def check_close(found: Path, wanted: Path) -> None:
    """Sums over devices go another way between processes, so that last bits differ."""
    for row, other in zip(runs.rows(found), runs.rows(wanted), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_two_processes_see_the_losses_of_one(one: Path, two: Path):
    check_close(two, one)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_to_one_of_two_stops_both(one: Path, two: Path, tmp_path: Path, number: signal.Signals):
    children = runs.begin_together(tmp_path, 2, *MESH)
    runs.at_step(tmp_path, children[0], 5)
    runs.stop(children[1], number)
    said = [runs.end(child, 75) for child in children]
    last = runs.rows(tmp_path)[-1]["step"]
    for text in said:
        assert f"stopped by {number.name} at step {last}/12; step {last} is saved" in text
    if number == signal.SIGTERM:
        said = [runs.end(child) for child in runs.begin_together(tmp_path, 2, *MESH)]
        assert f"resumed     step {last}," in said[0]
        assert runs.digests(tmp_path) == runs.digests(two)
    else:
        assert f"resumed     step {last}," in runs.train(tmp_path, "--devices", "8", *MESH)
        check_close(tmp_path, one)


@pytest.mark.slow
def test_saved_by_one_resumed_by_two(one: Path, tmp_path: Path):
    child = runs.begin(tmp_path, "--devices", "8", *MESH)
    runs.at_step(tmp_path, child, 6)
    runs.stop(child, signal.SIGKILL)
    runs.end(child, [-signal.SIGKILL, 0])
    said = [runs.end(child) for child in runs.begin_together(tmp_path, 2, *MESH)]
    assert "resumed     step " in said[0]
    check_close(tmp_path, one)


PIPELINE = [
    *("mesh.pipeline=2", "mesh.data=2", "mesh.model=2", "pipeline=Interleaved", "model.layers=5", "layout.zero=1"),
    *("batch.global_size=16", "batch.micro_size=2", "eval_every=0", "checkpoints.every_steps=6"),
]


@pytest.mark.slow
def test_a_process_for_each_stage_of_a_pipeline(tmp_path: Path):
    """Stopped by half, and gone on with by one process; layers change places between processes when they are saved."""
    children = runs.begin_together(tmp_path / "two", 2, *PIPELINE)
    runs.at_step(tmp_path / "two", children[0], 5)
    runs.stop(children[1], signal.SIGTERM)
    for child in children:
        assert "is saved, the same command goes on" in runs.end(child, 75)
    assert "(saved on the same mesh)" in runs.train(tmp_path / "two", "--devices", "8", *PIPELINE)
    runs.train(tmp_path / "one", "--devices", "8", *PIPELINE)
    check_close(tmp_path / "two", tmp_path / "one")


def test_a_signal_while_they_compile_ends_both(tmp_path: Path):
    children = runs.begin_together(tmp_path, 2, *MESH, "loss.chunk_tokens=16")
    runs.wait_for(tmp_path, children[0], lambda: (tmp_path / "config.json").exists())
    runs.stop(children[1], signal.SIGTERM)
    for child in children:
        said = runs.end(child, 75)
        assert "before the first step" in said or "is saved" in said


def test_data_that_are_not_prepared_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    data = ["data=TextFiles", f"data.paths={tmp_path}/a.txt", f"data.folder={tmp_path}/shards"]
    for child in runs.begin_together(tmp_path / "run", 2, *MESH, *data):
        said = runs.end(child, 65)
        assert "the data are not prepared" in said
        assert "python main.py prepare --config configs/quickstart.py" in said
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed=3", "process 1 has seed=3, process 0 has 0; start all with the same command."),
        ("", "process 1 has another folder run than process 0; workdir must be on a shared file system."),
    ],
)
def test_processes_that_are_not_alike_are_refused(tmp_path: Path, word: str, said: str):
    """`run` is one folder where both start in one, and two where each starts in its own, as on local disks."""
    homes = [tmp_path / "a", tmp_path / ("a" if word else "b")]
    for home in set(homes):
        home.mkdir()
        for name in ("main.py", "configs"):
            (home / name).symlink_to(runs.ROOT / name)
    cluster = ["--devices", "4", "--coordinator", f"127.0.0.1:{runs.port()}", "--processes", "2", "--process"]
    first = runs.begin(Path("run"), *MESH, *cluster, "0", cwd=homes[0])
    second = runs.begin(Path("run"), *MESH, *cluster, "1", *filter(None, [word]), cwd=homes[1])
    try:
        assert said in runs.end(second, 64)
    finally:
        first.kill()
        first.communicate()
