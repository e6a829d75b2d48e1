"""What an attention call asks of a backend."""

from dataclasses import dataclass

import jax

from pallas_kernels.masks import Mask


@dataclass(frozen=True)
class Chip:
    """What runs the call; it need not be here."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str = ""
    """JAX's device_kind, e.g. NVIDIA H200, TPU v5 lite."""
    capability: float = 0.0
    """CUDA compute capability: 7.5 Turing, 8.0 and 8.6 Ampere, 8.9 Ada, 9.0 Hopper."""

    @classmethod
    def of(cls, device: jax.Device) -> "Chip":
        platform = "gpu" if device.platform == "cuda" else device.platform
        return cls(platform, device.device_kind, float(device.compute_capability) if platform == "gpu" else 0.0)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Shapes are those of one device: N is a multiple of K."""

    chip: Chip
    dtype: str
    mask: Mask
    rows: int
    """B"""
    queries: int
    """T"""
    keys: int
    """S"""
    heads: int
    """N"""
    kv_heads: int
    """K"""
    head_size: int
    """H of queries and keys."""
    value_size: int
    """U"""
    positions: bool = False
    """Whether positions are given, and differ from indices."""
    key_segments: bool = False
    """Whether keys have segments of their own."""
    softcap: bool = False
    dropout: bool = False
    lse: bool = False
    """Whether lse is wanted, or needed for sinks."""
