"""A small writer of what torch.save writes: pickles out of opcodes, and both kinds of file.

It follows the formats' descriptions (the opcodes of the standard library's ``pickle``, the zip
specification, the layout that torch/serialization.py documents) and shares no code with the reader
under test. Everything can be written wrong on purpose.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
    "uint16": "BFloat16Storage", "int64": "LongStorage", "uint8": "ByteStorage",
    "bool": "BoolStorage",
}  # fmt: skip

# -- opcodes -----------------------------------------------------------------------------------


def text(string: str) -> bytes:
    """BINUNICODE."""
    content = string.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    """BININT, or LONG1 for more than 32 bits."""
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(content)]) + content


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL, whose names may hold anything."""
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def put(index: int) -> bytes:
    """LONG_BINPUT: remember the top of the stack."""
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    """LONG_BINGET: push what was remembered."""
    return pickle.LONG_BINGET + struct.pack("<I", index)


def tuple_of(*parts: bytes) -> bytes:
    """MARK ... TUPLE."""
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + tuple_of(*arguments) + pickle.REDUCE


def dict_of(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """EMPTY_DICT and SETITEMS."""
    inside = b"".join(key + value for key, value in items)
    return pickle.EMPTY_DICT + pickle.MARK + inside + pickle.SETITEMS


def program(*parts: bytes, protocol: int = 2) -> bytes:
    """PROTO ... STOP."""
    return pickle.PROTO + bytes([protocol]) + b"".join(parts) + pickle.STOP


def value(plain: Any) -> bytes:
    """Opcodes of None, bool, int, float, str, and tuples, lists and dicts of them.

    ``bytes`` are taken for opcodes that are ready.
    """
    match plain:
        case bytes():
            return plain
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if plain else pickle.NEWFALSE
        case int():
            return number(plain)
        case float():
            return pickle.BINFLOAT + struct.pack(">d", plain)
        case str():
            return text(plain)
        case tuple():
            return tuple_of(*map(value, plain))
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(value, plain)) + pickle.APPENDS
        case dict():
            return dict_of((value(key), value(item)) for key, item in plain.items())
    raise TypeError(type(plain))


# -- tensors -----------------------------------------------------------------------------------

REBUILD = name("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = call(name("collections", "OrderedDict"))


def storage(kind: str, key: str, count: int, legacy: bool = False, view: Any = None) -> bytes:
    """The persistent id of a storage, and BINPERSID; `view` is (key, first, count)."""
    parts = [text("storage"), name("torch", kind), text(key), text("cpu"), number(count)]
    if legacy:
        parts.append(value(view))
    return tuple_of(*parts) + pickle.BINPERSID


def tensor(block: bytes, offset: Any, shape: Any, strides: Any) -> bytes:
    """``_rebuild_tensor_v2`` with its six arguments."""
    parts = [value(part) for part in (offset, shape, strides, False)]
    return call(REBUILD, block, *parts, ORDERED_DICT)


def steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of C order, in elements."""
    return tuple(int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape)))


class Saved(NamedTuple):
    """A state dict as opcodes, and the blocks of its numbers."""

    state: bytes
    blocks: dict[str, tuple[int, bytes]]  # key -> (elements, bytes)


def saved(arrays: Mapping[str, np.ndarray], legacy: bool = False) -> Saved:
    """A state dict; an array that stands in it under two names is stored once.

    uint16 arrays are written as bfloat16. C order only.
    """
    blocks: dict[str, tuple[int, bytes]] = {}
    keys: dict[int, str] = {}
    items = []
    for label, array in arrays.items():
        key = keys.setdefault(id(array), str(len(keys)))
        blocks[key] = (array.size, np.ascontiguousarray(array).tobytes())
        block = storage(STORAGES[array.dtype.name], key, array.size, legacy)
        items.append((text(label), tensor(block, 0, array.shape, steps(array.shape))))
    return Saved(dict_of(items), blocks)


# -- files -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A member of a zip archive. What is not None lies about it."""

    name: bytes
    data: bytes
    local_name: bytes | None = None
    size: int | None = None
    packed: int | None = None
    start: int | None = None
    flags: int = 0
    method: int = 0
    signature: bytes = b"PK\3\4"
    extra: bytes = b""


def zip_file(
    entries: Iterable[Entry], align: int = 1, comment: bytes = b"", shift: int = 0
) -> bytes:
    """A zip archive, stored; data begins at multiples of `align`.

    Parameters
    ----------
    entries : iterable of Entry
    align : int
        Bytes; the local header is padded with an extra field, as PyTorch does.
    comment : bytes
        Stands at the end.
    shift : int
        Added to where the directory is said to begin.
    """
    body, directory, count = bytearray(), bytearray(), 0
    for entry in entries:
        start = len(body)
        local = entry.name if entry.local_name is None else entry.local_name
        missing = -(start + 30 + len(local)) % align
        extra = b""
        if missing:
            while missing < 4:  # the field has a head of its own
                missing += align
            extra = b"FB" + struct.pack("<H", missing - 4) + b"Z" * (missing - 4)
        size = len(entry.data) if entry.size is None else entry.size
        packed = size if entry.packed is None else entry.packed
        same = (entry.flags, entry.method, 0, 0, zlib.crc32(entry.data), packed, size)
        body += entry.signature
        body += struct.pack("<HHHHHIIIHH", 20, *same, len(local), len(extra))
        body += local + extra + entry.data
        directory += b"PK\1\2" + struct.pack("<HHHHHHIIIHH", 20, 20, *same, len(entry.name),
                                             len(entry.extra))  # fmt: skip
        told = start if entry.start is None else entry.start
        directory += struct.pack("<HHHII", 0, 0, 0, 0, told % 2**32) + entry.name + entry.extra
        count += 1
    end = struct.pack("<HHHHIIH", 0, 0, count % 2**16, count % 2**16, len(directory),
                      (len(body) + shift) % 2**32, len(comment))  # fmt: skip
    return bytes(body + directory) + b"PK\5\6" + end + comment


def torch_entries(
    pickled: bytes, blocks: Mapping[str, bytes], root: str = "archive", order: bytes = b"little"
) -> list[Entry]:
    """The members of PyTorch's zip format."""
    named = {"data.pkl": pickled, "byteorder": order}
    named |= {f"data/{key}": data for key, data in blocks.items()}
    named["version"] = b"3\n"
    return [Entry(f"{root}/{label}".encode(), data) for label, data in named.items()]


def torch_zip(pickled: bytes, blocks: Mapping[str, bytes] | None = None, align: int = 64) -> bytes:
    """A file in PyTorch's zip format."""
    return zip_file(torch_entries(pickled, blocks or {}), align)


LEGACY_HEAD = program(number(MAGIC)) + program(number(VERSION))
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4}}


def torch_legacy(
    pickled: bytes,
    blocks: Mapping[str, tuple[int, bytes]] | None = None,
    keys: Any = None,
    machine: Any = MACHINE,
) -> bytes:
    """A file in PyTorch's format before 1.6: five pickles, then counts and numbers."""
    blocks = blocks or {}
    content = LEGACY_HEAD + program(value(machine)) + pickled
    content += program(value(list(blocks) if keys is None else keys))
    return content + b"".join(struct.pack("<q", count) + data for count, data in blocks.values())


def save(arrays: Mapping[str, np.ndarray], legacy: bool = False, wrap: Any = None) -> bytes:
    """A whole file with a state dict; `wrap` makes the saved object out of its opcodes."""
    state, blocks = saved(arrays, legacy)
    pickled = program(wrap(state) if wrap else state)
    if legacy:
        return torch_legacy(pickled, blocks)
    return torch_zip(pickled, {key: data for key, (_, data) in blocks.items()})


# -- damage ------------------------------------------------------------------------------------


def cuts(path: pathlib.Path, step: int = 1) -> Iterator[int]:
    """Shorten a file in place; yields each size from the largest to nothing."""
    for size in reversed(range(0, path.stat().st_size, step)):
        os.truncate(path, size)
        yield size


def changes(path: pathlib.Path, masks: tuple[int, ...], step: int = 1) -> Iterator[int]:
    """Change one byte of a file in place, by one mask after the other; yields its place.

    The byte is put back before the next one is changed.
    """
    content = path.read_bytes()
    for turn, place in enumerate(range(0, len(content), step)):
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            file.write(bytes([content[place] ^ masks[turn % len(masks)]]))
        yield place
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            file.write(content[place : place + 1])
