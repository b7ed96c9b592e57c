"""Writing a checkpoint: safetensors in the Hugging Face layout, ``.npz``, llm.c, GGUF.

Arrays are read, converted and written one at a time, in pieces, so that a model of any size can be
written in little memory. What a format cannot express is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ArgumentError, TokenizerError
from ..params import Config, Params, shapes
from ..storage import Int8, Stored, storage_of
from . import safetensors
from .arrays import FLOATS, ITEMS, Tensor
from .atomic import new_directory, new_file, require_absent, require_room
from .config import config_fields
from .narrowing import is_matrix, stored_shape
from .source import END_OF_TEXT, Vocabulary

__all__ = [
    "FORMATS",
    "KINDS",
    "Outgoing",
    "Written",
    "bytes_of",
    "format_of",
    "save",
    "stored_kinds",
    "write",
]

# Formats that can be written, and the ending that asks for each; any other name is a directory.
FORMATS = {"safetensors": "", "npz": ".npz", "llm.c": ".bin", "gguf": ".gguf"}

# Endings of formats that are read, or refused, but not written.
READ_ONLY = {".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".onnx", ".index"}

KINDS = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8",
}  # fmt: skip

# The names under which transformers knows the files of a vocabulary, and what belongs to them.
RENAMED = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
VOCABULARY_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
)  # fmt: skip


class Outgoing(NamedTuple):
    """A model on its way into a file.

    ``tensors`` are those that :func:`numpygpt.params.shapes` lists for the config; ``directory``
    is where vocabulary files may lie; ``vocabulary`` is None if there is none to be used.
    """

    config: Config
    tensors: dict[str, Tensor]
    directory: pathlib.Path | None = None
    vocabulary: Vocabulary | None = None


class Written(NamedTuple):
    """What was written: with the zero biases that most formats need, each array in its type."""

    config: Config
    tensors: dict[str, Tensor]
    kinds: dict[str, str]


class Savable(Protocol):
    """What :func:`save` needs of a :class:`numpygpt.Model`."""

    config: Config
    params: Params

    @property
    def tokenizer(self) -> Any:
        """A :class:`numpygpt.tokenizer.Tokenizer`."""


def save(
    model: Savable,
    path: str | pathlib.Path,
    format: str | None = None,
    dtype: str | None = None,
) -> pathlib.Path:
    """Write a model that is in memory.

    Parameters
    ----------
    model : numpygpt.Model
    path : str or path
        Must not exist yet. ``.npz``, ``.bin`` (llm.c) and ``.gguf`` are files, any other name is a
        directory in the Hugging Face layout.
    format : {"safetensors", "npz", "llm.c", "gguf"}, optional
        Where the name does not tell.
    dtype : {"float32", "float16", "bfloat16", "float64", "int8"}, optional
        What to store; what each array is in if None, but float32 for int8 where the format has
        none. With int8 the matrices become integers with a scale for each output, and all else
        float32; only safetensors has it.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    CheckpointError
        If the format cannot express the model, or a number does not fit `dtype`.
    OutputError
        If `path` exists or cannot be written.
    ArgumentError
        If `format` or `dtype` is unknown, or the format does not have it.

    Examples
    --------
    >>> import numpygpt, tempfile
    >>> model = numpygpt.load("shakespeare")
    >>> path = save(model, pathlib.Path(tempfile.mkdtemp()) / "half", dtype="float16")
    >>> sorted(file.name for file in path.iterdir())
    ['config.json', 'merges.txt', 'model.safetensors', 'vocab.json']
    """
    path = pathlib.Path(path)
    tensors = {name: _in_memory(array) for name, array in _named(model.config, model.params)}
    vocabulary = None
    with contextlib.suppress(TokenizerError):  # a model without one
        vocabulary = model.tokenizer.vocabulary()
    write(Outgoing(model.config, tensors, None, vocabulary), path, format_of(path, format), dtype)
    return path


def format_of(path: pathlib.Path, format: str | None) -> str:
    """The format that a destination asks for.

    >>> format_of(pathlib.Path("gpt2.gguf"), None), format_of(pathlib.Path("gpt2"), None)
    ('gguf', 'safetensors')
    """
    if format is None:
        if path.suffix.lower() == ".safetensors":
            raise ArgumentError(
                f"{path}: name a directory, which gets model.safetensors and its config.json"
            )
        endings = {ending: name for name, ending in FORMATS.items() if ending}
        if path.suffix.lower() in READ_ONLY or path.match("pytorch_model*.bin"):
            raise ArgumentError(
                f"{path}: {path.suffix} of this kind is not written; name a directory for "
                f"safetensors, or a file that ends in {', '.join(endings)}"
            )
        return endings.get(path.suffix.lower(), "safetensors")
    if format not in FORMATS:
        raise ArgumentError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    return format


def stored_kinds(
    tensors: Mapping[str, Tensor], dtype: str | None, format: str = "safetensors"
) -> dict[str, str]:
    """The type in which each array will be stored: its own if `dtype` is None.

    Quantised ones become float32, which holds them exactly, where the format does not have them.
    """
    if dtype is not None and dtype not in KINDS:
        raise ArgumentError(f"dtype must be one of {', '.join(KINDS)}, not {dtype!r}")
    if dtype == "int8":
        if format != "safetensors":
            raise ArgumentError(
                f"{format} has no int8 with a scale for each row; write safetensors (a directory)"
            )
        return {name: "I8" if is_matrix(name) else "F32" for name in tensors}
    own = {*FLOATS, "I8"} if format == "safetensors" else FLOATS.keys()
    return {
        name: KINDS[dtype] if dtype else tensor.dtype if tensor.dtype in own else "F32"
        for name, tensor in tensors.items()
    }


def write(
    outgoing: Outgoing,
    path: pathlib.Path,
    format: str,
    dtype: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda count, total: None,
) -> Written:
    """Write a model.

    Parameters
    ----------
    outgoing : Outgoing
    path : pathlib.Path
        Must not exist.
    format : str
        A key of :data:`FORMATS`.
    dtype : str, optional
        A key of :data:`KINDS`; each array as it is stored now if None.
    on_bytes : callable
        Told after each piece how many more bytes were written, and how many there will be.

    Returns
    -------
    Written

    Raises
    ------
    CheckpointError, OutputError, ArgumentError
        As for :func:`save`.
    """
    if not outgoing.config.bias and format != "npz":
        outgoing = _with_zero_biases(outgoing)
    config, tensors = outgoing.config, outgoing.tensors
    if format in ("llm.c", "gguf"):
        wanted = {"llm.c": ("float32", "bfloat16"), "gguf": ("float32",)}[format]
        if dtype is None and format == "llm.c" and _all_are(tensors, "BF16"):
            dtype = "bfloat16"
        if dtype is None and any(tensor.dtype == "F64" for tensor in tensors.values()):
            raise ArgumentError(f"{format} has no float64; ask for float32 to have it rounded")
        dtype = dtype or "float32"
        if dtype not in wanted:
            raise ArgumentError(f"{format} is written in {' or '.join(wanted)}, not {dtype!r}")
    kinds = stored_kinds(tensors, dtype, format)
    total = bytes_of(tensors, kinds)
    require_absent(path)
    require_room(path, total)

    def advance(count: int) -> None:
        on_bytes(count, total)

    if format == "safetensors":
        with new_directory(path) as directory:
            _fill(directory, outgoing, kinds, advance)
        return Written(config, tensors, kinds)
    with new_file(path) as file:
        if format == "npz":
            from . import npz

            config_json = _config_json(outgoing, kinds)
            npz.write(file, config_json, tensors, kinds, advance, outgoing.vocabulary)
        elif format == "llm.c":
            from . import llmc

            llmc.write(file, config, tensors, KINDS[dtype or "float32"], advance)
        else:
            from . import gguf

            gguf.write(file, config, tensors, outgoing.vocabulary, advance)
    return Written(config, tensors, kinds)


def bytes_of(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> int:
    """Bytes that arrays take when they are stored in the types `kinds`, and scales of int8."""
    scales = sum(
        stored_shape(name, tensor.shape)[0] * ITEMS["F32"].itemsize
        for name, tensor in tensors.items()
        if kinds[name] == "I8"
    )
    return scales + sum(
        math.prod(tensor.shape) * ITEMS[kinds[name]].itemsize for name, tensor in tensors.items()
    )


def _fill(
    directory: pathlib.Path,
    outgoing: Outgoing,
    kinds: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """The Hugging Face layout, under the names that transformers saves."""
    names = {
        name: name if name == "lm_head.weight" else f"transformer.{name}"
        for name in outgoing.tensors
    }
    with (directory / "model.safetensors").open("xb") as file:
        safetensors.write(
            file,
            {names[name]: tensor for name, tensor in outgoing.tensors.items()},
            {names[name]: kind for name, kind in kinds.items()},
            advance,
        )
    if outgoing.vocabulary is not None:  # files that cannot be used are not passed on
        for new, old in _vocabulary_files(outgoing.directory).items():
            shutil.copyfile(old, directory / new)
    vocabulary = outgoing.vocabulary
    has_one = (directory / "vocab.json").exists() or (directory / "tokenizer.json").exists()
    if vocabulary is not None and not has_one:
        numbers = {token: i for i, token in enumerate(vocabulary.tokens)}
        merges = "".join(f"{merge}\n" for merge in vocabulary.merges)
        _write_text(directory / "vocab.json", json.dumps(numbers))
        _write_text(directory / "merges.txt", f"#version: 0.2\n{merges}")
    (directory / "config.json").write_bytes(_config_json(outgoing, kinds))


def _write_text(path: pathlib.Path, text: str) -> None:
    path.write_bytes(text.encode())  # the same bytes on every system


def _vocabulary_files(directory: pathlib.Path | None) -> dict[str, pathlib.Path]:
    """The files of a vocabulary in a directory, under the names that transformers knows."""
    found: dict[str, pathlib.Path] = {}
    if directory is not None:
        for name in (*VOCABULARY_FILES, *RENAMED):
            if (directory / name).is_file():
                found.setdefault(RENAMED.get(name, name), directory / name)
    if found.keys() & {"vocab.json", "merges.txt"} == {"merges.txt"}:
        del found["merges.txt"]  # half a vocabulary: the whole one will be written
    return found


def _config_json(outgoing: Outgoing, kinds: Mapping[str, str]) -> bytes:
    vocabulary, end = outgoing.vocabulary, None
    if vocabulary is not None and END_OF_TEXT in vocabulary.tokens:
        end = vocabulary.tokens.index(END_OF_TEXT)
    used = set(kinds.values())
    int8 = "I8" in used
    if int8:
        used = {"F32"}  # what they stand for
    # transformers turns every array into one dtype: this one, or that of the first array.
    widest = used.pop() if len(used) == 1 else "F64" if "F64" in used else "F32"
    dtype = next(name for name, kind in KINDS.items() if kind == widest)
    fields = config_fields(outgoing.config, end, dtype, int8)
    return (json.dumps(fields, indent=2) + "\n").encode()


def _with_zero_biases(outgoing: Outgoing) -> Outgoing:
    """The same model for formats in which every array has a bias."""
    config = dataclasses.replace(outgoing.config, bias=True)
    tensors = {}
    for name, (shape, _) in shapes(config).items():
        kind = outgoing.tensors[name.replace(".bias", ".weight")].dtype
        zeros = _zeros("F32" if kind == "I8" else kind, shape)
        tensors[name] = outgoing.tensors.get(name) or zeros
    return outgoing._replace(config=config, tensors=tensors)


def _zeros(kind: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(kind, shape, 0, lambda dtype: np.zeros(shape, dtype))


def _in_memory(array: Any) -> Tensor:
    """An ndarray or a stored matrix as what a reader would have found."""
    kind = KINDS[storage_of(array)]
    if not isinstance(array, Stored):
        return Tensor(
            kind, array.shape, array.nbytes, lambda dtype: array.astype(dtype, copy=False)
        )

    def part(dtype: Any, start: int, stop: int) -> Any:
        return array[start:stop].astype(dtype, copy=False)

    def stored() -> Int8:
        assert isinstance(array, Int8)
        return array

    return Tensor(
        kind,
        array.shape,
        array.nbytes,
        lambda dtype: part(dtype, 0, len(array)),
        None if array.turned else part,
        stored if isinstance(array, Int8) else None,
    )


def _named(config: Config, params: Params) -> Iterator[tuple[str, Any]]:
    """The arrays of a model under their names in files; the opposite of ``params.pack``."""
    for name in shapes(config):
        *path, last = name.split(".")
        if name == "lm_head.weight":
            yield name, params.head
            continue
        place: Any = params
        for part in path:
            place = place[int(part)] if part.isdigit() else getattr(place, part)
        if isinstance(place, tuple):  # a norm (g, b) or a linear map (w, b)
            place = place[0 if last == "weight" else 1]
        yield name, place


def _all_are(tensors: Mapping[str, Tensor], kind: str) -> bool:
    return all(tensor.dtype == kind for tensor in tensors.values())
