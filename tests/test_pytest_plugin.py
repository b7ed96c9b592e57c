"""``assert_matches_gpt2`` as a function, and as a fixture of pytest."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support import nano, random_ids, random_params
from test_reports import gelu, make

import numpygpt
import numpygpt.verify
from numpygpt.errors import ArgumentError
from numpygpt.verify.asserting import assert_matches_gpt2
from numpygpt.verify.reports import as_text

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFIG = nano()
MODEL = numpygpt.Model(CONFIG, random_params(CONFIG))
IDS = random_ids(CONFIG, 6)


# -- the function --------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """What ``verify`` was asked for; its answer is the first item."""
    calls: list[Any] = [[make()]]

    def verify(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return calls[0]

    monkeypatch.setattr(numpygpt.verify, "verify", verify)
    return calls


def test_a_candidate_that_passes_is_told_by_its_reports(asked):
    assert assert_matches_gpt2("run.npz", "gpt2", dtype="float16", chunks=(5, 1)) is asked[0]
    assert asked[1:] == [
        (("run.npz", "gpt2"), {"ids": None, "dtype": "float16", "chunks": (5, 1)})
    ]  # fmt: skip


def test_a_candidate_that_does_not_is_told_by_its_text(asked):
    asked[0] = [make(), gelu(), gelu(sequence=2)]
    with pytest.raises(AssertionError) as caught:
        assert_matches_gpt2("run.npz", "gpt2")
    assert str(caught.value) == f"{as_text(gelu())}\n\n{as_text(gelu(sequence=2))}"
    with pytest.raises(AssertionError) as caught:
        assert_matches_gpt2("run.npz", "gpt2", verbose=True)
    assert str(caught.value).startswith(as_text(gelu(), verbose=True))


def test_a_function_is_run_on_the_ids_as_they_are(asked):
    given: list[Any] = []

    def candidate(ids: Any) -> dict[str, np.ndarray]:
        given.append(ids)
        return {"logits": np.zeros((2, 17))}

    ids = [3, 1]
    assert_matches_gpt2(candidate, MODEL, ids=ids)
    assert given[0] is ids
    (source, model), options = asked[1]
    assert (list(source), model, options) == (["logits"], MODEL, {"ids": ids})


def test_a_function_needs_ids(asked):
    with pytest.raises(ArgumentError, match="needs ids="):
        assert_matches_gpt2(lambda ids: {}, MODEL)
    assert len(asked) == 1


def test_our_own_run_passes_and_a_changed_one_fails():
    trace = MODEL.trace(IDS)
    (report,) = assert_matches_gpt2(trace, MODEL, ids=IDS, dtype="float64")
    assert report.passed
    # By 1e-6 where float64 rounds by 1e-16.
    changed = trace | {"h.1.mlp.out": trace["h.1.mlp.out"] + 1e-6}
    with pytest.raises(AssertionError, match=r"first +h\.1\.mlp\.out, linear map mlp\.c_proj"):
        assert_matches_gpt2(changed, MODEL, ids=IDS, dtype="float64")


# -- the fixture ---------------------------------------------------------------------------------

TESTS = """\
def test_good(assert_matches_gpt2, good):
    assert_matches_gpt2(good, model="gpt2")


def test_bad(assert_matches_gpt2, bad):
    assert_matches_gpt2(bad, model="gpt2")


def test_function(assert_matches_gpt2):
    import numpygpt.verify
    assert assert_matches_gpt2 is numpygpt.verify.asserting.assert_matches_gpt2
"""

CONFTEST = f"""\
import sys

import pytest

sys.path.insert(0, {str(ROOT / "tests")!r})


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    import numpygpt.verify
    monkeypatch.setattr(numpygpt.verify, "verify", lambda source, *_, **__: [source])


@pytest.fixture
def good():
    import test_reports
    return test_reports.make()


@pytest.fixture
def bad():
    import test_reports
    return test_reports.gelu()
"""


def run(folder: pathlib.Path, *options: str) -> str:
    """What pytest says of the tests above."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_port.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
    # Where numpygpt is installed, pytest loads the plugin by itself; here it is named.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)],
        capture_output=True, text=True, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_fixture_fails_with_the_report_alone(tmp_path):
    out = run(tmp_path, "-p", "numpygpt.verify.pytest_plugin", "-W", "error")
    assert "1 failed, 2 passed" in out
    assert "FAILED test_port.py::test_bad" in out
    lines = [line.removeprefix("E       ") for line in out.splitlines() if line[:2] == "E "]
    first, *rest = as_text(gelu()).splitlines()
    assert lines[0] == f"AssertionError: {first}"
    assert [line.strip() for line in lines[1:]] == [line.strip() for line in rest]
    # Nothing of what stands between the test and the report.
    assert "asserting.py" not in out
    assert "raise AssertionError" not in out


def test_the_fixture_has_a_description(tmp_path):
    out = run(tmp_path, "-p", "numpygpt.verify.pytest_plugin", "--fixtures", "-v")
    assert "assert_matches_gpt2" in out
    assert "imported when the first test asks for it" in out
