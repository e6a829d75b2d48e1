"""`data show`: where a sample of a run comes from, and its text. Touches no device."""

import argparse
from collections.abc import Iterator

import numpy as np

from data import Loader, Origin, Prepared, sources_of
from mtx import config as configs
from mtx.building import load_data
from mtx.command import run_folder
from mtx.config import Config
from mtx.errors import ConfigError, DataError


def main(flags: argparse.Namespace, words: list[str]) -> int:
    """`python main.py data show RUN --sample N`: returns the exit code."""
    folder, overrides = run_folder(flags, words, "data show")
    if flags.sample is None or flags.sample < 0:
        raise ConfigError("data show needs --sample N, the number of a sample, from 0; such as --sample 123456.")
    config = configs.override(configs.read_config(folder), overrides)
    configs.check(config)
    loader = load_data(config)
    try:
        print("\n".join(lines(config, loader, flags.sample)))
    except ValueError as error:
        raise DataError(str(error)) from error
    return 0


def lines(config: Config, loader: Loader, sample: int) -> Iterator[str]:
    """What is shown of a sample. Raises: ValueError if the run has no such sample."""
    if loader.blend.end is not None and sample >= loader.blend.end:
        raise ValueError(f"there is no sample {sample}: every source has reached its max_epochs at {loader.blend.end}.")
    origin, batch = loader.origin(sample), loader.train([sample])
    source = f"source {origin.source}, " if origin.source else ""
    epochs = "" if origin.epoch is None else f", after {origin.epoch:,} epochs of its source"
    yield f"sample {sample}: {source}row {origin.row:,}{epochs}"
    yield from _documents(config, loader, origin)
    real, learned = int((batch["segments"] > 0).sum()), int((batch["weights"] > 0).sum())
    yield f"{real:,} tokens, {learned:,} targets that weigh; as the model reads them:"
    yield text(loader, batch["tokens"][0][batch["segments"][0] > 0])
    if loader.objective.attention != "causal" or loader.objective.needs:
        yield "targets that weigh:"
        yield text(loader, batch["targets"][0][batch["weights"][0] > 0])


def _documents(config: Config, loader: Loader, origin: Origin) -> Iterator[str]:
    split = loader.corpus.parts[origin.source].splits["train"]
    data = sources_of(config.data)[origin.source]
    starts_D, tokens_N = split.document_starts(), split.tokens_N
    for start, end in origin.spans:
        first, last = np.searchsorted(starts_D, [start, end - 1], side="right") - 1
        for document in range(int(first), int(last) + 1):
            here = max(start, int(starts_D[document])), min(end, int(starts_D[document + 1]))
            name = data.part_of("train", document) if isinstance(data, Prepared) else None
            place = f"tokens {here[0]:,} to {here[1]:,} of the training split"
            if isinstance(tokens_N, np.memmap):
                place = (
                    f"bytes {here[0] * tokens_N.itemsize:,} to {here[1] * tokens_N.itemsize:,} of {tokens_N.filename}"
                )
            whole = here == (starts_D[document], starts_D[document + 1])
            yield f"  {'' if whole else 'part of '}document {document:,}{f' ({name})' if name else ''}: {place}"


def text(loader: Loader, tokens_T: np.ndarray) -> str:
    """Tokens as text, special ones by their names."""
    names = {loader.frame.end_of_document: "end"} | loader.frame.specials.names()
    parts: list[str] = []
    plain: list[int] = []
    for token in tokens_T.tolist():
        if token not in names:
            plain.append(token)
            continue
        parts += [loader.corpus.tokenizer.decode(plain), f"<{names[token]}>"]
        plain = []
    return "".join([*parts, loader.corpus.tokenizer.decode(plain)])
