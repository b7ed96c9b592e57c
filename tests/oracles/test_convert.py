"""What we write, read by the programs it is written for: transformers, safetensors, NumPy."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from support import nano, random_tensors, write_checkpoint

import numpygpt
from numpygpt import checkpoints
from numpygpt.checkpoints.arrays import to_bfloat16
from numpygpt.convert import convert
from numpygpt.params import Config

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors")

pytestmark = pytest.mark.oracle

# Both sides compute in float64 from the same stored numbers. Measured: at most 2.2e-15 of the
# largest logit; rounding the arrays to bfloat16 moves the logits of small models by 5e-3 of it.
TOLERANCE = 1e-12


def compare(directory: pathlib.Path, ids: list[int]) -> float:
    """The largest difference of logits to transformers, as a fraction of the largest logit."""
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    # Nothing was made up and nothing thrown away.
    assert not set(info["missing_keys"]) - {"lm_head.weight"}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        expected = theirs.double().eval()(torch.tensor([ids])).logits[0].numpy()
    found = numpygpt.load(directory, dtype="float64").logits(ids)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "config",
    [
        nano(),
        nano(tie_word_embeddings=False),
        nano(bias=False),
        nano(n_inner=20, activation_function="gelu", scale_attn_by_inverse_layer_idx=True),
    ],
    ids=["plain", "untied", "no biases", "odd"],
)
def test_transformers_computes_the_same_from_what_we_write(tmp_path, config: Config, dtype):
    source = write_checkpoint(tmp_path / "source", config)
    convert(source, tmp_path / "target", dtype=dtype)
    assert compare(tmp_path / "target", [3, 1, 4, 1, 5, 9, 2, 6]) < TOLERANCE


def test_a_lost_bias_would_be_seen(tmp_path):
    """The comparison can fail: one bias less is far outside the tolerance."""
    tensors = random_tensors(nano(), dtype=np.float32)
    source = write_checkpoint(tmp_path / "source", nano(), tensors)
    expected = numpygpt.load(source, dtype="float64").logits([3, 1, 4])
    tensors["h.1.mlp.c_fc.bias"][:] = 0
    other = write_checkpoint(tmp_path / "other", nano(), tensors)
    found = numpygpt.load(other, dtype="float64").logits([3, 1, 4])
    assert np.abs(found - expected).max() > 1e6 * TOLERANCE * np.abs(expected).max()


def test_transformers_loads_the_bundled_model_with_its_tokenizer(tmp_path):
    model = numpygpt.load("shakespeare")
    path = checkpoints.save(model, tmp_path / "saved")
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(path)
    text = "ROMEO:\nO, thou'rt 12  times\n\n"
    ids = model.tokenizer.encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.eos_token_id == model.tokenizer.end_of_text
    assert compare(path, ids) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_safetensors_library_reads_what_we_write(tmp_path, dtype):
    convert("shakespeare", tmp_path / "target", dtype=dtype)
    held = safetensors_numpy.load_file(tmp_path / "target" / "model.safetensors")
    source = checkpoints.find("shakespeare") / "model.safetensors"
    for name, array in safetensors_numpy.load_file(source).items():
        found = held[f"transformer.{name.removeprefix('transformer.')}"]
        np.testing.assert_array_equal(found, array.astype(dtype), strict=True)


def test_our_bfloat16_is_that_of_torch():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:1000] = bits[:1000] & 0xFFFF0000 | 0x8000  # ties
    array = bits.view(np.float32)
    theirs = torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(array)
    np.testing.assert_array_equal(to_bfloat16(array)[number], theirs[number])


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_transformers_writes_is_converted_exactly(tmp_path, options, dtype):
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=2, n_head=2)
    ).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "source", **options)
    assert (tmp_path / "source" / "model.safetensors.index.json").exists() == bool(options)
    done = convert(tmp_path / "source", tmp_path / "target", proof=True)
    assert all(array.before == array.after for array in done.proof)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "target")
    expected = theirs.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_numpy_opens_our_npz(tmp_path):
    convert("shakespeare", tmp_path / "x.npz", dtype="float32")
    with np.load(tmp_path / "x.npz") as held:
        assert held["wte.weight"].shape == (3072, 256)
        assert b"n_embd" in held["config.json"]


FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
CHECKPOINTS = {
    "OpenAI TensorFlow": ("openai", {}),
    "Flax": ("flax/tied", {}),
    "Flax, untied": ("flax/untied", {}),
    "llm.c": ("llmc/model.bin", {}),
    "llm.c, bfloat16": ("llmc/model_bf16.bin", {}),
    "PyTorch zip": ("torch/hugging_face_zip", {}),
    "PyTorch legacy": ("torch/hugging_face_legacy", {}),
    "PyTorch shards": ("torch/hugging_face_shards", {}),
    "nanoGPT": ("torch/nanogpt", {"activation_function": "gelu"}),
    "build-nanogpt": ("torch/build_nanogpt", {"activation_function": "gelu_new"}),
    "minGPT": ("torch/mingpt", {"n_head": 2}),
    "minGPT before 2022": ("torch/mingpt_old", {"n_head": 2}),
    "GGUF F16": ("gguf/F16.gguf", {}),
    "GGUF Q8_0": ("gguf/Q8_0.gguf", {}),
    "GGUF Q4_K": ("gguf/Q4_K.gguf", {}),
}


@pytest.mark.parametrize(("path", "config"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_every_format_ends_in_transformers_with_the_same_logits(tmp_path, path, config):
    """The files were written by the tools themselves; their logits are tested with each reader."""
    source = FIXTURES / path
    done = convert(source, tmp_path / "target", config=config, proof=True)
    assert all(array.before == array.after and array.rounding == 0 for array in done.proof)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    assert compare(tmp_path / "target", ids) < TOLERANCE
    expected = numpygpt.load(source, dtype="float64", config=config).logits(ids)
    found = numpygpt.load(tmp_path / "target", dtype="float64").logits(ids)
    # The order of memory may differ, and with it the order of BLAS's sums.
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
