"""Raw numbers in files, described by a JSON beside them: what C writes with ``fwrite``.

The JSON is an object. ``tensors`` is a list of objects with ``name``, ``shape``, ``file`` and, if
they are not the defaults, ``dtype`` (``"float32"``), ``offset`` in bytes (0) and ``file``, which
may also be told once for all. The tokens are a list ``ids``, or a tensor of integers named
``ids``. Beside these it may have ``dtype``, ``weights``, ``chunks``, ``producer``, ``config`` and
``model_sha256``. Numbers are little-endian, in C order.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from ...checkpoints.arrays import FLOATS, DataFile
from ...errors import DumpError
from ...params import shown
from .files import Keeper, integers, stored
from .recording import COMPUTED, INTEGERS, Recording, Stored, recording

__all__ = ["read"]

KINDS = {name: kind for kind, name in COMPUTED.items()}
KINDS |= {integers(kind).name: kind for kind in INTEGERS}


def read(path: pathlib.Path, fields: Mapping[str, Any]) -> Recording:
    """Read the files that a side JSON describes.

    Parameters
    ----------
    path : pathlib.Path
        The JSON, whose folder holds the files.
    fields : mapping
        What stands in it.

    Raises
    ------
    DumpError
        Naming the tensor whose description is not true.
    """
    entries = fields.get("tensors")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DumpError(f"{path}: tensors must be a list of objects")
    keeper = Keeper()
    files: dict[str, DataFile] = {}
    arrays: dict[str, Stored] = {}
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str) or name in arrays:
            raise DumpError(f"{path}: a name is missing or stands there twice: {shown(entry)}")
        inside = _file_name(path, name, entry.get("file", fields.get("file")))
        if inside not in files:
            files[inside] = DataFile(path.parent / inside)
        arrays[name] = keeper.keep(_described(path, name, entry, files[inside]))
    return recording(path, arrays, {"producer": "", **fields})


def _file_name(path: pathlib.Path, name: str, told: object) -> str:
    """A file in the folder of the JSON; nothing outside it is opened."""
    if not isinstance(told, str) or told in ("", ".", "..") or set(told) & set("/\\\0"):
        raise DumpError(
            f"{path}: {shown(name)} needs the name of a file in the same folder, received "
            f"{shown(repr(told))}"
        )
    return told


def _described(path: pathlib.Path, name: str, entry: Mapping[str, Any], file: DataFile) -> Stored:
    what, told = f"{path}: {shown(name)}", entry.get("dtype", "float32")
    shape, offset = entry.get("shape"), entry.get("offset", 0)
    if not isinstance(told, str) or told not in KINDS:
        raise DumpError(f"{what} has the dtype {shown(repr(told))}; known are {', '.join(KINDS)}")
    if not isinstance(shape, list) or not all(map(_is_size, [*shape, offset])) or len(shape) > 8:
        raise DumpError(
            f"{what} needs a shape of at most 8 integers and an offset in bytes, received "
            f"{shown(shape)} and {shown(offset)}"
        )
    kind = KINDS[told]
    stop = offset + math.prod(shape) * _item(kind)
    if stop > file.size:
        raise DumpError(
            f"{what} would end at byte {stop} of {file.path.name}, which has {file.size}"
        )
    return stored(file, kind, offset, tuple(shape))


def _item(kind: str) -> int:
    return (FLOATS[kind] if kind in COMPUTED else integers(kind)).itemsize


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48
