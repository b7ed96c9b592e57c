"""The oracle leg: skipped as a whole without PyTorch.

With NUMPYGPT_REQUIRE_ORACLES set, as in .ci/run, a missing tool or a skipped test is a failure.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

NEEDED = ("torch", "transformers", "safetensors", "tokenizers")
# Some machines have no TensorFlow; the tests of one format each skip without these.
MORE = ("gguf", "google_crc32c", "lm_eval", "tensorflow")
MISSING = [name for name in (*NEEDED, *MORE) if importlib.util.find_spec(name) is None]
REQUIRED = bool(os.environ.get("NUMPYGPT_REQUIRE_ORACLES"))

if MISSING and REQUIRED:
    raise pytest.UsageError(f"oracles are required, but not installed: {', '.join(MISSING)}")

collect_ignore_glob = ["test_*.py"] if set(NEEDED) & set(MISSING) else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    if REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped, but oracles are required: {report.longrepr}"
    return report
