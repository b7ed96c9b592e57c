"""From one checkpoint format to another: what ``numpygpt convert`` does."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .checkpoints import find
from .checkpoints.arrays import Tensor, write_array
from .checkpoints.detect import open_source
from .checkpoints.narrowing import narrowed
from .checkpoints.reading import settle, without_tied_head
from .checkpoints.saving import Outgoing, bytes_of, format_of, write
from .errors import CheckpointWarning, TokenizerError
from .loading import tokenizer_for
from .params import Config, shapes

__all__ = ["Conversion", "Proof", "convert"]


class Proof(NamedTuple):
    """One array before and after: SHA-256 of its numbers, in the type in which they were written.

    ``rounding`` is the largest absolute difference that this type made to the numbers.
    """

    name: str
    before: str
    after: str
    rounding: float


@dataclasses.dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes
    ----------
    source, destination : pathlib.Path
    source_format, format : str
    config : Config
        Of what was written.
    read, written : dict of str to int
        How many arrays of each type there were, and are.
    bytes : int
        Of the arrays written.
    notes : list of str
        Decisions on the way, and what was taken for granted; doubtful ones are warnings.
    proof : list of Proof
        Empty unless it was asked for.
    """

    source: pathlib.Path
    destination: pathlib.Path
    source_format: str
    format: str
    config: Config
    read: dict[str, int]
    written: dict[str, int]
    bytes: int
    notes: list[str]
    proof: list[Proof]


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    proof: bool = False,
    on_bytes: Callable[[int, int], None] = lambda count, total: None,
) -> Conversion:
    """Write a checkpoint in another format, or with another type of numbers.

    One array at a time is in memory, beside the mapped file. The destination is there whole or
    not at all.

    Parameters
    ----------
    source : str or path
        Whatever :func:`numpygpt.load` takes.
    destination : str or path
        Must not exist yet. ``.npz``, ``.bin`` (llm.c) and ``.gguf`` are files, any other name is a
        directory in the Hugging Face layout, with safetensors.
    format : {"safetensors", "npz", "llm.c", "gguf"}, optional
        Where the name does not tell.
    dtype : {"float32", "float16", "bfloat16", "float64", "int8"}, optional
        What to store. As it is stored now, if None; what is quantised becomes float32, but int8
        stays so in safetensors. int8 is for the matrices, all else becomes float32.
    config : mapping, optional
        Config fields that override the checkpoint's.
    proof : bool
        Read the destination again and hash every array.
    on_bytes : callable
        Told after each piece how many more bytes were written, and how many there will be.

    Returns
    -------
    Conversion

    Raises
    ------
    ModelNotFoundError, CheckpointError
        As for :func:`numpygpt.load`; also if the format cannot express the model.
    OutputError
        If the destination exists or cannot be written.
    ArgumentError
        If a setting is unknown.

    Examples
    --------
    >>> import tempfile
    >>> done = convert("shakespeare", pathlib.Path(tempfile.mkdtemp()) / "x.npz", proof=True)
    >>> done.source_format, done.format, done.written
    ('safetensors', 'npz', {'F16': 52})
    >>> all(array.before == array.after for array in done.proof)
    True
    """
    path, target = find(source), pathlib.Path(destination)
    given = config or {}
    format = format_of(target, format)
    opened = open_source(path)
    settled = settle(path, opened, given)
    told = [text for text in (*opened.notes, *settled.assumptions) if text not in settled.doubtful]
    for text in settled.doubtful:
        warnings.warn(f"{path}: {text}", CheckpointWarning, stacklevel=2)
    held = without_tied_head(path, settled)
    tensors = {name: held[name] for name in shapes(settled.config)}
    vocabulary = None
    try:
        make = tokenizer_for(opened.directory, settled.config, opened.vocabulary)
        vocabulary = make().vocabulary() if make else None
    except TokenizerError as error:
        told.append(f"its vocabulary cannot be used, and none is written: {error}")
    # Files that lie beside a checkpoint with a vocabulary of its own are another model's.
    beside = opened.directory if opened.vocabulary is None else None
    if format == "llm.c" and vocabulary is not None:
        told.append("llm.c's format has no vocabulary: keep vocab.json and merges.txt beside it")
    outgoing = Outgoing(settled.config, tensors, beside, vocabulary)
    written = write(outgoing, target, format, dtype, on_bytes)
    if added := len(written.tensors) - len(tensors):
        told.append(f"{added} biases of zeros added, because the format always has biases")
    return Conversion(
        path,
        target,
        opened.format,
        format,
        written.config,
        dict(collections.Counter(tensor.dtype for tensor in tensors.values())),
        dict(collections.Counter(written.kinds.values())),
        bytes_of(written.tensors, written.kinds),
        told,
        _prove(written.tensors, written.kinds, target) if proof else [],
    )


def _prove(
    written: Mapping[str, Tensor], kinds: Mapping[str, str], target: pathlib.Path
) -> list[Proof]:
    """Each array as it was given to the writer, and as the reader finds it."""
    opened = open_source(target)
    found = settle(target, opened, {}).tensors
    rows = []
    for name, tensor in written.items():
        kind = kinds[name]
        array, after = tensor.read(tensor.exact), found[name].read(found[name].exact)
        before = _sha256(array, kind, name, tensor)
        same = (after == array) | (np.isnan(after) & np.isnan(array))
        with np.errstate(invalid="ignore"):  # infinity less infinity, which is then left out
            apart = np.abs(np.subtract(after, array, dtype=np.float64))
        difference = apart.max(initial=0, where=~same)
        again = _sha256(after, kind, name, found[name])
        rows.append(Proof(name, before, again, float(difference)))
    return rows


def _sha256(array: Any, kind: str, name: str, tensor: Tensor) -> str:
    """The hash of a tensor's numbers in C order, as `kind` stores them; of int8, scales too."""
    digest = _Digest()
    if kind == "I8":
        matrix = narrowed(name, tensor, "int8")
        write_array(digest, matrix.numbers, kind)
        write_array(digest, matrix.scales, "F32")
    else:
        write_array(digest, array, kind)
    return digest.hash.hexdigest()


class _Digest:
    """Keeps nothing but the hash of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def write(self, data: Any, /) -> None:
        self.hash.update(data)
