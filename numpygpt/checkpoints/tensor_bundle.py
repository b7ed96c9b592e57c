"""TensorFlow's checkpoint container: an index, and one or more files of raw data beside it.

``model.ckpt.index`` is a sorted table from names to descriptions, in the layout of LevelDB's
tables: blocks of records, a block that says where those lie, and a footer. ``model.ckpt.data-``
``00000-of-00001`` holds the arrays one after the other, little-endian, in C order.

Every block of the index and every array has a checksum. Those of the index are verified when it is
opened, that of an array when it is read. Lengths are checked against the bytes that are there
before they are believed, and the arrays must tile the files of data exactly.

References
----------
google/leveldb, doc/table_format.md; tensorflow/tensorflow, tensor_bundle.proto, tensor_bundle.h
and table_options.h.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, ModelNotFoundError
from ..params import Array
from .arrays import FLOATS, DataFile, Tensor
from .crc32c import crc32c, masked

__all__ = ["read_bundle"]

MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER_BYTES = 48
# After each block: a byte that tells its compression, and a checksum of both.
TRAILER_BYTES = 5

# An index takes about 36 bytes for each array: 21 KB for gpt2-xl, 62 KB with Adam's moments.
MOST_INDEX_BYTES = 2**20
# gpt2-xl has 580 arrays, three times as many with Adam's moments.
MOST_ARRAYS = 10_000
# A key may share its beginning with the one before it, so a few bytes can stand for a long one.
# OpenAI's longest is "model/h47/attn/c_attn/w"; the value, a description, takes about 30 bytes.
MOST_RECORD_BYTES = 1000

# TensorFlow's numbers of types: our names, and the bytes of an element if that is fixed. Others
# need not be known, because only floating-point numbers can be read.
TYPES = {
    1: ("F32", 4), 2: ("F64", 8), 3: ("I32", 4), 4: ("U8", 1), 5: ("I16", 2), 6: ("I8", 1),
    7: ("text", 0), 9: ("I64", 8), 10: ("BOOL", 1), 14: ("BF16", 2), 17: ("U16", 2), 19: ("F16", 2),
    22: ("U32", 4), 23: ("U64", 8),
}  # fmt: skip


class Entry(NamedTuple):
    """What the index says of an array: bytes `start` to `stop` of the file number `shard`."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    stop: int
    checksum: int


def read_bundle(path: pathlib.Path) -> dict[str, Tensor]:
    """Every array of a TensorFlow checkpoint by its name, not read yet.

    Parameters
    ----------
    path : pathlib.Path
        The index; the files of data lie beside it and are called after it.

    Returns
    -------
    dict of str to Tensor
        In alphabetical order. An array's checksum is verified whenever it is loaded.

    Raises
    ------
    CheckpointError
        If the index is damaged, does not fit the files of data, or uses what is not supported:
        compression, big-endian numbers, variables stored in slices.
    ModelNotFoundError
        If a file of data is missing.
    """
    if path.suffix != ".index":
        raise CheckpointError(
            f"{path}: expected a name that ends in .index, because the files of data beside it "
            f"are called after it; give it its name back, or, if there are none, restore this "
            f"checkpoint of TensorFlow's first format with TensorFlow and save it again"
        )
    index = DataFile(path)
    if index.size > MOST_INDEX_BYTES:
        raise CheckpointError(f"{path}: over 1 MiB, which no index of a GPT-2 is")
    try:
        shards, entries = _parse(bytes(index.map))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    by_shard: dict[int, dict[str, Entry]] = {}
    for name, entry in entries.items():
        by_shard.setdefault(entry.shard, {})[name] = entry
    files = {shard: _data_file(path, shard, shards) for shard in sorted(by_shard)}
    for shard, held in by_shard.items():
        _check_tiling(files[shard], held)
    return {name: _tensor(files[entry.shard], name, entry) for name, entry in entries.items()}


# -- files of data --------------------------------------------------------------------------------


def _data_file(path: pathlib.Path, shard: int, shards: int) -> DataFile:
    file = path.with_name(f"{path.stem}.data-{shard:05d}-of-{shards:05d}")
    if not os.path.exists(file):  # Path.exists raises if the name is too long
        raise ModelNotFoundError(f"{file}: not found, but {path.name} says it holds arrays")
    return DataFile(file)


def _check_tiling(file: DataFile, held: Mapping[str, Entry]) -> None:
    """Refuse arrays that overlap, leave bytes out or lie outside of their file."""
    end = 0
    for name, entry in sorted(held.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps the array before it" if entry.start < end else "leaves a hole"
            raise CheckpointError(
                f"{file.path}: {name} starts at byte {entry.start}, expected {end}: it {what}"
            )
        end = entry.stop
    if end != file.size:
        what = "truncated" if end > file.size else "data that belongs to no array"
        raise CheckpointError(
            f"{file.path}: its arrays end at byte {end}, the file at byte {file.size}: {what}"
        )


def _tensor(file: DataFile, name: str, entry: Entry) -> Tensor:
    def load(dtype: np.dtype[Any]) -> Array:
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: {name} is {entry.dtype}; expected one of {', '.join(FLOATS)}"
            )
        checksum = masked(crc32c(memoryview(file.map)[entry.start : entry.stop]))
        if checksum != entry.checksum:
            raise CheckpointError(
                f"{file.path}: {name} is damaged: its checksum is {checksum:08x}, expected "
                f"{entry.checksum:08x}; fetch the file again"
            )
        return file.array(entry.dtype, entry.start, entry.shape, dtype)

    return Tensor(entry.dtype, entry.shape, entry.stop - entry.start, load)


# -- the index: what its records mean -------------------------------------------------------------


def _parse(table: bytes) -> tuple[int, dict[str, Entry]]:
    """The number of files of data, and what is in them."""
    records = _records(table)
    key, header = next(records, (b"?", b""))
    if key:
        raise CheckpointError("expected a header under the empty name, found none")
    shards = _shards(header)
    entries: dict[str, Entry] = {}
    for key, value in records:
        if len(entries) == MOST_ARRAYS:
            raise CheckpointError(f"over {MOST_ARRAYS} arrays, which no GPT-2 has")
        name = _name(key)
        try:
            entries[name] = _entry(value, shards)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
    return shards, entries


def _name(key: bytes) -> str:
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError:
        name = "\0"
    if not name.isprintable():
        raise CheckpointError(
            f"the name {key[:80]!r} is no text; a slice of a partitioned variable? Save the "
            f"variables whole"
        )
    return name


def _shards(message: bytes) -> int:
    """The number of files of data, from the message BundleHeaderProto."""
    header = _message(message, {1: int, 2: int, 3: bytes})
    shards: int = header.get(1, 0)
    if header.get(2, 0):
        raise CheckpointError(
            "its numbers are big-endian; write it again with TensorFlow on a little-endian machine"
        )
    if not 1 <= shards <= 99999:  # five digits in the names of the files
        raise CheckpointError(f"expected 1 to 99999 files of data, received {shards}")
    least = _message(header.get(3, b""), {1: int, 2: int}).get(2, 0)
    if least > 1:
        raise CheckpointError(f"needs a reader of version {least}, and this is one of version 1")
    return shards


def _entry(message: bytes, shards: int) -> Entry:
    """An array's description, from the message BundleEntryProto."""
    if any(number == 7 for number, _ in _fields(message)):
        raise CheckpointError(
            "a partitioned variable, stored in slices; OpenAI's GPT-2 has none: save it whole"
        )
    fields = _message(message, {1: int, 2: bytes, 3: int, 4: int, 5: int, 6: bytes})
    number, shard, start, size = (fields.get(key, 0) for key in (1, 3, 4, 5))
    dtype, item = TYPES.get(number, (f"TensorFlow's type {number}", 0))
    shape = _shape(fields.get(2, b""))
    if shard >= shards:
        raise CheckpointError(f"is in file of data {shard}, but there are only {shards}")
    if max(start, size) >= 2**62:
        raise CheckpointError(f"impossible place: {size} bytes from byte {start} on")
    needed = math.prod(shape) * item
    if item and size != needed:
        raise CheckpointError(
            f"has {size} bytes, but {dtype} of shape {list(shape)} takes {needed}"
        )
    checksum = int.from_bytes(fields.get(6, b""), "little")
    return Entry(dtype, shape, shard, start, start + size, checksum)


def _shape(message: bytes) -> tuple[int, ...]:
    """The sizes in a message TensorShapeProto."""
    shape: list[int] = []
    for number, value in _fields(message):
        if number != 2 or not isinstance(value, bytes):
            raise CheckpointError("has a shape of unknown rank")
        shape.append(_message(value, {1: int}).get(1, 0))
        # The product counts empty axes as 1: NumPy refuses (0, 2**62) although it has no elements.
        if len(shape) > 8 or math.prod(size or 1 for size in shape) >= 2**48:
            raise CheckpointError(f"has an impossible shape: {shape}")
    return tuple(shape)


# -- protocol buffers -----------------------------------------------------------------------------


def _message(message: bytes, kinds: Mapping[int, type]) -> dict[int, Any]:
    """The fields of a message that are known by number; fields with their default are not in it."""
    found: dict[int, Any] = {}
    for number, value in _fields(message):
        if number in kinds:
            if number in found or not isinstance(value, kinds[number]):
                raise CheckpointError(
                    f"field {number} of a description is repeated, or of another kind"
                )
            found[number] = value
    return found


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an integer, or the bytes of anything else."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise CheckpointError(f"expected a field, found one of the unknown kind {kind}")
        if size > len(message) - at:
            raise CheckpointError(f"a field of {size} bytes where {len(message) - at} are left")
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and the place after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(data):
            break
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            if shift and not byte:
                break
            return value, at
    raise CheckpointError("a number that has no end, or is longer than it need be")


# -- the table ------------------------------------------------------------------------------------


class Block(NamedTuple):
    """`size` bytes from `start` on, before the trailer."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """The first byte after the trailer."""
        return self.start + self.size + TRAILER_BYTES


def _records(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table: its data blocks, which an index block lists."""
    if len(table) < FOOTER_BYTES or table[-8:] != MAGIC:
        raise CheckpointError(
            f"{len(table)} bytes, expected a table with its magic number at the end"
        )
    footer = table[-FOOTER_BYTES:-8]
    meta, at = _handle(footer, 0)
    index, at = _handle(footer, at)
    # Blocks without a gap: data, meta, index. So no byte but the footer's is without a checksum.
    if any(footer[at:]) or index.stop != len(table) - FOOTER_BYTES or meta.stop != index.start:
        raise CheckpointError("the blocks that its footer names do not fill the file: truncated?")
    _content(table, meta)  # names filters for faster searching, which TensorFlow does not write
    end, before = 0, None
    for last, value in _pairs(_content(table, index)):
        block, at = _handle(value, 0)
        if at != len(value) or block.start != end or block.stop > meta.start:
            raise CheckpointError(f"expected a block at byte {end}, found {block.start}")
        end = block.stop
        for key, value in _pairs(_content(table, block)):
            if (before is not None and key <= before) or key > last:
                raise CheckpointError(f"the name {key[:80]!r} stands in the wrong place, or twice")
            before = key
            yield key, value
    if end != meta.start:
        raise CheckpointError(f"its data blocks end at byte {end}, expected {meta.start}")


def _handle(data: bytes, at: int) -> tuple[Block, int]:
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return Block(start, size), at


def _content(table: bytes, block: Block) -> bytes:
    """The bytes of a block, verified."""
    content = table[block.start : block.start + block.size + 1]
    checksum = table[block.stop - 4 : block.stop]
    if masked(crc32c(content)) != int.from_bytes(checksum, "little"):
        raise CheckpointError(
            f"the checksum of the block at byte {block.start} does not hold; fetch the file again"
        )
    if compression := content[-1]:
        name = {1: "snappy"}.get(compression, f"the unknown method {compression}")
        raise CheckpointError(
            f"compressed with {name}; TensorFlow's Saver writes an index without compression: "
            f"restore the checkpoint with TensorFlow and save it again"
        )
    return content[:-1]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key is stored without what it shares with the one before."""
    restarts = int.from_bytes(block[-4:], "little")  # where whole keys stand, for searching
    stop = len(block) - 4 - 4 * restarts
    if stop <= 0:
        raise CheckpointError(
            f"a block of {len(block)} bytes with {restarts} places to start at has no records"
        )
    key, at = b"", 0
    while at < stop:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        most = min(MOST_RECORD_BYTES - shared, stop - at)
        if shared > len(key) or own + length > most:
            raise CheckpointError(f"a name of {shared} + {own} bytes with {length} bytes of value")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length
