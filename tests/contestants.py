"""Contestants for test_bench.py that do what a real one should not."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from numpygpt import load
from numpygpt.bench.contestant import Contestant
from numpygpt.bench.peers.numpygpt_itself import NumpyGPT


class Noisy(NumpyGPT):
    """Prints on standard output, from Python and from below it."""

    name = "noisy"

    def prefill(self, ids: Sequence[int]) -> float:
        print('{"result": 1000.0}', flush=True)
        os.write(1, b'{"result": 2000.0}\n')
        return super().prefill(ids)


class WrongGelu(NumpyGPT):
    """Has the exact GELU where the checkpoint asks for the one of GPT-2."""

    name = "wrong gelu"

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        self.model = load(directory, config={"activation_function": "gelu"})


class Crashing(NumpyGPT):
    """Ends in the middle of its first batch."""

    name = "crashing"

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        os.write(2, b"starting\nSegmentation\x1b[2J fault\n")
        os._exit(11)


class Failing(NumpyGPT):
    """Raises an error in every batch, and has no score."""

    name = "failing"

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        raise RuntimeError("no room\nfor a batch")

    def score(self, ids: Sequence[int]) -> float:
        raise NotImplementedError


class Unloadable(Contestant):
    """Needs a file that is not there."""

    name = "unloadable"

    def __init__(self, directory: pathlib.Path, threads: int):
        raise FileNotFoundError("weights.gguf")


class Obedient(Contestant):
    """Loads nothing, and says what it was told."""

    name = "obedient"

    def version(self) -> str:
        return f"obedient {self.threads} {os.environ.get('OMP_NUM_THREADS')}"

    def echo(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def pins(self) -> list[str | None]:
        return [os.environ.get(name) for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")]
