r"""How well a model predicts a text.

The log-probability of a text is the sum over its tokens,

    log p(x_1 ... x_n) = sum_t log p(x_t | x_1 ... x_(t-1)),

and perplexity is exp of the mean of its negative (F. Jelinek, R. L. Mercer, L. R. Bahl,
J. K. Baker, "Perplexity - a measure of the difficulty of speech recognition tasks", Journal of
the Acoustical Society of America 62, S63, 1977). A text longer than the context is read in windows
that overlap, as on the page "Perplexity of fixed-length models" of the transformers
documentation; :func:`windows` says which token is scored in which.

Logarithms are natural, so log-probabilities, entropies and divergences are in nats. Sums over the
vocabulary are in float64, whatever the model computes in.

Perplexities can be compared only between the same text, tokenizer, window, stride and rule for
the first token. Bits per byte can be compared across tokenizers too.

Memory: the logits of a bounded number of tokens are held at a time (:data:`BLOCK`). What is kept
of each token are four numbers: its id, log-probability, rank and entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .arguments import whole
from .cache import Cache
from .decoding.sample import require_finite
from .errors import Interrupted
from .feed import CHUNK, Feeder
from .params import Array, Config, Params
from .threads import get_threads, spread

__all__ = [
    "FirstToken",
    "Rows",
    "Score",
    "Summary",
    "Window",
    "score",
    "total",
    "window_and_stride",
    "windows",
]

FirstToken: TypeAlias = Literal["skip", "end-of-text"]
OnTokens: TypeAlias = "Callable[[int], None] | None"

# How many logits of a model are held at a time, at most: with GPT-2's 50257 tokens 333 rows, 67 MB
# in float32. A product of 83 rows reached 73 GFLOP/s, one of 250 rows 115; more rows take more
# memory.
BLOCK = 2**24

# How many of them are normalised at a time: 10 such rows, two arrays of 2 MB in float32.
PART = 2**19


# -- windows --------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Tokens ``begin`` to ``end - 1`` of a text, of which ``first`` to ``end - 1`` are scored.

    Token ``end - 1`` is not read: nothing follows it here that could be predicted.
    """

    begin: int
    end: int
    first: int


def window_and_stride(window: int | None, stride: int | None, n_ctx: int) -> tuple[int, int]:
    """The defaults of both, and their ranges.

    Parameters
    ----------
    window : int or None
        Tokens in a window, the scored ones included: 2 to `n_ctx` + 1; `n_ctx` if None (2 where
        that is 1). The last token of a window is only predicted, not read, hence the + 1.
    stride : int or None
        How far a window stands from the one before: 1 to `window` - 1; half a window if None.
    n_ctx : int
        Positions of the model, or of the smaller of two.

    Returns
    -------
    window, stride : int

    Raises
    ------
    ArgumentError
        If one is not an integer in its range.

    Examples
    --------
    >>> window_and_stride(None, None, 1024)
    (1024, 512)
    """
    window = max(2, n_ctx) if window is None else window
    window = whole("window", window, 2, n_ctx + 1, f"the model has {n_ctx} positions")
    stride = max(1, window // 2) if stride is None else stride
    stride = whole("stride", stride, 1, window - 1, "every window but the first needs context")
    return window, stride


def windows(total: int, start: int, window: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows that overlap, so that every token is scored exactly once.

    Window k is tokens k * stride to k * stride + window - 1, as far as there are so many. It
    scores those that no earlier window scored; the others are context. A token thus has at least
    `window` - `stride` tokens of context, where so many stand before it.

    Parameters
    ----------
    total : int
        Tokens of the text.
    start : int
        The first token to score, 1 or more: a token is predicted from those before it. A
        window that would score nothing is left out.
    window, stride : int
        As :func:`window_and_stride` returns them.

    Yields
    ------
    Window

    Examples
    --------
    >>> for w in windows(total=10, start=1, window=6, stride=3):
    ...     print(w)
    Window(begin=0, end=6, first=1)
    Window(begin=3, end=9, first=6)
    Window(begin=6, end=10, first=9)
    """
    for begin in range(0, total, stride):
        end = min(begin + window, total)
        first = max(start, begin - stride + window if begin else 1)
        if first < end:
            yield Window(begin, end, first)


# -- one model ------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What a model says about T tokens, in the order of the text.

    Attributes
    ----------
    logprobs : (T,) ndarray of float64
        Of each token, given those before it; in nats.
    ranks : (T,) ndarray of int
        1 if the token is the likeliest, the greedy choice; among equals the lower id goes first.
    entropies : (T,) ndarray of float64
        Of the model's distribution at each token, sum of -p log p; in nats.
    """

    logprobs: Array
    ranks: Array
    entropies: Array


def score(
    ids: Array,
    start: int,
    params: Params,
    config: Config,
    *,
    window: int | None = None,
    stride: int | None = None,
    chunk: int = CHUNK,
    on_tokens: OnTokens = None,
) -> Rows:
    """Score tokens `start` to N - 1 of a text, each given the tokens before it.

    Parameters
    ----------
    ids : (N,) ndarray of int
        Of the model's vocabulary. The last one is not read, only predicted.
    start : int
        The first token to score, 1 to N. What stands before it is context.
    params : Params
    config : Config
    window, stride : int, optional
        See :func:`window_and_stride` and :func:`windows`.
    chunk : int
        Most tokens in one forward pass. Changes nothing but rounding.
    on_tokens : function, optional
        Called again and again with how many more tokens have been scored.

    Returns
    -------
    Rows
        Of the N - `start` tokens.

    Raises
    ------
    ArgumentError
        If `start`, `window` or `stride` is out of range.
    NumpyGPTError
        If the logits are NaN or infinite: the weights are.
    Interrupted
        On Ctrl-C. ``results`` has the rows; those not scored are NaN, with rank 0.

    Examples
    --------
    >>> import numpy as np, numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> ids = np.array(model.tokenizer.encode("To be, or not to be"))
    >>> rows = score(ids, 1, model.params, model.config)
    >>> len(ids), rows.ranks.shape
    (7, (6,))
    """
    window, stride = window_and_stride(window, stride, config.n_ctx)
    start = whole("start", start, 1, len(ids), f"there are {len(ids)} tokens")
    count = len(ids) - start
    rows = Rows(np.full(count, np.nan), np.zeros(count, np.intp), np.full(count, np.nan))
    workspaces = [make_workspace(config, params.dtype) for _ in range(get_threads())]
    try:
        for targets, (logits,) in logit_blocks(
            ids, start, window, stride, [(params, config)], chunk
        ):
            place = slice(targets.start - start, targets.stop - start)
            found = measured(logits, ids[targets], workspaces)
            # Last of all the log-probabilities, which say up to where the rows are valid.
            rows.entropies[place], rows.ranks[place] = found.entropies, found.ranks
            rows.logprobs[place] = found.logprobs
            if on_tokens is not None:
                on_tokens(len(logits))
    except KeyboardInterrupt:
        raise Interrupted(rows) from None
    return rows


def logit_blocks(
    ids: Array,
    start: int,
    window: int,
    stride: int,
    models: Sequence[tuple[Params, Config]],
    chunk: int,
) -> Iterator[tuple[slice, list[Array]]]:
    """The tokens to score, some at a time, and each model's logits for them, (R, V)."""
    read = max(1, min(window, len(ids)) - 1)
    feeders = [Feeder(params, config, read, read, chunk) for params, config in models]
    caches = [Cache(config, read, params.dtype) for params, config in models]
    vocab_size = models[0][1].vocab_size
    most = min(max(1, BLOCK // vocab_size), chunk, read)
    buffers = [np.empty((most, vocab_size), params.dtype) for params, _ in models]
    for begin, end, first in windows(len(ids), start, window, stride):
        for cache in caches:
            cache.truncate(0)
        new = [ids[begin : end - 1]]
        readers = [f.pieces(new, [cache]) for f, cache in zip(feeders, caches, strict=True)]
        for pieces in zip(*readers, strict=True):  # side by side: each model reads one chunk
            after = begin + pieces[0].start + 1  # the token that the piece's first row predicts
            stop = after + len(pieces[0].hidden)
            rest = stop - max(first, after)
            step = math.ceil(rest / math.ceil(rest / most)) if rest > 0 else 1  # of equal size
            for low in range(max(first, after), stop, step):
                rows = slice(low - after, min(low + step, stop) - after)
                logits = [
                    feeder.logits(piece.hidden[rows], buffer[: rows.stop - rows.start])
                    for feeder, piece, buffer in zip(feeders, pieces, buffers, strict=True)
                ]
                yield slice(low, low + len(logits[0])), logits


def parts(logits: Array) -> list[slice]:
    """The rows of a block, few enough at a time to be worked on in a core's cache."""
    few = max(1, PART // logits.shape[-1])
    return [slice(low, min(low + few, len(logits))) for low in range(0, len(logits), few)]


def make_workspace(config: Config, dtype: Any = np.float64) -> Array:
    """Memory for a part that is used again and again: fresh pages are slow to come by."""
    return np.empty((2, max(1, PART // config.vocab_size), config.vocab_size), dtype)


def measured(logits: Array, targets: Array, workspaces: Sequence[Array]) -> Rows:
    """What is kept of some tokens, from the logits (R, V) before each and their ids (R,).

    Exponentials are of the logits' type and sums in float64: of float32 logits, which are wrong by
    1e-5 themselves, that takes a third of the time and changes a log-probability by 1.4e-8 nats.
    """
    rows = Rows(np.empty(len(logits)), np.empty(len(logits), np.intp), np.empty(len(logits)))

    def work(share: tuple[Array, list[slice]]) -> None:
        workspace, some = share
        for part in some:
            kept = _measured(logits[part], targets[part], workspace)
            for whole_column, column in zip(rows, kept, strict=True):
                whole_column[part] = column

    each = parts(logits)
    shares = [each[i :: len(workspaces)] for i in range(len(workspaces))]
    spread(work, list(zip(workspaces, shares, strict=True)))
    return rows


def _measured(logits: Array, targets: Array, workspace: Array) -> Rows:
    """:func:`measured` for one part."""
    shifted, p = workspace[:, : len(logits)]
    top = logits.max(axis=-1, keepdims=True)
    require_finite(np.append(top, -logits.min()))
    np.subtract(logits, top, out=shifted)
    with np.errstate(under="ignore"):  # a probability below 1e-38 is 0
        np.exp(shifted, out=p)
        total = p.sum(axis=-1, dtype=np.float64)
        mean = np.multiply(shifted, p, out=p).sum(axis=-1, dtype=np.float64) / total
    came = logits[np.arange(len(logits)), targets].astype(np.float64) - top[:, 0]
    log_total = np.log(total)
    # Of a certain token the entropy is 0, not -0.
    return Rows(came - log_total, _ranks(logits, targets), 0.0 + (log_total - mean))


def log_softmax(logits: Array, workspace: Array) -> tuple[Array, Array]:
    """Logits (R, V) -> log-probabilities and probabilities (R, V), in float64."""
    log_p, p = workspace[:, : len(logits)]
    top = logits.max(axis=-1, keepdims=True)
    require_finite(np.append(top, -logits.min()))
    np.subtract(logits, top, out=log_p, dtype=np.float64)
    with np.errstate(under="ignore"):  # a probability below 1e-308 is 0
        np.exp(log_p, out=p)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
    log_p -= np.log(total)
    return log_p, p


def expected(values: Array, p: Array) -> Array:
    """The mean of values (R, V) under the distributions p (R, V), which is overwritten."""
    # Not a product of the BLAS: it may start threads, and there is too little work to share.
    with np.errstate(under="ignore"):
        weighted: Array = np.multiply(values, p, out=p).sum(axis=-1)
    return weighted


def _ranks(logits: Array, targets: Array) -> Array:
    """Each target's place among the logits of its row, from 1; among equals by id."""
    return np.array(
        [
            1 + np.count_nonzero(row > row[target]) + np.count_nonzero(row[:target] == row[target])
            for row, target in zip(logits, targets, strict=True)
        ]
    )


# -- statistics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """How well a model predicts some tokens: those of a text, or of several together.

    Attributes
    ----------
    count : int
        Scored tokens.
    bytes : int or None
        Of the scored tokens; None without a tokenizer.
    nll : float
        Their negative log-likelihood together, in nats.
    standard_error : float
        Of the mean negative log-likelihood, in nats per token: the sample's standard deviation /
        sqrt(count). That is for independent tokens. Those of a text are not: hard and easy
        passages make neighbours alike, so the true uncertainty is larger. NaN for fewer than two
        tokens.

    Examples
    --------
    >>> four = Summary(count=4, bytes=10, nll=4 * math.log(8), standard_error=0.5)
    >>> round(four.perplexity, 9), round(four.bits_per_token, 9), round(four.bits_per_byte, 9)
    (8.0, 3.0, 1.2)
    """

    count: int
    bytes: int | None
    nll: float
    standard_error: float

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood, in nats; NaN if nothing is scored."""
        return self.nll / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood): V for a model that knows nothing, 1 at best."""
        return bounded_exp(self.nats_per_token)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity, to first order: perplexity * standard_error."""
        return self.perplexity * self.standard_error

    @property
    def bits_per_token(self) -> float:
        """Mean negative log-likelihood, in bits."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of the scored tokens / bytes of the scored tokens; None without a tokenizer.

        Can be compared across tokenizers. A token that is not scored counts in neither.
        """
        if self.bytes is None:
            return None
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan


def total(summaries: Sequence[Summary]) -> Summary:
    """Several texts together: tokens, bytes and nats are added before anything is divided.

    So a long text weighs more than a short one. The standard error is that of all tokens,
    sqrt(M / (n (n - 1))) with M the sum of squared deviations from the common mean, which is put
    together from each text's own M_i and mean (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979).

    Parameters
    ----------
    summaries : sequence of Summary
        All made with the same window, stride and rule for the first token.

    Returns
    -------
    Summary
        ``bytes`` is None if it is None for any of them.

    Examples
    --------
    >>> a, b = Summary(2, 8, 6.0, 1.0), Summary(1, 4, 3.0, math.nan)  # tokens of 2, 4 and 3 nats
    >>> total([a, b])
    Summary(count=3, bytes=12, nll=9.0, standard_error=0.5773502691896257)
    """
    parts = [s for s in summaries if s.count]
    count, nll = sum(s.count for s in parts), math.fsum(s.nll for s in parts)
    sizes = [s.bytes for s in summaries if s.bytes is not None]
    size = sum(sizes) if len(sizes) == len(summaries) else None
    squares = 0.0
    for s in parts:
        own = s.standard_error**2 * s.count * (s.count - 1) if s.count > 1 else 0.0
        squares += own + s.count * (s.nats_per_token - nll / count) ** 2
    error = math.sqrt(squares / count / (count - 1)) if count > 1 else math.nan
    return Summary(count, size, nll, error)


@dataclass(repr=False, eq=False)
class Score:
    """How well a model predicts a text of T tokens.

    Attributes
    ----------
    ids : (T,) ndarray of int
    logprobs : (T,) ndarray of float64
        Of each token, given those before it, in nats; NaN if not scored.
    ranks : (T,) ndarray of int
        1 if the token is the greedy choice (among equals the lowest id), 2 if it is the second
        likeliest, and so on; 0 if not scored.
    entropies : (T,) ndarray of float64
        Of the model's distribution at each token, in nats; NaN if not scored.
    bytes : int or None
        Of the scored tokens only; None without a tokenizer.
    window, stride : int
        See :func:`windows`.
    first_token : {"skip", "end-of-text"}
        Whether the first token of the text was left out or read after an end-of-text token.
    """

    ids: Array
    logprobs: Array
    ranks: Array
    entropies: Array
    bytes: int | None
    window: int
    stride: int
    first_token: FirstToken = "skip"

    @property
    def summary(self) -> Summary:
        """The scored tokens together; :func:`total` joins those of several texts."""
        known = self.logprobs[~np.isnan(self.logprobs)]
        nll = 0.0 - float(known.sum())  # of nothing 0, not -0
        return Summary(known.size, self.bytes, nll, mean_and_error(known)[1])

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return self.summary.count

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the scored tokens together, in nats."""
        return self.summary.nll

    @property
    def nats_per_token(self) -> float:
        """See :attr:`Summary.nats_per_token`."""
        return self.summary.nats_per_token

    @property
    def standard_error(self) -> float:
        """Of :attr:`nats_per_token`, in nats; see :class:`Summary`."""
        return self.summary.standard_error

    @property
    def perplexity(self) -> float:
        """See :attr:`Summary.perplexity`."""
        return self.summary.perplexity

    @property
    def perplexity_error(self) -> float:
        """See :attr:`Summary.perplexity_error`."""
        return self.summary.perplexity_error

    @property
    def bits_per_token(self) -> float:
        """See :attr:`Summary.bits_per_token`."""
        return self.summary.bits_per_token

    @property
    def bits_per_byte(self) -> float | None:
        """See :attr:`Summary.bits_per_byte`."""
        return self.summary.bits_per_byte

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written the scored tokens: all ranks are 1."""
        ranks = self.ranks[self.ranks > 0]
        return bool(ranks.size and (ranks == 1).all())

    def __str__(self) -> str:
        per_byte = self.bits_per_byte
        return (
            f"{self.count} tokens: perplexity {self.perplexity:.4g} +- {self.perplexity_error:.2g}"
            + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
            + f" (window {self.window}, stride {self.stride}, first token: {self.first_token})"
        )

    def __repr__(self) -> str:
        return f"<Score of {self}>"


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean and its standard error of what is not NaN; NaN if that is too little."""
    known = values[~np.isnan(values)]
    if not known.size:
        return math.nan, math.nan
    mean = float(known.mean())
    if known.size == 1:
        return mean, math.nan
    return mean, float(known.std(ddof=1)) / math.sqrt(known.size)


def bounded_exp(x: float) -> float:
    """exp(x), infinite where it is too large for a float."""
    return math.exp(x) if not x > 709 else math.inf
