"""``numpygpt score``: how likely each token of a text is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from ..api import Model
from ..errors import ArgumentError, NumpyGPTError
from ..records import plain, record
from ..scoring import Score
from ..tokenizer import Tokenizer
from .colours import coloured, legend
from .options import ModelChoice, add_model, add_windows, windows_of
from .record import add_record, finish, recorded
from .terminal import on_colour_terminal, one_line, tell
from .texts import Source, argument, encode, named, open_input

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

# Bytes of a line with --jsonl.
LONGEST_LINE = 2**24

EXPECTED = 'expected a JSON string, {"text": ...} or {"context": ..., "continuation": ...}'

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
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a text in UTF-8, at most 256 MiB; - is standard input, which is also read if it is "
        "piped and no FILE is given",
    )
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
    if old is None:
        options = windows_of(args)
        context = None if args.context is None else argument("--context", args.context)
        sources = [Source.look(name) for name in named(args.files)]
    else:
        sources, options, context = _from_record(old, args.replay)
    choice = ModelChoice.of(args, old)
    model = choice.load()
    show = _shower(args, model.tokenizer) if old is None and not args.json else None
    scores = []
    for source in sources:
        score = _score(model, source, context, options)
        if show is not None:
            heading = f"==> {one_line(source.name)} <==\n" if len(sources) > 1 else ""
            print(heading, end="")
            show(score)
            print(_summary(score, context), end="\n\n" if heading else "\n")
        else:
            scores.append(score)
    if show is not None:
        return 0
    settled = {"window": scores[0].window, "stride": scores[0].stride}
    texts = [source.describe() for source in sources]
    made = record(
        "score",
        choice.describe(model),
        {"texts": texts, "context": context, **options, **settled},
        {"texts": [as_json(score, model.tokenizer) for score in scores]},
    )
    return finish(args, made, old)


def _from_record(
    old: Mapping[str, Any], path: str
) -> tuple[list[Source], dict[str, Any], str | None]:
    """Texts, settings and context of a record; the settings' values are checked where they go."""
    match old["options"]:
        case {
            "texts": [_, *_] as texts,
            "context": None | str() as context,
            "window": int() as window,
            "stride": int() as stride,
            "first_token": str() as first_token,
            "chunk": int() as chunk,
        }:
            sources = [Source.from_record(text, path) for text in texts]
            ways = {"window": window, "stride": stride, "first_token": first_token, "chunk": chunk}
            return sources, ways, context
    raise ArgumentError(f"{path}: its options are not those of numpygpt score")


def _score(model: Model, source: Source, context: str | None, options: Mapping[str, Any]) -> Score:
    """The score of one text."""
    ids = encode(model.tokenizer, source.read())
    if context is None:
        return model.score(ids, **options)
    return model.score(context, ids, **options)


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


def _shower(args: argparse.Namespace, tokenizer: Tokenizer) -> Any:
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
    model.tokenizer  # noqa: B018  # without one, every line would be refused
    wrong = 0
    for name in names:
        for number, line in enumerate(_lines(name), 1):
            if not line.strip():
                continue
            text, problem = _answer(model, line, options)
            print(text, flush=True)
            if problem:
                tell("error", f"{name}: line {number}: {problem}")
                wrong += 1
    return 2 if wrong else 0


def _lines(name: str) -> Iterator[bytes]:
    """The lines of a file, or of standard input while somebody writes them."""
    with open_input(name) as file:
        try:
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise ArgumentError(f"{name}: a line of more than {LONGEST_LINE:,} bytes")
                yield line
        except OSError as error:
            raise ArgumentError(f"{name}: {error.strerror}") from None


def _answer(model: Model, line: bytes, options: Mapping[str, Any]) -> tuple[str, str]:
    """The line that answers a line, and what is wrong with it, if anything is."""
    asked: dict[str, Any] = {}
    try:
        asked = _parsed(line)
        score = model.score(*_asked(asked), **options)
        return json.dumps(asked | {"score": plain(as_json(score, model.tokenizer))}), ""
    except RecursionError:
        asked, problem = {}, "nested too deeply"
    except NumpyGPTError as error:
        problem = str(error)
    return json.dumps(asked | {"error": problem}), problem


def _parsed(line: bytes) -> dict[str, Any]:
    """The object that a line is, or its string as one."""
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except ValueError as error:  # not UTF-8, not JSON
        raise ArgumentError(f"expected JSON, but {error}") from None
    match value:
        case str():
            return {"text": value}
        case dict() if not value.keys() & {"score", "error"}:
            return value
        case dict():
            raise ArgumentError("the keys score and error are for the answer")
    raise ArgumentError(f"{EXPECTED}, not {type(value).__name__}")


def _asked(asked: Mapping[str, Any]) -> list[str]:
    """The arguments of ``Model.score``: a text, or a context and its continuation."""
    texts = [asked.get(name) for name in ("text", "context", "continuation")]
    match texts:
        case [str(text), None, None]:
            return [_exact(text)]
        case [None, str(context), str(continuation)]:
            return [_exact(context), _exact(continuation)]
    raise ArgumentError(EXPECTED)


def _exact(text: str) -> str:
    """A text that has UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError("the text has half of a surrogate pair") from None
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
