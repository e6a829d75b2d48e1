"""The documentation corpus: what is read, how it is packed, and that batches depend on (seed, sample)."""

import dataclasses
import gzip
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from data import Batch, Concatenate, Corpus, Loader, Pick, PythonDocs, Split
from data.batches.packing import window_count
from data.sources.python_docs import module_documents, topic_documents
from data.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
E = ByteTokenizer.end_of_document


@pytest.fixture(scope="module")
def docs() -> Corpus:
    return PythonDocs().load()


def stream(*documents: str) -> np.ndarray:
    return np.array([token for text in documents for token in (*text.encode(), E)], np.uint16)


def split_of(tokens_N: np.ndarray) -> Split:
    ends = np.flatnonzero(tokens_N == E)
    return Split(
        tokens_N=tokens_N,
        lengths_S=np.diff(ends, prepend=-1).astype(np.int32),
        documents_D=np.arange(len(ends) + 1),
        bytes=len(tokens_N) - len(ends),
    )


def loader(corpus: Corpus, sequence_length: int, *, seed: int = 0, isolate: bool = True) -> Loader:
    packing = Concatenate(isolate_documents=isolate)
    return Loader(corpus=corpus, sequence_length=sequence_length, packing=packing, seed=seed)


def pack(stream_N: np.ndarray, windows_B: list[int], *, sequence_length: int, isolate_documents: bool) -> Batch:
    splits = {"train": split_of(stream_N), "validation": split_of(stream_N)}
    corpus = Corpus(source="", tokenizer=ByteTokenizer(), splits=splits, digest="", gzip_bits_per_byte=None)
    rows, _ = loader(corpus, sequence_length, isolate=isolate_documents).held_out("validation")[""]
    return rows.batch([Pick(0, window) for window in windows_B])


def numbered_corpus(*, tokens: int, ends: tuple[int, ...] = ()) -> Corpus:
    """A corpus in which token i of the training stream is 1000 + i, except for ends of documents."""
    train = np.arange(1000, 1000 + tokens).astype(np.uint16)
    train[[*ends, -1]] = E
    return Corpus(
        source="numbers",
        tokenizer=ByteTokenizer(),
        splits={"train": split_of(train), "validation": split_of(stream("xyz"))},
        digest="0" * 16,
        gzip_bits_per_byte=None,
    )


def texts(corpus: Corpus, split: str) -> set[str]:
    return set(corpus.tokenizer.decode(corpus.splits[split].tokens_N).rstrip("\n").split("\n"))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# Reading


def test_documents_are_read_from_source(tmp_path: Path) -> None:
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(
        '"""Encodes.\n\n    Decodes too.\n    """\n'
        "raise SystemExit('imported')\n"
        "class Coder(dict, metaclass=type):\n"
        '    """Codes \u00e9."""\n'
        "    def code(self, x: int = 1, *, y=None) -> str:\n"
        '        """Codes x.\n\n        Not y.\n        """\n'
        "    def bare(self): pass\n"
        "if True:\n"
        "    async def late():\n"
        "        'Late.'\n"
    )
    (tmp_path / "abc.py").write_text("def f():\n    'Has no signature worth \\ud800.'\n")
    (tmp_path / "heapq.py").write_text("def undocumented(): pass\n")
    for stranger in ("json/tests/__init__.py", "site-packages/abc.py", "sitecustomize.py", "abc.txt"):
        (tmp_path / stranger).write_text("'A stranger.'")
    documents = module_documents(tmp_path)
    assert sorted(documents) == ["abc", "json"]
    assert documents["json"] == (
        "module json\n\nEncodes.\n\nDecodes too.\n\n"
        "class Coder(dict)\n    Codes \u00e9.\n\n"
        "def Coder.code(self, x: int=1, *, y=None) -> str\n    Codes x.\n\n    Not y.\n\n"
        "async def late()\n    Late.\n"
    )
    corpus = Corpus.from_documents(documents, source="test", validation_fraction=0.5)
    # A lone surrogate does not stop it.
    assert sum(split.documents for split in corpus.splits.values()) == 2

    assert topic_documents(tmp_path) == {}
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("# By Sphinx\ntopics = {'b': 'B\\n', 'a': '\\nA'}\n")
    assert topic_documents(tmp_path) == {"topic a": "topic a\n\nA\n", "topic b": "topic b\n\nB\n"}


def test_no_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(ValueError, match=r"no Python source under .*python311\.zip.*run a full one"):
        PythonDocs().load()


def test_this_python_has_enough_text(docs: Corpus) -> None:
    train, validation = docs.splits["train"], docs.splits["validation"]
    assert 1_500_000 < train.bytes < 10_000_000
    assert train.documents > 250
    assert 0.02 < validation.bytes / train.bytes < 0.1
    text = "".join(docs.tokenizer.decode(split.tokens_N) for split in docs.splits.values())
    assert "module json.decoder\n" in text
    assert all(topic in text for topic in topic_documents(Path(sysconfig.get_path("stdlib"))).values())
    held_out = validation.tokens_N[validation.tokens_N != E].astype(np.uint8).tobytes()
    assert len(held_out) == validation.bytes
    assert docs.gzip_bits_per_byte == 8 * len(gzip.compress(held_out, 9)) / validation.bytes
    assert 1.5 < docs.gzip_bits_per_byte < 3.5  # English and code; zeros or noise would lie outside.
    for part in (f"Python {sys.version_info.major}.", f"{train.documents} documents", docs.digest):
        assert part in docs.describe()
    assert "\n" not in docs.describe()


def test_loading_is_deterministic_and_imports_nothing(docs: Corpus, tmp_path: Path) -> None:
    program = """
import hashlib, sys
from data import Loader, PythonDocs
before = set(sys.modules)
corpus = PythonDocs().load()
print(sorted(name for name in set(sys.modules) - before if name[0] != "_"))  # _sysconfigdata_...
print(sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "mtx", "turtle", "this", "pydoc")))
batch = Loader(corpus=corpus, sequence_length=64, seed=7).train(range(123456789, 123456794))
print(hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch))).hexdigest(), corpus.digest)
"""
    outputs = []
    for hash_seed in "1", "2":
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", program],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert outputs[0] == outputs[1]
    imported, forbidden, hashes = outputs[0].splitlines()
    assert (imported, forbidden) == ("[]", "[]")
    assert hashes.split()[1] == docs.digest


def test_split_is_disjoint_and_stable() -> None:
    def split(documents: dict[str, str]) -> tuple[set[str], set[str]]:
        corpus = Corpus.from_documents(documents, source="test", validation_fraction=0.2)
        train, validation = texts(corpus, "train"), texts(corpus, "validation")
        assert {name: split.documents for name, split in corpus.splits.items()} == {
            "train": len(train),
            "validation": len(validation),
        }
        return train, validation

    few = {f"d{i}": f"text {i}" for i in range(200)}
    many = few | {f"c{i}": f"new {i}" for i in range(200)}
    train, validation = split(few)
    assert not train & validation and train | validation == set(few.values())
    assert 0.1 < len(validation) / len(few) < 0.3
    more_train, more_validation = split(many)
    assert train < more_train and validation < more_validation
    edited = split({name: text + " edited" for name, text in few.items()})[1]
    assert edited == {text + " edited" for text in validation}


def test_an_empty_split_is_refused() -> None:
    documents = {f"d{i}": "text" for i in range(20)}
    for fraction, change in (1e-9, "larger"), (1 - 1e-9, "smaller"):
        with pytest.raises(ValueError, match=f"empty; try a {change} one"):
            Corpus.from_documents(documents, source="test", validation_fraction=fraction)


# Packing


def test_borders_when_documents_are_isolated() -> None:
    batch = pack(
        stream("abc", "d", "efgh"),  # a b c E d E e | f g h E: windows overlap by one target.
        [0, 1],
        sequence_length=6,
        isolate_documents=True,
    )
    a, b, c, d, e, f, g, h = b"abcdefgh"
    expected = {
        "tokens": [[a, b, c, E, d, E], [e, f, g, h, E, E]],
        "targets": [[b, c, E, d, E, e], [f, g, h, E, E, E]],
        "weights": [[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]],
        "segments": [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0]],
        "positions": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 0]],
    }
    assert {name: array.tolist() for name, array in batch.items()} == expected
    assert {name: str(array.dtype) for name, array in batch.items()} == dict.fromkeys(expected, "int32") | {
        "weights": "float32"
    }
    middle = pack(
        stream("abc", "d", "efgh"),
        [1],
        sequence_length=4,
        isolate_documents=True,
    )  # d E e f: a window that starts with a document; the next one starts inside "efgh".
    assert middle["segments"].tolist() == [[1, 1, 2, 2]] and middle["positions"].tolist() == [[0, 1, 0, 1]]
    inside = pack(
        stream("abc", "d", "efgh"),
        [1],
        sequence_length=2,
        isolate_documents=True,
    )  # c E: goes on with "abc", from position 0.
    assert inside["segments"].tolist() == [[1, 1]] and inside["positions"].tolist() == [[0, 1]]


def test_borders_when_documents_are_joined() -> None:
    batch = pack(
        stream("abc", "d", "efgh"),
        [0, 1],
        sequence_length=6,
        isolate_documents=False,
    )
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0]]


@pytest.mark.parametrize(("tokens", "windows"), [(2, 1), (9, 2), (10, 3), (11, 3)])
def test_window_count(tokens: int, windows: int) -> None:
    assert window_count(tokens, 4) == windows


@pytest.mark.parametrize("tokens", [12, 13, 14, 40])
@pytest.mark.parametrize("isolate", [True, False])
def test_each_token_is_a_target_once_in_an_epoch(tokens: int, isolate: bool) -> None:
    ends = (0, 4, 5)
    corpus = numbered_corpus(tokens=tokens, ends=ends)
    rows = loader(corpus, 4, seed=5, isolate=isolate)
    windows = rows.epoch_samples[""]
    for epoch in 0, 3:
        batches = [rows.train(np.array([epoch * windows + i])) for i in range(windows)]
        targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in batches])
        inputs = np.concatenate([batch["tokens"][batch["segments"] > 0] for batch in batches])
        firsts = [end + 1 for end in ends] if isolate else []
        assert sorted(targets) == sorted(np.delete(corpus.splits["train"].tokens_N, [0, *firsts]))
        assert sorted(inputs) == sorted(corpus.splits["train"].tokens_N[:-1])


# Order


def order(corpus: Corpus, seed: int, samples: range, length: int = 7) -> list[int]:
    """The windows of a numbered corpus that these samples are."""
    return ((loader(corpus, length, seed=seed, isolate=False).train(samples)["tokens"][:, 0] - 1000) // length).tolist()


def test_samples_do_not_depend_on_the_batch(docs: Corpus) -> None:
    rows = loader(docs, 128, seed=1)
    whole = rows.train(np.arange(1000, 1064))
    quarters = [rows.train(np.arange(1000 + 16 * i, 1016 + 16 * i)) for i in range(4)]
    joined = {name: np.concatenate([quarter[name] for quarter in quarters]) for name in whole}
    assert whole["tokens"].shape == (64, 128) and same(whole, joined)
    own = rows.train(np.array([1063, 1000, 1031]))  # as a process reads its own
    assert same(own, {name: array[[63, 0, 31]] for name, array in whole.items()})


@pytest.mark.parametrize("windows", [1, 2, 3, 100])
@pytest.mark.parametrize("epoch", [0, 1, 2**32, 2**40])
def test_each_epoch_is_a_permutation(windows: int, epoch: int) -> None:
    corpus = numbered_corpus(tokens=7 * windows + 1)
    assert loader(corpus, 7).epoch_samples == {"": windows}
    found = order(corpus, 3, range(epoch * windows, (epoch + 1) * windows))
    assert sorted(found) == list(range(windows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    corpus = numbered_corpus(tokens=701)
    orders = [order(corpus, seed, range(100 * e, 100 * e + 100)) for seed in range(4) for e in range(4)]
    assert len({tuple(found) for found in orders}) == len(orders)
    # No two agree in more places than two unrelated permutations do (1 on average).
    agree = [np.sum(np.equal(a, b)) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agree) < 10 and 0.5 < np.mean(agree) < 1.5
    assert order(corpus, 2**70, range(5)) != order(corpus, 0, range(5))  # seeds beyond Grain's 32 bits


def test_the_order_of_training_has_not_moved() -> None:
    """If this moves, every run resumes in another order: say so in CHANGELOG.md, or undo what moved it."""
    two_epochs = order(numbered_corpus(tokens=57), 0, range(16))
    assert two_epochs == [3, 6, 2, 1, 4, 5, 0, 7, 1, 3, 4, 7, 2, 0, 6, 5]


def test_any_sample_costs_the_same() -> None:
    """No permutation is kept: a billion windows, and a sample far along, at once."""
    import tracemalloc

    stream_N = np.broadcast_to(np.uint16(1), (2**31,))
    corpus = numbered_corpus(tokens=12)
    loader(corpus, 2).train([0])  # imports
    object.__setattr__(corpus, "splits", {"train": dataclasses.replace(corpus.splits["train"], tokens_N=stream_N)})
    tracemalloc.start()
    started = time.process_time()
    rows = loader(corpus, 2)
    batch = rows.train(np.arange(2**61, 2**61 + 32))
    assert time.process_time() - started < 1.0
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert rows.epoch_samples == {"": 2**30} and batch["tokens"].shape == (32, 2)


def test_validation_is_the_held_out_text_in_order(docs: Corpus) -> None:
    split = docs.splits["validation"]
    rows, _ = loader(docs, 100).held_out("validation")[""]
    stream_N, batch = split.tokens_N, rows.batch([Pick(0, row) for row in range(len(rows))])
    assert batch["tokens"].shape == (window_count(len(stream_N), 100), 100)
    real = batch["segments"] > 0
    assert batch["targets"][real].tolist() == stream_N[1:].tolist()
    assert batch["weights"].sum() == len(stream_N) - split.documents
    part = rows.batch([Pick(0, 7), Pick(0, 3)])
    assert same(part, {name: array[[7, 3]] for name, array in batch.items()})


# Edges


def test_encode_and_decode() -> None:
    tokenizer = numbered_corpus(tokens=12).tokenizer
    assert tokenizer.vocab_size == PythonDocs().vocab_size == 257
    assert tokenizer.encode("h\u00e9") == [104, 195, 169]
    assert tokenizer.decode(np.array([104, 195, 169, E, 195, 104])) == "h\u00e9\n\ufffdh"
    for token in 257, -1:
        with pytest.raises(ValueError, match=r"0\.\.256"):
            tokenizer.decode([token])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_check_names_the_field(fraction: float) -> None:
    assert list(PythonDocs().check()) == []
    wrong = list(PythonDocs(validation_fraction=fraction).check())
    assert wrong == [("validation_fraction", "must lie strictly between 0 and 1; try 0.05")]


def test_config_is_frozen_and_hashable() -> None:
    assert hash(PythonDocs()) == hash(PythonDocs(validation_fraction=0.05))
    assert [field.name for field in dataclasses.fields(PythonDocs)] == ["validation_fraction"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PythonDocs().validation_fraction = 0.5  # pyrefly: ignore


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0], 4), "seed=-1 .* try seed=0"),
        ((0, [0, -1], 4), "none below 0"),
        ((0, [], 4), "at least one number"),
        ((0, [0], 0), "batch.sequence_length=0 must be >= 1"),
        ((0, [0], 12), "batch.sequence_length=12 .* try batch.sequence_length=11 or less"),
    ],
)
def test_wrong_arguments_say_what_to_type(arguments: tuple[int, list[int], int], message: str) -> None:
    corpus = numbered_corpus(tokens=12)
    assert loader(corpus, 11).check().train([0])["weights"].sum() == 11
    seed, samples, length = arguments
    with pytest.raises(ValueError, match=message):
        loader(corpus, length, seed=seed).check().train(samples)


def test_the_digest_changes_with_any_token() -> None:
    def digest(*documents: str) -> str:
        named = {str(i): text for i, text in enumerate(documents)}
        return Corpus.from_documents(named, source="", validation_fraction=0.5).digest

    one = digest("abc", "def", "ghi", "jkl")
    assert one == digest("abc", "def", "ghi", "jkl") and len(one) == 16
    assert len({one, digest("abd", "def", "ghi", "jkl"), digest("abc", "def", "ghi", "jk")}) == 3


def test_nothing_needs_to_be_prepared() -> None:
    assert PythonDocs().is_prepared()
