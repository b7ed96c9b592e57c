"""How far two models differ on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .arguments import whole
from .errors import ArgumentError, Interrupted
from .feed import CHUNK
from .params import Array, Config, Params
from .scoring import (
    FirstToken,
    OnTokens,
    bounded_exp,
    expected,
    log_softmax,
    logit_blocks,
    make_workspace,
    mean_and_error,
    parts,
    window_and_stride,
)

__all__ = ["Divergence", "divergence"]


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
        See :func:`numpygpt.scoring.windows`.
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
        return mean_and_error(self.kl)[0]

    @property
    def mean_kl_error(self) -> float:
        """Standard error of :attr:`mean_kl`, in nats per token."""
        return mean_and_error(self.kl)[1]

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
        return mean_and_error(self._agreement)[0]

    @property
    def top_1_agreement_error(self) -> float:
        """Standard error of :attr:`top_1_agreement`: sqrt(a (1 - a) / (count - 1))."""
        return mean_and_error(self._agreement)[1]

    @property
    def _agreement(self) -> Array:
        return np.where(np.isnan(self.kl), np.nan, self.same_top)

    @property
    def perplexity(self) -> float:
        """Of the model p."""
        return bounded_exp(mean_and_error(-self.logprobs)[0])

    @property
    def other_perplexity(self) -> float:
        """Of the other model q."""
        return bounded_exp(mean_and_error(-self.other_logprobs)[0])

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of q / perplexity of p: above 1 if q predicts the text worse."""
        return bounded_exp(mean_and_error(self.logprobs - self.other_logprobs)[0])

    @property
    def perplexity_ratio_error(self) -> float:
        """Standard error of the ratio, to first order.

        The models are compared token by token: it is the ratio times the standard error of the
        mean difference of log-probabilities. That is far less than the errors of the two
        perplexities, since what is hard for one model is hard for the other.
        """
        return self.perplexity_ratio * mean_and_error(self.logprobs - self.other_logprobs)[1]

    @property
    def rms_change(self) -> float:
        """Root mean square of q(token) - p(token), over the tokens of the text."""
        return math.sqrt(mean_and_error(self._squared_change)[0])

    @property
    def rms_change_error(self) -> float:
        """Standard error of :attr:`rms_change`, to first order: that of its square / (2 rms)."""
        error = mean_and_error(self._squared_change)[1]
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
    first_token: FirstToken = "skip",
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
        See :func:`numpygpt.scoring.window_and_stride`; the window must fit both models.
    first_token : {"skip", "end-of-text"}
        What the result says of it; it changes nothing, since `start` does.
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
    start = whole("start", start, 1, len(ids), f"there are {len(ids)} tokens")
    kl, logprobs, other_logprobs = np.full((3, len(ids) - start), np.nan)
    same_top = np.zeros(len(kl), bool)
    result = Divergence(
        ids[start:], kl, same_top, logprobs, other_logprobs, window, stride, first_token
    )
    workspaces = make_workspace(p[1]), make_workspace(q[1])
    try:
        for targets, blocks in logit_blocks(ids, start, window, stride, [p, q], chunk):
            for part in parts(blocks[0]):
                some = [block[part] for block in blocks]
                first, stop, _ = part.indices(targets.stop - targets.start)
                began = targets.start - start + first
                place = slice(began, began + stop - first)
                tops = [block.argmax(axis=-1) for block in some]
                (log_p, probabilities), (log_q, _) = map(log_softmax, some, workspaces)
                came = np.arange(len(log_p)), ids[start:][place]
                same_top[place] = tops[0] == tops[1]
                logprobs[place], other_logprobs[place] = log_p[came], log_q[came]
                kl[place] = expected(np.subtract(log_p, log_q, out=log_p), probabilities)
                if on_tokens is not None:
                    on_tokens(len(log_p))
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    return result
