"""A contestant's process, seen from outside: started, asked, and ended whatever it does."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from ..errors import NumpyGPTError
from ..params import shown
from .contestant import unpacked

__all__ = ["PINS", "ContestantFailed", "Lacks", "Process", "cold_start", "environment"]

# Settings that pin OpenBLAS to the kernels of another processor. Users do not have them.
PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class ContestantFailed(NumpyGPTError):
    """A contestant said that it failed, or ended, or was ended because it took too long."""


class Lacks(Exception):
    """A contestant has no way to do what was asked."""


def environment(threads: int) -> dict[str, str]:
    """The variables of every process that is measured: no pins, and a number of threads."""
    kept = {name: value for name, value in os.environ.items() if name not in PINS}
    return kept | dict.fromkeys(THREADS, str(threads))


class Process:
    """One contestant.

    Parameters
    ----------
    name : str
        As :func:`numpygpt.bench.contestant.find` takes it.
    directory : pathlib.Path
        Its weights.
    threads : int
    timeout : float
        Seconds that an answer may take, loading included. After that the process is killed.

    Attributes
    ----------
    version : str
        What it says of itself.
    alive : bool
        Whether it can still be asked.

    Raises
    ------
    ContestantFailed
        If it does not load.
    """

    def __init__(self, name: str, directory: pathlib.Path, threads: int, timeout: float):
        self.timeout = timeout
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.contestant", name, str(directory),
             "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(threads),
            encoding="utf-8",
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        # A thread, because no system but Linux can wait for a pipe and a clock at once.
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.version = self._answer("load")
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the contestant.

        Raises
        ------
        ContestantFailed
            If it raises an error, ends, or takes too long. Only after the first is it ``alive``.
        Lacks
            If it has no such method.
        """
        request = json.dumps({"method": method, "arguments": arguments})
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: there will be no answer, either
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        return self._answer(method)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a request that it never took
                    pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put("")

    def _answer(self, what: str) -> Any:
        try:
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            self.process.kill()
            self.process.wait()
            raise ContestantFailed(f"{what}: no answer in {self.timeout:g} s; ended it") from None
        if not line:
            code = self.process.wait()
            raise ContestantFailed(f"{what}: ended with exit code {code}{self._last_words()}")
        answer = json.loads(line)
        if "lacks" in answer:
            raise Lacks(what)
        if "error" in answer:
            raise ContestantFailed(f"{what}: {_one_line(answer['error'])}")
        result = answer["result"]
        return unpacked(result) if isinstance(result, dict) and "data" in result else result

    def _last_words(self) -> str:
        self.errors.seek(0)
        return _last_line(self.errors.read().decode(errors="replace"))


def cold_start(command: Sequence[str], threads: int, timeout: float) -> tuple[float, int | None]:
    """Run the command of a cold start.

    Parameters
    ----------
    command : sequence of str
        See :func:`numpygpt.bench.contestant.cold_command`.
    threads : int
    timeout : float
        Seconds.

    Returns
    -------
    seconds : float
        From before the process was started to its first token.
    peak : int or None
        The most memory it had, in bytes, where the system tells.

    Raises
    ------
    ContestantFailed
        If it fails or takes too long.
    """
    began = time.time()
    try:
        done = subprocess.run(
            command,
            env=environment(threads),
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        raise ContestantFailed(f"cold: no token in {timeout:g} s") from None
    if done.returncode:
        last = _last_line(done.stderr)
        raise ContestantFailed(f"cold: ended with exit code {done.returncode}{last}")
    said = json.loads(done.stdout.splitlines()[-1])
    return said["now"] - began, said["peak"]


def _last_line(text: str) -> str:
    """The last line that says something, with a colon before it; or nothing."""
    lines = text.strip().splitlines()
    return f": {_one_line(lines[-1])}" if lines else ""


def _one_line(text: str) -> str:
    """What a library said, fit for a message."""
    return shown(" ".join(text.split()), most=200)
