"""NumPy's ``.npz`` as a dump: arrays by name, the tokens as ``ids``."""

from __future__ import annotations

import pathlib

from ...checkpoints.archives import StoredZip
from ...checkpoints.json_files import parse_json
from ...errors import DumpError
from .npy import describe
from .recording import Recording, recording

__all__ = ["read"]

# A member of this name holds metadata; numpy.savez does not write one.
METADATA = "dump.json"
LARGEST_METADATA = 2**20


def read(path: pathlib.Path) -> Recording:
    """Read an ``.npz`` that ``numpy.savez`` wrote.

    Raises
    ------
    DumpError
        If it is damaged, compressed, or holds Python objects.
    """
    archive = StoredZip(path)
    if not any(name.endswith(".npy") for name in archive.names):
        raise DumpError(
            f"{path}: a zip archive without NumPy arrays, perhaps of torch.save, whose pickles "
            f"are not opened; save the tensors with safetensors or numpy.savez"
        )
    archive.require_stored()
    arrays = {
        name.removesuffix(".npy"): describe(archive.file, member.start, member.size, name)
        for name, member in archive.members.items()
        if name.endswith(".npy")
    }
    metadata = {}
    if METADATA in archive.members:
        text = archive.read(METADATA, LARGEST_METADATA)
        metadata = parse_json(text, f"{path}: {METADATA}", DumpError)
    return recording(path, arrays, metadata)
