"""The verbs ``score`` and ``perplexity``, and the replay of their records."""

# The fixtures of test_cli are arguments here, too.
# ruff: noqa: F811

from __future__ import annotations

import argparse
import ast
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import tqdm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import nano, random_tensors, write_checkpoint
from test_cli import (  # noqa: F401  # fixtures
    CONFIG,
    VOCAB,
    Result,
    Terminal,
    check_error,
    cli,
    command,
    make_model,
    model,
    pipe,
    terminal,
)
from test_tokenizer import make_vocab_json

import numpygpt
from numpygpt import divergence, scoring
from numpygpt.cli import colours, json_lines, options, resume, texts
from numpygpt.cli.record import add_record, recorded
from numpygpt.cli.terminal import on_colour_terminal, spelled
from numpygpt.errors import ArgumentError
from numpygpt.scoring import Score

TEXT = "the then\n\n 12 é 👏 \\ 'tis \x1b[31m\tthe\r\nend\n"


@pytest.fixture
def text(tmp_path: pathlib.Path) -> str:
    """The path of a text with much that does not print."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    return str(tmp_path / "a.txt")


@pytest.fixture
def other(tmp_path: pathlib.Path) -> str:
    """The path of another text."""
    (tmp_path / "b.txt").write_text("the other one, then" * 3)
    return str(tmp_path / "b.txt")


def change_weights(model: str, seed: int) -> None:
    """Other weights, under the same name."""
    write_checkpoint(pathlib.Path(model), CONFIG, random_tensors(CONFIG, seed, "float32"))


# -- the table ---------------------------------------------------------------------------------


def table(out: str) -> tuple[list[list[str]], list[str], str]:
    """The cells of a table but the last, its tokens, and what follows the table."""
    lines = out.splitlines()
    rows = [line.split(maxsplit=5) for line in lines[1:-2]]
    return [row[:5] for row in rows], [row[5] for row in rows], "\n".join(lines[-2:])


def test_the_table_has_a_line_for_each_token(cli, model, text):
    score = numpygpt.load(model).score(TEXT)
    result = cli("score", text, "--model", model)
    assert (result.code, result.err) == (0, "")
    cells, tokens, summary = table(result.out)
    assert cells[0] == [str(score.ids[0]), "-", "-", "-", "-"]
    for i, row in enumerate(cells[1:], 1):
        p = math.exp(score.logprobs[i])
        assert row == [
            str(score.ids[i]),
            f"{score.logprobs[i]:.4f}",
            f"{p:.4g}",
            str(score.ranks[i]),
            f"{score.entropies[i]:.4f}",
        ]
    # Each token is spelled as Python would, so all together are the text again.
    values = [ast.literal_eval(token) for token in tokens]
    whole = b"".join(v.encode() if isinstance(v, str) else v for v in values)
    assert whole.decode() == TEXT
    assert all(c.isprintable() for c in result.out.replace("\n", ""))
    assert f"{-score.nll:,.4f} nats" in summary
    assert f"perplexity {score.perplexity:,.4g}" in summary
    assert f"{score.bits_per_byte:.4f} bits per byte" in summary
    assert f"window {CONFIG.n_ctx}, stride {CONFIG.n_ctx // 2}" in summary
    assert f"scored: {score.count}, of {score.bytes} bytes" in summary


@pytest.mark.parametrize("greedy", [True, False])
def test_a_continuation_is_scored_after_its_context(cli, model, monkeypatch, greedy):
    loaded = numpygpt.load(model)
    best = loaded.generate("the", max_new_tokens=1, stop_ids=()).ids[0]
    text = loaded.tokenizer.token_bytes[best] if greedy else b"then"
    pipe(monkeypatch, text)
    result = cli("score", "--context", "the", "--model", model)
    cells, _, summary = table(result.out)
    score = loaded.score("the", text.decode())
    assert [row[1] for row in cells] == [f"{p:.4f}" for p in score.logprobs]
    assert f"greedy: {'yes' if greedy else 'no'}" in summary


def test_an_id_without_a_token_or_a_text_of_one_token_is_no_problem(cli, model, monkeypatch):
    pipe(monkeypatch, b"t")
    result = cli("score", "--model", model)
    assert (result.code, result.err) == (0, "")
    assert "scored: 0, of 0 bytes" in result.out
    pipe(monkeypatch, b"t")
    result = cli("score", "--model", model, "--first-token", "end-of-text")
    assert "scored: 1, of 1 bytes" in result.out


def test_several_texts_have_headings(cli, model, text, other):
    result = cli("score", text, other, "--model", model)
    assert re.findall("==> (.*) <==", result.out) == [text, other]
    assert result.out.count("perplexity") == 2


SETTINGS = [
    {},
    {"window": 5, "stride": 2},
    {"first_token": "end-of-text"},
    {"chunk": 1},
    {"window": 13, "stride": 12, "first_token": "end-of-text", "chunk": 3},
]


def as_options(settings: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in settings.items()
        for part in ("--" + name.replace("_", "-"), str(value))
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_record_has_the_settings_and_every_number(cli, model, text, settings):
    score = numpygpt.load(model).score(TEXT, **settings)
    result = cli("score", text, "--model", model, "--json", *as_options(settings))
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    record = json.loads(result.out)
    assert record["verb"] == "score"
    options = record["options"]
    for name, default in [("window", 12), ("stride", 6), ("first_token", "skip"), ("chunk", 512)]:
        assert options[name] == settings.get(name, default)
    (found,) = record["results"]["texts"]
    assert found["ids"] == score.ids.tolist()
    assert found["ranks"] == score.ranks.tolist()
    for name in ("logprobs", "entropies"):
        values = getattr(score, name).tolist()
        assert found[name] == [None if math.isnan(value) else value for value in values]
    for name in ("count", "bytes", "nll", "perplexity", "bits_per_byte", "is_greedy"):
        assert found[name] == getattr(score, name)
    assert cli("score", text, "--model", model, "--output", "json", *as_options(settings)).out == (
        result.out
    )


# -- colours -----------------------------------------------------------------------------------

PAINTED = re.compile("\x1b\\[38;5;16;48;5;(\\d+)m(.*?)\x1b\\[0m")


def test_colours_say_how_likely_each_token_was(cli, model, other):
    score = numpygpt.load(model).score(pathlib.Path(other).read_text())
    result = cli("score", other, "--model", model, "--output", "colors")
    legend, painted = result.out.splitlines()[:2]
    names = {int(colour): name.strip() for colour, name in PAINTED.findall(legend)}
    assert list(names.values()) == ["50 % or more", "10 %", "1 %", "0.1 %", "less"]
    tokens = numpygpt.load(model).tokenizer.token_bytes
    pieces = PAINTED.findall(painted)
    assert [piece for _, piece in pieces] == [tokens[i].decode() for i in score.ids.tolist()[1:]]
    assert painted.startswith(tokens[score.ids[0]].decode() + "\x1b")  # not scored: no colour
    least = {"50 % or more": 0.5, "10 %": 0.1, "1 %": 0.01, "0.1 %": 0.001, "less": 0.0}
    for (colour, _), logprob in zip(pieces, score.logprobs[1:], strict=True):
        p = math.exp(logprob)
        assert least[names[int(colour)]] == max(x for x in least.values() if x <= p)


def test_every_class_of_probability_has_its_colour():
    for p, colour in [(1.0, 230), (0.5, 230), (0.4999, 223), (0.1, 223), (0.01, 216), (0.0099, 209),
                      (0.001, 209), (0.0009, 203), (0.0, 203)]:  # fmt: skip
        logprob = math.log(p) if p else -1e9
        assert colours._colour(math.nextafter(logprob, 0.0)) == colour


def test_what_does_not_print_is_spelled_out_and_nothing_steers_the_terminal(cli, model, text):
    result = cli("score", text, "--model", model, "--output", "colors")
    lines = result.out.split("\n")[1:-4]
    plain = [PAINTED.sub(r"\2", line) for line in lines]
    assert plain == ["the then\\n", "\\n", " 12 é 👏 \\ 'tis \\x1b[31m\\tthe\\r\\n", "end\\n"]
    assert "\x1b" not in "".join(plain)


def test_a_character_of_several_tokens_has_the_colour_of_all_of_them(cli, model, monkeypatch):
    pipe(monkeypatch, "t👏".encode())
    score = numpygpt.load(model).score("t👏")
    assert len(score.ids) == 5
    result = cli("score", "-", "--model", model, "--output", "colors")
    ((colour, piece),) = PAINTED.findall(result.out.splitlines()[1])
    assert piece == "👏"
    assert int(colour) == colours._colour(score.logprobs[1:].sum())


def painted(*tokens: bytes) -> list[tuple[str, str]]:
    """The colours and pieces of tokens that each have the log-probability -1."""
    n = len(tokens)
    score = Score(np.arange(n), np.full(n, -1.0), np.ones(n, int), np.zeros(n), 1, 2, 1)
    return PAINTED.findall("".join(colours.coloured(score, dict(enumerate(tokens)))))


def test_the_colour_of_a_character_is_that_of_the_product():
    # exp(-1) = 0.37 and exp(-4) = 0.018 are in different classes.
    assert painted(b"a", *(bytes([byte]) for byte in "👏".encode()), b"b") == [
        ("223", "a"), ("216", "👏"), ("223", "b"),
    ]  # fmt: skip


def test_bytes_that_are_no_character_do_not_stop_the_colours():
    def pieces(*tokens: bytes) -> list[str]:
        return [piece for _, piece in painted(*tokens)]

    assert pieces(b"\xf0\x9f", b"\x91\x8f!") == ["👏!"]
    assert pieces(b"\xf0\x9f", b"x") == ["\ufffdx"]
    assert pieces(b"\xf0\x9f") == ["\ufffd"]
    assert pieces(b"\x9f", b"x") == ["\ufffd", "x"]


def luminance(colour: int) -> float:
    """Relative luminance by WCAG 2.1 of one of the 216 colours of a 256-colour terminal."""
    levels = [0, 95, 135, 175, 215, 255]
    cube = colour - 16
    channels = [levels[i] / 255 for i in (cube // 36, cube // 6 % 6, cube % 6)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_black_letters_can_be_read_on_every_colour_and_likelier_is_lighter():
    light = [luminance(colour) for _, colour, _ in colours.CLASSES]
    assert luminance(16) == 0
    assert min((x + 0.05) / 0.05 for x in light) >= 7  # WCAG's AAA
    assert light == sorted(light, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(light)) > 0.05


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "", "TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
    ],
    ids=str,
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, variables, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not on_colour_terminal()  # pytest's captured output
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert on_colour_terminal() is expected
    monkeypatch.setattr(sys, "stdout", None)
    assert not on_colour_terminal()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_the_default_is_colours(model, other, no_color):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    run = command("score", other, "--model", model)
    with subprocess.Popen(run, stdout=theirs, env=environment) as process:
        os.close(theirs)
        out = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            out += piece
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[" in out) is (no_color == "")


# -- mistakes ----------------------------------------------------------------------------------

VERBS = pytest.mark.parametrize("verb", ["score", "perplexity"])


@VERBS
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "No such file"),
        ("directory", "a directory; name the files in it"),
        ("empty", "empty, there is nothing to score"),
        ("only a mark", "empty, there is nothing to score"),
        ("latin-1", r"not UTF-8 at byte 4 \(0xe9\); convert it"),
        ("latin-1 after a mark", r"not UTF-8 at byte 7 \(0xe9\)"),
        ("cut", r"not UTF-8 at byte 1 \(0xf0\)"),
        ("null", "null byte|null character"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_the_model_is_loaded(
    cli, tmp_path, verb, how, message
):
    data = {
        "empty": b"",
        "only a mark": b"\xef\xbb\xbf",
        "latin-1": b"caf \xe9 x",
        "latin-1 after a mark": b"\xef\xbb\xbfcaf \xe9",
        "cut": b"x\xf0\x9f",
    }
    path = tmp_path / "x.txt"
    if how in data:
        path.write_bytes(data[how])
    name = {"directory": str(tmp_path), "null": "a\0b"}.get(how, str(path))
    result = cli(verb, name, "--model", "nowhere")
    check_error(result, message)
    assert how == "null" or name in result.err


@VERBS
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-", "-"], "standard input .* once only"),
        ([], "there is no text: name files, or pipe one in"),
        (["{}", "--window", "4", "--stride", "4"], "stride must be an integer from 1 to 3 .*not 4"),
        (["{}", "--config", "n_head"], "--config expects NAME=VALUE"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_before_the_model_is_loaded(cli, text, verb, argv, message):
    argv = [text if part == "{}" else part for part in argv]
    check_error(cli(verb, *argv, "--model", "nowhere"), message)


@VERBS
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--window", "1"], "--window: expected an integer from 2 up, not '1'"),
        (["--window", "9" * 5000], "--window: expected an integer from 2 up, not '9"),
        (["--stride", "0"], "--stride: expected an integer from 1 up, not '0'"),
        (["--chunk", "x"], "--chunk: expected an integer from 1 up, not 'x'"),
        (["--first-token", "no"], "--first-token: invalid choice: 'no'"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_a_value_out_of_range_gets_the_usage(cli, text, verb, argv, message):
    result = cli(verb, text, *argv)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


@VERBS
def test_a_window_that_the_model_does_not_have_is_refused(cli, model, text, verb):
    message = "window must be an integer from 2 to 13 .*not 14"
    check_error(cli(verb, text, "--model", model, "--window", "14"), message)
    assert cli(verb, text, "--model", model, "--window", "13").code == 0


@VERBS
def test_a_model_without_a_vocabulary_is_refused(cli, tmp_path, text, verb):
    write_checkpoint(tmp_path / "m", nano())
    check_error(cli(verb, text, "--model", str(tmp_path / "m")), "no vocabulary files")


@VERBS
def test_a_text_of_any_size_is_bounded(cli, monkeypatch, text, verb):
    monkeypatch.setattr(texts, "LARGEST", len(TEXT.encode()) - 1)
    check_error(cli(verb, text, "--model", "nowhere"), "the most for one text; split it")
    monkeypatch.setattr(texts, "LARGEST", len(TEXT.encode()))
    check_error(cli(verb, text, "--model", "nowhere"), "'nowhere'")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_a_device_that_never_ends_is_refused(cli, monkeypatch):
    monkeypatch.setattr(texts, "LARGEST", 1000)
    check_error(cli("perplexity", "/dev/zero"), "the most for one text")


@VERBS
@pytest.mark.parametrize("given", [[], ["-"]], ids=str)
def test_standard_input_is_a_text_with_its_last_newline_and_no_mark(
    cli, model, monkeypatch, verb, given
):
    pipe(monkeypatch, b"\xef\xbb\xbfthe then\n")
    record = json.loads(cli(verb, *given, "--model", model, "--json").out)
    (text,) = record["options"]["texts"]
    assert (text["path"], text["bytes"], text["text"]) == ("-", 12, "\ufeffthe then\n")
    count = len(numpygpt.load(model).tokenizer.encode("the then\n")) - 1
    assert record["results"]["texts"][0]["count"] == count


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no such directory")
@VERBS
def test_a_pipe_that_has_a_name_can_be_read_once_and_is_read_once(cli, model, verb):
    ours, theirs = os.pipe()
    os.write(theirs, b"the then")
    os.close(theirs)
    result = cli(verb, f"/dev/fd/{ours}", "--model", model, "--json")  # as with <(...) in a shell
    os.close(ours)
    assert json.loads(result.out)["options"]["texts"][0]["text"] == "the then"


@VERBS
def test_without_any_standard_input_there_is_no_text(cli, model, monkeypatch, verb):
    monkeypatch.setattr(sys, "stdin", None)
    check_error(cli(verb, "--model", model), "there is no text")
    check_error(cli(verb, "-", "--model", model), "no standard input")


@pytest.mark.parametrize("piece", range(1, 6))
@pytest.mark.parametrize(
    "text", ["ab\n\n\n", "a      b", "ab \n\n c", "a\n\n\nb", "a\r\n\r\n"], ids=repr
)
def test_a_run_of_white_space_is_not_cut(monkeypatch, text, piece):
    gpt2 = numpygpt.tokenizer.Tokenizer.gpt2()
    monkeypatch.setattr(texts, "PIECE", piece)
    assert texts.encode(gpt2, text).tolist() == gpt2.encode(text)


@given(st.text(alphabet="ab '!.12é\n\t \r\x0b\x0c\x1c\x1d\x85\xa0\u2003\u2028👏", max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, text):
    gpt2 = numpygpt.tokenizer.Tokenizer.gpt2()
    with monkeypatch.context() as patch:
        patch.setattr(texts, "PIECE", 3)
        assert texts.encode(gpt2, text).tolist() == gpt2.encode(text)


# -- JSON lines --------------------------------------------------------------------------------


def run_lines(cli: Any, monkeypatch: Any, model: str, *lines: bytes) -> tuple[Result, list[Any]]:
    pipe(monkeypatch, b"\n".join(lines))
    result = cli("score", "--jsonl", "--model", model)
    return result, [json.loads(line) for line in result.out.splitlines()]


def test_each_line_is_answered_with_its_keys_and_a_score(cli, model, monkeypatch):
    result, answers = run_lines(
        cli, monkeypatch, model,
        b'\xef\xbb\xbf"the then"',
        b"",
        b'{"id": [7, null], "text": "the then"}',
        b'{"context": "the", "continuation": " then", "x": {"y": 1.5}}\r',
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    loaded = numpygpt.load(model)
    first, second, third = answers
    assert first["text"] == "the then"
    assert second == {"id": [7, None], **first}
    assert third["x"] == {"y": 1.5}
    for found, score in [(first, loaded.score("the then")), (third, loaded.score("the", " then"))]:
        assert found["score"]["ids"] == score.ids.tolist()
        assert found["score"]["nll"] == score.nll
        assert found["score"]["is_greedy"] is score.is_greedy


BAD_LINES = {
    b"nonsense": "expected JSON, but",
    b'{"text": "\xff"}': "expected JSON, but",
    b"[1, 2]": "expected a JSON string",
    b"3": "expected a JSON string",
    b'{"text": 3, "id": 1}': "expected a JSON string",
    b'{"id": 1}': "expected a JSON string",
    b'{"text": "a", "context": "b", "continuation": "c", "id": 1}': "expected a JSON string",
    b'{"context": "b", "id": 1}': "expected a JSON string",
    b'{"text": "", "id": 1}': "the text is empty",
    b'{"context": "the", "continuation": "", "id": 1}': "empty",
    b'{"text": "a", "score": 1}': "these keys are for the answer: score; rename them",
    b'{"text": "a", "score": 1, "error": 2}': "these keys are for the answer: error, score",
    b'{"text": "a", "n": NaN}': "NaN is no JSON number",
    b'{"text": "a", "n": 1e999}': "expected JSON, but",
    b'{"text": "\\ud83d", "id": 1}': "half of a surrogate pair",
    b'{"text": ' + b"[" * 100_000: "nested too deeply|expected JSON",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "expected JSON, but",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=lambda v: str(v)[:30])
def test_a_wrong_line_is_told_and_the_others_are_answered(cli, model, monkeypatch, line, message):
    result, answers = run_lines(cli, monkeypatch, model, b'"the"', line, b'"then"')
    assert result.code == 2
    assert [("error" in answer) for answer in answers] == [False, True, False]
    assert re.search(message, answers[1]["error"])
    assert b'"id": 1' not in line or answers[1]["id"] == 1
    assert result.err.startswith("numpygpt: error: line 2 of standard input: ")
    assert result.err.count("\n") == 1


def test_a_line_without_end_is_refused(cli, model, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST", 12)
    result, answers = run_lines(cli, monkeypatch, model, b'"the then "', b'"the then t"', b'"the"')
    assert result.code == 2
    assert "score" in answers[0]  # 12 bytes with its newline
    assert answers[1:] == [{"error": "more than 12 bytes; nothing from here on was read"}]
    assert result.err.startswith("numpygpt: error: line 2 of standard input: more than 12 bytes")


def test_no_more_of_a_line_is_read_than_the_longest_has(cli, model, monkeypatch):
    asked = []

    class Input(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            asked.append(size)
            return super().readline(size)

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Input(b'"the"\n')))
    assert cli("score", "--jsonl", "--model", model).code == 0
    assert asked == [json_lines.LONGEST + 1] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file that cannot be read")
def test_a_file_that_cannot_be_read_is_told(cli, model):
    result = cli("score", "--jsonl", "/proc/self/mem", "--model", model)
    assert (result.code, "Input/output error" in result.out) == (2, True)
    check_error(cli("score", "--jsonl", "/no/such", "--model", model), "/no/such: No such file")


def test_lines_nested_near_the_limit_never_end_in_a_traceback(cli, model, monkeypatch):
    limit = sys.getrecursionlimit()
    deep = [b'{"text": "the", "x": ' + b"[" * n + b"]" * n + b"}" for n in range(limit)[-150:]]
    _, answers = run_lines(cli, monkeypatch, model, *deep)
    assert len(answers) == 150
    assert all("score" in answer or "nested" in answer["error"] for answer in answers)
    assert "score" in answers[0]


def test_a_window_that_no_line_can_have_is_refused_at_once(cli, model, monkeypatch):
    pipe(monkeypatch, b'"the"')
    run = ["score", "--jsonl", "--model", model, "--window", "14"]
    check_error(cli(*run), "window must be an integer from 2 to 13 .*not 14")


def test_standard_input_stays_open(cli, model, monkeypatch):
    run_lines(cli, monkeypatch, model, b'"the"')
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize("option", [["--json"], ["--context", "x"], ["--output", "table"]], ids=str)
def test_options_that_lines_have_no_use_for_are_refused(cli, text, option):
    check_error(cli("score", text, "--jsonl", *option), f"{option[0]} and --jsonl exclude")


def test_lines_are_answered_at_once(model):
    run, ends = command("score", "--jsonl", "--model", model), subprocess.PIPE
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(run, stdin=ends, stdout=ends, env=buffered) as process:
        for text in ("the", "then"):
            process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text  # stdin is still open
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# -- replay ------------------------------------------------------------------------------------


def make_record(cli: Any, path: pathlib.Path, *argv: str) -> str:
    path.write_text(cli(*argv, "--json").out)
    return str(path)


def change(record: str, keys: list[Any], value: Any) -> None:
    """Put another value into a record."""
    path = pathlib.Path(record)
    whole = json.loads(path.read_text())
    place = whole
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(whole))


RUNS = {
    "score": ["score", "{text}", "{other}", "--window", "5", "--stride", "2"],
    "continuation": ["score", "{other}", "--context", "the", "--dtype", "float64"],
    "perplexity": ["perplexity", "{text}", "{other}", "--first-token", "end-of-text"],
    "against": ["perplexity", "{other}", "--against", "{model}", "--against-dtype", "float64"],
}


@pytest.fixture(params=RUNS)
def record(request, cli, tmp_path, model, text, other) -> str:
    """A run record of every kind, in a file."""
    places = {"text": text, "other": other, "model": model}
    argv = [part.format_map(places) for part in RUNS[request.param]]
    return make_record(cli, tmp_path / "run.json", *argv, "--model", model)


def replay(cli: Any, record: str, *argv: str) -> Result:
    verb = json.loads(pathlib.Path(record).read_text())["verb"]
    return cli(verb, "--replay", record, *argv)


def test_a_replay_is_identical(cli, record):
    result = replay(cli, record)
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        "identical: the results are those of the record, to the last bit\n"
        "model and environment are the same\n"
    )
    told = json.loads(replay(cli, record, "--json").out)
    assert (told["identical"], told["places"], told["first"], told["around"]) == (True, 0, None, [])
    assert told["record"] == json.loads(pathlib.Path(record).read_text())


def test_a_replay_with_other_weights_is_noticed_and_explained(cli, record, model):
    change_weights(model, seed=1)
    result = replay(cli, record)
    assert (result.code, result.err) == (1, "")
    first, *said, around, weights = result.out.splitlines()
    assert re.match(r"different: results\.texts\[0\]\.\S+ was .*, is .*", first)
    assert said in ([], [line for line in said if line.startswith("no id, rank or text differs")])
    assert around == "around it, this differs:"
    assert weights.split()[0] == "model.weights_sha256"


def test_a_number_that_was_changed_in_the_last_digit_is_noticed(cli, record):
    results = json.loads(pathlib.Path(record).read_text())["results"]["texts"][0]
    name = "nll" if "nll" in results else "mean_kl"
    changed = math.nextafter(results[name], math.inf)
    change(record, ["results", "texts", 0, name], changed)
    result = replay(cli, record, "--json")
    told = json.loads(result.out)
    assert (result.code, told["identical"], told["places"]) == (1, False, 1)
    assert told["first"] == {
        "path": f"results.texts[0].{name}", "recorded": changed, "found": results[name],
    }  # fmt: skip


def test_a_setting_that_was_changed_is_noticed(cli, record):
    change(record, ["options", "window"], 4)
    change(record, ["options", "stride"], 3)
    assert replay(cli, record).code == 1


def test_the_seed_of_a_generation_is_recorded_and_its_change_is_noticed(cli, model, tmp_path):
    run = ["generate", "the", "--model", model, "--max-new-tokens", "8", "--temperature", "2"]
    record = make_record(cli, tmp_path / "r.json", *run)  # no seed was given
    assert replay(cli, record).code == 0
    seed = json.loads(pathlib.Path(record).read_text())["options"]["seed"]
    change(record, ["options", "seed"], seed + 1)
    result = replay(cli, record)
    assert result.code == 1
    assert "model and environment are the same" in result.out


def test_other_circumstances_are_told_although_the_results_agree(cli, record, monkeypatch):
    monkeypatch.setenv("OPENBLAS_VERBOSE", "0")
    result = replay(cli, record)
    assert result.code == 0
    assert 'environment.variables.OPENBLAS_VERBOSE was nothing, is "0"' in result.out


def test_a_replay_takes_weights_that_have_moved(cli, record, model, tmp_path):
    shutil.copytree(model, tmp_path / "moved")
    if json.loads(pathlib.Path(record).read_text())["options"].get("against") is None:
        shutil.rmtree(model)
    result = replay(cli, record, "--model", str(tmp_path / "moved"))
    assert result.code == 0
    assert "  model.name was " in result.out


def test_a_text_that_has_changed_is_refused(cli, record, other):
    path = pathlib.Path(other)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"X")
    result = replay(cli, record)
    check_error(result, "b.txt: its content has changed: SHA-256")
    path.unlink()
    check_error(replay(cli, record), "b.txt: No such file")


@VERBS
def test_a_piped_text_is_in_its_record_unless_it_is_long(cli, model, tmp_path, monkeypatch, verb):
    monkeypatch.setattr(texts, "STORED", 9)
    for data in (b"the then\n", b"the then the\n"):
        pipe(monkeypatch, data)
        record = make_record(cli, tmp_path / "r.json", verb, "--model", model)
        stored = b"text" in data or len(data) <= 9
        assert (
            "text" in json.loads(pathlib.Path(record).read_text())["options"]["texts"][0]
        ) is stored
        pipe(monkeypatch, b"" if stored else data)
        assert replay(cli, record).code == 0
        if not stored:  # it has to be piped in again
            pipe(monkeypatch, b"another")
            check_error(replay(cli, record), "standard input: its content has changed")


@pytest.mark.parametrize(
    "option",
    [["{}"], ["--window", "5"], ["--dtype", "float64"], ["--config", "n_head=2"], ["--chunk", "1"]],
    ids=str,
)
def test_what_a_record_holds_cannot_be_given_beside_it(cli, record, text, option):
    option = [text if part == "{}" else part for part in option]
    name = "FILE" if option == [text] else option[0]
    check_error(replay(cli, record, *option), f"leave out {name} ")


def test_an_argument_without_a_display_name_is_named_by_its_own():
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?")
    add_record(parser)
    parser.set_defaults(declared=parser)  # as `main` does
    with pytest.raises(ArgumentError, match="leave out prompt "):
        recorded(parser.parse_args(["x", "--replay", "r.json"]))


JUNK = [None, True, -1, 0, 1e300, 10**30, "", "x", "\x1b[2J", [], [None], {}, {"a": 1}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, item in inner:
        found += places(item, (*path, key)) if isinstance(item, dict | list) else [(*path, key)]
    return found


@pytest.mark.filterwarnings("ignore::numpygpt.errors.CheckpointWarning")
def test_a_damaged_record_never_ends_in_a_traceback(cli, record):
    whole = json.loads(pathlib.Path(record).read_text())
    kept = {name: whole[name] for name in ("verb", "model", "options", "filters")}
    for i, path in enumerate(places(kept)):
        junk = JUNK[5 * i % len(JUNK)]  # all at every place would take two minutes
        pathlib.Path(record).write_text(json.dumps(whole))
        change(record, list(path), junk)
        result = cli(whole["verb"], "--replay", record)
        assert result.code in (0, 1, 2), (path, junk)
        assert "\x1b" not in result.out + result.err
        assert result.code < 2 or result.err.splitlines()[-1].startswith("numpygpt: error: ")


def test_what_is_no_record_is_refused(cli, tmp_path, model, text):
    record = make_record(cli, tmp_path / "r.json", "score", text, "--model", model)
    check_error(cli("perplexity", "--replay", record), "a record of 'score', expected one of 'perp")
    check_error(cli("score", "--replay", text), "a.txt: expected JSON")
    check_error(cli("score", "--replay", str(tmp_path)), "not a regular file")
    check_error(cli("score", "--replay", str(tmp_path / "no")), "No such file")
    path = pathlib.Path(record)
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    path.write_bytes(
        path.read_bytes().replace(b'"results": {', b'"results": {"deep": ' + deep + b",")
    )
    result = cli("score", "--replay", record)
    assert result.code in (1, 2)
    assert result.err.count("\n") <= 1


# -- perplexity --------------------------------------------------------------------------------


def rows(out: str) -> dict[str, list[float]]:
    """The numbers of each line of the table, by the name at its end."""
    found = {}
    for line in out.splitlines()[1:]:
        if re.match(r" *[\d,]+ +[\d,]", line):
            *numbers, name = re.split(r"  +| (?=[-\d])", line.strip())
            found[name] = [
                math.nan if number == "-" else float(re.sub("[,%]", "", number))
                for number in numbers
            ]
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_perplexity_is_that_of_the_score(cli, model, text, other, settings):
    loaded = numpygpt.load(model)
    one, two = (loaded.score(pathlib.Path(p).read_bytes().decode(), **settings)
                for p in (text, other))  # fmt: skip
    result = cli("perplexity", text, other, "--model", model, *as_options(settings))
    assert (result.code, result.err) == (0, "")
    found = rows(result.out)
    assert list(found) == [text, other, "total"]
    columns = ((getattr(s, name) for s in (one, two)) for name in vars(one))
    ids, *numbers = (np.concatenate([*pair]) for pair in itertools.islice(columns, 4))
    both = Score(ids, *numbers, one.bytes + two.bytes, one.window, one.stride)
    for name, score in [(text, one), (other, two), ("total", both)]:
        expected = [
            score.count, score.bytes, score.nats_per_token, score.standard_error, score.perplexity,
            score.perplexity_error, score.bits_per_byte, score.bits_per_token,
        ]  # fmt: skip
        # Printed with four digits after the point, so at most half a digit apart.
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=0.5001e-4)
    assert f"window {one.window}, stride {one.stride}" in result.out


def test_one_text_has_no_total(cli, model, text):
    assert list(rows(cli("perplexity", text, "--model", model).out)) == [text]


def test_a_text_with_nothing_to_score_counts_for_nothing(cli, model, text, tmp_path):
    (tmp_path / "t").write_text("t")
    found = rows(cli("perplexity", text, str(tmp_path / "t"), "--model", model).out)
    assert found["total"] == found[text]
    nothing = found[str(tmp_path / "t")]
    assert nothing[:2] == [0, 0]
    assert np.isnan(nothing[2:]).all()
    record = json.loads(cli("perplexity", str(tmp_path / "t"), "--model", model, "--json").out)
    assert record["results"]["total"]["perplexity"] is None


# -- resuming ----------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "done.jsonl"


def refuse_to_score(monkeypatch: pytest.MonkeyPatch, allowed: int = 0) -> list[int]:
    """Let `Model.score` work so many times, and then stand for Ctrl-C."""
    calls: list[int] = []
    real = numpygpt.Model.score

    def score(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > allowed:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(numpygpt.Model, "score", score)
    return calls


def test_a_second_run_takes_everything_from_the_first(
    cli, model, text, other, journal, monkeypatch
):
    run = ["perplexity", text, other, "--model", model, "--resume", str(journal)]
    first = cli(*run)
    assert first.code == 0
    before = journal.read_bytes()
    assert before.count(b"\n") == 2
    calls = refuse_to_score(monkeypatch)
    second = cli(*run)
    assert (second.code, second.err, calls) == (0, "", [])
    assert second.out == first.out + f"2 of 2 results were taken from {journal}\n"
    assert journal.read_bytes() == before


def test_ctrl_c_prints_what_was_finished_and_a_resumed_run_is_exact(
    cli, model, text, other, journal, monkeypatch
):
    run = ["perplexity", text, other, "--model", model]
    whole = cli(*run, "--json").out
    with monkeypatch.context() as patch:
        refuse_to_score(patch, allowed=1)
        stopped = cli(*run, "--resume", str(journal))
    assert stopped.code == 130
    assert list(rows(stopped.out)) == [text]
    assert stopped.err == "numpygpt: interrupted: incomplete: 1 of 2 texts were finished\n"
    with monkeypatch.context() as patch:
        calls = refuse_to_score(patch, allowed=1)
        assert cli(*run, "--resume", str(journal), "--json").out == whole
        assert len(calls) == 1


def test_a_line_that_was_cut_off_is_written_again(cli, model, text, other, journal):
    run = ["perplexity", text, other, "--model", model, "--resume", str(journal)]
    cli(*run)
    whole = journal.read_bytes()
    first = whole.index(b"\n") + 1
    step = max(1, (len(whole) - first) // 12)
    for cut in [first, first + 1, *range(first + 2, len(whole), step), len(whole) - 1]:
        journal.write_bytes(whole[:cut])
        assert cli(*run).code == 0
        assert journal.read_bytes() == whole


@pytest.mark.parametrize(
    "how", ["weights", "config", "vocabulary", "settings", "dtype", "text", "version"]
)
def test_results_of_something_else_are_neither_used_nor_touched(
    cli, model, text, journal, monkeypatch, how
):
    run = ["perplexity", text, "--model", model, "--resume", str(journal)]
    cli(*run)
    before = journal.read_bytes()
    directory = pathlib.Path(model)
    if how == "weights":
        change_weights(model, seed=1)
    elif how == "config":
        run += ["--config", "activation_function=gelu"]
    elif how == "vocabulary":
        # The two letters change places, and with them the ids of the text.
        swapped = {**VOCAB, "t": VOCAB["h"], "h": VOCAB["t"]}
        make_vocab_json(directory, swapped, (directory / "merges.txt").read_text())
    elif how == "settings":
        run += ["--stride", "1"]
    elif how == "dtype":
        run += ["--dtype", "float64"]
    elif how == "version":
        monkeypatch.setattr(resume, "__version__", "0.0")
    else:
        pathlib.Path(text).write_bytes(TEXT.encode() + b".")
    calls = refuse_to_score(monkeypatch, allowed=1)
    result = cli(*run)
    assert (result.code, len(calls)) == (0, 1)
    after = journal.read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 2
    assert "taken from" not in result.out
    assert "1 of 1" in cli(*run).out  # each has its own line now


def test_the_name_of_text_and_model_do_not_matter(cli, model, text, journal, tmp_path):
    cli("perplexity", text, "--model", model, "--resume", str(journal))
    moved, renamed = str(tmp_path / "m2"), str(tmp_path / "c.txt")
    shutil.copytree(model, moved)
    shutil.copy(text, renamed)
    result = cli("perplexity", renamed, "--model", moved, "--resume", str(journal))
    assert "1 of 1 results were taken" in result.out


FOREIGN = {
    "a text": b"My thesis\nChapter 1\n",
    "a text without a newline": b"My thesis",
    "JSON": b'{"a": 1}\n',
    "a list": b"[]\n",
    "a result without numbers": b'{"numpygpt_perplexity": 1, "key": {}, "result": {}}\n',
    "binary": bytes(range(256)),
    "an empty line": b"\n",
    "damage inside": b'{"numpygpt_perplexity": 1, "te\n{"numpygpt_perplexity": 1}\n',
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(cli, text, journal, how):
    journal.write_bytes(FOREIGN[how])
    result = cli("perplexity", text, "--model", "nowhere", "--resume", str(journal))
    check_error(result, "line 1 is not a result of numpygpt perplexity; nothing .* was changed")
    assert journal.read_bytes() == FOREIGN[how]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(cli, text, tmp_path):
    for place in (tmp_path, tmp_path / "no" / "such", "a\0b"):
        result = cli("perplexity", text, "--model", "nowhere", "--resume", str(place))
        check_error(result, "cannot be written|not a regular file")


def test_a_result_is_on_the_disk_before_the_next_text_is_read(
    cli, model, text, other, journal, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        resume.os, "fsync", lambda _: seen.append(journal.read_bytes().count(b"\n"))
    )
    assert cli("perplexity", text, other, "--model", model, "--resume", str(journal)).code == 0
    assert seen == [1, 2]


def test_a_disk_that_refuses_is_told(cli, model, text, journal, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "fsync", refuse)
    result = cli("perplexity", text, "--model", model, "--resume", str(journal))
    check_error(result, "done.jsonl: cannot be written: No space left")


def test_two_runs_that_write_at_once_keep_whole_lines(tmp_path):
    path = tmp_path / "j"
    one, two = resume.Journal(str(path)), resume.Journal(str(path))
    result = {"count": 1, "bytes": 2, "nll": 3.0, "standard_error": math.nan}
    for i, writer in enumerate([one, two, one, two]):
        writer.append({"key": i}, "name", result)
    again = resume.Journal(str(path))
    assert [again.find({"key": i})["nll"] for i in range(4)] == [3.0] * 4
    assert again.find({"key": 4}) is None


def test_two_that_write_to_one_journal_lose_nothing(tmp_path):
    """Threads stand for processes: each has a journal of its own on the same file."""
    path = tmp_path / "done.jsonl"
    result = {"count": 1, "bytes": 2, "nll": 3.0, "standard_error": 0.5}

    def write(writer: int) -> None:
        journal = resume.Journal(str(path))
        for i in range(100):
            journal.append({"key": [writer, i]}, "a name " * writer, result)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(resume.Journal(str(path)).results) == 400


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such SIGINT")
def test_ctrl_c_ends_the_process_with_130_and_keeps_what_was_done(model, text, tmp_path, journal):
    (tmp_path / "long").write_text("then the " * 200_000)
    run = command("perplexity", text, str(tmp_path / "long"), "--model", model,
                  "--resume", str(journal))  # fmt: skip
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().endswith(b"\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # the second text has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # The unfinished text is there, too, unless not even its first window was.
    finished, *unfinished = rows(out.decode())
    assert finished == text
    assert unfinished in ([], [f"{tmp_path / 'long'} (so far)", "total"])
    assert err.decode().strip() == "numpygpt: interrupted: incomplete: 1 of 2 texts were finished"


def interrupt_after(monkeypatch: pytest.MonkeyPatch, name: str, blocks: int) -> None:
    """Let Ctrl-C come, once, when so many blocks of rows have been scored."""
    real, module = scoring.logit_blocks, {"score": scoring, "divergence": divergence}[name]

    def stopping(*args: Any) -> Any:
        for i, block in enumerate(real(*args)):
            if i == blocks:
                monkeypatch.setattr(module, "logit_blocks", real)
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(module, "logit_blocks", stopping)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("verb", ["score", "divergence"])
def test_ctrl_c_in_the_middle_of_a_text_keeps_what_was_scored_of_it(
    cli, model, text, other, monkeypatch, verb, blocks
):
    run = ["perplexity", text, other, "--model", model]
    run += ["--against", model] if verb == "divergence" else []
    whole = rows(cli(*run).out)[text]
    interrupt_after(monkeypatch, verb, blocks)
    stopped = cli(*run)
    assert (stopped.code, stopped.err) == (130, incomplete(0, 2))
    found = rows(stopped.out)
    assert list(found) == ([f"{text} (so far)"] if blocks else [])  # and not the next text
    counts = [numbers[0] for numbers in found.values()]
    assert all(0 < count < whole[0] for count in counts)
    interrupt_after(monkeypatch, verb, blocks)
    recorded = cli(*run, "--json")
    assert recorded.code == 130
    results = json.loads(recorded.out)["results"]
    assert results["finished"] == 0
    assert [each["count"] for each in results["texts"]] == counts
    assert (results["total"] is None) is (not blocks)


def incomplete(finished: int, count: int) -> str:
    return f"numpygpt: interrupted: incomplete: {finished} of {count} texts were finished\n"


OUTPUTS = pytest.mark.parametrize("output", ["table", "colors", "json"])


@OUTPUTS
def test_ctrl_c_in_score_keeps_what_was_scored_of_a_text(cli, model, text, monkeypatch, output):
    whole = numpygpt.load(model).score(TEXT)
    interrupt_after(monkeypatch, "score", 2)
    result = cli("score", text, "--model", model, "--output", output)
    assert (result.code, result.err) == (130, incomplete(0, 1))
    # Windows of 12 tokens that move by 6, the first token not scored: 11 and 6 tokens.
    read = 1 + 11 + 6
    if output == "json":
        results = json.loads(result.out)["results"]
        assert results["finished"] == 0
        (found,) = results["texts"]
        assert (found["ids"], found["count"]) == (whole.ids[:read].tolist(), read - 1)
        assert found["logprobs"] == [None, *whole.logprobs[1:read].tolist()]
        assert found["bytes"] < whole.bytes
        return
    assert result.out.startswith(f"==> {text} (so far) <==\n")
    assert f"tokens scored: {read - 1}, of " in result.out
    if output == "table":
        cells, _, _ = table(result.out.split("\n", 1)[1].removesuffix("\n"))
        assert [row[1] for row in cells[1:]] == [f"{p:.4f}" for p in whole.logprobs[1:read]]
    else:  # after the text so far there is no more of it
        tokens = numpygpt.load(model).tokenizer.token_bytes
        seen = b"".join(tokens[i] for i in whole.ids[:read].tolist()).decode()
        plain = "".join(PAINTED.sub(r"\2", line) for line in result.out.split("\n")[2:-4])
        assert plain == spelled(seen)


@OUTPUTS
@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_in_score_keeps_the_texts_before(
    cli, model, text, other, monkeypatch, output, finished
):
    run = ["score", other, text, "--model", model, "--output", output]
    whole = cli(*run).out
    refuse_to_score(monkeypatch, allowed=finished)
    result = cli(*run)
    assert (result.code, result.err) == (130, incomplete(finished, 2))
    if output == "json":
        expected, found = (json.loads(out)["results"] for out in (whole, result.out))
        assert found == {"texts": expected["texts"][:finished], "finished": finished}
        assert expected["finished"] == 2
    else:
        assert result.out == (whole[: whole.index(f"==> {text}")] if finished else "")


@pytest.mark.parametrize("stderr", [True, False], ids=["stderr", "no stderr"])
def test_ctrl_c_keeps_the_lines_before(cli, model, monkeypatch, stderr):
    refuse_to_score(monkeypatch, allowed=1)
    if not stderr:
        monkeypatch.setattr(sys, "stderr", None)
    result, answers = run_lines(cli, monkeypatch, model, b'"the"', b'"then"')
    assert (result.code, [answer["text"] for answer in answers]) == (130, ["the"])
    assert result.out.count("\n") == 1


# -- progress ----------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The progress bars that were shown: name, where it stood at the end, and its full length."""
    seen: list[tuple[str, int, int]] = []

    class Bar(tqdm.tqdm):
        def __exit__(self, *error: Any) -> None:
            if not self.disable:
                seen.append((self.desc, self.n, self.total))
            super().__exit__(*error)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return seen


MEASURING = {
    "score": ["score"],
    "continuation": ["score", "--context", "the"],
    "perplexity": ["perplexity", "--first-token", "end-of-text"],
    "against": ["perplexity", "--against", "{model}"],
}


@pytest.mark.parametrize("how", MEASURING)
def test_progress_is_shown_on_a_terminal_and_counts_every_token(
    cli, model, text, other, monkeypatch, bars, how
):
    run = [part.format(model=model) for part in MEASURING[how]] + [text, other, "--model", model]
    quiet = cli(*run)
    counts = [found["count"] for found in json.loads(cli(*run, "--json").out)["results"]["texts"]]
    assert (quiet.err, bars) == ("", [])  # capsys is no terminal
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    shown = cli(*run)
    assert (shown.code, shown.out) == (0, quiet.out)
    assert bars == [
        (name[-30:], count, count) for name, count in zip([text, other], counts, strict=True)
    ]
    lines = err.getvalue()
    assert f" 0/{counts[0]} [" in lines
    assert "\n" not in lines
    assert lines.endswith("\r")  # nothing is left of it
    cli(*run, "--json")
    assert (len(bars), err.getvalue()) == (2, lines)


# -- against another model ---------------------------------------------------------------------


def test_a_model_against_itself_differs_in_nothing(cli, model, text):
    result = cli("perplexity", text, "--model", model, "--against", model)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"perplexity of q / of p +1 \+- 0", result.out)
    assert re.search(r"mean KL\(p \|\| q\), nats +0 \+- 0", result.out)
    assert re.search(r"maximum +0\n", result.out)
    assert re.search(r"same likeliest token, % +100 \+- 0", result.out)


def test_the_reference_is_p_and_the_model_is_q(cli, model, text, other, tmp_path):
    reference = make_model(tmp_path / "reference")
    change_weights(reference, seed=1)
    run = ["perplexity", text, other, "--model", model, "--against", reference]
    results = json.loads(cli(*run, "--json").out)["results"]
    p, q = numpygpt.load(reference), numpygpt.load(model)
    for path, found in zip([text, other], results["texts"], strict=True):
        whole = pathlib.Path(path).read_bytes().decode()
        expected = p.divergence(q, whole)
        assert found["mean_kl"] == expected.mean_kl
        assert found["mean_kl"] != q.divergence(p, whole).mean_kl
        assert found["kl_quantiles"]["0.5"] == expected.kl_quantile(0.5)
        assert found["top_1_agreement"] == expected.top_1_agreement
        # score has float32 exponentials, which move a log-probability by 1.4e-8 nats.
        assert found["perplexity"] == pytest.approx(q.score(whole).perplexity, rel=5e-8)
        assert found["perplexity_reference"] == pytest.approx(p.score(whole).perplexity, rel=5e-8)
    one, two = results["texts"]
    count = one["count"] + two["count"]
    mean = (one["count"] * one["mean_kl"] + two["count"] * two["mean_kl"]) / count
    assert results["total"]["count"] == count
    assert results["total"]["mean_kl"] == pytest.approx(mean, rel=1e-12)
    printed = cli(*run).out
    assert f"all {count} tokens; p is the reference, q the model" in printed
    assert f"{results['total']['mean_kl']:.6g} +-" in printed
    assert list(rows(printed)) == [text, other]


def test_the_window_of_a_comparison_fits_both_models(cli, model, text, tmp_path):
    smaller = tmp_path / "smaller"
    config = nano(vocab_size=len(VOCAB), n_ctx=6)
    write_checkpoint(smaller, config, random_tensors(config, dtype="float32"))
    for name in ("merges.txt", "vocab.json"):
        shutil.copy(pathlib.Path(model) / name, smaller)
    run = ["perplexity", text, "--model", model, "--against", str(smaller), "--json"]
    options = json.loads(cli(*run).out)["options"]
    assert (options["window"], options["stride"]) == (6, 3)


def test_models_that_do_not_fit_each_other_are_refused(cli, model, text, tmp_path):
    config = nano(vocab_size=300)
    write_checkpoint(tmp_path / "larger", config, random_tensors(config, dtype="float32"))
    shutil.copy(pathlib.Path(model) / "merges.txt", tmp_path / "larger")
    shutil.copy(pathlib.Path(model) / "vocab.json", tmp_path / "larger")
    run = ["perplexity", text, "--model", model, "--against"]
    check_error(cli(*run, str(tmp_path / "larger")), "264.*300|300.*264")
    swapped = make_model(tmp_path / "swapped", {**VOCAB, "t": VOCAB["h"], "h": VOCAB["t"]})
    check_error(cli(*run, swapped), "the two models cut it into different tokens")
    check_error(cli(*run, str(tmp_path / "nowhere")), "nowhere")
    check_error(
        cli(*run, model, "--resume", str(tmp_path / "j")), "leave out one of --resume and --against"
    )
    check_error(cli(*run[:-1], "--against-dtype", "float64"), "--against-dtype needs --against")
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("missing", ["--model", "--against"])
def test_both_models_are_found_before_one_is_loaded(cli, model, text, monkeypatch, missing):
    names = {"--model": model, "--against": model} | {missing: "nowhere"}

    def load(self: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(options.ModelChoice, "load", load)
    run = itertools.chain(*names.items())
    check_error(cli("perplexity", text, *run), "unknown model 'nowhere'")


def test_ctrl_c_in_a_comparison_prints_what_was_finished(cli, model, text, other, monkeypatch):
    real, calls = numpygpt.Model.divergence, []

    def divergence(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(numpygpt.Model, "divergence", divergence)
    result = cli("perplexity", text, other, "--model", model, "--against", model)
    assert result.code == 130
    assert list(rows(result.out)) == [text]
    assert result.err == "numpygpt: interrupted: incomplete: 1 of 2 texts were finished\n"
    calls.append(1)
    result = cli("perplexity", text, other, "--model", model, "--against", model)
    assert (result.code, result.out) == (130, "")


# -- help --------------------------------------------------------------------------------------


@VERBS
def test_help_has_every_option_with_what_it_means(cli, verb):
    result = cli(verb, "--help")
    assert (result.code, result.err) == (0, "")
    for option in ("--window W", "--stride S", "--first-token", "--chunk N", "--replay RECORD"):
        assert option in result.out
    for meaning in ("2 to n_ctx + 1", "half of W", "end-of-text", "1 or more"):
        assert meaning in " ".join(result.out.split())


def test_help_has_the_exit_codes(cli):
    told = " ".join(cli("--help").out.split())
    assert "1 if a proof failed, a replay differed or a verification found more" in told
    assert "130 after Ctrl-C" in told
