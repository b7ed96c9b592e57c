"""Wrong layer norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ...params import Array, Config
from ..operations import Compute, Program
from .mistake import Mistake, exchanged, has_bias
from .weights import zeroed

__all__ = ["NORMS", "norms"]

NORMS = ("h.{i}.ln_1", "h.{i}.ln_2", "ln_f")

EPSILONS = {1e-5: "PyTorch's default", 1e-6: "the default of Flax and T5", 1e-12: "BERT's"}

Formula = Callable[[Array, Array, Array, Config], Array]  # of x, g, b and the config


def norms(config: Config) -> list[Mistake]:
    """Layer norms with another epsilon or another formula."""
    own = config.layer_norm_epsilon
    return [
        *(
            Mistake(
                f"layer norm epsilon {eps:g} instead of {own:g}",
                why,
                NORMS,
                config={"layer_norm_epsilon": eps},
            )
            for eps, why in EPSILONS.items()
            if eps != own
        ),
        *_WRONG,
    ]


def _by(formula: Formula) -> list[tuple[str, Compute]]:
    """The three layer norms by another formula."""

    def of(name: str) -> Compute:
        def compute(program: Program, layer: int, x: Array) -> Array:
            g, b = program.norm(name.format(i=layer))
            return formula(x, g, np.zeros_like(g) if b is None else b, program.config)

        return compute

    return [(name, of(name)) for name in NORMS]


def _standard(x: Array, config: Config, ddof: int = 0, axis: int = -1) -> Array:
    """Mean 0 and variance 1 along an axis."""
    variance = x.var(axis, keepdims=True, ddof=min(ddof, x.shape[axis] - 1))
    z: Array = (x - x.mean(axis, keepdims=True)) / np.sqrt(variance + config.layer_norm_epsilon)
    return z


def _outside(x: Array, g: Array, b: Array, config: Config) -> Array:
    deviation = x.std(-1, keepdims=True)
    return np.asarray(
        (x - x.mean(-1, keepdims=True)) / (deviation + config.layer_norm_epsilon) * g + b
    )


def _unbiased(x: Array, g: Array, b: Array, config: Config) -> Array:
    return _standard(x, config, ddof=1) * g + b


def _root_mean_square(x: Array, g: Array, b: Array, config: Config) -> Array:
    square = np.square(x).mean(-1, keepdims=True)
    return np.asarray(x / np.sqrt(square + config.layer_norm_epsilon) * g + b)


def _over_tokens(x: Array, g: Array, b: Array, config: Config) -> Array:
    return _standard(x, config, axis=0) * g + b


def _without_gain(x: Array, g: Array, b: Array, config: Config) -> Array:
    return _standard(x, config) + b


def _one_more(x: Array, g: Array, b: Array, config: Config) -> Array:
    return np.asarray(_standard(x, config) * (1 + g) + b)


def _swapped(program: Program, name: str, array: Array) -> Array:
    """ln_1's gain and shift for ln_2's."""
    right = dataclasses.replace(program, edits=())
    other = {".ln_1.": ".ln_2.", ".ln_2.": ".ln_1."}
    for here, there in other.items():
        if here in name:
            found = right.weight(name.replace(here, there))
            return array if found is None else found
    return array


_WRONG = (
    exchanged(
        "layer norm epsilon outside the root",
        "the formula with a standard deviation in it",
        *_by(_outside),
    ),
    exchanged(
        "layer norm variance over C - 1",
        "torch.var and pandas divide so by default",
        *_by(_unbiased),
    ),
    exchanged(
        "layer norm without subtracting the mean", "LLaMA's RMSNorm", *_by(_root_mean_square)
    ),
    exchanged(
        "layer norm over tokens",
        "batch norm, or axis=0 on unbatched rows",
        *_by(_over_tokens),
        causal=False,
    ),
    exchanged("layer norm without its gain", "elementwise_affine=False", *_by(_without_gain)),
    exchanged("layer norm with gain 1 + g", "Gemma's", *_by(_one_more)),
    Mistake(
        "layer norm without its shift",
        "bias=False carried over from a nanoGPT config",
        NORMS,
        edit=zeroed("ln_1.b", "ln_2.b", "ln_f.b"),
        when=has_bias,
    ),
    Mistake(
        "ln_1 and ln_2 swapped",
        "the names do not say what they belong to",
        NORMS[:2],
        edit=_swapped,
    ),
)
