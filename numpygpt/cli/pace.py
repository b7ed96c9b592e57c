"""Whether decoding is as fast as this machine's memory, or something is in its way."""

from __future__ import annotations

import statistics
import time

from ..api import Model
from ..decoding import Step
from ..params import Params
from ..threads import get_threads

__all__ = ["Pace"]

# Steps before anything is said, and weights that no cache holds.
STEPS = 16
LARGE = 2**27

# Each step reads every weight once. On a quiet machine it reaches 0.9 to 2 times what one thread
# reads by itself; with two threads beside another program that uses both cores 0.05 to 0.2.
FAR_BELOW = 0.25


class Pace:
    """Notes when each step of one sequence ends; give it as ``on_step``."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, steps: list[Step]) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def problem(self, model: Model) -> str | None:
        """What to tell whoever waits; None if all is well, or too little is known."""
        weights = weight_bytes(model.params)
        if len(self.times) <= STEPS or weights < LARGE:
            return None
        # The first step reads the prompt, and a copy of the weights may be made before it.
        spent = [b - a for a, b in zip(self.times[:-1], self.times[1:], strict=True)]
        reached, possible = weights / statistics.median(spent), read_speed(model.params)
        if reached >= FAR_BELOW * possible:
            return None
        return (
            f"each token took {statistics.median(spent):.2g} s, {possible / reached:.0f} times "
            f"what reading the weights takes: something else uses the processors, and "
            f"{get_threads()} threads wait for each other; try --threads 1"
        )


def weight_bytes(params: Params) -> int:
    """Bytes that a step reads: every matrix once."""
    matrices = [
        linear.w for block in params.h for linear in (*block.attn, *block.mlp)
    ]  # fmt: skip
    return sum(int(w.nbytes) for w in [*matrices, params.head])


def read_speed(params: Params) -> float:
    """Bytes a second that one thread reads of the largest matrix."""
    table = getattr(params.head, "numbers", params.head)
    rows = table[: max(1, 2**26 // max(1, table[:1].nbytes))]
    rows.max()  # it may not be in memory yet
    began = time.perf_counter()
    rows.max()
    return float(rows.nbytes / (time.perf_counter() - began))
