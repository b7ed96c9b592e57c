"""What several peers share: converted files, float32 arrays by name, and log-probabilities."""

from __future__ import annotations

import importlib
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...checkpoints.config import read_config
from ...checkpoints.detect import open_source
from ...checkpoints.reading import settle
from ...errors import MissingPackageError
from ...params import Config, shapes
from ...threads import spread

__all__ = ["arrays_of", "config_of", "log_probabilities", "made", "package"]

Array = np.ndarray[Any, Any]


def package(name: str) -> Any:
    """An optional module.

    Raises
    ------
    MissingPackageError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f'{name} is needed: pip install "numpygpt[peers]" ({error})'
        ) from None


def config_of(directory: pathlib.Path) -> Config:
    """The config of a checkpoint."""
    return read_config(directory / "config.json")


def arrays_of(directory: pathlib.Path) -> dict[str, Array]:
    """Every array of a checkpoint in float32, under its name in the Hugging Face layout."""
    settled = settle(directory, open_source(directory), {})
    tensors = settled.tensors
    return {name: tensors[name].read(np.dtype(np.float32)) for name in shapes(settled.config)}


def made(directory: pathlib.Path, name: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """A converted file or folder in ``directory / "peers"``, whole or not at all.

    Parameters
    ----------
    directory : pathlib.Path
        Of the checkpoint.
    name : str
    make : callable
        Writes it to the path that it is given; called only if it is not there yet.
    """
    path = directory / "peers" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        new = path.with_name(f"new-{os.getpid()}-{name}")
        try:
            make(new)
            new.rename(path)
        finally:
            if new.is_dir():
                shutil.rmtree(new)
            else:
                new.unlink(missing_ok=True)
    return path


def log_probabilities(logits: Array, ids: Sequence[int]) -> Array:
    """Log-probability (T - 1,) of each token but the first, from logits (T, V).

    For libraries that have no function for it. The logits are overwritten: their exponentials
    need no other place.
    """
    following = np.asarray(ids[1:])
    rows = len(following)
    result: Array = logits[np.arange(rows), following]

    def subtract(start: int) -> None:
        part = logits[start : min(start + 8, rows)]
        largest = part.max(axis=1)
        np.subtract(part, largest[:, None], out=part)
        np.exp(part, out=part)
        result[start : start + len(part)] -= largest + np.log(part.sum(axis=1))

    spread(subtract, range(0, rows, 8))
    return result
