"""Stored matrices: narrow in memory, float32 in every product.

A stored matrix stands where the page expects an array. It keeps its numbers in one or two bytes
each and answers the calls that the page makes: ``np.matmul`` and ``np.take``. Multiplying
widens some rows into a small float32 buffer, multiplies by them while they are in the cache,
and goes on; no matrix is ever there in float32 as a whole.

========  ===========================================================  ============  ==============
storage   a number                                                     bytes         largest error
========  ===========================================================  ============  ==============
bfloat16  the upper half of a float32                                  2             2**-8 of it
int8      an integer from -127 to 127, times its row's float32 scale   1, and 4/row  scale / 2
========  ===========================================================  ============  ==============

A row is one output of a linear map, or one token's vector: what shares a scale is added up in one
sum, so the scale is applied once to the result.
"""

from __future__ import annotations

import abc
import functools
import math
import threading
from typing import Any

import numpy as np

from .ops import Array
from .threads import spread

__all__ = [
    "STORAGES",
    "Bfloat16",
    "Int8",
    "Stored",
    "rounded",
    "row_scales",
    "storage_of",
    "to_int8",
]

# Bytes of the float32 numbers that are widened at a time. The speed of int8 as a share of
# float32's, one thread, with tiles of 0.5, 1, 2 and 4 MiB:
#     one row      768 x 3072    0.92  0.95  0.96  0.97
#     one row      3072 x 768    0.62  0.67  0.70  0.67
#     one row      1600 x 6400   0.68  0.82  0.79  0.82
#     256 rows     768 x 3072    0.91  0.94  1.01  0.93
#     256 rows     3072 x 768    0.73  0.83  0.96  0.94
# (Zen 3 with 512 KiB of L2 and 32 MiB of L3, not idle, so that the last place is noise. Fewer
# calls gain more than a tile beyond L2 loses.)
TILE_BYTES = 2**21

# Other ways to multiply one row, measured beside it (same machine, 768 x 3072, one thread):
# int8 by np.einsum with casting 0.61 of float32's speed, by widening and a product 0.95;
# bfloat16 widened by copying into uint32 and shifting in place 0.65, by one shift with casting
# 0.36, by writing the upper halves of float32 0.37; as pairs of rows in one uint32, parted by a
# shift and a mask, 0.73, which is not worth numbers that lie in another order than in files.

# A row of zeros has this scale; a smaller one would have lost digits itself.
LEAST_SCALE = np.finfo(np.float32).smallest_normal


class Stored(abc.ABC):
    """A matrix of narrow numbers that multiplies like one of float32.

    Parameters
    ----------
    numbers : (O, I) ndarray
        As they are kept: a row is one output. May be a read-only view of a file.
    turned : bool
        Show its columns as rows: `shape` is (I, O), and ``x @ self`` gives (N, O).

    Attributes
    ----------
    storage : str
        A key of :data:`STORAGES`.
    shape : tuple of int
    dtype : dtype
        float32: what it computes in.
    """

    storage: str
    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, numbers: Array, turned: bool = False):
        self.numbers, self.turned = numbers, turned
        rows, columns = numbers.shape
        self.shape: tuple[int, int] = (columns, rows) if turned else (rows, columns)

    def __repr__(self) -> str:
        return f"<{self.storage} matrix of shape {self.shape}>"

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return int(self.numbers.nbytes)

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(self.numbers.size)

    @property
    @abc.abstractmethod
    def T(self) -> Stored:
        """The same numbers, with rows and columns exchanged; not a copy."""

    @abc.abstractmethod
    def first(self, count: int) -> Stored:
        """The same with only the first `count` of the (O, I) numbers' rows; not a copy."""

    @abc.abstractmethod
    def widen(self, rows: Any, out: Array) -> None:
        """Write some of the O rows, but for what :meth:`scale` does, into `out` (n, I), float32."""

    @abc.abstractmethod
    def scale(self, products: Array, rows: Any) -> None:
        """Finish products (N, n) with some of the O rows, in place."""

    def wide(self, rows: Any, count: int) -> Array:
        """Some of the O rows, `count` of them, in float32: a new (count, I) ndarray."""
        numbers = np.empty((count, self.numbers.shape[1]), self.dtype)
        self.widen(rows, numbers)
        self.scale(numbers.T, rows)
        return numbers

    # -- what the page asks for ------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """``np.matmul(x, self, out=...)`` of a turned matrix: (N, I) or (I,) times (I, O)."""
        (out,) = options.pop("out", (None,))
        if ufunc is not np.matmul or method != "__call__" or options:
            return NotImplemented
        x, matrix = inputs
        if matrix is not self or not self.turned or not isinstance(x, np.ndarray):
            return NotImplemented
        shape = (*x.shape[:-1], self.shape[1])
        if out is None:
            out = np.empty(shape, np.result_type(x, self.dtype))
        if x.ndim not in (1, 2) or x.shape[-1] != self.shape[0] or out.shape != shape:
            raise ValueError(f"matmul: {x.shape} times {self.shape} does not fit {out.shape}")
        self._multiply(np.atleast_2d(x), np.atleast_2d(out))
        return out

    def _multiply(self, x: Array, out: Array) -> None:
        """(N, I) times the turned matrix, into (N, O)."""

        def multiply(rows: slice) -> None:
            tile = _buffer(rows.stop - rows.start, self.numbers.shape[1])
            self.widen(rows, tile)
            place = out[:, rows]
            np.matmul(x, tile.T, out=place)
            self.scale(place, rows)

        spread(multiply, _tiles(*self.numbers.shape))

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        """``np.take(self, ids, axis=0, out=...)`` of a matrix that is not turned."""
        if function is not np.take or self.turned:
            return NotImplemented
        return self._take(*args[1:], **options)

    def _take(self, ids: Array, axis: int | None = None, out: Array | None = None) -> Array:
        if axis != 0:
            raise ValueError(f"np.take of a stored matrix needs axis=0, not {axis}")
        ids = np.asarray(ids)
        rows = self.wide(ids.ravel(), ids.size).reshape(*ids.shape, self.shape[1])
        if out is None:
            return rows
        out[...] = rows  # in any memory order
        return out

    # -- what everything else asks for -----------------------------------------------------------

    def __getitem__(self, rows: slice) -> Array:
        """Some of the rows that it shows, in float32."""
        if self.turned:
            return self.wide(slice(None), len(self.numbers)).T[rows]
        start, stop, step = rows.indices(len(self))
        return self.wide(rows, len(range(start, stop, step)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All of it in float32."""
        if copy is False:
            raise ValueError("a stored matrix becomes an array only as a copy")
        return self[:].astype(dtype or self.dtype, copy=False)


class Bfloat16(Stored):
    """A matrix of bfloat16: numbers (O, I) of uint16, the upper halves of float32.

    Examples
    --------
    >>> import numpy as np
    >>> table = Bfloat16(np.array([[0x3F80, 0xC000], [0x4040, 0x0000]], np.uint16))
    >>> np.array([[1.0, 10.0]], np.float32) @ table.T
    array([[-19.,   3.]], dtype=float32)
    """

    storage = "bfloat16"

    @property
    def T(self) -> Bfloat16:
        """The same numbers, with rows and columns exchanged; not a copy."""
        return Bfloat16(self.numbers, not self.turned)

    def first(self, count: int) -> Bfloat16:
        """The same with only the first `count` of the (O, I) numbers' rows; not a copy."""
        return Bfloat16(self.numbers[:count], self.turned)

    def widen(self, rows: Any, out: Array) -> None:
        """Write some of the O rows into `out` (n, I), float32."""
        bits = out.view(np.uint32)
        np.copyto(bits, self.numbers[rows])
        np.left_shift(bits, 16, out=bits)

    def scale(self, products: Array, rows: Any) -> None:
        """Do nothing: they are whole."""


class Int8(Stored):
    """A matrix of int8: numbers (O, I), and a scale for each of their rows (O,), float32.

    Examples
    --------
    >>> import numpy as np
    >>> table = to_int8(np.array([[1.0, 127.0], [0.5, -0.25]], np.float32))
    >>> table.numbers
    array([[  1, 127],
           [127, -64]], dtype=int8)
    >>> np.take(table, [0], axis=0)
    array([[  1., 127.]], dtype=float32)
    """

    storage = "int8"

    def __init__(self, numbers: Array, scales: Array, turned: bool = False):
        super().__init__(numbers, turned)
        self.scales = scales

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return int(self.numbers.nbytes + self.scales.nbytes)

    @property
    def T(self) -> Int8:
        """The same numbers, with rows and columns exchanged; not a copy."""
        return Int8(self.numbers, self.scales, not self.turned)

    def first(self, count: int) -> Int8:
        """The same with only the first `count` of the (O, I) numbers' rows; not a copy."""
        return Int8(self.numbers[:count], self.scales[:count], self.turned)

    def widen(self, rows: Any, out: Array) -> None:
        """Write some of the O rows, not scaled yet, into `out` (n, I), float32."""
        np.copyto(out, self.numbers[rows])

    def scale(self, products: Array, rows: Any) -> None:
        """Multiply products (N, n) with some of the O rows by these rows' scales."""
        np.multiply(products, self.scales[rows], out=products)


# Every way to store a matrix other than as an ndarray.
STORAGES: dict[str, type[Stored]] = {kind.storage: kind for kind in (Bfloat16, Int8)}


def storage_of(matrix: Any) -> str:
    """How a matrix is stored: a key of :data:`STORAGES`, or the name of an ndarray's dtype.

    >>> storage_of(np.zeros((2, 2))), storage_of(Bfloat16(np.zeros((2, 2), np.uint16)))
    ('float64', 'bfloat16')
    """
    return matrix.storage if isinstance(matrix, Stored) else str(matrix.dtype.name)


def row_scales(rows: Array) -> Array:
    """The scale of each row with which its largest number becomes 127 or -127.

    Parameters
    ----------
    rows : (n, I) ndarray of float32

    Returns
    -------
    (n,) ndarray of float32
        Not finite where a number of the row is not.
    """
    largest = np.abs(rows).max(axis=1, initial=0)
    scales: Array = np.maximum(largest / np.float32(127), LEAST_SCALE)
    return scales


def rounded(rows: Array, scales: Array) -> Array:
    """The integers (n, I) that come nearest to rows of finite numbers divided by their scales."""
    wide = rows / scales[:, None]
    return np.rint(wide, out=wide).astype(np.int8)


def to_int8(rows: Array) -> Int8:
    """A matrix of int8 from finite float32 numbers (O, I).

    Examples
    --------
    >>> import numpy as np
    >>> matrix = to_int8(np.array([[2.0, -0.5], [0.0, 0.0]], np.float32))
    >>> matrix.numbers
    array([[127, -32],
           [  0,   0]], dtype=int8)
    >>> bool(matrix.scales[0] == np.float32(2 / 127))
    True
    """
    scales = row_scales(rows)
    return Int8(rounded(rows, scales), scales)


class _Buffers(threading.local):
    """Each thread's own memory for widened numbers, as large as it needed so far."""

    numbers = np.empty(0, np.float32)


_buffers = _Buffers()


def _buffer(rows: int, columns: int) -> Array:
    """An array (rows, columns) of float32 that nothing else in this thread uses now."""
    if _buffers.numbers.size < rows * columns:
        _buffers.numbers = np.empty(rows * columns, np.float32)
    return _buffers.numbers[: rows * columns].reshape(rows, columns)


@functools.lru_cache(maxsize=64)
def _tiles(rows: int, columns: int) -> tuple[slice, ...]:
    """Divide rows into tiles of about :data:`TILE_BYTES`: the same for any number of threads.

    An even number, so that two threads have equal shares; never one, because :func:`spread` keeps
    the BLAS to one thread only around several pieces, and a sum must not depend on the threads.

    >>> _tiles(768, 768)
    (slice(0, 384, None), slice(384, 768, None))
    """
    pairs = math.ceil(rows * columns * 4 / (2 * TILE_BYTES))
    step = max(1, math.ceil(rows / max(2, 2 * pairs)))
    return tuple(slice(start, min(start + step, rows)) for start in range(0, rows, step))
