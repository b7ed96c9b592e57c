"""``flax_model.msgpack``: what the Flax classes of transformers, before its version 5, save.

A tree of maps, the path to an array being its name: ``transformer/h/0/attn/c_attn/kernel``. The
kernels of GPT-2's blocks are stored (out, in), although Flax's own layers, such as the head, have
them (in, out). Nothing in the file says so, and ``attn/c_proj`` is square, so no shape does either.

References
----------
huggingface/transformers, modeling_flax_gpt2.py, class FlaxConv1D; google/flax, serialization.py.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ..errors import CheckpointError
from .arrays import FLOATS, DataFile, Tensor
from .msgpack import Extension, Span, unpack
from .names import joined
from .source import Source

__all__ = ["read"]

# Flax's names of types, and ours.
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Codes of Flax's extension values that hold an array, and a NumPy scalar stored like one.
ARRAYS = (1, 3)

# Arrays of more than 2**30 bytes are divided; this key marks the map of their pieces.
DIVIDED = "__msgpack_chunked_array__"

TABLE = re.compile(r"(wte|wpe)\.embedding")
NORM = re.compile(r"(h\.\d+\.ln_1|h\.\d+\.ln_2|ln_f)\.scale")
KERNEL = re.compile(
    r"(h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)|lm_head)\.kernel"
)


def read(path: pathlib.Path) -> Source:
    """Describe a Flax checkpoint; its config is the ``config.json`` beside it.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Source

    Raises
    ------
    CheckpointError
        If the file is damaged, or holds something else than a tree of floating-point arrays.
    """
    file = DataFile(path)
    tree = unpack(file, Span(0, file.size))
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{path}: expected a map of parameters, received {type(tree).__name__}"
        )
    tensors: dict[str, Tensor] = {}
    for place, leaf in _leaves(tree):
        name, tensor = _canonical(place, _tensor(file, "/".join(place), leaf))
        if name in tensors:
            raise CheckpointError(f"{path}: {name[:80]} stands in it twice")
        tensors[name] = tensor
    notes = ["kernels of the blocks stored (out, in): transposed"]
    return Source("Flax", path.parent, tensors, notes=notes)


def _leaves(
    tree: dict[str, Any], place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of what is not a map, and of the maps that stand for a divided array."""
    for key, value in tree.items():
        if isinstance(value, dict) and DIVIDED not in value:
            yield from _leaves(value, (*place, key))
        else:
            yield (*place, key), value


def _canonical(place: tuple[str, ...], tensor: Tensor) -> tuple[str, Tensor]:
    """The one layout's name and orientation; an unknown name stays, for the check to refuse it."""
    for wrapper in ("params", "transformer"):
        place = place[1:] if place[0] == wrapper and len(place) > 1 else place
    name = ".".join(place)
    if match := KERNEL.fullmatch(name):
        # The head turns from (C, V) to (V, C), the others from (out, in) to (in, out).
        return f"{match[1]}.weight", tensor.transposed()
    if match := TABLE.fullmatch(name) or NORM.fullmatch(name):
        return f"{match[1]}.weight", tensor
    return name, tensor


def _tensor(file: DataFile, name: str, leaf: Any) -> Tensor:
    match leaf:
        case Extension(code, span) if code in ARRAYS:
            return _array(file, name, span)
        case {"shape": dict(shape), "chunks": dict(chunks)} if leaf.get(DIVIDED) is True:
            return _divided(file, name, _ordered(shape), _ordered(chunks))
    raise CheckpointError(f"{file.path}: {name[:80]}: expected an array, received {str(leaf)[:80]}")


def _array(file: DataFile, name: str, span: Span) -> Tensor:
    """An array's bytes are MessagePack again: shape, name of the type, and the numbers."""
    match unpack(file, span, most=12):
        case [list(shape), str(dtype), Span(start, stop)]:
            pass
        case other:
            raise CheckpointError(
                f"{file.path}: {name[:80]}: expected shape, type and numbers of an array, "
                f"received {str(other)[:80]}"
            )
    if dtype not in KINDS:
        raise CheckpointError(
            f"{file.path}: {name[:80]} is {dtype[:20]!r}; expected one of {', '.join(KINDS)}"
        )
    kind = KINDS[dtype]
    needed = _count(file, name, shape) * FLOATS[kind].itemsize
    if stop - start != needed:
        raise CheckpointError(
            f"{file.path}: {name[:80]} has {stop - start} bytes, but {dtype} of shape {shape} "
            f"takes {needed}"
        )
    return file.tensor(kind, start, tuple(shape))


def _count(file: DataFile, name: str, shape: list[Any]) -> int:
    """The number of elements of a shape, which may be anything."""
    if len(shape) > 8 or not all(type(size) is int and size < 2**63 for size in shape):
        raise CheckpointError(
            f"{file.path}: {name[:80]} has an impossible shape: {str(shape)[:80]}"
        )
    return math.prod(shape)


def _ordered(numbered: dict[str, Any]) -> list[Any]:
    """The values of a map with the keys "0", "1", ...; None where one is missing."""
    return [numbered.get(str(place)) for place in range(len(numbered))]


def _divided(file: DataFile, name: str, shape: list[Any], chunks: list[Any]) -> Tensor:
    """An array whose numbers, flattened, are stored in several pieces."""
    pieces = [_tensor(file, f"{name}/chunks/{i}", chunk) for i, chunk in enumerate(chunks)]
    alike = {(piece.dtype, len(piece.shape)) for piece in pieces}
    held = sum(math.prod(piece.shape) for piece in pieces)
    if len(alike) != 1 or len(pieces[0].shape) != 1 or held != _count(file, name, shape):
        raise CheckpointError(
            f"{file.path}: {name[:80]}: expected flat pieces of one type that make up the shape "
            f"{str(shape)[:80]}, received {len(pieces)} with {held} numbers together"
        )
    return joined(pieces, axis=0).reshaped(*shape)
