"""Small checkpoints on which each mistake shows, and how far one dump is from another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from support import nano, random_tensors

from numpygpt.params import Config

from . import mistakes

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


class Situation(NamedTuple):
    """A checkpoint and how a program reads IDS."""

    config: Config
    tensors: Mapping[str, np.ndarray]
    chunks: list[int] | None = None


def situation(when: str = "") -> Situation:
    """Where a mistake with this `when` shows; "" is the ordinary one."""
    changes = {
        mistakes.INVERSE_SCALE: {"scale_attn_by_inverse_layer_idx": True},
        mistakes.OWN_HEAD: {"tie_word_embeddings": False},
        mistakes.MANY_LAYERS: {"n_layer": 11},
    }
    config = nano(**changes.get(when, {}))
    # Numbers of float32, as in real files: torch rounds float64 to it on the way to float16.
    tensors = {
        name: array.astype(np.float32).astype(np.float64)
        for name, array in random_tensors(config).items()
    }
    if when == mistakes.LARGE_SCORES:
        for name in [name for name in tensors if "c_attn" in name]:
            tensors[name][..., : 2 * config.n_embd] *= 400  # scores of 1e5
    return Situation(config, tensors, [3, 1, 4] if when == mistakes.CHUNKS else None)


def dump(program, where: Situation, dtype="float64", mistake=None, **options):
    """The dump of one of the programs' modules."""
    built = program.build((where.config, where.tensors), dtype, mistake, **options)
    return built.dump(IDS, where.chunks)


def gap(actual, expected) -> float:
    """Largest difference as a fraction of the largest number.

    Masked scores count as equal however a program writes them: -inf or its dtype's lowest.
    """
    assert actual.shape == expected.shape
    assert not np.isnan(actual).any()
    masked = expected == -np.inf
    assert np.all(actual[masked] < -1e30)
    actual, expected = actual[~masked], expected[~masked]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def unit(dtype: str) -> float:
    """The rounding of a dtype."""
    return {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype) or float(np.finfo(dtype).eps) / 2


@functools.cache
def right_logits(program, when: str, options: tuple[tuple[str, str], ...]) -> np.ndarray:
    """The logits without a mistake, in float64."""
    return dump(program, situation(when), **dict(options))["logits"]


def logits_gap(program, mistake: str, when: str, **options) -> float:
    """How far a mistake moves the logits, in float64."""
    wrong = dump(program, situation(when), mistake=mistake, **options)["logits"]
    return gap(wrong, right_logits(program, when, tuple(options.items())))
