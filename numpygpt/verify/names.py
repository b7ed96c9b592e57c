"""What other programs call the intermediates of a GPT-2.

A name is taken apart as ``prefix.`` + a name of the table + what hooks append; the first whole
number in it is the layer. Names of modules mean what the module returns, and with ``.input`` what
it was given. Where the name of a layer's array has no number, the layers are its first axis, as
in llm.c.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from ..checkpoints.json_files import parse_json, read_small
from ..errors import DumpError
from ..params import shown
from ..plans import trace_names
from .operations import layer_of

__all__ = [
    "PARTS",
    "Known",
    "Mapped",
    "known",
    "mapped",
    "part_names",
    "read_mapping",
    "source_of",
    "whole",
]

# q, k and v side by side are the columns of attn.qkv.
PARTS = ("q", "k", "v")

# transformers, nanoGPT, minGPT: names of modules.
MODULES = {
    "drop": "embed",
    "h.{i}": "h.{i}.resid_post",
    "h.{i}.attn": "h.{i}.attn.out",
    "h.{i}.attn.c_attn": "h.{i}.attn.qkv",
    "h.{i}.attn.attn_dropout": "h.{i}.attn.pattern",
    "h.{i}.attn.c_proj": "h.{i}.attn.out",
    "h.{i}.attn.resid_dropout": "h.{i}.attn.out",
    "h.{i}.mlp": "h.{i}.mlp.out",
    "h.{i}.mlp.c_fc": "h.{i}.mlp.pre",
    "h.{i}.mlp.act": "h.{i}.mlp.post",
    "h.{i}.mlp.gelu": "h.{i}.mlp.post",
    "h.{i}.mlp.c_proj": "h.{i}.mlp.out",
    "h.{i}.mlp.dropout": "h.{i}.mlp.out",
    "lm_head": "logits",
    # What transformers returns. For hidden_states see _hidden.
    "last_hidden_state": "ln_f",
    "attentions.{i}": "h.{i}.attn.pattern",
}

# What modules are given.
INPUTS = {
    "drop.input": "embed",
    "h.{i}.input": "h.{i}.resid_pre",
    "h.{i}.ln_1.input": "h.{i}.resid_pre",
    "h.{i}.attn.input": "h.{i}.ln_1",
    "h.{i}.attn.c_attn.input": "h.{i}.ln_1",
    "h.{i}.attn.c_proj.input": "h.{i}.attn.heads",
    "h.{i}.attn.resid_dropout.input": "h.{i}.attn.out",
    "h.{i}.ln_2.input": "h.{i}.resid_mid",
    "h.{i}.mlp.input": "h.{i}.ln_2",
    "h.{i}.mlp.c_fc.input": "h.{i}.ln_2",
    "h.{i}.mlp.act.input": "h.{i}.mlp.pre",
    "h.{i}.mlp.gelu.input": "h.{i}.mlp.pre",
    "h.{i}.mlp.c_proj.input": "h.{i}.mlp.post",
    "h.{i}.mlp.dropout.input": "h.{i}.mlp.out",
    "ln_f.input": "h.{last}.resid_post",
    "lm_head.input": "ln_f",
}

# TransformerLens: hook points. They are GPT-2's own intermediates only after
# HookedTransformer.from_pretrained_no_processing; its other loaders fold the layer norms' gains
# into the next matrix and centre the stream.
TRANSFORMER_LENS = {
    "blocks.{i}.hook_resid_pre": "h.{i}.resid_pre",
    "blocks.{i}.ln1.hook_normalized": "h.{i}.ln_1",
    "blocks.{i}.attn.hook_q": "h.{i}.attn.q",
    "blocks.{i}.attn.hook_k": "h.{i}.attn.k",
    "blocks.{i}.attn.hook_v": "h.{i}.attn.v",
    "blocks.{i}.attn.hook_attn_scores": "h.{i}.attn.scores",
    "blocks.{i}.attn.hook_pattern": "h.{i}.attn.pattern",
    "blocks.{i}.attn.hook_attn": "h.{i}.attn.pattern",
    "blocks.{i}.attn.hook_z": "h.{i}.attn.heads",
    "blocks.{i}.hook_attn_out": "h.{i}.attn.out",
    "blocks.{i}.hook_resid_mid": "h.{i}.resid_mid",
    "blocks.{i}.ln2.hook_normalized": "h.{i}.ln_2",
    "blocks.{i}.mlp.hook_pre": "h.{i}.mlp.pre",
    "blocks.{i}.mlp.hook_post": "h.{i}.mlp.post",
    "blocks.{i}.hook_mlp_out": "h.{i}.mlp.out",
    "blocks.{i}.hook_resid_post": "h.{i}.resid_post",
    "ln_final.hook_normalized": "ln_f",
}

# llm.c: the fields of ActivationTensors, all layers in one array.
LLM_C = {
    "encoded": "embed",
    "ln1": "h.{i}.ln_1",
    "qkv": "h.{i}.attn.qkv",
    "att": "h.{i}.attn.pattern",
    "atty": "h.{i}.attn.heads",
    "attproj": "h.{i}.attn.out",
    "residual2": "h.{i}.resid_mid",
    "ln2": "h.{i}.ln_2",
    "fch": "h.{i}.mlp.pre",
    "fch_gelu": "h.{i}.mlp.post",
    "fcproj": "h.{i}.mlp.out",
    "residual3": "h.{i}.resid_post",
    "lnf": "ln_f",
}

# llama.cpp: names that its eval callback sees. Its kqv_out was what attention adds to the stream
# until 2024, and is the merged heads since; the values decide.
LLAMA_CPP = {
    "inpL": "embed",
    "attn_norm-{i}": "h.{i}.ln_1",
    "bqkv-{i}": "h.{i}.attn.qkv",
    "wqkv_b-{i}": "h.{i}.attn.qkv",
    "Qcur-{i}": "h.{i}.attn.q",
    "Kcur-{i}": "h.{i}.attn.k",
    "Vcur-{i}": "h.{i}.attn.v",
    "kq_soft_max-{i}": "h.{i}.attn.pattern",
    "kq_soft_max_ext-{i}": "h.{i}.attn.pattern",
    "kqv-{i}": "h.{i}.attn.heads",
    "kqv_merged_cont-{i}": "h.{i}.attn.heads",
    "kqv_out-{i}": "h.{i}.attn.heads h.{i}.attn.out",
    "ffn_inp-{i}": "h.{i}.resid_mid",
    "ffn_norm-{i}": "h.{i}.ln_2",
    "ffn_up_b-{i}": "h.{i}.mlp.pre",
    "ffn_gelu-{i}": "h.{i}.mlp.post",
    "ffn_out-{i}": "h.{i}.mlp.out",
    "l_out-{i}": "h.{i}.resid_post",
    "result_norm": "ln_f",
    "result_output": "logits",
}

NO_BIAS = "a product before its bias is added"
NO_GAIN = "a layer norm before its gain"
NO_SHIFT = "a layer norm before its shift"
STATISTICS = "mean or scale of a layer norm"
HALF = "token or position vectors alone; embed is their sum"

# Arrays of these programs that look like an intermediate and are none. Told by name, because
# values could not: kq is a multiple of the scores.
NONE_OF_THEM = {
    "wte": HALF, "wpe": HALF, "hook_embed": HALF, "hook_pos_embed": HALF, "pos_embd": HALF,
    "inp_embd": HALF, "embd": HALF,
    "wte.input": HALF, "wpe.input": HALF,
    "wqkv-{i}": f"{NO_BIAS}; wqkv_b or bqkv is the whole",
    "ffn_up-{i}": f"{NO_BIAS}; ffn_up_b is the whole",
    "ffn_down-{i}": f"{NO_BIAS}; ffn_out is the whole",
    "norm": NO_GAIN, "norm-{i}": NO_GAIN, "norm_w": NO_SHIFT, "norm_w-{i}": NO_SHIFT,
    "kq-{i}": "query times key before scale and mask; kq_soft_max is the pattern",
    "ln1_mean": STATISTICS, "ln1_rstd": STATISTICS, "ln2_mean": STATISTICS,
    "ln2_rstd": STATISTICS, "lnf_mean": STATISTICS, "lnf_rstd": STATISTICS,
    "blocks.{i}.ln1.hook_scale": STATISTICS, "blocks.{i}.ln2.hook_scale": STATISTICS,
    "ln_final.hook_scale": STATISTICS,
    "blocks.{i}.attn.hook_result": "attention's sum head by head",
    "preatt": "scores, but those of later keys are left unwritten; att is the pattern",
    "probs": "softmax of the logits", "losses": "a loss",
    "h.{i}.input.kwargs.attention_mask": "a mask",
    "h.{i}.input.args.2": "a mask",
    "h.{i}.attn.input.kwargs.attention_mask": "a mask",
}  # fmt: skip

ALIASES = {**MODULES, **INPUTS, **TRANSFORMER_LENS, **LLM_C, **LLAMA_CPP}

# What wrapping a model puts before the names of its modules; Flax and JAX write slashes.
PREFIX = re.compile(r"(?:(?:_orig_mod|module|model|transformer|params|intermediates)\.)+")

# What hooks append to them: ".output", the index in a tuple.
SUFFIX = re.compile(r"(?:\.__call__)?(?:[._]outputs?)?(?:\.0)?")

# ggml's note of a view, a copy or another shape of an array that was there before.
VIEW = re.compile(r".* \((?:view|reshaped|permuted|transposed|cont|copy[a-z ]*)\)")

LAYER = re.compile(r"(?<=[.-])\d{1,6}(?=[.-]|$)")


class Known(NamedTuple):
    """What a name stands for.

    Attributes
    ----------
    keys : tuple of str
        Trace key, or part of one (``"h.0.attn.q"``); several where the values must decide, the
        likeliest first. With ``{i}`` if the array holds all layers. None: no intermediate.
    how : str
        ``"name"``, ``"alias"`` or ``"mapping"``.
    reason : str
        Why it is no intermediate.
    given : bool
        Whether it is what a module was given rather than what one made.
    """

    keys: tuple[str, ...]
    how: str = "alias"
    reason: str = ""
    given: bool = False


def read_mapping(path: pathlib.Path) -> dict[str, str | None]:
    """A mapping from a JSON file: an object of names, see :func:`mapped`.

    Raises
    ------
    DumpError
        If it is none.
    """
    try:
        fields = parse_json(read_small(path, DumpError), str(path), DumpError)
    except FileNotFoundError:
        raise DumpError(f"{path}: no such file") from None
    for name, key in fields.items():
        if key is not None and not isinstance(key, str):
            raise DumpError(
                f"{path}: {shown(name)!r} must be given a name or null, not {shown(repr(key))}"
            )
    return fields


def part_names(n_layer: int) -> list[str]:
    """The parts of qkv that programs keep under names of their own.

    >>> part_names(1)
    ['h.0.attn.q', 'h.0.attn.k', 'h.0.attn.v']
    """
    return [f"h.{i}.attn.{part}" for i in range(n_layer) for part in PARTS]


def known(name: str, n_layer: int) -> Known | None:
    """What a name stands for, or None if nobody uses it.

    Parameters
    ----------
    name : str
    n_layer : int
        Layers of the model.

    Raises
    ------
    DumpError
        If it is of a layer that the model does not have.

    Examples
    --------
    >>> known("transformer.h.3.mlp.act", 12).keys
    ('h.3.mlp.post',)
    >>> known("fch_gelu", 12).keys
    ('h.{i}.mlp.post',)
    >>> known("hidden_states.12", 12).keys
    ('ln_f',)
    >>> known("my_array", 12) is None
    True
    """
    if name in trace_names(n_layer) or name in part_names(n_layer):
        return Known((name,), "name")
    if VIEW.fullmatch(name):
        return Known((), reason="another view of an array that ggml made before")
    plain = re.sub(r"^(hidden_states|attentions)[_\[](\d+)\]?$", r"\1.\2", name.replace("/", "."))
    plain = re.sub(r"(^|\.)h_(\d+)(?=\.|$)", r"\1h.\2", plain)  # modules of Flax
    plain = PREFIX.sub("", plain, count=1) if PREFIX.match(plain) else plain
    for spelled in dict.fromkeys((plain, _stripped(plain))):
        if (found := _look_up(name, spelled, n_layer)) is not None:
            return found
    return None


def _stripped(name: str) -> str:
    """A name without what hooks append."""
    end = next(m.start() for m in SUFFIX.finditer(name) if m.end() == len(name))
    return name[:end]


def _look_up(name: str, spelled: str, n_layer: int) -> Known | None:
    number = LAYER.search(spelled)
    layer = int(number[0]) if number else None
    kind = spelled
    if number is not None:
        kind = f"{spelled[: number.start()]}{{i}}{spelled[number.end() :]}"
    if kind == "hidden_states.{i}" and layer is not None:
        return _hidden(name, layer, n_layer)
    if kind in NONE_OF_THEM:
        return Known((), reason=NONE_OF_THEM[kind])
    own = [key for key in (*trace_names(1), *part_names(1)) if key.replace("h.0", "h.{i}") == kind]
    target = ALIASES.get(kind) or (kind if own else None)
    if target is None:
        return None
    if layer is not None and layer >= n_layer:
        raise DumpError(
            f"{shown(name)}: is of layer {layer}, but the model has layers 0 to {n_layer - 1}"
        )
    keys = target.replace("{last}", str(n_layer - 1))
    keys = keys if layer is None else keys.replace("{i}", str(layer))
    return Known(tuple(keys.split()), given=kind in INPUTS)


def _hidden(name: str, index: int, n_layer: int) -> Known:
    """As in transformers: the stream before the first block and after each; the last is ln_f."""
    if index > n_layer:
        raise DumpError(f"{shown(name)}: a model of {n_layer} layers has 0 to {n_layer} of these")
    if index == n_layer:
        return Known(("ln_f",))
    return Known((f"h.{index - 1}.resid_post" if index else "embed",))


class Mapped(NamedTuple):
    """One line of a user's mapping.

    Attributes
    ----------
    name : str
        As the user wrote it.
    pattern : Pattern
        Their names; a group ``i`` is the layer.
    key : str or None
        Trace key or part, with ``{i}``; None: to be left alone.
    """

    name: str
    pattern: re.Pattern[str]
    key: str | None


def mapped(mapping: Mapping[str, str | None], n_layer: int) -> list[Mapped]:
    """Check a user's mapping.

    Parameters
    ----------
    mapping : mapping of str to str or None
        Their name -> trace key, either with ``{i}`` for the layer. A key with ``{i}`` for a name
        without it says that the layers are the array's first axis. None leaves an array out.
    n_layer : int

    Raises
    ------
    DumpError
        If a key is not known, or ``{i}`` stands where it means nothing.

    Examples
    --------
    >>> line = mapped({"block_{i}/gelu": "h.{i}.mlp.post"}, 2)[0]
    >>> line.pattern.fullmatch("block_1/gelu")["i"]
    '1'
    """
    allowed = {*trace_names(n_layer), *part_names(n_layer)}
    allowed |= {key.replace("h.0.", "h.{i}.") for key in (*trace_names(1), *part_names(1))}
    lines = []
    for name, key in mapping.items():
        if key is not None and key not in allowed:
            raise DumpError(
                f"the mapping gives {shown(name)!r} the name {shown(repr(key))}, which is no "
                f"intermediate (see numpygpt.plans.INTERMEDIATES)"
            )
        if name.count("{i}") > 1 or ("{i}" in name and key is not None and "{i}" not in key):
            raise DumpError(
                f"the mapping of {shown(name)!r} to {shown(repr(key))}: write {{i}} once on either "
                f"side, or on the right alone where the layers are an axis"
            )
        lines.append(
            Mapped(name, re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d{1,6})")), key)
        )
    return lines


def whole(key: str) -> str:
    """The trace key that a part belongs to; any other key is its own."""
    return f"{key[:-1]}qkv" if key.endswith(tuple(f".attn.{part}" for part in PARTS)) else key


def source_of(key: str) -> str:
    """The key under which an array is made: a block's input is what came out before it."""
    if not key.endswith(".resid_pre"):
        return key
    layer = layer_of(key)
    return f"h.{layer - 1}.resid_post" if layer else "embed"
