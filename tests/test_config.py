"""The config system: overrides, checks, hints, dumps; and 40 and more mistakes, each with its hint."""

import ast
import json
import re
import sys
import time
from pathlib import Path

import mistakes_of_data
import pytest
from mistakes_of_configs import FILE, FILE_MISTAKES, MISTAKES, OVERRIDE_MISTAKES, QUICKSTART, TEXT, line_of

from data import Bpe, Skip, TextFiles, TfdsText, WordPiece
from mtx import config as configs
from mtx.attention import AttentionConfig
from mtx.checkpoint import Checkpoints
from mtx.command import take_verb
from mtx.config import schema
from mtx.config.printing import flat
from mtx.config.root import Config
from mtx.errors import ConfigError, DeviceError, UserError
from mtx.layers import Gelu, Llama3Scaling, Rotary, SwiGLU
from mtx.layout import Layout, Row
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Cosine, Fraction, Linear, Lion, Sgd, Steps, Tokens
from mtx.pipeline import OneFOneB
from mtx.spmd import Compiled

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(tmp_path):
    """load("steps=3 seed=1", replace=("old", "new")): the small file, edited, and overrides."""

    def load_file(words: str = "", replace: tuple[str, str] | None = None) -> configs.Loaded:
        assert replace is None or FILE.count(replace[0]) == 1
        path = tmp_path / "small.py"
        path.write_text(FILE.replace(*replace) if replace else FILE)
        return configs.load(path, words.split())

    return load_file


def said(load, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        configs.check(load(*arguments).config, 8)
    return str(caught.value)


@pytest.mark.parametrize(("words", "hint"), OVERRIDE_MISTAKES, ids=[words for words, _ in OVERRIDE_MISTAKES])
def test_override_mistakes_are_refused_with_a_hint(load, words, hint):
    if words == "steps":  # a bare word is the command line's verb; load alone says what an override looks like
        with pytest.raises(ConfigError, match=hint):
            take_verb(["steps"])
        hint = "'steps' is not an override; write path=value without spaces, such as steps=100."
    message = said(load, words)
    assert hint in message
    assert "\n" not in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("edit", "hint"), FILE_MISTAKES, ids=[edit[1].strip() or "no layers" for edit, _ in FILE_MISTAKES]
)
def test_file_mistakes_are_refused_with_a_hint(load, edit, hint):
    assert hint in said(load, "", edit)


@pytest.mark.parametrize("mistake", mistakes_of_data.FILE_MISTAKES, ids=lambda mistake: mistake[0][1])
def test_mistakes_of_a_blend_are_refused_with_a_hint(load, mistake):
    edit, *hints = mistake
    message = said(load, "", edit)
    assert all(hint in message for hint in hints)


def test_every_config_dataclass_has_a_mistake_in_the_tables():
    names = ("Row", "Group", "Stack", "Block")
    listed = {name for name in names if any(f"{name}(" in edit[1] for edit, _ in FILE_MISTAKES)}
    in_files = {"Weighted", "Phase"}
    assert set(MISTAKES) | listed | in_files == set(schema.reachable(Config))
    assert all(MISTAKES.values())
    assert len(OVERRIDE_MISTAKES) + len(FILE_MISTAKES) >= 40


def test_a_mesh_that_leaves_devices_idle_is_a_device_error_unless_the_config_is_wrong_too(load):
    with pytest.raises(DeviceError, match=r"mesh.data=4 uses 4 of 8 devices"):
        configs.check(load("mesh.data=4").config, 8)
    with pytest.raises(ConfigError, match=r"2 problems[^\n]*\nsteps=0 must be positive.\nmesh.data=4 uses 4 of 8"):
        configs.check(load("mesh.data=4 steps=0").config, 8)
    with pytest.raises(ConfigError, match="--devices 0 must be at least 1"):
        configs.check(load().config, 0)


def test_all_problems_are_reported_at_once(load):
    assert said(load, "stesp=3 optimizer=lion model.remat=ful").splitlines()[0] == "3 problems in the configuration:"
    lines = said(load, "steps=0 model.dropout=2 mesh.data=0 batch.global_size=0").splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert [line.partition("=")[0] for line in lines[1:]] == [
        "model.dropout",
        "batch.global_size",
        "mesh.data",
        "steps",
    ]
    lines = said(load, "batch.global_size=10 batch.sequence_length=512 model.mlp.width=3 mesh.model=2").splitlines()
    assert [line.partition("=")[0] for line in lines[1:]] == [
        "batch.global_size",
        "batch.sequence_length",
        "model.mlp.width",
    ]


def test_without_a_device_count_only_what_is_known_of_the_mesh_is_checked(load):
    configs.check(load("batch.global_size=12").config)
    with pytest.raises(
        ConfigError, match=r"over 8 data shards \(mesh.replica\*data\*expert\); try .* or mesh.data=4\.$"
    ):
        configs.check(load("batch.global_size=12 mesh.data=8").config)
    with pytest.raises(ConfigError, match=r"model.mlp.width=100 does not divide over mesh.model=8"):
        configs.check(load("model.mlp.width=100 mesh.model=8").config)


@pytest.mark.parametrize(
    "words",
    [
        "mesh.model=2 layout.sequence_parallel=true layout.zero=2",
        "mesh.replica=8 mesh.data=1 layout.zero=3 layout.sequence_parallel=True",
        "precision.params=bfloat16",
        "partition=Compiled",
        "steps=None tokens=2e6",
        "steps=none epochs=0.5",
        "checkpoints=None",
        "checkpoints.every_steps=20 checkpoints.keep_every_steps=100",
        "checkpoints.every_steps=0 checkpoints.every_minutes=0",
        "workdir=/mnt/bucket:1/x",
        "init_from=runs/small/checkpoints/3",
        TEXT,
        f"{TEXT}data.split=1,0 data.bad_records=Skip",
        f"{TEXT}data.tokenizer=Bpe data.tokenizer.vocab_size=257",
    ],
)
def test_what_is_legal_or_without_effect_is_not_refused(load, words):
    configs.check(load(words).config, 8)


def test_every_suggested_change_is_itself_legal(load):
    """What a hint says to type, typed."""
    tried = 0
    for words, hint in OVERRIDE_MISTAKES:
        message = said(load, words)
        if "; try " not in hint + message or " devices" in message:
            continue
        options = message.partition("; try ")[2].rstrip(".").split(", or ")
        for option in options:
            if "=" not in option:
                continue
            path, values = option.split("=", 1) if option.count("=") == 1 else (None, "")
            changes = [option] if path is None else [f"{path}={value}" for value in values.split(" or ")]
            for change in changes:
                paths = {pair.partition("=")[0] for pair in change.split()}
                kept = [word for word in words.split() if word.partition("=")[0] not in paths]
                configs.check(load(" ".join(kept + change.split())).config, 8)
                tried += 1
    assert tried >= 35


@pytest.mark.parametrize(
    "words", ["mesh.pipeline=16", "mesh.pipeline=4", "mesh.model=3", "mesh.data=3 batch.global_size=4", "mesh.data=16"]
)
def test_every_suggested_mesh_runs_the_config(load, words):
    """Two layers and, in one case, four sequences do not go on every mesh of eight devices."""
    words = f"mesh.data=3 {words}" if "mesh.data" not in words else words
    with pytest.raises(DeviceError, match="; try ") as caught:
        configs.check(load(words).config, 8)
    options = str(caught.value).partition("; try ")[2].rstrip(".").split(", or ")
    options = [option for option in options if option.startswith("mesh.")]
    for option in options:
        paths = {pair.partition("=")[0] for pair in option.split()}
        kept = [word for word in words.split() if word.partition("=")[0] not in paths]
        configs.check(load(" ".join(kept + option.split())).config, 8)
    assert len(options) == 4


def test_meshes_are_suggested_where_none_would_do(load):
    with pytest.raises(DeviceError, match=r"; try mesh.data=8, or "):
        configs.check(load("mesh.data=3 batch.global_size=1 model.attention.heads=1").config, 8)


TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 999}, "merges": []},
    "added_tokens": [{"id": 1000, "content": "</s>", "special": True}],
}


@pytest.mark.parametrize(
    ("words", "content", "hint"),
    [
        (
            "",
            TOKENIZER,
            "model.vocab_size=257 is smaller than the 1001 tokens of data=TextFiles; try model.vocab_size=10",
        ),
        ("data.tokenizer.end_of_document=<eos>", TOKENIZER, "has no token '<eos>' among its added tokens (</s>); name"),
        ("", TOKENIZER | {"added_tokens": []}, "has no usual end of document among its added tokens (none); name one"),
        (
            "",
            {"vocab": {}},
            "data.tokenizer.path=small.json cannot be used: small.json is no tokenizer.json: it has no",
        ),
    ],
)
def test_a_tokenizer_s_file_is_looked_at_before_any_device(load, tmp_path, monkeypatch, words, content, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(content))
    assert hint in said(load, f"{TEXT}data.tokenizer=TokenizerFile data.tokenizer.path=small.json {words}")
    if content == TOKENIZER and not words:
        fitting = f"{TEXT}data.tokenizer=TokenizerFile data.tokenizer.path=small.json model.vocab_size=1001"
        configs.check(load(fitting).config, 8)


# How long a run is.


def no_data() -> int:
    raise AssertionError("only epochs need the data")


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("steps=7", 7),
        ("steps=None tokens=1", 1),
        ("steps=None tokens=1023", 1),
        ("steps=None tokens=1024", 1),
        ("steps=None tokens=1025", 2),
        ("steps=None tokens=2e6", 1954),
        ("steps=None tokens=1e16", 9_765_625_000_000),
        ("steps=None tokens=10_000_000_000_000_001", 9_765_625_000_001),
    ],
)
def test_a_length_in_steps_or_tokens_rounds_up_to_steps_of_1024_tokens_without_asking_the_data(load, words, steps):
    assert configs.total_steps(load(words).config, no_data) == steps


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"),
    [
        ("1", 32, 2),
        ("1", 33, 3),
        ("0.5", 32, 1),
        ("0.5", 33, 2),
        ("0.001", 32, 1),
        ("1.1", 800, 55),  # in floats 1.1 * 800 / 16 > 55
        ("2.2", 1440, 198),
        ("3", 2**60, 3 * 2**56),
        ("1e308", 16, 10**308),
    ],
)
def test_a_length_in_epochs_rounds_up_to_steps_of_16_sequences(load, epochs, samples, steps):
    config = load(f"steps=None epochs={epochs}").config
    configs.check(config, 8)
    assert configs.total_steps(config, lambda: samples) == steps


def test_a_file_may_say_its_length_in_any_unit(load):
    for written, steps in (("tokens=5000", 5), ("epochs=2", 20), ("epochs=0.5", 5)):
        config = load("", ("steps=3", written)).config
        configs.check(config, 8)
        assert configs.total_steps(config, lambda: 160) == steps
    hint = "steps=4 and epochs=2 both say how long the run is; try steps=None, or epochs=None."
    assert said(load, "steps=4", ("steps=3", "epochs=2")) == hint
    assert "leaves the run without a length" in said(load, "", ("steps=3,", ""))


# Overrides.


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("steps=1e9", "steps", 10**9),
        ("--steps=7", "steps", 7),
        ("--mesh.data -1", "mesh.data", -1),
        ("mesh.data=-1", "mesh.data", -1),
        ("tokens=2e6", "tokens", 2_000_000),
        ("tokens=None", "tokens", None),
        ("epochs=0.5", "epochs", 0.5),
        ("epochs=2", "epochs", 2.0),
        ("stop_after_minutes=30", "stop_after_minutes", 30.0),
        ("checkpoints=None", "checkpoints", None),
        ("checkpoints=Checkpoints checkpoints.keep=5", "checkpoints", Checkpoints(keep=5)),
        (f"{TEXT}data.split=8,2", "data.split", "8,2"),
        ("data=TextFiles data.paths=a/*.txt,b=c", "data.paths", "a/*.txt,b=c"),
        ("optimizer.b1=0", "optimizer.b1", 0.0),
        ("optimizer.clip_norm=None", "optimizer.clip_norm", None),
        ("optimizer.clip_norm=2", "optimizer.clip_norm", 2.0),
        ("batch.micro_size=none", "batch.micro_size", None),
        ("batch.micro_size=2", "batch.micro_size", 2),
        ("model.causal=false", "model.causal", False),
        ("model.causal=True", "model.causal", True),
        ("layout.zero=3", "layout.zero", 3),
        ("layout.rows=()", "layout.rows", ()),
        ("layout.rows=None", "layout.rows", None),
        ("model.remat=full", "model.remat", "full"),
        ("workdir=runs/a=b", "workdir", "runs/a=b"),
        ("workdir=None", "workdir", "runs/small"),
        ("workdir=17", "workdir", "17"),
    ],
)
def test_values_are_read_by_the_field_s_type(load, word, path, value):
    loaded = load(word)
    found = loaded.config
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert hash(loaded.config) is not None


def test_a_union_s_class_is_chosen_by_name_and_keeps_optional_fields_that_the_file_set(load):
    lion = load("optimizer=Lion optimizer.b1=0.95").config.optimizer
    schedule = Cosine(peak_lr=3e-3, warmup=Fraction(share=0.1))
    assert lion == Lion(schedule=schedule, b1=0.95, b2=0.99)  # AdamW's b2 is another thing
    sgd = load("optimizer=Sgd optimizer.schedule=Linear").config.optimizer
    assert sgd == Sgd(schedule=Linear(peak_lr=3e-3, warmup=Fraction(share=0.1)))
    assert sgd.weight_decay == 0.0  # Sgd's default, not AdamW's
    assert load("partition=Compiled").config.partition == Compiled()
    assert load("model.mlp=SwiGLU model.mlp.width=64").config.model.mlp == SwiGLU(width=64)
    assert load("optimizer=AdamW").config == load().config


def test_what_a_class_of_the_command_line_keeps_is_said(load):
    """Fields that a base of both classes declares; what each declares for itself is its own."""
    assert load("optimizer.b1=0.95").remarks == ()
    (said,) = load("optimizer=Lion").remarks
    assert said == "optimizer=Lion keeps schedule of AdamW; it has its own b2=0.99, not 0.98 as AdamW had."
    (said,) = load("optimizer=Lion optimizer.b2=0.95").remarks
    assert said == "optimizer=Lion keeps schedule of AdamW."
    words = f"{TEXT}data.tokenizer=Bpe data.tokenizer.vocab_size=4096 data.split=8,1,1"
    config = load(words).config
    other = configs.override(config, ["data.tokenizer=WordPiece"])
    assert other.data.tokenizer == WordPiece(vocab_size=4096)
    tfds = configs.override(config, ["data=TfdsText", "data.name=my_corpus"])
    assert tfds.data == TfdsText(name="my_corpus", tokenizer=Bpe(vocab_size=4096)), "its split is another thing"


def test_a_part_that_may_be_none_is_chosen_and_removed(load):
    rotary = "model.positions=Rotary "
    scaled = load(rotary + "model.positions.scaling=Llama3Scaling model.positions.scaling.factor=32").config
    assert scaled.model.positions == Rotary(scaling=Llama3Scaling(factor=32.0))
    edit = ("Learned(length=256)", "Rotary(scaling=Llama3Scaling())")
    assert load("", edit).config.model.positions.scaling == Llama3Scaling()
    assert load("model.positions.scaling=None", edit).config.model.positions == Rotary()


def test_another_source_of_data_is_chosen_with_its_parts(load):
    words = f"{TEXT}data.tokenizer=Bpe data.bad_records=Skip data.bad_records.budget=7"
    assert load(words).config.data == TextFiles(paths="texts", tokenizer=Bpe(), bad_records=Skip(budget=7))


def test_a_config_in_hand_is_overridden_as_a_file_is(load):
    config = load().config
    assert configs.override(config, []) == config
    words = "--seed 7 optimizer=Lion mesh.model=2 checkpoints.keep=5"
    assert configs.override(config, words.split()) == load(words).config
    with pytest.raises(ConfigError, match=r"^2 problems[^\n]*\nstesp: Config has .*\noptimizer=lion must be one of"):
        configs.override(config, ["stesp=3", "optimizer=lion"])
    with pytest.raises(ConfigError, match="'runs/x' is not an override; write path=value"):
        configs.override(config, ["runs/x"])


def test_the_order_of_overrides_does_not_matter(load):
    words = (
        "optimizer.schedule.warmup.count=9 optimizer.b1=0.95 optimizer.schedule.warmup=Tokens optimizer.schedule=Linear"
    )
    words = [*words.split(), "optimizer=Lion"]
    found = {load(" ".join(order)).config for order in (words, words[::-1], words[2:] + words[:2])}
    assert found == {load(" ".join(words)).config}
    optimizer = found.pop().optimizer
    assert optimizer == Lion(schedule=Linear(peak_lr=3e-3, warmup=Tokens(count=9)), b1=0.95)


def test_a_length_in_other_units_must_be_said_again(load):
    edit = ("Fraction(share=0.1)", "Steps(count=100)")
    assert load("", edit).config.optimizer.schedule.warmup == Steps(count=100)
    with pytest.raises(ConfigError, match=r"needs optimizer.schedule.warmup.count=... too \(Steps had count=100\)"):
        load("optimizer.schedule.warmup=Tokens", edit)


def test_each_value_says_where_it_came_from(load):
    loaded = load("optimizer=Lion optimizer.b1=0.95 seed=3")
    here = str(loaded.path)
    assert loaded.origin("seed") == "command line"
    assert loaded.origin("optimizer") == "command line"
    assert loaded.origin("optimizer.b1") == "command line"
    assert loaded.origin("optimizer.b2") == "default"  # Lion's own
    assert loaded.origin("optimizer.weight_decay") == "default"
    assert loaded.origin("optimizer.schedule.peak_lr") == f"{here}:{line_of('peak_lr')}"
    assert loaded.origin("optimizer.schedule.final_share") == "default"
    assert loaded.origin("model.layers") == f"{here}:{line_of('layers=2')}"
    assert loaded.origin("workdir") == "the config file's name"
    assert load("workdir=x").origin("workdir") == "command line"
    assert load("optimizer=Sgd").origin("optimizer.b2") == "default"


def test_origins_follow_names_functions_and_replace(tmp_path):
    (tmp_path / "small.py").write_text(FILE)
    variant = tmp_path / "variant.py"
    variant.write_text(
        "import sys; from dataclasses import replace\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import small\n"
        "from mtx.mesh import MeshConfig\n"
        "def mesh():\n"
        "    return MeshConfig(\n"
        "        model=2)\n"
        "def get_config():\n"
        "    config = replace(small.get_config(), steps=9,\n"
        "        mesh=mesh())\n"
        "    return config\n"
    )
    loaded = configs.load(variant)
    assert loaded.config.mesh == MeshConfig(model=2)
    assert loaded.origin("steps") == f"{variant}:9"
    assert loaded.origin("mesh.model") == f"{variant}:7"
    assert loaded.origin("mesh.data") == "default"
    assert loaded.origin("model.layers") == str(variant)
    assert "small" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_origins_reach_through_replace_to_the_constructor(load):
    head = "def get_config():\n    from dataclasses import replace\n    return replace(base(), steps=5)\n\n\n"
    loaded = load("", ("def get_config() -> Config:", f"{head}def base() -> Config:"))
    moved = head.count("\n")
    assert loaded.origin("steps") == f"{loaded.path}:{line_of('def get_config') + 2}"
    assert loaded.origin("model.layers") == f"{loaded.path}:{line_of('layers=2') + moved}"


# Files.


def test_files_are_imported_alone_and_from_anywhere(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != ROOT])
    modules, path = set(sys.modules), list(sys.path)
    load()
    variant = tmp_path / "variant.py"
    variant.write_text("from configs.quickstart import get_config as base\ndef get_config():\n    return base()\n")
    assert configs.load(variant).config.model.vocab_size == 257
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.startswith(("configs", "mtx config", "small"))}
    assert not list(tmp_path.glob("**/__pycache__"))


def test_a_file_is_read_anew_each_time(load):
    assert load().config.steps == 3
    assert load("", ("steps=3", "steps=4")).config.steps == 4


def test_a_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        ConfigError, match=r"no config file configs/quikstart.py; did you mean configs/quickstart.py\?$"
    ):
        configs.load("configs/quikstart.py")
    with pytest.raises(ConfigError, match=r"did you mean configs/quickstart.py\?$"):
        configs.load("quickstart")
    with pytest.raises(ConfigError, match=r"no config file zzz; configs holds gpt2_124m.py, .*quickstart.py\.$"):
        configs.load("zzz")
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.load(tmp_path)


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("[!_]*.py")))
def test_every_config_file_is_legal_and_a_lab_note(file):
    loaded = configs.load(ROOT / "configs" / file)
    for devices in (1, 8, 64):
        if file not in ("quickstart.py", "own_text.py") or devices <= loaded.config.batch.global_size:
            configs.check(loaded.config, devices)
    assert len((ast.get_docstring(ast.parse(loaded.source)) or "").split()) > 30


def test_quickstart_trains_on_every_mesh_of_eight_by_overrides_alone():
    count = 0
    for replica in (1, 2, 4, 8):
        for data in (d for d in (1, 2, 4, 8) if replica * d <= 8):
            mesh = [f"mesh.replica={replica}", f"mesh.data={data}", f"mesh.model={8 // replica // data}"]
            for more in ([], ["layout.sequence_parallel=true"], ["layout.zero=3"], ["partition=Compiled"]):
                configs.check(configs.load(QUICKSTART, mesh + more).config, 8)
                count += 1
    assert count == 40


def test_microbatches(load):
    sizes = {"pipeline": 1, "replica": 2, "data": 2, "context": 1, "expert": 1, "model": 2}
    assert configs.microbatches(load().config, sizes) == 1
    assert configs.microbatches(load("batch.micro_size=2").config, sizes) == 2
    assert configs.microbatches(load("batch.micro_size=1").config, sizes) == 4
    with pytest.raises(AssertionError):
        configs.microbatches(load("batch.micro_size=3").config, sizes)


# Dumps, the run folder, help.


def test_a_dump_is_json_and_reads_back(load):
    edit = ("steps=3", "steps=3, layout=Layout(rows=(Row(dimension='heads', weights=('model',)),))")
    config = load("optimizer=Lion optimizer.clip_norm=None", edit).config
    dumped = json.loads(json.dumps(configs.dump(config)))
    assert dumped["optimizer"]["class"] == "Lion"
    assert dumped["optimizer"]["clip_norm"] is None
    assert configs.read_dump(dumped) == config
    assert config.layout == Layout(rows=(Row(dimension="heads", weights=("model",)),))
    assert configs.differences(dumped, config) == []
    for words in ("checkpoints=None steps=None epochs=0.5", f"{TEXT}data.tokenizer=Bpe data.bad_records=Skip"):
        config = load(words).config
        assert configs.read_dump(json.loads(json.dumps(configs.dump(config)))) == config


def test_differences_name_path_and_both_values(load):
    found = configs.differences(load().config, load("optimizer=Sgd steps=9").config)
    assert ("steps", "3", "9") in found
    assert ("optimizer", "AdamW", "Sgd") in found
    assert ("optimizer.b2", "0.98", "(absent)") in found
    assert ("optimizer.momentum", "(absent)", "0.0") in found
    assert not [row for row in found if row[0].startswith(("model", "optimizer.schedule"))]


def test_a_field_that_is_younger_than_a_run_had_its_default(load):
    old = configs.dump(load().config)
    del old["model"]["attention"]["window"]
    assert configs.differences(old, load().config) == []
    changed = load("model.attention.window=9").config
    assert configs.differences(old, changed) == [("model.attention.window", "None", "9")]
    gone = old | {"of_an_older_version": 1}
    assert ("of_an_older_version", "1", "(absent)") in configs.differences(gone, load().config)


def test_the_run_folder_holds_what_is_needed_to_repeat_the_run(load, tmp_path):
    loaded = load("steps=9 optimizer=Lion")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "uncommitted.diff").write_text("of an earlier run")
    configs.write_run_folder(loaded, folder, ["main.py", "--config", "a b.py", "steps=9"])
    assert configs.read_dump(json.loads((folder / "config.json").read_text())) == loaded.config
    assert (folder / "config.py").read_text() == loaded.source
    text = (folder / "config.txt").read_text()
    assert re.search(r"^steps = 9 +# command line$", text, re.MULTILINE)
    assert re.search(r"^optimizer = Lion +# command line$", text, re.MULTILINE)
    assert re.search(rf"^model.layers = 2 +# .*small.py:{line_of('layers=2')}$", text, re.MULTILINE)
    assert "steps: 3 -> 9\n" in (folder / "overrides.txt").read_text()
    run = json.loads((folder / "run.json").read_text())
    assert run["command"].endswith("main.py --config 'a b.py' steps=9")
    assert set(run["versions"]) == {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert run["versions"]["jax"].count(".") >= 2
    if (ROOT / ".git").exists():
        assert len(run["git_commit"] or "0" * 40) == 40
    diff = folder / "uncommitted.diff"
    assert not diff.exists() or diff.read_bytes().startswith(b"diff --git")


def test_the_run_folder_does_not_need_git(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    configs.write_run_folder(load(), tmp_path / "run", ["main.py"])
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["git_commit"] is None
    assert not (tmp_path / "run" / "uncommitted.diff").exists()


def test_help_lists_every_field_with_type_value_origin_and_help(load):
    for words in (f"{TEXT}data.tokenizer=Bpe data.bad_records=Skip checkpoints=None", "seed=3"):
        loaded = load(words)
        text = configs.help_text(loaded)
        for path in flat(configs.dump(loaded.config)):
            assert re.search(rf"^{re.escape(path)}(:|$)", text, re.MULTILINE), path
    assert re.search(rf"^steps: int \| None = 3\s+\S*small.py:{line_of('steps=')}$", text, re.MULTILINE)
    assert re.search(r"^tokens: int \| None = None +default\n    Tokens to train on, ", text, re.MULTILINE)
    assert re.search(r"^checkpoints: Checkpoints \| None = Checkpoints +default$", text, re.MULTILINE)
    assert "TextFiles: Your own text: " in text
    assert "Fields: paths, text_key=text, prompt_key=None," in text
    assert re.search(r"^seed: int = 3 +command line\n    Of initial weights, ", text, re.MULTILINE)
    assert re.search(
        rf"^optimizer: AdamW \| Lion \| Sgd = AdamW\s+\S*small.py:{line_of('optimizer=')}$", text, re.MULTILINE
    )
    assert "Sgd: Gradient descent with momentum. Fields: schedule=Cosine(), weight_decay=0.0," in text
    assert "model.remat: none | selective | full | stage = none" in text
    assert max(len(line) for line in text.splitlines() if "small.py" not in line) <= 100


def test_every_field_has_help():
    for name, cls in schema.reachable(Config).items():
        for field in schema.fields(cls):
            named = schema.classes(schema.fields(cls)[field].annotation)
            assert schema.help_of(cls, field) or len(named) > 1, f"{name}.{field}"


def test_load_and_check_are_quick():
    started = time.perf_counter()
    configs.check(configs.load(QUICKSTART, ["optimizer=Lion", "mesh.model=2"]).config, 8)
    assert time.perf_counter() - started < 1.0


# Other parts.


def test_a_cluster_is_whole_or_absent():
    of = configs.Cluster.of
    assert of(None, None, None) is None
    assert of("host:1234", 2, 1) == configs.Cluster(coordinator="host:1234", processes=2, process=1)
    for wrong in (("host:1234", 2, None), ("host", 2, 0), ("host:1234", 2, 2), ("host:1234", 0, 0)):
        with pytest.raises(ConfigError, match="--"):
            of(*wrong)


def test_types_that_a_file_can_get_wrong():
    assert schema.fits(1, float)
    assert not schema.fits(True, float)
    assert not schema.fits(True, int)
    assert not schema.fits(1.0, int)
    assert not schema.fits(True, schema.fields(Layout)["zero"].annotation)
    assert schema.type_name(schema.fields(AttentionConfig)["kv_heads"].annotation) == "int | None"
    assert schema.expected(schema.fields(Config)["model"].annotation) == f"a {Transformer.__name__}"
    assert (
        schema.expected(schema.fields(Config)["data"].annotation)
        == "one of PythonDocs, TextFiles, TfdsText, SeqioTask, MegatronShards, Blend"
    )
    assert schema.expected(schema.fields(Config)["checkpoints"].annotation) == "a Checkpoints or None"
    assert schema.show(AdamW(b1=0.5)) == "AdamW(b1=0.5)"
    assert schema.show(Gelu(width=3)) == "Gelu(width=3)"


def test_a_count_of_microbatches_that_a_schedule_cannot_take(load, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OneFOneB, "fits", lambda self, stages, microbatches: microbatches % stages == 0)
    config = load("mesh.data=1 mesh.pipeline=2 batch.global_size=6 batch.micro_size=2").config
    with pytest.raises(ConfigError, match=r"cannot take the 3 microbatches .*; try batch.global_size=4 or 8, or an"):
        configs.check(config, 2)
