"""``numpygpt generate``: continue a text, or many."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .. import records
from ..api import Model
from ..decoding import Generation
from ..errors import ArgumentError, Interrupted
from .options import ModelChoice, add_model, whole
from .record import add_record, finish, recorded
from .request import Request, add_settings, numbers, prompt_of
from .terminal import tell

__all__ = ["add", "run"]

EXAMPLES = r"""
examples:
  numpygpt generate "ROMEO:" --temperature 0.8 --top-k 40 --seed 12
  echo "To be, or not" | numpygpt generate --max-new-tokens 50
  numpygpt generate "Alan Turing" --model gpt2 --temperature 0.8 --top-p 0.9 --stop "\n\n"
  numpygpt generate "JULIET:" --temperature 1 --n 3 --json > run.json
  numpygpt generate --replay run.json
  numpygpt generate --jsonl < prompts.jsonl > continuations.jsonl
"""

# The exit code after Ctrl-C, by the custom of shells.
INTERRUPTED = 130


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, printing it as it comes. Ctrl-C keeps what has come.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        help="the text to continue; read from standard input when that is piped (one trailing "
        "newline is dropped); without any, the model starts a new document",
    )
    add_model(parser)
    add_settings(parser)
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--ids",
        action="store_true",
        help="the prompt is token ids with spaces between them, and ids are printed",
    )
    group.add_argument(
        "--jsonl",
        action="store_true",
        help="read prompts from standard input, one JSON string, list of ids, or object with the "
        'key "prompt" on each line; print one JSON object for each result, in that order, with '
        "all keys of its line",
    )
    group.add_argument(
        "--batch",
        type=whole(1),
        default=8,
        metavar="N",
        help="most prompts that --jsonl continues together, from 1 (default: %(default)s)",
    )
    group.add_argument(
        "--top-logprobs",
        type=int,
        default=0,
        metavar="N",
        help="give the N likeliest tokens at each place, in JSON (default: 0)",
    )
    add_record(parser, "the text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Generate, and stream the text or print JSON."""
    if args.jsonl:
        return _run_lines(args)
    old = recorded(args)
    if old is not None:
        request = Request.recorded(old, args.replay)
    else:
        prompt = prompt_of(args.prompt)
        ids = numbers("a prompt with --ids", prompt.split()) if args.ids else None
        request = Request.of(args, [prompt if ids is None else ids])
    choice = ModelChoice.of(args, old)
    model = choice.load()
    if old is not None or args.json:
        results, interrupted = request.run(model)
        options, filters = request.options(model)
        found = {"generations": [vars(result) for result in results]}
        made = records.record("generate", choice.describe(model), options, found, filters)
        status = finish(args, made, old)
        return INTERRUPTED if interrupted else status
    if request.beams is None and request.settings["n"] == 1 and not args.ids:
        return _stream(model, request)
    results, interrupted = request.run(model)
    for i, result in enumerate(results, 1):
        if len(results) > 1:
            print(f"=== {i} of {len(results)}")
        if args.ids:
            print(*result.ids)
        else:
            print(request.prompts[0], result.text, sep="")
    _tell_lookup(request, results)
    return INTERRUPTED if interrupted else 0


def _stream(model: Model, request: Request) -> int:
    """Print a single text as it comes."""
    (prompt,) = request.prompts
    pieces = model.stream(prompt, **request.settings)
    interrupted = False
    try:
        first = next(pieces, "")  # errors come before any output
        print(prompt, first, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    except Interrupted:
        interrupted = True
    print()
    _tell_lookup(request, [pieces.result])
    return INTERRUPTED if interrupted else 0


def _tell_lookup(request: Request, results: Sequence[Generation]) -> None:
    """Say whether prompt lookup paid."""
    passes = sum(result.passes for result in results)
    if request.settings["lookup"] and passes:
        drafted = sum(result.drafted for result in results)
        accepted = sum(result.accepted for result in results)
        rate = sum(len(result.ids) for result in results) / passes
        tell("lookup", f"{accepted} of {drafted} proposed tokens were right, {rate:.2f} per pass")


# -- many prompts ------------------------------------------------------------------------------


def _run_lines(args: argparse.Namespace) -> int:
    """Continue the prompts of standard input, some at a time."""
    for name in ("prompt", "ids", "json", "replay"):
        if getattr(args, name):
            raise ArgumentError(
                f"--jsonl reads prompts, texts or ids, from standard input, and prints JSON: leave "
                f"out {name if name == 'prompt' else '--' + name}"
            )
    request = Request.of(args, [])
    model = ModelChoice.of(args).load()
    for entries in _batches(args.batch):
        prompts = [entry["prompt"] for entry in entries]
        results, interrupted = request._replace(prompts=prompts).run(model)
        each = len(results) // len(entries)
        for i, result in enumerate(results):
            line = {**entries[i // each], **vars(result)}
            print(json.dumps(records.plain(line), allow_nan=False), flush=True)
        if interrupted:
            return INTERRUPTED
    return 0


def _batches(size: int) -> Iterator[list[dict[str, Any]]]:
    """The entries of standard input, `size` at a time."""
    batch: list[dict[str, Any]] = []
    for number, line in enumerate(sys.stdin.buffer if sys.stdin else (), 1):
        if line.strip():
            batch.append(_entry(line, number))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _entry(line: bytes, number: int) -> dict[str, Any]:
    """One line of JSON, as an object with a prompt."""
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"line {number} of standard input is not JSON: {error}") from None
    entry = found if isinstance(found, dict) else {"prompt": found}
    if not isinstance(entry.get("prompt"), str | list):
        raise ArgumentError(
            f"line {number} of standard input: expected a text, a list of ids, or an object with "
            f'one of these as "prompt"'
        )
    return entry
