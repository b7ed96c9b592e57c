"""Running tokens through the page, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .cache import Cache, segments
from .model import forward, unembed
from .params import Array, Config, Params
from .plans import Planner, Reused

__all__ = ["CHUNK", "Piece", "feed", "feed_last", "unembed_rows"]

# Rows in one forward pass. Larger chunks make the matrix products no faster and every buffer
# larger: at 124M parameters the buffers of 256 rows take 15 MB.
CHUNK = 256


class Piece(NamedTuple):
    """Some tokens of one sequence that were read together.

    ``sequence`` says whose they are, ``start`` the index of the first among that sequence's new
    tokens; ``hidden`` (T, C) lives until the next piece is asked for.
    """

    sequence: int
    start: int
    hidden: Array


def feed(
    new: Sequence[Array],
    caches: Sequence[Cache],
    params: Params,
    config: Config,
    planner: Planner,
    chunk: int = CHUNK,
) -> Iterator[Piece]:
    """Read the new tokens of some sequences, packed, at most `chunk` rows in one forward pass.

    With ``chunk=1`` every token goes through the same shapes whatever stands around it, so the
    result is the same to the last bit however a text is split or batched.

    Parameters
    ----------
    new : sequence of (T,) ndarray of int
        The new ids of each sequence.
    caches : sequence of Cache
    params, config
    planner : Planner
        Must have room for `chunk` rows.
    chunk : int

    Yields
    ------
    Piece
        In the order of `new`.
    """
    waiting: list[tuple[int, int, int]] = []  # sequence, start, stop
    room = chunk
    for sequence, ids in enumerate(new):
        start = 0
        while start < len(ids):
            stop = min(start + room, len(ids))
            waiting.append((sequence, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield from _pass(waiting, new, caches, params, config, planner)
                waiting, room = [], chunk
    if waiting:
        yield from _pass(waiting, new, caches, params, config, planner)


def _pass(
    parts: Sequence[tuple[int, int, int]],
    new: Sequence[Array],
    caches: Sequence[Cache],
    params: Params,
    config: Config,
    planner: Planner,
) -> Iterator[Piece]:
    """One forward pass over parts of sequences."""
    laid = segments(
        [stop - start for _, start, stop in parts], [caches[sequence] for sequence, _, _ in parts]
    )
    ids = np.concatenate([new[sequence][start:stop] for sequence, start, stop in parts])
    hidden = forward(ids, laid, params, config, planner.fit(laid))
    for (sequence, start, _), segment in zip(parts, laid, strict=True):
        yield Piece(sequence, start, hidden[segment.rows])


def feed_last(
    new: Sequence[Array],
    caches: Sequence[Cache],
    params: Params,
    config: Config,
    planner: Planner,
    chunk: int = CHUNK,
) -> Array:
    """Read the new tokens of some sequences; return the last hidden state of each, (B, C)."""
    last = np.empty((len(new), config.n_embd), params.wpe.dtype)
    for piece in feed(new, caches, params, config, planner, chunk):
        last[piece.sequence] = piece.hidden[-1]  # of its pieces, the last one stays
    return last


def unembed_rows(hidden: Array, params: Params, chunk: int, out: Array | None = None) -> Array:
    """Logits (N, V) of hidden states (N, C), at most `chunk` rows in one product."""
    if out is None:
        out = np.empty((len(hidden), len(params.head)), hidden.dtype)
    for start in range(0, len(hidden), chunk):
        unembed(hidden[start : start + chunk], params, out=out[start : start + chunk])
    return out


def planner_for(config: Config, rows: int, capacity: int, dtype: Any, chunk: int = CHUNK) -> Reused:
    """Buffers for at most `rows` rows in all, `chunk` at a time."""
    return Reused(config, max(1, min(rows, chunk)), capacity, dtype)
