"""Options that several verbs have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..api import Model
from ..errors import ArgumentError
from ..loading import DTYPES, load
from ..records import describe
from ..threads import set_threads

__all__ = [
    "DEFAULT_MODEL",
    "ModelChoice",
    "add_config",
    "add_model",
    "config_of",
    "restore_dashes",
    "whole",
]

DEFAULT_MODEL = "shakespeare"
DEFAULT_DTYPE = "float32"


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: integers from `least` up."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # not a number, or one of thousands of digits
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {least} up, not {text[:40]!r}"
            )
        return value

    return convert


# -- the model ---------------------------------------------------------------------------------


class ModelChoice(NamedTuple):
    """Which model, and how it is loaded."""

    name: str
    dtype: str
    overrides: dict[str, Any]
    threads: int | None

    @classmethod
    def of(cls, args: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> ModelChoice:
        """What the options of :func:`add_model` say; where a record is replayed, what it says.

        Of the options only ``--model`` and ``--threads`` count in a replay: the weights may have
        moved, and the machine may be another one.
        """
        if recorded is not None:
            said = recorded["model"]
            name = args.model or said["name"]
            return cls(name, said["dtype"], said["overrides"], args.threads)
        name, dtype = (
            args.model or DEFAULT_MODEL,
            DEFAULT_DTYPE if args.dtype is None else args.dtype,
        )
        return cls(name, dtype, config_of(args.config), args.threads)

    def load(self) -> Model:
        """Load it."""
        if self.threads is not None:
            set_threads(self.threads)
        return load(self.name, dtype=self.dtype, config=self.overrides)

    def describe(self, model: Model) -> dict[str, Any]:
        """Its entry in a run record."""
        return describe(self.name, model.config, model.params, self.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model``, ``--dtype``, ``--threads`` and ``--config``; None: a default."""
    parser.add_argument("--model", help=f"name, directory or file (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--dtype",
        metavar="{" + ",".join(DTYPES) + "}",
        help="what to compute in, or how to keep the matrices of a model that computes in "
        f"float32 (default: {DEFAULT_DTYPE})",
    )
    parser.add_argument(
        "--threads",
        type=whole(1),
        metavar="N",
        help="how many threads compute, from 1 (default: as many as there are processors, or what "
        "OMP_NUM_THREADS says); beside other work one is often faster",
    )
    add_config(parser)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare ``--config NAME=VALUE``."""
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a config field that overrides the checkpoint's, such as n_head=6 or "
        "activation_function=gelu_new; may be given several times",
    )


def config_of(settings: Sequence[str]) -> dict[str, Any]:
    """The fields of ``--config`` options.

    >>> config_of(["n_head=6", "activation_function=gelu", "bias=false"])
    {'n_head': 6, 'activation_function': 'gelu', 'bias': False}
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ArgumentError(f"--config expects NAME=VALUE, such as n_head=6, not {setting!r}")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value  # a word
    return fields


# -- argparse ------------------------------------------------------------------------------------


def restore_dashes(args: argparse.Namespace) -> None:
    """Put back "--" where it was the value of an option: before 3.13, Python leaves [] there.

    Raises
    ------
    ArgumentError
        If the option is not one that may be given several times, such as ``--stop``: no other
        has a use for "--".
    """
    for action in args.declared._actions:
        value = getattr(args, action.dest, None)
        if not isinstance(value, list) or not action.option_strings:
            continue
        if value == [] and action.default != []:
            raise ArgumentError(f"{action.option_strings[0]} expects a value, not '--'")
        setattr(args, action.dest, ["--" if item == [] else item for item in value])
