"""The features of a run, which pairs of them a config may switch on together, and the page that says so.

`python tests/composition.py` writes docs/composition.md anew. A new feature is one more `Feature` here.
"""

import dataclasses
import functools
import itertools
import math
import re
import string
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401 (eight CPU devices, before JAX is imported)
import jax
from test_rules import Adafactor, Muon, ScheduleFree, Sgd8

from data import PythonDocs
from mtx import config as configs
from mtx.attention import AttentionConfig
from mtx.building import build
from mtx.config import BatchConfig, Config
from mtx.config.schema import show
from mtx.errors import ConfigError
from mtx.layers import RMSNorm, Rotary, SwiGLU
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Constant, Group, Lion, Sgd

PAGE = Path(__file__).resolve().parent.parent / "docs" / "composition.md"
DEVICES = 8


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that a config switches on."""

    name: str
    """On the page."""
    group: str
    """Features of one group are alternatives, and no pairs."""
    words: str = ""
    """What switches it on, as on the command line."""
    groups: tuple[Group, ...] | None = None
    """`optimizer.groups`, which a config file sets."""
    changes_nothing: bool = False
    """It says how the result is computed, not what it is: the reference on one device is without it."""
    rounds: bool = False
    """It computes in bfloat16, so that a case that holds it proves little of pairs of others."""


@dataclass(frozen=True, kw_only=True)
class WiderConfig(Config):
    """A config that takes the optimizers of tests/test_rules.py too, as whoever adds one does in config/root.py."""

    optimizer: AdamW | Lion | Sgd | Muon | Adafactor | ScheduleFree | Sgd8  # pyrefly: ignore[bad-override]


BASE = WiderConfig(
    model=Transformer(
        vocab_size=300,
        vocab_multiple=64,
        layers=4,
        width=16,
        attention=AttentionConfig(heads=4),
        mlp=SwiGLU(width=32),
        norm=RMSNorm(),
        positions=Rotary(),
        bias=False,
    ),
    data=PythonDocs(),
    batch=BatchConfig(global_size=16, sequence_length=32),
    optimizer=AdamW(schedule=Constant(peak_lr=1e-2)),
    mesh=MeshConfig(),
    loss=CrossEntropy(),
    steps=10,
)
"""What features are switched on in."""


def _how(group: str, named: dict[str, str]) -> list[Feature]:
    return [Feature(name=name, group=group, words=words, changes_nothing=True) for name, words in named.items()]


def _what(group: str, named: dict[str, str], rounds: bool = False) -> list[Feature]:
    return [Feature(name=name, group=group, words=words, rounds=rounds) for name, words in named.items()]


_PIPELINE = "mesh.pipeline=2 batch.micro_size=2 pipeline="
_PATTERN = "model.attention.pattern.block={} model.attention.pattern="
_PACING = "pacing=FixedLinear {0}.pacing.first={1} {0}.pacing.last={2} {0}.pacing.steps=4"
_PATTERNS = ("Fixed", "Strided", "LocalGlobal", "Longformer", "BigBird")
_BLOCKS = str(((True, False), (False, True))).replace(" ", "")
FEATURES = (
    *_how(
        "data",
        {
            "data": "mesh.data=2",
            **{f"ZeRO {stage}": f"mesh.data=2 layout.zero={stage}" for stage in (1, 2, 3)},
            "ZeRO 3 scatter": "mesh.data=2 layout.zero=3 layout.scatter=compute",
        },
    ),
    *_how("replica", {"replica": "mesh.replica=2"}),
    *_how("tensor", {"tensor": "mesh.model=2", "sequence": "mesh.model=2 layout.sequence_parallel=true"}),
    *_how(
        "microbatches",
        {
            "accumulation": "batch.micro_size=2",
            **{name: f"{_PIPELINE}{name}" for name in ("GPipe", "OneFOneB", "Interleaved", "ZeroBubble")},
        },
    ),
    *_how("vocabulary", {"whole vocabulary": "layout.vocabulary=replicated"}),
    *_how("partition", {name: f"partition={name}" for name in ("Manual", "Compiled")}),
    *_how("remat", {f"remat {name}": f"model.remat={name}" for name in ("selective", "full", "stage")}),
    *_how("unroll", {"unroll": "model.unroll=2"}),
    *_how("chunks", {"loss in chunks": "loss.chunk_tokens=64"}),
    *_how("backend", {"chunked attention": "model.attention.backend=chunked"}),
    *_what(
        "objective",
        {
            "CausalLm": "objective=CausalLm",
            "PrefixLm": "objective=PrefixLm",
            "FillInTheMiddle": "objective=FillInTheMiddle",
            "MaskedLm": "objective=MaskedLm model.causal=false",
            "SentencePairs": "objective=SentencePairs model.causal=false model.pairs=true",
            "SpanCorruption": "objective=SpanCorruption",
            "Completion": "objective=Completion objective.prefix=true",
        },
    ),
    *_what("packing", {"BestFit": "packing=BestFit", "documents joined": "packing.isolate_documents=false"}),
    *_what("curriculum", {"Curriculum": f"curriculum=Curriculum curriculum.{_PACING.format('curriculum', 50, 100)}"}),
    *_what(
        "length_warmup",
        {
            "LengthWarmup": "length_warmup=LengthWarmup length_warmup.lengths=(16,32) length_warmup."
            + _PACING.format("length_warmup", 16, 32)
        },
    ),
    *_what("layers", {"uneven layers": "model.layers=6"}),
    *_what("window", {"window": "model.attention.window=7"}),
    *_what(
        "pattern",
        {
            **{name: f"{_PATTERN.format(4)}{name}" for name in _PATTERNS},
            "Chosen": f"{_PATTERN.format(16)}Chosen model.attention.pattern.rows={_BLOCKS}",
        },
    ),
    *_what("softcap", {"softcap": "model.attention.softcap=2.0"}),
    *_what("sinks", {"sinks": "model.attention.sinks=true"}),
    *_what("kv_heads", {"kv_heads": "model.attention.kv_heads=2"}),
    *_what("positions", {"Learned": "model.positions=Learned model.positions.length=32"}),
    *_what("norm", {"LayerNorm": "model.norm=LayerNorm"}),
    *_what("mlp", {"Gelu": "model.mlp=Gelu model.mlp.width=32"}),
    *_what("bias", {"bias": "model.bias=true"}),
    *_what("head", {"head of its own": "model.tied_head=false"}),
    *_what("dropout", {"dropout": "model.dropout=0.2"}),
    *_what("attention_dropout", {"attention dropout": "model.attention_dropout=0.2"}),
    *_what("z_loss", {"z-loss": "loss.z_loss=1e-3"}),
    *_what("compute", {"compute bfloat16": "precision.compute=bfloat16"}, rounds=True),
    *_what("params", {"params bfloat16": "precision.params=bfloat16"}, rounds=True),
    *_what(
        "optimizer",
        {
            "AdamW": "optimizer=AdamW",
            "Lion": "optimizer=Lion",
            "Sgd": "optimizer=Sgd optimizer.momentum=0.9",
            "Muon": "optimizer=Muon",
            "Adafactor": "optimizer=Adafactor",
            "ScheduleFree": "optimizer=ScheduleFree",
            "Sgd8": "optimizer=Sgd8",
        },
    ),
    Feature(
        name="groups",
        group="groups",
        groups=(Group(roles=("embedding",), frozen=True), Group(names="stacks/main/block/mlp/*", rate=0.5), Group()),
    ),
    *_what("ema", {"Ema": "ema=Ema"}),
)
NAMED = {feature.name: feature for feature in FEATURES}
SEVERAL = "optimizer"
"""The group of which a case may hold several: they share its gradients."""
MOST = 3
"""Optimizers of a case."""
STATE = {"optimizer", "groups", "ema", "compute", "params"}
"""Groups whose pairs are built too: what the parts of the state refuse of one another, the program says."""
SPLITS = {"data", "replica", "tensor", "microbatches"}
"""Groups that split work over devices."""
Case = tuple[Feature, ...]


def config_of(features: Iterable[Feature]) -> Config:
    """The config with these features switched on."""
    features = list(features)
    config = configs.override(BASE, [word for feature in features for word in feature.words.split()])
    for groups in [feature.groups for feature in features if feature.groups is not None]:
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))
    return config


def devices_of(config: Config) -> int:
    """Devices of its mesh."""
    return math.prod(dataclasses.asdict(config.mesh).values())


def refusal(features: Sequence[Feature]) -> str | None:
    """The sentence that a user gets who switches these on, or None if a config may."""
    config = config_of(features)
    try:
        configs.check(config, devices_of(config))
        if all(feature.group in STATE for feature in features):
            build(config, jax.devices()[: devices_of(config)])
    except ConfigError as error:
        return " ".join(str(error).split())
    return None


@functools.cache
def refusals() -> dict[frozenset[Feature], str | None]:
    """Of every pair, its sentence if it is refused."""
    pairs = itertools.combinations(FEATURES, 2)
    return {frozenset(pair): refusal(pair) for pair in pairs if pair[0].group != pair[1].group}


@functools.cache
def cases() -> list[Case]:
    """A greedy cover of the legal pairs: each is among those that some case is the proof of."""
    legal = {pair for pair, said in refusals().items() if said is None}
    missing = dict.fromkeys(pair for pair in refusals() if pair in legal)  # in order
    found = []
    while missing:
        chosen = list(next(iter(missing)))
        tried = set(chosen)
        while (best := _best(chosen, tried, legal, missing)) is not None:
            tried.add(best)
            if _fits((*chosen, best)):
                chosen.append(best)
        found.append(tuple(sorted(_filled(chosen, len(found)), key=FEATURES.index)))
        for pair in proven(found[-1]):
            missing.pop(pair, None)
    return found


def _fits(case: Case) -> bool:
    """Whether all of its features together are legal on the devices that there are."""
    each = optimizers(case)
    return devices_of(config_of(each[0])) <= DEVICES and not any(map(refusal, each))


def _filled(chosen: Sequence[Feature], turn: int) -> list[Feature]:
    """The case with features that split work over the devices that it leaves idle, each case beginning with others."""
    splits, chosen = [feature for feature in FEATURES if feature.group in SPLITS], list(chosen)
    for i in range(len(splits)):
        feature = splits[(turn + i) % len(splits)]
        if all(feature.group != other.group for other in chosen) and _fits((*chosen, feature)):
            chosen.append(feature)
    return chosen


def _best(chosen: list[Feature], tried: set[Feature], legal: set, missing: dict) -> Feature | None:
    """The feature that goes with those chosen and adds most missing pairs."""

    def gain(feature: Feature) -> int:
        same = [other for other in chosen if other.group == feature.group]
        if len(same) >= (MOST if feature.group == SEVERAL else 1):
            return 0
        if any(other not in same and frozenset((feature, other)) not in legal for other in chosen):
            return 0
        before, after = (sum(pair in missing for pair in proven(case)) for case in (chosen, [*chosen, feature]))
        return after - before

    best = max((feature for feature in FEATURES if feature not in tried), key=gain, default=None)
    return best if best is not None and gain(best) > 0 else None


def proven(case: Iterable[Feature]) -> set[frozenset[Feature]]:
    """The pairs that a case is the proof of."""
    case = list(case)
    rounds = any(feature.rounds for feature in case)
    pairs = [(a, b) for a, b in itertools.combinations(case, 2) if a.group != b.group]
    return {frozenset((a, b)) for a, b in pairs if a.rounds or b.rounds or not rounds}


def optimizers(case: Case) -> list[Case]:
    """A case for each optimizer of this one, or itself if it has none."""
    found = [feature for feature in case if feature.group == SEVERAL]
    rest = [feature for feature in case if feature.group != SEVERAL]
    return [(*rest, optimizer) for optimizer in found] or [case]


# The page.

INTRODUCTION = """\
# What goes together

`tests/test_composition.py` holds this page to what the code does; `python tests/composition.py` writes it anew.

Two features that a config may both switch on are **equal**: on eight simulated devices, the loss and the
gradient of every weight are those of one device in float32 (the loss to 1e-5, each tensor to
||dg|| <= 1e-5 max(||g||, 1e-4 ||all g||)), and three updates from given gradients leave every weight, and every weight
that evaluation reads, within 3e-6 of its norm (3e-4 if it is stored in bfloat16). The reference has the same model,
rows, objective and optimizer, and none of the features marked `*`, which only say how a step is computed. Or two
features are **refused**: the run ends before its first step, with a sentence that says what to type. A pair that is
neither fails the test.

The cases below are the proof: each switches many features on, and every pair is in at least one of them. Features of
one group (two objectives, two pipeline schedules) are alternatives, and no pairs; optimizers share a case's gradients.
A case in bfloat16 shows that the mesh rounds no worse than one device does: the loss is float32's to {loss:g}, and the
error of no gradient, as a share of its norm, is more than {rounding:g} times the largest of one device in bfloat16.
Such a case proves only pairs with bfloat16.

`python -m pytest tests/test_composition.py -m "slow or not slow"` runs all cases. The default tests run {default} of
them, and see that each pair is refused or in a case.

Text becomes rows before a mesh sees it: where it comes from (files, tensorflow-datasets, seqio, shards, a blend) is no
feature here, and `tests/test_live.py` has what a live reader of seqio refuses. Muon, Adafactor, ScheduleFree and Sgd8
(momentum in eight bits) are optimizers of `tests/test_rules.py`, each a kind of rule that one may write:
[optimizers.md](optimizers.md). Every factorization of eight devices into replica, data and model is in
`tests/test_equality.py`; `python -m benchmarks.gpu_day` compares the kernels of accelerators with plain attention.

## Pairs

A letter or digit names the case that proves a pair equal, `!` marks a refused one, `.` alternatives.
"""
IDS = string.digits[1:] + string.ascii_lowercase + string.ascii_uppercase
DEFAULT = ("1", "a")
"""Cases that the default tests run."""
ROUNDING = 1.5
"""How much farther from float32 a gradient of a mesh in bfloat16 may be than the farthest of one device."""
ROUNDED_LOSS = 1e-3
"""How far from float32 the loss may be in bfloat16, relative."""


def page() -> str:
    """docs/composition.md."""
    lines = [INTRODUCTION.format(rounding=ROUNDING, loss=ROUNDED_LOSS, default=len(DEFAULT)), "```"]
    width = max(len(_marked(feature)) for feature in FEATURES)
    for digit in range(2):
        numbers = (f"{i:02}"[digit] for i in range(1, len(FEATURES) + 1))
        lines.append(" " * (width + 5) + _spaced(numbers).rstrip())
    first = {pair: IDS[i] for i, case in reversed(list(enumerate(cases()))) for pair in proven(case)}
    for i, row in enumerate(FEATURES):
        marks = (
            "." if row.group == other.group else first.get(frozenset((row, other)), "!") for other in FEATURES[: i + 1]
        )
        lines.append(f"{i + 1:2}  {_marked(row):{width}} {_spaced(marks)}".rstrip())
    lines += ["```", "", "## Refused", ""]
    for pair, said in refusals().items():
        if said is not None:
            a, b = sorted(pair, key=FEATURES.index)
            lines.append(_item(f"{a.name}, {b.name}: {said}"))
    lines += ["", "## Features", "", "Of a group in one line, with what switches them on.", ""]
    for _, group in itertools.groupby(FEATURES, lambda feature: feature.group):
        lines.append(
            _item("; ".join(f"{_marked(f)} `{f.words or f'optimizer.groups={show(f.groups, 200)}'}`" for f in group))
        )
    lines += ["", "## Cases", ""]
    for name, case in zip(IDS, cases(), strict=False):
        lines.append(_item(f"`{name}` {', '.join(feature.name for feature in case)}"))
    return "\n".join(lines) + "\n"


def _item(text: str) -> str:
    """A line of a list, wrapped."""
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _marked(feature: Feature) -> str:
    return feature.name + "*" * feature.changes_nothing


def _spaced(marks: Iterable[str]) -> str:
    """Characters in groups of ten."""
    return "".join(mark + " " * (i % 10 == 9) for i, mark in enumerate(marks))


def cases_of_page() -> dict[str, Case]:
    """The cases that the page names, by their letters: what the tests run, without looking for a cover first."""
    items = re.findall(r"^- `(\w)` (.*(?:\n  .*)*)", PAGE.read_text("utf-8"), re.M)
    return {name: tuple(NAMED[feature] for feature in " ".join(said.split()).split(", ")) for name, said in items}


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
