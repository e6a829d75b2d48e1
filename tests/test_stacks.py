"""Models of several kinds of layer. Their gradients and tokens on every mesh: test_equality.py and test_decode.py."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toys

from mtx import config as configs
from mtx import metrics
from mtx.attention import AttentionConfig
from mtx.checkpoint import Checkpoints, Store, digests, named
from mtx.errors import ConfigError
from mtx.layers import Gelu
from mtx.model import Model, flatten
from mtx.optim import AdamW
from mtx.stacks import Block, Stack

TWINS = (Stack(name="main", count=2, pattern=(Block(name="even"), Block(name="odd"))), Stack(name="last", count=1))
UNIFORM = dataclasses.replace(toys.dropped(toys.LLAMA, 0.2), layers=5)


def in_order(stacks: dict) -> dict[str, np.ndarray]:
    """Arrays of `TWINS`' layers as those of one uniform stack."""
    even, odd, last = (flatten(stacks[s][b]) for s, b in (("main", "even"), ("main", "odd"), ("last", "block")))
    return {name: np.stack([even[name][0], odd[name][0], even[name][1], odd[name][1], last[name][0]]) for name in even}


def test_blocks_that_are_alike_are_a_uniform_model():
    """Initial weights, the order of layers, and dropout, which follows a layer's number."""
    alone, twins = (toys.program(model) for model in (UNIFORM, dataclasses.replace(UNIFORM, stacks=TWINS)))
    uniform, params = (jax.tree.map(np.asarray, p.init(3).params) for p in (alone, twins))
    wanted = flatten(uniform["stacks"]["main"]["block"])
    for name, x in in_order(params["stacks"]).items():
        np.testing.assert_array_equal(x, wanted[name], err_msg=name)
    found, sums = toys.gradients(twins, params, toys.batch(), 4)
    wanted, wanted_sums = toys.gradients(alone, uniform, toys.batch(), 4)
    np.testing.assert_allclose(sums, wanted_sums, rtol=1e-6)
    toys.check_close(in_order(found["stacks"]), wanted["stacks"]["main"]["block"], 1e-6)
    toys.check_close(found["ends"], wanted["ends"], 1e-6)


def test_a_block_says_its_own_parts_and_inherits_the_rest():
    own = {"attention": AttentionConfig(heads=8, window=3, sinks=True), "mlp": Gelu(width=96)}
    stacks = (Stack(name="main", count=2, pattern=(Block(**own),)),)
    plain = dataclasses.replace(toys.LLAMA, **own)
    params = toys.weights_of(plain)
    found, _ = toys.gradients(toys.program(dataclasses.replace(toys.LLAMA, stacks=stacks)), params, toys.batch())
    toys.check_close(found, toys.gradients(toys.program(plain), params, toys.batch())[0], 1e-6)


def test_the_program_does_not_grow_with_the_count():
    def lines(count: int) -> int:
        stack = dataclasses.replace(toys.ALTERNATING.stacks[0], count=count)
        model = dataclasses.replace(toys.ALTERNATING, layers=2 * count, stacks=(stack,))
        return len(toys.program(model, (1, 2, 1), zero=3).lower_train_step(2, 8, 8).as_text().splitlines())

    assert lines(2) == lines(9)


def test_remat_has_a_barrier_in_a_stack_of_one_repetition():
    """XLA unrolls a loop of one trip, and may merge what is computed again with what was computed first."""

    def barriers(*counts: int) -> int:
        stacks = tuple(dataclasses.replace(s, count=n) for s, n in zip(toys.WIDE_FIRST.stacks, counts, strict=True))
        model = dataclasses.replace(toys.WIDE_FIRST, layers=sum(counts), stacks=stacks, remat="full")
        return toys.program(model).lower_train_step(1, 8, 16).as_text().count("optimization_barrier")

    assert barriers(1, 1) > barriers(3, 1) > barriers(3, 2) == 0


def test_a_window_s_cache_is_a_ring():
    p = toys.program(toys.ALTERNATING)
    cache = jax.eval_shape(lambda: p.model.cache(3, 16, p.doors()))
    assert {name: x.k_LBSKH.shape for name, x in cache["main"].items()} == {
        "local": (2, 3, 5, 8, 2),
        "full": (2, 3, 16, 8, 2),
    }
    cache = jax.eval_shape(lambda: p.model.cache(3, 4, p.doors()))
    assert {x.v_LBSKH.shape for x in cache["main"].values()} == {(2, 3, 4, 8, 2)}


def test_flops_are_summed_over_kinds():
    model, T, D = toys.WIDE_FIRST, 16, 32
    layer = [4 * D * 8 * 4 + 2 * D * 128] * 3 + [4 * D * 8 * 6 + 2 * D * 64]
    attention = 3 * 8 * 4 + 8 * 6
    wanted = 6 * (sum(layer) + model.padded_vocab * D) + 12 * T * attention
    assert metrics.flops_per_token(Model(model), T) == wanted
    assert metrics.flops_per_token(Model(toys.ALTERNATING), T) == metrics.flops_per_token(
        Model(dataclasses.replace(toys.ALTERNATING, stacks=None)), T
    )


@pytest.mark.parametrize("model", [toys.ALTERNATING, toys.WIDE_FIRST], ids=["alternating", "wide"])
def test_saved_on_one_mesh_and_gone_on_with_on_another(tmp_path: Path, model):
    meshes = {"saved": ((1, 4, 2), {"zero": 3}), "restored": ((2, 2, 1), {"zero": 1}), "whole": ((1, 1, 1), {})}
    programs = {name: toys.program(model, mesh, optimizer=AdamW(), **kw) for name, (mesh, kw) in meshes.items()}
    p, store = programs["saved"], Store(tmp_path, Checkpoints())
    state = p.init(5)
    store.save(p.ordered(state), 0, {})
    store.close()
    names = store.at(0).manifest.arrays
    block = f"{model.stacks[0].name}/{model.stacks[0].pattern[0].name}"
    assert names[f"params/stacks/{block}/attention/out_NHD"].shape[0] == model.stacks[0].count
    saved, after = digests(named(state))[0], {}
    for name, p in programs.items():
        restored = p.placed(store.restore(store.newest(), p.abstract_ordered()))
        assert digests(named(restored))[0] == saved
        with jax.set_mesh(p.mesh):
            stepped, _ = p.compile_train_step()(restored, toys.place(p, toys.batch(), 1), jnp.int32(1))
        after[name] = jax.tree.map(np.asarray, stepped.parts["moments"])
    for name in ("saved", "restored"):
        for x, y in zip(jax.tree.leaves(after[name]), jax.tree.leaves(after["whole"]), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5 * max(np.abs(y).max(), 1e-6))


# Configs

CONFIG = """
from dataclasses import replace

from configs.quickstart import get_config as quickstart
from mtx.layers import SwiGLU
from mtx.stacks import Block, Stack


def get_config():
    config = quickstart()
    model = replace(config.model, width=32, mlp=SwiGLU(width=64))
    local = Block(name="local", attention=replace(model.attention, window=8))
    stacks = {stacks}
    return replace(config, model=replace(model, layers=4, stacks=stacks))
"""
STACKS = {
    "alternating": '(Stack(name="main", count=2, pattern=(local, Block(name="full"))),)',
    "wide": '(Stack(name="first", count=3, pattern=(Block(mlp=SwiGLU(width=96)),)), Stack(name="rest", count=1))',
}


def config_file(folder: Path, model: str) -> str:
    path = folder / f"{model}.py"
    path.write_text(CONFIG.replace("{stacks}", STACKS[model]))
    return str(path)


@pytest.mark.parametrize("model", STACKS)
def test_a_config_trains_goes_on_elsewhere_and_generates(model: str, tmp_path: Path):
    words = ["--config", config_file(tmp_path, model), *runs.book(), "model.layers=4", "log_every=1"]
    words += ["eval_every=0", "eval_sequences=8"]
    said = runs.train(tmp_path / "run", *words, "--devices", "4", "mesh.data=2", "mesh.model=2", "steps=3")
    text = {"alternating": "main 2 x (local, full)", "wide": "first 3 x (block), rest 1 x (block)"}[model]
    assert f"4 layers of width 32: {text}" in said
    kinds = {"alternating": ("main/local", "main/full"), "wide": ("first/block", "rest/block")}[model]
    for kind in kinds:
        assert len(re.findall(f"attention of {kind}: plain, ", said)) == 1
    assert len(re.findall(r"main/local: plain, Window\(before=7", said)) == (model == "alternating")
    said = runs.train(tmp_path / "run", *words, "--devices", "2", "mesh.data=2", "layout.zero=3", "steps=6")
    assert re.search(r"resumed     step 3, [\d,]+ tokens \(saved on data=2 x model=2\)", said)
    losses = [row["train/loss"] for row in runs.rows(tmp_path / "run") if "train/loss" in row]
    assert losses[-1] < losses[0]
    (answer,) = runs.ask([["generate", str(tmp_path / "run"), "--prompt", "Line 3", "--tokens", "20"]])
    assert answer.code == 0, answer.err


def refused(words: list[str], devices: int | None = None, **model) -> str:
    config = configs.load("configs/quickstart.py", words).config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    with pytest.raises(ConfigError) as error:
        configs.check(config, devices)
    return str(error.value)


LOCAL = Block(name="local", attention=AttentionConfig(heads=6))
TWO = (Stack(name="main", count=2, pattern=(Block(name="local"), Block(name="full"))),)


@pytest.mark.parametrize(
    ("words", "devices", "stacks", "wanted"),
    [
        ([], None, (), "model.stacks=() holds no stack; None means layers that are all alike."),
        ([], None, (Stack(name="a", count=3),), "model.layers=4 must be 3, the layers of all stacks."),
        ([], None, (Stack(name="a", count=2), Stack(name="a", count=2)), "names two stacks 'a'; give each"),
        ([], None, (Stack(name="a", count=2, pattern=(Block(), Block())),), "names two blocks 'block'; give each"),
        ([], None, (Stack(name="A/b", count=4),), "model.stacks[0].name=A/b must be lower-case letters, digits and _"),
        ([], None, (Stack(name="a", count=0),), "model.stacks[0].count=0 must be at least 1."),
        ([], None, (Stack(name="a", count=4, pattern=()),), "model.stacks[0].pattern=() holds no block"),
        (
            [],
            None,
            (Stack(name="a", count=4, pattern=(LOCAL,)),),
            "model.stacks[0].pattern[0].attention.heads=6 does not divide width=128; try 4 or 8",
        ),
        (["model.unroll=4"], None, TWO, "model.unroll=4 must divide the 2 repetitions of stack 'main'."),
        (
            ["mesh.data=1", "mesh.pipeline=2", "batch.micro_size=1"],
            2,
            TWO,
            "mesh.pipeline=2 places layers of one kind, and model.stacks has 2 (main/local, main/full); try "
            "mesh.pipeline=1.",
        ),
        (
            ["mesh.data=1", "mesh.model=8"],
            8,
            (Stack(name="a", count=3), Stack(name="b", count=1, pattern=(Block(mlp=Gelu(width=100)),))),
            "model.stacks[1].pattern[0].mlp.width=100 does not divide over mesh.model=8",
        ),
        (
            [],
            None,
            (
                Stack(
                    name="a", count=4, pattern=(Block(attention=AttentionConfig(heads=8, sinks=True, backend="cudnn")),)
                ),
            ),
            "model.stacks[0].pattern[0].attention.backend=cudnn cannot do this",
        ),
    ],
)
def test_what_is_wrong_is_said_by_its_place(words: list[str], devices: int | None, stacks: tuple, wanted: str):
    said = refused(words, devices, stacks=stacks)
    assert wanted in said


def test_a_config_with_stacks_is_read_back_as_it_was_written():
    config = configs.load("configs/quickstart.py", []).config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, stacks=TWO))
    assert configs.read_dump(configs.dump(config)) == config
    narrower = dataclasses.replace(TWO[0], pattern=(LOCAL, TWO[0].pattern[1]))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, stacks=(narrower,)))
    path, *_ = next(iter(configs.differences(config, other)))
    assert path == "model.stacks[0].pattern[0].attention"
