"""``config.json``: every field that changes the maths is honoured or refused by name."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, ModelNotFoundError
from ..params import Config, shown
from .json_files import parse_json, read_small

__all__ = ["INT8", "config_fields", "parse_config", "read_config", "read_fields"]

# Fields that say something about training, generation defaults, other tasks or the software that
# wrote the file, and nothing about the forward pass.
# fmt: off
HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "_num_labels", "architectures", "attn_pdrop", "author", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range",
    "is_decoder", "keys_to_ignore_at_inference", "label2id", "length_penalty", "license",
    "max_length", "min_length", "n_special", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id",
    "predict_special_tokens", "prefix", "problem_type", "remove_invalid_values",
    "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "unk_token_id", "use_bfloat16",
    "use_cache",
    # Changes how a score is rounded, not what it is.
    "reorder_and_upcast_attn",
})
# fmt: on

# What ``quantization_config`` says of matrices as numpygpt.storage.Int8 has them. No other program
# knows this method, so none takes the integers for the numbers.
INT8: dict[str, Any] = {
    "quant_method": "numpygpt_int8",
    "bits": 8,
    "numbers": "int8, one row for each output, times the float32 scale of the row",
}

# Fields that would change the maths, and the values under which they do not.
INERT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": ({}, None, INT8),
    "tie_encoder_decoder": (False, None),
}

FIELDS = {field.name for field in dataclasses.fields(Config)}


def parse_config(fields: Mapping[str, Any], source: str = "config") -> Config:
    """A Config from the fields of a ``config.json``.

    Parameters
    ----------
    fields : mapping
        What the JSON holds.
    source : str
        Names the file in messages.

    Returns
    -------
    Config

    Raises
    ------
    ConfigError
        If a field asks for what GPT-2 is not, is unknown, is missing or has a wrong value.

    Examples
    --------
    >>> parse_config({"vocab_size": 10, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2})
    ... # doctest: +ELLIPSIS
    Config(vocab_size=10, n_ctx=8, n_embd=4, n_layer=1, n_head=2, n_inner=None, ...)
    """
    rest = dict(fields)
    kind = rest.pop("model_type", "gpt2")
    if kind != "gpt2":
        raise ConfigError(
            f"{source}: model_type is {shown(repr(kind))}, and numpygpt runs only 'gpt2'"
        )
    names = rest.get("architectures") or []
    if not isinstance(names, list) or not all(str(n).startswith("GPT2") for n in names):
        raise ConfigError(f"{source}: architectures is {shown(repr(names))}, expected a GPT2 class")
    for name, inert in INERT.items():
        if rest.pop(name, None) not in inert:
            raise ConfigError(
                f"{source}: {name} = {shown(repr(fields[name]))} changes the model, and numpygpt "
                f"has no support for it"
            )
    sizes = [(name, rest.pop(name)) for name in ("n_positions", "n_ctx") if name in rest]
    if len({repr(size) for _, size in sizes}) > 1:
        raise ConfigError(f"{source}: n_positions and n_ctx disagree: {shown(dict(sizes))}")
    values = {name: rest.pop(name) for name in FIELDS & rest.keys()}
    unknown = sorted(rest.keys() - HARMLESS)
    if unknown:
        raise ConfigError(
            f"{source}: unknown field {shown(repr(unknown[0]))} = {shown(rest[unknown[0]])}; "
            f"numpygpt refuses what it does not know, because it may change the model"
        )
    if sizes:
        values["n_ctx"] = sizes[0][1]
    required = {"vocab_size", "n_ctx", "n_embd", "n_layer", "n_head"} - values.keys()
    if required:
        missing = ", ".join(sorted(required)).replace("n_ctx", "n_positions")
        raise ConfigError(
            f"{source}: missing {missing}; what a checkpoint does not say can be given with "
            f"config={{...}} in Python or --config NAME=VALUE on the command line"
        )
    try:
        return Config(**values)
    except ConfigError as error:
        told = str(error).removeprefix("config: ").replace("n_ctx", sizes[0][0])
        raise ConfigError(f"{source}: {told}") from None


def read_fields(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a ``config.json`` file, not yet checked."""
    try:
        text = read_small(path)
    except FileNotFoundError:
        raise ModelNotFoundError(
            f"{path}: not found; a checkpoint of this format needs its config.json beside it, or "
            f"the fields that shapes do not tell: config={{'n_head': ...}} in Python, --config "
            f"n_head=... on the command line"
        ) from None
    return parse_json(text, str(path))


def read_config(path: pathlib.Path) -> Config:
    """The Config in a ``config.json`` file."""
    return parse_config(read_fields(path), str(path))


def config_fields(
    config: Config, end_of_text: int | None, dtype: str, int8: bool = False
) -> dict[str, Any]:
    """The ``config.json`` under which transformers builds the same model.

    Parameters
    ----------
    config : Config
    end_of_text : int or None
        The id with which texts begin and end.
    dtype : str
        One that holds all weights without rounding; transformers loads them in it.
    int8 : bool
        Whether the matrices are int8.

    Returns
    -------
    dict
        Without ``bias``, which transformers does not know, if the model has biases.

    Examples
    --------
    >>> parse_config(config_fields(Config(n_layer=2), 50256, "float32")) == Config(n_layer=2)
    True
    """
    fields: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    fields |= dataclasses.asdict(config)
    fields["n_positions"] = fields["n_ctx"]
    if config.bias:
        del fields["bias"]
    return fields | {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        **({"quantization_config": INT8} if int8 else {}),
    }
