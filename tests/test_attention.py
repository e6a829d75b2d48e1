"""Which backend runs, and what is refused."""

import dataclasses

import aot
import jax.numpy as jnp
import pytest
import toys

from mtx.attention import AttentionConfig, _say_once, choose
from mtx.errors import ConfigError
from pallas_kernels.masks import Mask

CAUSAL, DOCUMENTS = Mask(causal=True), Mask(causal=True, documents=True)


@pytest.mark.parametrize(
    ("platform", "dtype", "head", "mask", "dropout", "manual", "wanted"),
    [
        ("cpu", "float32", 64, CAUSAL, 0.0, True, "plain"),
        ("gpu", "bfloat16", 64, CAUSAL, 0.0, True, "cudnn"),
        ("gpu", "bfloat16", 64, CAUSAL, 0.0, False, "plain"),
        ("gpu", "float32", 64, CAUSAL, 0.0, True, "plain"),
        ("gpu", "bfloat16", 64, DOCUMENTS, 0.0, True, "plain"),
        ("gpu", "bfloat16", 64, CAUSAL, 0.1, True, "plain"),
        ("tpu", "bfloat16", 128, CAUSAL, 0.0, True, "splash"),
        ("tpu", "bfloat16", 128, CAUSAL, 0.0, False, "plain"),
        ("tpu", "bfloat16", 64, CAUSAL, 0.0, True, "plain"),
        ("tpu", "bfloat16", 128, DOCUMENTS, 0.0, True, "plain"),
    ],
)
def test_the_first_able_backend_is_taken(platform, dtype, head, mask, dropout, manual, wanted):
    assert choose("auto", platform, dtype, head, 256, mask, dropout, manual) == wanted


@pytest.mark.parametrize(
    ("backend", "platform", "mask", "dropout", "why"),
    [
        ("cudnn", "cpu", CAUSAL, 0.0, "NVIDIA GPU"),
        ("cudnn", "gpu", DOCUMENTS, 0.0, "document borders"),
        ("cudnn", "gpu", CAUSAL, 0.1, "no dropout"),
        ("splash", "gpu", CAUSAL, 0.0, "TPU"),
        ("splash", "tpu", DOCUMENTS, 0.0, "document borders"),
    ],
)
def test_a_demanded_backend_refuses_what_it_cannot_do(backend, platform, mask, dropout, why):
    with pytest.raises(ConfigError, match=rf"model.attention.backend={backend} cannot do this: .*{why}.*plain"):
        choose(backend, platform, "bfloat16", 128, 256, mask, dropout, True)


def test_plain_attention_is_said_loudly_on_accelerators(caplog: pytest.LogCaptureFixture):
    choose.cache_clear()
    _say_once.cache_clear()
    with caplog.at_level("INFO", "mtx"):
        choose("auto", "gpu", "bfloat16", 64, 128, DOCUMENTS, 0.0, True)
        choose("auto", "gpu", "bfloat16", 64, 128, DOCUMENTS, 0.0, True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        "plain XLA (not cudnn: it does not see document borders (data.isolate_documents=false has none); not"
        in record.message
    )


@pytest.mark.aot
@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 2, 4)], ids=str)
def test_splash_compiles_in_the_train_step_for_a_tpu(mesh: tuple[int, int, int]):
    """Forward and backward, under remat, with grouped keys, on the chips that are not here."""
    attention = AttentionConfig(heads=8, kv_heads=4, head_size=128, backend="splash")
    model = dataclasses.replace(toys.LLAMA, attention=attention, width=256, remat="full")
    chips = aot.tpu_devices("v5e:2x4")
    p = toys.program(model, mesh, zero=1, documents=False, compute=jnp.bfloat16, devices=chips)
    text = p.lower_train_step(2, 8, 256).compile().as_text()
    assert text.count("tpu_custom_call") >= 2
