"""Checkpoints: digests that no mesh changes, damage that no byte hides, what is kept, what does not fit."""

import dataclasses
import functools
import json
import operator
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx.checkpoint import Checkpoints, DigestError, Manifest, Store, digests, kept, named
from mtx.checkpoint import manifest as manifests
from mtx.checkpoint.digest import LANES, _digest
from mtx.errors import CheckpointError, NumericsError, StorageError
from mtx.optim import AdamW

# Digests


def digest_by_numpy(x: np.ndarray) -> str:
    """The definition once more, in 64-bit integers, for the whole array at once."""
    mask = np.uint64(0xFFFFFFFF)

    def mix(h: np.ndarray) -> np.ndarray:
        h = (h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
        h = (h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35) & mask
        return h ^ (h >> np.uint64(16))

    bits = x.view(f"u{x.dtype.itemsize}").astype(np.uint64)
    words = []
    for lane, (by_bits, by_index) in enumerate(LANES):
        place = np.full(x.shape, lane + 1, np.uint64)
        for d, index in enumerate(np.indices(x.shape)):
            place += mix((index.astype(np.uint64) * np.uint64(by_index) + np.uint64(d * 2 + lane + 1)) & mask)
        words.append(int(mix((bits * np.uint64(by_bits) & mask) ^ (place & mask)).sum()) % 2**32)
    return "".join(f"{word:08x}" for word in words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 6), (2, 3, 8), (5, 1, 2, 3)])
@pytest.mark.parametrize("block", [2**20, 16])
def test_digest_is_its_definition(dtype: str, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mtx.checkpoint.digest.BLOCK", block)
    _digest.cache_clear()
    x = np.asarray(jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype))
    assert digests({"x": jnp.asarray(x)}) == ({"x": digest_by_numpy(np.atleast_1d(x).reshape(x.shape))}, [])


SPECS = [jax.P(), jax.P("data"), jax.P(None, "model"), jax.P(("model", "data")), jax.P("model", "data")]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_digest_does_not_depend_on_the_mesh(spec: jax.P):
    x = np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32)
    wanted = digests({"x": jnp.asarray(x)})
    for mesh in (toys.program(toys.GPT, shape).mesh for shape in ((1, 4, 2), (2, 2, 2), (1, 8, 1))):
        assert digests({"x": jax.device_put(x, jax.NamedSharding(mesh, spec))}) == wanted


def test_digests_need_no_memory_of_the_arrays_size():
    x = jnp.zeros((64, 512, 1024))
    compiled = jax.jit(_digest(x.sharding)).lower(x).compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 0.2 * x.nbytes


def test_digest_sees_each_flipped_bit_and_each_swap():
    x = np.random.default_rng(2).standard_normal((8, 8)).astype(np.float32)
    seen = {digests({"x": jnp.asarray(x)})[0]["x"]}
    for bit in range(0, x.nbytes * 8, 7):
        flipped = x.copy()
        flipped.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        seen.add(digests({"x": jnp.asarray(flipped)})[0]["x"])
    seen |= {digests({"x": jnp.asarray(y)})[0]["x"] for y in (x[::-1].copy(), x.T.copy(), np.roll(x, 1, axis=1))}
    assert len(seen) == 1 + len(range(0, x.nbytes * 8, 7)) + 3


def test_one_bad_number_is_found_by_name():
    good = jnp.ones((4, 4))
    _, bad = digests({"good": good, "nan": good.at[1, 2].set(jnp.nan), "inf": good.at[3, 3].set(-jnp.inf)})
    assert sorted(bad) == ["inf", "nan"]


# What is kept


def test_what_is_kept():
    losses = {10: 3.0, 15: float("nan"), 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: None}
    assert kept(losses, Checkpoints(keep=1, keep_best=0)) == {60}
    assert kept(losses, Checkpoints(keep=2, keep_best=1)) == {60, 50, 20}
    assert kept(losses, Checkpoints(keep=2, keep_best=2)) == {60, 50, 20, 40}
    assert kept(losses, Checkpoints(keep=1, keep_best=0, keep_every_steps=30)) == {60, 30}


# Saving and restoring


def adam(model=toys.LLAMA, mesh=(1, 1, 1), **kw):
    return toys.program(model, mesh, optimizer=AdamW(), **kw)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder that holds steps 1 and 2, saved on eight devices, and the digests of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    p = adam(mesh=(2, 2, 2), zero=3)
    store = Store(folder, Checkpoints())
    store.save(p.init(1), 1, {"x": 1}, 3.0)
    state = p.init(2)
    store.save(state, 2, {"x": 2}, 2.5)
    store.close()
    return folder, digests(named(state))[0]


@pytest.fixture
def copy(two_steps: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    shutil.copytree(two_steps[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 1, 4)])
def test_restored_bit_by_bit_on_any_mesh(two_steps: tuple[Path, dict[str, str]], mesh: tuple[int, int, int]):
    p, store = adam(mesh=mesh, zero=1), Store(two_steps[0])
    found = store.newest()
    assert (found.step, found.skipped, found.manifest.about, found.manifest.val_loss) == (2, [], {"x": 2}, 2.5)
    state = store.restore(found, p.abstract_state())
    assert digests(named(state))[0] == two_steps[1]
    assert jax.tree.map(lambda x: x.sharding, state) == p.state_shardings
    np.testing.assert_array_equal(
        *(np.asarray(s.params["stacks"]["main"]["block"]["mlp"]["out_FD"]) for s in (state, p.init(2)))
    )
    weights = store.restore(found, {"params": p.abstract_state().params})
    assert digests(named(weights))[0] == {k: v for k, v in two_steps[1].items() if k.startswith("params/")}


def test_a_step_that_goes_on_does_not_reach_into_the_save(tmp_path: Path):
    """The next steps donate the buffers that are being written."""
    p, store = adam(), Store(tmp_path, Checkpoints())
    state, batch = p.init(0), toys.place(adam(), toys.batch(8), 1)
    step, wanted = p.compile_train_step(), {}
    with jax.set_mesh(p.mesh):
        for number in range(1, 6):
            state, _ = step(state, batch, np.int32(1))
            if number == 2:
                wanted = digests(named(state))[0]
                store.save(state, 2, {})
    store.close()
    assert digests(named(store.restore(store.newest(), p.abstract_state())))[0] == wanted


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path):
    p, store = adam(), Store(tmp_path, Checkpoints())
    for name in ("params/ends/norm/gain_D", "moments/ends/norm/gain_D/nu"):
        state = p.init(0)
        part, *folders, last = name.split("/")
        node = functools.reduce(operator.getitem, folders, {"params": state.params, **state.parts}[part])
        node[last] = node[last].at[3].set(jnp.nan)
        with pytest.raises(NumericsError, match=f"step 7 is not saved: {name} holds"):
            store.save(state, 7, {})
    store.close()
    assert store.steps() == []


def test_old_steps_go_when_newer_ones_are_sealed(tmp_path: Path):
    p, store = adam(), Store(tmp_path, Checkpoints(keep=2, keep_best=1, keep_every_steps=3))
    state = p.init(0)
    for step, loss in zip(range(1, 8), (3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0), strict=True):
        store.save(state, step, {}, loss)
    store.close()
    assert store.steps() == [7, 6, 3, 2]


def test_two_saves_that_fail_end_the_run_and_harm_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    p, store = adam(), Store(tmp_path / "full", Checkpoints())
    state = p.init(0)
    store.save(state, 1, {})
    store.finish()
    (tmp_path / "full").rename(tmp_path / "gone")
    (tmp_path / "full").write_text("a file where the folder was")
    store.save(state, 2, {})
    store.finish()
    assert "the checkpoint of step 2 was not saved" in caplog.text
    store.save(state, 3, {})
    with pytest.raises(StorageError, match=r"step 3 was not saved: .*nor was the one before it"):
        store.finish()
    (tmp_path / "full").unlink()
    (tmp_path / "gone").rename(tmp_path / "full")
    assert Store(tmp_path / "full").newest().step == 1


def test_a_save_that_failed_is_forgiven_by_one_that_did_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    p, store = adam(), Store(tmp_path / "a", Checkpoints())
    state = p.init(0)
    for step, fails in enumerate((True, False, True), 1):
        if fails:
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
            (tmp_path / "a").write_text("a file where the folder was")
        store.save(state, step, {})
        store.finish()
        if fails:
            (tmp_path / "a").unlink()
    assert caplog.text.count("was not saved") == 2
    with pytest.raises(StorageError, match="the last checkpoint, of step 3, was not saved"):
        store.close()


def test_old_steps_that_cannot_be_deleted_are_no_failed_save(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    p, store = adam(), Store(tmp_path, Checkpoints(keep=1, keep_best=0))
    state = p.init(0)
    store.save(state, 1, {})
    store.finish()
    (tmp_path / "1.deleting/in the way").mkdir(parents=True)
    store.save(state, 2, {})
    store.close()
    assert "an old checkpoint could not be deleted" in caplog.text
    assert Store(tmp_path).newest().step == 2
    store = Store(tmp_path, Checkpoints(keep=1, keep_best=0))
    store.save(state, 3, {})
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "promises"], "the next run sweeps"


def test_the_loss_comes_into_the_manifest_later(copy: Path):
    store = Store(copy, Checkpoints())
    store.amend(2, {"x": 3}, 1.5)
    found = Store(copy).newest()
    assert (found.step, found.manifest.about, found.manifest.val_loss) == (2, {"x": 3}, 1.5)


def unseal(folder: Path, **changes) -> None:
    """As a kill leaves it between Orbax's end and the seal."""
    manifest = dataclasses.replace(manifests.read(folder), files={}, **changes)
    manifests.promise(folder.parent, manifest)
    (folder / "manifest.json").unlink()


def test_a_kill_before_the_seal_costs_nothing(copy: Path, two_steps: tuple[Path, dict[str, str]]):
    unseal(copy / "2")
    assert dict(Store(copy).newest().skipped) == {2: "manifest.json is missing: it is not sealed"}, (
        "readers change nothing"
    )
    store, p = Store(copy, Checkpoints()), adam()
    found = store.newest()
    assert (found.step, found.skipped) == (2, [])
    assert digests(named(store.restore(found, p.abstract_state())))[0] == two_steps[1]
    assert not list((copy / "promises").iterdir())


def test_what_was_written_is_not_what_was_promised(copy: Path):
    arrays = dict(manifests.read(copy / "2").arrays)
    name = "moments/stacks/main/block/mlp/out_FD/mu"
    unseal(copy / "2", arrays=arrays | {name: dataclasses.replace(arrays[name], digest="0" * 16)})
    store = Store(copy, Checkpoints())
    with pytest.raises(DigestError, match=name):
        store.restore(store.newest(), adam().abstract_state())


def test_a_promise_without_a_step_is_nothing(copy: Path):
    unseal(copy / "2")
    shutil.rmtree(copy / "2")
    assert Store(copy, Checkpoints()).newest().step == 1


MISFITS = {
    "shape": (
        dataclasses.replace(toys.LLAMA, mlp=dataclasses.replace(toys.LLAMA.mlp, width=128)),
        {},
        r"params/stacks/main/block/mlp/out_FD has shape \[2, 64, 32\] in the checkpoint, \[2, 128, 32\] in the model",
    ),
    "dtype": (
        toys.LLAMA,
        {"stored": jnp.bfloat16},
        r"params/stacks/main/block/mlp/out_FD is float32 .* \(nothing is cast\)",
    ),
    "missing": (dataclasses.replace(toys.LLAMA, bias=True), {}, r"bias_F is in the model and not in the checkpoint"),
    "unknown": (dataclasses.replace(toys.LLAMA, tied_head=True), {}, r"head_VD is in the checkpoint and not in the m"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_leaf_by_leaf(two_steps: tuple[Path, dict[str, str]], name: str):
    model, kw, said = MISFITS[name]
    store, p = Store(two_steps[0]), adam(model, **kw)
    with pytest.raises(CheckpointError, match=re.sub("bias_F", "bias_JF", said)):
        store.restore(store.newest(), p.abstract_state())


# Damage


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "flipped": lambda path: flip(path, path.stat().st_size * 4),
    "truncated": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_the_older_step_is_used_whichever_file_is_damaged(copy: Path, how: str):
    for name in files(copy / "2"):
        before = (copy / "2" / name).read_bytes()
        DAMAGE[how](copy / "2" / name)
        found = Store(copy).newest()
        assert found.step == 1, name
        (step, why), *others = found.skipped
        assert step == 2
        assert name in why, (name, why)
        assert not others
        (copy / "2" / name).write_bytes(before)
    assert Store(copy).newest().step == 2


def test_no_single_bit_is_silent(copy: Path):
    dice = random.Random(5)
    for _ in range(100):
        sizes = {name: (copy / "2" / name).stat().st_size for name in files(copy / "2")}
        (name,) = dice.choices(list(sizes), weights=[size + 200 for size in sizes.values()])
        bit = dice.randrange(8 * sizes[name]) if sizes[name] else None
        if bit is None:
            continue
        flip(copy / "2" / name, bit)
        assert Store(copy).newest().step == 1, (name, bit)
        flip(copy / "2" / name, bit)
    assert Store(copy).newest().step == 2


def test_no_bit_of_the_manifest_is_silent(copy: Path):
    path, dice = copy / "2/manifest.json", random.Random(6)
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=manifests.NAME):
            manifests.read(copy / "2")


def test_folders_that_are_no_checkpoints(copy: Path):
    (copy / "9").mkdir()
    (copy / "tmp").mkdir()
    (copy / "7.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(copy / "1", copy / "3")  # a step under another's number
    found = Store(copy).newest()
    assert found.step == 2
    assert dict(found.skipped) == {9: "the folder is empty", 3: "manifest.json is that of step 1"}


def test_if_none_verifies_nothing_is_chosen(copy: Path):
    for step in ("1", "2"):
        flip(copy / step / "manifest.json", 4000)
    with pytest.raises(CheckpointError, match=r"none verifies \(step 2: manifest.json is damaged.*step 1: .*--fresh"):
        Store(copy, Checkpoints()).newest()
    assert Store(copy / "nothing here").newest() is None


def test_a_manifest_of_the_future_is_named(copy: Path):
    sealed = json.loads((copy / "2" / "manifest.json").read_text())
    body = sealed["manifest"] | {"format": 99}
    (copy / "2" / "manifest.json").write_text(manifests._sealed(body))
    assert dict(Store(copy).newest().skipped) == {2: "manifest.json has format 99; this version reads 2"}


def test_checkpoints_of_an_older_format_are_refused_in_one_sentence(copy: Path):
    for step in ("1", "2"):
        sealed = json.loads((copy / step / "manifest.json").read_text())
        (copy / step / "manifest.json").write_text(manifests._sealed(sealed["manifest"] | {"format": 1}))
    wanted = (
        "holds checkpoints (steps: 2, 1) of another format than 2, the one that this version reads; use the version "
    )
    for rule, end in ((None, "."), (Checkpoints(), ", or train anew with --fresh, which moves them to earlier/.")):
        with pytest.raises(CheckpointError, match=re.escape(f"{wanted}of mtx that wrote them{end}")):
            Store(copy, rule).newest()
    with pytest.raises(CheckpointError, match=r"step 2 of .* cannot be used: manifest.json has format 1; this version"):
        Store(copy).at(2)


def test_values_that_changed_under_a_right_hash_are_caught_by_their_digest(copy: Path):
    """As if Orbax read something else than what was written: the manifest seals a wrong digest."""
    store = Store(copy)
    manifest = store.newest().manifest
    name = "params/stacks/main/block/mlp/out_FD"
    wrong = dataclasses.replace(manifest.arrays[name], digest="0" * 16)
    manifest = dataclasses.replace(manifest, arrays=manifest.arrays | {name: wrong})
    assert isinstance(manifest, Manifest)
    manifests.write(copy / "2", manifest)
    p = adam()
    with pytest.raises(DigestError, match=f"{name} has digest"):
        store.restore(store.newest(), p.abstract_state())


def test_damaged_steps_move_aside_and_can_be_saved_again(copy: Path):
    flip(copy / "2" / "manifest.json", 4000)
    store = Store(copy, Checkpoints())
    store.quarantine(store.newest().skipped)
    assert files(copy / "damaged" / "2-1")
    store.save(adam().init(5), 2, {})
    store.close()
    assert Store(copy).newest().step == 2
