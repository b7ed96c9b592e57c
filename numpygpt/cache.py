"""Keys and values of the tokens already read, and the segments that new tokens come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import ContextError
from .params import Array, Config

__all__ = ["Cache", "Segment", "segments"]


class Cache:
    """The keys and values of one sequence, or of several side by side, in a slab allocated once.

    ``lengths`` is the only place where positions are kept: a sequence's next token has the
    position ``lengths[b]``, the number of its tokens already read. Memory that was never written
    costs nothing on the systems that hand out pages lazily.

    Parameters
    ----------
    config : Config
    capacity : int, optional
        Tokens it can hold of each sequence; all ``n_ctx`` positions if None.
    dtype : dtype
    sequences : int
        B. ``cache[b]`` and ``cache[b:e]`` are caches of their own that share this one's memory.

    Attributes
    ----------
    keys, values : (L, B, H, capacity, D) ndarray
        A query that several sequences share one product with also meets, in the shorter ones,
        places beyond their length. They are masked, so what stands there must only be finite.
    lengths : (B,) ndarray of int
        Tokens read so far.
    place : slice
        Which sequences of the slab these are.

    Examples
    --------
    >>> import numpy as np
    >>> cache = Cache(Config(n_layer=1, n_head=1, n_embd=2), capacity=4)
    >>> k, v = cache.append(0, np.ones((1, 1, 3, 2)), np.zeros((1, 1, 3, 2)))
    >>> k.shape, cache.length
    ((1, 1, 3, 2), 0)
    """

    def __init__(
        self,
        config: Config,
        capacity: int | None = None,
        dtype: Any = np.float32,
        sequences: int = 1,
    ):
        capacity = config.n_ctx if capacity is None else capacity
        shape = (config.n_layer, sequences, config.n_head, capacity, config.head_dim)
        self.keys: Array = np.zeros(shape, dtype)
        self.values: Array = np.zeros(shape, dtype)
        self.lengths: Array = np.zeros(sequences, np.intp)
        self.slab = self.keys, self.values, self.lengths
        self.place = slice(0, sequences)

    def __getitem__(self, part: int | slice) -> Cache:
        part = slice(part, part + 1) if isinstance(part, int) else part
        start, stop, _ = part.indices(len(self.lengths))
        return self._view(slice(self.place.start + start, self.place.start + stop))

    def _view(self, place: slice) -> Cache:
        """Some of the slab's sequences, whichever of them this cache has."""
        view = object.__new__(Cache)
        keys, values, lengths = view.slab = self.slab
        view.keys, view.values, view.lengths = keys[:, place], values[:, place], lengths[place]
        view.place = place
        return view

    def joined(self, other: Cache) -> Cache | None:
        """Both as one cache, if `other` stands right behind this one in the same slab."""
        if self.slab is not other.slab or self.place.stop != other.place.start:
            return None
        return self._view(slice(self.place.start, other.place.stop))

    @property
    def capacity(self) -> int:
        """Tokens it can hold of each sequence."""
        return int(self.keys.shape[3])

    @property
    def length(self) -> int:
        """Tokens read so far of the longest sequence, or of the only one."""
        return int(self.lengths.max())

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write one layer's new keys and values; return all of that layer's visible ones.

        ``lengths`` do not move, since every layer of one forward pass writes at the same
        positions; ``forward`` moves them once, at its end. A pass that is interrupted therefore
        leaves the cache as it was.

        Parameters
        ----------
        layer : int
        k, v : (B, H, T, D) ndarray

        Returns
        -------
        keys, values : (B, H, S, D) ndarray
            Views of the slab; S = T + the longest sequence's length.
        """
        new, longest = k.shape[2], 0
        for b, start in enumerate(self.lengths.tolist()):
            self.keys[layer, b, :, start : start + new] = k[b]
            self.values[layer, b, :, start : start + new] = v[b]
            longest = max(longest, start + new)
        return self.keys[layer, :, :, :longest], self.values[layer, :, :, :longest]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises
        ------
        ContextError
            If fewer than `length` tokens have been read.
        """
        if not 0 <= length <= self.lengths.min():
            raise ContextError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.lengths[...] = length

    def copy_from(self, other: Cache) -> None:
        """Hold the tokens of another cache: a sequence that goes on in two ways needs two.

        Raises
        ------
        ContextError
            If they do not fit.
        """
        length = other.length
        if length > self.capacity:
            raise ContextError(f"{length} tokens do not fit into a cache of {self.capacity}")
        self.keys[:, :, :, :length] = other.keys[:, :, :, :length]
        self.values[:, :, :, :length] = other.values[:, :, :, :length]
        self.lengths[...] = other.lengths


class Segment(NamedTuple):
    """New tokens of a sequence, or as many of each of several whose caches lie side by side.

    Attributes
    ----------
    rows : slice
        Their place among the packed rows: those of the first sequence, then of the next.
    cache : Cache
        Of B sequences.
    length : int
        T, new tokens of each.
    """

    rows: slice
    cache: Cache
    length: int

    @property
    def positions(self) -> Array:
        """The position of each row: (B * T,)."""
        return (self.cache.lengths[:, None] + np.arange(self.length)).reshape(-1)


# Sequences of different lengths that share their products multiply by masked places, too, up to
# this share of the places that count, plus a few. At 124M parameters a place costs 4 us of memory
# traffic a step, and a product more about 150 us of Python in the twelve layers.
PADDING, PADDING_PLACES = 1.25, 32


def segments(lengths: Sequence[int], caches: Sequence[Cache]) -> list[Segment]:
    """Lay sequences one after another on the packed rows, without padding.

    Neighbours that have equally many new tokens, about as many old ones, and caches side by side
    in one slab become one segment: attention then takes them in one product.

    Parameters
    ----------
    lengths : sequence of int
        New tokens of each sequence.
    caches : sequence of Cache
        The cache of each.

    Raises
    ------
    ContextError
        If a sequence does not fit into its cache.

    Examples
    --------
    >>> caches = [Cache(Config(n_layer=1), capacity=8) for _ in range(2)]
    >>> [segment.rows for segment in segments([3, 2], caches)]
    [slice(0, 3, None), slice(3, 5, None)]
    >>> slab = Cache(Config(n_layer=1), capacity=8, sequences=2)
    >>> [segment.rows for segment in segments([1, 1], [slab[0], slab[1]])]
    [slice(0, 2, None)]
    """
    laid: list[Segment] = []
    row = total = longest = 0  # total and longest: tokens read by the last segment's sequences
    for length, cache in zip(lengths, caches, strict=True):
        read = cache.length
        if read + length > cache.capacity:
            raise ContextError(
                f"{read} tokens read and {length} new ones are more than the "
                f"{cache.capacity} that this cache holds"
            )
        start, total, longest = row, total + read, max(longest, read)
        joined = laid[-1].cache.joined(cache) if laid and laid[-1].length == length else None
        if joined is not None:
            padded = len(joined.lengths) * longest
            joined = joined if padded <= PADDING * total + PADDING_PLACES else None
        if joined is not None:
            start, cache = laid.pop().rows.start, joined
        else:
            total = longest = read
        row += length
        laid.append(Segment(slice(start, row), cache, length))
    return laid
