"""Keys and values of the tokens already read, and the segments that new tokens come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import ContextError
from .params import Array, Config

__all__ = ["Cache", "Segment", "segments"]


class Cache:
    """The keys and values of one sequence, in a slab that is allocated once.

    ``length`` is the only place where a sequence's position is kept: the next token's position is
    the number of tokens already read. Memory that was never written costs nothing on the systems
    that hand out pages lazily.

    Parameters
    ----------
    config : Config
    capacity : int, optional
        Tokens it can hold; all ``n_ctx`` positions if None.
    dtype : dtype

    Attributes
    ----------
    keys, values : (L, H, capacity, D) ndarray
    length : int
        Tokens read so far.

    Examples
    --------
    >>> import numpy as np
    >>> cache = Cache(Config(n_layer=1, n_head=1, n_embd=2), capacity=4)
    >>> k, v = cache.append(0, np.ones((1, 3, 2)), np.zeros((1, 3, 2)))
    >>> k.shape, cache.length
    ((1, 3, 2), 0)
    """

    def __init__(self, config: Config, capacity: int | None = None, dtype: Any = np.float32):
        self.capacity = config.n_ctx if capacity is None else capacity
        shape = (config.n_layer, config.n_head, self.capacity, config.head_dim)
        self.keys = np.empty(shape, dtype)
        self.values = np.empty(shape, dtype)
        self.length = 0

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write one layer's new keys and values; return all of that layer's visible ones.

        ``length`` does not move, since every layer of one forward pass writes at the same
        positions; ``forward`` moves it once, at its end. A pass that is interrupted therefore
        leaves the cache as it was.

        Parameters
        ----------
        layer : int
        k, v : (H, T, D) ndarray

        Returns
        -------
        keys, values : (H, S, D) ndarray
            Views of the slab, S = length + T.
        """
        start, stop = self.length, self.length + k.shape[1]
        self.keys[layer, :, start:stop] = k
        self.values[layer, :, start:stop] = v
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises
        ------
        ContextError
            If fewer than `length` tokens have been read.
        """
        if not 0 <= length <= self.length:
            raise ContextError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def copy_from(self, other: Cache) -> None:
        """Hold the tokens of another cache: a sequence that goes on in two ways needs two.

        Raises
        ------
        ContextError
            If they do not fit.
        """
        if other.length > self.capacity:
            raise ContextError(f"{other.length} tokens do not fit into a cache of {self.capacity}")
        self.keys[:, :, : other.length] = other.keys[:, :, : other.length]
        self.values[:, :, : other.length] = other.values[:, :, : other.length]
        self.length = other.length


class Segment(NamedTuple):
    """The new tokens of one sequence: their place among the packed rows, and their cache."""

    rows: slice
    cache: Cache

    @property
    def length(self) -> int:
        """T, how many new tokens there are."""
        return int(self.rows.stop - self.rows.start)


def segments(lengths: Sequence[int], caches: Sequence[Cache]) -> list[Segment]:
    """Lay sequences one after another on the packed rows, without padding.

    Raises
    ------
    ContextError
        If a sequence does not fit into its cache.

    Examples
    --------
    >>> caches = [Cache(Config(n_layer=1), capacity=8) for _ in range(2)]
    >>> [segment.rows for segment in segments([3, 2], caches)]
    [slice(0, 3, None), slice(3, 5, None)]
    """
    laid, start = [], 0
    for length, cache in zip(lengths, caches, strict=True):
        if cache.length + length > cache.capacity:
            raise ContextError(
                f"{cache.length} tokens read and {length} new ones are more than the "
                f"{cache.capacity} that this cache holds"
            )
        laid.append(Segment(slice(start, start + length), cache))
        start += length
    return laid
