"""The heat strip: a row for each layer, a column for each operation, the ratio in each cell."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from ...plans import INTERMEDIATES
from ..operations import layer_of
from ..report import Finding, Report
from .conclusions import cause
from .groups import part_of
from .words import clean, config_of, how_far, numbers, place, short, through

__all__ = ["anchor", "escape", "legend", "sign", "strip"]

PARTS = [part_of(row.name) for row in INTERMEDIATES if row.name.startswith("h.")]
NAMES = [row.name for row in INTERMEDIATES]
BEFORE = NAMES[: NAMES.index("h.{i}.resid_pre")]
AFTER = NAMES[NAMES.index("h.{i}.resid_post") + 1 :]

# A wrong cell's class says how far it is: up to these multiples of the bound.
WRONG = (10.0, 100.0, 10_000.0)
ROUNDING = (0.1, 0.5)

# What tells verdicts apart without colours.
SIGNS = {"rounding": "", "suspicious": "?", "wrong": "!"}

LEGEND = (
    ("r0", "up to 0.1"),
    ("r1", "0.5"),
    ("r2", "1: rounding"),
    ("s", "? suspicious"),
    ("w0", "! wrong, up to 10"),
    ("w1", "! 100"),
    ("w2", "! 10,000"),
    ("w3", "! more"),
)


def escape(text: object) -> str:
    """A name from anywhere, as part of a page.

    >>> escape("<b>")
    '&lt;b&gt;'
    """
    return html.escape(clean(text))


def anchor(number: int, finding: Finding) -> str:
    """The id of a finding's row in the table, ready for an attribute."""
    return escape(f"r{number}-{finding.name}")


def sign(finding: Finding) -> str:
    """A ratio, and its verdict without words."""
    return f"{short(finding.ratio)}{SIGNS[finding.verdict]}"


def legend() -> str:
    """What the colours and signs mean."""
    items = "".join(f'<li class="{kind}">{text}</li>' for kind, text in LEGEND)
    return (
        f'<ul class="legend" aria-label="Meaning of the colours and signs">{items}'
        '<li class="first">first that is not rounding</li></ul>'
    )


def strip(report: Report, number: int) -> str:
    """The strip of a report as a table."""
    found = {finding.name: finding for finding in report.findings}
    layers = max((layer_of(name) for name in found), default=-1) + 1
    layers = max(layers, config_of(report).get("n_layer") or 0)
    heads = "".join(f'<th scope="col"><span>{escape(part)}</span></th>' for part in PARTS)
    rows = [
        *_whole_rows(BEFORE, found, report, number),
        *(
            f'<tr><th scope="row">layer {i}</th>'
            + "".join(_cell(found.get(f"h.{i}.{part}"), report, number) for part in PARTS)
            + "</tr>"
            for i in range(layers)
        ),
        *_whole_rows(AFTER, found, report, number),
    ]
    return (
        f'<p class="quiet" id="r{number}-strip">The largest difference of each array, as a '
        f"multiple of the rounding that {escape(report.dump.dtype)} allows; &middot; is not in the "
        f'dump.</p><div class="scroll" role="region" tabindex="0" aria-label="Heat strip">'
        f'<table class="strip" aria-describedby="r{number}-strip"><thead><tr><td></td>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _whole_rows(
    names: list[str], found: dict[str, Finding], report: Report, number: int
) -> Iterator[str]:
    """What belongs to no layer fills a row."""
    for name in names:
        cell = _cell(found.get(name), report, number, f' colspan="{len(PARTS)}"')
        yield f'<tr><th scope="row">{escape(name)}</th>{cell}</tr>'


def _cell(finding: Finding | None, report: Report, number: int, span: str = "") -> str:
    if finding is None:
        return f'<td{span} class="none" title="not in the dump">&middot;</td>'
    kind, name = _class(finding), escape(finding.name)
    if finding.verdict == "rounding":
        title = f"{name}: {escape(finding.operation)}, {sign(finding)} of the bound"
        return f'<td{span} class="{kind}" title="{title}"><span>{sign(finding)}</span></td>'
    first = " first" if finding is report.first else ""
    return (
        f'<td{span} class="{kind}{first}"><a href="#{anchor(number, finding)}">{sign(finding)}'
        f"{_tip(finding, report)}</a></td>"
    )


def _tip(finding: Finding, report: Report) -> str:
    """What is shown of a cell while it is pointed at or has the focus."""
    lines = [
        f"{finding.verdict}: {how_far(finding, report.dump)}",
        f"at {place(finding, config_of(report))}",
        numbers(finding),
        cause(finding),
        through(finding),
    ]
    told = "".join(f"<i>{html.escape(line)}</i>" for line in lines if line)
    return (
        f'<span class="tip"><b>{escape(finding.name)}: {escape(finding.operation)}</b>{told}</span>'
    )


def _class(finding: Finding) -> str:
    if finding.verdict == "rounding":
        return f"r{sum(finding.ratio > limit for limit in ROUNDING)}"
    if finding.verdict == "suspicious":
        return "s"
    ratio = math.inf if math.isnan(finding.ratio) else finding.ratio
    return f"w{sum(ratio > limit for limit in WRONG)}"
