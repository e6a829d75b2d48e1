"""Decoding with a cache: the tokens of whole forward passes, on every mesh; what may be sampled, and how often."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_equality
import toys

from mtx import decode
from mtx.decode import Sampling
from mtx.errors import ConfigError
from mtx.model import Batch
from mtx.spmd import Compiled, Manual
from mtx.step import Program

MODELS = {
    "gpt": toys.GPT,
    "llama": toys.LLAMA,
    "odd": toys.ODD,
    "alternating": toys.ALTERNATING,
    "wide": toys.WIDE_FIRST,
}
GREEDY = Sampling(temperature=0.0)
WILD = Sampling(temperature=1.0, top_k=40, top_p=0.95)
LENGTHS = (1, 5, 3, 8, 2)
PROMPTS = [np.random.default_rng(n).integers(0, 250, n).tolist() for n in LENGTHS]
TOKENS = 7
TABLE = 16


@functools.cache
def weights(model: str) -> dict:
    """Large ones, so that every token says something else and none is nearly as probable as another."""
    return jax.tree.map(lambda x: x * (8 if x.ndim > 2 else 1), toys.weights_of(MODELS[model]))


def placed(p: Program, params: dict) -> dict:
    return jax.tree.map(jax.device_put, params, p.shardings("weights"))


def generate(p: Program, model: str, prompts: Sequence[Sequence[int]] = PROMPTS, **kw) -> list[list[int]]:
    return decode.generate(p, placed(p, weights(model)), prompts, **{"tokens": TOKENS, **kw})


@functools.cache
def on_one_device(model: str, sampling: Sampling) -> list[list[int]]:
    return generate(toys.program(MODELS[model]), model, sampling=sampling)


# The cache


def rows_of(tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    ones = np.ones(tokens_BT.shape, np.float32)
    arrays = dict(zip(Batch._fields[:5], (tokens_BT, tokens_BT, ones, ones, positions), strict=True))
    return {name: x.astype(np.float32 if name == "weights" else np.int32) for name, x in arrays.items()}


def whole_logits(p: Program, model: str, tokens_BT: np.ndarray) -> np.ndarray:
    """Without a cache: one forward pass of the model that is trained."""
    batch = jax.tree.map(lambda x: x[0], toys.place(p, rows_of(tokens_BT), 1))
    with jax.set_mesh(p.mesh):
        return np.asarray(jax.jit(p.logits)(toys.state_of(p, weights(model)), batch))


@pytest.mark.parametrize("documents", [True, False], ids=["isolated", "joined"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_a_whole_forward_pass(model: str, documents: bool):
    """Rows of unequal prompts, so that slots are not positions."""
    p = toys.program(MODELS[model], documents=documents)
    tokens_BT = np.random.default_rng(0).integers(0, 250, (len(LENGTHS), TABLE))
    wanted_BTV = whole_logits(p, model, tokens_BT)
    prompts = [row[:length].tolist() for row, length in zip(tokens_BT, LENGTHS, strict=True)]
    arranged = decode.Prompts(*decode._arrange(prompts, 1))
    filled, steps, doors = arranged.tokens_BT.shape[1], TABLE - max(LENGTHS), p.doors()

    @jax.jit
    def run(params: dict) -> list[jax.Array]:
        cache, found = p.model.cache(len(arranged.last_B), filled + steps, doors), []
        cache = decode._prefill(p, params, arranged, cache, filled + steps, doors)
        for step in range(steps + 1):
            at_B = np.array([min(length - 1 + step, TABLE - 1) for length in LENGTHS] + [0] * 3)
            token_B1 = np.pad(tokens_BT, ((0, 3), (0, 0)))[np.arange(8), at_B][:, None]
            slots = functools.partial(decode._next_slots, arranged.length_B, filled, step, steps, doors)
            h_BTD, cache = p.model.cached(params, token_B1, at_B[:, None], slots, cache, doors)
            found.append(decode._next_logits(p, params, h_BTD, doors))
        return found

    with jax.set_mesh(p.mesh):
        found = np.stack(run(placed(p, weights(model))))
    for row, length in enumerate(LENGTHS):
        wanted = wanted_BTV[row, length - 1 : length - 1 + steps]
        np.testing.assert_allclose(found[:steps, row], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_whole_forward_passes(model: str):
    p, found = toys.program(MODELS[model]), on_one_device(model, GREEDY)
    assert len({token for row in found for token in row}) > 10, "the test sees little if all tokens are alike"
    tokens_BT = np.zeros((len(PROMPTS), TABLE), int)
    for row, prompt in enumerate(PROMPTS):
        tokens_BT[row, : len(prompt)] = prompt
    for step in range(TOKENS):
        logits_BTV = whole_logits(p, model, tokens_BT)[..., :250]
        for row, length in enumerate(LENGTHS):
            tokens_BT[row, length + step] = np.argmax(logits_BTV[row, length + step - 1])
    assert found == [row[n : n + TOKENS].tolist() for row, n in zip(tokens_BT, LENGTHS, strict=True)]


@pytest.mark.parametrize("partition", [Manual(), Compiled()], ids=["manual", "compiled"])
def test_the_cache_is_split_and_in_the_compute_dtype(partition: Manual | Compiled):
    p = toys.program(toys.LLAMA, (2, 1, 4), partition=partition, compute=jnp.bfloat16, zero=0)
    rows, filled, most = 16, 8, 32
    with jax.set_mesh(p.mesh):
        prompts = decode.Prompts(*(decode._put(p, x) for x in decode._arrange([[1] * filled] * rows, 2)))
        call = decode.compiled(p, GREEDY, most, 250)
        lowered = call.lower(p.abstract_state().params, prompts, np.int32(most), np.uint32(0), np.int32(-1))
        text = lowered.compile().as_text()
    L, K, H = 2, 8, 2
    assert f"bf16[{L},{rows // 2},{filled + most},{K // 4},{H}]" in text
    for whole in ((rows, K), (rows // 2, K), (rows, K // 4)):
        assert f"[{L},{whole[0]},{filled + most},{whole[1]},{H}]" not in text


# Meshes


class Case(NamedTuple):
    model: str
    mesh: tuple[int, int, int]
    zero: int
    sequence_parallel: bool
    compiled: bool
    documents: bool

    def __str__(self) -> str:
        replica, data, tensor = self.mesh
        words = [self.model, f"r{replica}d{data}m{tensor}", f"zero{self.zero}"]
        return "-".join(words + [word for word in Case._fields[3:] if getattr(self, word)])

    def program(self) -> Program:
        partition = Compiled() if self.compiled else Manual()
        rest = self._asdict()
        model, mesh = MODELS[rest.pop("model")], rest.pop("mesh")
        return toys.program(model, mesh, partition=partition, **{k: v for k, v in rest.items() if k != "compiled"})


FACTORS = (MODELS, toys.MESHES, range(4), *[(False, True)] * 3)
MATRIX = [
    case
    for case in itertools.starmap(Case, itertools.product(*FACTORS))
    if (case.mesh[1] > 1 or not case.zero) and (case.mesh[2] > 1 or not case.sequence_parallel)
]
PAIRS = test_equality.pairwise(MATRIX)


def one_for_each_mesh() -> list[Case]:
    """Each with as many pairs of values as can be that those before it lack; the training matrix has all."""
    seen, chosen = set(), []
    for mesh in toys.MESHES:
        pairs = {case: {*itertools.combinations(enumerate(case), 2)} for case in PAIRS if case.mesh == mesh}
        chosen.append(max(pairs, key=lambda case: len(pairs[case] - seen)))
        seen |= pairs[chosen[-1]]
    return chosen


DEFAULT = one_for_each_mesh()


def check(case: Case, sampling: Sampling) -> None:
    assert generate(case.program(), case.model, sampling=sampling) == on_one_device(case.model, sampling)


@pytest.mark.parametrize(("case", "sampling"), list(zip(DEFAULT, [WILD, GREEDY] * 5, strict=True)), ids=str)
def test_every_mesh_makes_the_tokens_of_one_device(case: Case, sampling: Sampling):
    check(case, sampling)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_mesh_whole_matrix(case: Case, sampling: Sampling):
    check(case, sampling)


def test_the_matrix_is_whole():
    assert len(MATRIX) == 860
    assert {case.mesh for case in DEFAULT} == set(toys.MESHES)


# Prompts and seeds


def test_unequal_prompts_are_each_as_alone():
    p = toys.program(toys.LLAMA)
    assert on_one_device("llama", GREEDY) == [generate(p, "llama", [prompt], sampling=GREEDY)[0] for prompt in PROMPTS]


def test_samples_depend_on_seed_number_and_position_alone():
    p = toys.program(toys.LLAMA)
    found = on_one_device("llama", WILD)
    assert generate(p, "llama", sampling=WILD) == found
    assert generate(p, "llama", sampling=WILD, seed=1) != found
    others = [[3] * 4, PROMPTS[1], [9] * 8, [1, 2]]
    assert generate(p, "llama", others, sampling=WILD)[1] == found[1]
    assert generate(p, "llama", sampling=WILD, tokens=3) == [row[:3] for row in found]
    twins = generate(p, "llama", [[5]] * 8, sampling=WILD)
    assert len(set(map(tuple, twins))) == 8, "prompts of one call are sampled independently"
    # What came before the prompt's end does not matter if the position is the same: the noise goes on where it was.
    assert generate(p, "llama", [PROMPTS[0] + found[0][:4]], sampling=WILD, tokens=3)[0] == found[0][4:]


def test_one_token_to_choose_from_is_the_greedy_one():
    p = toys.program(toys.LLAMA)
    for sampling in (Sampling(temperature=3.0, top_k=1), Sampling(temperature=3.0, top_p=1e-6)):
        assert generate(p, "llama", sampling=sampling, seed=4) == on_one_device("llama", GREEDY)


def test_no_prompts_no_tokens():
    assert generate(toys.program(toys.LLAMA), "llama", []) == []


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2), (1, 2, 2)], ids=str)
def test_stop(mesh: tuple[int, int, int]):
    """It is not part of the text, the other rows go on, and no step follows the last row's stop.

    Under ZeRO-3 a rank whose rows are done must go on gathering weights for the others: else this hangs.
    """
    p, free = toys.program(toys.LLAMA, mesh, zero=3 if mesh[1] > 1 else 0), on_one_device("llama", WILD)
    stop = free[1][2]
    assert stop not in free[1][:2]
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert [len(row) for row in cut].count(TOKENS) == len(free) - 1
    assert generate(p, "llama", sampling=WILD, stop=stop) == cut
    arrays = decode._arrange([PROMPTS[1]], mesh[0] * mesh[1])
    with jax.set_mesh(p.mesh):
        prompts = decode.Prompts(*(decode._put(p, x) for x in arrays))
        call = decode.compiled(p, GREEDY, 8, 250)
        greedy = on_one_device("llama", GREEDY)[1]
        stop_at = next(i for i in range(2, TOKENS) if greedy[i] not in greedy[:i])
        out = call(placed(p, weights("llama")), prompts, np.int32(8), np.uint32(0), np.int32(greedy[stop_at]))
    assert np.asarray(out)[0].tolist() == greedy[: stop_at + 1] + [0] * (7 - stop_at)


def test_compiled_once_for_sizes_that_share_a_power_of_two():
    p = toys.program(toys.LLAMA)
    generate(p, "llama", [[1] * 4, [2] * 9, [3]], tokens=5)
    call = decode.compiled(p, Sampling(), 8, 250)
    assert call._cache_size() == 1
    for lengths, tokens, seed in (((6, 6, 6), 8, 1), ((9, 2, 1, 1), 6, 2), ((8, 1, 7), 7, 3)):
        generate(p, "llama", [[1] * length for length in lengths], tokens=tokens, seed=seed, stop=seed)
    assert decode.compiled(p, Sampling(), 8, 250) is call
    assert call._cache_size() == 1
    generate(p, "llama", [[1] * 10], tokens=8)
    assert call._cache_size() == 2


# What is drawn


def draw(sampling: Sampling, logits_V: np.ndarray, count: int) -> np.ndarray:
    """`count` samples: numbers and positions both vary."""
    i = np.arange(count)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (count, len(logits_V)))
    call = jax.jit(functools.partial(decode.draw, sampling))
    return np.asarray(call(logits_BV, np.uint32(7), (i % 200).astype(np.uint32), (i // 200).astype(np.int32)))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_probabilities(temperature: float):
    p_V = np.array([0.5, 0.25, 0.15, 0.09, 0.01])
    count = 40_000
    tokens = draw(Sampling(temperature=temperature), np.log(p_V), count)
    wanted = p_V ** (1 / temperature) / np.sum(p_V ** (1 / temperature))
    found = np.bincount(tokens, minlength=5) / count
    assert np.all(np.abs(found - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / count)), (found, wanted)
    # Neighbours in number and in position are independent: pairs are as frequent as their product.
    for step in (1, 200):
        same = np.mean(tokens[step:] == tokens[:-step])
        expected = np.sum(wanted**2)
        assert abs(same - expected) < 4.5 * np.sqrt(expected / count) + 1e-3


def kept(logits_V: np.ndarray, top_k: int | None, top_p: float | None) -> set[int]:
    """The definition, in NumPy's float64, token by token."""
    order = list(np.argsort(-logits_V.astype(np.float64)))[: top_k or None]
    if top_p is None:
        return {int(token) for token in order}
    p = np.exp(logits_V[order].astype(np.float64))
    p /= p.sum()
    total, found = 0.0, set()
    for token, share in zip(order, p, strict=True):
        found.add(int(token))
        total += share
        if total >= top_p:
            break
    return found


@pytest.mark.parametrize("top_k", [None, 1, 5, 50, 99])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_k_and_top_p_keep_what_the_definition_keeps(top_k: int | None, top_p: float | None):
    logits_BV = np.random.default_rng(0).normal(0, 2, (20, 50)).astype(np.float32)
    found_BV = np.asarray(decode.keep(Sampling(top_k=top_k, top_p=top_p), jnp.asarray(logits_BV)))
    for found_V, logits_V in zip(found_BV, logits_BV, strict=True):
        stays = kept(logits_V, top_k, top_p)
        assert set(np.flatnonzero(found_V != decode.NEVER)) == stays
        np.testing.assert_array_equal(found_V[sorted(stays)], logits_V[sorted(stays)])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=50.0)], ids=["greedy", "hot"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_tokens_that_do_not_exist_are_never_made(sampling: Sampling, mesh: tuple[int, int, int]):
    """Although the padding of the table is made the most probable by far."""
    p = toys.program(dataclasses.replace(toys.LLAMA, vocab_size=6), mesh)
    params = toys.weights_of(p.model.config)
    head_VD = params["ends"]["head_VD"]
    head_VD[6:] = 1e4 * np.resize([1, -1], (len(head_VD) - 6, 1)) * np.abs(head_VD[6:])
    for size, known in ((None, 6), (3, 3), (7, 6)):
        kw = {"tokens": 20, "sampling": sampling, "vocab_size": size}
        rows = decode.generate(p, placed(p, params), [[1], [2, 5, 1], [0, 3]], **kw)
        assert {token for row in rows for token in row} <= set(range(known))
        assert [len(row) for row in rows] == [20] * 3


# What is refused


def test_what_cannot_be_done_is_refused():
    p = toys.program(toys.GPT)
    assert [len(row) for row in generate(p, "gpt", [[1] * 9], tokens=7)] == [7]
    with pytest.raises(ConfigError, match=r"length=16\); try at most 7 tokens"):
        generate(p, "gpt", [[1] * 9], tokens=8)
    with pytest.raises(ConfigError, match="try a prompt below 16 tokens"):
        generate(p, "gpt", [[1] * 16], tokens=1)
    with pytest.raises(ConfigError, match="tokens=0 must be at least 1"):
        generate(p, "gpt", tokens=0)
    with pytest.raises(ConfigError, match=r"model\.causal=false is an encoder"):
        generate(toys.program(dataclasses.replace(toys.GPT, causal=False)), "gpt")
    with pytest.raises(ConfigError, match=r"top_p=1.5 must be above 0 and at most 1"):
        generate(p, "gpt", sampling=Sampling(top_p=1.5))


@pytest.mark.parametrize(
    ("field", "value"),
    [*itertools.product(["temperature"], [-0.1, float("inf"), float("nan")]), ("top_k", 0), ("top_p", 0.0)],
)
def test_sampling_checks_itself(field: str, value: float):
    assert [name for name, _ in Sampling(**{field: value}).check()] == [field]
    assert not list(Sampling(temperature=0.0, top_k=1, top_p=1.0).check())
