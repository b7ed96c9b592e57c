"""llm.c's debug state as a dump: tokens and logits, which its PyTorch twin computed."""

from __future__ import annotations

import pathlib

from ...checkpoints.llmc import read_debug_state
from ...errors import DumpError
from ...params import Config
from .recording import Recording, Stored, recording

__all__ = ["read"]


def read(path: pathlib.Path, config: Config | None) -> Recording:
    """Read the logits of a ``*_debug_state.bin``; its loss and gradients are left alone.

    Raises
    ------
    DumpError
        If it is damaged, of a model of another size, or `config` is missing.
    """
    if config is None:
        raise DumpError(f"{path}: llm.c's debug state can be read only with its model's config")
    state = read_debug_state(path, config)
    arrays = {"logits": Stored("F32", state.logits.shape, lambda: state.logits)}
    metadata = {"ids": state.x, "producer": "llm.c, train_gpt2.py"}
    return recording(path, arrays, metadata, notes=["loss and gradients were not looked at"])
