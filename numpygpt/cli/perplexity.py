"""``numpygpt perplexity``: how well a model foretells whole texts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..api import Model
from ..divergence import Divergence
from ..errors import ArgumentError
from ..params import Array
from ..records import record
from ..scoring import Score, window_and_stride
from .divergences import print_divergences, statistics, together
from .options import DEFAULT_DTYPE, ModelChoice, add_model, add_windows, windows_of
from .record import add_record, finish, recorded
from .resume import Journal, key_of
from .terminal import one_line, tell
from .texts import Source, encode, named

__all__ = ["Measure", "add", "run", "total"]

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
        help="measure how well a model foretells texts",
        description="Print for each text, and for all together, the mean negative log-likelihood\n"
        "of its tokens in nats, the perplexity, and bits per byte and per token, with\n"
        "standard errors. A text longer than the context is read in windows that\n"
        "overlap. It is measured as it is, a newline at its end included.",
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
        "tokens, ratio of perplexities",
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
    if old is None:
        sources = [Source.look(name) for name in named(args.files)]
        options, against = windows_of(args), _against(args)
    else:
        sources, options, against = _from_record(old, args.replay)
    choice = ModelChoice.of(args, old)
    if against is not None:
        if args.resume is not None:
            raise ArgumentError(
                "--resume keeps no comparisons: leave out one of --resume and --against"
            )
        return _compare(args, choice, against, sources, options, old)
    return _measure(args, choice, sources, options, old)


# -- one model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measure:
    """How well a model foretells a text, or several.

    Attributes
    ----------
    count : int
        Scored tokens.
    bytes : int
        Of the scored tokens.
    nll : float
        Their negative log-likelihood together, in nats.
    standard_error : float
        Of the mean negative log-likelihood, in nats per token; NaN for fewer than two tokens.
    """

    count: int
    bytes: int
    nll: float
    standard_error: float

    @classmethod
    def of(cls, score: Score) -> Measure:
        """What is kept of a score."""
        return cls(score.count, score.bytes or 0, score.nll, score.standard_error)

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return self.nll / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood)."""
        return math.exp(self.nats) if not self.nats > 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of the scored tokens / bytes of the scored tokens."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood, in bits per token."""
        return self.nats / math.log(2)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a record."""
        return {
            **vars(self),
            "nats_per_token": self.nats,
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity * self.standard_error,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_token": self.bits_per_token,
        }


def total(measures: Sequence[Measure]) -> Measure:
    """Several texts together: tokens, bytes and nats are added before anything is divided.

    The standard error is that of all tokens, sqrt(M / (n (n - 1))) with M the sum of squared
    deviations from the common mean, which is put together from each text's own M_i and mean
    (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979).

    Examples
    --------
    >>> a, b = Measure(2, 8, 6.0, 1.0), Measure(1, 4, 3.0, math.nan)  # tokens of 2, 4 and 3 nats
    >>> total([a, b])
    Measure(count=3, bytes=12, nll=9.0, standard_error=0.5773502691896257)
    """
    parts = [m for m in measures if m.count]
    count, nll = sum(m.count for m in parts), math.fsum(m.nll for m in parts)
    squares = 0.0
    for m in parts:
        own = m.standard_error**2 * m.count * (m.count - 1) if m.count > 1 else 0.0
        squares += own + m.count * (m.nats - nll / count) ** 2
    error = math.sqrt(squares / count / (count - 1)) if count > 1 else math.nan
    return Measure(count, sum(m.bytes for m in parts), nll, error)


def _measure(
    args: argparse.Namespace,
    choice: ModelChoice,
    sources: Sequence[Source],
    options: Mapping[str, Any],
    old: Mapping[str, Any] | None,
) -> int:
    journal = None if args.resume is None else Journal(args.resume)
    model = choice.load()
    settled = _settled(options, model.config.n_ctx)
    described = choice.describe(model) if args.json or journal or old else {}
    done: list[Measure] = []
    taken, finished = 0, 0
    try:
        for source in sources:
            ids = encode(model.tokenizer, source.read())
            key = key_of(source.sha256, ids, described, settled) if journal else {}
            known = journal.find(key) if journal else None
            if known is not None:
                done.append(Measure(**known))
                taken += 1
                finished += 1
                continue
            with _bar(source, len(ids), settled, args.json) as advance:
                measure = Measure.of(model.score(ids, **settled, on_tokens=advance))
            if journal:
                journal.append(key, source.name, vars(measure))
            done.append(measure)
            finished += 1
    except KeyboardInterrupt as stopped:
        so_far = getattr(stopped, "results", None)
        if isinstance(so_far, Score) and so_far.count:
            done.append(Measure.of(so_far))  # of the text that was being measured
    if args.json or old is not None:
        results = {
            "texts": [m.as_json() for m in done],
            "total": total(done).as_json(),
            "finished": finished,
        }
        texts = [source.describe() for source in sources]
        asked = {"texts": texts, **settled, "against": None}
        status = finish(args, record("perplexity", described, asked, results), old)
    else:
        _print_measures(_names(sources, len(done), finished), done, settled)
        if taken:
            print(f"{taken} of {len(done)} results were taken from {one_line(args.resume)}")
        status = 0
    if finished == len(sources):
        return status
    tell("interrupted", f"incomplete: {finished} of {len(sources)} texts were measured")
    return 130


def _print_measures(
    names: Sequence[str], measures: Sequence[Measure], settled: Mapping[str, Any]
) -> None:
    """A line for each text and, if there are several, one for all."""
    print(
        f"{'tokens':>10} {'bytes':>11} {'nats/token':>10} {'+-':>7} {'perplexity':>11} {'+-':>8} "
        f"{'bits/byte':>9} {'bits/token':>10}  text"
    )
    rows = list(zip(measures, names, strict=True))
    if len(measures) > 1:
        rows.append((total(measures), "total"))
    for m, name in rows:
        error = m.perplexity * m.standard_error
        print(
            f"{m.count:>10,} {m.bytes:>11,} {_number(m.nats, 10)} {_number(m.standard_error, 7)} "
            f"{_number(m.perplexity, 11)} {_number(error, 8)} {_number(m.bits_per_byte, 9)} "
            f"{_number(m.bits_per_token, 10)}  {name}"
        )
    print(_way(settled))


def _number(value: float, width: int) -> str:
    """A number with four digits after the point; a dash if there is none."""
    return f"{'-' if math.isnan(value) else f'{value:,.4f}':>{width}}"


def _way(settled: Mapping[str, Any]) -> str:
    first = "skipped" if settled["first_token"] == "skip" else "after end-of-text"
    return f"window {settled['window']}, stride {settled['stride']}, first token {first}"


# -- two models --------------------------------------------------------------------------------


def _against(args: argparse.Namespace) -> ModelChoice | None:
    if args.against is not None:
        return ModelChoice(args.against, args.against_dtype or DEFAULT_DTYPE, {})
    if args.against_dtype is not None:
        raise ArgumentError("--against-dtype needs --against")
    return None


def _compare(
    args: argparse.Namespace,
    choice: ModelChoice,
    against: ModelChoice,
    sources: Sequence[Source],
    options: Mapping[str, Any],
    old: Mapping[str, Any] | None,
) -> int:
    model, reference = choice.load(), against.load()
    settled = _settled(options, min(model.config.n_ctx, reference.config.n_ctx))
    done: list[Divergence] = []
    finished = 0
    try:
        for source in sources:
            ids = _same_ids(model, reference, source)
            with _bar(source, len(ids), settled, args.json) as advance:
                done.append(reference.divergence(model, ids, **settled, on_tokens=advance))
            finished += 1
    except KeyboardInterrupt as stopped:
        so_far = getattr(stopped, "results", None)
        if isinstance(so_far, Divergence) and so_far.count:
            done.append(so_far)
    if args.json or old is not None:
        results = {
            "texts": [statistics(divergence) for divergence in done],
            "total": statistics(together(done)) if done else None,
            "finished": finished,
        }
        asked = {
            "texts": [source.describe() for source in sources],
            **settled,
            "against": against.describe(reference),
        }
        made = record("perplexity", choice.describe(model), asked, results)
        status = finish(args, made, old)
    else:
        if done:
            print_divergences(_names(sources, len(done), finished), done)
            print(_way(settled))
        status = 0
    if finished == len(sources):
        return status
    tell("interrupted", f"incomplete: {finished} of {len(sources)} texts were compared")
    return 130


def _same_ids(model: Model, reference: Model, source: Source) -> Array:
    """The tokens of a text, which must be the same for both models."""
    text = source.read()
    ids = encode(model.tokenizer, text)
    if not np.array_equal(ids, encode(reference.tokenizer, text)):
        raise ArgumentError(
            f"{source.name}: the two models cut it into different tokens; only models with one "
            "vocabulary can be compared token by token"
        )
    return ids


# -- both --------------------------------------------------------------------------------------


def _names(sources: Sequence[Source], count: int, finished: int) -> list[str]:
    """The names of the texts that there are results of; the last may be unfinished."""
    names = [one_line(source.name) for source in sources[:count]]
    return names[:finished] + [f"{name} (so far)" for name in names[finished:]]


def _settled(options: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    """The settings with their resolved values."""
    window, stride = window_and_stride(options["window"], options["stride"], n_ctx)
    return {**options, "window": window, "stride": stride}


@contextlib.contextmanager
def _bar(
    source: Source, tokens: int, settled: Mapping[str, Any], silent: bool
) -> Iterator[Callable[[int], None]]:
    """A progress bar where standard error is a terminal; yields what advances it."""
    from tqdm import tqdm

    scored = tokens - (settled["first_token"] == "skip")

    disable = True if silent or sys.stderr is None else None
    name = one_line(source.name)[-30:]
    with tqdm(total=scored, desc=name, unit="token", leave=False, disable=disable) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _from_record(
    old: Mapping[str, Any], path: str
) -> tuple[list[Source], dict[str, Any], ModelChoice | None]:
    """Texts, settings and reference of a record; values are checked where they go."""
    match old["options"]:
        case {
            "texts": [_, *_] as texts,
            "window": int() as window,
            "stride": int() as stride,
            "first_token": str() as first_token,
            "chunk": int() as chunk,
            "against": None | {"name": str(), "dtype": str(), "overrides": dict()} as against,
        }:
            sources = [Source.from_record(text, path) for text in texts]
            ways = {"window": window, "stride": stride, "first_token": first_token, "chunk": chunk}
            if against is None:
                return sources, ways, None
            reference = ModelChoice(against["name"], against["dtype"], against["overrides"])
            return sources, ways, reference
    raise ArgumentError(f"{path}: its options are not those of numpygpt perplexity")
