"""Sources of ours as seqio Tasks and Mixtures: whoever reads with seqio reads the tokens that are trained on here.

    from data import TextFiles
    from data.export import seqio_tasks
    seqio_tasks.register("my_corpus", TextFiles(paths="text/"))
    seqio.get_mixture_or_task("my_corpus").get_dataset(split="train")

This module imports TensorFlow, and training does not import it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from data.corpus import Corpus, Split
from data.sources.blend import Blend, Source
from data.tokenizer import Tokenizer

BLOCK = 1 << 18
"""Tokens that are read at once."""


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer of ours. seqio takes id 0 for padding: where the tokenizer has a token there, all ids are one higher.

    It has no operation in TensorFlow's graphs: tokens are in the shards, and Python in a graph may hang.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.shift = tokenizer, int(tokenizer.special("pad") != 0)
        super().__init__()

    @property
    def bos_id(self) -> None:
        """There is none."""

    @property
    def eos_id(self) -> int:
        return self.tokenizer.end_of_document + self.shift

    @property
    def unk_id(self) -> None:
        """There is none."""

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size + self.shift

    def _encode(self, s: str) -> Sequence[int]:
        return [token + self.shift for token in self.tokenizer.encode(s)]

    def _decode(self, ids: Iterable[int]) -> str:
        tokens = [int(number) - self.shift for number in ids if number != self.eos_id]
        return self.tokenizer.decode([token for token in tokens if token >= 0])

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError("this tokenizer is not in TensorFlow; encode texts before they come into a graph.")

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        raise NotImplementedError("this tokenizer is not in TensorFlow; decode what comes out of a graph.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerVocabulary) and self.tokenizer.digest == other.tokenizer.digest


def register(name: str, source: Source, *, feature: str = "targets") -> seqio.Task:
    """A Task of a source's tokens, prepared before: each example is a document with its end.

    Raises: ValueError if it is not prepared, or seqio does not take the name.
    """
    corpus = source.load()
    if not isinstance(corpus, Corpus):
        raise ValueError(f"{corpus.source} is no single text; register its tasks by themselves.")
    vocabulary = TokenizerVocabulary(corpus.tokenizer)

    def documents(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        found = _documents(corpus.splits[split], corpus.tokenizer.end_of_document)
        return found.map(lambda tokens: {feature: tokens + vocabulary.shift})

    counts = {split: found.documents for split, found in corpus.splits.items()}
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(documents, tuple(counts), counts),  # pyrefly: ignore[bad-argument-type]
        preprocessors=[],
        output_features={feature: seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
        metric_fns=[],
    )


def register_mixture(name: str, sources: Iterable[tuple[str, Source, float]]) -> seqio.Mixture:
    """A Mixture of sources (name, source, weight), each registered as `name.<its name>`.

    seqio takes the weights for shares of examples, here they are shares of rows, and so of tokens. Raises: see
    `register`.
    """
    rates = []
    for part, source, weight in sources:
        register(f"{name}.{part}", source)
        rates.append((f"{name}.{part}", weight))
    return seqio.MixtureRegistry.add(name, rates)


def register_blend(name: str, blend: Blend) -> seqio.Mixture:
    """A blend as a Mixture. Raises: ValueError for what Mixtures do not have, and see `register`."""
    limited = any(source.max_epochs is not None for source in blend.sources)
    for field, said in (("phases", blend.phases), ("temperature", blend.temperature), ("max_epochs", limited)):
        if said:
            raise ValueError(f"a seqio Mixture has no {field}; register the blend without, or register_mixture.")
    return register_mixture(name, [(source.name, source.data, source.weight) for source in blend.sources])


def _documents(split: Split, end: int) -> tf.data.Dataset:
    """A split's documents, each with its end, read by TensorFlow alone, a block at a time."""

    def cut(rest: tf.Tensor, block: tf.Tensor) -> tuple[tf.Tensor, tf.RaggedTensor]:
        tokens = tf.concat([rest, block], 0)
        behind = tf.where(tokens == end)[:, 0] + 1
        whole = tf.concat([tf.zeros(1, tf.int64), behind], 0)[-1]
        rows = tf.RaggedTensor.from_row_limits(tokens[:whole], behind)  # pyrefly: ignore[missing-attribute]
        return tokens[whole:], rows

    return _blocks(split.tokens_N).scan(tf.zeros(0, tf.int32), cut).unbatch()


def _blocks(stream_N: Any) -> tf.data.Dataset:
    """A token stream in parts, int32. Raises: ValueError for one that TensorFlow cannot read."""
    if not isinstance(stream_N, np.memmap):
        if not isinstance(stream_N, np.ndarray):
            raise ValueError("several shards end to end cannot be registered as one Task; name them one by one.")
        return tf.data.Dataset.from_tensors(stream_N.astype(np.int32))
    path, size = str(stream_N.filename), stream_N.dtype.itemsize
    whole = len(stream_N) // BLOCK * BLOCK * size
    last = stream_N.nbytes - whole
    assert stream_N.offset == 0, "the map is of the whole file"
    parts = [tf.data.FixedLengthRecordDataset(path, BLOCK * size, footer_bytes=last)] if whole else []
    parts += [tf.data.FixedLengthRecordDataset(path, last, header_bytes=whole)] if last else []
    found = parts[0] if len(parts) == 1 else parts[0].concatenate(parts[1])
    kind = tf.dtypes.as_dtype(stream_N.dtype.newbyteorder("="))
    return found.map(lambda content: tf.cast(tf.io.decode_raw(content, kind), tf.int32))
