"""Continue prompts with a trained model.

Standard output holds the texts and nothing else; what is to be said goes to the log.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from data import Loader
from data.tokenizer import Tokenizer
from mtx import decode
from mtx.building import open_run
from mtx.command import log_to_stderr, run_folder
from mtx.decode import Sampling
from mtx.errors import ConfigError
from mtx.spmd import Params
from mtx.step import Program

log = logging.getLogger("mtx")

TOKENS = 128


class Asked(NamedTuple):
    """Flags that are right."""

    prompts: list[str]
    tokens: int
    sampling: Sampling
    seed: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    usual = Sampling()
    add = parser.add_argument_group("generate RUN").add_argument
    add("--prompt", metavar="TEXT", dest="prompts", action="append", type=str, help="a text to continue; repeatable")
    add(
        "--prompt-file",
        metavar="FILE",
        dest="prompts",
        action="append",
        type=Path,
        help="a file whose whole text, but for a newline at its end, is one prompt; repeatable",
    )
    add("--tokens", metavar="N", type=int, default=TOKENS, help=f"new tokens per prompt, at most ({TOKENS})")
    add(
        "--temperature",
        metavar="X",
        type=float,
        default=usual.temperature,
        help=f"0 takes the most probable token; above 1 is wilder than the model ({usual.temperature})",
    )
    add("--top-k", metavar="K", type=int, help="sample from the K most probable tokens alone")
    add("--top-p", metavar="P", type=float, help="sample from the most probable tokens that reach probability P alone")
    add("--step", metavar="N", type=int, help="this checkpoint instead of the newest")
    add("--seed", metavar="S", type=int, default=0, help="equal seeds give equal texts, on every mesh (0)")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py generate RUN --prompt TEXT`: returns the exit code."""
    folder, overrides = run_folder(flags, words, "generate")

    def opened() -> tuple[Program, Params, Loader]:
        log_to_stderr()
        run = open_run(folder, overrides, flags.step)
        return run.program, run.params, run.loader

    run(flags, opened)
    return 0


def check(flags: argparse.Namespace) -> Asked:
    """The flags' meaning, found without a device. Raises: ConfigError."""
    if not flags.prompts:
        raise ConfigError("generate needs --prompt TEXT or --prompt-file FILE; --prompt '' starts a new document.")
    if flags.tokens < 1:
        raise ConfigError(f"--tokens {flags.tokens} must be at least 1.")
    if not 0 <= flags.seed < 2**32:
        raise ConfigError(f"--seed {flags.seed} must lie in 0..{2**32 - 1}.")
    sampling = Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
    for field, why in sampling.check():
        raise ConfigError(f"--{field.replace('_', '-')} {getattr(sampling, field)} {why}.")
    return Asked([_text(prompt) for prompt in flags.prompts], flags.tokens, sampling, flags.seed)


def _text(prompt: str | Path) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return prompt.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(f"--prompt-file {prompt} cannot be read: {why}.") from error


def run(flags: argparse.Namespace, opened: Callable[[], tuple[Program, Params, Loader]]) -> None:
    """Prints each prompt with its continuation; several get a line with their number above them.

    `opened` gives the trained model; it is called once the flags are known to be right. Raises: ConfigError.
    """
    asked = check(flags)
    program, params, loader = opened()
    texts = answers(
        program, params, loader, asked.prompts, tokens=asked.tokens, sampling=asked.sampling, seed=asked.seed
    )
    if jax.process_index() == 0:
        print(page(asked.prompts, texts), flush=True)


def page(prompts: Sequence[str], texts: Sequence[str]) -> str:
    """Prompts and continuations as they are printed."""
    whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    if len(whole) == 1:
        return whole[0]
    return "\n\n".join(f"--- {i}/{len(whole)} ---\n{text}" for i, text in enumerate(whole, 1))


def answers(
    program: Program,
    params: Params,
    loader: Loader,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, up to its end of document. An empty prompt starts a document.

    Raises: ConfigError for what the model cannot do (`decode.generate`).
    """
    tokenizer, isolated = loader.corpus.tokenizer, loader.packing.isolate_documents
    end = tokenizer.end_of_document
    if isolated and not all(prompts):
        log.warning(
            "an empty prompt stands for the end of the document before, which this model never saw go on "
            "(packing.isolate_documents=true); a few characters give better texts"
        )
    starts = [tokenizer.encode(prompt) or [end] for prompt in prompts]
    size = tokenizer.vocab_size
    found = decode.generate(
        program, params, starts, tokens=tokens, sampling=sampling, seed=seed, stop=end, vocab_size=size
    )
    return [_continuation(tokenizer, start, new) for start, new in zip(starts, found, strict=True)]


def _continuation(tokenizer: Tokenizer, start: list[int], new: list[int]) -> str:
    """Text of the new tokens as it follows the prompt's: a tokenizer may write a first token differently."""
    before, whole = tokenizer.decode(start), tokenizer.decode(start + new)
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)
