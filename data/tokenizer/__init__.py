"""Text to tokens and back: bytes, GPT-2's BPE, SentencePiece, WordPiece, any tokenizer.json; published or learned.

A tokenizer takes every document's text as plain text: `<|endoftext|>` typed in a web page never becomes the end of
a document, which only the writer of a stream adds. Each config here makes one; `AnyTokenizer` lists them.
"""

from typing import get_args

from data.tokenizer.gpt2 import Gpt2, Gpt2Tokenizer
from data.tokenizer.interface import Bytes, ByteTokenizer, Defined, Given, Learned, Tokenizer, read_file
from data.tokenizer.json_file import Bpe, JsonTokenizer, TokenizerFile
from data.tokenizer.sentence_piece import SentencePiece, SentencePieceFile, SentencePieceTokenizer
from data.tokenizer.word_piece import WordPiece, WordPieceFile, WordPieceTokenizer

AnyTokenizer = Bytes | Bpe | WordPiece | SentencePiece | Gpt2 | TokenizerFile | WordPieceFile | SentencePieceFile
COPY_NAMES = {config.copy_name for config in get_args(AnyTokenizer) if issubclass(config, Defined)}
"""Of definitions beside shards."""

__all__ = [
    "COPY_NAMES",
    "AnyTokenizer",
    "Bpe",
    "ByteTokenizer",
    "Bytes",
    "Defined",
    "Given",
    "Gpt2",
    "Gpt2Tokenizer",
    "JsonTokenizer",
    "Learned",
    "SentencePiece",
    "SentencePieceFile",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerFile",
    "WordPiece",
    "WordPieceFile",
    "WordPieceTokenizer",
    "read_file",
]
