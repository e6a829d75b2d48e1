"""Batches by sample number: blends, restarts at any place on any number of hosts, objectives, packing, curricula."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from corpora import E, corpus, texts

from data import (
    BestFit,
    Blend,
    Blended,
    CausalLm,
    Completion,
    Concatenate,
    Curriculum,
    FillInTheMiddle,
    Loader,
    MaskedLm,
    Phase,
    Pick,
    PrefixLm,
    PythonDocs,
    SentencePairs,
    SpanCorruption,
    Weighted,
)
from data.batches.curriculum import FixedLinear, MetricFile, Rarity
from data.batches.special_tokens import NAMES, specials
from data.tokenizer import ByteTokenizer

T = 32
SOURCES = {name: corpus(texts(40, 60 + 20 * i, name), texts(3, 60, name), name) for i, name in enumerate("abc")}
ONE = (Weighted(name="a", data=PythonDocs()),)
OBJECTIVES = [
    CausalLm(),
    PrefixLm(),
    FillInTheMiddle(),
    MaskedLm(whole_words=True),
    SpanCorruption(),
]


def blended(weights: tuple[float, ...] = (5, 3, 2), caps: tuple[float | None, ...] = (None,) * 3, **rest) -> Blended:
    sources = tuple(
        Weighted(name=name, data=PythonDocs(), weight=weight, max_epochs=cap)
        for name, weight, cap in zip(SOURCES, weights, caps, strict=True)
    )
    return Blend(sources=sources, **rest).blended(SOURCES)


def source_of(row: np.ndarray) -> str:
    """Which source a row of tokens is of: sources have letters of their own, behind ends of documents."""
    (found,) = {
        name for name in SOURCES if any(chr(t) == name for t, before in zip(row[1:], row, strict=False) if before == E)
    }
    return found


def digest(batch: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()


# Blends


def test_every_prefix_has_its_weights_within_one_sample() -> None:
    loader = Loader(corpus=blended(), sequence_length=T).check()
    found = [loader.origin(sample).source for sample in range(700)]
    for samples in range(1, 701):
        for name, share in zip(SOURCES, (0.5, 0.3, 0.2), strict=True):
            assert abs(found[:samples].count(name) - share * samples) < 1
    assert loader.epochs(700) == {name: found.count(name) / rows for (name, rows) in loader.epoch_samples.items()}


def test_phases_change_the_weights_and_replay_nothing() -> None:
    phases = (Phase(start_sample=101, weights=(0, 1, 1)), Phase(start_sample=301, weights=(1, 0, 0)))
    loader = Loader(corpus=blended(phases=phases), sequence_length=T)
    before = Loader(corpus=blended(), sequence_length=T)
    origins = [loader.origin(sample) for sample in range(500)]
    assert origins[:101] == [before.origin(sample) for sample in range(101)]
    assert {origin.source for origin in origins[101:301]} == {"b", "c"}
    assert {origin.source for origin in origins[301:]} == {"a"}
    for name, rows in loader.epoch_samples.items():  # each source goes on where it was, whatever the phase
        own = [origin.row for origin in origins if origin.source == name]
        assert len(own) > 20 and len(set(own[:rows])) == min(rows, len(own))


def test_a_source_that_reached_its_epochs_is_left_out() -> None:
    loader = Loader(corpus=blended(caps=(1.5, None, 3)), sequence_length=T)
    rows = loader.epoch_samples
    counts = loader.blend.counts(5000)
    assert counts.tolist()[0] == int(1.5 * rows["a"]) and counts.tolist()[2] == 3 * rows["c"]
    assert counts.sum() == 5000 and loader.blend.end is None
    late = [loader.origin(sample).source for sample in range(4000, 4050)]
    assert set(late) == {"b"}
    capped = Loader(corpus=blended(caps=(1, 1, 1)), sequence_length=T).blend
    assert capped.end == sum(rows.values()) == capped.counts(capped.end).sum()


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [1, 4, 16]), (2.0, [1, 2, 4]), (1e9, [1, 1, 1])])
def test_temperature_evens_out_sizes(temperature: float, expected: list[float]) -> None:
    parts = {name: corpus(texts(20, 60, name) * 4**i) for i, name in enumerate("abc")}
    sources = tuple(Weighted(name=name, data=PythonDocs()) for name in parts)
    blend = Blend(sources=sources, temperature=temperature).blended(parts)
    counts = Loader(corpus=blend, sequence_length=T).blend.counts(2**16)
    np.testing.assert_allclose(counts / counts[0], expected, rtol=1e-3)


# Restarts


@pytest.mark.parametrize("objective", [CausalLm(), FillInTheMiddle()], ids=lambda o: type(o).__name__)
def test_any_restart_on_any_hosts_gives_the_same_stream(objective) -> None:
    """At 500 places of a run through two phases with growing batches, read by 1, 2, 3, 4 and 8 hosts."""
    phases = (Phase(start_sample=300, weights=(1, 1, 4)), Phase(start_sample=900, weights=(2, 1, 1)))

    def started() -> Loader:
        return Loader(corpus=blended(phases=phases), sequence_length=T, objective=objective, seed=3)

    sizes = [8 * (1 + step // 40) for step in range(80)]
    starts = np.cumsum([0, *sizes])
    whole = started().train(range(starts[-1]))
    loaders = {hosts: started() for hosts in (1, 2, 3, 4, 8)}
    for place in np.random.default_rng(0).integers(0, starts[-1] - 16, 500):
        step = int(np.searchsorted(starts, place, side="right")) - 1
        size, hosts = sizes[step], (1, 2, 3, 4, 8)[place % 5]
        numbers = np.arange(place, min(place + size, starts[-1]))  # as if samples consumed were `place`
        parts = [loaders[hosts].train(own) for own in np.array_split(numbers, hosts)]
        for name, rows in whole.items():
            assert np.concatenate([part[name] for part in parts]).tobytes() == rows[numbers].tobytes()


def test_what_a_run_has_to_keep_is_one_number() -> None:
    """Nothing that was read before changes what comes: a loader that never read gives what one gives that did."""
    used, fresh = (Loader(corpus=blended(), sequence_length=T) for _ in range(2))
    for start in range(0, 640, 64):
        used.train(range(start, start + 64))
    assert digest(used.train(range(640, 704))) == digest(fresh.train(range(640, 704)))


# Objectives and packing


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_an_objective_draws_anew_in_each_epoch_and_alike_in_each_run(objective) -> None:
    loader, again, other = (
        Loader(corpus=SOURCES["a"], sequence_length=2 * T, objective=objective, seed=seed) for seed in (0, 0, 1)
    )
    rows = loader.epoch_samples[""]
    first, second = loader.train(range(rows)), loader.train(range(rows, 2 * rows))
    assert digest(first) == digest(again.train(range(rows))) != digest(other.train(range(rows)))
    epochs = [np.argsort([loader.origin(e * rows + i).row for i in range(rows)]) for e in (0, 1)]
    in_order = [{k: v[order] for k, v in batch.items()} for batch, order in zip((first, second), epochs, strict=True)]
    assert (digest(in_order[0]) == digest(in_order[1])) == isinstance(objective, CausalLm)
    assert all(rows.shape == (len(first["tokens"]), 2 * T) for rows in first.values())


@pytest.mark.parametrize("packing", [Concatenate(), BestFit()], ids=lambda p: type(p).__name__)
def test_a_row_comes_from_where_its_origin_says(packing) -> None:
    loader = Loader(corpus=blended(), sequence_length=T, packing=packing)
    batch = loader.train(range(60))
    for sample in range(60):
        origin = loader.origin(sample)
        stream_N = SOURCES[origin.source].splits["train"].tokens_N
        wanted = [t for start, end in origin.spans for t in stream_N[start : end - 1]]
        real = batch["segments"][sample] > 0
        assert batch["tokens"][sample][real].tolist() == wanted
        targets = [t for start, end in origin.spans for t in stream_N[start + 1 : end]]
        assert batch["targets"][sample][real].tolist() == targets


def test_best_fit_keeps_documents_whole_and_loses_none() -> None:
    loader = Loader(corpus=SOURCES["b"], sequence_length=128, packing=BestFit())
    rows = loader.epoch_samples[""]
    stream = SOURCES["b"].splits["train"]
    spans = sorted(span for sample in range(rows) for span in loader.origin(sample).spans)
    ends = np.cumsum(stream.lengths_S)
    assert [end for _, end in spans] == ends.tolist() and spans[0].start == 0
    assert [start for start, _ in spans[1:]] == ends[:-1].tolist()
    batch = loader.train(range(rows))
    assert (batch["weights"].sum(axis=1) > 0).all()
    assert batch["weights"].sum() == len(stream.tokens_N) - stream.documents
    assert rows < Loader(corpus=SOURCES["b"], sequence_length=128).epoch_samples[""] * 1.3


def test_completions_weigh_and_prompts_do_not() -> None:
    pairs = [[f"q{i}?".encode(), f"answer {i}".encode()] for i in range(30)]
    loader = Loader(corpus=corpus(pairs), sequence_length=64, objective=Completion()).check()
    batch = loader.train(range(loader.epoch_samples[""]))
    learned = bytes(t if t != E else 10 for t in batch["targets"][batch["weights"] > 0]).decode().split("\n")
    assert sorted(learned[:-1]) == sorted(f"answer {i}" for i in range(30))
    with pytest.raises(ValueError, match=r"prepare them with data\.prompt_key"):
        Loader(corpus=SOURCES["a"], sequence_length=64, objective=Completion()).check()


def test_sentence_pairs_are_of_one_document_or_of_two_half_and_half() -> None:
    documents = [[f"{d} sentence {s}. ".encode() for s in range(6)] for d in range(60)]
    loader = Loader(corpus=corpus(documents), sequence_length=64, objective=SentencePairs(), seed=2).check()
    samples = 20 * loader.epoch_samples[""]
    batch = loader.train(range(samples))
    labels, frame = batch["label"][:, 0], loader.frame
    assert abs(labels.sum() - samples / 2) < 5 * math.sqrt(samples) / 2
    for row in range(100):
        real = int((batch["segments"][row] > 0).sum())
        text = batch["targets"][row][:real]
        assert text[0] == frame.specials.cls and (text == frame.specials.sep).sum() == 2
        between = int(np.flatnonzero(text == frame.specials.sep)[0])
        assert batch["types"][row][:real].tolist() == [0] * (between + 1) + [1] * (real - between - 1)
    with pytest.raises(ValueError, match=r"prepare them with data\.sentences=true"):
        Loader(corpus=SOURCES["a"], sequence_length=64, objective=SentencePairs()).check()


# Special tokens


def test_what_a_tokenizer_lacks_comes_behind_its_vocabulary() -> None:
    found = specials(ByteTokenizer(), FillInTheMiddle(), T)
    assert [getattr(found, name) for name in NAMES] == list(range(257, 257 + len(NAMES)))
    spans = specials(ByteTokenizer(), SpanCorruption(), 512)
    assert spans.fim_prefix == found.fim_prefix and min(spans.sentinels) == 257 + len(NAMES)
    assert len(spans.sentinels) == SpanCorruption().sentinels(512) == 23
    assert not specials(ByteTokenizer(), CausalLm(), T).tokens()


# Curricula


def test_a_curriculum_gives_the_easiest_rows_first(tmp_path) -> None:
    rows = Loader(corpus=SOURCES["a"], sequence_length=T).epoch_samples[""]
    metric_N = np.random.default_rng(0).permutation(rows).astype(np.float32)
    np.save(tmp_path / "metric.npy", metric_N)
    pacing = FixedLinear(first=10, last=100, steps=20)
    curriculum = Curriculum(pacing=pacing, metric=MetricFile(path=str(tmp_path / "metric.npy")))
    loader = Loader(corpus=SOURCES["a"], sequence_length=T, curriculum=curriculum, global_size=8)
    for step in range(30):
        drawn = [metric_N[loader.origin(8 * step + i).row] for i in range(8)]
        assert max(drawn) < max(1, pacing.difficulty(step) * rows // 100)
    np.save(tmp_path / "moved.npy", metric_N)
    moved = dataclasses.replace(curriculum, metric=MetricFile(path=str(tmp_path / "moved.npy")))
    digests = [loader.metric_digest, dataclasses.replace(loader, curriculum=moved).metric_digest]
    np.save(tmp_path / "moved.npy", metric_N[::-1])
    digests.append(dataclasses.replace(loader, curriculum=moved).metric_digest)
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 16
    assert dataclasses.replace(loader, curriculum=None).metric_digest is None
    np.save(tmp_path / "metric.npy", metric_N[1:])
    with pytest.raises(ValueError, match=rf"a finite number for each of the {rows} rows"):
        Loader(corpus=SOURCES["a"], sequence_length=T, curriculum=curriculum).train([0])


def test_a_curriculum_goes_by_the_run_s_steps_in_each_source() -> None:
    curriculum = Curriculum(pacing=FixedLinear(first=20, last=100, steps=10), metric=Rarity())
    loader = Loader(corpus=blended(), sequence_length=T, curriculum=curriculum, global_size=16)
    origins = [loader.origin(sample) for sample in range(16 * 9)]
    for name, rows in loader.epoch_samples.items():
        first = [origin.row for origin in origins[:16] if origin.source == name]
        assert len(set(first)) <= max(1, 20 * rows // 100)
    alone = [Loader(corpus=blended(), sequence_length=T).origin(sample).source for sample in range(16 * 9)]
    assert [origin.source for origin in origins] == alone


# Edges


def test_a_blend_of_two_tokenizers_is_refused() -> None:
    parts = dict(SOURCES)
    parts["b"] = corpus(texts(3, 60, "b"))
    object.__setattr__(parts["b"], "tokenizer", ByteTokenizer(digest="other"))
    sources = tuple(Weighted(name=name, data=PythonDocs()) for name in parts)
    with pytest.raises(ValueError, match="sources a and b have different tokenizers"):
        Blend(sources=sources).blended(parts)


def test_sources_without_the_split_are_left_out_of_it() -> None:
    parts = dict(SOURCES) | {"b": corpus(texts(3, 60, "b"))}
    sources = tuple(Weighted(name=name, data=PythonDocs()) for name in parts)
    held_out = Loader(corpus=Blend(sources=sources).blended(parts), sequence_length=T).held_out("validation")
    assert list(held_out) == ["a", "c"]
    rows, split = held_out["a"]
    batch = rows.batch([Pick(0, row) for row in range(len(rows))])
    assert batch["targets"][batch["segments"] > 0].tolist() == split.tokens_N[1:].tolist()


@pytest.mark.parametrize(
    ("blend", "field"),
    [
        (Blend(sources=()), "sources"),
        (Blend(sources=ONE * 2), "sources"),
        (Blend(sources=(Weighted(name="a", data=PythonDocs(), weight=0),)), "sources"),
        (Blend(sources=ONE, temperature=0.0), "temperature"),
        (Blend(sources=ONE, phases=(Phase(start_sample=0, weights=(1,)),)), "phases"),
        (Blend(sources=ONE, phases=(Phase(start_sample=9, weights=(1, 2)),)), "phases"),
        (Blend(sources=ONE, phases=(Phase(start_sample=9, weights=(0,)),)), "phases"),
        (Weighted(name="a b", data=PythonDocs()), "name"),
        (Weighted(name="a", data=PythonDocs(), weight=-1), "weight"),
        (Weighted(name="a", data=PythonDocs(), max_epochs=0), "max_epochs"),
    ],
)
def test_check_names_the_field(blend, field: str) -> None:
    assert [name for name, _ in blend.check()] == [field]
