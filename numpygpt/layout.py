"""Where learned matrices lie in memory, which decides how fast products with them are.

A checkpoint of GPT-2 holds its matrices as (in, out), and float32 files are mapped: that starts at
once and takes no memory of its own. But a product reads a matrix of shape (out, in) faster, and
memory that is not mapped from a file may lie in large pages. One decode step of 124M parameters
(two Zen 3 cores, medians of interleaved runs):

======================================  =====  ========
matrices                                1 row  32 rows
======================================  =====  ========
mapped, (in, out)                        1.00      1.00
copied, (in, out)                        0.85      0.93
copied, (out, in)                        0.77      0.79
======================================  =====  ========

The copy takes 0.2 to 0.4 s, so it pays from some fifty tokens on. On processors with AVX-512,
one row takes 0.63 to 0.77 of the time and 32 rows 0.71. Where matrices lie as (out, in), NumPy
hands the BLAS both operands without a copy if the result lies in Fortran order, too, which
:func:`order_of` tells to the plans.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Literal, TypeAlias

import numpy as np

from .params import Array, Linear, Params
from .threads import spread

__all__ = ["Order", "fast", "order_of"]

Order: TypeAlias = Literal["C", "F"]

# Rows that are turned at a time: what is read of a matrix and what is written then both stay in a
# core's cache. 85 million numbers, two threads: 0.16 s with 16 or 64 rows, 0.32 s at once.
ROWS = 64


def order_of(params: Params) -> Order:
    """The memory order in which results of products with these matrices are made fastest."""
    w = params.h[0].mlp.c_fc.w
    return "C" if isinstance(w, np.ndarray) and w.flags.c_contiguous else "F"


def fast(params: Params) -> Params:
    """The same numbers where products read them fastest: copied, and (out, in)-contiguous.

    Only matrices that are mapped from a file are copied, because the memory that the file takes
    can be given back: they are not in memory twice. All others stay as they are.

    Parameters
    ----------
    params : Params

    Returns
    -------
    Params

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")  # float16 in its file, so nothing is mapped
    >>> fast(model.params).wte is model.params.wte
    True
    """
    linears = [
        linear
        for block in params.h
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    ]
    turned = iter(spread(lambda linear: linear._replace(w=_turned(linear.w)), linears))

    def following() -> Linear:
        return next(turned)

    blocks = tuple(
        block._replace(
            attn=block.attn._replace(c_attn=following(), c_proj=following()),
            mlp=block.mlp._replace(c_fc=following(), c_proj=following()),
        )
        for block in params.h
    )
    wte = _copied(params.wte)
    head = wte if params.head is params.wte else _copied(params.head)
    return params._replace(h=blocks, wte=wte, head=head)


def _turned(w: Any) -> Any:
    """An (in, out) matrix whose memory is (out, in)."""
    file = _mapped(w)
    if file is None:
        return w
    turned = np.empty(w.shape[::-1], w.dtype)
    for start in range(0, w.shape[0], ROWS):
        turned[:, start : start + ROWS] = w[start : start + ROWS].T
    _forget(w, file)
    return turned.T


def _copied(table: Any) -> Any:
    """A (V, C) table that is not mapped from a file."""
    file = _mapped(table)
    if file is None:
        return table
    copy = table.copy()
    _forget(table, file)
    return copy


def _mapped(array: Any) -> mmap.mmap | None:
    """The file that an array is mapped from to be read; None if it is no such array.

    There is nothing in this memory that the file does not have.
    """
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    source = base.obj if isinstance(base, memoryview) else base
    if not isinstance(source, mmap.mmap) or not memoryview(source).readonly:
        return None
    return source


def _forget(array: Array, file: mmap.mmap) -> None:
    """Give back the memory in which a part of a mapped file is held; it can be read again."""
    if not hasattr(file, "madvise") or not array.flags.forc:
        return
    whole = np.frombuffer(file, np.uint8)
    first = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        with contextlib.suppress(OSError):  # memory that is locked stays
            file.madvise(mmap.MADV_DONTNEED, start, stop - start)
