"""Arrays in files: described first, read when they are asked for, used where they lie if possible.

Every reader of a format ends in :class:`Tensor`: a description that costs nothing and a function
that reads. So `inspect` looks at any file without reading weights, and a conversion holds one
array at a time.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from ..errors import CheckpointError
from ..params import Array
from ..storage import Int8
from .json_files import require_regular

__all__ = [
    "FLOATS",
    "ITEMS",
    "QUANTISED",
    "DataFile",
    "Sink",
    "Tensor",
    "encoded",
    "from_bfloat16",
    "to_bfloat16",
    "write_array",
]

# Arrays are converted and written in pieces of about this size, so that a conversion needs little
# memory beside the mapped file.
PIECE_BYTES = 2**24

# What is read to be narrowed comes in pieces of about this size, and several temporary arrays are
# made of each.
READ_BYTES = 2**21

# Types of stored floating-point numbers, by the names that safetensors gives them.
# bfloat16 has no NumPy dtype: it is read as 16-bit integers, the upper halves of float32.
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

# Types that a file's numbers can be read as: also the integers of int8, whose scales lie elsewhere.
ITEMS = {**FLOATS, "I8": np.dtype("i1")}

# Types of blocks of small integers with a scale, by the names that GGUF gives them.
QUANTISED = frozenset(
    ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)


class Sink(Protocol):
    """What takes bytes: a file, or something that hashes them."""

    def write(self, data: Any, /) -> Any:
        """Take some bytes."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of a checkpoint that has not been read yet.

    Parameters
    ----------
    dtype : str
        How it is stored: a key of :data:`FLOATS`, another type's name, or a quantisation's.
    shape : tuple of int
    nbytes : int
        Bytes it takes in its file.
    load : callable
        From the dtype wanted (float16, float32 or float64) to an ndarray of `shape`, which may
        be a read-only view of the mapped file.
    part : callable, optional
        From the dtype wanted, and the first row and the one after the last, to these rows, in
        memory of their own.
    stored : callable, optional
        From nothing to the numbers and scales that the file holds, if it is int8 in it.
    turned : Tensor, optional
        The same with its axes in reverse order, if that is how it lies in the file.

    Examples
    --------
    >>> import numpy as np
    >>> stored = Tensor("F32", (2, 3), 24, lambda dtype: np.arange(6, dtype=dtype).reshape(2, 3))
    >>> stored.transposed().rows(2).read(np.float64)
    array([[0., 3.],
           [1., 4.]])
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[np.dtype[Any]], Array]
    part: Callable[[np.dtype[Any], int, int], Array] | None = None
    stored: Callable[[], Int8] | None = None
    turned: Tensor | None = None

    @property
    def exact(self) -> np.dtype[Any]:
        """The NumPy dtype that holds its values as they are stored, without rounding."""
        return np.dtype({"F64": "f8", "F16": "f2"}.get(self.dtype, "f4"))

    def read(self, dtype: Any) -> Array:
        """The array; `dtype` is float16, float32 or float64."""
        return self.load(np.dtype(dtype))

    def pieces(self, dtype: Any) -> Iterator[tuple[slice, Array]]:
        """Some of its rows at a time, and which: where it can, without touching the mapped file.

        Pages of a mapped file count as this process's memory once they were looked at.
        """
        size = math.prod(self.shape[1:]) * np.dtype(dtype).itemsize
        step = max(1, READ_BYTES // max(1, size))
        whole = None if self.part else self.read(dtype)
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            if self.part is not None:
                yield rows, self.part(np.dtype(dtype), rows.start, rows.stop)
            elif whole is not None:
                yield rows, whole[rows]

    def _changed(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Tensor:
        count = math.prod(self.shape)
        size = self.nbytes * math.prod(shape) // count if count else 0
        return Tensor(self.dtype, shape, size, lambda dtype: change(self.load(dtype)))

    def transposed(self) -> Tensor:
        """The same with its axes in reverse order."""
        made = self.turned or self._changed(self.shape[::-1], lambda array: array.T)
        stored = self.stored
        return dataclasses.replace(
            made, stored=None if stored is None else lambda: stored().T, turned=self
        )

    def rows(self, count: int) -> Tensor:
        """Its first rows."""
        made = self._changed((count, *self.shape[1:]), lambda array: array[:count])
        stored = self.stored
        return dataclasses.replace(
            made, part=self.part, stored=None if stored is None else lambda: stored().first(count)
        )

    def reshaped(self, *shape: int) -> Tensor:
        """The same numbers in another shape."""
        return self._changed(shape, lambda array: array.reshape(shape))


class DataFile:
    """A file of numbers, mapped into memory.

    Parameters
    ----------
    path : pathlib.Path

    Attributes
    ----------
    path : pathlib.Path
    size : int
        Bytes.
    map : mmap or bytes
        All of it; nothing is read before it is looked at.

    Raises
    ------
    CheckpointError
        If it is not a regular file that can be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            require_regular(path, CheckpointError)
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                self.map: mmap.mmap | bytes = b""
                if self.size:
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None

    def array(
        self,
        kind: str,
        start: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
        mapped: bool = True,
    ) -> Array:
        """Numbers of this file, converted to `dtype`.

        Parameters
        ----------
        kind : str
            A key of :data:`ITEMS`.
        start : int
            Byte of the file at which the first number lies.
        shape : tuple of int
        dtype : dtype
        strides : tuple of int, optional
            In numbers; C order if None.
        mapped : bool
            Whether it may be a view of the mapped file.

        Returns
        -------
        ndarray
            A read-only view where that is possible (same type, aligned), else a new array.

        Raises
        ------
        CheckpointError
            If the file has become shorter since it was opened.
        """
        stored = ITEMS[kind]
        usable = mapped and stored == dtype and start % stored.itemsize == 0
        # OpenAI's own safetensors file has a header of 14283 bytes, so its data is misaligned, and
        # BLAS would copy such a matrix at every product. What cannot be used where it lies is read
        # rather than mapped, so that it is not in memory twice.
        if strides is not None:
            steps = tuple(step * stored.itemsize for step in strides)
            array: Array = np.ndarray(shape, stored, self.map, start, steps)
            if not usable:
                array = array.copy(order="K")  # aligned, in the same order
        elif usable and 0 not in shape:
            array = np.frombuffer(self.map, stored, math.prod(shape), start).reshape(shape)
        else:
            with self.path.open("rb") as file:
                file.seek(start)
                array = np.fromfile(file, stored, math.prod(shape))
            if array.size != math.prod(shape):
                raise CheckpointError(f"{self.path}: became shorter while it was read")
            array = array.reshape(shape)
        if kind == "BF16":
            array = from_bfloat16(array)
        with np.errstate(all="ignore"):  # the caller names tensors that are not finite
            converted: Array = array.astype(dtype, copy=False)
        return converted

    def tensor(
        self, kind: str, start: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """A description of numbers of this file; :meth:`array` says what the arguments are."""
        item = FLOATS[kind].itemsize
        row = math.prod(shape[1:])

        def part(dtype: np.dtype[Any], first: int, stop: int) -> Array:
            at = start + first * row * item
            return self.array(kind, at, (stop - first, *shape[1:]), dtype, mapped=False)

        return Tensor(
            kind,
            shape,
            math.prod(shape) * item,
            lambda dtype: self.array(kind, start, shape, dtype, strides),
            part if strides is None else None,
        )


def from_bfloat16(bits: Array) -> Array:
    """float32 from the 16 bits of bfloat16, exactly.

    >>> import numpy as np
    >>> from_bfloat16(np.array([0x3F80, 0xC049], np.uint16))
    array([ 1.      , -3.140625], dtype=float32)
    """
    return np.left_shift(bits, 16, dtype=np.uint32).view("<f4")


def to_bfloat16(array: Array) -> Array:
    """The 16 bits of the bfloat16 nearest to each float32, ties to even; NaN stays NaN.

    >>> import numpy as np
    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, -3.1415927], np.float32))]
    ['0x3f80', '0xc049']
    """
    single = np.ascontiguousarray(array, "<f4")
    if array.dtype.itemsize > 4:
        # Rounding twice could end in another number. So the first time towards zero, with the
        # last bit set where something is cut off: the second rounding then sees all it needs.
        beyond = np.abs(single) > np.abs(array)
        single = np.where(beyond, np.nextafter(single, np.float32(0)), single)
        single = (single.view("<u4") | (single != array)).view("<f4")
    bits = single.view("<u4")
    # Half of the last place that stays, less one where that place is even: a tie then stays.
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    quiet = bits >> 16 | 0x40  # the carry would turn some NaNs into infinity
    return np.where(np.isnan(array), quiet, rounded).astype("<u2")


def encoded(array: Array, kind: str, name: str = "a number") -> Array:
    """Numbers as the type `kind` stores them, in C order; the nearest ones if they do not fit.

    Parameters
    ----------
    array : ndarray
    kind : str
        A key of :data:`ITEMS`; integers only as I8.
    name : str
        What the numbers are, for messages.

    Returns
    -------
    ndarray
        Of the dtype ``ITEMS[kind]``.

    Raises
    ------
    CheckpointError
        If a finite number would become infinite.
    """
    with np.errstate(over="ignore"):
        narrow = to_bfloat16(array) if kind == "BF16" else array.astype(ITEMS[kind], order="C")
        back = from_bfloat16(narrow) if kind == "BF16" else narrow
    if back.itemsize < array.itemsize or kind == "BF16":
        lost = np.isinf(back) & np.isfinite(array)
        if lost.any():
            raise CheckpointError(f"{name} has {array[lost][0]:g}, which is too large for {kind}")
    return np.ascontiguousarray(narrow)


def write_array(
    file: Sink,
    array: Array,
    kind: str,
    advance: Callable[[int], None] = lambda count: None,
    name: str = "a number",
) -> None:
    """Write numbers in C order, piece by piece.

    Parameters
    ----------
    file : binary file
    array : ndarray
    kind : str
        A key of :data:`ITEMS`; integers only as I8.
    advance : callable
        Told after each piece how many bytes were written.
    name : str
        What the numbers are, for messages.

    Raises
    ------
    CheckpointError
        As :func:`encoded` does.
    """
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, PIECE_BYTES // max(1, rows[:1].size * 8))
    for start in range(0, len(rows), step):
        piece = encoded(rows[start : start + step], kind, name)
        file.write(piece.data)
        advance(piece.nbytes)
