"""The safetensors container: 8 bytes of header length, a JSON header, one block of raw data.

Everything the header claims is checked against the size of the file before anything is believed.
Tensors must tile the data exactly. What remains for a hostile file is its header: JSON of nothing
but brackets becomes Python objects of 28 times its size (measured). A header may therefore take
at most 1/32 of the file, or 256 KiB, so that reading it never takes more memory than the file's
own size and 7 MiB. (gpt2-xl's takes 1/100000 of the file.)

References
----------
https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import math
import mmap
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..params import Array
from .json_files import parse_json

__all__ = ["FLOATS", "Entry", "SafetensorsFile"]

SMALL_HEADER = 2**18

# Bytes for each element of every type the format has in whole bytes.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

# bfloat16 has no NumPy dtype: it is read as 16-bit integers, the upper halves of float32.
FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


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
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
                raise CheckpointError(f"{path}: not a regular file")
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8:
                    raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
                most = min(size - 8, max(SMALL_HEADER, size // 32))
                if length > most and path.suffix == ".json":
                    raise CheckpointError(f"{path}: a JSON file; name its directory instead")
                if length > most:
                    raise CheckpointError(
                        f"{path}: its header claims {length} bytes, more than the {most} possible: "
                        f"truncated, or not safetensors"
                    )
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        self.entries, self.metadata = self._parse(header, 8 + length, size)

    def read(self, name: str, dtype: np.dtype[Any]) -> Array:
        """One tensor, converted to `dtype`.

        A view of the mapped file where that is possible (same type, aligned), else a new array.

        Parameters
        ----------
        name : str
        dtype : dtype
            float32 or float64.

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
        stored = FLOATS.get(entry.dtype)
        if stored is None:
            raise CheckpointError(
                f"{self.path}: {name} is {entry.dtype}; expected one of {', '.join(FLOATS)}"
            )
        count = math.prod(entry.shape)
        # OpenAI's own file has a header of 14283 bytes, so its data is misaligned, and BLAS would
        # copy such a matrix at every product. What cannot be used where it lies is read rather
        # than mapped, so that it is not in memory twice.
        if stored == dtype and entry.start % stored.itemsize == 0:
            array: Array = np.frombuffer(self._map, stored, count, entry.start)
        else:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                array = np.fromfile(file, stored, count)
            if len(array) != count:
                raise CheckpointError(f"{self.path}: became shorter while it was read")
        if entry.dtype == "BF16":
            array = np.left_shift(array, 16, dtype=np.uint32).view("<f4")
        with np.errstate(all="ignore"):  # the caller names tensors that are not finite
            converted: Array = array.astype(dtype, copy=False).reshape(entry.shape)
        return converted

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
