"""The part of MessagePack in which Flax stores parameters, read without touching the numbers.

A file is one value. Maps with text as keys lead to extension values, and those hold arrays. What
else MessagePack has (signed integers, floats, times) does not occur in such a file and is refused.

Every length is checked against the bytes that are left before it is believed. A value of one byte
becomes a Python object of up to 300, so the number of values is limited as well.

References
----------
https://github.com/msgpack/msgpack/blob/master/spec.md, section "Formats".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import CheckpointError
from .arrays import DataFile

__all__ = ["Extension", "Span", "unpack"]

# gpt2-xl has 580 arrays and 438 maps inside each other, all with a key: 2037 values in all. Ten
# times that is enough.
MOST_VALUES = 25_000
# params, transformer, h, a layer, attn, c_attn and kernel are 7 maps in each other, and the
# pieces of a divided array lie 2 further down.
MOST_DEPTH = 16
# The longest text Flax writes is "__msgpack_chunked_array__".
MOST_TEXT = 255

# From a value's first byte to the number of bytes that its length, or its number, takes.
INTEGERS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
LISTS = {0xDC: 2, 0xDD: 4}
MAPS = {0xDE: 2, 0xDF: 4}
EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
# Values that are told by their first byte alone, and extensions whose length is.
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
SHORT_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class Span(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    start: int
    stop: int


class Extension(NamedTuple):
    """A value of a type that the writer has defined: its code, and where its bytes lie."""

    code: int
    span: Span


def unpack(file: DataFile, span: Span, most: int = MOST_VALUES) -> Any:
    """The one value in a part of a file.

    Parameters
    ----------
    file : DataFile
    span : Span
        The bytes that the value must fill.
    most : int
        How many values it may consist of.

    Returns
    -------
    object
        Maps become dicts, lists and text themselves; binary data becomes the :class:`Span` where
        it lies, and an extension value an :class:`Extension`.

    Raises
    ------
    CheckpointError
        If it is damaged, too large, or of a type that Flax does not write.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.msgpack"
    >>> path.write_bytes(bytes.fromhex("81 a161 93 07 c402ffff c0"))
    10
    >>> unpack(DataFile(path), Span(0, 10))
    {'a': [7, Span(start=7, stop=9), None]}
    """
    cursor = _Cursor(file, span, most)
    value = cursor.value(0)
    if cursor.at != span.stop:
        raise cursor.refusal(f"expected the end, found {span.stop - cursor.at} more bytes")
    return value


class _Cursor:
    """A place in a file that moves on as values are read."""

    def __init__(self, file: DataFile, span: Span, most: int):
        self.file, self.at, self.stop = file, span.start, span.stop
        self.most = self.left = most

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: byte {self.at}: {what}")

    def value(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.refusal(f"expected at most {self.most} values, found more")
        if depth > MOST_DEPTH:
            raise self.refusal(f"maps are nested more than {MOST_DEPTH} deep")
        kind = self.number(1)
        if kind < 0x80:
            return kind
        if kind < 0x90:
            return self.mapping(kind & 0x0F, depth)
        if kind < 0xA0:
            return self.sequence(kind & 0x0F, depth)
        if kind < 0xC0:
            return self.text(kind & 0x1F)
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        if kind in INTEGERS:
            return self.number(INTEGERS[kind])
        if kind in TEXTS:
            return self.text(self.number(TEXTS[kind]))
        if kind in BINARIES:
            return self.take(self.number(BINARIES[kind]))
        if kind in LISTS:
            return self.sequence(self.number(LISTS[kind]), depth)
        if kind in MAPS:
            return self.mapping(self.number(MAPS[kind]), depth)
        if kind in SHORT_EXTENSIONS:
            return self.extension(SHORT_EXTENSIONS[kind])
        if kind in EXTENSIONS:
            return self.extension(self.number(EXTENSIONS[kind]))
        raise self.refusal(f"a value of the type {kind:#x}, which no Flax parameters hold")

    def take(self, count: int) -> Span:
        if count > self.stop - self.at:
            raise self.refusal(f"expected {count} more bytes, received {self.stop - self.at}")
        self.at += count
        return Span(self.at - count, self.at)

    def number(self, count: int) -> int:
        start, stop = self.take(count)
        return int.from_bytes(self.file.map[start:stop], "big")

    def text(self, count: int) -> str:
        if count > MOST_TEXT:
            raise self.refusal(f"a text of {count} bytes, expected at most {MOST_TEXT}")
        start, stop = self.take(count)
        try:
            return self.file.map[start:stop].decode("utf-8")
        except UnicodeDecodeError:
            raise self.refusal("a text that is not UTF-8") from None

    def sequence(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(count)]

    def mapping(self, count: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise self.refusal(f"expected text as a key, received {type(key).__name__}")
            if key in found:
                raise self.refusal(f"the key {key[:80]!r} stands in one map twice")
            found[key] = self.value(depth + 1)
        return found

    def extension(self, count: int) -> Extension:
        return Extension(self.number(1), self.take(count))
