"""Conversion: the same numbers in another format, whole or not at all, in little memory."""

from __future__ import annotations

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support import config_json, nano, random_tensors, safetensors_bytes, write_checkpoint

import numpygpt
from numpygpt import checkpoints
from numpygpt.checkpoints import arrays as arrays_module
from numpygpt.checkpoints import atomic, inspect, npz, read
from numpygpt.checkpoints.arrays import Tensor, encoded, from_bfloat16, to_bfloat16
from numpygpt.checkpoints.source import Vocabulary
from numpygpt.cli import main
from numpygpt.convert import convert
from numpygpt.errors import (
    ArgumentError,
    CheckpointError,
    CheckpointWarning,
    OutputError,
    TokenizerError,
)
from numpygpt.params import Config, shapes
from numpygpt.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
ENDINGS = {"safetensors": "", "npz": ".npz", "llm.c": ".bin", "gguf": ".gguf"}


def arrays(params: Any, config: Config) -> dict[str, np.ndarray]:
    """Every learned array by its name in files; walks the tuples without the package's help."""
    found = {"wte.weight": params.wte, "wpe.weight": params.wpe}
    for i, block in enumerate(params.h):
        found |= {f"h.{i}.ln_1.weight": block.ln_1.g, f"h.{i}.ln_1.bias": block.ln_1.b}
        found |= {f"h.{i}.ln_2.weight": block.ln_2.g, f"h.{i}.ln_2.bias": block.ln_2.b}
        for name, linear in [
            ("attn.c_attn", block.attn.c_attn),
            ("attn.c_proj", block.attn.c_proj),
            ("mlp.c_fc", block.mlp.c_fc),
            ("mlp.c_proj", block.mlp.c_proj),
        ]:
            found |= {f"h.{i}.{name}.weight": linear.w, f"h.{i}.{name}.bias": linear.b}
    found |= {"ln_f.weight": params.ln_f.g, "ln_f.bias": params.ln_f.b}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = params.head
    return {name: array for name, array in found.items() if array is not None}


def assert_same(one: pathlib.Path, other: pathlib.Path, dtype: Any = np.float64) -> None:
    """Two checkpoints hold the same config and the same numbers, to the last bit."""
    a, b = read(one, dtype), read(other, dtype)
    assert a.config == b.config
    expected, found = arrays(a.params, a.config), arrays(b.params, b.config)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True)


# -- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ENDINGS)
@pytest.mark.parametrize("stored", [np.float32, np.float16, np.uint16], ids=lambda d: d.__name__)
def test_every_format_holds_the_numbers_it_was_given(tmp_path, format, stored):
    tensors = random_tensors(nano(), dtype=np.float32 if stored is np.uint16 else stored)
    if stored is np.uint16:  # the writer of the tests stores these as bfloat16
        tensors = {name: to_bfloat16(array) for name, array in tensors.items()}
    source = write_checkpoint(tmp_path / "source", nano(), tensors)
    target = tmp_path / f"target{ENDINGS[format]}"
    # NumPy has no bfloat16: .npz must be told what to use instead.
    dtype = "float32" if (format, stored) == ("npz", np.uint16) else None
    done = convert(source, target, dtype=dtype, proof=True)
    assert done.format == format
    assert [array.name for array in done.proof] == list(shapes(nano()))
    assert all(array.before == array.after and array.rounding == 0 for array in done.proof)
    assert_same(source, target)
    same = {np.float32: "F32", np.float16: "F16", np.uint16: "BF16"}[stored]
    kinds = {"safetensors": same, "npz": {"BF16": "F32"}.get(same, same), "gguf": "F32"}
    kinds["llm.c"] = {"BF16": "BF16"}.get(same, "F32")
    assert (done.read, done.written) == ({same: 28}, {kinds[format]: 28})


@pytest.mark.parametrize("format", ["safetensors", "npz", "gguf"])
def test_an_untied_head_is_carried_over(tmp_path, format):
    config = nano(tie_word_embeddings=False)
    source = write_checkpoint(tmp_path / "source", config)
    convert(source, tmp_path / f"target{ENDINGS[format]}")
    assert_same(source, tmp_path / f"target{ENDINGS[format]}")


@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_every_config_field_is_carried_over(tmp_path, format):
    config = nano(
        n_inner=20, activation_function="relu", layer_norm_epsilon=1e-6, scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False,
    )  # fmt: skip
    source = write_checkpoint(tmp_path / "source", config)
    convert(source, tmp_path / f"target{ENDINGS[format]}")
    assert_same(source, tmp_path / f"target{ENDINGS[format]}")


@pytest.mark.parametrize("format", ENDINGS)
def test_a_model_without_biases_keeps_its_logits(tmp_path, format):
    source = write_checkpoint(tmp_path / "source", nano(bias=False))
    target = tmp_path / f"target{ENDINGS[format]}"
    done = convert(source, target)
    added = any("13 biases of zeros added" in note for note in done.notes)
    assert done.config.bias == added == (format != "npz")
    ids = [3, 1, 4, 1, 5]
    expected = numpygpt.load(source, dtype="float64").logits(ids)
    # Adding a zero bias changes nothing; a layout of the matrices may change how BLAS sums rows
    # of n numbers, in float64 by at most n times 1.1e-16 of their size.
    found = numpygpt.load(target, dtype="float64").logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    assert read(target).config.bias is (format != "npz")


def test_from_format_to_format_and_back(tmp_path):
    """A chain through every format ends where it began."""
    source = write_checkpoint(tmp_path / "0", nano())
    chain = [source, *(tmp_path / name for name in ("1.npz", "2.bin", "3.gguf", "4", "5.bin", "6"))]
    for before, after in itertools.pairwise(chain):
        convert(before, after)
    assert_same(source, chain[-1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_a_model_in_memory_can_be_saved(tmp_path, format, dtype):
    model = numpygpt.load("shakespeare", dtype=dtype)
    path = checkpoints.save(model, tmp_path / "saved", format=format)
    again = numpygpt.load(path, dtype=dtype)
    assert again.config == model.config
    before, after = arrays(model.params, model.config), arrays(again.params, again.config)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], strict=True)
    stored = {tensor.dtype for tensor in inspect(path).tensors.values()}
    assert stored == {{"float32": "F32", "float64": "F64"}[dtype]}


def test_a_saved_directory_has_a_vocabulary_that_encodes_alike(tmp_path):
    model = numpygpt.load("shakespeare")
    again = numpygpt.load(checkpoints.save(model, tmp_path / "saved"))
    text = "ROMEO:\nO, thou'rt 12  times ✓"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.tokenizer.special == model.tokenizer.special


def test_a_model_without_vocabulary_is_saved_without(tmp_path):
    model = numpygpt.load(write_checkpoint(tmp_path / "source", nano()))
    path = checkpoints.save(model, tmp_path / "saved")
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((path / "config.json").read_text())["eos_token_id"] is None


@pytest.mark.parametrize(
    ("matrices", "rest", "told"),
    [
        (np.float16, np.float16, "float16"),
        (np.uint16, np.uint16, "bfloat16"),
        (np.float16, np.float32, "float32"),
        (np.float16, np.uint16, "float32"),
        (np.float32, np.float64, "float64"),
    ],
)
def test_config_names_a_dtype_that_holds_every_array(tmp_path, matrices, rest, told):
    """transformers turns everything into the one dtype, and would round what it does not hold."""
    tensors = {
        name: array.astype(matrices if array.ndim == 2 else rest)
        for name, array in random_tensors(nano()).items()
    }
    convert(write_checkpoint(tmp_path / "source", nano(), tensors), tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["torch_dtype"] == told


# -- vocabularies ------------------------------------------------------------------------------


def test_vocabulary_files_are_copied_as_they_are(tmp_path):
    convert("shakespeare", tmp_path / "target")
    source = checkpoints.find("shakespeare")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "target" / "config.json").read_text())["eos_token_id"] == 3071


def test_openai_names_of_vocabulary_files_become_those_of_transformers(tmp_path):
    files = checkpoints.find("shakespeare")
    source = write_checkpoint(tmp_path / "source", nano(vocab_size=3072))
    (source / "encoder.json").write_bytes((files / "vocab.json").read_bytes())
    (source / "vocab.bpe").write_bytes((files / "merges.txt").read_bytes())
    convert(source, tmp_path / "target")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "target" / name).read_bytes() == (files / name).read_bytes()


def test_gpt2_gets_its_vocabulary_where_there_is_none(tmp_path):
    source = write_checkpoint(tmp_path / "source", nano(vocab_size=50257))
    convert(source, tmp_path / "target")
    written = Tokenizer.from_directory(tmp_path / "target")
    assert written.token_bytes == Tokenizer.gpt2().token_bytes
    assert written.encode("Hello world") == [15496, 995]


def test_a_damaged_vocabulary_is_not_passed_on_in_silence(tmp_path):
    source = write_checkpoint(tmp_path / "source", nano())
    (source / "merges.txt").write_text("#version: 0.2\nno such merge\n")
    (source / "vocab.json").write_text("{}")
    done = convert(source, tmp_path / "target")
    assert any("vocabulary cannot be used, and none is written" in note for note in done.notes)
    assert not (tmp_path / "target" / "vocab.json").exists()


def test_tokens_and_merges_are_those_of_the_files():
    text = (checkpoints.find("shakespeare") / "merges.txt").read_text(encoding="utf-8")
    merges = [line for line in text.split("\n") if line and not line.startswith("#version")]
    vocabulary = numpygpt.load("shakespeare").tokenizer.vocabulary()
    assert vocabulary.merges == merges
    numbers = json.loads((checkpoints.find("shakespeare") / "vocab.json").read_text("utf-8"))
    assert vocabulary.tokens == sorted(numbers, key=numbers.__getitem__)
    assert vocabulary.special == [3071]


def test_a_vocabulary_survives_and_gaps_are_filled():
    small = numpygpt.load("shakespeare").tokenizer
    whole = small.vocabulary()
    with_gap = Vocabulary([*whole.tokens, "[PAD3072]", "<more>"], whole.merges, [3071, 3072, 3073])
    tokenizer = Tokenizer.from_vocabulary(with_gap, pathlib.Path("x"))
    assert tokenizer.vocabulary() == with_gap
    hello = small.encode("Hello")
    assert tokenizer.encode("Hello<more>", allowed_special="all") == [*hello, 3073]
    gaps = {"<end>": 3071, "<more>": 3074}
    tokens = [token for i, token in small.token_bytes.items() if i < 3071]
    filled = Tokenizer(tokens, None, gaps).vocabulary()
    assert filled.tokens[3071:] == ["<end>", "[PAD3072]", "[PAD3073]", "<more>"]
    assert filled.special == [3071, 3072, 3073, 3074]


def test_vocabularies_that_are_none_are_refused():
    with pytest.raises(TokenizerError, match="one token twice"):
        Tokenizer.from_vocabulary(Vocabulary(["a", "a"], [], []), pathlib.Path("x"))
    letters = [bytes([i]) for i in range(256)]
    with pytest.raises(TokenizerError, match="not the merger of two others"):
        Tokenizer([*letters, b"abc"]).vocabulary()


def test_npz_carries_the_vocabulary(tmp_path):
    convert("shakespeare", tmp_path / "x.npz")
    ours = numpygpt.load(tmp_path / "x.npz").tokenizer
    assert ours.vocabulary() == numpygpt.load("shakespeare").tokenizer.vocabulary()
    text = "ROMEO:\nO, thou'rt 12  times"
    assert ours.encode(text) == numpygpt.load("shakespeare").tokenizer.encode(text)


@pytest.mark.parametrize(
    "damaged",
    [
        {}, {"tokens": ["a"], "merges": []}, {"tokens": [1], "merges": [], "special": []},
        {"tokens": ["a"], "merges": [], "special": [1]},
        {"tokens": ["a"], "merges": "", "special": []},
    ],
)  # fmt: skip
def test_a_damaged_vocabulary_in_npz_is_refused(tmp_path, damaged):
    convert("shakespeare", tmp_path / "x.npz")
    with (
        zipfile.ZipFile(tmp_path / "x.npz") as old,
        zipfile.ZipFile(tmp_path / "y.npz", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(
                name,
                json.dumps(damaged) if name == "vocabulary.json" else old.read(name),
            )
    with pytest.raises(CheckpointError, match=r"vocabulary\.json holds no tokens"):
        read(tmp_path / "y.npz")


def test_files_beside_a_checkpoint_with_its_own_vocabulary_are_another_models(tmp_path):
    convert("shakespeare", tmp_path / "x.npz")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    convert(tmp_path / "x.npz", tmp_path / "target")
    source = checkpoints.find("shakespeare")
    for name in ("vocab.json", "merges.txt"):
        expected = (source / name).read_text(encoding="utf-8").rstrip("\n")
        found = (tmp_path / "target" / name).read_text(encoding="utf-8").rstrip("\n")
        assert (
            json.loads(found) == json.loads(expected) if name == "vocab.json" else found == expected
        )


def test_llmc_has_no_vocabulary_and_that_is_told(tmp_path):
    done = convert("shakespeare", tmp_path / "x.bin")
    assert any("no vocabulary: keep vocab.json" in note for note in done.notes)


def test_a_vocabulary_is_cut_with_the_rows_that_it_fills_up(tmp_path):
    """As GGUF files of padded models have it: unused tokens for the rows that only fill up."""
    gpt2 = Tokenizer.gpt2().vocabulary()
    filled = Vocabulary([*gpt2.tokens, "[PAD50257]"], gpt2.merges, [*gpt2.special, 50257])
    config = nano(vocab_size=50258)
    with (tmp_path / "x.npz").open("wb") as file:
        tensors = {n: Tensor("F32", a.shape, a.nbytes, lambda dtype, a=a: a.astype(dtype))
                   for n, a in random_tensors(config).items()}  # fmt: skip
        kinds = dict.fromkeys(tensors, "F16")
        fields = json.dumps(config_json(config)).encode()
        npz.write(file, fields, tensors, kinds, lambda count: None, filled)
    cut = numpygpt.load(tmp_path / "x.npz", config={"vocab_size": 50257})
    assert len(cut.tokenizer) == 50257
    with pytest.raises(TokenizerError, match="do not belong together"):
        numpygpt.load(tmp_path / "x.npz", config={"vocab_size": 50000}).tokenizer.encode("a")


def test_a_token_too_long_to_be_taken_apart_is_no_reason_to_wait(tmp_path):
    pieces, merges = "a", []
    while len(pieces) < 2000:
        merges.append(f"{pieces} {pieces}")
        pieces *= 2
    text = "".join(f"{merge}\n" for merge in merges)
    source = write_checkpoint(tmp_path / "source", nano(vocab_size=300))
    (source / "vocab.bpe").write_text(f"#version: 0.2\n{text}")
    done = convert(source, tmp_path / "target")
    assert any("a token of 1024 bytes" in note for note in done.notes)


# -- types of numbers --------------------------------------------------------------------------

FLOAT32 = npst.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32))


def nearest_bfloat16(x: float) -> list[int]:
    """The bits of the bfloat16 numbers next to a finite x, found in exact arithmetic."""
    bits = int(np.float32(x).view(np.uint32))
    below = bits >> 16
    candidates = {b: float(np.uint32(b << 16).view(np.float32)) for b in (below, below + 1)}
    exact = float(np.float32(x))
    distance = {b: abs(value - exact) for b, value in candidates.items()}
    return [b for b in candidates if distance[b] == min(distance.values())]


@given(array=FLOAT32)
@example(array=np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], np.float32))  # ties
def test_bfloat16_is_the_nearest_number_and_even_in_a_tie(array):
    stored = to_bfloat16(array)
    for x, bits in zip(array.tolist(), stored.tolist(), strict=True):
        if np.isnan(x):
            assert np.isnan(from_bfloat16(np.array([bits], np.uint16)))[0]
        elif abs(x) >= 3.3895e38:  # the largest bfloat16; what is nearest may be infinity
            assert bits & 0x7FFF in (0x7F7F, 0x7F80)
        else:
            near = nearest_bfloat16(x)
            assert bits in near
            assert len(near) == 1 or bits % 2 == 0


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_stays_nan_in_bfloat16(bits):
    array = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(array))).all()


@given(bits=npst.arrays(np.uint16, st.integers(0, 20)))
def test_bfloat16_numbers_survive(bits):
    again = to_bfloat16(from_bfloat16(bits))
    nan = (bits & 0x7FFF) > 0x7F80
    np.testing.assert_array_equal(again[~nan], bits[~nan], strict=True)
    assert np.isnan(from_bfloat16(again[nan])).all()


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_rounding_is_told_and_is_what_the_type_allows(tmp_path, dtype, kind):
    source = write_checkpoint(tmp_path / "source", nano())
    done = convert(source, tmp_path / "target", dtype=dtype, proof=True)
    assert done.written == {kind: 28}
    assert all(array.before == array.after for array in done.proof)
    largest = max(
        np.abs(array).max() for array in random_tensors(nano(), dtype=np.float32).values()
    )
    half_a_place = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # relative to a power of two below
    assert 0 < max(array.rounding for array in done.proof) <= largest * half_a_place


@pytest.mark.parametrize(("dtype", "large"), [("float16", 70000.0), ("bfloat16", 3.4e38)])
def test_numbers_too_large_for_a_type_are_refused_by_name(tmp_path, dtype, large):
    tensors = random_tensors(nano(), dtype=np.float32)
    tensors["h.1.mlp.c_fc.bias"][7] = large
    source = write_checkpoint(tmp_path / "source", nano(), tensors)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias has .* too large for"):
        convert(source, tmp_path / "target", dtype=dtype)
    assert list(tmp_path.iterdir()) == [source]


@given(
    array=npst.arrays(
        np.float64, st.integers(0, 20), elements=st.floats(-1e38, 1e38, allow_subnormal=False)
    )
)
@example(array=np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, -(1 + 3 * 2**-8)]))
def test_float64_becomes_the_nearest_bfloat16_without_a_detour(array):
    """Rounding to float32 first would make a tie of what is none."""
    for x, bits in zip(array.tolist(), to_bfloat16(array).tolist(), strict=True):
        found = Fraction(float(from_bfloat16(np.array([bits], np.uint16))[0]))
        for other in (bits - 1, bits + 1):
            if bits & 0x7FFF not in (0, 0x7F7F):
                near = Fraction(float(from_bfloat16(np.array([other], np.uint16))[0]))
                assert abs(found - Fraction(x)) <= abs(near - Fraction(x))
                if abs(found - Fraction(x)) == abs(near - Fraction(x)):
                    assert bits % 2 == 0


@pytest.mark.parametrize("target", ["x.gguf", "x.bin"])
def test_float64_is_rounded_only_when_that_is_asked_for(tmp_path, target):
    source = write_checkpoint(tmp_path / "source", nano(), random_tensors(nano()))
    with pytest.raises(ArgumentError, match="ask for float32 to have it rounded"):
        convert(source, tmp_path / target)
    convert(source, tmp_path / target, dtype="float32")


def test_infinity_is_no_overflow():
    array = np.array([np.inf, -np.inf, np.nan, 1e-30], np.float32)
    for kind in ("F16", "BF16"):
        narrow = encoded(array, kind)
        back = from_bfloat16(narrow) if kind == "BF16" else narrow
        np.testing.assert_array_equal(np.isinf(back), [True, True, False, False])


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["llm.c", "gguf"])
@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_format_cannot_say_is_refused_by_name(tmp_path, format, changes):
    source = write_checkpoint(tmp_path / "source", nano(**changes))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        convert(source, tmp_path / f"target{ENDINGS[format]}")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("x.safetensors", {}, "name a directory"),
        ("x.SafeTensors", {}, "name a directory"),
        ("x.pt", {}, r"\.pt of this kind is not written; name a directory for safetensors"),
        ("x.H5", {}, r"\.H5 of this kind is not written"),
        ("pytorch_model.bin", {}, r"\.bin of this kind is not written"),
        ("x", {"format": "onnx"}, "format must be one of"),
        ("x", {"dtype": "int3"}, "dtype must be one of"),
        ("x.gguf", {"dtype": "float16"}, "gguf is written in float32"),
        ("x.bin", {"dtype": "float16"}, "llm.c is written in float32 or bfloat16"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, name, settings, part):
    with pytest.raises(ArgumentError, match=part):
        convert("shakespeare", tmp_path / name, **settings)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_in_npz_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no dtype for BF16; choose the dtype float32"):
        convert("shakespeare", tmp_path / "x.npz", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["there", "there.npz"])
def test_nothing_that_exists_is_overwritten(tmp_path, name):
    target = tmp_path / name
    if target.suffix:
        target.write_bytes(b"precious")
    else:
        target.mkdir()
        (target / "file").write_bytes(b"precious")
    with pytest.raises(OutputError, match="is there already"):
        convert("shakespeare", target)
    assert (target if target.suffix else target / "file").read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_an_empty_directory_may_be_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    convert("shakespeare", tmp_path / "empty")
    convert("shakespeare", tmp_path / "new" / "deep" / "x.npz")
    assert_same(tmp_path / "empty", tmp_path / "new" / "deep" / "x.npz")


def test_a_link_to_an_empty_directory_is_no_empty_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputError, match="is there already"):
        convert("shakespeare", tmp_path / "link")


@pytest.mark.parametrize("target", ["target", "target.npz"])
def test_what_appears_meanwhile_is_not_overwritten(tmp_path, target):
    def appear(count: int, total: int) -> None:
        (tmp_path / target).mkdir(exist_ok=True)
        (tmp_path / target / "file").write_bytes(b"precious")

    with pytest.raises(OutputError, match="is there already"):
        convert("shakespeare", tmp_path / target, on_bytes=appear)
    assert [file.name for file in (tmp_path / target).iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [tmp_path / target]


def test_a_dangling_link_is_not_written_through(tmp_path):
    (tmp_path / "link.npz").symlink_to(tmp_path / "elsewhere.npz")
    with pytest.raises(OutputError, match="is there already"):
        convert("shakespeare", tmp_path / "link.npz")
    assert not (tmp_path / "elsewhere.npz").exists()


@pytest.mark.parametrize("target", ["/", ".", "..", "a\0b", "x" * 300])
def test_odd_destinations_are_refused(tmp_path, monkeypatch, target):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError):
        convert("shakespeare", target)
    assert [file.name for file in tmp_path.rglob("*")] == ["here", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_an_empty_directory_keeps_its_permissions(tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    convert("shakespeare", tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_a_destination_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        convert("shakespeare", tmp_path / "file" / "x.npz")


# -- interrupted -------------------------------------------------------------------------------

# Stops before each piece of the file and, at last, before it gets its name.
STEPWISE = """
import pathlib, sys
from numpygpt.convert import convert

def pause(*_):
    print("step", flush=True)
    sys.stdin.readline()

rename = pathlib.Path.rename
def renamed(self, target):
    pause()
    return rename(self, target)

pathlib.Path.rename = renamed
convert(sys.argv[1], sys.argv[2], on_bytes=pause)
print("done", flush=True)
"""


@pytest.mark.parametrize("target", ["target", "target.npz"])
def test_killed_at_any_step_the_destination_is_whole_or_absent(tmp_path, target):
    source = write_checkpoint(tmp_path / "source", nano(n_layer=1))
    steps = 16 + 1  # arrays, and the renaming
    for killed_at in (0, 1, 7, steps - 2, steps - 1, steps):
        path = tmp_path / str(killed_at) / target
        command = [sys.executable, "-c", STEPWISE, str(source), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            for _ in range(killed_at):
                assert process.stdout.readline().strip() == b"step"
                process.stdin.write(b"\n")
                process.stdin.flush()
            last = process.stdout.readline().strip()
            process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        assert last == (b"done" if killed_at == steps else b"step")
        assert path.exists() == (killed_at == steps)
        left = [entry.name for entry in path.parent.iterdir() if entry != path]
        assert len(left) == (killed_at < steps)
        assert all(name.startswith(f".{target}.") and name.endswith(".partial") for name in left)
    assert_same(source, path)


def test_an_error_on_the_way_leaves_nothing_behind(tmp_path):
    def fail(count: int, total: int) -> None:
        raise KeyboardInterrupt

    for target in ("target", "target.npz"):
        with pytest.raises(KeyboardInterrupt):
            convert("shakespeare", tmp_path / target, on_bytes=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    size = sum(t.nbytes for t in inspect(checkpoints.find("shakespeare")).tensors.values())
    room = type("Usage", (), {"free": size})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: room)
    atomic.require_room(tmp_path / "target", size)
    room.free = size - 1
    with pytest.raises(OutputError):
        convert("shakespeare", tmp_path / "target")
    room.free = 1_000_000
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: room)
    with pytest.raises(OutputError, match="needs 8 MB, but its disk has only 1 MB free"):
        convert("shakespeare", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
@pytest.mark.parametrize("target", ["target", "target.npz"])
def test_a_disk_that_is_full_on_the_way_ends_in_one_line(tmp_path, target):
    code = (
        "import resource, signal, sys; from numpygpt.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\n"
        "sys.exit(main(['convert', 'shakespeare', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be written: File too large; nothing was left there" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_one_piece_at_a_time_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays_module, "PIECE_BYTES", 2**18)
    config = nano(vocab_size=40_000, n_embd=64)  # a token table of 10 MB
    source = write_checkpoint(tmp_path / "source", config)
    for target in ("target", "target.npz", "target.bin", "target.gguf"):
        tracemalloc.start()
        try:
            convert(source, tmp_path / target)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Modules that are imported on the way take 1 MB; one token table would take 10.
        assert peak < 3e6, target


# -- command line ------------------------------------------------------------------------------


def test_the_command_says_what_it_did(tmp_path, capsys):
    assert main(["convert", "shakespeare", str(tmp_path / "x"), "--dtype", "float32"]) == 0
    read_line, wrote_line = capsys.readouterr().out.splitlines()
    assert "safetensors, 52 F16 arrays" in read_line
    assert "safetensors, 52 F32 arrays, 4,011,520 parameters, 16.0 MB in" in wrote_line


def test_doubtful_assumptions_are_warned_of_once(tmp_path):
    source = FIXTURES / "torch" / "nanogpt"
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu' is assumed") as caught:
        done = convert(source, tmp_path / "x")
    assert len(caught) == 1
    assert not any("activation_function" in note for note in done.notes)
    assert any("transposed" in note for note in done.notes)
    assert read(tmp_path / "x").config.activation_function == "gelu"


def test_inspect_shows_what_is_assumed(capsys):
    source = str(FIXTURES / "torch" / "mingpt")
    assert main(["inspect", source]) == 2
    assert "missing n_head" in capsys.readouterr().err
    assert main(["inspect", source, "--config", "n_head=2"]) == 0
    assert "activation_function = 'gelu_new' is assumed: what minGPT" in capsys.readouterr().out
    assert main(["inspect", source, "--config", "n_head=2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["n_head"] == 2
    assert record["format"] == "minGPT, PyTorch (zip)"
    assert any("activation_function" in note for note in record["notes"])


@pytest.mark.parametrize(("setting", "part"), [
    ("nhead=2", "did you mean 'n_head'"), ("dtype=float16", "unknown field 'dtype'"),
    ("=6", "--config expects NAME=VALUE"), ("n_head=" + "[" * 10**5, "must be a positive integer"),
])  # fmt: skip
def test_fields_that_are_given_must_be_known(capsys, setting, part):
    assert main(["inspect", "shakespeare", "--config", setting]) == 2
    assert part in capsys.readouterr().err


def test_the_proof_lists_every_array(tmp_path, capsys):
    assert main(["convert", "shakespeare", str(tmp_path / "x.npz"), "--proof"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(len(line.split()[0]) == 64 for line in lines if line) == 52
    assert lines[-1] == "all 52 arrays are equal; no number was changed"


def test_a_proof_that_fails_is_told(tmp_path, capsys, monkeypatch):
    from numpygpt.checkpoints import safetensors

    def wrong(file: Any, tensors: Any, kinds: Any, advance: Any) -> None:
        held = {name: tensor.read(np.float32).copy() for name, tensor in tensors.items()}
        held["transformer.wpe.weight"][3, 4] += 1
        file.write(safetensors_bytes(held))

    monkeypatch.setattr(safetensors, "write", wrong)
    source = write_checkpoint(tmp_path / "source", nano())
    assert main(["convert", str(source), str(tmp_path / "x"), "--proof"]) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.out.splitlines() if "FOUND" in line]
    assert "wpe.weight: FOUND" in line
    assert "equal" not in printed.out
    assert "1 arrays differ from what was read; remove it" in printed.err


def test_a_proof_of_weights_that_are_nan_is_json(tmp_path, capsys):
    tensors = random_tensors(nano(), dtype=np.float32)
    tensors["ln_f.bias"][:2] = np.nan, np.inf
    source = write_checkpoint(tmp_path / "source", nano(), tensors)
    assert main(["convert", str(source), str(tmp_path / "x"), "--proof", "--json"]) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {row["rounding"] for row in record["proof"]} == {0}


def test_standard_error_may_be_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["convert", "shakespeare", str(tmp_path / "x.npz")]) == 0
    assert (tmp_path / "x.npz").exists()


def test_json_holds_the_same(tmp_path, capsys):
    arguments = ["convert", "shakespeare", str(tmp_path / "x"), "--proof", "--json"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source_format"] == record["format"] == "safetensors"
    assert record["written"] == {"F16": 52}
    assert len(record["proof"]) == 52
    assert record["proof"][0]["before"] == record["proof"][0]["after"]


def test_config_fields_can_be_given(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", nano())
    given = ["--config", "activation_function=relu", "--config", "layer_norm_epsilon=1e-3"]
    assert main(["convert", str(source), str(tmp_path / "x"), *given]) == 0
    config = read(tmp_path / "x").config
    assert (config.activation_function, config.layer_norm_epsilon) == ("relu", 1e-3)
    capsys.readouterr()
    assert main(["convert", str(source), str(tmp_path / "y"), "--config", "n_head"]) == 2
    assert "--config expects NAME=VALUE" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "y"), "--config", "n_heads=4"]) == 2
    assert "unknown field 'n_heads'; did you mean 'n_head'?" in capsys.readouterr().err


def test_the_script_is_the_command(tmp_path):
    script = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "convert_weights.py"
    if not script.exists():
        pytest.fail("scripts/convert_weights.py is missing")
    command = [sys.executable, str(script), "shakespeare", str(tmp_path / "x.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote" in done.stdout
    assert_same(checkpoints.find("shakespeare"), tmp_path / "x.npz")


def test_a_converted_gpt2_has_the_vocabulary_files_that_openai_published(tmp_path):
    """So its tokenizer is known by them, and need not be built for a short text."""
    config = nano(vocab_size=50257, n_layer=1)
    write_checkpoint(tmp_path / "model", config)
    convert(tmp_path / "model", tmp_path / "int8", dtype="int8")
    numbers = (tmp_path / "int8" / "vocab.json").read_bytes()
    # The size of encoder.json in openai/gpt-2 and of vocab.json on the Hugging Face hub.
    assert len(numbers) == 1_042_301
    assert Tokenizer.from_directory(tmp_path / "int8") is Tokenizer.gpt2()
