"""``--json`` and ``--replay``: run records on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from .. import records
from ..errors import ArgumentError
from ..params import shown
from ..records import Difference
from .terminal import one_line

__all__ = ["add_record", "finish", "recorded", "unfit"]

# What may be given beside --replay; everything else is in the record.
BESIDE = ("model", "threads", "json", "replay")

# Differences of model and environment that are told; there are rarely more.
TOLD = 20


def add_record(parser: argparse.ArgumentParser, shown_as: str = "the result") -> None:
    """Declare ``--json`` and ``--replay RECORD``. A verb calls it once all its options are known.

    Parameters
    ----------
    parser : argparse.ArgumentParser
    shown_as : str
        What is printed without ``--json``.
    """
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print a run record instead of {shown_as}: one JSON object with the settings, the "
        "versions, the SHA-256 of the weights and the results",
    )
    parser.add_argument(
        "--replay",
        metavar="RECORD",
        help="run what a file from --json records (at most 256 MiB) and compare the results, "
        "exactly; of the other options only --model (weights that have moved), --threads and "
        "--json can be given. The exit code is 1 if the results differ",
    )


def recorded(args: argparse.Namespace) -> dict[str, Any] | None:
    """The record that ``--replay`` names, or None without one.

    Raises
    ------
    ArgumentError
        If it is unusable, or what it holds was given as an option too.
    """
    if args.replay is None:
        return None
    for name, value in vars(args).items():
        given = value not in (args.declared.get_default(name), [])  # []: no positional argument
        if given and name not in (*BESIDE, "verb", "run", "declared"):
            raise ArgumentError(
                f"--replay takes everything from its record: leave out {_spelled(args, name)} "
                "(only --model, --threads and --json can be given beside it)"
            )
    return records.read(args.replay, args.verb)


def unfit(args: argparse.Namespace) -> ArgumentError:
    """What is wrong with a record whose options its verb cannot use."""
    return ArgumentError(f"{args.replay}: its options are not those of numpygpt {args.verb}")


def finish(args: argparse.Namespace, made: Mapping[str, Any], old: Mapping[str, Any] | None) -> int:
    """Print the record, or how it differs from the one that was replayed; the exit code.

    Parameters
    ----------
    args : argparse.Namespace
    made : mapping
        The record of this run.
    old : mapping, optional
        The one that was replayed.

    Returns
    -------
    int
        1 if the results differ, else 0.
    """
    if old is None:
        print(json.dumps(made, allow_nan=False))
        return 0
    try:
        comparison = records.compare(old, made)
    except RecursionError:
        raise ArgumentError(f"{args.replay}: nested too deeply for a record") from None
    if args.json:
        told = {
            "identical": comparison.result is None,
            "places": comparison.places,
            "largest": comparison.largest,
            "first": _as_json(comparison.result) if comparison.result else None,
            "around": [_as_json(difference) for difference in comparison.around],
            "record": made,
        }
        print(json.dumps(told, allow_nan=False))
    else:
        _print(comparison)
    return 0 if comparison.result is None else 1


def _print(comparison: records.Comparison) -> None:
    first, around = comparison.result, comparison.around
    if first is None:
        print("identical: the results are those of the record, to the last bit")
    else:
        rest = comparison.places - 1
        print(f"different: {_line(first)}" + (f"; and {rest} more places" if rest else ""))
        if comparison.largest is not None:
            print(f"no id, rank or text differs; numbers do, by at most {comparison.largest:.2g}")
    print("around it, this differs:" if around else "model and environment are the same")
    for difference in around[:TOLD]:
        print(f"  {_line(difference)}")
    if len(around) > TOLD:
        print(f"  and {len(around) - TOLD} more")


def _line(difference: Difference) -> str:
    path, before, after = difference
    apart = ""
    if isinstance(before, float) and isinstance(after, float):
        apart = f" ({after - before:+.2g})"
    return f"{one_line(path)} was {_value(before)}, is {_value(after)}{apart}"


def _value(value: Any) -> str:
    """A value on a part of a line."""
    match value:
        case dict():
            return f"an object of {len(value)} keys"
        case list():
            return f"a list of {len(value)}"
        case str():
            return shown(json.dumps(value, ensure_ascii=False))
        case None:
            return "null"
    return shown(repr(value))


def _as_json(difference: Difference) -> dict[str, Any]:
    values = {"recorded": difference.recorded, "found": difference.found}
    return {
        "path": difference.path,
        **{name: value for name, value in values.items() if value is not records.ABSENT},
    }


def _spelled(args: argparse.Namespace, name: str) -> str:
    """An option as the user writes it."""
    for action in args.declared._actions:
        if action.dest == name:
            positional = action.metavar or action.dest
            return str(action.option_strings[0] if action.option_strings else positional)
    return name
