"""The mesh: six named axes, from a `MeshConfig` and a list of devices to a `jax.sharding.Mesh`."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from mtx.errors import DeviceError, Problem

AXES = ("pipeline", "replica", "data", "context", "expert", "model")
BATCH_AXES = ("replica", "data", "expert")
NOT_YET = ("context", "expert")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, outermost first. One of them may be -1: the rest of the devices."""

    pipeline: int = 1
    """Pipeline stages: each holds some of the layers (config field `pipeline`)."""
    replica: int = 1
    """Data parallelism that never shards weights; across slow links, with `data` inside it: HSDP."""
    data: int = 1
    """Data parallelism; ZeRO shards weights and optimizer state over it."""
    context: int = 1
    """Shards of the sequence in attention (not built yet: 1)."""
    expert: int = 1
    """Shards of the experts of an MoE layer (not built yet: 1)."""
    model: int = 1
    """Tensor parallelism: heads, feed-forward and vocabulary are split over it."""

    def check(self) -> Iterator[Problem]:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                yield axis, "must be a positive number of devices, or -1 for the rest of them"
            elif axis in NOT_YET and size != 1:
                yield axis, f"is not built yet; set mesh.{axis}=1 and use pipeline, replica, data and model"
        wild = [axis for axis, size in sizes.items() if size == -1]
        if len(wild) > 1:
            yield wild[1], f"is a second -1 beside mesh.{wild[0]}; only one axis can take the rest of the devices"


def sizes(
    config: MeshConfig, num_devices: int, able: Callable[[dict[str, int]], bool] = lambda _: True
) -> dict[str, int]:
    """The size of every axis, with -1 filled in.

    Raises: DeviceError if the mesh does not use exactly `num_devices`, with legal values: of meshes that are `able`
    to do what is wanted of them, if there are any.
    """
    wanted = dataclasses.asdict(config)
    fixed = math.prod(size for size in wanted.values() if size != -1)
    wild = [axis for axis, size in wanted.items() if size == -1]
    said = " ".join(f"mesh.{axis}={size}" for axis, size in wanted.items() if size != 1) or "mesh.data=1"
    if wild and num_devices % fixed == 0:
        return wanted | {wild[0]: num_devices // fixed}
    if not wild and fixed == num_devices:
        return wanted
    tries = legal_meshes(num_devices, {axis: wanted[axis] for axis in AXES if axis not in NOT_YET}, able)
    problem = f"does not divide {num_devices} devices" if wild else f"uses {fixed} of {num_devices} devices"
    if fixed > num_devices:
        tries.append(f"--devices {fixed} to simulate them on the CPU")
    raise DeviceError(f"{said} {problem}; try {', or '.join(tries)}.")


def legal_meshes(
    num_devices: int, wanted: dict[str, int], able: Callable[[dict[str, int]], bool] = lambda _: True, most: int = 4
) -> list[str]:
    """Up to `most` meshes that use every device, those nearest to `wanted` first, as overrides of it.

    Of those that are `able`, unless none is.
    """

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    found = []
    for pipeline in divisors(num_devices) if wanted["pipeline"] != 1 else (1,):
        for model in divisors(num_devices // pipeline):
            rest = num_devices // pipeline // model
            for replica in divisors(rest):
                found.append({"pipeline": pipeline, "replica": replica, "data": rest // replica, "model": model})

    def distance(mesh: dict[str, int]) -> float:
        return sum(abs(math.log2(size / max(wanted[axis], 1))) for axis, size in mesh.items() if wanted[axis] > 0)

    found.sort(key=distance)

    def words(mesh: dict[str, int]) -> str:
        changes = [f"mesh.{axis}={size}" for axis, size in mesh.items() if size > 1 or wanted[axis] != 1]
        return " ".join(changes) or "mesh.data=1"

    fit = itertools.islice((mesh for mesh in found if able(dict.fromkeys(AXES, 1) | mesh)), most)
    return [words(mesh) for mesh in list(fit) or found[:most]]


def make(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh; sharding is part of every array's type on it (explicit axes).

    TPU slices that DCN joins are crossed by the outer axes (pipeline, replica, data) first; elsewhere
    neighbours in `devices` are neighbours on the inner axes.
    Raises: DeviceError if a device would be idle, or if no outer axes span the slices.
    """
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes(config, len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices > 1:
        outer = _outer(shape, slices)
        inner = tuple(size // o for size, o in zip(shape, outer, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _outer(shape: tuple[int, ...], num_slices: int) -> tuple[int, ...]:
    """How the slices divide over the axes that may cross slow links."""
    outer, rest = [1] * len(shape), num_slices
    for i, axis in enumerate(AXES):
        if axis in ("pipeline", "replica", "data"):
            outer[i] = math.gcd(shape[i], rest)
            rest //= outer[i]
    if rest > 1:
        raise DeviceError(
            f"{num_slices} slices are joined by slow links, and mesh.pipeline x mesh.replica x mesh.data does "
            f"not span them; try mesh.replica={num_slices}."
        )
    return tuple(outer)


def batch_shards(mesh_sizes: dict[str, int]) -> int:
    """In how many parts the batch is split."""
    return math.prod(mesh_sizes[axis] for axis in BATCH_AXES)
