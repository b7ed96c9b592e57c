"""The README's commands and examples do what it says."""

from __future__ import annotations

import doctest
import pathlib
import re
import shlex

import pytest

from numpygpt.cli import main

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


@pytest.mark.parametrize("block", blocks("console"))
def test_console_examples(block: str, capsys: pytest.CaptureFixture[str]):
    for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, expected = call.split("\n", 1)
        program, *arguments = shlex.split(command)
        assert program == "numpygpt"
        main(arguments)
        printed = "".join(capsys.readouterr())
        assert printed.rstrip() == expected.rstrip()


def test_console_examples_exist():
    assert blocks("console")
