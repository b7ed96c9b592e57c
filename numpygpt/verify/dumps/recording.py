"""A recording: what a program left behind, under its own names and in its own layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import DumpError
from ...params import Array, listing, shown
from ..arithmetic import ARITHMETICS

__all__ = [
    "Recording",
    "Stored",
    "as_ids",
    "check_chunks",
    "check_dtype",
    "check_weights",
    "recording",
]

# What programs call the tokens they read. In this order, if a file has several of them.
IDS = ("ids", "input_ids", "token_ids", "tokens", "inp_tokens", "idx")

# Stored types that are intermediates, and what a program that stores them computes in.
COMPUTED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# A file without a note of what was computed in is taken for the coarsest type in it: results of
# a program in bfloat16 are often widened at the end.
COARSEST_FIRST = ("BF16", "F16", "F32", "F64")

INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")

FORMAT, VERSION = "numpygpt-trace", "1"


class Stored(NamedTuple):
    """An array of a file that has been described but not read.

    Attributes
    ----------
    kind : str
        How it is stored, by the names of safetensors: ``"F32"``, ``"I64"`` ...
    shape : tuple of int
    read : callable
        From nothing to the array, bfloat16 as float32.
    """

    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


@dataclass(frozen=True, eq=False)
class Recording:
    """What a file holds, before anybody asks which array is what.

    Attributes
    ----------
    tensors : mapping of str to ndarray
        By the names in the file. Floating point; bfloat16 was widened to float32.
    source : str
        The file.
    ids : (B, T) ndarray of int64, optional
    dtype : str, optional
        What the program computed in, if the file says so.
    stored : str
        What it must have computed in, judging by how its arrays are stored.
    weights : str, optional
        How its weights were stored.
    chunks : tuple of int
        How many tokens each pass read.
    producer : str
    config : mapping, optional
        The config of its model, in the words of ``config.json``.
    model_sha256 : str, optional
        Of its learned arrays, as :func:`numpygpt.records.weights_sha256` computes it.
    others : mapping of str to str
        Name -> why it is no intermediate: integers, printed digits ...
    notes : tuple of str
        What was assumed while reading.
    """

    tensors: Mapping[str, Array]
    source: str
    ids: Array | None
    dtype: str | None
    stored: str
    weights: str | None
    chunks: tuple[int, ...]
    producer: str
    config: Mapping[str, Any] | None
    model_sha256: str | None
    others: Mapping[str, str]
    notes: tuple[str, ...]


def recording(
    source: Any,
    arrays: Mapping[str, Stored],
    metadata: Mapping[str, Any],
    others: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
) -> Recording:
    """Put together what a reader found.

    Parameters
    ----------
    source : path
    arrays : mapping of str to Stored
    metadata : mapping of str to object
        ids, dtype, weights, chunks, producer, config, model_sha256; each may be the text of its
        JSON. Other keys are left alone.
    others : mapping of str to str
        What the reader left out, and why.
    notes : iterable of str

    Returns
    -------
    Recording

    Raises
    ------
    DumpError
        If no array could be an intermediate, or a field of `metadata` has the wrong type.
    """
    floats = {name: array for name, array in arrays.items() if array.kind in COMPUTED}
    tokens = {
        name: array
        for name, array in arrays.items()
        if name.rpartition(".")[2] in IDS and array.kind in INTEGERS
    }
    left = {
        name: f"{array.kind}, not floating point"
        for name, array in arrays.items()
        if name not in floats and name not in tokens
    }
    if not floats:
        raise DumpError(
            f"{source}: holds no floating-point arrays"
            + (f"; found {listing([*arrays, *(others or {})])}" if arrays or others else "")
            + "".join(f": {reason}" for reason in list((others or {}).values())[:1])
        )
    if metadata.get("format") == FORMAT and str(metadata.get("format_version")) != VERSION:
        raise DumpError(
            f"{source}: version {shown(metadata.get('format_version'))} of the format {FORMAT}, "
            f"expected {VERSION}; a newer numpygpt wrote it"
        )
    kinds = {array.kind for array in floats.values()}
    dtype, weights = _value(metadata, "dtype"), _value(metadata, "weights")
    config, chunks = _value(metadata, "config"), _value(metadata, "chunks")
    if config is not None and not isinstance(config, dict):
        raise DumpError(f"{source}: config must be a JSON object, not {shown(config)}")
    return Recording(
        tensors={name: array.read() for name, array in floats.items()},
        source=str(source),
        ids=_ids(source, tokens, _value(metadata, "ids")),
        dtype=None if dtype is None else check_dtype(dtype, str(source)),
        stored=COMPUTED[next(kind for kind in COARSEST_FIRST if kind in kinds)],
        weights=None if weights is None else check_weights(weights, str(source)),
        chunks=() if chunks is None else check_chunks(chunks, str(source)),
        producer=_text(source, metadata, "producer") or "",
        config=config,
        model_sha256=_text(source, metadata, "model_sha256"),
        others={**left, **(others or {})},
        notes=tuple(notes),
    )


def check_dtype(dtype: object, source: str) -> str:
    """What a program computed in, in our words; PyTorch's prefix is taken off.

    >>> check_dtype("torch.bfloat16", "a.safetensors")
    'bfloat16'
    """
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in ARITHMETICS:
        raise DumpError(
            f"{source}: dtype must be one of {', '.join(ARITHMETICS)}, not {shown(repr(dtype))}"
        )
    return str(name)


def check_weights(weights: object, source: str) -> str:
    """How a program stored its weights: a dtype, or int8."""
    name = weights.removeprefix("torch.") if isinstance(weights, str) else weights
    if name not in (*ARITHMETICS, "int8"):
        raise DumpError(
            f"{source}: weights must be one of {', '.join(ARITHMETICS)} or int8, not "
            f"{shown(repr(weights))}"
        )
    return str(name)


def check_chunks(chunks: object, source: str) -> tuple[int, ...]:
    """How many tokens each pass read: positive integers."""
    if not isinstance(chunks, list | tuple) or not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in chunks
    ):
        raise DumpError(
            f"{source}: chunks must be a list of positive integers, not {shown(repr(chunks))}"
        )
    return tuple(int(n) for n in chunks)


def _value(metadata: Mapping[str, Any], name: str) -> Any:
    """A field; safetensors has only texts, so a text may be JSON."""
    value = metadata.get(name)
    if name in ("ids", "chunks", "config") and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise DumpError(f"the metadata {name} is no JSON, received {shown(value)!r}") from None
    return value


def _text(source: Any, metadata: Mapping[str, Any], name: str) -> str | None:
    value = metadata.get(name)
    if value is not None and not isinstance(value, str):
        raise DumpError(f"{source}: {name} must be text, not {shown(repr(value))}")
    return value


def _ids(source: Any, arrays: Mapping[str, Stored], told: object) -> Array | None:
    """The tokens (B, T): what the metadata says, or an array of integers with a known name."""
    if told is not None:
        return as_ids(told, str(source))
    known = sorted(arrays, key=lambda name: IDS.index(name.rpartition(".")[2]))
    return as_ids(arrays[known[0]].read(), f"{source}: {known[0]}") if known else None


def as_ids(ids: Any, source: str) -> Array:
    """Token ids as (B, T) int64.

    Parameters
    ----------
    ids : sequence of int, sequence of sequences of int, or ndarray
        One sequence, or B of the same length.
    source : str
        What they are, for messages.

    Raises
    ------
    DumpError
        If they are not integers, none at all, or sequences of unequal lengths.

    Examples
    --------
    >>> as_ids([5, 3], "ids").shape
    (1, 2)
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of unequal lengths
        raise DumpError(
            f"{source}: the sequences of ids have unequal lengths; write one dump for each"
        ) from None
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "iu":
        raise DumpError(
            f"{source}: expected ids as integers (T,) or (B, T) with at least one token, received "
            f"{array.dtype} of shape {array.shape}"
        )
    wide: Array = np.atleast_2d(array).astype(np.int64)
    return wide
