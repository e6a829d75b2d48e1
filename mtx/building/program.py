"""From a config to the program that it describes."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtx import config as configs
from mtx import mesh as meshes
from mtx.attention import choose_backend
from mtx.config import Config
from mtx.layout import BoundLayout, Placement
from mtx.model import Model, flatten
from mtx.step import Program
from pallas_kernels.attention import Chip

log = logging.getLogger("mtx")


def build(config: Config, devices: Sequence[jax.Device], steps: int | None = None) -> Program:
    """Builds the program that a config describes, on these devices, present or not; `steps` is the run's length.

    Raises: ConfigError, DeviceError.
    """
    mesh = meshes.make(config.mesh, devices)
    layout = BoundLayout.of(config.layout, dict(mesh.shape))
    stages = mesh.shape["pipeline"]
    chunks = config.pipeline.per_stage() if stages > 1 else 1
    model = Model(config.model, Placement.even(config.model.layers, stages, chunks))
    layout.check(flatten(model.weights))
    compute, _ = config.precision.resolve(devices[0])
    masks = configs.masks_of(config)
    for kind, mask in zip(model.kinds, masks, strict=True):
        attention = kind.config.attention
        heads, kv_heads = (
            count // layout.size(*layout.axes(name, "activations"))
            for name, count in (("heads", attention.heads), ("kv_heads", attention.kv_heads or attention.heads))
        )
        backend = choose_backend(
            dataclasses.replace(attention, heads=heads, kv_heads=kv_heads),
            Chip.of(devices[0]),
            compute.name,
            kind.config.head_size,
            mask,
            rows=1,
            time=config.batch.sequence_length,
            dropout=config.model.attention_dropout,
            path=f"model.{kind.path('attention')}",
        )
        if len(model.kinds) > 1:
            log.info("attention of %s: %s, %s", kind.name, backend, mask)
    return Program(
        model=model,
        mesh=mesh,
        layout=layout,
        optimizer=config.optimizer,
        loss=config.loss,
        partition=config.partition,
        compute=compute,
        stored=jnp.dtype(config.precision.params),
        masks=masks,
        steps=steps or config.steps or 1,
        schedule=config.pipeline,
        more_parts=(config.ema,) if config.ema is not None else (),
    )
