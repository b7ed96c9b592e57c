"""What a run's record says: rates, ratios and shares, as a table for the eye and as Markdown.

A record is what :func:`numpygpt.bench.rounds.measure` returns, and what ``--json`` writes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..params import Config
from .cases import KINDS, Case
from .shapes import matrix_bytes, prefill_flops

__all__ = ["Figure", "markdown", "rates", "ratio", "shares", "text", "warnings"]

Record = dict[str, Any]

# Below this share of the bandwidth, something is wrong with the run rather than with the code;
# except that matrices of few bytes take less time to read than Python takes to ask for it.
TOO_SLOW = 0.6
LARGE = 1e8
BUSY = "something else uses the processors, or there are more threads than processors"


class Figure(NamedTuple):
    """Median, least and most over the rounds.

    >>> Figure.of([3.0, 1.0, 2.0, 10.0])
    Figure(median=2.5, least=1.0, most=10.0)
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of one value for each round."""
        return cls(statistics.median(values), min(values), max(values))


# -- arithmetic ------------------------------------------------------------------------------------


def rates(record: Record, contestant: Record, case: str) -> list[float] | None:
    """Tokens per second in each round; for "cold" seconds; None if it was not measured.

    Parameters
    ----------
    record, contestant : dict
        The second is one of the first's ``contestants``.
    case : str
    """
    measured = contestant["cases"].get(case)
    if measured is None:
        return None
    seconds: list[float] = measured["seconds"]
    if case == "cold":
        return seconds
    tokens = Case.named(case).tokens(record["settings"]["steps"])
    return [tokens / each for each in seconds]


def ratio(record: Record, contestant: Record, case: str) -> float | None:
    """How many times as fast the first contestant is: the median of the rounds' ratios."""
    first = record["contestants"][0]["cases"].get(case)
    other = contestant["cases"].get(case)
    if first is None or other is None:
        return None
    pairs = zip(other["seconds"], first["seconds"], strict=True)
    return float(statistics.median(theirs / ours for theirs, ours in pairs))


def shares(record: Record, contestant: Record, case: str) -> dict[str, float]:
    """What part of the machine's limits a case reached: the median of the rounds' shares.

    Parameters
    ----------
    record, contestant : dict
    case : str

    Returns
    -------
    dict of str to float
        ``bandwidth``: bytes of all matrices in float32 per step, over those of a bare sweep.
        ``peak``: floating-point operations per second, over those of one large product.
        Empty where neither limit was measured, or the case was not.
    """
    limits, measured = record["limits"].get(case, {}), contestant["cases"].get(case)
    if measured is None:
        return {}
    config, kind = Config(**record["config"]), Case.named(case)
    if kind.kind == "decode":
        name, work = "bandwidth", record["settings"]["steps"] * matrix_bytes(config)
    else:
        logits = kind.size if kind.kind == "score" else 1
        name, work = "peak", prefill_flops(config, kind.size, logits)
    if name not in limits:
        return {}
    pairs = zip(measured["seconds"], limits[name], strict=True)
    return {name: statistics.median(work / seconds / limit for seconds, limit in pairs)}


def warnings(record: Record) -> list[str]:
    """What makes a run doubtful."""
    found, machine = [], record["machine"]
    if machine["threads"] > machine["processors"]:
        found.append(
            f"{machine['threads']} threads on {machine['processors']} processors wait for each "
            "other"
        )
    if (machine["load"] or 0) > machine["processors"]:
        found.append(
            f"{machine['load']:.1f} processes wanted to run on {machine['processors']} processors "
            "before this began: expect noise"
        )
    first, large = record["contestants"][0], matrix_bytes(Config(**record["config"])) >= LARGE
    for case, limits in record["limits"].items() if large else ():
        share = shares(record, first, case).get("bandwidth", 1.0)
        if share < TOO_SLOW:
            found.append(
                f"{case} reaches only {share:.0%} of the bandwidth measured beside it: {BUSY}"
            )
        if "peak" in limits:
            peak, products = (statistics.median(limits[name]) for name in ("peak", "products"))
            if products < TOO_SLOW * peak:
                found.append(
                    f"{case}: bare products of its shapes reach only {products / peak:.0%} of one "
                    f"large product: {BUSY}"
                )
    return found


# -- cells -----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, or all before the point.

    >>> number(1806.6), number(90.04), number(0.2345)
    ('1807', '90.0', '0.234')
    """
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{1 if value >= 10 else 2}f}"


Cell = Callable[[Record, str], str]


def _cells(record: Record) -> tuple[Cell, Cell, Cell]:
    """What stands in the tables of medians, of ranges and of ratios."""

    def median(contestant: Record, case: str) -> str:
        found = rates(record, contestant, case)
        return "-" if found is None else number(Figure.of(found).median)

    def spread(contestant: Record, case: str) -> str:
        found = rates(record, contestant, case)
        if found is None:
            return "-"
        _, least, most = Figure.of(found)
        return f"{number(least)}-{number(most)}"

    def faster(contestant: Record, case: str) -> str:
        found = ratio(record, contestant, case)
        return "-" if found is None else f"{found:.2f}"

    return median, spread, faster


def _cases(record: Record) -> list[str]:
    return list(record["limits"])


def _rows(record: Record) -> tuple[Record, list[Record]]:
    """The first contestant, and the others of which anything was measured."""
    first, *others = record["contestants"]
    return first, [each for each in others if each["cases"]]


# -- the text --------------------------------------------------------------------------------------


def text(record: Record) -> str:
    """A table to read at a glance, then the limits of the machine."""
    median, spread, faster = _cells(record)
    first, others = _rows(record)
    rounds = record["settings"]["rounds"]
    lines = [*_heading(record), ""]
    lines.append(f"tokens/s, higher is better{_but_cold(record)}; median of {rounds} rounds")
    lines += _columns(record, [first, *others], median)
    if rounds > 1:
        lines += ["", "least to most", *_columns(record, [first, *others], spread)]
    if others:
        lines += ["", f"{first['name']} is so many times as fast as"]
        lines += _columns(record, others, faster)
    lines += ["", "limits of this machine", *_limits(record)]
    lines += ["", "checked", *_checks(record)]
    if "profile" in record:
        lines += ["", *_profile(record["profile"])]
    return "\n".join(lines)


def _but_cold(record: Record) -> str:
    return " (cold: seconds, lower is better)" if "cold" in record["limits"] else ""


def _heading(record: Record) -> list[str]:
    machine = record["machine"]
    return [
        f"{record['model']}: {Config(**record['config']).parameter_count:,} parameters",
        f"{machine['cpu']}, {machine['processors']} processors; "
        f"{machine['threads']} {'threads' if machine['threads'] > 1 else 'thread'}; "
        f"{machine['blas']}, kernel {machine['kernel'] or 'unknown'}",
        f"NumPy {machine['numpy']}, Python {machine['python']}, {machine['system']}; "
        f"{machine['date']}",
    ]


def _columns(record: Record, rows: Sequence[Record], cell: Cell) -> list[str]:
    """Rows of text with columns as wide as what stands in them."""
    table = [["", *_cases(record)]]
    table += [[row["name"], *(cell(row, case) for case in _cases(record))] for row in rows]
    return _aligned(table)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right.

    >>> _aligned([["", "a"], ["row", "12"]])
    ['       a', 'row   12']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "   ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in table
    ]


def _limits(record: Record) -> list[str]:
    """What the machine can do, and what part of that the first contestant reached."""
    first, lines = record["contestants"][0], []
    config = Config(**record["config"])
    for case, limits in record["limits"].items():
        share = shares(record, first, case)
        if "bandwidth" in limits:
            speed = statistics.median(limits["bandwidth"])
            lines.append(
                f"{case}: a bare W @ x for every matrix, laid out as suits it best, reads "
                f"{speed / 1e9:.1f} GB/s, "
                f"{number(speed / matrix_bytes(config))} tokens/s"
                + (f"; reached {share['bandwidth']:.0%}" if share else "")
            )
        if "peak" in limits:
            peak, products = (statistics.median(limits[name]) for name in ("peak", "products"))
            lines.append(
                f"{case}: one large product {peak / 1e9:.0f} GFLOP/s, the products of the blocks "
                f"alone {products / 1e9:.0f} ({products / peak:.0%})"
                + (f"; reached {share['peak']:.0%}" if share else "")
            )
    memory = []
    for contestant in record["contestants"]:
        peaks = [peak for peak in contestant["cases"].get("cold", {}).get("peak", []) if peak]
        memory += [f"{contestant['name']} {max(peaks) / 2**20:.0f}"] if peaks else []
    if memory:
        weights = 4 * config.parameter_count / 2**20
        lines.append(f"cold: MiB at most, weights in float32 {weights:.0f}: {', '.join(memory)}")
    return lines


def _checks(record: Record) -> list[str]:
    """How far each contestant's logits were from float64, and what went wrong."""
    lines = []
    for each in record["contestants"]:
        name = each["name"] + (f" ({each['version']})" if each["version"] else "")
        if each["error"] is not None and each["error"] <= each["bound"]:
            lines.append(
                f"{name}: logits {each['error']:.1e} of their scale from float64, bound "
                f"{each['bound']:.0e} ({each['bound_reason']})"
            )
        out = "" if each["cases"] else "left out: "
        lines += [f"{each['name']}: {out}{note}" for note in each["notes"]]
    if record.get("missing"):
        lines.append(f"not installed here: {', '.join(record['missing'])}")
    return lines


def _profile(profile: Record) -> list[str]:
    lines: list[str] = []
    for title, section in (("a decode step", "decode"), ("a prefill", "prefill")):
        part = profile[section]
        where = "after" if section == "decode" else "of"
        lines += [
            *([""] if lines else []),
            f"where the time of {title} goes ({where} {part['rows']} tokens, {profile['dtype']}), "
            "ms, and the least that this machine needs",
        ]
        lines += _aligned(_operations(part["operations"]))
    return lines


def _operations(operations: Sequence[Record]) -> list[list[str]]:
    """Rows of operations, and their sum."""
    total = sum(each["seconds"] for each in operations)
    least = sum(each["bound"] for each in operations)
    rows = [["", "ms", "part", "least", "reached"]]
    for name, seconds, bound in [
        *((each["name"], each["seconds"], each["bound"]) for each in operations),
        ("all", total, least),
    ]:
        reached = f"{bound / seconds:.0%}" if seconds > 0 and bound > 0 else "-"
        part = f"{seconds / total:.0%}"
        rows.append([name, f"{1e3 * seconds:.3f}", part, f"{1e3 * bound:.3f}", reached])
    return rows


# -- Markdown --------------------------------------------------------------------------------------


def markdown(record: Record, command: str) -> str:
    """The page that is kept: machine, figures, ratios, limits, and how to repeat it.

    Parameters
    ----------
    record : dict
    command : str
        What was run.
    """
    median, spread, faster = _cells(record)
    first, others = _rows(record)
    settings = record["settings"]

    def both(contestant: Record, case: str) -> str:
        most = spread(contestant, case)
        return median(contestant, case) + (f" ({most})" if settings["rounds"] > 1 else "")

    lines = [
        f"# Benchmark of {record['machine']['date']}: {record['model']}",
        "",
        *(f"- {line}" for line in _heading(record)[1:]),
        f"- {settings['rounds']} rounds in which all take turns, {settings['steps']} new tokens",
        "",
        f"## Tokens per second{_but_cold(record)}",
        "",
        "Median, and least to most of the rounds." if settings["rounds"] > 1 else "One round.",
        "",
        *_grid(record, [first, *others], both),
        "",
        *(f"- {case}: {KINDS[Case.named(case).kind]}" for case in _one_of_each(record)),
    ]
    if others:
        lines += ["", f"## {first['name']} is so many times as fast as", ""]
        lines += _grid(record, others, faster)
    lines += ["", "## Limits of the machine, in the same rounds", ""]
    lines += [f"- {line}" for line in _limits(record)]
    lines += ["", "## Checked before anything was timed", ""]
    lines += [f"- {line}" for line in _checks(record)]
    if "profile" in record:
        lines += ["", "## By operation", "", "```text", *_profile(record["profile"]), "```"]
    lines += ["", "## To repeat it", "", "```sh", command, "```", ""]
    return "\n".join(lines)


def _grid(record: Record, rows: Sequence[Record], cell: Cell) -> list[str]:
    cases = _cases(record)
    lines = [f"| | {' | '.join(cases)} |", f"|---|{'--:|' * len(cases)}"]
    for row in rows:
        lines.append(f"| {row['name']} | {' | '.join(cell(row, case) for case in cases)} |")
    return lines


def _one_of_each(record: Record) -> list[str]:
    """The first case of each kind."""
    found: dict[str, str] = {}
    for case in _cases(record):
        found.setdefault(Case.named(case).kind, case)
    return list(found.values())
