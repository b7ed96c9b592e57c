"""Matrices of a checkpoint as stored matrices: read some rows at a time, and kept narrow.

What becomes narrow is what is multiplied by: the matrices of the linear maps, the token table and
a head. Everything else is small, and stays in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import numpy as np

from ..errors import CheckpointError
from ..params import Array
from ..storage import Bfloat16, Int8, Stored, rounded, row_scales
from .arrays import Tensor, encoded
from .names import LINEAR

__all__ = ["is_matrix", "narrowed", "stored_shape"]

# The name with which the Hugging Face layout begins that of all arrays but the head.
PREFIX = "transformer."


def is_matrix(name: str) -> bool:
    """Whether an array is a matrix that can be narrow: a linear map's, or a table of tokens.

    >>> [is_matrix(name) for name in ("wte.weight", "h.0.mlp.c_fc.weight", "wpe.weight")]
    [True, True, False]
    """
    return name.removeprefix(PREFIX) in ("wte.weight", "lm_head.weight") or _is_linear(name)


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(O, I) of a matrix whose shape is (I, O) if it is a linear map's: a row for each output.

    >>> stored_shape("h.0.mlp.c_fc.weight", (8, 32)), stored_shape("wte.weight", (17, 8))
    ((32, 8), (17, 8))
    """
    return shape[::-1] if _is_linear(name) else shape


def _is_linear(name: str) -> bool:
    return LINEAR.fullmatch(name.removeprefix(PREFIX)) is not None


@overload
def narrowed(name: str, tensor: Tensor, storage: Literal["int8"]) -> Int8: ...
@overload
def narrowed(name: str, tensor: Tensor, storage: str) -> Stored: ...
def narrowed(name: str, tensor: Tensor, storage: str) -> Stored:
    """Read a matrix as a stored matrix.

    Parameters
    ----------
    name : str
        In the Hugging Face layout.
    tensor : Tensor
        (I, O) if it is a linear map's, as the page uses it. What is int8 in the file is used
        where it lies.
    storage : str
        A key of :data:`numpygpt.storage.STORAGES`.

    Returns
    -------
    Stored
        Of the tensor's shape.

    Raises
    ------
    CheckpointError
        If a number is NaN, infinite or too large for `storage`.
    """
    if storage == "int8" and tensor.stored is not None:
        return tensor.stored()
    made = _int8(name, tensor) if storage == "int8" else _bfloat16(name, tensor)
    return made.T if _is_linear(name) else made


def _bfloat16(name: str, tensor: Tensor) -> Stored:
    bits = np.empty(stored_shape(name, tensor.shape), np.uint16)
    for rows, columns, numbers in _blocks(name, tensor, tensor.exact):
        bits[rows, columns] = encoded(numbers, "BF16", name)
    return Bfloat16(bits)


def _int8(name: str, tensor: Tensor) -> Stored:
    shape = stored_shape(name, tensor.shape)
    integers, scales = np.empty(shape, np.int8), np.zeros(shape[0], np.float32)
    for rows, _, numbers in _blocks(name, tensor, np.float32):
        np.maximum(scales[rows], row_scales(numbers), out=scales[rows])
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{name} has numbers that are NaN, infinite or too large for float32, which int8 "
            "cannot hold; load it with another dtype"
        )
    # Read twice, because a matrix (I, O) of a file shows whole columns only: kept as a whole
    # meanwhile, the largest would be what takes most memory in all of loading.
    for rows, columns, numbers in _blocks(name, tensor, np.float32):
        integers[rows, columns] = rounded(numbers, scales[rows])
    return Int8(integers, scales)


def _blocks(name: str, tensor: Tensor, dtype: Any) -> Iterator[tuple[slice, slice, Array]]:
    """Blocks of the matrix (O, I), one for each piece in the file: rows, columns, numbers."""
    every = slice(None)
    if not _is_linear(name):
        for rows, numbers in tensor.pieces(dtype):
            yield rows, every, numbers
    elif tensor.turned is not None:
        for rows, numbers in tensor.turned.pieces(dtype):
            yield rows, every, numbers
    else:
        for columns, numbers in tensor.pieces(dtype):
            yield every, columns, numbers.T
