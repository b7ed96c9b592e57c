"""What a GPT-2 is made of: its config, and its learned arrays with their expected shapes.

The learned arrays keep OpenAI's names (``wte``, ``ln_1.g``, ``attn.c_attn.w`` ...). In files they
carry the names of the Hugging Face layout (``h.0.attn.c_attn.weight``), which every reader in
:mod:`numpygpt.checkpoints` produces and :func:`pack` turns into named tuples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import CheckpointError, ConfigError
from .ops import ACTIVATIONS, Array

__all__ = [
    "MLP",
    "Array",
    "Attention",
    "Block",
    "Config",
    "Linear",
    "Norm",
    "Params",
    "check",
    "pack",
    "shapes",
]


@dataclass(frozen=True)
class Config:
    """Every choice that changes the maths of a GPT-2, and nothing else.

    The names are those of Hugging Face's ``config.json``; the defaults are GPT-2 small's.

    Parameters
    ----------
    vocab_size : int
        V, rows of the token table.
    n_ctx : int
        Positions the model has (``n_positions`` in files).
    n_embd, n_layer, n_head : int
        C, L and H.
    n_inner : int, optional
        F, the width of the MLP; 4 C if None.
    activation_function : str
        A key of :data:`numpygpt.ops.ACTIVATIONS`.
    layer_norm_epsilon : float
    scale_attn_weights : bool
        Divide the scores by sqrt(D).
    scale_attn_by_inverse_layer_idx : bool
        Divide the scores of layer i by i + 1 too (CRFM's and CodeParrot's models).
    tie_word_embeddings : bool
        Unembed with the token table; if False there is a matrix ``lm_head`` of its own.
    bias : bool
        False for checkpoints trained without any bias or shift.

    Raises
    ------
    ConfigError
        If a value has the wrong type or no GPT-2 can have it.

    Examples
    --------
    >>> config = Config()
    >>> config.head_dim, config.mlp_dim, config.parameter_count
    (64, 3072, 124439808)
    """

    vocab_size: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "n_ctx", "n_embd", "n_layer", "n_head"]
        for name in sizes + ["n_inner"] * (self.n_inner is not None):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(
                    f"config: {name} must be a positive integer, not {shown(repr(value))}"
                )
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"config: n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}"
            )
        eps = self.layer_norm_epsilon
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
            raise ConfigError(
                f"config: layer_norm_epsilon must be in [0, 1), not {shown(repr(eps))}"
            )
        if not isinstance(self.activation_function, str) or (
            self.activation_function not in ACTIVATIONS
        ):
            raise ConfigError(
                f"config: unknown activation_function {shown(repr(self.activation_function))}; "
                f"known are {', '.join(sorted(ACTIVATIONS))}"
            )
        for name in (
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "tie_word_embeddings",
            "bias",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"config: {name} must be true or false, not {shown(repr(getattr(self, name)))}"
                )

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        """F, the width of the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def activation(self) -> Callable[..., Array]:
        """The function named by ``activation_function``."""
        return ACTIVATIONS[self.activation_function]

    def attention_scale(self, layer: int) -> float:
        """The factor on the scores of one layer, counted from 0.

        >>> Config().attention_scale(3)
        0.125
        >>> Config(scale_attn_by_inverse_layer_idx=True).attention_scale(3)
        0.03125
        """
        scale = 1 / math.sqrt(self.head_dim) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def parameter_count(self) -> int:
        """Learned numbers, a tied head counted once."""
        return sum(math.prod(shape) for shape, _ in shapes(self).values())


class Norm(NamedTuple):
    """Gain and shift of a layer norm, (C,) each."""

    g: Array
    b: Array | None


class Linear(NamedTuple):
    """Matrix (I, O) and bias (O,) of a linear map."""

    w: Any
    b: Array | None


class Attention(NamedTuple):
    """Attention of one block: C -> 3C, and C -> C."""

    c_attn: Linear
    c_proj: Linear


class MLP(NamedTuple):
    """Multi-layer perceptron of one block: C -> F, and F -> C."""

    c_fc: Linear
    c_proj: Linear


class Block(NamedTuple):
    """One of the L blocks."""

    ln_1: Norm
    attn: Attention
    ln_2: Norm
    mlp: MLP


class Params(NamedTuple):
    """All learned arrays of a model.

    ``wte`` is (V, C), ``wpe`` is (n_ctx, C), ``head`` is (V, C) and the same array as ``wte``
    when the two are tied.
    """

    wte: Any
    wpe: Array
    h: tuple[Block, ...]
    ln_f: Norm
    head: Any

    @property
    def dtype(self) -> np.dtype[Any]:
        """What activations are: float32 or float64, whatever the matrices are stored as."""
        dtype: np.dtype[Any] = self.wpe.dtype
        return dtype

    @property
    def storage(self) -> str:
        """What the matrices are stored as: "float32", "float64", "bfloat16" or "int8"."""
        return str(getattr(self.head, "storage", self.dtype.name))


# Hugging Face name of each learned array of a block, and its shape in the letters of Config.
BLOCK_SHAPES: dict[str, tuple[str, ...]] = {
    "ln_1.weight": ("C",),
    "ln_1.bias": ("C",),
    "attn.c_attn.weight": ("C", "3C"),
    "attn.c_attn.bias": ("3C",),
    "attn.c_proj.weight": ("C", "C"),
    "attn.c_proj.bias": ("C",),
    "ln_2.weight": ("C",),
    "ln_2.bias": ("C",),
    "mlp.c_fc.weight": ("C", "F"),
    "mlp.c_fc.bias": ("F",),
    "mlp.c_proj.weight": ("F", "C"),
    "mlp.c_proj.bias": ("C",),
}


# The largest GPT-2 has 48.
MOST_LAYERS = 1000


@functools.lru_cache(maxsize=8)
def shapes(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, the shape in letters) of every array a checkpoint must hold, in file order.

    >>> shapes(Config(n_layer=1))["h.0.attn.c_attn.weight"]
    ((768, 2304), '(C, 3C)')
    """
    sizes = {
        "V": config.vocab_size,
        "n_ctx": config.n_ctx,
        "C": config.n_embd,
        "3C": 3 * config.n_embd,
        "F": config.mlp_dim,
    }
    letters: dict[str, tuple[str, ...]] = {"wte.weight": ("V", "C"), "wpe.weight": ("n_ctx", "C")}
    for layer in range(config.n_layer):
        letters |= {f"h.{layer}.{name}": axes for name, axes in BLOCK_SHAPES.items()}
    letters |= {"ln_f.weight": ("C",), "ln_f.bias": ("C",)}
    if not config.tie_word_embeddings:
        letters["lm_head.weight"] = ("V", "C")
    return {
        name: (tuple(sizes[axis] for axis in axes), f"({', '.join(axes)})")
        for name, axes in letters.items()
        if config.bias or not name.endswith(".bias")
    }


def check(config: Config, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the names and shapes of a checkpoint's arrays with what its config calls for.

    Parameters
    ----------
    config : Config
    found : mapping of str to tuple of int
        Hugging Face name, without the prefix ``transformer.`` -> shape.

    Raises
    ------
    CheckpointError
        If an array is missing, left over, or of another shape.
    """
    layers = {name.split(".")[1] for name in found if name.startswith("h.")}
    if len(layers) != config.n_layer:  # first, because a config may claim a billion of them
        raise CheckpointError(
            f"config says n_layer = {config.n_layer}, but there are tensors of {len(layers)} layers"
        )
    if config.n_layer > MOST_LAYERS:  # each is described by hundreds of bytes
        raise CheckpointError(f"{config.n_layer} layers, expected at most {MOST_LAYERS}")
    expected = shapes(config)
    if surplus := [name for name in found if name not in expected]:
        raise CheckpointError(f"unexpected tensors, which GPT-2 has no use for: {listing(surplus)}")
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors are missing: {listing(missing)}"
        )
    for name, (shape, letters) in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{name} expected shape {shape} = {letters}, received {found[name]}"
            )


def pack(config: Config, tensors: Mapping[str, Any]) -> Params:
    """Arrange the arrays of a checkpoint as :class:`Params`, checking every name and shape.

    Parameters
    ----------
    config : Config
    tensors : mapping of str to ndarray
        Arrays by their Hugging Face names, without the prefix ``transformer.``.

    Returns
    -------
    Params
        The same arrays, not copies.

    Raises
    ------
    CheckpointError
        As :func:`check` does.
    """
    check(config, {name: array.shape for name, array in tensors.items()})

    def norm(name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def linear(name: str) -> Linear:
        return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    return Params(
        wte=tensors["wte.weight"],
        wpe=tensors["wpe.weight"],
        h=tuple(
            Block(
                ln_1=norm(f"h.{i}.ln_1"),
                attn=Attention(linear(f"h.{i}.attn.c_attn"), linear(f"h.{i}.attn.c_proj")),
                ln_2=norm(f"h.{i}.ln_2"),
                mlp=MLP(linear(f"h.{i}.mlp.c_fc"), linear(f"h.{i}.mlp.c_proj")),
            )
            for i in range(config.n_layer)
        ),
        ln_f=norm("ln_f"),
        head=tensors["wte.weight" if config.tie_word_embeddings else "lm_head.weight"],
    )


def shown(value: object, most: int = 80) -> str:
    r"""A name or value from a file as a message can show it: short, printable.

    >>> shown("h.0.ln_1.b"), shown("\x1b[2J\n"), shown("x" * 100, most=5)
    ('h.0.ln_1.b', '\\x1b[2J\\n', 'xxxxx...')
    """
    text = str(value)
    cut = text[:most] + ("..." if len(text) > most else "")
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def listing(names: list[str], most: int = 4) -> str:
    """The first few names, and how many more there are.

    >>> listing(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(map(shown, names[:most])) + (f" and {rest} more" if rest > 0 else "")
