"""Options that several verbs have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..api import Model
from ..errors import ArgumentError
from ..feed import CHUNK
from ..loading import load
from ..records import describe

__all__ = [
    "DEFAULT_MODEL",
    "ModelChoice",
    "add_config",
    "add_model",
    "add_windows",
    "config_of",
    "whole",
    "windows_of",
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


# -- windows -----------------------------------------------------------------------------------


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Declare how a text is cut into windows that a model can read."""
    parser.add_argument(
        "--window",
        type=whole(2),
        metavar="W",
        help="tokens in a window, the scored ones included: 2 to n_ctx + 1 (default: n_ctx, or 2 "
        "if that is 1)",
    )
    parser.add_argument(
        "--stride",
        type=whole(1),
        metavar="S",
        help="how far each window stands from the one before: 1 to W - 1 (default: half of W). "
        "A window scores the tokens that none before it scored, so every token has at least W - S "
        "tokens of context where there are so many; a smaller S takes longer",
    )
    parser.add_argument(
        "--first-token",
        choices=("skip", "end-of-text"),
        metavar="{skip,end-of-text}",
        help="the first token of a text has no context: it is read but not scored, or the text is "
        "read after an end-of-text token (default: skip)",
    )
    parser.add_argument(
        "--chunk",
        type=whole(1),
        metavar="N",
        help="most tokens in one forward pass, 1 or more; changes nothing but rounding and speed "
        f"(default: {CHUNK})",
    )


def windows_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``Model.score`` that the options of :func:`add_windows` are.

    Raises
    ------
    ArgumentError
        If the stride is not smaller than the window.
    """
    if args.window is not None and args.stride is not None and args.stride >= args.window:
        raise ArgumentError(
            f"--stride must be an integer from 1 to {args.window - 1} with --window {args.window}, "
            f"not {args.stride}: every window but the first needs context"
        )
    return {
        "window": args.window,
        "stride": args.stride,
        "first_token": args.first_token or "skip",
        "chunk": args.chunk or CHUNK,
    }
