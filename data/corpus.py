"""A corpus: token streams, one per split, and batches of them by sample number."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.order import Order, Windows, shuffled
from data.packing import Batch, Window, cut, pack, window_count
from data.tokenizer import ByteTokenizer, Tokenizer

GZIP_BYTES = 16_000_000
"""The most text that is compressed as a yardstick: `gzip -9` takes about a second for it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One stream of tokens, each document followed by an end of document."""

    tokens_N: np.ndarray
    """The stream, an integer array or memory map [N]."""
    documents: int
    """How many it holds."""
    bytes: int
    """Of text in UTF-8, ends of documents not counted: what bits per byte are divided by."""
    end_of_document: int
    """The token behind each document."""
    isolate_documents: bool
    """Whether positions restart and attention stays inside a document."""

    def windows(self, sequence_length: int) -> int:
        """How many windows of this length cover the stream. Raises: ValueError for a length below 1."""
        if sequence_length < 1:
            raise ValueError(f"batch.sequence_length={sequence_length} must be >= 1; try batch.sequence_length=256.")
        return window_count(len(self.tokens_N), sequence_length)

    def batch(self, windows_B: np.ndarray | Sequence[int], sequence_length: int) -> Batch:
        """The windows of these numbers (int [B]), in the order of the text; the stream's last one is padded.

        Raises:
          ValueError: a sequence length below 1, or a window that is not there.
        """
        count = self.windows(sequence_length)
        for window in windows_B:
            if not 0 <= window < count:
                raise ValueError(f"there is no window {window}: this split has {count}, counted from 0.")
        return self.pack([cut(self.tokens_N, int(window), sequence_length) for window in windows_B])

    def pack(self, windows: Sequence[Window]) -> Batch:
        """Windows as `packing.cut` makes them, as a batch."""
        return pack(windows, end_of_document=self.end_of_document, isolate_documents=self.isolate_documents)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokens to train on and to measure with. `from_documents` makes one in memory, `TextFiles.load` opens shards."""

    source: str
    """What the text is, for people."""
    tokenizer: Tokenizer
    """Text to tokens and back."""
    splits: Mapping[str, Split]
    """"train" and, where there is one, "validation" and "test"."""
    digest: str
    """16 hexadecimal digits that change with any token of any split, and with the tokenizer."""
    gzip_bits_per_byte: float | None
    """What `gzip -9` needs for the validation text: a model that does worse has learned little. None: too much text."""
    _orders: dict[tuple[int, int], Order] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_documents(
        cls,
        documents: Mapping[str, str],
        *,
        source: str,
        validation_fraction: float,
        isolate_documents: bool,
    ) -> "Corpus":
        """Splits `documents` (name -> text) and concatenates each split in the order of names, bytes as tokens.

        A hash of its name alone decides where a document goes, so that adding others moves none. Characters
        that UTF-8 cannot hold (lone surrogates) become "?".

        Raises:
          ValueError: one of the two splits is empty.
        """
        texts: dict[str, list[bytes]] = {"train": [], "validation": []}
        for name in sorted(documents):
            split = "validation" if _unit_hash(name) < validation_fraction else "train"
            texts[split].append(documents[name].encode(errors="replace"))
        for split, change in (("train", "smaller"), ("validation", "larger")):
            if not texts[split]:
                raise ValueError(
                    f"data.validation_fraction={validation_fraction} leaves one side of the split of "
                    f"{len(documents)} documents empty; try a {change} one, such as "
                    "data.validation_fraction=0.05."
                )
        tokenizer = ByteTokenizer()
        end = tokenizer.end_of_document
        splits = {
            name: Split(
                tokens_N=_stream(tokenizer, parts),
                documents=len(parts),
                bytes=sum(map(len, parts)),
                end_of_document=end,
                isolate_documents=isolate_documents,
            )
            for name, parts in texts.items()
        }
        contents = {
            name: hashlib.sha256(split.tokens_N.astype("<u2").tobytes()).hexdigest() for name, split in splits.items()
        }
        yardstick = Gzip()
        for text in texts["validation"]:
            yardstick.add(text)
        return cls(
            source=source,
            tokenizer=tokenizer,
            splits=splits,
            digest=digest(tokenizer, contents),
            gzip_bits_per_byte=yardstick.bits_per_byte(),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens; every token is below it."""
        return self.tokenizer.vocab_size

    @property
    def isolate_documents(self) -> bool:
        """Whether positions restart and attention stays inside a document."""
        return self.splits["train"].isolate_documents

    def describe(self) -> str:
        """One line for the banner."""
        held_out = [
            f"{split.documents:,}, {split.bytes / 1e6:.2f} MB {'held out' if name == 'validation' else f'to {name}'}"
            for name, split in self.splits.items()
            if name != "train"
        ]
        train = self.splits["train"]
        return (
            f"{self.source}: {train.documents:,} documents, {train.bytes / 1e6:.2f} MB to train on, "
            f"{', '.join(held_out) or 'none held out'}; {self._tokens()}; "
            f"documents {'isolated' if self.isolate_documents else 'joined'}; digest {self.digest}"
        )

    def _tokens(self) -> str:
        if isinstance(self.tokenizer, ByteTokenizer):
            return "bytes as tokens"
        train = self.splits["train"]
        tokens = len(train.tokens_N) - train.documents
        return f"{train.bytes / max(tokens, 1):.2f} bytes per token of {self.vocab_size:,}"

    def train_windows(self, sequence_length: int) -> int:
        """Samples in one epoch.

        Raises:
          ValueError: the training split does not fill one window of this length.
        """
        train = self.splits["train"]
        windows, longest = train.windows(sequence_length), len(train.tokens_N) - 1
        if sequence_length > longest:
            raise ValueError(
                f"batch.sequence_length={sequence_length} is longer than the whole training text; "
                f"try batch.sequence_length={longest} or less."
            )
        return windows

    def train(self, seed: int, samples_B: np.ndarray, sequence_length: int) -> Batch:
        """The samples of these numbers (int64 [B], in any order) of the endless training order.

        A sample is a function of (seed, text, number), whatever the batch, the process or the number of
        either. Over an epoch, `train_windows` samples, each training token but the first is a target once;
        `packing.pack` says which of them weigh 0.

        Raises:
          ValueError: a negative seed or sample, or a sequence longer than the training text.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be an integer >= 0; try seed=0.")
        samples = [int(sample) for sample in samples_B]
        if not samples or min(samples) < 0:
            raise ValueError(f"samples_B={samples[:3]}... must hold at least one number, and none below 0.")
        self.train_windows(sequence_length)
        order = self._order(seed, sequence_length)
        return self.splits["train"].pack([order[sample] for sample in samples])

    def _order(self, seed: int, sequence_length: int) -> Order:
        key = (seed, sequence_length)
        if key not in self._orders:
            self._orders[key] = shuffled(Windows(self.splits["train"].tokens_N, sequence_length), seed)
        return self._orders[key]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document."""
        return self.tokenizer.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens: an end of document becomes a newline, bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        return self.tokenizer.decode(tokens)


class Gzip:
    """What `gzip -9` needs for a text that comes in parts, up to `GZIP_BYTES`."""

    def __init__(self) -> None:
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._text_bytes, self._zipped_bytes = 0, 0

    def add(self, text: bytes) -> None:
        self._text_bytes += len(text)
        if self._text_bytes <= GZIP_BYTES:
            self._zipped_bytes += len(self._gzip.compress(text))

    def bits_per_byte(self) -> float | None:
        """None: no text, or too much."""
        if not 0 < self._text_bytes <= GZIP_BYTES:
            return None
        return 8 * (self._zipped_bytes + len(self._gzip.flush())) / self._text_bytes


def digest(tokenizer: Tokenizer, contents: Mapping[str, str]) -> str:
    """16 hexadecimal digits of a tokenizer and of the splits' contents (split name -> a hash)."""
    lines = [f"tokenizer {tokenizer.digest}", *(f"{name} {content}" for name, content in sorted(contents.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _unit_hash(name: str) -> float:
    """A hash of a name, uniform in [0, 1); equal in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _stream(tokenizer: ByteTokenizer, documents: Iterable[bytes]) -> np.ndarray:
    end = np.array([tokenizer.end_of_document], np.uint16)
    return np.concatenate([piece for tokens in tokenizer.encode_batch(documents) for piece in (tokens, end)])
