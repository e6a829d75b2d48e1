"""The devices of a run: what makes MFU out of seconds, and how full their memory was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from mtx.metrics.clock import Pace


@dataclass(frozen=True)
class Machine:
    """What turns seconds into rates."""

    devices: int
    """All devices of the run, over all processes."""
    flops_per_token: float
    """See `flops_per_token`."""
    peak_flops: float | None
    """Of one device in the compute dtype; None where unknown."""

    def rates(self, pace: Pace) -> dict[str, float]:
        """The entries of a row of metrics that are about speed; mfu is not a number where the peak is unknown."""
        per_s = pace.tokens / pace.seconds if pace.seconds > 0 else math.nan
        flops = per_s / self.devices * self.flops_per_token
        return {
            "step_s": pace.seconds / pace.steps if pace.steps else math.nan,
            "data_wait_s": pace.data_wait_s / pace.steps if pace.steps else math.nan,
            "tokens_per_s": per_s,
            "tokens_per_s_per_device": per_s / self.devices,
            "tflops_per_s_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops if self.peak_flops else math.nan,
        }


def memory(devices: Sequence[jax.Device]) -> tuple[int, int] | None:
    """(peak bytes in use, limit) of the fullest of this process's devices; None where JAX does not know, as on CPUs."""
    stats = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    known = [
        (s["peak_bytes_in_use"], s["bytes_limit"])
        for s in stats
        if s and {"peak_bytes_in_use", "bytes_limit"} <= s.keys()
    ]
    return max(known, default=None)


def peak_flops(device_kind: str, compute_dtype: str) -> float | None:
    """Dense FLOP/s that the maker promises one JAX device in a dtype; None where no source says it.

    `device_kind` is `jax.Device.device_kind`, letter by letter: a slice of a GPU (MIG) or a new model is unknown,
    never its nearest relative. float32 is unknown everywhere: what XLA makes of it depends on the matmul precision.
    """
    return _PEAKS.get(device_kind, {}).get(compute_dtype)


def _half(tera: float) -> dict[str, float]:
    """Both 16-bit formats at one rate, as on NVIDIA's tensor cores since Ampere."""
    return {"bfloat16": tera * 1e12, "float16": tera * 1e12}


def _bfloat16(tera: float) -> dict[str, float]:
    return {"bfloat16": tera * 1e12}


def _float16(tera: float) -> dict[str, float]:
    return {"float16": tera * 1e12}


# NVIDIA prints most figures "with sparsity"; dense is half. Names are CUDA's, as JAX passes them on; TPU names are
# those that libtpu gives, and JAX's own table (jax/_src/tpu_info.py) spells some in a second way.
_PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA H100 Tensor Core GPU datasheet: SXM 1,979 sparse, PCIe 1,513 (its first edition), NVL 1,671.
    "NVIDIA H100 80GB HBM3": _half(1979 / 2),
    "NVIDIA H100 PCIe": _half(1513 / 2),
    "NVIDIA H100 NVL": _half(1671 / 2),
    # NVIDIA H200 Tensor Core GPU datasheet: SXM 1,979 sparse, NVL 1,671.
    "NVIDIA H200": _half(1979 / 2),
    "NVIDIA H200 NVL": _half(1671 / 2),
    # NVIDIA GH200 Grace Hopper Superchip datasheet: 1,979 sparse.
    "NVIDIA GH200 480GB": _half(1979 / 2),
    # NVIDIA Blackwell architecture technical brief: HGX B200 4.5 PFLOP/s sparse, GB200 5 per GPU.
    "NVIDIA B200": _half(4500 / 2),
    "NVIDIA GB200": _half(5000 / 2),
    # NVIDIA A100 Tensor Core GPU datasheet: 312 dense, every form.
    "NVIDIA A100-SXM4-40GB": _half(312),
    "NVIDIA A100-SXM4-80GB": _half(312),
    "NVIDIA A100-PCIE-40GB": _half(312),
    "NVIDIA A100 80GB PCIe": _half(312),
    # NVIDIA A10 datasheet: 125 dense; AWS's A10G has its own datasheet: 70 dense.
    "NVIDIA A10": _half(125),
    "NVIDIA A10G": _half(70),
    # NVIDIA L4 datasheet: 242 sparse; L40S datasheet: 362.05 dense.
    "NVIDIA L4": _half(242 / 2),
    "NVIDIA L40S": _half(362.05),
    # NVIDIA T4 datasheet: 65 mixed precision; V100 datasheet: 125 (SXM2), 112 (PCIe). No bfloat16 units.
    "Tesla T4": _float16(65),
    "Tesla V100-SXM2-16GB": _float16(125),
    "Tesla V100-SXM2-32GB": _float16(125),
    "Tesla V100-PCIE-16GB": _float16(112),
    "Tesla V100-PCIE-32GB": _float16(112),
    # cloud.google.com/tpu/docs/v4: 275 per chip, one device where its two cores work as one, as on Cloud TPU.
    "TPU v4": _bfloat16(275),
    # cloud.google.com/tpu/docs/v5e: 197 per chip, one device.
    "TPU v5 lite": _bfloat16(197),
    "TPU v5e": _bfloat16(197),
    # cloud.google.com/tpu/docs/v5p: 459 per chip, one device.
    "TPU v5": _bfloat16(459),
    "TPU v5p": _bfloat16(459),
    # cloud.google.com/tpu/docs/v6e: 918 per chip, one device.
    "TPU v6 lite": _bfloat16(918),
    "TPU v6e": _bfloat16(918),
    # docs.cloud.google.com/tpu/docs/tpu7x: 2,307 per chip, which is two devices.
    "TPU7x": _bfloat16(2307 / 2),
}
