"""The arrays of a dump against GPT-2's: resynchronised, which decides, and free-running.

*Resynchronised*: each array against what the right operation makes of the dump's own arrays
before it. An error that came in earlier is in both, so it can neither hide nor accuse: what
differs by more than rounding was computed wrongly right here. *Free-running*: each array against
our own run from the ids; what an error does to all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..params import Array
from .arithmetic import Arithmetic
from .bounds import Bound
from .operations import Program, future, kind_of, layer_of
from .propagation import REACH, Expected, evaluate, expect
from .report import Decision, Finding, Verdict

__all__ = [
    "Difference",
    "Expectation",
    "Given",
    "apart",
    "compare",
    "decide",
    "differs",
]

# A score that hides its key. The lowest number of float16 is -65504.
HIDDEN = -6e4

OnProgress = Callable[[int, int, str], Any]


class Difference(NamedTuple):
    """How far an array is from what is expected: see :class:`numpygpt.verify.report.Finding`."""

    verdict: Verdict
    ratio: float
    ceiling: float
    error: float
    where: tuple[int, ...]


class Expectation(NamedTuple):
    """What a dump's array should be, given the arrays before it."""

    value: Array
    bound: Bound


class Given(Mapping[str, Array]):
    """The arrays of a dump by trace key, each widened to float64 when it is asked for.

    What a block starts with is what the one before it left. Where a dump has only one of the two,
    it stands for both, and is compared with what makes it.

    Parameters
    ----------
    tensors : mapping of str to ndarray
    names : list of str
        Every trace key, in the order of execution.

    Attributes
    ----------
    compared : list of str
        The trace keys that are to be compared.
    """

    def __init__(self, tensors: Mapping[str, Array], names: list[str]):
        self.tensors = tensors
        self.keys_of = {name: name for name in names if name in tensors}
        made = dict.fromkeys(self.keys_of)
        for name in names:
            if kind_of(name) == "h.{i}.resid_pre":
                layer = layer_of(name)
                before = f"h.{layer - 1}.resid_post" if layer else "embed"
                if name in tensors and before not in tensors:
                    self.keys_of[before] = name
                    made[before] = made.pop(name)
                elif before in tensors:
                    self.keys_of.setdefault(name, before)
        self.compared = [name for name in names if name in made]

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.tensors[self.keys_of[name]], np.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def differs(name: str, observed: Array, expected: Expectation, a: Arithmetic) -> Difference:
    """Measure the largest difference of an array, in units of its bound.

    Parameters
    ----------
    name : str
        Trace key.
    observed : ndarray of float64
    expected : Expectation
    a : Arithmetic

    Returns
    -------
    Difference
    """
    value, (likely, certain) = expected
    ratios = apart(name, observed, value, likely, a)
    with np.errstate(all="ignore"):
        beyond = bool((np.isinf(ratios) | (ratios * likely > certain)).any())
    where = np.unravel_index(int(ratios.argmax()), ratios.shape)
    ratio = float(ratios[where])
    verdict: Verdict = "rounding" if ratio <= 1 else "wrong" if beyond else "suspicious"
    with np.errstate(all="ignore"):
        ceiling = float(certain[where] / likely[where])
        error = float(np.abs(observed[where] - value[where]))
    return Difference(verdict, ratio, ceiling, error, tuple(map(int, where)))


def apart(name: str, observed: Array, value: Array, likely: Array, a: Arithmetic) -> Array:
    """Each number's difference in units of its bound; inf where only one of the two is a number."""
    with np.errstate(all="ignore"):
        ratios = np.abs(observed - value) / likely
    ratios = np.where((observed == value) | (np.isnan(observed) & np.isnan(value)), 0.0, ratios)
    if kind_of(name) == "h.{i}.attn.scores":
        both = (value <= HIDDEN) & (observed <= HIDDEN)  # in one way or another
        ratios = np.where(both | _masked(observed, value, a), 0.0, ratios)
    return np.where(np.isnan(ratios), np.inf, ratios)


def _masked(observed: Array, value: Array, a: Arithmetic) -> Array:
    """Which scores hide a key from a query that comes before it, as they should.

    Any number does that lets the softmax give the key less than rounding, -1e9 as well as -inf.
    """
    length = observed.shape[-1]
    hidden = np.broadcast_to(future(length), observed.shape) | np.isneginf(value)
    with np.errstate(all="ignore"):
        seen = np.where(hidden, -np.inf, observed)
        weight = np.exp(observed - seen.max(-1, keepdims=True))
        return np.asarray(hidden & (weight * length <= a.u))


def compare(
    program: Program,
    given: Mapping[str, Array],
    names: list[str],
    arithmetic: Arithmetic,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[Finding, Expected]]:
    """Both comparisons of every array.

    Parameters
    ----------
    program : Program
        The right one.
    given : mapping of str to ndarray of float64
        The arrays of a dump.
    names : list of str
        Those that are to be compared, in the order of execution.
    arithmetic : Arithmetic
    on_progress : callable, optional
        ``on_progress(done, total, name)``.

    Yields
    ------
    Finding, Expected
        Without explanations; and what was expected.
    """
    free = evaluate(program, names, {})
    resynchronised = expect(program, names, given, arithmetic)
    for done, (each, (also, alone)) in enumerate(zip(resynchronised, free, strict=True)):
        name, expected = each.name, Expectation(each.value, each.bound)
        assert name == also, "both go through the same order"
        observed = given[name]
        found = differs(name, observed, expected, arithmetic)
        inputs, through = _sources(program, name, given)
        yield (
            Finding(
                name, program.operation(name).words.format(**vars(program.config)), inputs, through,
                *found[:4], float(expected.bound.likely[found.where]), found.where,
                float(observed[found.where]), float(expected.value[found.where]),
                *_apart(name, observed, alone),
            ),
            each,
        )  # fmt: skip
        if on_progress:
            on_progress(done + 1, len(names), name)


def _apart(name: str, observed: Array, alone: Array) -> tuple[float, float]:
    """The largest free-running difference, and the same as a fraction of the largest number."""
    compared = np.isfinite(alone)
    if kind_of(name) == "h.{i}.attn.scores":
        compared &= ~future(observed.shape[-1])
    with np.errstate(all="ignore"):
        error = np.abs(observed - alone)[compared].max(initial=0.0)
        largest = np.abs(alone[compared]).max(initial=0.0)
    return float(error), float(error / largest) if largest else float(error > 0)


def _sources(
    program: Program, name: str, given: Mapping[str, Array]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The dump's arrays that one was computed from, and the intermediates on the way."""
    through: dict[str, None] = {}
    inputs: dict[str, None] = {}
    waiting = [name]
    while waiting:
        key = waiting.pop()
        needed = program.operation(key).inputs
        if not needed:
            inputs["ids"] = None
        for each in needed:
            if each in given:
                inputs[each] = None
            elif each not in through:
                through[each] = None
                waiting.append(each)
    order = {key: n for n, key in enumerate(["ids", *program.names])}
    return tuple(sorted(inputs, key=order.__getitem__)), tuple(
        sorted(through, key=order.__getitem__)
    )


def decide(
    program: Program, logits: Array, arithmetic: Arithmetic, ours: Expected | None = None
) -> list[Decision]:
    """For each position, whether the likeliest next token is decided by more than rounding.

    Parameters
    ----------
    program : Program
        The right one.
    logits : (T, V) ndarray of float64
        The dump's.
    arithmetic : Arithmetic
    ours : Expected, optional
        Our logits from the ids, if they are there already.

    Returns
    -------
    list of Decision
    """
    if ours is None:
        (ours,) = expect(program, ["logits"], {}, arithmetic)
    return margins(ours.value, ours.shaken, logits, ours.own.likely)


def margins(value: Array, shaken: list[Array], logits: Array, own: Array) -> list[Decision]:
    """The same, from our logits, those of shaken runs, and the bounds of the last operation.

    What both logits inherit has much in common, so the reach of their difference is measured; where
    the few samples happen to lie close together, the average of all positions helps. Their own
    roundings, that of storing them included, have nothing in common.
    """
    rows = np.arange(len(value))
    with np.errstate(all="ignore"):
        first = value.argmax(-1)
        theirs = np.where(np.isnan(logits), -np.inf, logits).argmax(-1)
        others = value.copy()
        others[rows, first] = -np.inf
        rival = np.where(theirs == first, others.argmax(-1), theirs)
        margin = value[rows, first] - value[rows, rival]
        moved = [x[rows, first] - x[rows, rival] - margin for x in shaken]
        square = np.mean(np.square(moved), axis=0)
        typical = np.mean(square[np.isfinite(square)]) if np.isfinite(square).any() else 0.0
        reach = REACH * np.sqrt(np.maximum(square, typical / 4))
        reach += own[rows, first] + own[rows, rival]
    decisions = []
    for t in range(len(value)):
        tie = not margin[t] > reach[t]  # nothing can be said where either is no number
        verdict = "same" if theirs[t] == first[t] else "tie within rounding" if tie else "real"
        decisions.append(
            Decision(t, int(first[t]), int(theirs[t]), float(margin[t]), float(reach[t]), verdict)  # type: ignore[arg-type]
        )
    return decisions
