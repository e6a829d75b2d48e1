"""What Pallas calls differently in jax 0.10.2, 0.11.2 and 0.12.x: the only place that knows of versions."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])


def transposed(ref: Any) -> Any:
    """The view of a two-dimensional shared-memory ref with its axes swapped: free, wgmma reads either order."""
    if JAX_VERSION < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))
    return ref.transpose((1, 0))


def load_rows(ref: Any, layout: Any) -> jax.Array:
    """A one-dimensional shared-memory ref as registers in `layout`."""
    load: Any = plgpu.load
    if JAX_VERSION < (0, 11):
        return load(ref, (), layout=layout)
    return load(ref, layout=layout)


def gpu_interpreter(**params: Any) -> Any:
    """Parameters that make `plgpu.kernel` run on the CPU, barriers and copies included; raises where jax has none."""
    if JAX_VERSION < (0, 12):
        raise NotImplementedError("this jax has no GPU interpreter that runs the kernels; it needs jax 0.12")
    mosaic_gpu: Any = plgpu
    return mosaic_gpu.InterpretGPUParams(**params)


def out_shape(shape: tuple[int, ...], dtype: Any, *inputs: jax.Array) -> jax.ShapeDtypeStruct:
    """The result of a kernel inside `shard_map`: it varies over every mesh axis over which an input does."""
    kind = jax.typeof(inputs[0]).manual_axis_type
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kind)(varying=varying))


def varying_alike(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Inputs of one kernel inside `shard_map`, all made to vary over the mesh axes over which any of them does."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in inputs]
    every = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(every - mine)), to="varying") if every - mine else x
        for x, mine in zip(inputs, varying, strict=True)
    )


def varying_like(inputs: Sequence[jax.Array], *outputs: jax.Array) -> Any:
    """Results of a `plgpu.kernel` in a tuple, inside `shard_map` varying as its inputs do, which it does not say."""
    every = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    axes = [tuple(sorted(every - jax.typeof(x).manual_axis_type.varying)) for x in outputs]
    return tuple(jax.lax.pcast(x, more, to="varying") if more else x for x, more in zip(outputs, axes, strict=True))


def reset_gpu_interpreter() -> None:
    """Needed after an exception inside an interpreted kernel, before the next one."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # no public name

    interpret_pallas_call.reset_gpu_interpret_mode_state()


REFS_IN_GPU_KERNELS = JAX_VERSION >= (0, 11)
"""Whether a kernel can be given a `jax.new_ref` to add to."""


def require_refs_in_gpu_kernels(what: str) -> None:
    if not REFS_IN_GPU_KERNELS:
        raise NotImplementedError(f"{what} needs jax 0.11 or later, not {jax.__version__}")
