"""What the model must not see, and what a config must give."""

import dataclasses

import jax
import numpy as np
import pytest
import toys

from mtx.model import Batch, Model, flatten


def logits(p, arrays) -> np.ndarray:
    params = toys.weights_of(p.model.config)
    batch = jax.tree.map(lambda x: x[0], toys.place(p, arrays, 1))
    with jax.set_mesh(p.mesh):
        return np.asarray(p.logits(toys.state_of(p, params), batch))


def row(tokens: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.arange(len(tokens)) - np.searchsorted(segments, segments)
    ones = np.ones(len(tokens), np.float32)
    arrays = dict(zip(Batch._fields[:5], (tokens, tokens, ones, segments, positions), strict=True))
    return {name: x[None].astype(x.dtype if x.dtype == np.float32 else np.int32) for name, x in arrays.items()}


@pytest.mark.parametrize("model", [toys.GPT, toys.LLAMA], ids=["gpt", "llama"])
def test_documents_do_not_see_each_other_nor_the_future(model):
    p, random = toys.program(model), np.random.default_rng(0)
    tokens, segments = random.integers(0, 250, 16), np.repeat([1, 2, 3], [5, 7, 4])
    before = logits(p, row(tokens, segments))
    changed = tokens.copy()
    changed[:5] += 1
    changed[11:] += 1
    after = logits(p, row(changed % 250, segments))
    np.testing.assert_array_equal(before[0, 5:11], after[0, 5:11])
    assert not np.array_equal(before[0, :5], after[0, :5])
    assert not np.array_equal(before[0, 11], after[0, 11])


def test_documents_may_see_each_other_when_asked():
    p, random = toys.program(toys.LLAMA, documents=False), np.random.default_rng(0)
    tokens, segments = random.integers(0, 250, 16), np.repeat([1, 2], 8)
    changed = tokens.copy()
    changed[0] += 1
    assert not np.array_equal(logits(p, row(tokens, segments))[0, 8:], logits(p, row(changed, segments))[0, 8:])


def test_an_encoder_sees_both_ways():
    p = toys.program(dataclasses.replace(toys.GPT, causal=False), documents=False)
    tokens, segments = np.arange(16), np.ones(16, int)
    changed = tokens.copy()
    changed[-1] = 99
    assert not np.array_equal(logits(p, row(tokens, segments))[0, 0], logits(p, row(changed, segments))[0, 0])


@pytest.fixture(scope="module")
def dropped() -> tuple[dict, np.ndarray]:
    """Gradients and sums with dropout."""
    return toys.gradients(toys.program(toys.dropped(toys.GPT, 0.1)), toys.weights_of(toys.GPT), toys.batch())


@pytest.mark.parametrize("change", [{"remat": "selective"}, {"remat": "full"}, {"unroll": 2}], ids=str)
def test_remat_and_unroll_change_nothing(change: dict, dropped: tuple[dict, np.ndarray]):
    wanted, sums = dropped
    model = dataclasses.replace(toys.dropped(toys.GPT, 0.1), **change)
    for mesh, kw in (((1, 1, 1), {}), ((1, 4, 2), {"zero": 3, "sequence_parallel": True})):
        found, found_sums = toys.gradients(toys.program(model, mesh, **kw), toys.weights_of(toys.GPT), toys.batch())
        np.testing.assert_allclose(found_sums, sums, rtol=1e-5)
        toys.check_close(found, wanted, 1e-5)


def test_dropout_drops_the_share_that_it_says_and_differs_by_sample_and_layer():
    from pallas_kernels.threefry import keep_mask, threefry2x32

    sample = np.arange(64, dtype=np.uint32)[:, None, None]
    key = threefry2x32((np.uint32(1), np.uint32(2)), (sample, np.uint32(0)))
    keep = np.asarray(keep_mask(0.25, key, (np.arange(32, dtype=np.uint32)[:, None], np.arange(64, dtype=np.uint32))))
    assert keep.mean() == pytest.approx(0.75, abs=0.005)
    assert len({row.tobytes() for row in keep}) == 64


def test_threefry_is_the_published_function():
    """Test vectors of Random123, and both forms that platforms take."""
    from pallas_kernels import threefry

    ones = np.uint32(0xFFFFFFFF)
    vectors = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, wanted in vectors:
        words = [np.asarray(x, np.uint32) for x in (*key, *counter)]
        found = jax.jit(threefry.threefry2x32)(tuple(words[:2]), tuple(words[2:]))
        assert tuple(int(x) for x in found) == wanted
        start = (words[2] + words[0], words[3] + words[1], *words[:2], words[0] ^ words[1] ^ threefry._PARITY)
        with np.errstate(over="ignore"):
            assert tuple(int(x) for x in jax.jit(threefry._unrolled)(*start)) == wanted


def test_a_published_model_has_its_published_size():
    from mtx import config

    for name, wanted in (("gpt2_124m", 124_439_808), ("llama3_8b", 8_030_261_248)):
        model = config.load(f"configs/{name}.py", []).config.model
        weights = flatten(Model(dataclasses.replace(model, vocab_multiple=1)).weights)
        assert sum(int(np.prod(w.shape)) for w in weights.values()) == wanted
