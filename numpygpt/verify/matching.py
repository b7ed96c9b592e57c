"""Which array of a recording is which intermediate, and in what layout.

A user's mapping decides first, then trace keys, then the spellings of :mod:`.names`. Where a shape
allows several layouts (T = C, B = T ...), and for arrays whose name says nothing, the values
decide, as :mod:`.recognition` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DumpError
from ..params import Array, Config, listing, shown
from ..plans import trace_names
from .dump import Dump, Match
from .dumps.recording import Recording, as_ids, check_chunks, check_dtype, check_weights
from .layouts import Placed, Sizes, expected_shapes, fitting, kind
from .names import PARTS, Known, known, mapped, whole
from .nearness import Expected, Reference
from .operations import layer_of
from .recognition import Found, Notes, choose, recognised

__all__ = ["match"]


def match(
    recording: Recording,
    config: Config,
    expected: Expected,
    mapping: Mapping[str, str | None] | None = None,
    ids: Any = None,
    dtype: str | None = None,
    weights: str | None = None,
    chunks: Sequence[int] | None = None,
) -> list[Dump]:
    """Give the arrays of a recording the names and axes of the trace.

    Parameters
    ----------
    recording : Recording
    config : Config
        Of the model it is to be compared with.
    expected : callable
        ``expected(ids, names)`` is our own float64 trace, such as ``model.trace``. It is called
        only where values must decide, and with the first sequence.
    mapping : mapping of str to str or None, optional
        Their name -> trace key, see :func:`.names.mapped`. It comes before every other rule.
    ids : (T,) or (B, T) array of int, optional
        The tokens, if the recording has none.
    dtype : str, optional
        What the program computed in, if the recording does not say so.
    weights : str, optional
        How its weights were stored.
    chunks : sequence of int, optional
        How many tokens each pass read.

    Returns
    -------
    list of Dump
        One for each sequence.

    Raises
    ------
    DumpError
        If the ids are missing or impossible, an array with a known name has no fitting shape or
        is not floating point, two different arrays claim one name, or nothing could be matched.

    Examples
    --------
    >>> import tempfile
    >>> import numpygpt
    >>> from numpygpt.verify import dumps
    >>> model, ids = numpygpt.load("shakespeare", dtype="float64"), [46, 1, 2]
    >>> trace = model.trace(ids)
    >>> path = tempfile.mkdtemp() + "/run.npz"
    >>> np.savez(path, ids=ids, **{"transformer.h.0.mlp.act": trace["h.0.mlp.post"][None]})
    >>> (dump,) = match(dumps.read(path), model.config, model.trace)
    >>> dump.matches[0].name, dump.matches[0].layout
    ('h.0.mlp.post', '(B, T, F) -> (T, F)')
    """
    notes = Notes({}, list(recording.notes))
    tokens = _tokens(recording, config, ids)
    sizes = Sizes(config, *tokens.shape)
    reference = Reference(expected, tokens[0])
    claims, loose = _named(recording, config, mapping or {}, notes)
    groups: dict[str, list[Found]] = {}
    for name, claim in claims:
        for key, found in _place(name, recording, claim, sizes, reference, notes):
            groups.setdefault(key, []).append(found)
    settled = {key: _settle(key, found, notes) for key, found in groups.items()}
    settled |= recognised(loose, settled, sizes, reference, notes)
    settled = _put_together(settled, config, notes)
    if not settled:
        raise DumpError(
            f"{recording.source}: none of its {len(recording.tensors)} arrays is an intermediate "
            f"of this model: "
            + "; ".join(f"{shown(n)}: {why}" for n, why in list(notes.unmatched.items())[:3])
            + "; name them in a mapping"
        )
    return _dumps(recording, tokens, settled, notes, dtype, weights, chunks)


def _tokens(recording: Recording, config: Config, ids: Any) -> Array:
    """The tokens (B, T), checked."""
    where = recording.source
    if ids is None and recording.ids is None:
        raise DumpError(
            f"{where}: holds no token ids; name the tokens its program read, or store them as 'ids'"
        )
    given = None if ids is None else as_ids(ids, "ids")
    tokens = recording.ids if given is None else given
    assert tokens is not None
    if given is not None and recording.ids is not None and not np.array_equal(given, recording.ids):
        raise DumpError(f"{where}: holds other token ids than those given")
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise DumpError(
            f"{where}: token id {wrong[0]} is outside the vocabulary, 0 to {config.vocab_size - 1}"
        )
    if tokens.shape[1] > config.n_ctx:
        raise DumpError(
            f"{where}: {tokens.shape[1]} tokens, but the model has {config.n_ctx} positions"
        )
    return tokens


def _named(
    recording: Recording, config: Config, mapping: Mapping[str, str | None], notes: Notes
) -> tuple[list[tuple[str, Known]], dict[str, Array]]:
    """The arrays whose names say what they are, and the others."""
    lines = mapped(mapping, config.n_layer)
    used: set[str] = set()
    claims: list[tuple[str, Known]] = []
    loose: dict[str, Array] = {}
    for name in (*recording.tensors, *recording.others):
        claim = None
        for line in lines:
            if found := line.pattern.fullmatch(name):
                used.add(line.name)
                claim = _mapped(name, line.key, found.groupdict().get("i"), config)
        claim = claim or known(name, config.n_layer)
        if name in recording.others:
            if claim is not None and claim.keys and recording.others[name].endswith("point"):
                raise DumpError(
                    f"{recording.source}: {shown(name)} is {recording.others[name]}, as "
                    f"{claim.keys[0]} must be"
                )
            notes.unmatched[name] = recording.others[name]
        elif claim is None:
            loose[name] = recording.tensors[name]
        elif claim.keys:
            claims.append((name, claim))
        else:
            notes.unmatched[name] = claim.reason
    if unused := [line.name for line in lines if line.name not in used]:
        raise DumpError(
            f"{recording.source}: the mapping names arrays that are not there: {listing(unused)}"
        )
    return claims, loose


def _mapped(name: str, key: str | None, layer: str | None, config: Config) -> Known:
    """What a line of the mapping makes of a name."""
    if key is None:
        return Known((), "mapping", "left out by the mapping")
    if layer is None:
        return Known((key,), "mapping")
    if int(layer) >= config.n_layer:
        raise DumpError(
            f"{shown(name)}: is of layer {layer}, but the model has layers 0 to "
            f"{config.n_layer - 1}"
        )
    return Known((key.replace("{i}", str(int(layer))),), "mapping")


def _place(
    name: str,
    recording: Recording,
    claim: Known,
    sizes: Sizes,
    reference: Reference,
    notes: Notes,
) -> list[tuple[str, Found]]:
    """An array with a known name in our axes, or all layers of one."""
    array, layers = recording.tensors[name], sizes.config.n_layer
    stacked = any("{i}" in key for key in claim.keys)
    if stacked and array.shape[:1] != (layers,):
        raise DumpError(
            f"{recording.source}: {shown(name)} holds {claim.keys[0]} of all layers: expected "
            f"{layers} of them along its first axis, received the shape {array.shape}"
        )
    made = []
    for i in range(layers) if stacked else [None]:
        keys = [key if i is None else key.replace("{i}", str(i)) for key in claim.keys]
        own = array if i is None else array[i]
        options = [
            (key, placed) for key in keys for placed in fitting(own, kind(key), sizes, stacked)
        ]
        heads = None if options else _other_heads(own, kind(keys[0]), sizes)
        if heads is not None:
            notes.unmatched[name] = f"has {heads} heads, the model has {sizes.config.n_head}"
            continue
        if not options:
            raise DumpError(_misfit(recording, name, keys, array, sizes, stacked))
        key, placed = choose(name, options, reference, notes)
        doubtful = claim.how != "mapping" and name.endswith("hook_normalized")
        if doubtful and _before_gain(key, placed.array[0], reference):
            notes.unmatched[name] = (
                f"normalised, but before gain and shift, which TransformerLens folded into other "
                f"weights: it is not {key}; record with from_pretrained_no_processing"
            )
            continue
        made.append((key, Found((name,), claim.how, placed, claim.given)))
    return made


def _misfit(
    recording: Recording, name: str, keys: list[str], array: Array, sizes: Sizes, stacked: bool
) -> str:
    wanted = " or ".join(dict.fromkeys(expected_shapes(kind(key), sizes) for key in keys))
    shape = array.shape[1:] if stacked else array.shape
    hint = ""
    if sizes.tokens > 1 and fitting(
        np.broadcast_to(np.float32(0), shape), kind(keys[0]), sizes._replace(tokens=1)
    ):
        hint = f"; it holds one token of {sizes.tokens}: record every position"
    return (
        f"{recording.source}: {shown(name)}, which is {keys[0]}, has the shape {shape}, expected "
        f"{wanted}{hint}"
    )


def _other_heads(array: Array, axes: str, sizes: Sizes) -> int | None:
    """With how many heads the array would fit. A wrong number of them is a known mistake."""
    width = sizes.config.n_embd
    for heads in (n for n in range(2, width + 1) if width % n == 0):
        config = dataclasses.replace(sizes.config, n_head=heads)
        if axes.startswith("H") and fitting(array, axes, sizes._replace(config=config)):
            return heads
    return None


def _before_gain(key: str, array: Array, reference: Reference) -> bool:
    """Whether rows are normalised and nothing else, unlike ours."""
    with np.errstate(all="ignore"):
        rows = array.astype(np.float64)
        means, squares = rows.mean(axis=-1), np.square(rows).mean(axis=-1)
        # bfloat16 rounds each number by up to 2**-9 of it.
        plain = (np.abs(means) < 0.01).all() and (np.abs(squares - 1) < 0.02).all()
    return bool(plain) and reference.distance(key, array) > 0.01


def _settle(key: str, found: list[Found], notes: Notes) -> Found:
    """The one of several arrays for one name."""
    order = sorted(found, key=lambda each: (each.how != "mapping", each.given))
    first = order[0]
    for other in order[1:]:
        if np.array_equal(first.placed.array, other.placed.array, equal_nan=True):
            notes.unmatched[other.sources[0]] = f"the same numbers as {first.label}"
        elif first.how == "mapping" and other.how != "mapping":
            notes.unmatched[other.sources[0]] = f"the mapping names {first.label} {key}"
        elif other.given:
            notes.unmatched[other.sources[0]] = (
                f"differs from {first.label}, though both should be {key}: something "
                f"lies between them"
            )
        else:
            raise DumpError(
                f"{first.label} and {other.label} are both {key}, but hold "
                f"different numbers; leave one out, or map one to null. (With dropout on, a "
                f"program cannot be verified.)"
            )
    return first


def _put_together(settled: Mapping[str, Found], config: Config, notes: Notes) -> dict[str, Found]:
    """Queries, keys and values side by side."""
    made = {key: found for key, found in settled.items() if key == whole(key)}
    for layer in range(config.n_layer):
        key, sides = f"h.{layer}.attn.qkv", [f"h.{layer}.attn.{part}" for part in PARTS]
        parts = {side: settled[side] for side in sides if side in settled}
        if key in made:
            for side, columns in zip(sides, np.split(made[key].placed.array, 3, -1), strict=True):
                if side in parts:
                    same = np.array_equal(columns, parts[side].placed.array, equal_nan=True)
                    notes.unmatched[parts[side].sources[0]] = (
                        f"{'' if same else 'not '}the columns of {side[-1]} in {made[key].label}"
                    )
        elif len(parts) == len(PARTS):
            made[key] = _side_by_side([parts[side] for side in sides])
        else:
            for side, found in parts.items():
                missing = [each[-1] for each in sides if each not in parts]
                notes.unmatched[found.sources[0]] = (
                    f"is {side}, but {' and '.join(missing)} is missing"
                )
    return made


def _side_by_side(parts: list[Found]) -> Found:
    """Three arrays as one; the source has all three names."""
    array = np.concatenate([part.placed.array for part in parts], axis=-1)
    layouts = dict.fromkeys(part.placed.layout.partition(" -> ")[0] or "(T, C)" for part in parts)
    how = next((part.how for part in parts if part.how != "name"), "name")
    placed = Placed(array, f"q, k, v of {', '.join(layouts)} -> (T, 3C)")
    return Found(tuple(part.sources[0] for part in parts), how, placed)


def _dumps(
    recording: Recording,
    tokens: Array,
    settled: Mapping[str, Found],
    notes: Notes,
    dtype: str | None,
    weights: str | None,
    chunks: Sequence[int] | None,
) -> list[Dump]:
    """One dump for each sequence."""
    where = recording.source
    computed = recording.dtype if dtype is None else check_dtype(dtype, "dtype")
    if computed is None:
        computed = recording.stored
        notes.notes.append(f"computed in {computed}, judging by how its arrays are stored")
    passes = recording.chunks if chunks is None else check_chunks(chunks, "chunks")
    if passes and sum(passes) != tokens.shape[1]:
        raise DumpError(
            f"{where}: its passes read {sum(passes)} tokens together, but there are "
            f"{tokens.shape[1]}"
        )
    order = [key for key in trace_names(_layers(settled)) if key in settled]
    found = [settled[key] for key in order]
    matches = tuple(
        Match(key, each.sources, each.how, each.placed.layout)
        for key, each in zip(order, found, strict=True)
    )
    return [
        Dump(
            ids=ids,
            tensors={key: settled[key].placed.array[index] for key in order},
            dtype=computed,
            weights=recording.weights if weights is None else check_weights(weights, "weights"),
            chunks=passes,
            producer=recording.producer,
            source=where,
            matches=matches,
            unmatched=tuple(f"{shown(name)}: {why}" for name, why in notes.unmatched.items()),
            notes=tuple(notes.notes),
        )
        for index, ids in enumerate(tokens)
    ]


def _layers(settled: Iterable[str]) -> int:
    return 1 + max((layer_of(key) for key in settled), default=0)
