"""OpenAI's own GPT-2, where it is at hand, says what others have published that it says."""

from __future__ import annotations

import os

import pytest

import numpygpt

PATH = os.environ.get("NUMPYGPT_GPT2")

pytestmark = pytest.mark.skipif(
    not PATH, reason="set NUMPYGPT_GPT2 to a directory with OpenAI's 124M checkpoint"
)


def test_the_continuation_in_transformers_integration_test():
    # transformers, tests/models/gpt2/test_modeling_gpt2.py: greedy after "The dog".
    expected = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198,
                198, 464, 3290]  # fmt: skip
    model = numpygpt.load(PATH)
    assert model.generate([464, 3290], max_new_tokens=len(expected)).ids == expected


def test_the_continuation_in_picogpts_readme():
    model = numpygpt.load(PATH)
    prompt = "Alan Turing theorized that computers would one day become"
    assert model.generate(prompt, max_new_tokens=40).text.startswith(
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations"
    )
