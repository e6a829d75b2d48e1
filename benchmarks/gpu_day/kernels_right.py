"""Part 2: each form of the attention kernels of this chip, values and gradients, against plain attention in float32."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, form_of
from benchmarks.tune_attention import own_backend
from pallas_kernels import shim
from pallas_kernels.attention import BackendName, Chip, Dropout, Unable, flash_attention, module
from pallas_kernels.masks import Blocks, BoundMask, Causal, Documents, Full, Mask, Window, bind
from pallas_kernels.patterns import Strided

TWO_TERMS = (Causal() & Window(200)) | Blocks(Strided(block=128, stride=2))
"""No interval of keys per query, so that kernels walk lists of tiles."""
HOPPER = Chip("gpu", "NVIDIA H200", 9.0)
REPEATS = 100
KEYS_64 = {"forward_keys": 64, "dq_keys": 128}
"""Hopper's tiles where the compiler ignores `setmaxnreg`; see docs/results.md."""
NAMES = ("out_BTNU", "dq_BTNH", "dk_BSKH", "dv_BSKU")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an attention kernel, at rows B = 2."""

    backend: BackendName
    mask: Mask = Causal()
    queries: int = 1024
    keys: int | None = None
    """None: as many as queries."""
    heads: tuple[int, int] = (8, 2)
    """Query heads, and key and value heads."""
    head_size: int = 128
    value_size: int | None = None
    """None: as head_size."""
    dropout: float = 0.0
    variant: str = ""
    """Name of what is unusual about the sizes."""
    sizes: Any = None
    chip: Chip | None = None
    """None: the first device."""

    @property
    def form(self) -> str:
        variant = "dropout" if self.dropout else "list" if self.mask == TWO_TERMS else self.variant
        variant = "documents" if self.mask.has(Documents) and not variant else variant
        return form_of(self.backend, self.head_size, self.value_size, variant)

    @property
    def shape(self) -> tuple[int, int, int, int, int, int, int]:
        """B, T, S, N, K, H, U."""
        keys, value_size = self.keys or self.queries, self.value_size or self.head_size
        return 2, self.queries, keys, *self.heads, self.head_size, value_size

    def bound(self) -> BoundMask:
        _, T, S, *_ = self.shape
        return bind(self.mask, T, S, segments=segments(T) if self.mask.has(Documents) else None)

    def shapes(self) -> list[tuple[int, ...]]:
        """Those of q_BTNH, k_BSKH, v_BSKU and a cotangent dout_BTNU."""
        B, T, S, N, K, H, U = self.shape
        return [(B, T, N, H), (B, S, K, H), (B, S, K, U), (B, T, N, U)]

    def inputs(self) -> list[jax.Array]:
        """Random arrays of `shapes` in bfloat16."""
        return [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(self.shapes())]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, plain: bool = False) -> jax.Array:
        """out_BTNU of the kernel, or of plain attention on this machine."""
        row_B = jnp.arange(2, dtype=jnp.uint32)
        words_2B = row_B * 7 + np.uint32(5), row_B * 7 + np.uint32(2**31 + 9)
        return flash_attention(
            q,
            k,
            v,
            self.bound(),
            dropout=Dropout(self.dropout, words_2B, jnp.arange(self.heads[0]) + 3) if self.dropout else None,
            backend="plain" if plain else self.backend,
            sizes=None if plain else self.sizes,
            chip=None if plain else self.chip,
        )


def segments(time: int) -> jax.Array:
    """Documents that end on and off a tile's edge, one of them of length 1, and an eighth of padding at the end."""
    ends = sorted({time // 4, time // 4 + 1, min(128, time // 2), 5 * time // 8, time - time // 8})
    row = np.searchsorted(ends, np.arange(time), side="right") + 1
    row[time - time // 8 :] = 0
    return jnp.asarray(np.broadcast_to(row, (2, time)), jnp.int32)


def calls(day: Day) -> Iterator[Call | LeftOut]:
    """The calls to check on this chip, the most useful first."""
    chip = day.chip
    if day.is_toy:
        yield Call(backend="chunked", queries=65, head_size=64)
        yield Call(backend="chunked", queries=64, head_size=64, mask=Causal() & Documents())
        tiles = dict.fromkeys(("forward_query", "forward_key", "dq_query", "dq_key", "dkv_query", "dkv_key"), 128)
        sizes = module("tpu").Sizes(**tiles, interpret=True)
        yield Call(backend="tpu", queries=128, head_size=64, sizes=sizes, chip=Chip("tpu", "TPU v5 lite"))
        if shim.JAX_VERSION < (0, 12):
            yield LeftOut(name="hopper, interpreted", why="the GPU interpreter needs jax 0.12")
            return
        sizes = module("hopper").Sizes(forward_keys=64, staged=True, interpret=shim.gpu_interpreter())
        yield Call(backend="hopper", queries=65, heads=(1, 1), head_size=64, sizes=sizes, chip=HOPPER)
    elif chip.platform == "tpu":
        for backend in ("splash", "tpu"):
            yield Call(backend=backend)
            yield Call(backend=backend, mask=Causal() & Documents())
            yield Call(backend=backend, head_size=64)
            yield Call(backend=backend, queries=1001)
        yield Call(backend="tpu", dropout=0.1)
        yield Call(backend="tpu", mask=TWO_TERMS)
        yield Call(backend="tpu", head_size=192, value_size=128)
        yield Call(backend="chunked")
    elif chip.capability == 9.0:
        yield from _hopper_calls()
    else:
        if chip.capability >= 8.0:
            yield from _cudnn_calls()
        yield Call(backend="chunked")
        yield Call(backend="chunked", mask=Causal() & Documents())


def _cudnn_calls() -> Iterator[Call]:
    yield Call(backend="cudnn")
    yield Call(backend="cudnn", head_size=64)
    yield Call(backend="cudnn", mask=Window(200), queries=1001)


def _hopper_calls() -> Iterator[Call]:
    sizes = module("hopper").Sizes
    yield Call(backend="hopper")
    yield Call(backend="hopper", mask=Causal() & Documents())
    yield Call(backend="hopper", head_size=64)
    yield from _cudnn_calls()
    for queries in (1001, 65, 1):
        yield Call(backend="hopper", queries=queries)
    yield Call(backend="hopper", variant="fused", sizes=sizes(fused=True))
    yield Call(backend="hopper", variant="keys 64", sizes=sizes(**KEYS_64))
    yield Call(backend="hopper", mask=TWO_TERMS)
    yield Call(backend="hopper", dropout=0.1)
    yield Call(backend="hopper", head_size=192, value_size=128)
    yield Call(backend="hopper", head_size=256, queries=512)
    yield Call(backend="hopper", mask=Window(200), queries=1000, keys=600)  # the last queries see nothing
    yield Call(backend="hopper", mask=Full(), queries=300, keys=1000)
    yield Call(backend="hopper", variant="staged", sizes=sizes(staged=True))
    yield Call(backend="hopper", head_size=64, mask=Causal() & Documents(), queries=1001)
    yield Call(backend="chunked")


def cases(day: Day) -> Iterator[Case | LeftOut]:
    """The first call of each form decides about it; what fails at an odd length or mask is a failure by itself."""
    decided: set[str] = set()
    for number, call in enumerate(calls(day)):
        if isinstance(call, LeftOut):
            yield call
            continue
        form = call.form if call.form not in decided else None
        decided.add(call.form)
        yield _case(f"{_name(call.mask)}, {_lengths(call)}", call, partial(compare, call), day, form)
        if number == 1:
            yield from _stress(day)


def _stress(day: Day) -> Iterator[Case]:
    for call in repeated(day):
        count = 3 if day.is_toy else REPEATS
        yield _case(f"{count} repeats are bit-equal, {_lengths(call)}", call, partial(repeat, call, count), day)
    # At a length that is no multiple of a tile, the last tile of a row reaches into the next one.
    call = Call(backend=own_backend(day.chip), queries=65 if day.is_toy else 1001, head_size=64 if day.is_toy else 128)
    yield _case(f"NaN in the next row changes nothing, {_lengths(call)}", call, partial(neighbours, call), day)


def repeated(day: Day) -> Iterator[Call]:
    """Calls whose bits must not change: more blocks than an H200 has multiprocessors, so that they run in waves."""
    if day.is_toy:
        yield Call(backend="chunked", queries=65, head_size=64)
        return
    backend = own_backend(day.chip)
    yield Call(backend=backend, queries=4096, heads=(16, 4))
    if backend != "chunked":
        yield Call(backend=backend, queries=4096, heads=(16, 4), mask=TWO_TERMS)
        yield Call(backend=backend, queries=4096, heads=(16, 4), dropout=0.1)


def _case(what: str, call: Call, run: Callable[[], Row], day: Day, form: str | None = None) -> Case:
    expected_s, limit_s = (1.0, None) if day.is_toy else (4.0, 30.0)
    return Case(name=f"{call.form}, {what}", run=run, expected_s=expected_s, limit_s=limit_s, form=form)


def _lengths(call: Call) -> str:
    _, T, S, N, K, *_ = call.shape
    return f"T {T}{'' if S == T else f', S {S}'}, heads {N}:{K}"


def _name(mask: Mask) -> str:
    return "two terms" if mask == TWO_TERMS else " & ".join(str(mask).replace("()", "").split(" & "))


def answers(call: Call, arrays: list[jax.Array], plain: bool = False) -> list[np.ndarray]:
    """Returns out and the gradients of q, k, v, as float64 on the host. Raises: LeftOut if the backend refuses."""

    @jax.jit
    def run(q, k, v, dout):
        out, back = jax.vjp(partial(call.attend, plain=plain), q, k, v)
        return out, *back(dout)

    try:
        return [np.asarray(x, np.float64) for x in run(*arrays)]
    except Unable as error:  # a smaller GPU, or a mask that the backend does not know
        raise LeftOut(name=call.form, why=str(error)) from None


@lru_cache(maxsize=8)
def _references(shape: tuple, mask: Mask, dropout: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Plain attention's answers in float32 at the highest precision, and in bfloat16."""
    _, T, S, N, K, H, U = shape
    call = Call(backend="plain", mask=mask, queries=T, keys=S, heads=(N, K), head_size=H, value_size=U, dropout=dropout)
    arrays = call.inputs()
    try:
        with jax.default_matmul_precision("highest"):
            exact = answers(call, [x.astype(jnp.float32) for x in arrays], plain=True)
        return exact, answers(call, arrays, plain=True)
    except jax.errors.JaxRuntimeError as error:
        raise LeftOut(name=call.form, why=f"plain attention failed here: {error}") from error


def compare(call: Call) -> Row:
    """Errors relative to float32; the bound is twice what plain attention in bfloat16 has, and 2e-4."""
    results = answers(call, call.inputs())
    exact, rounded = _references(call.shape, call.mask, call.dropout)
    row: Row = {"bound": "2 x plain + 2e-4"}
    for name, result, right, simple in zip(NAMES, results, exact, rounded, strict=True):
        scale = max(float(np.linalg.norm(right)), 1e-2 * right.size**0.5)
        error, allowed = (float(np.linalg.norm(x - right)) / scale for x in (result, simple))
        row[f"error of {name} (of plain)"] = f"{error:.2e} ({allowed:.2e})"
        if not error <= 2 * allowed + 2e-4:
            difference = np.where(np.isfinite(result), np.abs(result - right), np.inf)
            at = np.unravel_index(np.argmax(difference), result.shape)
            worst = f"at {tuple(map(int, at))} {result[at]:.6g} in place of {right[at]:.6g}"
            bad = int(np.sum(~np.isfinite(result)))
            return row | {
                "failed": f"{call}: {name} is off by {error:.2e} of its norm (plain bfloat16 by {allowed:.2e}), worst "
                f"{worst}; {bad} of {result.size} elements are not finite"
            }
    return row


def repeat(call: Call, repeats: int) -> Row:
    """Runs the same call again and again; a difference of one bit is a race."""
    arrays = call.inputs()

    @jax.jit
    def run(q, k, v, dout):
        out, back = jax.vjp(call.attend, q, k, v)
        return out, *back(dout)

    @jax.jit
    def differ(first, second):
        bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (*first, *second)]
        return jnp.stack([jnp.sum(a != b) for a, b in zip(bits[:4], bits[4:], strict=True)])

    first = run(*arrays)
    different = sum(np.asarray(differ(first, run(*arrays))) for _ in range(repeats))
    if np.any(different):
        return {"failed": f"{call}: elements of {', '.join(NAMES)} that changed: {np.asarray(different).tolist()}"}
    return {"elements that changed": 0}


def neighbours(call: Call) -> Row:
    """Fills the second row with NaN: the first row's answers keep their bits."""
    arrays = call.inputs()
    clean = answers(call, arrays)
    dirty = answers(call, [x.at[1].set(jnp.nan) for x in arrays])
    changed = [name for name, a, b in zip(NAMES, clean, dirty, strict=True) if not np.array_equal(a[0], b[0])]
    if changed:
        return {"failed": f"{call}: NaN in row 1 changes row 0 of {', '.join(changed)}"}
    return {"elements that changed": 0}
