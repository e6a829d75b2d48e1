"""The config system: overrides, checks, hints, dumps; and 40 and more mistakes, each with its hint."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from data import PythonDocs
from mtx import config as configs
from mtx.attention import AttentionConfig
from mtx.config import schema
from mtx.config.overrides import FLAGS
from mtx.config.printing import flat
from mtx.config.root import Config
from mtx.errors import ConfigError, DeviceError, UserError
from mtx.layers import Gelu, Llama3Scaling, Rotary, SwiGLU
from mtx.layout import Layout, Row
from mtx.mesh import MeshConfig
from mtx.optim import AdamW, Cosine, Fraction, Linear, Lion, Sgd, Steps, Tokens
from mtx.spmd import Compiled

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.py"
FILE = '''"""A small config for tests."""

from data import PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import *
from mtx.layout import Layout, Row
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import *
from mtx.spmd import *


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=257,
            layers=2,
            width=64,
            attention=AttentionConfig(heads=8),
            mlp=Gelu(width=128),
            positions=Learned(length=256),
        ),
        data=PythonDocs(),
        batch=BatchConfig(global_size=16, sequence_length=64),
        optimizer=AdamW(schedule=Cosine(peak_lr=3e-3, warmup=Fraction(share=0.1)), b2=0.98),
        mesh=MeshConfig(data=-1),
        steps=3,
    )
'''


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FILE.splitlines(), 1) if text in line)


@pytest.fixture
def load(tmp_path):
    """load("steps=3 seed=1", replace=("old", "new")): the small file, edited, and overrides."""

    def load_file(words: str = "", replace: tuple[str, str] | None = None) -> configs.Loaded:
        assert replace is None or FILE.count(replace[0]) == 1
        path = tmp_path / "small.py"
        path.write_text(FILE.replace(*replace) if replace else FILE)
        return configs.load(path, words.split())

    return load_file


# What a user gets wrong. (words, hint), on 8 devices; the hint is all that follows but for lists of fields.

NEGATIVE_COUNT = "optimizer.schedule.warmup.count=-1 must not be negative."
MISTAKES = {
    "Config": [
        (
            "stesp=3",
            "stesp: Config has no field 'stesp'; did you mean steps? Its fields: model, data, batch, optimizer, ",
        ),
        ("steps=abc", "steps=abc must be an int."),
        ("steps=1.5", "steps=1.5 must be an int."),
        ("steps=true", "steps=true must be an int."),
        ("steps=0", "steps=0 must be at least 1."),
        ("steps.count=3", "steps.count cannot be set: steps is a single value (int); write steps=3."),
        ("steps=3 steps=4", "steps is given twice, as 3 and as 4; keep one."),
        ("steps", "there is no verb"),
        ("--steps", "--steps needs a value; write steps=value."),
        ("seed=-1", "seed=-1 must be at least 0 and below 2**32."),
        ("log_every=0", "log_every=0 must be at least 1."),
        ("eval_every=-1", "eval_every=-1 must be at least 0; 0 evaluates only at the end."),
        ("sample_tokens=-1", "sample_tokens=-1 must be at least 0; 0 shows no sample."),
        ("save_every=10", "save_every=10 asks for checkpoints, which are not built yet; set save_every=0."),
        ("workdir=", "workdir= is empty; name a folder, or None for runs/ and the name of the config file."),
        ("--device=8", "did you mean --devices?"),
        ("lr=1e-3", "lr: Config has no field 'lr'; did you mean optimizer.schedule.peak_lr?"),
        ("learning_rate=1e-3", "did you mean optimizer.schedule.peak_lr?"),
        ("modle.width=8", "modle.width: Config has no field 'modle'; did you mean model.width?"),
    ],
    "BatchConfig": [
        ("batch=16", "batch=16 must be a BatchConfig; set its fields: batch.global_size, batch.micro_size, batch.seq"),
        ("batch.size=16", "BatchConfig has no field 'size'; did you mean batch.global_size?"),
        ("batch.global_size=0", "batch.global_size=0 must be at least 1."),
        ("batch.micro_size=0", "batch.micro_size=0 must be at least 1, or None for no accumulation."),
        ("batch.micro_size=none batch.sequence_length=0", "batch.sequence_length=0 must be at least 1."),
        (
            "batch.global_size=12",
            "batch.global_size=12 does not divide over 8 data shards (mesh.replica*data*expert); "
            "try batch.global_size=8 or 16, or mesh.data=4 mesh.model=2.",
        ),
        (
            "batch.global_size=20 mesh.data=4 mesh.model=2 batch.micro_size=2",
            "batch.micro_size=2 does not divide the 5 sequences of a data shard "
            "(batch.global_size=20 over mesh.replica*data*expert=4); legal: 1, 5.",
        ),
        (
            "batch.sequence_length=512",
            "batch.sequence_length=512 is longer than the table of positions; try batch.sequence_length=256, "
            "or model.positions.length=512, or model.positions=Rotary.",
        ),
        (
            "batch.sequence_length=60 mesh.model=8 layout.sequence_parallel=true",
            "batch.sequence_length=60 does not divide over mesh.model=8 (layout.sequence_parallel); "
            "try batch.sequence_length=56 or 64, or layout.sequence_parallel=false.",
        ),
    ],
    "MeshConfig": [
        ("mesh=8", "mesh=8 must be a MeshConfig; set its fields: mesh.pipeline, mesh.replica, mesh.data, "),
        ("mesh.data=0", "mesh.data=0 must be a positive number of devices, or -1 for the rest of them."),
        ("mesh.model=-1", "mesh.model=-1 is a second -1 beside mesh.data; only one axis can take the rest"),
        ("mesh.pipeline=2", "mesh.pipeline=2 is not built yet; set mesh.pipeline=1 and use replica, data and model."),
        ("mesh.tensor=2", "mesh.tensor: MeshConfig has no field 'tensor'"),
        ("mesh.data=3", "mesh.data=3 uses 3 of 8 devices; try mesh.data=8, or "),
        ("mesh.model=3", "mesh.data=-1 mesh.model=3 does not divide 8 devices; try mesh.data=2 mesh.model=4"),
    ],
    "Transformer": [
        ("model=gpt2", "model=gpt2 must be a Transformer; set its fields: model.vocab_size, model.layers, "),
        ("model.heads=4", "Transformer has no field 'heads'; did you mean model.attention.heads?"),
        ("model.layers=0", "model.layers=0 must be at least 1."),
        ("model.dropout=1.5", "model.dropout=1.5 must be at least 0 and below 1."),
        ("model.causal=yes", "model.causal=yes must be true or false."),
        ("model.remat=ful", "model.remat=ful must be one of none, selective, full; did you mean full?"),
        ("model.unroll=4", "model.unroll=4 must divide layers=2."),
        (
            "model.vocab_size=256",
            "model.vocab_size=256 is smaller than the 257 tokens of data=PythonDocs; try model.vocab_size=257.",
        ),
        (
            "model.vocab_multiple=1 mesh.model=2",
            "model.vocab_multiple=1 does not divide over mesh.model=2 (the vocabulary, padded, has 257 rows); "
            "try model.vocab_multiple=2, or mesh.model=1.",
        ),
    ],
    "AttentionConfig": [
        ("model.attention.heads=7", "model.attention.heads=7 does not divide width=64; try 4 or 8, or set head_size."),
        ("model.attention.kv_heads=3", "model.attention.kv_heads=3 must divide heads=8; legal: 1, 2, 4, 8."),
        (
            "model.attention.kv_heads=2 mesh.data=2 mesh.model=4",
            "model.attention.kv_heads=2 does not divide over mesh.model=4; try model.attention.kv_heads=4 or 8, "
            "or mesh.model=1 mesh.data=8, or mesh.model=2 mesh.data=4.",
        ),
        (
            "model.attention.heads=4 mesh.model=8",
            "model.attention.heads=4 does not divide over mesh.model=8; try model.attention.heads=8 or 16, or mesh",
        ),
        ("model.attention.backend=flash", "must be one of auto, plain, cudnn, splash; did you mean splash?"),
        (
            "model.attention.backend=cudnn",
            "model.attention.backend=cudnn cannot do this: it does not see document borders "
            "(data.isolate_documents=false has none); use model.attention.backend=plain, or auto",
        ),
    ],
    "LayerNorm": [
        ("model.norm.epsilon=0", "model.norm.epsilon=0.0 must be positive."),
    ],
    "RMSNorm": [
        ("model.norm=RmsNorm", "model.norm=RmsNorm must be one of LayerNorm, RMSNorm; did you mean RMSNorm?"),
        ("model.norm=RMSNorm model.norm.epsilon=-1", "model.norm.epsilon=-1.0 must be positive."),
    ],
    "Learned": [
        ("model.positions.length=0", "model.positions.length=0 must be at least 1."),
    ],
    "Rotary": [
        ("model.positions.theta=1e4", "Learned has no field 'theta'; Rotary has it: add model.positions=Rotary."),
        ("model.positions=Rotary model.positions.theta=1", "model.positions.theta=1.0 must be above 1."),
    ],
    "Llama3Scaling": [
        (
            "model.positions=Rotary model.positions.scaling.factor=8",
            "model.positions.scaling.factor cannot be set: model.positions.scaling is None; choose its class too: "
            "model.positions.scaling=Llama3Scaling.",
        ),
        (
            "model.positions=Rotary model.positions.scaling=Llama3Scaling model.positions.scaling.factor=0.5",
            "model.positions.scaling.factor=0.5 must be at least 1.",
        ),
    ],
    "Gelu": [
        ("model.mlp.width=0", "model.mlp.width=0 must be at least 1."),
        (
            "model.mlp.width=100 mesh.model=8",
            "model.mlp.width=100 does not divide over mesh.model=8; try model.mlp.width=96 or 104, or mesh.model=2, or",
        ),
    ],
    "SwiGLU": [
        ("model.mlp=SwiGLU", "model.mlp=SwiGLU needs model.mlp.width=... too (Gelu had width=128)."),
        ("model.mlp=SwiGLU model.mlp.width=-8", "model.mlp.width=-8 must be at least 1."),
    ],
    "AdamW": [
        ("optimizer=lion", "optimizer=lion must be one of AdamW, Lion, Sgd; did you mean Lion?"),
        ("optimizer=Lion(b1=0.9)", "must be one of AdamW, Lion, Sgd; did you mean Lion?"),
        ("optimizer.b1=1", "optimizer.b1=1.0 must be at least 0 and below 1."),
        ("optimizer.epsilon=0", "optimizer.epsilon=0.0 must be positive."),
        ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0 must be positive, or None."),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1 must not be negative."),
    ],
    "Lion": [
        ("optimizer=Lion optimizer.b2=2", "optimizer.b2=2.0 must be at least 0 and below 1."),
        ("optimizer=Lion optimizer.epsilon=1e-8", "Lion has no field 'epsilon'; AdamW has it: add optimizer=AdamW."),
    ],
    "Sgd": [
        ("optimizer=Sgd optimizer.momentum=1", "optimizer.momentum=1.0 must be at least 0 and below 1."),
    ],
    "Cosine": [
        ("optimizer.schedule=cosine", "must be one of Constant, Linear, Cosine; did you mean Cosine?"),
        ("optimizer.schedule.peak_lr=fast", "optimizer.schedule.peak_lr=fast must be a number."),
        ("optimizer.schedule.peak_lr=1e999", "optimizer.schedule.peak_lr=inf must be a finite number."),
        ("optimizer.schedule.final_share=-1", "optimizer.schedule.final_share=-1.0 must lie between 0 and 1."),
        ("optimizer.schedule.end.share=0.1", "optimizer.schedule.warmup=Fraction(share=0.1) must end before the decay"),
        (
            "optimizer.schedule.end=Steps optimizer.schedule.end.count=0",
            "optimizer.schedule.end=Steps(count=0) must be positive.",
        ),
    ],
    "Constant": [
        (
            "optimizer.schedule=Constant optimizer.schedule.peak_lr=0",
            "optimizer.schedule.peak_lr=0.0 must be positive, such as 3e-4.",
        ),
    ],
    "Linear": [
        ("optimizer.schedule=Linear optimizer.schedule.final_share=2", "final_share=2.0 must lie between 0 and 1."),
    ],
    "Fraction": [
        (
            "optimizer.schedule.warmup.count=3",
            "Fraction has no field 'count'; Steps, Samples, Tokens have it: add optimizer.schedule.warmup=Steps.",
        ),
        ("optimizer.schedule.warmup.share=2", "optimizer.schedule.warmup.share=2.0 must lie between 0 and 1."),
    ],
    "Steps": [
        (
            "optimizer.schedule.warmup=Steps",
            "optimizer.schedule.warmup=Steps needs optimizer.schedule.warmup.count=... too.",
        ),
        ("optimizer.schedule.warmup=Steps optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "Samples": [
        ("optimizer.schedule.warmup=Samples optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "Tokens": [
        ("optimizer.schedule.warmup=Tokens optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "CrossEntropy": [
        ("loss.chunk_tokens=0", "loss.chunk_tokens=0 must be at least 1."),
        ("loss.z_los=1", "CrossEntropy has no field 'z_los'; did you mean loss.z_loss?"),
    ],
    "Layout": [
        ("layout.zero=4", "layout.zero=4 must be one of 0, 1, 2, 3."),
        ("layout.scatter=compute", "layout.scatter=compute is for layout.zero=3; leave it at float32."),
        ("layout.rows=(1,2)", "layout.rows=(1,2) must be a tuple of Row or None."),
    ],
    "Manual": [
        ("partition=compiled", "partition=compiled must be one of Manual, Compiled; did you mean Compiled?"),
        ("partition.overlap=1", "partition.overlap: Manual has no field 'overlap'; it has none."),
    ],
    "Compiled": [
        ("partition=Compiled partition.overlap=1", "partition.overlap: Compiled has no field 'overlap'; it has none."),
    ],
    "Precision": [
        ("precision.compute=fp16", "precision.compute=fp16 must be one of auto, float32, bfloat16."),
    ],
    "PythonDocs": [
        ("data=Wikipedia", "data=Wikipedia must be a PythonDocs; set its fields: data.isolate_documents, data.valid"),
        ("data.validation_fraction=2", "data.validation_fraction=2.0 must lie strictly between 0 and 1; try 0.05."),
    ],
}

OVERRIDE_MISTAKES = [mistake for group in MISTAKES.values() for mistake in group]

# In the file: ((old text, new text), hint). The last ones are of Layout and Row.
FILE_MISTAKES = [
    (("layers=2", "layers='2'"), "model.layers='2' must be an int."),
    (("layers=2", "layers=True"), "model.layers=True must be an int."),
    (
        ("layers=2", "layer=2"),
        f"small.py:{line_of('model=')}: Transformer has no field 'layer'; did you mean layers? Its fields: voc",
    ),
    (("            layers=2,\n", ""), f"small.py:{line_of('model=')}: Transformer needs 'layers'."),
    (("Gelu(width=128)", "Learned()"), "model.mlp=Learned() must be one of Gelu, SwiGLU."),
    (
        ("width=64", "width=64, remat='Full'"),
        "model.remat='Full' must be one of none, selective, full; did you mean full?",
    ),
    (("steps=3", "steps=3, optimiser=Lion()"), "Config has no field 'optimiser'; did you mean optimizer?"),
    (("AdamW(schedule", "AdamX(schedule"), "NameError: name 'AdamX' is not defined; did you mean AdamW?"),
    (("b2=0.98", "b2=float('nan')"), "optimizer.b2=nan must be a finite number."),
    (("return Config", "Config"), "returned None (is `return` missing?); it must return an mtx.config.Config."),
    (
        ("def get_config() -> Config:", "def config():"),
        "has no get_config(); define `def get_config() -> Config:` in it.",
    ),
    (("import MeshConfig", "import MeshConfig as"), "small.py:8: invalid syntax."),
    (
        ("import MeshConfig", "import MeshConfg"),
        "small.py:8: ImportError: cannot import name 'MeshConfg' from 'mtx.mesh'",
    ),
    (("steps=3", "steps=1 // 0"), f"small.py:{line_of('steps=')}: ZeroDivisionError: "),
    (
        ("steps=3", "steps=3, layout=Layout(rows=(Row(dimension='heads', weights='model'),))"),
        "layout.rows[0].weights='model' must be a tuple of str.",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(rows=(Row(dimension='haeds'),))"),
        "names no dimension 'haeds'; legal: batch, ",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(zero=2, rows=(Row(dimension='heads'), Row(dimension='heads')))"),
        "layout.rows=(Row(dimension=heads), Row(dimension=heads)) has two rows for heads; keep one.\n",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(zero=2, rows=())"),
        "layout.zero=2 has no effect: layout.rows replaces the preset and has no row `zero` over data.",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(sequence_parallel=True, rows=())"),
        "layout.sequence_parallel=true has no effect: layout.rows has no row `residual_time` over model.",
    ),
]


def said(load, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        configs.check(load(*arguments).config, 8)
    return str(caught.value)


@pytest.mark.parametrize(("words", "hint"), OVERRIDE_MISTAKES, ids=[words for words, _ in OVERRIDE_MISTAKES])
def test_override_mistakes_are_refused_with_a_hint(load, words, hint):
    if words == "steps":  # a bare word is the command line's verb; load alone says what an override looks like
        with pytest.raises(ConfigError, match=hint):
            main.take_verb(["steps"])
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


def test_every_config_dataclass_has_a_mistake_in_the_tables():
    rows = {"Row"} if any("Row(" in edit[1] for edit, _ in FILE_MISTAKES) else set()
    assert set(MISTAKES) | rows == set(schema.reachable(Config))
    assert all(MISTAKES.values())
    assert len(OVERRIDE_MISTAKES) + len(FILE_MISTAKES) >= 40


def test_a_mesh_that_leaves_devices_idle_is_a_device_error_unless_the_config_is_wrong_too(load):
    with pytest.raises(DeviceError, match=r"mesh.data=4 uses 4 of 8 devices"):
        configs.check(load("mesh.data=4").config, 8)
    with pytest.raises(ConfigError, match=r"2 problems[^\n]*\nsteps=0 must be at least 1.\nmesh.data=4 uses 4 of 8"):
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
            path, values = option.split("=", 1) if " mesh" not in option else (None, "")
            changes = [option] if path is None else [f"{path}={value}" for value in values.split(" or ")]
            for change in changes:
                paths = {pair.partition("=")[0] for pair in change.split()}
                kept = [word for word in words.split() if word.partition("=")[0] not in paths]
                configs.check(load(" ".join(kept + change.split())).config, 8)
                tried += 1
    assert tried >= 15


# Overrides.


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("steps=1e9", "steps", 10**9),
        ("--steps=7", "steps", 7),
        ("--mesh.data -1", "mesh.data", -1),
        ("mesh.data=-1", "mesh.data", -1),
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
    assert lion == Lion(schedule=schedule, b1=0.95, b2=0.98)
    sgd = load("optimizer=Sgd optimizer.schedule=Linear").config.optimizer
    assert sgd == Sgd(schedule=Linear(peak_lr=3e-3, warmup=Fraction(share=0.1)))
    assert sgd.weight_decay == 0.0  # Sgd's default, not AdamW's
    assert load("partition=Compiled").config.partition == Compiled()
    assert load("model.mlp=SwiGLU model.mlp.width=64").config.model.mlp == SwiGLU(width=64)
    assert load("optimizer=AdamW").config == load().config


def test_a_part_that_may_be_none_is_chosen_and_removed(load):
    rotary = "model.positions=Rotary "
    scaled = load(rotary + "model.positions.scaling=Llama3Scaling model.positions.scaling.factor=32").config
    assert scaled.model.positions == Rotary(scaling=Llama3Scaling(factor=32.0))
    edit = ("Learned(length=256)", "Rotary(scaling=Llama3Scaling())")
    assert load("", edit).config.model.positions.scaling == Llama3Scaling()
    assert load("model.positions.scaling=None", edit).config.model.positions == Rotary()


def test_the_order_of_overrides_does_not_matter(load):
    words = (
        "optimizer.schedule.warmup.count=9 optimizer.b1=0.95 optimizer.schedule.warmup=Tokens optimizer.schedule=Linear"
    )
    words = [*words.split(), "optimizer=Lion"]
    found = {load(" ".join(order)).config for order in (words, words[::-1], words[2:] + words[:2])}
    assert found == {load(" ".join(words)).config}
    optimizer = found.pop().optimizer
    assert optimizer == Lion(schedule=Linear(peak_lr=3e-3, warmup=Tokens(count=9)), b1=0.95, b2=0.98)


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
    assert loaded.origin("optimizer.b2") == f"{here}:{line_of('b2=0.98')}"
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
        if file != "quickstart.py" or devices <= loaded.config.batch.global_size:
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


def test_differences_name_path_and_both_values(load):
    found = configs.differences(load().config, load("optimizer=Sgd steps=9").config)
    assert ("steps", "3", "9") in found
    assert ("optimizer", "AdamW", "Sgd") in found
    assert ("optimizer.b2", "0.98", "(absent)") in found
    assert ("optimizer.momentum", "(absent)", "0.0") in found
    assert not [row for row in found if row[0].startswith(("model", "optimizer.schedule"))]


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
    loaded = load("seed=3")
    text = configs.help_text(loaded)
    for path in flat(configs.dump(loaded.config)):
        assert re.search(rf"^{re.escape(path)}(:|$)", text, re.MULTILINE), path
    assert re.search(r"^seed: int = 3 +command line\n    Of initial weights, ", text, re.MULTILINE)
    assert re.search(
        rf"^optimizer: AdamW \| Lion \| Sgd = AdamW\s+\S*small.py:{line_of('optimizer=')}$", text, re.MULTILINE
    )
    assert "Sgd: Gradient descent with momentum. Fields: schedule=Cosine(), weight_decay=0.0," in text
    assert "model.remat: none | selective | full = none" in text
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


# The command line.


def run_main(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """main.py on a platform that does not exist: whatever touches a device fails loudly."""
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nowhere"} | environment,
    )


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["--config", "configs/quickstart.py", "steps=0"], ["error: steps=0 must be at least 1."]),
        (
            ["--config", "configs/quickstart.py", "optimizer=lion", "--mesh.modle", "2"],
            [
                "error: 2 problems in the configuration:",
                "error: optimizer=lion must be",
                "error: mesh.modle: MeshConfig",
            ],
        ),
        (
            ["trian", "--config", "configs/quickstart.py"],
            ["error: there is no verb 'trian'; did you mean train? Verbs:"],
        ),
        (
            ["configs/quickstart.py"],
            ["error: there is no verb 'configs/quickstart.py'; did you mean --config configs/q"],
        ),
        (["steps=3"], ["error: --config FILE is missing; such as --config configs/quickstart.py."]),
        (["--config"], ["error: argument --config: expected one argument"]),
        (["--config", "configs/quickstart.py", "--devices", "many"], ["error: argument --devices: invalid int value"]),
        (
            ["--config", "configs/quickstart.py", "--processes", "2"],
            ["error: --coordinator, --processes and --process"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_command_line_refuses_in_one_line_before_devices(words, lines):
    done = run_main(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == len(lines)
    for line, start in zip(done.stderr.splitlines(), lines, strict=True):
        assert line.startswith(start)


def test_devices_that_do_not_fit_exit_with_their_own_code():
    done = run_main("--config", "configs/quickstart.py", "--devices", "6", "mesh.data=4")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert done.stderr.startswith("error: mesh.data=4 uses 4 of 6 devices; try mesh.data=6, or ")


def test_help_is_quick_and_imports_no_jax():
    code = "import sys, main; main.main(['main.py', '--help']); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "verbs:\n  train" in done.stdout
    assert "--devices N" in done.stdout


def test_help_with_a_config_lists_fields_without_devices():
    done = run_main("--config", "configs/quickstart.py", "--help", "steps=17")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^steps: int = 17 +command line$", done.stdout, re.MULTILINE)


def test_devices_replaces_an_existing_count(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=4 --xla_b=2")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    main.simulate(8)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", "--xla_force_host_platform_device_count=8"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_the_verb_is_the_first_bare_word():
    words = ["--steps", "3", "train", "seed=1"]
    assert main.take_verb(words) == "train"
    assert words == ["--steps", "3", "seed=1"]
    assert main.take_verb(["--steps", "3"]) == "train"
    assert main.parser().parse_known_args(["--mesh.data", "-1", "-v", "a.b=1"])[1] == ["--mesh.data", "-1", "a.b=1"]


def test_flags_for_near_misses_are_the_parser_s():
    known = {option for action in main.parser()._actions for option in action.option_strings}
    assert {f"--{flag}" for flag in FLAGS} == {option for option in known if option.startswith("--")}


def test_a_cluster_is_whole_or_absent():
    of = configs.Cluster.of
    assert of(None, None, None) is None
    assert of("host:1234", 2, 1) == configs.Cluster(coordinator="host:1234", processes=2, process=1)
    for wrong in (("host:1234", 2, None), ("host", 2, 0), ("host:1234", 2, 2), ("host:1234", 0, 0)):
        with pytest.raises(ConfigError, match="--"):
            of(*wrong)


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 80


def test_types_that_a_file_can_get_wrong():
    assert schema.fits(1, float)
    assert not schema.fits(True, float)
    assert not schema.fits(True, int)
    assert not schema.fits(1.0, int)
    assert not schema.fits(True, schema.fields(Layout)["zero"].annotation)
    assert schema.type_name(schema.fields(AttentionConfig)["kv_heads"].annotation) == "int | None"
    assert schema.expected(schema.fields(Config)["data"].annotation) == f"a {PythonDocs.__name__}"
    assert schema.show(AdamW(b1=0.5)) == "AdamW(b1=0.5)"
    assert schema.show(Gelu(width=3)) == "Gelu(width=3)"
