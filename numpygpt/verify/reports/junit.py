"""A result as JUnit XML, which systems for continuous integration show as tests.

Each array that was compared is a test case. The order of elements and the attributes are those
that the strictest schema in use asks for, of Ant's JUnit task; Jenkins' accepts them, too.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from xml.etree import ElementTree

from ...records import plain
from ..report import Finding, Report
from .conclusions import cause, dump_name
from .text import as_text
from .words import Unusable, clean, config_of, how_far, numbers, place, prose, through

__all__ = ["as_junit"]


def as_junit(reports: Sequence[Report], unusable: Sequence[Unusable] = ()) -> str:
    """Reports as an XML document: a suite for each, a test case for each array.

    An array that is not within rounding is a failure of the type ``wrong`` or ``suspicious``; a
    dump that could not be verified is a suite with an error.

    Parameters
    ----------
    reports : sequence of Report
    unusable : sequence of Unusable
    """
    root = ElementTree.Element("testsuites")
    for report in reports:
        suite = _suite(root, dump_name(report), len(report.findings), report.seconds)
        suite.set("failures", str(sum(each.verdict != "rounding" for each in report.findings)))
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in _properties(report).items():
            ElementTree.SubElement(properties, "property", name=name, value=clean(value))
        for finding in report.findings:
            _case(suite, report, finding)
        ElementTree.SubElement(suite, "system-out").text = as_text(report)
        ElementTree.SubElement(suite, "system-err")
    for each in unusable:
        suite = _suite(root, clean(each.source), 1, 0.0)
        suite.set("errors", "1")
        ElementTree.SubElement(suite, "properties")
        case = ElementTree.SubElement(
            suite, "testcase", name="read", classname=_class(each.source), time="0.000"
        )
        reason = prose(each.reason)
        ElementTree.SubElement(case, "error", type="unusable", message=reason).text = reason
        ElementTree.SubElement(suite, "system-out")
        ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{_serialised(root)}\n'


def _suite(root: ElementTree.Element, name: str, tests: int, seconds: float) -> ElementTree.Element:
    now = datetime.datetime.now(datetime.UTC)
    return ElementTree.SubElement(
        root,
        "testsuite",
        name=name or "dump",
        id=str(len(root)),
        package="numpygpt.verify",
        timestamp=now.strftime("%Y-%m-%dT%H:%M:%S"),
        hostname="localhost",
        tests=str(tests),
        failures="0",
        errors="0",
        time=f"{seconds if math.isfinite(seconds) else 0.0:.3f}",
    )


def _case(suite: ElementTree.Element, report: Report, finding: Finding) -> None:
    """A test case; what took how long is not known of a single one."""
    case = ElementTree.SubElement(
        suite, "testcase", name=clean(finding.name), classname=_class(dump_name(report)),
        time="0.000",
    )  # fmt: skip
    if finding.verdict == "rounding":
        return
    message = f"{how_far(finding, report.dump)}: {cause(finding)}"
    lines = [
        f"operation: {clean(finding.operation)}",
        f"place: {place(finding, config_of(report))}",
        f"numbers: {numbers(finding)}",
        f"cause: {cause(finding)}",
        *([f"but: {through(finding)}"] if finding.through else []),
    ]
    failure = ElementTree.SubElement(case, "failure", type=finding.verdict, message=message)
    failure.text = "\n".join(lines)


def _class(name: str) -> str:
    """A dump's name where dots part packages."""
    return f"numpygpt.verify.{clean(name).replace('.', '_') or 'dump'}"


def _properties(report: Report) -> dict[str, str]:
    dump = report.dump
    return {
        "verdict": report.verdict,
        "first": report.first.name if report.first is not None else "",
        "dtype": dump.dtype,
        "weights": dump.weights or dump.dtype,
        "producer": dump.producer,
        "model": str(plain(report.model.get("path")) or ""),
        "model_sha256": str(plain(report.model.get("sha256")) or ""),
    }


def _serialised(root: ElementTree.Element) -> str:
    return ElementTree.tostring(root, encoding="unicode")
