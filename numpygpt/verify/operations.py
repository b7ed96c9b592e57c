"""The page, cut at the names of its intermediates.

:data:`OPERATIONS` says of every trace key what it is made of and how, in the functions of the
page. Running all of it in order is :func:`numpygpt.model.forward`, bit for bit (a test holds
that; but for the scores, which are masked one step later). What the table adds is that one
operation can be run by itself, on inputs that somebody else computed, and that one operation can
be exchanged for a wrong one.
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .. import model
from ..ops import layer_norm, linear, softmax
from ..params import Array, Config, Params
from ..plans import Plan, trace_names

__all__ = ["OPERATIONS", "Operation", "Program", "kind_of", "layer_of", "run"]

Compute: TypeAlias = Callable[..., Array]
Edit: TypeAlias = Callable[["Program", str, Array], Array]


class Operation(NamedTuple):
    """How one intermediate is made.

    Attributes
    ----------
    inputs : tuple of str
        Trace keys, with ``{i}`` for the layer.
    compute : callable
        ``compute(program, layer, *inputs)`` -> array. float64 in, float64 out.
    words : str
        What it does, for a reader; may name fields of the config.
    """

    inputs: tuple[str, ...]
    compute: Compute
    words: str


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A GPT-2 that is to be run on some tokens: the right one, or one with mistakes.

    Attributes
    ----------
    ids : (T,) ndarray of int64
    config : Config
    params : Params
        As they are stored; each array is widened to float64 when it is needed.
    chunks : tuple of int
        How many tokens each pass reads. The right program does not depend on it.
    operations : mapping of str to Operation
        By trace key, with ``{i}`` for the layer.
    edits : tuple of callable
        ``edit(program, name, array)`` -> array: what is made of the weights.
    storage : callable, optional
        One more of these, after the others: how the weights are stored.
    dtype : dtype
        What it computes in.
    """

    ids: Array
    config: Config
    params: Params
    chunks: tuple[int, ...] = ()
    operations: Mapping[str, Operation] = dataclasses.field(default_factory=lambda: OPERATIONS)
    edits: tuple[Edit, ...] = ()
    storage: Edit | None = None
    dtype: Any = np.float64
    # What the storage makes of weights that are not edited, for all programs made from this one.
    stored: dict[str, Array] = dataclasses.field(default_factory=dict)

    def weight(self, name: str) -> Array | None:
        """A learned array by OpenAI's name, such as ``"h.0.ln_1.g"``."""
        if name in self.stored and not self.edits:
            return np.asarray(self.stored[name], self.dtype)
        found: Any = functools.reduce(_part, name.split("."), self.params)
        if found is None:
            return None
        array = self.edited(name, np.asarray(found, self.dtype))
        if self.storage and not self.edits:
            self.stored[name] = np.asarray(array, np.float32)  # every storage is narrower
        return array

    def rows(self, name: str, index: Array) -> Array:
        """Some rows of a table."""
        table = getattr(self.params, name)
        return self.edited(name, np.asarray(np.take(table, index, axis=0), self.dtype))

    def edited(self, name: str, array: Array) -> Array:
        """What the program makes of a learned array."""
        for edit in (*self.edits, self.storage):
            array = edit(self, name, array) if edit else array
        return array

    def map(self, name: str) -> tuple[Array, Array | None]:
        """Matrix and bias of a linear map."""
        w = self.weight(f"{name}.w")
        assert w is not None
        return w, self.weight(f"{name}.b")

    def norm(self, name: str) -> tuple[Array, Array | None]:
        """Gain and shift of a layer norm."""
        g = self.weight(f"{name}.g")
        assert g is not None
        return g, self.weight(f"{name}.b")

    def operation(self, name: str) -> Operation:
        """What makes an intermediate, with the layer filled in."""
        operation, layer = self.operations[kind_of(name)], layer_of(name)
        layer = self.config.n_layer if layer < 0 else layer  # ln_f reads the last block
        return operation._replace(inputs=tuple(_named(key, layer) for key in operation.inputs))

    def compute(self, name: str, inputs: Mapping[str, Array]) -> Array:
        """One intermediate from those it is made of."""
        operation = self.operation(name)
        arrays = (inputs[key] for key in operation.inputs)
        with np.errstate(all="ignore"):  # a dump may hold anything
            return operation.compute(self, layer_of(name), *arrays)

    @property
    def names(self) -> list[str]:
        """Every trace key, in the order of execution."""
        return trace_names(self.config.n_layer)


def _part(whole: Any, name: str) -> Any:
    return whole[int(name)] if name.isdigit() else getattr(whole, name)


@functools.cache
def _named(key: str, layer: int) -> str:
    """A key of the table for a layer; what stood before the first block is the embedding."""
    before = re.fullmatch(r"h\.\{i-(\d)\}\.(.*)", key)
    if before:
        layer -= int(before[1])
        return f"h.{layer}.{before[2]}" if layer >= 0 else "embed"
    return key.format(i=layer)


@functools.cache
def kind_of(name: str) -> str:
    """The row of the table that a trace key belongs to.

    >>> kind_of("h.11.attn.out"), kind_of("logits")
    ('h.{i}.attn.out', 'logits')
    """
    first, _, rest = name.partition(".")
    return f"h.{{i}}.{rest.partition('.')[2]}" if first == "h" else name


@functools.cache
def layer_of(name: str) -> int:
    """The layer of a trace key; -1 for what belongs to none.

    >>> layer_of("h.11.attn.out"), layer_of("logits")
    (11, -1)
    """
    return int(name.split(".")[1]) if name.startswith("h.") else -1


# -- the operations -------------------------------------------------------------------------------


def embed(program: Program, layer: int) -> Array:
    """(T, C)."""
    tokens = program.rows("wte", program.ids)
    positions = program.rows("wpe", np.arange(len(program.ids)))
    table = program.params._replace(wte=tokens, wpe=positions)
    every = np.arange(len(program.ids))
    return model.embed(every, every, table, Plan(h=[]))


def same(program: Program, layer: int, x: Array) -> Array:
    """The same array under another name."""
    return x


def normed(name: str) -> Compute:
    """(T, C) -> (T, C)."""

    def compute(program: Program, layer: int, x: Array) -> Array:
        eps = program.config.layer_norm_epsilon
        return layer_norm(x, *program.norm(name.format(i=layer)), eps)

    return compute


def mapped(name: str) -> Compute:
    """(T, I) -> (T, O)."""

    def compute(program: Program, layer: int, x: Array) -> Array:
        return linear(x, *program.map(name.format(i=layer)))

    return compute


def heads_of(program: Program, qkv: Array) -> tuple[Array, Array, Array]:
    """(T, 3C) -> queries, keys and values, each (H, T, D)."""
    q, k, v = model.split_heads(qkv, 3, len(qkv), program.config.n_head)
    return q[0], k[0], v[0]


def future(length: int) -> Array:
    """Which keys come after which queries: (T, T)."""
    return np.triu(np.ones((length, length), bool), 1)


def scores(program: Program, layer: int, qkv: Array) -> Array:
    """(T, 3C) -> (H, T, S), before the mask: that is where some programs record them."""
    q, k, _ = heads_of(program, qkv)
    return np.asarray(np.matmul(q * program.config.attention_scale(layer), k.mT))


def pattern(program: Program, layer: int, scores: Array) -> Array:
    """(H, T, S) -> (H, T, S). Scores that are masked already stay as they are."""
    return softmax(np.where(future(scores.shape[1]), -np.inf, scores))


def mixed(program: Program, layer: int, pattern: Array, qkv: Array) -> Array:
    """(H, T, S) and (T, 3C) -> (H, T, D)."""
    return np.asarray(np.matmul(pattern, heads_of(program, qkv)[2]))


def projected(program: Program, layer: int, heads: Array) -> Array:
    """(H, T, D) -> (T, C)."""
    return linear(model.merge_heads(heads[None]), *program.map(f"h.{layer}.attn.c_proj"))


def added(program: Program, layer: int, x: Array, y: Array) -> Array:
    """The residual stream after a branch."""
    return np.add(x, y)


def activated(program: Program, layer: int, pre: Array) -> Array:
    """(T, F) -> (T, F)."""
    return program.config.activation(pre)


def unembedded(program: Program, layer: int, hidden: Array) -> Array:
    """(T, C) -> (T, V)."""
    head = program.weight("head")
    assert head is not None
    return model.unembed(hidden, program.params._replace(head=head))


OPERATIONS: dict[str, Operation] = {
    "embed": Operation((), embed, "token vector plus position vector"),
    "h.{i}.resid_pre": Operation(("h.{i-1}.resid_post",), same, "what the block before left"),
    "h.{i}.ln_1": Operation(("h.{i}.resid_pre",), normed("h.{i}.ln_1"), "layer norm ln_1"),
    "h.{i}.attn.qkv": Operation(
        ("h.{i}.ln_1",), mapped("h.{i}.attn.c_attn"), "linear map attn.c_attn"
    ),
    "h.{i}.attn.scores": Operation(
        ("h.{i}.attn.qkv",), scores, "scaled products of queries and keys"
    ),
    "h.{i}.attn.pattern": Operation(("h.{i}.attn.scores",), pattern, "causal mask and softmax"),
    "h.{i}.attn.heads": Operation(
        ("h.{i}.attn.pattern", "h.{i}.attn.qkv"), mixed, "values mixed by the pattern"
    ),
    "h.{i}.attn.out": Operation(("h.{i}.attn.heads",), projected, "linear map attn.c_proj"),
    "h.{i}.resid_mid": Operation(
        ("h.{i}.resid_pre", "h.{i}.attn.out"), added, "residual stream plus attention"
    ),
    "h.{i}.ln_2": Operation(("h.{i}.resid_mid",), normed("h.{i}.ln_2"), "layer norm ln_2"),
    "h.{i}.mlp.pre": Operation(("h.{i}.ln_2",), mapped("h.{i}.mlp.c_fc"), "linear map mlp.c_fc"),
    "h.{i}.mlp.post": Operation(("h.{i}.mlp.pre",), activated, "activation {activation_function}"),
    "h.{i}.mlp.out": Operation(
        ("h.{i}.mlp.post",), mapped("h.{i}.mlp.c_proj"), "linear map mlp.c_proj"
    ),
    "h.{i}.resid_post": Operation(
        ("h.{i}.resid_mid", "h.{i}.mlp.out"), added, "residual stream plus MLP"
    ),
    "ln_f": Operation(("h.{i-1}.resid_post",), normed("ln_f"), "final layer norm ln_f"),
    "logits": Operation(("ln_f",), unembedded, "products with every token's vector"),
}


# -- their order ----------------------------------------------------------------------------------


def run(program: Program, targets: Collection[str], given: Collection[str] = ()) -> list[str]:
    """What has to be computed for `targets`, in order, when the arrays called `given` are there.

    The targets themselves are computed even if they are given.
    """
    graph: dict[str, tuple[str, ...]] = {}
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name not in graph:
            inputs = program.operation(name).inputs
            graph[name] = tuple(key for key in inputs if key not in given)
            waiting += graph[name]
    rank = {name: place for place, name in enumerate(program.names)}
    if all(rank[key] < rank[name] for name in graph for key in graph[name]):
        return sorted(graph, key=rank.__getitem__)
    return list(graphlib.TopologicalSorter(graph).static_order())  # a wrong program's
