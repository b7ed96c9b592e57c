"""A folder of ``.npy`` files: one array each, the tokens as ``ids.npy``, metadata beside them."""

from __future__ import annotations

import pathlib

from ...checkpoints.arrays import DataFile
from ...checkpoints.json_files import parse_json
from ...errors import DumpError
from .files import Keeper, read_text
from .npy import describe
from .recording import Recording, Stored, recording

__all__ = ["METADATA", "read", "read_array"]

# What stands beside the arrays: ids, dtype, weights, chunks, producer, config.
METADATA = "dump.json"
LARGEST_METADATA = 2**20


def read(folder: pathlib.Path) -> Recording:
    """Read a folder of ``.npy`` files.

    Raises
    ------
    DumpError
        If one of them is damaged or holds Python objects.
    """
    keeper, beside = Keeper(), folder / METADATA
    arrays = {path.stem: keeper.keep(_array(path)) for path in sorted(folder.glob("*.npy"))}
    metadata = {}
    if beside.exists():
        metadata = parse_json(read_text(beside, LARGEST_METADATA), str(beside), DumpError)
    return recording(folder, arrays, metadata)


def read_array(path: pathlib.Path) -> Recording:
    """Read one ``.npy`` file, whose name is the array's; the tokens must come from elsewhere."""
    return recording(path, {path.stem: _array(path)}, {})


def _array(path: pathlib.Path) -> Stored:
    file = DataFile(path)
    return describe(file, 0, file.size, path.stem)
