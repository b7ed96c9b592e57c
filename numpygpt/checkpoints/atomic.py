"""Files and directories that are there whole or not at all.

What is written goes to a neighbour called ``.NAME.xxxxxxxx.partial``, is flushed to the disk and
then renamed. Whoever is stopped on the way leaves at most that neighbour behind.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import NumpyGPTError, OutputError

__all__ = ["new_directory", "new_file", "require_absent", "require_room"]


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends well.

    Parameters
    ----------
    path : pathlib.Path
        Must not exist; its directory is made.

    Yields
    ------
    binary file

    Raises
    ------
    OutputError
        If `path` exists, or the disk refuses.
    """
    with _told(path):
        partial = _neighbour(path)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _refuse_existing(path)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to fill, which gets its name when the block ends well.

    Parameters
    ----------
    path : pathlib.Path
        Must not exist, or be empty; the directory above it is made.

    Yields
    ------
    pathlib.Path
        Where to write.

    Raises
    ------
    OutputError
        If `path` exists and is not empty, or the disk refuses.
    """
    with _told(path):
        partial = _neighbour(path)
        partial.mkdir()
        try:
            yield partial
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            _refuse_existing(path)
            if path.exists():  # and is empty
                shutil.copymode(path, partial)
                path.rmdir()
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(path.parent)


def require_room(path: pathlib.Path, size: int) -> None:
    """Refuse what cannot fit, before any time is spent on it.

    Parameters
    ----------
    path : pathlib.Path
        What is to be written.
    size : int
        Bytes it will take.

    Raises
    ------
    OutputError
        If its disk has less room.
    """
    with _told(path):
        above = next(place for place in (path, *path.absolute().parents) if place.exists())
        free = shutil.disk_usage(above).free
    if free < size:
        raise OutputError(
            f"{path}: needs {size / 1e6:,.0f} MB, but its disk has only {free / 1e6:,.0f} MB free"
        )


def _neighbour(path: pathlib.Path) -> pathlib.Path:
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{os.urandom(4).hex()}.partial"


def require_absent(path: pathlib.Path) -> None:
    """Refuse to write over anything.

    Parameters
    ----------
    path : pathlib.Path
        May be an empty directory.

    Raises
    ------
    OutputError
        If something is there.
    """
    with _told(path):
        _refuse_existing(path)


def _refuse_existing(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise OutputError(f"{path}: is there already and not empty; name another, or remove it")
    elif path.exists() or path.is_symlink():
        raise OutputError(f"{path}: is there already; name another, or remove it")


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """Turn what the operating system says of `path` into an OutputError."""
    try:
        yield
    except NumpyGPTError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}: cannot be written: {reason}; nothing was left there") from None


def _sync(path: pathlib.Path) -> None:
    """Have a file's or directory's contents reach the disk, where the system can be asked to."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
