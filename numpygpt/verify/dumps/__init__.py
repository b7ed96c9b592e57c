"""Recordings of activations on disk: every kind is read, one is written.

What a path is, is decided by what stands in it. Arrays are mapped where that is possible, nothing
in a file is executed, and memory is bounded by the size of the files.
"""

from __future__ import annotations

import pathlib

from ...checkpoints.json_files import parse_json, require_regular
from ...checkpoints.llmc import MODEL, STATE
from ...errors import CheckpointError, DumpError
from ...params import Config, listing
from . import folder, hf_debugger, llmc_state, npz_dump, raw, safetensors_dump
from .files import read_text
from .recording import Recording
from .safetensors_dump import write

__all__ = ["Recording", "read", "write"]

# A side JSON of xl's 700 tensors takes 100 KB.
LARGEST_JSON = 2**22

# Files that hold no arrays as they are, and what to do about them.
REFUSED = {
    b"\x80": "a pickle, which can run any program when it is opened; save the tensors with "
    "safetensors or numpy.savez",
    b"GGUF": "a GGUF model, not activations",
    MODEL.to_bytes(4, "little"): "an llm.c model, not activations",
    b"\x89HDF\r\n\x1a\n": "HDF5; save the arrays with numpy.savez",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
}


def read(path: str | pathlib.Path, config: Config | None = None) -> Recording:
    """Read a recording of any kind.

    =================================== ===========================================================
    path                                what it is
    =================================== ===========================================================
    safetensors file                    arrays by name; metadata as :func:`write` writes it
    ``.npz``                            arrays by name, without compression and Python objects
    folder of ``.npy``, or one ``.npy`` arrays by file name, ``ids.npy``, metadata in ``dump.json``
    JSON with ``tensors``, its folder,  raw numbers, see :mod:`.raw`
    or a file with such a ``.json``
    folder or ``*_debug_tree*.json``    tree of transformers' model debugger
    ``*_debug_state.bin``               llm.c's debug state; needs `config`
    =================================== ===========================================================

    Parameters
    ----------
    path : path
    config : Config, optional
        Of the model it belongs to.

    Returns
    -------
    Recording

    Raises
    ------
    DumpError
        If it is none of these, or damaged. The message names the tensor.
    """
    path = pathlib.Path(path)
    try:
        if not path.exists():
            raise DumpError(f"{path}: no such file or directory")
        return _read_folder(path) if path.is_dir() else _read_file(path, config)
    except CheckpointError as error:  # from the readers that checkpoints have, too
        raise DumpError(str(error)) from None
    except OSError as error:
        raise DumpError(f"{error.filename or path}: {error.strerror}") from None


def _read_folder(path: pathlib.Path) -> Recording:
    tree = hf_debugger.find(path)
    if tree is not None:
        return hf_debugger.read(tree)
    if any(path.glob("*.npy")):
        return folder.read(path)
    if (path / folder.METADATA).exists():
        return _read_json(path / folder.METADATA)
    there = sorted(entry.name for entry in path.iterdir())
    files = [name for name in there if name.endswith((".safetensors", ".npz"))]
    if len(files) == 1:
        return _read_file(path / files[0], None)
    raise DumpError(
        f"{path}: expected .npy files, a dump.json, a tree of transformers' debugger or one "
        f"safetensors or .npz file; "
        + (f"found {listing(there)}" if there else "but the directory is empty")
    )


def _read_file(path: pathlib.Path, config: Config | None) -> Recording:
    require_regular(path, DumpError)  # opening a pipe would wait for its writer
    with path.open("rb") as file:
        head = file.read(64)
        size = file.seek(0, 2)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return safetensors_dump.read(path)
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return npz_dump.read(path)
    if head[:6] == b"\x93NUMPY":
        return folder.read_array(path)
    if head[:4] == STATE.to_bytes(4, "little"):
        return llmc_state.read(path, config)
    if head.lstrip()[:1] in (b"{", b"["):
        return _read_json(path)
    beside = path.with_suffix(".json")
    if beside != path and beside.exists():
        return _read_json(beside)
    if path.suffix == ".safetensors":  # damaged: its reader says how
        return safetensors_dump.read(path)
    reason = next((why for start, why in REFUSED.items() if head.startswith(start)), None)
    raise DumpError(
        f"{path}: "
        + (
            reason
            or (
                f"no recording begins with the bytes {head[:8].hex(' ')}; raw numbers need a "
                f"JSON beside them, {beside.name}"
                if head
                else "the file is empty"
            )
        )
    )


def _read_json(path: pathlib.Path) -> Recording:
    """A side JSON, or a tree."""
    if path.name.endswith((hf_debugger.FULL, hf_debugger.SUMMARY)):
        return hf_debugger.read(path)
    fields = parse_json(read_text(path, LARGEST_JSON), str(path), DumpError)
    if "tensors" in fields:
        return raw.read(path, fields)
    if "module_path" in fields:
        return hf_debugger.read(path)
    raise DumpError(
        f"{path}: expected a JSON object with tensors (raw files) or module_path (transformers' "
        f"debugger), received the keys {listing(list(fields)) or 'of nothing'}"
    )
