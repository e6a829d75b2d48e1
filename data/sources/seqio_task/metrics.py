"""A Task's own metric functions over what a model answers to its held-out examples.

The model answers in the training process, which has no TensorFlow; the Task's module is in a process of its own
(data/tensorflow_process.py), as its metric functions and postprocessors are: `evaluate` goes there for the examples,
and again with the answers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from data import tensorflow_process
from data.sources.seqio_task import inside
from data.sources.seqio_task.config import SeqioTask
from data.sources.seqio_task.inside import Recipe
from data.tensorflow_process import Wrong

HERE = "data.sources.seqio_task.metrics"
INPUTS = "inputs"
"""What precedes the targets, where a Task has it."""


class Question(NamedTuple):
    """An example as tokens, without ends."""

    inputs: np.ndarray
    """int32; empty where the Task has none."""
    targets: np.ndarray
    """int32: what a good answer is."""


Generate = Callable[[Sequence[Question]], Sequence[Sequence[int]]]
"""The model's answers to the inputs, as tokens, up to their end."""
Score = Callable[[Sequence[Question]], Sequence[float]]
"""The log-likelihood of each question's targets, and of the end behind them, after its inputs."""


def evaluate(
    config: SeqioTask,
    *,
    generate: Generate | None = None,
    score: Score | None = None,
    split: str = "validation",
    most: int | None = None,
) -> dict[str, dict[str, float]]:
    """Of each task that has metrics and the split (seqio's name), its metrics by name; of its first `most` examples.

    Raises: ValueError if there is none, if a metric needs what is not given, and for what goes wrong in the Task.
    """
    values = {}
    tasks = config.describe().tasks
    for name in tasks:
        recipe = config.recipe_of(name).plain()
        asked = {"recipe": recipe, "split": split, "most": most}

        def stream(function: str, more: dict[str, Any], name: str = name) -> Iterator[tensorflow_process.Item]:
            arguments, doing = more, f"metrics of {name}"
            return tensorflow_process.stream(f"{HERE}:{function}", arguments, silence_s=config.silence_s, doing=doing)

        items = list(stream("questions", asked))
        if not items:
            continue
        needs, *arrays = items
        assert isinstance(needs, dict)
        found = [Question(*pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]  # pyrefly: ignore
        answers = _answers(name, needs["needs"], found, generate, score)
        (measured,) = stream("measure", asked | answers)
        assert isinstance(measured, dict)
        values[name] = measured
    if not values:
        raise ValueError(f"{config.described}: none of {', '.join(tasks)} has the split {split} and metric functions.")
    return values


def _answers(
    name: str, needs: Sequence[str], found: Sequence[Question], generate: Generate | None, score: Score | None
) -> dict[str, Any]:
    """What the model says, as plain data."""
    given = {"predictions": generate, "scores": score}
    if lacking := [kind for kind in needs if given[kind] is None]:
        raise ValueError(f"the metrics of {name} need {lacking[0]}, and nothing here gives them.")
    said = {kind: function(found) for kind, function in given.items() if kind in needs and function is not None}
    assert all(len(one) == len(found) for one in said.values()), "one answer for each question"
    return {kind: [np.asarray(one).tolist() for one in said[kind]] if kind in said else None for kind in given}


# In a process with TensorFlow


def questions(recipe: dict[str, Any], split: str, most: int | None) -> Iterator[Any]:
    """What the metrics need, then of each example its inputs and its targets; nothing for a Task without metrics."""
    asked = Recipe(**recipe)
    task = inside.provider(asked.module, asked.mixture)
    if split not in task.splits or not task.metric_objs:
        return
    end = inside.feature(task, asked).vocabulary.eos_id
    yield {"needs": sorted({_need(metric) for metric in task.metric_objs})}
    for example in _examples(task, asked, split, most):
        yield inside.document(example.get(INPUTS, np.empty(0, np.int32)), end)
        yield inside.document(example[asked.feature], end)


def measure(
    recipe: dict[str, Any],
    split: str,
    most: int | None,
    predictions: list[list[int]] | None,
    scores: list[float] | None,
) -> Iterator[dict[str, float]]:
    """The Task's metrics by name, computed as `seqio.Evaluator` does."""
    import seqio

    asked = Recipe(**recipe)
    task = inside.provider(asked.module, asked.mixture)
    examples = list(_examples(task, asked, split, most))
    outputs = {"scores": np.array(scores), "predictions": _padded(predictions, inside.feature(task, asked).vocabulary)}
    values: dict[str, float] = {}
    for metric in task.metric_objs:
        features = task.output_features
        try:
            found = metric.from_model_output(examples, outputs[_need(metric)], features, asked.feature)
            collects = isinstance(found, seqio.metrics.CollectingMetric)
            computed = found.actual_compute(examples, features, asked.feature)[0] if collects else found.compute()
        except Exception as error:
            raise ValueError(f"a metric of {task.name} fails: {inside.said(error)}") from error
        for name, value in computed.items():
            if name in values:
                raise ValueError(f"two metrics of {task.name} have the name {name}.")
            plain = value.value if isinstance(value, seqio.metrics.Scalar) else value
            if np.ndim(plain) == 0 and not isinstance(plain, seqio.metrics.MetricValue):  # not of pictures and texts
                values[name] = float(plain)
    yield values


def _need(metric: Any) -> str:
    """Which of a model's outputs a metric is of. Raises: Wrong."""
    kind = metric.model_output_type.name
    if kind not in ("PREDICTION", "SCORE"):
        raise Wrong("mixture", f"has a metric of {kind}; those of predictions, and of scores alone, can be computed")
    return {"PREDICTION": "predictions", "SCORE": "scores"}[kind]


def _examples(task: Any, recipe: Recipe, split: str, most: int | None) -> Iterator[dict[str, Any]]:
    found = inside.whole_examples(task, recipe, split)
    return islice(inside.examples(found.as_numpy_iterator(), f"{task.name}, split {split}"), most)


def _padded(rows: list[list[int]] | None, vocabulary: Any) -> np.ndarray | None:
    """Of one length, each with its end, as what decodes them expects."""
    if rows is None:
        return None
    filled = np.full((len(rows), max(map(len, rows), default=0) + 1), vocabulary.pad_id, np.int32)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens) + 1] = [*tokens, vocabulary.eos_id]
    return filled
