"""What ``trace`` and ``verify`` share: tokens and chunks as options, files that may be replaced."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..checkpoints.atomic import require_absent
from ..checkpoints.json_files import read_small
from ..errors import ArgumentError, OutputError

__all__ = ["chunks_of", "ids_of", "replacing", "require_writable", "silent"]

# Numbers with commas or blanks between them, perhaps in brackets.
LIST = re.compile(r"[\s\d,\[\]+-]*\d[\s\d,\[\]+-]*")


def ids_of(text: str) -> list[Any]:
    """Token ids from an option: a list, or the name of a file with one.

    A file is JSON or plain text of at most 1 MiB, or NumPy's ``.npy``.

    Returns
    -------
    list of int, or list of list of int
        Which tokens exist is not looked at.

    Raises
    ------
    ArgumentError

    Examples
    --------
    >>> ids_of("46, 1 2"), ids_of("[[46, 1], [2, 3]]")
    ([46, 1, 2], [[46, 1], [2, 3]])
    """
    if LIST.fullmatch(text):
        return _parsed(text, "--ids")
    path = pathlib.Path(text)
    if path.suffix == ".npy":
        return _loaded(path)
    try:
        data = read_small(path, ArgumentError)
        return _parsed(data.decode("utf-8-sig"), text)
    except FileNotFoundError:
        raise ArgumentError(
            f"--ids expects token ids such as 15496,995 or a file with them, not {text[:40]!r}"
        ) from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{text}: expected token ids as text, JSON or .npy") from None


def chunks_of(text: str) -> list[int]:
    """How many tokens each pass reads, from ``--chunks``.

    >>> chunks_of("5,1,1")
    [5, 1, 1]
    """
    try:
        chunks = [int(number) for number in text.split(",")]
    except ValueError:
        chunks = [0]
    if min(chunks) < 1:
        raise ArgumentError(f"--chunks expects numbers from 1 up, such as 5,1,1, not {text[:40]!r}")
    return chunks


def _parsed(text: str, source: str) -> list[Any]:
    """Ids from JSON, or from numbers with something between them."""
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            found = [int(number) for number in re.split(r"[\s,]+", text.strip(" \t\r\n,"))]
    except (ValueError, RecursionError):
        found = None
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    if not all(isinstance(row, list) and row and all(type(i) is int for i in row) for row in rows):
        raise ArgumentError(f"{source}: expected token ids, one list or a list of lists")
    assert isinstance(found, list)
    return found


def _loaded(path: pathlib.Path) -> list[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    integers = isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.size > 0
    if not integers or array.ndim not in (1, 2):
        raise ArgumentError(f"{path}: expected integers, (T,) or (B, T)")
    ids: list[Any] = array.tolist()
    return ids


# -- output ------------------------------------------------------------------------------------


def silent() -> bool | None:
    """What tqdm is told: to show nothing (True), or only where standard error is a terminal."""
    return True if sys.stderr is None else None


def require_writable(name: str, overwrite: bool) -> pathlib.Path:
    """Refuse what cannot become a file, before any time is spent.

    Raises
    ------
    ArgumentError
        If it is no name of a file.
    OutputError
        If something is there that must not be replaced, or the directory cannot be written into.
    """
    path = pathlib.Path(name)
    if not name or path.is_dir():
        raise ArgumentError(f"expected the name of a file to write, not {name!r}")
    if not (overwrite and path.is_file()):
        try:
            require_absent(path)
        except OutputError as error:
            raise OutputError(f"{error}, or give --overwrite") from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{name}: {path.parent} is no directory that can be written into")
    return path


@contextlib.contextmanager
def replacing(path: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """Where to write a new file: at `path`, or beside the one that it then replaces.

    Parameters
    ----------
    path : pathlib.Path
    overwrite : bool
        Whether a file that is there may be replaced. It is, whole, when the block ends well.

    Yields
    ------
    pathlib.Path
        Nothing is there.

    Raises
    ------
    OutputError
        If the system refuses to replace it.
    """
    if not (overwrite and path.is_file()):
        yield path
        return
    beside = path.with_name(f".{os.urandom(4).hex()}.{path.name}")
    try:
        yield beside
        beside.replace(path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be replaced: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
