"""The command line: what it prints, one line for each mistake, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from support import nano, random_tensors, write_checkpoint
from test_tokenizer import MERGES_TEXT, SMALL, make_vocab_json

import numpygpt
from numpygpt.cli import main
from numpygpt.errors import CheckpointWarning
from numpygpt.tokenizer import END_OF_TEXT

VOCAB = SMALL | {END_OF_TEXT: len(SMALL)}
CONFIG = nano(vocab_size=len(VOCAB))


def make_model(directory: pathlib.Path, vocab: dict[str, int] = VOCAB, **changes: Any) -> str:
    """A nano checkpoint with a vocabulary of bytes and seven merges; its path as text."""
    write_checkpoint(directory, CONFIG, random_tensors(CONFIG, dtype="float32"), **changes)
    make_vocab_json(directory, vocab, MERGES_TEXT)
    return str(directory)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> str:
    return make_model(tmp_path / "model")


class Result:
    """What a command line printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line inside this process."""

    def run(*argv: str) -> Result:
        try:
            code = main(argv)
        except SystemExit as error:  # argparse
            code = error.code
        return Result(code, *capsys.readouterr())

    return run


class Terminal(io.StringIO):
    """A standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "numpygpt", *argv]


SAMPLING = ("--temperature", "2", "--top-k", "40", "--seed", "7")


# -- generate ----------------------------------------------------------------------------------


def test_generate_prints_the_prompt_and_what_follows(cli, model):
    expected = numpygpt.load(model).generate("the ", max_new_tokens=8)
    result = cli("generate", "the ", "--model", model, "--max-new-tokens", "8")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"the {expected.text}\n"


def test_no_new_tokens_print_the_prompt_alone(cli, model):
    result = cli("generate", "the", "--model", model, "--max-new-tokens", "0")
    assert (result.code, result.out, result.err) == (0, "the\n", "")


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        ("the", "the"),
        ("the\n", "the"),
        ("the\n\n", "the\n"),
        (" the ", " the "),
        ("12é\n", "12é"),
        ("t\nh", "t\nh"),
    ],
)
def test_a_piped_prompt_loses_exactly_one_trailing_newline(cli, model, monkeypatch, piped, prompt):
    pipe(monkeypatch, piped.encode())
    result = cli("generate", "--model", model, "--max-new-tokens", "2", "--json")
    assert result.code == 0
    assert json.loads(result.out)["options"]["prompts"] == [prompt]


def test_an_argument_is_preferred_to_what_is_piped(cli, model, monkeypatch):
    pipe(monkeypatch, b"piped")
    result = cli("generate", "given", "--model", model, "--max-new-tokens", "0")
    assert result.out == "given\n"


def test_json_holds_the_settings_and_the_result(cli, model):
    expected = numpygpt.load(model).generate(
        "the", max_new_tokens=5, temperature=2.0, top_k=40, seed=7
    )
    result = cli("generate", "the", "--model", model, "--max-new-tokens", "5", *SAMPLING, "--json")
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    record = json.loads(result.out)
    assert (record["model"]["name"], record["model"]["dtype"]) == (model, "float32")
    given = {"max_new_tokens": 5, "temperature": 2.0, "top_k": 40, "seed": 7, "prompts": ["the"]}
    assert {name: record["options"][name] for name in given} == given
    assert record["filters"] == ["temperature 2.0", "top_k 40"]
    assert record["results"]["generations"] == [vars(expected)]
    assert len(expected.ids) == len(expected.logprobs)


def generation(out: str) -> dict[str, Any]:
    """The only result in a run record."""
    (result,) = json.loads(out)["results"]["generations"]
    return result


def test_a_seed_makes_the_text_repeatable_and_another_one_changes_it(cli, model):
    run = ["generate", "the", "--model", model, "--max-new-tokens", "8", *SAMPLING]
    first, second = cli(*run).out, cli(*run).out
    assert first == second
    assert cli(*run[:-1], "8").out != first


def test_float64_is_computed_in_float64(cli, model):
    run = ["generate", "the", "--model", model, "--max-new-tokens", "5", "--json"]
    logprobs = generation(cli(*run, "--dtype", "float64").out)["logprobs"]
    assert logprobs == numpygpt.load(model, "float64").generate("the", max_new_tokens=5).logprobs
    assert logprobs != generation(cli(*run).out)["logprobs"]


@pytest.mark.parametrize("how", ["given", "piped", "terminal"])
def test_an_empty_prompt_starts_from_end_of_text(cli, model, monkeypatch, how):
    if how == "piped":
        pipe(monkeypatch, b"\n")
    argv = ["generate", *[""] * (how == "given"), "--model", model, "--json"]
    result = cli(*argv, "--max-new-tokens", "2")
    assert result.code == 0
    assert generation(result.out)["prompt_ids"] == [VOCAB[END_OF_TEXT]]


def test_the_bundled_model_is_the_default(cli):
    result = cli("generate", "ROMEO:", "--max-new-tokens", "3", "--json")
    assert (result.code, len(generation(result.out)["ids"])) == (0, 3)
    assert json.loads(result.out)["model"]["name"] == "shakespeare"


def test_a_doubtful_checkpoint_gets_a_warning_on_one_line(cli, model, monkeypatch):
    def doubtful(*args, **options):
        warnings.warn("gelu is assumed", CheckpointWarning, stacklevel=2)
        return numpygpt.load(*args, **options)

    monkeypatch.setattr("numpygpt.cli.options.load", doubtful)
    result = cli("generate", "the", "--model", model, "--max-new-tokens", "2")
    assert (result.code, result.err) == (0, "numpygpt: warning: gelu is assumed\n")


def test_damaged_weights_are_an_error_on_one_line(cli, tmp_path):
    tensors = random_tensors(CONFIG, dtype="float32")
    tensors["wpe.weight"][0, 0] = float("nan")
    model = make_model(tmp_path)
    write_checkpoint(tmp_path, CONFIG, tensors)
    text = tmp_path / "text"
    text.write_text("the the")
    for command in (["generate", "the", "--max-new-tokens", "2"], ["score", str(text)]):
        check_error(cli(*command, "--model", model), "its weights are damaged")


def test_threads_are_set_for_the_run(cli, model, monkeypatch):
    asked = []
    monkeypatch.setattr("numpygpt.cli.options.set_threads", asked.append)
    cli("generate", "the", "--model", model, "--max-new-tokens", "1")
    assert asked == []
    cli("generate", "the", "--model", model, "--max-new-tokens", "1", "--threads", "3")
    assert asked == [3]
    result = cli("generate", "the", "--model", model, "--threads", "0")
    assert result.code == 2
    assert "--threads: expected an integer from 1 up, not '0'" in result.err


def test_without_any_standard_input_the_prompt_is_empty(cli, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of "<&-"
    result = cli("generate", "--model", model, "--max-new-tokens", "1", "--json")
    assert json.loads(result.out)["options"]["prompts"] == [""]


class Full(io.StringIO):
    """A standard output on a disk that is full."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("verb", [["generate", "the", "--model"], ["inspect"]], ids=lambda v: v[0])
def test_output_that_cannot_be_written_is_a_mistake_on_one_line(cli, model, monkeypatch, verb):
    monkeypatch.setattr(sys, "stdout", Full())
    few = ["--max-new-tokens", "2"] * (verb[0] == "generate")
    check_error(cli(*verb, model, *few), os.strerror(errno.ENOSPC))


# -- mistakes ----------------------------------------------------------------------------------


def break_model(directory: pathlib.Path, how: str) -> str:
    """The path of a model that is broken in one way."""
    path = pathlib.Path(make_model(directory))
    weights, merges = path / "model.safetensors", path / "merges.txt"
    if how == "missing directory":
        return str(directory / "nowhere")
    if how == "empty directory":
        (directory / "empty").mkdir()
        return str(directory / "empty")
    if how == "empty file":
        weights.write_bytes(b"")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "llama":
        write_checkpoint(path, CONFIG, model_type="llama")
    elif how == "wrong n_layer":
        write_checkpoint(path, CONFIG, n_layer=3)
    elif how == "no config":
        (path / "config.json").unlink()
    elif how == "bad merges":
        merges.write_text("one\n")
    elif how == "no vocabulary":
        merges.unlink()
    elif how == "larger vocabulary":
        (path / "vocab.json").write_text(json.dumps({**VOCAB, "<pad>": 10**6}))
    elif how == "no end-of-text":
        (path / "vocab.json").write_text(json.dumps(SMALL))
    return str(path)


BROKEN = {
    "missing directory": "nowhere",
    "empty directory": "empty: expected model.safetensors",
    "empty file": "model.safetensors: 0 bytes",
    "truncated": "model.safetensors: .* truncated",
    "llama": "config.json: model_type is 'llama'",
    "wrong n_layer": "n_layer = 3",
    "no config": "config.json: not found",
    "bad merges": "merges.txt: expected two tokens",
    "no vocabulary": "vocab.json: a vocabulary needs more files",
    "larger vocabulary": "ids up to 1000000, but the model has 264",
}


def check_error(result: Result, message: str) -> None:
    """One line that says what is wrong, nothing else, exit code 2."""
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("numpygpt: error: ")
    assert re.search(message, result.err)


@pytest.mark.parametrize(("how", "message"), BROKEN.items(), ids=BROKEN)
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_generate_says_in_one_line_what_is_wrong_with_a_model(cli, tmp_path, how, message, as_json):
    check_error(cli("generate", "the", "--model", break_model(tmp_path, how), *as_json), message)


def test_an_empty_prompt_without_end_of_text_is_a_mistake(cli, tmp_path):
    model = break_model(tmp_path, "no end-of-text")
    check_error(cli("generate", "", "--model", model), "prompt is empty.* no end-of-text")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["the" * 20], "more than the 13 that 12 positions allow"),
        (["the", "--max-new-tokens", "13"], "more than the 13 .*ask for at most 12"),
        (["the", "--max-new-tokens", "-1"], "max_new_tokens must be an integer from 0 up, not -1"),
        (["the", "--top-k", "5"], "top_k = 5 has no effect on greedy"),
        (["the", "--top-k", "0", "--temperature", "1"], "top_k must be an integer from 1 up"),
        (["the", "--temperature", "-1"], "temperature must be .* not -1.0"),
        (["the", "--temperature", "nan"], "temperature must be .* not nan"),
        (["the", "--temperature", "inf"], "temperature must be .* not inf"),
        (["the", "--seed", "-1", "--temperature", "1"], "seed must be an integer from 0 up"),
        (["the", "--dtype", "int7"], "dtype must be one of float32, .*, int8, not 'int7'"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_generate_says_in_one_line_what_is_wrong_with_a_setting(cli, model, argv, message):
    defaults = [] if "--max-new-tokens" in argv else ["--max-new-tokens", "2"]
    check_error(cli("generate", *argv, "--model", model, *defaults), message)


@pytest.mark.parametrize("verb", [["generate", "x", "--model"], ["inspect"]], ids=lambda v: v[0])
def test_an_unknown_name_gets_a_suggestion(cli, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    check_error(cli(*verb, "shakespear"), r"unknown model 'shakespear'.*mean 'shakespeare'\?")
    check_error(cli(*verb, "gpt2"), "'gpt2' is not on this machine.* never downloads")


@pytest.mark.parametrize(
    "argv",
    [[], ["dream"], ["generate", "--no-such"], ["generate", "x", "--top-k", "many"]],
    ids=str,
)
def test_a_line_that_cannot_be_parsed_gets_the_usage(cli, argv):
    result = cli(*argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage: numpygpt")
    assert "Traceback" not in result.err


def test_version_and_help(cli):
    version = cli("--version")
    assert (version.code, version.out) == (0, f"numpygpt {numpygpt.__version__}\n")
    for verb in ([], ["generate"], ["inspect"]):
        text = cli(*verb, "--help")
        assert (text.code, text.err) == (0, "")
        assert text.out.startswith(" ".join(["usage: numpygpt", *verb]))


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_prints_config_size_tokenizer_and_tensors(cli, model):
    result = cli("inspect", model)
    assert (result.code, result.err) == (0, "")
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[0] == model
    for line in [
        "n_embd 8",
        "activation_function gelu_new",
        f"parameters {CONFIG.parameter_count:,}",
        f"bytes of tensors {4 * CONFIG.parameter_count:,}",
        f"tokens {len(VOCAB)}",
        f"end-of-text {VOCAB[END_OF_TEXT]}",
        "tensors 28 F32",
        f"wte.weight F32 {len(VOCAB)} x 8",
        "h.*.attn.c_attn.weight F32 8 x 24 x 2",
    ]:
        assert line in lines


def test_inspect_json_holds_the_same(cli, model):
    record = json.loads(cli("inspect", model, "--json").out)
    assert record["config"] == vars(CONFIG)
    assert (record["path"], record["problems"]) == (model, [])
    assert record["parameters"] == CONFIG.parameter_count
    assert record["tensors"]["wpe.weight"] == {"dtype": "F32", "shape": [12, 8], "bytes": 384}
    assert list(record["tensors"]) == list(random_tensors(CONFIG))


# A model without vocabulary files is sound: it takes ids.
REPORTED = BROKEN.keys() - {"missing directory", "empty directory"}


@pytest.mark.parametrize("how", sorted(REPORTED))
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_inspect_says_what_would_be_refused(cli, tmp_path, how, as_json):
    result = cli("inspect", break_model(tmp_path, how), *as_json)
    assert result.code == 2
    assert result.err.startswith("numpygpt: would be refused: ")
    assert result.err.count("\n") == 1
    assert re.search(BROKEN[how], result.err)
    if as_json:
        (problem,) = json.loads(result.out)["problems"]
        assert problem in result.err


def test_inspect_prints_each_problem_on_a_line(cli, tmp_path):
    path = pathlib.Path(break_model(tmp_path, "llama"))
    (path / "model.safetensors").write_bytes(b"short")
    result = cli("inspect", str(path))
    assert result.code == 2
    assert [line[:28] for line in result.err.splitlines()] == ["numpygpt: would be refused: "] * 2
    assert "none could be read" in result.out


@pytest.mark.parametrize("how", ["missing directory"])
def test_inspect_where_there_is_nothing_is_a_mistake(cli, tmp_path, how):
    check_error(cli("inspect", break_model(tmp_path, how)), BROKEN[how])


def test_a_model_without_vocabulary_is_inspected_as_such(cli, tmp_path):
    write_checkpoint(tmp_path, nano())
    result = cli("inspect", str(tmp_path))
    assert (result.code, result.err) == (0, "")
    assert "ids only" in result.out


# -- as a process ------------------------------------------------------------------------------


def test_the_module_runs_reads_a_pipe_and_writes_utf_8(model):
    run = command("generate", "--model", model, "--max-new-tokens", "0")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(run, input="é 12\n".encode(), capture_output=True, env=environment)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"é 12{os.linesep}", b"")


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(model):
    run = command("generate", "é", "--model", model, "--max-new-tokens", "0")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(run, capture_output=True, env=environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"?", b"")


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback(tmp_path):
    done = subprocess.run(command("inspect", str(tmp_path / "x")), capture_output=True, text=True)
    check_error(Result(done.returncode, done.stdout, done.stderr), "x")


@pytest.fixture
def long_model(tmp_path: pathlib.Path) -> str:
    """A model that talks for minutes unless it is stopped."""
    config = nano(vocab_size=len(VOCAB), n_ctx=200_000)
    write_checkpoint(tmp_path, config)
    make_vocab_json(tmp_path, SMALL, MERGES_TEXT)  # without end-of-text nothing else stops it
    return str(tmp_path)


def start(model: str) -> subprocess.Popen[bytes]:
    """Begin to generate, and wait for the first byte."""
    run = command("generate", "the", "--model", model, "--max-new-tokens", "199000", *SAMPLING)
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"t"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE and no such SIGINT")
@pytest.mark.parametrize("how", ["the reader leaves", "Ctrl-C"])
def test_a_stream_that_is_cut_ends_without_a_traceback(long_model, how):
    process = start(long_model)
    try:
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
            process.stdout = None
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert errors.strip() == b""
    assert process.returncode == (130 if how == "Ctrl-C" else 0)


def test_inspect_as_json_has_the_tokenizer(cli, model):
    record = json.loads(cli("inspect", model, "--json").out)
    assert record["tokenizer"] == {"tokens": len(VOCAB), "end_of_text": VOCAB[END_OF_TEXT]}


@pytest.mark.parametrize("piped", ["the\n", "the\r\n", "\ufeffthe\n"], ids=ascii)
def test_line_ends_and_marks_of_windows_are_no_part_of_a_piped_prompt(model, piped):
    command = [sys.executable, "-m", "numpygpt", "generate", "--model", model, "--json"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"], input=piped.encode(), capture_output=True, check=True
    )
    assert json.loads(done.stdout)["options"]["prompts"] == ["the"]


def test_a_tensor_name_cannot_steer_the_terminal(cli, tmp_path):
    directory = write_checkpoint(
        tmp_path, CONFIG, random_tensors(CONFIG, dtype=np.float32) | {"\x1b]0;x\x07": np.ones(1)}
    )
    result = cli("inspect", str(directory))
    assert result.code == 2
    assert "\x1b" not in result.out + result.err
    assert r"\x1b]0;x\x07" in result.err
