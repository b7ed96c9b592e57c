"""``numpygpt generate``: continue a text, or many."""

from __future__ import annotations

import argparse
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from .. import records
from ..api import Answer, Model, Prompt
from ..decoding import Generation
from ..errors import ArgumentError, Interrupted
from .json_lines import Line, arriving, print_answers
from .options import ModelChoice, add_model
from .pace import Pace
from .record import add_record, finish, recorded
from .request import Request, add_settings, numbers, prompt_of
from .terminal import INTERRUPTED, tell

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
lines are left out. Results come in the order of their lines, each as soon as it
and those before it are finished. A line that comes through a pipe is begun at
once, beside those that are running.
"""

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
    if args.batch is not None and args.n == 1:
        raise ArgumentError("--batch has no effect on a single text; leave it out")
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
    pace = Pace()
    pieces = model.stream(prompt, on_step=pace, **request.settings)
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
    if problem := pace.problem(model):
        tell("warning", problem)
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
    lines = _Lines(request.settings["seed"])
    try:
        for number, answer in request.each(model, lines.prompts()):
            lines.answer(number, answer)
    except Interrupted as stopped:
        for number, answer in stopped.results:
            lines.answer(number, answer)
        return INTERRUPTED
    return 2 if lines.wrong else 0


# Wrong lines that are read at a time while others wait for their answers.
WRONG = 16


class _Lines:
    """The lines that have been read and not printed, each with its answer once there is one.

    Attributes
    ----------
    wrong : bool
        Whether one could not be continued.
    """

    def __init__(self, seed: int | None):
        self.wrong, self.seed = False, seed
        self.waiting: deque[tuple[Line, int | None]] = deque()  # None: wrong from the beginning
        self.answers: dict[int, Answer] = {}

    def prompts(self) -> Iterator[Prompt | None]:
        """Those of the lines, in their order; None while none has come and others are waiting."""
        number = wrong = 0
        for line in arriving("prompt", ANSWER, may_wait=lambda: not self.waiting):
            if line is None:
                yield None
                continue
            line = _checked(line)
            self.waiting.append((line, None if line.problem else number))
            self.flush()
            if not line.problem:
                number += 1
                yield line.asked["prompt"]
                continue
            wrong += 1
            if self.waiting and wrong % WRONG == 0:
                yield None

    def answer(self, number: int, answer: Answer) -> None:
        """Take an answer, and print what can be printed now."""
        self.answers[number] = answer
        self.flush()

    def flush(self) -> None:
        """Print the answers, in the order of the lines, up to one that has none."""
        while self.waiting:
            line, number = self.waiting[0]
            answer = line.problem if number is None else self.answers.pop(number, None)
            if answer is None:
                return
            self.waiting.popleft()
            self.wrong |= not print_answers(line, self._entries(answer))

    def _entries(self, answer: Answer | str) -> list[dict[str, Any]] | str:
        """What is printed for each result of a line, or what is wrong with it."""
        if not isinstance(answer, list):
            return str(answer)
        return [
            {**vars(result), "sample": sample, "seed": self.seed}
            for sample, result in enumerate(answer)
        ]


def _checked(line: Line) -> Line:
    """The line, with a problem if it has no prompt."""
    if line.problem or isinstance(line.asked.get("prompt"), str | list):
        return line
    return line._replace(
        problem='expected a text, a list of token ids, or an object with one of these as "prompt"'
    )
