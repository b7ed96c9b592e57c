"""What a result means, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..dump import Dump
from ..report import Decision, Explanation, Finding, Report
from .words import TOLD, clean, config_of, prose, sig, some, times

__all__ = [
    "arithmetic",
    "assumed",
    "cause",
    "compared",
    "dump_name",
    "freely",
    "greedy",
    "headline",
    "largest",
    "matched",
    "mistakes",
    "model_name",
    "reason",
]


def dump_name(report: Report) -> str:
    """What a report is about."""
    name = clean(report.dump.source) or "the candidate"
    return f"{name}, sequence {report.sequence}" if report.sequence else name


def model_name(report: Report) -> str:
    """What it was compared with."""
    config = config_of(report)
    size = ", ".join(
        f"{config[key]} {word}"
        for key, word in {"n_layer": "layers", "n_head": "heads", "n_embd": "channels"}.items()
        if key in config
    )
    name = clean(report.model.get("path") or "the model")
    sha256 = clean(report.model.get("sha256") or "")
    parts = [size, f"sha256 {sha256[:12]}" if sha256 else ""]
    told = "; ".join(part for part in parts if part)
    return f"{name} ({told})" if told else name


def headline(report: Report) -> str:
    """The verdict in a sentence."""
    what, how = dump_name(report), f"the rounding of {arithmetic(report.dump)}"
    match report.verdict:
        case "rounding":
            return f"{what} is GPT-2 within {how}"
        case "suspicious" if report.first is not None and report.first.ratio <= 1:
            return f"{what} is GPT-2 within {how}, but a mistake shows through it"
        case "suspicious":
            return f"{what} is beyond {how}, but not beyond what is conceivable"
        case _:
            return f"{what} is not GPT-2 within {how}"


def arithmetic(dump: Dump) -> str:
    """What was computed in.

    >>> import numpy as np
    >>> arithmetic(Dump(np.array([1]), {}, "float32", "int8"))
    'float32 with int8 weights'
    """
    stored = dump.weights not in (None, dump.dtype)
    return clean(dump.dtype) + (f" with {clean(dump.weights)} weights" if stored else "")


def assumed(dump: Dump) -> str:
    """What the verdict takes for granted."""
    passes = "one pass"
    if len(dump.chunks) > 1:
        passes = (
            f"{len(dump.chunks)} passes with a cache ({some([str(n) for n in dump.chunks], 6)})"
        )
    made = f"; made by {clean(dump.producer)}" if dump.producer else ""
    count = len(dump.ids)
    tokens = f"{count} token{'s' * (count != 1)}"
    return f"computed in {arithmetic(dump)}, {tokens} in {passes}{made}"


def mistakes(explanation: Explanation) -> str:
    """The name of a mistake, or of several that were made together."""
    return " together with ".join(map(clean, explanation.mistakes))


def reason(finding: Finding) -> str:
    """How people come to make the mistake, if it is the only one that explains a finding."""
    exact = [each for each in finding.explanations if each.reproduces]
    return prose(exact[0].why) if len(exact) == 1 else ""


def cause(finding: Finding) -> str:
    """Which known mistakes explain a finding."""
    exact = [each for each in finding.explanations if each.reproduces]
    if exact and finding.ratio <= 1:
        return f"{mistakes(exact[0])}; no number is beyond its bound, but together they show it"
    if len(exact) == 1:
        return f"{mistakes(exact[0])}; this reproduces it within rounding"
    if exact:
        listed = "; or ".join(map(mistakes, exact[:TOLD]))
        listed += f"; or {len(exact) - TOLD} more" if len(exact) > TOLD else ""
        return (
            f"one of {len(exact)} mistakes, each of which reproduces it within rounding: {listed}"
        )
    near = [each for each in finding.explanations if each.explained > 0]
    if not near:
        return "no known mistake explains it"
    share = f"{100 * near[0].explained:.3g} % of the squared difference"
    return f"no known mistake reproduces it; nearest: {mistakes(near[0])}, with {share}"


def compared(report: Report) -> str:
    """How many operations were compared, and how they did."""
    verdicts = [finding.verdict for finding in report.findings]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in ("wrong", "suspicious")]
    counts.append(f"{verdicts.count('rounding')} within rounding")
    many = f"{len(verdicts)} operation{'s' * (len(verdicts) != 1)}"
    return f"{many} in {report.seconds:.1f} s: {', '.join(counts)}"


def freely(report: Report) -> str:
    """What all differences together do to the last array, the logits if they are there."""
    if not report.findings:
        return ""
    last = report.findings[-1]
    what, unit = f"{clean(last.name)} is", ""
    if last.name == "logits":
        what, unit = "the logits are", " nats"
    return (
        f"run freely, {what} off by up to {sig(last.free_error)}{unit}, "
        f"{sig(last.free_relative, 2)} of the largest"
    )


def largest(report: Report) -> str:
    """How near the bound of rounding the worst of all arrays comes."""
    worst = max(report.findings, key=lambda finding: finding.ratio)
    return f"{clean(worst.name)} reaches {times(worst.ratio)} of the bound of rounding"


def greedy(decisions: Sequence[Decision]) -> str:
    """Whether the likeliest tokens are the same, and if not, whether that means anything."""
    ties = [each for each in decisions if each.verdict == "tie within rounding"]
    real = [each for each in decisions if each.verdict == "real"]
    if not ties and not real:
        close = sum(each.margin <= each.bound for each in decisions)
        margin = f"; rounding could turn {close} of them" if close else ""
        one = len(decisions) == 1
        words = "the only greedy token is" if one else f"all {len(decisions)} greedy tokens are"
        return f"{words} the same{margin}"
    parts = []
    for some_, kind in ((ties, "tie{} within rounding"), (real, "real")):
        if not some_:
            parts.append(f"0 {kind.format('s')}")
            continue
        listed = "; ".join(map(_decision, some_[:TOLD]))
        more = f"; and {len(some_) - TOLD} more" if len(some_) > TOLD else ""
        parts.append(f"{len(some_)} {kind.format('s' * (len(some_) != 1))} ({listed}{more})")
    count = len(ties) + len(real)
    verb = "differs" if count == 1 else "differ"
    return f"{count} of {len(decisions)} greedy tokens {verb}: {', '.join(parts)}"


def _decision(decision: Decision) -> str:
    return (
        f"position {decision.position}: margin {sig(decision.margin, 2)} nats, bound "
        f"{sig(decision.bound, 2)}"
    )


def matched(dump: Dump) -> str:
    """How the arrays of a file became those of a dump."""
    if not dump.matches:
        return f"{len(dump.tensors)} arrays by their names"
    ways = {"name": "name", "alias": "alias", "mapping": "the mapping", "values": "their values"}
    counts: dict[str, int] = {}
    for match in dump.matches:
        counts[match.how] = counts.get(match.how, 0) + 1
    parts = [f"{count} by {ways.get(how, clean(how))}" for how, count in counts.items()]
    moved = sum(bool(match.layout) for match in dump.matches)
    split = sum(len(match.source) > 1 for match in dump.matches)
    parts += [f"{moved} with other axes"] * (moved > 0)
    parts += [f"{split} put together from several"] * (split > 0)
    count = len(dump.matches)
    return f"{count} array{'s' * (count != 1)}: {', '.join(parts)}"
