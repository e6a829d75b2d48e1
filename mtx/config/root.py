"""The root config of a run, and what is derived from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data import PythonDocs
from mtx.errors import Problem
from mtx.layout import BoundLayout, Layout
from mtx.losses import CrossEntropy
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import AdamW, Lion, Sgd
from mtx.spmd import Compiled, Manual, Precision


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
    data: PythonDocs
    """Where tokens come from."""
    batch: BatchConfig
    """How many tokens a step sees."""
    optimizer: AdamW | Lion | Sgd
    """How gradients move weights."""
    steps: int
    """Optimizer steps of the whole run."""
    loss: CrossEntropy = CrossEntropy()
    """What is minimised."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    layout: Layout = Layout()
    """How weights and activations are split over the mesh."""
    partition: Manual | Compiled = Manual()
    """Who writes the collectives."""
    precision: Precision = Precision()
    """Number formats of weights and of computing."""
    seed: int = 0
    """Of initial weights, dropout and the order of the data."""
    log_every: int = 10
    """Steps between log lines."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 0
    """Steps between checkpoints (not built yet: 0)."""
    sample_tokens: int = 256
    """Length of the text sample at the end, at most batch.sequence_length; 0: none."""
    workdir: str | None = None
    """The run folder; None: runs/ and the name of the config file."""

    def check(self) -> Iterator[Problem]:
        for field in ("steps", "log_every"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if self.eval_every < 0:
            yield "eval_every", "must be at least 0; 0 evaluates only at the end"
        if self.sample_tokens < 0:
            yield "sample_tokens", "must be at least 0; 0 shows no sample"
        if not 0 <= self.seed < 2**32:
            yield "seed", "must be at least 0 and below 2**32"
        if self.save_every != 0:
            yield "save_every", "asks for checkpoints, which are not built yet; set save_every=0"
        if self.workdir == "":
            yield "workdir", "is empty; name a folder, or None for runs/ and the name of the config file"


def microbatches(config: Config, mesh_sizes: Mapping[str, int]) -> int:
    """M, the gradient accumulation count of a checked config on a mesh."""
    if config.batch.micro_size is None:
        return 1
    layout = BoundLayout.of(config.layout, mesh_sizes)
    rows = config.batch.micro_size * layout.size(*layout.batch_axes)
    assert config.batch.global_size % rows == 0, "check() comes first"
    return config.batch.global_size // rows
