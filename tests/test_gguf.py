"""GGUF files: those of llama.cpp's own package, our own, and every refusal.

The fixtures were written by tests/fixtures/make_gguf.py. The writer below follows the
specification of GGUF and shares no code with the reader or the writer under test.
"""

from __future__ import annotations

import io
import mmap
import os
import pathlib
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_tensors

from numpygpt.checkpoints import gguf, reading
from numpygpt.checkpoints.arrays import Tensor
from numpygpt.checkpoints.gguf_container import GGUFFile
from numpygpt.checkpoints.source import Vocabulary
from numpygpt.errors import CheckpointError
from numpygpt.params import Config

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "gguf"
FLOAT32 = np.dtype(np.float32)
MIB = 2**20

# -- a writer ------------------------------------------------------------------------------------

TYPES = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64"]
LETTERS = {
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "u64": "Q", "i64": "q",
    "f32": "f", "f64": "d", "bool": "B",
}  # fmt: skip
# llama.cpp's name of each array, and ours; a block's stand behind "blk.0." and "h.0.".
BLOCK = {
    "attn_norm.weight": "ln_1.weight",
    "attn_norm.bias": "ln_1.bias",
    "attn_qkv.weight": "attn.c_attn.weight",
    "attn_qkv.bias": "attn.c_attn.bias",
    "attn_output.weight": "attn.c_proj.weight",
    "attn_output.bias": "attn.c_proj.bias",
    "ffn_norm.weight": "ln_2.weight",
    "ffn_norm.bias": "ln_2.bias",
    "ffn_up.weight": "mlp.c_fc.weight",
    "ffn_up.bias": "mlp.c_fc.bias",
    "ffn_down.weight": "mlp.c_proj.weight",
    "ffn_down.bias": "mlp.c_proj.bias",
}
TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def packed(kind: str, value: Any) -> bytes:
    """A value without its type; a list is (type of its items, items)."""
    if kind == "str":
        data = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(data)) + data
    if kind == "arr":
        item, items = value
        start = struct.pack("<IQ", TYPES.index(item), len(items))
        return start + b"".join(packed(item, each) for each in items)
    return struct.pack("<" + LETTERS[kind], value)


def pair(key: str | bytes, kind: str, value: Any) -> bytes:
    return packed("str", key) + struct.pack("<I", TYPES.index(kind)) + packed(kind, value)


ARCHITECTURE = pair("general.architecture", "str", "gpt2")


def info(name: str | bytes, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    """A tensor's description; `shape` is NumPy's."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return packed("str", name) + dims + struct.pack("<IQ", kind, start)


def container(
    pairs: list[bytes] | tuple[bytes, ...] = (ARCHITECTURE,),
    infos: list[bytes] | tuple[bytes, ...] = (),
    data: bytes = b"",
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file from encoded pairs, descriptions and data."""
    numbers = counts or (len(infos), len(pairs))
    head = start + struct.pack("<QQ", *numbers) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def settings(config: Config) -> dict[str, tuple[str, Any]]:
    """The pairs that every model has: type and value by key."""
    return {
        "general.architecture": ("str", "gpt2"),
        "gpt2.context_length": ("u32", config.n_ctx),
        "gpt2.embedding_length": ("u32", config.n_embd),
        "gpt2.feed_forward_length": ("u32", config.mlp_dim),
        "gpt2.block_count": ("u32", config.n_layer),
        "gpt2.attention.head_count": ("u32", config.n_head),
        "gpt2.attention.layer_norm_epsilon": ("f32", config.layer_norm_epsilon),
    }


VOCABULARY = {
    "tokenizer.ggml.model": ("str", "gpt2"),
    "tokenizer.ggml.pre": ("str", "gpt-2"),
    "tokenizer.ggml.tokens": ("arr", ("str", ["a", "Ġ", "Ġa", "<|endoftext|>", "<x>", "[PAD5]"])),
    "tokenizer.ggml.token_type": ("arr", ("i32", [1, 1, 1, 3, 4, 5])),
    "tokenizer.ggml.merges": ("arr", ("str", ["Ġ a"])),
}


def named(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Arrays under llama.cpp's names, turned as its converter turns them."""
    arrays = {
        "token_embd.weight": tensors["wte.weight"],
        "position_embd.weight": tensors["wpe.weight"],
        "output_norm.weight": tensors["ln_f.weight"],
        "output_norm.bias": tensors["ln_f.bias"],
    }
    if "lm_head.weight" in tensors:
        arrays["output.weight"] = tensors["lm_head.weight"]
    for layer in range(layers):
        for theirs, ours in BLOCK.items():
            array = tensors[f"h.{layer}.{ours}"]
            arrays[f"blk.{layer}.{theirs}"] = array.T if theirs in TURNED else array
    return arrays


def model(
    values: dict[str, tuple[str, Any]], arrays: dict[str, np.ndarray], alignment: int = 32
) -> bytes:
    """A file of pairs and float32, float16 or float64 arrays."""
    kinds = {"float32": 0, "float16": 1, "float64": 28}
    infos, data = [], b""
    for name, array in arrays.items():
        infos.append(info(name, array.shape, kinds[array.dtype.name], len(data)))
        data += np.ascontiguousarray(array).tobytes()
        data += bytes(-len(data) % alignment)
    pairs = [pair(key, *value) for key, value in values.items()]
    return container(pairs, infos, data, alignment=alignment)


def of_config(config: Config, seed: int = 0, **more: Any) -> bytes:
    """A random model of a config with some pairs more, or (None) fewer."""
    arrays = named(random_tensors(config, seed, np.float32), config.n_layer)
    values = {**settings(config), **more}
    return model({key: value for key, value in values.items() if value is not None}, arrays)


SMALL = nano(vocab_size=6, n_ctx=2, n_embd=4, n_layer=1, n_head=2)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "x.gguf"


def read_bytes(path: pathlib.Path, content: bytes):
    path.write_bytes(content)
    return gguf.read(path)


def assert_holds(tensors: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(
            tensors[name].read(np.float32), array, strict=True, err_msg=name
        )
        assert tensors[name].shape == array.shape


# -- files that llama.cpp's package wrote ---------------------------------------------------------


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def brain(array: np.ndarray) -> np.ndarray:
    """The nearest numbers with the upper 16 bits of float32 alone, ties to even."""
    bits = array.view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return upper.astype(np.uint32).view(np.float32)


FLOATING = {
    "F32": (1, {}, lambda array: array),
    "F16": (2, {"tie_word_embeddings": False}, half),
    "BF16": (3, {"n_inner": 12, "layer_norm_epsilon": 1e-3}, brain),
}


@pytest.mark.parametrize("name", FLOATING)
def test_every_array_of_a_file_of_floats_is_read_exactly(name):
    seed, changes, rounded = FLOATING[name]
    config = nano(**changes)
    settled = reading.settle(FIXTURES / name, gguf.read(FIXTURES / f"{name}.gguf"), {})
    assert settled.config == config
    arrays = random_tensors(config, seed, np.float32)
    assert_holds(settled.tensors, {n: rounded(a) if a.ndim == 2 else a for n, a in arrays.items()})
    assert {t.dtype for t in settled.tensors.values() if len(t.shape) == 2} == {name}


@pytest.mark.parametrize("name", FLOATING)
def test_the_vocabulary_inside_a_file_is_read(name):
    tokens = [*"abcdefghijklm", "Ġa", "Ġb", "<|endoftext|>", "[PAD16]"]
    source = gguf.read(FIXTURES / f"{name}.gguf")
    assert source.vocabulary == (tokens, ["Ġ a", "Ġ b"], [15, 16])
    assert source.notes == []


def test_what_gguf_cannot_say_is_assumed():
    source = gguf.read(FIXTURES / "F32.gguf")
    assert {name: each.value for name, each in source.assumed.items()} == {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    assert not any(each.doubtful for each in source.assumed.values())


# Bytes of a block of so many numbers.
QUANTISED = {
    "Q4_0": (18, 32), "Q4_1": (20, 32), "Q5_0": (22, 32), "Q5_1": (24, 32), "Q8_0": (34, 32),
    "Q2_K": (84, 256), "Q3_K": (110, 256), "Q4_K": (144, 256), "Q5_K": (176, 256),
    "Q6_K": (210, 256),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_file_is_described_without_the_package(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    report = reading.inspect(FIXTURES / f"{name}.gguf")
    (problem,) = report.problems  # `read` would say the same
    assert f"{name}" in problem
    assert 'takes the package gguf: pip install "numpygpt[gguf]"' in problem
    assert report.config == nano(n_embd=32, n_layer=1, n_inner=256)
    tensor = report.tensors["h.0.mlp.c_proj.weight"]
    size, block = QUANTISED[name]
    assert tensor.dtype == name
    assert tensor.shape == (256, 32)
    assert tensor.nbytes == 256 * 32 // block * size


@pytest.mark.parametrize("name", QUANTISED)
def test_reading_a_quantised_tensor_without_the_package_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    tensors = gguf.read(FIXTURES / f"{name}.gguf").tensors
    expected = random_tensors(nano(n_embd=32, n_layer=1, n_inner=256), 4, np.float32)
    np.testing.assert_array_equal(tensors["ln_f.bias"].read("f4"), expected["ln_f.bias"])
    message = rf'ffn_down.weight is quantised as {name}, .*pip install "numpygpt\[gguf\]"'
    with pytest.raises(CheckpointError, match=message):
        tensors["h.0.mlp.c_proj.weight"].read(np.float32)


# -- numbers and names ----------------------------------------------------------------------------


def test_aligned_float32_is_a_view_of_the_mapped_file_even_if_transposed(path):
    tensor = read_bytes(path, of_config(SMALL)).tensors["h.0.mlp.c_fc.weight"]
    first, again = tensor.read(np.float32), tensor.read(np.float32)
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    owner: Any = first
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner.obj, mmap.mmap)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("stored", ["f2", "f4", "f8"])
def test_all_floating_types_are_read(path, stored, dtype):
    # Multiples of 1/8 below 2**7 are exact in all three types.
    array = (np.arange(-12, 12) / 8).reshape(4, 6).astype(stored)
    content = model({"general.architecture": ("str", "gpt2")}, {"a": array})
    path.write_bytes(content)
    file = GGUFFile(path, "gpt2", ())
    np.testing.assert_array_equal(file.tensors()["a"].read(dtype), array.astype(dtype), strict=True)


@pytest.mark.parametrize("alignment", [1, 4, 64, 4096])
def test_other_alignments_are_read(path, alignment):
    config = SMALL
    tensors = random_tensors(config, 5, np.float32)
    values = {**settings(config), "general.alignment": ("u32", alignment)}
    source = read_bytes(path, model(values, named(tensors, 1), alignment))
    assert_holds(source.tensors, tensors)


def test_version_2_is_read_like_version_3(path):
    content = of_config(SMALL, seed=6)
    source = read_bytes(path, content[:4] + b"\2" + content[5:])
    assert_holds(source.tensors, random_tensors(SMALL, 6, np.float32))


def test_tensors_may_lie_in_another_order_than_they_are_listed(path):
    first, second = np.arange(3, dtype="<f4"), np.arange(12, dtype="<f4").reshape(3, 4)
    infos = [info("b", (3, 4), 0, 32), info("none", (0, 4), 0, 32), info("a", (3,), 0, 0)]
    data = first.tobytes() + bytes(20) + second.tobytes()
    path.write_bytes(container(infos=infos, data=data))
    tensors = GGUFFile(path, "gpt2", ()).tensors()
    assert list(tensors) == ["b", "none", "a"]
    for name, array in {"a": first, "b": second, "none": np.zeros((0, 4), "<f4")}.items():
        np.testing.assert_array_equal(tensors[name].read("f4"), array, strict=True)


@pytest.mark.parametrize("padding", [0, 1, 16])
def test_padding_behind_the_last_tensor_may_be_there_or_not(path, padding):
    path.write_bytes(container(infos=[info("a", (4,), 0, 0)], data=bytes(16 + padding)))
    assert GGUFFile(path, "gpt2", ()).entries["a"].nbytes == 16


def test_a_quantised_tensor_without_numbers_is_empty(path, monkeypatch):
    class Quants:
        dequantize = None

    class Constants:
        GGMLQuantizationType = dict.fromkeys(QUANTISED)

    monkeypatch.setitem(sys.modules, "gguf", Quants)
    monkeypatch.setitem(sys.modules, "gguf.quants", Quants)
    monkeypatch.setitem(sys.modules, "gguf.constants", Constants)
    path.write_bytes(container(infos=[info("a", (0, 32), 8, 0)]))
    array = GGUFFile(path, "gpt2", ()).tensors()["a"].read(np.float32)
    np.testing.assert_array_equal(array, np.zeros((0, 32), np.float32), strict=True)


def test_a_head_of_its_own_is_one_even_if_it_equals_the_token_table(path):
    tensors = random_tensors(SMALL, 7, np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    source = read_bytes(path, model(settings(SMALL), named(tensors, 1)))
    assert source.fields["tie_word_embeddings"] is False
    assert_holds(source.tensors, tensors)


def test_tensors_that_gpt2_does_not_have_are_refused_by_their_names(path):
    arrays = named(random_tensors(SMALL, 0, np.float32), 1)
    more = {"rope_freqs.weight": np.ones(2, np.float32), "blk.0.attn_q.weight": np.ones(2, "f4")}
    source = read_bytes(path, model(settings(SMALL), {**arrays, **more}))
    with pytest.raises(CheckpointError, match=r"unexpected .*: rope_freqs.weight, blk.0.attn_q.w"):
        reading.settle(path, source, {})


# Bytes that 256 numbers take in types that are not read.
OTHERS = {
    9: 288, 15: 292, 16: 66, 17: 74, 18: 98, 19: 50, 20: 144, 21: 110, 22: 82, 23: 136, 24: 256,
    25: 512, 26: 1024, 27: 2048, 29: 56, 34: 54, 35: 66, 39: 136, 40: 144, 41: 36, 42: 72,
}  # fmt: skip


@pytest.mark.parametrize(("number", "size"), OTHERS.items())
def test_other_types_are_described_and_refused_by_name(path, number, size):
    path.write_bytes(container(infos=[info("a", (1, 256), number, 0)], data=bytes(size)))
    tensor = GGUFFile(path, "gpt2", ()).tensors()["a"]
    assert tensor.nbytes == size
    with pytest.raises(CheckpointError, match=f"a is {tensor.dtype}; expected one of"):
        tensor.read(np.float32)


def test_a_model_with_a_tensor_of_another_type_is_refused_before_anything_is_read(path):
    name = packed("str", "position_embd.weight")
    dims = struct.pack("<IQQ", 2, SMALL.n_embd, SMALL.n_ctx)
    content = of_config(SMALL)
    assert name + dims + bytes(4) in content
    integers = content.replace(name + dims + bytes(4), name + dims + struct.pack("<I", 26))
    with pytest.raises(CheckpointError, match=r"wpe\.weight is I32; expected one of"):
        reading.settle(path, read_bytes(path, integers), {})


# -- config ---------------------------------------------------------------------------------------


def test_the_config_is_read_in_the_words_of_config_json(path):
    source = read_bytes(path, of_config(SMALL))
    assert source.fields == {
        "n_positions": 2,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 2,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 6,
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize("kind", ["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"])
def test_sizes_may_be_stored_in_any_type_of_integer(path, kind):
    config = nano(**{**vars(SMALL), "n_inner": 6})
    values = {key: (kind, value) for key, (old, value) in settings(config).items() if old == "u32"}
    source = read_bytes(path, of_config(config, **values))
    assert reading.settle(path, source, {}).config == config


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12, 0.001, 2.0**-17, 0.0])
def test_epsilon_is_the_decimal_that_was_stored_in_float32(path, epsilon):
    key = "gpt2.attention.layer_norm_epsilon"
    fields = read_bytes(path, of_config(SMALL, **{key: ("f32", epsilon)})).fields
    assert fields["layer_norm_epsilon"] == epsilon
    wide = read_bytes(path, of_config(SMALL, **{key: ("f64", epsilon * 1.0000001)})).fields
    assert wide["layer_norm_epsilon"] == epsilon * 1.0000001


# What llama.cpp's saver writes for GPT-2: values that say nothing.
NEUTRAL = {
    "attention.head_count_kv": ("u32", 2),
    "attention.key_length": ("u32", 2),
    "attention.value_length": ("u32", 2),
    "attention.causal": ("bool", 1),
    "attention.clamp_kqv": ("f32", 0.0),
    "attention.max_alibi_bias": ("f32", 0.0),
    "attention.scale": ("f32", 0.0),
    "attention.sliding_window": ("u32", 0),
    "use_parallel_residual": ("bool", 0),
    "expert_count": ("u32", 0),
    "logit_scale": ("f32", 0.0),
    "residual_scale": ("f32", 0.0),
    "embedding_scale": ("f32", 0.0),
    "vocab_size": ("u32", 6),
}
OTHER_MODELS = {
    "attention.head_count_kv": ("u32", 1),
    "attention.key_length": ("u32", 4),
    "attention.value_length": ("arr", ("u32", [2])),
    "attention.causal": ("bool", 0),
    "attention.clamp_kqv": ("f32", 8.0),
    "attention.max_alibi_bias": ("f32", float("nan")),
    "attention.scale": ("f32", 0.5),
    "attention.sliding_window": ("u32", 128),
    "use_parallel_residual": ("bool", 1),
    "expert_count": ("u32", 8),
    "logit_scale": ("f32", 2.0),
    "residual_scale": ("f32", 2.0),
    "embedding_scale": ("f32", 2.0),
    "vocab_size": ("u32", 7),
}


def test_what_says_nothing_about_gpt2_changes_nothing(path):
    more = {f"gpt2.{key}": value for key, value in NEUTRAL.items()}
    more |= {
        "gpt2.rope.scaling.type": ("str", "linear"),
        "gpt2.attn_logit_softcapping": ("f32", 50.0),
        "general.type": ("str", "model"),
        "general.quantization_version": ("u32", 2),
        "split.count": ("u16", 1),
        "tokenizer.chat_template": ("str", "\xff" * 1000),
        "a.list": ("arr", ("f64", [1.0, 2.0])),
        "texts": ("arr", ("str", ["a", b"\xff"])),
        "lists": ("arr", ("arr", [("u8", [1, 2]), ("str", ["a"]), ("arr", [("u32", [7])])])),
        "none": ("arr", ("str", [])),
        **{f"a.{kind}": (kind, 1) for kind in LETTERS},
    }
    source = read_bytes(path, of_config(SMALL, **more))
    assert reading.settle(path, source, {}).config == SMALL


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_a_key_that_asks_for_another_model_is_refused(path, key):
    with pytest.raises(CheckpointError, match=rf"x.gguf: gpt2\.{key} is .*, expected"):
        read_bytes(path, of_config(SMALL, **{f"gpt2.{key}": OTHER_MODELS[key]}))


@pytest.mark.parametrize("key", [key for key in settings(SMALL) if key.startswith("gpt2.")])
def test_a_missing_or_mistyped_size_is_refused_by_its_key(path, key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        read_bytes(path, of_config(SMALL, **{key: None}))
    with pytest.raises(CheckpointError, match=f"{key} must be one (int|float)"):
        read_bytes(path, of_config(SMALL, **{key: ("arr", ("u32", [2]))}))


@pytest.mark.parametrize("key", [key for key in settings(SMALL) if key.startswith("gpt2.")])
@pytest.mark.parametrize("kind", ["u64", "f32"])
@pytest.mark.parametrize("value", [0, 2**63, 2**64 - 1])
def test_impossible_sizes_are_refused(path, key, kind, value):
    if key.endswith("epsilon") and value == 0:
        value = float("nan")
    kind = "f32" if value != value else kind
    with pytest.raises(CheckpointError):
        reading.settle(path, read_bytes(path, of_config(SMALL, **{key: (kind, value)})), {})


# -- vocabulary -----------------------------------------------------------------------------------


def vocabulary_of(path, **changes: Any):
    """Vocabulary and notes of a file whose tokenizer has some pairs changed."""
    more = {**VOCABULARY, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    source = read_bytes(path, of_config(SMALL, **more))
    return source.vocabulary, source.notes


TOKENS = ["a", "Ġ", "Ġa", "<|endoftext|>", "<x>", "[PAD5]"]


def test_control_user_defined_and_unused_tokens_are_special(path):
    assert vocabulary_of(path) == ((TOKENS, ["Ġ a"], [3, 4, 5]), [])
    kinds = ("arr", ("u8", [6, 2, 1, 1, 1, 0]))
    assert vocabulary_of(path, token_type=kinds) == ((TOKENS, ["Ġ a"], []), [])


def test_without_kinds_only_the_end_of_text_is_special(path):
    assert vocabulary_of(path, token_type=None) == ((TOKENS, ["Ġ a"], [3]), [])
    none = ("arr", ("str", list("abcdef")))
    assert vocabulary_of(path, token_type=None, tokens=none)[0].special == []


@pytest.mark.parametrize("cut", [None, ("str", "default")])
def test_files_older_than_the_name_of_the_cutting_are_noted(path, cut):
    vocabulary, notes = vocabulary_of(path, pre=cut)
    assert vocabulary.tokens == TOKENS
    assert notes == ["how it cuts text into words is not said; taken to be GPT-2's way"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": ("str", "llama")}, "its tokenizer is 'llama'"),
        ({"model": ("u8", 1)}, "its tokenizer is '1'"),
        ({"pre": ("str", "llama-bpe")}, "it cuts text into words as 'llama-bpe' does"),
        ({"add_bos_token": ("bool", 1)}, "add_bos_token is set"),
        ({"add_eos_token": ("bool", 1)}, "add_eos_token is set"),
        ({"add_sep_token": ("bool", 1)}, "add_sep_token is set"),
        ({"add_space_prefix": ("bool", 1)}, "add_space_prefix is set"),
    ],
)
def test_other_tokenizers_are_not_used_and_noted(path, changes, reason):
    expected = (None, [f"its vocabulary is not used, because {reason}"])
    assert vocabulary_of(path, **changes) == expected


def test_settings_that_are_off_say_nothing(path):
    off = dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), ("bool", 0))
    assert vocabulary_of(path, **off)[1] == []


@pytest.mark.parametrize("model", [None, ("str", "none"), ("str", "no_vocab")])
def test_a_file_without_vocabulary_says_so(path, model):
    assert vocabulary_of(path, model=model) == (None, ["it carries no vocabulary"])


@pytest.mark.parametrize("count", [5, 7])
def test_a_vocabulary_of_another_size_than_the_table_is_noted(path, count):
    tokens = ("arr", ("str", [str(i) for i in range(count)]))
    _, notes = vocabulary_of(path, tokens=tokens, token_type=None)
    assert notes == [f"the vocabulary has {count} tokens, but the token table has 6 rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens and .*merges must be lists of texts"),
        ({"tokens": ("arr", ("u8", [1]))}, "tokens and .*merges must be lists of texts"),
        ({"merges": ("str", "a b")}, "tokens and .*merges must be lists of texts"),
        ({"merges": ("arr", ("arr", []))}, "tokens and .*merges must be lists of texts"),
        ({"token_type": ("arr", ("i32", [1] * 5))}, "token_type must have one number for each"),
        ({"token_type": ("u8", 1)}, "token_type must have one number for each"),
        ({"token_type": ("arr", ("str", ["1"] * 6))}, "token_type must have one number for each"),
        ({"tokens": ("arr", ("str", [b"\xff"]))}, "expected UTF-8 at byte"),
    ],
)
def test_a_damaged_vocabulary_is_refused(path, changes, message):
    with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}"):
        vocabulary_of(path, **changes)


# -- refusals -------------------------------------------------------------------------------------

A = info("a", (4,), 0, 0)
SIXTEEN = bytes(16)
MANY = 2**64 - 1
REFUSED = {
    "empty": (b"", "expected 4 more bytes of its header at byte 0, received 0: truncated"),
    "only magic": (b"GGUF", "expected 4 more bytes of its header at byte 4"),
    "another magic": (container(start=b"GGML\3\0\0\0"), "not GGUF, it begins with b'GGML'"),
    "version 0": (container(start=b"GGUF" + bytes(4)), "version 0 of GGUF"),
    "version 1": (container(start=b"GGUF\1\0\0\0"), "version 1 of GGUF; numpygpt reads 2 and 3"),
    "version 4": (container(start=b"GGUF\4\0\0\0"), "version 4 of GGUF"),
    "big-endian": (container(start=b"GGUF\0\0\0\3"), "big-endian GGUF"),
    "no architecture": (container([]), "does not say its general.architecture"),
    "llama": (
        container([pair("general.architecture", "str", "llama")]),
        "a model of the architecture 'llama', and numpygpt runs only 'gpt2'",
    ),
    "a number for architecture": (
        container([pair("general.architecture", "f32", 1.0)]),
        "of the architecture '1.0'",
    ),
    "a book for architecture": (
        container([pair("general.architecture", "str", "gpt2" * 100)]),
        "of the architecture 'None'",
    ),
    "one key twice": (container([ARCHITECTURE, ARCHITECTURE]), "key 'general.architecture' stands"),
    "many keys": (container(counts=(0, MANY)), f"claims {MANY} keys, and at most 4096 are read"),
    "many tensors": (container(counts=(MANY, 1)), f"claims {MANY} tensors, and at most 4096"),
    "more keys than there are": (container(counts=(0, 9)), "the key '' stands in it twice"),
    "more keys than bytes": (
        container([ARCHITECTURE], counts=(0, 2), alignment=1),
        "more bytes of its header.*: truncated",
    ),
    "more tensors than there are": (container(counts=(9, 1)), "of its header at .*: truncated"),
    "a long key": (
        container([struct.pack("<Q", 2**63)]),
        f"expected {2**63} more bytes of its header",
    ),
    "a key not UTF-8": (container([pair(b"\xc3", "u8", 1)]), "expected UTF-8 at byte 32"),
    "a text not UTF-8": (container([pair("a", "str", b"a\x80")]), "expected UTF-8 at byte"),
    "an unknown kind": (
        container([packed("str", "a") + struct.pack("<I", 13)]),
        "value at byte 37 is of the unknown type 13",
    ),
    "a list of an unknown kind": (
        container([packed("str", "a") + struct.pack("<IIQ", 9, 99, 1)]),
        "is of the unknown type 99",
    ),
    "a long list of numbers": (
        container([packed("str", "a") + struct.pack("<IIQ", 9, 12, MANY)]),
        f"expected {8 * MANY} more bytes",
    ),
    "a long list of texts": (
        container([packed("str", "a") + struct.pack("<IIQ", 9, 8, 2**19 + 1)]),
        f"a list of {2**19 + 1} texts or lists at byte 49; at most {2**19} are read",
    ),
    "lists in lists": (
        container([pair("a", "arr", ("arr", [("arr", [("arr", [("arr", [("u8", [])])])])]))]),
        "nested too deeply at byte",
    ),
    "alignment 0": (
        container([ARCHITECTURE, pair("general.alignment", "u32", 0)]),
        "general.alignment must be a power of two, not 0",
    ),
    "alignment 12": (container([ARCHITECTURE, pair("general.alignment", "u32", 12)]), "not 12"),
    "alignment -8": (container([ARCHITECTURE, pair("general.alignment", "i8", -8)]), "not -8"),
    "alignment 8.0": (container([ARCHITECTURE, pair("general.alignment", "f32", 8)]), "not 8.0"),
    "alignment 2**63": (
        container([ARCHITECTURE, pair("general.alignment", "u64", 2**63)], [A], SIXTEEN),
        "tensors end at byte .*: truncated",
    ),
    "a long name": (
        container(infos=[info("a" * 64, (4,), 0, 0)], data=SIXTEEN),
        "a name of 64 bytes at byte .*; 63 are read",
    ),
    "five axes": (container(infos=[info("a", (1,) * 5, 0, 0)]), "'a' has 5 axes, and 4 are"),
    "an unknown type": (
        container(infos=[info("a", (4,), 31, 0)], data=SIXTEEN),
        "'a' is of the unknown type 31",
    ),
    "half a block": (
        container(infos=[info("a", (3, 48), 8, 0)], data=bytes(153)),
        "'a' has rows of 48 numbers, but Q8_0 has blocks of 32",
    ),
    "blocks across rows": (
        container(infos=[info("a", (32, 1), 8, 0)], data=bytes(34)),
        "'a' has rows of 1 numbers",
    ),
    "a scalar of a quantisation": (
        container(infos=[info("a", (), 8, 0)], data=bytes(34)),
        "'a' has rows of 1 numbers",
    ),
    "one tensor twice": (
        container(infos=[A, info("a", (4,), 0, 32)], data=bytes(48)),
        "the tensor 'a' stands in it twice",
    ),
    "truncated": (container(infos=[A], data=bytes(15)), "tensors end at byte .*: truncated"),
    "2**256 numbers": (
        container(infos=[info("a", (MANY,) * 4, 0, 0)], data=SIXTEEN),
        "tensors end at byte .*: truncated",
    ),
    "far away": (
        container(infos=[info("a", (4,), 0, 2**63)], data=SIXTEEN),
        "'a' starts at data byte .*, expected 0: it leaves a hole",
    ),
    "not aligned": (
        container(infos=[A, info("b", (4,), 0, 16)], data=bytes(32)),
        "'b' starts at data byte 16, expected 32: it is not aligned",
    ),
    "overlap": (
        container(infos=[info("a", (12,), 0, 0), info("b", (4,), 0, 32)], data=bytes(48)),
        "'b' starts at data byte 32, expected 64: it overlaps another tensor",
    ),
    "the same place": (
        container(infos=[A, info("b", (4,), 0, 0)], data=SIXTEEN),
        "'b' starts at data byte 0, expected 32: it overlaps",
    ),
    "hole at the start": (
        container(infos=[info("a", (4,), 0, 32)], data=bytes(48)),
        "'a' starts at data byte 32, expected 0: it leaves a hole",
    ),
    "hole between": (
        container(infos=[A, info("b", (4,), 0, 64)], data=bytes(80)),
        "'b' starts at data byte 64, expected 32: it leaves a hole",
    ),
    "trailing data": (
        container(infos=[A], data=bytes(33)),
        "17 bytes at its end belong to no tensor",
    ),
    "data of nothing": (container(data=bytes(1)), "bytes at its end belong to no tensor"),
    "one of several parts": (
        container([ARCHITECTURE, pair("split.count", "u16", 3)]),
        "one of 3 parts of a model; join them",
    ),
    "an adapter": (
        container([ARCHITECTURE, pair("general.type", "str", "adapter")]),
        "expected a model, received 'adapter'",
    ),
    "old blocks": (
        container([ARCHITECTURE, pair("general.quantization_version", "u32", 1)]),
        "general.quantization_version is 1, expected 2",
    ),
    "our own names": (
        container(infos=[info("h.0.attn.c_proj.weight", (4,), 0, 0)], data=SIXTEEN),
        "'h.0.attn.c_proj.weight' is not how llama.cpp names a tensor",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damage_is_refused_with_the_name_of_the_file(path, content, message):
    with pytest.raises(CheckpointError, match=f"x.gguf: .*{message}"):
        read_bytes(path, content)


def test_a_key_and_a_name_are_shown_without_their_control_characters(path):
    with pytest.raises(CheckpointError) as caught:
        read_bytes(path, container(infos=[info("\x1b[2J", (4,), 31, 0)]))
    assert str(caught.value).isprintable()


# -- damage at large ------------------------------------------------------------------------------

TINY = nano(vocab_size=6, n_ctx=2, n_embd=2, n_layer=1, n_head=1)
WHOLE = of_config(TINY, **VOCABULARY)
# Where the first tensor begins; each takes whole steps of 32 bytes.
DATA = len(WHOLE) - sum(-(-a.size // 8) * 32 for a in random_tensors(TINY).values())


@pytest.mark.hostile
def test_a_file_cut_at_any_byte_is_refused(path):
    reading.settle(path, read_bytes(path, WHOLE), {})
    padding = 32 - 4 * TINY.n_embd  # behind the last tensor, the bias of ffn_down
    for size in reversed(range(len(WHOLE))):
        os.truncate(path, size)
        if size < len(WHOLE) - padding:
            with pytest.raises(CheckpointError, match=r"x\.gguf: .*"):
                gguf.read(path)
        else:
            assert_holds(gguf.read(path).tensors, random_tensors(TINY, 0, np.float32))


@pytest.mark.hostile
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_file_with_any_byte_changed_loads_or_is_refused(path, mask):
    path.write_bytes(WHOLE)
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(WHOLE):
            file.seek(at)
            file.write(bytes([byte ^ mask]))
            try:
                reading.settle(path, gguf.read(path), {})
            except CheckpointError as error:
                assert "x.gguf: " in str(error)  # noqa: PT017
            file.seek(at)
            file.write(bytes([byte]))


EDITS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, len(WHOLE) - 1), st.integers(1, 255)),
    st.tuples(st.just("insert"), st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("delete"), st.integers(0, len(WHOLE) - 1), st.integers(1, 40)),
)


@given(st.lists(EDITS, min_size=1, max_size=4))
def test_an_edited_file_loads_or_is_refused_but_nothing_else(tmp_path_factory, edits):
    content = bytearray(WHOLE)
    for kind, at, what in edits:
        at = min(at, len(content))
        if kind == "flip" and at < len(content):
            content[at] ^= what
        elif kind == "insert":
            content[at:at] = what
        elif kind == "delete":
            del content[at : at + what]
    path = tmp_path_factory.getbasetemp() / "edited.gguf"
    try:
        reading.settle(path, read_bytes(path, bytes(content)), {})
    except CheckpointError:
        return


@given(st.integers(0, len(WHOLE)), st.binary(max_size=200))
def test_random_bytes_behind_a_sound_beginning_are_refused(tmp_path_factory, length, rest):
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    try:
        reading.settle(path, read_bytes(path, WHOLE[:length] + rest), {})
    except CheckpointError:
        return
    assert length >= DATA  # only numbers were changed


# A file may take twice its size and 64 MiB of memory, and ten seconds.
TOKENS_KEY = packed("str", "tokenizer.ggml.tokens")
LONG = packed("str", "\U0001f600" + "a" * (12 * MIB - 200))  # four times its size in memory


def texts(count: int, item: bytes) -> bytes:
    """A list of equal tokens, already packed."""
    return TOKENS_KEY + struct.pack("<IIQ", 9, 8, count) + item * count


LARGE: dict[str, Callable[[], bytes]] = {
    # 23 bytes in the file each, and 132 in memory
    "wide tokens": lambda: container(
        [ARCHITECTURE, texts(2**19, packed("str", "\U0001f600" + "a" * 11))]
    ),
    "a long token": lambda: container([ARCHITECTURE, texts(1, LONG)]),
    "a long key": lambda: container([LONG + bytes(4)]),
    "a long header": lambda: container([ARCHITECTURE, texts(1, packed("str", "a" * 13 * MIB))]),
    "many tensors": lambda: container(infos=[info(f"tensor{i}", (0,), 0, 0) for i in range(4096)]),
}


@pytest.mark.hostile
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_a_hostile_header_cannot_make_the_reader_allocate(path, make):
    content = make()
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.gguf: "):
            gguf.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(content) + 64 * MIB


LISTS = packed("str", "a") + struct.pack("<IIQ", 9, 9, 2**19) + bytes(12) * 2**19
SLOW: dict[str, Callable[[], bytes]] = {
    "short tokens": lambda: container([ARCHITECTURE, texts(2**19, packed("str", "Ġa"))]),
    "empty lists": lambda: container([ARCHITECTURE, LISTS]),
    "many keys": lambda: container(
        [ARCHITECTURE, *(pair(f"key{i}", "u8", 1) for i in range(4095))]
    ),
}


@pytest.mark.hostile
@pytest.mark.parametrize("make", SLOW.values(), ids=SLOW)
def test_a_hostile_header_is_gone_through_quickly(path, make):
    path.write_bytes(make())
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.gguf: gpt2.context_length is missing"):
        gguf.read(path)
    assert time.process_time() - begin < 10  # it takes 0.6 s


# -- writing --------------------------------------------------------------------------------------


def tensor_of(array: np.ndarray) -> Tensor:
    """An array that has not been read yet."""
    kind = {"float64": "F64", "float32": "F32", "float16": "F16"}[array.dtype.name]
    return Tensor(kind, array.shape, array.nbytes, lambda dtype: array.astype(dtype, copy=False))


def written(
    config: Config,
    tensors: dict[str, np.ndarray],
    vocabulary: Vocabulary | None = None,
    told: list[int] | None = None,
) -> bytes:
    file = io.BytesIO()
    described = {name: tensor_of(array) for name, array in tensors.items()}
    gguf.write(file, config, described, vocabulary, (told if told is not None else []).append)
    return file.getvalue()


WORDS = Vocabulary([*"abc", "ab", "<|endoftext|>", "[PAD5]"], ["a b"], [4, 5])
ALL_CONFIGS = [
    {},
    {"tie_word_embeddings": False},
    {"n_inner": 10},
    {"layer_norm_epsilon": 2.0**-17},
    {"activation_function": "gelu_pytorch_tanh"},
]


@pytest.mark.parametrize("changes", ALL_CONFIGS, ids=str)
@pytest.mark.parametrize("vocabulary", [None, WORDS])
def test_what_is_written_is_read_again(path, changes, vocabulary):
    config = nano(**{**vars(SMALL), **changes})
    tensors = random_tensors(config, 8, np.float32)
    told: list[int] = []
    source = read_bytes(path, written(config, tensors, vocabulary, told))
    settled = reading.settle(path, source, {})
    assert settled.config == nano(**{**vars(config), "activation_function": "gelu_new"})
    assert_holds(settled.tensors, tensors)
    assert source.vocabulary == vocabulary
    assert sum(told) == 4 * config.parameter_count


def test_our_file_is_byte_for_byte_what_the_specification_says():
    tensors = random_tensors(SMALL, 9, np.float32)
    values = {
        "general.architecture": ("str", "gpt2"),
        "general.name": ("str", "GPT-2"),
        "general.file_type": ("u32", 0),
        **settings(SMALL),
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "gpt-2"),
        "tokenizer.ggml.tokens": ("arr", ("str", WORDS.tokens)),
        "tokenizer.ggml.token_type": ("arr", ("i32", [1, 1, 1, 1, 3, 5])),
        "tokenizer.ggml.merges": ("arr", ("str", ["a b"])),
        "tokenizer.ggml.bos_token_id": ("u32", 4),
        "tokenizer.ggml.eos_token_id": ("u32", 4),
    }
    arrays = named(tensors, 1)
    order = ["token_embd.weight", "position_embd.weight", *(f"blk.0.{name}" for name in BLOCK),
             "output_norm.weight", "output_norm.bias"]  # fmt: skip
    assert written(SMALL, tensors, WORDS) == model(values, {name: arrays[name] for name in order})


def test_a_model_without_vocabulary_says_how_many_tokens_it_has(path):
    path.write_bytes(written(SMALL, random_tensors(SMALL, 0, np.float32)))
    values = GGUFFile(path, "gpt2", ()).values
    assert values["tokenizer.ggml.model"] == "no_vocab"
    assert values["gpt2.vocab_size"] == 6
    assert gguf.read(path).notes == ["it carries no vocabulary"]


def test_a_vocabulary_that_is_too_short_is_filled_up(path):
    config = nano(**{**vars(SMALL), "vocab_size": 8})
    content = written(config, random_tensors(config, 0, np.float32), WORDS)
    expected = ([*WORDS.tokens, "[PAD6]", "[PAD7]"], ["a b"], [4, 5, 6, 7])
    assert read_bytes(path, content).vocabulary == expected


def test_a_model_without_biases_gets_zeros_because_llama_cpp_needs_them(path):
    config = nano(**{**vars(SMALL), "bias": False})
    tensors = random_tensors(config, 1, np.float32)
    source = read_bytes(path, written(config, tensors))
    assert reading.settle(path, source, {}).config == SMALL
    biases = {n: np.zeros(t.shape, "f4") for n, t in source.tensors.items() if n not in tensors}
    assert len(biases) == 7
    assert_holds(source.tensors, {**tensors, **biases})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_become_the_nearest_float32(path, dtype):
    tensors = random_tensors(SMALL, 2, dtype)
    source = read_bytes(path, written(SMALL, tensors))
    assert_holds(source.tensors, {n: a.astype(np.float32) for n, a in tensors.items()})


def test_a_head_that_is_stored_although_it_is_tied_is_left_out(path):
    tensors = random_tensors(SMALL, 3, np.float32)
    content = written(SMALL, {**tensors, "lm_head.weight": tensors["wte.weight"]})
    assert_holds(read_bytes(path, content).tensors, tensors)


@pytest.mark.parametrize(
    ("changes", "vocabulary", "message"),
    [
        ({"activation_function": "gelu"}, None, "activation_function = 'gelu'.* with 'gelu_new'"),
        ({"scale_attn_weights": False}, None, "scale_attn_weights = False.* with True"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            None,
            "scale_attn_by_inverse_layer_idx = True.* with False",
        ),
        (
            {"layer_norm_epsilon": 1.23456789e-5},
            None,
            r"layer_norm_epsilon = 1\.23456789e-05: .* 1\.234567\d+e-05 could be",
        ),
        ({"vocab_size": 5}, WORDS, "the vocabulary has 6 tokens, but the token table has 5 rows"),
        ({}, WORDS._replace(tokens=[*"abcded"]), "two tokens with one name: 'd'"),
        ({}, WORDS._replace(tokens=["[PAD5]", *WORDS.tokens[1:5]]), "one name: '.PAD5.'"),
        ({}, WORDS._replace(merges=["\ud800 a"]), "cannot express the vocabulary: 'utf-8' codec"),
        ({}, WORDS._replace(tokens=[*"abcdef"]), r"a vocabulary without <\|endoftext\|>"),
    ],
)
def test_what_gguf_cannot_express_is_refused_before_a_byte_is_written(changes, vocabulary, message):
    config = nano(**{**vars(SMALL), **changes})
    described = {n: tensor_of(a) for n, a in random_tensors(config, 0, np.float32).items()}
    file = io.BytesIO()
    with pytest.raises(CheckpointError, match=message):
        gguf.write(file, config, described, vocabulary, lambda count: None)
    assert file.getvalue() == b""


def test_an_incomplete_model_is_refused_before_a_byte_is_written():
    described = {n: tensor_of(a) for n, a in random_tensors(SMALL, 0, np.float32).items()}
    del described["wpe.weight"]
    file = io.BytesIO()
    with pytest.raises(CheckpointError, match=r"1 of 16 tensors are missing: wpe\.weight"):
        gguf.write(file, SMALL, described, None, lambda count: None)
    assert file.getvalue() == b""


def test_a_number_too_large_for_float32_is_refused():
    tensors = random_tensors(SMALL, 0, np.float64)
    tensors["wpe.weight"][0, 0] = 1e39
    with pytest.raises(
        CheckpointError, match=r"wpe\.weight has 1e\+39, which is too large for F32"
    ):
        written(SMALL, tensors)
