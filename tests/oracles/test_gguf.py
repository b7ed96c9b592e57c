"""GGUF against llama.cpp's own package, and against transformers, which reads it through that.

``pytest tests/oracles/test_gguf.py -s`` prints the largest differences of logits.
"""

from __future__ import annotations

import io
import pathlib
import tracemalloc

import numpy as np
import pytest
from support import nano, random_ids, random_tensors, run_page

gguf_package = pytest.importorskip("gguf", reason="needs the package gguf")

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402

from numpygpt.checkpoints import gguf, gguf_container, reading  # noqa: E402
from numpygpt.checkpoints.arrays import QUANTISED, Tensor  # noqa: E402
from numpygpt.checkpoints.source import Vocabulary  # noqa: E402
from numpygpt.params import Config, pack  # noqa: E402

pytestmark = pytest.mark.oracle

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gguf"
TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
# Types that the package can make itself; blocks of the others are random bits.
MADE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def their_numbers(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor as the package reads and dequantises it, by llama.cpp's name."""
    with np.errstate(all="ignore"):  # the scales of random blocks may be anything
        return {
            tensor.name: gguf_package.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf_package.GGUFReader(path).tensors
        }


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(
        np.ascontiguousarray(ours).view(np.uint32),
        np.ascontiguousarray(theirs).view(np.uint32),
        strict=True,
        err_msg=name,
    )


def assert_read_alike(path: pathlib.Path) -> None:
    """Every tensor of a file, bit for bit; matrices of blocks the other way round."""
    expected = their_numbers(path)
    ours = gguf.read(path).tensors
    assert len(ours) == len(expected)
    for name, array in expected.items():
        tensor = ours[gguf._our_name(name)]
        assert_same_bits(tensor.read(np.float32), array.T if name.endswith(TURNED) else array, name)
        wide = tensor.read(np.float64)
        assert wide.dtype == np.float64
        np.testing.assert_array_equal(wide, tensor.read(np.float32))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.gguf")), ids=lambda path: path.stem)
def test_fixtures_are_read_as_the_package_reads_them(path):
    assert_read_alike(path)
    checkpoint = reading.read(path)
    assert np.isfinite(run_page(random_ids(checkpoint.config, 12), *checkpoint[1::-1])).all()


@pytest.mark.parametrize("name", sorted({*MADE, *QUANTISED}))
def test_every_type_is_read_as_the_package_reads_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr(gguf_container, "PIECE_BYTES", 3 * 4 * 256)  # three rows of 256 numbers
    config = nano(n_embd=256, n_head=4, n_layer=1, vocab_size=40)
    kind = GGMLQuantizationType[name]
    rng = np.random.default_rng(11)
    writer = gguf_package.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    for ours, array in random_tensors(config, 12, np.float32).items():
        theirs = gguf._their_name(ours)
        array = np.ascontiguousarray(array.T) if theirs.endswith(TURNED) else array
        if array.ndim == 1:
            writer.add_tensor(theirs, array)
        elif name in MADE:
            writer.add_tensor(theirs, gguf_package.quants.quantize(array, kind), raw_dtype=kind)
        else:
            block, size = GGML_QUANT_SIZES[kind]
            bits = rng.integers(0, 256, (len(array), array.shape[1] // block * size), np.uint8)
            writer.add_tensor(theirs, bits, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_read_alike(tmp_path / "x.gguf")
    assert reading.inspect(tmp_path / "x.gguf").config == config


def test_names_are_those_of_the_package():
    config = nano(tie_word_embeddings=False)
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH.GPT2, config.n_layer)
    for ours in random_tensors(config):
        prefix = "" if ours == "lm_head.weight" else "transformer."
        theirs = names.get_name(prefix + ours, try_suffixes=(".weight", ".bias"))
        assert gguf._their_name(ours) == theirs
        assert gguf._our_name(theirs) == ours


def test_sizes_of_blocks_are_those_of_the_package():
    theirs = {kind.value: (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    # llama.cpp itself (ggml_type_size of v0.5.0) says 36 bytes of a block of Q8_1; the package is
    # older. It never stands in files.
    assert theirs.pop(9) == ("Q8_1", 32, 40)
    ours = {number: gguf_container.TYPES[number] for number in theirs}
    assert ours == theirs


def test_reading_a_large_quantised_tensor_takes_little_more_than_its_result(tmp_path):
    shape, kind = (1024, 8192), GGMLQuantizationType.Q4_K  # 32 MiB of float32
    block, size = GGML_QUANT_SIZES[kind]
    bits = np.zeros((shape[0], shape[1] // block * size), np.uint8)
    writer = gguf_package.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    writer.add_tensor("a", bits, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf_container.GGUFFile(tmp_path / "x.gguf", "gpt2", ()).tensors()["a"]
    tensor.rows(1).read(np.float32)  # imports the package
    tracemalloc.start()
    try:
        array = tensor.read(np.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A piece of 4 MiB, its parts before the package joins them, and what it needs for one part.
    assert peak < array.nbytes + 4 * gguf_container.PIECE_BYTES


def written(path: pathlib.Path, config: Config, vocabulary: Vocabulary | None) -> pathlib.Path:
    """A random model in our own file."""
    tensors = {
        name: Tensor("F32", a.shape, a.nbytes, lambda dtype, a=a: a.astype(dtype, copy=False))
        for name, a in random_tensors(config, 13, np.float32).items()
    }
    file = io.BytesIO()
    gguf.write(file, config, tensors, vocabulary, lambda count: None)
    path.write_bytes(file.getvalue())
    return path


WORDS = Vocabulary([*"abc", "ab", "Ġ", "<|endoftext|>"], ["a b"], [5])


@pytest.mark.parametrize("tied", [True, False])
def test_the_package_reads_what_we_write(tmp_path, tied):
    config = nano(tie_word_embeddings=tied, n_inner=12, layer_norm_epsilon=1e-3)
    path = written(tmp_path / "x.gguf", config, WORDS)
    padding = [f"[PAD{i}]" for i in range(6, 17)]
    values = {
        name: field.contents()
        for name, field in gguf_package.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }
    assert values == {
        "general.architecture": "gpt2",
        "general.name": "GPT-2",
        "general.file_type": gguf_package.LlamaFileType.ALL_F32,
        "gpt2.context_length": 12,
        "gpt2.embedding_length": 8,
        "gpt2.feed_forward_length": 12,
        "gpt2.block_count": 2,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": np.float32(1e-3),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": WORDS.tokens + padding,
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3] + [5] * 11,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 5,
    }
    expected = random_tensors(config, 13, np.float32)
    arrays = their_numbers(path)
    assert len(arrays) == len(expected)
    for name, array in arrays.items():
        ours = expected[gguf._our_name(name)]
        assert_same_bits(array.T if name.endswith(TURNED) else array, ours, name)


# Largest difference to transformers in float32, as a fraction of the largest logit: float32 rounds
# at 6e-8, and sums over dozens of products in two blocks multiply that by a dozen or two.
# Measured: 3.5e-7.
TOLERANCE = 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate, for transformers to read GGUF")
    # transformers 5.23 takes context_length for n_ctx and leaves n_positions at 1024.
    config = nano(n_ctx=1024, n_embd=32, tie_word_embeddings=tied)
    written(tmp_path / "x.gguf", config, WORDS)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, gguf_file="x.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = random_ids(config, 40)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    checkpoint = reading.read(tmp_path / "x.gguf")
    ours = run_page(ids, checkpoint.params, checkpoint.config)
    gap = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"tied {tied}: logits differ by {gap:.1e}")
    assert gap <= TOLERANCE
    exact = run_page(ids, pack(config, random_tensors(config, 13, np.float32)), config)
    np.testing.assert_array_equal(ours, exact)
