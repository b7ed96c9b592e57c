"""Wrong activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ...ops import ACTIVATIONS
from ...params import Array, Config
from ..arithmetic import ARITHMETICS, rounded
from ..operations import Compute, Program, same
from .mistake import Mistake, exchanged

__all__ = ["activations"]

POST = "h.{i}.mlp.post"

TITLES = {
    "gelu_new": "tanh GELU (gelu_new)",
    "gelu": "exact (erf) GELU",
    "quick_gelu": "sigmoid GELU (quick_gelu)",
    "relu": "ReLU",
    "silu": "SiLU",
    "tanh": "tanh",
}
WHYS = {
    "gelu_new": "most ports of GPT-2 have this one, whatever the config says",
    "gelu": "torch.nn.GELU() and jax.nn.gelu(approximate=False) are the exact one",
    "quick_gelu": "CLIP's text model is a GPT-2 with this one",
    "relu": "the original transformer's",
    "silu": "LLaMA's",
    "tanh": "the name of an approximation taken for the function",
}


def activations(config: Config) -> list[Mistake]:
    """Every function that is not the config's, and GELU got wrong."""
    return [*_others(config), *_WRONG]


def _others(config: Config) -> list[Mistake]:
    own = config.activation
    return [
        Mistake(
            f"{title} instead of {config.activation_function}",
            WHYS[name],
            (POST,),
            config={"activation_function": name},
        )
        for name, title in TITLES.items()
        if ACTIVATIONS[name] is not own
    ]


def _elementwise(function: Callable[[Array], Array]) -> Compute:
    """An operation that is a function of each number."""
    return lambda program, layer, x: function(x)


def _table_of_halves(program: Program, layer: int, x: Array) -> Array:
    """The activation looked up by half-precision inputs, in a table of half-precision results."""
    narrow = rounded(x.astype(np.float32), "float16")
    return rounded(program.config.activation(narrow).astype(np.float32), "float16")


def _without_cube(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * x)))


def _without_factor(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.tanh(x + 0.044715 * x**3)))


_WRONG = (
    exchanged(
        "GELU from a table of halves",
        "ggml looks it up by half-precision inputs",
        (POST, _table_of_halves),
        roundoff=ARITHMETICS["float16"].u,
        slack=2 * ARITHMETICS["float16"].u,
    ),
    exchanged(
        "GELU without its cubic term",
        "the 0.044715 looks like noise",
        (POST, _elementwise(_without_cube)),
    ),
    exchanged(
        "GELU without sqrt(2/pi)", "a factor left out", (POST, _elementwise(_without_factor))
    ),
    exchanged("no activation function", "the call left out", (POST, same)),
)
