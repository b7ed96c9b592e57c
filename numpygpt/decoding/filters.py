"""Filters: pure functions from logits to logits. A token is ruled out by the logit -inf."""

from __future__ import annotations

import numpy as np

from ..params import Array

__all__ = ["temperature", "top_k"]


def temperature(logits: Array, t: float) -> Array:
    """Divide by `t`: below 1 the likely becomes likelier, above 1 less so.

    Parameters
    ----------
    logits : (V,) ndarray
    t : float
        Above 0.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> temperature(np.array([1.0, 2.0]), 0.5)
    array([2., 4.])
    """
    return logits / t


def top_k(logits: Array, k: int) -> Array:
    """Keep exactly the `k` largest; among equals the lower ids.

    (OpenAI's and nanoGPT's samplers keep every token that ties with the k-th.)

    Parameters
    ----------
    logits : (V,) ndarray
    k : int
        At least 1. If it is V or more, nothing is ruled out.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> top_k(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    array([-inf,   3.,   2., -inf])
    """
    if k >= len(logits):
        return logits
    threshold = np.partition(logits, -k)[-k]
    kept = logits > threshold
    kept[np.flatnonzero(logits == threshold)[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, -np.inf)
