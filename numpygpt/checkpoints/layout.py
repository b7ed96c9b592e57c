"""Checkpoints in the Hugging Face layout: a config.json and one or more safetensors files."""

from __future__ import annotations

import pathlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, CheckpointWarning, ModelNotFoundError
from ..params import Array, Config, Params, listing, pack, shapes
from .config import parse_json, read_config
from .safetensors import Entry, SafetensorsFile

__all__ = ["Checkpoint", "Report", "inspect", "read"]

INDEX = "model.safetensors.index.json"

# Causal masks that old versions of transformers stored among the weights.
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


class Checkpoint(NamedTuple):
    """A checkpoint in memory; ``directory`` is where its vocabulary files would be."""

    config: Config
    params: Params
    directory: pathlib.Path


class Stored(NamedTuple):
    """One tensor of a checkpoint: the file that holds it, and the name it has there."""

    file: SafetensorsFile
    key: str

    @property
    def entry(self) -> Entry:
        """Its type, shape and place."""
        return self.file.entries[self.key]


@dataclass
class Report:
    """What :func:`inspect` found.

    Attributes
    ----------
    path : pathlib.Path
    directory : pathlib.Path
    config : Config or None
        None if it would be refused.
    tensors : dict of str to Entry
        By their names without prefix, in file order; mask buffers included.
    problems : list of str
        Each reason for which :func:`read` would refuse this checkpoint.
    """

    path: pathlib.Path
    directory: pathlib.Path
    config: Config | None = None
    tensors: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read(path: pathlib.Path, dtype: Any = np.float32) -> Checkpoint:
    """Read a checkpoint, checking every name, shape and size.

    Parameters
    ----------
    path : pathlib.Path
        A directory with config.json, or a safetensors file (or index) with config.json beside it.
    dtype : dtype
        float32 or float64. float32 stored as float32 is not copied but mapped.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ModelNotFoundError
        If a file is missing.
    CheckpointError
        If a file is damaged, or config and tensors do not fit each other.

    Warns
    -----
    CheckpointWarning
        If weights are NaN or infinite; it names them.
    """
    directory, files = _files(path)
    config = read_config(directory / "config.json")
    stored = _stored(files)
    config = _with_biases(config, stored)
    _check(config, stored)
    tensors = {
        name: tensor.file.read(tensor.key, np.dtype(dtype))
        for name, tensor in stored.items()
        if not MASK_BUFFER.fullmatch(name)
    }
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _drop_tied_copy(tensors)
    odd = [name for name, array in tensors.items() if not _finite(array)]
    if odd:
        warnings.warn(
            f"{path}: NaN or infinite weights in {listing(odd)}", CheckpointWarning, stacklevel=2
        )
    return Checkpoint(config, pack(config, tensors), directory)


def inspect(path: pathlib.Path) -> Report:
    """Look at a checkpoint without reading its weights, and collect what would be refused.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Report

    Raises
    ------
    ModelNotFoundError
        If there is nothing to look at.
    """
    directory, files = _files(path)
    report = Report(path, directory)
    stored: dict[str, Stored] = {}
    try:
        stored = _stored(files)
    except CheckpointError as error:
        report.problems.append(str(error))
    report.tensors = {name: tensor.entry for name, tensor in stored.items()}
    try:
        report.config = _with_biases(read_config(directory / "config.json"), stored)
    except (CheckpointError, ModelNotFoundError) as error:
        report.problems.append(str(error))
    if report.config and stored:
        try:
            _check(report.config, stored)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


def _files(path: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The directory of a checkpoint, and the files that hold its tensors."""
    if path.is_dir():
        single, index = path / "model.safetensors", path / INDEX
        found = sorted(path.glob("*.safetensors"))
        if single.exists():
            return path, [single]
        if index.exists():
            return path, _shards(index)
        if len(found) == 1:
            return path, found
        there = [entry.name for entry in sorted(path.iterdir())]
        raise ModelNotFoundError(
            f"{path}: expected model.safetensors or {INDEX}, "
            + (f"found {listing(there)}" if there else "but the directory is empty")
        )
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    if path.name.endswith(".index.json"):
        return path.parent, _shards(path)
    return path.parent, [path]


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    """The files named by an index, which must lie beside it and hold what it says they hold."""
    if index.stat().st_size > 2**24:
        raise CheckpointError(f"{index}: over 16 MiB, which no GPT-2 index is")
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != pathlib.PureWindowsPath(file).name or not file:
            raise CheckpointError(
                f"{index}: {name} is in {str(file)[:80]!r}, expected a plain file name: shards "
                f"must lie beside their index"
            )
        by_file.setdefault(file, set()).add(name)
    paths = []
    for file, names in sorted(by_file.items()):
        path = index.parent / file
        if not path.exists():
            raise ModelNotFoundError(f"{path}: not found, but {index.name} says it holds tensors")
        held = SafetensorsFile(path).entries.keys()
        if held != names:
            raise CheckpointError(
                f"{path}: holds other tensors than {index.name} says: "
                f"{listing(sorted(held ^ names))}"
            )
        paths.append(path)
    return paths


def _stored(paths: Sequence[pathlib.Path]) -> dict[str, Stored]:
    """Every tensor of the files, by its name without the prefix ``transformer.``."""
    stored: dict[str, Stored] = {}
    for path in paths:
        file = SafetensorsFile(path)
        for key in file.entries:
            name = key.removeprefix("transformer.")
            if name in stored:
                raise CheckpointError(
                    f"{path}: {name} stands in it twice, as {stored[name].key} and as {key}"
                )
            stored[name] = Stored(file, key)
    return stored


def _with_biases(config: Config, stored: dict[str, Stored]) -> Config:
    """`config`, without biases if the checkpoint has not one of them."""
    some = any(name.endswith(".bias") and not MASK_BUFFER.fullmatch(name) for name in stored)
    if config.bias and stored and not some:
        return Config(**{**vars(config), "bias": False})
    return config


def _check(config: Config, stored: dict[str, Stored]) -> None:
    """Names and shapes, before any tensor is read."""
    layers = {name.split(".")[1] for name in stored if re.match(r"h\.\d+\.", name)}
    if len(layers) != config.n_layer:
        raise CheckpointError(
            f"config.json says n_layer = {config.n_layer}, but there are tensors of "
            f"{len(layers)} layers"
        )
    expected = shapes(config)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    surplus = [
        name
        for name in stored
        if name not in expected and name not in optional and not MASK_BUFFER.fullmatch(name)
    ]
    if surplus:
        raise CheckpointError(f"unexpected tensors, which GPT-2 has no use for: {listing(surplus)}")
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(expected)} tensors are missing: {listing(missing)}"
        )
    for name, (shape, letters) in expected.items():
        if stored[name].entry.shape != shape:
            raise CheckpointError(
                f"{stored[name].file.path}: {name} expected shape {shape} = {letters}, received "
                f"{stored[name].entry.shape}"
            )


def _drop_tied_copy(tensors: dict[str, Array]) -> None:
    """Remove a stored head that repeats the token table; refuse one that does not."""
    if not np.array_equal(tensors.pop("lm_head.weight"), tensors["wte.weight"]):
        raise CheckpointError(
            "lm_head.weight differs from wte.weight, but config.json ties them; set "
            '"tie_word_embeddings": false if the model was trained with a head of its own'
        )


def _finite(array: Array) -> bool:
    """Whether no element is NaN or infinite: one pass over the memory if none is."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
