"""Checkpoints in the Hugging Face layout: a config.json and one or more safetensors files."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, CheckpointWarning, ModelNotFoundError
from ..params import Array, Config, Params, check, listing, pack
from .config import read_config
from .json_files import parse_json, read_small
from .safetensors import FLOATS, Entry, SafetensorsFile

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


@dataclasses.dataclass
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
    tensors: dict[str, Entry] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


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
    directory = _directory(path)
    stored = _stored(_files(path))
    config = _with_biases(read_config(directory / "config.json"), stored)
    _check(path, config, stored)
    tensors = {
        name: tensor.file.read(tensor.key, np.dtype(dtype))
        for name, tensor in stored.items()
        if not MASK_BUFFER.fullmatch(name)
    }
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        _drop_tied_copy(path, tensors)
    odd = [name for name, array in tensors.items() if not _finite(array)]
    if odd:
        warnings.warn(
            f"{path}: NaN or infinite weights in {listing(odd)}", CheckpointWarning, stacklevel=2
        )
    return Checkpoint(config, pack(config, tensors), directory)


def inspect(path: pathlib.Path) -> Report:
    """Look at a checkpoint without reading its weights, and collect what would be refused.

    Only what needs the weights themselves is left to :func:`read`: whether a head that is stored
    although it is tied equals the token table, and whether weights are NaN.

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
    report = Report(path, _directory(path))
    stored: dict[str, Stored] = {}
    try:
        stored = _stored(_files(path))
    except (CheckpointError, ModelNotFoundError) as error:
        report.problems.append(str(error))
    report.tensors = {name: tensor.entry for name, tensor in stored.items()}
    try:
        report.config = _with_biases(read_config(report.directory / "config.json"), stored)
    except (CheckpointError, ModelNotFoundError) as error:
        report.problems.append(str(error))
    if report.config and stored:
        try:
            _check(path, report.config, stored)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


def _directory(path: pathlib.Path) -> pathlib.Path:
    """Where the parts of a checkpoint lie."""
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    return path if path.is_dir() else path.parent


def _files(path: pathlib.Path) -> list[SafetensorsFile]:
    """The files that hold the tensors of a checkpoint."""
    try:
        return _open(path)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from None


def _open(path: pathlib.Path) -> list[SafetensorsFile]:
    if path.is_dir():
        single, index = path / "model.safetensors", path / INDEX
        found = sorted(path.glob("*.safetensors"))
        if single.exists():
            return [SafetensorsFile(single)]
        if index.exists():
            return _shards(index)
        if len(found) == 1:
            return [SafetensorsFile(found[0])]
        there = sorted(entry.name for entry in path.iterdir())
        raise ModelNotFoundError(
            f"{path}: expected model.safetensors or {INDEX}, "
            + (f"found {listing(there)}" if there else "but the directory is empty")
            + ("; numpygpt reads no other format yet" if there else "")
        )
    if path.name.endswith(".index.json"):
        return _shards(path)
    return [SafetensorsFile(path)]


def _shards(index: pathlib.Path) -> list[SafetensorsFile]:
    """The files named by an index, which must lie beside it and hold what it says they hold."""
    text = read_small(index, CheckpointError)
    weight_map = parse_json(text, str(index), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A name that is its own last part on Windows is one everywhere.
        plain = isinstance(file, str) and file == pathlib.PureWindowsPath(file).name
        if not plain or file in ("", ".", "..") or len(file) > 255:
            raise CheckpointError(
                f"{index}: {name} is in {str(file)[:80]!r}, expected a plain file name: shards "
                f"must lie beside their index"
            )
        by_file.setdefault(file, set()).add(name)
    files = []
    for file, names in sorted(by_file.items()):
        path = index.parent / file
        if not path.exists():
            raise ModelNotFoundError(f"{path}: not found, but {index.name} says it holds tensors")
        files.append(SafetensorsFile(path))
        held = files[-1].entries.keys()
        if held != names:
            raise CheckpointError(
                f"{path}: holds other tensors than {index.name} says: "
                f"{listing(sorted(held ^ names))}"
            )
    return files


def _stored(files: Sequence[SafetensorsFile]) -> dict[str, Stored]:
    """Every tensor of the files, by its name without the prefix ``transformer.``."""
    stored: dict[str, Stored] = {}
    for file in files:
        for key in file.entries:
            name = key.removeprefix("transformer.")
            if name in stored:
                raise CheckpointError(
                    f"{file.path}: {name} stands in it twice, as {stored[name].key} and as {key}"
                )
            stored[name] = Stored(file, key)
    return stored


def _with_biases(config: Config, stored: dict[str, Stored]) -> Config:
    """`config`, without biases if the checkpoint has not one of them."""
    some = any(name.endswith(".bias") and not MASK_BUFFER.fullmatch(name) for name in stored)
    if config.bias and stored and not some:
        return dataclasses.replace(config, bias=False)
    return config


def _check(path: pathlib.Path, config: Config, stored: dict[str, Stored]) -> None:
    """Names, shapes and types, before any tensor is read."""
    used = {name: t.entry for name, t in stored.items() if not MASK_BUFFER.fullmatch(name)}
    # A tied head may be stored too; then it must have a head's shape.
    stored_head = config.tie_word_embeddings and "lm_head.weight" in used
    told = dataclasses.replace(config, tie_word_embeddings=False) if stored_head else config
    try:
        check(told, {name: entry.shape for name, entry in used.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, entry in used.items():
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {name} is {entry.dtype}; expected one of {', '.join(FLOATS)}"
            )


def _drop_tied_copy(path: pathlib.Path, tensors: dict[str, Array]) -> None:
    """Remove a stored head that repeats the token table; refuse one that does not."""
    head = tensors.pop("lm_head.weight")
    if not np.array_equal(head, tensors["wte.weight"], equal_nan=True):
        raise CheckpointError(
            f"{path}: lm_head.weight differs from wte.weight, but config.json ties them; set "
            '"tie_word_embeddings": false if the model was trained with a head of its own'
        )


def _finite(array: Array) -> bool:
    """Whether no element is NaN or infinite: one pass over the memory if none is."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())
