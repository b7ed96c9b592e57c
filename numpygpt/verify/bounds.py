r"""How far rounding can move the result of one operation, number by number.

For each operation there are two bounds, functions of its exact inputs. *likely* is what rounding
does in practice, with the constants of :data:`SUMS`, which a script measures
(scripts/calibrate_bounds.py; its table lies beside it). *certain* is what no order of rounding
exceeds, to first order in u. What lies between is suspicious; what lies beyond both is no
rounding.

In what follows u is the unit roundoff of stored results, s that of sums, f that of the factors of
a product (see :class:`numpygpt.verify.arithmetic.Arithmetic`).

Sums
    Adding n numbers x_k in any order makes n - 1 roundings of partial sums, none larger than ``A
    = sum |x_k|``: the error is at most ``n s A``. Independent roundings add up like a random
    walk, to about ``sqrt(n) s A`` and less, as partial sums are smaller than A and the roundings
    smaller than u. likely takes ``c sqrt(n) s A`` (Higham and Mary 2019 show that such a bound
    holds with a probability that c controls). c is measured over orders from one long chain,
    which is the worst that is in use, to pairwise.
Products x W + b
    A sum for each number, with ``A = |x| |W| + |b|``, since it may begin with the bias. Where
    factors are read with fewer bits, each loses up to ``2 f``, as matrix units cut bits off rather
    than round; part of that is the same in every term, part goes this way and that, so that likely
    takes ``4 f (sqrt(x**2 W**2) + |x W|)`` and certain ``4 f A``. Where results are stored with
    fewer bits than sums have, a library may cut a long sum into parts and store these before it
    adds them (cuBLAS does for PyTorch unless it is told not to): likely takes ``u min(3 sqrt(x**2
    W**2) + |x W|, A)``, certain ``u A``. Then the product and the sum with the bias are stored:
    ``u (|x W| + |y|)``.
Layer norm
    The mean errs like a sum: ``m = c sqrt(n) s mean|x| + u |mean|``. The variance v is a sum of
    squares (of x, where a program computes ``mean(x**2) - mean(x)**2``: hence the condition ``k =
    mean(x**2) / (v + eps)``), so z = (x - mean) / sqrt(v + eps) errs by ``m / sqrt(v + eps) + |z|
    (c sqrt(n) s k + 4 u)``, and the result by |g| times that, ``u |g z|`` and ``u |y|``. The root
    halves the error of the variance; but where one feature is a thousand times the others, as in
    GPT-2's stream, the squares of the others are rounded in one direction, and the half is needed.
Softmax
    exp(x - max) turns the absolute error of its argument into a relative one: ``u |x - max|``,
    and ``u (|x| + |max|)`` for scores that were recorded with fewer bits, or multiplied by log2(e)
    for an exponential of 2. The exponential, the division and the stored result add ``4 u``, the
    sum of positive numbers ``c sqrt(n) s``.
Activation functions
    Every formula for GELU, sigmoid and their like multiplies x by a number between 0 and 1 that
    is itself computed as a difference or sum with 1: ``4 u (|x| + |y|)``, not so many units of y.
The residual stream
    One sum, ``u |y|``, of two terms that a program may have kept in more bits than it recorded,
    ``u (|x| + |branch|)``.

References
----------
N. J. Higham (2002), Accuracy and Stability of Numerical Algorithms, chapters 3 and 4. N. J.
Higham and T. Mary (2019), A New Approach to Probabilistic Rounding Error Analysis, SIAM Journal
on Scientific Computing 41(5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from ..params import Array
from .arithmetic import Arithmetic
from .operations import Program, future, heads_of, kind_of, layer_of

__all__ = ["SUMS", "Bound", "bound"]

# c, the constant of sums: between 4 and 10 standard deviations of what was measured. In one long
# chain of n terms of one sign and size they are a quarter of s A sqrt(n) (evenly spread roundings
# of partial sums that grow like k A / n would give a third); where one term is nearly all of A from
# the start, 0.58 of it. Every other order stays further below (scripts/rounding-table.md).
SUMS = 2.5


class Bound(NamedTuple):
    """For each number of a result: what rounding does in practice, and what it cannot exceed."""

    likely: Array
    certain: Array


Bounder: TypeAlias = Callable[..., Bound]


def bound(program: Program, name: str, inputs: dict[str, Array], y: Array, a: Arithmetic) -> Bound:
    """The bounds of one operation of the right program.

    Parameters
    ----------
    program : Program
    name : str
        Trace key.
    inputs : dict of str to ndarray
        By trace key, as the operation takes them.
    y : ndarray of float64
        Its result.
    a : Arithmetic

    Returns
    -------
    Bound
        Of y's shape.
    """
    arrays = [inputs[key] for key in program.operation(name).inputs]
    with np.errstate(all="ignore"):
        likely, certain = BOUNDS[kind_of(name)](program, layer_of(name), *arrays, y=y, a=a)
        likely = likely + a.least
        return Bound(likely, np.maximum(likely, certain))


def sum_of(n: int, size: Array, s: float) -> Bound:
    """Of adding `n` numbers whose absolute values add up to `size`."""
    return Bound(SUMS * math.sqrt(n) * s * size, n * s * size)


def product(x: Array, w: Array, a: Arithmetic, scale: float = 1.0) -> Bound:
    """Of ``scale * x @ w``, but for storing it."""
    size = abs(scale) * np.matmul(np.abs(x), np.abs(w))
    likely, certain = sum_of(x.shape[-1], size, a.sums)
    if a.factors or a.u > a.sums:
        spread = np.abs(scale) * np.sqrt(np.matmul(np.square(x), np.square(w)))
        result = np.abs(scale * np.matmul(x, w))
    if a.factors:
        likely = likely + 4 * a.factors * (spread + result)
        certain = certain * (1 + 4 * a.factors / (x.shape[-1] * a.sums))
    if a.u > a.sums:
        likely = likely + a.u * np.minimum(3 * spread + result, size)
        certain = certain + a.u * size
    return Bound(likely, certain)


def plus(bound: Bound, more: Array) -> Bound:
    """With another error that both bounds take in full."""
    return Bound(bound.likely + more, bound.certain + more)


# -- one for each operation -----------------------------------------------------------------------


def _stored(program: Program, layer: int, *inputs: Array, y: Array, a: Arithmetic) -> Bound:
    """Of what is only stored: the embedding, and a copy."""
    return Bound(a.u * np.abs(y), a.u * np.abs(y))


def _added(
    program: Program, layer: int, x: Array, branch: Array, *, y: Array, a: Arithmetic
) -> Bound:
    most = a.u * (np.abs(y) + np.abs(x) + np.abs(branch))
    return Bound(most, most)


def _mapped(name: str) -> Bounder:
    def of(program: Program, layer: int, x: Array, *, y: Array, a: Arithmetic) -> Bound:
        w, b = program.map(name.format(i=layer))
        products = y if b is None else y - b
        stored = a.u * (np.abs(products) + np.abs(y))
        likely, certain = product(x, w, a)
        if b is not None:  # the sum may begin with the bias
            more = sum_of(x.shape[-1] + 1, np.abs(b), a.sums)
            likely, certain = likely + more.likely, certain + more.certain
        return plus(Bound(likely, certain), stored)

    return of


def _projected(program: Program, layer: int, heads: Array, *, y: Array, a: Arithmetic) -> Bound:
    rows = heads.transpose(1, 0, 2).reshape(len(y), -1)
    return _mapped("h.{i}.attn.c_proj")(program, layer, rows, y=y, a=a)


def _unembedded(program: Program, layer: int, hidden: Array, *, y: Array, a: Arithmetic) -> Bound:
    head = program.weight("head")
    assert head is not None
    return plus(product(hidden, head.T, a), a.u * np.abs(y))


def _normed(name: str) -> Bounder:
    def of(program: Program, layer: int, x: Array, *, y: Array, a: Arithmetic) -> Bound:
        g, _ = program.norm(name.format(i=layer))
        n = x.shape[-1]
        mean = x.mean(-1, keepdims=True)
        root = np.sqrt(x.var(-1, keepdims=True) + program.config.layer_norm_epsilon)
        z = (x - mean) / root
        condition = np.square(x).mean(-1, keepdims=True) / np.square(root)
        stored = a.u * (np.abs(g) * (np.abs(mean) / root + 5 * np.abs(z)) + np.abs(y))
        mean_sum = sum_of(n, np.abs(x).mean(-1, keepdims=True), a.sums)
        square_sum = sum_of(n, condition, a.sums)
        likely, certain = (
            np.abs(g) * (mean_error / root + np.abs(z) * relative)
            for mean_error, relative in zip(mean_sum, square_sum, strict=True)
        )
        return plus(Bound(likely, certain), stored)

    return of


def _scores(program: Program, layer: int, qkv: Array, *, y: Array, a: Arithmetic) -> Bound:
    q, k, _ = heads_of(program, qkv)
    scale = program.config.attention_scale(layer)
    likely, certain = product(q, k.mT, a, scale)
    # Queries may be stored once more after they are scaled, products before.
    spread = scale * np.sqrt(np.matmul(np.square(q), np.square(k.mT)))
    stored = 2 * a.u * np.abs(scale * np.matmul(q, k.mT))
    worst = a.u * scale * np.matmul(np.abs(q), np.abs(k.mT))
    return plus(Bound(likely + np.minimum(4 * a.u * spread, worst), certain + worst), stored)


def _pattern(program: Program, layer: int, scores: Array, *, y: Array, a: Arithmetic) -> Bound:
    seen = np.where(future(scores.shape[1]), -np.inf, scores)
    largest = seen.max(-1, keepdims=True)
    below = largest - seen
    argument = np.where(np.isfinite(below), below + np.abs(seen) + np.abs(largest), 0.0)
    # Not only to first order: in bfloat16 the error of an argument of -80 is 0.3.
    relative = np.expm1(np.minimum(a.u * (argument + 4), 50))
    return plus(sum_of(scores.shape[-1], y, a.sums), relative * y)


def _mixed(
    program: Program, layer: int, pattern: Array, qkv: Array, *, y: Array, a: Arithmetic
) -> Bound:
    return plus(product(pattern, heads_of(program, qkv)[2], a), a.u * np.abs(y))


def _activated(program: Program, layer: int, x: Array, *, y: Array, a: Arithmetic) -> Bound:
    most = 4 * a.u * (np.abs(x) + np.abs(y))
    return Bound(most, 2 * most)


BOUNDS: dict[str, Bounder] = {
    "embed": _stored,
    "h.{i}.resid_pre": _stored,
    "h.{i}.ln_1": _normed("h.{i}.ln_1"),
    "h.{i}.attn.qkv": _mapped("h.{i}.attn.c_attn"),
    "h.{i}.attn.scores": _scores,
    "h.{i}.attn.pattern": _pattern,
    "h.{i}.attn.heads": _mixed,
    "h.{i}.attn.out": _projected,
    "h.{i}.resid_mid": _added,
    "h.{i}.ln_2": _normed("h.{i}.ln_2"),
    "h.{i}.mlp.pre": _mapped("h.{i}.mlp.c_fc"),
    "h.{i}.mlp.post": _activated,
    "h.{i}.mlp.out": _mapped("h.{i}.mlp.c_proj"),
    "h.{i}.resid_post": _added,
    "ln_f": _normed("ln_f"),
    "logits": _unembedded,
}
