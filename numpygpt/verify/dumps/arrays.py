"""A recording that never was in a file: arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import DumpError
from ...params import shown
from .recording import Recording, Stored, recording

__all__ = ["of_arrays"]


def of_arrays(arrays: Mapping[str, Any]) -> Recording:
    """Take arrays by name for a recording; those called ``ids`` and their like are the tokens.

    Parameters
    ----------
    arrays : mapping of str to array
        Whatever NumPy makes an array of; PyTorch's tensors, bfloat16 among them.

    Returns
    -------
    Recording

    Raises
    ------
    DumpError
        If one is no array, or none of them is floating point.

    Examples
    --------
    >>> import numpy as np
    >>> of_arrays({"ids": np.array([1, 2]), "logits": np.zeros((2, 3))}).ids.shape
    (1, 2)
    """
    return recording("the arrays", {str(name): _stored(name, x) for name, x in arrays.items()}, {})


def _stored(name: object, given: Any) -> Stored:
    """An array of NumPy's, a tensor of PyTorch's or anything that NumPy makes an array of."""
    bfloat16 = str(getattr(given, "dtype", "")).removeprefix("torch.") == "bfloat16"
    try:
        if hasattr(given, "detach"):  # a tensor, whose gradients do not matter here
            given = given.detach().cpu()
            given = given.float() if bfloat16 else given
        array = np.asarray(given)
        array = array.astype(np.float32) if bfloat16 else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise DumpError(f"{shown(name)}: cannot be read as an array: {error}") from None
    kind = {"f": "F", "i": "I", "u": "U"}.get(array.dtype.kind, array.dtype.name)
    stored = f"{kind}{8 * array.dtype.itemsize}" if len(kind) == 1 else kind
    return Stored("BF16" if bfloat16 else stored, array.shape, lambda: array)
