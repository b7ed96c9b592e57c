"""A recording that never was in a file: arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...params import Array
from .recording import Recording, Stored, recording

__all__ = ["of_arrays"]


def of_arrays(arrays: Mapping[str, Any]) -> Recording:
    """Take arrays by name for a recording; those called ``ids`` and their like are the tokens.

    Parameters
    ----------
    arrays : mapping of str to array
        Whatever NumPy makes an array of.

    Returns
    -------
    Recording

    Raises
    ------
    DumpError
        If none of them is floating point.

    Examples
    --------
    >>> import numpy as np
    >>> of_arrays({"ids": np.array([1, 2]), "logits": np.zeros((2, 3))}).ids.shape
    (1, 2)
    """
    return recording(
        "the arrays", {str(name): _stored(np.asarray(array)) for name, array in arrays.items()}, {}
    )


def _stored(array: Array) -> Stored:
    kind = {"f": "F", "i": "I", "u": "U"}.get(array.dtype.kind, array.dtype.name)
    name = f"{kind}{8 * array.dtype.itemsize}" if len(kind) == 1 else kind
    return Stored(name, array.shape, lambda: array)
