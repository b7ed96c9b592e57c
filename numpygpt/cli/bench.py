"""``numpygpt bench``: how fast it is here, beside the machine's limits and other libraries."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..bench import report
from ..bench.cases import DEFAULT, Case, fitting
from ..bench.contestant import Contestant, find, known, missing
from ..bench.machine import processors
from ..bench.rounds import Settings, measure
from ..bench.shapes import SIZES, write_random_checkpoint
from ..checkpoints.atomic import new_file, require_absent, require_room
from ..checkpoints.config import read_config
from ..convert import convert
from ..errors import ArgumentError, MissingPackageError, OutputError
from ..threads import blas, get_threads
from .options import DEFAULT_DTYPE, whole
from .terminal import tell

__all__ = ["add", "run"]

OURS = {
    "float32": "numpygpt",
    "bfloat16": "numpygpt bfloat16",
    "int8": "numpygpt int8",
    "float64": "numpygpt float64",
}

EXAMPLES = """\
examples:
  numpygpt bench                                        # random weights of GPT-2's smallest shape
  numpygpt bench --model gpt2 --cases decode32 cold
  numpygpt bench --peers all --markdown results.md --json results.json
  numpygpt bench --size nano --cases decode512 --profile

cases: decodeN and prefillN with a prompt of N tokens, batchN with N prompts of 32, scoreN with a
text of N, and cold, from the start of a process to its first token. Prompts are random. Each
contestant runs in a process of its own, and all take turns in every round, so compare the figures
of one run only. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset in all of them.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure speed beside the machine's limits and other libraries",
        description="Measure how many tokens per second are read and made here. Before anything\n"
        "is timed, the logits are compared with float64 ones. In the same run the speed\n"
        "of bare matrix products is measured, which bounds what is possible.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--size",
        metavar="{" + ",".join(SIZES) + "}",
        help="random weights of this shape, made on the spot (default: 124M)",
    )
    which.add_argument("--model", help="a model of yours: name, directory or file")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="CASE",
        help=f"what to measure (default: {' '.join(DEFAULT)}, as far as they fit)",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["none"],
        metavar="NAME",
        help='other libraries: "all" that are installed, "none" (default), or names such as '
        '"llama.cpp" or "llama.cpp f32"',
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=[DEFAULT_DTYPE],
        metavar="DTYPE",
        help=f"how numpygpt stores its matrices, one or more of {', '.join(OURS)} (default: "
        f"{DEFAULT_DTYPE}); the first is what others are compared with",
    )
    parser.add_argument("--threads", type=whole(1), help="default: as many as the BLAS would use")
    parser.add_argument("--rounds", type=whole(1), default=5, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=whole(1), default=128, help="tokens to make (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=whole(1),
        default=600,
        metavar="SECONDS",
        help="end a contestant that takes longer to answer (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help='write all figures, "-" instead of the text')
    parser.add_argument("--markdown", metavar="FILE", help="write a page with the tables")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also say where the time of a step goes, by operation, beside a lower bound of each",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    for name in (args.json, args.markdown):
        if name not in (None, "-"):
            _require_new(name)
    if args.markdown == "-":
        raise ArgumentError('--markdown needs the name of a file, not "-"')
    if args.json is not None and args.json == args.markdown:
        raise ArgumentError("--json and --markdown name the same file; give each its own")
    names = contestants(args.dtype, args.peers)
    asked = [Case.named(name) for name in args.cases or DEFAULT]
    with _weights(args) as (directory, label):
        config = read_config(directory / "config.json")
        cases = fitting(asked, config, args.steps)
        if args.cases and cases != asked:
            unfit = next(case for case in asked if case not in cases)
            raise ArgumentError(
                f"case {unfit.name!r} takes {unfit.positions(args.steps)} positions, but the "
                f"model has {config.n_ctx}; "
                + ("fewer --steps help" if unfit.kind in ("decode", "batch") else "ask for fewer")
            )
        if not cases:
            raise ArgumentError(f"no case fits into {config.n_ctx} positions; fewer --steps")
        settings = Settings(
            contestants=names,
            cases=list(dict.fromkeys(cases)),
            threads=args.threads or (get_threads() if blas() else processors()),
            rounds=args.rounds,
            steps=args.steps,
            timeout=args.timeout,
            profile=args.dtype[0] if args.profile else None,
        )
        with _progress(settings.turns) as on_turn:
            record = {"model": label, **measure(directory, settings, on_turn)}
    record["missing"] = absent() if args.peers == ["all"] else []
    _write(record, args)
    for warning in report.warnings(record):
        tell("warning", warning)
    return 0


def contestants(dtypes: Sequence[str], peers: Sequence[str]) -> list[str]:
    """The names of all that take part, numpygpt first.

    Parameters
    ----------
    dtypes : sequence of str
        Of numpygpt.
    peers : sequence of str
        "all", "none", or names: whole ones, their first word, or ``module:class``.

    Raises
    ------
    ArgumentError
        If there is no such dtype or contestant.
    MissingPackageError
        If one that was named is not installed.
    """
    for dtype in dtypes:
        if dtype not in OURS:
            raise ArgumentError(f"--dtype takes {', '.join(OURS)}, not {dtype!r}")
    ours = [OURS[dtype] for dtype in dict.fromkeys(dtypes)]
    if list(peers) == ["none"]:
        return ours
    others = {name: kind for name, kind in known().items() if name not in OURS.values()}
    if list(peers) == ["all"]:
        return ours + [name for name, kind in others.items() if not missing(kind)]
    chosen = [name for asked in peers for name in _called(asked, others)]
    return ours + list(dict.fromkeys(chosen))


def absent() -> list[str]:
    """The peers that are not installed."""
    return [name for name, kind in known().items() if missing(kind)]


def _called(asked: str, others: dict[str, type[Contestant]]) -> list[str]:
    """The installed contestants that a word means."""
    if ":" in asked:
        find(asked)
        return [asked]
    meant = [name for name in others if asked in (name, name.split()[0])]
    if not meant:
        raise ArgumentError(
            f"--peers takes all, none, or names among {', '.join(others) or 'none'}; not {asked!r}"
        )
    lacking = sorted({module for name in meant for module in missing(others[name])})
    if lacking:
        raise MissingPackageError(
            f"--peers {asked}: cannot be imported here: {', '.join(lacking)}; "
            "pip install 'numpygpt[peers]'"
        )
    return meant


@contextmanager
def _weights(args: argparse.Namespace) -> Iterator[tuple[pathlib.Path, str]]:
    """A directory with float32 weights that every contestant can read, removed afterwards."""
    from tqdm import tqdm

    if args.size is not None and args.size not in SIZES:
        raise ArgumentError(f"--size takes {', '.join(SIZES)}, not {args.size!r}")
    size = args.size or "124M"
    with (
        tempfile.TemporaryDirectory(prefix="numpygpt-bench-") as folder,
        tqdm(desc="weights", unit="B", unit_scale=True, leave=False, disable=_silent()) as bar,
    ):
        directory = pathlib.Path(folder) / "model"
        if args.model is not None:

            def on_bytes(count: int, total: int) -> None:
                bar.total = total
                bar.update(count)

            done = convert(args.model, directory, dtype="float32", on_bytes=on_bytes)
            label = f"{args.model} ({done.source_format})"
        else:
            require_room(directory, 4 * SIZES[size].parameter_count)
            directory.mkdir()
            write_random_checkpoint(directory, SIZES[size], bar.update)
            label = f"random weights in the shape of GPT-2 {size}"
        bar.close()
        yield directory, label


@contextmanager
def _progress(turns: int) -> Iterator[Callable[[str], None]]:
    """What tells on standard error, if it is a terminal, what is being measured."""
    from tqdm import tqdm

    with tqdm(total=turns, leave=False, disable=_silent()) as bar:

        def on_turn(what: str) -> None:
            bar.set_description(what)
            bar.update()

        yield on_turn


def _silent() -> bool | None:
    return True if sys.stderr is None else None  # None: where standard error is no terminal


def _require_new(name: str) -> None:
    """Refuse what cannot become a file, before minutes are spent on measuring."""
    path = pathlib.Path(name)
    if not name:
        raise ArgumentError("expected the name of a file to write, not an empty one")
    require_absent(path)
    if path.is_dir():  # an empty one
        raise ArgumentError(f"expected the name of a file to write, not of a directory: {name}")
    if not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
        raise OutputError(f"{name}: {path.parent} is no directory that can be written into")


def _write(record: dict[str, Any], args: argparse.Namespace) -> None:
    """To the files that were named, and to standard output."""
    as_json = json.dumps(record, indent=2) + "\n"
    # First, so that nothing that happens to a file loses what was measured.
    print(as_json if args.json == "-" else report.text(record), end="\n" * (args.json != "-"))
    if args.markdown is not None:
        page = report.markdown(record, shlex.join(["numpygpt", "bench", *_repeated(args)]))
        with new_file(pathlib.Path(args.markdown)) as file:
            file.write(page.encode())
    if args.json not in (None, "-"):
        with new_file(pathlib.Path(args.json)) as file:
            file.write(as_json.encode())


def _repeated(args: argparse.Namespace) -> list[str]:
    """The options that make the same measurement."""
    words = ["--model", args.model] if args.model else ["--size", args.size or "124M"]
    words += ["--cases", *dict.fromkeys(args.cases)] if args.cases else []
    words += ["--peers", *args.peers] if args.peers != ["none"] else []
    words += ["--dtype", *args.dtype] if args.dtype != [DEFAULT_DTYPE] else []
    words += ["--threads", str(args.threads)] if args.threads else []
    words += ["--rounds", str(args.rounds), "--steps", str(args.steps)]
    return words + ["--profile"] * args.profile
