"""The limits of the machine, measured with NumPy and in the layout that suits it best."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import __version__
from ..checkpoints.config import read_config
from ..ops import Array
from ..params import Config
from ..threads import blas, get_threads, spread
from .shapes import matrices

__all__ = ["Limits", "describe", "processors"]

# The sweep reads at most so much: far more than any cache holds, also where a model is larger.
SWEEP_BYTES = 2**29

# Rows and columns of the one large product. 4096 was not faster.
PRODUCT = 2048

# Seconds that a measurement goes on at least.
LEAST = 0.1


class Limits:
    """How fast this machine reads matrices, multiplies, and applies a function to numbers.

    It is asked like a contestant, in a process of its own, and has its turn in every round.

    Parameters
    ----------
    directory : pathlib.Path
        Whose ``config.json`` says how large the matrices are.
    threads : int
        Only for the record: the process was started with as many.
    """

    def __init__(self, directory: pathlib.Path, threads: int):
        self.config, self.threads = read_config(directory / "config.json"), threads

    def version(self) -> str:
        """NumPy's."""
        return f"numpy {np.__version__}"

    def describe(self) -> dict[str, Any]:
        """Which library multiplies here, and on how many threads."""
        library = blas()
        return {
            "numpy": np.__version__,
            "blas": blas_name(),
            "kernel": None if library is None else library.kernel,
            "threads": self.threads if library is None else get_threads(),
        }

    def bandwidth(self, least: float = LEAST) -> float:
        """Bytes per second of a sweep: nothing but ``W @ x`` for every matrix W of the model.

        In the faster of its two layouts: which that is depends on the kernels. On a Zen 3 it was
        (in, out), by 15 %; on a Zen 5 (out, in), by 50 %.
        """
        size = sum(w.nbytes for w in self.held)
        turned = [w.reshape(w.shape[::-1]).T for w in self.held]  # the same memory
        return max(
            size / self._seconds(self._sweep(weights), least) for weights in (self.held, turned)
        )

    def peak(self, least: float = LEAST) -> float:
        """Floating-point operations per second of one large product."""
        a, b, out = self.square
        return 2 * PRODUCT**3 / self._seconds(lambda: np.matmul(a, b, out=out), least)

    def products(self, rows: int) -> float:
        """Floating-point operations per second of the products of a prefill, and nothing else.

        The matrices are (out, in) in memory and the results in Fortran order, which is fastest.
        """
        weights = self.held[1:]
        jobs = [
            (np.ones((rows, w.shape[1]), w.dtype), np.full((rows, len(w)), 0, w.dtype, "F"))
            for w in weights[:4]  # one block's; every block has the same shapes
        ]

        def prefill() -> None:
            for i, w in enumerate(weights):
                x, out = jobs[i % 4]
                np.matmul(x, w.T, out=out)

        return 2 * rows * sum(w.size for w in weights) / self._seconds(prefill, LEAST)

    def elementwise(self, name: str) -> float:
        """Numbers per second to which a function of NumPy is applied, in cache, on all threads."""
        return elements_per_second(name, self.threads)

    @functools.cached_property
    def held(self) -> list[Array]:
        """The head and the matrices of the blocks, or as many blocks as SWEEP_BYTES allow."""
        return sweep_matrices(self.config)

    @functools.cached_property
    def square(self) -> tuple[Array, Array, Array]:
        """Two factors, and room for their product."""
        a, b, out = (np.ones((PRODUCT, PRODUCT), np.float32) for _ in range(3))
        return a, b, out

    @staticmethod
    def _sweep(weights: list[Array]) -> Callable[[], None]:
        jobs = [(w, np.ones(w.shape[1], w.dtype), np.empty(len(w), w.dtype)) for w in weights]

        def sweep() -> None:
            for w, x, out in jobs:
                np.matmul(w, x, out=out)

        return sweep

    @staticmethod
    def _seconds(work: Callable[[], object], least: float = LEAST) -> float:
        """The mean time of a run: of one, or of as many as take at least so many seconds."""
        count, began = 0, time.perf_counter()
        while True:
            work()
            count += 1
            passed = time.perf_counter() - began
            if passed >= least:
                return passed / count


def sweep_matrices(config: Config) -> list[Array]:
    """Matrices (out, in) of a model in memory of their own, written once so that it is there."""
    shapes = [(config.vocab_size, config.n_embd)]
    block = list(matrices(config).values())
    size = 4 * sum(rows * columns for rows, columns in block)
    room = SWEEP_BYTES - 4 * shapes[0][0] * shapes[0][1]
    shapes += block * min(config.n_layer, max(1, room // size))
    return [np.full(shape, 0.02, np.float32) for shape in shapes]


def elements_per_second(name: str, threads: int) -> float:
    """How fast a ufunc is on arrays that stay in the cache, on several threads at once."""
    function = getattr(np, name)

    def work(array: Array) -> int:
        arguments = [array] * function.nin
        out, count = np.empty_like(array), 0
        until = time.perf_counter() + LEAST
        while time.perf_counter() < until:
            for _ in range(16):
                function(*arguments, out=out)
            count += 16
        return count * array.size

    began = time.perf_counter()
    done = spread(work, [np.full(2**15, 0.5, np.float32) for _ in range(threads)])
    return sum(done) / (time.perf_counter() - began)


def describe() -> dict[str, Any]:
    """What the figures depend on, apart from the BLAS."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor_name(),
        "processors": processors(),
        "load": load_average(),
        "numpygpt": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def load_average() -> float | None:
    """How many processes wanted to run in the last minute, where the system tells."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """As the system tells it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def blas_name() -> str:
    """The library that NumPy was built with, and its version."""
    built: Any = np.show_config(mode="dicts")
    found = built.get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()
