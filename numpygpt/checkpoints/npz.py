"""NumPy's ``.npz``: an archive of arrays, with the config as the member ``config.json``.

``numpy.load`` opens the files written here, and a file of other programs that has the names of
the Hugging Face layout can be read.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from .archives import Member, StoredZip
from .arrays import FLOATS, Tensor, write_array
from .json_files import parse_json
from .names import canonical
from .source import Source, Vocabulary

__all__ = ["is_npz", "read", "write"]

KINDS = {dtype: kind for kind, dtype in FLOATS.items() if kind != "BF16"}

# What stands before the numbers of an array, and how much of it is looked at; it has 118 bytes.
HEADER = re.compile(
    rb"\{ *'descr': *'([^']*)', *'fortran_order': *(True|False), "
    rb"*'shape': *\(([0-9, ]{0,200})\),? *\} *\n"
)
LONGEST_HEADER = 2**12

VOCABULARY = "vocabulary.json"
# GPT-2's has 1.3 MB; read as JSON a small text takes up to ten times its bytes.
LARGEST_VOCABULARY = 2**22


def is_npz(archive: StoredZip) -> bool:
    """Whether a zip archive holds NumPy arrays.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "arrays.npz")
    >>> np.savez(path, x=np.ones(3))
    >>> is_npz(StoredZip(path))
    True
    """
    return any(name.endswith(".npy") for name in archive.names)


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
    archive.require_stored()
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
    if VOCABULARY in archive.members:
        text = archive.read(VOCABULARY, LARGEST_VOCABULARY)
        source.vocabulary = _vocabulary(parse_json(text, f"{path}: {VOCABULARY}", CheckpointError))
        if source.vocabulary is None:
            raise CheckpointError(f"{path}: {VOCABULARY} holds no tokens, merges and special ids")
    return source


def write(
    file: BinaryIO,
    config: bytes,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    advance: Callable[[int], None],
    vocabulary: Vocabulary | None = None,
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
    vocabulary : Vocabulary, optional
        Becomes the member ``vocabulary.json``.

    Raises
    ------
    CheckpointError
        If a type has no NumPy dtype, or a number does not fit it.
    """
    if unknown := set(kinds.values()) - set(KINDS.values()):
        raise CheckpointError(
            f"NumPy has no dtype for {unknown.pop()}; choose the dtype float32 or float16 for .npz"
        )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_info("config.json"), config)
        if vocabulary is not None:
            archive.writestr(_info(VOCABULARY), json.dumps(vocabulary._asdict()))
        for name, tensor in tensors.items():
            kind = kinds[name]
            header = io.BytesIO()
            described = np.lib.format.header_data_from_array_1_0(np.empty(0, FLOATS[kind]))
            np.lib.format.write_array_header_1_0(header, {**described, "shape": tensor.shape})
            with archive.open(_info(f"{name}.npy"), "w", force_zip64=True) as member:
                member.write(header.getvalue())
                write_array(member, tensor.read(tensor.exact), kind, advance, name)


def _vocabulary(fields: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary that a member describes, or None if it is none."""
    match fields:
        case {"tokens": list(tokens), "merges": list(merges), "special": list(special)}:
            texts = all(type(text) is str for text in (*tokens, *merges))
            if texts and all(type(i) is int and 0 <= i < len(tokens) for i in special):
                return Vocabulary(tokens, merges, special)
    return None


def _info(name: str) -> zipfile.ZipInfo:
    """A member with a fixed date, so that the same model gives the same file."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _tensor(archive: StoredZip, name: str, member: Member) -> Tensor:
    """The description of one member.

    NumPy's own reader of the header takes it for a Python expression; on damaged ones it fails in
    ways that depend on the version of Python. Every writer spells it as :data:`HEADER`.
    """
    path, label = archive.file.path, repr(name[:80])
    head = archive.file.map[member.start : member.start + min(member.size, LONGEST_HEADER)]
    digits = 2 if head[6:7] == b"\1" else 4  # in which the length of the header is told
    begin = 8 + digits
    stop = begin + int.from_bytes(head[8:begin], "little")
    match = HEADER.fullmatch(head[begin:stop])
    sound = head[:6] == b"\x93NUMPY" and head[6:7] in (b"\1", b"\2", b"\3")
    if not sound or stop > len(head) or match is None:
        raise CheckpointError(f"{path}: {label} is no NumPy array, or a damaged one")
    told = match[1].decode("latin-1")
    kind = next((kind for dtype, kind in KINDS.items() if dtype.str == told), None)
    if kind is None:
        raise CheckpointError(
            f"{path}: {label} is {told[:20]!r}; expected one of "
            f"{', '.join(dtype.str for dtype in KINDS)}"
        )
    told_sizes = [size.strip() for size in match[3].removesuffix(b",").split(b",") if match[3]]
    sizes = [int(size) for size in told_sizes if size.isdigit() and len(size) <= 15]
    if len(sizes) > 8 or len(sizes) != len(told_sizes):
        raise CheckpointError(f"{path}: {label} has an impossible shape")
    needed = math.prod(sizes) * FLOATS[kind].itemsize
    if stop + needed != member.size:
        raise CheckpointError(
            f"{path}: {label} has {member.size - stop} bytes of numbers, expected {needed} for "
            f"the shape {tuple(sizes)}"
        )
    strides = tuple(math.prod(sizes[:axis]) for axis in range(len(sizes)))
    in_columns = match[2] == b"True" and len(sizes) > 1
    start = member.start + stop
    return archive.file.tensor(kind, start, tuple(sizes), strides if in_columns else None)
