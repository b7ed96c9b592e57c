"""Wrong scales, masks and softmaxes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...ops import softmax
from ...params import Array
from ..operations import OPERATIONS, Compute, Program, future
from .mistake import Mistake, exchanged, several_passes

__all__ = ["SCORES"]

RAW, PATTERN = "h.{i}.attn.scores", "h.{i}.attn.pattern"

Sees = Callable[[Program, Array, Array], Array]  # which keys s each query t sees


def _rescaled(factor: Callable[[Program, int], float]) -> tuple[str, Compute]:
    """Scores with another factor on them."""

    def scores(program: Program, layer: int, qkv: Array) -> Array:
        right: Array = OPERATIONS[RAW].compute(program, layer, qkv)
        return right * factor(program, layer)

    return RAW, scores


def _seeing(sees: Sees, fill: float = -np.inf, how: str = "set") -> list[tuple[str, Compute]]:
    """Attention with another mask: which keys s each query t sees, and what the others get."""

    def mask(program: Program, scores: Array) -> Array:
        t = np.arange(scores.shape[1])
        seen = sees(program, t, t[:, None])
        if how == "add":
            return np.where(seen, scores, np.where(scores > fill / 2, scores + fill, scores))
        return np.where(seen, scores, fill)

    def scores(program: Program, layer: int, qkv: Array) -> Array:
        return mask(program, OPERATIONS[RAW].compute(program, layer, qkv))

    def pattern(program: Program, layer: int, scores: Array) -> Array:
        return softmax(mask(program, scores))

    return [(RAW, scores), (PATTERN, pattern)]


def _own_row(program: Program, s: Array, t: Array) -> Array:
    """Earlier keys only; the first query has none, so it keeps its own."""
    return np.asarray((s < t) | ((s == 0) & (t == 0)))


def _from_the_start(program: Program, s: Array, t: Array) -> Array:
    """Query 0 of each pass aligned with key 0."""
    starts = np.cumsum([0, *program.chunks[:-1]])
    start = np.repeat(starts, program.chunks)
    return np.asarray(s <= t - start[:, None])


def _pattern_as(function: Callable[[Array, Array], Array]) -> tuple[str, Compute]:
    """The pattern as another function of the scores, and of which keys are hidden."""

    def pattern(program: Program, layer: int, scores: Array) -> Array:
        hidden = future(scores.shape[1])
        return function(scores, np.broadcast_to(hidden, scores.shape))

    return PATTERN, pattern


def _softmax_over(axis: int) -> Callable[[Array, Array], Array]:
    """Softmax over another axis than the keys'."""

    def function(scores: Array, hidden: Array) -> Array:
        masked = np.where(hidden, -np.inf, scores)
        weights = np.exp(masked - masked.max())
        total = weights.sum(axis, keepdims=True)
        return np.asarray(weights / np.where(total > 0, total, 1))

    return function


def _after_softmax(scores: Array, hidden: Array) -> Array:
    """Rows that no longer sum to 1."""
    return np.where(hidden, 0.0, softmax(scores))


def _bare_softmax(scores: Array, hidden: Array) -> Array:
    """The formula as it stands, in float32: it overflows from 88.7 on."""
    weights = np.exp(np.where(hidden, -np.inf, scores))
    weights = np.where(weights > np.finfo(np.float32).max, np.inf, weights)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _multiplied(scores: Array, hidden: Array) -> Array:
    """A masked score of 0 is not a weight of 0."""
    return softmax(np.where(hidden, 0.0, scores))


SCORES = (
    Mistake(
        "scores not scaled",
        "T5 has the factor in its initial weights instead",
        (RAW,),
        config={"scale_attn_weights": False},
        when=lambda program: program.config.scale_attn_weights,
    ),
    exchanged(
        "scores scaled by sqrt(C) instead of sqrt(D)",
        "the width of the model taken for that of a head",
        _rescaled(lambda program, layer: program.config.n_head**-0.5),
    ),
    exchanged(
        "scores scaled twice",
        "once by hand, once inside the library's attention",
        _rescaled(lambda program, layer: program.config.head_dim**-0.5),
    ),
    Mistake(
        "inverse-layer scale ignored",
        "transformers did until March 2026",
        (RAW,),
        config={"scale_attn_by_inverse_layer_idx": False},
        when=lambda program: program.config.scale_attn_by_inverse_layer_idx,
    ),
    Mistake(
        "inverse-layer scale added",
        "Megatron has it, and undoes it in its softmax",
        (RAW,),
        config={"scale_attn_by_inverse_layer_idx": True},
        when=lambda program: (
            not program.config.scale_attn_by_inverse_layer_idx and program.config.n_layer > 1
        ),
    ),
    exchanged(
        "mask hides the token itself",
        "tril(-1) for tril(0)",
        *_seeing(lambda program, s, t: s < t, fill=-1e30),
        causal=False,  # the first row sees nothing, and so everything
    ),
    exchanged("mask hides the token itself", "tril(-1) for tril(0)", *_seeing(_own_row)),
    exchanged(
        "mask shows the next token",
        "triu(2) for triu(1)",
        *_seeing(lambda program, s, t: s <= t + 1),
        causal=False,
    ),
    exchanged(
        "mask inverted",
        "True means masked in one API and allowed in the next",
        *_seeing(lambda program, s, t: s > t, fill=-1e30),
        causal=False,
    ),
    exchanged(
        "mask inverted",
        "True means masked in one API and allowed in the next",
        *_seeing(lambda program, s, t: s >= t),
        causal=False,
    ),
    exchanged(
        "mask of -1e4",
        "fits into float16, and leaks where scores are large",
        *_seeing(lambda program, s, t: s <= t, fill=-1e4, how="add"),
    ),
    exchanged(
        "mask of -1e4",
        "fits into float16, and leaks where scores are large",
        *_seeing(lambda program, s, t: s <= t, fill=-1e4),
    ),
    exchanged(
        "mask multiplied",
        "a masked score of 0 is not a weight of 0",
        _pattern_as(_multiplied),
        causal=False,
    ),
    exchanged(
        "mask aligned with the first query of a pass",
        "is_causal=True with a cache",
        *_seeing(_from_the_start),
        when=several_passes,
    ),
    exchanged(
        "mask missing",
        "BERT has none",
        *_seeing(lambda program, s, t: s + t >= 0),
        causal=False,
    ),
    exchanged(
        "mask after the softmax",
        "rows no longer sum to 1",
        _pattern_as(_after_softmax),
        causal=False,
    ),
    exchanged(
        "softmax over queries",
        "axis=-2, or a transposed score matrix",
        _pattern_as(_softmax_over(-2)),
        causal=False,
    ),
    exchanged("softmax over heads", "dim=0 on unbatched scores", _pattern_as(_softmax_over(-3))),
    exchanged(
        "softmax without subtracting the maximum",
        "the textbook's formula overflows",
        _pattern_as(_bare_softmax),
    ),
)
