"""NumPy's ``.npy``: one array, in a file of its own or as a member of an ``.npz``."""

from __future__ import annotations

import math

import numpy as np

from ...checkpoints.arrays import DataFile
from ...checkpoints.npz import HEADER, LONGEST_HEADER
from ...errors import DumpError
from ...params import shown
from .files import exact, integers, stored
from .recording import COMPUTED, INTEGERS, Stored

__all__ = ["describe"]

KINDS = {exact(kind).str: kind for kind in COMPUTED if kind != "BF16"}
KINDS |= {integers(kind).str: kind for kind in INTEGERS}
# How NumPy writes the bfloat16 of ml_dtypes, which JAX has; no other type of this name is about.
KINDS |= {"<V2": "BF16", "|V2": "BF16", "|b1": "BOOL"}


def describe(file: DataFile, start: int, size: int, label: str) -> Stored:
    """What an array is, from its header.

    NumPy's own reader takes the header for a Python expression; here it must be spelled as
    NumPy writes it.

    Parameters
    ----------
    file : DataFile
    start, size : int
        Which bytes of it are the array, header included.
    label : str
        The array's name, for messages.

    Raises
    ------
    DumpError
        If it is damaged, or holds Python objects or numbers of an unknown type.
    """
    what = f"{file.path}: {shown(label)}"
    head = file.map[start : start + min(size, LONGEST_HEADER)]
    digits = 2 if head[6:7] == b"\1" else 4  # in which the length of the header is told
    begin = 8 + digits
    stop = begin + int.from_bytes(head[8:begin], "little")
    match = HEADER.fullmatch(head[begin:stop])
    sound = head[:6] == b"\x93NUMPY" and head[6:7] in (b"\1", b"\2", b"\3")
    if not sound or stop > len(head) or match is None:
        raise DumpError(f"{what} is no NumPy array of numbers, or a damaged one")
    told = match[1].decode("latin-1")
    if told not in KINDS:
        raise DumpError(f"{what} is {shown(told)!r}; expected one of {', '.join(KINDS)}")
    texts = [text.strip() for text in match[3].removesuffix(b",").split(b",") if match[3]]
    shape = tuple(int(text) for text in texts if text.isdigit() and len(text) <= 15)
    if len(shape) > 8 or len(shape) != len(texts):
        raise DumpError(f"{what} has an impossible shape")
    kind, item = KINDS[told], np.dtype(told).itemsize
    if stop + math.prod(shape) * item != size:
        raise DumpError(
            f"{what} has {size - stop} bytes of numbers, expected {math.prod(shape) * item} for "
            f"the shape {shape}"
        )
    return stored(file, kind, start + stop, shape, match[2] == b"True" and len(shape) > 1)
