"""What sources share that bring parts of their own: fixed splits, tokens, packages that only workers load."""

import dataclasses
import sys
from pathlib import Path

import pytest

from data import Bpe, Skip, WordPieceFile

SOURCE = '''
import dataclasses
import sys
from data import Bytes, Fail, Prepared, Skip
from data.documents import Part, Slice, Tokenized
from data.documents import Bad, BadFile
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted(Prepared):
    """Documents 0, 1, 2, ... of each of several splits, of a package that is heavy."""

    sizes: tuple = (("train", 50), ("validation", 4))
    tokens: bool = False
    bad: tuple = ()
    broken: bool = False
    words: bool = False
    tokenizer: object = Bytes()
    bad_records: Fail | Skip = Fail()
    folder: str | None = None
    in_workers = True
    most_workers = 2
    described = "data.sizes=some"

    def parts(self):
        import heavy
        return [Part(f"{split}{heavy.MARK}", str(size), 1000 * size, split) for split, size in self.sizes]

    def slices(self, part, most_bytes, reading):
        import heavy
        step, size = most_bytes // 1000, int(part.fingerprint)
        return [Slice(part, i, min(i + step, size), bytes=1000 * step) for i in range(0, size, step)]

    def read(self, piece, reading):
        import heavy
        for i in range(piece.start, int(piece.part.fingerprint) if piece.stop is None else piece.stop):
            reading.count(1000)
            if i in self.bad:
                reading.report(Bad(reading.name, f"example {i}", "odd", "is odd."))
            elif self.tokens:
                yield Tokenized([np.array([i, i]), np.array([i] * (i % 3))], 7)
            else:
                yield [f"document {i}".encode()]
        if self.broken and piece.part.split == "train":
            raise BadFile(Bad(reading.name, "", "gone", "is gone."))

    def sequences(self, document):
        return list(document[0].partition(b" ")) if self.words else document

    def definition(self):
        import heavy
        return self.tokenizer.original().read_bytes()

    def is_here(self, names):
        return False
'''


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The class of `SOURCE`; UNIT_BYTES are ten documents."""
    (tmp_path / "counted.py").write_text(SOURCE)
    (tmp_path / "heavy.py").write_text('MARK = "!"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("data.prepare.run.UNIT_BYTES", 10_000)
    sys.modules.pop("counted", None)
    import counted  # pyrefly: ignore

    yield counted.Counted
    assert "heavy" not in sys.modules


def test_splits_that_are_known_need_one_pass_and_only_workers_load_what_is_heavy(counted) -> None:
    lines: list[str] = []
    config = counted(sizes=(("validation", 4), ("train", 50)))
    config.prepare(lines.append, workers=4)
    assert not any(line.startswith("reading") for line in lines)
    corpus = config.load()
    config.verify()
    assert list(corpus.splits) == ["train", "validation"]
    texts = {name: corpus.tokenizer.decode(split.tokens_N).splitlines() for name, split in corpus.splits.items()}
    assert texts == {name: [f"document {i}" for i in range(n)] for name, n in (("train", 50), ("validation", 4))}
    sources = config.manifest().sources
    assert [(source.name, source.fingerprint, sum(source.documents.values())) for source in sources] == [
        ("validation!", "4", 4),
        ("train!", "50", 50),
    ]
    assert len({source.sha256 for source in sources}) == 2 and None not in {source.sha256 for source in sources}


def test_tokens_that_a_source_brings_are_taken_as_they_are(counted) -> None:
    """A document whose last sequence is empty is no document."""
    config = counted(tokens=True)
    config.prepare(lambda line: None, workers=2)
    corpus, shard = config.load(), config.manifest().splits["train"]
    tokens = [t for i in range(50) if i % 3 for t in ([i] * (2 + i % 3) + [256])]
    assert corpus.splits["train"].tokens_N.tolist() == tokens
    assert (shard.documents, shard.sequences, shard.bytes) == (33, 66, 33 * 7)
    assert corpus.gzip_bits_per_byte is None
    assert sum(source.empty for source in config.manifest().sources) == 17 + 2


def test_a_tokenizer_is_learned_from_the_training_split_that_is_known(counted) -> None:
    lines: list[str] = []
    config = counted(tokenizer=Bpe(vocab_size=265))
    config.prepare(lines.append, workers=2)
    assert any(line.startswith("learning") for line in lines)
    corpus = config.load()
    assert corpus.tokenizer.decode(corpus.splits["validation"].tokens_N).splitlines() == [
        f"document {i}" for i in range(4)
    ]


def test_a_sequence_without_tokens_is_none(counted) -> None:
    """To WordPiece a space is nothing."""
    Path("vocab.txt").write_text("[UNK]\n[SEP]\ndocument\n" + "".join(f"{i}\n##{i}\n" for i in range(10)))
    config = counted(words=True, tokenizer=WordPieceFile(path="vocab.txt", lowercase=True))
    config.prepare(lambda line: None, workers=1)
    shard = config.manifest().splits["train"]
    assert (shard.documents, shard.sequences) == (50, 100)


def test_bad_records_of_one_pass_are_counted_or_refused(counted) -> None:
    config = counted(bad=(3, 33, 34))
    with pytest.raises(ValueError, match=r"train!, example 3: is odd\. Mend it, or leave such"):
        config.prepare(lambda line: None, workers=2)
    skips = dataclasses.replace(config, bad_records=Skip(budget=4))
    skips.prepare(lambda line: None, workers=2)
    assert [source.bad for source in skips.manifest().sources] == [{"odd": 3}, {"odd": 1}]
    assert skips.manifest().splits["train"].documents == 47
    with pytest.raises(ValueError, match=r"4 bad records \(odd 4\) .*budget=3.*validation!, example 3"):
        dataclasses.replace(config, bad_records=Skip(budget=3)).prepare(lambda line: None, workers=2)


def test_a_part_that_breaks_off_ends_a_preparation_of_one_pass(counted) -> None:
    with pytest.raises(ValueError, match=r"train!: is gone\."):
        counted(broken=True, bad_records=Skip()).prepare(lambda line: None, workers=2)


def test_a_split_without_documents_says_so(counted) -> None:
    with pytest.raises(ValueError, match=r"data\.sizes=some: no document of the validation split .* Give more text"):
        counted(sizes=(("train", 3), ("validation", 0))).prepare(lambda line: None)
