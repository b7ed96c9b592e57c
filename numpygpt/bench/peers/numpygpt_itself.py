"""numpygpt, in each of the ways it can store its matrices."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..contestant import COLD_IDS, Array, Contestant, cold_command

__all__ = ["CONTESTANTS", "NumpyGPT", "NumpyGPTBfloat16", "NumpyGPTFloat64", "NumpyGPTInt8"]

_COLD = """
import sys
import numpygpt
model = numpygpt.load(sys.argv[1], dtype=sys.argv[2])
model.generate([int(id) for id in sys.argv[3].split()], max_new_tokens=1, stop_ids=())
"""


class NumpyGPT(Contestant):
    """float32, the default."""

    name = "numpygpt"
    dtype: ClassVar[str] = "float32"

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        from numpygpt import load

        self.model = load(directory, dtype=self.dtype)

    def version(self) -> str:
        """The package's."""
        from numpygpt import __version__

        return f"numpygpt {__version__}"

    def logits(self, ids: Sequence[int]) -> Array:
        """All rows."""
        return self.model.logits(ids)

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """The time from one token to the next, as a user's ``on_step`` sees them."""
        return np.diff(self._ticks(ids, steps)).tolist()

    def prefill(self, ids: Sequence[int]) -> float:
        """The last row's logits."""
        began = time.perf_counter()
        self.model.logits(ids, last=True)
        return time.perf_counter() - began

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """From the first token of all prompts to their last."""
        ticks = self._ticks(prompts, steps)
        return ticks[-1] - ticks[0]

    def score(self, ids: Sequence[int]) -> float:
        """``Model.score``, which also ranks each token and measures each entropy."""
        began = time.perf_counter()
        self.model.score(ids)
        return time.perf_counter() - began

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """``load`` and ``generate``."""
        return cold_command(_COLD, str(directory), cls.dtype, " ".join(map(str, COLD_IDS)))

    def _ticks(self, prompt: Sequence[int] | Sequence[Sequence[int]], steps: int) -> list[float]:
        """When each token was there; the first comes from reading the prompt."""
        ticks: list[float] = []
        self.model.generate(
            prompt,
            max_new_tokens=steps + 1,
            stop_ids=(),
            on_step=lambda _: ticks.append(time.perf_counter()),
        )
        return ticks


class NumpyGPTFloat64(NumpyGPT):
    """What the others are checked against."""

    name = "numpygpt float64"
    dtype = "float64"
    bound, bound_reason = 1e-12, "rounding of float64"


class NumpyGPTBfloat16(NumpyGPT):
    """Matrices of 16 bits."""

    name = "numpygpt bfloat16"
    dtype = "bfloat16"
    bound, bound_reason = 3e-2, "weights rounded to 8 bits of precision"


class NumpyGPTInt8(NumpyGPT):
    """Matrices of 8 bits."""

    name = "numpygpt int8"
    dtype = "int8"
    bound, bound_reason = 1e-1, "weights rounded to 8 bits"


CONTESTANTS = (NumpyGPT, NumpyGPTFloat64, NumpyGPTBfloat16, NumpyGPTInt8)
