"""JSON from files that nobody has checked."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ..errors import ConfigError, NumpyGPTError

__all__ = ["parse_json", "read_small", "require_regular"]


def parse_json(text: bytes, source: str, kind: type[NumpyGPTError] = ConfigError) -> dict[str, Any]:
    """A JSON object with distinct keys; anything else is an error that names `source`."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise kind(f"{source}: the key {name[:80]!r} stands in it twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    except RecursionError:
        raise kind(f"{source}: nested too deeply to be read") from None
    except NumpyGPTError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise kind(f"{source}: expected JSON, but {error}") from None
    if not isinstance(value, dict):
        raise kind(f"{source}: expected a JSON object, received {type(value).__name__}")
    return value


def require_regular(path: pathlib.Path, kind: type[NumpyGPTError]) -> None:
    """Refuse what is there but is no file: opening a named pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise kind(f"{path}: not a regular file")


def read_small(path: pathlib.Path, kind: type[NumpyGPTError] = ConfigError) -> bytes:
    """A file of at most 1 MiB, which every config and index of a GPT-2 is."""
    try:
        require_regular(path, kind)
        with path.open("rb") as file:
            text = file.read(2**20 + 1)
    except (FileNotFoundError, NumpyGPTError):
        raise
    except OSError as error:
        raise kind(f"{path}: {error.strerror}") from None
    if len(text) > 2**20:
        raise kind(f"{path}: over 1 MiB, which no GPT-2 config or index is")
    return text
