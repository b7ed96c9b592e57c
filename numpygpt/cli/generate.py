"""``numpygpt generate``: continue a text."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ..api import load
from ..errors import ArgumentError
from .options import add_config, config_of

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  numpygpt generate "ROMEO:" --temperature 0.8 --top-k 40 --seed 14
  echo "To be, or not" | numpygpt generate --max-new-tokens 50
  numpygpt generate "Alan Turing" --model gpt2 --temperature 0.8 --top-k 40 --json
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, printing it as it comes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        help="the text to continue; read from standard input when that is piped (one trailing "
        "newline is dropped); without any, the model starts a new document",
    )
    parser.add_argument(
        "--model", default="shakespeare", help="name, directory or file (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="{float32,float64}",
        help="what to compute in (default: %(default)s)",
    )
    add_config(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="stop after N tokens at the latest (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="draw at random, 0.8 is a good start; without it decoding is greedy, which soon "
        "repeats itself",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only"
    )
    parser.add_argument("--seed", type=int, help="makes the draws repeatable")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming the text"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Generate, and stream the text or print the JSON."""
    prompt = _prompt(args.prompt)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "seed": args.seed,
    }
    model = load(args.model, dtype=args.dtype, config=config_of(args.config))
    if args.json:
        result = model.generate(prompt, **settings)
        asked = {"model": args.model, "dtype": args.dtype, **settings, "prompt": prompt}
        print(json.dumps({**asked, **vars(result)}, allow_nan=False))
        return 0
    pieces = model.stream(prompt, **settings)
    first = next(pieces, "")  # errors come before any output
    print(prompt, first, sep="", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _prompt(argument: str | None) -> str:
    """The prompt given as an argument, else what is piped in, else nothing."""
    if argument is not None:
        return os.fsencode(argument).decode("utf-8", errors="replace")
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        piped = sys.stdin.buffer.read()
    except OSError as error:
        raise ArgumentError(f"cannot read the prompt: {error.strerror}") from None
    text = piped.decode("utf-8-sig", errors="replace")
    return text.removesuffix("\n").removesuffix("\r")
