"""The Hugging Face layout: config.json beside one or more files of tensors."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping

from ..errors import CheckpointError, ModelNotFoundError
from ..params import listing
from .arrays import Tensor
from .json_files import parse_json, read_small
from .names import canonical
from .source import Source

__all__ = ["INDEXES", "read_shards", "source_of"]

# Files that name the shards of a checkpoint.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def source_of(format: str, path: pathlib.Path, stored: Mapping[str, Tensor]) -> Source:
    """A checkpoint whose config is the ``config.json`` beside `path`."""
    tensors, notes = canonical(stored, path)
    return Source(format, path.parent, tensors, notes=notes)


def read_shards(
    index: pathlib.Path, opener: Callable[[pathlib.Path], tuple[str, Mapping[str, Tensor]]]
) -> Source:
    """The files named by an index, which must lie beside it and hold what it says they hold.

    Parameters
    ----------
    index : pathlib.Path
    opener : callable
        From a shard's path to its format and tensors.

    Raises
    ------
    CheckpointError
        If the index or a shard is damaged, or they do not agree.
    ModelNotFoundError
        If a shard is missing.
    """
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
    stored: dict[str, Tensor] = {}
    formats = set()
    for file, names in sorted(by_file.items()):
        path = index.parent / file
        if not path.exists():
            raise ModelNotFoundError(f"{path}: not found, but {index.name} says it holds tensors")
        format, held = opener(path)
        formats.add(format)
        if held.keys() != names:
            raise CheckpointError(
                f"{path}: holds other tensors than {index.name} says: "
                f"{listing(sorted(held.keys() ^ names))}"
            )
        stored |= held
    return source_of(f"{' and '.join(sorted(formats))}, {len(by_file)} shards", index, stored)
