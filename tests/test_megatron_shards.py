"""Shards of other programs: trained on as they are, or refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Bpe, Bytes, Gpt2, Loader, MegatronShards, TokenizerFile
from data.shards.format import Writer
from data.shards.index import DTYPES
from data.sources import megatron_shards
from data.sources.megatron_shards import _Joined
from data.tokenizer import ByteTokenizer

END = ByteTokenizer.end_of_document


def write(path: Path, documents: list[list[list[int]]], code: int = 8) -> str:
    """A pair of files as Megatron-LM writes them, with nothing of ours; returns its name."""
    sequences = [np.array(sequence, DTYPES[code]) for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")])[:-1] * np.dtype(DTYPES[code]).itemsize
    firsts = np.cumsum([0, *(len(document) for document in documents)], dtype="<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(firsts))
    Path(f"{path}.idx").write_bytes(head + lengths.tobytes() + pointers.astype("<i8").tobytes() + firsts.tobytes())
    Path(f"{path}.bin").write_bytes(np.concatenate(sequences).tobytes())
    return str(path)


def text(document: str) -> list[list[int]]:
    return [[*document.encode(), END]]


def ten(folder: Path, **kinds: int) -> str:
    return write(folder / "ten_text_document", [text(f"document {i}") for i in range(10)], **kinds)


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_documents_are_split_in_their_order(code: int, tmp_path: Path) -> None:
    corpus = MegatronShards(train=ten(tmp_path, code=code), tokenizer=Bytes(), split="6,3,1").load()
    found = {name: corpus.tokenizer.decode(split.tokens_N) for name, split in corpus.splits.items()}
    assert found == {
        "train": "".join(f"document {i}\n" for i in range(6)),
        "validation": "document 6\ndocument 7\ndocument 8\n",
        "test": "document 9\n",
    }
    assert [split.documents for split in corpus.splits.values()] == [6, 3, 1]
    assert [split.lengths_S.tolist() for split in corpus.splits.values()] == [[11] * 6, [11] * 3, [11]]
    assert [split.bytes for split in corpus.splits.values()] == [None, 30, None]
    assert corpus.gzip_bits_per_byte is not None and 5 < corpus.gzip_bits_per_byte < 20
    assert {len(corpus.digest)} == {16}


@pytest.mark.parametrize(
    ("split", "documents"),
    [
        ("949,50,1", {"train": 9, "validation": 1}),
        ("1", {"train": 10}),
        ("1,0,1", {"train": 5, "test": 5}),
        ("0.5,0.25,0.25", {"train": 5, "validation": 3, "test": 2}),  # Megatron rounds the borders: 5, 7.5, 10
    ],
)
def test_shares_are_rounded_as_megatron_does(split: str, documents: dict[str, int], tmp_path: Path) -> None:
    corpus = MegatronShards(train=ten(tmp_path), tokenizer=Bytes(), split=split).load()
    assert {name: split.documents for name, split in corpus.splits.items()} == documents


def test_several_pairs_are_one_stream(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [text("one"), [[1, 2], [], [3, END]]])
    second = write(tmp_path / "b", [text("two")], code=4)
    held_out = write(tmp_path / "v", [text("half"), text("out")])
    data = MegatronShards(
        train=f"{first}, {second}.bin", tokenizer=Bytes(), validation=held_out, test=f"{held_out}.idx"
    )
    assert not list(data.check())
    corpus = data.load()
    train = corpus.splits["train"]
    assert np.asarray(train.tokens_N[0 : len(train.tokens_N)]).tolist() == [*b"one", END, 1, 2, 3, END, *b"two", END]
    assert (train.lengths_S.tolist(), train.documents_D.tolist()) == ([4, 2, 0, 2, 4], [0, 1, 4, 5])
    assert {name: split.documents for name, split in corpus.splits.items()} == {"train": 3, "validation": 2, "test": 2}
    assert corpus.splits["validation"].bytes == 7
    batch = Loader(corpus=corpus, sequence_length=4).check().train([0, 1, 2])
    assert sorted(batch["tokens"].reshape(-1).tolist()) == sorted([*b"one", END, 1, 2, 3, END, *b"two", END])
    alone = MegatronShards(train=first, tokenizer=Bytes(), validation=held_out).load()
    assert alone.digest != corpus.digest


def test_empty_documents_are_harmless_and_every_token_counts(tmp_path: Path) -> None:
    documents = [[], text("one"), [], text("two"), []]
    data = MegatronShards(train=write(tmp_path / "x", documents), tokenizer=Bytes(), split="1,1,0")
    corpus = data.load()
    assert [split.bytes for split in corpus.splits.values()] == [None, 3]
    assert corpus.splits["train"].documents_D.tolist() == [0, 0, 1]
    digests = {corpus.digest}
    for changed in ([[], text("onE"), [], text("two"), []], [[], text("one"), [], [[*b"tw"], [*b"o", END]], []]):
        write(tmp_path / "x", changed)
        digests.add(data.load().digest)
    assert len(digests) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5), st.data())
def test_joined_streams_are_sliced_as_one(parts: list[list[int]], data: st.DataObject) -> None:
    joined, whole = _Joined([np.array(part, np.uint16) for part in parts]), [token for part in parts for token in part]
    start, stop = data.draw(st.integers(-3, 30)), data.draw(st.integers(-3, 30))
    found = joined[start:stop]
    assert isinstance(found, np.ndarray) and (found.tolist(), found.dtype) == (whole[start:stop], np.uint16)
    assert len(joined) == len(whole) and [int(joined[i]) for i in range(-len(whole), len(whole))] == whole * 2


def test_it_trains_on_what_prepare_writes(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "train", "uint16", END)
    for document in ("first", "second", "third"):
        writer.add([np.frombuffer(document.encode(), np.uint8)], text_bytes=len(document))
    writer.finish()
    writer.publish()
    corpus = MegatronShards(train=str(tmp_path / "train"), tokenizer=Bytes(), split="2,1").load()
    assert corpus.tokenizer.decode(corpus.splits["train"].tokens_N) == "first\nsecond\n"


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            [text("good"), [[*b"no end"]]],
            r"data\.train=.*x: document 1 ends with token 100, not with the end of document 256",
        ),
        (
            [text("good"), [[*b"open"], []]],
            r"document 1 ends with token 110, .* \(Megatron-LM: --append-eod; datatrove: eos",
        ),
        (
            [text("good"), [[257, END]]],
            r"x: token 5 is 257, and the tokenizer has 257; the shards were written with another",
        ),
        ([[[-1, END]]], r"x: token 0 is -1, and"),
        ([[[]]], r"x holds no tokens"),
    ],
    ids=["open", "open sequence", "outside", "negative", "empty"],
)
@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_what_cannot_be_trained_on_is_refused(
    documents: list[list[list[int]]], message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_shards, "BLOCK", block)
    data = MegatronShards(train=write(tmp_path / "x", documents, code=4), tokenizer=Bytes(), split="1")
    with pytest.raises(ValueError, match=message):
        data.load()
    held_out = MegatronShards(train=ten(tmp_path), tokenizer=Bytes(), validation=data.train)
    with pytest.raises(ValueError, match=message.replace(r"data\.train", r"data\.validation")):
        held_out.load()


def test_of_long_streams_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_shards, "BLOCK", 11)  # a document
    monkeypatch.setattr(megatron_shards, "BLOCKS", 3)
    monkeypatch.setattr(megatron_shards, "DECODED_TOKENS", 10)
    documents = [text(f"document {i}") for i in range(9)]
    documents[3][0][4] = 999
    train = write(tmp_path / "x", documents, code=4)
    corpus = MegatronShards(train=train, tokenizer=Bytes(), validation=train).load()
    assert corpus.splits["validation"].bytes is None and corpus.gzip_bits_per_byte is None
    for checked in (0, 4, 8):
        documents[checked][0][4] = 999
        with pytest.raises(ValueError, match=rf"token {11 * checked + 4} is 999"):
            MegatronShards(train=write(tmp_path / "x", documents, code=4), tokenizer=Bytes(), split="1").load()
        documents[checked] = text("document 0")


def test_damage_and_typing_errors_are_named(tmp_path: Path) -> None:
    ten(tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.train: .*tin_text_document\.idx cannot be read.* mean .*ten_text_document\?"
    ):
        MegatronShards(train=str(tmp_path / "tin_text_document"), tokenizer=Bytes()).load()
    (tmp_path / "ten_text_document.bin").write_bytes(b"x")
    train, validation = write(tmp_path / "y", [text("y")]), str(tmp_path / "ten_text_document")
    with pytest.raises(ValueError, match=r"data\.validation: .* they are no pair\.$"):
        MegatronShards(train=train, tokenizer=Bytes(), validation=validation).load()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"train": " ,"}, ("train", "is empty; name a pair of files without .bin and .idx")),
        ({"validation": ""}, ("validation", "is empty; name a pair of files without .bin and .idx")),
        (
            {"test": "x"},
            ("test", "needs validation, for without it split gives both; name validation, or leave out test"),
        ),
        ({"split": "0,1"}, ("split", "must be one to three numbers, the first above 0, none below; try 949,50,1")),
        ({"split": "a"}, ("split", "must be one to three numbers, the first above 0, none below; try 949,50,1")),
    ],
)
def test_wrong_fields(fields: dict[str, str], problem: tuple[str, str]) -> None:
    assert list(MegatronShards(**{"train": "x", "tokenizer": Bytes(), **fields}).check()) == [problem]


def test_a_missing_tokenizer_is_a_wrong_field() -> None:
    ((field, why),) = MegatronShards(train="x", tokenizer=Gpt2(folder="nowhere")).check()
    assert field == "tokenizer.folder" and why.startswith("cannot be used: nowhere")


@pytest.mark.slow
def test_shards_that_datatrove_wrote(tmp_path: Path) -> None:
    make = pytest.importorskip("datatrove.pipeline.tokens").MegatronDocumentTokenizer
    document = pytest.importorskip("datatrove.data").Document
    texts = [f"Document {i} of many: {'word ' * (i % 17)}\n" for i in range(300)]
    definition = tmp_path / "tokenizer.json"
    definition.write_bytes(Bpe(vocab_size=300).learn(texts))
    step = make(str(tmp_path), tokenizer_name_or_path=str(definition), eos_token="<|endoftext|>")
    step.run(iter([document(text=text, id=str(i)) for i, text in enumerate(texts)]), rank=0, world_size=1)
    (index,) = tmp_path.glob("*.idx")
    corpus = MegatronShards(train=str(index), tokenizer=TokenizerFile(path=str(definition)), split="270,30").load()
    assert corpus.tokenizer.decode(corpus.splits["train"].tokens_N) == "".join(f"{text}\n" for text in texts[:270])
    assert corpus.splits["validation"].bytes == sum(len(text) for text in texts[270:])
