"""Numbers, names and places in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ...params import shown
from ...plans import INTERMEDIATES
from ...records import plain
from ..dump import Dump
from ..operations import kind_of, layer_of
from ..report import Finding, Report

__all__ = [
    "TOLD",
    "Unusable",
    "clean",
    "config_of",
    "how_far",
    "intervals",
    "joined",
    "numbers",
    "of_layer",
    "place",
    "prose",
    "short",
    "sig",
    "some",
    "through",
    "times",
]

# Characters that are shown: of a name from a file, of a sentence.
LONGEST, LONGEST_SENTENCE = 200, 2000

# Places or names that are told before "and 3 more".
TOLD = 3

AXES = {row.name: row.axes for row in INTERMEDIATES}

# What an index along an axis counts.
COUNTED = {
    "N": "position", "T": "position", "S": "key", "C": "channel", "3C": "column", "H": "head",
    "D": "channel", "F": "unit", "V": "token",
}  # fmt: skip


class Unusable(NamedTuple):
    """A dump that could not be verified, and why."""

    source: str
    reason: str


# -- names and numbers -------------------------------------------------------------------------


def clean(text: object) -> str:
    r"""A name from a file on one line, with everything that does not print spelled out.

    >>> clean("h.0.mlp\x1b[2J")
    'h.0.mlp\\x1b[2J'
    """
    return shown(" ".join(str(text).split()), LONGEST)


def prose(text: object) -> str:
    """The same for a sentence."""
    return shown(" ".join(str(text).split()), LONGEST_SENTENCE)


def sig(number: float, digits: int = 3) -> str:
    """A number to a few digits.

    >>> sig(0.000123456), sig(float("nan"))
    ('0.000123', 'nan')
    """
    return f"{number:.{digits}g}"


def times(ratio: float) -> str:
    """How many times, to two digits.

    >>> times(0.4321), times(9812.0), times(2.5e7), times(float("inf"))
    ('0.43', '9,800', '2.5e+07', 'inf')
    """
    if not math.isfinite(ratio) or ratio >= 999_500:
        return f"{ratio:.2g}"
    return f"{float(f'{ratio:.2g}'):,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def short(ratio: float) -> str:
    """The same in at most five characters.

    >>> [short(x) for x in (0.043, 3.14, 9812.0, 2.5e7, 3e14, float("inf"))]
    ['0.04', '3.1', '9.8k', '25M', '3e14', '∞']
    """
    if math.isnan(ratio):
        return "nan"
    if math.isinf(ratio):
        return "∞"
    if ratio < 0.995:
        return f"{ratio:.2f}"
    ratio = float(f"{ratio:.2g}")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if unit <= ratio < 1000 * unit:
            scaled = ratio / unit
            return f"{scaled:.0f}{letter}" if scaled >= 10 else f"{scaled:.1f}{letter}"
    return f"{ratio:.0e}".replace("e+", "e")


def intervals(numbers: Collection[int]) -> str:
    """Whole numbers, those in a row as one.

    >>> intervals([5, 0, 1, 2, 8, 9])
    '0-2, 5, 8, 9'
    """
    rows: list[list[int]] = []
    for number in sorted(numbers):
        if rows and rows[-1][-1] == number - 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    return ", ".join(
        f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in rows
    )


def joined(items: Sequence[str], word: str = "and") -> str:
    """Items in a sentence.

    >>> joined(["a", "b", "c"]), joined(["a"])
    ('a, b and c', 'a')
    """
    return f" {word} ".join(", ".join(part) for part in (items[:-1], items[-1:]) if part)


def some(items: Sequence[str], most: int = TOLD) -> str:
    """The first few, and how many more there are.

    >>> some(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    rest = len(items) - most
    return joined([*items[:most], f"{rest} more"]) if rest > 0 else joined(items)


# -- where -------------------------------------------------------------------------------------


def config_of(report: Report) -> dict[str, Any]:
    """The model's config as plain values, whatever it came as."""
    config = plain(report.model.get("config") or {})
    return config if isinstance(config, dict) else {}


def of_layer(name: str) -> str:
    """Which part of the model a trace key belongs to, or nothing.

    >>> of_layer("h.3.attn.out"), of_layer("logits")
    ('layer 3', '')
    """
    layer = layer_of(name)
    return f"layer {layer}" if layer >= 0 else ""


def place(finding: Finding, config: dict[str, Any]) -> str:
    """Where in an array a difference is largest."""
    axes = AXES.get(kind_of(finding.name), ())
    if len(axes) != len(finding.where):
        return f"index {finding.where}"
    parts = [f"{COUNTED[axis]} {i}" for axis, i in zip(axes, finding.where, strict=True)]
    width, heads = config.get("n_embd"), config.get("n_head")
    if axes[-1] == "3C" and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        part, channel = divmod(finding.where[-1], max(width, 1))
        if part < 3:
            head, channel = divmod(channel, max(width // heads, 1))
            vector = ("query", "key", "value")[part]
            parts[-1] = f"{parts[-1]} ({vector} of head {head}, channel {channel})"
    return ", ".join(parts)


def numbers(finding: Finding) -> str:
    """What was found and what was expected, to so many digits that they differ."""
    digits = 4
    size = max(abs(finding.observed), abs(finding.expected))
    if math.isfinite(size) and finding.error > 0 and size > finding.error:
        digits = min(17, max(digits, 2 + math.ceil(math.log10(size) - math.log10(finding.error))))
    observed, expected = (
        f"{number:#.{digits}g}".rstrip(".") for number in (finding.observed, finding.expected)
    )
    return (
        f"observed {observed}, expected {expected}, off by {sig(finding.error, 2)}, "
        f"bound {sig(finding.bound, 2)}"
    )


def how_far(finding: Finding, dump: Dump) -> str:
    """A difference as a multiple of what rounding allows."""
    if math.isinf(finding.ratio):
        return "beyond any rounding"
    far = f"{times(finding.ratio)} times the rounding of {clean(dump.dtype)}"
    if finding.verdict == "suspicious":
        far += f" (conceivable: {times(finding.ceiling)})"
    return far


def through(finding: Finding) -> str:
    """What else the mistake may lie in, since the dump does not hold it; or nothing."""
    if not finding.through:
        return ""
    return (
        f"the dump does not hold {some(finding.through, 4)}, so the mistake may lie there; it was "
        f"computed from {joined(finding.inputs)}"
    )
