"""Where the programs get their weights from, and the arithmetic of sizes they share."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from numpygpt import checkpoints
from numpygpt.params import Config

Source = pathlib.Path | str | tuple[Config, Mapping[str, np.ndarray]]

BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def load(source: Source, dtype: str) -> tuple[Config, dict[str, np.ndarray]]:
    """Config, and arrays by Hugging Face names; matrices are (in, out)."""
    if isinstance(source, tuple):
        return source[0], dict(source[1])
    wide = "float64" if dtype == "float64" else "float32"
    read = checkpoints.read(pathlib.Path(source), dtype=wide)
    return read.config, named(read.config, read.params)


def named(config: Config, params) -> dict[str, np.ndarray]:
    """The arrays of :class:`numpygpt.Params` by Hugging Face names."""
    tensors = {"wte.weight": params.wte, "wpe.weight": params.wpe}
    places = {"ln_f": params.ln_f}
    for i, block in enumerate(params.h):
        parts = (block.ln_1, *block.attn, block.ln_2, *block.mlp)
        places |= {f"h.{i}.{name}": part for name, part in zip(BLOCK, parts, strict=True)}
    for name, (weight, bias) in places.items():
        tensors[f"{name}.weight"] = weight
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = params.head
    return tensors


def passes(ids, chunks: list[int] | None) -> Iterator[tuple[int, list[int]]]:
    """The ids of each forward pass, and how many went before."""
    ids = [int(i) for i in ids]
    sizes = [len(ids)] if chunks is None else list(chunks)
    if sum(sizes) != len(ids) or min(sizes) < 1:
        raise ValueError(f"chunks {sizes} do not make {len(ids)} ids")
    past = 0
    for size in sizes:
        yield past, ids[past : past + size]
        past += size


def another_head_count(config: Config) -> int:
    """A number of heads that C allows and that is wrong."""
    choices = (2 * config.n_head, config.n_head // 2, 1, config.n_embd)
    return next(n for n in choices if n and n != config.n_head and config.n_embd % n == 0)


def padding_rows(vocab_size: int) -> int:
    """Rows that make the vocabulary a multiple of 8; at least one."""
    return 8 - vocab_size % 8
