"""The house's rules that a machine can check: the import law, light start-up, and a README that is true."""

import ast
import dataclasses
import fnmatch
import graphlib
import importlib.util
import re
import subprocess
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mtx", "pallas_kernels", "data", "configs")
OURS = {*PACKAGES, "main", "tests", "benchmarks"}

# A module or folder of mtx imports only those before it. Add a new one where it belongs, here and in the README's tree.
VERBS = ("train", "evaluate", "generate", "prepare", "data_tools", "convert", "doctor", "launch", "compare")
ORDER = (
    *(
        "errors",
        "command",
        "processes",
        "mesh",
        "layout",
        "spmd",
        "sums",
        "hlo",
        "layers",
        "attention",
        "moe",
        "stacks",
        "model",
        "losses",
        "optim",
    ),
    *("pipeline", "state", "step", "decode", "checkpoint", "metrics", "config", "building", "validation", "plan"),
    *VERBS,
)
# The same inside data/: from text to tokens, to shards, to batches.
DATA_ORDER = (
    *("workers", "tensorflow_process", "documents", "files", "tokenizer", "shards", "mixing", "corpus", "statistics"),
    *("prepare", "batches", "sources", "export", "get"),
)
ORDERS = {"mtx": ORDER, "data": DATA_ORDER}
MAY_IMPORT_KERNELS = {"attention", "moe", "losses", "optim"}
FOR_EVERYBODY = {"pallas_kernels.masks", "pallas_kernels.threefry", "pallas_kernels.attention"}
MAY_IMPORT_DATA = {"config", "building", "validation", *VERBS}

# Test files that are about no single module.
CROSS_CUTTING = {"house", "data", "equality", "census", "parity", "processes", "debug_configs"}
CROSS_CUTTING |= {"pipelined", "pipeline_census", "objective_meshes", "letters", "gpu_day", "composition"}

VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
LAZY = (
    "tensorflow",
    "torch",
    "seqio",
    "tensorflow_datasets",
    "grain",
    "orbax",
    "tensorboardX",
    "tokenizers",
    "tiktoken",
    "sentencepiece",
    "nupunkt",
    "zstandard",
    "rich",
    "pyarrow",
    "wandb",
    "trackio",
)


# The import law


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(package: str) -> dict[str, Path]:
    """Dotted name to file, of every module in a top-level folder."""
    return {module_name(path): path for path in sorted((ROOT / package).rglob("*.py"))}


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module that a file imports, as a dotted name, wherever in the file it does so."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if is_module(inner) else source
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            target = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            assert isinstance(target, str), f"{name}: the import law cannot read {ast.unparse(node)}"
            yield importlib.util.resolve_name(target, package)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def folders(name: str) -> set[str]:
    """The packages that a module is in, and the module itself."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def room(name: str) -> str:
    """mtx.config.root -> config: what stands in an order."""
    return name.split(".")[1] if "." in name else ""


def broken_law(name: str, target: str) -> str | None:
    """Why module `name` may not import `target`, None if it may."""
    package, target_package = name.partition(".")[0], target.partition(".")[0]
    if target_package not in OURS or package in ("tests", "benchmarks", "main"):
        return None
    if target_package in ("main", "tests", "benchmarks"):
        return f"nothing imports {target_package}"
    if package == target_package:
        return broken_order(package, room(name), room(target))
    if package in ("pallas_kernels", "data"):
        return f"{package}/ is a leaf"
    if package == "configs":
        return None
    here = room(name)
    if target_package == "configs":
        return "mtx does not know its configs"
    if target_package == "data":
        return None if here in MAY_IMPORT_DATA else f"only {', '.join(sorted(MAY_IMPORT_DATA))} import data"
    allowed = here in MAY_IMPORT_KERNELS or target in FOR_EVERYBODY
    return None if allowed else f"only {', '.join(sorted(MAY_IMPORT_KERNELS))} import kernels"


def broken_order(package: str, here: str, there: str) -> str | None:
    """The same within a package, of modules or folders directly in it; its own `__init__` has no name."""
    if package not in ORDERS or here == there or not there:
        return None
    if package == "mtx" and here in VERBS and there in VERBS:
        return "a verb imports no other verb"
    if package == "data" and not here:
        return None  # the door of data/ opens all of it; that of mtx imports nothing
    order = ORDERS[package]
    before = order[: order.index(here)] if here in order else ()
    return None if there in before else f"{there} does not come before {here or package}"


@pytest.mark.parametrize("package", ORDERS)
def test_every_module_has_its_place_in_the_order(package: str) -> None:
    assert {room(name) for name in modules(package)} - {""} <= set(ORDERS[package])


@pytest.mark.parametrize("package", PACKAGES)
def test_import_law(package: str) -> None:
    found = modules(package)
    assert found
    broken = [
        f"{name} imports {target}: {why}"
        for name, path in found.items()
        for target in imports(name, path)
        if (why := broken_law(name, target))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_one_another_in_a_circle(package: str) -> None:
    """Inside folders too. Importing a module runs the `__init__` of each folder above it that does not run yet."""
    files, graph = modules(package), {}
    for name, path in files.items():
        targets = files.keys() & set(imports(name, path))
        graph[name] = targets.union(*map(folders, targets)) - folders(name) | (targets - {name})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_no_module_has_a_vague_name() -> None:
    paths = [path for package in OURS - {"main"} for path in (ROOT / package).rglob("*")]
    assert not [str(path) for path in paths if path.stem in VAGUE]


def test_every_test_file_is_named_after_a_module() -> None:
    known = {part for package in PACKAGES for name in modules(package) for part in name.split(".")[1:]}
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert files <= known | {"main"} | CROSS_CUTTING


# Start-up


def run_python(program: str) -> str:
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout


# Flax imports rich for itself, JAX zstandard for its compile cache; from then on whoever imports one of the heavy
# packages is refused.
WITHOUT_HEAVY_PACKAGES = f"""
import sys
import flax.nnx

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {LAZY}:
            raise ImportError(f"{{name}} is imported at start-up, not where it is used")

for name in [name for name in sys.modules if name.partition(".")[0] in ("rich", "zstandard")]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse)
"""


def test_training_starts_without_heavy_packages() -> None:
    loaded = run_python(WITHOUT_HEAVY_PACKAGES + "import mtx.train; print(*sys.modules)").split()
    assert "mtx.train" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(LAZY)


def test_training_starts_within_three_seconds() -> None:
    """Of CPU time, on which the machine's other work weighs little; the best of three."""
    program = "import mtx.train, time; print(time.process_time())"
    assert min(float(run_python(program)) for _ in range(3)) < 3.0


def test_every_config_loads_without_heavy_packages() -> None:
    """In a process of its own, which prints the name of each config once it has loaded."""
    loaded = run_python(
        WITHOUT_HEAVY_PACKAGES
        + """
import pathlib, runpy
from mtx.config import Config

for path in sorted(pathlib.Path("configs").glob("*.py")):
    module = runpy.run_path(str(path))
    assert isinstance(module["get_config"](), Config), path
    assert module["__doc__"], f"{path} has no lab note"
    print(path.stem)
"""
    )
    assert loaded.split() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert "quickstart" in loaded.split()


# Configs are values


def parts(annotation: object) -> Iterator[type]:
    """The classes in an annotation, and in those of their fields."""
    if typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from parts(argument)
    elif isinstance(annotation, type):
        yield annotation


def reachable(root: type) -> set[type]:
    """The dataclasses that a config of type `root` can hold."""
    seen: set[type] = set()
    waiting = [root]
    while waiting:
        cls = waiting.pop()
        if cls in seen or not dataclasses.is_dataclass(cls):
            continue
        seen.add(cls)
        hints = typing.get_type_hints(cls)
        waiting += [part for field in dataclasses.fields(cls) for part in parts(hints[field.name])]
    return seen


def test_every_dataclass_in_a_config_is_frozen_and_keyword_only() -> None:
    from mtx.config import Config
    from mtx.mesh import MeshConfig
    from mtx.optim import AdamW, Steps

    found = reachable(Config)
    assert {Config, MeshConfig, AdamW, Steps} <= found
    assert not {cls for cls in found if not cls.__dataclass_params__.frozen}
    assert not {cls for cls in found if not all(field.kw_only for field in dataclasses.fields(cls))}


# The README


def fenced_blocks() -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def tree() -> set[str]:
    """The paths in the README's annotated tree: a folder ends in /, what is indented lies in the folder above."""
    block = next((block for block in fenced_blocks() if re.search(r"^mtx/\s", block, flags=re.MULTILINE)), "")
    paths, folder = set(), ""
    for line in block.splitlines():
        if not (words := line.strip(" │├└─").split()):
            continue
        indented = not line.startswith(words[0])
        if not indented and words[0].endswith("/"):
            folder = words[0]
        paths.add(folder + words[0] if indented else words[0])
    return paths


def on_disk(folder: str = "") -> set[str]:
    """Folders (with a /) and Python files directly in a folder, without what is hidden, ignored or empty."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = set()
    for path in (ROOT / folder).iterdir():
        if path.name.startswith((".", "__")) or any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            continue
        if path.is_dir() and any(inner.is_file() for inner in path.rglob("*") if "__pycache__" not in inner.parts):
            found.add(f"{folder}{path.name}/")
        elif path.suffix == ".py":
            found.add(folder + path.name)
    return found


def test_readme_tree_is_the_tree_on_disk() -> None:
    listed = tree()
    assert listed, "README.md has no fenced block with a line that begins with mtx/"
    assert {path for path in listed if path.count("/") == 1 and path.endswith("/")} == {
        path for path in on_disk() if path.endswith("/")
    }
    for folder in ("mtx/", "data/"):
        assert {path for path in listed if path.startswith(folder) and path != folder} == on_disk(folder)
    assert not {path for path in listed if not (ROOT / path).exists()}


def test_readme_commands_are_targets_of_the_makefile() -> None:
    said = set(re.findall(r"^\s*(?:\$ )?make +(\w+)", "\n".join(fenced_blocks()), flags=re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"quickstart", "test"} <= said <= targets


def test_lint_does_not_depend_on_whether_something_was_trained(tmp_path: Path) -> None:
    """`make quickstart` leaves runs/, and several tests import their own runs.py."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/test_train.py"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "tests"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout
