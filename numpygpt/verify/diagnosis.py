"""Which known mistake explains an array that is not GPT-2's.

Every mistake of the gallery is made on the dump's own arrays before the one in question. The
mistake that explains it gives the array itself, within rounding. If none does, every two are made
together; if no two do, the array may be what another arithmetic gives.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ..params import Array
from ..plans import INTERMEDIATES
from .arithmetic import ARITHMETICS, Arithmetic, rounded
from .bounds import Bound
from .comparison import Expectation, apart, differs
from .gallery import Mistake, gallery
from .operations import Program, kind_of, layer_of, run
from .propagation import evaluate, expect
from .report import Explanation, Finding

__all__ = ["explain", "hidden"]

AXES = {row.name: row.axes for row in INTERMEDIATES}

# An array is what a mistake gives if it is within this many bounds (which are those of the right
# program, though the mistake may round a little more), and if this share of the squared difference
# goes away; else a mistake of hardly any effect would explain what is hardly beyond a bound.
WITHIN = 2.0
SHARE = 0.9

# Explanations that are kept.
MOST = 3

# Through many operations, mistakes are first tried on so many tokens, and two at a time only of so
# many. With 124 million parameters and logits alone: TIMES.
SHORT = 12
PAIRED = 10

# A mistake that no single number shows is only looked for where its effect is at least this
# fraction of the rounding; it shows if 1 -+ NEARNESS of it is there, and that is this many
# standard errors from nothing.
LEAST_EFFECT = 0.2
NEARNESS = 0.25
SIGNIFICANCE = 10.0
LEAST_ROWS = 8

# The least root mean square of rounding in units of its bound; where only the result is stored,
# it is about 0.3.
LEAST_ROUNDING = 0.02


def explain(
    program: Program,
    given: Mapping[str, Array],
    finding: Finding,
    expected: Expectation,
    arithmetic: Arithmetic,
    mistakes: Iterable[Mistake] | None = None,
    pairs: bool = True,
    right: Iterable[str] = (),
) -> tuple[Explanation, ...]:
    """The mistakes that account for an array, the best first.

    Parameters
    ----------
    program : Program
        The right one.
    given : mapping of str to ndarray of float64
        The arrays of the dump, the one in question among them.
    finding : Finding
    expected : Expectation
        What it should be.
    arithmetic : Arithmetic
    mistakes : iterable of Mistake, optional
        Those to be tried; the whole gallery if None.
    pairs : bool
        Whether two at a time are tried where one is not enough.
    right : iterable of str
        Arrays that were found to be right. Of several mistakes that reproduce this one, those
        come last that would have shown there.

    Returns
    -------
    tuple of Explanation
        At most three. Those that reproduce the array; if there are none, those that take away at
        least half of the squared difference.
    """
    tried = list(gallery(program) if mistakes is None else mistakes)
    kinds = {kind_of(name) for name in (finding.name, *finding.through)}
    singles: list[tuple[Mistake, ...]] = [
        (mistake,) for mistake in tried if kinds & set(mistake.kinds)
    ]
    trial = _Trial(program, given, finding.name, expected, arithmetic)
    quick = trial.shortened() if finding.through else trial
    found = [
        *_ranked(quick, [made for made in singles if made[0].causal]),
        *_ranked(trial, [made for made in singles if not made[0].causal]),
    ]
    if pairs and not any(each.reproduces for each, _ in found):
        best = singles
        if finding.through:  # through many operations, every two would take too long
            found.sort(key=lambda pair: -pair[0].explained)
            best = [made for _, made in found if made[0].causal or quick is trial][:PAIRED]
        both = [(*a, *b) for a, b in itertools.combinations(best, 2) if _together(*a, *b)]
        found = [*_ranked(quick, both), *found]
    found = _ranked(trial, [made for each, made in found if each.explained >= 0.5][: 2 * MOST])
    if sum(each.reproduces for each, _ in found) > 1:
        exact = [pair for pair in found if pair[0].reproduces]
        exact.sort(key=lambda pair: trial.elsewhere(pair[1], right))
        found = exact
    kept = [each for each, _ in found if each.explained >= 0.5]
    if not any(each.reproduces for each in kept):
        kept = [*_dropout(trial), *_arithmetics(trial), *kept]
    return tuple(kept[:MOST])


def hidden(
    program: Program,
    given: Mapping[str, Array],
    finding: Finding,
    expected: Expectation,
    arithmetic: Arithmetic,
    mistakes: Iterable[Mistake],
) -> tuple[Explanation, ...]:
    """The mistake that shows through the rounding of an array, though no number exceeds its bound.

    Rounding goes this way and that; a mistake pushes every number just where it would. So the
    differences of all numbers together are laid along those that the mistake makes: the share t
    of the mistake that fits best is 1 if it was made, and 0, but for chance, if it was not.

    Parameters
    ----------
    program, given, finding, expected, arithmetic
        As for :func:`explain`; the finding is one of rounding.
    mistakes : iterable of Mistake

    Returns
    -------
    tuple of Explanation
        None or one.
    """
    if finding.through:  # what was inherited lies along many directions
        return ()
    trial = _Trial(program, given, finding.name, expected, arithmetic)
    kind = kind_of(finding.name)
    found = [trial.shows(each) for each in mistakes if kind in each.kinds]
    shown = [each for each in found if each is not None]
    return tuple(sorted(shown, key=lambda each: -each.explained)[:1])


def _together(a: Mistake, b: Mistake) -> bool:
    """Whether two mistakes are two, and do not replace each other's operation or field."""
    return (
        a.name != b.name
        and not set(a.operations) & set(b.operations)
        and not set(a.config) & set(b.config)
    )


def _ranked(
    trial: _Trial, made: Iterable[tuple[Mistake, ...]]
) -> list[tuple[Explanation, tuple[Mistake, ...]]]:
    """What explains an array best first, each name once."""
    found = [(trial.of(mistakes), mistakes) for mistakes in made]
    ranked = sorted(
        ((each, mistakes) for each, mistakes in found if each is not None),
        key=lambda pair: (not pair[0].reproduces, len(pair[1]), -round(pair[0].explained, 3)),
    )
    best: dict[tuple[str, ...], tuple[Explanation, tuple[Mistake, ...]]] = {}
    for each, mistakes in ranked:
        best.setdefault(each.mistakes, (each, mistakes))
    return list(best.values())


class _Trial:
    """One array, against which mistakes are tried."""

    def __init__(
        self,
        program: Program,
        given: Mapping[str, Array],
        name: str,
        expected: Expectation,
        arithmetic: Arithmetic,
    ):
        self.program, self.name, self.arithmetic = program, name, arithmetic
        self.through = len(run(program, [name], given)) > 1
        self.given = given
        self.observed, self.expected = given[name], expected

    def shortened(self) -> _Trial:
        """The same for the first few tokens, which do not depend on the others.

        It is used where many operations are run, if these tokens differ.
        """
        length = len(self.program.ids)
        short = min(SHORT, length)
        value, (likely, certain) = self.expected
        first = functools.partial(_first, self.name, length=length, short=short)
        expected = Expectation(first(value), Bound(first(likely), first(certain)))
        program = dataclasses.replace(
            self.program,
            ids=self.program.ids[:short],
            chunks=_begun(self.program.chunks, short),
            # A bound is several times the rounding of float32, which reads half the bytes.
            dtype=np.float32 if self.arithmetic.u >= ARITHMETICS["float32"].u else np.float64,
        )
        given = {
            key: _first(key, self.given[key], length=length, short=short) for key in self.given
        }
        trial = _Trial(program, given, self.name, expected, self.arithmetic)
        found = differs(self.name, given[self.name], expected, self.arithmetic)
        return trial if found.ratio > 1 else self

    def of(self, mistakes: tuple[Mistake, ...]) -> Explanation | None:
        """How well some mistakes account for the array; None if they cannot be made."""
        value = self._made(mistakes)
        if value is None:
            return None
        likely = self._scaled(value)
        slack = sum(mistake.slack for mistake in mistakes)
        if slack:
            likely = likely + slack * np.abs(value)
        found = differs(
            self.name,
            self.observed,
            Expectation(value, Bound(likely, likely)),
            self.arithmetic,
        )
        right = self._square(self.expected.value, likely)
        explained = 1 - self._square(value, likely) / right if right else 0.0
        return Explanation(
            tuple(mistake.name for mistake in mistakes),
            "; ".join(mistake.why for mistake in mistakes),
            found.ratio <= WITHIN and explained >= SHARE,
            found.ratio,
            float(explained),
        )

    def elsewhere(self, mistakes: tuple[Mistake, ...], right: Iterable[str]) -> tuple[int, int]:
        """How some mistakes do on other arrays: how many contradict them, less how many agree.

        Those are the others of the same layer, and one that is right for each operation.
        """
        settled = {kind_of(name): name for name in right}
        against = agreeing = 0
        for mistake in mistakes:
            for kind in {*mistake.kinds, kind_of(self.name)}:
                own = kind.format(i=layer_of(self.name))
                for name in {own, settled.get(kind, own)} - {self.name}:
                    if name in self.given:
                        agrees = self._other(name).reproduced(mistake)
                        against, agreeing = against + (not agrees), agreeing + agrees
        return against, -agreeing

    def _other(self, name: str) -> _Trial:
        """The same dump with another array in question."""
        (should,) = expect(self.program, [name], self.given, self.arithmetic)
        expected = Expectation(should.value, should.bound)
        return _Trial(self.program, self.given, name, expected, self.arithmetic)

    def reproduced(self, mistake: Mistake) -> bool:
        """Whether the array is what a mistake gives."""
        found = self.of((mistake,))
        return found is not None and found.ratio <= WITHIN

    def shows(self, mistake: Mistake) -> Explanation | None:
        """Whether the rounding lies around what a mistake gives instead of what is right."""
        value = self._made((mistake,))
        if value is None:
            return None
        right, likely = self.expected
        with np.errstate(all="ignore"):
            effect = (value - right) / likely.likely
            found = (self.observed - right) / likely.likely
        # A masked score may be any number that is low enough.
        counted = np.isfinite(effect) & np.isfinite(found)
        counted &= (apart(self.name, self.observed, right, likely.likely, self.arithmetic) > 0) | (
            self.observed == right
        )
        effect, found = (np.where(counted, np.clip(x, -1e30, 1e30), 0.0) for x in (effect, found))
        size, noise = np.square(effect).sum(-1).ravel(), float(np.square(found).sum())
        if size.sum() < LEAST_EFFECT**2 * noise or not noise:
            return None
        share, error = _slope(size, (effect * found).sum(-1).ravel())
        if abs(share - 1) > NEARNESS or share < SIGNIFICANCE * error:
            return None
        ratio = float(np.abs(found - effect).max())
        left = float(np.square(found - effect).sum())
        why = f"{mistake.why}; {share:.2f} +- {error:.2f} of it shows through the rounding"
        return Explanation((mistake.name,), why, ratio <= WITHIN, ratio, 1 - left / noise)

    def _made(self, mistakes: tuple[Mistake, ...]) -> Array | None:
        """The array with some mistakes in it; None if they cannot be made."""
        program = self.program
        for mistake in mistakes:
            program = mistake.made(program)
        try:
            ((_, value),) = evaluate(program, [self.name], self.given)
        except (ValueError, IndexError):  # shapes that do not fit together
            return None
        return value if value.shape == self.observed.shape else None

    def _scaled(self, value: Array) -> Array:
        """The bound of the right result, larger where a wrong one is."""
        right, likely = self.expected.value, self.expected.bound.likely
        with np.errstate(all="ignore"):
            rows = _largest(value) / np.maximum(_largest(right), np.finfo(float).tiny)
            relative = _largest(likely) / np.maximum(_largest(right), np.finfo(float).tiny)
            own = relative * np.where(np.isfinite(value), np.abs(value), 0.0)
        return np.asarray(np.maximum(likely * np.clip(rows, 1.0, 1e30), own))

    def _square(self, value: Array, likely: Array) -> float:
        """The mean squared difference in units of the bound, each at most 10**6."""
        ratios = apart(self.name, self.observed, value, likely, self.arithmetic)
        return float(np.square(np.minimum(ratios, 1e6)).mean())


def _slope(size: Array, product: Array) -> tuple[float, float]:
    """Which multiple of an effect there is, and its standard error, from the rows of an array.

    Rows count, not numbers: the mean and the variance of a layer norm are rounded once for a whole
    row, which moves all of it in one direction. With fewer than eight rows nothing can be said.

    Parameters
    ----------
    size, product : (rows,) ndarray
        Of each row the squared effect, and the effect times what was found.
    """
    total = float(size.sum())
    share = float(product.sum()) / total
    if total**2 < LEAST_ROWS * float(np.square(size).sum()):
        return share, math.inf
    return share, float(np.sqrt(np.square(product - share * size).sum())) / total


def _first(name: str, array: Array, *, length: int, short: int) -> Array:
    """What an array is of the first `short` of `length` tokens."""
    axes = AXES[kind_of(name)]
    return array[tuple(slice(short if axis in "NTS" else None) for axis in axes)]


def _begun(chunks: tuple[int, ...], short: int) -> tuple[int, ...]:
    """The passes that read the first tokens."""
    stops = [min(stop, short) for stop in itertools.accumulate(chunks)]
    return tuple(b - a for a, b in itertools.pairwise([0, *stops]) if b > a)


def _largest(array: Array) -> Array:
    """The largest finite absolute value of each row."""
    size = np.abs(np.where(np.isfinite(array), array, 0.0))
    return np.asarray(size.max(-1, keepdims=True))


def _dropout(trial: _Trial) -> Iterator[Explanation]:
    """Numbers that are zero at random, and the others larger by the same factor."""
    observed, right = trial.observed, trial.expected.value
    kept = (observed != 0) & np.isfinite(observed)
    share = 1 - float(kept.mean())
    if not 0 < share < 1:
        return
    with np.errstate(all="ignore"):
        factor = float(np.median(right[kept] / observed[kept]))
        dropped = np.where(kept, right / factor, 0.0)
        likely = trial.expected.bound.likely / factor
    ratio = float(apart(trial.name, observed, dropped, likely, trial.arithmetic).max())
    # One factor was fitted, to within its own rounding.
    if 0.2 < factor < 0.999 and ratio <= 2 * WITHIN:
        why = f"model.eval() forgotten; about {1 - factor:.2f} of the numbers are zero"
        yield Explanation(("dropout left on",), why, True, ratio, 1.0)


def _arithmetics(trial: _Trial) -> Iterator[Explanation]:
    """The most exact of the other arithmetics that the array could come from.

    How it came about cannot be told from the numbers: float16 factors, float16 sums and tf32 all
    leave about 11 bits. Only results that were stored with fewer bits show it.
    """
    own, observed = trial.arithmetic, trial.observed
    coarser = []
    for name, bits in (("float16", 11), ("bfloat16", 8)):
        u = ARITHMETICS[name].u
        if own.u == u and not trial.through:
            coarser.append((f"sums accumulated in {name}", own._replace(sums=u)))
        if max(own.u, own.factors) >= u:
            continue
        stored = bool((rounded(observed.astype(np.float32), name) == observed).all())
        if stored or trial.through:
            words = "results stored as" if stored else "computed in"
            coarser.append((f"{words} {name}", ARITHMETICS[name]))
        else:
            words = f"products or sums in about {bits} bits ({name}{', tf32' * (bits == 11)})"
            finest_first = (
                own._replace(u=u),
                own._replace(factors=u),
                own._replace(u=u, sums=u, factors=u),
            )
            coarser += [(words, each) for each in finest_first]
    for words, other in coarser:
        (again,) = expect(trial.program, [trial.name], trial.given, other)
        ratios = apart(trial.name, observed, again.value, again.bound.likely, other)
        # Far below its bounds, it is finer than that.
        if ratios.max() <= 1 and np.square(ratios).mean() >= LEAST_ROUNDING**2:
            why = "autocast, or a library's default for its matrix unit"
            yield Explanation((words,), why, True, float(ratios.max()), 1.0)
            return
