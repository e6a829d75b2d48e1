"""The Hopper kernels without a Hopper: interpreted on jax 0.12 with its race detector, lowered and compiled on all."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import aot
import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import shim
from pallas_kernels.attention import hopper
from pallas_kernels.attention.flash import Noise, Scores, flash
from pallas_kernels.attention.question import Chip, Question
from pallas_kernels.masks import Blocks, Causal, Documents, Full, Mask, Window, bind
from pallas_kernels.patterns import Strided

needs_interpreter = pytest.mark.skipif(shim.JAX_VERSION < (0, 12), reason="the GPU interpreter needs jax 0.12")


def interpreted(**sizes) -> hopper.Sizes:
    tiles = {"forward_keys": 64, "staged": True, "interpret": shim.gpu_interpreter(detect_races=True)}
    return hopper.Sizes(**(tiles | sizes))


def given(shape: tuple[int, ...], dtype=jnp.bfloat16, seed: int = 0) -> Any:
    """q, k, v, dout and a cotangent of lse, for shape B, T, S, N, K, H, U."""
    B, T, S, N, K, H, U = shape
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, U), (B, T, N, U)
    dlse_BNT = jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)
    return [*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), dlse_BNT]


def noise_of(shape) -> Noise:
    """Of shards that are not the first: neither heads nor positions begin at 0, nor go by ones."""
    B, T, S, N = shape[:4]
    words = tuple(jnp.arange(B, dtype=jnp.uint32) * 7 + np.uint32(word) for word in (5, 2**31 + 9))
    return Noise(words, jnp.arange(N) + 3, jnp.arange(T) * 2 + 100, jnp.arange(S) * 3)


def computed(
    q, k, v, dout, dlse_BNT, visible, scores: Scores, sizes, noise: Noise | None = None
) -> dict[str, jax.Array]:
    out, lse = hopper.forward(q, k, v, visible, noise, scores, sizes)
    delta_BNT = jnp.einsum("BTNU,BTNU->BNT", out, dout, preferred_element_type=jnp.float32) - dlse_BNT
    dq, dk, dv = hopper.backward(q, k, v, visible, noise, scores, lse, delta_BNT, dout, sizes)
    return {"out_BTNU": out, "lse_BNT": lse, "dq": dq, "dk": dk, "dv": dv}


def check(shape, mask: Mask, scores: Scores | None = None, dtype=jnp.bfloat16, sizes=None, **bound) -> None:
    B, T, S, _, _, H, _ = shape
    scores = scores or Scores(scale=H**-0.5)
    q, k, v, dout, dlse_BNT = given(shape, dtype)
    bound_mask = bind(mask, T, S, **bound)
    dense = bound_mask.dense()
    seen_BTS = np.broadcast_to(True if dense is None else np.asarray(dense), (B, T, S))
    noise, keep_BNTS = None, None
    if scores.dropout:
        noise = noise_of(shape)
        keep_BNTS = noise.keep(scores.dropout, noise.query_T, noise.key_S, groups=1)[:, :, 0]
    expected = attention_oracle.attend(
        *(q, k, v, seen_BTS, dout, dlse_BNT),
        scale=scores.scale,
        softcap=scores.softcap,
        keep_BNTS=keep_BNTS,
        dropout=scores.dropout,
    )._asdict()
    got = computed(q, k, v, dout, dlse_BNT, bound_mask.visible(), scores, interpreted(**(sizes or {})), noise)
    del expected["dsinks_N"]
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        close(np.asarray(got[name], np.float64), value, name, 2.0**-7 if dtype == jnp.bfloat16 else 2.0**-10)


def close(got: np.ndarray, value: np.ndarray, name: str, epsilon: float) -> None:
    """lse within float32's reach, others within the rounding of P, dS and the result to the inputs' dtype."""
    finite = np.isfinite(value)
    np.testing.assert_array_equal(np.isfinite(got), finite, err_msg=name)
    np.testing.assert_array_equal(got[~finite], value[~finite], err_msg=name)
    got, value = np.where(finite, got, 0), np.where(finite, value, 0)
    bound = 1e-5 if name == "lse_BNT" else epsilon
    np.testing.assert_allclose(got, value, rtol=0, atol=bound * max(np.abs(value).max(), 1.0), err_msg=name)
    norm = np.linalg.norm(value)
    assert np.linalg.norm(got - value) <= (1e-6 if name == "lse_BNT" else epsilon / 2) * norm + 1e-6, name


PACKED = {"segments": jnp.asarray([[1] * 64 + [2] + [3] * 70 + [0] * 25])}
"""Documents that end on and off a tile's edge, one of length 1, and padding at the end."""
TWO_TERMS = (Causal() & Window(20)) | Blocks(Strided(stride=2))
"""No interval: lists of tiles, two terms, one of them with a pattern."""


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "mask", "more"),
    [
        ((1, 200, 200, 2, 1, 64, 64), Causal(), {}),
        ((1, 1, 1, 1, 1, 64, 64), Full(), {}),
        ((1, 65, 190, 4, 2, 64, 64), Causal() & Window(33), {}),
        ((1, 160, 160, 2, 2, 64, 64), Causal() & Documents(), PACKED),
        ((1, 300, 100, 1, 1, 64, 64), Window(20), {}),
        ((1, 200, 300, 2, 1, 64, 64), TWO_TERMS, {"scores": Scores(scale=0.2, softcap=3.0)}),
        ((1, 64, 130, 1, 1, 80, 48), Full(), {"dtype": jnp.float16, "sizes": {"backward_stages": 1}}),
        ((1, 140, 200, 2, 1, 128, 128), Causal(), {"sizes": {"fused": True}}),
        pytest.param((1, 200, 150, 1, 1, 128, 128), TWO_TERMS, {"sizes": {"fused": True}}, marks=pytest.mark.slow),
        ((2, 100, 130, 2, 1, 64, 64), Causal(), {"scores": Scores(scale=0.125, dropout=0.3)}),
        pytest.param((2, 130, 65, 2, 2, 64, 64), Full(), {}, marks=pytest.mark.slow),
        pytest.param((2, 257, 257, 4, 1, 128, 128), Causal(), {}, marks=pytest.mark.slow),
        pytest.param((1, 160, 160, 2, 2, 64, 64), Documents(), PACKED, marks=pytest.mark.slow),
        pytest.param((1, 129, 129, 1, 1, 96, 96), Causal(), {"dtype": jnp.float16}, marks=pytest.mark.slow),
        pytest.param((1, 127, 63, 2, 1, 192, 128), Causal(), {}, marks=pytest.mark.slow),
        pytest.param((1, 130, 130, 1, 1, 256, 256), Causal(), {}, marks=pytest.mark.slow),
        pytest.param((1, 130, 130, 1, 1, 64, 64), Full(), {"scores": Scores(scale=9.0)}, marks=pytest.mark.slow),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_interpreted_kernels_are_attention_and_have_no_races(shape, mask, more):
    check(shape, mask, **more)


@needs_interpreter
def test_hidden_keys_change_nothing_to_the_bit():
    """What no query sees lies in tiles that some kernel visits, and whatever finite thing it holds is not seen."""
    q, k, v, dout, dlse = given((1, 100, 150, 2, 1, 64, 64))
    visible = bind(Window(9, 20), 100, 150).visible()
    scores = Scores(scale=0.125)
    first = computed(q, k, v, dout, dlse, visible, scores, interpreted())
    second = computed(q, k.at[:, 120:].set(3e4), v.at[:, 120:].set(-3e4), dout, dlse, visible, scores, interpreted())
    for name in first:
        np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]), err_msg=name)


WAITS = {"forward": 13, "backward": 10}
"""Calls of barrier_wait in the kernels' text, which is traced once for unmasked and once for masked tiles."""
UNNOTICED = {("forward", 8), ("forward", 10), ("backward", 3)}
"""Of the masked loop, whose one or two steps per tile here are too few for the detector's clocks."""


@needs_interpreter
@pytest.mark.parametrize(
    ("which", "removed"),
    [
        pytest.param(which, i, marks=() if (which, i) in {("forward", 12), ("backward", 1)} else pytest.mark.slow)
        for which, count in WAITS.items()
        for i in range(count)
        if (which, i) not in UNNOTICED
    ],
)
def test_a_removed_wait_is_caught(monkeypatch, which, removed):
    """A control of the tests above: without any one wait, the interpreter must complain."""
    calls, wait = [], plgpu.barrier_wait

    def wait_unless_removed(barrier):
        calls.append(barrier)
        if len(calls) - 1 != removed:
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_unless_removed)
    q, k, v, dout, row = given((1, 320, 320, 1, 1, 64, 64))
    given_to_both = (q, k, v, bind(Causal(), 320).visible(), None, Scores(scale=0.125))
    run = {
        "forward": lambda: hopper.forward(*given_to_both, interpreted()),
        "backward": lambda: hopper.backward(*given_to_both, row, row, dout, interpreted()),
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RACE DETECTED|phase"):
        jax.block_until_ready(jax.jit(run[which])())
    shim.reset_gpu_interpreter()
    assert len(calls) == WAITS[which]


CASES = [
    ((128, 128), "bfloat16", Causal(), 0),
    ((128, 128), "float16", TWO_TERMS, 0),
    ((64, 64), "bfloat16", Causal(), 16),
    ((80, 80), "bfloat16", Causal(), 0),
    ((96, 96), "bfloat16", Causal(), 0),
    ((192, 128), "bfloat16", Causal(), 64),
    ((192, 192), "bfloat16", Causal(), 0),
    ((256, 256), "bfloat16", Causal(), 256),
    ((64, 64), "float16", TWO_TERMS, 64),
    ((128, 128), "bfloat16", TWO_TERMS, 0),
]
"""(H, U), dtype, mask, bytes that a thread may spill in the worst kernel."""
IDS = [f"{H}-{U}-{dtype}-{'intervals' if mask == Causal() else 'list'}" for (H, U), dtype, mask, _ in CASES]
DEFAULT_CASES = 2


def asked(head_sizes: tuple[int, int], dtype: str, mask: Mask) -> Question:
    H, U = head_sizes
    chip = Chip("gpu", "NVIDIA H200", 9.0)
    sizes = {"rows": 2, "queries": 1000, "keys": 1000, "heads": 8, "kv_heads": 2}
    return Question(chip=chip, dtype=dtype, mask=mask, head_size=H, value_size=U, **sizes)


def both_passes(question: Question, sharding=None, **sizes):
    """A function of everything that a step of training calls, and the shapes of its arguments."""
    B, T, S, N, K, H, U = (
        getattr(question, name) for name in ("rows", "queries", "keys", "heads", "kv_heads", "head_size", "value_size")
    )
    scores = Scores(scale=H**-0.5, dropout=0.1 if question.dropout else 0.0)
    sizes = replace(hopper.default_sizes(question), **sizes)

    def step(q, k, v, dout, row_BNT):
        visible = bind(question.mask, T, S).visible()
        noise = noise_of((B, T, S, N)) if question.dropout else None
        out, lse = hopper.forward(q, k, v, visible, noise, scores, sizes)
        return out, hopper.backward(q, k, v, visible, noise, scores, lse, row_BNT, dout, sizes)

    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, U), (B, T, N, U)
    inputs = [jax.ShapeDtypeStruct(shape, question.dtype, sharding=sharding) for shape in shapes]
    return step, [*inputs, jax.ShapeDtypeStruct((B, N, T), jnp.float32, sharding=sharding)]


def matrix_products(question: Question, sizes: hopper.Sizes) -> dict[str, int]:
    """wgmma instructions by kernel: one per 16 of what is summed over, and loops with and without a mask."""
    H, U = (-(-size // 64) * 64 for size in (question.head_size, question.value_size))
    forward, dq, dkv = (2 * keys // 16 for keys in (sizes.forward_keys, sizes.dq_keys, sizes.dkv_queries))
    scores, dp = 2 * H // 16, 2 * U // 16
    found = {"forward": scores + forward, "backward_dq": scores + dp + dq}
    if H + U <= hopper.WIDE:
        return found | {"backward_dkv": scores + dp + 2 * dkv}
    return found | {"backward_dk": scores + dp + dkv, "backward_dv": scores + dkv}


@pytest.mark.parametrize(("head_sizes", "dtype", "mask", "spill"), CASES[:DEFAULT_CASES], ids=IDS[:DEFAULT_CASES])
def test_kernels_lower_without_any_compiler(head_sizes, dtype, mask, spill):
    step, shapes = both_passes(asked(head_sizes, dtype, mask))
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(("queries", "keys"), [(1001, 1003), (1, 129)])
def test_any_length_lowers(queries, keys):
    """TMA takes pieces of 8 rows, which the interpreter does not mind."""
    question = replace(asked((128, 128), "bfloat16", Causal()), queries=queries, keys=keys)
    step, shapes = both_passes(question)
    text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3


def test_results_vary_over_the_mesh_axes_of_the_inputs():
    """As the derivative rule demands inside a `shard_map` with check_vma=True."""
    question = asked((128, 128), "bfloat16", Causal())
    _, (*shapes, _, _) = both_passes(question)
    sizes, scores = hopper.default_sizes(question), Scores(scale=1.0)

    def loss(q, k, v):
        out, lse = flash(hopper, scores, sizes, q, k, v, bind(Causal(), q.shape[1]).visible(), None)
        return out.astype(jnp.float32).sum() + lse.sum()

    mesh, along = jax.sharding.Mesh(jax.devices()[:1], ("d",)), jax.sharding.PartitionSpec("d")
    gradients = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=along, out_specs=along)
    assert [x.shape for x in jax.eval_shape(gradients, *shapes)] == [x.shape for x in shapes]


def test_tuning_tries_what_is_deterministic():
    found = hopper.candidates(asked((128, 128), "bfloat16", Causal()))
    assert len(set(found)) == len(found) == 32 and not any(sizes.fused for sizes in found)


def test_sizes_that_the_kernels_cannot_take_are_refused():
    with pytest.raises(ValueError, match="64 or 128"):
        hopper.Sizes(dq_keys=256)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("head_sizes", "dtype", "mask", "spill"),
    [
        pytest.param(*case, id=name, marks=() if i < DEFAULT_CASES else pytest.mark.slow)
        for i, (case, name) in enumerate(zip(CASES, IDS, strict=True))
    ],
)
def test_compiled_for_h200(monkeypatch, uncached, tmp_path, head_sizes, dtype, mask, spill):
    """Registers, spills, serialised products and shared memory, from what the CUDA compiler says."""
    question = asked(head_sizes, dtype, mask)
    products = compile_and_judge(monkeypatch, tmp_path, question, spill)
    assert products == matrix_products(question, hopper.default_sizes(question))


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(("head_size", "spill"), [(64, 16), (128, 400)])
def test_dropout_compiled_for_h200(monkeypatch, uncached, tmp_path, head_size, spill):
    question = replace(asked((head_size, head_size), "bfloat16", Causal()), dropout=True)
    products = compile_and_judge(monkeypatch, tmp_path, question, spill)
    assert products == matrix_products(question, hopper.default_sizes(question))


@pytest.mark.aot
@pytest.mark.skipif(shim.JAX_VERSION < (0, 11), reason="the fused kernel needs jax 0.11")
def test_the_fused_backward_compiled_for_h200(monkeypatch, uncached, tmp_path):
    question = asked((128, 128), "bfloat16", Causal())
    products = compile_and_judge(monkeypatch, tmp_path, question, 128, fused=True)
    # Scores, dp, dv, dk, and half of dq, which each warpgroup has in a branch of its own; with and without a mask.
    assert products["backward_fused"] == 2 * (8 + 8 + 4 + 4 + 2 * 8)


def compile_and_judge(monkeypatch, folder: Path, question: Question, spill: int, **sizes) -> dict[str, int]:
    """Compiles both passes, fails on what would make them slow; returns wgmma instructions by kernel."""
    device = aot.cuda_devices(1)[0]
    step, shapes = both_passes(question, jax.sharding.SingleDeviceSharding(device), **sizes)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    jax.jit(step).lower(*shapes).compile()
    logs = {name_of(path): path.read_text() for path in folder.glob("*.ptxas")}
    products = {name_of(path): path.read_text().count("wgmma.mma_async") for path in folder.glob("*.ptx")}
    assert logs.keys() == products.keys()
    for path in folder.glob("*.resources.txt"):  # jax 0.10 writes none, and refuses what is too much
        (smem,) = re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
        assert int(smem) <= 227 * 1024, path.name
    for name, log in logs.items():
        (registers,) = re.findall(r"Used (\d+) registers", log)
        spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill", log))
        print(f"jax {jax.__version__} {question.dtype} {name}: {registers} registers, {spilled} bytes spilled")
        if "C7504" in log:
            print(f"this jaxlib ignores setmaxnreg: {log}")
            continue
        assert "C7512" not in log, name
        assert int(registers) == 168 if name == "forward" else int(registers) <= 255, name
        assert spilled <= spill, name
    return products


@pytest.fixture
def uncached():
    """What comes out of the compilation cache leaves no dumps."""
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", was)


def name_of(path: Path) -> str:
    return re.fullmatch(r"mtx_attention_(\w+?)_\d+", path.stem)[1]


def test_fused_says_which_heads_it_needs():
    step, shapes = both_passes(asked((64, 64), "bfloat16", Causal()), fused=True)
    error, words = (ValueError, "heads of 128") if shim.JAX_VERSION >= (0, 11) else (NotImplementedError, "jax 0.11")
    with pytest.raises(error, match=words):
        jax.eval_shape(step, *shapes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"chip": Chip("gpu", "NVIDIA A100", 8.0)}, "Hopper"),
        ({"chip": Chip("tpu", "TPU v5 lite")}, "Hopper"),
        ({"dtype": "float32"}, "bfloat16"),
        ({"head_size": 512}, "256"),
        ({"mask": Blocks(Strided(block=64))}, "128"),
    ],
)
def test_what_it_cannot_do_it_says(change, reason):
    said = hopper.cannot(replace(asked((128, 128), "bfloat16", Causal()), **change))
    assert said is None if reason is None else reason in said
