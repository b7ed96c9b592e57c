"""A report to read: the verdict, the first operation that differs and why, then everything else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ..report import Finding, Report
from .conclusions import (
    assumed,
    cause,
    compared,
    dump_name,
    freely,
    greedy,
    headline,
    largest,
    matched,
    mistakes,
    model_name,
    reason,
)
from .groups import groups, sentence
from .words import clean, config_of, how_far, numbers, of_layer, place, prose, some, through, times

__all__ = ["as_text"]

WIDTH = 80
LABEL = 10

# Bold, on the terminal's own green, yellow and red.
COLOURS = {"rounding": "\x1b[1;32m", "suspicious": "\x1b[1;33m", "wrong": "\x1b[1;31m"}
RESET = "\x1b[0m"


def as_text(report: Report, verbose: bool = False, colour: bool = False) -> str:
    """A report on lines of at most 80 columns.

    Parameters
    ----------
    report : Report
    verbose : bool
        With every finding, every explanation and every match.
    colour : bool
        The verdict in the colours of a terminal.

    Returns
    -------
    str
        Without a newline at its end.
    """
    lines = [line for label, text in _entries(report) for line in _entry(label, text)]
    if verbose:
        lines += ["", *_details(report)]
    if colour:
        word = report.verdict.upper()
        lines[0] = lines[0].replace(word, COLOURS[report.verdict] + word + RESET, 1)
    return "\n".join(lines)


def _entries(report: Report) -> Iterator[tuple[str, str]]:
    """What is said, each with its label; an empty label goes on with the one before."""
    config, first = config_of(report), report.first
    # The verdict stands where the labels do, and may be wider.
    yield report.verdict.upper(), headline(report)
    if first is not None:
        yield "first", ", ".join(filter(None, [first.name, first.operation, of_layer(first.name)]))
        yield "off by", f"{how_far(first, report.dump)}, at {place(first, config)}"
        yield "", numbers(first)
        yield "cause", cause(first)
        yield "", reason(first)
        yield "but", through(first)
    elif report.findings:
        yield "largest", largest(report)
    yield "compared", compared(report)
    for group in groups(report):
        yield "", sentence(group, first, config.get("n_layer"))
    yield "effect", freely(report)
    if report.decisions:
        yield "greedy", greedy(report.decisions)
    yield "matched", matched(report.dump)
    yield "left out", some([prose(name) for name in report.dump.unmatched])
    yield "assumed", assumed(report.dump)
    for note in report.dump.notes:
        yield "", prose(note)
    yield "against", model_name(report)


def _entry(label: str, text: str) -> list[str]:
    """A label and its text on lines; nothing for no text."""
    lead = label.ljust(LABEL) if len(label) < LABEL else f"{label}  "
    return _wrapped(text, lead, " " * LABEL)


def _wrapped(text: str, lead: str, margin: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=lead, subsequent_indent=margin, break_on_hyphens=False
    )


# -- everything --------------------------------------------------------------------------------


def _details(report: Report) -> Iterator[str]:
    yield f"every operation of {dump_name(report)}"[:WIDTH]
    columns = "name", "verdict", "ratio", "error", "free", "where"
    yield _row(*columns).rstrip()
    for finding in report.findings:
        yield _row(
            finding.name,
            finding.verdict,
            times(finding.ratio),
            f"{finding.error:.2g}",
            f"{finding.free_error:.2g}",
            str(finding.where),
        )
    for finding in report.findings:
        yield from _explanations(finding)
    if report.dump.matches:
        yield ""
        yield "every match"
        for match in report.dump.matches:
            source = ", ".join(map(clean, match.source))
            layout = f", {clean(match.layout)}" if match.layout else ""
            text = f"{match.name} <- {source} (by {clean(match.how)}{layout})"
            yield from _wrapped(text, "  ", " " * 6)
    if report.dump.unmatched:
        yield ""
        yield "left out"
        for name in report.dump.unmatched:
            yield from _wrapped(prose(name), "  ", " " * 6)


def _row(name: str, verdict: str, ratio: str, error: str, free: str, where: str) -> str:
    return f"{name:<17} {verdict:<10} {ratio:>8} {error:>8} {free:>8}  {where}"


def _explanations(finding: Finding) -> Iterator[str]:
    """What was tried on a finding that is not rounding."""
    if finding.verdict == "rounding" or not finding.explanations:
        return
    yield ""
    yield f"explanations of {finding.name}"
    for each in finding.explanations:
        how = "reproduces it" if each.reproduces else "does not reproduce it"
        text = (
            f"{mistakes(each)}: {how}, ratio {times(each.ratio)}, explains "
            f"{100 * each.explained:.3g} %. {prose(each.why)}"
        )
        yield from _wrapped(text, "  ", " " * 6)
