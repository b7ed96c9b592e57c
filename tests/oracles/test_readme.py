"""The README's worked example: a PyTorch model with the exact GELU, its dump, what is said."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import numpygpt

pytestmark = pytest.mark.oracle

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return found


def test_the_worked_example_prints_what_the_readme_shows(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    weights = (ROOT / "weights" / "shakespeare").as_posix()
    monkeypatch.chdir(tmp_path)
    exec(block("py").replace("weights/shakespeare", weights), {})
    command, _, shown = block("text").removeprefix("$ numpygpt ").partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", "numpygpt", *command.split()],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(numpygpt.__file__).parent.parent)},
    )
    assert done.stderr == ""
    assert done.returncode == 1
    said, expected = words(done.stdout), words(shown)
    # What is found, and what explains it; numbers differ with the kernels of a machine.
    for piece in ("first h.0.mlp.post, activation gelu_new, layer 0", "exact (erf) GELU instead"):
        assert piece in said
        assert piece in expected
    assert re.sub(r"\d[\d.]*", "#", said) == re.sub(r"\d[\d.]*", "#", expected)


def words(text: str) -> str:
    return " ".join(text.split())
