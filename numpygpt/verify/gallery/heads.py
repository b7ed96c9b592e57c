"""Queries, keys and values read from the wrong columns, heads put together wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ... import model
from ...ops import linear, softmax
from ...params import Array, Config
from ..operations import OPERATIONS, Compute, Edit, Operation, Program, future, heads_of
from .mistake import Mistake, exchanged

__all__ = ["HEADS", "head_counts"]

QKV, SCORES, PATTERN, MIXED, OUT = (
    f"h.{{i}}.attn.{name}" for name in ("qkv", "scores", "pattern", "heads", "out")
)

Order = Callable[[Program, int], Array]  # of so many columns
Split = Callable[[Program, Array], tuple[Array, Array, Array]]


def _read_as(split: Split) -> list[tuple[str, Compute]]:
    """Scores and mixed values with queries, keys and values taken from other columns."""

    def scores(program: Program, layer: int, qkv: Array) -> Array:
        q, k, _ = split(program, qkv)
        products: Array = np.matmul(q * program.config.attention_scale(layer), k.mT)
        return products

    def mixed(program: Program, layer: int, pattern: Array, qkv: Array) -> Array:
        values: Array = np.matmul(pattern, split(program, qkv)[2])
        return values

    return [(SCORES, scores), (MIXED, mixed)]


def _columns(order: Order) -> tuple[Edit, Split]:
    """A wrong order of c_attn's columns, in the file and in the reading."""

    def edit(program: Program, name: str, array: Array) -> Array:
        if ".c_attn." not in name:
            return array
        return array[..., order(program, array.shape[-1])]

    def split(program: Program, qkv: Array) -> tuple[Array, Array, Array]:
        return heads_of(program, qkv[:, order(program, qkv.shape[1])])

    return edit, split


def _thirds(*parts: int) -> Order:
    """The thirds in another order."""
    return lambda program, n: np.arange(n).reshape(3, -1)[list(parts)].ravel()


def _by_head(program: Program, n: int) -> Array:
    """Columns by head first and part second."""
    return np.arange(n).reshape(3, program.config.n_head, -1).swapaxes(0, 1).ravel()


def _by_head_inverse(program: Program, n: int) -> Array:
    """The way back."""
    return np.argsort(_by_head(program, n))


def _by_feature(program: Program, n: int) -> Array:
    """Features of a head first, heads second, within each part."""
    return np.arange(n).reshape(3, -1, program.config.n_head).swapaxes(1, 2).ravel()


def _reordered(name: str, why: str, order: Order) -> list[Mistake]:
    """Both forms of a wrong order."""
    edit, split = _columns(order)
    return [
        Mistake(name, why, (QKV,), edit=edit),
        exchanged(name, why, *_read_as(split)),
    ]


def _backwards(program: Program, qkv: Array) -> tuple[Array, Array, Array]:
    q, k, v = heads_of(program, qkv)
    return q[::-1], k[::-1], v[::-1]


def _merged(merge: Callable[[Array], Array]) -> tuple[str, Compute]:
    """attn.c_proj after heads that were put together in another way: (H, T, D) -> (T, C)."""

    def compute(program: Program, layer: int, heads: Array) -> Array:
        return linear(merge(heads), *program.map(f"h.{layer}.attn.c_proj"))

    return OUT, compute


def _not_merged(program: Program, layer: int, pattern: Array, qkv: Array) -> Array:
    """What stands in the place of each head then: (H, T, D)."""
    heads = OPERATIONS[MIXED].compute(program, layer, pattern, qkv)
    h, t, d = heads.shape
    return heads.reshape(t, h, d).transpose(1, 0, 2)


def head_counts(config: Config) -> list[Mistake]:
    """Other numbers of heads; every shape but the scores' fits any divisor of C."""
    own, width = config.n_head, config.n_embd
    usual = {1, own // 4, own // 2, 2 * own, 4 * own, 8, 12, 16, width // 64, width // 128, width}
    return [
        Mistake(
            f"{count} heads instead of {own}",
            "every weight fits any divisor of C",
            (SCORES, PATTERN, MIXED, OUT),
            {OUT: Operation((QKV,), _attended(count), "attention")},
        )
        for count in sorted(usual - {0, own})
        if width % count == 0
    ]


def _attended(count: int) -> Compute:
    """Attention with so many heads: (T, 3C) -> (T, C)."""

    def compute(program: Program, layer: int, qkv: Array) -> Array:
        q, k, v = model.split_heads(qkv, 3, len(qkv), count)[:, 0]
        scale = dataclasses.replace(program.config, n_head=count).attention_scale(layer)
        scores = np.where(future(len(qkv)), -np.inf, np.matmul(q * scale, k.mT))
        mixed = model.merge_heads(np.matmul(softmax(scores), v)[None])
        return linear(mixed, *program.map(f"h.{layer}.attn.c_proj"))

    return compute


HEADS = (
    *_reordered("q, k, v interleaved by head", "Megatron's and GPT-NeoX's layout", _by_head),
    *_reordered(
        "q, k, v interleaved by head", "Megatron's and GPT-NeoX's layout", _by_head_inverse
    ),
    *_reordered("keys and values swapped", "two of three slices swapped", _thirds(0, 2, 1)),
    *_reordered(
        "queries and keys swapped",
        "the scores come out transposed, and look alike",
        _thirds(1, 0, 2),
    ),
    *_reordered("queries and values swapped", "three slices in reverse", _thirds(2, 1, 0)),
    *_reordered(
        "head features first when heads are split", "(D, H) for (H, D) in a reshape", _by_feature
    ),
    exchanged(
        "heads in reverse order",
        "an axis counted from the other end",
        _merged(lambda heads: model.merge_heads(heads[None, ::-1])),
    ),
    exchanged(
        "heads in reverse order", "an axis counted from the other end", *_read_as(_backwards)
    ),
    exchanged(
        "heads not merged by token",
        "a reshape without its transpose",
        _merged(lambda heads: heads.reshape(heads.shape[1], -1)),
        causal=False,
    ),
    exchanged(
        "heads not merged by token",
        "a reshape without its transpose",
        (MIXED, _not_merged),
        causal=False,
    ),
    exchanged(
        "head features first when heads are merged",
        "(D, H) for (H, D) in a reshape",
        _merged(lambda heads: heads.transpose(1, 2, 0).reshape(heads.shape[1], -1)),
    ),
)
