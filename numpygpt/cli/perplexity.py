"""``numpygpt perplexity``: how well a model predicts whole texts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..api import Model
from ..checkpoints import find
from ..divergence import Divergence
from ..errors import ArgumentError, Interrupted
from ..params import Array
from ..records import record
from ..scoring import Summary
from . import divergences, summaries
from .measuring import (
    add_texts,
    add_windows,
    in_turn,
    progress,
    settled,
    status_of,
    texts_and_windows,
)
from .options import DEFAULT_DTYPE, ModelChoice, add_model
from .record import add_record, finish, recorded, unfit
from .resume import Journal, key_of
from .terminal import one_line
from .texts import Source, encode

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  numpygpt perplexity wikitext.txt --model gpt2
  numpygpt perplexity *.txt --resume done.jsonl        # again after Ctrl-C: goes on
  numpygpt perplexity a.txt --model gpt2-half --against gpt2
  numpygpt perplexity a.txt --json > run.json && numpygpt perplexity --replay run.json

Perplexities can be compared only for the same text, tokenizer, window, stride and rule for the
first token; bits per byte for different tokenizers, too. A standard error (+-) takes the tokens
as independent, which those of a text are not: the true one is larger.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "perplexity",
        help="measure how well a model predicts texts",
        description="Print for each text, and for all together, the mean negative log-likelihood\n"
        "of its tokens in nats and the perplexity, each with its standard error, and\n"
        "bits per byte and per token. A text longer than the context is read in windows\n"
        "that overlap. It is measured as it is, a newline at its end included.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_texts(parser)
    add_model(parser)
    add_windows(parser)
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="append the result of each text to this file of JSON lines as soon as it is there, "
        "and take from it what an earlier run with the same weights and settings has done",
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="compare with this reference model, token by token: Kullback-Leibler divergence "
        "KL(p || q) in nats, p the reference and q the model, agreement of their likeliest "
        "tokens, ratio of perplexities. The reference has the config of its checkpoint; --config "
        "is for --model",
    )
    parser.add_argument(
        "--against-dtype",
        metavar="{float32,float64}",
        help=f"what the reference computes in (default: {DEFAULT_DTYPE})",
    )
    add_record(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or a record."""
    old = recorded(args)
    against = _against(args, old)
    if against is not None and args.resume is not None:
        raise ArgumentError(
            "--resume keeps no comparisons: leave out one of --resume and --against"
        )
    sources, options = texts_and_windows(args, old)
    choice = ModelChoice.of(args, old)
    journal = None if args.resume is None else Journal(args.resume)
    for each in (choice, against):
        if each is not None:
            find(each.name)  # both, before one is loaded
    model, reference = choice.load(), None if against is None else against.load()
    ways = settled(options, min(m.config.n_ctx for m in (model, reference) if m is not None))
    recording = args.json or old is not None
    described = choice.describe(model) if recording or journal else {}

    def work(source: Source) -> Summary | Divergence:
        if reference is None:
            return _measure(model, source, ways, args.json, journal, described)
        return _compare(model, reference, source, ways, args.json)

    names, done, finished = [], [], 0
    for name, result, is_whole in in_turn(sources, work):
        names.append(name)
        done.append(result)
        finished += is_whole
    kind = summaries if reference is None else divergences
    if recording:
        settings = {
            "texts": [source.describe() for source in sources],
            **ways,
            "against": against.describe(reference) if against and reference else None,
        }
        results = {
            "texts": [kind.statistics(each) for each in done],
            "total": kind.statistics(kind.together(done)) if done else None,
            "finished": finished,
        }
        status = finish(args, record("perplexity", described, settings, results), old)
        return status_of(finished, sources, status)
    if done:
        kind.print_table(names, done)
        print(_way(ways))
    if journal and journal.taken:
        print(f"{journal.taken} of {len(done)} results were taken from {one_line(args.resume)}")
    return status_of(finished, sources)


def _against(args: argparse.Namespace, old: Mapping[str, Any] | None) -> ModelChoice | None:
    """The reference, from the command line or from the record that is replayed."""
    if old is not None:
        match old["options"]:
            case {"against": None}:
                return None
            case {"against": {"name": str(name), "dtype": str(dtype), "overrides": dict(fields)}}:
                return ModelChoice(name, dtype, fields, None)
        raise unfit(args)
    if args.against is not None:
        return ModelChoice(args.against, args.against_dtype or DEFAULT_DTYPE, {}, None)
    if args.against_dtype is not None:
        raise ArgumentError("--against-dtype needs --against")
    return None


def _measure(
    model: Model,
    source: Source,
    ways: Mapping[str, Any],
    silent: bool,
    journal: Journal | None,
    described: Mapping[str, Any],
) -> Summary:
    """How well one model predicts a text, or what an earlier run found."""
    ids = encode(model.tokenizer, source.read())
    key = key_of(source.sha256, ids, described, ways) if journal else {}
    known = journal.find(key) if journal else None
    if known is not None:
        return Summary(**known)
    try:
        with progress(source, _scored(ids, ways), silent) as bar:
            summary = model.score(ids, **ways, on_tokens=bar.update).summary
    except Interrupted as stopped:
        raise Interrupted(stopped.results.summary) from None
    if journal:
        journal.append(key, source.name, vars(summary))
    return summary


def _compare(
    model: Model, reference: Model, source: Source, ways: Mapping[str, Any], silent: bool
) -> Divergence:
    """How far a model is from the reference on a text, whose tokens must be the same for both."""
    text = source.read()
    ids = encode(model.tokenizer, text)
    if not np.array_equal(ids, encode(reference.tokenizer, text)):
        raise ArgumentError(
            f"{source.name}: the two models cut it into different tokens; only models with one "
            "vocabulary can be compared token by token"
        )
    with progress(source, _scored(ids, ways), silent) as bar:
        return reference.divergence(model, ids, **ways, on_tokens=bar.update)


def _scored(ids: Array, ways: Mapping[str, Any]) -> int:
    """How many tokens of a text are scored."""
    return len(ids) - int(ways["first_token"] == "skip")


def _way(ways: Mapping[str, Any]) -> str:
    first = "skipped" if ways["first_token"] == "skip" else "after end-of-text"
    return f"window {ways['window']}, stride {ways['stride']}, first token {first}"
