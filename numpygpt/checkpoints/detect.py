"""What a path is: recognised by what stands in it, not by how it is called."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping

from ..errors import CheckpointError, ModelNotFoundError, NumpyGPTError
from ..params import listing
from .arrays import Tensor
from .hugging_face import INDEXES, read_shards, source_of
from .safetensors import SafetensorsFile
from .source import Source

__all__ = ["identify", "open_source"]

# Where a directory has several of them, the first is meant, as in transformers.
PREFERRED = (
    "model.safetensors",
    INDEXES[0],
    "pytorch_model.bin",
    INDEXES[1],
    "model.ckpt.index",
    "flax_model.msgpack",
)

# Endings of files that may be a checkpoint by themselves.
ENDINGS = {".safetensors", ".gguf", ".npz", ".pt", ".pth", ".ckpt", ".bin", ".msgpack"}

# Why some files are refused, by how they begin.
REFUSED = {
    b"\x89HDF\r\n\x1a\n": "HDF5 (Keras, TensorFlow .h5), whose usual reader is a C library that "
    "hostile files can crash; save it again with transformers' save_pretrained",
    b"lmgg": "the GGML format that GGUF has replaced; convert the original again",
    b"tjgg": "the GGJT format that GGUF has replaced; convert the original again",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file; fetch that with git lfs pull",
    b"<": "HTML or XML, perhaps the error page of a download",
}

TABLE_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")


def identify(path: pathlib.Path) -> str:
    """The name of a file's format.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    str
        A key of :data:`READERS`.

    Raises
    ------
    CheckpointError
        If it is a format that is refused, with the reason, or none that is known.

    Examples
    --------
    >>> from numpygpt.checkpoints import find
    >>> identify(find("shakespeare") / "model.safetensors")
    'safetensors'
    """
    if not path.is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            tail = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if path.name.endswith(".index.json"):
        return "index"
    if head.startswith(b"GGUF"):
        return "GGUF"
    # Its first bytes are a number, so they can be any other format's; but a fitting number.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    for start, reason in REFUSED.items():
        if head.startswith(start):
            raise CheckpointError(f"{path}: {reason}")
    if head.startswith(b"PK\3\4"):
        from .archives import StoredZip
        from .npz import is_npz

        return "npz" if is_npz(StoredZip(path)) else "PyTorch"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "PyTorch"
    if head[:4] in ((20240326).to_bytes(4, "little"), (20240327).to_bytes(4, "little")):
        return "llm.c"
    if tail == TABLE_MAGIC:
        return "TensorFlow"
    if _starts_as_flax(head):
        return "Flax"
    if path.suffix in (".safetensors", ".json"):  # damaged: its reader says how
        return "safetensors"
    raise CheckpointError(
        f"{path}: no checkpoint that numpygpt knows begins with "
        + (f"the bytes {head[:8].hex(' ')}" if head else "nothing: the file is empty")
    )


def _starts_as_flax(head: bytes) -> bool:
    """Whether this is a MessagePack map whose first key is a short string."""
    kind, start = head[:1], {0xDE: 3, 0xDF: 5}.get(head[0] if head else 0, 1)
    is_map = b"\x81" <= kind <= b"\x8f" or kind in (b"\xde", b"\xdf")
    return is_map and 0xA1 <= (head[start : start + 1] or b"\0")[0] <= 0xBF and head[8:9] != b"{"


def open_source(path: pathlib.Path) -> Source:
    """Recognise a checkpoint and describe it, without reading weights.

    Parameters
    ----------
    path : pathlib.Path
        A file of any format in :data:`READERS`, or a directory that has one.

    Returns
    -------
    Source

    Raises
    ------
    ModelNotFoundError
        If there is nothing, or nothing that could be a checkpoint.
    CheckpointError
        If what is there is damaged or refused.
    """
    try:
        if not path.exists():
            raise ModelNotFoundError(f"{path}: no such file or directory")
        file = _file_in(path) if path.is_dir() else path
        return READERS[identify(file)](file)
    except NumpyGPTError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror}") from None


def _file_in(directory: pathlib.Path) -> pathlib.Path:
    """The file of a directory that holds its tensors, or names those that do."""
    for name in PREFERRED:
        if (directory / name).exists():
            return directory / name
    there = sorted(entry.name for entry in directory.iterdir())
    found = [name for name in there if pathlib.PurePath(name).suffix in ENDINGS]
    indexes = [name for name in there if name.endswith(".index")]
    for names in (found, indexes):
        if len(names) == 1:
            return directory / names[0]
    if len(found) > 1:
        raise ModelNotFoundError(
            f"{directory}: several files could be meant, name one of them: {listing(found)}"
        )
    raise ModelNotFoundError(
        f"{directory}: expected {PREFERRED[0]}, {PREFERRED[2]}, {PREFERRED[4]} or one file that "
        f"ends in {', '.join(sorted(ENDINGS))}; "
        + (f"found {listing(there)}" if there else "but the directory is empty")
    )


def _safetensors(path: pathlib.Path) -> Source:
    return source_of("safetensors", path, SafetensorsFile(path).tensors())


def _index(path: pathlib.Path) -> Source:
    return read_shards(path, _shard)


def _shard(path: pathlib.Path) -> tuple[str, Mapping[str, Tensor]]:
    format = identify(path)
    if format == "PyTorch":
        from .torch_files import TorchFile

        file = TorchFile(path)
        return file.format, file.tensors()
    if format != "safetensors":
        raise CheckpointError(f"{path}: a shard in the format {format}, which numpygpt reads whole")
    return format, SafetensorsFile(path).tensors()


def _later(module: str) -> Callable[[pathlib.Path], Source]:
    """The function ``read`` of a module that is imported when a file needs it."""

    def read(path: pathlib.Path) -> Source:
        source: Source = importlib.import_module(f".{module}", __package__).read(path)
        return source

    return read


READERS: dict[str, Callable[[pathlib.Path], Source]] = {
    "safetensors": _safetensors,
    "index": _index,
    "PyTorch": _later("torch_files"),
    "npz": _later("npz"),
    "TensorFlow": _later("openai"),
    "Flax": _later("flax"),
    "llm.c": _later("llmc"),
    "GGUF": _later("gguf"),
}
