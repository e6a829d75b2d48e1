"""Meshes: sizes, idle devices, legal alternatives."""

import aot
import jax
import pytest
from jax.sharding import AxisType

from mtx import mesh
from mtx.errors import DeviceError
from mtx.mesh import AXES, MeshConfig


def test_minus_one_takes_the_rest():
    assert mesh.sizes(MeshConfig(data=-1, model=2), 8) == dict(zip(AXES, (1, 1, 4, 1, 1, 2), strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"mesh.data=3 uses 3 of 8 devices; try mesh.data=8, or "),
        (MeshConfig(), r"mesh.data=1 uses 1 of 8 devices"),
        (MeshConfig(data=-1, model=3), r"mesh.data=-1 mesh.model=3 does not divide 8 devices; try "),
        (MeshConfig(data=16), r"uses 16 of 8 devices"),
    ],
    ids=str,
)
def test_idle_or_missing_devices_are_refused_with_what_is_legal(config: MeshConfig, message: str):
    with pytest.raises(DeviceError, match=message):
        mesh.sizes(config, 8)


@pytest.mark.parametrize("pipeline", [1, 3, 5])
def test_what_is_proposed_is_legal(pipeline: int):
    wanted = {"pipeline": pipeline, "replica": 1, "data": 5, "model": 2}
    for words in mesh.legal_meshes(12, wanted):
        sizes = {word.split("=")[0].removeprefix("mesh."): int(word.split("=")[1]) for word in words.split()}
        assert mesh.sizes(MeshConfig(**sizes), 12)


def test_a_mesh_has_every_axis_and_explicit_types():
    made = mesh.make(MeshConfig(replica=2, data=2, model=2), jax.devices())
    assert tuple(made.axis_names) == AXES
    assert set(made.axis_types) == {AxisType.Explicit}


def test_slices_are_crossed_by_outer_axes_first():
    assert mesh._outer((1, 2, 1, 1, 1, 4), 2) == (1, 2, 1, 1, 1, 1)
    assert mesh._outer((1, 1, 8, 1, 1, 4), 4) == (1, 1, 4, 1, 1, 1)
    with pytest.raises(DeviceError, match=r"2 slices .* try mesh.replica=2"):
        mesh._outer((1, 1, 1, 1, 1, 8), 2)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "data", "tensor"), [("v5p:4x4x4", 8, 8), ("v5p:4x4x4", 32, 2), ("v6e:8x8", 32, 2)]
)
def test_axes_may_split_a_pods_physical_axes(topology: str, data: int, tensor: int):
    chips = aot.tpu_devices(topology)
    made = mesh.make(MeshConfig(data=data, model=tensor), chips)
    assert {chip.id for chip in made.devices.flat} == {chip.id for chip in chips}
