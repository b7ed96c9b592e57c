"""``numpygpt score``: how likely each token of a text is."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..api import Model
from ..errors import ArgumentError, Interrupted, NumpyGPTError
from ..records import record
from ..scoring import Score
from ..tokenizer import Tokenizer
from .colours import coloured, legend
from .json_lines import exact, print_answers, read_lines
from .measuring import (
    add_texts,
    add_windows,
    in_turn,
    progress,
    settled,
    status_of,
    texts_and_windows,
    windows_of,
)
from .options import ModelChoice, add_model
from .record import add_record, finish, recorded, unfit
from .terminal import on_colour_terminal
from .texts import Source, argument, encode, named

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  numpygpt score sonnet.txt
  echo "To be, or not to be" | numpygpt score --output table
  printf " Paris" | numpygpt score --context "The capital of France is" --model gpt2
  numpygpt score sonnet.txt --json > run.json && numpygpt score --replay run.json

with --jsonl, line by line:
  "a text"                                                  the text
  {"id": 1, "text": "a text"}                               the text
  {"context": "The capital of France is", "continuation": " Paris"}
                                                            the continuation alone
Each line comes out as a JSON object with all its keys and one more: "score", or "error" if the
line cannot be scored; the exit code is then 2. Blank lines are left out.
"""

# What each column of the table holds, and how wide it is; the token itself stands last.
COLUMNS = {"id": 7, "log-prob.": 11, "probability": 12, "rank": 7, "entropy": 9}


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "score",
        help="say how likely each token of a text is",
        description="Print for each token of a text its log-probability given the tokens before\n"
        "it (nats), its probability, its rank (1: the greedy choice) and the entropy of\n"
        "the model's prediction (nats); then perplexity and bits per byte of all. The\n"
        "text is scored as it is, a newline at its end included.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_texts(parser)
    add_model(parser)
    parser.add_argument(
        "--context",
        metavar="TEXT",
        help="score the files as continuations of this text, which is not scored itself",
    )
    add_windows(parser)
    parser.add_argument(
        "--output",
        choices=("table", "colors", "json"),
        metavar="{table,colors,json}",
        help="a table, a line for each token; the text with a background by probability (256 "
        "colours); or as --json (default: colors on a terminal unless NO_COLOR is set, else table)",
    )
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help="each line of FILE is a JSON string or object (see below); one line is printed for "
        "each, at once",
    )
    add_record(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Score, and print a table, colours, a record, or JSON lines."""
    if args.jsonl:
        return _run_lines(args)
    old = recorded(args)
    args.json = args.json or args.output == "json"
    context = _context(args, old)
    sources, options = texts_and_windows(args, old)
    choice = ModelChoice.of(args, old)
    model = choice.load()
    ways = settled(options, model.config.n_ctx)
    scores = in_turn(sources, lambda source: _score(model, source, context, ways, args.json))
    if old is None and not args.json:
        finished = _print_texts(scores, context, _shower(args, model.tokenizer), len(sources) > 1)
        return status_of(finished, sources)
    described = choice.describe(model)  # before the work, since Ctrl-C would end it, too
    done = [(as_json(score, model.tokenizer), is_whole) for _, score, is_whole in scores]
    finished = sum(is_whole for _, is_whole in done)
    results = {"texts": [result for result, _ in done], "finished": finished}
    texts = [source.describe() for source in sources]
    settings = {"texts": texts, "context": context, **ways}
    status = finish(args, record("score", described, settings, results), old)
    return status_of(finished, sources, status)


def _context(args: argparse.Namespace, old: Mapping[str, Any] | None) -> str | None:
    """The context, from the command line or from the record that is replayed."""
    if old is None:
        return None if args.context is None else argument("--context", args.context)
    match old["options"]:
        case {"context": None | str() as context}:
            return context
    raise unfit(args)


def _score(
    model: Model, source: Source, context: str | None, ways: Mapping[str, Any], silent: bool
) -> Score:
    """The score of one text; after Ctrl-C, of as much as was scored."""
    ids = encode(model.tokenizer, source.read())
    parts = [ids] if context is None else [context, ids]
    skipped = context is None and ways["first_token"] == "skip"
    try:
        with progress(source, len(ids) - skipped, silent) as bar:
            return model.score(*parts, **ways, on_tokens=bar.update)
    except Interrupted as stopped:
        raise Interrupted(_begun(stopped.results)) from None


def _begun(score: Score) -> Score:
    """A score without the tokens after the last that is scored."""
    known = np.flatnonzero(~np.isnan(score.logprobs))
    end = known[-1] + 1 if known.size else 0
    names = ("ids", "logprobs", "ranks", "entropies")
    return dataclasses.replace(score, **{name: getattr(score, name)[:end] for name in names})


def as_json(score: Score, tokenizer: Tokenizer) -> dict[str, Any]:
    """The score of one text as a run record and a JSON line have it."""
    return {
        "ids": score.ids,
        "tokens": [tokenizer.decode([i]) for i in score.ids],
        "logprobs": score.logprobs,
        "ranks": score.ranks,
        "entropies": score.entropies,
        "count": score.count,
        "bytes": score.bytes,
        "nll": score.nll,
        "nats_per_token": score.nats_per_token,
        "standard_error": score.standard_error,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "is_greedy": score.is_greedy,
    }


# -- for people --------------------------------------------------------------------------------


def _print_texts(
    scores: Iterator[tuple[str, Score, bool]],
    context: str | None,
    show: Callable[[Score], None],
    several: bool,
) -> int:
    """Print each text as soon as it is scored; return how many are finished."""
    finished = 0
    for name, score, is_whole in scores:
        heading = f"==> {name} <==\n" if several or not is_whole else ""
        print(heading, end="")
        show(score)
        print(_summary(score, context), end="\n\n" if heading else "\n")
        finished += is_whole
    return finished


def _shower(args: argparse.Namespace, tokenizer: Tokenizer) -> Callable[[Score], None]:
    """What prints the tokens of a score."""
    output = args.output or ("colors" if on_colour_terminal() else "table")
    if output == "colors":
        return lambda score: print(legend(), "\n", *coloured(score, tokenizer.token_bytes), sep="")
    return lambda score: _print_table(score, tokenizer)


def _print_table(score: Score, tokenizer: Tokenizer) -> None:
    print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()), " token")
    for token, logprob, rank, entropy in _rows(score):
        if rank:
            cells = [f"{logprob:.4f}", f"{np.exp(logprob):.4g}", f"{rank}", f"{entropy:.4f}"]
        else:
            cells = ["-"] * 4
        row = zip([str(token), *cells], COLUMNS.values(), strict=True)
        print(" ".join(f"{cell:>{width}}" for cell, width in row), "", _token(token, tokenizer))


def _rows(score: Score) -> Iterator[tuple[int, float, int, float]]:
    columns = (score.ids, score.logprobs, score.ranks, score.entropies)
    for i in range(len(score.ids)):
        token, logprob, rank, entropy = (column[i].item() for column in columns)
        yield token, logprob, rank, entropy


def _token(token: int, tokenizer: Tokenizer) -> str:
    """A token in quotes, with what does not print spelled out; bytes, if not whole characters."""
    data = tokenizer.token_bytes.get(token)
    if data is None:
        return "(an id without a token)"
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def _summary(score: Score, context: str | None) -> str:
    """All tokens together, on two lines."""
    greedy = "yes" if score.is_greedy else "no"
    first = {"skip": "the first token skipped", "end-of-text": "read after end-of-text"}
    told = first[score.first_token] if context is None else "the context not counted"
    return (
        f"tokens scored: {score.count:,}, of {score.bytes:,} bytes; log-probability "
        f"{-score.nll:,.4f} nats, perplexity {score.perplexity:,.4g}, "
        f"{score.bits_per_byte:.4f} bits per byte\n"
        f"greedy: {greedy}; window {score.window}, stride {score.stride}, {told}"
    )


# -- JSON lines --------------------------------------------------------------------------------


def _run_lines(args: argparse.Namespace) -> int:
    """Answer each line as it comes; the exit code is 2 if one could not be scored."""
    for name in ("context", "output", "json", "replay"):
        if getattr(args, name):
            raise ArgumentError(f"--{name} and --jsonl exclude each other")
    options = windows_of(args)
    names = named(args.files)
    model = ModelChoice.of(args).load()
    # Without a tokenizer, or with a window that does not fit, every line would be refused.
    model.tokenizer  # noqa: B018
    ways = settled(options, model.config.n_ctx)
    wrong = 0
    for name in names:
        for line in read_lines(name, bare="text", reserved={"score"}):
            wrong += not print_answers(line, line.problem or _answers(model, line.asked, ways))
    return 2 if wrong else 0


def _answers(
    model: Model, asked: Mapping[str, Any], ways: Mapping[str, Any]
) -> list[dict[str, Any]] | str:
    """The answer to a line, or why there is none."""
    try:
        score = model.score(*_texts(asked), **ways)
    except NumpyGPTError as error:
        return str(error)
    return [{"score": as_json(score, model.tokenizer)}]


def _texts(asked: Mapping[str, Any]) -> list[str]:
    """The arguments of ``Model.score``: a text, or a context and its continuation."""
    match [asked.get(name) for name in ("text", "context", "continuation")]:
        case [str(text), None, None]:
            return [exact(text)]
        case [None, str(context), str(continuation)]:
            return [exact(context), exact(continuation)]
    raise ArgumentError(
        'expected a JSON string, {"text": ...} or {"context": ..., "continuation": ...}'
    )
