"""Quickstart's model on your own text: two passes over the folder notes/, byte-level BPE learned from it.

Half a megabyte of prose gives about 160,000 tokens of 1,024 kinds; a larger text deserves a larger vocabulary (8,192
from about 50 MB on) and a larger model. Learning rate and batch are quickstart's.

    python main.py prepare --config configs/own_text.py data.paths=my/folder
    python main.py --config configs/own_text.py data.paths=my/folder
"""

from dataclasses import replace

from configs.quickstart import get_config as quickstart
from data import Bpe, TextFiles
from mtx.config import Config


def get_config() -> Config:
    base = quickstart()
    tokenizer = Bpe(vocab_size=1024)
    return replace(
        base,
        model=replace(base.model, vocab_size=tokenizer.vocab_size),
        data=TextFiles(paths="notes", tokenizer=tokenizer),
        steps=None,
        epochs=2.0,
        log_every=50,
        eval_every=100,
        sample_tokens=40,
    )
