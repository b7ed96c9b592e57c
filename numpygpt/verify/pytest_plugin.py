"""A pytest plugin with one fixture, ``assert_matches_gpt2``.

.. code-block:: python

    def test_port(assert_matches_gpt2):
        assert_matches_gpt2("run.safetensors", "gpt2")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

__all__ = ["assert_matches_gpt2"]


@pytest.fixture
def assert_matches_gpt2() -> Callable[..., Any]:
    """:func:`numpygpt.verify.assert_matches_gpt2`, imported when the first test asks for it."""
    from .asserting import assert_matches_gpt2

    return assert_matches_gpt2
