"""How near an array is to one of our own run, and when that is enough to tell what it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import numpy as np

from ..params import Array
from .layouts import kind
from .names import PARTS, whole

__all__ = ["CLEAR", "CLOSE", "Expected", "Reference", "is_clear"]

Expected: TypeAlias = Callable[[Array, list[str]], Mapping[str, Array]]

# Distances are fractions of our array's norm. Measured with 40 tokens of the bundled model:
# different intermediates of one shape are 0.16 to 1.5 apart, neighbours in the residual stream the
# least (with weights as GPT-2 is initialised, 0.036); ours with weights in bfloat16 is within
# 0.003 of float64, in int8 0.012, in float32 4e-7. Within a quarter means a cosine of 0.968.
CLOSE = 0.25
CLEAR = 4.0

# Distances are measured on at most this many numbers of an array.
SAMPLE = 2**16


class Reference:
    """Our own run of the first sequence, of which samples are kept.

    Parameters
    ----------
    expected : callable
        From the ids (T,) and trace keys to a mapping of these to arrays.
    ids : (T,) ndarray
    """

    def __init__(self, expected: Expected, ids: Array):
        self.expected, self.ids = expected, ids
        self.samples: dict[str, Array] = {}

    def prepare(self, keys: Iterable[str]) -> None:
        """Run what is still missing; large arrays one kind at a time."""
        missing = {whole(key): None for key in keys if key not in self.samples}
        groups: dict[str, list[str]] = {}
        for key in missing:
            large = kind(key) in ("H T S", "T V")
            groups.setdefault(key.split(".", 2)[-1] if large else "", []).append(key)
        for group in groups.values():
            for key, array in self.expected(self.ids, group).items():
                self._keep(key, array)

    def distance(self, key: str, array: Array) -> float:
        """How far an array of the first sequence is from ours, as a fraction of ours."""
        self.prepare([key])
        return _distance(_sample(array), self.samples[key])

    def _keep(self, key: str, array: Array) -> None:
        self.samples[key] = _sample(array)
        if key.endswith(".attn.qkv"):
            for part, columns in zip(PARTS, np.split(array, 3, axis=1), strict=True):
                self.samples[f"{key.removesuffix('qkv')}{part}"] = _sample(columns)


def is_clear(nearest: float, second: float) -> bool:
    """Whether the nearest is so much nearer than the second that it must be meant."""
    return bool(nearest < second and CLEAR * nearest <= second)


def _distance(array: Array, reference: Array) -> float:
    """``|array - reference| / |reference|``, where both are finite; inf if that is rare."""
    shared = np.isfinite(array) & np.isfinite(reference)
    if 2 * np.count_nonzero(shared) < np.count_nonzero(np.isfinite(reference)):
        return math.inf
    own, ours = array[shared], reference[shared]
    with np.errstate(over="ignore"):
        size, gap = np.linalg.norm(ours), np.linalg.norm(own - ours)
    return float(gap / size) if size > 0 else (0.0 if gap == 0 else math.inf)


def _sample(array: Array) -> Array:
    """Some numbers of an array as float64, always from the same places; all if they are few."""
    if array.size <= SAMPLE:
        return array.astype(np.float64).ravel()
    return array[_places(array.shape)].astype(np.float64)


@functools.lru_cache(maxsize=16)
def _places(shape: tuple[int, ...]) -> tuple[Array, ...]:
    flat = np.random.default_rng(0).integers(0, math.prod(shape), SAMPLE)
    return np.unravel_index(flat, shape)
