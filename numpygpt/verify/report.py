"""What a verification found, as data; :mod:`numpygpt.verify.reports` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from .dump import Dump

__all__ = ["Decision", "Explanation", "Finding", "Report", "Verdict"]

Verdict: TypeAlias = Literal["rounding", "suspicious", "wrong"]


class Explanation(NamedTuple):
    """One or two known mistakes, and how well they account for what was found.

    Attributes
    ----------
    mistakes : tuple of str
        Names in the gallery, such as ``"exact (erf) GELU instead of gelu_new"``.
    why : str
        How people come to make them.
    reproduces : bool
        Whether the array is what the mistake gives, within rounding.
    ratio : float
        The largest difference from what the mistake gives, as a multiple of its bound.
    explained : float
        The share of the squared difference (in units of the bound) that goes away: 1 is all.
    """

    mistakes: tuple[str, ...]
    why: str
    reproduces: bool
    ratio: float
    explained: float


class Finding(NamedTuple):
    """One array of a dump against what GPT-2 makes of the dump's own arrays before it.

    Attributes
    ----------
    name : str
        Trace key.
    operation : str
        What makes it, such as ``"activation gelu_new"``.
    inputs : tuple of str
        What it was computed from: arrays of the dump, or ``"ids"``.
    through : tuple of str
        Intermediates between the inputs and this array, which the dump does not hold.
    verdict : {"rounding", "suspicious", "wrong"}
        Within the bound; beyond it, but not beyond what the worst order of rounding could
        reach; beyond that, or just what a known mistake gives. Suspicious, too, are numbers
        within their bounds that lie along a known mistake.
    ratio : float
        The largest difference, as a multiple of the bound at its place. inf for NaN.
    ceiling : float
        The multiple of the bound up to which rounding is conceivable; at least 1.
    error, bound : float
        Difference and bound at that place.
    where : tuple of int
        That place.
    observed, expected : float
        The numbers there.
    free_error : float
        Free-running: the largest difference from our own float64 run, inherited errors included.
    free_relative : float
        The same as a fraction of the largest number of the array.
    explanations : tuple of Explanation
        Of what is not rounding, the best first.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    through: tuple[str, ...]
    verdict: Verdict
    ratio: float
    ceiling: float
    error: float
    bound: float
    where: tuple[int, ...]
    observed: float
    expected: float
    free_error: float
    free_relative: float
    explanations: tuple[Explanation, ...] = ()


class Decision(NamedTuple):
    """Whether the likeliest next token at a position is decided by more than rounding.

    Attributes
    ----------
    position : int
    ours, theirs : int
        The likeliest token in float64, and in the dump.
    margin : float
        How far ours is ahead of theirs (of the second, where they agree), in nats.
    bound : float
        By how much rounding can move that margin, in nats.
    verdict : {"same", "tie within rounding", "real"}
    """

    position: int
    ours: int
    theirs: int
    margin: float
    bound: float
    verdict: Literal["same", "tie within rounding", "real"]


@dataclass(frozen=True, eq=False)
class Report:
    """The result of :func:`numpygpt.verify.verify`.

    Attributes
    ----------
    dump : Dump
    model : dict
        ``path``, ``sha256``, ``config``: what it was compared with.
    sequence : int
        Which of the file's sequences.
    verdict : {"rounding", "suspicious", "wrong"}
        The worst of the findings'.
    findings : tuple of Finding
        In the order of execution.
    first : Finding or None
        The first that is not rounding.
    decisions : tuple of Decision
        One for each position, if the dump has logits.
    seconds : float
    """

    dump: Dump
    model: dict[str, Any]
    sequence: int
    verdict: Verdict
    findings: tuple[Finding, ...]
    first: Finding | None
    decisions: tuple[Decision, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every array is GPT-2's within rounding."""
        return self.verdict == "rounding"
