"""A result as one HTML file, which needs no network and no scripts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

from ..report import Decision, Explanation, Finding, Report
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
from .html_strip import anchor, escape, legend, sign, strip
from .html_style import STYLE
from .words import (
    Unusable,
    config_of,
    how_far,
    numbers,
    of_layer,
    place,
    prose,
    sig,
    through,
    times,
)

__all__ = ["as_html"]

# Nothing but the style inside the page may have an effect, whatever a name in a dump contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

WITHIN = "rounding"


def as_html(reports: Sequence[Report], unusable: Sequence[Unusable] = ()) -> str:
    """Reports as a page.

    Parameters
    ----------
    reports : sequence of Report
    unusable : sequence of Unusable

    Returns
    -------
    str
        A whole HTML document, in UTF-8 when it is written.
    """
    refused = "".join(
        f"<li>{escape(each.source)}: {html.escape(prose(each.reason))}</li>" for each in unusable
    )
    sections = "".join(_section(report, i) for i, report in enumerate(reports, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_title(reports)}</title><style>\n{STYLE}</style></head><body>"
        f"<h1>GPT-2 verification</h1>{_contents(reports)}"
        + (f"<h2>Could not be verified</h2><ul>{refused}</ul>" if unusable else "")
        + f"<main>{sections}</main></body></html>\n"
    )


def _title(reports: Sequence[Report]) -> str:
    if len(reports) == 1:
        return f"{reports[0].verdict.upper()}: {escape(dump_name(reports[0]))}"
    return f"GPT-2 verification of {len(reports)} dumps"


def _contents(reports: Sequence[Report]) -> str:
    """Links to the reports, where there are several."""
    if len(reports) < 2:
        return ""
    links = "".join(
        f'<li><a href="#r{i}">{escape(dump_name(report))}</a>: {report.verdict}</li>'
        for i, report in enumerate(reports, 1)
    )
    return f"<nav><ul>{links}</ul></nav>"


def _section(report: Report, number: int) -> str:
    parts = [
        f'<section id="r{number}"><h2>{escape(dump_name(report))}</h2>',
        _verdict(report),
        "<h3>Layer by operation</h3>",
        f'<a class="skip" href="#r{number}-after">Skip the heat strip</a>',
        legend(),
        strip(report, number),
        f'<div id="r{number}-after"></div>',
        _differences(report, number),
        _consequences(report),
        _provenance(report),
        _within(report, number),
        "</section>",
    ]
    return "\n".join(parts)


# -- parts of a section ------------------------------------------------------------------------


def _verdict(report: Report) -> str:
    """What a reader wants to know first."""
    first, entries = report.first, []
    if first is not None:
        what = ", ".join(filter(None, [first.name, first.operation, of_layer(first.name)]))
        far = f"{how_far(first, report.dump)}, at {place(first, config_of(report))}"
        entries = [
            ("First that differs", what),
            ("Off by", far),
            ("Numbers", numbers(first)),
            ("Cause", cause(first)),
            ("Why", reason(first)),
            ("But", through(first)),
        ]
    elif report.findings:
        entries = [("Largest", largest(report))]
    return (
        f'<div class="verdict {report.verdict}"><p><strong>{report.verdict.upper()}</strong> '
        f"{html.escape(headline(report))}</p>{_definitions(entries)}</div>"
    )


def _differences(report: Report, number: int) -> str:
    """What is not rounding: grouped, then each by itself; and what was tried to explain it."""
    n_layer = config_of(report).get("n_layer")
    grouped = "".join(
        f"<li>{html.escape(sentence(group, report.first, n_layer))}</li>"
        for group in groups(report)
    )
    made = f"<h3>Compared</h3><p>{html.escape(compared(report))}.</p>"
    if not grouped:
        return made
    bad = [finding for finding in report.findings if finding.verdict != WITHIN]
    made += f"<ul>{grouped}</ul>{_findings(bad, report, number)}"
    if report.first is not None and report.first.explanations:
        made += f"<h3>Explanations of {escape(report.first.name)}</h3>"
        made += _explanations(report.first.explanations)
    return made


def _explanations(explanations: Sequence[Explanation]) -> str:
    rows = (
        [
            escape(mistakes(each)),
            "reproduces it" if each.reproduces else "does not",
            _number(times(each.ratio)),
            _bar(each.explained),
            html.escape(prose(each.why)),
        ]
        for each in explanations
    )
    heads = "known mistake", "within rounding", "ratio", "share explained", "how it comes about"
    return _table("What each known mistake would have given, against the dump", heads, rows)


def _bar(share: float) -> str:
    percent = 100 * min(max(share, 0.0), 1.0) if share == share else 0.0
    return (
        f'<span class="bar" aria-hidden="true"><span style="width:{percent:.1f}%"></span></span>'
        f"{100 * share:.3g} %"
    )


def _findings(findings: Sequence[Finding], report: Report, number: int) -> str:
    config = config_of(report)
    heads = (
        "array", "operation", "verdict", "ratio", "error", "bound", "observed", "expected",
        "at", "run freely", "explained by",
    )  # fmt: skip
    rows = (
        [
            f'<span class="name">{escape(each.name)}</span>',
            escape(each.operation),
            each.verdict,
            _number(sign(each)),
            *(
                _number(sig(value, digits))
                for value, digits in [
                    (each.error, 2), (each.bound, 2), (each.observed, 5), (each.expected, 5),
                ]
            ),
            escape(place(each, config)),
            _number(sig(each.free_error, 2)),
            html.escape("; or ".join(mistakes(e) for e in each.explanations if e.reproduces)),
        ]
        for each in findings
    )  # fmt: skip
    ids = [anchor(number, each) for each in findings]
    return _table("Each array at the place of its largest difference", heads, rows, ids)


def _consequences(report: Report) -> str:
    told = html.escape(freely(report).capitalize())
    made = f"<h3>Effect</h3><p>{told}.</p>" if told else ""
    if not report.decisions:
        return made
    made += f"<h3>Greedy tokens</h3><p>{html.escape(greedy(report.decisions).capitalize())}.</p>"
    listed = [each for each in report.decisions if each.verdict != "same"]
    if listed:
        made += _decisions(listed)
    return made


def _decisions(decisions: Sequence[Decision]) -> str:
    heads = "position", "ours", "theirs", "margin (nats)", "bound (nats)", "verdict"
    rows = (
        [
            *(_number(str(number)) for number in each[:3]),
            _number(sig(each.margin, 2)),
            _number(sig(each.bound, 2)),
            each.verdict,
        ]
        for each in decisions
    )
    return _table("Positions where the likeliest token is another one", heads, rows)


def _provenance(report: Report) -> str:
    dump = report.dump
    entries = [
        ("Matched", matched(dump)),
        *(("Left out", prose(name)) for name in dump.unmatched),
        ("Assumed", assumed(dump)),
        *(("Note", prose(note)) for note in dump.notes),
        ("Against", model_name(report)),
    ]
    made = f"<h3>What was compared with what</h3>{_definitions(entries)}"
    if not dump.matches:
        return made
    rows = (
        [
            f'<span class="name">{escape(match.name)}</span>',
            f'<span class="name">{escape(", ".join(match.source))}</span>',
            escape(match.how),
            escape(match.layout),
        ]
        for match in dump.matches
    )
    table = _table("", ("array", "in the file", "matched by", "axes"), rows)
    return f"{made}<details><summary>Every match ({len(dump.matches)})</summary>{table}</details>"


def _within(report: Report, number: int) -> str:
    good = [finding for finding in report.findings if finding.verdict == WITHIN]
    if not good:
        return ""
    table = _findings(good, report, number)
    return f"<details><summary>Within rounding ({len(good)})</summary>{table}</details>"


# -- elements ----------------------------------------------------------------------------------


def _definitions(entries: Iterable[tuple[str, str]]) -> str:
    """A list of labels and texts; what has no text is left out."""
    items = "".join(
        f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in entries if text
    )
    return f"<dl>{items}</dl>" if items else ""


def _number(text: str) -> str:
    """A cell's text, marked as one that stands to the right."""
    return f'<td class="number">{html.escape(text)}</td>'


def _table(
    caption: str, heads: Sequence[str], rows: Iterable[list[str]], ids: Sequence[str] = ()
) -> str:
    """A table whose first column names its rows; cells are HTML."""

    def lines() -> Iterator[str]:
        for i, row in enumerate(rows):
            attribute = f' id="{ids[i]}"' if ids else ""
            first, *rest = row
            cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
            name = first.removeprefix('<td class="number">').removesuffix("</td>")
            yield f'<tr{attribute}><th scope="row">{name}</th>{cells}</tr>'

    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    label = html.escape(caption or heads[0])
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f'<table class="list">{told}<thead><tr>{head}</tr></thead><tbody>{"".join(lines())}'
        "</tbody></table></div>"
    )
