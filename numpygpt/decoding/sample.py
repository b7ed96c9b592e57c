"""From logits to a token."""

from __future__ import annotations

import math

import numpy as np

from ..errors import NumpyGPTError
from ..params import Array

__all__ = [
    "choose",
    "largest",
    "log_probability",
    "margin",
    "normalizer_of",
    "require_finite",
    "top_logprobs",
]


def choose(logits: Array, rng: np.random.Generator | None = None) -> int:
    """The likeliest token, or one drawn by its probability.

    Parameters
    ----------
    logits : (V,) ndarray
    rng : numpy.random.Generator, optional
        Greedy if None; among equals the lowest id wins. Otherwise exactly one uniform number is
        drawn, and the token is read off the cumulative distribution in float64.

    Returns
    -------
    int

    Raises
    ------
    NumpyGPTError
        If the logits are NaN or infinite: the weights are; or if every token is ruled out.

    Examples
    --------
    >>> import numpy as np
    >>> choose(np.array([0.0, 2.0, 2.0]))
    1
    >>> choose(np.array([-np.inf, 2.0, -np.inf]), np.random.default_rng(0))
    1
    """
    top = require_finite(logits)
    if rng is None:
        return int(logits.argmax())
    # A probability below 1e-308 is 0, and so is what is further below the top than floats reach.
    with np.errstate(over="ignore", under="ignore"):
        cumulative = np.cumsum(np.exp(logits.astype(np.float64, copy=False) - top))
    # The total is at least 1 = exp(0), so a number below 1 times the total rounds to less than the
    # total, and the search cannot fall off the end; "right" steps over tokens of probability 0.
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def log_probability(
    logits: Array, token: int, normalizer: tuple[float, float] | None = None
) -> float:
    """The logarithm of a token's probability, in nats, summed in float64.

    Parameters
    ----------
    logits : (V,) ndarray
    token : int
    normalizer : (float, float), optional
        :func:`normalizer_of` these logits, where that is known.

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> round(log_probability(np.log(np.array([0.25, 0.75])), 0), 6)  # log(1/4)
    -1.386294
    """
    top, spread = normalizer or normalizer_of(logits)
    return float(logits[token]) - top - spread


def top_logprobs(logits: Array, n: int) -> list[tuple[int, float]]:
    """The likeliest tokens, with the logarithms of their probabilities.

    Parameters
    ----------
    logits : (V,) ndarray
    n : int
        How many; all if there are no more than that.

    Returns
    -------
    list of (int, float)
        Ids and nats, the likeliest first; among equals the lower id.

    Examples
    --------
    >>> import numpy as np
    >>> [(i, round(value, 3)) for i, value in top_logprobs(np.log([0.2, 0.3, 0.3, 0.2]), 3)]
    [(1, -1.204), (2, -1.204), (0, -1.609)]
    """
    n = min(n, len(logits))
    if n < 1:
        return []
    top, spread = normalizer_of(logits)
    return [(int(i), float(logits[i]) - top - spread) for i in largest(logits, n)]


def largest(values: Array, n: int) -> Array:
    """The places of the `n` largest, the largest first; among equals the lower.

    Parameters
    ----------
    values : (V,) ndarray
    n : int
        1 to V.

    Returns
    -------
    (n,) ndarray of int

    Examples
    --------
    >>> import numpy as np
    >>> largest(np.array([1.0, 3.0, 2.0, 3.0]), 3)
    array([1, 3, 2])
    """
    places = np.flatnonzero(values >= np.partition(values, -n)[-n])  # a few, so sorting is cheap
    return places[np.argsort(-values[places], kind="stable")][:n]


def margin(logits: Array, token: int) -> float:
    """How far a token is above the best of the others: what rounding must exceed to change it.

    Parameters
    ----------
    logits : (V,) ndarray
    token : int

    Returns
    -------
    float
        In nats; negative if another is likelier, inf if there is no other.

    Examples
    --------
    >>> import numpy as np
    >>> margin(np.array([1.0, 3.5, 3.0]), 1)
    0.5
    """
    others = max(logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf))
    return float(logits[token]) - float(others)


def require_finite(logits: Array) -> float:
    """The largest logit.

    Parameters
    ----------
    logits : (V,) ndarray

    Returns
    -------
    float

    Raises
    ------
    NumpyGPTError
        If it is NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite(np.array([1.0, 3.0, -np.inf]))
    3.0
    """
    top = float(logits.max())  # NaN if any is
    if top == -math.inf:
        raise NumpyGPTError(
            f"all {len(logits)} tokens are ruled out, so there is none to choose: what is banned, "
            f"biased by -inf or may not repeat leaves nothing; allow more"
        )
    if not math.isfinite(top):
        raise NumpyGPTError(
            f"the model's logits are {top}, not numbers to choose by: its weights are damaged or "
            f"too large for {logits.dtype}"
        )
    return top


def normalizer_of(logits: Array) -> tuple[float, float]:
    """The logarithm of the sum of exponentials, in two parts: the largest logit and the rest.

    Both are NaN if a logit is.

    >>> normalizer_of(np.array([2.0, 2.0]))[0], round(normalizer_of(np.array([2.0, 2.0]))[1], 6)
    (2.0, 0.693147)
    """
    top = logits.max()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        total = np.exp(logits - top).sum(dtype=np.float64)
    return float(top), math.log(total)
