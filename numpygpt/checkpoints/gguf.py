"""GGUF files of the architecture ``gpt2``, as llama.cpp writes and runs them.

The converter of llama.cpp turns the four matrices of a block to (out, in); they are turned back
here as views. A head of its own is optional: a file without ``output.weight`` is tied, and the
converter wrote a copy of the token table there until March 2025.

llama.cpp computes every ``gpt2`` file with the tanh form of GELU and plain scaling of the scores,
whatever the model was trained with: its converter drops those settings without a word, and the
format has no place for them. Reading assumes llama.cpp's model; writing refuses any other.

References
----------
ggml-org/llama.cpp: conversion/gpt2.py, src/models/gpt2.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..ops import gelu_new
from ..params import Config, check, shapes
from .arrays import Sink, Tensor, write_array
from .gguf_container import ALIGNMENT, ARRAY, F32, I32, NUMBERS, TEXT, U32, GGUFFile, aligned
from .names import LINEAR
from .source import END_OF_TEXT, Assumption, Source, Vocabulary

__all__ = ["read", "write"]

# llama.cpp's names of arrays, and ours. A block's stand behind "blk.N." and "h.N.".
PARTS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
OUTSIDE = {
    "token_embd.weight": "wte.weight",
    "position_embd.weight": "wpe.weight",
    "output_norm.weight": "ln_f.weight",
    "output_norm.bias": "ln_f.bias",
    "output.weight": "lm_head.weight",
}
IN_BLOCK = re.compile(rf"blk\.([0-9]+)\.({'|'.join(PARTS)})\.(weight|bias)")
OURS = re.compile(r"(h\.[0-9]+|wte|wpe|ln_f|lm_head)\..*")

# Keys that every file must have, behind "gpt2.", and the config fields they are.
EPSILON = "attention.layer_norm_epsilon"
FIELDS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    EPSILON: "layer_norm_epsilon",
}

# Keys that would ask for another model than GPT-2, and the values with which they do not. The
# saver of llama.cpp writes all of them, and a hundred more that its gpt2 code never looks at
# (rope.freq_base, attn_logit_softcapping = 50 ...): those are passed over.
INERT: dict[str, tuple[Any, ...]] = {
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
}

TOKENS, MERGES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type"))
# Kinds of tokens: ordinary ones, and those that text cannot spell.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = (CONTROL, USER_DEFINED, UNUSED)

# Settings of the tokenizer that change the ids of a text.
UNSUPPORTED = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix")

WHY = "llama.cpp computes every gpt2 file so; GGUF has no field for it"
ASSUMED = {
    "activation_function": Assumption("gelu_new", WHY),
    "scale_attn_weights": Assumption(True, WHY),
    "scale_attn_by_inverse_layer_idx": Assumption(False, WHY),
}


def read(path: pathlib.Path) -> Source:
    """Describe a GGUF file; config and vocabulary are in it.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Source
        Quantised tensors are described too; to read one takes the ``gguf`` package.

    Raises
    ------
    CheckpointError
        If the file is damaged, or is no whole model of the architecture ``gpt2``.

    Examples
    --------
    >>> import tempfile
    >>> from numpygpt.params import Config
    >>> config = Config(vocab_size=5, n_ctx=4, n_embd=2, n_layer=1, n_head=1)
    >>> ones = {
    ...     name: Tensor("F32", shape, 0, lambda dtype, shape=shape: np.ones(shape, dtype))
    ...     for name, (shape, _) in shapes(config).items()
    ... }
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "ones.gguf"
    ...     with path.open("wb") as file:
    ...         write(file, config, ones, None, lambda count: None)
    ...     source = read(path)
    >>> source.fields["n_positions"], source.tensors["h.0.mlp.c_fc.weight"].shape
    (4, (2, 8))
    """
    file = GGUFFile(path, "gpt2", (TOKENS, MERGES, KINDS))
    _check_whole(file)
    tensors: dict[str, Tensor] = {}
    for stored, tensor in file.tensors().items():
        name = _our_name(stored)
        if name == stored and OURS.fullmatch(stored):
            raise CheckpointError(f"{path}: {stored!r} is not how llama.cpp names a tensor")
        tensors[name] = tensor.transposed() if LINEAR.fullmatch(name) else tensor
    vocabulary, notes = _vocabulary(file)
    table = tensors.get("wte.weight")
    if vocabulary and table and len(table.shape) == 2 and len(vocabulary.tokens) != table.shape[0]:
        notes.append(
            f"the vocabulary has {len(vocabulary.tokens)} tokens, but the token table has "
            f"{table.shape[0]} rows"
        )
    return Source(
        "GGUF", path.parent, tensors, _fields(file, tensors), dict(ASSUMED), notes, vocabulary
    )


def _check_whole(file: GGUFFile) -> None:
    """Refuse files of the architecture that are not all of a model."""
    count = file.values.get("split.count", 1)
    if count not in (0, 1):
        raise CheckpointError(
            f"{file.path}: one of {str(count)[:20]} parts of a model; join them with "
            f"llama-gguf-split --merge"
        )
    kind = file.values.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file.path}: expected a model, received {str(kind)[:40]!r}")
    # Version 1 had other blocks under the same names; it ended before GGUF began.
    version = file.values.get("general.quantization_version", 2)
    if version != 2:
        raise CheckpointError(
            f"{file.path}: general.quantization_version is {str(version)[:20]}, expected 2"
        )


def _our_name(name: str) -> str:
    """The name in the Hugging Face layout, or the same if there is none."""
    if match := IN_BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        return f"h.{layer}.{PARTS[part]}.{kind}"
    return OUTSIDE.get(name, name)


def _their_name(name: str) -> str:
    """llama.cpp's name of an array of the Hugging Face layout."""
    if name.startswith("h."):
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{next(n for n, ours in PARTS.items() if ours == part)}.{kind}"
    return next(theirs for theirs, ours in OUTSIDE.items() if ours == name)


def _fields(file: GGUFFile, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config, in the words of ``config.json``; what does not belong to GPT-2 is refused."""
    told = {
        key.removeprefix("gpt2."): value
        for key, value in file.values.items()
        if key.startswith("gpt2.")
    }
    fields: dict[str, Any] = {}
    for key, name in FIELDS.items():
        expected = float if key == EPSILON else int
        if type(told.get(key)) is not expected:
            what = "is missing" if key not in told else f"must be one {expected.__name__}"
            raise CheckpointError(f"{file.path}: gpt2.{key} {what}")
        fields[name] = told[key]
    fields["layer_norm_epsilon"] = _decimal(fields["layer_norm_epsilon"])
    width, heads = fields["n_embd"], fields["n_head"]
    if fields["n_inner"] == 4 * width:
        del fields["n_inner"]
    table = tensors.get("wte.weight")
    if table is not None and len(table.shape) == 2:
        fields["vocab_size"] = table.shape[0]
    elif "vocab_size" in told:
        fields["vocab_size"] = told["vocab_size"]
    fields["tie_word_embeddings"] = "lm_head.weight" not in tensors
    head_dim = width // heads if heads else 0
    allowed = {
        **INERT,
        "vocab_size": (fields.get("vocab_size"),),
        "attention.head_count_kv": (heads,),
        "attention.key_length": (head_dim,),
        "attention.value_length": (head_dim,),
    }
    for key, values in allowed.items():
        if key in told and told[key] not in values:
            raise CheckpointError(
                f"{file.path}: gpt2.{key} is {str(told[key])[:40]}, expected {values[0]}: GPT-2 "
                f"has nothing else"
            )
    return fields


def _decimal(value: float) -> float:
    """A decimal of six digits if float32 rounds it to this number, else the number itself.

    1e-05 is stored as the float32 nearest to it, and that is not 1e-05.

    >>> _decimal(9.999999747378752e-06), _decimal(2.0**-17)
    (1e-05, 7.62939453125e-06)
    """
    short = float(f"{value:.6g}")
    with np.errstate(over="ignore"):
        return short if float(np.float32(short)) == value else value


def _vocabulary(file: GGUFFile) -> tuple[Vocabulary | None, list[str]]:
    """The vocabulary of the file, if its tokenizer is GPT-2's, and what to say about it."""
    values = file.values
    settings = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in values.items()
        if key.startswith("tokenizer.ggml.")
    }
    model = settings.get("model", "no_vocab")
    if model in ("no_vocab", "none"):
        return None, ["it carries no vocabulary"]
    cut = settings.get("pre", "default")
    reasons = [f"its tokenizer is {str(model)[:40]!r}"] if model != "gpt2" else []
    if cut not in ("gpt-2", "default"):
        reasons.append(f"it cuts text into words as {str(cut)[:40]!r} does")
    reasons += [f"{key} is set" for key in UNSUPPORTED if settings.get(key, False) is not False]
    if reasons:
        return None, [f"its vocabulary is not used, because {' and '.join(reasons)}"]
    tokens, merges, kinds = values.get(TOKENS), values.get(MERGES), values.get(KINDS)
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise CheckpointError(f"{file.path}: {TOKENS} and {MERGES} must be lists of texts")
    if kinds is None:
        special = [tokens.index(END_OF_TEXT)] if END_OF_TEXT in tokens else []
    elif isinstance(kinds, np.ndarray) and kinds.shape == (len(tokens),):
        special = np.flatnonzero(np.isin(kinds, SPECIAL)).tolist()
    else:
        raise CheckpointError(f"{file.path}: {KINDS} must have one number for each token")
    notes = []
    if cut == "default":
        notes.append("how it cuts text into words is not said; taken to be GPT-2's way")
    return Vocabulary(tokens, merges, special), notes


def write(
    file: Sink,
    config: Config,
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary | None,
    advance: Callable[[int], None],
) -> None:
    """Write a GGUF file of float32 that llama.cpp loads.

    llama.cpp needs every bias and shift, so a model without any gets zeros; and a name for each
    row of the token table, so a vocabulary that has fewer is filled up with unused tokens.

    Parameters
    ----------
    file : binary file
        Open and empty.
    config : Config
    tensors : mapping of str to Tensor
        Under the names of the Hugging Face layout. A head that is stored although it is tied is
        left out; llama.cpp before March 2025 cannot load a tied model.
    vocabulary : Vocabulary, optional
        Without one, llama.cpp takes token ids alone.
    advance : callable
        Told how many bytes of tensors were written.

    Raises
    ------
    CheckpointError
        If GGUF cannot express the model, or a number is too large for float32.
    """
    _refuse_other_models(config)
    expected = shapes(dataclasses.replace(config, bias=True))
    found = {n: t for n, t in tensors.items() if n in expected}
    check(config, {name: tensor.shape for name, tensor in found.items()})
    stored = {}
    for name, (shape, _) in expected.items():
        tensor = found.get(name) or _zeros(shape)
        stored[name] = tensor.transposed() if LINEAR.fullmatch(name) else tensor
    values = {**_settings(config), **_tokenizer(config, vocabulary)}
    file.write(_header(values, {_their_name(name): t.shape for name, t in stored.items()}))
    for name, tensor in stored.items():
        array = tensor.read(tensor.exact)
        write_array(file, array, "F32", advance, name)
        file.write(bytes(-4 * array.size % ALIGNMENT))


def _refuse_other_models(config: Config) -> None:
    """Refuse what llama.cpp would silently compute in another way."""
    differing = {name: each for name, each in ASSUMED.items() if name != "activation_function"}
    for name, (value, _, _) in differing.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"GGUF cannot express {name} = {getattr(config, name)!r}: llama.cpp computes "
                f"every gpt2 file with {value!r}; write safetensors instead"
            )
    if config.activation is not gelu_new:
        raise CheckpointError(
            f"GGUF cannot express activation_function = {config.activation_function!r}: llama.cpp "
            f"computes every gpt2 file with 'gelu_new'; write safetensors instead"
        )
    epsilon = config.layer_norm_epsilon
    nearest = _decimal(float(np.float32(epsilon)))
    if nearest != epsilon:
        raise CheckpointError(
            f"GGUF cannot express layer_norm_epsilon = {epsilon!r}: it is stored in float32; "
            f"{nearest!r} could be"
        )


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor("F32", shape, 4 * math.prod(shape), lambda dtype: np.zeros(shape, dtype))


def _settings(config: Config) -> dict[str, tuple[Any, ...]]:
    """What llama.cpp must know before it looks at tensors; each has its type first."""
    return {
        "general.architecture": (TEXT, "gpt2"),
        "general.name": (TEXT, "GPT-2"),
        "general.file_type": (U32, 0),  # all of it float32
        "gpt2.context_length": (U32, config.n_ctx),
        "gpt2.embedding_length": (U32, config.n_embd),
        "gpt2.feed_forward_length": (U32, config.mlp_dim),
        "gpt2.block_count": (U32, config.n_layer),
        "gpt2.attention.head_count": (U32, config.n_head),
        f"gpt2.{EPSILON}": (F32, config.layer_norm_epsilon),
    }


def _tokenizer(config: Config, vocabulary: Vocabulary | None) -> dict[str, tuple[Any, ...]]:
    """A vocabulary as llama.cpp needs it, with one token for each row of the token table."""
    if vocabulary is None:
        return {
            "tokenizer.ggml.model": (TEXT, "no_vocab"),
            "gpt2.vocab_size": (U32, config.vocab_size),
        }
    count, rows = len(vocabulary.tokens), config.vocab_size
    if count > rows:
        raise CheckpointError(
            f"the vocabulary has {count} tokens, but the token table has {rows} rows; GGUF needs "
            f"one row for each token"
        )
    tokens = [*vocabulary.tokens, *(f"[PAD{i}]" for i in range(count, rows))]
    kinds = [NORMAL] * count + [UNUSED] * (rows - count)
    for i in vocabulary.special:
        kinds[i] = UNUSED if tokens[i] == f"[PAD{i}]" else CONTROL
    if len(set(tokens)) < rows:
        twice = next(token for token, n in collections.Counter(tokens).items() if n > 1)
        raise CheckpointError(f"GGUF cannot express two tokens with one name: {twice[:40]!r}")
    try:
        "".join([*tokens, *vocabulary.merges]).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"GGUF cannot express the vocabulary: {error}") from None
    if END_OF_TEXT not in tokens:  # llama.cpp would take token 11 for it
        raise CheckpointError(
            f"GGUF cannot express a vocabulary without {END_OF_TEXT}, which ends texts in "
            f"llama.cpp; write the model without its vocabulary"
        )
    end = tokens.index(END_OF_TEXT)
    return {
        "tokenizer.ggml.model": (TEXT, "gpt2"),
        "tokenizer.ggml.pre": (TEXT, "gpt-2"),
        TOKENS: (ARRAY, TEXT, tokens),
        KINDS: (ARRAY, I32, kinds),
        MERGES: (ARRAY, TEXT, vocabulary.merges),
        "tokenizer.ggml.bos_token_id": (U32, end),
        "tokenizer.ggml.eos_token_id": (U32, end),
    }


def _header(values: Mapping[str, tuple[Any, ...]], dims: Mapping[str, tuple[int, ...]]) -> bytes:
    """All of a file of float32 that comes before its tensors, which follow in the order given.

    A value is its type and itself; a list is :data:`ARRAY`, the type of its items, and the items.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(dims), len(values))]
    for key, (kind, *rest) in values.items():
        parts += [_packed(TEXT, key), _packed(U32, kind)]
        if kind == ARRAY:
            item, content = rest
            parts.append(struct.pack("<IQ", item, len(content)))
            parts += [_packed(item, each) for each in content]
        else:
            parts.append(_packed(kind, rest[0]))
    start = 0
    for name, shape in dims.items():
        parts.append(_packed(TEXT, name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 0, start))
        start += aligned(4 * math.prod(shape), ALIGNMENT)
    content = b"".join(parts)
    return content.ljust(aligned(len(content), ALIGNMENT), b"\0")


def _packed(kind: int, value: Any) -> bytes:
    if kind != TEXT:
        return NUMBERS[kind].pack(value)
    content = value.encode()
    return struct.pack("<Q", len(content)) + bytes(content)
