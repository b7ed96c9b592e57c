"""Does the verification find mistakes, and only mistakes? Make them in other programs, and ask.

Every mistake of ``tests/implementations`` is made in every program there and in numpygpt itself, in
every dtype, with several checkpoints and kinds of dumps. What the mistake is, is known; the tables
say how often the verification found it, found its place and named it. Programs without a mistake
must raise no alarm. Needs PyTorch and transformers, and half an hour on two cores:

    python scripts/mutation_benchmark.py --markdown scripts/mutation-results.md

``--quick`` makes a tenth of it, ``--help`` says what else there is.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mutations  # noqa: E402
from mutations import DUMPED, SOME, SUBJECTS  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt.verify.operations import OPERATIONS, kind_of  # noqa: E402

# Checkpoint, number of tokens, kinds of dumps, and which mistakes: all, or these.
GRID = [
    ("nano", 8, tuple(DUMPED), ()),
    ("wide", 24, ("everything",), ()),
    ("wide", 24, ("hidden states", "logits"), SOME),
    ("odd", 13, ("everything",), SOME),
    ("odd", 5, tuple(DUMPED), SOME),
    ("wide", 48, ("everything",), SOME),
    ("outliers", 17, tuple(DUMPED), SOME),
    ("shakespeare", 24, ("everything", "logits"), SOME),
]
QUICK = [("nano", 8, ("everything", "hidden states"), ()), ("wide", 24, ("logits",), SOME)]


class Record(NamedTuple):
    """An answer about one mistake, in words and numbers."""

    subject: str
    dtype: str
    checkpoint: str
    kind: str
    mistake: str
    effect: float
    visible: float
    detected: bool
    located: bool
    named: bool
    among: bool
    first: str
    ratio: float
    said: str


class Run(NamedTuple):
    """An answer about a program without a mistake."""

    subject: str
    dtype: str
    seed: int
    kind: str
    verdict: str
    first: str
    ratios: dict[str, float]


# -- work for several processes -------------------------------------------------------------------


def prepared() -> None:
    """Each process on one thread, and without warnings about numbers that are meant to be bad."""
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


def wrong(task: tuple[str, str, tuple[Any, ...]]) -> list[Record]:
    """All mistakes of one program in one dtype on one checkpoint."""
    subject, dtype, (name, length, kinds, only) = task
    records = []
    for mistake in SUBJECTS[subject].mistakes:
        if only and mistake not in only:
            continue
        for where in mutations.situations(mistake, [name], length):
            if not mutations.can_make(subject, dtype, mistake, where):
                continue
            for kind, answer in mutations.judge(subject, dtype, where, mistake, kinds):
                first = answer.report.first
                said = first.explanations[0].mistakes if first and first.explanations else ()
                records.append(
                    Record(
                        subject, dtype, f"{name} T={length}", kind, mistake, *answer[:6],
                        first.name if first else "", first.ratio if first else 0.0,
                        " + ".join(said),
                    )
                )  # fmt: skip
    return records


def right(task: tuple[str, str, int, int]) -> list[Run]:
    """Correct runs of one program in one dtype."""
    subject, dtype, first, stop = task
    runs = []
    for seed in range(first, stop):
        for kind, report in mutations.right_answers(subject, dtype, seed):
            ratios: dict[str, float] = {}
            for finding in report.findings:
                row = kind_of(finding.name)
                ratios[row] = max(ratios.get(row, 0.0), finding.ratio)
            bad = report.first.name if report.first else ""
            runs.append(Run(subject, dtype, seed, kind, report.verdict, bad, ratios))
    return runs


def together(pair: Any) -> tuple[str, bool, bool, bool, str]:
    """Two mistakes at once."""
    answer = mutations.judge_pair(mutations.Both(*pair))
    first = answer.report.first
    said = first.explanations[0].mistakes if first and first.explanations else ()
    words = f"{first.name}: {' + '.join(said)}" if first else "nothing"
    return " and ".join(pair), answer.together, answer.located, answer.named, words


# -- tables ---------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def share(true: int, of: int) -> str:
    """`96 % (48 of 50)`, or a dash."""
    if not of:
        return "-"
    return "100 %" if true == of else f"{100 * true / of:.1f} % ({true} of {of})"


def rates(records: list[Record]) -> list[object]:
    """The columns of one row of the main table."""
    shown = [each for each in records if each.effect > 1]
    small = [each for each in records if each.effect <= 1]
    return [
        len(records),
        len(shown),
        share(sum(each.detected for each in shown), len(shown)),
        share(sum(each.located for each in shown), len(shown)),
        share(sum(each.named for each in shown), len(shown)),
        share(sum(each.among for each in shown), len(shown)),
        f"{sum(each.detected for each in small)} of {len(small)}",
    ]


COLUMNS = ("made", "beyond the bound", "detected", "located", "named first", "among those named",
           "found of the others")  # fmt: skip


def main_tables(records: list[Record]) -> Iterator[str]:
    """By kind of dump, by program and dtype, by checkpoint."""
    for title, keys in (
        ("Kind of dump", ("kind",)),
        ("Program", ("kind", "subject", "dtype")),
        ("Checkpoint", ("kind", "checkpoint")),
    ):
        groups: dict[tuple[str, ...], list[Record]] = collections.defaultdict(list)
        for record in records:
            groups[tuple(getattr(record, key) for key in keys)].append(record)
        rows = [[*key, *rates(group)] for key, group in groups.items()]
        rows.sort(key=lambda row: list(DUMPED).index(str(row[0])))
        yield f"## {title}\n\n" + table([*keys, *COLUMNS], rows)


def grouped(records: Iterable[Record]) -> str:
    """Records of one mistake and one outcome in one line."""
    groups: dict[tuple[str, ...], list[Record]] = collections.defaultdict(list)
    for each in records:
        first = kind_of(each.first) if each.first else ""
        groups[each.kind, each.mistake, first, each.said].append(each)
    rows = []
    for (kind, mistake, first, said), group in sorted(groups.items()):
        where = sorted({f"{each.subject} {each.dtype} ({each.checkpoint})" for each in group})
        low, high = (f"{f(each.effect for each in group):.2g}" for f in (min, max))
        shown = "; ".join(where[:3]) + (f"; and {len(where) - 3} more" if len(where) > 3 else "")
        rows.append([kind, mistake, f"{low} to {high}", first or "-", said or "-", shown])
    head = ("dump", "mistake", "effect in bounds", "first", "said", "where")
    return table(head, rows) if rows else "None."


def exempt(records: list[Record]) -> str:
    """The mistakes whose effect is within the bound, by dtype and kind of dump."""
    groups: dict[tuple[str, str], dict[str, int]] = collections.defaultdict(collections.Counter)
    for each in records:
        if each.effect <= 1:
            groups[each.kind, each.dtype][each.mistake] += 1
    rows = [
        [kind, dtype, ", ".join(f"{name} {n}" for name, n in sorted(names.items()))]
        for (kind, dtype), names in sorted(groups.items())
    ]
    return table(("dump", "dtype", "mistakes, and how often"), rows)


def alarms(runs: list[Run]) -> Iterator[str]:
    """How often a correct program was called wrong, and how near it came."""
    rows = []
    for kind in DUMPED:
        of_kind = [run for run in runs if run.kind == kind]
        bad = [run for run in of_kind if run.verdict != "rounding"]
        rows.append([kind, len(of_kind), len(bad)])
    yield "## False alarms\n\n" + table(("dump", "correct runs", "not called rounding"), rows)
    bad = [run for run in runs if run.verdict != "rounding"]
    if bad:
        yield "Called otherwise:\n\n" + "\n".join(
            f"- {run.subject} {run.dtype}, seed {run.seed}, {run.kind}: "
            f"{run.verdict} at {run.first}"
            for run in bad
        )
    # Our own storages compute in float32, whatever the matrices are stored as.
    most: dict[tuple[str, str], float] = collections.defaultdict(float)
    for run in (run for run in runs if run.kind == "everything"):
        column = f"numpygpt {run.dtype}" if run.subject == "numpygpt" else run.dtype
        for row, ratio in run.ratios.items():
            most[row, column] = max(most[row, column], ratio)
    columns = list(dict.fromkeys(column for _, column in most))
    rows = [[f"`{row}`", *(f"{most[row, each]:.2f}" for each in columns)] for row in OPERATIONS]
    yield (
        "The largest difference of correct runs, in units of the bound. (What is one rounding, "
        "such as a sum, may reach 1 and never exceeds it.)\n\n"
        + table(("operation", *columns), rows)
    )


def pair_table(answers: list[tuple[str, bool, bool, bool, str]]) -> str:
    """Two mistakes at once."""
    rows = []
    for meeting, words in ((True, "in one operation"), (False, "in two operations")):
        of = [each for each in answers if each[1] is meeting]
        located, named = (share(sum(each[n] for each in of), len(of)) for n in (2, 3))
        rows.append([words, len(of), located, named])
    lines = [f"- {each[0]}: {each[4]}" for each in answers if not each[3]]
    return (
        "## Two mistakes at once\n\n"
        "In the NumPy port, in float32. Named: both, and nothing else first.\n\n"
        + table(("pairs", "made", "located", "both named"), rows)
        + ("\n\nNot named:\n\n" + "\n".join(lines) if lines else "")
    )


def heading(arguments: argparse.Namespace, seconds: float) -> str:
    """Where, when and with what."""
    versions = [f"numpygpt {numpygpt.__version__}", f"Python {platform.python_version()}"]
    for name in ("numpy", "torch", "transformers"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    quick = " (--quick)" if arguments.quick else ""
    return (
        "# Mutation benchmark\n\n"
        f"Made by `scripts/mutation_benchmark.py`{quick} on {datetime.date.today()} in "
        f"{seconds / 60:.0f} minutes, with {', '.join(versions)}.\n\n"
        "*Beyond the bound*: in float64 the mistake makes a difference of more than the "
        "verification's bound for the dtype, somewhere in the dump, so that it must be found. "
        "*Located*: the first finding is where the mistake is made, or, where arrays are left out, "
        "the first array after it. *Named first*: the best explanation is the mistake alone. "
        "*Among those named*: it is one of the explanations that reproduce the array; several do "
        "where several mistakes come to the same. *Found of the others*: found although the effect "
        "is within the bound."
    )


def report(
    arguments: argparse.Namespace,
    records: list[Record],
    runs: list[Run],
    answers: list[Any],
    seconds: float,
) -> str:
    """The whole file."""
    shown = [each for each in records if each.effect > 1]
    plain = [each for each in records if each.visible > 4 and not each.detected]
    return "\n\n".join(
        [
            heading(arguments, seconds),
            *main_tables(records),
            "## Beyond the bound, but not detected or not located\n\n"
            + grouped(each for each in shown if not (each.detected and each.located)),
            "## Beyond the bound, but not named first\n\n"
            + grouped(each for each in shown if each.located and not each.named),
            "## Not detected, though the effect is more than four times the rounding\n\n"
            "By another measure, which knows no bounds: the mistaken program against the right one "
            "in the same dtype, at the first array that differs, over the right one's rounding "
            "there.\n\n" + grouped(plain),
            "## Within the bound\n\n" + exempt(records),
            *alarms(runs),
            pair_table(answers),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--programs", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--dtypes", nargs="+", help="only these")
    parser.add_argument("--runs", type=int, help="correct runs (default: 1050, quick 105)")
    parser.add_argument("--pairs", type=int, help="two mistakes at once (default: 50, quick 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the tables there, too")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    each = [
        (name, dtype)
        for name in arguments.programs
        for dtype in SUBJECTS[name].dtypes
        if not arguments.dtypes or dtype in arguments.dtypes
    ]
    grid = QUICK if arguments.quick else GRID
    count = arguments.runs or (105 if arguments.quick else 1050)
    share_of = -(-count // len(each))
    step = 5
    prepared()
    with concurrent.futures.ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), prepared
    ) as pool:
        made = [pool.submit(wrong, (*one, row)) for row in grid for one in each]
        seeds = [(first, min(first + step, share_of)) for first in range(0, share_of, step)]
        clean = [
            pool.submit(right, (*one, n * share_of + a, n * share_of + b))
            for n, one in enumerate(each)
            for a, b in seeds
        ]
        sample = mutations.pairs(arguments.pairs or (10 if arguments.quick else 50))
        paired = [pool.submit(together, pair.parts) for pair in sample]
        records, runs, answers = collect(made), collect(clean), [one.result() for one in paired]
    text = report(arguments, records, runs, answers, time.perf_counter() - start)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    return 0


def collect(tasks: list[Any]) -> list[Any]:
    """Their results in order; says how far it is."""
    results: list[Any] = []
    for done, task in enumerate(tasks):
        results += task.result()
        print(f"\r{done + 1} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


if __name__ == "__main__":
    sys.exit(main())
