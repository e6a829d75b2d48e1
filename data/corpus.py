"""A corpus: documents as bytes, split in training and validation, and batches by sample number."""

import functools
import gzip
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data.packing import Batch, pack, window_count

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
"""The 256 bytes and the end of document."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Two streams of byte tokens, each document followed by `END_OF_DOCUMENT`. `from_documents` makes one."""

    source: str
    """What the text is, for people."""
    isolate_documents: bool
    """Whether positions restart and attention stays inside a document."""
    train_tokens_N: np.ndarray
    """Training stream, uint16 [N]."""
    validation_tokens_N: np.ndarray
    """Validation stream, uint16 [N]."""

    @classmethod
    def from_documents(
        cls,
        documents: Mapping[str, str],
        *,
        source: str,
        validation_fraction: float,
        isolate_documents: bool,
    ) -> "Corpus":
        """Splits `documents` (name -> text) and concatenates each split in the order of names.

        A hash of its name alone decides where a document goes, so that adding others moves none. Characters
        that UTF-8 cannot hold (lone surrogates) become "?".

        Raises:
          ValueError: one of the two splits is empty.
        """
        train, validation = [], []
        for name in sorted(documents):
            split = validation if _unit_hash(name) < validation_fraction else train
            split.append(documents[name])
        for split, change in ((train, "smaller"), (validation, "larger")):
            if not split:
                raise ValueError(
                    f"data.validation_fraction={validation_fraction} leaves one side of the split of "
                    f"{len(documents)} documents empty; try a {change} one, such as "
                    "data.validation_fraction=0.05."
                )
        return cls(
            source=source,
            isolate_documents=isolate_documents,
            train_tokens_N=_stream(train),
            validation_tokens_N=_stream(validation),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens; every token is below it."""
        return VOCAB_SIZE

    @property
    def train_documents(self) -> int:
        """Documents in the training split."""
        return int(np.count_nonzero(self.train_tokens_N == END_OF_DOCUMENT))

    @property
    def validation_documents(self) -> int:
        """Documents in the validation split."""
        return int(np.count_nonzero(self.validation_tokens_N == END_OF_DOCUMENT))

    @property
    def train_bytes(self) -> int:
        """Bytes of training text, ends of documents not counted."""
        return len(self.train_tokens_N) - self.train_documents

    @property
    def validation_bytes(self) -> int:
        """Bytes of validation text, ends of documents not counted: what bits per byte are divided by."""
        return len(self.validation_tokens_N) - self.validation_documents

    @property
    def validation_text(self) -> bytes:
        """The validation documents end to end; `gzip -9` of it is a yardstick for bits per byte."""
        tokens_N = self.validation_tokens_N
        return tokens_N[tokens_N != END_OF_DOCUMENT].astype(np.uint8).tobytes()

    @functools.cached_property
    def gzip_bits_per_byte(self) -> float:
        """What `gzip -9` needs for the validation text: a model that does worse has learned little."""
        return 8 * len(gzip.compress(self.validation_text, 9, mtime=0)) / self.validation_bytes

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any byte of either split and with nothing else."""
        sha256 = hashlib.sha256()
        for tokens_N in (self.train_tokens_N, self.validation_tokens_N):
            sha256.update(len(tokens_N).to_bytes(8, "little"))
            sha256.update(tokens_N.astype("<u2").tobytes())
        return sha256.hexdigest()[:16]

    def describe(self) -> str:
        """One line for the banner."""
        return (
            f"{self.source}: {self.train_documents} documents, {self.train_bytes / 1e6:.2f} MB to train on, "
            f"{self.validation_documents}, {self.validation_bytes / 1e6:.2f} MB held out; bytes as tokens; "
            f"documents {'isolated' if self.isolate_documents else 'joined'}; digest {self.digest}"
        )

    def train_windows(self, sequence_length: int) -> int:
        """Samples in one epoch.

        Raises:
          ValueError: the training split does not fill one window of this length.
        """
        longest = len(self.train_tokens_N) - 1
        _check_sequence_length(sequence_length)
        if sequence_length > longest:
            raise ValueError(
                f"batch.sequence_length={sequence_length} is longer than the whole training text; "
                f"try batch.sequence_length={longest} or less."
            )
        return window_count(len(self.train_tokens_N), sequence_length)

    def train(self, seed: int, first_sample: int, count: int, sequence_length: int) -> Batch:
        """Samples `first_sample` to `first_sample + count - 1` of the endless training order.

        Sample i is window `epoch_order(seed, i // windows, windows)[i % windows]`, whatever the batch, the
        host or the number of either. Over an epoch each training token but the first is a target once;
        `packing.pack` says which of them weigh 0.

        Raises:
          ValueError: a negative argument, or a sequence longer than the training text.
        """
        for name, value, least in (("seed", seed, 0), ("first_sample", first_sample, 0), ("count", count, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be an integer >= {least}; try {name}={least}.")
        windows = self.train_windows(sequence_length)
        pieces, sample, end = [], int(first_sample), int(first_sample) + int(count)
        while sample < end:
            epoch, offset = divmod(sample, windows)
            pieces.append(epoch_order(seed, epoch, windows)[offset : offset + end - sample])
            sample += len(pieces[-1])
        return self._pack(self.train_tokens_N, np.concatenate(pieces), sequence_length)

    def validation(self, sequence_length: int) -> Batch:
        """All validation windows, in the order of the text; the last one is padded.

        Raises:
          ValueError: a sequence length below 1.
        """
        _check_sequence_length(sequence_length)
        windows = window_count(len(self.validation_tokens_N), sequence_length)
        return self._pack(self.validation_tokens_N, np.arange(windows), sequence_length)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document."""
        return list(_utf8(text))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens: an end of document becomes a newline, bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        tokens = [int(token) for token in tokens]
        if any(not 0 <= token < VOCAB_SIZE for token in tokens):
            raise ValueError(f"tokens to decode must lie in 0..{VOCAB_SIZE - 1}.")
        text = bytes(ord("\n") if token == END_OF_DOCUMENT else token for token in tokens)
        return text.decode(errors="replace")

    def _pack(self, stream_N: np.ndarray, windows_B: np.ndarray, sequence_length: int) -> Batch:
        return pack(
            stream_N,
            windows_B,
            sequence_length=sequence_length,
            end_of_document=END_OF_DOCUMENT,
            isolate_documents=self.isolate_documents,
        )


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0..windows-1, int64 [windows], read-only.

    It sorts raw Philox output, which numpy keeps equal in all versions, unlike `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(bits.random_raw(windows), kind="stable")
    order.flags.writeable = False
    return order


def _unit_hash(name: str) -> float:
    """A hash of a name, uniform in [0, 1); equal in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")


def _stream(texts: Iterable[str]) -> np.ndarray:
    pieces = []
    for text in texts:
        pieces += [
            np.frombuffer(_utf8(text), np.uint8).astype(np.uint16),
            np.array([END_OF_DOCUMENT], np.uint16),
        ]
    return np.concatenate(pieces)


def _check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"batch.sequence_length={sequence_length} must be >= 1; try batch.sequence_length=256.")
