"""GPT-2 and Llama against transformers, AdamW against torch: logits, gradients, training, initial weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
import toys

from mtx.attention import AttentionConfig
from mtx.layers import Gelu, LayerNorm, Learned, Llama3Scaling, RMSNorm, Rotary, SwiGLU
from mtx.losses import CrossEntropy
from mtx.model import Batch, Model, Transformer, flatten
from mtx.optim import AdamW, Cosine, Steps
from mtx.spmd import Compiled
from mtx.step import Program

pytestmark = [pytest.mark.parity, pytest.mark.slow]

BOUND = 1e-4
"""Of logits (absolute) and trained weights (relative): what is promised. Rounding makes less than a fifth of it."""
GRADIENTS = 1e-5
"""Of losses and gradients (relative). Rounding makes less than a third of it."""

# Odd sizes show what a product of them hides. Splitting over `model` needs even ones.
GPT2 = Transformer(
    vocab_size=251,
    vocab_multiple=64,
    layers=3,
    width=60,
    attention=AttentionConfig(heads=5),
    mlp=Gelu(width=101),
    positions=Learned(length=37),
)
EVEN = dataclasses.replace(GPT2, attention=AttentionConfig(heads=4), mlp=Gelu(width=102))
LLAMA = Transformer(
    vocab_size=251,
    vocab_multiple=64,
    layers=3,
    width=60,
    attention=AttentionConfig(heads=6, kv_heads=2, head_size=14),
    mlp=SwiGLU(width=102),
    norm=RMSNorm(),
    positions=Rotary(theta=100.0),
    bias=False,
    tied_head=False,
    init_scale_residual=False,
)
# At this length some frequencies are kept, some are mixed, some are divided by the factor.
LLAMA3 = dataclasses.replace(LLAMA, positions=Rotary(theta=100.0, scaling=Llama3Scaling(original_length=40)))

# Rows of 37 tokens; sequence parallelism needs an even time.
CASES: dict[str, tuple[Transformer, int, dict[str, Any]]] = {
    "gpt2": (GPT2, 37, {}),
    "gpt2-exact-gelu-large-epsilon": (
        dataclasses.replace(GPT2, mlp=Gelu(width=101, approximate=False), norm=LayerNorm(epsilon=0.1)),
        37,
        {},
    ),
    "gpt2-data2-model2-zero3": (EVEN, 37, {"mesh": (1, 2, 2), "zero": 3}),
    "gpt2-replica2-data2-model2-sequence-parallel": (EVEN, 36, {"mesh": (2, 2, 2), "sequence_parallel": True}),
    "gpt2-data2-model2-zero1-compiled": (EVEN, 37, {"mesh": (1, 2, 2), "zero": 1, "partition": Compiled()}),
    "llama": (LLAMA, 37, {}),
    "llama3": (LLAMA3, 37, {}),
    "llama3-tied-biased-large-epsilon": (
        dataclasses.replace(LLAMA3, bias=True, tied_head=True, norm=RMSNorm(epsilon=0.1)),
        37,
        {},
    ),
    "llama-data2-model2-zero2": (LLAMA, 37, {"mesh": (1, 2, 2), "zero": 2}),
    "llama3-data2-model2-zero3-sequence-parallel": (
        LLAMA3,
        36,
        {"mesh": (1, 2, 2), "zero": 3, "sequence_parallel": True},
    ),
    "llama3-replica2-model2-compiled": (LLAMA3, 37, {"mesh": (2, 1, 2), "partition": Compiled()}),
}


@pytest.fixture(scope="module")
def oracle():
    """`parity_weights`, imported only where its tests run: it takes seconds."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"no {package}: pip install -e '.[parity]'")
    import parity_weights

    return parity_weights


def program(config: Transformer, documents: bool = False, **kw) -> Program:
    return toys.program(config, loss=CrossEntropy(chunk_tokens=16), documents=documents, **kw)


def batch(time: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of one document each. Their last target is ignored, as transformers has none there."""
    arrays = toys.batch(sequences=8, time=time, vocab=GPT2.vocab_size, seed=seed)
    arrays["segments"] = np.ones_like(arrays["segments"])
    arrays["positions"] = np.broadcast_to(np.arange(time, dtype=np.int32), arrays["positions"].shape).copy()
    arrays["weights"][:, -1] = 0.0
    return arrays


def logits(p: Program, params: dict, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Logits_BTV over the tokens that exist."""
    at = p.sharding(jax.P(*p.batch_spec[1:]))
    placed = Batch(**{name: jax.device_put(x, at) for name, x in arrays.items()})
    with jax.set_mesh(p.mesh):
        found = jax.jit(p.logits)(toys.state_of(p, params), placed)
    assert found.shape[-1] == p.model.config.padded_vocab
    return np.asarray(found)[..., : p.model.config.vocab_size]


def host(params: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(params).items()}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, oracle) -> None:
    config, time, how = CASES[case]
    model, arrays = oracle.random(config), batch(time)
    wanted = oracle.logits(model, arrays["tokens"])
    assert np.std(wanted) > 0.5  # else an absolute bound says little
    found = logits(program(config, **how), oracle.weights(config, model), arrays)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=BOUND)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, oracle) -> None:
    config, time, how = CASES[case]
    model, arrays = oracle.random(config), batch(time)
    wanted, wanted_loss = oracle.gradients(config, model, arrays)
    params, microbatches = oracle.weights(config, model), 2 if how else 1
    found, (_, nll, labels) = toys.gradients(program(config, **how), params, arrays, microbatches)
    np.testing.assert_allclose(nll / labels, wanted_loss, rtol=GRADIENTS)
    toys.check_close(found, wanted, GRADIENTS)


@pytest.mark.parametrize("config", [GPT2, LLAMA3], ids=["gpt2", "llama3"])
def test_documents_packed_in_a_row_are_as_alone(config: Transformer, oracle) -> None:
    model, arrays = oracle.random(config), toys.batch(sequences=4, time=37, vocab=config.vocab_size)
    found = logits(program(config, documents=True), oracle.weights(config, model), arrays)
    for tokens, segments, row in zip(arrays["tokens"], arrays["segments"], found, strict=True):
        for document in np.unique(segments):
            alone = oracle.logits(model, tokens[None, segments == document])[0]
            np.testing.assert_allclose(row[segments == document], alone, rtol=0, atol=BOUND)


@pytest.mark.parametrize("positions", [LLAMA.positions, LLAMA3.positions, Rotary(theta=5e5, scaling=Llama3Scaling())])
def test_rotary_frequencies(positions: Rotary, oracle) -> None:
    config = dataclasses.replace(
        LLAMA, attention=AttentionConfig(heads=2, kv_heads=1, head_size=128), positions=positions
    )
    wanted = oracle.fresh(config).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(positions.frequencies(128), wanted, rtol=1e-5)


CLIP_NORM = 1.0
ADAMW = AdamW(
    schedule=Cosine(peak_lr=1e-2, warmup=Steps(count=4), end=Steps(count=20), final_share=0.1),
    weight_decay=0.1,
    clip_norm=CLIP_NORM,
)


@functools.cache
def trained_by_torch(oracle, config: Transformer) -> tuple[dict, dict, list[dict[str, float]]]:
    """(first weights, last weights, a row per step)."""
    model = oracle.random(config)
    before = oracle.weights(config, model)
    rows = oracle.train(model, ADAMW, [batch(37, seed) for seed in range(20)])
    return before, oracle.weights(config, model), rows


def trained_by_us(p: Program, params: dict, microbatches: int) -> tuple[dict, list[dict[str, float]]]:
    state, step, rows = toys.state_of(p, params), p.compile_train_step(), []
    with jax.set_mesh(p.mesh):
        for seed in range(20):
            state, metrics = step(state, toys.place(p, batch(37, seed), microbatches), np.int32(microbatches))
            rows.append(jax.device_get(metrics))
    return state.params, rows


def with_gradients(config: Transformer, params: dict) -> dict[str, np.ndarray]:
    """Without what has no gradient, which AdamW moves by its rounding: padding tokens, and biases on keys, which
    move a query's scores alike."""
    flat = host(params)
    flat["ends/token_VD"] = flat["ends/token_VD"][: config.vocab_size]
    flat["stacks/main/block/attention/bias_KGH"] = np.delete(flat["stacks/main/block/attention/bias_KGH"], -2, axis=2)
    return flat


@pytest.mark.parametrize(
    ("config", "microbatches", "how"),
    [(GPT2, 1, {}), (EVEN, 2, {"mesh": (1, 2, 2), "zero": 3})],
    ids=["one-device", "data2-model2-zero3"],
)
def test_twenty_adamw_steps(config: Transformer, microbatches: int, how: dict[str, Any], oracle) -> None:
    before, wanted, wanted_rows = trained_by_torch(oracle, config)
    p = program(config, optimizer=ADAMW, steps=20, **how)
    found, rows = trained_by_us(p, before, microbatches)

    assert any(row["train/grad_norm"] > CLIP_NORM for row in wanted_rows)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for name, value in wanted_row.items():
            np.testing.assert_allclose(row[name], value, rtol=GRADIENTS, err_msg=name)
    before, found, wanted = (with_gradients(config, params) for params in (before, found, wanted))
    toys.check_close(found, wanted, BOUND)
    found, wanted = ({name: x - before[name] for name, x in params.items()} for params in (found, wanted))
    toys.check_close(found, wanted, BOUND)  # of the way that they went: 3 to 23 % of where they began


GPT2_LARGER = Transformer(
    vocab_size=1024,
    layers=4,
    width=192,
    attention=AttentionConfig(heads=6),
    mlp=Gelu(width=768),
    positions=Learned(length=256),
)
LLAMA_LARGER = dataclasses.replace(
    LLAMA, vocab_size=1024, layers=4, width=192, attention=AttentionConfig(heads=6, kv_heads=2), mlp=SwiGLU(width=512)
)


@pytest.mark.parametrize("config", [GPT2_LARGER, LLAMA_LARGER], ids=["gpt2", "llama"])
def test_initial_weights(config: Transformer, oracle) -> None:
    """Both draw from one normal distribution, layer by layer: moments within five standard errors."""
    found = host(Model(config).init(jax.random.key(0)))
    wanted = host(oracle.weights(config, oracle.fresh(config)))
    assert found.keys() == wanted.keys()
    for name, wanted_value in wanted.items():
        stacked = name.startswith("stacks/")
        pairs = zip(found[name], wanted_value, strict=True) if stacked else [(found[name], wanted_value)]
        for x, y in pairs:
            assert x.shape == y.shape, name
            if np.std(y) == 0:
                np.testing.assert_array_equal(x, y, err_msg=name)
                continue
            n, std = y.size, np.std(y)
            assert abs(np.std(x) / std - 1) < 5 / math.sqrt(n), f"{name}: std {np.std(x)}, transformers has {std}"
            assert abs(np.mean(x)) < 5 * std / math.sqrt(n), name
            assert abs(np.mean((x / np.std(x)) ** 4) - 3) < 5 * math.sqrt(24 / n), f"{name} is not normal"
