"""From logits to a token."""

from __future__ import annotations

import math

import numpy as np

from ..errors import NumpyGPTError
from ..params import Array

__all__ = ["choose", "log_probability"]


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
        If the logits are NaN or infinite: the weights are.

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
    with np.errstate(under="ignore"):  # a probability below 1e-308 is 0
        cumulative = np.cumsum(np.exp(logits.astype(np.float64, copy=False) - top))
    # The total is at least 1 = exp(0), so a number below 1 times the total rounds to less than the
    # total, and the search cannot fall off the end; "right" steps over tokens of probability 0.
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def log_probability(logits: Array, token: int) -> float:
    """The logarithm of a token's probability, in nats, summed in float64.

    Parameters
    ----------
    logits : (V,) ndarray
    token : int

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> round(log_probability(np.log(np.array([0.25, 0.75])), 0), 6)  # log(1/4)
    -1.386294
    """
    top = logits.max()
    with np.errstate(under="ignore"):
        total = np.exp(logits - top).sum(dtype=np.float64)
    return float(logits[token]) - float(top) - math.log(total)


def require_finite(logits: Array) -> float:
    """The largest logit; an error if that is NaN or infinite."""
    top = float(logits.max())  # NaN if any is
    if not math.isfinite(top):
        raise NumpyGPTError(
            f"the model's logits are {top}, not numbers to choose by: its weights are damaged or "
            f"too large for {logits.dtype}"
        )
    return top
