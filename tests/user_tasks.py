"""A user's seqio module, copied to where the tests of `SeqioTask` want it: its texts lie beside it."""

import functools
import time
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

HERE = Path(__file__).parent
BYTES = seqio.ByteVocabulary(extra_ids=10)


def lines(name, **splits):
    return seqio.TextLineDataSource({split: str(HERE / f"{name}_{file}.txt") for split, file in splits.items()})


def keyed(ds):
    return ds.map(lambda line: {"targets": line})


def question(ds):
    def cut(line):
        parts = tf.strings.split(line, "\t")
        return {"inputs": parts[0], "targets": parts[1]}

    return ds.map(cut)


def numbers(ds):
    return ds.map(lambda line: {"targets": tf.strings.to_number(tf.strings.split(line, " "), tf.int32)})


def sleeps(ds):
    def asleep(line):
        time.sleep(1000)
        return line

    return ds.map(lambda line: tf.ensure_shape(tf.numpy_function(asleep, [line], tf.string), []))


def shorter(ds, sequence_length):
    return ds.map(lambda example: {"targets": example["targets"][: sequence_length["targets"]]})


@seqio.map_over_dataset(num_seeds=1)
def chosen(example, seed):
    """A random token of each document."""
    at = tf.random.stateless_uniform([], seed, 0, tf.size(example["targets"]), tf.int32)
    return {"targets": example["targets"][at : at + 1]}


def exact(targets, predictions):
    return {"exact": np.mean([target == prediction for target, prediction in zip(targets, predictions, strict=True)])}


def mean_score(targets, scores):
    return {"mean_score": np.mean(scores)}


def features(vocabulary=BYTES, *names, add_eos=True):
    return {name: seqio.Feature(vocabulary, add_eos=add_eos) for name in names or ("targets",)}


SPLITS = {"train": "train", "validation": "validation"}
STEPS = [keyed, seqio.preprocessors.tokenize]
END = seqio.preprocessors.append_eos
add = functools.partial(seqio.TaskRegistry.add)
add("a", source=lines("a", **SPLITS), preprocessors=[*STEPS, END], output_features=features())
add("b", source=lines("b", **SPLITS), preprocessors=STEPS, output_features=features())
add("trained", source=lines("b", train="train"), preprocessors=STEPS, output_features=features())
add("held", source=lines("b", validation="validation"), preprocessors=STEPS, output_features=features())
add("sleeps", source=lines("b", **SPLITS), preprocessors=[sleeps, *STEPS], output_features=features())
add("short", source=lines("a", **SPLITS), preprocessors=[*STEPS, shorter], output_features=features())
add("chosen", source=lines("a", **SPLITS), preprocessors=[*STEPS, chosen], output_features=features())
add(
    "asked",
    source=lines("qa", **SPLITS),
    preprocessors=[question, seqio.preprocessors.tokenize, END],
    output_features=features(BYTES, "inputs", "targets"),
    postprocess_fn=lambda text, example=None, is_target=False: text.lower(),
    metric_fns=[exact, mean_score],
)
add(
    "numbers",
    source=lines("numbers", **SPLITS),
    preprocessors=[numbers],
    output_features=features(seqio.PassThroughVocabulary(size=1000, eos_id=999)),
)
add(
    "endless",
    source=lines("numbers", **SPLITS),
    preprocessors=[numbers],
    output_features=features(seqio.PassThroughVocabulary(size=1000)),
)
add(
    "letters",
    source=lines("a", **SPLITS),
    preprocessors=STEPS,
    output_features=features(seqio.FullCodepointVocabulary()),
)
seqio.MixtureRegistry.add("three_to_one", [("a", 3.0), ("b", lambda task: 1)])
seqio.MixtureRegistry.add("nested", [("three_to_one", 2), ("trained", 1), ("held", 1)])
seqio.MixtureRegistry.add(
    "sized", ["a", "b"], default_rate=lambda task: len((HERE / f"{task.name}_train.txt").read_text())
)
seqio.MixtureRegistry.add("unsized", ["a"], default_rate=seqio.mixing_rate_num_examples)
seqio.MixtureRegistry.add("mixed_up", [("a", 1), ("numbers", 1)])
seqio.MixtureRegistry.add("own_order", [("a", 1), ("b", 1)], sample_fn=lambda datasets, rates, seed: datasets[0])
print("a module may print")
