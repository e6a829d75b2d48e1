"""Attention's forward and backward pass beside every rival that is installed, in one run on one chip.

    python -m benchmarks.attention                          # checks, then times everything; some minutes on an H200
    python -m benchmarks.attention --quick --results OUT.md  # a few shapes; the table is appended to OUT.md too

First every backend of ours is held against float64 on this chip. Then times: bfloat16 (float32 on a CPU), random data,
B T tokens and N H features constant. TFLOP/s count 4 B N T S H per forward pass times the share of pairs that the mask
shows, 2.5 times that for the backward pass, which is (forward and backward) - forward. `% matmul` is of an 8192 cubed
product of the same dtype in the same run.
"""

import argparse
import contextlib
import datetime as dt
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import BackendName, Chip, Unable, flash_attention, module
from pallas_kernels.masks import Blocks, Causal, Documents, Full, Mask, bind
from pallas_kernels.patterns import Chosen, LocalGlobal
from tests import attention_oracle

OURS: tuple[BackendName, ...] = ("cudnn", "hopper", "splash", "tpu", "chunked", "plain")


class Shape(NamedTuple):
    name: str
    mask: Mask
    time: int
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    document: int = 0
    """Mean length of packed documents."""

    def segments(self) -> np.ndarray:
        random = np.random.default_rng(0)
        return 1 + np.cumsum(random.random((self.rows, self.time)) < 1 / max(self.document, 1), axis=1).astype(np.int32)

    def bound(self) -> Any:
        return bind(self.mask, self.time, segments=jnp.asarray(self.segments()))

    def share(self) -> float:
        """Share of the query and key pairs that the mask shows."""
        bound = self.bound()
        if bound.mask == Full():
            return 1.0
        ranges = bound.visible()
        if ranges.is_interval:
            seen = jnp.maximum(ranges.last_RBT[0] - ranges.first_RBT[0] + 1, 0)
            return float(jnp.mean(seen.astype(jnp.float32))) / self.time
        return float(np.mean(np.asarray(bound.dense())))

    def flops(self) -> float:
        return 4.0 * self.rows * self.heads * self.time**2 * self.head_size * self.share()


def shapes(small: bool, quick: bool) -> Iterator[Shape]:
    tokens, features = (1024, 256) if small else (16384, 2048)
    lengths = (256, 512, 1024) if small else (8192,) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    for head in (64,) if small else (128,) if quick else (128, 64, 256):
        for T in lengths:
            rows, heads = max(1, tokens // T), features // head
            yield Shape("causal", Causal(), T, heads, heads, head, rows)
            if not quick or small:
                yield Shape("full", Full(), T, heads, heads, head, rows)
    T, H = (512, 64) if small else (8192, 128)
    rows, heads = tokens // T, features // H
    yield Shape("documents", Causal() & Documents(), T, heads, heads, H, rows, document=T // 8)
    blocks = T // 128
    random = np.random.default_rng(0).random((blocks, blocks)) < 0.25
    chosen = Chosen(block=128, rows=tuple(map(tuple, (random | np.eye(blocks, dtype=bool)).tolist())))
    yield Shape("25 % of blocks", Blocks(chosen), T, heads, heads, H, rows)
    for T in (512,) if small else (4096, 8192):
        yield Shape("causal, GQA 4:1", Causal(), T, *((4, 1) if small else (32, 8)), H, max(1, tokens // T // 2))


def inputs(shape: Shape, dtype: Any) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [
        jax.random.normal(key, (shape.rows, shape.time, n, shape.head_size), dtype)
        for key, n in zip(keys, heads, strict=True)
    ]


# What is timed: name -> (forward, forward and backward), or why not.

Timed = tuple[Callable[[], Any], Callable[[], Any]]
"""They only launch, and return what `seconds` waits for."""


def ours(name: BackendName, shape: Shape, arrays: list[jax.Array]) -> Timed:
    def attend(q, k, v):
        return flash_attention(q, k, v, shape.bound(), backend=name)

    if name == "plain" and shape.time > 4096:
        raise Unable("its scores would need too much memory")
    return jitted(attend, arrays)


def fused(shape: Shape, arrays: list[jax.Array]) -> Timed:
    """Hopper's other backward pass, which is not deterministic."""
    sizes = module("hopper").Sizes(fused=True)
    return jitted(lambda q, k, v: flash_attention(q, k, v, shape.bound(), backend="hopper", sizes=sizes), arrays)


def jitted(attend: Callable, arrays: list[jax.Array]) -> Timed:
    q, k, v, dout = arrays
    forward, both = jax.jit(attend), jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
    return (lambda: forward(q, k, v)), (lambda: both(q, k, v, dout))


def tokamax(shape: Shape, arrays: list[jax.Array]) -> Timed:
    import tokamax  # pyrefly: ignore[missing-import]

    if shape.mask not in (Causal(), Full()):
        raise Unable("its public door knows causal and full")
    return jitted(lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=shape.mask == Causal()), arrays)


SDPA_KERNELS = {"SDPA by cuDNN": "CUDNN_ATTENTION", "SDPA by FlashAttention 2": "FLASH_ATTENTION"}
"""Rivals that name one of torch's kernels; plain `SDPA` lets torch choose."""


def torch_rival(which: str, shape: Shape, arrays: list[jax.Array]) -> Timed:
    import torch  # pyrefly: ignore[missing-import]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    order = (0, 1, 2, 3) if which == "flash_attn" else (0, 2, 1, 3)
    q, k, v, dout = (
        torch.tensor(np.asarray(x, np.float32)).permute(order).contiguous().to(device, dtype) for x in arrays
    )
    grouped = shape.heads != shape.kv_heads
    if which.startswith("SDPA"):
        if shape.mask in (Causal(), Full()):
            options: dict = {"is_causal": shape.mask == Causal()}
        else:
            options = {"attn_mask": torch.tensor(np.asarray(shape.bound().dense()))[:, None].to(device)}

        which_kernel = contextlib.nullcontext
        if which in SDPA_KERNELS:
            from torch.nn.attention import SDPBackend, sdpa_kernel  # pyrefly: ignore[missing-import]

            which_kernel = partial(sdpa_kernel, SDPBackend[SDPA_KERNELS[which]])

        def attend(q, k, v):
            with which_kernel():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)

    elif which == "FlexAttention":
        from torch.nn.attention.flex_attention import (  # pyrefly: ignore[missing-import]
            create_block_mask,
            flex_attention,
        )

        if device == "cpu":
            raise Unable("it has no backward pass on a CPU")
        block_mask = None
        if shape.mask != Full():
            segments = torch.tensor(shape.segments()).to(device)
            blocks = torch.tensor(np.asarray(_block_matrix(shape))).to(device)

            def shown(b, h, t, s):
                if isinstance(shape.mask, Blocks):
                    return blocks[t // 128, s // 128]
                return (t >= s) & (segments[b, t] == segments[b, s]) if shape.document else t >= s

            block_mask = create_block_mask(shown, shape.rows, None, shape.time, shape.time, device=device)
        compiled = torch.compile(flex_attention)

        def attend(q, k, v):
            return compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped)

    else:
        from flash_attn import flash_attn_func  # pyrefly: ignore[missing-import]

        if shape.mask not in (Causal(), Full()):
            raise Unable("its plain door knows causal and full")

        def attend(q, k, v):
            return flash_attn_func(q, k, v, causal=shape.mask == Causal())

    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    return forward, both


def _block_matrix(shape: Shape) -> np.ndarray:
    pattern = shape.mask.pattern if isinstance(shape.mask, Blocks) else LocalGlobal()
    return pattern.matrix(shape.time, shape.time)


def seconds(launch: Callable[[], Any], budget_s: float) -> float:
    """Returns the median seconds of a call over five rounds; a round launches as many calls as fit, then waits once."""
    for _ in range(2):
        wait(launch())
    start = time.perf_counter()
    wait(launch())
    calls = max(1, int(budget_s / 5 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(5):
        start, results = time.perf_counter(), None
        for _ in range(calls):
            results = launch()
        wait(results)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def wait(results: Any) -> None:
    """Waits for the arrays or tensors of the last call; calls end in the order in which they were launched."""
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(results)):
        jax.block_until_ready(results)
    else:
        import torch  # pyrefly: ignore[missing-import]

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def matmul_flops(dtype: Any, n: int, budget_s: float) -> float:
    """FLOP/s of a product of n x n random matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    return 2.0 * n**3 / seconds(lambda: product(a, b), budget_s)


def answers(name: BackendName, shape: Shape, arrays: list[jax.Array]) -> list[np.ndarray]:
    """out, dq, dk, dv."""

    @jax.jit
    def run(q, k, v, dout):
        out, back = jax.vjp(lambda *x: flash_attention(*x, shape.bound(), backend=name), q, k, v)  # type: ignore[misc]
        return out, *back(dout)

    return [np.asarray(x, np.float64) for x in run(*arrays)]


def check(name: BackendName, dtype: Any) -> str:
    """The worst error of values and gradients over masks and odd shapes, as a multiple of plain attention's."""
    worst = 0.0
    for mask, T, heads, head in (
        (Causal(), 1000, (4, 4), 128),
        (Full(), 384, (2, 2), 64),
        (Causal() & Documents(), 1000, (8, 2), 128),
        (Documents(), 640, (4, 1), 64),
        (Blocks(LocalGlobal()) & Causal(), 1024, (2, 2), 128),
    ):
        shape = Shape("check", mask, T, *heads, head, 2, document=90)
        arrays, dense = inputs(shape, dtype), shape.bound().dense()
        seen = np.ones((1, T, T), bool) if dense is None else np.asarray(dense)
        q, k, v, dout = (np.asarray(x, np.float64) for x in arrays)
        zeros = np.zeros((2, heads[0], T))
        wanted = attention_oracle.attend(q, k, v, seen, dout, zeros, scale=head**-0.5)

        try:
            found = answers(name, shape, arrays)
        except Unable:
            continue
        names = (wanted.out_BTNU, wanted.dq, wanted.dk, wanted.dv)
        for x, simple, right in zip(found, answers("plain", shape, arrays), names, strict=True):
            allowed = attention_oracle.error(simple, right) + 0.5e-5
            worst = max(worst, attention_oracle.error(x, right) / allowed)
    return f"{worst:.2f}" if worst else "cannot run here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--seconds", type=float, default=0.5, help="per thing that is timed")
    parser.add_argument("--results", type=Path, help="a file to append the tables to")
    flags = parser.parse_args()
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    lines = [f"### Attention on {Chip.of(jax.devices()[0]).kind}, {dt.date.today()}, jax {jax.__version__}", ""]
    lines += ["| backend | worst error / plain attention's (2 is the bound) |", "|---|---|"]
    for name in OURS:
        lines.append(f"| {name} | {check(name, dtype)} |")
        print(lines[-1], flush=True)
    n = 1024 if small else 8192
    peak = matmul_flops(dtype, n, flags.seconds)
    lines += ["", f"A {n} cubed matmul: {peak / 1e12:.3g} TFLOP/s.", ""]
    header = (
        "| mask | T | heads | H | seen | what | forward ms | TFLOP/s | % matmul | backward ms | TFLOP/s | % matmul |"
    )
    lines += [header, "|---" * header.count(" | ") + "|---|"]
    print("\n".join(lines[-4:]), flush=True)
    torch_names = ("SDPA", "FlexAttention", "flash_attn")
    rivals: dict[str, Callable[[Shape, list[jax.Array]], Timed]] = {"tokamax": tokamax}
    rivals |= {f"torch {name}": partial(torch_rival, name) for name in torch_names}
    rivals |= {name: partial(ours, name) for name in OURS}
    rivals["hopper, fused"] = fused
    for shape in shapes(small, flags.quick):
        arrays, flops = inputs(shape, dtype), shape.flops()
        for name, rival in rivals.items():
            try:
                forward_s, both_s = (seconds(f, flags.seconds) for f in rival(shape, arrays))
            except (Unable, ImportError, NotImplementedError, ValueError):
                continue  # what cannot do this, or is not installed
            except Exception as error:
                lines.append(
                    f"| {shape.name} | {shape.time} | | | | {name} | failed: {str(error).splitlines()[0][:80]} |"
                )
                print(lines[-1], flush=True)
                continue
            backward_s = max(both_s - forward_s, 1e-9)
            rates = [flops / forward_s, 2.5 * flops / backward_s]
            cells = [shape.name, shape.time, f"{shape.heads}:{shape.kv_heads}", shape.head_size, f"{shape.share():.3f}"]
            cells.append(name)
            for took, rate in zip((forward_s, backward_s), rates, strict=True):
                cells += [f"{1e3 * took:.3f}", f"{rate / 1e12:.3g}", f"{100 * rate / peak:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
    if flags.results:
        with flags.results.open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
