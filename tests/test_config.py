"""config.json: each field that changes the maths is honoured or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import pytest
from support import config_json, nano

from numpygpt.checkpoints.config import parse_config, read_config
from numpygpt.errors import ConfigError, ModelNotFoundError
from numpygpt.params import Config

# openai-community/gpt2, as published.
PUBLISHED = """{
  "activation_function": "gelu_new",
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_ctx": 1024,
  "n_embd": 768,
  "n_head": 12,
  "n_layer": 12,
  "n_positions": 1024,
  "resid_pdrop": 0.1,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
  "vocab_size": 50257
}"""

# What transformers 5 writes for GPT2Config().
TRANSFORMERS_5 = """{
  "activation_function": "gelu_new",
  "add_cross_attention": false,
  "architectures": ["GPT2LMHeadModel"],
  "attn_pdrop": 0.1,
  "bos_token_id": 50256,
  "dtype": "float32",
  "embd_pdrop": 0.1,
  "eos_token_id": 50256,
  "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  "n_embd": 768,
  "n_head": 12,
  "n_inner": null,
  "n_layer": 12,
  "n_positions": 1024,
  "pad_token_id": null,
  "reorder_and_upcast_attn": false,
  "resid_pdrop": 0.1,
  "scale_attn_by_inverse_layer_idx": false,
  "scale_attn_weights": true,
  "summary_activation": null,
  "summary_first_dropout": 0.1,
  "summary_proj_to_labels": true,
  "summary_type": "cls_index",
  "summary_use_proj": true,
  "tie_word_embeddings": true,
  "transformers_version": "5.0.0",
  "use_cache": true,
  "vocab_size": 50257
}"""


def fields(**changes: Any) -> dict[str, Any]:
    """The fields of a sound config.json, changed; `...` removes one."""
    changed = config_json(nano(), **changes)
    return {name: value for name, value in changed.items() if value is not ...}


# -- honoured ----------------------------------------------------------------------------------

HONOURED = {
    "vocab_size": 50304,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 7,
    "activation_function": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-6,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False,
    "bias": False,
}


@pytest.mark.parametrize(("name", "value"), HONOURED.items(), ids=HONOURED)
def test_a_field_that_changes_the_maths_reaches_the_config(name, value):
    assert getattr(nano(), name) != value
    assert parse_config(fields(**{name: value})) == nano(**{name: value})


def test_every_field_of_the_config_is_among_those_tested():
    names = {field.name for field in dataclasses.fields(Config)}
    assert names == HONOURED.keys() | {"n_ctx"}


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_positions": 9, "n_ctx": 9},
        {"n_positions": 9, "n_ctx": ...},
        {"n_positions": ..., "n_ctx": 9},
    ],
    ids=["both", "n_positions", "n_ctx"],
)
def test_the_context_length_goes_by_either_name_or_both(sizes):
    assert parse_config(fields(**sizes)).n_ctx == 9


def test_what_a_config_leaves_out_is_as_in_gpt2():
    sizes = {"vocab_size": 17, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    assert parse_config(sizes) == nano()


@pytest.mark.parametrize("text", [PUBLISHED, TRANSFORMERS_5], ids=["published", "transformers 5"])
def test_real_configs_are_gpt2_small(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert read_config(path) == Config()


# What the configs of published GPT-2 descendants say beyond GPT-2's own, and what must come of it.
SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02}
FAMILIES = {
    "distilgpt2": (
        {
            "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
            "n_layer": 6, "n_ctx": 1024, "n_inner": None, "gradient_checkpointing": False,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        {"n_layer": 6},
    ),
    "DialoGPT": (
        {
            "n_layer": 24, "n_head": 16, "n_embd": 1024, "n_ctx": 1024,
            "task_specific_params": {"conversational": {"max_length": 1000}},
        },
        {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    ),
    "Cerebras-GPT": (
        {
            "n_layer": 10, "n_positions": 2048, "n_inner": 3072, "activation_function": "gelu",
            "scale_attn_weights": True, "use_cache": True,
        },
        {"n_layer": 10, "n_ctx": 2048, "n_inner": 3072, "activation_function": "gelu"},
    ),
    "CRFM BioMedLM": (
        {
            "n_layer": 32, "n_head": 20, "n_embd": 2560, "n_ctx": 1024, "vocab_size": 28896,
            "bos_token_id": 28895, "eos_token_id": 28895, "pad_token_id": 28895,
            "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": False,
            "gradient_checkpointing": False, "use_cache": False, "n_inner": None,
        },
        {
            "n_layer": 32, "n_head": 20, "n_embd": 2560, "vocab_size": 28896,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "CodeParrot": (
        {
            "n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 32768,
            "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        {
            "n_layer": 48, "n_head": 25, "n_embd": 1600, "vocab_size": 32768,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_descendants_of_gpt2_are_honoured_field_by_field(said, expected):
    common = json.loads(PUBLISHED) | SUMMARY | DROPOUT
    if said.get("n_positions", 1024) != 1024:
        del common["n_ctx"]  # written by later versions, which have one name for it
    assert parse_config(common | said) == Config(**expected)


FOREIGN = {
    "gpt_bigcode (multi-query)": ({"model_type": "gpt_bigcode", "multi_query": True}, "model_type"),
    "ruGPT3-XL (sparse attention)": ({"sparse_mode": "alternating"}, "sparse_mode"),
    "JAIS (ALiBi)": ({"model_type": "jais", "position_embedding_type": "alibi"}, "model_type"),
    "a GPT-2 with ALiBi": ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    "encoder-decoder": ({"add_cross_attention": True}, "add_cross_attention"),
    "muP": ({"mup_embeddings_scale": 10.0}, "mup_embeddings_scale"),
}


@pytest.mark.parametrize(("said", "field"), FOREIGN.values(), ids=FOREIGN)
def test_what_only_looks_like_gpt2_is_refused_by_the_field_that_differs(said, field):
    with pytest.raises(ConfigError, match=field):
        parse_config(json.loads(PUBLISHED) | said)


@pytest.mark.parametrize(
    "harmless",
    [
        {"torch_dtype": "float16"},
        {"reorder_and_upcast_attn": True},
        {"pruned_heads": {}},
        {"add_cross_attention": False, "is_encoder_decoder": False},
        {"quantization_config": None},
        {"architectures": None},
        {"architectures": ["GPT2Model"]},
        {"model_type": ...},
    ],
    ids=str,
)
def test_fields_that_do_not_change_the_maths_are_accepted(harmless):
    assert parse_config(fields(**harmless)) == nano()


# -- refused -----------------------------------------------------------------------------------

REFUSED = {
    "model_type": ["llama", "gpt_neo", None, 2],
    "architectures": [["LlamaForCausalLM"], ["GPT2LMHeadModel", "T5"], "GPT2LMHeadModel", 7],
    "add_cross_attention": [True, 1],
    "pruned_heads": [{"0": [1]}, [[1]]],
    "quantization_config": [{"bits": 4}],
    "is_encoder_decoder": [True],
    "tie_encoder_decoder": [True],
    "cross_attention_hidden_size": [8],
    "rope_theta": [1e4, None],
    "layer_norm_eps": [1e-5],
    "vocab_size": [0, -1, True, "17", 17.0, None, [17], 2**31, 10**30],
    "n_embd": [0, True, "8", 8.0, None],
    "n_layer": [0, -1, True, "2", 2.0, None, 2**31],
    "n_head": [0, True, "2", 2.0, None],
    "n_inner": [0, -1, True, "32", 32.0, []],
    "activation_function": ["gelu2", "GELU", "", None, ["gelu"], {}, 1],
    "layer_norm_epsilon": [math.nan, math.inf, -1e-5, 1, True, False, "1e-5", None, 10**400],
    "scale_attn_weights": [None, 0, 1, "true"],
    "scale_attn_by_inverse_layer_idx": [None, 0, 1, "false"],
    "tie_word_embeddings": [None, 0, 1, "true"],
    "bias": [None, 0, 1, "true"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda value: str(value)[:30],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^here: .*{name}"):
        parse_config(fields(**{name: value}), "here")


@pytest.mark.parametrize("value", [0, True, "12", 12.0, None, [12]], ids=str)
@pytest.mark.parametrize("name", ["n_positions", "n_ctx"])
@pytest.mark.parametrize("other", [12, ...], ids=["beside 12", "alone"])
def test_a_context_length_of_the_wrong_kind_is_refused(name, value, other):
    both = dict.fromkeys(["n_positions", "n_ctx"], other) | {name: value}
    with pytest.raises(ConfigError, match=r"^here: .*(n_ctx|n_positions)"):
        parse_config(fields(**both), "here")


@pytest.mark.parametrize("n_ctx", [11, 13])
def test_two_different_context_lengths_are_refused(n_ctx):
    with pytest.raises(ConfigError, match="n_positions and n_ctx disagree"):
        parse_config(fields(n_positions=12, n_ctx=n_ctx))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="n_embd = 8 is not a multiple of n_head = 3"):
        parse_config(fields(n_head=3))


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_missing_size_is_named(name):
    absent = {name: ...} | ({"n_ctx": ...} if name == "n_positions" else {})
    with pytest.raises(ConfigError, match=f"^here: missing {name}; .*config="):
        parse_config(fields(**absent), "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"n_head": 2, "n_head": 4}', "the key 'n_head' stands in it twice"),
        (b'{"n_head": 2', "expected JSON"),
        (b"", "expected JSON"),
        (b'{"author": "\xff"}', "expected JSON"),
        (b"[]", "expected a JSON object, received list"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
        (json.dumps(fields()).encode() + b" " * 2**20, "over 1 MiB"),
    ],
    ids=["twice", "cut", "empty", "no UTF-8", "list", "nested", "long"],
)
def test_a_damaged_file_is_refused_with_its_path(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        read_config(path)


def test_a_missing_file_is_not_a_damaged_one(tmp_path: pathlib.Path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json: not found"):
        read_config(tmp_path / "config.json")


def test_a_config_made_in_python_is_checked_alike():
    with pytest.raises(ConfigError, match="n_embd = 8 is not a multiple of n_head = 3"):
        nano(n_head=3)
    with pytest.raises(ConfigError, match="n_layer must be a positive integer, not True"):
        nano(n_layer=True)


# -- what follows from a config ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "count"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
    ids=["small", "medium", "large", "xl"],
)
def test_the_four_gpt2s_have_the_published_number_of_parameters(n_layer, n_head, n_embd, count):
    config = Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    assert config.parameter_count == count
    assert config.head_dim == 64
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert untied.parameter_count == count + 50257 * n_embd
    # A block has 11 C of biases (3 C + C, 4 C + C, and two shifts), ln_f one C.
    without = dataclasses.replace(config, bias=False)
    assert without.parameter_count == count - n_layer * 11 * n_embd - n_embd


@pytest.mark.parametrize(
    ("weights", "by_layer", "expected"),
    [
        (True, False, [0.5, 0.5, 0.5]),
        (True, True, [0.5, 0.25, 0.5 / 3]),
        (False, False, [1.0, 1.0, 1.0]),
        (False, True, [1.0, 0.5, 1 / 3]),
    ],
)
def test_scores_are_divided_by_the_root_of_the_width_and_by_the_layer(weights, by_layer, expected):
    config = nano(scale_attn_weights=weights, scale_attn_by_inverse_layer_idx=by_layer)
    assert config.head_dim == 4
    assert [config.attention_scale(layer) for layer in range(3)] == expected


def test_the_mlp_is_four_times_as_wide_unless_the_config_says_otherwise():
    assert nano().mlp_dim == 32
    assert nano(n_inner=5).mlp_dim == 5
