"""Dumps as safetensors: ours, with all metadata, and those of other programs.

Ours have the arrays under their trace keys and, as texts in the header:

================ =================================================================
format           ``numpygpt-trace``
format_version   ``1``
ids              the T tokens, a JSON list
dtype            what was computed in: ``float64``, ``float32``, ``bfloat16`` ...
weights          how the weights were stored, if not as `dtype`
chunks           JSON list, how many tokens each pass read, if there were several
producer         free text
model_sha256     of the learned arrays
config           JSON object, in the words of ``config.json``
================ =================================================================
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ...checkpoints.arrays import FLOATS, DataFile, write_array
from ...checkpoints.atomic import new_file, require_room
from ...checkpoints.safetensors import SafetensorsFile
from ...errors import DumpError
from ...params import Array
from ..dump import Dump
from .files import stored
from .recording import FORMAT, VERSION, Recording, check_chunks, check_dtype, check_weights
from .recording import recording as put_together

__all__ = ["read", "write"]

KINDS = {dtype: kind for kind, dtype in FLOATS.items() if kind != "BF16"}


def read(path: pathlib.Path) -> Recording:
    """Read a safetensors file.

    Raises
    ------
    DumpError
        If it is damaged, or a field of its metadata is wrong.
    """
    header, file = SafetensorsFile(path), DataFile(path)
    arrays = {
        name: stored(file, entry.dtype, entry.start, entry.shape)
        for name, entry in header.entries.items()
    }
    return put_together(path, arrays, header.metadata)


def write(
    path: str | pathlib.Path,
    dump: Dump,
    model_sha256: str | None = None,
    config: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a dump; the file is there whole or not at all.

    Parameters
    ----------
    path : path
        Must not exist.
    dump : Dump
        Its arrays are stored as they are.
    model_sha256 : str, optional
        Of the model's learned arrays.
    config : mapping, optional
        The model's, in the words of ``config.json``.
    advance : callable
        Told how many bytes of arrays were written.

    Raises
    ------
    DumpError
        If the dump holds anything but floating-point arrays, or its metadata is wrong.
    OutputError
        If `path` exists, or the disk refuses.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from numpygpt.verify.dumps import read
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.safetensors")
    >>> write(path, Dump(np.array([3, 1]), {"ln_f": np.ones((2, 8))}, "float64"))
    >>> read(path).ids
    array([[3, 1]])
    """
    path = pathlib.Path(path)
    header: dict[str, Any] = {"__metadata__": _metadata(path, dump, model_sha256, config)}
    stop = 0
    for name, array in dump.tensors.items():
        start, stop = stop, stop + array.nbytes
        header[name] = {
            "dtype": _kind(path, name, array),
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned data can be used where it lies
    require_room(path, 8 + len(text) + stop)
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in dump.tensors.items():
            write_array(file, array, KINDS[array.dtype.newbyteorder("<")], advance, name)


def _metadata(
    path: pathlib.Path, dump: Dump, model_sha256: str | None, config: Mapping[str, Any] | None
) -> dict[str, str]:
    """The texts of the header."""
    told = {
        "format": FORMAT,
        "format_version": VERSION,
        "ids": json.dumps(dump.ids.tolist()),
        "dtype": check_dtype(dump.dtype, str(path)),
        "producer": dump.producer,
    }
    if dump.weights is not None:
        told["weights"] = check_weights(dump.weights, str(path))
    if dump.chunks:
        told["chunks"] = json.dumps(check_chunks(dump.chunks, str(path)))
    if model_sha256 is not None:
        told["model_sha256"] = model_sha256
    if config is not None:
        told["config"] = json.dumps(dict(config))
    return told


def _kind(path: pathlib.Path, name: str, array: Array) -> str:
    kind = KINDS.get(array.dtype.newbyteorder("<"))
    if kind is None:
        raise DumpError(f"{path}: {name} is {array.dtype}; expected float64, float32 or float16")
    return kind
