"""What some operations of GPT-2 give, and how far rounding can move it on the way.

The rounding of one operation has a formula (:mod:`numpygpt.verify.bounds`). Where a dump leaves
out intermediates, several operations lie between what is known and what is to be checked, and the
errors of the first go through the others. How far they reach is measured: the operations are run
a few times more, every result shaken by random errors of the size of its own bound, and the spread
of the outcomes is the bound of what was inherited (Monte Carlo arithmetic; Parker 1997).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..params import Array
from .arithmetic import Arithmetic
from .bounds import Bound, bound
from .operations import Program, added, run, same

__all__ = ["Expected", "evaluate", "expect"]

# How often the operations are run with shaken results. Of eight samples, the root of the mean
# square is under a third of what it should be once in 10,000 numbers; those are held by their row.
SHAKES = 8

# A bound is taken for this many standard deviations of the rounding that it bounds.
DEVIATIONS = 4.0

# What is shaken moves by one of these times a standard deviation: by nearly as much every time, so
# that where one error is all there is every sample shows it; not by quite as much, so that two
# errors seldom cancel. (bfloat16 with scores of 100 and 600, pattern not recorded, 80 runs: the
# largest difference was 1.26 of the reach with +-1, 0.97 with these.)
SIZES = np.array([-1.2, -0.75, 0.75, 1.2])

# And so many standard deviations of the outcomes are taken for rounding.
REACH = 6.0


class Expected(NamedTuple):
    """A result of GPT-2.

    Attributes
    ----------
    name : str
        Trace key.
    value : ndarray of float64
    bound : Bound
        How far rounding can move it, that of everything it was computed through included.
    own : Bound
        That of the last operation alone.
    shaken : list of ndarray
        What it was with its inputs shaken; empty where they were given.
    """

    name: str
    value: Array
    bound: Bound
    own: Bound
    shaken: list[Array]


def evaluate(
    program: Program, targets: Collection[str], given: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    """Compute some intermediates from others. What is not needed any more is let go.

    Parameters
    ----------
    program : Program
    targets : collection of str
        Trace keys.
    given : mapping of str to ndarray
        Intermediates that are there; empty to start from the ids.

    Yields
    ------
    str, ndarray
        The targets, in an order in which they can be computed.
    """
    order = run(program, targets, given)
    last = _last_uses(program, order, given)
    arrays: dict[str, Array] = {}
    for name in order:
        needed = program.operation(name).inputs
        inputs = {key: given[key] if key in given else arrays[key] for key in needed}
        arrays[name] = program.compute(name, inputs)
        if name in targets:
            yield name, arrays[name]
        _forget(arrays, name, needed, last)


def expect(
    program: Program,
    targets: Collection[str],
    given: Mapping[str, Array],
    arithmetic: Arithmetic,
    shakes: int = SHAKES,
) -> Iterator[Expected]:
    """Compute some intermediates from others, with the reach of rounding.

    Parameters
    ----------
    program : Program
        The right one: a wrong one has no bounds.
    targets : collection of str
    given : mapping of str to ndarray
        Taken as exact.
    arithmetic : Arithmetic
    shakes : int
        How many runs with shaken results the reach is measured by.

    Yields
    ------
    Expected
        The targets, in an order in which they can be computed.
    """
    rng = np.random.default_rng(0)
    order = run(program, targets, given)
    last = _last_uses(program, order, given)
    # Of each intermediate the exact value, then the shaken ones; these are made in step, so that
    # no more than what is in use is kept.
    arrays: dict[str, list[Array]] = {}
    reaches: dict[str, Array] = {}
    for name in order:
        needed = program.operation(name).inputs
        inputs = {key: given[key] if key in given else arrays[key][0] for key in needed}
        value = program.compute(name, inputs)
        own = bound(program, name, inputs, value, arithmetic)
        computed = [key for key in needed if key not in given]
        shaken = [
            program.compute(name, inputs | {key: arrays[key][k + 1] for key in computed})
            for k in range(shakes if computed else 0)
        ]
        reach = _reach(value, own, shaken)
        if computed and program.operation(name).compute in (added, same):
            # Errors that are only added up need no samples.
            inherited = sum(reaches[key] for key in computed)
            reach = Bound(own.likely + inherited, own.certain + 4 * inherited)
        if name in targets:
            yield Expected(name, value, reach, own, shaken)
        if name in last:
            size = own.likely / DEVIATIONS
            around = shaken or [value] * shakes
            arrays[name] = [value]
            arrays[name] += [x + size * rng.choice(SIZES, x.shape) for x in around]
            reaches[name] = reach.likely
        _forget(arrays, name, needed, last)
        _forget(reaches, name, needed, last)


def _reach(value: Array, own: Bound, shaken: list[Array]) -> Bound:
    """The bound of a result whose inputs were shaken."""
    if not shaken:
        return own
    with np.errstate(all="ignore"):
        square = np.mean([np.square(x - value) for x in shaken], axis=0)
        square = np.where(np.isfinite(square), square, 0.0)
        inherited = REACH * np.sqrt(np.maximum(square, square.mean(-1, keepdims=True) / 4))
    # There is no certain bound for several operations: one that is four times as large.
    likely = own.likely + inherited
    return Bound(likely, np.maximum(own.certain, 4 * likely))


def _last_uses(program: Program, order: list[str], given: Collection[str]) -> dict[str, str]:
    """For each intermediate that is used, the last one that uses it."""
    return {
        key: name for name in order for key in program.operation(name).inputs if key not in given
    }


def _forget(
    arrays: dict[str, Any], name: str, needed: tuple[str, ...], last: dict[str, str]
) -> None:
    """Let go what was used for the last time."""
    for key in needed:
        if last.get(key) == name:
            arrays.pop(key, None)
    if name not in last:
        arrays.pop(name, None)
