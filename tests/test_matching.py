"""Which array is which: known names, layouts and values; what is unclear is said, not guessed."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import nano, random_ids, random_params

from numpygpt.cache import Cache, segments
from numpygpt.errors import DumpError
from numpygpt.model import forward, unembed
from numpygpt.params import Config
from numpygpt.plans import Traced, trace_names
from numpygpt.verify import names
from numpygpt.verify.dumps.recording import Recording, Stored, recording
from numpygpt.verify.matching import match

# What numpygpt.verify.recognition promises: within a quarter, and four times nearer than the next.
CLOSE, CLEAR = 0.25, 4.0

# B = 2 sequences of T = 5 tokens; every axis of NANO has a length of its own: H = 2, D = 6,
# C = 12, F = 28, V = 17, and 3C = 36.
NANO = nano(n_embd=12, n_inner=28)
IDS = np.stack([random_ids(NANO, 5, seed) for seed in (1, 2)])


def run(config: Config, ids: np.ndarray, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Our trace of one sequence, with random weights that depend on the config only."""
    params, length = random_params(config, seed=7), len(ids)
    laid = segments([length], [Cache(config, length, np.float64)])
    planner = Traced(config, length, names, length, np.float64)
    hidden = forward(ids, laid, params, config, plan := planner.fit(laid))
    if plan.logits is not None:
        unembed(hidden, params, out=plan.logits)
    return {name: np.ascontiguousarray(array) for name, array in planner.arrays.items()}


@functools.cache
def traces(config: Config = NANO, ids: bytes = IDS.tobytes(), count: int = 2) -> dict[str, Any]:
    """The traces of several sequences, (B, ...)."""
    each = [run(config, row) for row in np.frombuffer(ids, np.int64).reshape(count, -1)]
    return {name: np.stack([trace[name] for trace in each]) for name in each[0]}


def recorded(tensors: Mapping[str, np.ndarray], ids: Any = IDS, **metadata: Any) -> Recording:
    """A recording as the readers make it."""
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64"}
    arrays = {
        name: Stored(kinds[array.dtype.name], array.shape, lambda array=array: array)
        for name, array in tensors.items()
    }
    return recording("run.npz", arrays, {"ids": ids, **metadata})


def never(ids: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    raise AssertionError(f"values were asked for: {names}")


def matched(
    tensors: Mapping[str, np.ndarray], config: Config = NANO, ids: Any = IDS, **more: Any
) -> Any:
    """The dumps of some arrays."""
    more = {"expected": functools.partial(run, config), **more}
    return match(recorded(tensors, ids), config, **more)


def only(tensors: Mapping[str, np.ndarray], **more: Any) -> Any:
    """The one match of some arrays, and the array of both sequences."""
    dumps = matched(tensors, **more)
    (found,) = dumps[0].matches
    return found, np.stack([dump.tensors[found.name] for dump in dumps])


# -- names -------------------------------------------------------------------------------------


def test_trace_keys_are_taken_as_they_are_and_no_value_is_looked_at():
    dumps = matched(traces(), expected=never)
    assert [dump.ids.tolist() for dump in dumps] == IDS.tolist()
    for index, dump in enumerate(dumps):
        assert list(dump.tensors) == trace_names(NANO.n_layer)
        for name, array in dump.tensors.items():
            np.testing.assert_array_equal(array, traces()[name][index], strict=True)
        assert all(each.how == "name" and each.source == (each.name,) for each in dump.matches)
        assert dump.unmatched == ()


def test_arrays_of_one_sequence_need_no_axis_for_it():
    (dump,) = matched(run(NANO, IDS[0]), ids=IDS[0], expected=never)
    assert {each.layout for each in dump.matches} == {""}
    assert dump.tensors["ln_f"].shape == (5, 12)


def heads(name: str, b: int = 1) -> np.ndarray:
    """A part of qkv, (B, T, H, D)."""
    return np.split(traces()[f"h.{b}.attn.qkv"], 3, axis=-1)["qkv".index(name)].reshape(2, 5, 2, 6)


# Programs' names of arrays of layer 1 and of none, and what they are.
PROGRAMS: dict[str, dict[str, str]] = {
    "transformers and nanoGPT": {
        "transformer.drop": "embed",
        "transformer.h.1": "h.1.resid_post",
        "transformer.h.1.ln_1": "h.1.ln_1",
        "transformer.h.1.attn": "h.1.attn.out",
        "transformer.h.1.attn.c_attn": "h.1.attn.qkv",
        "transformer.h.1.attn.attn_dropout": "h.1.attn.pattern",
        "transformer.h.1.attn.c_proj": "h.1.attn.out",
        "transformer.h.1.attn.resid_dropout": "h.1.attn.out",
        "transformer.h.1.ln_2": "h.1.ln_2",
        "transformer.h.1.mlp": "h.1.mlp.out",
        "transformer.h.1.mlp.c_fc": "h.1.mlp.pre",
        "transformer.h.1.mlp.act": "h.1.mlp.post",
        "transformer.h.1.mlp.gelu": "h.1.mlp.post",
        "transformer.h.1.mlp.c_proj": "h.1.mlp.out",
        "transformer.h.1.mlp.dropout": "h.1.mlp.out",
        "transformer.ln_f": "ln_f",
        "lm_head": "logits",
        "logits": "logits",
    },
    "what modules are given": {
        "transformer.drop.input": "embed",
        "transformer.h.1.input": "h.1.resid_pre",
        "transformer.h.1.ln_1.input": "h.1.resid_pre",
        "transformer.h.1.attn.input": "h.1.ln_1",
        "transformer.h.1.attn.c_attn.input": "h.1.ln_1",
        "transformer.h.1.attn.c_proj.input": "h.1.attn.heads",
        "transformer.h.1.attn.resid_dropout.input": "h.1.attn.out",
        "transformer.h.1.ln_2.input": "h.1.resid_mid",
        "transformer.h.1.mlp.input": "h.1.ln_2",
        "transformer.h.1.mlp.c_fc.input": "h.1.ln_2",
        "transformer.h.1.mlp.act.input": "h.1.mlp.pre",
        "transformer.h.1.mlp.gelu.input": "h.1.mlp.pre",
        "transformer.h.1.mlp.c_proj.input": "h.1.mlp.post",
        "transformer.h.1.mlp.dropout.input": "h.1.mlp.out",
        "transformer.ln_f.input": "h.1.resid_post",
        "lm_head.input": "ln_f",
    },
    "what transformers returns": {
        "hidden_states.0": "embed",
        "hidden_states.1": "h.0.resid_post",
        "hidden_states.2": "ln_f",
        "hidden_states_1": "h.0.resid_post",
        "hidden_states[1]": "h.0.resid_post",
        "attentions.1": "h.1.attn.pattern",
        "last_hidden_state": "ln_f",
    },
    "wrapped": {
        "_orig_mod.transformer.h.1.ln_2": "h.1.ln_2",
        "module._orig_mod.transformer.h.1.mlp": "h.1.mlp.out",
        "model.transformer.ln_f": "ln_f",
        "h.1.mlp.c_fc": "h.1.mlp.pre",
        "transformer.h.1.0": "h.1.resid_post",
        "transformer.h.1.attn.output.0": "h.1.attn.out",
        "transformer.h.1.ln_1.output": "h.1.ln_1",
        "transformer/h/1/attn/c_attn/__call__": "h.1.attn.qkv",
        "h_1/mlp/c_fc/__call__": "h.1.mlp.pre",
    },
    "TransformerLens": {
        "blocks.1.hook_resid_pre": "h.1.resid_pre",
        "blocks.1.ln1.hook_normalized": "h.1.ln_1",
        "blocks.1.attn.hook_attn_scores": "h.1.attn.scores",
        "blocks.1.attn.hook_pattern": "h.1.attn.pattern",
        "blocks.1.attn.hook_z": "h.1.attn.heads",
        "blocks.1.hook_attn_out": "h.1.attn.out",
        "blocks.1.hook_resid_mid": "h.1.resid_mid",
        "blocks.1.ln2.hook_normalized": "h.1.ln_2",
        "blocks.1.mlp.hook_pre": "h.1.mlp.pre",
        "blocks.1.mlp.hook_post": "h.1.mlp.post",
        "blocks.1.hook_mlp_out": "h.1.mlp.out",
        "blocks.1.hook_resid_post": "h.1.resid_post",
        "ln_final.hook_normalized": "ln_f",
    },
    "llama.cpp": {
        "inpL": "embed",
        "attn_norm-1": "h.1.ln_1",
        "bqkv-1": "h.1.attn.qkv",
        "wqkv_b-1": "h.1.attn.qkv",
        "kq_soft_max-1": "h.1.attn.pattern",
        "kq_soft_max_ext-1": "h.1.attn.pattern",
        "kqv-1": "h.1.attn.heads",
        "kqv_merged_cont-1": "h.1.attn.heads",
        "ffn_inp-1": "h.1.resid_mid",
        "ffn_norm-1": "h.1.ln_2",
        "ffn_up_b-1": "h.1.mlp.pre",
        "ffn_gelu-1": "h.1.mlp.post",
        "ffn_out-1": "h.1.mlp.out",
        "l_out-1": "h.1.resid_post",
        "result_norm": "ln_f",
        "result_output": "logits",
    },
}


@pytest.mark.parametrize(
    ("name", "key"), [item for table in PROGRAMS.values() for item in table.items()]
)
def test_the_names_of_other_programs(name, key):
    found, array = only({name: traces()[key]}, expected=functools.partial(run, NANO))
    assert (found.name, found.source) == (key, (name,))
    assert found.how == ("name" if name == key else "alias")
    np.testing.assert_array_equal(array, traces()[key], strict=True)


LLM_C = {
    "ln1": "ln_1", "qkv": "attn.qkv", "att": "attn.pattern",
    "attproj": "attn.out", "residual2": "resid_mid", "ln2": "ln_2", "fch": "mlp.pre",
    "fch_gelu": "mlp.post", "fcproj": "mlp.out", "residual3": "resid_post",
}  # fmt: skip


def test_llm_c_keeps_all_layers_in_one_array():
    trace = traces()
    tensors = {
        name: np.stack([trace[f"h.{i}.{key}"] for i in range(2)]) for name, key in LLM_C.items()
    }
    mixed = np.stack([trace[f"h.{i}.attn.heads"] for i in range(2)])
    tensors["atty"] = mixed.transpose(0, 1, 3, 2, 4).reshape(2, 2, 5, 12)
    tensors |= {"encoded": trace["embed"], "lnf": trace["ln_f"], "logits": trace["logits"]}
    # What stands in preatt behind the newest key was never written.
    tensors |= {"preatt": np.stack([trace[f"h.{i}.attn.scores"] for i in range(2)])}
    tensors |= {"ln1_mean": np.zeros((2, 2, 5)), "probs": trace["logits"]}
    dumps = matched(tensors, expected=never)
    absent = {f"h.{i}.{name}" for i in range(2) for name in ("resid_pre", "attn.scores")}
    expected = set(trace_names(2)) - absent
    assert set(dumps[0].tensors) == expected
    for index, dump in enumerate(dumps):
        for name in expected:
            np.testing.assert_array_equal(dump.tensors[name], trace[name][index], strict=True)
    layouts = {each.name: each.layout for each in dumps[0].matches}
    assert layouts["h.1.mlp.post"] == "(L, B, T, F) -> (T, F)"
    assert layouts["h.0.attn.heads"] == "(L, B, T, C) -> (H, T, D)"
    assert dumps[0].unmatched == (
        "preatt: scores, but those of later keys are left unwritten; att is the pattern",
        "ln1_mean: mean or scale of a layer norm",
        "probs: softmax of the logits",
    )


def test_all_layers_in_one_array_need_as_many_layers():
    with pytest.raises(DumpError, match=r"fch holds h\.\{i\}\.mlp\.pre of all layers: expected 2"):
        matched({"fch": np.zeros((3, 2, 5, 28))})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("transformer.wte", "their sum"),
        ("blocks.0.attn.hook_result", "head by head"),
        ("hook_pos_embed", "their sum"),
        ("kq-0", "before scale and mask"),
        ("wqkv-0", "before its bias"),
        ("ffn_up-1", "before its bias"),
        ("norm-0", "before its gain"),
        ("losses", "a loss"),
        ("Vcur-0 (cont) (reshaped)", "another view"),
        ("cache_k_l0 (view)", "another view"),
    ],
)
def test_what_only_looks_like_an_intermediate_is_left_out(name, why):
    # 8 times the scores have the values of a run that forgot the scale: not even values may say so.
    tensors = {name: 8 * traces()["h.0.attn.scores"], "ln_f": traces()["ln_f"]}
    (dump, _) = matched(tensors, expected=never)
    assert list(dump.tensors) == ["ln_f"]
    assert dump.unmatched[0].startswith(f"{name}: ")
    assert why in dump.unmatched[0]


@pytest.mark.parametrize("key", ["h.0.attn.heads", "h.0.attn.out"])
def test_kqv_out_of_llama_cpp_was_one_thing_and_is_another(key):
    array = traces()[key]
    if key.endswith("heads"):
        array = array.transpose(0, 2, 1, 3).reshape(2, 5, 12)
    found, array = only({"kqv_out-0": array})
    assert found.name == key
    np.testing.assert_array_equal(array, traces()[key], strict=True)


def test_what_transformer_lens_folded_is_not_the_layer_norm():
    normed = traces()["h.1.resid_pre"]
    plain = (normed - normed.mean(-1, keepdims=True)) / normed.std(-1, keepdims=True)
    tensors = {"blocks.1.ln1.hook_normalized": plain, "ln_f": traces()["ln_f"]}
    (dump, _) = matched(tensors)
    assert list(dump.tensors) == ["ln_f"]
    assert "from_pretrained_no_processing" in dump.unmatched[0]


def test_a_model_without_gains_has_plain_layer_norms():
    plain = traces()["h.1.resid_pre"]
    plain = (plain - plain.mean(-1, keepdims=True)) / plain.std(-1, keepdims=True)

    def expected(ids, names):
        return dict.fromkeys(names, plain[0])

    found, _ = only({"blocks.1.ln1.hook_normalized": plain}, expected=expected)
    assert found.name == "h.1.ln_1"


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1", "attn_norm-7", "hidden_states.3"])
def test_a_layer_that_the_model_has_not(name):
    with pytest.raises(DumpError, match="layer"):
        matched({name: traces()["ln_f"]})


# -- mappings ----------------------------------------------------------------------------------


def test_a_mapping_names_arrays_layers_and_parts():
    trace = traces()
    tensors = {
        "out of block 0": trace["h.0.resid_post"],
        "act_0": trace["h.0.mlp.post"],
        "act_1": trace["h.1.mlp.post"],
        "normed": np.stack([trace["h.0.ln_1"], trace["h.1.ln_1"]]),
        "ln_f": trace["logits"],
        "scratch": trace["ln_f"],
        **{f"{part}#1": heads(part) for part in "qkv"},
    }
    mapping = {
        "out of block 0": "h.0.resid_post",
        "act_{i}": "h.{i}.mlp.post",
        "normed": "h.{i}.ln_1",
        "ln_f": "logits",
        "scratch": None,
        "q#{i}": "h.{i}.attn.q",
        "k#{i}": "h.{i}.attn.k",
        "v#1": "h.1.attn.v",
    }
    (dump, _) = matched(tensors, mapping=mapping, expected=never)
    assert {each.name: each.source for each in dump.matches} == {
        "h.0.resid_post": ("out of block 0",),
        "h.0.mlp.post": ("act_0",),
        "h.1.mlp.post": ("act_1",),
        "h.0.ln_1": ("normed",),
        "h.1.ln_1": ("normed",),
        "h.1.attn.qkv": ("q#1", "k#1", "v#1"),
        "logits": ("ln_f",),
    }
    assert {each.how for each in dump.matches} == {"mapping"}
    assert dump.unmatched == ("scratch: left out by the mapping",)
    for name, array in dump.tensors.items():
        np.testing.assert_array_equal(array, trace[name][0])


def test_a_mapping_comes_before_a_name_that_is_known():
    tensors = {"transformer.ln_f": 2 * traces()["ln_f"], "mine": traces()["ln_f"]}
    (dump, _) = matched(tensors, mapping={"mine": "ln_f"}, expected=never)
    assert dump.matches[0].source == ("mine",)
    assert dump.unmatched == ("transformer.ln_f: the mapping names mine ln_f",)


def test_a_mapping_may_leave_out_what_the_model_cannot_have():
    tensors = {"hidden_states.9": traces()["ln_f"], "logits": traces()["logits"]}
    (dump, _) = matched(tensors, mapping={"hidden_states.9": None}, expected=never)
    assert list(dump.tensors) == ["logits"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"mine": "h.0.mlp_post"}, "no intermediate"),
        ({"mine": "h.2.mlp.post"}, "no intermediate"),
        ({"mine": ""}, "no intermediate"),
        ({"a{i}b{i}": "h.{i}.ln_1"}, "once"),
        ({"mine{i}": "ln_f"}, "once"),
        ({"other": "ln_f"}, "not there: other"),
        ({"mine": "ln_f", "x{i}": None}, r"not there: x\{i\}"),
    ],
)
def test_a_mapping_that_cannot_be_meant(mapping, message):
    with pytest.raises(DumpError, match=message):
        matched({"mine": traces()["ln_f"]}, mapping=mapping)


def test_a_mapping_to_a_layer_that_the_model_has_not():
    with pytest.raises(DumpError, match="layer 4"):
        matched({"x4": traces()["ln_f"]}, mapping={"x{i}": "h.{i}.ln_1"})


def test_a_mapping_in_a_file(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"a": "ln_f", "b": None}))
    assert names.read_mapping(path) == {"a": "ln_f", "b": None}
    for text, message in (("[]", "JSON object"), ("{", "JSON"), ('{"a": 1}', "must be given")):
        path.write_text(text)
        with pytest.raises(DumpError, match=message):
            names.read_mapping(path)
    with pytest.raises(DumpError, match="no such file"):
        names.read_mapping(tmp_path / "nothing.json")


# -- layouts -----------------------------------------------------------------------------------

Layout = Callable[[np.ndarray], np.ndarray]


def merged(array: np.ndarray) -> np.ndarray:
    """(B, H, T, D) -> (B, T, C)."""
    return array.transpose(0, 2, 1, 3).reshape(array.shape[0], array.shape[2], -1)


def split(array: np.ndarray, parts: int, h: int) -> np.ndarray:
    """(B, T, parts * C) -> (B, T, parts, H, D)."""
    b, t, c = array.shape
    return array.reshape(b, t, parts, h, c // parts // h)


# From (B, T, W), and the same with the axis B taken off where there is one sequence.
ROWS: dict[str, Layout] = {
    "BTW": lambda x: x,
    "TBW": lambda x: x.transpose(1, 0, 2),
    "(BT)W": lambda x: x.reshape(-1, x.shape[-1]),
}
ONE_ROW: dict[str, Layout] = {"TW": lambda x: x[0], "WT": lambda x: x[0].T}
# From (B, H, T, D).
SPLIT: dict[str, Layout] = {
    "BHTD": lambda x: x,
    "BTHD": lambda x: x.transpose(0, 2, 1, 3),
    "TBHD": lambda x: x.transpose(2, 0, 1, 3),
    "(BH)TD": lambda x: x.reshape(-1, *x.shape[2:]),
}
ONE_SPLIT: dict[str, Layout] = {"HTD": lambda x: x[0], "THD": lambda x: x[0].transpose(1, 0, 2)}
# From (B, T, 3, H, D).
FUSED: dict[str, Layout] = {
    "BT3HD": lambda x: x,
    "3BTHD": lambda x: x.transpose(2, 0, 1, 3, 4),
    "3BHTD": lambda x: x.transpose(2, 0, 3, 1, 4),
    "BT3C": lambda x: x.reshape(*x.shape[:3], -1),
    "3BTC": lambda x: x.reshape(*x.shape[:3], -1).transpose(2, 0, 1, 3),
}
ONE_FUSED: dict[str, Layout] = {
    "T3HD": lambda x: x[0],
    "3THD": lambda x: x[0].transpose(1, 0, 2, 3),
    "3HTD": lambda x: x[0].transpose(1, 2, 0, 3),
    "T3C": lambda x: x[0].reshape(*x.shape[1:3], -1),
    "3TC": lambda x: x[0].reshape(*x.shape[1:3], -1).transpose(1, 0, 2),
}
SQUARE: dict[str, Layout] = {"BHTS": lambda x: x, "(BH)TS": lambda x: x.reshape(-1, *x.shape[2:])}
ONE_SQUARE: dict[str, Layout] = {"HTS": lambda x: x[0], "11": lambda x: x[None]}


def layouts(key: str, b: int, h: int) -> dict[str, Layout]:
    """Every layout of an array (B, ...) that must be undone."""
    rows = {**ROWS, **(ONE_ROW if b == 1 else {})}
    if key.endswith("heads"):
        both = {**SPLIT, **(ONE_SPLIT if b == 1 else {})}
        return {**both, **{n: lambda x, f=f: f(merged(x)) for n, f in rows.items()}}
    if key.endswith(("scores", "pattern")):
        return {**SQUARE, **(ONE_SQUARE if b == 1 else {})}
    if key.endswith("qkv"):
        fused = {**FUSED, **(ONE_FUSED if b == 1 else {})}
        return {**rows, **{n: lambda x, f=f: f(split(x, 3, h)) for n, f in fused.items()}}
    if key.endswith((".attn.q", ".attn.k", ".attn.v")):
        both = {**SPLIT, **(ONE_SPLIT if b == 1 else {})}
        halves = {
            n: lambda x, f=f: f(split(x, 1, h)[:, :, 0].transpose(0, 2, 1, 3))
            for n, f in both.items()
        }
        return {**rows, **halves}
    return rows


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Config, np.ndarray, dict[str, Any], dict[str, str]]:
    """A config, ids, arrays under names and in layouts of all kinds, and a mapping of some."""
    h = draw(st.integers(1, 4))
    config = nano(
        n_embd=h * draw(st.integers(1, 4)),
        n_head=h,
        n_inner=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(2, 9)),
        n_ctx=6,
    )
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seeds = st.integers(0, 2**32 - 1)
    ids = np.random.default_rng(draw(seeds)).integers(0, config.vocab_size, (b, t))
    whole = traces(config, ids.astype(np.int64).tobytes(), b)
    keys = draw(st.lists(st.sampled_from(trace_names(2)), min_size=1, max_size=6, unique=True))
    tensors, mapping = {}, {}
    for index, key in enumerate(keys):
        arrays = {key: whole[key]}
        if key.endswith("qkv") and draw(st.booleans()):
            parts = np.split(whole[key], 3, axis=-1)
            arrays = {key[:-3] + part: x for part, x in zip("qkv", parts, strict=True)}
        for part, array in arrays.items():
            name = draw(st.sampled_from([part, f"transformer.{part}", f"array {index}{part[-1]}"]))
            if name.startswith("array"):
                mapping[name] = part
            tensors[name] = draw(st.sampled_from([*layouts(part, b, h).values()]))(array)
    return config, ids, tensors, mapping


@given(recordings())
@settings(deadline=None)
def test_any_layout_under_any_name_comes_back_to_the_bit(case):
    config, ids, tensors, mapping = case
    dumps = matched(tensors, config, ids, mapping=mapping)
    whole = traces(config, ids.astype(np.int64).tobytes(), len(ids))
    sources = [source for each in dumps[0].matches for source in each.source]
    assert sorted(sources) == sorted(tensors)
    for index, dump in enumerate(dumps):
        for name, array in dump.tensors.items():
            np.testing.assert_array_equal(array, whole[name][index], strict=True)


@given(st.data())
@settings(deadline=None)
def test_arrays_without_a_name_are_known_by_their_values(data):
    b = data.draw(st.integers(1, 2))
    ids = IDS[:b]
    whole = traces(NANO, ids.tobytes(), b)
    # The stream before a block and after the one before it is one array.
    keys = [name for name in trace_names(2) if not name.endswith("resid_pre")]
    keys = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5, unique=True))
    noise = data.draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    rng = np.random.default_rng(0)
    tensors = {}
    for index, key in enumerate(keys):
        array = whole[key] * (1 + noise * rng.standard_normal(whole[key].shape))
        layout = data.draw(st.sampled_from([*layouts(key, b, 2).values()]))
        tensors[f"array {index}"] = layout(array)
    dumps = matched(tensors, ids=ids)
    assert sorted((each.name, *each.source) for each in dumps[0].matches) == sorted(
        zip(keys, tensors, strict=True)
    )
    assert {each.how for each in dumps[0].matches} == {"values"}
    for dump, index in itertools.product(dumps[:1], range(len(keys))):
        key = keys[index]
        # Noise of 1e-3 of each number; neighbours in the stream are 0.3 of their norm apart.
        np.testing.assert_allclose(dump.tensors[key], whole[key][0], rtol=6 * noise, atol=0)


def test_queries_keys_and_values_without_names():
    whole = traces()
    tensors = {f"x{part}": heads(part).transpose(0, 2, 1, 3) for part in "qkv"}
    found, array = only(tensors)
    assert found.source == ("xq", "xk", "xv")
    assert (found.name, found.how) == ("h.1.attn.qkv", "values")
    assert found.layout == "q, k, v of (B, H, T, D) -> (T, 3C)"
    np.testing.assert_array_equal(array, whole["h.1.attn.qkv"], strict=True)


@pytest.mark.parametrize("style", ["blocks.1.attn.hook_{}", "{}cur-1"])
def test_queries_keys_and_values_of_other_programs(style):
    tensors = {
        style.format(part.upper() if "cur" in style else part): heads(part) for part in "qkv"
    }
    found, array = only(tensors, expected=never)
    assert found.name == "h.1.attn.qkv"
    assert found.layout == "q, k, v of (B, T, H, D) -> (T, 3C)"
    np.testing.assert_array_equal(array, traces()["h.1.attn.qkv"], strict=True)


def test_queries_without_keys_are_not_enough():
    tensors = {"blocks.0.attn.hook_q": heads("q", 0), "ln_f": traces()["ln_f"]}
    (dump, _) = matched(tensors, expected=never)
    assert dump.unmatched == ("blocks.0.attn.hook_q: is h.0.attn.q, but k and v is missing",)


@pytest.mark.parametrize(("factor", "word"), [(1, "the columns"), (2, "not the columns")])
def test_queries_beside_the_whole(factor, word):
    tensors = {"bqkv-1": traces()["h.1.attn.qkv"], "Qcur-1": factor * heads("q")}
    (dump, _) = matched(tensors, expected=never)
    assert dump.unmatched == (f"Qcur-1: {word} of q in bqkv-1",)


@pytest.mark.parametrize("key", ["ln_f", "h.0.attn.heads", "h.0.attn.pattern"])
def test_the_four_axes_of_ggml(key):
    array = run(NANO, IDS[0])[key]
    (dump,) = matched({key: array.reshape((1,) * (4 - array.ndim) + array.shape)}, ids=IDS[0])
    np.testing.assert_array_equal(dump.tensors[key], array, strict=True)
    if key == "ln_f":
        assert dump.matches[0].layout == "(1, B, T, C) -> (T, C)"


# -- what is not undone ------------------------------------------------------------------------


def test_exchanged_heads_stay_exchanged():
    array = traces()["h.0.attn.pattern"][:, ::-1]
    _, found = only({"h.0.attn.pattern": array}, expected=never)
    np.testing.assert_array_equal(found, array, strict=True)


def test_interleaved_queries_keys_and_values_stay_interleaved():
    whole = split(traces()["h.0.attn.qkv"], 3, 2)
    megatron = whole.transpose(0, 1, 3, 2, 4)  # (B, T, H, 3, D)
    _, found = only({"h.0.attn.qkv": megatron.reshape(2, 5, 36)}, expected=never)
    np.testing.assert_array_equal(found, megatron.reshape(2, 5, 36), strict=True)
    with pytest.raises(DumpError, match=r"h\.0\.attn\.qkv.*\(2, 5, 2, 3, 6\)"):
        matched({"h.0.attn.qkv": megatron})


def test_merged_heads_are_parted_in_one_way_only():
    """Heads merged without a transposition: a mistake, which must be seen."""
    array = traces()["h.0.attn.heads"].reshape(2, 5, 12)
    _, found = only({"h.0.attn.heads": array}, expected=never)
    assert not np.array_equal(found, traces()["h.0.attn.heads"])


# -- where values decide -----------------------------------------------------------------------


def test_a_square_array_may_be_transposed():
    config = nano(n_ctx=8)
    ids = random_ids(config, 8)
    trace = run(config, ids)
    for array, layout in ((trace["ln_f"], ""), (trace["ln_f"].T, "(C, T) -> (T, C)")):
        (dump,) = matched({"ln_f": array}, config, ids)
        assert dump.matches[0].layout == layout
        np.testing.assert_array_equal(dump.tensors["ln_f"], trace["ln_f"], strict=True)
        assert "2 readings fit its shape; by its values" in dump.notes[0]


def test_as_many_sequences_as_tokens():
    ids = np.stack([random_ids(NANO, 3, seed) for seed in range(3)])
    whole = traces(NANO, ids.tobytes(), 3)
    for array in (whole["logits"], whole["logits"].transpose(1, 0, 2)):
        dumps = matched({"logits": array}, ids=ids)
        for index, dump in enumerate(dumps):
            np.testing.assert_array_equal(dump.tensors["logits"], whole["logits"][index])


def test_values_that_do_not_decide_leave_the_usual_layout():
    config = nano(n_ctx=8)
    ids = random_ids(config, 8)
    noise = np.random.default_rng(0).standard_normal((8, 8))
    (dump,) = matched({"ln_f": noise}, config, ids)
    np.testing.assert_array_equal(dump.tensors["ln_f"], noise)
    assert "its values do not decide; taken as ln_f as it is" in dump.notes[0]


def test_nan_is_for_the_verifier_to_report():
    array = np.full((8, 8), np.nan)
    (dump,) = matched({"ln_f": array}, config := nano(n_ctx=8), random_ids(config, 8))
    assert np.isnan(dump.tensors["ln_f"]).all()
    some = traces()["h.0.mlp.pre"].copy()
    some[:, 0, 0] = np.nan
    found, array = only({"x": some})
    assert found.name == "h.0.mlp.pre"
    np.testing.assert_array_equal(array, some)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (1 + 0.9 * CLOSE, None),
        (1 - 0.9 * CLOSE, None),
        (1 + 1.1 * CLOSE, "nearest is h.0.attn.qkv, from which it differs by 0.27 of its size"),
        (-1.0, "nearest is"),
    ],
)
def test_how_near_is_near(factor, reason):
    # The qkv of the other layer, the only array of this shape, is 1.3 away from that of layer 0.
    tensors = {"x": factor * traces()["h.0.attn.qkv"], "ln_f": traces()["ln_f"]}
    (dump, _) = matched(tensors)
    assert ("h.0.attn.qkv" in dump.tensors) == (reason is None)
    if reason is not None:
        assert reason in dump.unmatched[0]


@pytest.mark.parametrize(("share", "known"), [(0.97, True), (1.03, False)])
def test_how_clear_is_clear(share, known):
    """A number on the way from one intermediate to another of the same shape."""
    near, far = traces()["h.0.mlp.pre"], traces()["h.0.mlp.post"]
    # At a way of 1 / (CLEAR + 1) it is CLEAR times as far from the other, by their mean size;
    # scaling the other to the first one's size makes the two fractions comparable.
    size = np.linalg.norm
    way = share * size(far[0]) ** -1 / (CLEAR * size(near[0]) ** -1 + size(far[0]) ** -1)
    array = near + way * (far - near)
    (dump, _) = matched({"x": array, "ln_f": traces()["ln_f"]})
    gap = way * size(far[0] - near[0]) / size(near[0])
    assert gap < CLOSE
    assert ("h.0.mlp.pre" in dump.tensors) == known
    if not known:
        assert dump.unmatched == ("x: h.0.mlp.pre and h.0.mlp.post are both near its values",)


def test_one_array_near_two_intermediates_that_are_the_same():
    array = traces()["h.0.mlp.pre"]

    def expected(ids, names):
        return {name: array[0] if ".mlp." in name else 9 * array[0][:, :12] for name in names}

    with pytest.raises(DumpError, match=r"x: h\.0\.mlp\.pre and h\.0\.mlp\.post are both near"):
        matched({"x": array}, expected=expected)


def test_an_array_of_which_little_is_finite():
    array = traces()["h.0.mlp.pre"].copy()
    array[:, :3] = np.nan
    (dump, _) = matched({"x": array, "ln_f": traces()["ln_f"]})
    assert "differs by inf of its size" in dump.unmatched[0]


def test_queries_without_a_name_beside_the_whole():
    (dump, _) = matched({"h.1.attn.qkv": traces()["h.1.attn.qkv"], "x": heads("k")})
    assert dump.unmatched == ("x: the columns of k in h.1.attn.qkv",)


def test_two_arrays_near_one_intermediate():
    whole = traces()["h.1.mlp.out"]
    other = {"ln_f": traces()["ln_f"]}
    (dump, _) = matched({"a": whole, "b": whole.copy(), **other})
    assert dump.unmatched == ("b: the same numbers as a",)
    (dump, _) = matched({"a": 1.01 * whole, "b": 1.001 * whole, **other})
    assert dump.unmatched == ("a: b is nearer to h.1.mlp.out",)
    np.testing.assert_array_equal(dump.tensors["h.1.mlp.out"], 1.001 * whole[0])
    (dump, _) = matched({"a": 1.01 * whole, "b": 0.99 * whole, **other})
    assert list(dump.tensors) == ["ln_f"]
    assert len(dump.unmatched) == 2
    assert dump.unmatched[0] == "a: as near to h.1.mlp.out as b"


def test_the_stream_between_blocks_has_two_names():
    whole = traces()
    found, _ = only({"x": whole["h.1.resid_pre"]})
    assert found.name == "h.0.resid_post"
    (dump, _) = matched({"h.0.resid_post": whole["h.0.resid_post"], "x": whole["h.1.resid_pre"]})
    assert {each.name: each.source for each in dump.matches} == {
        "h.0.resid_post": ("h.0.resid_post",),
        "h.1.resid_pre": ("x",),
    }


def test_large_arrays_are_compared_by_a_sample():
    config = nano(n_embd=64, n_ctx=64, vocab_size=1500)  # logits: 64 * 1500 numbers, over 2**16
    ids = random_ids(config, 64)
    trace = run(config, ids)
    (dump,) = matched({"x": trace["logits"].astype(np.float32).T}, config, ids)
    np.testing.assert_array_equal(dump.tensors["logits"], trace["logits"].astype(np.float32))


# -- filled up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [24, 32, 64, 128, 1024])
def test_a_vocabulary_that_is_filled_up_is_cut(length):
    logits = traces()["logits"]
    padded = np.concatenate([logits, np.ones((2, 5, length - 17))], axis=-1)
    found, array = only({"logits": padded}, expected=never)
    assert found.layout == f"(B, T, V+{length - 17}) -> (T, V)"
    np.testing.assert_array_equal(array, logits, strict=True)


@pytest.mark.parametrize("length", [16, 18, 20, 23, 25, 2048])
def test_a_vocabulary_of_another_size(length):
    with pytest.raises(DumpError, match=rf"logits.*\(2, 5, {length}\).*expected \(B, T, V\) = "):
        matched({"logits": np.zeros((2, 5, length))})


@pytest.mark.parametrize(("name", "fill"), [("pattern", 0.0), ("scores", -np.inf)])
def test_keys_of_an_empty_cache_are_cut(name, fill):
    array = traces()[f"h.0.attn.{name}"]
    padded = np.concatenate([array, np.full((2, 2, 5, 3), fill)], axis=-1)
    found, array = only({f"h.0.attn.{name}": padded}, expected=never)
    assert found.layout == "(B, H, T, S+3) -> (H, T, S)"
    np.testing.assert_array_equal(array, traces()[f"h.0.attn.{name}"], strict=True)
    padded[0, 0, 0, -1] = 0.5
    with pytest.raises(DumpError, match="shape"):
        matched({f"h.0.attn.{name}": padded})


# -- several arrays for one name ---------------------------------------------------------------


def test_modules_that_return_the_same_numbers():
    array = traces()["h.0.attn.out"]
    tensors = {
        "transformer.h.0.attn.resid_dropout.input": array,
        "transformer.h.0.attn.c_proj": array.copy(),
        "transformer.h.0.attn": array.copy(),
    }
    (dump, _) = matched(tensors, expected=never)
    assert dump.matches[0].source == ("transformer.h.0.attn.c_proj",)
    assert all(each.endswith("as transformer.h.0.attn.c_proj") for each in dump.unmatched)
    assert len(dump.unmatched) == 2


def test_modules_that_return_different_numbers():
    array = traces()["h.0.attn.out"]
    tensors = {"transformer.h.0.attn.c_proj": array, "transformer.h.0.attn": 2 * array}
    with pytest.raises(DumpError, match=r"c_proj and transformer\.h\.0\.attn are both h\.0\.attn"):
        matched(tensors)
    mapping = {"transformer.h.0.attn.c_proj": None}
    (dump, _) = matched(tensors, mapping=mapping)
    np.testing.assert_array_equal(dump.tensors["h.0.attn.out"], 2 * array[0])


def test_a_module_given_something_else_than_the_one_before_returned():
    array = traces()["h.0.mlp.pre"]
    tensors = {"transformer.h.0.mlp.act.input": 2 * array, "transformer.h.0.mlp.c_fc": array}
    (dump, _) = matched(tensors, expected=never)
    np.testing.assert_array_equal(dump.tensors["h.0.mlp.pre"], array[0])
    assert "something lies between them" in dump.unmatched[0]


# -- refusals ----------------------------------------------------------------------------------


def test_ids_are_needed_once():
    tensors = {"ln_f": traces()["ln_f"]}
    with pytest.raises(DumpError, match="no token ids"):
        match(recorded(tensors, None), NANO, never)
    assert len(match(recorded(tensors, None), NANO, never, ids=IDS.tolist())) == 2
    assert len(match(recorded(tensors), NANO, never, ids=IDS)) == 2
    with pytest.raises(DumpError, match="other token ids"):
        match(recorded(tensors), NANO, never, ids=IDS + 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "unequal lengths"),
        ([1, 17], "token id 17 is outside the vocabulary, 0 to 16"),
        ([-1, 2], "token id -1"),
        ([1] * 13, "13 tokens, but the model has 12 positions"),
        ([], "at least one token"),
        (np.zeros((1, 0), int), "at least one token"),
        ([[[1]]], "integers"),
        ([1.5], "integers"),
        ([True], "integers"),
        ("abc", "integers"),
        ([None], "integers"),
        ({"a": 1}, "integers"),
    ],
)
def test_ids_that_cannot_be(ids, message):
    with pytest.raises(DumpError, match=message):
        match(recorded({"ln_f": traces()["ln_f"]}, None), NANO, never, ids=ids)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("h.0.ln_1", (2, 5, 13), r"h\.0\.ln_1, which is h\.0\.ln_1, has the shape \(2, 5, 13\)"),
        ("transformer.h.0.mlp.act", (2, 5, 12), r"expected \(B, T, F\) = \(2, 5, 28\) or the like"),
        ("lm_head", (2, 1, 17), "it holds one token of 5: record every position"),
        ("logits", (17,), "shape"),
        ("h.0.attn.pattern", (2, 5, 5), "shape"),
        ("fch", (2, 2, 5, 12), r"fch, which is h\.0\.mlp\.pre, has the shape \(2, 5, 12\)"),
        ("ln_f", (), "shape"),
    ],
)
def test_a_known_name_with_an_impossible_shape(name, shape, message):
    with pytest.raises(DumpError, match=message):
        matched({name: np.zeros(shape)})


def test_integers_under_a_known_name():
    with pytest.raises(DumpError, match=r"ln_f is I64, not floating point, as ln_f must be"):
        matched({"ln_f": np.ones((2, 5, 12), np.int64), "logits": traces()["logits"]})
    (dump, _) = matched({"mask": np.ones((2, 5), np.int64), "logits": traces()["logits"]})
    assert dump.unmatched == ("mask: I64, not floating point",)


def test_nothing_that_could_be_matched():
    with pytest.raises(DumpError, match=r"none of its 2 arrays.*a: its shape \(3,\).*mapping"):
        matched({"a": np.zeros(3), "b": np.zeros((2, 5, 12))})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of float64, float32, tf32, float16, bfloat16"),
        ({"weights": "int4"}, "weights must be one of"),
        ({"chunks": [2, 2]}, "its passes read 4 tokens together, but there are 5"),
        ({"chunks": [5, 0]}, "positive integers"),
        ({"chunks": 5}, "positive integers"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(DumpError, match=message):
        matched({"ln_f": traces()["ln_f"]}, **setting)


def test_settings_come_before_what_the_file_says():
    tensors = {"ln_f": traces()["ln_f"].astype(np.float16), "logits": traces()["logits"]}
    (dump, _) = matched(tensors)
    assert (dump.dtype, dump.weights, dump.chunks) == ("float16", None, ())
    assert dump.notes == ("computed in float16, judging by how its arrays are stored",)
    file = recorded(tensors, dtype="torch.float32", weights="float16", chunks=[4, 1], producer="x")
    (dump, _) = match(file, NANO, never)
    assert (dump.dtype, dump.weights, dump.chunks) == ("float32", "float16", (4, 1))
    assert (dump.notes, dump.producer, dump.source) == ((), "x", "run.npz")
    (dump, _) = match(file, NANO, never, dtype="tf32", weights="int8", chunks=(5,))
    assert (dump.dtype, dump.weights, dump.chunks) == ("tf32", "int8", (5,))


@given(st.text(max_size=30))
def test_any_name_is_known_or_not(name):
    assume(name not in trace_names(2))
    try:
        found = names.known(name, 2)
    except DumpError:
        return
    assert found is None or found.keys or found.reason


@pytest.mark.parametrize("name", ["h.0.attn.pattern", "h.0.attn.scores", "h.0.attn.heads"])
def test_another_number_of_heads_is_reported_and_leaves_the_rest(name):
    """A wrong number of heads is a known mistake, which the rest of the dump shows."""
    trace = traces()
    batch, heads, rows, last = trace[name].shape
    wrong = np.zeros((batch, 2 * heads, rows, last // 2 if name.endswith("heads") else last))
    dumps = matched({name: wrong, "ln_f": trace["ln_f"]})
    assert dumps[0].unmatched == (f"{name}: has {2 * heads} heads, the model has {heads}",)
    assert list(dumps[0].tensors) == ["ln_f"]
