"""The texts that are measured: exactly what a file holds, or an error.

A text is read twice, first to look at all of them before any work begins, then when its turn
comes; only standard input and pipes, which can be read once, are held.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import ArgumentError
from ..params import Array
from ..tokenizer import Tokenizer

__all__ = ["LARGEST", "STANDARD_INPUT", "Source", "argument", "encode", "named", "open_input"]

# Bytes. What is read of it is bounded, since a path can name a device that never ends.
LARGEST = 2**28

# Bytes of a piped text that a record stores; of a longer one it has the hash.
STORED = 2**16

STANDARD_INPUT = "-"

# Characters that are encoded at a time; tiktoken's list of ids is many times the text.
PIECE = 2**20

# Where a text can be cut without changing its tokens: before white space that follows something
# else. No word of GPT-2's pattern has white space after anything else. (Python takes a few
# characters more for white space than tiktoken does, so those that follow are named.)
BORDER = re.compile(r"(?<=\S)(?=[ \t\r\n])")


class Source(NamedTuple):
    """Where a text comes from, and which it is.

    Attributes
    ----------
    name : str
        The path as given; "-" is standard input.
    sha256 : str
        Of its bytes.
    size : int
        Bytes.
    data : bytes or None
        Those bytes; None if they are read again when they are needed.
    """

    name: str
    sha256: str
    size: int
    data: bytes | None = None

    @classmethod
    def look(cls, name: str) -> Source:
        """Read a text for the first time.

        Raises
        ------
        ArgumentError
            If it cannot be read, is empty, too large or not UTF-8.
        """
        data = _read(name)
        if not _decoded(name, data):
            raise ArgumentError(f"{_shown(name)}: empty, there is nothing to score")
        held = data if name == STANDARD_INPUT or not pathlib.Path(name).is_file() else None
        return cls(name, _sha256(data), len(data), held)

    @classmethod
    def from_record(cls, value: Any, record: str) -> Source:
        """What :meth:`describe` wrote.

        Raises
        ------
        ArgumentError
            If it is something else.
        """
        match value:
            case {"path": str(name), "sha256": str(sha256), "bytes": int(size), **rest}:
                text = rest.get("text")
                if text is None:
                    return cls(name, sha256, size)
                data = text.encode("utf-8", "replace") if isinstance(text, str) else b""
                if _sha256(data) != sha256:
                    raise ArgumentError(f"{record}: a text in it does not have the SHA-256 beside")
                return cls(name, sha256, len(data), data)
        raise ArgumentError(
            f"{record}: expected each text as an object with path, sha256 and bytes"
        )

    def describe(self) -> dict[str, Any]:
        """Its entry in a run record: path, SHA-256, bytes; if piped and short, the text itself."""
        entry: dict[str, Any] = {"path": self.name, "sha256": self.sha256, "bytes": self.size}
        if self.data is not None and self.size <= STORED:
            entry["text"] = self.data.decode()
        return entry

    def read(self) -> str:
        """The text.

        Raises
        ------
        ArgumentError
            If it has changed, or cannot be read any more.
        """
        data = _read(self.name) if self.data is None else self.data
        found = _sha256(data)
        if found != self.sha256:
            raise ArgumentError(
                f"{_shown(self.name)}: its content has changed: SHA-256 {found[:12]}... and "
                f"{len(data)} bytes, expected {self.sha256[:12]}... and {self.size}"
            )
        return _decoded(self.name, data)


def named(files: Sequence[str]) -> list[str]:
    """The names of the texts: those given, else standard input if something is piped in.

    Raises
    ------
    ArgumentError
        If there is nothing to read, or standard input is named twice.
    """
    if files.count(STANDARD_INPUT) > 1:
        raise ArgumentError("standard input (-) can be read once only")
    if not files and (sys.stdin is None or sys.stdin.isatty()):
        raise ArgumentError("there is no text: name files, or pipe one in")
    return list(files) or [STANDARD_INPUT]


def argument(name: str, value: str) -> str:
    """The text of a command-line argument, which Python holds with stand-ins for wrong bytes."""
    return _decoded(name, os.fsencode(value))


@contextlib.contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """A text to read from its beginning. Standard input stays open.

    Raises
    ------
    ArgumentError
        If it cannot be opened.
    """
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise ArgumentError("there is no standard input to read")
        yield sys.stdin.buffer
        return
    try:
        if pathlib.Path(name).is_dir():
            raise ArgumentError(f"{name}: a directory; name the files in it")
        file = open(name, "rb")  # noqa: SIM115  # closed below
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        yield file


def encode(tokenizer: Tokenizer, text: str) -> Array:
    """The token ids of a text, (T,), encoded in pieces so that memory stays near the text's.

    >>> gpt2 = Tokenizer.gpt2()
    >>> encode(gpt2, "Hello world").tolist() == gpt2.encode("Hello world")
    True
    """
    parts, start = [], 0
    while start < len(text):
        border = BORDER.search(text, start + PIECE)
        stop = border.start() if border else len(text)
        parts.append(np.array(tokenizer.encode(text[start:stop]), np.int32))
        start = stop
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _read(name: str) -> bytes:
    """The bytes of a text, at most :data:`LARGEST`."""
    with open_input(name) as file:
        try:
            data = file.read(LARGEST + 1)
        except OSError as error:
            raise ArgumentError(f"{_shown(name)}: {error.strerror}") from None
    if len(data) > LARGEST:
        raise ArgumentError(
            f"{_shown(name)}: over {LARGEST // 2**20} MiB, the most for one text; split it"
        )
    return data


def _sha256(data: bytes) -> str:
    import hashlib  # slow, and a verb that reads no text needs it not

    return hashlib.sha256(data).hexdigest()


def _decoded(name: str, data: bytes) -> str:
    """Text from UTF-8, without a byte-order mark. What is measured must be exact."""
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = mark + error.start
        raise ArgumentError(
            f"{_shown(name)}: not UTF-8 at byte {at} (0x{data[at]:02x}); convert it first, such as "
            "with iconv -f latin1 -t utf-8"
        ) from None
    return text


def _shown(name: str) -> str:
    return "standard input" if name == STANDARD_INPUT else name
