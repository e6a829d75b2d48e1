"""`data show`: documents, bytes and text of a sample are those that training reads."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from data import Bytes, FillInTheMiddle, TextFiles
from mtx import config as configs
from mtx.building import make_loader
from mtx.data_tools import show


@pytest.fixture
def config(tmp_path: Path) -> configs.Config:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " + "word " * i)
    quick = configs.load("configs/quickstart.py").config
    data = TextFiles(paths=str(tmp_path), folder=str(tmp_path / "shards"), split="8,2", tokenizer=Bytes())
    data.prepare(lambda line: None, workers=1)
    batch = dataclasses.replace(quick.batch, sequence_length=40)
    return dataclasses.replace(quick, data=data, batch=batch)


def test_bytes_and_text_are_those_of_the_sample(config: configs.Config, tmp_path: Path):
    loader = make_loader(config, config.data.load())
    raw = np.fromfile(tmp_path / "shards/train.bin", np.uint8)
    for sample in (0, 17, 10_000):
        first, *documents, counts, text = show.lines(config, loader, sample)
        origin = loader.origin(sample)
        assert first == f"sample {sample}: row {origin.row:,}, after {origin.epoch:,} epochs of its source"
        parts = []
        for line in documents:
            found = re.fullmatch(
                r"  (?:part of )?document (\d+) \((.*)\): bytes ([\d,]+) to ([\d,]+) of .*train.bin", line
            )
            assert found, line
            start, end = (int(number.replace(",", "")) for number in found.groups()[2:])
            content = raw[start:end].view("<u2")
            whole = Path(found[2]).read_text()
            parts.append("".join(chr(t) if t < 256 else "<end>" for t in content))
            assert parts[-1].removesuffix("<end>") in whole
        real = int((loader.train([sample])["segments"] > 0).sum())
        assert counts.startswith(f"{real} tokens, ")
        joined = "".join(parts)
        assert (
            text == (joined[:-5] if joined.endswith("<end>") and len(joined) - 4 > real else joined[:-1])[: len(text)]
        )


def test_special_tokens_are_shown_by_name(config: configs.Config):
    config = dataclasses.replace(config, objective=FillInTheMiddle(rate=1.0, spm_rate=0.0))
    *_, text, said, targets = show.lines(config, make_loader(config, config.data.load()), 3)
    assert text.startswith("<fim_prefix>") and "<fim_suffix>" in text and "<fim_middle>" in text
    assert said == "targets that weigh:" and "<fim_middle>" in targets
