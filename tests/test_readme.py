"""The README's commands and examples do what it says."""

from __future__ import annotations

import doctest
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import numpygpt

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_first_two_blocks_install_and_test():
    first, second = blocks("sh")[:2]
    assert "pip install ." in first
    assert "numpygpt generate" in first
    assert 'pip install ".[test]"' in second
    assert "pytest" in second


def test_python_examples():
    example = "\n".join(blocks("python"))
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", "README.md", 0)
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(test).failed == 0


@pytest.mark.skipif(shutil.which("sh") is None, reason="the examples are for a Unix shell")
@pytest.mark.parametrize("block", blocks("console"))
def test_console_examples(block: str, tmp_path: pathlib.Path):
    """Every command prints what stands below it, one after the other in one directory."""
    program = tmp_path / "bin" / "numpygpt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m numpygpt "$@"\n')
    program.chmod(0o755)
    package = str(pathlib.Path(numpygpt.__file__).parent.parent)
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": package,
    }
    for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, expected = call.split("\n", 1)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        assert_alike(done.stdout.rstrip(), expected.rstrip())


def assert_alike(printed: str, expected: str) -> None:
    """The same text; numbers with a fraction may differ in their last digit.

    float32 log-probabilities differ by up to 1e-5 between the kernels of a BLAS, and so one of
    the fifty here, which have four digits, is rounded the other way on some machine.
    """
    number = r"\d+\.\d+"
    assert re.sub(number, "#", printed) == re.sub(number, "#", expected)
    for one, other in zip(re.findall(number, printed), re.findall(number, expected), strict=True):
        digit = 10.0 ** -len(other.partition(".")[2])
        assert abs(float(one) - float(other)) < 1.5 * digit


def test_console_examples_exist():
    assert blocks("console")
