"""How programs lay out the axes of an intermediate, and how to undo it.

A layout is written as axes from the outside in: ``B T H D``, or ``(B T) C`` where two of them are
one. Undoing it is a reshape and a permutation; no number is changed. What a wrong program does by
mistake is not undone: nothing here exchanges heads, nor parts an axis of 3C or (H, 3, D) into
queries, keys and values otherwise than the page does.

B sequences, T tokens, S keys, C width, H heads of width D, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..params import Array, Config
from ..plans import INTERMEDIATES
from .operations import kind_of

__all__ = ["Placed", "Sizes", "axes_of", "expected_shapes", "fitting", "kind"]


def _rows(width: str) -> tuple[str, ...]:
    """The layouts of an array of one vector for each token."""
    return (f"T {width}", f"B T {width}", f"T B {width}", f"(B T) {width}", f"{width} T")


HEADS = ("H T D", "T H D", "B H T D", "B T H D", "T B H D", "(B H) T D")
MERGED = ("T (H D)", "B T (H D)", "T B (H D)", "(B T) (H D)", "(H D) T")

# q, k or v alone: a third of the columns of qkv, whose axes in the trace are T and C.
PART = "T (H D)"

# By the axes of the trace; the commonest layout first.
LAYOUTS = {
    "T C": _rows("C"),
    "T F": _rows("F"),
    "T V": _rows("V"),
    "T 3C": (
        *_rows("3C"),
        "T 3 C", "3 T C", "B T 3 C", "3 B T C",
        "T 3 H D", "3 T H D", "3 H T D", "B T 3 H D", "3 B T H D", "3 B H T D",
    ),
    "H T D": (*HEADS, *MERGED),
    "H T S": ("H T S", "B H T S", "(B H) T S"),
    PART: (*MERGED, *HEADS),
}  # fmt: skip

# In which order of single axes all sequences of an array are gathered, if not B and the axes of
# the trace. Behind the second, these are then made one.
GATHERED = {PART: "B T H D"}

# Vocabularies are filled up to a multiple of one of these.
PADDINGS = tuple(2**power for power in range(3, 11))


class Sizes(NamedTuple):
    """How long every axis is."""

    config: Config
    sequences: int
    tokens: int

    def of(self, letter: str) -> int:
        """The length of an axis."""
        c = self.config
        sizes = {
            "B": self.sequences, "T": self.tokens, "S": self.tokens, "C": c.n_embd, "3": 3,
            "3C": 3 * c.n_embd, "H": c.n_head, "D": c.head_dim, "F": c.mlp_dim,
            "V": c.vocab_size,
        }  # fmt: skip
        return sizes[letter]

    def padded(self, length: int) -> bool:
        """Whether this many tokens are the vocabulary, filled up."""
        v = self.config.vocab_size
        return any(length == -(-v // step) * step for step in PADDINGS)


class Placed(NamedTuple):
    """An array in our axes.

    Attributes
    ----------
    array : (B, ...) ndarray
        A view of the original where that is possible.
    layout : str
        What was done; empty for nothing.
    """

    array: Array
    layout: str


_KINDS = {row.name: " ".join(row.axes).replace("N", "T") for row in INTERMEDIATES}


def kind(key: str) -> str:
    """The axes of a trace key, or of one of the parts of qkv.

    >>> kind("h.3.attn.pattern"), kind("logits"), kind("h.0.attn.q")
    ('H T S', 'T V', 'T (H D)')
    """
    return _KINDS.get(kind_of(key), PART)


def axes_of(key: str) -> str:
    """The axes as a reader writes them.

    >>> axes_of("h.0.attn.qkv")
    '(T, 3C)'
    """
    return _final(kind(key))


def fitting(array: Array, axes: str, sizes: Sizes, layers: bool = False) -> list[Placed]:
    """Every different array that a layout can make of this one.

    Parameters
    ----------
    array : ndarray
    axes : str
        What is wanted, as :func:`kind` returns it.
    sizes : Sizes
    layers : bool
        Whether `array` is one layer of an array of all; the report then says so.

    Returns
    -------
    list of Placed
        The commonest layout first.
    """
    found: list[Placed] = []
    for layout in LAYOUTS[axes]:
        for placed in _placed(array, layout, axes, sizes, layers):
            if not any(np.array_equal(placed.array, x.array, equal_nan=True) for x in found):
                found.append(placed)
    if not found and array.ndim > 2 and array.shape[0] == 1:  # ggml's arrays have four axes
        inside = fitting(array[0], axes, sizes)
        found = [each._replace(layout=_with_one(each.layout, axes)) for each in inside]
    return found


def expected_shapes(axes: str, sizes: Sizes) -> str:
    """What would have fitted, for a message.

    >>> expected_shapes("T C", Sizes(Config(), 1, 5))
    '(T, C) = (5, 768) or the like'
    """
    first = LAYOUTS[axes][0 if sizes.sequences == 1 else 1]
    shape = tuple(math.prod(map(sizes.of, axis)) for axis in _parsed(first))
    return f"{_written(first)} = {shape} or the like"


def _parsed(layout: str) -> list[list[str]]:
    """``"(B T) C"`` -> ``[["B", "T"], ["C"]]``."""
    return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\S+", layout)]


def _with_one(layout: str, axes: str) -> str:
    """A layout's words after an axis of one was taken off."""
    before = layout.partition(" -> ")[0] or _final(axes)
    return f"(1, {before[1:]} -> {_final(axes)}"


def _final(axes: str) -> str:
    """The axes of the trace, as a reader writes them."""
    return _written("T C" if axes == PART else axes)


def _written(layout: str, longer: Mapping[str, int] | None = None, layers: bool = False) -> str:
    """``"(B T) C"`` -> ``"(B T, C)"``; axes that are too long tell by how much."""
    words = [
        " ".join(f"{x}+{longer[x]}" if longer and x in longer else x for x in axis)
        for axis in _parsed(layout)
    ]
    words = ["C" if word == "H D" else word for word in words]  # merged heads
    return f"({', '.join(['L'] * layers + words)})"


def _placed(array: Array, layout: str, axes: str, sizes: Sizes, layers: bool) -> Iterator[Placed]:
    """What one layout makes of an array, if it fits."""
    parsed = _parsed(layout)
    letters = [letter for axis in parsed for letter in axis]
    if len(parsed) != array.ndim or ("B" not in letters and sizes.sequences != 1):
        return
    lengths = {letter: sizes.of(letter) for letter in letters}
    longer: dict[str, int] = {}
    for axis, length in zip(parsed, array.shape, strict=True):
        if length == math.prod(lengths[letter] for letter in axis):
            continue
        filled = (axis == ["V"] and sizes.padded(length)) or (
            axis == ["S"] and length > sizes.tokens
        )
        if not filled:
            return
        longer[axis[0]] = length - lengths[axis[0]]
        lengths[axis[0]] = length
    order = _gathered(axes, letters)
    split = array.reshape([lengths[letter] for letter in letters])
    if "B" not in letters:
        letters, split = ["B", *letters], split[None]
    moved = split.transpose([letters.index(letter) for letter in order])
    if "S" in longer:
        if not _is_empty(moved[..., sizes.tokens :]):
            return
        moved = moved[..., : sizes.tokens]
    if "V" in longer:
        moved = moved[..., : sizes.config.vocab_size]
    if axes == PART or axes == "T 3C":
        moved = moved.reshape(*moved.shape[:2], -1)
    before, after = _written(layout, longer, layers), _final(axes)
    yield Placed(moved, "" if before == after else f"{before} -> {after}")


def _gathered(axes: str, letters: list[str]) -> list[str]:
    """The order of single axes in which all sequences of an array are gathered."""
    if axes == "T 3C" and "3" in letters:
        return ["B", "T", "3", "C"] if "C" in letters else ["B", "T", "3", "H", "D"]
    return GATHERED.get(axes, f"B {axes}").split()


def _is_empty(keys: Array) -> bool:
    """Whether keys behind the last token take no part: no attention, or masked scores."""
    return bool((keys == 0).all() or np.isneginf(keys).all())
