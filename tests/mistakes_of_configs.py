"""A small config file, and what a user gets wrong in one, with the hint; of rows of data, see mistakes_of_data.py."""

from pathlib import Path

import mistakes_of_data

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
FILE = '''"""A small config for tests."""

from data import PythonDocs
from mtx.attention import AttentionConfig
from mtx.config import BatchConfig, Config
from mtx.layers import *
from mtx.layout import Layout, Row
from mtx.mesh import MeshConfig
from mtx.model import Transformer
from mtx.optim import *
from mtx.spmd import *
from mtx.stacks import Block, Stack


def get_config() -> Config:
    return Config(
        model=Transformer(
            vocab_size=257,
            layers=2,
            width=64,
            attention=AttentionConfig(heads=8),
            mlp=Gelu(width=128),
            positions=Learned(length=256),
        ),
        data=PythonDocs(),
        batch=BatchConfig(global_size=16, sequence_length=64),
        optimizer=AdamW(schedule=Cosine(peak_lr=3e-3, warmup=Fraction(share=0.1)), b2=0.98),
        mesh=MeshConfig(data=-1),
        steps=3,
    )
'''


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FILE.splitlines(), 1) if text in line)


# What a user gets wrong. (words, hint), on 8 devices; the hint is all that follows but for lists of fields.

TEXT = "data=TextFiles data.paths=texts "
SHARDS = "data=MegatronShards data.train=a data.tokenizer=Bytes "
TOKENIZERS = "one of Bytes, Bpe, WordPiece, SentencePiece, Gpt2, TokenizerFile, WordPieceFile, SentencePieceFile"
NOT_A_FILE_SYSTEM = (
    " is not on a file system: a checkpoint is sealed by a rename that object stores do not have. "
    "Mount the bucket with something that can rename (such as gcsfuse) and name the mounted folder."
)
NEGATIVE_COUNT = "optimizer.schedule.warmup.count=-1 must not be negative."
MISTAKES = {
    "Config": [
        (
            "stesp=3",
            "stesp: Config has no field 'stesp'; did you mean steps? Its fields: model, data, batch, optimizer, ",
        ),
        ("steps=abc", "steps=abc must be an int or None."),
        ("steps=1.5", "steps=1.5 must be an int or None."),
        ("steps=true", "steps=true must be an int or None."),
        ("steps=0", "steps=0 must be positive."),
        (
            "steps=None",
            "steps=None leaves the run without a length; set one of steps, tokens and epochs, such as steps=1000.",
        ),
        ("tokens=2e6", "steps=3 and tokens=2000000 both say how long the run is; try steps=None, or tokens=None."),
        (
            "steps=10 tokens=1e6",
            "steps=10 and tokens=1000000 both say how long the run is; try steps=None, or tokens=None.",
        ),
        (
            "steps=none tokens=1e6 epochs=0.5",
            "tokens=1000000 and epochs=0.5 both say how long the run is; try tokens=None, or epochs=None.",
        ),
        (
            "tokens=1e6 epochs=0.5",
            "steps=3 and tokens=1000000 and epochs=0.5 all say how long the run is; try steps=None tokens=None, "
            "or steps=None epochs=None, or tokens=None epochs=None.",
        ),
        ("steps=None tokens=0", "tokens=0 must be positive."),
        ("steps=None tokens=1.5", "tokens=1.5 must be an int or None."),
        ("steps=None epochs=-0.5", "epochs=-0.5 must be positive."),
        ("steps=None epochs=1e999", "epochs=inf must be a finite number."),
        ("steps=None epochs=all", "epochs=all must be a number or None."),
        ("token=1e6", "token: Config has no field 'token'; did you mean tokens?"),
        ("steps.count=3", "steps.count cannot be set: steps is a single value (int | None); write steps=3."),
        ("steps=3 steps=4", "steps is given twice, as 3 and as 4; keep one."),
        ("steps", "there is no verb"),
        ("--steps", "--steps needs a value; write steps=value."),
        ("seed=-1", "seed=-1 must be at least 0 and below 2**32."),
        ("log_every=0", "log_every=0 must be at least 1."),
        ("eval_every=-1", "eval_every=-1 must be at least 0; 0 evaluates only at the end."),
        ("sample_tokens=-1", "sample_tokens=-1 must be at least 0; 0 shows no sample."),
        ("eval_sequences=-1", "eval_sequences=-1 must be at least 0; 0 evaluates all of the validation split."),
        ("max_skipped_steps=-1", "max_skipped_steps=-1 must be at least 0; 0 stops at the first."),
        ("stop_after_minutes=-5", "stop_after_minutes=-5.0 must be at least 0; 0 sets no limit."),
        # What it was before checkpoints; not eval_every, which is near in letters alone.
        ("save_every=10", "save_every: Config has no field 'save_every'. Its fields: model, data, "),
        ("workdir=", "workdir= is empty; name a folder, or None."),
        ("workdir=gs://b/x", f"workdir=gs://b/x{NOT_A_FILE_SYSTEM}"),
        ("workdir=s3://b/x", f"workdir=s3://b/x{NOT_A_FILE_SYSTEM}"),
        ("workdir=S3://b/x", f"workdir=S3://b/x{NOT_A_FILE_SYSTEM}"),
        ("init_from=", "init_from= is empty; name a folder, or None."),
        ("init_from=gs://b/x", f"init_from=gs://b/x{NOT_A_FILE_SYSTEM}"),
        ("--device=8", "did you mean --devices?"),
        ("--frseh", "there is no flag --frseh; did you mean --fresh?"),
        ("--frseh steps=3", "did you mean --fresh?"),
        ("fresh=true", "did you mean --fresh?"),
        ("--accept-change", "there is no flag --accept-change; did you mean --accept-changes?"),
        ("accept_changes=true", "did you mean --accept-changes?"),
        ("--mesh", "--mesh needs a value; write mesh=value."),
        ("lr=1e-3", "lr: Config has no field 'lr'; did you mean optimizer.schedule.peak_lr?"),
        ("learning_rate=1e-3", "did you mean optimizer.schedule.peak_lr?"),
        ("modle.width=8", "modle.width: Config has no field 'modle'; did you mean model.width?"),
    ],
    "BatchConfig": [
        ("batch=16", "batch=16 must be a BatchConfig; set its fields: batch.global_size, batch.micro_size, batch.seq"),
        ("batch.size=16", "BatchConfig has no field 'size'; did you mean batch.global_size?"),
        ("batch.global_size=0", "batch.global_size=0 must be at least 1."),
        ("batch.micro_size=0", "batch.micro_size=0 must be at least 1, or None for no accumulation."),
        ("batch.micro_size=none batch.sequence_length=0", "batch.sequence_length=0 must be at least 1."),
        (
            "batch.global_size=12",
            "batch.global_size=12 does not divide over 8 data shards (mesh.replica*data*expert); "
            "try batch.global_size=8 or 16, or mesh.data=4 mesh.model=2.",
        ),
        (
            "batch.global_size=20 mesh.data=4 mesh.model=2 batch.micro_size=2",
            "batch.micro_size=2 does not divide the 5 sequences of a data shard "
            "(batch.global_size=20 over mesh.replica*data*expert=4); legal: 1, 5.",
        ),
        (
            "batch.sequence_length=512",
            "batch.sequence_length=512 is longer than the table of positions; try batch.sequence_length=256, "
            "or model.positions.length=512, or model.positions=Rotary.",
        ),
        (
            "batch.sequence_length=60 mesh.model=8 layout.sequence_parallel=true",
            "batch.sequence_length=60 does not divide over mesh.model=8 (layout.sequence_parallel); "
            "try batch.sequence_length=56 or 64, or layout.sequence_parallel=false.",
        ),
    ],
    "MeshConfig": [
        ("mesh=8", "mesh=8 must be a MeshConfig; set its fields: mesh.pipeline, mesh.replica, mesh.data, "),
        ("mesh.data=0", "mesh.data=0 must be a positive number of devices, or -1 for the rest of them."),
        ("mesh.model=-1", "mesh.model=-1 is a second -1 beside mesh.data; only one axis can take the rest"),
        (
            "mesh.context=2",
            "mesh.context=2 is not built yet; set mesh.context=1 and use pipeline, replica, data and mod",
        ),
        ("mesh.tensor=2", "mesh.tensor: MeshConfig has no field 'tensor'"),
        ("mesh.data=3", "mesh.data=3 uses 3 of 8 devices; try mesh.data=8, or "),
        ("mesh.model=3", "mesh.data=-1 mesh.model=3 does not divide 8 devices; try mesh.data=2 mesh.model=4"),
    ],
    "Transformer": [
        ("model=gpt2", "model=gpt2 must be a Transformer; set its fields: model.vocab_size, model.layers, "),
        ("model.heads=4", "Transformer has no field 'heads'; did you mean model.attention.heads?"),
        ("model.layers=0", "model.layers=0 must be at least 1."),
        ("model.dropout=1.5", "model.dropout=1.5 must be at least 0 and below 1."),
        ("model.causal=yes", "model.causal=yes must be true or false."),
        ("model.remat=ful", "model.remat=ful must be one of none, selective, full, stage; did you mean full?"),
        ("model.unroll=4", "model.unroll=4 must divide layers=2."),
        (
            "model.vocab_size=256",
            "model.vocab_size=256 is smaller than the 257 tokens of data=PythonDocs; try model.vocab_size=257.",
        ),
        (
            "model.vocab_multiple=1 mesh.model=2",
            "model.vocab_multiple=1 does not divide over mesh.model=2 (the vocabulary, padded, has 257 rows); "
            "try model.vocab_multiple=2, or mesh.model=1.",
        ),
    ],
    "AttentionConfig": [
        ("model.attention.heads=7", "model.attention.heads=7 does not divide width=64; try 4 or 8, or set head_size."),
        ("model.attention.kv_heads=3", "model.attention.kv_heads=3 must divide heads=8; legal: 1, 2, 4, 8."),
        (
            "model.attention.kv_heads=2 mesh.data=2 mesh.model=4",
            "model.attention.kv_heads=2 does not divide over mesh.model=4; try model.attention.kv_heads=4 or 8, "
            "or mesh.model=1 mesh.data=8, or mesh.model=2 mesh.data=4.",
        ),
        (
            "model.attention.heads=4 mesh.model=8",
            "model.attention.heads=4 does not divide over mesh.model=8; try model.attention.heads=8 or 16, or mesh",
        ),
        (
            "model.attention.backend=flash",
            "must be one of auto, plain, chunked, cudnn, hopper, splash, tpu; did you mean splash?",
        ),
        (
            "model.attention.backend=cudnn",
            "model.attention.backend=cudnn cannot do this: of masks it knows Full, Causal and Window(before), not "
            "Causal() & Documents(); use model.attention.backend=hopper, or auto.",
        ),
    ],
    "Fixed": [
        (
            "model.attention.pattern=Fixed model.attention.pattern.summary=9",
            "model.attention.pattern.summary=9",
        ),
    ],
    "Strided": [
        (
            "model.attention.pattern=Strided model.attention.pattern.stride=0",
            "model.attention.pattern.stride=0 must be at least 1.",
        ),
    ],
    "LocalGlobal": [
        (
            "model.attention.pattern=LocalGlobal model.attention.pattern.window=-1",
            "model.attention.pattern.window=-1 must be at least 0.",
        ),
    ],
    "Longformer": [
        (
            "model.attention.pattern=Longformer model.attention.pattern.dilation=0",
            "model.attention.pattern.dilation=0 must be at least 1.",
        ),
    ],
    "BigBird": [
        (
            "model.attention.pattern=BigBird model.attention.pattern.randm=2",
            "did you mean model.attention.pattern.random?",
        ),
    ],
    "Chosen": [
        ("model.attention.pattern=Chosen", "rows"),
    ],
    "LayerNorm": [
        ("model.norm.epsilon=0", "model.norm.epsilon=0.0 must be positive."),
    ],
    "RMSNorm": [
        ("model.norm=RmsNorm", "model.norm=RmsNorm must be one of LayerNorm, RMSNorm; did you mean RMSNorm?"),
        ("model.norm=RMSNorm model.norm.epsilon=-1", "model.norm.epsilon=-1.0 must be positive."),
    ],
    "Learned": [
        ("model.positions.length=0", "model.positions.length=0 must be at least 1."),
    ],
    "Rotary": [
        ("model.positions.theta=1e4", "Learned has no field 'theta'; Rotary has it: add model.positions=Rotary."),
        ("model.positions=Rotary model.positions.theta=1", "model.positions.theta=1.0 must be above 1."),
    ],
    "Llama3Scaling": [
        (
            "model.positions=Rotary model.positions.scaling.factor=8",
            "model.positions.scaling.factor cannot be set: model.positions.scaling is None; choose its class too: "
            "model.positions.scaling=Llama3Scaling.",
        ),
        (
            "model.positions=Rotary model.positions.scaling=Llama3Scaling model.positions.scaling.factor=0.5",
            "model.positions.scaling.factor=0.5 must be at least 1.",
        ),
    ],
    "Gelu": [
        ("model.mlp.width=0", "model.mlp.width=0 must be at least 1."),
        (
            "model.mlp.width=100 mesh.model=8",
            "model.mlp.width=100 does not divide over mesh.model=8; try model.mlp.width=96 or 104, or mesh.model=2, or",
        ),
    ],
    "SwiGLU": [
        ("model.mlp=SwiGLU", "model.mlp=SwiGLU needs model.mlp.width=... too (Gelu had width=128)."),
        ("model.mlp=SwiGLU model.mlp.width=-8", "model.mlp.width=-8 must be at least 1."),
    ],
    "AdamW": [
        ("optimizer=lion", "optimizer=lion must be one of AdamW, Lion, Sgd; did you mean Lion?"),
        ("optimizer=Lion(b1=0.9)", "must be one of AdamW, Lion, Sgd; did you mean Lion?"),
        ("optimizer.b1=1", "optimizer.b1=1.0 must be at least 0 and below 1."),
        ("optimizer.epsilon=0", "optimizer.epsilon=0.0 must be positive."),
        ("optimizer.clip_norm=0", "optimizer.clip_norm=0.0 must be positive, or None."),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1 must not be negative."),
    ],
    "Lion": [
        ("optimizer=Lion optimizer.b2=2", "optimizer.b2=2.0 must be at least 0 and below 1."),
        ("optimizer=Lion optimizer.epsilon=1e-8", "Lion has no field 'epsilon'; AdamW has it: add optimizer=AdamW."),
    ],
    "Sgd": [
        ("optimizer=Sgd optimizer.momentum=1", "optimizer.momentum=1.0 must be at least 0 and below 1."),
    ],
    "Ema": [
        ("ema=0.999", "ema=0.999 must be a Ema or None; set its fields: ema.decay, ema.warmup_steps, ema.evaluate."),
        ("ema.decay=0.9", "ema.decay cannot be set: ema is None; choose its class too: ema=Ema."),
        ("ema=Ema ema.decay=1", "ema.decay=1.0 must be at least 0 and below 1, such as 0.999."),
        ("ema=Ema ema.warmup_steps=-1", "ema.warmup_steps=-1 must be at least 0; 0: always the decay."),
    ],
    "Cosine": [
        ("optimizer.schedule=cosine", "must be one of Constant, Linear, Cosine; did you mean Cosine?"),
        ("optimizer.schedule.peak_lr=fast", "optimizer.schedule.peak_lr=fast must be a number."),
        ("optimizer.schedule.peak_lr=1e999", "optimizer.schedule.peak_lr=inf must be a finite number."),
        ("optimizer.schedule.final_share=-1", "optimizer.schedule.final_share=-1.0 must lie between 0 and 1."),
        ("optimizer.schedule.end.share=0.1", "optimizer.schedule.warmup=Fraction(share=0.1) must end before the decay"),
        (
            "optimizer.schedule.end=Steps optimizer.schedule.end.count=0",
            "optimizer.schedule.end=Steps(count=0) must be positive.",
        ),
    ],
    "Constant": [
        (
            "optimizer.schedule=Constant optimizer.schedule.peak_lr=0",
            "optimizer.schedule.peak_lr=0.0 must be positive, such as 3e-4.",
        ),
    ],
    "Linear": [
        ("optimizer.schedule=Linear optimizer.schedule.final_share=2", "final_share=2.0 must lie between 0 and 1."),
    ],
    "Fraction": [
        (
            "optimizer.schedule.warmup.count=3",
            "Fraction has no field 'count'; Steps, Samples, Tokens have it: add optimizer.schedule.warmup=Steps.",
        ),
        ("optimizer.schedule.warmup.share=2", "optimizer.schedule.warmup.share=2.0 must lie between 0 and 1."),
    ],
    "Steps": [
        (
            "optimizer.schedule.warmup=Steps",
            "optimizer.schedule.warmup=Steps needs optimizer.schedule.warmup.count=... too.",
        ),
        ("optimizer.schedule.warmup=Steps optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "Samples": [
        ("optimizer.schedule.warmup=Samples optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "Tokens": [
        ("optimizer.schedule.warmup=Tokens optimizer.schedule.warmup.count=-1", NEGATIVE_COUNT),
    ],
    "CrossEntropy": [
        ("loss.chunk_tokens=0", "loss.chunk_tokens=0 must be at least 1."),
        ("loss.z_los=1", "CrossEntropy has no field 'z_los'; did you mean loss.z_loss?"),
    ],
    "Layout": [
        ("layout.zero=4", "layout.zero=4 must be one of 0, 1, 2, 3."),
        ("layout.scatter=compute", "layout.scatter=compute is for layout.zero=3; leave it at float32."),
        ("layout.rows=(1,2)", "layout.rows=(1,2) must be a tuple of Row or None."),
    ],
    "Manual": [
        ("partition=compiled", "partition=compiled must be one of Manual, Compiled; did you mean Compiled?"),
        ("partition.overlap=1", "partition.overlap: Manual has no field 'overlap'; it has none."),
    ],
    "Compiled": [
        ("partition=Compiled partition.overlap=1", "partition.overlap: Compiled has no field 'overlap'; it has none."),
    ],
    "Precision": [
        ("precision.compute=fp16", "precision.compute=fp16 must be one of auto, float32, bfloat16."),
    ],
    "PythonDocs": [
        (
            "data=Wikipedia",
            "data=Wikipedia must be one of PythonDocs, TextFiles, TfdsText, SeqioTask, MegatronShards, Blend.",
        ),
        ("data.validation_fraction=2", "data.validation_fraction=2.0 must lie strictly between 0 and 1; try 0.05."),
    ],
    "MegatronShards": [
        ("data=MegatronShards", "data=MegatronShards needs data.train=... data.tokenizer=... too"),
        (
            "data=MegatronShards data.tokenizer=Bytes data.train=,",
            "data.train=, is empty; name a pair of files without .bin and .idx.",
        ),
        (f"{SHARDS}data.test=x", "data.test=x needs validation, for without it split gives both; name validation, or"),
        (
            f"{SHARDS}data.split=0,1",
            "data.split=0,1 must be one to three numbers, the first above 0, none below; try 949",
        ),
        (
            "data=MegatronShards data.train=a data.tokenizer=Bpe",
            "data.tokenizer=Bpe must be one of Bytes, Gpt2, TokenizerFile, WordPieceFile, Sent",
        ),
    ],
    "TextFiles": [
        ("data=TextFiles", "data=TextFiles needs data.paths=... too."),
        (
            "data=textfiles",
            "data=textfiles must be one of PythonDocs, TextFiles, TfdsText, SeqioTask, MegatronShards, Blend; did you "
            "mean TextFiles?",
        ),
        ("data.paths=texts", "data.paths: PythonDocs has no field 'paths'; TextFiles has it: add data=TextFiles."),
        (
            f"{TEXT}data.validation_fraction=0.1",
            "TextFiles has no field 'validation_fraction'; PythonDocs has it: add data=PythonDocs.",
        ),
        ("data=TextFiles data.paths=,", "data.paths=, is empty; name files, folders or globs."),
        (f"{TEXT}data.path=text", "data.path: TextFiles has no field 'path'; did you mean data.paths?"),
        (f"{TEXT}data.text_key=", "data.text_key= is empty; name the key that holds the text."),
        (
            f"{TEXT}data.split=a,b",
            "data.split=a,b must be two or three numbers, the first above 0, none below; try 949,50,1 or 1,0.",
        ),
        (f"{TEXT}data.split=0,1", "data.split=0,1 must be two or three numbers, the first above 0, none below; try"),
        (f"{TEXT}data.split=9", "data.split=9 must be two or three numbers, the first above 0, none below; try"),
        (f"{TEXT}data.cut_text_bytes=-1", "data.cut_text_bytes=-1 must be at least 0; 0 makes each file one document."),
        (
            f"{TEXT}data.max_record_bytes=1000",
            "data.cut_text_bytes=16384 must be at most half of max_record_bytes=1000.",
        ),
        (f"{TEXT}data.max_record_bytes=0", "data.max_record_bytes=0 must lie in 1..1073741824; try 33554432."),
        (f"{TEXT}data.folder=", "data.folder= is empty; name a folder, or None for prepared/ and a hash."),
        (
            f"{TEXT}model.vocab_size=256",
            "model.vocab_size=256 is smaller than the 257 tokens of data=TextFiles; try model.vocab_size=257.",
        ),
    ],
    "Bytes": [
        (f"{TEXT}data.tokenizer=bytes", f"must be {TOKENIZERS}; did you mean Bytes?"),
        (
            f"{TEXT}data.tokenizer.vocab_size=300",
            "data.tokenizer.vocab_size: Bytes has no field 'vocab_size'; Bpe, WordPiece, SentencePiece have it: add ",
        ),
    ],
    "Bpe": [
        (
            f"{TEXT}data.tokenizer=Bpe",
            "model.vocab_size=257 is smaller than the 8192 tokens of data=TextFiles; try model.vocab_size=8192.",
        ),
        (
            f"{TEXT}data.tokenizer=Bpe data.tokenizer.vocab_size=256",
            "data.tokenizer.vocab_size=256 must be at least 257: 256 bytes and the end of document; try 8192.",
        ),
    ],
    "TokenizerFile": [
        (f"{TEXT}data.tokenizer=TokenizerFile", "data.tokenizer=TokenizerFile needs data.tokenizer.path=... too."),
        (
            f"{TEXT}data.tokenizer=TokenizerFile data.tokenizer.path=nope.json",
            "data.tokenizer.path=nope.json cannot be used: nope.json cannot be read: No such file or directory.",
        ),
        (
            f"{TEXT}data.tokenizer=tokenizer.json",
            f"must be {TOKENIZERS}; did you mean TokenizerFile",
        ),
        (
            f"{TEXT}data.tokenizer.path=tokenizer.json",
            "'path'; TokenizerFile, WordPieceFile, SentencePieceFile have it: add data.tokenizer=TokenizerFile.",
        ),
    ],
    "Gpt2": [
        (f"{TEXT}data.tokenizer=gpt2", f"must be {TOKENIZERS}; did you mean Gpt2?"),
        (f"{TEXT}data.tokenizer=GPT-2", f"must be {TOKENIZERS}; did you mean Gpt2?"),
        (
            f"{TEXT}data.tokenizer=Gpt2 data.tokenizer.folder=nowhere/gpt2",
            "data.tokenizer.folder=nowhere/gpt2 cannot be used: nowhere/gpt2 is no folder.",
        ),
        (
            f"{TEXT}data.tokenizer=Gpt2 data.tokenizer.path=vocab.bpe",
            "Gpt2 has no field 'path'; TokenizerFile, WordPieceFile, SentencePieceFile have it",
        ),
    ],
    "WordPiece": [
        (
            f"{TEXT}data.tokenizer=WordPiece data.tokenizer.vocab_size=100",
            "data.tokenizer.vocab_size=100 must be at least 128: 5 special tokens, letters, and letters within words",
        ),
        (f"{TEXT}data.tokenizer=WordPiece data.tokenizer.lowercase=no", "lowercase=no must be true or false."),
        (
            f"{TEXT}data.tokenizer=WordPiece",
            "model.vocab_size=257 is smaller than the 8192 tokens of data=TextFiles; try model.vocab_size=8192.",
        ),
    ],
    "WordPieceFile": [
        (f"{TEXT}data.tokenizer=WordPieceFile", "data.tokenizer=WordPieceFile needs data.tokenizer.path=... too."),
        (
            f"{TEXT}data.tokenizer=WordPieceFile data.tokenizer.path=nope.txt",
            "data.tokenizer.path=nope.txt cannot be used: nope.txt cannot be read: No such file or directory.",
        ),
    ],
    "SentencePiece": [
        (f"{TEXT}data.tokenizer=Sentencepiece", f"must be {TOKENIZERS}; did you mean SentencePiece?"),
        (
            f"{TEXT}data.tokenizer=SentencePiece data.tokenizer.kind=Unigram",
            "data.tokenizer.kind=Unigram must be one of unigram, bpe; did you mean unigram?",
        ),
        (
            f"{TEXT}data.tokenizer=SentencePiece data.tokenizer.vocab_size=262",
            "data.tokenizer.vocab_size=262 must be above 262: 256 bytes and 6 special tokens; try 8192.",
        ),
        (
            f"{TEXT}data.tokenizer=SentencePiece data.tokenizer.sentinels=-1",
            "data.tokenizer.sentinels=-1 must be at least 0.",
        ),
    ],
    "SentencePieceFile": [
        (
            f"{TEXT}data.tokenizer=SentencePieceFile data.tokenizer.path=nope.model",
            "data.tokenizer.path=nope.model cannot be used: nope.model cannot be read: No such file or directory.",
        ),
        (
            f"{TEXT}data.tokenizer=SentencePieceFile data.tokenizer.path={QUICKSTART}",
            "is no model that sentencepiece",
        ),
    ],
    "Fail": [
        (f"{TEXT}data.bad_records=fail", "data.bad_records=fail must be one of Fail, Skip; did you mean Fail?"),
        (
            f"{TEXT}data.bad_records.budget=5",
            "data.bad_records.budget: Fail has no field 'budget'; Skip has it: add data.bad_records=Skip.",
        ),
    ],
    "OneFOneB": [
        (
            "mesh.pipeline=4",
            "model.layers=2 are fewer than the 4 virtual stages of mesh.pipeline=4, each of which needs one; try "
            "mesh.pipeline=2, or model.layers=4.",
        ),
        ("pipeline=1F1B", "pipeline=1F1B must be one of GPipe, OneFOneB, Interleaved, ZeroBubble"),
        ("pipeline=onefoneb", "did you mean OneFOneB?"),
        ("pipeline.chunks=2", "OneFOneB has no field 'chunks'"),
        (
            "mesh.pipeline=2 partition=Compiled",
            "mesh.pipeline=2 needs partition=Manual: in Compiled no stage can do wor",
        ),
        (
            "mesh.data=1 mesh.pipeline=8 model.layers=8 model.vocab_multiple=257",
            "model.vocab_multiple=257 does not divide over mesh.pipeline=8 (the vocabulary, padded, has 257 rows); try "
            "layout.vocabulary=replicated, or model.vocab_multiple=2056.",
        ),
        ("layout.vocabulary=whole", "layout.vocabulary=whole must be one of sharded, replicated."),
    ],
    "GPipe": [
        ("pipeline=gpip", "pipeline=gpip must be one of GPipe, OneFOneB, Interleaved, ZeroBubble; did you mean GPi")
    ],
    "ZeroBubble": [("pipeline=ZB-H1", "pipeline=ZB-H1 must be one of GPipe, OneFOneB, Interleaved, ZeroBubble")],
    "Interleaved": [
        (
            "mesh.pipeline=2 pipeline=Interleaved",
            "model.layers=2 are fewer than the 4 virtual stages of mesh.pipeline=2 x pipeline.chunks=2, each of which "
            "needs one; try pipeline=OneFOneB, or model.layers=4.",
        ),
        ("pipeline=Interleaved pipeline.chunks=1", "pipeline.chunks=1 must be at least 2; one chunk per stage is One"),
    ],
    "Skip": [
        (
            f"{TEXT}data.bad_records=Skip data.bad_records.budget=0",
            "data.bad_records.budget=0 must be at least 1; data.bad_records=Fail skips none.",
        ),
        (
            f"{TEXT}data.bad_records=Skip data.bad_records.budget=1%",
            "data.bad_records.budget=1% must be an int.",
        ),
    ],
    "Checkpoints": [
        (
            "checkpoints=10",
            "checkpoints=10 must be a Checkpoints or None; set its fields: checkpoints.every_steps, checkpoints.every_",
        ),
        (
            "checkpoints=None checkpoints.keep=3",
            "checkpoints.keep cannot be set: checkpoints is None; choose its class too: checkpoints=Checkpoints.",
        ),
        ("checkpoints.every=10", "Checkpoints has no field 'every'; did you mean checkpoints.every_steps?"),
        ("checkpoints.every_steps=-1", "checkpoints.every_steps=-1 must be at least 0."),
        ("checkpoints.every_minutes=-1", "checkpoints.every_minutes=-1.0 must be at least 0."),
        ("checkpoints.keep=0", "checkpoints.keep=0 must be at least 1."),
        ("checkpoints.keep_best=-1", "checkpoints.keep_best=-1 must be at least 0."),
        ("checkpoints.keep_every_steps=-1", "checkpoints.keep_every_steps=-1 must be at least 0."),
    ],
    "Reporting": [
        ("reporting=wandb", "reporting=wandb must be a Reporting; set its fields: reporting.tensorboard, reporting.w"),
        ("reporting.tensorboard=yes", "reporting.tensorboard=yes must be true or false."),
        ("reporting.wandb=", "reporting.wandb= is empty; name a project, or None."),
        ("reporting.trackio=", "reporting.trackio= is empty; name a project, or None."),
        ("wandb=mtx", "wandb: Config has no field 'wandb'; did you mean reporting.wandb?"),
    ],
}
MISTAKES |= mistakes_of_data.MISTAKES

OVERRIDE_MISTAKES = [mistake for group in MISTAKES.values() for mistake in group]

# In the file: ((old text, new text), hint). The last ones are of Layout and Row.
FILE_MISTAKES = [
    (("b2=0.98", "groups=(Group(rate=0.0),)"), "optimizer.groups[0].rate=0.0 must be positive; frozen=True is what"),
    (("b2=0.98", "groups=(Group(weight_decay=-1.0),)"), "optimizer.groups[0].weight_decay=-1.0 must not be negative."),
    (("b2=0.98", "groups=(Group(frozen=True, rate=2.0),)"), "optimizer.groups[0].frozen=true leaves rate and weight_d"),
    (("b2=0.98", "groups=(Group(roles=('matrixes',)),)"), "optimizer.groups[0].roles=('matrixes',) must be a tuple of"),
    (("b2=0.98", "groups=()"), "optimizer.groups has no group for ends/norm/bias_D (vector); end with Group() for all"),
    (
        ("b2=0.98", "groups=(Group(roles=('head',)), Group())"),
        "optimizer.groups[0] (roles=head) matches no weight; there are the roles embedding, matrix, vector, and names",
    ),
    (
        ("b2=0.98", "groups=(Group(), Group(names='ends/*'))"),
        "optimizer.groups[1] (names=ends/*) is left without a weight: group 0 has ends/norm/bias_D before it; move it",
    ),
    (("b2=0.98", "groups=(Group(frozen=True),)"), "optimizer.groups freezes every weight; leave one to train."),
    (("layers=2", "layers='2'"), "model.layers='2' must be an int."),
    (("layers=2", "layers=True"), "model.layers=True must be an int."),
    (
        ("layers=2", "layer=2"),
        f"small.py:{line_of('model=')}: Transformer has no field 'layer'; did you mean layers? Its fields: voc",
    ),
    (("            layers=2,\n", ""), f"small.py:{line_of('model=')}: Transformer needs 'layers'."),
    (("Gelu(width=128)", "Learned()"), "model.mlp=Learned() must be one of Gelu, SwiGLU."),
    (
        ("width=64", "width=64, remat='Full'"),
        "model.remat='Full' must be one of none, selective, full, stage; did you mean full?",
    ),
    (("layers=2", "layers=2, stacks=(Stack(name='main', count=0),)"), "model.stacks[0].count=0 must be at least 1."),
    (
        ("layers=2", "layers=2, stacks=(Stack(name='main', count=2, pattern=(Block(name='A'),)),)"),
        "model.stacks[0].pattern[0].name=A must be lower-case letters, digits and _, such as local.",
    ),
    (("steps=3", "steps=3, optimiser=Lion()"), "Config has no field 'optimiser'; did you mean optimizer?"),
    (("AdamW(schedule", "AdamX(schedule"), "NameError: name 'AdamX' is not defined; did you mean AdamW?"),
    (("b2=0.98", "b2=float('nan')"), "optimizer.b2=nan must be a finite number."),
    (("return Config", "Config"), "returned None (is `return` missing?); it must return an mtx.config.Config."),
    (
        ("def get_config() -> Config:", "def config():"),
        "has no get_config(); define `def get_config() -> Config:` in it.",
    ),
    (("import MeshConfig", "import MeshConfig as"), "small.py:8: invalid syntax."),
    (
        ("import MeshConfig", "import MeshConfg"),
        "small.py:8: ImportError: cannot import name 'MeshConfg' from 'mtx.mesh'",
    ),
    (("steps=3", "steps=1 // 0"), f"small.py:{line_of('steps=')}: ZeroDivisionError: "),
    (
        ("steps=3", "steps=3, layout=Layout(rows=(Row(dimension='heads', weights='model'),))"),
        "layout.rows[0].weights='model' must be a tuple of str.",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(rows=(Row(dimension='haeds'),))"),
        "names no dimension 'haeds'; legal: answer, batch, ",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(zero=2, rows=(Row(dimension='heads'), Row(dimension='heads')))"),
        "layout.rows=(Row(dimension=heads), Row(dimension=heads)) has two rows for heads; keep one.\n",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(zero=2, rows=())"),
        "layout.zero=2 has no effect: layout.rows replaces the preset and has no row `zero` over data.",
    ),
    (
        ("steps=3", "steps=3, layout=Layout(sequence_parallel=True, rows=())"),
        "layout.sequence_parallel=true has no effect: layout.rows has no row `residual_time` over model.",
    ),
]
