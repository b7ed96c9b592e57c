"""Tracing a run that reads its tokens in several passes, as generation does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..api import Model
from ..arguments import whole
from ..cache import Cache, segments
from ..errors import ArgumentError
from ..model import forward, unembed
from ..params import Array
from ..plans import INTERMEDIATES, Traced
from .operations import kind_of

__all__ = ["trace_chunks"]

AXES = {row.name: row.axes for row in INTERMEDIATES}

# What stands where a token does not look, since it comes later.
UNSEEN = {"h.{i}.attn.scores": -np.inf, "h.{i}.attn.pattern": 0.0}


def trace_chunks(
    model: Model,
    ids: Sequence[int] | Array,
    chunks: Sequence[int],
    names: Sequence[str] | None = None,
) -> dict[str, Array]:
    """Every intermediate of several forward passes with a cache, as if it had been one.

    Parameters
    ----------
    model : Model
    ids : sequence of int
        1 to n_ctx token ids.
    chunks : sequence of int
        How many of them each pass reads, at least one; together, all.
    names : sequence of str, optional
        As for :meth:`numpygpt.Model.trace`.

    Returns
    -------
    dict of str to ndarray
        In the order of execution, T rows each. What a pass did not see is -inf in scores and 0 in
        patterns.

    Raises
    ------
    ArgumentError
        If the chunks do not add up to the number of tokens, or a name matches nothing.
    TokenError, ContextError
        As for :meth:`numpygpt.Model.logits`.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare", dtype="float64")
    >>> once = model.trace([46, 1, 2], names=["logits"])["logits"]
    >>> passes = trace_chunks(model, [46, 1, 2], [2, 1], names=["logits"])["logits"]
    >>> bool(np.allclose(once, passes, rtol=0, atol=1e-12))
    True
    """
    array = model._ids(ids)
    sizes = [whole("a chunk", chunk, 1, len(array)) for chunk in chunks]
    if sum(sizes) != len(array):
        raise ArgumentError(
            f"the chunks read {sum(sizes)} tokens together, but there are {len(array)}"
        )
    if names is not None:
        names = [names] if isinstance(names, str) else [str(name) for name in names]
    cache = Cache(model.config, len(array), model.dtype)
    planner = Traced(model.config, max(sizes), names, len(array), model.dtype)
    made: dict[str, Array] = {}
    for size in sizes:
        start = cache.length
        for name, part in _read(model, array[start : start + size], cache, planner).items():
            if name not in made:
                made[name] = _blank(kind_of(name), part, len(array))
            made[name][_place(kind_of(name), start, size)] = part
    return made


def _read(model: Model, ids: Array, cache: Cache, planner: Traced) -> dict[str, Array]:
    """The intermediates of one pass."""
    laid = segments([len(ids)], [cache])
    plan = planner.fit(laid)
    with np.errstate(under="ignore"):  # an attention of less than 1e-38 is 0
        hidden = forward(ids, laid, model.params, model.config, plan)
    if plan.logits is not None:
        unembed(hidden, model.params, out=plan.logits)
    return planner.arrays


def _blank(kind: str, part: Array, length: int) -> Array:
    """Room for all rows of an array of which some are there."""
    shape = (
        length if axis in "NTS" else size for axis, size in zip(AXES[kind], part.shape, strict=True)
    )
    return np.full(tuple(shape), UNSEEN.get(kind, 0.0), part.dtype)


def _place(kind: str, start: int, size: int) -> tuple[Any, ...]:
    """Where the rows of a pass, and the positions it saw, stand among all."""
    rows = {"N": slice(start, start + size), "T": slice(start, start + size)}
    seen = {"S": slice(0, start + size)}
    return tuple((rows | seen).get(axis, slice(None)) for axis in AXES[kind])
