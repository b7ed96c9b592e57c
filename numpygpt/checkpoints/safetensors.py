"""The safetensors container: 8 bytes of header length, a JSON header, one block of raw data.

Everything the header claims is checked against the size of the file before anything is believed.
Tensors must tile the data exactly. What remains for a hostile file is its header: JSON of nothing
but brackets becomes Python objects of 28 times its size (measured). A header may therefore take at
most 1/32 of the file, up to 4 MiB, or 256 KiB, so that reading it never takes more memory than the
file's own size and 7 MiB. (gpt2-xl's takes 1/100000 of the file.)

References
----------
https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..params import Array
from ..storage import Int8
from .arrays import FLOATS, ITEMS, DataFile, Tensor, write_array
from .json_files import parse_json
from .narrowing import narrowed, stored_shape

__all__ = ["Entry", "SafetensorsFile", "write"]

SMALL_HEADER = 2**18
# 4 MiB take two seconds to read. gpt2-xl's has 60 KB.
LARGEST_HEADER = 2**22

# What is added to the name of an int8 matrix (O, I) for that of its scales (O,).
SCALES = "_scale"

# Bytes for each element of every type the format has in whole bytes.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class Entry(NamedTuple):
    """What the header says of a tensor; ``start`` and ``stop`` are bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file whose header has been checked.

    Parameters
    ----------
    path : pathlib.Path

    Attributes
    ----------
    path : pathlib.Path
    entries : dict of str to Entry
    metadata : dict of str to str
        Free text that the writer put beside the tensors.

    Raises
    ------
    CheckpointError
        If the file is not a sound safetensors file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = DataFile(path)
        size = self._file.size
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
        length = int.from_bytes(self._file.map[:8], "little")
        most = min(size - 8, max(SMALL_HEADER, min(size // 32, LARGEST_HEADER)))
        if length > most and path.suffix == ".json":
            raise CheckpointError(f"{path}: a JSON file; name its directory instead")
        if length > most:
            raise CheckpointError(
                f"{path}: its header claims {length} bytes, more than the {most} possible: "
                f"truncated, or not safetensors"
            )
        self.entries, self.metadata = self._parse(self._file.map[8 : 8 + length], 8 + length, size)

    def read(self, name: str, dtype: np.dtype[Any]) -> Array:
        """One tensor, converted to `dtype`.

        A view of the mapped file where that is possible (same type, aligned), else a new array.

        Parameters
        ----------
        name : str
        dtype : dtype
            float16, float32 or float64.

        Returns
        -------
        ndarray
            Read-only when it is a view.

        Raises
        ------
        CheckpointError
            If the tensor does not hold floating-point numbers.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} is {entry.dtype}; expected one of {', '.join(FLOATS)}"
            )
        return self._file.array(entry.dtype, entry.start, entry.shape, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, not read yet; an int8 matrix and its scales are one.

        Raises
        ------
        CheckpointError
            If the scales beside an int8 matrix do not fit it.
        """
        made = {}
        for name, entry in self.entries.items():
            if entry.dtype in FLOATS:
                if not self._is_scale(name):
                    made[name] = self._file.tensor(entry.dtype, entry.start, entry.shape)
                continue
            load, size = functools.partial(self.read, name), entry.stop - entry.start
            made[name] = Tensor(entry.dtype, entry.shape, size, load)
            if self._is_scale(name + SCALES):
                made[name] = self._int8(name)
        return made

    def _is_scale(self, name: str) -> bool:
        """Whether these are the scales of an int8 matrix."""
        matrix = self.entries.get(name.removesuffix(SCALES))
        ours = name in self.entries and name.endswith(SCALES)
        return ours and matrix is not None and matrix.dtype == "I8"

    def _int8(self, name: str) -> Tensor:
        """An int8 matrix, whose numbers are used where they lie."""
        entry, scale = self.entries[name], self.entries[name + SCALES]
        if len(entry.shape) != 2 or scale.dtype != "F32" or scale.shape != entry.shape[:1]:
            raise CheckpointError(
                f"{self.path}: {name} is int8 of shape {entry.shape}, and its scales are "
                f"{scale.dtype} of shape {scale.shape}; expected F32 with one for each row"
            )

        def stored() -> Int8:
            integers = self._file.array("I8", entry.start, entry.shape, np.dtype(np.int8))
            scales = self._file.array(
                "F32", scale.start, scale.shape, np.dtype(np.float32), mapped=False
            )
            if not (np.isfinite(scales) & (scales > 0)).all():
                raise CheckpointError(
                    f"{self.path}: {name}{SCALES} must be positive and finite, received "
                    f"{scales[~(np.isfinite(scales) & (scales > 0))][0]:g}"
                )
            return Int8(integers, scales)

        def part(dtype: np.dtype[Any], start: int, stop: int) -> Array:
            return stored()[start:stop].astype(dtype, copy=False)

        def load(dtype: np.dtype[Any]) -> Array:
            return part(dtype, 0, entry.shape[0])

        size = entry.stop - entry.start + scale.stop - scale.start
        return Tensor(entry.dtype, entry.shape, size, load, part, stored)

    def _parse(
        self, header: bytes, begin: int, size: int
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        fields = parse_json(header, f"{self.path}: header", CheckpointError)
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise CheckpointError(f"{self.path}: __metadata__ must map strings to strings")
        entries = {name: self._entry(name, value, begin) for name, value in fields.items()}
        end = begin
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            if entry.start != end:
                what = "overlaps the tensor before it" if entry.start < end else "leaves a hole"
                raise CheckpointError(
                    f"{self.path}: {name} starts at data byte {entry.start - begin}, expected "
                    f"{end - begin}: it {what}"
                )
            end = entry.stop
        if end != size:
            what = "truncated" if end > size else "data that belongs to no tensor"
            raise CheckpointError(
                f"{self.path}: its tensors end at byte {end}, the file at byte {size}: {what}"
            )
        return entries, metadata

    def _entry(self, name: str, value: Any, begin: int) -> Entry:
        match value:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
                pass
            case _:
                raise CheckpointError(
                    f"{self.path}: {name} needs dtype, shape and two data_offsets, received "
                    f"{str(value)[:80]}"
                )
        if dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{self.path}: {name} has the unknown dtype {dtype[:20]!r}; known are "
                f"{', '.join(ITEM_BYTES)}"
            )
        numbers = [*shape[:8], start, stop]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(
                f"{self.path}: {name} has an impossible shape or offset: {str(numbers)[:80]}"
            )
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if stop - start != expected:
            raise CheckpointError(
                f"{self.path}: {name} has {stop - start} bytes, but {dtype} of shape {shape} "
                f"takes {expected}"
            )
        return Entry(dtype, tuple(shape), begin + start, begin + stop)


def write(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    file : binary file
    tensors : mapping of str to Tensor
    kinds : mapping of str to str
        Type in which each is stored, a key of :data:`~.arrays.ITEMS`. What becomes I8 is stored
        (O, I), with its scales (O,) beside it.
    advance : callable
        Told how many bytes of arrays were written.

    Raises
    ------
    CheckpointError
        If a number does not fit its type.
    """
    integers = [name for name in tensors if kinds[name] == "I8"]
    rest = [name for name in tensors if kinds[name] != "I8"]
    # transformers asks for this note of who may read the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0

    def describe(name: str, kind: str, shape: tuple[int, ...]) -> None:
        nonlocal stop
        start, stop = stop, stop + math.prod(shape) * ITEMS[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}

    shapes = {name: stored_shape(name, tensors[name].shape) for name in integers}
    for name in integers:
        describe(name, "I8", shapes[name])
    for name in integers:  # after the integers, because they are known only when these are
        describe(name + SCALES, "F32", shapes[name][:1])
    for name in rest:
        describe(name, kinds[name], tensors[name].shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned data can be used where it lies
    file.write(len(text).to_bytes(8, "little") + text)
    scales = []
    for name in integers:
        matrix = narrowed(name, tensors[name], "int8")
        write_array(file, matrix.numbers, "I8", advance)
        scales.append(matrix.scales)
    for numbers in scales:
        write_array(file, numbers, "F32", advance)
    for name in rest:
        write_array(file, tensors[name].read(tensors[name].exact), kinds[name], advance, name)
