"""The arithmetics a GPT-2 is computed in, and how far each one rounds.

Rounding a number x to the nearest of a format's changes it by at most ``u |x|``, where the *unit
roundoff* u is ``2**-p`` for p significant bits. Programs keep results in one format and may add
up products in a wider one, or read the factors of a product in a narrower one; so three numbers
describe an arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..checkpoints.arrays import from_bfloat16, to_bfloat16
from ..errors import ArgumentError
from ..params import Array

__all__ = ["ARITHMETICS", "Arithmetic", "arithmetic", "rounded"]


class Arithmetic(NamedTuple):
    """How a program rounds.

    Attributes
    ----------
    name : str
    u : float
        Unit roundoff of results that are stored.
    sums : float
        Unit roundoff of what sums are added up in.
    factors : float
        Unit roundoff of the factors of a matrix product as it reads them; 0 if it reads them as
        they are stored.
    least : float
        What may be lost below the smallest numbers of the format.
    """

    name: str
    u: float
    sums: float
    factors: float
    least: float


# bfloat16 and float16 products are added up in float32 (of parts, which may be stored in between;
# the bounds allow for that); an accumulation in float16 is a mistake. A program may flush
# subnormal numbers to zero, but for those of float16, where that would show. Our own side rounds
# like float64, too, so in float64 everything counts twice.
ARITHMETICS = {
    each.name: each
    for each in [
        Arithmetic("float64", 2.0**-52, 2.0**-52, 0.0, 2.0**-1022),
        Arithmetic("float32", 2.0**-24, 2.0**-24, 0.0, 2.0**-126),
        Arithmetic("tf32", 2.0**-24, 2.0**-24, 2.0**-11, 2.0**-126),
        Arithmetic("float16", 2.0**-11, 2.0**-24, 0.0, 2.0**-22),
        Arithmetic("bfloat16", 2.0**-8, 2.0**-24, 0.0, 2.0**-126),
    ]
}


def arithmetic(name: str) -> Arithmetic:
    """The arithmetic of a name.

    Raises
    ------
    ArgumentError
        If it is not known.

    Examples
    --------
    >>> arithmetic("bfloat16").u
    0.00390625
    """
    if name not in ARITHMETICS:
        raise ArgumentError(f"a dump's dtype must be one of {', '.join(ARITHMETICS)}, not {name!r}")
    return ARITHMETICS[name]


def rounded(array: Array, dtype: str) -> Array:
    """Each number rounded to the nearest of a format's, as float64.

    Parameters
    ----------
    array : ndarray
    dtype : {"float64", "float32", "tf32", "float16", "bfloat16"}
        As weights are stored: those of "tf32" are float32.

    Returns
    -------
    ndarray of float64

    Examples
    --------
    >>> import numpy as np
    >>> float(rounded(np.array(1.01), "bfloat16"))
    1.0078125
    """
    if dtype == "bfloat16":
        bits = to_bfloat16(np.asarray(array)).reshape(np.shape(array))
        return from_bfloat16(bits).astype(np.float64)
    kind = {"tf32": "float32"}.get(dtype, dtype)
    with np.errstate(over="ignore"):
        narrow = np.asarray(array).astype(kind)
    return np.asarray(narrow.astype(np.float64, copy=False))
