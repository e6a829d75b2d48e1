"""The command line: verbs, flags, help without a device, what is refused with which words and exit code."""

import argparse
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import runs

import main
from mtx import command, data_tools, errors
from mtx.config.overrides import FLAGS
from mtx.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ["--config", "configs/quickstart.py"]
NOWHERE = {"JAX_PLATFORMS": "nowhere"}
"""A platform that does not exist: whatever touches a device fails loudly."""


def run_main(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The real command line, from the repository's folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | NOWHERE | environment,
    )


def ask_main(asked: list[list[str]]) -> list[runs.Answer]:
    return runs.ask(asked, **NOWHERE)


# What is refused before a device is touched: how each line of the error begins. One line for each problem.

NO_VERB = "error: there is no verb"
VERBS = "Verbs: train, eval, generate, prepare, data, doctor."
NO_FILE_SYSTEM = "is not on a file system: a checkpoint is sealed by a rename that object stores do not have. Mount"
FOLDER = "such as python main.py"
TRAINED, A_KIND = "error: --train-tokenizer ", "a kind and a number of tokens"
KINDS = "Kinds: bpe, wordpiece, unigram."
DATA = ("get debian|austen --out DIR", "show RUN --sample N", "stats --config FILE [--html FILE]")
SUBCOMMANDS = ", ".join(f"python main.py data {words}" for words in DATA)
REFUSED = [
    ("C steps=0", ["error: steps=0 must be positive."]),
    (
        "C steps=None",
        ["error: steps=None leaves the run without a length; set one of steps, tokens and epochs, such as"],
    ),
    (
        "C steps=10 tokens=1e6",
        ["error: steps=10 and tokens=1000000 both say how long the run is; try steps=None, or tokens=None."],
    ),
    (
        "C optimizer=lion --mesh.modle 2",
        ["error: 2 problems in the configuration:", "error: optimizer=lion must be", "error: mesh.modle: MeshConfig"],
    ),
    ("C workdir=gs://b/x", [f"error: workdir=gs://b/x {NO_FILE_SYSTEM} the bucket with"]),
    ("C workdir=s3://b/x", [f"error: workdir=s3://b/x {NO_FILE_SYSTEM} the bucket with"]),
    ("C data=TextFiles", ["error: data=TextFiles needs data.paths=... too."]),
    ("C data=TextFiles data.paths=x data.split=a,b", ["error: data.split=a,b must be two or three numbers, the first"]),
    (
        "C data=TextFiles data.paths=x data.bad_records=Skip data.bad_records.budget=0",
        ["error: data.bad_records.budget=0 must be at least 1; data.bad_records=Fail skips none."],
    ),
    (
        "C data=TextFiles data.paths=x data.tokenizer=TokenizerFile data.tokenizer.path=no/t.json",
        ["error: data.tokenizer.path=no/t.json cannot be used: no/t.json cannot be read: No such file or directory."],
    ),
    (
        "C data=TextFiles data.paths=x data.tokenizer=Bpe",
        ["error: model.vocab_size=257 is smaller than the 8192 tokens of data=TextFiles; try model.vocab_size=8192."],
    ),
    # Verbs.
    ("trian C", [f"{NO_VERB} 'trian'; did you mean train? {VERBS}"]),
    ("TRAIN C", [f"{NO_VERB} 'TRAIN'; did you mean train? {VERBS}"]),
    ("evaluate runs/x", [f"{NO_VERB} 'evaluate'; did you mean eval? {VERBS}"]),
    ("generat runs/x", [f"{NO_VERB} 'generat'; did you mean generate? {VERBS}"]),
    ("prepair C", [f"{NO_VERB} 'prepair'; did you mean prepare? {VERBS}"]),
    ("docter", [f"{NO_VERB} 'docter'; did you mean doctor? {VERBS}"]),
    ("help", [f"{NO_VERB} 'help'; did you mean --help? {VERBS}"]),
    ("launch C", [f"{NO_VERB} 'launch'. {VERBS}"]),
    ("runs/quickstart", [f"{NO_VERB} 'runs/quickstart'. {VERBS}"]),
    (
        "configs/quickstart.py",
        [f"{NO_VERB} 'configs/quickstart.py'; did you mean --config configs/quickstart.py? {VERBS}"],
    ),
    ("C optimizer.b1 0.9", [f"{NO_VERB} 'optimizer.b1'; did you mean optimizer.b1=VALUE, without spaces? {VERBS}"]),
    ("trian --help", [f"{NO_VERB} 'trian'; did you mean train? {VERBS}"]),
    # Flags.
    ("C --frseh", ["error: there is no flag --frseh; did you mean --fresh?"]),
    ("--frseh C steps=3", ["error: frseh: Config has no field 'frseh'; did you mean --fresh? Its fields:"]),
    ("C --accept_changes", ["error: there is no flag --accept_changes; did you mean --accept-changes?"]),
    ("C --fresh=true", ["error: argument --fresh: takes no value, got 'true'"]),
    ("C fresh=true", ["error: fresh: Config has no field 'fresh'; did you mean --fresh?"]),
    ("C --frseh --stesp=3", ["error: there is no flag --frseh; did you mean --fresh?"]),
    ("C --steps", ["error: --steps needs a value; write steps=value."]),
    ("--config", ["error: argument --config: expected one argument"]),
    ("C --devices many", ["error: argument --devices: invalid int value: 'many'"]),
    ("C --processes 2", ["error: --coordinator, --processes and --process go together; give all three or none."]),
    ("steps=3", ["error: --config FILE is missing; such as --config configs/quickstart.py."]),
    (
        "--config configs/quikstart.py",
        ["error: there is no config file configs/quikstart.py; did you mean configs/quick"],
    ),
    # Verbs other than train.
    ("prepare", ["error: --config FILE is missing; such as --config configs/quickstart.py."]),
    ("prepare C data=TextFiles data.paths=x data.split=a,b", ["error: data.split=a,b must be two or three numbers,"]),
    ("prepare C stesp=3", ["error: stesp: Config has no field 'stesp'; did you mean steps?"]),
    ("prepare C --train-tokenizer", ["error: argument --train-tokenizer: expected one argument"]),
    ("prepare C --train-tokenizer bpe", [f"{TRAINED}bpe must be {A_KIND}; did you mean bpe:16384? {KINDS}"]),
    ("prepare C --train-tokenizer bep:8192", [f"{TRAINED}bep:8192 must be {A_KIND}; did you mean bpe:8192? {KINDS}"]),
    ("prepare C --train-tokenizer BPE:8192", [f"{TRAINED}BPE:8192 must be {A_KIND}; did you mean bpe:8192? {KINDS}"]),
    ("prepare C --train-tokenizer bpe=8192", [f"{TRAINED}bpe=8192 must be {A_KIND}; did you mean bpe:8192? {KINDS}"]),
    ("prepare C --train-tokenizer bpe:16k", [f"{TRAINED}bpe:16k must be {A_KIND}; did you mean bpe:16384? {KINDS}"]),
    ("prepare C --train-tokenizer bpe:-3", [f"{TRAINED}bpe:-3 must be {A_KIND}; did you mean bpe:16384? {KINDS}"]),
    (
        "prepare C --train-tokenizer word:8192",
        [f"{TRAINED}word:8192 must be {A_KIND}; did you mean wordpiece:8192? {KINDS}"],
    ),
    ("prepare C --train-tokenizer x:9000", [f"{TRAINED}x:9000 must be {A_KIND}; such as bpe:9000. {KINDS}"]),
    (
        "prepare C --train-tokenizer bpe:8192",
        ["error: --train-tokenizer is for data=TextFiles; data=PythonDocs has bytes as tokens; add data=TextFiles"],
    ),
    (
        "prepare C data=TextFiles data.paths=x --train-tokenizer bpe:100",
        ["error: data.tokenizer.vocab_size=100 must be at least 257: 256 bytes and the end of document; try 8192."],
    ),
    (
        "prepare C data=TextFiles data.paths=x data.tokenizer=Gpt2 --train-tokenizer bpe:300",
        ["error: data.tokenizer is given twice, as Gpt2 and as Bpe; keep one."],
    ),
    ("C --train-tokenizer bpe:300", [f"{TRAINED}is for prepare alone, which says what to type for train."]),
    ("eval runs/x --train-tokenizer=bpe:300", [f"{TRAINED}is for prepare alone, which says what to type for eval."]),
    ("C --workers 4", ["error: --workers is for prepare alone, which may be run before train."]),
    ("prepare C --workers 0", ["error: --workers 0 must be at least 1; without it there are as many as cores."]),
    ("prepare C --workers two", ["error: argument --workers: invalid int value: 'two'"]),
    ("eval", [f"error: eval takes one run folder (none is given); {FOLDER} eval runs/quickstart."]),
    ("eval a b", [f"error: eval takes one run folder (got a, b); {FOLDER} eval runs/quickstart."]),
    ("eval C", [f"error: eval takes a run folder, not --config; {FOLDER} eval runs/quickstart."]),
    ("eval no/run", ["error: no/run is no run folder: it has no config.json; such as runs/quickstart."]),
    ("eval no/run --split tset", ["error: argument --split: invalid choice: 'tset'"]),
    ("eval no/run --step one", ["error: argument --step: invalid int value: 'one'"]),
    (
        "generate --prompt hello",
        [f"error: generate takes one run folder (none is given); {FOLDER} generate runs/quicks"],
    ),
    ("generate no/run --prompt hello", ["error: no/run is no run folder: it has no config.json; such as runs/quick"]),
    ("generate no/run", ["error: generate needs --prompt TEXT or --prompt-file FILE;"]),
    ("generate no/run --promt hello", ["error: generate needs --prompt TEXT or --prompt-file FILE;"]),
    ("generate no/run --prompt a --tokens 0", ["error: --tokens 0 must be at least 1."]),
    ("data", [f"error: data needs a subcommand: {SUBCOMMANDS}."]),
    ("data stast C", [f"error: there is no data stast; did you mean data stats? Type: {SUBCOMMANDS}."]),
    ("data xyz C", [f"error: there is no data xyz. Type: {SUBCOMMANDS}."]),
    (
        "data show runs/x",
        ["error: data show needs --sample N, the number of a sample, from 0; such as --sample 123456."],
    ),
    (
        "data show --sample 4",
        ["error: data show takes one run folder (none is given); such as python main.py data show "],
    ),
    ("data stats", ["error: --config FILE is missing; such as --config configs/quickstart.py."]),
    ("data stats C --out x", ["error: --out is for data get; leave it out of data stats."]),
    ("data stats C --fresh", ["error: --fresh is for train alone; leave it out of data."]),
    ("data stats C stesp=3", ["error: stesp: Config has no field 'stesp'; did you mean steps?"]),
    ("data get C", ["error: data get takes a recipe, not --config; such as python main.py data get austen --out aus"]),
    ("data get", ["error: data get takes one recipe (none is given): austen, debian; such as python main.py data g"]),
    ("data get a b=3", ["error: data get takes one recipe (got a, b=3): austen, debian; such as python main.py da"]),
    ("data get austin", ["error: there is no recipe 'austin'; did you mean austen? Recipes: austen, debian."]),
    ("data get debian", ["error: data get needs a folder for the corpus; add --out debian."]),
    ("data get debian --out x --html y", ["error: --html is for data stats; leave it out of data get."]),
    ("doctor steps=3", ["error: doctor takes no steps=3; python main.py doctor --help shows what it takes."]),
]


def split(text: str) -> list[str]:
    return [part for word in text.split() for part in (QUICKSTART if word == "C" else [word])]


@pytest.fixture(scope="module")
def refusals() -> dict[str, tuple[int | str, str, str, bool]]:
    return dict(zip([words for words, _ in REFUSED], ask_main([split(words) for words, _ in REFUSED]), strict=True))


@pytest.mark.parametrize(("words", "lines"), REFUSED, ids=[words for words, _ in REFUSED])
def test_the_command_line_refuses_in_a_line_for_each_problem_before_devices(refusals, words, lines):
    code, out, err, _ = refusals[words]
    assert code == 64
    assert out == ""
    assert len(err.splitlines()) == len(lines)
    for line, start in zip(err.splitlines(), lines, strict=True):
        assert line.startswith(start)


def test_a_process_that_is_refused_says_so_and_nothing_else():
    done = run_main(*QUICKSTART, "steps=0")
    assert (done.returncode, done.stdout, done.stderr) == (64, "", "error: steps=0 must be positive.\n")


def test_devices_that_do_not_fit_exit_with_their_own_code():
    done = run_main(*QUICKSTART, "--devices", "6", "mesh.data=4")
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert done.stderr.startswith("error: mesh.data=4 uses 4 of 6 devices; try mesh.data=6, or ")


@pytest.fixture
def mistyped(tmp_path: Path) -> list[str]:
    """Text in texts/, and a command line that looks for it in text/."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello\n" * 9)
    return [*QUICKSTART, "data=TextFiles", f"data.paths={tmp_path}/text/*.txt", f"data.folder={tmp_path}/shards"]


def test_text_that_is_not_there_is_a_data_error_with_the_nearest_name(mistyped, tmp_path):
    done = run_main("prepare", *mistyped)
    hint = f"error: data.paths: {tmp_path}/text/*.txt matches no file; did you mean {tmp_path}/texts?\n"
    assert (done.returncode, done.stdout, done.stderr) == (65, "", hint)


def test_training_prepares_first_and_ends_with_the_code_of_its_data(mistyped, tmp_path):
    workdir = tmp_path / "run"
    done = run_main(*mistyped, f"workdir={workdir}", "--devices", "1", JAX_PLATFORMS="cpu")
    assert done.returncode == 65
    assert "Traceback" not in done.stderr
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert found == [
        f"error: data.paths: {tmp_path}/text/*.txt matches no file; did you mean {tmp_path}/texts?",
        "error: the data could not be prepared: `prepare` ended with exit code 65, see above.",
    ]
    assert not workdir.exists()


# Exit codes.

CODES = {
    errors.UserError: 1,
    errors.ConfigError: 64,
    errors.DataError: 65,
    errors.CheckpointError: 66,
    errors.NumericsError: 67,
    errors.DeviceError: 69,
    errors.StorageError: 73,
    errors.Stopped: 75,
    errors.StoppedUnsaved: 76,
}


def test_every_end_has_a_code_of_its_own_apart_from_those_of_shells_and_signals():
    ends = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)}
    assert ends == set(CODES)
    assert len(set(CODES.values())) == len(CODES)
    assert all(64 <= code < 126 for error, code in CODES.items() if error is not errors.UserError)


@pytest.mark.parametrize("error", CODES, ids=lambda error: error.__name__)
def test_a_verb_s_error_becomes_lines_and_its_exit_code(monkeypatch, capsys, error):
    def fails(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
        assert (flags.verbose, words, argv) == (True, ["a=1"], ["main.py", "-v", "fails", "a=1"])
        raise error("first\nsecond")

    monkeypatch.setitem(command.VERBS, "fails", ("fails", "for this test"))
    monkeypatch.setitem(sys.modules, "mtx.fails", types.SimpleNamespace(main=fails))
    assert main.main(["main.py", "-v", "fails", "a=1"]) == CODES[error]
    prefix = "" if issubclass(error, errors.Stopped) else "error: "
    assert capsys.readouterr() == ("", f"{prefix}first\n{prefix}second\n")


def test_what_is_no_user_s_mistake_keeps_its_traceback(monkeypatch):
    def fails(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
        raise ValueError("ours")

    monkeypatch.setitem(command.VERBS, "fails", ("fails", "for this test"))
    monkeypatch.setitem(sys.modules, "mtx.fails", types.SimpleNamespace(main=fails))
    with pytest.raises(ValueError, match="ours"):
        main.main(["main.py", "fails"])


# Help.

EVERY = {f"--{flag}" for flag in FLAGS}
OWN = {
    "train": set(),
    "doctor": {"--folder", "--need-gb", "--dev"},
    "data": {"--out", "--sample", "--html"},
    "prepare": {"--train-tokenizer", "--workers"},
    "eval": {"--split", "--step", "--metrics"},
    "generate": {
        *("--prompt", "--prompt-file", "--tokens", "--temperature", "--top-k", "--top-p", "--step", "--seed"),
    },
}
"""In the order in which they are asked: JAX, once imported, stays."""
NO_JAX = {"train", "doctor", "data"}


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int | str, str, str, bool]]:
    return dict(zip(OWN, ask_main([[verb, "--help"] for verb in OWN]), strict=True))


@pytest.mark.parametrize("verb", OWN)
def test_help_of_every_verb_names_its_flags_without_a_device(helps, verb):
    code, out, err, jax = helps[verb]
    assert (code, err) == (0, "")
    named = re.findall(r"^  (?:-\w, )?(--[\w-]+)(?: \S+)?(?:  +|\n {10,})(\S.*)$", out, re.MULTILINE)
    assert {flag for flag, _ in named} == EVERY | OWN[verb]
    assert all(len(said) > 8 for _, said in named)
    for other, (_, what) in command.VERBS.items():
        assert f"  {other:<12}{what}\n" in out
    assert out.startswith(f"usage: {command.USAGE}\n")
    assert not (jax and verb in NO_JAX)


def test_help_is_known_for_every_verb():
    assert set(OWN) == set(command.VERBS)
    assert set(data_tools.SUBCOMMANDS) <= set(re.findall(r"\w+", command.VERBS["data"][1]))


def test_help_without_a_verb_or_a_config_imports_no_jax():
    (short, short_verb) = ask_main([["-h"], ["--help", "train"]])
    assert short == short_verb
    code, out, err, jax = short
    assert (code, err, jax) == (0, "", False)
    assert "verbs:\n  train" in out
    assert "--devices N" in out


def test_help_with_a_config_lists_fields_without_devices():
    done = run_main(*QUICKSTART, "--help", "steps=17")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--devices N" in done.stdout
    assert re.search(r"^steps: int \| None = 17 +command line$", done.stdout, re.MULTILINE)
    assert re.search(r"^checkpoints.keep: int = 2 +default$", done.stdout, re.MULTILINE)


def test_help_with_a_wrong_config_is_refused_like_any_run(capsys):
    assert main.main(["main.py", "--config", str(ROOT / "configs" / "quickstart.py"), "--help", "stesp=3"]) == 64
    assert capsys.readouterr().err.startswith("error: stesp: Config has no field 'stesp'; did you mean steps?")


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 80


# The parts.


def test_devices_replaces_an_existing_count(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=4 --xla_b=2")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    command.simulate(8)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b=2", "--xla_force_host_platform_device_count=8"]
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_the_verb_is_the_first_bare_word():
    words = ["--steps", "3", "train", "seed=1"]
    assert command.take_verb(words) == "train"
    assert words == ["--steps", "3", "seed=1"]
    assert command.take_verb(["--steps", "3"]) == "train"
    words = ["generate", "runs/a", "--prompt", "eval"]
    assert command.take_verb(words) == "generate"
    assert words == ["runs/a", "--prompt", "eval"]
    assert command.parser().parse_known_args(["--mesh.data", "-1", "-v", "a.b=1"])[1] == ["--mesh.data", "-1", "a.b=1"]


def test_flags_are_not_abbreviated_and_those_for_near_misses_are_the_parser_s():
    known = {option for action in command.parser()._actions for option in action.option_strings}
    assert {option for option in known if option.startswith("--")} == EVERY
    flags, words = command.parser().parse_known_args(["--fres", "--accept"])
    assert (flags.fresh, flags.accept_changes, words) == (False, False, ["--fres", "--accept"])
    flags, words = command.parser().parse_known_args(["--fresh", "--accept-changes"])
    assert (flags.fresh, flags.accept_changes, words) == (True, True, [])


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("runs/a", ""),
        ("runs/a steps=3 --mesh.model=2", "steps=3 --mesh.model=2"),
        ("seed=1 runs/a --mesh.data 4 eval_sequences=8", "seed=1 --mesh.data 4 eval_sequences=8"),
        ("--mesh.data -1 runs/a", "--mesh.data -1"),
        ("--workdir runs/a runs/a", "--workdir runs/a"),
    ],
)
def test_a_run_folder_is_the_bare_word_among_overrides(words, left):
    flags, rest = command.parser().parse_known_args(words.split())
    assert command.run_folder(flags, rest, "eval") == (Path("runs/a"), left.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "eval takes one run folder (none is given); such as python main.py eval runs/quickstart."),
        ("steps=3", "eval takes one run folder (none is given); such as python main.py eval runs/quickstart."),
        ("a steps=3 b", "eval takes one run folder (got a, b); such as python main.py eval runs/quickstart."),
        ("--config c.py a", "eval takes a run folder, not --config; such as python main.py eval runs/quickstart."),
    ],
)
def test_a_verb_that_takes_a_run_folder_says_so(words, said):
    flags, rest = command.parser().parse_known_args(words.split())
    with pytest.raises(ConfigError) as caught:
        command.run_folder(flags, rest, "eval")
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["eval", "runs/x", "--fresh"], "--fresh"),
        (["generate", "runs/x", "--accept-changes"], "--accept-changes"),
        (["prepare", "--config", "configs/quickstart.py", "--processes", "2"], "--processes"),
        (["doctor", "--fresh"], "--fresh"),
    ],
)
def test_flags_of_train_are_refused_by_other_verbs(words: list[str], flag: str, capsys: pytest.CaptureFixture):
    assert main.main(["main.py", *words]) == 64
    assert f"error: {flag} is for train alone; leave it out of {words[0]}." in capsys.readouterr().err
