"""The root config of a run, and what is derived from it."""

import bisect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from data import (
    AnyObjective,
    BestFit,
    Blend,
    CausalLm,
    Completion,
    Concatenate,
    Curriculum,
    LengthWarmup,
    MegatronShards,
    PythonDocs,
    SeqioTask,
    TextFiles,
    TfdsText,
)
from mtx.checkpoint import Checkpoints
from mtx.errors import Problem
from mtx.layout import BoundLayout, Layout
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.metrics import Reporting
from mtx.model import Transformer
from mtx.optim import AdamW, Lion, Sgd
from mtx.pipeline import AnySchedule, OneFOneB
from mtx.spmd import Compiled, Manual, Precision
from mtx.state import Ema
from pallas_kernels.masks import Mask


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The global batch and how it is cut."""

    global_size: int
    """Sequences per optimizer step, over all devices."""
    micro_size: int | None = None
    """Sequences per batch shard per microbatch; the accumulation count follows. None: no accumulation."""
    sequence_length: int
    """Tokens per sequence."""

    def check(self) -> Iterator[Problem]:
        if self.global_size < 1:
            yield "global_size", "must be at least 1"
        if self.micro_size is not None and self.micro_size < 1:
            yield "micro_size", "must be at least 1, or None for no accumulation"
        if self.sequence_length < 1:
            yield "sequence_length", "must be at least 1"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    model: Transformer
    """The network."""
    data: PythonDocs | TextFiles | TfdsText | SeqioTask | MegatronShards | Blend
    """Where tokens come from."""
    batch: BatchConfig
    """How many tokens a step sees."""
    optimizer: AdamW | Lion | Sgd
    """How gradients move weights."""
    ema: Ema | None = None
    """Average of the weights, for evaluation, generation and export; None: none is kept."""
    steps: int | None = None
    """Optimizer steps of the whole run; one of steps, tokens and epochs says how long it is."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps."""
    epochs: float | None = None
    """Passes over the training data, rounded up to whole steps."""
    objective: AnyObjective = CausalLm()
    """What is learned of the tokens."""
    packing: Concatenate | BestFit = Concatenate()
    """How documents share rows."""
    curriculum: Curriculum | None = None
    """Which samples come first; None: all, shuffled."""
    length_warmup: LengthWarmup | None = None
    """Shorter rows first; None: all rows are batch.sequence_length long."""
    loss: CrossEntropy = CrossEntropy()
    """What is minimised."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    layout: Layout = Layout()
    """How weights and activations are split over the mesh."""
    pipeline: AnySchedule = OneFOneB()
    """In which order microbatches go through the stages, where mesh.pipeline is above 1."""
    partition: Manual | Compiled = Manual()
    """Who writes the collectives."""
    precision: Precision = Precision()
    """Number formats of weights and of computing."""
    seed: int = 0
    """Of initial weights, dropout and the order of the data."""
    init_from: str | None = None
    """A run folder, or one checkpoint in it, whose weights a new run starts from; nothing else is taken."""
    checkpoints: Checkpoints | None = Checkpoints()
    """When to save and what to keep; None: save nothing."""
    reporting: Reporting = Reporting()
    """Where metrics go besides the console and metrics.jsonl."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    eval_sequences: int = 0
    """Sequences of the validation split to evaluate, spread over it; 0: all."""
    sample_tokens: int = 256
    """Length of the text sample after each evaluation; 0: none."""
    max_skipped_steps: int = 20
    """Steps that may be skipped because their gradients are not finite; one more stops the run."""
    stop_after_minutes: float = 0.0
    """Save and stop after this long, as for a queue that ends jobs; the same command goes on. 0: no limit."""
    workdir: str | None = None
    """The run folder; None: runs/ and the name of the config file."""

    def check(self) -> Iterator[Problem]:
        lengths = {name: value for name in LENGTHS if (value := getattr(self, name)) is not None}
        if not lengths:
            yield "steps", "leaves the run without a length; set one of steps, tokens and epochs, such as steps=1000"
        for name, value in lengths.items():
            if value <= 0:
                yield name, "must be positive"
        if len(lengths) > 1:
            first, *others = lengths
            said = " and ".join(f"{name}={lengths[name]}" for name in others)
            keep = [" ".join(f"{name}=None" for name in lengths if name != kept) for kept in reversed(lengths)]
            each = "both" if len(lengths) == 2 else "all"
            yield first, f"and {said} {each} say how long the run is; try {', or '.join(keep)}"
        if self.log_every < 1:
            yield "log_every", "must be at least 1"
        for field, zero in (
            ("eval_every", "evaluates only at the end"),
            ("eval_sequences", "evaluates all of the validation split"),
            ("sample_tokens", "shows no sample"),
            ("stop_after_minutes", "sets no limit"),
            ("max_skipped_steps", "stops at the first"),
        ):
            if getattr(self, field) < 0:
                yield field, f"must be at least 0; 0 {zero}"
        if not 0 <= self.seed < 2**32:
            yield "seed", "must be at least 0 and below 2**32"
        for field in ("workdir", "init_from"):
            value = getattr(self, field)
            if value == "":
                yield field, "is empty; name a folder, or None"
            elif value is not None and re.match(r"[\w+.-]+://", value):
                why = "is not on a file system: a checkpoint is sealed by a rename that object stores do not have. "
                why += "Mount the bucket with something that can rename (such as gcsfuse) and name the mounted folder"
                yield field, why


LENGTHS = ("steps", "tokens", "epochs")


def masks_of(config: Config) -> tuple[Mask, ...]:
    """What a token sees in the layers of each of the model's kinds."""
    attention = config.objective.attention
    # Padding, which has a segment of its own, is hidden from what sees both ways; several prompts share a row.
    apart = config.packing.isolate_documents or attention == "both" or isinstance(config.objective, Completion)
    return tuple(kind.mask(apart, attention == "prefix") for kind in config.model.kinds)


def total_steps(
    config: Config,
    samples_per_epoch: Callable[[], int],
    done_steps: int = 0,
    done_samples: int = 0,
    done_tokens: int = 0,
) -> int:
    """Optimizer steps of a checked config, of which some are done, maybe with another batch size.

    `samples_per_epoch` is asked only for a length in epochs.
    """
    if config.steps is not None:
        return config.steps
    if config.tokens is not None and (warmup := config.length_warmup) is not None:
        size, rest = config.batch.global_size, config.tokens - done_tokens
        before = warmup.tokens(done_steps, size)[0]
        more = range(max(rest, 0) + 1)
        return done_steps + bisect.bisect_left(
            more, rest, key=lambda steps: warmup.tokens(done_steps + steps, size)[0] - before
        )
    if config.tokens is not None:
        samples = Fraction(config.tokens, config.batch.sequence_length)
    else:
        assert config.epochs is not None, "check() comes first"
        samples = Fraction(str(config.epochs)) * samples_per_epoch()  # in floats 1.1 * 800 > 880
    return done_steps + math.ceil(max(samples - done_samples, 0) / config.batch.global_size)


def microbatches(config: Config, mesh_sizes: Mapping[str, int]) -> int:
    """M, the gradient accumulation count of a checked config on a mesh."""
    if config.batch.micro_size is None:
        return 1
    layout = BoundLayout.of(config.layout, mesh_sizes)
    rows = config.batch.micro_size * layout.size(*layout.batch_axes)
    assert config.batch.global_size % rows == 0, "check() comes first"
    return config.batch.global_size // rows
