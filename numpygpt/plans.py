"""Where intermediate results go: the table of intermediates, and three ways to place them.

The page (:mod:`numpygpt.model`) names a destination for every array it makes. A planner decides
what those destinations are, for the segments at hand:

* :class:`Fresh`: everywhere ``None``, so NumPy allocates. The textbook; nothing is aliased.
* :class:`Reused`: one preallocated set of buffers, shared between layers and, where that is
  legal, between intermediates. The fast way. Results live until the next call with it.
* :class:`Traced`: one array for each layer and name. Afterwards they are the record of the run.

All three divide the query rows of a segment into the same tiles and give their arrays the same
memory order, so they produce the same bits. Another order (``"F"``) makes BLAS add in another
sequence and agrees within rounding.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from .cache import Segment
from .errors import ArgumentError
from .layout import Order
from .params import Array, Config
from .threads import spread

__all__ = [
    "INTERMEDIATES",
    "AttentionPlan",
    "BlockPlan",
    "Fresh",
    "Intermediate",
    "MLPPlan",
    "Plan",
    "Planner",
    "Reused",
    "Tile",
    "Traced",
    "trace_names",
]

Place: TypeAlias = Array | None
Each: TypeAlias = Callable[[Callable[..., Array], list[Any]], Iterable[Array]]


class Intermediate(NamedTuple):
    """A row of the table: trace key (``{i}`` is the layer), axes, meaning."""

    name: str
    axes: tuple[str, ...]
    meaning: str


# In the order of execution. N rows now, T tokens of the segment, S positions visible to them,
# C width, H heads of width D, F width of the MLP, V vocabulary.
INTERMEDIATES = tuple(
    Intermediate(name, tuple(axes.split()), meaning)
    for name, axes, meaning in [
        ("embed", "N C", "token vector plus position vector"),
        ("h.{i}.resid_pre", "N C", "residual stream before attention"),
        ("h.{i}.ln_1", "N C", "normalised input of attention"),
        ("h.{i}.attn.qkv", "N 3C", "queries, keys and values side by side"),
        ("h.{i}.attn.scores", "H T S", "query times key, scaled, -inf where masked"),
        ("h.{i}.attn.pattern", "H T S", "softmax of the scores; rows sum to 1"),
        ("h.{i}.attn.heads", "H T D", "values mixed by the pattern"),
        ("h.{i}.attn.out", "N C", "what attention adds to the stream"),
        ("h.{i}.resid_mid", "N C", "residual stream between attention and MLP"),
        ("h.{i}.ln_2", "N C", "normalised input of the MLP"),
        ("h.{i}.mlp.pre", "N F", "MLP before its activation function"),
        ("h.{i}.mlp.post", "N F", "MLP after its activation function"),
        ("h.{i}.mlp.out", "N C", "what the MLP adds to the stream"),
        ("h.{i}.resid_post", "N C", "residual stream after the MLP"),
        ("ln_f", "N C", "hidden state: the normalised final stream"),
        ("logits", "N V", "score of every token as the next one, in nats"),
    ]
)

_AXES = {row.name: row.axes for row in INTERMEDIATES}


def trace_names(n_layer: int) -> list[str]:
    """Every trace key of a model, in the order of execution.

    >>> trace_names(1)[:3]
    ['embed', 'h.0.resid_pre', 'h.0.ln_1']
    """
    names = [row.name for row in INTERMEDIATES]
    layer = [name for name in names if name.startswith("h.")]
    before, after = names[: names.index(layer[0])], names[names.index(layer[-1]) + 1 :]
    return before + [name.format(i=i) for i in range(n_layer) for name in layer] + after


def _source(name: str) -> str:
    """The name under which an array is made: a block's input is what stood there before it."""
    if not name.endswith(".resid_pre"):
        return name
    i = int(name.split(".")[1])
    return f"h.{i - 1}.resid_post" if i else "embed"


class Tile(NamedTuple):
    """Some query rows of one segment, few enough that their scores stay in the cache.

    Attributes
    ----------
    sequences, tokens : slice
        Which of the segment's B sequences and T tokens.
    visible : int
        S, the positions that the last row of the longest sequence sees.
    future : (..., T, W) ndarray of bool
        For the last W of these positions: True where a position comes after the query's token.
    scores, pattern : (B, H, T, S) ndarray or None
    heads : (B, H, T, D) ndarray or None
    """

    sequences: slice
    tokens: slice
    visible: int
    future: Array
    scores: Place = None
    pattern: Place = None
    heads: Place = None


class AttentionPlan(NamedTuple):
    """Destinations inside attention.

    ``tiles``, a list for each segment, also say which rows; ``each`` calls a function with each
    of some tuples of arguments, one after another or several at once.
    """

    tiles: list[list[Tile]]
    qkv: Place = None
    heads: Place = None
    out: Place = None
    each: Each = itertools.starmap


class MLPPlan(NamedTuple):
    """Destinations inside the MLP."""

    pre: Place = None
    post: Place = None
    out: Place = None


class BlockPlan(NamedTuple):
    """Destinations inside one block."""

    attn: AttentionPlan
    mlp: MLPPlan
    ln_1: Place = None
    resid_mid: Place = None
    ln_2: Place = None
    resid_post: Place = None


class Plan(NamedTuple):
    """Destinations of a whole forward pass; ``h`` has one entry for each layer."""

    h: list[BlockPlan]
    embed: Place = None
    ln_f: Place = None
    logits: Place = None


class Planner(Protocol):
    """Anything that can say where the results for some segments go."""

    def fit(self, segments: Sequence[Segment]) -> Plan:
        """Destinations for the new tokens of `segments`, whose caches have not moved yet."""


# Query rows for each tile. Attention over 512 positions, 256 rows at a time: 13.5 ms with 128
# rows, 12.1 with 64; over 1024: 37 and 34 ms.
TILE_ROWS = 64

# Tiles that may be worked on at once, each with scores of its own.
AT_ONCE = 4

# Products of a query and a key from which the tiles of a pass are worth two threads. 256 rows that
# see 1024 positions: 25.4 ms on one thread for all but the products, 17.5 on two; that see 512:
# 11.2 and 11.3; that see 256: 4.0 and 5.1.
SEVERAL = 2**17


def _future(rows: int) -> Array:
    """Which of `rows` keys come after which of as many queries: (T, T), made once a planner."""
    return np.triu(np.ones((rows, rows), bool), 1)


def _tiles(segments: Sequence[Segment], future: Array) -> list[list[Tile]]:
    """Divide the rows of each segment into tiles of at most as many as `future` has, or one."""
    most = len(future)
    return [
        _parts(segment, future) if len(segment.cache.lengths) == 1 else _groups(segment, most)
        for segment in segments
    ]


def _parts(segment: Segment, future: Array) -> list[Tile]:
    """Tiles of the tokens of one sequence, each of which sees nothing behind its last token."""
    read, tiles = segment.cache.length, []
    for start in range(0, segment.length, len(future)):
        stop = min(start + len(future), segment.length)
        own = future[: stop - start, : stop - start]
        tiles.append(Tile(slice(0, 1), slice(start, stop), read + stop, own))
    return tiles


def _groups(segment: Segment, most: int) -> list[Tile]:
    """Tiles of several sequences, which may have different lengths."""
    lengths, new, tiles = segment.cache.lengths, segment.length, []
    step = max(1, most // new)
    for first, start in itertools.product(range(0, len(lengths), step), range(0, new, most)):
        read, stop = lengths[first : first + step], min(start + most, new)
        shortest, longest = int(read.min()), int(read.max())
        own = read[:, None, None, None] + np.arange(start, stop)[:, None]  # (B, 1, T, 1)
        future = np.arange(shortest + start, longest + stop) > own  # (B, 1, T, W)
        part = slice(first, first + len(read))
        tiles.append(Tile(part, slice(start, stop), longest + stop, future))
    return tiles


def _each(tiles: Sequence[Sequence[Tile]], at_once: int) -> Each:
    """How the tiles of a pass are gone through: one by one, or several on as many threads."""
    sizes = [
        (tile.sequences.stop - tile.sequences.start)
        * (tile.tokens.stop - tile.tokens.start)
        * tile.visible
        for some in tiles
        for tile in some
    ]

    def together(function: Callable[..., Array], tasks: list[Any]) -> Iterator[Array]:
        for start in range(0, len(tasks), at_once):
            yield from spread(lambda task: function(*task), tasks[start : start + at_once])

    return together if at_once > 1 and sum(sizes) > SEVERAL else itertools.starmap


def _as_heads(rows: Array, segment: Segment, n_head: int) -> Array:
    """(B * T, H * D) -> (B, H, T, D), a view: heads written there need no merging afterwards."""
    width = rows.shape[1] // n_head
    return rows.reshape(-1, segment.length, n_head, width).transpose(0, 2, 1, 3)


class Fresh:
    """Allocate every array anew.

    Parameters
    ----------
    config : Config
    tile_rows : int
        Query rows for each tile.
    """

    def __init__(self, config: Config, tile_rows: int = TILE_ROWS):
        self.config = config
        self.future = _future(tile_rows)

    def fit(self, segments: Sequence[Segment]) -> Plan:
        """Geometry only; every destination is None."""
        tiles = _tiles(segments, self.future)
        attn = AttentionPlan(tiles, each=_each(tiles, AT_ONCE))
        return Plan(h=[BlockPlan(attn, MLPPlan())] * self.config.n_layer)


class Reused:
    """One set of buffers for all layers and all calls.

    Buffers are shared where no value is still needed: the normalised inputs share one, so do the
    two branches that are added to the residual stream, the stream itself is updated in place,
    and the pattern overwrites the scores.

    Parameters
    ----------
    config : Config
    rows : int
        Most packed rows in one call.
    capacity : int, optional
        Most positions visible to a token; n_ctx if None.
    dtype : dtype
    order : {"C", "F"}
        Memory order of the row-wise buffers.
    tile_rows : int
    """

    def __init__(
        self,
        config: Config,
        rows: int,
        capacity: int | None = None,
        dtype: Any = np.float32,
        order: Order = "C",
        tile_rows: int = TILE_ROWS,
    ):
        c = config.n_embd
        self.config, self.order, self.future = config, order, _future(min(tile_rows, rows))
        visible = config.n_ctx if capacity is None else capacity
        self.at_once = min(AT_ONCE, math.ceil(rows / len(self.future)))
        sizes = {
            "stream": rows * c,
            "normed": rows * c,
            "qkv": rows * 3 * c,
            "scores": self.at_once * config.n_head * len(self.future) * visible,
            "heads": rows * c,
            "branch": rows * c,
            "pre": rows * config.mlp_dim,
            "post": rows * config.mlp_dim,
        }
        self.buffers = {name: np.empty(size, dtype) for name, size in sizes.items()}

    def fit(self, segments: Sequence[Segment]) -> Plan:
        """The first rows of every buffer."""
        n, c, f = segments[-1].rows.stop, self.config.n_embd, self.config.mlp_dim
        stream, normed, branch = (self._rows(b, n, c) for b in ("stream", "normed", "branch"))
        heads = self._rows("heads", n, c)
        tiles = self._place(segments, heads)
        attn = AttentionPlan(
            tiles, self._rows("qkv", n, 3 * c), heads, branch, _each(tiles, self.at_once)
        )
        mlp = MLPPlan(self._rows("pre", n, f), self._rows("post", n, f), branch)
        block = BlockPlan(attn, mlp, normed, stream, normed, stream)
        return Plan([block] * self.config.n_layer, stream, normed)

    def _rows(self, name: str, n: int, width: int) -> Array:
        return self.buffers[name][: n * width].reshape(n, width, order=self.order)

    def _place(self, segments: Sequence[Segment], heads: Array) -> list[list[Tile]]:
        """Tiles with their places."""
        room = self.buffers["scores"].reshape(self.at_once, -1)
        placed: list[list[Tile]] = []
        rooms = itertools.cycle(room)
        for segment, tiles in zip(segments, _tiles(segments, self.future), strict=True):
            own = _as_heads(heads[segment.rows], segment, self.config.n_head)
            placed.append([])
            for tile in tiles:
                mixed = own[tile.sequences, :, tile.tokens]
                shape = (*mixed.shape[:3], tile.visible)
                scores = next(rooms)[: math.prod(shape)].reshape(shape)
                placed[-1].append(tile._replace(scores=scores, pattern=scores, heads=mixed))
        return placed


class Traced(Reused):
    """Keep every intermediate, or those whose names match; the others use the shared buffers.

    Parameters
    ----------
    config : Config
    rows : int
        Most tokens in one call.
    names : sequence of str, optional
        Trace keys or shell patterns (``"h.*.attn.pattern"``); all if None.
    capacity, dtype, order, tile_rows
        As for :class:`Reused`.

    Attributes
    ----------
    arrays : dict of str to ndarray
        After a forward pass: trace key -> array, in the order of execution.

    Raises
    ------
    ArgumentError
        If a pattern matches no name.
    """

    def __init__(
        self,
        config: Config,
        rows: int,
        names: Sequence[str] | None = None,
        capacity: int | None = None,
        dtype: Any = np.float32,
        order: Order = "C",
        tile_rows: int = TILE_ROWS,
    ):
        super().__init__(config, rows, capacity, dtype, order, tile_rows)
        self.dtype = dtype
        known = trace_names(config.n_layer)
        for pattern in names or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                raise ArgumentError(
                    f"no intermediate is called {pattern!r}; the names are {', '.join(known[:4])} "
                    f"... {', '.join(known[-3:])} (see numpygpt.plans.INTERMEDIATES)"
                )
        self.wanted = [
            name
            for name in known
            if names is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
        ]
        self.arrays: dict[str, Array] = {}

    def fit(self, segments: Sequence[Segment]) -> Plan:
        """One array for each wanted name, the shared buffers elsewhere."""
        sequences = sum(len(segment.cache.lengths) for segment in segments)
        if sequences != 1:
            raise ArgumentError(f"a trace follows one sequence, not {sequences}")
        plan, (segment,) = super().fit(segments), segments
        c, t = self.config, segment.length
        sizes = {
            "N": t, "T": t, "S": segment.cache.length + t, "C": c.n_embd, "3C": 3 * c.n_embd,
            "H": c.n_head, "D": c.head_dim, "F": c.mlp_dim, "V": c.vocab_size,
        }  # fmt: skip
        kept: dict[str, Array] = {}
        for name in map(_source, self.wanted):
            if name not in kept:
                kind = re.sub(r"^h\.\d+", "h.{i}", name)
                kept[name] = self._new(kind, tuple(sizes[axis] for axis in _AXES[kind]))
        self.arrays = {name: kept[_source(name)] for name in self.wanted}

        def tile(h: str, tile: Tile) -> Tile:
            at = np.s_[None, :, tile.tokens, : tile.visible]
            scores, pattern = (kept.get(f"{h}.attn.{name}") for name in ("scores", "pattern"))
            heads = kept.get(f"{h}.attn.heads")
            return tile._replace(
                scores=tile.scores if scores is None else scores[at],
                pattern=tile.pattern if pattern is None else pattern[at],
                heads=tile.heads if heads is None else heads[None, :, tile.tokens],
            )

        def block(i: int, p: BlockPlan) -> BlockPlan:
            h, get = f"h.{i}", kept.get
            heads = get(f"{h}.attn.heads")
            attn = p.attn._replace(
                tiles=[[tile(h, each) for each in p.attn.tiles[0]]],
                qkv=get(f"{h}.attn.qkv", p.attn.qkv),
                heads=p.attn.heads if heads is None else heads.transpose(1, 0, 2).reshape(t, -1),
                out=get(f"{h}.attn.out", p.attn.out),
            )
            mlp = MLPPlan(
                pre=get(f"{h}.mlp.pre", p.mlp.pre),
                post=get(f"{h}.mlp.post", p.mlp.post),
                out=get(f"{h}.mlp.out", p.mlp.out),
            )
            return BlockPlan(
                attn,
                mlp,
                ln_1=get(f"{h}.ln_1", p.ln_1),
                resid_mid=get(f"{h}.resid_mid", p.resid_mid),
                ln_2=get(f"{h}.ln_2", p.ln_2),
                resid_post=get(f"{h}.resid_post", p.resid_post),
            )

        return Plan(
            h=[block(i, p) for i, p in enumerate(plan.h)],
            embed=kept.get("embed", plan.embed),
            ln_f=kept.get("ln_f", plan.ln_f),
            logits=kept.get("logits"),
        )

    def _new(self, kind: str, shape: tuple[int, ...]) -> Array:
        if kind.endswith("attn.heads"):
            h, t, d = shape
            return np.empty((t, h * d), self.dtype, self.order).reshape(t, h, d).transpose(1, 0, 2)
        order = self.order if len(shape) == 2 and kind != "logits" else "C"
        array = np.empty(shape, self.dtype, order)
        # What no tile covers is masked.
        if kind.endswith("attn.scores"):
            array.fill(-np.inf)
        if kind.endswith("attn.pattern"):
            array.fill(0.0)
        return array
