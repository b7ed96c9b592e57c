"""A dump: what one run of a GPT-2 left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..params import Array

__all__ = ["Dump", "Match"]


class Match(NamedTuple):
    """How one array of a file became one array of a dump.

    Attributes
    ----------
    name : str
        Trace key.
    source : tuple of str
        The names in the file; several where an array was put together, as q, k and v are.
    how : str
        Why these two belong together: ``"name"``, ``"alias"``, ``"mapping"`` or ``"values"``.
    layout : str
        What was done to its axes, such as ``"(B, T, H, D) -> (H, T, D)"``; empty for nothing.
    """

    name: str
    source: tuple[str, ...]
    how: str = "name"
    layout: str = ""


@dataclass(frozen=True, eq=False)
class Dump:
    """The activations of one sequence, under the names and axes of the table of intermediates.

    Attributes
    ----------
    ids : (T,) ndarray of int64
        The tokens, from position 0.
    tensors : mapping of str to ndarray
        Trace key -> array, in the axes of :data:`numpygpt.plans.INTERMEDIATES`; any of them
        may be absent. Floating point of any width, as it was recorded.
    dtype : str
        What the program computed in, a key of :data:`numpygpt.verify.arithmetic.ARITHMETICS`.
    weights : str, optional
        How its weights were stored, where that is not `dtype`.
    chunks : tuple of int
        How many tokens each forward pass read, one after another, with a cache.
    producer : str
        What made it.
    source : str
        Where it was read from.
    matches : tuple of Match
    unmatched : tuple of str
        Names in the file that belong to nothing, and why, for the reader of the report.
    notes : tuple of str
        What else was assumed.
    """

    ids: Array
    tensors: Mapping[str, Array]
    dtype: str = "float32"
    weights: str | None = None
    chunks: tuple[int, ...] = ()
    producer: str = ""
    source: str = ""
    matches: tuple[Match, ...] = field(default=())
    unmatched: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
