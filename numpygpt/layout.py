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

    What is copied out of a file that is mapped is not kept in memory twice. Stored matrices, and
    arrays that cannot be had faster, stay as they are.

    Parameters
    ----------
    params : Params

    Returns
    -------
    Params

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> w = fast(model.params).h[0].mlp.c_fc.w
    >>> w.shape, w.T.flags.c_contiguous, bool((w == model.params.h[0].mlp.c_fc.w).all())
    ((192, 768), True, True)
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
    if not isinstance(w, np.ndarray) or (w.flags.f_contiguous and w.flags.writeable):
        return w
    turned = np.empty(w.shape[::-1], w.dtype)
    for start in range(0, w.shape[0], ROWS):
        turned[:, start : start + ROWS] = w[start : start + ROWS].T
    _forget(w)
    return turned.T


def _copied(table: Any) -> Any:
    """A (V, C) table that is not mapped from a file."""
    if not isinstance(table, np.ndarray) or (table.flags.c_contiguous and table.flags.writeable):
        return table
    copy = np.ascontiguousarray(table) if not table.flags.c_contiguous else table.copy()
    _forget(table)
    return copy


def _forget(array: Array) -> None:
    """Let go of the memory in which an array that is mapped from a file is held for now.

    It is read again when it is looked at. Only what is mapped to be read qualifies: there is
    nothing in it that the file does not have.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    source = base.obj if isinstance(base, memoryview) else base
    if not isinstance(source, mmap.mmap) or not hasattr(source, "madvise"):
        return
    whole = np.frombuffer(source, np.uint8)
    if whole.flags.writeable:
        return
    first = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if array.flags.forc and start < stop:
        source.madvise(mmap.MADV_DONTNEED, start, stop - start)
