"""What every reader makes of a checkpoint, whatever its format."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from .arrays import Tensor

__all__ = ["AS_OPENAI", "END_OF_TEXT", "Assumption", "Source", "Vocabulary"]

# The token that separates texts in GPT-2's training, and stands before the first.
END_OF_TEXT = "<|endoftext|>"

# What OpenAI's code computes, and every program that runs OpenAI's models only.
AS_OPENAI: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


class Assumption(NamedTuple):
    """A config field that a format does not record, and what is taken instead.

    ``doubtful`` says that checkpoints of both kinds are about, so that loading one warns.
    """

    value: Any
    why: str
    doubtful: bool = False


class Vocabulary(NamedTuple):
    """A byte-level BPE that a checkpoint carries in itself.

    ``tokens`` are spelled in GPT-2's byte alphabet, in the order of their ids; ``merges`` are
    pairs joined by a space; ``special`` are the ids of tokens that text cannot spell.
    """

    tokens: list[str]
    merges: list[str]
    special: list[int]


@dataclasses.dataclass
class Source:
    """A checkpoint that was recognised and described, but whose weights were not read.

    Parameters
    ----------
    format : str
        For people: ``"safetensors"``, ``"OpenAI TensorFlow"`` ...
    directory : pathlib.Path
        Where vocabulary files would lie.
    tensors : dict of str to Tensor
        Under the names of the Hugging Face layout, without prefix; matrices are (in, out).
    fields : dict, optional
        The config, in the words of ``config.json``; None if a ``config.json`` in `directory`
        has it.
    assumed : dict of str to Assumption
        Config fields that the format leaves open. `fields` overrides it.
    notes : list of str
        What was decided on the way, for `inspect` and `convert` to tell.
    vocabulary : Vocabulary, optional
        If the file carries one.
    """

    format: str
    directory: pathlib.Path
    tensors: dict[str, Tensor]
    fields: Mapping[str, Any] | None = None
    assumed: dict[str, Assumption] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    vocabulary: Vocabulary | None = None
