"""The verb ``generate``: every option, JSON lines, run records and their replay."""

# The fixtures of test_cli are arguments here, too.
# ruff: noqa: F811

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import nano, random_tensors, write_checkpoint
from test_cli import (  # noqa: F401  # fixtures
    CONFIG,
    VOCAB,
    Result,
    check_error,
    cli,
    command,
    generation,
    long_model,
    make_model,
    model,
    pipe,
    terminal,
)

import numpygpt
from numpygpt.cli import generate, json_lines
from numpygpt.decoding import Beams, Generation, Settings
from numpygpt.feed import Feeder
from numpygpt.records import plain
from numpygpt.tokenizer import END_OF_TEXT

PROMPT = "the th"  # 4 tokens of the 12 positions, so 9 new ones fit
NEW = 8
NEWLINE = 198  # ids of the vocabulary of test_cli
THE, SPACE_THE, E_ACUTE = 258, 259, 260


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser by their names."""
    return {name: action for action in parser._actions for name in action.option_strings}


@pytest.fixture(scope="module")
def declared() -> dict[str, argparse.Action]:
    """The options of ``numpygpt generate``, without -h."""
    found = options(generate.add(argparse.ArgumentParser().add_subparsers()))
    return {name: action for name, action in found.items() if name not in ("-h", "--help")}


# -- the options -------------------------------------------------------------------------------

# Each setting: options, the same settings in Python, and the value that means it was not given.
SAMPLED = {"temperature": 2.0, "seed": 7}
GREEDY: dict[str, Any] = {}
REACH: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "--max-new-tokens": (["--max-new-tokens", "3"], GREEDY | {"max_new_tokens": 3}, {}),
    "--min-new-tokens": (
        ["--min-new-tokens", "5", "--stop-id", "116"],
        {"min_new_tokens": 5, "stop_ids": [116]},
        {"stop_ids": [116]},
    ),
    "--stop": (
        ["--force", f"3={NEWLINE}", "--stop", r"\n", "--stop", "never"],
        {"forced": {3: NEWLINE}, "stop": ["\n", "never"]},
        {"forced": {3: NEWLINE}},
    ),
    "--stop-id": (["--stop-id", "5", "--stop-id", "116"], {"stop_ids": [5, 116]}, {}),
    "--no-stop-id": (
        ["--force", f"2={VOCAB[END_OF_TEXT]}", "--no-stop-id"],
        {"forced": {2: VOCAB[END_OF_TEXT]}, "stop_ids": ()},
        {"forced": {2: VOCAB[END_OF_TEXT]}},
    ),
    "--overflow": (
        ["--max-new-tokens", "11", "--overflow", "truncate-left"],
        {"max_new_tokens": 11, "overflow": "truncate-left"},
        {"max_new_tokens": 9},
    ),
    "--keep": (
        ["--max-new-tokens", "20", "--overflow", "slide", "--keep", "2"],
        {"max_new_tokens": 20, "overflow": "slide", "keep": 2},
        {"max_new_tokens": 20, "overflow": "slide"},
    ),
    "--temperature": (["--temperature", "2", "--seed", "7"], SAMPLED, {}),
    "--top-k": (
        ["--temperature", "2", "--seed", "7", "--top-k", "3"],
        SAMPLED | {"top_k": 3},
        SAMPLED,
    ),
    "--top-p": (
        ["--temperature", "2", "--seed", "7", "--top-p", "0.3"],
        SAMPLED | {"top_p": 0.3},
        SAMPLED,
    ),
    "--min-p": (
        ["--temperature", "2", "--seed", "7", "--min-p", "0.5"],
        SAMPLED | {"min_p": 0.5},
        SAMPLED,
    ),
    "--typical-p": (
        ["--temperature", "2", "--seed", "7", "--typical-p", "0.3"],
        SAMPLED | {"typical_p": 0.3},
        SAMPLED,
    ),
    "--seed": (
        ["--temperature", "2", "--seed", "8"],
        {"temperature": 2.0, "seed": 8},
        SAMPLED,
    ),
    "--n": (["--temperature", "2", "--seed", "7", "--n", "2"], SAMPLED | {"n": 2}, SAMPLED),
    "--repetition-penalty": (["--repetition-penalty", "3"], {"repetition_penalty": 3.0}, {}),
    "--presence-penalty": (["--presence-penalty", "9"], {"presence_penalty": 9.0}, {}),
    "--frequency-penalty": (["--frequency-penalty", "1"], {"frequency_penalty": 1.0}, {}),
    "--penalty-window": (
        ["--presence-penalty", "9", "--penalty-window", "1"],
        {"presence_penalty": 9.0, "penalty_window": 1},
        {"presence_penalty": 9.0},
    ),
    "--no-repeat-ngram": (["--no-repeat-ngram", "1"], {"no_repeat_ngram": 1}, {}),
    "--logit-bias": (
        ["--logit-bias", "116=-inf", "--logit-bias", "7=50.5"],
        {"logit_bias": {116: float("-inf"), 7: 50.5}},
        {"logit_bias": {116: float("-inf")}},
    ),
    "--ban": (
        ["--ban", "116,116", "--ban", "7"],
        {"banned": [(116, 116), (7,)]},
        {"banned": [(7,)]},
    ),
    "--force": (
        ["--force", "2=7", "--force=-1=9"],
        {"forced": {2: 7, NEW - 1: 9}},
        {"forced": {2: 7}},
    ),
    "--order": (
        ["--temperature", "2", "--seed", "7", "--top-p", "0.3", "--order", "llama.cpp"],
        SAMPLED | {"top_p": 0.3, "order": "llama.cpp"},
        SAMPLED | {"top_p": 0.3},
    ),
    "--lookup": (["--lookup", "3"], {"lookup": 3}, {}),
    "--top-logprobs": (["--top-logprobs", "2"], {"top_logprobs": 2}, {}),
}


@pytest.mark.parametrize("option", REACH)
def test_every_option_reaches_the_setting_of_its_meaning(cli, model, option):
    argv, given, without = REACH[option]
    loaded = numpygpt.load(model)

    def expected(settings: dict[str, Any]) -> list[dict[str, Any]]:
        found = loaded.generate(PROMPT, **{"max_new_tokens": NEW} | settings)
        results = found if isinstance(found, list) else [found]
        return [plain(vars(result)) for result in results]  # without tuples and infinity

    result = cli("generate", PROMPT, "--model", model, *["--max-new-tokens", str(NEW)], *argv,
                 "--json")  # fmt: skip
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)["results"]["generations"]
    assert found == expected(given)
    assert found != expected(without)  # so the option did something


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--beams", "3"], {"beams": 3}),
        (["--beams", "3", "--n", "2", "--no-stop-id"], {"beams": 3, "n": 2, "stop_ids": ()}),
        (["--beams", "2", "--length-penalty", "-3"], {"beams": 2, "length_penalty": -3.0}),
        (["--beams", "2", "--length-penalty", "0"], {"beams": 2, "length_penalty": 0.0}),
        (["--beams", "2", "--early-stopping", "yes"], {"beams": 2, "early_stopping": True}),
        (["--beams", "2", "--early-stopping", "no"], {"beams": 2, "early_stopping": False}),
        (["--beams", "2", "--early-stopping", "never"], {"beams": 2, "early_stopping": "never"}),
        (["--beams", "2", "--ban", "116"], {"beams": 2, "banned": [116]}),
        (["--beams", "2", "--no-repeat-ngram", "1"], {"beams": 2, "no_repeat_ngram": 1}),
        (
            ["--beams", "2", "--min-new-tokens", "4", "--stop-id", "116"],
            {"beams": 2, "min_new_tokens": 4, "stop_ids": [116]},
        ),
        (["--beams", "2", "--chunk", "1"], {"beams": 2, "chunk": 1}),
    ],
    ids=str,
)
def test_the_options_of_beam_search_reach_it(cli, model, monkeypatch, argv, given):
    asked = []
    search = numpygpt.Model.beam_search

    def watched(self: Any, prompt: Any, **settings: Any) -> Any:
        asked.append(settings)
        return search(self, prompt, **settings)

    expected = numpygpt.load(model).beam_search(PROMPT, max_new_tokens=NEW, **given)
    monkeypatch.setattr(numpygpt.Model, "beam_search", watched)
    run = ["generate", PROMPT, "--model", model, "--max-new-tokens", str(NEW)]
    result = cli(*run, *argv, "--json")
    assert (result.code, result.err) == (0, "")
    record = json.loads(result.out)
    assert record["results"]["generations"] == [vars(each) for each in expected]
    # Several searches end with the same texts, so what was passed on is looked at, too.
    default = {field.name: field.default for field in dataclasses.fields(Beams)}
    (settings,) = asked
    for name, value in (default | {"max_new_tokens": NEW, "stop_ids": None} | given).items():
        passed = settings[name]
        if name == "banned":
            value, passed = [[i] for i in value], list(passed)
        elif name == "stop_ids" and value is not None:
            value, passed = list(value), list(passed)
        assert passed == value, name


def test_dtype_and_config_reach_the_model(cli, model):
    run = ["generate", PROMPT, "--model", model, "--max-new-tokens", "3", "--json"]
    found = []
    for argv, asked in [
        ([], {}),
        (["--dtype", "float64"], {"dtype": "float64"}),
        (["--config", "layer_norm_epsilon=0.1"], {"config": {"layer_norm_epsilon": 0.1}}),
    ]:
        expected = numpygpt.load(model, **asked).generate(PROMPT, max_new_tokens=3)
        found.append(generation(cli(*run, *argv).out))
        assert found[-1] == vars(expected)
    assert found[0]["logprobs"] != found[1]["logprobs"] != found[2]["logprobs"]


def test_chunk_is_the_most_rows_of_a_pass(cli, model, monkeypatch):
    most = []
    init = Feeder.__init__

    def watched(self: Any, params: Any, config: Any, rows: int, capacity: int, chunk: int) -> None:
        most.append(chunk)
        init(self, params, config, rows, capacity, chunk)

    monkeypatch.setattr(Feeder, "__init__", watched)
    assert cli("generate", PROMPT, "--model", model, "--max-new-tokens", "1").code == 0
    assert cli("generate", PROMPT, "--model", model, "--max-new-tokens", "1", "--chunk", "3").out
    assert most == [Settings.chunk, 3]


def test_batch_is_the_most_sequences_of_a_pass(cli, model, monkeypatch):
    most = []
    last = Feeder.last

    def watched(self: Any, new: Any, caches: Any, counts: Any = None) -> Any:
        most.append(len(caches))
        return last(self, new, caches, counts)

    monkeypatch.setattr(Feeder, "last", watched)
    argv = [str(THE), "--ids", "--model", model, "--max-new-tokens", "2", "--temperature", "1"]
    argv += ["--seed", "0"]  # one of the many seeds that draw no end of text as a first token
    for size, expected in ((["--batch", "2"], [2, 2, 2, 2, 1, 1]), ([], [5, 5])):
        assert cli("generate", *argv, "--n", "5", *size).code == 0
        assert most == expected
        most.clear()
    for size, expected in ((["--batch", "2"], [2, 2, 1, 1]), ([], [3, 3])):
        run_lines(cli, monkeypatch, model, [b"[1]", b"[2]", b"[3]"], *size)
        assert most == expected
        most.clear()


@pytest.mark.parametrize(
    "order", ["numpygpt", "transformers", "openai", "top_k", "top_p, top_k,temperature"]
)
def test_an_order_is_a_name_or_names_of_filters(cli, model, order):
    argv = ["--top-k", "5"] + (["--temperature", "2"] if "," in order else ["--temperature", "1"])
    result = cli("generate", "the", "--model", model, "--max-new-tokens", "1", *argv, "--order",
                 order, "--json")  # fmt: skip
    assert (result.code, result.err) == (0, "")
    filters = {
        "numpygpt": ["top_k 5"],
        "transformers": ["top_k_ties 5"],
        "openai": ["top_k_ties 5"],
        "top_k": ["top_k 5"],
    }
    assert json.loads(result.out)["filters"] == filters.get(order, ["top_k 5", "temperature 2.0"])


# -- help --------------------------------------------------------------------------------------


def test_help_fits_80_columns_and_no_option_is_cut_in_two(cli, monkeypatch, declared):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli("generate", "--help").out
    assert max(map(len, text.splitlines())) <= 80
    for line in text.splitlines():  # argparse breaks lines at hyphens, too
        assert not re.search(r"--\w+(-\w+)*-$", line), line
    for name in declared:
        assert name in text


# Values without a range: texts, names, files and switches.
FREE = {
    "--model", "--dtype", "--config", "--stop", "--no-stop-id", "--overflow", "--early-stopping",
    "--order", "--ids", "--jsonl", "--json", "--replay", "--stop-id", "--ban",
}  # fmt: skip


def test_every_number_is_told_with_its_range(declared):
    for name, action in declared.items():
        if name not in FREE:
            assert re.search(r"from -?\d|above 0|0 to 1|1 to|begin with 0", action.help), name
    assert not [name for name in FREE if name not in declared]


def test_there_is_an_option_for_every_setting(declared):
    names = {"--stop-id": "stop_ids", "--ban": "banned", "--force": "forced"}
    found = {names.get(name, name[2:].replace("-", "_")) for name in declared}
    for kind in (Settings, Beams):
        assert {field.name for field in dataclasses.fields(kind)} <= found


# -- mistakes ----------------------------------------------------------------------------------

# What is wrong, and what is said. No model is looked for before.
WRONG: list[tuple[str, str]] = [
    ("--max-new-tokens -1", "max_new_tokens must be an integer from 0 up, not -1"),
    ("--min-new-tokens -1", "min_new_tokens must be an integer from 0 up, not -1"),
    ("--min-new-tokens 101", "min_new_tokens = 101 is more than max_new_tokens = 100"),
    ("--stop=", "a stop string must be a non-empty text"),
    ("--stop-id 3 --no-stop-id", "--stop-id and --no-stop-id contradict each other"),
    ("--overflow wrap", "overflow must be 'error', 'truncate-left'.* not '?wrap"),
    ("--overflow slide --keep 0", "keep must be an integer from 1 up, not 0"),
    ("--keep 3", "keep = 3 has no effect without overflow='slide'"),
    ("--temperature -1", "temperature must be .* not -1.0"),
    ("--temperature nan", "temperature must be .* not nan"),
    ("--temperature 1 --top-k 0", "top_k must be an integer from 1 up, not 0"),
    ("--temperature 1 --top-p 0", "top_p must be above 0 and at most 1"),
    ("--temperature 1 --top-p 1.1", "top_p must be above 0 and at most 1"),
    ("--temperature 1 --min-p -0.1", "min_p must be from 0 to 1"),
    ("--temperature 1 --typical-p 2", "typical_p must be above 0 and at most 1"),
    ("--temperature 1 --seed -1", "seed must be an integer from 0 up"),
    ("--temperature 1 --n 0", "n must be an integer from 1 to 10000, not 0"),
    ("--n 2", "n = 2 greedy continuations would be equal"),
    ("--top-k 3", "top_k = 3 has no effect on greedy decoding"),
    ("--top-p 0.5", "top_p = 0.5 has no effect on greedy decoding"),
    ("--min-p 0.5", "min_p = 0.5 has no effect on greedy decoding"),
    ("--typical-p 0.5", "typical_p = 0.5 has no effect on greedy decoding"),
    ("--temperature 0 --top-k 3", "top_k = 3 has no effect on greedy decoding"),
    ("--repetition-penalty 0", "repetition_penalty must be from 1e-100 to 1e100"),
    ("--presence-penalty nan", "presence_penalty must be from -1e9 to 1e9"),
    ("--frequency-penalty inf", "frequency_penalty must be from -1e9 to 1e9"),
    ("--penalty-window 3", "penalty_window has no effect without a penalty"),
    ("--presence-penalty 1 --penalty-window 0", "penalty_window must be an integer from 1 up"),
    ("--no-repeat-ngram 0", "no_repeat_ngram must be an integer from 1 up"),
    ("--logit-bias 3", "--logit-bias expects two numbers such as 50256=2, not '3'"),
    ("--logit-bias x=3", "--logit-bias expects two numbers"),
    ("--logit-bias 3=x", "--logit-bias expects two numbers"),
    ("--logit-bias 3=inf", "logit_bias must be numbers from -1e9 to 1e9, or -inf, not inf"),
    ("--logit-bias 3=nan", "logit_bias must be numbers from -1e9 to 1e9, or -inf, not nan"),
    ("--logit-bias 3=1 --logit-bias 3=2", "--logit-bias is given twice for 3"),
    ("--ban x", "--ban expects token ids, not 'x'"),
    ("--ban 1,,2", "--ban expects token ids"),
    ("--ban=", "--ban expects token ids"),
    ("--force 1", "--force expects two numbers"),
    ("--force 1=2.5", "--force expects two numbers"),
    ("--force 100=1", "forced: there is no new token 100 among max_new_tokens = 100"),
    ("--force=-101=1", "forced: there is no new token -101"),
    ("--force 0=1 --force 0=2", "--force is given twice for 0"),
    ("--force 0=1 --force=-100=2", "forced: two ids for the new token 0"),
    ("--order top", "unknown order 'top'; expected 'numpygpt'"),
    ("--order temperature,top", "unknown filter 'top' in the order; expected logit_bias"),
    ("--order top_k,top_k", "the order applies top_k twice"),
    ("--order top_k --temperature 2", "has no filter for temperature, which would have no effect"),
    ("--beams 0", "beams must be an integer from 1 to 10000, not 0"),
    ("--temperature 1 --n 10001", "n must be an integer from 1 to 10000, not 10001"),
    ("--beams 10001", "beams must be an integer from 1 to 10000, not 10001"),
    ("--beams 2 --n 3", "n must be an integer from 1 to 2 .*not 3"),
    ("--beams 2 --length-penalty nan", "length_penalty must be a number from -50 to 50"),
    ("--beams 2 --length-penalty 51", "length_penalty must be a number from -50 to 50"),
    ("--length-penalty 1", "--length-penalty and --early-stopping need --beams"),
    ("--early-stopping no", "--length-penalty and --early-stopping need --beams"),
    ("--beams 2 --temperature 1", "temperature has no effect on beam search"),
    ("--beams 2 --seed 1", "seed has no effect on beam search"),
    ("--beams 2 --stop x", "stop has no effect on beam search"),
    ("--beams 2 --lookup 2", "lookup has no effect on beam search"),
    ("--beams 2 --overflow slide", "overflow has no effect on beam search"),
    ("--beams 2 --logit-bias 1=1", "logit_bias has no effect on beam search"),
    ("--beams 2 --force 1=1", "forced has no effect on beam search"),
    ("--beams 2 --json --top-logprobs 1", "top_logprobs has no effect on beam search"),
    ("--beams 2 --max-new-tokens -1", "max_new_tokens must be an integer from 0 up"),
    ("--lookup -1", "lookup must be an integer from 0 up"),
    ("--chunk 0", "chunk must be an integer from 1 up"),
    ("--json --top-logprobs -1", "top_logprobs must be an integer from 0 up"),
    ("--top-logprobs 1", "--top-logprobs has no effect without --json or --jsonl"),
    ("--batch 3", "--batch has no effect on a single text; leave it out"),
    ("--temperature 1 --n 2 --batch 0", "batch must be an integer from 1 to 10000, not 0"),
    ("--beams 2 --n 2 --batch 2", "batch has no effect on beam search"),
    ("--ids", "a prompt with --ids expects token ids, not 'the'"),
    ("--config n_head", "--config expects NAME=VALUE"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[argv for argv, _ in WRONG])
def test_a_wrong_value_is_refused_on_one_line_before_a_model_is_looked_for(cli, argv, message):
    result = cli("generate", "the", "--model", "/no/such/model", *argv.split(" "))
    check_error(result, message)
    assert "/no/such/model" not in result.err


NUMBERS = [
    "--max-new-tokens", "--min-new-tokens", "--stop-id", "--keep", "--temperature", "--top-k",
    "--top-p", "--min-p", "--typical-p", "--seed", "--n", "--repetition-penalty",
    "--presence-penalty", "--frequency-penalty", "--penalty-window", "--no-repeat-ngram",
    "--beams", "--length-penalty", "--lookup", "--chunk", "--batch", "--top-logprobs",
]  # fmt: skip


@pytest.mark.parametrize("option", [*NUMBERS, "--early-stopping"])
@pytest.mark.parametrize("value", ["many", "0x1", ""])
def test_what_is_no_number_gets_the_usage_and_one_line(cli, option, value):
    result = cli("generate", "the", "--model", "/no/such/model", f"{option}={value}")
    assert (result.code, result.out) == (2, "")
    usage, line = result.err.splitlines()
    assert usage == "usage: numpygpt generate [option ...] [PROMPT]"
    assert line.startswith(f"numpygpt generate: error: argument {option}: ")


def test_two_dashes_are_a_value_too(cli, declared):
    # Python's own parser drops them before 3.13, and leaves an empty list.
    for name, action in declared.items():
        if action.nargs != 0 and name != "--stop":
            result = cli("generate", "the", f"{name}=--")
            assert (result.code, result.out) == (2, "")
            assert result.err.splitlines()[-1].startswith("numpygpt")


def test_every_option_with_a_value_has_been_given_a_wrong_one(declared):
    tried = {word.partition("=")[0] for argv, _ in WRONG for word in argv.split(" ")}
    others = {"--model", "--dtype", "--threads", "--replay", "--json", "--jsonl"}
    # These are tried elsewhere, or are switches.
    assert declared.keys() <= tried | {*NUMBERS} | others


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stop-id", "999"], "token id 999 is outside the vocabulary, 0 to 263"),
        (["--stop-id", "-1"], "token id -1 is outside the vocabulary"),
        (["--ban", "3,264"], "token id 264 is outside the vocabulary"),
        (["--logit-bias", "264=1"], "token id 264 is outside the vocabulary"),
        (["--force", "0=264"], "token id 264 is outside the vocabulary"),
        (["--overflow", "slide", "--keep", "13"], "keep must be from 1 to n_ctx = 12, not 13"),
        (["--max-new-tokens", "14", "--overflow", "truncate-left"], "leave no room for a prompt"),
    ],
    ids=str,
)
@pytest.mark.parametrize("lines", [False, True], ids=["prompt", "jsonl"])
def test_what_only_this_model_cannot_do_is_refused_on_one_line(
    cli, model, monkeypatch, argv, message, lines
):
    few = [] if "--max-new-tokens" in argv else ["--max-new-tokens", "2"]
    if lines:
        pipe(monkeypatch, b'"the"\n"then"\n')
    how = ["--jsonl"] if lines else ["the"]
    check_error(cli("generate", *how, "--model", model, *few, *argv), message)


@pytest.mark.parametrize("argv", [["the", "--top-p", "2"], ["--jsonl", "--top-p", "2"]], ids=str)
def test_nothing_is_read_before_the_options_are_checked(cli, monkeypatch, argv):
    class Untouchable(io.BytesIO):
        def readline(self, *_: Any) -> bytes:
            raise AssertionError("standard input was read")

        read = read1 = readline

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Untouchable()))
    if argv[0] == "the":
        argv = argv[1:]
    check_error(cli("generate", *argv, "--temperature", "1"), "top_p must be")


# -- what is printed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"END\n\\n", "END\n\\n"),
        (r"\t\r", "\t\r"),
        (r"\x", r"\x"),
        ("\\", "\\"),
        (r"\\\n", "\\\n"),
        ("é👏", "é👏"),
    ],
)
def test_stop_texts_know_escapes(cli, model, given, meant):
    run = ["generate", "the", "--model", model, "--max-new-tokens", "1", "--json"]
    assert json.loads(cli(*run, f"--stop={given}").out)["options"]["stop"] == [meant]


def test_a_stop_text_is_not_printed_nor_what_follows(cli, model):
    forced = [E_ACUTE, NEWLINE, NEWLINE, THE]
    argv = [f"--force={i}={token}" for i, token in enumerate(forced)]
    run = ["generate", "the", "--model", model, "--max-new-tokens", "4", *argv]
    assert cli(*run).out == "theé\n\nthe\n"
    assert cli(*run, "--stop", r"\n\n").out == "theé\n"


def test_ids_go_in_and_come_out(cli, tmp_path, monkeypatch):
    config = nano()
    path = write_checkpoint(tmp_path, config, random_tensors(config, dtype="float32"))
    expected = numpygpt.load(path).generate([3, 1, 4], max_new_tokens=5)
    argv = ["--model", str(path), "--max-new-tokens", "5"]
    result = cli("generate", " 3 1\n4 ", "--ids", *argv)
    assert (result.code, result.err) == (0, "")
    assert result.out == " ".join(map(str, expected.ids)) + "\n"
    found = generation(cli("generate", "3 1 4", "--ids", *argv, "--json").out)
    assert (found["prompt_ids"], found["ids"], found["text"]) == ([3, 1, 4], expected.ids, None)
    check_error(cli("generate", "3 1 4", *argv), "no vocabulary files; pass token ids")
    check_error(cli("generate", "3 17", "--ids", *argv), "token id 17 is outside .* 0 to 16")
    check_error(cli("generate", "", "--ids", *argv), "the prompt is empty")
    check_error(cli("generate", "3", "--ids", *argv, "--stop", "x"), "no vocabulary files")
    pipe(monkeypatch, b"[3]\n[1]\n")  # said once, not for each line
    check_error(cli("generate", "--jsonl", *argv, "--stop", "x"), "no vocabulary files")


def test_ids_of_a_model_with_a_vocabulary_can_be_piped(cli, model, monkeypatch):
    pipe(monkeypatch, f"{THE}\n{SPACE_THE}\n".encode())
    result = cli("generate", "--ids", "--model", model, "--max-new-tokens", "3")
    expected = numpygpt.load(model).generate("the the", max_new_tokens=3)
    assert result.out.split() == [str(i) for i in expected.ids]


@pytest.mark.parametrize("beams", [False, True], ids=["samples", "beams"])
@pytest.mark.parametrize("ids", [False, True], ids=["text", "ids"])
def test_several_results_are_numbered(cli, model, beams, ids):
    loaded = numpygpt.load(model)
    if beams:
        argv = ["--beams", "3", "--n", "3"]
        expected = loaded.beam_search("the", beams=3, n=3, max_new_tokens=4)
    else:
        argv = ["--temperature", "2", "--seed", "1", "--n", "3"]
        expected = loaded.generate("the", temperature=2.0, seed=1, n=3, max_new_tokens=4)
    prompt = [str(THE), "--ids"] if ids else ["the"]
    result = cli("generate", *prompt, "--model", model, "--max-new-tokens", "4", *argv)
    shown = [" ".join(map(str, each.ids)) if ids else "the" + each.text for each in expected]
    assert result.out == "".join(f"=== {i} of 3\n{text}\n" for i, text in enumerate(shown, 1))
    assert len({tuple(each.ids) for each in expected}) == 3


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "ids"])
def test_whether_lookup_paid_is_told_beside_the_output(cli, model, streamed):
    # The forced tokens repeat, so what is proposed is right until they end.
    forced = [f"--force={i}={7 + i % 2}" for i in range(8)]
    argv = ["--model", model, "--max-new-tokens", "8", "--lookup", "2", *forced]
    expected = numpygpt.load(model).generate(
        "the", max_new_tokens=8, lookup=2, forced={i: 7 + i % 2 for i in range(8)}
    )
    assert expected.accepted > 0
    result = cli("generate", *(["the"] if streamed else [str(THE), "--ids"]), *argv)
    assert result.code == 0
    assert result.err == (
        f"numpygpt: lookup: {expected.accepted} of {expected.drafted} proposed tokens were right, "
        f"{8 / expected.passes:.2f} per pass\n"
    )


def test_a_prompt_that_does_not_fit_is_refused_cut_or_left_behind(cli, model):
    run = ["generate", "the" + " the" * 9, "--model", model, "--max-new-tokens", "6"]
    check_error(cli(*run), "10 prompt . 6 new tokens are more than the 13")
    check_error(cli(*run, "--overflow", "error"), "10 prompt . 6 new tokens are more than the 13")
    cut = generation(cli(*run, "--overflow", "truncate-left", "--json").out)
    assert cut["prompt_ids"] == [SPACE_THE] * 7
    slid = generation(cli(*run, "--overflow", "slide", "--json").out)
    assert slid["prompt_ids"] == [THE] + [SPACE_THE] * 9
    assert len(cut["ids"]) == len(slid["ids"]) == 6
    # The whole prompt is shown, whatever the model has seen of it.
    for how in ("truncate-left", "slide"):
        assert cli(*run, "--overflow", how).out.startswith("the" + " the" * 9)


def test_an_error_on_the_way_begins_on_a_line_of_its_own(cli, model):
    nothing = [f"--ban={i}" for i in range(len(VOCAB))]
    run = ["generate", "the", "--model", model, "--max-new-tokens", "4", *nothing]
    result = cli(*run, "--force", f"0={THE}", "--force", f"1={THE}")
    assert (result.code, result.out) == (2, "thethethe\n")
    assert re.match(r"numpygpt: error: the settings rule out every token.*\n$", result.err)
    check_error(cli(*run), "the settings rule out every token")  # at once: nothing is printed


@pytest.mark.parametrize("prompt", ["a\x1b[31mb\x07\r\n\t\x00", "\u202eé👏", "\ra", "- one"])
def test_the_prompt_is_shown_as_it_was_given(cli, model, monkeypatch, prompt):
    pipe(monkeypatch, prompt.encode() + b"\n")
    assert cli("generate", "--model", model, "--max-new-tokens", "0").out == f"{prompt}\n"


def test_a_prompt_and_values_that_begin_with_a_dash_can_be_given(cli, model):
    run = ["generate", "--model", model, "--max-new-tokens", "1", "--stop=--", "--force=-1=5"]
    options = json.loads(cli(*run, "--json", "--", "--help").out)["options"]
    assert (options["prompts"], options["stop"]) == (["--help"], ["--"])
    assert options["forced"] == {"0": 5}


class Endless(io.RawIOBase):
    """A pipe whose writer never ends; it complains if it is read much further than needed."""

    def __init__(self, most: int):
        self.left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.left -= len(buffer)
        assert self.left > 0, "read without a bound"
        buffer[:] = b"a" * len(buffer)
        return len(buffer)


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("numpygpt.cli.request.LARGEST", [], "a prompt may have at most 1 MiB"),
    ],
    ids=["prompt"],
)
def test_what_has_no_end_is_refused(cli, model, monkeypatch, name, argv, message):
    monkeypatch.setattr(name, 2**20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless(2**22))))
    check_error(cli("generate", "--model", model, "--max-new-tokens", "2", *argv), message)


# -- JSON lines --------------------------------------------------------------------------------


class Timed(io.StringIO):
    """A standard output that notes when each line came."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.times: list[int] = []

    def write(self, text: str) -> int:
        self.times += [self.now] * text.count("\n")
        return super().write(text)


def run_lines(
    cli: Any, monkeypatch: Any, model: str, lines: Sequence[bytes], *argv: str
) -> tuple[Result, list[dict[str, Any]]]:
    """The result of ``--jsonl``, and the objects it printed."""
    pipe(monkeypatch, b"\n".join(lines) + b"\n")
    few = [] if "--max-new-tokens" in argv else ["--max-new-tokens", "2"]
    result = cli("generate", "--jsonl", "--model", model, *few, *argv)
    return result, [json.loads(line, parse_constant=no_constant) for line in split(result.out)]


def split(out: str) -> list[str]:
    assert not out or out.endswith("\n")
    return out.split("\n")[:-1]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


ANSWER = {field.name for field in dataclasses.fields(Generation)} | {"sample", "seed"}


def test_lines_are_texts_ids_or_objects_and_their_keys_come_back(cli, model, monkeypatch):
    lines = [
        b'"the"',
        b"",
        f"[{THE}, {SPACE_THE}]".encode(),
        b"  \t",
        b'{"id": [1, {"a": null}], "prompt": "then", "\\u00e9": 1e300}\r',
        b'\xef\xbb\xbf"bom"',
        b'""',
        b'{"prompt": []}',
        '"é👏"'.encode(),
    ]
    result, answers = run_lines(cli, monkeypatch, model, lines)
    assert (result.code, result.err) == (0, "")
    asked = [
        {"prompt": "the"},
        {"prompt": [THE, SPACE_THE]},
        {"id": [1, {"a": None}], "prompt": "then", "é": 1e300},
        {"prompt": "bom"},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": "é👏"},
    ]
    assert [{k: v for k, v in a.items() if k not in ANSWER} for a in answers] == asked
    loaded = numpygpt.load(model)
    for answer, line in zip(answers, asked, strict=True):
        prompt = line["prompt"] or [VOCAB[END_OF_TEXT]]
        expected = loaded.generate(prompt, max_new_tokens=2)
        assert answer.keys() == line.keys() | ANSWER
        assert (answer["prompt_ids"], answer["ids"]) == (expected.prompt_ids, expected.ids)
        assert (answer["text"], answer["finish_reason"]) == (expected.text, "length")


BAD_LINES: dict[bytes, str] = {
    b"broken": "expected JSON, but",
    b'{"prompt": "a"': "expected JSON, but",
    b'"\xff"': "expected JSON, but .*utf-8",
    b"null": "expected a text, a list of token ids, or an object",
    b"3": "expected a text, a list of token ids, or an object",
    b'{"text": "a", "id": 1}': "these keys are for the answer: text",
    b'{"words": "a", "id": 1}': "expected a text, a list of token ids, or an object",
    b'{"prompt": 3, "id": 1}': "expected a text, a list of token ids, or an object",
    b'{"prompt": null, "id": 1}': "expected a text, a list of token ids, or an object",
    b'{"prompt": "a", "text": "b", "ids": 1}': "these keys are for the answer: ids, text",
    b'{"prompt": "a", "error": 1}': "these keys are for the answer: error",
    b'{"prompt": "a", "n": NaN}': "NaN is no JSON number",
    b'{"prompt": "a", "n": 1e999}': "expected JSON, but .*[Oo]ut of range",
    b"[NaN]": "NaN is no JSON number",
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}": "expected JSON, but",
    b'{"prompt": ' + b"[" * 100_000: "nested too deeply|expected JSON",
    b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}": "expected .*token ids in a row",
    b'{"prompt": [1, 264], "id": 1}': "token id 264 is outside the vocabulary, 0 to 263",
    b'{"prompt": [-1], "id": 1}': "token id -1 is outside the vocabulary",
    b'{"prompt": [1.5], "id": 1}': "token ids must be integers",
    b'{"prompt": [true], "id": 1}': "token ids must be integers",
    b'{"prompt": ["a"], "id": 1}': "token ids must be integers",
    b'{"prompt": [99999999999999999999], "id": 1}': "token id",
    b'{"prompt": [[1], [2, 3]], "id": 1}': "expected token ids in a row",
    b'{"prompt": "the the the the the the the the the the the the the", "id": 1}': "13 prompt",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=lambda v: str(v)[:40])
def test_a_wrong_line_is_told_and_the_others_are_answered(cli, model, monkeypatch, line, message):
    lines = [b'"the"', b"", line, b'"then"', b'{"prompt": [1], "id": 7}']
    result, answers = run_lines(cli, monkeypatch, model, lines)
    assert result.code == 2
    assert [("error" in answer) for answer in answers] == [False, True, False, False]
    assert re.search(message, answers[1]["error"])
    told = json.loads(line)["id"] if b'"id": 1}' in line and b"prompt" in line else None
    if told is not None and isinstance(json.loads(line)["prompt"], str | list):
        assert answers[1] == json.loads(line) | {"error": answers[1]["error"]}
    assert answers[3]["id"] == 7
    assert result.err.startswith("numpygpt: error: line 3 of standard input: ")
    assert result.err.count("\n") == 1
    for answer in (answers[0], answers[2], answers[3]):
        assert answer.keys() >= ANSWER


@pytest.mark.parametrize("batch", ["1", "3", "8"])
def test_many_wrong_lines_each_get_their_own_error(cli, model, monkeypatch, batch):
    lines = [b"[%d]" % (300 + i) if i % 3 else b"[%d]" % i for i in range(11)]
    result, answers = run_lines(cli, monkeypatch, model, lines, "--batch", batch)
    assert result.code == 2
    for i, answer in enumerate(answers):
        if i % 3:
            assert answer["error"].startswith(f"token id {300 + i} is outside")
        else:
            assert answer["prompt_ids"] == [i]
    told = [int(line.split("line ")[1].split()[0]) for line in result.err.splitlines()]
    assert told == [i + 1 for i in range(11) if i % 3]


def test_a_prompt_that_fails_on_the_way_does_not_take_the_others_with_it(cli, model, monkeypatch):
    # Once every token has been used, no_repeat_ngram 1 leaves nothing: only this prompt does that.
    config = nano(vocab_size=9)
    write_checkpoint(pathlib.Path(model), config, random_tensors(config, dtype="float32"))
    for name in ("vocab.json", "merges.txt"):
        (pathlib.Path(model) / name).unlink()
    lines = [b"[0, 1]", b"[0, 1, 2, 3, 4, 5, 6]", b"[2]"]
    argv = ["--no-repeat-ngram", "1", "--max-new-tokens", "4"]
    result, answers = run_lines(cli, monkeypatch, model, lines, *argv)
    assert [("error" in answer) for answer in answers] == [False, True, False]
    assert "rule out every token" in answers[1]["error"]
    assert [len(answers[i]["ids"]) for i in (0, 2)] == [4, 4]
    assert (result.code, result.err.count("\n")) == (2, 1)


def test_half_a_surrogate_pair_is_read_as_the_character_for_the_unknown(cli, model, monkeypatch):
    result, answers = run_lines(cli, monkeypatch, model, [b'{"prompt": "\\ud83d", "\\ud83d": 1}'])
    assert (result.code, result.err) == (0, "")
    assert answers[0]["prompt"] == "\ud83d"
    assert answers[0]["\ud83d"] == 1
    assert answers[0]["prompt_ids"] == numpygpt.load(model).tokenizer.encode("\ufffd")


SEVERAL = [
    b'"the"',
    b'"12 then"',
    b"[1, 2, 3, 4]",
    b'""',
    b'"a"',
    b'{"prompt": "th"}',
    b'"the the"',
]
BATCHES = ["1", "3", "8"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--chunk", "1"],
        ["--chunk", "1", "--temperature", "2", "--seed", "7", "--n", "2"],
        ["--dtype", "float64", "--temperature", "2", "--seed", "7"],
        ["--dtype", "float64", "--lookup", "2", "--overflow", "slide", "--max-new-tokens", "16"],
    ],
    ids=str,
)
def test_the_results_do_not_depend_on_the_batch(cli, model, monkeypatch, argv):
    runs = [run_lines(cli, monkeypatch, model, SEVERAL, "--batch", b, *argv)[1] for b in BATCHES]
    if "--chunk" in argv:
        assert runs[0] == runs[1] == runs[2]  # every bit
    else:  # without --chunk 1 log-probabilities may differ in their last bits
        ids = [[answer["ids"] for answer in run] for run in runs]
        assert ids[0] == ids[1] == ids[2]
        # float64 and a nano model: rounding stays below 1e-13, measured; a wrong position, token
        # or neighbour in the batch moves these by more than 1e-3.
        logprobs = [np.concatenate([answer["logprobs"] for answer in run]) for run in runs]
        np.testing.assert_allclose(logprobs[1:], [logprobs[0]] * 2, rtol=0, atol=1e-12)
    each = int(argv[argv.index("--n") + 1]) if "--n" in argv else 1
    prompts = [json.loads(line) for line in SEVERAL for _ in range(each)]
    asked = [p["prompt"] if isinstance(p, dict) else p for p in prompts]
    assert [answer["prompt"] for answer in runs[0]] == asked


def test_a_beam_search_takes_one_line_after_the_other(cli, model, monkeypatch):
    lines = [*SEVERAL[:2], b"[999]", b"3", *SEVERAL[2:4]]
    result, answers = run_lines(cli, monkeypatch, model, lines, "--beams", "2", "--n", "2")
    loaded = numpygpt.load(model)
    found = [answer.get("ids", answer.get("error")) for answer in answers]
    best = [
        each.ids
        for prompt in ("the", "12 then", [1, 2, 3, 4], "")
        for each in loaded.beam_search(prompt, beams=2, n=2, max_new_tokens=2)
    ]
    assert found[:4] + found[6:] == best
    assert "outside the vocabulary" in found[4]
    assert "expected a text" in found[5]
    assert (result.code, result.err.count("\n")) == (2, 2)


def test_answers_come_in_the_order_of_the_lines(cli, model, monkeypatch):
    """A short one that was finished first waits for those before it, and so does a wrong one."""
    monkeypatch.setattr(sys, "stdout", out := Timed())
    last, passes = Feeder.last, []

    def watched(self: Any, *args: Any) -> Any:
        passes.append(1)
        out.now = len(passes)
        return last(self, *args)

    monkeypatch.setattr(Feeder, "last", watched)
    pipe(monkeypatch, b'"the the the the"\n[5]\n[999]\n"the the"\n')
    argv = ["--max-new-tokens", "9", "--overflow", "slide", "--stop-id", "7", "--force", "6=7"]
    # The first makes seven tokens; the others stop at tokens of their own.
    assert cli("generate", "--jsonl", "--model", model, *argv, "--batch", "2").code == 2
    answers = [json.loads(line) for line in out.getvalue().splitlines()]
    prompts = [answer["prompt"] for answer in answers]
    assert prompts == ["the the the the", [5], [999], "the the"]
    # The second line was finished in the same pass, the fourth later.
    assert out.times == [7, 7, 7, 14]


def test_samples_of_a_line_are_those_of_its_prompt_alone(cli, model, monkeypatch):
    argv = ["--temperature", "2", "--seed", "7", "--n", "3", "--dtype", "float64"]
    _, answers = run_lines(cli, monkeypatch, model, SEVERAL[:3], *argv)
    loaded = numpygpt.load(model, dtype="float64")
    expected = [
        each.ids
        for prompt in ("the", "12 then", [1, 2, 3, 4])
        for each in loaded.generate(prompt, temperature=2.0, seed=7, n=3, max_new_tokens=2)
    ]
    assert [answer["ids"] for answer in answers] == expected


def test_top_logprobs_come_with_lines(cli, model, monkeypatch):
    _, (answer,) = run_lines(cli, monkeypatch, model, [b'"the"'], "--top-logprobs", "2")
    expected = numpygpt.load(model).generate("the", max_new_tokens=2, top_logprobs=2)
    assert answer["top_logprobs"] == [[list(pair) for pair in row] for row in expected.top_logprobs]


def test_a_line_without_end_is_refused_once_those_before_it_are_answered(cli, model, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST", 10)
    lines = [b'"the"', b'"12345678"', b'"123456789"', b'"the"']
    result, answers = run_lines(cli, monkeypatch, model, lines)
    assert [answer.get("prompt") for answer in answers] == ["the", None]
    assert result.code == 2
    assert "line 2 of standard input: more than 10 bytes" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [["the"], [""], ["--ids"], ["--json"], ["--replay", "run.json"], ["--replay", ""]],
    ids=str,
)
def test_what_lines_have_no_use_for_is_refused(cli, model, argv):
    name = argv[0] if argv[0].startswith("--") else "PROMPT"
    check_error(cli("generate", "--jsonl", "--model", model, *argv), f"leave out {name}$")


def test_every_result_of_a_line_has_what_makes_it_again(cli, model, monkeypatch):
    argv = ["--temperature", "2", "--n", "2"]
    _, answers = run_lines(cli, monkeypatch, model, [b'"the"', b'"then"'], *argv)
    assert [answer["sample"] for answer in answers] == [0, 1, 0, 1]
    (seed,) = {answer["seed"] for answer in answers}
    again = run_lines(cli, monkeypatch, model, [b'"then"'], *argv, "--seed", str(seed))[1]
    assert [answer["ids"] for answer in again] == [answer["ids"] for answer in answers[2:]]


def test_ctrl_c_prints_what_was_held_back_for_a_stop_text(cli, model, monkeypatch):
    real, passes = Feeder.last, []

    def last(self: Feeder, *args: Any) -> Any:
        passes.append(1)
        if len(passes) > 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Feeder, "last", last)
    force = [f"--force={i}={THE}" for i in range(3)]
    argv = ["--model", model, "--max-new-tokens", "3", "--stop", "thethethe and so on", *force]
    result = cli("generate", "12 ", *argv)
    assert (result.code, result.out) == (130, "12 thethe\n")


def test_no_other_verb_is_imported():
    code = (
        "import sys; from numpygpt.cli import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "sys.stderr.write(str([v for v in ('convert', 'perplexity') "
        "if f'numpygpt.cli.{v}' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == "[]"


def test_a_closed_input_is_an_error(cli, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    few = ["--max-new-tokens", "2"]
    check_error(cli("generate", "--jsonl", "--model", model, *few), "no standard input")


@pytest.mark.parametrize("how", ["empty", "blank"])
def test_no_lines_give_no_answers(cli, model, monkeypatch, how):
    pipe(monkeypatch, b"" if how == "empty" else b"\n \r\n\t\n")
    result = cli("generate", "--jsonl", "--model", model, "--max-new-tokens", "2")
    assert (result.code, result.out, result.err) == (0, "", "")


@contextlib.contextmanager
def talking(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """``numpygpt generate`` as a process that is killed after a minute, so that no test waits."""
    run, ends = command("generate", *argv), subprocess.PIPE
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(run, stdin=ends, stdout=ends, stderr=ends, env=buffered) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


@pytest.mark.parametrize("batch", [["--batch", "1"], [], ["--beams", "2"]], ids=str)
def test_lines_are_answered_while_standard_input_is_open(model, batch):
    """Nobody waits for lines that would fill the batch."""
    argv = ["--jsonl", *batch, "--model", model, "--max-new-tokens", "2"]
    with talking(*argv) as process:
        for line, key in ((b'"the"', "ids"), (b"[999]", "error"), (b'"then"', "ids")):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            assert key in json.loads(process.stdout.readline())
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith(b"numpygpt: error: line 2 of standard input: ")


def test_a_line_that_comes_later_runs_beside_those_that_are_running(cli, model, monkeypatch):
    """And what is running does not wait for it."""
    out, into = os.pipe()
    last, together = Feeder.last, []

    def watched(self: Any, new: Any, caches: Any, counts: Any = None) -> Any:
        together.append(len(caches))
        if len(together) == 3:
            os.write(into, b'"then"\n')
        elif len(together) > 3:
            time.sleep(0.001)  # the thread that reads has its turn
        if together[-1] == 2 and into not in closed:
            closed.append(into)
            os.close(into)
        return last(self, new, caches, counts)

    closed: list[int] = []
    monkeypatch.setattr(Feeder, "last", watched)
    argv = ["--model", model, "--max-new-tokens", "300", "--overflow", "slide", "--no-stop-id"]
    with open(out, "rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        os.write(into, b'"the"\n')
        result = cli("generate", "--jsonl", *argv)
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [(answer["prompt"], len(answer["ids"])) for answer in answers] == [
        ("the", 300), ("then", 300)
    ]  # fmt: skip
    # Three passes alone, some more until the line was read, then both.
    assert together[:3] == [1, 1, 1]
    assert together.count(2) > 100
    assert len(together) == 600 - together.count(2)


def test_a_file_is_read_as_it_is_needed_without_a_thread(cli, model, monkeypatch, tmp_path):
    """So that a run repeats: what runs together never depends on when a line came."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"[1]\n[2]\n[999]\n[3]\n")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a thread was made")

    monkeypatch.setattr(threading.Thread, "__init__", refuse)
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        result = cli("generate", "--jsonl", "--model", model, "--max-new-tokens", "2")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == [
        [1], [2], [999], [3]
    ]  # fmt: skip


def test_a_pipe_is_read_a_few_lines_ahead_and_no_more(cli, model, monkeypatch):
    monkeypatch.setattr(json_lines, "AHEAD", 3)
    read, real = [], json_lines._line
    monkeypatch.setattr(
        json_lines, "_line", lambda *args: read.append(args[0]) or real(*args)
    )  # fmt: skip
    begun = []
    init = generate._Lines.answer

    def answer(self: Any, number: int, *rest: Any) -> None:
        begun.append(number)
        time.sleep(0.01)  # the thread reads what it may
        # Two that run, three that wait, and one in the thread's hands.
        assert len(read) <= len(begun) + 2 + 3 + 1
        init(self, number, *rest)

    monkeypatch.setattr(generate._Lines, "answer", answer)
    out, into = os.pipe()
    os.write(into, b"[1]\n" * 40)
    os.close(into)
    with open(out, "rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        argv = ["--jsonl", "--model", model, "--max-new-tokens", "1", "--batch", "2"]
        assert cli("generate", *argv).out.count("\n") == 40
    assert len(read) == 40


# -- Ctrl-C ------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Let Ctrl-C come once so many forward passes have given logits."""
    logits, count = Feeder.logits, [0]

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if count[0] == passes:
            raise KeyboardInterrupt
        count[0] += 1
        return logits(self, *args, **kwargs)

    monkeypatch.setattr(Feeder, "logits", watched)


def test_ctrl_c_keeps_what_was_streamed_and_ends_the_line(cli, model, monkeypatch):
    expected = numpygpt.load(model).stream("the", max_new_tokens=NEW, forced={0: THE, 1: THE})
    text = next(expected) + next(expected)
    interrupt(monkeypatch, 2)
    force = ["--force", f"0={THE}", "--force", f"1={THE}"]
    result = cli("generate", "the", "--model", model, "--max-new-tokens", str(NEW), *force)
    assert (result.code, result.out, result.err) == (130, f"the{text}\n", "")


def test_ctrl_c_between_two_pieces_ends_the_line_too(cli, model, monkeypatch):
    class Interrupting(io.StringIO):
        def flush(self) -> None:
            if len(self.getvalue()) > 6:
                raise KeyboardInterrupt

    out = Interrupting()
    monkeypatch.setattr(sys, "stdout", out)
    force = [f"--force={i}={THE}" for i in range(4)]
    assert cli("generate", "the", "--model", model, "--max-new-tokens", "4", *force).code == 130
    assert out.getvalue() == "thethethe\n"


@pytest.mark.parametrize(
    "argv",
    [[], ["--n", "2", "--temperature", "2", "--seed", "1"], ["--n", "1", "--beams", "1"]],
    ids=str,
)
def test_ctrl_c_leaves_a_record_of_what_had_come(cli, model, monkeypatch, argv):
    run = ["generate", "the", "--model", model, "--max-new-tokens", str(NEW), *argv, "--json"]
    whole = json.loads(cli(*run).out)["results"]["generations"]
    interrupt(monkeypatch, 3)
    result = cli(*run)
    assert (result.code, result.err) == (130, "")
    found = json.loads(result.out)["results"]["generations"]
    assert len(found) == len(whole) == (2 if "2" in argv else 1)
    for part, complete in zip(found, whole, strict=True):
        assert part["finish_reason"] == "interrupted"
        assert part["ids"] == complete["ids"][:3]
        assert part["logprobs"] == complete["logprobs"][:3]


def test_ctrl_c_prints_the_samples_as_far_as_they_came(cli, model, monkeypatch):
    expected = numpygpt.load(model).generate("the", temperature=2.0, seed=1, n=2, max_new_tokens=3)
    interrupt(monkeypatch, 3)
    argv = ["--n", "2", "--temperature", "2", "--seed", "1", "--ids"]
    result = cli("generate", str(THE), "--model", model, "--max-new-tokens", str(NEW), *argv)
    assert result.code == 130
    ids = [" ".join(map(str, each.ids)) for each in expected]
    assert result.out == f"=== 1 of 2\n{ids[0]}\n=== 2 of 2\n{ids[1]}\n"


@pytest.mark.parametrize("batch", ["1", "8"])
def test_ctrl_c_keeps_the_lines_that_were_finished(cli, model, monkeypatch, batch):
    lines = [b'"the"', b'"then"', b'"th"']
    interrupt(monkeypatch, 3)  # batch 1: in the second line; batch 8: in the fourth step of all
    argv = ["--max-new-tokens", "2" if batch == "1" else "6", "--batch", batch]
    result, answers = run_lines(cli, monkeypatch, model, lines, *argv)
    assert (result.code, result.err) == (130, "")
    reasons = ["length", "interrupted"] if batch == "1" else ["interrupted"] * 3
    assert [answer["finish_reason"] for answer in answers] == reasons
    assert [len(a["ids"]) for a in answers] == ([2, 1] if batch == "1" else [3, 3, 3])


def test_ctrl_c_ends_the_lines_beside_a_wrong_one_too(cli, model, monkeypatch):
    interrupt(monkeypatch, 2)
    lines = [b'"the"', b"[999]", b"wrong", b'"then"']
    argv = ["--max-new-tokens", "6", "--batch", "2"]
    result, answers = run_lines(cli, monkeypatch, model, lines, *argv)
    assert result.code == 130
    assert [(a.get("prompt"), len(a.get("ids", []))) for a in answers] == [
        ("the", 2), ([999], 0), (None, 0), ("then", 1)
    ]  # fmt: skip
    assert [line.split(":")[2] for line in result.err.splitlines()] == [
        " line 2 of standard input", " line 3 of standard input"
    ]  # fmt: skip


@pytest.mark.parametrize(("passes", "begun"), [(1, 2), (3, 5)])
def test_ctrl_c_says_nothing_of_lines_that_had_not_begun(cli, model, monkeypatch, passes, begun):
    interrupt(monkeypatch, passes)
    lines = [b'"the"', b'"then"', b"wrong", b'"th"', b'"a"', b'"an"']
    argv = ["--max-new-tokens", "2", "--batch", "2"]
    _, answers = run_lines(cli, monkeypatch, model, lines, *argv)
    asked = ["the", "then", None, "th", "a"][:begun]
    assert [answer.get("prompt") for answer in answers] == asked


def test_ctrl_c_in_a_beam_search_keeps_the_lines_that_were_finished(cli, model, monkeypatch):
    interrupt(monkeypatch, 3)
    argv = ["--beams", "2", "--n", "2", "--no-stop-id"]
    result, answers = run_lines(cli, monkeypatch, model, [b'"the"', b'"then"'], *argv)
    assert (result.code, result.err) == (130, "")
    assert [answer["prompt"] for answer in answers] == ["the"] * 2 + ["then"] * 2
    assert [answer["finish_reason"] for answer in answers] == ["length"] * 2 + ["interrupted"] * 2
    assert [len(answer["ids"]) for answer in answers] == [2, 2, 1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such SIGINT")
def test_a_real_ctrl_c_ends_lines_with_what_had_come(long_model):
    argv = ["--jsonl", "--batch", "1", "--model", long_model, "--max-new-tokens", "199000"]
    with talking(*argv) as process:
        process.stdin.write(b'[999]\n"the"\n"then"\n')
        process.stdin.flush()
        assert "error" in json.loads(process.stdout.readline())
        time.sleep(0.5)  # the second line has begun, and talks for minutes
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    answer = json.loads(out)
    assert (answer["prompt"], answer["finish_reason"]) == ("the", "interrupted")
    assert 0 < len(answer["ids"]) < 199_000
    assert err.count(b"\n") == 1  # of the wrong line


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such SIGINT")
@pytest.mark.parametrize("lines", [b"", b'"the"\n'], ids=["before", "between"])
def test_ctrl_c_while_it_waits_for_a_line(model, lines):
    """The thread that waits for input does not keep the process."""
    with talking("--jsonl", "--model", model, "--max-new-tokens", "2", "--seed", "1",
                 "--temperature", "1") as process:  # fmt: skip
        process.stdin.write(b"[999]\n" + lines)
        process.stdin.flush()
        for _ in range(1 + bool(lines)):
            process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)  # standard input stays open
        out, err = process.stdout.read(), process.stderr.read()
    assert (process.returncode, out) == (130, b"")
    assert err.count(b"\n") == 1  # of the wrong line
    assert b"Fatal" not in err


# -- run records -------------------------------------------------------------------------------


def make_record(cli: Any, path: pathlib.Path, *argv: str) -> dict[str, Any]:
    """Write a run record, and return it."""
    result = cli("generate", *argv, "--json")
    assert (result.code, result.err) == (0, "")
    path.write_text(result.out)
    return json.loads(result.out)


def test_a_record_says_what_ran_on_what_with_which_settings(cli, model, tmp_path):
    argv = ["the", "--model", model, "--max-new-tokens", "3", "--temperature", "1.5", "--top-p"]
    argv += ["0.9", "--repetition-penalty", "1.1", "--stop", r"\n", "--config", "n_layer=2"]
    record = make_record(cli, tmp_path / "run.json", *argv)
    assert record["numpygpt"] == record["environment"]["numpygpt"] == numpygpt.__version__
    environment = record["environment"]
    assert environment["numpy"] == np.__version__
    assert environment["python"] == sys.version.split()[0]
    assert environment["blas"]["name"]
    assert environment["usable_cpus"] >= 1
    assert isinstance(environment["variables"], dict)
    assert record["model"]["config"] == vars(CONFIG)
    assert record["model"]["overrides"] == {"n_layer": 2}
    assert re.fullmatch("[0-9a-f]{64}", record["model"]["weights_sha256"])
    # Every setting has its resolved value: the defaults, the stop id, the seed that was chosen.
    seed = record["options"].pop("seed")
    assert isinstance(seed, int)
    resolved = Settings(
        max_new_tokens=3, temperature=1.5, top_p=0.9, repetition_penalty=1.1, stop=("\n",),
        stop_ids=(VOCAB[END_OF_TEXT],),
    )  # fmt: skip
    expected = {**dataclasses.asdict(resolved), "prompts": ["the"], "beam_search": None}
    del expected["seed"]
    assert record["options"] == json.loads(json.dumps(expected))
    assert record["filters"] == ["repetition_penalty 1.1", "temperature 1.5", "top_p 0.9"]
    again = make_record(cli, tmp_path / "again.json", *argv, "--seed", str(seed))
    assert again["results"] == record["results"]
    assert make_record(cli, tmp_path / "again.json", *argv)["options"]["seed"] != seed


def test_a_record_of_greedy_decoding_has_no_seed(cli, model, tmp_path):
    argv = ["the", "--model", model, "--max-new-tokens", "1"]
    assert make_record(cli, tmp_path / "run.json", *argv)["options"]["seed"] is None


SAMPLING = ["--temperature", "2", "--seed", "7"]
REPLAYED: dict[str, list[str]] = {
    "greedy": [],
    "ids": [],
    "ids, sampled": ["--temperature", "2", "--lookup", "2"],
    "sampled": ["--temperature", "2"],  # with a seed that was chosen
    "several": [*SAMPLING, "--n", "3", "--top-logprobs", "2"],
    "beams": ["--beams", "3", "--n", "2", "--length-penalty", "0.5", "--early-stopping", "never"],
    "lookup": ["--lookup", "3"],
    "bias": ["--logit-bias", "116=-inf", "--logit-bias", "5=1.5"],
    "forced": ["--force", "1=5", "--force=-1=6", "--ban", "7,8", "--ban", "9"],
    "stop": [*SAMPLING, "--stop", r"\n", "--stop", "é", "--no-stop-id"],
    "stop id": ["--stop-id", "116", "--min-new-tokens", "2"],
    "float64": [*SAMPLING, "--dtype", "float64"],
    "config": ["--config", "layer_norm_epsilon=0.01"],
    "order": [*SAMPLING, "--top-k", "9", "--order", "top_k,temperature"],
    "slide": ["--max-new-tokens", "30", "--overflow", "slide", "--keep", "3"],
    "truncate": ["--max-new-tokens", "11", "--overflow", "truncate-left"],
    "chunk": ["--chunk", "1"],
    "batch": [*SAMPLING, "--n", "5", "--batch", "2"],
    "penalties": ["--presence-penalty", "1", "--frequency-penalty", "0.1", "--penalty-window", "3"],
}


@pytest.mark.parametrize("how", REPLAYED)
def test_a_record_is_replayed_to_the_last_bit(cli, model, tmp_path, how):
    prompt = [f"{THE} {SPACE_THE} 5", "--ids"] if how.startswith("ids") else [PROMPT]
    argv = ["--model", model, "--max-new-tokens", "6", *REPLAYED[how]]
    record = make_record(cli, tmp_path / "run.json", *prompt, *argv)
    result = cli("generate", "--replay", str(tmp_path / "run.json"))
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        "identical: the results are those of the record, to the last bit\n"
        "model and environment are the same\n"
    )
    told = json.loads(cli("generate", "--replay", str(tmp_path / "run.json"), "--json").out)
    assert told["identical"] is True
    assert told["record"] == record


@pytest.fixture
def record(cli, model, tmp_path) -> pathlib.Path:
    """A run record with much in it, in a file."""
    argv = [*SAMPLING, "--n", "2", "--top-logprobs", "2", "--logit-bias", "3=-inf"]
    argv += ["--ban", "4,5", "--force", "0=9", "--stop", "zz", "--max-new-tokens", "4"]
    make_record(cli, tmp_path / "run.json", "the", "--model", model, *argv)
    return tmp_path / "run.json"


def test_other_weights_are_told_and_the_exit_code_is_1(cli, model, record):
    write_checkpoint(pathlib.Path(model), CONFIG, random_tensors(CONFIG, 1, "float32"))
    result = cli("generate", "--replay", str(record))
    assert (result.code, result.err) == (1, "")
    first, around, *rest = result.out.splitlines()
    assert re.match(r"different: results\.generations\[0\]\.\w+\[\d\] was .*, is ", first)
    assert around == "around it, this differs:"
    assert len(rest) == 1
    assert rest[0].startswith("  model.weights_sha256 was ")


def test_weights_that_have_moved_are_named(cli, model, record, tmp_path):
    pathlib.Path(model).rename(tmp_path / "moved")
    check_error(cli("generate", "--replay", str(record)), "unknown model|not found|not a directory")
    result = cli("generate", "--replay", str(record), "--model", str(tmp_path / "moved"))
    assert result.code == 0
    assert result.out.startswith("identical: ")
    assert "model.name was" in result.out


def test_another_version_is_told(cli, record):
    whole = json.loads(record.read_text())
    whole["numpygpt"] = whole["environment"]["numpygpt"] = "0.0.9"
    record.write_text(json.dumps(whole))
    result = cli("generate", "--replay", str(record))
    assert result.code == 0  # the results are the same all the same
    assert f'environment.numpygpt was "0.0.9", is "{numpygpt.__version__}"' in result.out


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value but itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def leaves(value: Any) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value that is no list or object."""
    return [path for path in places(value) if not isinstance(within(value, path), dict | list)]


def within(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_every_number_in_the_results_counts(cli, record):
    whole = json.loads(record.read_text())
    paths = leaves(whole["results"])
    assert len(paths) > 40
    for path in paths:
        changed = copy.deepcopy(whole)
        *above, last = path
        old = within(changed["results"], path)
        # The smallest change there is: of a float its last bit.
        new = float(np.nextafter(old, 0)) if isinstance(old, float) else "another"
        within(changed["results"], above)[last] = new
        record.write_text(json.dumps(changed))
        result = cli("generate", "--replay", str(record))
        assert (result.code, result.err) == (1, "")
        place = "results" + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path)
        assert result.out.startswith(f"different: {place} was ")
        number = isinstance(old, float)
        assert result.out.count("\n") == 2 + number
        assert ("no id, rank or text differs; numbers do, by at most" in result.out) == number


# Numbers are small, since a record that asks for a million tokens gets them.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.floats()
    | st.sampled_from(["", "0", "-inf", "error", "slide", "float64", "nowhere", "\ud800", "\0"])
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("-01x"), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_record_never_gets_more_than_one_line(cli, record, data):
    original = record.read_text()
    changed = json.loads(original)
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        paths = [path for path in places(changed) if path[0] != "environment"]
        *above, last = data.draw(st.sampled_from(paths), "path")
        parent = within(changed, above)
        match data.draw(st.sampled_from(["set", "remove", "add"]), "kind"):
            case "set":
                parent[last] = data.draw(VALUES, "value")
            case "remove":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=2), "name")] = data.draw(VALUES, "value")
            case "add":
                parent.insert(last, data.draw(VALUES, "value"))
    record.write_text(json.dumps(changed))
    try:
        result = cli("generate", "--replay", str(record))
    finally:
        record.write_text(original)
    assert result.code in (0, 1, 2)
    if result.code == 2:
        check_error(result, "")
    else:
        assert result.out.startswith("identical: " if result.code == 0 else "different: ")
        assert result.err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe", "expected JSON"),
        (b'{"a": 1, "a": 2}', "stands in it twice"),
        (b'{"results": ' + b"[" * 100_000, "nested too deeply|expected JSON"),
        (b"{}", "not a run record"),
        (b"9" * 5000, "expected JSON"),
    ],
    ids=lambda v: repr(v)[:20],
)
def test_what_is_no_record_is_refused(cli, record, content, message):
    record.write_bytes(content)
    check_error(cli("generate", "--replay", str(record)), message)


def test_records_that_cannot_be_read_are_refused(cli, record, tmp_path):
    check_error(cli("generate", "--replay", str(tmp_path / "nowhere")), "No such file")
    check_error(cli("generate", "--replay", str(tmp_path)), "not a regular file")
    check_error(cli("generate", "--replay", "a\0b"), "null")
    text = record.read_text()
    for size in range(0, len(text) - 1, 97):
        record.write_text(text[:size])
        check_error(cli("generate", "--replay", str(record)), "run.json: expected JSON")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["the"], "PROMPT"),
        (["--max-new-tokens", "3"], "--max-new-tokens"),
        (["--temperature", "1"], "--temperature"),
        (["--stop", "x"], "--stop"),
        (["--ban", "1"], "--ban"),
        (["--no-stop-id"], "--no-stop-id"),
        (["--dtype", "float64"], "--dtype"),
        (["--config", "n_head=2"], "--config"),
        (["--ids"], "--ids"),
        (["--batch", "1"], "--batch"),
        (["--top-logprobs", "1"], "--top-logprobs"),
    ],
    ids=lambda v: str(v),
)
def test_replay_takes_everything_from_its_record(cli, record, argv, name):
    check_error(cli("generate", "--replay", str(record), *argv), f"leave out {name} ")


# -- as a process ------------------------------------------------------------------------------


def test_generating_imports_nothing_for_records_and_networks(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    code = (
        "import sys, numpy; print(*sys.modules)\n"
        "from numpygpt.cli import main\n"
        f"main(['generate', '3', '--ids', '--model', {str(tmp_path)!r}, '--max-new-tokens', '1'])\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    before, _, after = done.stdout.splitlines()
    added = set(after.split()) - set(before.split())
    assert "numpygpt.records" in added
    # importlib.metadata takes 40 ms: it brings zipfile, csv and email.
    assert not added & {"importlib.metadata", "urllib.request", "http.client", "tiktoken", "tqdm"}
