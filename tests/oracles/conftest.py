"""The oracle leg: skipped as a whole without PyTorch, and never in part.

With NUMPYGPT_REQUIRE_ORACLES set, as in .ci/run, a missing tool or a skipped test is a failure.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

NEEDED = ("torch", "transformers", "safetensors", "tokenizers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
REQUIRED = bool(os.environ.get("NUMPYGPT_REQUIRE_ORACLES"))

if MISSING and REQUIRED:
    raise pytest.UsageError(f"oracles are required, but not installed: {', '.join(MISSING)}")

collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    if REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, but oracles are required: {report.longrepr}"
    return report
