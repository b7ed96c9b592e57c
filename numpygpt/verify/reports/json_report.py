"""A result as one JSON object, for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ...records import plain
from ..report import Finding, Report
from .words import Unusable

__all__ = ["as_json"]

FORMAT, VERSION = "numpygpt-verify", 1


def as_json(reports: Sequence[Report], unusable: Sequence[Unusable] = ()) -> str:
    """Reports as one JSON object on one line.

    It has ``format``, ``format_version``, ``verdict`` (the worst), ``passed``, ``reports``, each
    with the fields of :class:`~numpygpt.verify.report.Report` but the arrays, and ``unusable``,
    the dumps that could not be verified. A number that JSON does not have is one of the texts
    ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float()`` and JavaScript's ``Number()``
    take.

    Parameters
    ----------
    reports : sequence of Report
    unusable : sequence of Unusable
    """
    order = ("rounding", "suspicious", "wrong")
    worst = max((report.verdict for report in reports), key=order.index, default=None)
    made = {
        "format": FORMAT,
        "format_version": VERSION,
        "verdict": worst,
        "passed": worst == "rounding" and not unusable,
        "reports": [_report(report) for report in reports],
        "unusable": [each._asdict() for each in unusable],
    }
    return json.dumps(made, allow_nan=False)


def _report(report: Report) -> dict[str, Any]:
    dump, verdicts = report.dump, [finding.verdict for finding in report.findings]
    return {
        "source": dump.source,
        "sequence": report.sequence,
        "verdict": report.verdict,
        "passed": report.passed,
        "counts": {name: verdicts.count(name) for name in ("rounding", "suspicious", "wrong")},
        "first": report.first.name if report.first is not None else None,
        "model": plain(report.model),
        "dump": {
            "ids": plain(dump.ids),
            "dtype": dump.dtype,
            "weights": dump.weights,
            "chunks": list(dump.chunks),
            "producer": dump.producer,
            "matches": [match._asdict() for match in dump.matches],
            "unmatched": list(dump.unmatched),
            "notes": list(dump.notes),
        },
        "findings": [_finding(finding) for finding in report.findings],
        "decisions": [_spelled(decision._asdict()) for decision in report.decisions],
        "seconds": _number(report.seconds),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    fields = _spelled(finding._asdict())
    fields["explanations"] = [_spelled(each._asdict()) for each in finding.explanations]
    return fields


def _spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with numbers that JSON has."""
    return {
        name: _number(value) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
