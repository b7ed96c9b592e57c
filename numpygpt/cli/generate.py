"""``numpygpt generate``: continue a text, or many."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from .. import records
from ..api import Model
from ..decoding import Generation
from ..errors import ArgumentError, NumpyGPTError
from .json_lines import Line, print_answers, read_lines
from .options import ModelChoice, add_model, whole
from .record import add_record, finish, recorded
from .request import Request, add_settings, numbers, prompt_of
from .terminal import INTERRUPTED, tell
from .texts import STANDARD_INPUT

__all__ = ["add", "run"]

EXAMPLES = r"""
examples:
  numpygpt generate "ROMEO:" --temperature 0.8 --top-k 40 --seed 12
  echo "To be, or not" | numpygpt generate --max-new-tokens 50
  numpygpt generate "Alan Turing" --model gpt2 --temperature 1 --stop "\n\n"
  numpygpt generate "JULIET:" --temperature 1 --n 3 --json > run.json
  numpygpt generate --replay run.json
  numpygpt generate --jsonl < prompts.jsonl > continuations.jsonl

A value that begins with "-" needs an equals sign: --stop=--, --force=-1=198.
A prompt that does stands behind "--", after all options.

with --jsonl, line by line:
  "a prompt"                        a text
  [15496, 995]                      ids of tokens
  {"id": 7, "prompt": "a prompt"}   either of them, with keys of your own
Each result comes out as a JSON object with all keys of its line and those of a
generation: prompt_ids, ids, text, finish_reason ..., sample (its number), seed;
or with "error" if the line cannot be continued; the exit code is then 2. Blank
lines are left out.
"""

# Prompts that --jsonl continues together.
BATCH = 8

# Keys of an answer to a line with --jsonl. A line that had one, too, would lose its value.
ANSWER = {field.name for field in dataclasses.fields(Generation)} | {"sample", "seed"}


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        usage="%(prog)s [option ...] [PROMPT]",
        help="continue a text",
        description="Continue a text, printing it as it comes. Ctrl-C keeps what has come.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
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
        help="read prompts from standard input, one on each line (see below), and print a JSON "
        "object for each result, in that order",
    )
    group.add_argument(
        "--batch",
        type=whole(1),
        metavar="N",
        help="most prompts that --jsonl continues together, from 1; with 1 each line is answered "
        f"as it comes (default: {BATCH})",
    )
    group.add_argument(
        "--top-logprobs",
        type=int,
        default=0,
        metavar="N",
        help="with --json or --jsonl, give the N likeliest tokens at each place, from 0 "
        "(default: %(default)s)",
    )
    add_record(parser, "the text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Generate, and stream the text or print JSON."""
    if args.jsonl:
        return _run_lines(args)
    old = recorded(args)
    request = _request(args) if old is None else Request.recorded(old, args.replay)
    choice = ModelChoice.of(args, old)
    model = choice.load()
    if old is None and not args.json and not args.ids and request.is_single:
        return _stream(model, request)
    found, interrupted = request.run(model)
    results = list(chain(*found))
    if old is not None or args.json:
        options, filters = request.options(model)
        entry = {"generations": [vars(result) for result in results]}
        made = records.record("generate", choice.describe(model), options, entry, filters)
        status = finish(args, made, old)
        return INTERRUPTED if interrupted else status
    _print(request, results, args.ids)
    return INTERRUPTED if interrupted else 0


def _request(args: argparse.Namespace) -> Request:
    """What the options and the prompt ask for; nothing is read before the options are checked."""
    if args.batch is not None:
        raise ArgumentError("--batch has no effect without --jsonl; leave it out")
    if args.top_logprobs and not args.json:
        raise ArgumentError("--top-logprobs has no effect without --json or --jsonl")
    request = Request.of(args, [])
    prompt = prompt_of(args.prompt)
    ids = numbers("a prompt with --ids", prompt.split()) if args.ids else None
    return request._replace(prompts=[prompt if ids is None else ids])


def _print(request: Request, results: Sequence[Generation], as_ids: bool) -> None:
    """Print texts that were not streamed, or ids."""
    for i, result in enumerate(results, 1):
        if len(results) > 1:
            print(f"=== {i} of {len(results)}")
        if as_ids:
            print(*result.ids)
        else:
            print(request.prompts[0], result.text, sep="")
    _tell_lookup(request, results)


def _stream(model: Model, request: Request) -> int:
    """Print a single text as it comes."""
    (prompt,) = request.prompts
    pieces = model.stream(prompt, **request.settings)
    printed, interrupted = -1, False
    try:
        first = next(pieces, "")  # most errors come before any output
        printed = 0
        for piece in chain([prompt, first], pieces):
            printed += len(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # in the model, or between two pieces
        interrupted = True
        # What might have become a stop text was held back. It is text now.
        print((prompt + (pieces.result.text or ""))[max(0, printed) :], end="")
    finally:
        if printed >= 0 or interrupted:
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


# -- JSON lines --------------------------------------------------------------------------------


def _run_lines(args: argparse.Namespace) -> int:
    """Continue the prompts of standard input, some at a time; 2 if one could not be continued."""
    for name in ("prompt", "ids", "json", "replay"):
        if getattr(args, name) not in (None, False):
            raise ArgumentError(
                f"--jsonl reads prompts, texts or ids, from standard input, and prints JSON: leave "
                f"out {'PROMPT' if name == 'prompt' else '--' + name}"
            )
    request = Request.of(args, [])
    model = ModelChoice.of(args).load()
    request.require_possible(model)  # or else every line would be refused
    wrong = 0
    lines = read_lines(STANDARD_INPUT, bare="prompt", reserved=ANSWER)
    while batch := [_checked(line) for line in islice(lines, args.batch or BATCH)]:
        prompts = [line.asked["prompt"] for line in batch if not line.problem]
        answers, interrupted = _answers(model, request._replace(prompts=prompts))
        remaining = iter(answers)
        for line in batch:
            answer = line.problem or next(remaining, [])
            seed = request.settings["seed"]
            wrong += not print_answers(
                line, answer if isinstance(answer, str) else _entries(answer, seed)
            )
        if interrupted:
            return INTERRUPTED
    return 2 if wrong else 0


def _checked(line: Line) -> Line:
    """The line, with a problem if it has no prompt."""
    if line.problem or isinstance(line.asked.get("prompt"), str | list):
        return line
    return line._replace(
        problem='expected a text, a list of token ids, or an object with one of these as "prompt"'
    )


def _entries(results: Sequence[Generation], seed: int | None) -> list[dict[str, Any]]:
    """What is printed for each result of a line."""
    return [
        {**vars(result), "sample": sample, "seed": seed} for sample, result in enumerate(results)
    ]


def _answers(model: Model, request: Request) -> tuple[list[list[Generation] | str], bool]:
    """For each prompt its results, or what is wrong with it; and whether Ctrl-C came.

    After Ctrl-C there may be fewer than prompts.
    """
    try:
        found, interrupted = request.run(model)
        return [*found], interrupted
    except NumpyGPTError as error:
        if len(request.prompts) <= 1:
            return [str(error)], False
    # A prompt must not take those beside it with it: each half is tried by itself.
    half = len(request.prompts) // 2
    answers, interrupted = _answers(model, request._replace(prompts=request.prompts[:half]))
    if not interrupted:
        rest, interrupted = _answers(model, request._replace(prompts=request.prompts[half:]))
        answers += rest
    return answers, interrupted
