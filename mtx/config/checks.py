"""Every check of a config that needs no device: types, each dataclass's own, and across dataclasses."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

from data import BestFit, CausalLm, FillInTheMiddle, MaskedLm, SentencePairs, WindowObjective, lacking
from mtx import attention
from mtx.config import schema
from mtx.config.overrides import raise_all, sentence
from mtx.config.root import Config, masks_of
from mtx.config.schema import is_config, join, show
from mtx.errors import Checked, ConfigError, DeviceError
from mtx.layers import Learned
from mtx.layout import LAYER, RESIDUAL_TIME, STAGES, BoundLayout
from mtx.mesh import MeshConfig, batch_shards
from mtx.mesh import sizes as mesh_sizes
from mtx.model import Kind, Model, flatten
from mtx.optim import grouped
from mtx.spmd import Compiled
from pallas_kernels.attention import Chip

Said = tuple[str, str]  # (dotted path, the whole sentence)


def check(config: Config, num_devices: int | None = None) -> None:
    """Refuse a config that cannot run. What needs the mesh is checked as far as its sizes are known.

    Raises: ConfigError naming every problem, one a line; DeviceError if all that is wrong is that the
    mesh does not use exactly `num_devices`.
    """
    if num_devices is not None and num_devices < 1:
        raise ConfigError(f"--devices {num_devices} must be at least 1.")
    said = list(_types(config, Config, ""))
    said += _own(config, "", [path for path, _ in said])
    wrong, problems = {path.partition(".")[0] for path, _ in said}, [text for _, text in said]
    sizes = dataclasses.asdict(config.mesh) if "mesh" not in wrong else {}
    idle = None
    if num_devices is not None and sizes:
        try:
            sizes = mesh_sizes(config.mesh, num_devices, lambda tried: not _of_mesh(config, tried, num_devices, wrong))
        except DeviceError as error:
            idle, sizes = error, {}
    for needs, question in _QUESTIONS:
        if not wrong & set(needs) and (sizes or "mesh" not in needs):
            problems += question(_Case(config, sizes, num_devices))
    if idle is not None and not problems:
        raise idle
    raise_all(problems + ([str(idle)] if idle else []))


def _of_mesh(config: Config, sizes: dict[str, int], num_devices: int, wrong: set[str]) -> list[str]:
    """What would be wrong on a mesh of these sizes."""
    questions = [question for needs, question in _QUESTIONS if "mesh" in needs and not wrong & set(needs)]
    config = dataclasses.replace(config, mesh=MeshConfig(**sizes))
    return [text for question in questions for text in question(_Case(config, sizes, num_devices))]


def _types(value: Any, annotation: Any, path: str) -> Iterator[Said]:
    """Values that do not fit their annotation, at any depth."""
    if not schema.fits(value, annotation):
        legal = [*schema.classes(annotation), *_choices(annotation)]
        hint = schema.did_you_mean(value, legal) if isinstance(value, str) else ""
        yield path, sentence(f"{path}={_typed(value)} must be {schema.expected(annotation)}{hint}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{path}={value} must be a finite number."
    elif isinstance(value, tuple):
        member = next(member for member in schema.alternatives(annotation) if schema.fits(value, member))
        for i, item in enumerate(value):
            yield from _types(item, get_args(member)[0], f"{path}[{i}]")
    elif is_config(value):
        for name, field in schema.fields(type(value)).items():
            yield from _types(getattr(value, name), field.annotation, join(path, name))


def _own(value: Any, path: str, mistyped: list[str]) -> list[Said]:
    """What each dataclass says about itself, where it and all below it have the right types. What it
    says about a part is left out if the part has a problem already."""
    found: list[Said] = []
    for name, inner in schema.values(value).items():
        if is_config(inner):
            found += _own(inner, join(path, name), mistyped)
        elif isinstance(inner, tuple):
            for i, item in enumerate(inner):
                found += _own(item, f"{join(path, name)}[{i}]", mistyped) if is_config(item) else []
    if isinstance(value, Checked) and not any(wrong.startswith(path) for wrong in mistyped):
        for name, why in value.check():
            here = join(path, name)
            if not any(below.startswith((f"{here}.", f"{here}[")) for below, _ in found):
                found.append((here, sentence(f"{here}={show(_at(value, name))} {why}")))
    return found


def _choices(annotation: Any) -> list[str]:
    members = schema.alternatives(annotation)
    return [str(c) for m in members if get_origin(m) is Literal for c in get_args(m)]


def _typed(value: Any) -> str:
    """A value of a wrong type, so that one sees what is wrong: 'auto' is not auto."""
    return show(value) if is_config(value) else show(repr(value))


def _at(value: Any, dotted: str) -> Any:
    for name in dotted.replace("]", "").replace("[", ".").split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


@dataclasses.dataclass(frozen=True)
class _Case:
    """A config whose parts are right by themselves. A mesh size that is not known is -1."""

    config: Config
    sizes: dict[str, int]
    num_devices: int | None

    @property
    def layout(self) -> BoundLayout:
        """On the mesh, with 1 for a size that is not known."""
        return BoundLayout.of(self.config.layout, {axis: max(size, 1) for axis, size in self.sizes.items()})

    def mesh(self, axis: str, size: int) -> str | None:
        """Overrides that give `data` or `model` this smaller size; None if what grows instead does not fit."""
        text, other = f"mesh.{axis}={size}", "model" if axis == "data" else "data"
        wild = [name for name, wanted in dataclasses.asdict(self.config.mesh).items() if wanted == -1]
        if axis == "data" and wild and wild[0] in ("replica", "expert"):
            return None
        if self.num_devices is None:
            return text
        factor = self.sizes[axis] // size
        if axis == "data" and any(n % (self.sizes["model"] * factor) for _, n, _ in _split_sizes(self.config)):
            return None
        if axis == "model" and self.config.batch.global_size % (batch_shards(self.sizes) * factor):
            return None
        return text if wild and wild != [axis] else f"{text} mesh.{other}={self.sizes[other] * factor}"

    def fewer_stages(self, most: int) -> str | None:
        """Overrides for as many stages as can be, `most` at the most; None if what grows instead does not fit."""
        stages = self.sizes["pipeline"]
        fewer = max((n for n in _divisors(stages) if n <= most), default=1)
        text, factor = f"mesh.pipeline={fewer}", stages // fewer
        if self.num_devices is None or fewer == 1:
            return text if fewer > 1 else None
        wild = [name for name, wanted in dataclasses.asdict(self.config.mesh).items() if wanted == -1]
        grows = wild[0] if wild and wild != ["pipeline"] else "data"
        if grows not in ("data", "replica") or self.config.batch.global_size % (batch_shards(self.sizes) * factor):
            return None
        return text if wild == [grows] else f"{text} mesh.data={self.sizes['data'] * factor}"


def _batch(case: _Case) -> Iterator[str]:
    batch, layout = case.config.batch, case.layout
    axes = next((row.activations for row in case.config.layout.table() if row.dimension == "batch"), ())
    shards, mesh = layout.size(*layout.batch_axes), f"mesh.{'*'.join(axes)}"
    if batch.global_size % shards:
        hints = [f"batch.global_size={_either(_around(batch.global_size, shards))}"]
        data = layout.size("data")
        fitting = [d for d in _divisors(data)[:-1] if batch.global_size % (shards // data * d) == 0]
        if "data" in layout.batch_axes and fitting and (change := case.mesh("data", fitting[-1])):
            hints.append(change)
        yield (
            f"batch.global_size={batch.global_size} does not divide over {shards} data shards ({mesh}); "
            f"try {', or '.join(hints)}."
        )
    elif batch.micro_size is not None and -1 not in case.sizes.values():
        each = batch.global_size // shards
        if each % batch.micro_size:
            legal = ", ".join(str(size) for size in _divisors(each))
            yield (
                f"batch.micro_size={batch.micro_size} does not divide the {each} sequences of a data shard "
                f"(batch.global_size={batch.global_size} over {mesh}={shards}); legal: {legal}."
            )


def _groups(case: _Case) -> Iterator[str]:
    """Groups that match no weight, and weights that no group matches."""
    if (groups := case.config.optimizer.groups) is None:
        return
    try:
        grouped(groups, flatten(Model(case.config.model).weights))
    except ConfigError as error:
        yield str(error)


def _time(case: _Case) -> Iterator[str]:
    length, layout = case.config.batch.sequence_length, case.layout
    axes = layout.axes(RESIDUAL_TIME, "activations")
    parts, preset = layout.size(*axes), case.config.layout.rows is None
    field = "layout.sequence_parallel" if preset else "row `residual_time` of layout.rows"
    over = f"mesh.{'*'.join(axes)}={parts} ({field})"
    warmup = case.config.length_warmup
    if warmup is not None and (wrong := [n for n in warmup.lengths[:-1] if n % parts]):
        yield (
            f"length_warmup.lengths={schema.show(warmup.lengths)} holds {wrong[0]}, which does not divide over "
            f"{over}; try multiples of {parts}."
        )
    if length % parts:
        yield (
            f"batch.sequence_length={length} does not divide over {over}; try batch.sequence_length="
            f"{_either(_around(length, parts))}{', or layout.sequence_parallel=false' if preset else ''}."
        )


def _pipeline(case: _Case) -> Iterator[str]:
    """What a pipeline needs of the rest of the config."""
    config, stages = case.config, case.sizes["pipeline"]
    if stages < 2:
        return
    chunks, layers = config.pipeline.per_stage(), config.model.layers
    said = f"mesh.pipeline={stages}" + (f" x pipeline.chunks={chunks}" if chunks > 1 else "")
    if isinstance(config.partition, Compiled):
        yield f"mesh.pipeline={stages} needs partition=Manual: in Compiled no stage can do work of its own."
    if not any(row.dimension == LAYER for row in config.layout.table()):
        yield f"mesh.pipeline={stages} needs a row in layout.rows that splits layer over pipeline, as megatron() has."
    if len(kinds := config.model.kinds) > 1:
        yield (
            f"mesh.pipeline={stages} places layers of one kind, and model.stacks has {len(kinds)} "
            f"({', '.join(kind.name for kind in kinds)}); try mesh.pipeline=1."
        )
    if stages * chunks > layers:
        tries = [change] if (change := case.fewer_stages(layers // chunks)) else []
        tries += [f"pipeline.chunks={layers // stages}"] if layers // stages > 1 else []
        tries += ["pipeline=OneFOneB"] if chunks > 1 and layers // stages == 1 else []
        yield (
            f"model.layers={layers} are fewer than the {stages * chunks} virtual stages of {said}, each of which needs "
            f"one; try {', or '.join([*tries, f'model.layers={stages * chunks}'])}."
        )
    yield from _microbatch_count(case, stages)


def _microbatch_count(case: _Case, stages: int) -> Iterator[str]:
    """A count of microbatches that the schedule cannot take."""
    config, shards = case.config, case.layout.size(*case.layout.batch_axes)
    each, rest = divmod(config.batch.global_size, shards)
    micro = config.batch.micro_size or each
    if -1 in case.sizes.values() or rest or each % micro:
        return
    count = each // micro
    if not config.pipeline.fits(stages, count):
        tries = [n * micro * shards for n in config.pipeline.nearest(count, stages)]
        yield (
            f"pipeline={type(config.pipeline).__name__} cannot take the {count} microbatches of a step over "
            f"mesh.pipeline={stages} (batch.global_size={config.batch.global_size} by {micro} on each of {shards} data "
            f"shards); try batch.global_size={_either(tries)}, or another batch.micro_size."
        )


def _positions(case: _Case) -> Iterator[str]:
    length, positions = case.config.batch.sequence_length, case.config.model.positions
    if isinstance(positions, Learned) and length > positions.length:
        yield (
            f"batch.sequence_length={length} is longer than the table of positions; try batch.sequence_length="
            f"{positions.length}, or model.positions.length={length}, or model.positions=Rotary."
        )


def _pattern(case: _Case) -> Iterator[str]:
    length = case.config.batch.sequence_length
    for path, kind in _attentions(case.config).items():
        pattern = kind.config.attention.pattern
        if pattern is not None and length > (reach := pattern.reach()):
            yield (
                f"batch.sequence_length={length} is longer than the {reach} positions of {path}.pattern.rows; try "
                f"batch.sequence_length={reach}, or {path}.pattern.block={-(-length * pattern.block // reach)}, or "
                "more rows."
            )


def _vocabulary(case: _Case) -> Iterator[str]:
    config = case.config
    found, data = config.model.vocab_size, type(config.data).__name__
    try:
        more = lacking(config.data.tokenizer, config.objective, config.batch.sequence_length)
    except ValueError:
        return  # of the length: said by `_rows`
    if found < (needed := config.data.vocab_size + more):
        special = f" and {more} special ones of objective={type(config.objective).__name__}" if more else ""
        yield (
            f"model.vocab_size={found} is smaller than the {needed - more} tokens of data={data}{special}; "
            f"try model.vocab_size={needed}."
        )


def _attention(case: _Case) -> Iterator[str]:
    objective, causal = case.config.objective, case.config.model.causal
    name = type(objective).__name__
    if objective.attention == "both" and causal:
        yield f"objective={name} is for models that see both ways, and model.causal=true; try model.causal=false."
    elif objective.attention != "both" and not causal:
        yield (
            f"objective={name} is for causal models, and model.causal=false sees what is to be guessed; try "
            "model.causal=true, or a masked objective."
        )


def _pairs(case: _Case) -> Iterator[str]:
    objective, pairs = case.config.objective, case.config.model.pairs
    if isinstance(objective, SentencePairs) and not pairs:
        yield "objective=SentencePairs needs a head for pairs, and model.pairs=false; try model.pairs=true."
    if pairs and not isinstance(objective, SentencePairs):
        name = type(objective).__name__
        yield f"model.pairs=true reads pairs, and objective={name} makes none; try model.pairs=false."


def _rows(case: _Case) -> Iterator[str]:
    config = case.config
    name, length = type(config.objective).__name__, config.batch.sequence_length
    if isinstance(config.packing, BestFit) and not isinstance(config.objective, CausalLm):
        yield f"packing=BestFit goes with objective=CausalLm, not {name}; try packing=Concatenate."
    try:
        config.objective.sentinels(length)
        if isinstance(config.objective, WindowObjective):
            config.objective.window_length(length)
    except ValueError as error:
        yield str(error)
    warmup = config.length_warmup
    if warmup is not None and not isinstance(config.objective, CausalLm | MaskedLm | FillInTheMiddle):
        yield (
            f"length_warmup cuts off the ends of rows, which is where the targets of objective={name} are; try "
            "length_warmup=None."
        )
    if warmup is not None and warmup.lengths[-1] != length:
        yield (
            f"length_warmup.lengths ends at {warmup.lengths[-1]}, and batch.sequence_length={length}; the last must be "
            f"the whole row: try batch.sequence_length={warmup.lengths[-1]}."
        )


def _attentions(config: Config) -> dict[str, Kind]:
    """A kind of layer for each attention of the model, by its path in the config."""
    return {f"model.{kind.path('attention')}": kind for kind in config.model.kinds}


def _split_sizes(config: Config) -> list[tuple[str, int, Kind]]:
    """The dimensions that tensor parallelism may split, by name, their sizes, and the layers that have them."""
    attentions = _attentions(config).values()
    found = [("heads", kind.config.attention.heads, kind) for kind in attentions]
    found += [("kv_heads", kind.config.attention.kv_heads or kind.config.attention.heads, kind) for kind in attentions]
    by_mlp = {kind.path("mlp"): kind for kind in config.model.kinds}
    found += [("ff", kind.config.mlp.width, kind) for kind in by_mlp.values()]
    return [*found, ("vocab", config.model.padded_vocab, config.model.kinds[0])]


def _tensor_parallel(case: _Case) -> Iterator[str]:
    layout = case.layout
    for dimension, size, kind in _split_sizes(case.config):
        model, heads = kind.config, kind.config.attention.heads
        axes = layout.axes(dimension, "weights")
        parts = layout.size(*axes)
        if size % parts == 0 or (dimension == "kv_heads" and model.attention.kv_heads is None):
            continue
        mesh = "mesh." + "*".join(axes)
        where, tries = f"{mesh}={parts}", []
        if dimension == "heads":
            path = f"model.{kind.path('attention')}.heads"
            kv_heads = model.attention.kv_heads or 1
            able = [n for n in range(parts, 2 * max(size, parts) + 1, parts) if n % kv_heads == 0]
            tries = [n for n in able if model.attention.head_size or model.width % n == 0]
        elif dimension == "kv_heads":
            path = f"model.{kind.path('attention')}.kv_heads"
            tries = [n for n in range(parts, heads + 1, parts) if heads % n == 0]
        elif dimension == "ff":
            path, tries = f"model.{kind.path('mlp')}.width", _around(size, parts)
        else:
            path, tries = "model.vocab_multiple", [math.lcm(model.vocab_multiple, parts)]
            where += f" (the vocabulary, padded, has {size} rows)"
        value = model.vocab_multiple if dimension == "vocab" else size
        changes = [case.mesh("model", n) for n in _divisors(math.gcd(size, parts))] if axes == ("model",) else []
        # The layout first: another size is another model, which no checkpoint fits.
        in_use = layout.size(*layout.axes(dimension, "activations"))
        hints = ["layout.vocabulary=replicated"] if STAGES in axes and not size % in_use else []
        hints += [f"{path}={_either(tries[:2])}"] if tries else []
        hints += [change for change in changes[-2:] if change] or ([] if tries else ["another mesh"])
        yield f"{path}={value} does not divide over {where}; try {', or '.join(hints)}."


_MADE_FOR = {
    **dict.fromkeys(("cudnn", "hopper"), Chip("gpu", "NVIDIA H200", 9.0)),
    **dict.fromkeys(("splash", "tpu"), Chip("tpu", "TPU v5")),
}


def _backend(case: _Case) -> Iterator[str]:
    """A demanded attention backend that could not do this on the chip that it is made for either."""
    config = case.config
    dtype = "bfloat16" if config.precision.compute == "auto" else config.precision.compute
    length, rate = config.batch.sequence_length, config.model.attention_dropout
    sizes = {"rows": 1, "time": length, "dropout": rate, "there": False}
    masks = dict(zip([kind.name for kind in config.model.kinds], masks_of(config), strict=True))
    for path, kind in _attentions(config).items():
        asked = kind.config.attention
        if (chip := _MADE_FOR.get(asked.backend)) is None:
            continue
        try:
            attention.choose_backend(asked, chip, dtype, kind.config.head_size, masks[kind.name], path=path, **sizes)
        except ConfigError as error:
            yield str(error)


_QUESTIONS: tuple[tuple[tuple[str, ...], Callable[[_Case], Iterator[str]]], ...] = (
    (("batch", "mesh", "layout", "model"), _batch),
    (("batch", "mesh", "layout", "length_warmup"), _time),
    (("batch", "mesh", "layout", "model", "pipeline", "partition"), _pipeline),
    (("batch", "model"), _positions),
    (("batch", "model"), _pattern),
    (("objective", "model"), _attention),
    (("objective", "model"), _pairs),
    (("objective", "packing", "curriculum", "batch", "length_warmup"), _rows),
    (("data", "model", "objective", "batch"), _vocabulary),
    (("model", "mesh", "layout"), _tensor_parallel),
    (("model", "optimizer"), _groups),
    (("model", "objective", "packing", "precision", "batch"), _backend),
)
"""Checks across dataclasses, each with the fields that must be right for it to make sense."""


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _around(n: int, step: int) -> list[int]:
    """The multiples of step next to n, positive."""
    return [m for m in (n // step * step, -(-n // step) * step) if m > 0]


def _either(numbers: list[int]) -> str:
    return " or ".join(str(n) for n in numbers)
