"""What is wrong in many layers in the same way is said once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..operations import kind_of, layer_of
from ..report import Finding, Report
from .conclusions import mistakes
from .words import intervals, times

__all__ = ["Group", "groups", "part_of", "sentence"]


class Group(NamedTuple):
    """An operation that is not within rounding somewhere.

    Attributes
    ----------
    part : str
        Its trace key without the layer, such as ``"mlp.post"``.
    findings : tuple of Finding
        Those beyond rounding, in the order of execution.
    compared : int
        In how many layers the dump has this array.
    """

    part: str
    findings: tuple[Finding, ...]
    compared: int


def part_of(name: str) -> str:
    """A trace key without its layer.

    >>> part_of("h.11.mlp.post"), part_of("logits")
    ('mlp.post', 'logits')
    """
    return kind_of(name).removeprefix("h.{i}.")


def groups(report: Report) -> list[Group]:
    """The operations that are not within rounding, in the order in which they are met first."""
    everywhere = [part_of(finding.name) for finding in report.findings]
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        if finding.verdict != "rounding":
            found.setdefault(part_of(finding.name), []).append(finding)
    return [
        Group(part, tuple(findings), everywhere.count(part)) for part, findings in found.items()
    ]


def sentence(group: Group, first: Finding | None, n_layer: int | None) -> str:
    """What is wrong with an operation, how far, and why.

    Parameters
    ----------
    group : Group
    first : Finding or None
        The first that is not rounding, whose explanation was told already.
    n_layer : int or None
        How many layers the model has, if that is known.
    """
    verdicts = [
        f"{verdict}{_layers(bad, group, n_layer)}"
        for verdict in ("wrong", "suspicious")
        if (bad := [each for each in group.findings if each.verdict == verdict])
    ]
    low, high = (times(pick(each.ratio for each in group.findings)) for pick in (min, max))
    ratio = low if low == high else f"{low} to {high}"
    return f"{group.part}: {', '.join(verdicts)}, ratio {ratio}{_cause(group.findings, first)}"


def _layers(bad: Sequence[Finding], group: Group, n_layer: int | None) -> str:
    layers = [layer_of(finding.name) for finding in bad]
    if layers[0] < 0:
        return ""
    if len(layers) == group.compared > 1:
        whole = "" if len(layers) == n_layer else " that the dump has"
        return f" in all {len(layers)} layers{whole}"
    return f" in layer{'s' * (len(layers) > 1)} {intervals(layers)}"


def _cause(findings: Sequence[Finding], first: Finding | None) -> str:
    """Which mistakes explain the findings of a group; nothing where the first stands alone."""
    told = _exact(first) if first is not None else ()
    causes: dict[tuple[str, ...], list[int]] = {}
    for finding in findings:
        causes.setdefault(_exact(finding), []).append(layer_of(finding.name))
    if causes.keys() == {told}:
        if len(findings) == 1 and findings[0] is first:
            return ""
        return ", the same explanation" if told else ", no known mistake"
    parts = []
    for names, layers in causes.items():
        words = " or ".join(names) if names else "no known mistake"
        if names and names == told:
            words = "the same explanation"
        where = f" in {intervals(layers)}" if len(causes) > 1 else ""
        parts.append(words + where)
    return ", " + "; ".join(parts)


def _exact(finding: Finding) -> tuple[str, ...]:
    """The mistakes that reproduce a finding."""
    return tuple(mistakes(each) for each in finding.explanations if each.reproduces)
