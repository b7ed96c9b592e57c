"""Weights that were changed on their way."""

from __future__ import annotations

import dataclasses

import numpy as np

from ... import storage
from ...params import Array
from ..arithmetic import ARITHMETICS, rounded
from ..operations import Edit, Program
from .mistake import Mistake, has_bias

__all__ = ["WEIGHTS", "matrices_narrowed", "matrices_to_int8", "narrowed", "zeroed"]

MAPS = ("h.{i}.attn.qkv", "h.{i}.attn.out", "h.{i}.mlp.pre", "h.{i}.mlp.out")
IN_BLOCKS = ("h.{i}.ln_1", "h.{i}.ln_2", *MAPS)
EVERYWHERE = ("embed", *IN_BLOCKS, "ln_f", "logits")


def zeroed(*endings: str) -> Edit:
    """No bias where there is one."""
    return lambda program, name, array: array * 0.0 if name.endswith(endings) else array


def narrowed(dtype: str) -> Edit:
    """Weights rounded to fewer bits."""
    return lambda program, name, array: rounded(array, dtype)


def matrices_narrowed(dtype: str) -> Edit:
    """Matrices rounded to fewer bits, as :mod:`numpygpt.storage` does; vectors stay."""
    return lambda program, name, array: (
        array if array.ndim < 2 or name == "wpe" else rounded(array, dtype)
    )


def matrices_to_int8(program: Program, name: str, array: Array) -> Array:
    """Matrices as integers with a scale for each output, as :mod:`numpygpt.storage` keeps them."""
    if array.ndim < 2 or name == "wpe":
        return array
    by_output = name in ("wte", "head")
    rows = np.ascontiguousarray(array if by_output else array.T, np.float32)
    wide = np.asarray(storage.to_int8(rows), np.float64)
    return wide if by_output else wide.T


def _transposed(program: Program, name: str, array: Array) -> Array:
    """The square matrix of attention, as nn.Linear would have it."""
    return array.T if name.endswith("attn.c_proj.w") else array


def _sorted_as_strings(program: Program, name: str, array: Array) -> Array:
    """Layer 10 before layer 2."""
    if not name.startswith("h."):
        return array
    _, layer, rest = name.split(".", 2)
    order = sorted(range(program.config.n_layer), key=str)
    right = dataclasses.replace(program, edits=())
    found = right.weight(f"h.{order[int(layer)]}.{rest}")
    return array if found is None else found


WEIGHTS = (
    Mistake(
        "attn.c_proj transposed",
        "square, so nn.Linear loads a Conv1D without complaint",
        ("h.{i}.attn.out",),
        edit=_transposed,
    ),
    Mistake(
        "attention biases missing",
        "LLaMA-style layers have none",
        ("h.{i}.attn.qkv", "h.{i}.attn.out"),
        edit=zeroed("c_attn.b", "attn.c_proj.b"),
        when=has_bias,
    ),
    Mistake(
        "MLP biases missing",
        "bias=False as a default",
        ("h.{i}.mlp.pre", "h.{i}.mlp.out"),
        edit=zeroed("c_fc.b", "mlp.c_proj.b"),
        when=has_bias,
    ),
    Mistake(
        "layers in the order of their names",
        "h.10 sorts before h.2",
        IN_BLOCKS,
        edit=_sorted_as_strings,
        when=lambda program: program.config.n_layer > 10,
    ),
    *(
        Mistake(
            f"weights rounded to {dtype}",
            "half the memory",
            EVERYWHERE,
            edit=edit(dtype),
            roundoff=ARITHMETICS[dtype].u,
        )
        for dtype in ("float16", "bfloat16")
        for edit in (narrowed, matrices_narrowed)
    ),
    Mistake(
        "weights rounded to int8",
        "a quarter of the memory",
        ("embed", *MAPS, "logits"),
        edit=matrices_to_int8,
    ),
)
