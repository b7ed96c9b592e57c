"""Against transformers: logits and every hidden state, of checkpoints that transformers wrote.

``pytest tests/oracles/test_transformers.py -s`` prints the largest differences.
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers_writer import write  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt.checkpoints import find  # noqa: E402
from numpygpt.ops import ACTIVATIONS  # noqa: E402

pytestmark = pytest.mark.oracle

# Largest difference to transformers in float64, as a fraction of the largest number of the same
# array. float64 rounds at 1.1e-16, float32 at 6e-8; sums over thousands of products in a dozen
# blocks multiply that by a few dozen. Measured: 3.6e-15 (124M) and 1.2e-6, but 8.8e-13 for
# gelu_fast, where transformers cuts sqrt(2/pi) after ten digits. The mildest mistake: 1.3e-4.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5}


@pytest.fixture
def directory():
    """Removed after the test: pytest would keep half a gigabyte of each of its last runs."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def theirs(directory, ids, dtype="float64") -> dict[str, np.ndarray]:
    """Hidden states and logits of transformers, by our trace names."""
    model = transformers.GPT2LMHeadModel.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = model(torch.tensor(ids)[None], output_hidden_states=True)
    *streams, final = (state[0].numpy() for state in out.hidden_states)
    states = {f"h.{i}.resid_pre": stream for i, stream in enumerate(streams)}
    return {**states, "ln_f": final, "logits": out.logits[0].numpy()}


def gap(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_agree(directory, length, label) -> None:
    """Every hidden state and the logits, in both dtypes."""
    expected = None
    for dtype, tolerance in TOLERANCE.items():
        model = numpygpt.load(directory, dtype=dtype)
        ids = np.random.default_rng(length).integers(0, model.config.vocab_size, length).tolist()
        expected = expected or theirs(directory, ids)
        trace = model.trace(ids, names=list(expected))
        assert list(trace) == list(expected)
        assert {array.dtype.name for array in trace.values()} == {dtype}
        gaps = {name: gap(trace[name], expected[name]) for name in expected}
        logits = gap(model.logits(ids), expected["logits"])
        worst = max(gaps, key=gaps.get)
        print(f"{label:30} {dtype}: logits {logits:.1e}, states {gaps[worst]:.1e} at {worst}")
        assert {name: size for name, size in gaps.items() if not size <= tolerance} == {}
        assert logits <= tolerance


TINY = {"vocab_size": 300, "n_positions": 48, "n_embd": 64, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize(
    ("name", "layers", "heads"),
    # GPT-2's four sizes have 12, 16, 20, 25 heads of 64 and 12, 24, 36, 48 layers: a quarter.
    [("small", 3, 3), ("medium", 6, 4), ("large", 9, 5), ("xl", 12, 6)],
)
def test_the_proportions_of_the_four_sizes(directory, name, layers, heads):
    write(directory, vocab_size=500, n_positions=64, n_embd=64 * heads, n_layer=layers,
          n_head=heads)  # fmt: skip
    assert_agree(directory, 40, f"a quarter of {name}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(directory, activation):
    write(directory, activation_function=activation, **TINY)
    assert_agree(directory, 20, activation)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_inner": 80},
        {"n_inner": 500},
        {"layer_norm_epsilon": 1e-3},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        {"tie_word_embeddings": False},
        {"n_head": 1},
        {"n_head": 64},
        {"n_layer": 1},
    ],
    ids=str,
)
def test_config_fields(directory, fields):
    write(directory, **{**TINY, **fields})
    assert_agree(directory, 20, str(fields)[:30])


def test_reordered_and_upcast_attention_differs_by_rounding(directory):
    """transformers computes it in float32 only, whatever the model is in."""
    write(directory, reorder_and_upcast_attn=True, **TINY)
    ids = list(range(20))
    expected = theirs(directory, ids, "float32")
    trace = numpygpt.load(directory).trace(ids, names=list(expected))
    gaps = {name: gap(trace[name], expected[name]) for name in expected}
    assert {name: size for name, size in gaps.items() if not size <= TOLERANCE["float32"]} == {}


@pytest.mark.parametrize("length", [1, 48])
def test_lengths(directory, length):
    write(directory, **TINY)
    assert_agree(directory, length, f"{length} tokens")


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_types_of_files(directory, dtype):
    write(directory, dtype=getattr(torch, dtype), **TINY)
    assert_agree(directory, 20, f"{dtype} file")


def test_sharded_files(directory):
    write(directory, shard="200KB", **TINY)
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert_agree(directory, 20, "shards")


def test_a_model_of_124m_parameters(directory):
    write(directory)
    assert numpygpt.load(directory).config == numpygpt.Config()
    assert_agree(directory, 64, "124M")


# -- the bundled model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare():
    return find("shakespeare")


def test_the_bundled_model(shakespeare):
    assert_agree(shakespeare, 256, "shakespeare")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_greedy_continuations_are_those_of_transformers(shakespeare, dtype):
    ours = numpygpt.load("shakespeare", dtype=dtype)
    model = transformers.GPT2LMHeadModel.from_pretrained(shakespeare, dtype=getattr(torch, dtype))
    prompts = ["ROMEO:", "To be, or not to be", "\n", "What say you to this, my lord? I"]
    # Two logits closer than rounding could be chosen differently: once in a thousand such runs.
    for result in ours.generate(prompts, max_new_tokens=60):
        ids = torch.tensor([result.prompt_ids])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        end = [ours.tokenizer.end_of_text] * (result.finish_reason == "stop")
        assert result.ids + end == expected
