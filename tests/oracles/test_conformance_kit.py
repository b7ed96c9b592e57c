"""The conformance kit against transformers: every case loads there, and gives the same numbers.

``pytest tests/oracles/test_conformance_kit.py -s`` prints the largest differences, which the
kit's README quotes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")

pytestmark = pytest.mark.oracle

ROOT = pathlib.Path(__file__).parents[2]
KIT = ROOT / "tests" / "golden" / "conformance"
MANIFEST = json.loads((KIT / "manifest.json").read_text())
CASES = MANIFEST["cases"]


@pytest.fixture(scope="module")
def kit():
    spec = importlib.util.spec_from_file_location("kit", ROOT / "scripts/make_conformance_kit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def theirs(name, dtype):
    """What transformers makes of a case, by our trace keys: states, patterns and logits."""
    model, loading = transformers.GPT2LMHeadModel.from_pretrained(
        KIT / name, dtype=getattr(torch, dtype), attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not loading["unexpected_keys"]
    # transformers has no GPT-2 without biases; it fills those that a file lacks with zeros.
    assert not [key for key in loading["missing_keys"] if not key.endswith(".bias")]
    assert bool(loading["missing_keys"]) == (name == "no_bias")
    cache, passes = None, []
    ids = torch.tensor([json.loads((KIT / name / "ids.json").read_text())])
    with torch.no_grad():
        for part in ids.split(CASES[name]["chunks"], dim=1):
            out = model.eval()(part, past_key_values=cache, use_cache=True,
                               output_hidden_states=True, output_attentions=True)  # fmt: skip
            cache = out.past_key_values
            passes.append(out)
    states = zip(*(out.hidden_states for out in passes), strict=True)
    *streams, final = (torch.cat(parts, dim=1)[0] for parts in states)
    found = {f"h.{i}.resid_pre": stream for i, stream in enumerate(streams)}
    for i, parts in enumerate(zip(*(out.attentions for out in passes), strict=True)):
        width = ids.shape[1]
        rows = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
        found[f"h.{i}.attn.pattern"] = torch.cat(rows, dim=2)[0]
    found |= {"ln_f": final, "logits": torch.cat([out.logits for out in passes], dim=1)[0]}
    return {key: array.double().numpy() for key, array in found.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_agrees(kit, name, dtype):
    expected = safetensors.load_file(KIT / name / "trace.safetensors")
    units = {}
    with torch.inference_mode():
        for key, array in theirs(name, dtype).items():
            units[key] = kit.distance(array, expected[key]) / MANIFEST["unit_roundoff"][dtype]
    worst = max(units, key=units.get)
    print(f"{name:14} {dtype:9} {units[worst]:7.1f} roundings at {worst}")
    if (name, dtype) == ("large", "float16"):  # scores beyond 65504, as the README says
        assert math.isinf(units[worst])
        return
    assert units[worst] <= CASES[name]["rounding"]


@pytest.mark.parametrize("name", CASES)
def test_the_safetensors_library_reads_both_files(name):
    weights = safetensors.load_file(KIT / name / "model.safetensors")
    trace = safetensors.load_file(KIT / name / "trace.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    assert {array.dtype for array in trace.values()} == {np.dtype("float64")}
    logits = np.loadtxt(KIT / name / "logits.txt")
    np.testing.assert_array_equal(logits, trace["logits"])
