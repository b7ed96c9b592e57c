"""Results that outlive a run: a file of JSON lines to which each is appended at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ArgumentError, OutputError
from ..params import Array
from ..records import plain

__all__ = ["Journal", "key_of"]

# How each line begins. What does not begin so was written by somebody else and stays as it is.
OPENING = b'{"numpygpt_perplexity": '
VERSION = 1

# Bytes of a file that is read.
LARGEST = 2**28


def key_of(
    sha256: str, ids: Array, model: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result depends on. Results with equal keys are the same, up to rounding.

    Parameters
    ----------
    sha256 : str
        Of the text.
    ids : (T,) ndarray of int
        Its tokens, so that another vocabulary is another key.
    model : mapping
        As :func:`numpygpt.records.describe` returns it. Its name does not matter.
    settings : mapping
    """
    tokens = hashlib.sha256(ids.astype("<i4").data).hexdigest()
    own = {name: model[name] for name in ("dtype", "config", "weights_sha256")}
    key: dict[str, Any] = plain(
        {"numpygpt": __version__, "text": sha256, "tokens": tokens, **own, **settings}
    )
    return key


class Journal:
    """The results of earlier runs and of this one.

    Parameters
    ----------
    path : str
        Made if it does not exist. A last line that was cut off, by a crash or a full disk, is
        ignored and goes when the next line is written.

    Attributes
    ----------
    taken : int
        How many results have been found in it.

    Raises
    ------
    OutputError
        If it cannot be written.
    ArgumentError
        If it holds something else than such results: nothing in it is changed.
    """

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.results: dict[str, dict[str, Any]] = {}
        self.taken = 0
        try:
            if self.path.exists() and not self.path.is_file():
                raise OutputError(f"{path}: not a regular file")
            with self.path.open("a+b") as file:
                file.seek(0)
                data = file.read(LARGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            if isinstance(error, OutputError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{path}: cannot be written: {reason}") from None
        if len(data) > LARGEST:
            raise ArgumentError(f"{path}: over {LARGEST // 2**20} MiB; name a new file")
        self._read_bytes, self._whole_bytes = len(data), self._read(data)

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result with this key, or None."""
        known = self.results.get(_text(key))
        self.taken += known is not None
        return known

    def append(self, key: Mapping[str, Any], name: str, result: Mapping[str, Any]) -> None:
        """Write a result; when this returns, it is on the disk.

        Raises
        ------
        OutputError
            If the disk refuses.
        """
        line = {"numpygpt_perplexity": VERSION, "text": name, "key": key, "result": plain(result)}
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            self._cut()
            # Opened for appending and written at once, so that lines of other processes that use
            # the file at the same time stay whole.
            with self.path.open("ab", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.results[_text(key)] = dict(result)

    def _cut(self) -> None:
        """Remove a last line that was cut off, unless somebody else has written meanwhile."""
        if self._whole_bytes < self._read_bytes == self.path.stat().st_size:
            os.truncate(self.path, self._whole_bytes)
        self._read_bytes = self._whole_bytes

    def _read(self, data: bytes) -> int:
        """Take in all whole lines; return how many bytes they are."""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            self._take(line, number)
        if not rest.startswith(OPENING[: len(rest)]):
            raise self._foreign(len(lines) + 1)
        return len(data) - len(rest)

    def _take(self, line: bytes, number: int) -> None:
        try:
            value = json.loads(line) if line.startswith(OPENING) else None
        except (ValueError, RecursionError):
            value = None
        match value:
            case {
                "numpygpt_perplexity": int(version),
                "key": dict(key),
                "result": {
                    "count": int(),
                    "bytes": int(),
                    "nll": int() | float(),
                    "standard_error": None | int() | float(),
                } as result,
            } if len(result) == 4:
                if version == VERSION:
                    error = result["standard_error"]
                    known = {**result, "standard_error": np.nan if error is None else error}
                    self.results[_text(key)] = known
            case _:
                raise self._foreign(number)

    def _foreign(self, number: int) -> ArgumentError:
        return ArgumentError(
            f"{self.path}: line {number} is not a result of numpygpt perplexity; nothing in the "
            "file was changed; name another"
        )


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
