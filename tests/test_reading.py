"""Checkpoints as directories: names, shards, biases, heads, and every way they may not fit."""

from __future__ import annotations

import json
import os
import pathlib
import re
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from support import config_json, nano, random_tensors, safetensors_bytes, write_checkpoint

from numpygpt.checkpoints import inspect, read
from numpygpt.checkpoints.arrays import Tensor
from numpygpt.checkpoints.names import canonical, joined
from numpygpt.errors import CheckpointError, CheckpointWarning, ConfigError, ModelNotFoundError

Tensors = dict[str, np.ndarray]
INDEX = "model.safetensors.index.json"


def tensors(dtype: Any = np.float32, **changes: Any) -> Tensors:
    return random_tensors(nano(**changes), dtype=dtype)


def write(directory: pathlib.Path, stored: Mapping[str, np.ndarray], **changes: Any):
    """A checkpoint of the nano config that holds `stored`."""
    return write_checkpoint(directory, nano(), stored, **changes)


def write_shards(directory: pathlib.Path, files: Mapping[str, Tensors], weight_map: Any = None):
    """A checkpoint in several files, with the index that fits them or another one."""
    if weight_map is None:
        weight_map = {name: file for file, held in files.items() for name in held}
    directory.mkdir(exist_ok=True)
    for file, held in files.items():
        (directory / file).write_bytes(safetensors_bytes(held))
    (directory / "config.json").write_text(json.dumps(config_json(nano())))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def two_shards() -> dict[str, Tensors]:
    items = list(tensors().items())
    return {"a.safetensors": dict(items[:9]), "b.safetensors": dict(items[9:])}


def refused(directory: pathlib.Path, *parts: str) -> None:
    """`read` refuses it and `inspect` reports it, both with a message that has all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    (problem,) = inspect(directory).problems
    assert str(caught.value) == problem
    for part in parts:
        assert part in problem


def assert_equal_params(params: Any, expected: Any) -> None:
    """Two trees of arrays hold the same, element by element."""
    if isinstance(expected, tuple):
        assert len(params) == len(expected)
        for one, other in zip(params, expected, strict=True):
            assert_equal_params(one, other)
    elif expected is None:
        assert params is None
    else:
        np.testing.assert_array_equal(params, expected, strict=True)


# -- what loads --------------------------------------------------------------------------------


def test_every_array_lands_where_its_name_says(tmp_path):
    stored = tensors()
    config, params, directory, vocabulary = read(write(tmp_path, stored))
    assert vocabulary is None
    assert (config, directory) == (nano(), tmp_path)
    places = {"wte.weight": params.wte, "wpe.weight": params.wpe, "ln_f.weight": params.ln_f.g}
    places["ln_f.bias"] = params.ln_f.b
    for i, block in enumerate(params.h):
        for part, norm in [("ln_1", block.ln_1), ("ln_2", block.ln_2)]:
            places |= {f"h.{i}.{part}.weight": norm.g, f"h.{i}.{part}.bias": norm.b}
        for part, linear in [
            ("attn.c_attn", block.attn.c_attn),
            ("attn.c_proj", block.attn.c_proj),
            ("mlp.c_fc", block.mlp.c_fc),
            ("mlp.c_proj", block.mlp.c_proj),
        ]:
            places |= {f"h.{i}.{part}.weight": linear.w, f"h.{i}.{part}.bias": linear.b}
    assert places.keys() == stored.keys()
    for name, array in places.items():
        np.testing.assert_array_equal(array, stored[name], strict=True)
    assert params.head is params.wte


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_asked_for_is_the_dtype_of_every_array(tmp_path, dtype):
    params = read(write(tmp_path, tensors(np.float16)), dtype).params
    stored = tensors(np.float16)
    np.testing.assert_array_equal(params.wpe, stored["wpe.weight"].astype(dtype), strict=True)
    np.testing.assert_array_equal(params.ln_f.b, stored["ln_f.bias"].astype(dtype), strict=True)


def test_the_prefix_transformer_changes_nothing(tmp_path):
    plain, prefixed = tensors(), {f"transformer.{n}": a for n, a in tensors().items()}
    expected = read(write(tmp_path / "plain", plain)).params
    assert_equal_params(read(write(tmp_path / "prefixed", prefixed)).params, expected)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.bool_])
def test_stored_causal_masks_are_dropped(tmp_path, prefix, dtype):
    masks = {"attn.bias": np.tri(12, dtype=dtype)[None, None], "attn.masked_bias": np.array(-1e4)}
    stored = {f"{prefix}{n}": a for n, a in tensors().items()}
    stored |= {f"{prefix}h.{i}.{n}": a for i in range(2) for n, a in masks.items()}
    checkpoint = read(write(tmp_path / "masks", stored))
    assert_equal_params(checkpoint.params, read(write(tmp_path / "plain", tensors())).params)
    assert inspect(tmp_path / "masks").problems == []


def test_masks_are_not_taken_for_biases(tmp_path):
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 12, 12), np.float32) for i in range(2)}
    config = read(write(tmp_path, tensors(bias=False) | masks, bias=False)).config
    assert config == nano(bias=False)


@pytest.mark.parametrize("said", [True, False])
def test_a_checkpoint_without_any_bias_loads_without(tmp_path, said):
    directory = write(tmp_path, tensors(bias=False), **({"bias": False} if said else {}))
    if said:
        checkpoint = read(directory)
    else:  # trained without them, or lost them
        with pytest.warns(CheckpointWarning, match="bias = False is assumed: not one bias"):
            checkpoint = read(directory)
        assert any("not one bias is stored" in note for note in inspect(directory).notes)
    assert checkpoint.config == nano(bias=False)
    assert checkpoint.params.ln_f.b is None
    assert checkpoint.params.h[1].mlp.c_fc.b is None


@pytest.mark.parametrize("given", [True, False])
def test_biases_that_the_config_promises_must_be_there(tmp_path, given):
    directory = write(tmp_path, tensors(bias=False), **({} if given else {"bias": True}))
    config = {"bias": True} if given else {}
    with pytest.raises(CheckpointError, match="not one bias is stored, but its config says bias"):
        read(directory, config=config)
    assert "not one bias is stored" in inspect(directory, config).problems[0]


@pytest.mark.parametrize("n_inner", [1, 5, 64])
def test_an_mlp_may_have_any_width(tmp_path, n_inner):
    params = read(write_checkpoint(tmp_path, nano(n_inner=n_inner))).params
    assert params.h[0].mlp.c_fc.w.shape == (8, n_inner)
    assert params.h[0].mlp.c_proj.w.shape == (n_inner, 8)


def test_a_stored_head_that_repeats_the_token_table_is_fine(tmp_path):
    stored = tensors()
    stored["lm_head.weight"] = stored["wte.weight"].copy()
    params = read(write(tmp_path, stored)).params
    assert params.head is params.wte


def test_an_untied_head_is_used(tmp_path):
    config = nano(tie_word_embeddings=False)
    stored = random_tensors(config, dtype=np.float32)
    checkpoint = read(write_checkpoint(tmp_path, config, stored))
    np.testing.assert_array_equal(checkpoint.params.head, stored["lm_head.weight"], strict=True)
    np.testing.assert_array_equal(checkpoint.params.wte, stored["wte.weight"], strict=True)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
@pytest.mark.parametrize("by_file", [True, False])
def test_a_single_file_may_have_any_name_and_be_named_itself(tmp_path, name, by_file):
    file = write(tmp_path, tensors()) / "model.safetensors"
    file = file.rename(tmp_path / name)
    checkpoint = read(file if by_file else tmp_path)
    assert checkpoint.directory == tmp_path
    np.testing.assert_array_equal(checkpoint.params.wte, tensors()["wte.weight"], strict=True)


@pytest.mark.parametrize("source", ["", INDEX])
def test_two_shards_are_one_checkpoint(tmp_path, source):
    directory = write_shards(tmp_path / "shards", two_shards())
    checkpoint = read(directory / source)
    assert checkpoint.directory == directory
    assert_equal_params(checkpoint.params, read(write(tmp_path / "plain", tensors())).params)
    assert inspect(directory / source).tensors.keys() == tensors().keys()


# -- damaged or foreign shards -----------------------------------------------------------------

BAD_NAMES = ["../x", "/etc/x", "a/b", "a\\b", "C:\\x", "C:x", "..", ".", "", None, 5, ["a"]]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=ascii)
def test_a_shard_outside_its_directory_is_refused(tmp_path, bad):
    files = two_shards()
    weight_map = {name: file for file, held in files.items() for name in held}
    directory = write_shards(tmp_path / "here", files, weight_map | {"wte.weight": bad})
    (tmp_path / "x").write_bytes(safetensors_bytes({"wte.weight": tensors()["wte.weight"]}))
    with pytest.raises(CheckpointError, match=f"{INDEX}: wte.weight is in .* plain file name"):
        read(directory)


@pytest.mark.parametrize("bad", ["z" * 500, "zzz\0", "zzz\ud800"], ids=["long", "NUL", "surrogate"])
def test_a_shard_whose_name_no_file_can_have_is_refused(tmp_path, bad):
    files = two_shards()
    weight_map = {name: bad for held in files.values() for name in held}
    with pytest.raises((CheckpointError, ModelNotFoundError), match="zzz"):
        read(write_shards(tmp_path, files, weight_map))


def test_a_missing_shard_is_named(tmp_path):
    directory = write_shards(tmp_path, two_shards())
    (directory / "b.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=rf"b\.safetensors: not found, but {INDEX} says"):
        read(directory)


@pytest.mark.parametrize("change", ["more", "less"])
def test_a_shard_that_holds_other_tensors_than_its_index_says_is_refused(tmp_path, change):
    files = two_shards()
    directory = write_shards(tmp_path, files)
    held = files["a.safetensors"]
    if change == "more":
        held["h.5.ln_1.weight"] = held["h.0.ln_1.weight"]
    else:
        del held["wpe.weight"]
    (directory / "a.safetensors").write_bytes(safetensors_bytes(held))
    name = {"more": "h.5.ln_1.weight", "less": "wpe.weight"}[change]
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: holds other tensors .*: {name}$"):
        read(directory)


def test_one_tensor_in_two_shards_is_refused(tmp_path):
    files = two_shards()
    files["a.safetensors"]["transformer.ln_f.bias"] = np.zeros(8, np.float32)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: ln_f\.bias stands in it twice"):
        read(write_shards(tmp_path, files))


@pytest.mark.parametrize("weight_map", [{}, [], ["a.safetensors"], "a.safetensors", 7])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    with pytest.raises(CheckpointError, match=f"{INDEX}: expected a weight_map"):
        read(write_shards(tmp_path, two_shards(), weight_map))


def test_a_damaged_index_is_refused_and_a_huge_one_is_not_read(tmp_path):
    directory = write_shards(tmp_path, two_shards())
    (directory / INDEX).write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match=f"{INDEX}: expected JSON"):
        read(directory)
    (directory / INDEX).write_bytes(b" " * (2**20 + 1))
    with pytest.raises(CheckpointError, match=f"{INDEX}: over 1 MiB"):
        read(directory)


# -- tensors that do not fit the config --------------------------------------------------------


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_proj.weight", "h.0.ln_2.bias"])
def test_a_missing_tensor_is_named(tmp_path, name):
    stored = tensors()
    del stored[name]
    refused(write(tmp_path, stored), "1 of 28 tensors are missing", name)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.scale", "score.weight", "h.1.crossattention.b"])
def test_an_unexpected_tensor_is_named(tmp_path, name):
    stored = tensors() | {name: np.zeros(3, np.float32)}
    refused(write(tmp_path, stored), "unexpected tensors", name)


def test_a_tensor_stored_with_and_without_prefix_is_refused(tmp_path):
    stored = tensors() | {"transformer.ln_f.bias": np.zeros(8, np.float32)}
    refused(write(tmp_path, stored), "ln_f.bias stands in it twice")


@pytest.mark.parametrize(
    ("name", "shape", "letters"),
    [
        ("wte.weight", (17, 8), "(V, C)"),
        ("wpe.weight", (12, 8), "(n_ctx, C)"),
        ("h.0.attn.c_attn.weight", (8, 24), "(C, 3C)"),
        ("h.1.mlp.c_fc.weight", (8, 32), "(C, F)"),
        ("h.1.mlp.c_proj.weight", (32, 8), "(F, C)"),
        ("ln_f.bias", (8,), "(C)"),
    ],
)
@pytest.mark.parametrize("wrong", ["longer", "extra axis", "transposed"])
def test_a_wrong_shape_is_refused_with_the_shape_expected(tmp_path, name, shape, letters, wrong):
    stored = tensors()
    received = {"longer": (shape[0] + 1, *shape[1:]), "extra axis": (1, *shape)}
    received["transposed"] = shape[::-1] if len(shape) > 1 else (1, *shape)
    stored[name] = np.zeros(received[wrong], np.float32)
    message = f"{name} expected shape {shape} = {letters}, received {received[wrong]}"
    refused(write(tmp_path, stored), str(tmp_path), message)


@pytest.mark.parametrize("n_layer", [1, 3, 10**9])
def test_a_wrong_number_of_layers_is_refused_before_anything_is_built(tmp_path, n_layer):
    directory = write(tmp_path, tensors(), n_layer=n_layer)
    tracemalloc.start()
    try:
        refused(directory, f"n_layer = {n_layer}", "2 layers")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24  # names of 10**9 layers would take hundreds of GiB


def test_layers_numbered_with_a_gap_are_refused(tmp_path):
    stored = {name.replace("h.1.", "h.2."): array for name, array in tensors().items()}
    refused(write(tmp_path, stored), "unexpected tensors", "h.2.ln_1.weight")


@pytest.mark.parametrize(
    ("stored", "changes", "part"),
    [
        (tensors() | {"ln_f.bias": None}, {}, "missing: ln_f.bias"),
        (tensors(bias=False) | {"ln_f.bias": np.ones(8, np.float32)}, {}, "12 of 28 tensors are"),
        (tensors(), {"bias": False}, "unexpected tensors"),
        (tensors(), {"n_inner": 31}, "(8, 31) = (C, F), received (8, 32)"),
        (tensors(), {"tie_word_embeddings": False}, "missing: lm_head.weight"),
        (tensors(), {"n_ctx": 2**30, "n_positions": 2**30}, "wpe.weight expected shape"),
    ],
    ids=["one bias less", "one bias", "biases denied", "n_inner", "no head", "positions"],
)
def test_config_and_tensors_must_fit_each_other(tmp_path, stored, changes, part):
    stored = {name: array for name, array in stored.items() if array is not None}
    refused(write(tmp_path, stored, **changes), part)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    stored = tensors()
    stored["lm_head.weight"] = stored["wte.weight"].copy()
    stored["lm_head.weight"][16, 7] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        read(write(tmp_path, stored))


def test_a_tied_head_of_another_shape_is_refused(tmp_path):
    stored = tensors() | {"lm_head.weight": np.zeros((3, 8), np.float32)}
    refused(write(tmp_path, stored), "lm_head.weight", "(3, 8)")


@pytest.mark.parametrize("name", ["wte.weight", "lm_head.weight", "h.0.ln_1.bias"])
def test_weights_that_are_no_floats_are_refused(tmp_path, name):
    stored = tensors()
    stored[name] = np.ones(stored.get(name, stored["wte.weight"]).shape, np.uint8)
    refused(write(tmp_path, stored), str(tmp_path), f"{name} is U8")


# -- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_load_with_a_warning_that_names_the_tensors(tmp_path, value):
    stored = tensors()
    stored["wpe.weight"][3, 1] = stored["ln_f.bias"][0] = value
    with pytest.warns(CheckpointWarning, match="weights in wpe.weight, ln_f.bias$"):
        params = read(write(tmp_path, stored)).params
    np.testing.assert_array_equal(params.ln_f.b, stored["ln_f.bias"], strict=True)


def test_opposite_infinities_are_found(tmp_path):
    stored = tensors()
    stored["ln_f.bias"][:2] = np.inf, -np.inf
    with pytest.warns(CheckpointWarning, match="in ln_f.bias$"):
        read(write(tmp_path, stored))


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_large_finite_weights_whose_sum_overflows_are_no_reason_to_warn(tmp_path, value):
    stored = tensors()
    stored["wpe.weight"][:] = value
    read(write(tmp_path, stored))  # a warning would be an error


def test_a_tied_head_with_the_same_nan_is_the_same_head(tmp_path):
    stored = tensors()
    stored["wte.weight"][0, 0] = np.nan
    stored["lm_head.weight"] = stored["wte.weight"].copy()
    with pytest.warns(CheckpointWarning, match="in wte.weight"):
        read(write(tmp_path, stored))


def test_float64_weights_beyond_float32_get_the_named_warning_and_no_other(tmp_path):
    stored = tensors(np.float64)
    stored["ln_f.bias"][0] = 1e300
    with pytest.warns(CheckpointWarning, match="in ln_f.bias$") as caught:
        read(write(tmp_path, stored))
    assert [str(w.message) for w in caught if w.category is not CheckpointWarning] == []
    assert read(tmp_path, np.float64).params.ln_f.b[0] == 1e300


def test_tensors_alone_need_their_heads_and_warn_of_the_activation(tmp_path):
    (write(tmp_path, tensors()) / "config.json").unlink()
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu_new' is assumed"):
        assert read(tmp_path, config={"n_head": 2}).config == nano()
    given = {"n_head": 2, "activation_function": "gelu"}
    assert read(tmp_path, config=given).config == nano(activation_function="gelu")
    with pytest.raises(ConfigError, match="missing n_head"):
        read(tmp_path, config={"activation_function": "gelu"})


def test_over_a_thousand_layers_are_refused_before_they_are_described(tmp_path):
    stored = {f"h.{i}.ln_1.bias": np.zeros(1, np.float32) for i in range(1001)}
    refused(write(tmp_path, stored, n_layer=1001), "1001 layers, expected at most 1000")


def test_a_context_length_given_twice_must_agree(tmp_path):
    with pytest.raises(ConfigError, match="n_positions and n_ctx disagree"):
        read(write(tmp_path, tensors()), config={"n_ctx": 12, "n_positions": 99})


@pytest.mark.parametrize("name", ["é" * 200 + ".safetensors", "x" * 250 + ".bin"])
def test_a_shard_whose_name_is_too_long_for_the_system_is_refused(tmp_path, name):
    weight_map = dict.fromkeys(tensors(), name)
    with pytest.raises((CheckpointError, ModelNotFoundError)):
        read(write_shards(tmp_path, two_shards(), weight_map))


def test_old_mingpt_is_recognised_behind_a_wrapper():
    gain = Tensor("F32", (8,), 32, lambda dtype: np.ones(8, dtype))
    names = ["tok_emb.weight", "ln_f.weight", "blocks.0.ln1.weight"]
    found, _ = canonical({f"module.{name}": gain for name in names}, "x")
    assert list(found) == ["wte.weight", "ln_f.weight", "h.0.ln_1.weight"]


@pytest.mark.parametrize("n_inner", [8, 5, 24])
def test_orientation_is_told_by_the_shapes_that_can_tell(tmp_path, n_inner):
    config = nano(n_inner=n_inner)
    stored = random_tensors(config, dtype=np.float32)
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    turned = {n: a.T.copy() if n.endswith(ends) else a for n, a in stored.items()}
    one = read(write_checkpoint(tmp_path / "one", config, stored)).params
    assert_equal_params(read(write_checkpoint(tmp_path / "other", config, turned)).params, one)
    notes = inspect(tmp_path / "one").notes, inspect(tmp_path / "other").notes
    assert [len(each) for each in notes] == [0, 1]


def test_one_tensor_with_two_names_stays_one_when_it_is_turned():
    shapes = {"ln_f.weight": (8,), "h.0.attn.c_attn.weight": (24, 8)}
    held = {n: Tensor("F32", s, 0, lambda dtype, s=s: np.ones(s, dtype)) for n, s in shapes.items()}
    held["h.1.attn.c_attn.weight"] = held["h.0.attn.c_attn.weight"]
    found, notes = canonical(held, "x")
    assert notes
    assert found["h.0.attn.c_attn.weight"] is found["h.1.attn.c_attn.weight"]


def test_parts_of_different_types_are_joined_without_rounding():
    halves = np.array([1.0, 2.0], np.float16), np.array([1 / 3, 3.0], np.float32)
    parts = [
        Tensor(
            {2: "F16", 4: "F32"}[a.itemsize], a.shape, a.nbytes, lambda dtype, a=a: a.astype(dtype)
        )
        for a in halves
    ]
    for order in (parts, parts[::-1]):
        whole = joined(order, axis=0)
        assert (whole.dtype, whole.exact) == ("F32", np.float32)
        assert np.float32(1 / 3) in whole.read(whole.exact)
    assert joined(parts[:1] * 2, axis=0).dtype == "F16"


# -- missing files -----------------------------------------------------------------------------


def test_places_without_a_checkpoint_say_what_is_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere: no such file or directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"expected model\.safetensors, .* is empty"):
        read(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelNotFoundError, match=r"found model\.onnx"):
        read(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFoundError, match=r"name one of them: one\.saf.*, two\.saf"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["", "model.safetensors"])
def test_tensors_without_a_config_are_refused(tmp_path, source):
    (write(tmp_path, tensors()) / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json: not found"):
        read(tmp_path / source)


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_lists_tensors_without_prefix_in_file_order(tmp_path):
    stored = {f"transformer.{name}": array for name, array in tensors(np.float16).items()}
    report = inspect(write(tmp_path, stored))
    assert (report.config, report.problems) == (nano(), [])
    assert (report.path, report.directory) == (tmp_path, tmp_path)
    assert list(report.tensors) == list(tensors())
    assert {entry.dtype for entry in report.tensors.values()} == {"F16"}
    assert report.tensors["wpe.weight"].shape == (12, 8)


def test_inspect_collects_all_problems_instead_of_raising_the_first(tmp_path):
    directory = write(tmp_path, tensors(), model_type="llama")
    (directory / "model.safetensors").write_bytes(b"short")
    report = inspect(directory)
    assert report.config is None
    assert report.tensors == {}
    assert [bool(re.search("5 bytes, too short", p)) for p in report.problems] == [True, False]
    assert [bool(re.search("model_type is 'llama'", p)) for p in report.problems] == [False, True]


def test_inspect_reports_a_missing_config(tmp_path):
    (write(tmp_path, tensors()) / "config.json").unlink()
    (problem,) = inspect(tmp_path).problems
    assert "config.json: not found" in problem


def test_inspect_reports_a_damaged_index(tmp_path):
    directory = write_shards(tmp_path, two_shards(), {"wte.weight": "../x"})
    (problem,) = inspect(directory).problems
    assert "plain file name" in problem


def test_inspect_raises_where_there_is_nothing_to_look_at(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        inspect(tmp_path / "missing")


def test_inspect_says_that_a_directory_is_empty(tmp_path):
    assert "empty" in inspect(tmp_path).problems[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_config_that_is_a_pipe_is_refused_without_waiting(tmp_path):
    (write(tmp_path, tensors()) / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: not a regular file"):
        read(tmp_path)


def test_a_config_that_is_a_directory_is_refused(tmp_path):
    (write(tmp_path, tensors()) / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: "):
        read(tmp_path)
