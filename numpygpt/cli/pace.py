"""Whether decoding is as fast as this machine's memory, or something is in its way."""

from __future__ import annotations

import statistics
import time

import numpy as np

from ..api import Model
from ..decoding import Step
from ..params import Params
from ..threads import get_threads

__all__ = ["Pace"]

# Steps before anything is said, and weights that no cache holds.
STEPS = 16
LARGE = 2**27

# Each step multiplies by every weight once. It reaches 0.8 to 1.1 of the speed of a product by
# itself, stored as float32, bfloat16 or int8; with two threads beside another program that uses
# both cores, while the product is measured without it, 0.05 to 0.2.
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
        threads = get_threads()
        advice = f", and {threads} threads wait for each other; try --threads 1"
        return (
            f"each token took {statistics.median(spent):.2g} s, {possible / reached:.0f} times "
            f"what multiplying by the weights takes: something else uses the processors"
            + (advice if threads > 1 else "")
        )


def weight_bytes(params: Params) -> int:
    """Bytes that a step reads: every matrix once."""
    matrices = [
        linear.w for block in params.h for linear in (*block.attn, *block.mlp)
    ]  # fmt: skip
    return sum(int(w.nbytes) for w in [*matrices, params.head])


def read_speed(params: Params) -> float:
    """Bytes a second at which a part of the largest matrix multiplies one row, alone."""
    head = params.head
    count = min(len(head), max(2, 2**26 * len(head) // int(head.nbytes)))
    rows = head[:count] if isinstance(head, np.ndarray) else head.first(count)
    one = np.ones((1, rows.shape[1]), params.dtype)
    np.matmul(one, rows.T)  # it may not be in memory yet
    began = time.perf_counter()
    np.matmul(one, rows.T)
    return float(rows.nbytes / (time.perf_counter() - began))
