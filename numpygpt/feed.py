"""Reading tokens through the page, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .cache import Cache, segments
from .layout import order_of
from .model import forward, unembed
from .params import Array, Config, Params
from .plans import Reused

__all__ = ["CHUNK", "Feeder", "Piece"]

# Rows in one forward pass. At 124M parameters the buffers of 512 rows take 40 MB; a prompt of 1024
# tokens took 5 % longer with 256 rows, 18 % longer with 128, as long with 1024.
CHUNK = 512


class Piece(NamedTuple):
    """Some tokens of one sequence that were read together.

    ``sequence`` says whose they are, ``start`` the place of the first among that sequence's new
    tokens; ``hidden`` (T, C) lives until the next piece is asked for.
    """

    sequence: int
    start: int
    hidden: Array


class Feeder:
    """Reads new tokens of one or more sequences, at most `chunk` rows in one forward pass.

    With ``chunk=1`` every token goes through the same shapes whatever stands around it, so the
    result is the same to the last bit however a text is split or batched.

    Parameters
    ----------
    params : Params
    config : Config
    rows : int
        Most new tokens, of all sequences together, in one call.
    capacity : int
        Most positions visible to a token.
    chunk : int
    """

    def __init__(
        self, params: Params, config: Config, rows: int, capacity: int, chunk: int = CHUNK
    ):
        self.params, self.config, self.chunk = params, config, chunk
        rows, order = max(1, min(rows, chunk)), order_of(params)
        self.planner = Reused(config, rows, capacity, params.dtype, order)

    def pieces(self, new: Sequence[Array], caches: Sequence[Cache]) -> Iterator[Piece]:
        """Read the new ids of each sequence; yield their hidden states in the order of `new`."""
        waiting: list[tuple[int, int, int]] = []  # sequence, start, stop
        room = self.chunk
        for sequence, ids in enumerate(new):
            start = 0
            while start < len(ids):
                stop = min(start + room, len(ids))
                waiting.append((sequence, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    yield from self._forward(waiting, new, caches)
                    waiting, room = [], self.chunk
        if waiting:
            yield from self._forward(waiting, new, caches)

    def last(
        self,
        new: Sequence[Array],
        caches: Sequence[Cache],
        counts: Sequence[int] | None = None,
    ) -> Array:
        """Read the new ids of each sequence; return the last hidden states of each.

        Parameters
        ----------
        new : sequence of (T,) ndarray of int
        caches : sequence of Cache
        counts : sequence of int, optional
            How many of each sequence, 1 to T; one if None.

        Returns
        -------
        (N, C) ndarray
            One sequence after another, N the sum of `counts`.
        """
        counts = [1] * len(new) if counts is None else counts
        starts = np.cumsum([0, *counts])
        last = np.empty((starts[-1], self.config.n_embd), self.params.dtype)
        for sequence, start, hidden in self.pieces(new, caches):
            first = len(new[sequence]) - counts[sequence]  # the first token that is asked for
            hidden = hidden[max(0, first - start) :]
            row = starts[sequence] + max(0, start - first)
            last[row : row + len(hidden)] = hidden
        return last

    def logits(self, hidden: Array, out: Array | None = None) -> Array:
        """Unembed hidden states (N, C) -> (N, V), at most `chunk` rows in one product."""
        if out is None:
            out = np.empty((len(hidden), self.config.vocab_size), hidden.dtype)
        for start in range(0, len(hidden), self.chunk):
            rows = slice(start, start + self.chunk)
            unembed(hidden[rows], self.params, out=out[rows])
        return out

    def _forward(
        self,
        parts: Sequence[tuple[int, int, int]],
        new: Sequence[Array],
        caches: Sequence[Cache],
    ) -> Iterator[Piece]:
        """One forward pass over parts of sequences."""
        ids = np.concatenate([new[sequence][start:stop] for sequence, start, stop in parts])
        laid = segments(
            [stop - start for _, start, stop in parts],
            [caches[sequence] for sequence, _, _ in parts],
        )
        plan = self.planner.fit(laid)
        with np.errstate(under="ignore"):  # an attention of less than 1e-38 is 0
            hidden = forward(ids, laid, self.params, self.config, plan)
        row = 0
        for sequence, start, stop in parts:
            yield Piece(sequence, start, hidden[row : row + stop - start])
            row += stop - start
