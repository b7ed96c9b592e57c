"""``numpygpt inspect``: what a checkpoint is, and whether it would load."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import sys
from typing import Any

from .. import checkpoints
from ..api import tokenizer_for
from ..checkpoints import Report
from ..errors import TokenizerError

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
        description="Print the config, size, tensors and tokenizer of a checkpoint, and what "
        "numpygpt would refuse about it. Weights are not read. The exit code is 2 if it would "
        "not load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="name, directory or file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = checkpoints.inspect(checkpoints.find(args.model))
    tokenizer = "none: needs a sound config"
    if report.config:
        tokenizer, problem = _tokenizer(report)
        report.problems += [problem] if problem else []
    if args.json:
        print(json.dumps(_record(report, tokenizer)))
    else:
        _print(report, tokenizer)
    for problem in report.problems:
        print("numpygpt: would be refused:", " ".join(problem.split()), file=sys.stderr)
    return 2 if report.problems else 0


def _tokenizer(report: Report) -> tuple[str, str]:
    """What the tokenizer is, and what would be refused about it."""
    assert report.config
    make = tokenizer_for(report.directory, report.config)
    if make is None:
        return "none: takes and gives token ids only", ""
    try:
        tokenizer = make()
    except TokenizerError as error:
        return "damaged", str(error)
    end = "none" if tokenizer.end_of_text is None else tokenizer.end_of_text
    return f"{len(tokenizer)} tokens, end-of-text {end}", ""


def _record(report: Report, tokenizer: str) -> dict[str, Any]:
    config = report.config
    return {
        "path": str(report.path),
        "config": dataclasses.asdict(config) if config else None,
        "parameters": config.parameter_count if config else None,
        "tokenizer": tokenizer,
        "tensors": {
            name: {"dtype": entry.dtype, "shape": entry.shape, "bytes": entry.stop - entry.start}
            for name, entry in report.tensors.items()
        },
        "problems": report.problems,
    }


def _print(report: Report, tokenizer: str) -> None:
    config = report.config
    print(report.path)
    if config:
        print("\nconfig")
        for name, value in dataclasses.asdict(config).items():
            print(f"  {name:<32} {value}")
    size = sum(entry.stop - entry.start for entry in report.tensors.values())
    types = collections.Counter(entry.dtype for entry in report.tensors.values())
    print("\nsize")
    if config:
        print(f"  {'parameters':<32} {config.parameter_count:,}")
    print(f"  {'tensors':<32} {', '.join(f'{n} {t}' for t, n in types.items()) or 'none'}")
    print(f"  {'bytes of tensors':<32} {size:,}")
    print(f"\ntokenizer\n  {tokenizer}")
    print("\ntensors")
    layers: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, entry in report.tensors.items():
        layer = re.match(r"h\.(\d+)\.", name)
        key = re.sub(r"^h\.\d+\.", "h.*.", name)
        layers.setdefault((key, entry.dtype, entry.shape), []).extend(
            [int(layer[1])] if layer else []
        )
    for (name, dtype, shape), which in layers.items():
        count = f"x {len(which)}" if which else ""
        print(f"  {name:<32} {dtype:<5} {' x '.join(map(str, shape)) or 'scalar':<14} {count}")
    if not report.tensors:
        print("  none could be read")
