"""NumPy's ``.npz``: an archive of arrays, with the config as the member ``config.json``.

``numpy.load`` opens the files written here, and a file of other programs that has the names of
the Hugging Face layout can be read.
"""

from __future__ import annotations

import io
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from ..errors import CheckpointError
from .archives import Member, StoredZip
from .arrays import FLOATS, Tensor, write_array
from .json_files import parse_json
from .names import canonical
from .source import Source

__all__ = ["is_npz", "read", "write"]

KINDS = {dtype: kind for kind, dtype in FLOATS.items() if kind != "BF16"}


def is_npz(archive: StoredZip) -> bool:
    """Whether a zip archive holds NumPy arrays.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "arrays.npz")
    >>> np.savez(path, x=np.ones(3))
    >>> is_npz(StoredZip(path))
    True
    """
    return any(name.endswith(".npy") for name in archive.members)


def read(path: pathlib.Path) -> Source:
    """Describe an ``.npz`` file.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Source

    Raises
    ------
    CheckpointError
        If it is damaged, compressed, or holds Python objects.
    """
    archive = StoredZip(path)
    stored = {
        name.removesuffix(".npy"): _tensor(archive, name, member)
        for name, member in archive.members.items()
        if name.endswith(".npy")
    }
    tensors, notes = canonical(stored, path)
    source = Source("NumPy .npz", path.parent, tensors, notes=notes)
    if "config.json" in archive.members:
        text = archive.read("config.json", 2**20)
        source.fields = parse_json(text, f"{path}: config.json", CheckpointError)
    return source


def write(
    file: BinaryIO,
    config: bytes,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """Write an ``.npz`` file.

    Parameters
    ----------
    file : binary file
    config : bytes
        What ``config.json`` would hold.
    tensors : mapping of str to Tensor
    kinds : mapping of str to str
        Type in which each is stored: F64, F32 or F16.
    advance : callable
        Told how many bytes of arrays were written.

    Raises
    ------
    CheckpointError
        If a type has no NumPy dtype, or a number does not fit it.
    """
    if unknown := set(kinds.values()) - set(KINDS.values()):
        raise CheckpointError(
            f"NumPy has no dtype for {unknown.pop()}; choose float32 or float16 for .npz"
        )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_info("config.json"), config)
        for name, tensor in tensors.items():
            kind = kinds[name]
            header = io.BytesIO()
            described = np.lib.format.header_data_from_array_1_0(np.empty(0, FLOATS[kind]))
            np.lib.format.write_array_header_1_0(header, {**described, "shape": tensor.shape})
            with archive.open(_info(f"{name}.npy"), "w", force_zip64=True) as member:
                member.write(header.getvalue())
                write_array(member, tensor.read(tensor.exact), kind, advance, name)


def _info(name: str) -> zipfile.ZipInfo:
    """A member with a fixed date, so that the same model gives the same file."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _tensor(archive: StoredZip, name: str, member: Member) -> Tensor:
    """The description of one member, whose header NumPy itself reads."""
    path = archive.file.path
    # NumPy's own limit on a header is 10,000 characters.
    head = io.BytesIO(archive.file.map[member.start : member.start + min(member.size, 2**14)])
    try:
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
    except (ValueError, TypeError, OSError, SyntaxError) as error:
        raise CheckpointError(
            f"{path}: {name[:80]!r} is no NumPy array: {str(error)[:120]}"
        ) from None
    kind = KINDS.get(dtype)
    if kind is None:
        raise CheckpointError(
            f"{path}: {name[:80]!r} is {dtype}; expected one of {', '.join(map(str, KINDS))}"
        )
    steps: list[int] = []
    count = 1
    for size in shape:
        if not 0 <= size < 2**48 or len(shape) > 8:
            raise CheckpointError(f"{path}: {name[:80]!r} has an impossible shape")
        steps.append(count)
        count *= size
    if head.tell() + count * dtype.itemsize != member.size:
        raise CheckpointError(
            f"{path}: {name[:80]!r} has {member.size - head.tell()} bytes of numbers, expected "
            f"{count * dtype.itemsize} for the shape {shape}"
        )
    return archive.file.tensor(
        kind, member.start + head.tell(), shape, tuple(steps) if fortran else None
    )
