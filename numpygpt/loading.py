"""``load``: a checkpoint and its tokenizer become a ``Model``."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import checkpoints
from .api import Model
from .checkpoints.source import Vocabulary
from .errors import ArgumentError, TokenizerError
from .params import Config
from .storage import STORAGES
from .tokenizer import Tokenizer

__all__ = ["DTYPES", "load", "tokenizer_for"]

# What a model can be loaded as: what it computes in, or how its matrices are kept in memory while
# it computes in float32.
DTYPES = ("float32", "float64", *STORAGES)

# Vocabulary files that cannot be used alone. Where one lies, GPT-2's vocabulary is not meant.
PARTS = ("vocab.json", "merges.txt", "encoder.json", "vocab.txt", "spiece.model")


def load(
    source: str | os.PathLike[str],
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    source : str or path
        The name of a bundled model (``"shakespeare"``); a checkpoint file of any format that
        the README lists, or its directory; or a Hugging Face name (``"gpt2"``) whose files an
        earlier download has left on this machine. The network is never used.
    dtype : {"float32", "float64", "bfloat16", "int8"}
        float32 maps float32 files instead of copying them; float64 is the high-precision check.
        With bfloat16 and int8, matrices take a half and a quarter of the memory, and are
        widened to float32 piece by piece while they multiply (:mod:`numpygpt.storage`).
    config : mapping, optional
        Config fields, by the names of :class:`Config`, that override the checkpoint's: what its
        format does not say (``{"n_head": 6}``), or says wrongly.

    Returns
    -------
    Model

    Raises
    ------
    ModelNotFoundError
        If there is no such model.
    CheckpointError
        If its files are damaged or do not fit each other, or a number cannot be stored as `dtype`.
    ArgumentError
        If `dtype` is another one.

    Warns
    -----
    CheckpointWarning
        If the format leaves open what changes the model (whether a nanoGPT checkpoint has the
        exact GELU); it says what was assumed.

    Notes
    -----
    Weights are not looked at before they are used: for GPT-2 that would take as long as half of
    everything else before the first token. NaN among them make :meth:`Model.generate` and
    :meth:`Model.score` raise; :func:`numpygpt.checkpoints.read` names the arrays.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> model.config.n_layer
    4
    """
    name = dtype
    if name not in DTYPES and dtype is not None:  # np.dtype(None) is float64
        try:
            name = np.dtype(dtype).name  # of np.float32, say
        except TypeError:
            name = ""
    if name not in DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, not {str(dtype)[:40]!r}")
    if config is not None and not isinstance(config, Mapping):
        raise ArgumentError(f"config must be a mapping of fields, not {type(config).__name__}")
    path = checkpoints.find(source)
    settled, params, directory, vocabulary = checkpoints.read(path, name, config, scan=False)
    return Model(settled, params, tokenizer_for(directory, settled, vocabulary))


def tokenizer_for(
    directory: pathlib.Path, config: Config, vocabulary: Vocabulary | None = None
) -> Callable[[], Tokenizer] | None:
    """What makes the tokenizer that belongs to a checkpoint, or None if it has none.

    The vocabulary that a file carries in itself goes before the files beside it.
    """
    if vocabulary is not None:
        return functools.partial(_carried, vocabulary, directory, config.vocab_size)
    if Tokenizer.locate(directory) is None:
        part = next((name for name in PARTS if (directory / name).exists()), None)
        # 50304 is 50257 rounded up to a multiple of 128, as nanoGPT and llm.c store it.
        if part is None and config.vocab_size in (50257, 50304):
            return Tokenizer.gpt2
        return None if part is None else functools.partial(_incomplete, directory / part)
    return functools.partial(_fitting, directory, config.vocab_size)


def _carried(vocabulary: Vocabulary, source: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint's own vocabulary, without what fills up rows that were cut."""
    surplus = range(vocab_size, len(vocabulary.tokens))
    if not set(surplus) <= set(vocabulary.special):
        raise TokenizerError(
            f"{source}: the vocabulary has {len(vocabulary.tokens)} tokens, but the model only "
            f"{vocab_size}: they do not belong together"
        )
    special = [i for i in vocabulary.special if i < vocab_size]
    cut = Vocabulary(vocabulary.tokens[:vocab_size], vocabulary.merges, special)
    return Tokenizer.from_vocabulary(cut, source)


def _incomplete(part: pathlib.Path) -> Tokenizer:
    raise TokenizerError(f"{part}: a vocabulary needs more files than this one beside it")


def _fitting(directory: pathlib.Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.last_id >= vocab_size:
        raise TokenizerError(
            f"{directory}: the vocabulary has ids up to {tokenizer.last_id}, but the model has "
            f"{vocab_size} tokens: these files do not belong together"
        )
    return tokenizer
