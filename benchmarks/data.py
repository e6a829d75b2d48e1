"""How fast batches are read, and what it costs to start reading somewhere.

    python -m benchmarks.data [MILLIONS_OF_TOKENS]

Writes token shards of random numbers (400 million tokens by default, 0.8 GB, in a temporary folder), reads them through
Loader, and numpy's own gather of as many rows from the same file as the peer.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import (
    AnyObjective,
    BestFit,
    Blended,
    CausalLm,
    Concatenate,
    Corpus,
    FillInTheMiddle,
    Loader,
    MaskedLm,
    SpanCorruption,
    Split,
)
from data.tokenizer import ByteTokenizer

ROWS, SECONDS = 256, 3.0
END = ByteTokenizer.end_of_document


def split(folder: Path, tokens: int) -> Split:
    random = np.random.default_rng(0)
    stream_N = np.memmap(folder / "train.bin", np.uint16, "w+", shape=(tokens,))
    for start in range(0, tokens, 1 << 24):
        here = stream_N[start : start + (1 << 24)]
        here[:] = random.integers(0, 256, len(here), dtype=np.uint16)
    ends = np.arange(799, tokens, 800)
    stream_N[ends] = END
    stream_N.flush()
    return Split(
        tokens_N=np.memmap(folder / "train.bin", np.uint16, "r")[: ends[-1] + 1],
        lengths_S=np.full(len(ends), 800, np.int32),
        documents_D=np.arange(len(ends) + 1),
        bytes=None,
    )


def rate(read: Callable[[int], object], row_tokens: int) -> tuple[float, float]:
    """Millions of tokens per second of wall and of CPU time; `read(n)` reads the n-th batch of ROWS rows."""
    read(0)
    batch, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < SECONDS:
        batch += 1
        read(batch)
    found = batch * ROWS * row_tokens / 1e6
    return found / (time.perf_counter() - wall), found / (time.process_time() - cpu)


def corpus(there: Split) -> Corpus:
    splits = {"train": there}
    return Corpus(source="random", tokenizer=ByteTokenizer(), splits=splits, digest="", gzip_bits_per_byte=None)


def gather(there: Split, length: int) -> Callable[[int], np.ndarray]:
    random = np.random.default_rng(1)
    starts = random.integers(0, len(there.tokens_N) - length - 1, (64, ROWS))
    return lambda batch: np.stack([there.tokens_N[s : s + length + 1].astype(np.int32) for s in starts[batch % 64]])


def main() -> None:
    tokens = int(float(sys.argv[1]) * 1e6) if len(sys.argv) > 1 else 400_000_000
    with tempfile.TemporaryDirectory() as folder:
        there = split(Path(folder), tokens)
        one = corpus(there)
        fifteen = Blended({f"s{i}": one for i in range(15)}, [1 + i / 10 for i in range(15)])
        print("| rows of | how | million tokens/s | per CPU second |\n|---|---|---|---|")

        def line(length: int, how: str, read: Callable[[int], object]) -> None:
            wall, cpu = rate(read, length)
            print(f"| {length:,} | {how} | {wall:.1f} | {cpu:.1f} |", flush=True)

        for length in (1024, 4096):
            line(length, "numpy's gather of random rows", gather(there, length))
            line(length, "Loader", reader(one, length))
            line(length, "Loader, documents joined", reader(one, length, packing=Concatenate(isolate_documents=False)))
            line(length, "Loader, a blend of 15 sources", reader(fifteen, length))
        for objective in (FillInTheMiddle(characters=False), MaskedLm(), SpanCorruption()):
            line(1024, f"Loader, {type(objective).__name__}", reader(one, 1024, objective=objective))
        few = Split(
            tokens_N=there.tokens_N[: 800 * 50_000],
            lengths_S=there.lengths_S[:50_000],
            documents_D=there.documents_D[:50_001],
            bytes=None,
        )
        line(1024, "Loader, BestFit of 50,000 documents", reader(corpus(few), 1024, packing=BestFit()))
        for name, text in (("one source", one), ("a blend of 15", fifteen)):
            seconds = first_batch(text)
            print(f"| 1,024 | a new Loader's first batch at sample 10^9, {name} | {seconds:.3f} s | |")


def reader(
    text: Corpus | Blended,
    length: int,
    *,
    objective: AnyObjective = CausalLm(),
    packing: Concatenate | BestFit = Concatenate(),
) -> Callable[[int], object]:
    loader = Loader(corpus=text, sequence_length=length, objective=objective, packing=packing).check()
    return lambda batch: loader.train(range(batch * ROWS, (batch + 1) * ROWS))


def first_batch(text: Corpus | Blended) -> float:
    started = time.perf_counter()
    Loader(corpus=text, sequence_length=1024, seed=1).check().train(range(10**9, 10**9 + ROWS))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
