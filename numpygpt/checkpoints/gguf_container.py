"""The GGUF container: values by name, descriptions of tensors, one block of aligned data.

All that is said before the data is taken value by value, each checked against the end of the file
first. What is not needed, such as the vocabulary of another kind of model, is stepped over.

Floating-point numbers are read here. Blocks of small integers with a scale are turned into numbers
by the ``gguf`` package, llama.cpp's own, when such a tensor is read and not before.

References
----------
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; ggml/src/gguf.cpp, which says what
llama.cpp refuses.
"""

from __future__ import annotations

import functools
import importlib
import math
import pathlib
import struct
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..params import Array
from .arrays import FLOATS, QUANTISED, DataFile, Tensor

__all__ = [
    "ALIGNMENT",
    "ARRAY",
    "F32",
    "I32",
    "NUMBERS",
    "TEXT",
    "U32",
    "Entry",
    "GGUFFile",
    "aligned",
]

# What comes before the data. GPT-2's takes 1.7 MB, nearly all of it the vocabulary; one of the size
# of Llama 3's, 128,256 tokens and 280,147 merges, takes 8 MB.
MOST_HEADER = 12 * 2**20
# Texts, and lists inside lists: the two kinds of values that are gone through one by one. GPT-2 has
# 100,257. With both limits the worst file of 12 MB becomes Python objects of 73 MB (measured).
MOST_PIECES = 2**19
MOST_DEPTH = 4  # lists in lists; no writer is known to use any
MOST_VALUES = 4096  # llama.cpp's own saver writes 150
MOST_TENSORS = 4096  # gpt2-xl has 580
MOST_NAME = 63  # bytes, as in llama.cpp
LONG_TEXT = 256  # a single text that is longer is no setting but a licence or a chat template

ALIGNMENT = 32  # of tensors, in bytes, unless the file says otherwise

# Types of values. Numbers are little-endian.
U32, I32, F32, TEXT, ARRAY, U64 = 4, 5, 6, 8, 9, 10
NUMBERS = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", 7: "?", U64: "Q", 11: "q",
        12: "d",
    }.items()
}  # fmt: skip

# Types of tensors: name, numbers in a block, bytes of a block. Types that once had one of the
# numbers left out are read by no current program.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip

# Blocks are turned into numbers in pieces of this many bytes; the package takes three times that.
PIECE_BYTES = 2**22


class Entry(NamedTuple):
    """What the file says of a tensor; ``start`` and ``nbytes`` are bytes of the file.

    ``shape`` is NumPy's: the file lists the axes the other way round.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file whose header has been checked.

    Parameters
    ----------
    path : pathlib.Path
    architecture : str
        The only one that is wanted.
    lists : collection of str
        Names of the lists that are wanted.

    Attributes
    ----------
    path : pathlib.Path
    values : dict of str to object
        Numbers and short texts; a wanted list as a list of str or an ndarray; None for what was
        stepped over.
    entries : dict of str to Entry
        Tensors by the file's own names, in its order.

    Raises
    ------
    CheckpointError
        If the file is damaged, of another version, or of another architecture.
    """

    def __init__(self, path: pathlib.Path, architecture: str, lists: Collection[str]):
        self.path = path
        self._file = DataFile(path)
        cursor = _Cursor(self._file)
        _check_version(cursor)
        tensors, count = cursor.number(U64), cursor.number(U64)
        for found, most, what in ((tensors, MOST_TENSORS, "tensors"), (count, MOST_VALUES, "keys")):
            if found > most:
                raise CheckpointError(f"{path}: claims {found} {what}, and at most {most} are read")
        self.values: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.text()
            if key in self.values:
                raise CheckpointError(f"{path}: the key {key[:80]!r} stands in it twice")
            self.values[key] = cursor.value(cursor.number(U32), key in lists)
            if key == "general.architecture" and self.values[key] != architecture:
                raise CheckpointError(
                    f"{path}: a model of the architecture {str(self.values[key])[:40]!r}, and "
                    f"numpygpt runs only {architecture!r}"
                )
        if "general.architecture" not in self.values:
            raise CheckpointError(f"{path}: does not say its general.architecture")
        self.entries = self._entries(cursor, tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file, not read yet."""
        return {
            name: Tensor(
                entry.kind, entry.shape, entry.nbytes, functools.partial(self._read, name, entry)
            )
            for name, entry in self.entries.items()
        }

    def _entries(self, cursor: _Cursor, count: int) -> dict[str, Entry]:
        alignment = self.values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment must be a power of two, not {alignment!r}"
            )
        entries: dict[str, Entry] = {}
        for _ in range(count):
            name, entry = self._entry(cursor)
            if name in entries:
                raise CheckpointError(f"{self.path}: the tensor {name!r} stands in it twice")
            entries[name] = entry
        begin = aligned(cursor.at, alignment)
        self._check_places(entries, begin, alignment)
        return {n: entry._replace(start=begin + entry.start) for n, entry in entries.items()}

    def _entry(self, cursor: _Cursor) -> tuple[str, Entry]:
        """A tensor's name and description, its place still counted from the start of the data."""
        name = cursor.text(MOST_NAME)
        axes = cursor.number(U32)
        if axes > 4:
            raise CheckpointError(f"{self.path}: {name!r} has {axes} axes, and 4 are possible")
        dims = [cursor.number(U64) for _ in range(axes)]
        number, start = cursor.number(U32), cursor.number(U64)
        if number not in TYPES:
            raise CheckpointError(
                f"{self.path}: {name!r} is of the unknown type {number}; a newer version of "
                f"numpygpt may know it"
            )
        kind, block, size = TYPES[number]
        row = dims[0] if dims else 1
        if row % block:
            raise CheckpointError(
                f"{self.path}: {name!r} has rows of {row} numbers, but {kind} has blocks of {block}"
            )
        return name, Entry(kind, tuple(dims[::-1]), start, math.prod(dims) // block * size)

    def _check_places(self, entries: Mapping[str, Entry], begin: int, alignment: int) -> None:
        """Refuse tensors that do not lie one behind the other, up to the file's last bytes."""
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
            expected = aligned(end, alignment)
            if entry.start != expected:
                what = "overlaps another tensor" if entry.start < end else "leaves a hole"
                what = "is not aligned" if entry.start % alignment else what
                raise CheckpointError(
                    f"{self.path}: {name!r} starts at data byte {entry.start}, expected "
                    f"{expected}: it {what}"
                )
            end = entry.start + entry.nbytes
        if entries and begin + end > self._file.size:
            raise CheckpointError(
                f"{self.path}: tensors end at byte {begin + end}, but the file has "
                f"{self._file.size}: truncated"
            )
        if self._file.size > aligned(begin + end, alignment):
            raise CheckpointError(
                f"{self.path}: {self._file.size - begin - end} bytes at its end belong to no tensor"
            )

    def _read(self, name: str, entry: Entry, dtype: np.dtype[Any]) -> Array:
        if entry.kind in FLOATS:
            return self._file.array(entry.kind, entry.start, entry.shape, dtype)
        if entry.kind not in QUANTISED:
            raise CheckpointError(
                f"{self.path}: {name} is {entry.kind}; expected one of "
                f"{', '.join(sorted({*FLOATS, *QUANTISED}))}"
            )
        return self._numbers(name, entry, dtype)

    def _numbers(self, name: str, entry: Entry, dtype: np.dtype[Any]) -> Array:
        """A quantised tensor as numbers, a few rows at a time."""
        try:
            dequantize = importlib.import_module("gguf.quants").dequantize
            kind = importlib.import_module("gguf.constants").GGMLQuantizationType[entry.kind]
        except (ImportError, AttributeError):
            raise CheckpointError(
                f"{self.path}: {name} is quantised as {entry.kind}, which takes the package gguf, "
                f'0.10 or later, to read; pip install "numpygpt[gguf]"'
            ) from None
        numbers = np.empty(entry.shape, dtype)
        if not entry.nbytes:
            return numbers
        rows = numbers.reshape(-1, entry.shape[-1])
        stored = np.frombuffer(self._file.map, np.uint8, entry.nbytes, entry.start)
        stored = stored.reshape(len(rows), -1)
        step = max(1, PIECE_BYTES // (4 * entry.shape[-1]))
        with np.errstate(all="ignore"):  # the caller names tensors that are not finite
            for start in range(0, len(rows), step):
                rows[start : start + step] = dequantize(stored[start : start + step], kind)
        return numbers


class _Cursor:
    """Takes one value after another from the start of a file."""

    def __init__(self, file: DataFile):
        self.file = file
        self.at = 0
        self._end = min(file.size, MOST_HEADER)
        self._pieces = MOST_PIECES

    def skip(self, count: int) -> int:
        """Step over bytes; returns where they begin."""
        start = self.at
        if count > self._end - start:
            what = "truncated"
            if self._end < self.file.size:
                what = f"numpygpt reads at most {MOST_HEADER} bytes before the first tensor"
            raise CheckpointError(
                f"{self.file.path}: expected {count} more bytes of its header at byte {start}, "
                f"received {self._end - start}: {what}"
            )
        self.at += count
        return start

    def number(self, kind: int) -> Any:
        layout = NUMBERS[kind]
        return layout.unpack_from(self.file.map, self.skip(layout.size))[0]

    def text(self, most: int = MOST_HEADER) -> str:
        length = self.number(U64)
        start = self.skip(length)
        if length > most:
            raise CheckpointError(
                f"{self.file.path}: a name of {length} bytes at byte {start}; {most} are read"
            )
        return self._decoded(start)

    def value(self, kind: int, keep_list: bool, depth: int = 0) -> Any:
        """The value that comes next, or None if it is only stepped over."""
        if kind in NUMBERS:
            return self.number(kind)
        if kind == TEXT:
            length = self.number(U64)
            start = self.skip(length)
            return self._decoded(start) if length <= LONG_TEXT else None
        if kind != ARRAY:
            raise CheckpointError(
                f"{self.file.path}: the value at byte {self.at} is of the unknown type {kind}"
            )
        if depth == MOST_DEPTH:
            raise CheckpointError(f"{self.file.path}: nested too deeply at byte {self.at}")
        return self._list(keep_list, depth)

    def _list(self, keep: bool, depth: int) -> Any:
        item, count = self.number(U32), self.number(U64)
        if item in NUMBERS:
            size = NUMBERS[item].size
            start = self.skip(count * size)
            dtype = np.dtype(NUMBERS[item].format)
            return np.frombuffer(self.file.map[start : self.at], dtype) if keep else None
        if count > self._pieces:
            raise CheckpointError(
                f"{self.file.path}: a list of {count} texts or lists at byte {self.at}; at most "
                f"{MOST_PIECES} are read of a file"
            )
        self._pieces -= count
        if item == TEXT and keep:
            return [self.text() for _ in range(count)]
        for _ in range(count):
            if item == TEXT:
                self.skip(self.number(U64))
            else:
                self.value(item, False, depth + 1)
        return None

    def _decoded(self, start: int) -> str:
        content = self.file.map[start : self.at]
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.file.path}: expected UTF-8 at byte {start}, received {content[:8]!r}"
            ) from None


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.file.map[cursor.skip(4) : 4]
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.file.path}: not GGUF, it begins with {magic!r}")
    version = cursor.number(U32)
    if version and version % 2**16 == 0:
        raise CheckpointError(
            f"{cursor.file.path}: big-endian GGUF; convert it with gguf-convert-endian of the "
            f"package gguf"
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{cursor.file.path}: version {version} of GGUF; numpygpt reads 2 and 3"
        )


def aligned(at: int, alignment: int) -> int:
    """The first multiple of `alignment` from `at` on.

    >>> aligned(33, 32), aligned(64, 32)
    (64, 64)
    """
    return (at + alignment - 1) // alignment * alignment
