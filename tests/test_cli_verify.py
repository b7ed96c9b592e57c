"""The verb ``verify``: what it asks for, prints and writes, and how it ends."""

# The fixtures of test_cli are arguments here, too.
# ruff: noqa: F811

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import tqdm
from support import random_tensors, write_checkpoint
from test_cli import CONFIG, Terminal, check_error, cli, make_model, model, terminal  # noqa: F401
from test_reports import check_junit, finding, gelu, make

import numpygpt
import numpygpt.verify
from numpygpt.errors import DumpError
from numpygpt.verify.report import Report
from numpygpt.verify.reports import as_html, as_json, as_text

GOOD, BAD = make(), gelu()
DOUBTFUL = make({"ln_f": finding("ln_f", "suspicious", 2.0)})


class Stub:
    """Stands for ``verify``: knows the report of each dump, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **reports: list[Report] | Exception):
        self.reports = reports
        self.asked: list[tuple[Any, Any, dict[str, Any]]] = []
        monkeypatch.setattr(numpygpt.verify, "verify", self)

    def __call__(self, source: Any, model: Any, *, on_progress: Any, **options: Any) -> Any:
        self.asked.append((source, model, options))
        on_progress(1, 2, "embed")
        on_progress(2, 2, "logits")
        found = self.reports[source]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def stub(monkeypatch):
    return Stub(
        monkeypatch,
        good=[GOOD],
        bad=[BAD],
        doubtful=[DOUBTFUL],
        two=[GOOD, BAD],
        broken=DumpError("broken: h.0.ln_1 is\ntruncated"),
    )


# -- what it prints ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "report", "code"), [("good", GOOD, 0), ("bad", BAD, 1), ("doubtful", DOUBTFUL, 1)]
)
def test_the_report_is_printed_and_the_exit_code_is_its_verdict(
    cli, model, stub, name, report, code
):
    result = cli("verify", name, "--model", model)
    assert (result.code, result.err) == (code, "")
    assert result.out == as_text(report) + "\n"


def test_several_dumps_and_sequences_have_a_report_each(cli, model, stub):
    result = cli("verify", "good", "two", "--model", model)
    assert result.code == 1
    assert result.out == "\n\n".join(map(as_text, (GOOD, GOOD, BAD))) + "\n"
    assert [name for name, *_ in stub.asked] == ["good", "two"]


def test_verbose_says_everything(cli, model, stub):
    result = cli("verify", "bad", "--model", model, "--verbose")
    assert result.out == as_text(BAD, verbose=True) + "\n"


def test_json_is_one_object(cli, model, stub):
    result = cli("verify", "bad", "good", "--model", model, "--json")
    assert (result.code, result.err) == (1, "")
    assert result.out == as_json([BAD, GOOD]) + "\n"


@pytest.mark.parametrize(
    ("variables", "painted"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    cli, model, stub, monkeypatch, variables, painted
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    assert cli("verify", "bad", "--model", model).code == 1
    assert screen.getvalue() == as_text(BAD, colour=painted) + "\n"


def test_a_model_in_memory_gets_its_path_back(cli, model, monkeypatch):
    Stub(monkeypatch, good=[make(model={"sha256": "0" * 64, "config": {}})])
    made = json.loads(cli("verify", "good", "--model", model, "--json").out)
    assert made["reports"][0]["model"]["path"] == model


def test_progress_goes_to_a_terminal_only(cli, model, stub, monkeypatch):
    # Show every step, not ten a second.
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, mininterval=0))
    assert cli("verify", "good", "--model", model).err == ""
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    assert cli("verify", "good", "--model", model).code == 0
    shown = screen.getvalue().split("\r")
    assert any(re.match("good: *50%.* 1/2 .*embed", line) for line in shown)
    assert any(re.match("good: 100%.* 2/2 .*logits", line) for line in shown)
    assert not shown[-1].strip()  # cleared


# -- what it asks for --------------------------------------------------------------------------


def test_nothing_is_assumed_unless_it_is_said(cli, model, stub):
    cli("verify", "good", "--model", model)
    ((_, loaded, options),) = stub.asked
    assert isinstance(loaded, numpygpt.Model)
    assert options == {
        "mapping": None, "ids": None, "dtype": None, "weights": None, "chunks": None,
        "explain": True,
    }  # fmt: skip


def test_every_assumption_is_passed_on(cli, model, stub, tmp_path):
    mapping = tmp_path / "mapping.json"
    mapping.write_text('{"block.{i}.act": "h.{i}.mlp.post"}')
    cli(
        "verify", "good", "--model", model, "--mapping", str(mapping), "--ids", "3,1,2",
        "--as", "bfloat16", "--weights", "int8", "--chunks", "2,1", "--no-explain",
        "--config", "activation_function=gelu",
    )  # fmt: skip
    ((_, loaded, options),) = stub.asked
    assert loaded.config.activation_function == "gelu"
    assert options == {
        "mapping": {"block.{i}.act": "h.{i}.mlp.post"}, "ids": [3, 1, 2], "dtype": "bfloat16",
        "weights": "int8", "chunks": (2, 1), "explain": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("ids.json", b"[3, 1, 2]", [3, 1, 2]),
        ("ids.json", b"[[3, 1], [2, 3]]", [[3, 1], [2, 3]]),
        ("ids.txt", b"\xef\xbb\xbf3 1\n2\n", [3, 1, 2]),
        ("ids.csv", b"3, 1,2,", [3, 1, 2]),
    ],
)
def test_ids_come_from_files_of_several_kinds(cli, model, stub, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert cli("verify", "good", "--model", model, "--ids", str(tmp_path / name)).code == 0
    assert stub.asked[0][2]["ids"] == expected


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_ids_come_from_numpy(cli, model, stub, tmp_path, shape):
    ids = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    np.save(tmp_path / "ids.npy", ids)
    assert cli("verify", "good", "--model", model, "--ids", str(tmp_path / "ids.npy")).code == 0
    assert stub.asked[0][2]["ids"] == ids.tolist()


def test_weights_that_need_float64_are_loaded_so(cli, model, stub, tmp_path):
    cli("verify", "good", "--model", model)
    wide = tmp_path / "wide"
    write_checkpoint(wide, CONFIG, random_tensors(CONFIG, dtype="float64"))
    cli("verify", "good", "--model", str(wide))
    assert [str(loaded.dtype) for _, loaded, _ in stub.asked] == ["float32", "float64"]


# -- files -------------------------------------------------------------------------------------


def without_time(text: str) -> str:
    return re.sub(r'timestamp="[^"]*"', "", text)


def test_junit_and_html_are_written_beside_the_text(cli, model, stub, tmp_path):
    junit, page = tmp_path / "a.xml", tmp_path / "a.html"
    result = cli(
        "verify", "bad", "good", "--model", model, "--junit", str(junit), "--html", str(page)
    )
    assert (result.code, result.err) == (1, "")
    assert result.out.startswith("WRONG")
    root = check_junit(junit.read_text(encoding="utf-8"))
    assert [suite.get("failures") for suite in root] == ["12", "0"]
    assert page.read_text(encoding="utf-8") == as_html([BAD, GOOD])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.xml", "model"]


@pytest.mark.parametrize("option", ["--junit", "--html"])
def test_a_file_is_replaced_only_if_that_is_asked_for(cli, model, stub, tmp_path, option):
    path = tmp_path / "out"
    path.write_text("precious")
    check_error(cli("verify", "good", "--model", model, option, str(path)), "give --overwrite")
    assert path.read_text() == "precious"
    assert not stub.asked  # refused before any work
    assert cli("verify", "good", "--model", model, option, str(path), "--overwrite").code == 0
    assert path.read_text().startswith(("<?xml", "<!DOCTYPE"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "out"]


def test_a_report_that_fails_leaves_the_old_file(cli, model, stub, tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("precious")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    options = ["--html", str(path), "--overwrite"]
    result = cli("verify", "good", "--model", model, *options)
    assert result.code == 2
    assert "No space left on device" in result.err
    assert path.read_text() == "precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "out"]


def test_a_file_that_cannot_be_replaced_stays(cli, model, stub, tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("precious")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    result = cli("verify", "good", "--model", model, "--html", str(path), "--overwrite")
    assert result.code == 2
    assert result.err == f"numpygpt: error: {path}: cannot be replaced: Permission denied\n"
    assert path.read_text() == "precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "out"]


# -- what is unusable --------------------------------------------------------------------------


def test_a_dump_that_is_unusable_does_not_keep_the_others_waiting(cli, model, stub, tmp_path):
    junit = tmp_path / "a.xml"
    result = cli("verify", "good", "broken", "bad", "--model", model, "--junit", str(junit))
    assert result.code == 2
    assert result.err == "numpygpt: error: broken: h.0.ln_1 is truncated\n"
    assert result.out == f"{as_text(GOOD)}\n\n{as_text(BAD)}\n"
    root = check_junit(junit.read_text())
    assert [suite.get("errors") for suite in root] == ["0", "0", "1"]


def test_json_names_what_is_unusable(cli, model, stub):
    result = cli("verify", "broken", "good", "--model", model, "--json")
    made = json.loads(result.out)
    assert (result.code, made["passed"], made["verdict"]) == (2, False, "rounding")
    assert made["unusable"] == [
        {"source": "broken", "reason": "broken: h.0.ln_1 is truncated"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "float8"], "--as: dtype must be one of float64, float32"),
        (["--weights", "q4"], "--weights: weights must be one of .* or int8, not 'q4'"),
        (["--chunks", "3,0"], "--chunks expects numbers from 1 up, such as 5,1,1, not '3,0'"),
        (["--chunks", "a"], "--chunks expects numbers from 1 up"),
        (["--ids", "[1,[2]]"], "--ids: expected token ids"),
        (["--ids", "1 - 2"], "--ids: expected token ids"),
        (["--ids", "nowhere.json"], "a file with them, not 'nowhere.json'"),
        (["--ids", "nowhere.npy"], "nowhere.npy: No such file"),
        (["--mapping", "nowhere.json"], "nowhere.json"),
        (["--html", "nowhere/a.html"], "nowhere is no directory"),
        (["--html", "a", "--junit", "a"], "name the same file"),
        (["--junit", "."], "expected the name of a file"),
        (["--config", "n_head"], "--config expects NAME=VALUE"),
    ],
)
def test_options_are_refused_before_any_work(
    cli, model, stub, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    check_error(cli("verify", "good", "--model", model, *options), message)
    assert not stub.asked


@pytest.mark.parametrize(
    "content", [b"", b"[1.5]", b'{"ids": [1]}', b"\xff\xfe", b"[[1], []]", b"[true]"]
)
def test_ids_that_are_none_are_refused(cli, model, stub, tmp_path, content):
    (tmp_path / "ids").write_bytes(content)
    check_error(cli("verify", "good", "--model", model, "--ids", str(tmp_path / "ids")), "expected")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((1, 1, 1), int), np.array([], int)])
def test_arrays_that_are_no_ids_are_refused(cli, model, stub, tmp_path, array):
    np.save(tmp_path / "ids.npy", array)
    path = str(tmp_path / "ids.npy")
    check_error(cli("verify", "good", "--model", model, "--ids", path), "expected integers")


def test_pickles_are_not_opened(cli, model, stub, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([{}], object), allow_pickle=True)
    path = str(tmp_path / "ids.npy")
    check_error(cli("verify", "good", "--model", model, "--ids", path), "allow_pickle=False")


def test_a_model_must_be_named(cli, stub):
    result = cli("verify", "good")
    assert result.code == 2
    assert "--model" in result.err


# -- as a whole --------------------------------------------------------------------------------


@pytest.fixture
def traced(cli, model, tmp_path) -> pathlib.Path:
    """A dump of the model's own."""
    path = tmp_path / "own.safetensors"
    assert cli("trace", "--ids", "3,1,4,1,5", "--model", model, "-o", str(path)).code == 0
    return path


def test_what_trace_writes_is_verified(cli, model, traced):
    result = cli("verify", str(traced), "--model", model)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("ROUNDING ")


def test_another_activation_is_found_and_named(cli, model, traced):
    options = ["--config", "activation_function=gelu"]
    result = cli("verify", str(traced), "--model", model, *options, "--json")
    assert result.code == 1
    (report,) = json.loads(result.out)["reports"]
    assert report["first"] == "h.0.mlp.post"
    first = next(each for each in report["findings"] if each["name"] == "h.0.mlp.post")
    assert any("gelu_new" in name for name in first["explanations"][0]["mistakes"])
