"""Options that several verbs have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..errors import ArgumentError

__all__ = ["add_config", "config_of"]


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
