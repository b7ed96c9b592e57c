"""Arrays in files of other programs: where they lie, and how many files stay open."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...checkpoints.arrays import FLOATS, DataFile
from ...checkpoints.json_files import require_regular
from ...errors import DumpError
from ...params import Array
from .recording import COMPUTED, INTEGERS, Stored

__all__ = ["Keeper", "exact", "integers", "read_text", "stored"]

# Every mapped array keeps a file open, and systems allow a process as few as 256 of them.
MOST_MAPPED = 100

# Smaller arrays are copied, not mapped.
SMALL = 2**16


class Keeper:
    """Decides which arrays of many files stay mapped, and copies the others.

    Examples
    --------
    >>> import numpy as np
    >>> Keeper().keep(Stored("F32", (2,), lambda: np.ones(2, np.float32))).read()
    array([1., 1.], dtype=float32)
    """

    def __init__(self) -> None:
        self.mapped = 0

    def keep(self, array: Stored) -> Stored:
        """The same array, which is copied when it is read if there are many or it is small."""

        def read() -> Array:
            found = array.read()
            if found.nbytes >= SMALL and self.mapped < MOST_MAPPED:
                self.mapped += 1
                return found
            return np.array(found)

        return array._replace(read=read)


def read_text(path: pathlib.Path, most: int) -> bytes:
    """All of a small file.

    Raises
    ------
    DumpError
        If it has over `most` bytes, or cannot be read.
    """
    require_regular(path, DumpError)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size > most:
                raise DumpError(f"{path}: {size} bytes, expected at most {most} of a JSON file")
            return file.read(size)
    except OSError as error:
        raise DumpError(f"{path}: {error.strerror}") from None


def exact(kind: str) -> np.dtype[Any]:
    """The NumPy dtype that holds the values of a stored type; bfloat16 is widened."""
    return np.dtype({"BF16": "f4"}.get(kind) or FLOATS[kind])


def integers(kind: str) -> np.dtype[Any]:
    """The NumPy dtype of stored integers."""
    return np.dtype(f"<{kind[0].lower()}{int(kind[1:]) // 8}")


def stored(
    file: DataFile, kind: str, start: int, shape: tuple[int, ...], fortran: bool = False
) -> Stored:
    """An array that lies in a file from byte `start` on.

    Parameters
    ----------
    file : DataFile
    kind : str
        By the names of safetensors.
    start : int
    shape : tuple of int
    fortran : bool
        Whether the first axis runs fastest.

    Raises
    ------
    DumpError
        When it is read, if it has become shorter since.
    """
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape))) if fortran else None
    reader: Callable[[], Array] = _unreadable
    if kind in COMPUTED:

        def reader() -> Array:
            return file.array(kind, start, shape, exact(kind), strides)

    elif kind in INTEGERS:

        def reader() -> Array:
            count = math.prod(shape)
            flat = np.frombuffer(file.map, integers(kind), count, start)
            return flat.reshape(shape, order="F" if fortran else "C")

    return Stored(kind, shape, reader)


def _unreadable() -> Array:
    raise DumpError("only numbers are read")
