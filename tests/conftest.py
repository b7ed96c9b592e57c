"""Settings for every test: Hypothesis profiles, and no network."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import socket
import tempfile

import hypothesis
import pytest

# The matrices of tests are tiny, and threads that wait for each other take most of the time as soon
# as the machine has other work. NumPy reads this when it is imported first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shell lets its background jobs ignore Ctrl-C, and processes inherit that; the tests that send
# it to a process of their own would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis loads its derandomised profile by itself when CI is set. `random` is the leg of
# .ci/run that explores: fresh examples at every run, with a seed that is printed.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile(
    "random", deadline=None, max_examples=100, database=None, print_blob=True
)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker of tests that need not be repeated with other versions of NumPy."""
    config.addinivalue_line(
        "markers", "hostile: files that are bombs or damaged everywhere, refused before NumPy"
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to use the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture(autouse=True)
def no_download_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer happens to have downloaded changes no test."""
    monkeypatch.setenv("HF_HUB_CACHE", tempfile.gettempdir() + "/numpygpt-tests-no-such-cache")


def pytest_collection_finish() -> None:
    """The garbage collector never again looks at what the collection of the tests has made.

    Thousands of tests and their tables are a million objects. To go through them takes 0.1 to
    0.3 s, hundreds of times: a sixth of the whole run. What tests make later is collected as ever.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Say at once whether the oracles take part."""
    if importlib.util.find_spec("torch"):
        return "oracles: PyTorch is here, tests/oracles take part"
    return "oracles: not run, PyTorch is not installed (pip install '.[oracle]')"
