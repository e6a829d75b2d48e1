"""The verb `eval`: a run's loss, perplexity and bits per byte, from its newest checkpoint that verifies; and a seqio
Task's own metrics of it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from data import SeqioTask
from data.batches.objectives.row import Example, examples_row
from data.sources.seqio_task.metrics import Question, evaluate
from mtx import config as configs
from mtx import decode
from mtx.building import Opened, open_run
from mtx.command import log_to_stderr, run_folder
from mtx.decode import Sampling
from mtx.errors import ConfigError, DataError
from mtx.validation import validate

LONGER = 2
"""An answer is cut off when it is so many times as long as the longest right one."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("eval RUN").add_argument
    add("--split", default="validation", choices=("train", "validation", "test"), help="which part of the data")
    add("--metrics", metavar="N", type=int, help="data=SeqioTask: the first N examples through the Task's own metrics")
    add("--step", metavar="N", type=int, help="this checkpoint instead of the newest")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py eval RUN`: prints one JSON object. `eval_sequences=0` measures all of the split."""
    folder, overrides = run_folder(flags, words, "eval")
    if flags.metrics is not None:
        refuse_metrics(folder, overrides, flags)
    log_to_stderr()
    run = open_run(folder, overrides, flags.step)
    eval_fn = jax.jit(run.program.eval_sums)
    with jax.set_mesh(run.program.mesh):
        values = validate(run.config, run.program, run.loader, eval_fn, run.params, split=flags.split)
    more = {}
    if flags.metrics is not None:
        more = {"metrics": task_metrics(run, flags.split, flags.metrics)}
    found = {name.removeprefix("val/"): value for name, value in values.items()}
    print(json.dumps({"run": str(folder), "step": run.step, "split": flags.split, **found, **more}))
    return 0


def refuse_metrics(folder: Path, overrides: list[str], flags: argparse.Namespace) -> None:
    """Before anything is read. Raises: ConfigError."""
    data = configs.override(configs.read_config(folder), overrides).data
    if flags.metrics < 1:
        raise ConfigError(f"--metrics {flags.metrics} must be at least 1, a number of examples; such as --metrics 500.")
    if not isinstance(data, SeqioTask):
        kind = type(data).__name__
        raise ConfigError(f"--metrics is for data=SeqioTask, and this run has data={kind}; leave it out of eval.")
    if _task_split(data, flags.split) is None:
        raise ConfigError(f"--metrics needs the Task's {flags.split} split, and data.{flags.split}=None; name it.")


def _task_split(data: SeqioTask, split: str) -> str | None:
    """seqio's name of a split."""
    return {"train": data.split, "validation": data.validation, "test": data.test}[split]


def task_metrics(run: Opened, split: str, most: int) -> dict[str, dict[str, float]]:
    """Of each task its metrics by name, on the first `most` examples of a split. Raises: DataError."""
    data = run.config.data
    assert isinstance(data, SeqioTask), "refuse_metrics comes first"
    name = _task_split(data, split)
    assert name is not None
    models = _Model(run)
    try:
        return evaluate(data, generate=models.answers, score=models.scores, split=name, most=most)
    except ValueError as error:
        raise DataError(str(error)) from error


class _Model:
    """What `evaluate` asks of a model."""

    def __init__(self, run: Opened) -> None:
        self._run, self._frame = run, run.loader.frame
        self._end = run.loader.corpus.tokenizer.end_of_document

    def answers(self, questions: Sequence[Question]) -> list[list[int]]:
        """Greedy, up to the end."""
        room = self._frame.sequence_length - max(len(question.inputs) for question in questions) - 1
        longest = LONGER * max(len(question.targets) for question in questions)
        return decode.generate(
            self._run.program,
            self._run.params,
            [question.inputs.tolist() or [self._end] for question in questions],
            tokens=max(1, min(longest, room)),
            sampling=Sampling(temperature=0.0),
            stop=self._end,
            vocab_size=self._run.loader.corpus.tokenizer.vocab_size,
        )

    def scores(self, questions: Sequence[Question]) -> list[float]:
        """In nats, of the targets and the end behind them. Raises: ValueError for one that is longer than a row."""
        eval_fn, program = jax.jit(self._run.program.eval_sums), self._run.program
        shards, length = program.layout.size(*program.layout.batch_axes), self._frame.sequence_length
        found = []
        for number, (inputs, targets) in enumerate(questions):
            before = inputs if len(inputs) else np.array([self._end])
            tokens = np.concatenate([before, targets, [self._end]]).astype(np.int32)
            if len(tokens) > length + 1:
                raise ValueError(
                    f"example {number} has {len(tokens)} tokens, more than batch.sequence_length={length} can hold."
                )
            prefix = self._run.loader.objective.attention == "prefix"
            row = examples_row([Example(tokens, len(before))], self._frame, prefix=prefix)

            def load(rows: np.ndarray, row=row) -> dict[str, np.ndarray]:
                arrays = {name: np.broadcast_to(x, (len(rows), *x.shape)).copy() for name, x in row.items()}
                arrays["weights"][rows > 0] = 0  # one row for each data shard, of which the first counts
                return arrays

            batch = program.place_rows(load, (1, shards, length), program.batch_spec)
            with jax.set_mesh(program.mesh):
                found.append(-float(np.asarray(eval_fn(self._run.params, batch))[0]))
        return found
