r"""How well a model foretells a text, and how far two models differ on it.

The log-probability of a text is the sum over its tokens,

    log p(x_1 ... x_n) = sum_t log p(x_t | x_1 ... x_(t-1)),

and perplexity is exp of the mean of its negative (F. Jelinek, R. L. Mercer, L. R. Bahl,
J. K. Baker, "Perplexity - a measure of the difficulty of speech recognition tasks", Journal of
the Acoustical Society of America 62, S63, 1977). A text longer than the context is read in windows
that overlap, as on the page "Perplexity of fixed-length models" of the transformers
documentation; :func:`windows` says which token is scored in which.

Logarithms are natural, so log-probabilities, entropies and divergences are in nats; they are
computed in float64 from the model's logits, whatever the model computes in.

Perplexities can be compared only between the same text, tokenizer, window, stride and rule for
the first token. Bits per byte can be compared across tokenizers too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .cache import Cache
from .decoding.sample import require_finite
from .errors import ArgumentError, Interrupted
from .feed import CHUNK, Feeder
from .params import Array, Config, Params

__all__ = [
    "Divergence",
    "FirstToken",
    "Rows",
    "Score",
    "Window",
    "divergence",
    "pooled",
    "score",
    "window_and_stride",
    "windows",
]

FirstToken: TypeAlias = Literal["skip", "end-of-text"]
OnTokens: TypeAlias = "Callable[[int], None] | None"

# How many logits of a model are held at a time. With GPT-2's 50257 tokens these are 83 rows, 17 MB
# in float32: a product of fewer rows waits for the token vectors (5 rows took 3.7 times as long
# for each token, 20 rows 1.5 times), of 166 rows it was 7 % faster and takes twice the memory.
BLOCK = 2**22

# How many of them are normalised at a time: 10 such rows, 8 MB in float64. Smaller and larger parts
# were slower by up to 15 %. The exponentials are the costly step; in float32 they would take 0.07
# instead of 0.25 ms of the 1.2 ms that a token of the 124M model takes, and lose 1e-7 nats.
PART = 2**19


# -- windows --------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Tokens ``begin`` to ``end - 1`` of a text, of which ``first`` to ``end - 1`` are scored.

    Token ``end - 1`` is not read: nothing follows it here that could be foretold.
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
        that is 1). The last token of a window is only foretold, not read, hence the + 1.
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
    window = _integer("window", window, 2, n_ctx + 1, f"the model has {n_ctx} positions")
    stride = max(1, window // 2) if stride is None else stride
    stride = _integer("stride", stride, 1, window - 1, "every window but the first needs context")
    return window, stride


def _integer(name: str, value: Any, least: int, most: int, why: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool | np.bool) or not least <= number <= most:
        raise ArgumentError(
            f"{name} must be an integer from {least} to {most} ({why}), not {value!r}"
        )
    return number


def windows(total: int, start: int, window: int, stride: int) -> Iterator[Window]:
    """Cut a text into windows that overlap, so that every token is scored exactly once.

    Window k is tokens k * stride to k * stride + window - 1, as far as there are so many. It
    scores those that no earlier window scored; the others are context. A token thus has at least
    `window` - `stride` tokens of context, where so many stand before it. The last window is
    the first that reaches the end.

    Parameters
    ----------
    total : int
        Tokens of the text.
    start : int
        The first token to score, 1 or more: what foretells a token is the tokens before it. A
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
        if end == total:
            return


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
        Of the model's vocabulary. The last one is not read, only foretold.
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
    start = _integer("start", start, 1, len(ids), f"there are {len(ids)} tokens")
    count = len(ids) - start
    rows = Rows(np.full(count, np.nan), np.zeros(count, np.intp), np.full(count, np.nan))
    workspace = _workspace(config)
    try:
        for targets, (logits,) in _blocks(ids, start, window, stride, [(params, config)], chunk):
            log_p, p = _log_softmax(logits, workspace)
            place = slice(targets.start - start, targets.stop - start)
            # Last of all the log-probabilities, which say up to where the rows are valid.
            rows.entropies[place] = 0.0 - _expected(log_p, p)  # of a certain token 0, not -0
            rows.ranks[place] = _ranks(logits, ids[targets])
            rows.logprobs[place] = log_p[np.arange(len(log_p)), ids[targets]]
            if on_tokens is not None:
                on_tokens(len(log_p))
    except KeyboardInterrupt:
        raise Interrupted(rows) from None
    return rows


def _blocks(
    ids: Array,
    start: int,
    window: int,
    stride: int,
    models: Sequence[tuple[Params, Config]],
    chunk: int,
) -> Iterator[tuple[slice, list[Array]]]:
    """The tokens to score, some at a time, and each model's logits for them, (R, V).

    The models read side by side, so they are never more than a chunk apart.
    """
    read = max(1, min(window, len(ids)) - 1)
    feeders = [Feeder(params, config, read, read, chunk) for params, config in models]
    caches = [Cache(config, read, params.wpe.dtype) for params, config in models]
    vocab_size = models[0][1].vocab_size
    most = min(max(1, BLOCK // vocab_size), chunk, read)
    few = max(1, PART // vocab_size)
    buffers = [np.empty((most, vocab_size), params.wpe.dtype) for params, _ in models]
    for begin, end, first in windows(len(ids), start, window, stride):
        for cache in caches:
            cache.truncate(0)
        new = [ids[begin : end - 1]]
        readers = [f.pieces(new, [cache]) for f, cache in zip(feeders, caches, strict=True)]
        for pieces in zip(*readers, strict=True):
            after = begin + pieces[0].start + 1  # the token that the piece's first row foretells
            stop = after + len(pieces[0].hidden)
            for low in range(max(first, after), stop, most):
                rows = slice(low - after, min(low + most, stop) - after)
                logits = [
                    feeder.logits(piece.hidden[rows], buffer[: rows.stop - rows.start])
                    for feeder, piece, buffer in zip(feeders, pieces, buffers, strict=True)
                ]
                for part in range(0, len(logits[0]), few):
                    parts = [block[part : part + few] for block in logits]
                    yield slice(low + part, low + part + len(parts[0])), parts


def _workspace(config: Config) -> Array:
    """Memory that :func:`_log_softmax` uses again and again: fresh pages are slow to come by."""
    return np.empty((2, max(1, PART // config.vocab_size), config.vocab_size))


def _log_softmax(logits: Array, workspace: Array) -> tuple[Array, Array]:
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


def _expected(values: Array, p: Array) -> Array:
    """The mean of values (R, V) under the distributions p (R, V), which is overwritten.

    Not a dot product of the BLAS, which may set several threads to work on it: on a machine with
    other work their waiting for each other took a hundred times as long as this.
    """
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


@dataclass(repr=False, eq=False)
class Score:
    """How well a model foretells a text of T tokens.

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
    def count(self) -> int:
        """How many tokens are scored."""
        return int(np.count_nonzero(~np.isnan(self.logprobs)))

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the scored tokens together, in nats."""
        return 0.0 - float(np.nansum(self.logprobs))

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood, in nats; NaN if nothing is scored."""
        return _mean_and_error(-self.logprobs)[0]

    @property
    def standard_error(self) -> float:
        """Of :attr:`nats_per_token`, in nats: the sample's standard deviation / sqrt(count).

        That formula is for independent tokens. Those of a text are not: hard and easy passages
        make neighbours alike, so the true uncertainty is larger. NaN for fewer than two tokens.
        """
        return _mean_and_error(-self.logprobs)[1]

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood): V for a model that knows nothing, 1 at best."""
        return _exp(self.nats_per_token)

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
        return self.nll / math.log(2) / self.bytes if self.count and self.bytes else math.nan

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


def pooled(scores: Sequence[Score]) -> Score:
    """The score of several texts together: their tokens, one text after another.

    Sums of nats, tokens and bytes are added before anything is divided, so a long text weighs
    more than a short one; the standard error is that of all tokens.

    Parameters
    ----------
    scores : sequence of Score
        At least one; all with the same window, stride and rule for the first token.

    Returns
    -------
    Score
        ``bytes`` is None if it is None for any of them.

    Raises
    ------
    ArgumentError
        If there are none, or they were made in different ways.

    Examples
    --------
    >>> import numpy as np
    >>> def one(*logprobs):
    ...     n = len(logprobs)
    ...     return Score(np.zeros(n, int), np.log(logprobs), np.ones(n, int), np.zeros(n), 1, 2, 1)
    >>> round(pooled([one(1 / 2), one(1 / 4, 1 / 4, 1 / 4)]).bits_per_token, 6)  # (1 + 6) / 4
    1.75
    """
    ways = {(s.window, s.stride, s.first_token) for s in scores}
    if len(ways) != 1:
        raise ArgumentError(
            "scores can be pooled if there are some, all with one window, stride and rule for "
            f"the first token; received {len(scores)} scores with {sorted(ways)}"
        )
    ids, logprobs, ranks, entropies = (
        np.concatenate([getattr(s, name) for s in scores])
        for name in ("ids", "logprobs", "ranks", "entropies")
    )
    known = [s.bytes for s in scores if s.bytes is not None]
    size = sum(known) if len(known) == len(scores) else None
    ((window, stride, first_token),) = ways
    return Score(ids, logprobs, ranks, entropies, size, window, stride, first_token)


# -- two models -----------------------------------------------------------------------------------


@dataclass(repr=False, eq=False)
class Divergence:
    """How far another model q is from a model p, on T tokens of a text.

    The statistics and their standard errors are those that llama.cpp's perplexity tool reports
    with ``--kl-divergence``, where p is the base and q the quantised model. (Its numbers come
    out of 16 bit log-probabilities and from the second half of windows that do not overlap.)
    Every standard error takes the tokens as independent, which those of a text are not: it is
    too small.

    Attributes
    ----------
    ids : (T,) ndarray of int
        The scored tokens.
    kl : (T,) ndarray of float64
        KL(p || q) = sum over the vocabulary of p (log p - log q), in nats; NaN where
        interrupted. Never negative but for rounding: with equal models it is exactly 0,
        otherwise it has an absolute error of about 1e-15, and is not clipped.
    same_top : (T,) ndarray of bool
        Whether both models have the same likeliest token (among equals, the lowest id).
    logprobs, other_logprobs : (T,) ndarray of float64
        Of each token under p and under q, in nats; NaN where interrupted.
    window, stride : int
        See :func:`windows`.
    first_token : {"skip", "end-of-text"}
        Whether the first token of the text was left out or read after an end-of-text token.
    """

    ids: Array
    kl: Array
    same_top: Array
    logprobs: Array
    other_logprobs: Array
    window: int
    stride: int
    first_token: FirstToken = "skip"

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        return int(np.count_nonzero(~np.isnan(self.kl)))

    @property
    def mean_kl(self) -> float:
        """Mean of KL(p || q), in nats per token."""
        return _mean_and_error(self.kl)[0]

    @property
    def mean_kl_error(self) -> float:
        """Standard error of :attr:`mean_kl`, in nats per token."""
        return _mean_and_error(self.kl)[1]

    def kl_quantile(self, fraction: float) -> float:
        """The KL(p || q), in nats, that this fraction of the tokens does not exceed.

        Between two tokens it is interpolated linearly: 0.5 is the median, 1 the maximum.

        Raises
        ------
        ArgumentError
            If `fraction` is not from 0 to 1.
        """
        if not 0 <= fraction <= 1:
            raise ArgumentError(f"a fraction must be from 0 to 1, not {fraction!r}")
        known = self.kl[~np.isnan(self.kl)]
        return float(np.quantile(known, fraction)) if known.size else math.nan

    @property
    def top_1_agreement(self) -> float:
        """The fraction of tokens at which both models have the same likeliest token."""
        return _mean_and_error(self._agreement)[0]

    @property
    def top_1_agreement_error(self) -> float:
        """Standard error of :attr:`top_1_agreement`: sqrt(a (1 - a) / (count - 1))."""
        return _mean_and_error(self._agreement)[1]

    @property
    def _agreement(self) -> Array:
        return np.where(np.isnan(self.kl), np.nan, self.same_top)

    @property
    def perplexity(self) -> float:
        """Of the model p."""
        return _exp(_mean_and_error(-self.logprobs)[0])

    @property
    def other_perplexity(self) -> float:
        """Of the other model q."""
        return _exp(_mean_and_error(-self.other_logprobs)[0])

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of q / perplexity of p: above 1 if q foretells the text worse."""
        return _exp(_mean_and_error(self.logprobs - self.other_logprobs)[0])

    @property
    def perplexity_ratio_error(self) -> float:
        """Standard error of the ratio, to first order.

        The models are compared token by token: it is the ratio times the standard error of the
        mean difference of log-probabilities. That is far less than the errors of the two
        perplexities, since what is hard for one model is hard for the other.
        """
        return self.perplexity_ratio * _mean_and_error(self.logprobs - self.other_logprobs)[1]

    @property
    def rms_change(self) -> float:
        """Root mean square of q(token) - p(token), over the tokens of the text."""
        return math.sqrt(_mean_and_error(self._squared_change)[0])

    @property
    def rms_change_error(self) -> float:
        """Standard error of :attr:`rms_change`, to first order: that of its square / (2 rms)."""
        error = _mean_and_error(self._squared_change)[1]
        return error / (2 * self.rms_change) if self.rms_change else error

    @property
    def _squared_change(self) -> Array:
        with np.errstate(under="ignore"):
            squared: Array = np.square(np.exp(self.other_logprobs) - np.exp(self.logprobs))
        return squared

    def __str__(self) -> str:
        return (
            f"{self.count} tokens: KL {self.mean_kl:.4g} +- {self.mean_kl_error:.2g} nats, same "
            f"top token {self.top_1_agreement:.4%}, perplexity {self.perplexity:.4g} against "
            f"{self.other_perplexity:.4g} (window {self.window}, stride {self.stride}, "
            f"first token: {self.first_token})"
        )

    def __repr__(self) -> str:
        return f"<Divergence on {self}>"


def divergence(
    ids: Array,
    start: int,
    p: tuple[Params, Config],
    q: tuple[Params, Config],
    *,
    window: int | None = None,
    stride: int | None = None,
    chunk: int = CHUNK,
    on_tokens: OnTokens = None,
) -> Divergence:
    """Compare another model q with a model p on tokens `start` to N - 1 of a text.

    Both read the same windows side by side; the distributions are never kept.

    Parameters
    ----------
    ids : (N,) ndarray of int
    start : int
        The first token to score, 1 to N.
    p, q : (Params, Config)
        With vocabularies of one size.
    window, stride : int, optional
        See :func:`window_and_stride`; the window must fit both models.
    chunk : int
        Most tokens in one forward pass of each model.
    on_tokens : function, optional
        Called again and again with how many more tokens have been scored.

    Returns
    -------
    Divergence
        On the N - `start` tokens.

    Raises
    ------
    ArgumentError
        If the vocabularies differ in size, or an argument is out of range.
    NumpyGPTError
        If logits are NaN or infinite: the weights are.
    Interrupted
        On Ctrl-C. ``results`` is the Divergence; what was not compared is NaN.

    Examples
    --------
    >>> import numpy as np, numpygpt
    >>> models = [numpygpt.load("shakespeare", dtype=dtype) for dtype in ("float64", "float32")]
    >>> ids = np.array(models[0].tokenizer.encode("To be, or not to be"))
    >>> result = divergence(ids, 1, *((model.params, model.config) for model in models))
    >>> result.mean_kl < 1e-10, result.top_1_agreement
    (True, 1.0)
    """
    sizes = [config.vocab_size for _, config in (p, q)]
    if sizes[0] != sizes[1]:
        raise ArgumentError(
            f"only models with the same tokens can be compared; these have {sizes[0]} and "
            f"{sizes[1]}"
        )
    window, stride = window_and_stride(window, stride, min(p[1].n_ctx, q[1].n_ctx))
    start = _integer("start", start, 1, len(ids), f"there are {len(ids)} tokens")
    kl, logprobs, other_logprobs = np.full((3, len(ids) - start), np.nan)
    same_top = np.zeros(len(kl), bool)
    result = Divergence(ids[start:], kl, same_top, logprobs, other_logprobs, window, stride)
    workspaces = _workspace(p[1]), _workspace(q[1])
    try:
        for targets, blocks in _blocks(ids, start, window, stride, [p, q], chunk):
            place = slice(targets.start - start, targets.stop - start)
            tops = [block.argmax(axis=-1) for block in blocks]
            (log_p, probabilities), (log_q, _) = map(_log_softmax, blocks, workspaces)
            came = np.arange(len(log_p)), ids[targets]
            same_top[place] = tops[0] == tops[1]
            logprobs[place], other_logprobs[place] = log_p[came], log_q[came]
            kl[place] = _expected(np.subtract(log_p, log_q, out=log_p), probabilities)
            if on_tokens is not None:
                on_tokens(len(log_p))
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    return result


# -- statistics -----------------------------------------------------------------------------------


def _mean_and_error(values: Array) -> tuple[float, float]:
    """The mean and its standard error of what is not NaN; NaN if that is too little."""
    known = values[~np.isnan(values)]
    if not known.size:
        return math.nan, math.nan
    mean = float(known.mean())
    if known.size == 1:
        return mean, math.nan
    return mean, float(known.std(ddof=1)) / math.sqrt(known.size)


def _exp(x: float) -> float:
    """exp(x), infinite where it is too large for a float."""
    return math.exp(x) if not x > 709 else math.inf
