"""Numbers that a user passes in: Python's own, inside their range, or an error that says so."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from .errors import ArgumentError

__all__ = ["MOST", "as_float", "as_integer", "told", "whole"]

# More than anybody means. Python refuses to print what is much larger.
MOST = 2**128 - 1


def whole(name: str, value: Any, least: int, most: int = MOST, why: str = "") -> int:
    """An integer from `least` to `most`.

    Parameters
    ----------
    name : str
        Of the argument, for the message.
    value : object
    least, most : int
    why : str
        The reason of the range, for the message.

    Returns
    -------
    int
        Python's own: NumPy's wrap around in arithmetic.

    Raises
    ------
    ArgumentError

    Examples
    --------
    >>> whole("stride", np.uint8(200), 1)
    200
    """
    number = as_integer(value)
    if number is None or not least <= number <= most:
        bounds = f"from {least} up" if most == MOST else f"from {least} to {most}"
        if number is not None and number > MOST:
            bounds = f"from {least} to 2**128 - 1"
        reason = f" ({why})" if why else ""
        raise ArgumentError(f"{name} must be an integer {bounds}{reason}, not {told(value)}")
    return number


def as_integer(value: Any) -> int | None:
    """An integer as Python's own; None for what is not one.

    >>> as_integer(np.int8(3)), as_integer(3.0), as_integer(True)
    (3, None, None)
    """
    try:
        return None if isinstance(value, bool | np.bool) else operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float:
    """A real number as Python's own; NaN, which no range allows, for what is not one.

    >>> as_float(np.float32(0.5)), as_float("1"), as_float(True)
    (0.5, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return math.nan
    try:
        return float(value)
    except (OverflowError, TypeError):  # an integer beyond floats; NumPy's time spans
        return math.nan


def told(value: Any) -> str:
    """A value as a message can show it.

    >>> told([1, 2]), told(10**5000)
    ('[1, 2]', 'that')
    """
    try:
        return repr(value)[:40]
    except ValueError:  # an integer of more than 4300 digits
        return "that"
