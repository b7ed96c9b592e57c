"""The primitives GPT-2 is made of: linear, layer_norm, softmax and the activation functions.

Each function states its formula with the letters of its arguments, works on arrays of shape
``(..., C)``, keeps the dtype of its input (float64 in, float64 out), and writes into ``out`` if
one is given. NumPy reads ``out=None`` as "allocate", so there is one code path for both.

Python floats are used for constants because NumPy 2 lets them take the dtype of the array; a
NumPy float64 scalar would silently turn a float32 model into a float64 one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .threads import spread

__all__ = [
    "ACTIVATIONS",
    "Array",
    "erf",
    "gelu",
    "gelu_new",
    "layer_norm",
    "linear",
    "quick_gelu",
    "relu",
    "silu",
    "softmax",
    "solu",
    "tanh",
]

Array = np.ndarray[Any, Any]

# Numbers in a piece of a large array, and how many a row of pieces needs before several threads
# pay. gelu_new of 256 x 3072 numbers: 3.2 ms at once, 2.0 ms in such pieces on two threads; of
# 32 x 3072, no gain. Pieces of 2**15, which fit a core's cache, were slower on one thread, too.
PIECE = 2**17
SEVERAL = 2**18


def elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    """Make a function that treats each number by itself divide large arrays among threads.

    What is computed for each number stays the same, so the result does, to the last bit.
    """

    @functools.wraps(function)
    def divided(x: Array, out: Array | None = None) -> Array:
        if x.size < SEVERAL or not x.flags.forc:
            return function(x, out=out)
        out = np.empty_like(x) if out is None else out
        if x.strides != out.strides:
            return function(x, out=out)
        flat, results = x.ravel(order="K"), out.ravel(order="K")  # views of all their memory
        spread(
            lambda start: function(flat[start : start + PIECE], results[start : start + PIECE]),
            range(0, x.size, PIECE),
        )
        return out

    return divided


def linear(x: Array, w: Array, b: Array | None = None, out: Array | None = None) -> Array:
    """Multiply by a matrix and add a bias: ``x @ w + b``.

    Parameters
    ----------
    x : (..., I) ndarray
    w : (I, O) ndarray
        GPT-2 stores its matrices input-major ("Conv1D"), so nothing is transposed here.
    b : (O,) ndarray, optional
        Left out by checkpoints trained without biases.
    out : (..., O) ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    (..., O) ndarray

    Notes
    -----
    2·I·O floating-point operations per row.

    References
    ----------
    openai/gpt-2, src/model.py, ``conv1d``.

    Examples
    --------
    >>> import numpy as np
    >>> linear(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 10.0]]), np.array([5.0, 5.0]))
    array([[ 6., 25.]])
    """
    out = np.matmul(x, w, out=out)
    return out if b is None else np.add(out, b, out=out)


def layer_norm(
    x: Array, g: Array, b: Array | None = None, eps: float = 1e-5, out: Array | None = None
) -> Array:
    """Give every row mean 0 and variance 1, then scale and shift each feature.

    ``(x - mean(x)) / sqrt(var(x) + eps) * g + b`` over the last axis, with the population
    variance (divide by C, not C - 1) and `eps` inside the root.

    Parameters
    ----------
    x : (..., C) ndarray
    g : (C,) ndarray
        Gain.
    b : (C,) ndarray, optional
        Shift.
    eps : float
    out : (..., C) ndarray, optional
        May be `x` itself.

    Returns
    -------
    (..., C) ndarray

    References
    ----------
    Ba, Kiros and Hinton (2016), arXiv:1607.06450, section 3; openai/gpt-2, src/model.py, ``norm``.

    Examples
    --------
    >>> import numpy as np
    >>> layer_norm(np.array([1.0, 3.0]), g=np.array([1.0, 1.0]), b=np.array([0.0, 0.5]), eps=0.0)
    array([-1. ,  1.5])
    """
    size = x.shape[-1]  # sum() / size, because mean() spends 5 us on Python
    out = np.subtract(x, x.sum(axis=-1, keepdims=True) / size, out=out)
    variance = np.square(out).sum(axis=-1, keepdims=True) / size
    np.divide(out, np.sqrt(variance + eps), out=out)
    np.multiply(out, g, out=out)
    return out if b is None else np.add(out, b, out=out)


def softmax(x: Array, out: Array | None = None) -> Array:
    """Turn each row of scores into probabilities: ``exp(x) / sum(exp(x))`` over the last axis.

    Parameters
    ----------
    x : (..., S) ndarray
        Scores in nats; -inf gets probability 0. Each row needs one finite entry.
    out : (..., S) ndarray, optional
        May be `x` itself.

    Returns
    -------
    (..., S) ndarray

    Notes
    -----
    The row's maximum is subtracted first. In exact arithmetic that changes nothing, because it
    cancels in the fraction; in floating point it keeps ``exp`` from overflowing.

    Examples
    --------
    >>> import numpy as np
    >>> softmax(np.array([0.0, np.log(3.0), -np.inf]))
    array([0.25, 0.75, 0.  ])
    """
    out = np.subtract(x, x.max(axis=-1, keepdims=True), out=out)
    np.exp(out, out=out)
    pattern: Array = np.divide(out, out.sum(axis=-1, keepdims=True), out=out)
    return pattern


@elementwise
def gelu_new(x: Array, out: Array | None = None) -> Array:
    """The GELU of GPT-2: ``x/2 * (1 + tanh(u))`` with ``u = sqrt(2/pi) * (x + 0.044715 x^3)``.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        Must not overlap `x`, which is read again after `out` is first written.

    Returns
    -------
    ndarray

    Notes
    -----
    ``(1 + tanh(u)) / 2`` is the logistic function of ``2u``, so this computes
    ``x / (1 + exp(-2u))``. That takes 0.57 of the time, and loses nothing where ``tanh(u)`` is
    close to -1 and its sum with 1 cancels.

    Differs from the exact :func:`gelu` by at most 4.74e-4, near ``|x| = 2.70``: too little to
    see in a sample, and far more than rounding.

    References
    ----------
    Hendrycks and Gimpel (2016), arXiv:1606.08415, section 2; openai/gpt-2, src/model.py, ``gelu``.

    Examples
    --------
    >>> import numpy as np
    >>> gelu_new(np.array([-1.0, 0.0, 1.0])).round(6)
    array([-0.158808,  0.      ,  0.841192])
    """
    # -2u as x (a x x + b): np.power took 600 times as long per element as multiplying.
    out = np.multiply(x, x, out=out)
    np.multiply(out, -2.0 * math.sqrt(2.0 / math.pi) * 0.044715, out=out)
    np.add(out, -2.0 * math.sqrt(2.0 / math.pi), out=out)
    np.multiply(out, x, out=out)
    with np.errstate(over="ignore", under="ignore"):  # x / infinity is the 0 that is meant
        np.exp(out, out=out)
        np.add(out, 1.0, out=out)
        return np.divide(x, out, out=out)


@functools.cache
def _erf_series(dtype: np.dtype[Any], step: float = 1 / 16, terms: int = 10) -> Array:
    """Taylor coefficients of erf about the multiples of `step` from -6 to 6 -> (terms, nodes).

    The first is ``math.erf``. The derivatives of erf are ``2/sqrt(pi) exp(-a*a)`` times Hermite
    polynomials, whose recurrence ``H[n+1] = 2a H[n] - 2n H[n-1]`` gives all the others.
    """
    a = np.arange(-6.0, 6.0 + step, step)
    hermite = [np.ones_like(a), 2 * a]
    for n in range(1, terms):
        hermite.append(2 * a * hermite[n] - 2 * n * hermite[n - 1])
    slope = 2 / math.sqrt(math.pi) * np.exp(-a * a)
    series = [np.array([math.erf(value) for value in a])]
    for n in range(1, terms):
        series.append((-1) ** (n - 1) * slope * hermite[n - 1] / math.factorial(n))
    table: Array = np.array(series, dtype)
    return table


def erf(x: Array, out: Array | None = None) -> Array:
    """The error function ``2/sqrt(pi) * integral of exp(-t*t) from 0 to x``, for each element.

    Parameters
    ----------
    x : ndarray of float32 or float64
    out : ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    ndarray

    Notes
    -----
    NumPy has no erf. This is a Taylor series about the nearest multiple of 1/16, where
    ``math.erf`` gives the value: at most 1/32 away, ten terms leave an error of 1e-17, so what
    remains is rounding (at most 1.2e-16 in float64 and 6e-8 in float32, measured). Beyond
    ``|x| = 6`` erf is 1 to the last bit of a float64.

    Examples
    --------
    >>> import math, numpy as np
    >>> bool(abs(erf(np.array([0.3]))[0] - math.erf(0.3)) < 2e-16)
    True
    """
    series = _erf_series(x.dtype)
    bounded = np.clip(x, -6.0, 6.0)
    node = np.rint(bounded * 16.0)
    offset = bounded - node / 16.0
    # NaN passes clip and rint unchanged, and has no node: any will do, the offset keeps the NaN.
    index = np.nan_to_num(node).astype(np.intp) + 96
    out = np.take(series[-1], index, out=out, mode="clip")
    for coefficient in series[-2::-1]:
        np.multiply(out, offset, out=out)
        np.add(out, np.take(coefficient, index), out=out)
    return out


@elementwise
def gelu(x: Array, out: Array | None = None) -> Array:
    """The exact GELU, x times the normal distribution function: ``x/2 * (1 + erf(x/sqrt(2)))``.

    Not what OpenAI's weights were trained with (:func:`gelu_new` is), but what checkpoints
    trained by nanoGPT and Cerebras-GPT use.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    ndarray

    References
    ----------
    Hendrycks and Gimpel (2016), arXiv:1606.08415, section 2.

    Examples
    --------
    >>> import numpy as np
    >>> gelu(np.array([-1.0, 0.0, 1.0])).round(6)
    array([-0.158655,  0.      ,  0.841345])
    """
    out = erf(x * math.sqrt(0.5), out=out)
    np.add(out, 1.0, out=out)
    np.multiply(out, x, out=out)
    return np.multiply(out, 0.5, out=out)


def _sigmoid(x: Array, out: Array | None = None) -> Array:
    """``1 / (1 + exp(-x))``, written with tanh, which cannot overflow."""
    out = np.multiply(x, 0.5, out=out)
    np.tanh(out, out=out)
    np.add(out, 1.0, out=out)
    return np.multiply(out, 0.5, out=out)


@elementwise
def quick_gelu(x: Array, out: Array | None = None) -> Array:
    """A sigmoid stand-in for the GELU: ``x * sigmoid(1.702 x)``.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    ndarray

    Examples
    --------
    >>> import numpy as np
    >>> quick_gelu(np.array([-1.0, 0.0, 1.0])).round(6)
    array([-0.154204,  0.      ,  0.845796])
    """
    return np.multiply(x, _sigmoid(x * 1.702, out=out), out=out)


@elementwise
def silu(x: Array, out: Array | None = None) -> Array:
    """The sigmoid linear unit, also called swish: ``x * sigmoid(x)``.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    ndarray

    Examples
    --------
    >>> import numpy as np
    >>> silu(np.array([-1.0, 0.0, 1.0])).round(6)
    array([-0.268941,  0.      ,  0.731059])
    """
    return np.multiply(x, _sigmoid(x, out=out), out=out)


def relu(x: Array, out: Array | None = None) -> Array:
    """The rectifier ``max(x, 0)``.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        May be `x` itself.

    Returns
    -------
    ndarray

    Examples
    --------
    >>> import numpy as np
    >>> relu(np.array([-1.0, 0.0, 1.0]))
    array([0., 0., 1.])
    """
    return np.maximum(x, 0.0, out=out)


def tanh(x: Array, out: Array | None = None) -> Array:
    """The hyperbolic tangent.

    Parameters
    ----------
    x : ndarray
    out : ndarray, optional
        May be `x` itself.

    Returns
    -------
    ndarray

    Examples
    --------
    >>> import numpy as np
    >>> tanh(np.array([0.0, 100.0]))
    array([0., 1.])
    """
    return np.tanh(x, out=out)


def solu(x: Array, out: Array | None = None) -> Array:
    """The softmax linear unit ``x * softmax(x)`` over the last axis.

    Models trained with it put a layer norm after it; this function is the unit alone.

    Parameters
    ----------
    x : (..., F) ndarray
    out : (..., F) ndarray, optional
        Must not overlap `x`.

    Returns
    -------
    (..., F) ndarray

    References
    ----------
    Elhage et al. (2022), "Softmax Linear Units", section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> solu(np.array([4.0, 4.0]))
    array([2., 2.])
    """
    return np.multiply(x, softmax(x, out=out), out=out)


# The names that `activation_function` takes in GPT-2 configs. Several are one formula under the
# names different tools gave it.
ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu_fast": gelu_new,
    "gelu": gelu,
    "gelu_python": gelu,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
    "tanh": tanh,
}
