"""Models to measure: the shapes of GPT-2, random weights in them, and the work that they make."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..params import Config, shapes

__all__ = [
    "SIZES",
    "attention_flops",
    "cache_bytes",
    "matrices",
    "matrix_bytes",
    "prefill_flops",
    "write_random_checkpoint",
]

SIZES = {
    "nano": Config(n_layer=2, n_head=2, n_embd=128),
    "124M": Config(),
    "355M": Config(n_layer=24, n_head=16, n_embd=1024),
    "774M": Config(n_layer=36, n_head=20, n_embd=1280),
    "1558M": Config(n_layer=48, n_head=25, n_embd=1600),
}

PIECE = 2**22  # numbers made and written at once

# -- weights ---------------------------------------------------------------------------------------


def write_random_checkpoint(
    directory: pathlib.Path,
    config: Config,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """A checkpoint with GPT-2's proportions and random float32 weights, the same every time.

    Parameters
    ----------
    directory : pathlib.Path
        Gets ``config.json`` and ``model.safetensors``.
    config : Config
    on_bytes : callable
        Told after each piece how many more bytes were written.
    """
    fields = {**dataclasses.asdict(config), "n_positions": config.n_ctx, "model_type": "gpt2"}
    del fields["bias"]  # Hugging Face's GPT-2 always has them
    (directory / "config.json").write_text(json.dumps(fields))
    header: dict[str, Any] = {}
    start = 0
    for name, (shape, _) in shapes(config).items():
        stop = start + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, _) in shapes(config).items():
            centre = np.float32("ln_" in name and name.endswith("weight"))
            for count in _pieces(math.prod(shape)):
                values = rng.standard_normal(count, np.float32) * np.float32(0.02)
                file.write((values + centre).tobytes())
                on_bytes(4 * count)


def _pieces(size: int) -> Iterator[int]:
    while size > 0:
        yield min(size, PIECE)
        size -= PIECE


# -- work ------------------------------------------------------------------------------------------


def matrices(config: Config) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix of a block.

    >>> matrices(Config())["mlp.c_fc"]
    (3072, 768)
    """
    c, f = config.n_embd, config.mlp_dim
    return {
        "attn.c_attn": (3 * c, c),
        "attn.c_proj": (c, c),
        "mlp.c_fc": (f, c),
        "mlp.c_proj": (c, f),
    }


def matrix_bytes(config: Config) -> int:
    """What one token reads of the weights in float32: every matrix, and the table as the head.

    >>> matrix_bytes(Config())
    494128128
    """
    blocks = config.n_layer * sum(math.prod(shape) for shape in matrices(config).values())
    return 4 * (blocks + config.vocab_size * config.n_embd)


def cache_bytes(config: Config, positions: int) -> int:
    """What one token reads of the keys and values in float32.

    >>> cache_bytes(Config(), positions=1)
    73728
    """
    return 4 * 2 * config.n_layer * config.n_embd * positions


def attention_flops(config: Config, rows: int) -> int:
    """Floating-point operations of causal attention, without what it masks.

    Row t multiplies with t keys and t values of C numbers: 4 C (1 + ... + T) for each layer.

    >>> attention_flops(Config(n_layer=1, n_head=1, n_embd=1), rows=3)
    24
    """
    return config.n_layer * 2 * config.n_embd * rows * (rows + 1)


def prefill_flops(config: Config, rows: int, logits: int = 1) -> int:
    """Floating-point operations to read a prompt: two for each weight and row.

    Parameters
    ----------
    config : Config
    rows : int
        T, tokens of the prompt.
    logits : int
        Rows that are unembedded.
    """
    block = sum(math.prod(shape) for shape in matrices(config).values())
    products = 2 * (rows * config.n_layer * block + logits * config.vocab_size * config.n_embd)
    return products + attention_flops(config, rows)
