"""From the names and orientations that programs give GPT-2's arrays to those of one layout.

The layout is Hugging Face's: ``h.0.attn.c_attn.weight`` and so on, without a prefix, matrices
(in, out). What only differs in spelling is settled here; whether the arrays fit a config is
settled by :func:`numpygpt.params.check`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..params import Array, shown
from .arrays import Tensor

__all__ = ["LINEAR", "MASK_BUFFER", "canonical", "joined", "sizes"]

# Causal masks that old versions of transformers, nanoGPT and minGPT stored among the weights.
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")

# The matrices that nn.Linear would store the other way round.
LINEAR = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")

# minGPT until 2022, and what its arrays are called now. Its q, k and v are joined afterwards.
OLD_MINGPT = [
    (re.compile(r"tok_emb\.weight"), "wte.weight"),
    (re.compile(r"pos_emb"), "wpe.weight"),
    (re.compile(r"head\.weight"), "lm_head.weight"),
    (re.compile(r"(ln_f\.(?:weight|bias))"), r"\1"),
    (re.compile(r"blocks\.(\d+)\.ln([12])\.(weight|bias)"), r"h.\1.ln_\2.\3"),
    (re.compile(r"blocks\.(\d+)\.attn\.mask"), r"h.\1.attn.bias"),
    (re.compile(r"blocks\.(\d+)\.attn\.(query|key|value)\.(weight|bias)"), r"h.\1.attn.\2.\3"),
    (re.compile(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)"), r"h.\1.attn.c_proj.\2"),
    (re.compile(r"blocks\.(\d+)\.mlp\.0\.(weight|bias)"), r"h.\1.mlp.c_fc.\2"),
    (re.compile(r"blocks\.(\d+)\.mlp\.2\.(weight|bias)"), r"h.\1.mlp.c_proj.\2"),
]


def canonical(stored: Mapping[str, Tensor], source: object) -> tuple[dict[str, Tensor], list[str]]:
    """The arrays of a PyTorch-like checkpoint in the one layout.

    Parameters
    ----------
    stored : mapping of str to Tensor
        As the file names and turns them.
    source : object
        Names the file in messages.

    Returns
    -------
    tensors : dict of str to Tensor
    notes : list of str
        What was changed besides a prefix.

    Raises
    ------
    CheckpointError
        If two arrays would get one name.

    Examples
    --------
    >>> table, gain = Tensor("F32", (9, 2), 72, None), Tensor("F32", (2,), 8, None)
    >>> wide = Tensor("F32", (6, 2), 48, None)
    >>> stored = {"wte.weight": table, "ln_f.weight": gain, "h.0.attn.c_attn.weight": wide}
    >>> stored = {f"_orig_mod.transformer.{name}": tensor for name, tensor in stored.items()}
    >>> tensors, notes = canonical(stored | {"_orig_mod.lm_head.weight": table}, "ckpt.pt")
    >>> list(tensors)
    ['wte.weight', 'ln_f.weight', 'h.0.attn.c_attn.weight', 'lm_head.weight']
    >>> tensors["h.0.attn.c_attn.weight"].shape
    (2, 6)
    """
    if any(key.endswith("tok_emb.weight") for key in stored):
        return _old_mingpt(stored, source)
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    prefixes = _prefixes(stored)
    for key, tensor in stored.items():
        name = next(key[len(p) :] for p in (*prefixes, "") if key.startswith(p))
        if name in tensors:
            raise CheckpointError(
                f"{source}: {shown(name)} stands in it twice, as {shown(keys[name])} and as "
                f"{shown(key)}"
            )
        tensors[name], keys[name] = tensor, key
    if not _stored_out_in(tensors):
        return tensors, []
    return _turned(tensors), ["matrices stored (out, in), as nn.Linear has them: transposed"]


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config fields that the shapes of arrays tell: all sizes but the number of heads.

    >>> table, positions = Tensor("F32", (17, 8), 0, None), Tensor("F32", (12, 8), 0, None)
    >>> sizes({"wte.weight": table, "wpe.weight": positions})
    {'vocab_size': 17, 'n_embd': 8, 'n_positions': 12, 'n_layer': 0, 'tie_word_embeddings': True}
    """
    fields: dict[str, Any] = {}
    table, positions = tensors.get("wte.weight"), tensors.get("wpe.weight")
    if table is not None and len(table.shape) == 2:
        fields["vocab_size"], fields["n_embd"] = table.shape
    if positions is not None and len(positions.shape) == 2:
        fields["n_positions"] = positions.shape[0]
    fields["n_layer"] = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    wide = tensors.get("h.0.mlp.c_fc.weight")
    if wide is not None and len(wide.shape) == 2 and wide.shape[1] != 4 * wide.shape[0]:
        fields["n_inner"] = wide.shape[1]
    fields["tie_word_embeddings"] = tensors.get("lm_head.weight", table) is table
    return fields


def joined(parts: list[Tensor], axis: int) -> Tensor:
    """Arrays that a format keeps apart, side by side."""
    first = parts[0]
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)

    def load(dtype: np.dtype[Any]) -> Array:
        return np.concatenate([part.read(dtype) for part in parts], axis)

    kinds = {part.dtype for part in parts}
    widest = kinds.pop() if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"
    return Tensor(widest, tuple(shape), sum(part.nbytes for part in parts), load)


def _prefixes(stored: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names: ``transformer.`` and what wrappers of a module add to it.

    The token table tells: it is ``wte.weight`` behind the prefix. A head lies one level above.
    """
    table = next((key for key in stored if re.fullmatch(r"(.*\.)?wte\.weight", key)), "wte.weight")
    prefix = table.removesuffix("wte.weight")
    outer = prefix.removesuffix("transformer.")
    return [p for p in dict.fromkeys((prefix, outer + "transformer.", outer)) if p]


def _stored_out_in(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every matrix whose shape can tell is (out, in); attn.c_proj is square and cannot."""
    gain = tensors.get("ln_f.weight")
    width = gain.shape[0] if gain is not None and len(gain.shape) == 1 else None
    # The axis that has the width of the residual stream when the matrix is (out, in). A square
    # matrix cannot tell.
    told = [
        len(tensor.shape) == 2 and tensor.shape[axis] == width
        for end, axis in (
            ("attn.c_attn.weight", 1),
            ("mlp.c_fc.weight", 1),
            ("mlp.c_proj.weight", 0),
        )
        for name, tensor in tensors.items()
        if name.startswith("h.") and name.endswith(end) and len(set(tensor.shape)) != 1
    ]
    return bool(told) and all(told)


def _turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices that :data:`LINEAR` names, transposed; what was one tensor stays one."""
    turned = {id(t): t.transposed() for name, t in tensors.items() if LINEAR.fullmatch(name)}
    return {
        name: turned[id(tensor)] if LINEAR.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


def _old_mingpt(
    stored: Mapping[str, Tensor], source: object
) -> tuple[dict[str, Tensor], list[str]]:
    table = next(key for key in stored if key.endswith("tok_emb.weight"))
    prefix = table.removesuffix("tok_emb.weight")
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(prefix)
        for pattern, now in OLD_MINGPT:
            if match := pattern.fullmatch(name):
                name = match.expand(now)
                break
        if name in tensors:
            raise CheckpointError(f"{source}: {shown(name)} stands in it twice")
        tensors[name] = tensor
    positions = tensors.get("wpe.weight")
    if positions is not None and len(positions.shape) == 3 and positions.shape[0] == 1:
        tensors["wpe.weight"] = positions.reshaped(*positions.shape[1:])
    wholes: dict[tuple[int, ...], Tensor] = {}
    for key in [name for name in tensors if ".attn.query." in name]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shape = tensors[key].shape
        if shape and all(part in tensors and tensors[part].shape == shape for part in parts):
            held = [tensors.pop(part) for part in parts]
            whole = wholes.setdefault(tuple(map(id, held)), joined(held, axis=0))
            tensors[key.replace(".query.", ".c_attn.")] = whole
    return _turned(tensors), ["separate q, k and v joined; matrices stored (out, in): transposed"]
