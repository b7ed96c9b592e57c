"""``numpygpt inspect``: what a checkpoint is, and whether it would load."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
from typing import Any

from .. import checkpoints
from ..checkpoints import Report
from ..errors import TokenizerError
from ..loading import tokenizer_for
from ..tokenizer import Tokenizer
from .options import add_config, config_of
from .terminal import one_line, tell

__all__ = ["add", "run"]


EXAMPLES = """\
examples:
  numpygpt inspect shakespeare
  numpygpt inspect path/to/gpt2 --json
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="say what a checkpoint is",
        description="Print the config, size, tensors and tokenizer of a checkpoint, and what\n"
        "numpygpt would refuse about it. Weights are not read. The exit code is 2 if\n"
        "it would not load, or its vocabulary could not be used.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="name, directory or file")
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = checkpoints.inspect(checkpoints.find(args.model), config_of(args.config))
    tokenizer = None
    if report.config:
        try:
            make = tokenizer_for(report.directory, report.config, report.vocabulary)
            tokenizer = make() if make else None
        except TokenizerError as error:
            report.problems.append(str(error))
    if args.json:
        print(json.dumps(_record(report, tokenizer)))
    else:
        _print(report, tokenizer)
    for problem in report.problems:
        tell("would be refused", problem)
    return 2 if report.problems else 0


def _record(report: Report, tokenizer: Tokenizer | None) -> dict[str, Any]:
    config = report.config
    return {
        "path": str(report.path),
        "format": report.format,
        "config": dataclasses.asdict(config) if config else None,
        "parameters": config.parameter_count if config else None,
        "tokenizer": tokenizer and {"tokens": len(tokenizer), "end_of_text": tokenizer.end_of_text},
        "tensors": {
            name: {"dtype": entry.dtype, "shape": entry.shape, "bytes": entry.nbytes}
            for name, entry in report.tensors.items()
        },
        "notes": report.notes,
        "problems": report.problems,
    }


def _print(report: Report, tokenizer: Tokenizer | None) -> None:
    config = report.config
    print(one_line(str(report.path)))
    print(f"\nformat\n  {one_line(report.format) or 'unknown'}")
    for note in report.notes:
        print(f"  {one_line(note)}")
    if config:
        print("\nconfig")
        for name, value in dataclasses.asdict(config).items():
            shown = f"4 x n_embd = {config.mlp_dim}" if value is None else value
            print(f"  {name:<32} {shown}")
    size = sum(entry.nbytes for entry in report.tensors.values())
    types = collections.Counter(entry.dtype for entry in report.tensors.values())
    print("\nsize")
    if config:
        print(f"  {'parameters':<32} {config.parameter_count:,}")
    print(f"  {'tensors':<32} {', '.join(f'{n} {t}' for t, n in types.items()) or 'none'}")
    print(f"  {'bytes of tensors':<32} {size:,}")
    if any(entry.stored for entry in report.tensors.values()):
        print(f"  {'I8':<32} int8 with a scale for each output")
    print("\ntokenizer")
    if tokenizer:
        print(f"  {'tokens':<32} {len(tokenizer):,}")
        print(f"  {'end-of-text':<32} {tokenizer.end_of_text}")
    else:
        print("  none that could be used; ids only")
    print("\ntensors")
    alike = collections.Counter(
        (re.sub(r"^h\.\d+\.", "h.*.", name), entry.dtype, entry.shape)
        for name, entry in report.tensors.items()
    )
    for (name, dtype, shape), layers in alike.items():
        count = f"x {layers}" if name.startswith("h.*.") else ""
        sizes = " x ".join(map(str, shape)) or "scalar"
        print(f"  {one_line(name):<32} {dtype:<5} {sizes:<14} {count}".rstrip())
    if not report.tensors:
        print("  none could be read")
