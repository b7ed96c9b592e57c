"""Wrong tokens and positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...params import Array
from ..operations import OPERATIONS, Compute, Program
from .mistake import exchanged, several_passes

__all__ = ["EMBEDDING"]


def _embedded(
    positions: Callable[[Program], Array | None],
    tokens: Callable[[Program], Array] = lambda program: program.ids,
    factor: Callable[[Program], float] = lambda program: 1.0,
) -> tuple[str, Compute]:
    """An embedding with other positions (None for none) or other tokens."""

    def compute(program: Program, layer: int) -> Array:
        x = program.rows("wte", tokens(program)) * factor(program)
        places = positions(program)
        if places is None:
            return x
        return x + program.rows("wpe", np.clip(places, 0, program.config.n_ctx - 1))

    return "embed", compute


def _straight(program: Program) -> Array:
    """0, 1, 2 ..."""
    return np.arange(len(program.ids))


def _restarted(program: Program) -> Array:
    """From 0 in each pass."""
    return np.concatenate([np.arange(n) for n in program.chunks])


def _later(by: int) -> Callable[[Program], Array]:
    """The ids of other tokens."""
    return lambda program: (program.ids + by) % program.config.vocab_size


def _scaled(program: Program, layer: int) -> Array:
    return np.asarray(program.config.n_embd**0.5 * OPERATIONS["embed"].compute(program, layer))


EMBEDDING = (
    exchanged(
        "positions from 1",
        "a begin marker or a pad token counted along",
        _embedded(lambda program: _straight(program) + 1),
    ),
    exchanged(
        "positions start again in each pass",
        "arange(T) of the new tokens",
        _embedded(_restarted),
        when=several_passes,
    ),
    exchanged("positions missing", "rotary models add none here", _embedded(lambda program: None)),
    exchanged(
        "position 0 for every token",
        "position_ids left at zero",
        _embedded(lambda program: 0 * _straight(program)),
    ),
    exchanged(
        "token ids shifted by one", "a vocabulary that begins at 1", _embedded(_straight, _later(1))
    ),
    exchanged(
        "token ids shifted by one",
        "a vocabulary that begins at 1",
        _embedded(_straight, _later(-1)),
    ),
    exchanged(
        "token vectors scaled by sqrt(C)",
        "the original transformer's",
        _embedded(_straight, factor=lambda program: program.config.n_embd**0.5),
    ),
    exchanged(
        "token vector and position vector scaled by sqrt(C)",
        "Gemma's, after the sum",
        ("embed", _scaled),
    ),
)
