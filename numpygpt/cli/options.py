"""Options that several verbs have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..api import Model
from ..errors import ArgumentError
from ..loading import load
from ..records import describe

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

    @classmethod
    def of(cls, args: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> ModelChoice:
        """What the options of :func:`add_model` say; where a record is replayed, what it says.

        Of the options only ``--model`` counts in a replay: the weights may have moved.
        """
        if recorded is not None:
            said = recorded["model"]
            return cls(args.model or said["name"], said["dtype"], said["overrides"])
        return cls(args.model or DEFAULT_MODEL, args.dtype or DEFAULT_DTYPE, config_of(args.config))

    def load(self) -> Model:
        """Load it."""
        return load(self.name, dtype=self.dtype, config=self.overrides)

    def describe(self, model: Model) -> dict[str, Any]:
        """Its entry in a run record."""
        return describe(self.name, model.config, model.params, self.overrides)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model``, ``--dtype`` and ``--config``. None stands for a default."""
    parser.add_argument("--model", help=f"name, directory or file (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--dtype",
        metavar="{float32,float64}",
        help=f"what to compute in (default: {DEFAULT_DTYPE})",
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
