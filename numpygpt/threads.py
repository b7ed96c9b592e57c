"""How many threads work at once: those of the BLAS, and ours around it.

A matrix product is divided among threads by the BLAS that NumPy was built with. What NumPy does by
itself, such as ``exp``, uses one. :func:`spread` runs several pieces of such work at once, while
the BLAS inside each keeps to one thread: two levels of threads would wait for each other.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import importlib
import itertools
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from .arguments import whole
from .errors import MissingPackageError

if TYPE_CHECKING:  # slow to import, and one token needs no pool
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Blas", "blas", "get_threads", "set_threads", "spread"]

T = TypeVar("T")
R = TypeVar("R")


class Blas(NamedTuple):
    """The thread count of a BLAS, and the name of the kernels it chose for this processor."""

    get: Callable[[], int]
    set: Callable[[int], object]
    kernel: str


@functools.cache
def blas() -> Blas | None:
    """The library behind NumPy's matrix products.

    NumPy does not tell how many threads it uses. The OpenBLAS that NumPy's wheels bring along is
    asked directly; any other through the package threadpoolctl, where that is installed.

    Returns
    -------
    Blas or None
        None if there is no way to ask, as with Apple's Accelerate.
    """
    return _bundled() or _controlled()


def _bundled() -> Blas | None:
    home = pathlib.Path(np.__file__).parent
    for folder in (home.parent / "numpy.libs", home / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(path))  # the one that is loaded already
            except OSError:
                continue
            for spelling in ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_"):
                try:
                    get = library[spelling.format("get_num_threads")]
                    put = library[spelling.format("set_num_threads")]
                    kernel = library[spelling.format("get_corename")]
                except AttributeError:
                    continue
                get.argtypes, put.argtypes, kernel.argtypes = [], [ctypes.c_int], []
                kernel.restype = ctypes.c_char_p
                return Blas(get, put, kernel().decode())
    return None


def _controlled() -> Blas | None:
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        return None
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    if not found:
        return None
    first = found[0]
    return Blas(first.get_num_threads, first.set_num_threads, first.info().get("architecture", ""))


class _State:
    """What :func:`set_threads` asked for, the pool of our threads, and who limits the BLAS."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.pool: ThreadPoolExecutor | None = None
        self.size = 0
        self.lock = threading.Lock()
        self.limiting = 0  # how many calls of `spread` want one BLAS thread now
        self.outside = 1  # the count to go back to after them
        self.inside = threading.local()


_state = _State()
if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_state.__init__)  # type: ignore[misc]


def set_threads(count: int) -> None:
    """Set how many threads matrix products and everything else may use, in this whole process.

    Results agree for any number within rounding, because a BLAS divides its sums differently.
    With 1, and with ``chunk=1``, they are the same to the last bit on every run.

    Parameters
    ----------
    count : int
        1 or more. More than there are processors only costs time.

    Raises
    ------
    ArgumentError
        If it is no such number.
    MissingPackageError
        If this NumPy's BLAS cannot be told. The variable ``OMP_NUM_THREADS`` (and
        ``OPENBLAS_NUM_THREADS``, ``MKL_NUM_THREADS``, ``VECLIB_MAXIMUM_THREADS``) can, before
        Python starts.

    Examples
    --------
    >>> import numpygpt
    >>> before = numpygpt.get_threads()
    >>> numpygpt.set_threads(1)
    >>> numpygpt.get_threads()
    1
    >>> numpygpt.set_threads(before)
    """
    count = whole("threads", count, 1, 1024)
    library = blas()
    if library is None:
        raise MissingPackageError(
            "the number of threads of this NumPy's BLAS cannot be set: install the package "
            "threadpoolctl, or set OMP_NUM_THREADS before Python starts"
        )
    with _state.lock:
        _state.asked = _state.outside = count
        if not _state.limiting:
            library.set(count)


def get_threads() -> int:
    """How many threads work at once: what was set, else what the BLAS chose by itself.

    Returns
    -------
    int
    """
    if _state.asked is not None:
        return _state.asked
    library = blas()
    if library is None:
        return 1
    return _state.outside if _state.limiting else library.get()


def spread(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function for each item, several at once; the results in the order of the items.

    Parameters
    ----------
    function : callable
        Should spend its time inside NumPy, on arrays of 100 kB and more: between its calls only
        one thread runs at a time, and handing over takes some 50 microseconds.
    items : iterable

    Returns
    -------
    list

    Examples
    --------
    >>> spread(len, ["a", "bb", "ccc"])
    [1, 2, 3]
    """
    items = list(items)
    helpers = min(get_threads(), len(items)) - 1
    if helpers < 1 or getattr(_state.inside, "working", False) or (library := blas()) is None:
        return [function(item) for item in items]
    results: list[Any] = [None] * len(items)
    numbers = itertools.count()

    def work() -> None:
        _state.inside.working = True
        try:
            for i in numbers:
                if i >= len(items):
                    return
                results[i] = function(items[i])
        finally:
            _state.inside.working = False

    with _one_blas_thread(library):
        started: list[Future[None]] = []
        try:
            # Python starts no threads once its main one has ended; this one may run on.
            with suppress(RuntimeError):
                pool = _pool(helpers)
                # How NumPy treats overflow belongs to the context, which threads do not inherit.
                for _ in range(helpers):
                    started.append(pool.submit(contextvars.copy_context().run, work))
            work()
        finally:
            # A helper that has not begun, behind another caller's, is no longer needed.
            started = [future for future in started if not future.cancel()]
            if started:  # even after Ctrl-C: they write where the caller goes on
                from concurrent.futures import wait

                wait(started)
        for future in started:
            future.result()
    return results


def _pool(helpers: int) -> ThreadPoolExecutor:
    """At least so many threads beside the caller's."""
    from concurrent.futures import ThreadPoolExecutor

    with _state.lock:
        if _state.pool is None or _state.size < helpers:
            _state.pool = ThreadPoolExecutor(helpers, thread_name_prefix="numpygpt")
            _state.size = helpers
        return _state.pool


@contextmanager
def _one_blas_thread(library: Blas) -> Iterator[None]:
    """Limit the BLAS; calls from several threads may overlap."""
    counted = False  # Ctrl-C may come between any two of these lines
    try:
        with _state.lock:
            if not _state.limiting:
                _state.outside = _state.asked or library.get()
            _state.limiting += 1
            counted = True
        library.set(1)
        yield
    finally:
        with _state.lock:
            _state.limiting -= counted
            if counted and not _state.limiting:
                library.set(_state.outside)
