"""Files of torch.save: real ones are read exactly, hostile ones cost little and run nothing."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import pathlib
import pickle
import shutil
import signal
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch_writer as tw
from hypothesis import given
from hypothesis import strategies as st
from support import config_json, nano, random_tensors

from numpygpt import checkpoints
from numpygpt.checkpoints.archives import StoredZip
from numpygpt.checkpoints.arrays import DataFile
from numpygpt.checkpoints.detect import open_source
from numpygpt.checkpoints.torch_files import TorchFile
from numpygpt.errors import CheckpointError, CheckpointWarning, ConfigError, NumpyGPTError
from numpygpt.params import Config, Params, pack

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "torch"
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
MIB = 2**20


def leaves(tree: Any) -> list[Any]:
    """The arrays of a tree of tuples, and the Nones."""
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple) else [tree]


def assert_params(found: Params, expected: Params) -> None:
    """Every array equal, in shape and dtype too."""
    ours, theirs = leaves(found), leaves(expected)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if other is None:
            assert mine is None
        else:
            np.testing.assert_array_equal(mine, other, strict=True)


def expected(config: Config, seed: int, dtype: Any = np.float32) -> Params:
    tensors = random_tensors(config, seed=seed, dtype=np.float32)
    return pack(config, {name: array.astype(dtype) for name, array in tensors.items()})


def owner(array: np.ndarray) -> Any:
    """What holds the memory that `array` looks at."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def write(
    directory: pathlib.Path,
    content: bytes,
    name: str = "pytorch_model.bin",
    config: Config | None = None,
) -> pathlib.Path:
    """A file, with a config.json beside it if one is given."""
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config_json(config)))
    (directory / name).write_bytes(content)
    return directory / name


# -- files of the real program -----------------------------------------------------------------

UNTIED = nano(tie_word_embeddings=False)
TRANSPOSED = "matrices stored (out, in), as nn.Linear has them: transposed"
REAL = {
    "hugging_face_zip": (1, nano(), "PyTorch (zip)", []),
    "hugging_face_legacy": (2, nano(), "PyTorch (legacy)", []),
    "hugging_face_shards": (3, nano(), "PyTorch (zip), 2 shards", []),
    "nanogpt/ckpt.pt": (
        4, nano(activation_function="gelu"), "nanoGPT, PyTorch (zip)",
        [TRANSPOSED, "activation_function = 'gelu' is assumed"],
    ),
    "nanogpt_padded": (
        5, nano(activation_function="gelu", bias=False, vocab_size=24), "nanoGPT, PyTorch (zip)",
        [TRANSPOSED, "activation_function = 'gelu' is assumed"],
    ),
    "build_nanogpt": (
        6, nano(), "nanoGPT, PyTorch (zip)",
        [TRANSPOSED, "activation_function = 'gelu_new' is assumed"],
    ),
    "mingpt": (
        7, UNTIED, "minGPT, PyTorch (zip)",
        [TRANSPOSED, "activation_function = 'gelu_new' is assumed"],
    ),
    "mingpt_old": (
        8, nano(tie_word_embeddings=False, activation_function="gelu"),
        "minGPT before 2022, PyTorch (zip)",
        ["separate q, k and v joined", "activation_function = 'gelu' is assumed"],
    ),
}  # fmt: skip
GIVEN = {"mingpt": {"n_head": 2}, "mingpt_old": {"n_head": 2}}


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("name", REAL)
def test_every_number_of_a_real_file_is_read(name, dtype):
    seed, config, _, _ = REAL[name]
    told = {"activation_function": config.activation_function, **GIVEN.get(name, {})}
    found = checkpoints.read(FIXTURES / name, dtype, told)
    assert found.config == config
    assert_params(found.params, expected(config, seed, dtype))
    assert (found.params.head is found.params.wte) == config.tie_word_embeddings


@pytest.mark.parametrize("name", REAL)
def test_inspect_tells_what_a_real_file_is(name):
    _, config, form, notes = REAL[name]
    report = checkpoints.inspect(FIXTURES / name, GIVEN.get(name))
    assert report.problems == []
    assert report.format == form
    assert report.config == config
    *ours, last = [note for note in report.notes if "imported" not in note] + [None]
    assert last is None
    assert len(ours) == len(notes)
    for note, beginning in zip(ours, notes, strict=True):
        assert note.startswith(beginning)
    assert not any(vars(report)[field] for field in ("vocabulary", "problems"))


DOUBTFUL = ["nanogpt/ckpt.pt", "nanogpt_padded", "build_nanogpt"]


@pytest.mark.parametrize("name", REAL)
def test_a_guessed_gelu_warns_where_files_of_both_kinds_are_about(name):
    config = REAL[name][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = checkpoints.read(FIXTURES / name, config=GIVEN.get(name))
    assert found.config == config
    assert [w.category for w in caught] == [CheckpointWarning] * (name in DOUBTFUL)
    for warning in caught:
        assert f"activation_function = {config.activation_function!r}" in str(warning.message)


def test_the_other_gelu_can_be_chosen():
    found = checkpoints.read(FIXTURES / "nanogpt", config={"activation_function": "gelu_new"})
    assert found.config.activation_function == "gelu_new"


def test_the_globals_of_the_pickle_are_told_and_none_is_imported():
    (note,) = [n for n in checkpoints.inspect(FIXTURES / "build_nanogpt").notes if "named" in n
               or "names" in n]  # fmt: skip
    for name in ("__main__.GPTConfig", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"):
        assert name in note
    assert note.endswith("none was imported or called")


def test_a_padded_vocabulary_can_be_cut():
    given_ = {"vocab_size": 17, "activation_function": "gelu"}
    found = checkpoints.read(FIXTURES / "nanogpt_padded", config=given_)
    _, config, _, _ = REAL["nanogpt_padded"]
    whole = expected(config, 5)
    assert found.config == nano(activation_function="gelu", bias=False)
    np.testing.assert_array_equal(found.params.wte, whole.wte[:17], strict=True)
    assert found.params.head is found.params.wte


@pytest.mark.parametrize("name", ["mingpt", "mingpt_old"])
def test_heads_that_no_shape_tells_must_be_given(name):
    with pytest.raises(ConfigError, match="missing n_head; what a checkpoint does not say can be"):
        checkpoints.read(FIXTURES / name)
    (problem,) = checkpoints.inspect(FIXTURES / name).problems
    assert "config={...} in Python" in problem
    assert "--config NAME=VALUE" in problem


def test_mask_buffers_are_described_and_not_used():
    report = checkpoints.inspect(FIXTURES / "hugging_face_legacy")
    assert report.tensors["h.0.attn.bias"].dtype == "U8"
    assert report.tensors["h.0.attn.bias"].shape == (1, 1, 12, 12)
    assert report.tensors["h.1.attn.masked_bias"].shape == ()
    assert checkpoints.inspect(FIXTURES / "mingpt", {"n_head": 2}).tensors[
        "h.1.attn.bias"
    ].shape == (1, 1, 12, 12)  # fmt: skip


def test_tied_weights_are_one_tensor():
    tensors = checkpoints.inspect(FIXTURES / "hugging_face_zip").tensors
    assert tensors["lm_head.weight"] is tensors["wte.weight"]


def test_float32_of_the_zip_format_is_a_view_of_the_mapped_file():
    source = open_source(FIXTURES / "hugging_face_zip")
    for name, tensor in source.tensors.items():
        array = tensor.read(FLOAT32)
        assert isinstance(owner(array), mmap.mmap), name
        assert array.flags.aligned
        assert not array.flags.writeable
    found = checkpoints.read(FIXTURES / "nanogpt", config={"activation_function": "gelu"})
    assert isinstance(owner(found.params.h[1].mlp.c_fc.w), mmap.mmap)  # turned, still no copy


def test_a_state_dict_without_config_can_be_described_by_fields(tmp_path):
    shutil.copy(FIXTURES / "hugging_face_zip" / "pytorch_model.bin", tmp_path)
    with pytest.raises(NumpyGPTError, match="n_head"):
        checkpoints.read(tmp_path)
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu_new' is assumed"):
        found = checkpoints.read(tmp_path, config={"n_head": 2})
    assert found.config == nano()  # the GELU of GPT-2: these are not matrices of nn.Linear
    assert_params(found.params, expected(nano(), 1))
    assert checkpoints.inspect(tmp_path, {"n_head": 2}).format == "PyTorch (zip)"


# -- tensors and their storages ----------------------------------------------------------------


def bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = array.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return (rounded & 0xFFFF0000).view(np.float32)


TABLE = np.arange(24, dtype=np.float32).reshape(4, 6)
THIRDS = np.arange(6, dtype=np.float32) / np.float32(3)
VIEWS = {
    "table": TABLE, "transposed": TABLE.T, "columns": TABLE[:, 1:4], "row": TABLE[2],
    "stepped": TABLE[::2, ::3], "again": TABLE, "scalar": np.float32(7), "empty": np.zeros((0, 3)),
    "double": np.arange(5) / 3, "half": THIRDS[:5].astype(np.float16),
    "brain": bfloat16(THIRDS[:5]),
    "half_turned": THIRDS.astype(np.float16).reshape(2, 3).T,
    "brain_turned": bfloat16(THIRDS).reshape(2, 3).T,
    "parameter": np.arange(3), "with_state": np.arange(3),
    "permuted": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
    "upper": TABLE[:2], "lower": TABLE[2:],
}  # fmt: skip
NO_FLOATS = {"bool": "BOOL", "bytes": "U8", "long": "I64"}


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_views_of_storages_are_read_as_they_lie(name, dtype):
    tensors = TorchFile(FIXTURES / "views" / f"{name}.pt").tensors()
    assert tensors.keys() == VIEWS.keys() | NO_FLOATS.keys()
    for label, array in VIEWS.items():
        found = tensors[label].read(dtype)
        np.testing.assert_array_equal(found, array.astype(dtype), strict=True, err_msg=label)
        assert found.flags.aligned
        assert tensors[label].shape == array.shape
    for label, kind in NO_FLOATS.items():
        with pytest.raises(CheckpointError, match=f"{label} is {kind}; expected one of F64"):
            tensors[label].read(dtype)
    assert tensors["table"] is tensors["again"]


def test_what_lies_aligned_is_not_copied_and_what_does_not_is(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.arange(3, dtype=np.float32)}
    state, blocks = tw.saved(arrays)
    for align, mapped in ((64, True), (4, True), (1, None)):
        entries = tw.torch_entries(tw.program(state), {k: d for k, (_, d) in blocks.items()})
        for extra in range(4):
            padded = [tw.Entry(b"x" * (extra + 1), b""), *entries]
            path = write(tmp_path, tw.zip_file(padded, align))
            for name, tensor in TorchFile(path).tensors().items():
                found = tensor.read(FLOAT32)
                np.testing.assert_array_equal(found, arrays[name], strict=True)
                assert found.flags.aligned
                if mapped is not None:
                    assert isinstance(owner(found), mmap.mmap) == mapped


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("stored", ["float64", "float32", "float16"])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_a_whole_model_of_every_type(tmp_path, legacy, stored, dtype):
    arrays = {k: v.astype(stored) for k, v in random_tensors(nano(), 9, np.float32).items()}
    path = write(tmp_path, tw.save(arrays, legacy), config=nano())
    found = checkpoints.read(path, dtype)
    assert_params(found.params, pack(nano(), {k: v.astype(dtype) for k, v in arrays.items()}))


def test_the_head_of_an_untied_model_is_its_own(tmp_path):
    arrays = random_tensors(UNTIED, 10, np.float32)
    path = write(tmp_path, tw.save(arrays), config=UNTIED)
    found = checkpoints.read(path)
    assert found.params.head is not found.params.wte
    assert_params(found.params, expected(UNTIED, 10))


def test_a_head_that_is_called_tied_but_differs_is_refused(tmp_path):
    path = write(tmp_path, tw.save(random_tensors(UNTIED, 10, np.float32)), config=nano())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        checkpoints.read(path)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_weights_beside_other_state(tmp_path, key, legacy):
    def wrap(state: bytes) -> bytes:
        beside = {"epoch": 3, "lr": 1e-3, "args": tw.name("argparse", "Namespace") + b")\x81}b"}
        return tw.value({**beside, key: state, "rng": [1, (2, None)]})

    arrays = random_tensors(nano(), 11, np.float32)
    path = write(tmp_path, tw.save(arrays, legacy, wrap), config=nano())
    assert_params(checkpoints.read(path).params, expected(nano(), 11))


def test_sizes_that_mingpt_names_have_its_heads_with_a_warning(tmp_path):
    config = Config(vocab_size=5, n_ctx=4, n_embd=48, n_layer=3, n_head=3,
                    tie_word_embeddings=False)  # fmt: skip
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = random_tensors(config, 12, np.float32)
    arrays = {k: v.T.copy() if k.endswith(ends) else v for k, v in tensors.items()}
    arrays |= {f"h.{i}.attn.bias": np.tri(4, dtype=np.float32)[None, None] for i in range(3)}
    path = write(tmp_path, tw.save(arrays), "model.pt")
    with pytest.warns(CheckpointWarning, match="n_head = 3 is assumed"):
        found = checkpoints.read(path)
    assert found.config == config
    assert_params(found.params, expected(config, 12))
    assert checkpoints.read(path, config={"n_head": 4}).config.n_head == 4


def test_a_head_that_was_copied_does_not_make_a_mingpt(tmp_path):
    """minGPT stores its masks; without them the exact GELU is likelier, and a warning due."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = random_tensors(nano(tie_word_embeddings=False), 12, np.float32)
    arrays = {k: v.T.copy() if k.endswith(ends) else v for k, v in tensors.items()}
    path = write(tmp_path, tw.save(arrays), "model.pt")
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu' is assumed"):
        found = checkpoints.read(path, config={"n_head": 2})
    assert found.config == nano(tie_word_embeddings=False, activation_function="gelu")


def test_a_state_dict_of_nanogpt_alone_is_one_of_nanogpt(tmp_path):
    """minGPT's looks the same, but has a head of its own."""
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    tensors = random_tensors(nano(), 13, np.float32)
    arrays = {k: v.T.copy() if k.endswith(ends) else v for k, v in tensors.items()}
    arrays["lm_head.weight"] = arrays["wte.weight"]
    path = write(tmp_path, tw.save(arrays), "model.pt")
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu' is assumed"):
        found = checkpoints.read(path, config={"n_head": 2})
    assert found.config == nano(activation_function="gelu")
    assert_params(found.params, expected(nano(), 13))
    assert found.params.head is found.params.wte
    report = checkpoints.inspect(path, {"n_head": 2})
    assert report.format == "nanoGPT weights, PyTorch (zip)"


def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path):
    """``x.conj().imag`` is saved as the storage of x with the remark that its sign is turned."""
    block = tw.storage("FloatStorage", "0", 2)
    parts = [tw.value(part) for part in (0, (2,), (1,), False)]
    turned = tw.call(tw.REBUILD, block, *parts, tw.ORDERED_DICT, tw.value({"neg": True}))
    content = tw.program(tw.dict_of([(tw.text("a"), turned)]))
    path = write(tmp_path, tw.torch_zip(content, {"0": np.float32([1, 2]).tobytes()}))
    try:
        found = TorchFile(path).tensors()["a"].read(FLOAT32)
    except CheckpointError:
        return
    np.testing.assert_array_equal(found, np.float32([-1, -2]))


# -- refusals ----------------------------------------------------------------------------------

ONE = np.ones(1, np.float32)
DATA = {"0": ONE.tobytes()}
LEGACY_DATA = {"0": (1, ONE.tobytes())}


def block(
    count: int = 1, key: str = "0", kind: str = "FloatStorage", legacy: bool = False
) -> bytes:
    return tw.storage(kind, key, count, legacy)


GOOD_TENSOR = tw.tensor(block(), 0, (1,), (1,))


def state(*tensors: bytes) -> bytes:
    """A pickled state dict of tensors a, b, c ..."""
    named = [(tw.text(chr(97 + i)), tensor) for i, tensor in enumerate(tensors)]
    return tw.program(tw.dict_of(named))


def one(
    offset: Any = 0, shape: Any = (1,), strides: Any = (1,), count: int = 1, **what: Any
) -> bytes:
    return state(tw.tensor(block(count, **what), offset, shape, strides))


SOUND = tw.save({"a": ONE})
LEGACY_SOUND = tw.save({"a": ONE}, legacy=True)
REFUSED = {
    # what was saved
    "a list": (tw.torch_zip(tw.program(tw.value([1]))), "holds a list, expected a state dict"),
    "a tensor": (tw.torch_zip(tw.program(tw.tensor(block(), 0, (1,), (1,))), DATA), "holds a Sto"),
    "a record": (tw.torch_zip(tw.program(b"cm\nGPTConfig\n)\x81")), "holds a Record"),
    "a name": (tw.torch_zip(tw.program(tw.name("m", "GPTConfig"))), "holds a Global"),
    "nothing": (tw.torch_zip(tw.program(pickle.NONE)), "holds a NoneType"),
    "an empty dict": (tw.torch_zip(tw.program(b"}")), "only an empty dict"),
    "no weights": (tw.torch_zip(tw.program(tw.value({"epoch": 1}))), "no weights in it, only ep"),
    "Megatron": (
        tw.torch_zip(tw.program(tw.value({"model": {"language_model": {}}}))), "Megatron-LM's"
    ),
    "a number among the weights": (
        tw.torch_zip(tw.program(tw.dict_of([
            (tw.text("a"), tw.tensor(block(), 0, (1,), (1,))), (tw.text("b"), tw.value(1))
        ])), DATA),
        "'b' among the weights is no tensor but a int",
    ),
    "a number as name": (
        tw.torch_zip(tw.program(tw.dict_of([
            (tw.value(5), tw.tensor(block(), 0, (1,), (1,)))
        ])), DATA),
        "'5' among the weights is no tensor",
    ),
    # tensors and storages
    "no storage": (tw.torch_zip(one(key="1"), DATA), "storage '1' has 0 bytes"),
    "no storage of nothing": (tw.torch_zip(one(0, (0,), (1,), key="1"), DATA), "storage '1'"),
    "a storage too small": (tw.torch_zip(one(count=2), DATA), "'0' of 'a' has 4 bytes, expected 2"),
    "a storage of doubles": (tw.torch_zip(one(kind="DoubleStorage"), DATA), "4 bytes, fewer than"),
    "one too many": (tw.torch_zip(one(0, (2,), (1,)), DATA), "fewer than the tensors in it"),
    "behind its storage": (tw.torch_zip(one(1), DATA), "'a' reaches beyond its storage"),
    "far behind": (tw.torch_zip(one(2**47), DATA), "'a' reaches beyond its storage"),
    "a stride too far": (
        tw.torch_zip(one(0, (2,), (2,), 2), {"0": bytes(8)}), "reaches beyond its storage"
    ),
    "a stride of 2**47": (
        tw.torch_zip(one(0, (2,), (2**47,), 2), {"0": bytes(8)}), "reaches beyond its storage"
    ),
    "a stride of 0": (tw.torch_zip(one(0, (2**40,), (0,)), DATA), "fewer than the tensors in it"),
    "2**40 x 2**40": (
        tw.torch_zip(one(0, (2**40, 2**40), (2**40, 1), 2**47), DATA), "fewer than the tensors"
    ),
    "2**40 x 2**40 of nothing": (
        tw.torch_zip(one(0, (2**40, 2**40), (0, 0)), DATA), "fewer than the tensors in it"
    ),
    "2**376 elements": (
        tw.torch_zip(one(0, (2**47,) * 8, (0,) * 8), DATA), "fewer than the tensors in it"
    ),
    "two that overlap": (
        tw.torch_zip(state(tw.tensor(block(3), 0, (2,), (1,)), tw.tensor(block(3), 1, (2,), (1,))),
                     {"0": bytes(12)}),
        "tensors that overlap",
    ),
    "a head that overlaps its table": (
        tw.torch_zip(state(tw.tensor(block(4), 0, (2, 2), (2, 1)),
                           tw.tensor(block(4), 0, (2, 2), (1, 2))), {"0": bytes(16)}),
        "tensors that overlap",
    ),
    # the zip format
    "no pickle": (tw.zip_file([tw.Entry(b"a/data/0", b"")]), "with 0 data.pkl, expected one"),
    "an empty archive": (b"PK\5\6" + bytes(18), "pytorch_model.bin"),
    "two pickles": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"b/data.pkl", one())]), "with 2 data"
    ),
    "a pickle in the pickle's folder": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"a/b/data.pkl", one())]), "with 2 da"
    ),
    "a name twice": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"a/data.pkl", one())]), "twice"
    ),
    "names that differ behind a null byte": (
        tw.zip_file([tw.Entry(b"a/data.pkl\0x", one()), tw.Entry(b"a/data.pkl\0y", one())]), "twice"
    ),
    "a folder called data.pkl": (
        tw.zip_file([tw.Entry(b"a/data.pkl/", one()), tw.Entry(b"a/data/0", b"")]), "with 0 data"
    ),
    "backslashes": (tw.zip_file([tw.Entry(b"a\\data.pkl", one())]), "with 0 data.pkl"),
    "another letter case": (tw.zip_file([tw.Entry(b"a/DATA.PKL", one())]), "with 0 data.pkl"),
    "TorchScript": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"a/constants.pkl", b""),
                     tw.Entry(b"a/code/__torch__.py", b"import os")]),
        "a TorchScript archive, which holds code",
    ),
    "big-endian": (tw.zip_file(tw.torch_entries(one(), DATA, order=b"big")), "big-endian"),
    "a long byte order": (
        tw.zip_file(tw.torch_entries(one(), DATA, order=b"little" * 99)), "has 594 bytes, expected"
    ),
    "compressed": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), method=8)]), "is compressed or encrypted"
    ),
    "an unknown compression": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), method=99)]), "is compressed or encrypted"
    ),
    "compressed numbers": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"a/data/0", b"1234", method=8)]),
        "'a/data/0' is compressed or encrypted",
    ),
    "encrypted": (tw.zip_file([tw.Entry(b"a/data.pkl", one(), flags=1)]), "or encrypted"),
    "strongly encrypted": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), flags=0x41)]), "compressed or encrypted"
    ),
    "no local header": (
        tw.zip_file([tw.Entry(b"x", b""), tw.Entry(b"a/data.pkl", one(), signature=b"PK\3\5")]),
        "does not lie where the directory says",
    ),
    "a header behind the end": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), start=2**31)]), "does not lie where"
    ),
    "a header in the directory": (
        tw.zip_file([tw.Entry(b"a/data.pkl", b"abcd", start=46)]), "does not lie where"
    ),
    "larger than the file": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), size=2**31)]), "overlaps what follows it"
    ),
    "larger when unpacked": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one(), packed=3)]), "overlaps what follows it"
    ),
    "two that lie in one place": (
        tw.zip_file([tw.Entry(b"a/data.pkl", one()), tw.Entry(b"a/data/0", b"", start=0)]), "overl"
    ),
    "one inside another": (
        tw.zip_file([
            tw.Entry(b"a/data/0", tw.zip_file([tw.Entry(b"a/data.pkl", one())])),
            tw.Entry(b"a/data.pkl", one(), start=30 + len("a/data/0")),
        ]),
        "'a/data/0' overlaps what follows it",
    ),
    # the older format
    "another magic number": (tw.program(tw.number(5)) * 5, "a pickle, but not one of torch.save"),
    "another version": (
        tw.program(tw.number(tw.MAGIC)) + tw.program(tw.number(1002)), "not one of torch.save"
    ),
    "a plain pickle": (tw.program(tw.value({"a": 1})), "a pickle, but not one of torch.save"),
    "an array for the magic number": (
        tw.program(tw.tensor(block(), 0, (1,), (1,))), "not one of torch.save"
    ),
    "no machine": (tw.torch_legacy(one(), machine=None), "not written on a little-endian"),
    "a big-endian machine": (tw.torch_legacy(one(), machine={"little_endian": False}), "endian"),
    "an endianness of 1": (tw.torch_legacy(one(), machine={"little_endian": 1}), "little-endian"),
    "keys that are no list": (
        tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys="0"), "list of storages is damaged"
    ),
    "a key that is a number": (
        tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys=[0]), "list of storages is damaged"
    ),
    "a key twice": (
        tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys=["0", "0"]), "list of storages is dam"
    ),
    "a key of no tensor": (
        tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys=["1"]), "list of storages is damaged"
    ),
    "no keys": (tw.torch_legacy(one(legacy=True), {}), "has 0 bytes"),
    "no keys, but data": (
        tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys=[]), "data that belongs to no tensor"
    ),
    "a count of 2**63 - 1": (
        tw.torch_legacy(one(legacy=True), {"0": (2**63 - 1, b"1234")}), "truncated"
    ),
    "a count of -1": (tw.torch_legacy(one(legacy=True), {"0": (-1, b"1234")}), "truncated"),
    "a count of 2": (tw.torch_legacy(one(legacy=True), {"0": (2, b"1234")}), "truncated"),
    "a count of 0": (tw.torch_legacy(one(legacy=True), {"0": (0, b"1234")}), "to no tensor"),
    "trailing data": (LEGACY_SOUND + b"\0", "data that belongs to no tensor"),
    "a view behind its storage": (
        tw.torch_legacy(
            state(tw.tensor(tw.storage("FloatStorage", "0", 1, True, ("1", 1, 1)), 0, (1,), (1,))),
            LEGACY_DATA,
        ),
        "'0' of 'a' has 4 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_odd_is_refused_by_name(tmp_path, content, message):
    path = write(tmp_path, content, config=nano())
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert checkpoints.inspect(path).problems[0] == str(caught.value)


def test_the_sound_files_beside_the_odd_ones_are_sound(tmp_path):
    for content in (SOUND, LEGACY_SOUND, tw.torch_zip(one(), DATA),
                    tw.torch_legacy(one(legacy=True), LEGACY_DATA)):  # fmt: skip
        tensors = TorchFile(write(tmp_path, content)).tensors()
        np.testing.assert_array_equal(tensors["a"].read(FLOAT32), ONE, strict=True)


BEHIND = {
    "a pickle behind the pickle": tw.torch_zip(one() + tw.program(tw.value({})), DATA),
    "bytes behind the pickle": tw.torch_zip(one() + bytes(9), DATA),
    "bytes behind the archive": SOUND + bytes(99),
    "an archive behind the file": LEGACY_SOUND + SOUND,
    "more numbers than the storage has": tw.torch_zip(one(), {"0": bytes(40)}),
}


@pytest.mark.parametrize("content", BEHIND.values(), ids=BEHIND)
def test_data_that_belongs_to_nothing_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        TorchFile(path).tensors()


@pytest.mark.parametrize("content", [SOUND, LEGACY_SOUND], ids=["zip", "legacy"])
@pytest.mark.parametrize("code", ["os.system", "INST", "nested"])
def test_code_in_a_file_with_tricks_does_not_run(tmp_path, monkeypatch, content, code):
    monkeypatch.chdir(tmp_path)
    run = {
        "os.system": tw.call(tw.name("os", "system"), tw.text("touch ran")),
        "INST": pickle.MARK + tw.text("touch ran") + b"ios\nsystem\n",
        "nested": tw.call(tw.name("torch.storage", "_load_from_bytes"), b"C\1."),
    }[code]
    bad, good = tw.program(run), one()
    entries = tw.torch_entries(bad, DATA)
    tricks = {
        "another local name": [tw.Entry(b"a/data.pkl", bad, local_name=b"a/readme.txt")],
        "another central name": [
            tw.Entry(b"a/readme.txt", bad, local_name=b"a/data.pkl"), tw.Entry(b"a/data.pkl", bad)
        ],
        "flags": [entry._replace(flags=0x08 | 0x20 | 0x800) for entry in entries],
        "a folder beside": [tw.Entry(b"archive/", b""), *entries],
        "a good one beside": [*entries, tw.Entry(b"archive/data2.pkl", good)],
        "no root": [tw.Entry(b"data.pkl", bad), tw.Entry(b"data/0", ONE.tobytes())],
        "an absolute root": [tw.Entry(b"/etc/data.pkl", bad)],
        "a root above": [tw.Entry(b"../../data.pkl", bad)],
    }  # fmt: skip
    files = {label: tw.zip_file(members) for label, members in tricks.items()}
    files["two archives"] = tw.zip_file(tw.torch_entries(good, DATA)) + tw.zip_file(entries)
    files["an archive in the comment"] = tw.zip_file(entries, comment=content[-60000:])
    files["as magic number"] = bad + content
    files["as version"] = tw.program(tw.number(tw.MAGIC)) + bad + content
    files["as machine"] = tw.torch_legacy(one(legacy=True), LEGACY_DATA, machine=run)
    files["as object"] = tw.torch_legacy(bad, LEGACY_DATA)
    files["as keys"] = tw.torch_legacy(one(legacy=True), LEGACY_DATA, keys=run)
    files["behind the archive"] = content + bad
    for label, whole in files.items():
        path = write(tmp_path, whole, config=nano())
        with pytest.raises(CheckpointError):
            checkpoints.read(path)
        assert checkpoints.inspect(path).problems, label
        assert not (tmp_path / "ran").exists()


def test_a_member_before_the_beginning_of_the_file_is_refused(tmp_path):
    """The directory's place is told wrong, so that offsets become negative: from the end."""
    hidden = tw.zip_file([tw.Entry(b"a/data/0", bytes(8))])
    hidden = hidden[: hidden.index(b"PK\1\2")]  # a local header and its data
    field = struct.pack("<HH", 0x4242, len(hidden)) + hidden  # the last bytes of the directory
    behind = len(hidden) + 22
    pickled = one(count=2, shape=(2,))
    entries = [
        tw.Entry(b"a/data.pkl", pickled, start=behind),
        tw.Entry(b"a/data/0", b"", size=8, start=0, extra=field),
    ]
    content = tw.zip_file(entries, shift=behind)
    assert content[-behind:][:4] == b"PK\3\4"
    path = write(tmp_path, content, config=nano())
    for dtype in (FLOAT32, FLOAT64):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            TorchFile(path).tensors()["a"].read(dtype)


def test_numbers_beyond_4_gib_are_found(tmp_path):
    """A sparse file: the second storage lies behind a hole, and its place needs zip64."""
    state_, blocks = tw.saved({"a": ONE, "b": np.arange(8, dtype=np.float32)})
    members = tw.torch_entries(tw.program(state_), {key: data for key, (_, data) in blocks.items()})
    far = 2**32 + 2**20
    hidden = tw.zip_file([members.pop(3)], align=64)
    hidden = hidden[: hidden.index(b"PK\1\2")]
    place = struct.pack("<HHQ", 1, 8, far)
    directory = tw.Entry(b"archive/data/1", b"", size=32, start=2**32 - 1, extra=place)
    front = tw.zip_file([*members, directory])
    start = front.index(b"PK\1\2")
    listed = front[start : front.rindex(b"PK\5\6")]
    path = tmp_path / "far.pt"
    with path.open("wb") as file:
        file.write(front[:start])
        file.seek(far)
        file.write(hidden + listed)
        at = file.tell()
        record = (44, 45, 45, 0, 0, 5, 5, len(listed), at - len(listed))
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", *record))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, at, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 5, 5, *[2**32 - 1] * 2, 0))
    tensors = TorchFile(path).tensors()
    np.testing.assert_array_equal(tensors["a"].read(FLOAT32), ONE, strict=True)
    np.testing.assert_array_equal(tensors["b"].read(FLOAT32), np.arange(8, dtype=np.float32))
    assert isinstance(owner(tensors["b"].read(FLOAT32)), mmap.mmap)


ODD_TEXT = ["a\x1b[2J", "a\r\n", "a\ud800", "a\u202e", "a\0"]


@pytest.mark.parametrize("text", ODD_TEXT, ids=ascii)
def test_what_is_told_about_a_file_can_be_printed(tmp_path, text):
    """Control characters would move the cursor, and a lone surrogate cannot be encoded at all."""
    name = tw.stack_name(text, "GPTConfig") + b")\x81}b"
    weights = {"wte.weight": GOOD_TENSOR, f"h.{text}": tw.tensor(block(1, "1"), 0, (1,), (1,))}
    content = tw.torch_zip(
        tw.program(tw.value({"model": weights, "x": name})), DATA | {"1": bytes(4)}
    )
    report = checkpoints.inspect(write(tmp_path, content, "model.pt"), {"n_head": 2})
    assert report.problems
    for line in report.notes + report.problems:
        assert line.isprintable()
    assert attempt(report.path).isprintable()
    content = tw.torch_zip(tw.program(tw.value({text: 1})))
    assert attempt(write(tmp_path, content, "model.pt")).isprintable()


def test_notes_stay_short_whatever_the_pickle_names(tmp_path):
    names = b"".join(tw.name(f"{i}" * 100, "GPTConfig") for i in range(1000))
    whole = tw.value({"model": {"wte.weight": GOOD_TENSOR}, "x": b"(" + names + b"t"})
    report = checkpoints.inspect(write(tmp_path, tw.torch_zip(tw.program(whole), DATA), "m.pt"),
                                 {"n_head": 2})  # fmt: skip
    assert max(map(len, [*report.notes, *report.problems])) < 2000


def test_inspect_reads_no_numbers(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("numbers were read")

    monkeypatch.setattr(DataFile, "array", fail)
    for name in REAL:
        assert checkpoints.inspect(FIXTURES / name, GIVEN.get(name)).problems == []


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 1, 1), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_arrays_of_wrong_shapes_under_known_names_are_refused(tmp_path, shape, what):
    names = ["tok_emb.weight", "pos_emb", "head.weight", "ln_f.weight"]
    for part in ("query", "key", "value", "proj"):
        names.append(f"blocks.0.attn.{part}.{what}")
    new = ["wte.weight", "wpe.weight", "lm_head.weight", "ln_f.weight"]
    new += [f"h.0.{part}.{what}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "ln_1")]
    for labels in (names, new):
        arrays = {name: np.ones(shape, np.float32) for name in labels}
        path = write(tmp_path, tw.save(arrays), "model.pt")
        with pytest.raises(CheckpointError, match=r"model\.pt|config\.json"):
            checkpoints.read(path, config={"n_head": 1})
        assert checkpoints.inspect(path, {"n_head": 1}).problems


ARGUMENTS = {
    "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 12, "bias": True, "vocab_size": 17,
}  # fmt: skip
ODD_ARGUMENTS = {
    "a list": ({"n_layer": [2]}, "n_layer of its config is a list"),
    "a dict": ({"n_layer": {}}, "n_layer of its config is a dict"),
    "bytes": ({"n_layer": b"C\1a"}, "n_layer of its config is a bytes"),
    "a tensor": ({"n_layer": tw.tensor(block(), 0, (1,), (1,))}, "is a StoredTensor"),
    "a name": ({"n_layer": tw.name("m", "GPTConfig")}, "is a Global"),
    "text": ({"n_layer": "2"}, "n_layer"),
    "a bool": ({"n_layer": True}, "n_layer"),
    "a float": ({"n_layer": 2.0}, "n_layer"),
    "nothing": ({"n_layer": None}, "n_layer"),
    "zero": ({"n_layer": 0}, "n_layer"),
    "negative": ({"n_embd": -8}, "n_embd"),
    "2**100": ({"n_layer": 2**100}, "n_layer"),
    "another": ({"n_layer": 3}, "n_layer = 3, but there are tensors of 2 layers"),
    "not a divisor": ({"n_head": 3}, "not a multiple"),
    "an unknown field": ({"rotary": True}, "unknown field 'rotary'"),
    "a number as a name": ({5: 1}, "unknown field '5'"),
    "a long name": ({"x" * 10**6: 1}, "unknown field"),
    "a long text": ({"activation_function": "x" * 10**6}, "unknown activation_function"),
    "a NaN": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
}


@pytest.mark.parametrize("changed", ODD_ARGUMENTS.values(), ids=ODD_ARGUMENTS)
@pytest.mark.parametrize("kind", ["model_args", "config"])
def test_odd_configs_inside_a_file_are_refused_shortly(tmp_path, changed, kind):
    changes, message = changed

    def wrap(content: bytes) -> bytes:
        fields = tw.value({**ARGUMENTS, **changes})
        if kind == "config":
            fields = tw.name("__main__", "GPTConfig") + b")\x81" + fields + b"b"
        return tw.value({"model": content, kind: fields})

    tensors = random_tensors(nano(), 1, np.float32)
    path = write(tmp_path, tw.save(tensors, wrap=wrap), "ckpt.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000


# -- bombs -------------------------------------------------------------------------------------


class TooLong(BaseException):
    """Raised by the alarm; no reader catches it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what takes longer, where the system has alarms; else only notice it.

    The processor's time counts: a machine with other work to do fails no test.
    """

    def ring(*_: object) -> None:
        raise TooLong(f"over {seconds} s")

    start = time.process_time()
    alarms = hasattr(signal, "SIGPROF")
    if alarms:
        before = signal.signal(signal.SIGPROF, ring)
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except TooLong:
        pytest.fail(f"took over {seconds} s")
    finally:
        if alarms:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    assert time.process_time() - start <= seconds


def attempt(path: pathlib.Path, dtype: Any = np.float32, n_head: int = 2) -> str:
    """What `read` says to a file: the message of its refusal, or nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            checkpoints.read(path, dtype, {"n_head": n_head})
        except CheckpointError as error:
            return str(error)
    return ""


def assert_cheap(path: pathlib.Path, dtype: Any = np.float32) -> str:
    """It takes at most 10 s, and at most 64 MB besides twice the file's size."""
    gc.collect()
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with at_most(60):
            message = attempt(path, dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.collect()
    size = path.stat().st_size
    assert peak <= 2 * size + 64e6, f"{peak / 1e6:.0f} MB for a file of {size / 1e6:.1f} MB"
    assert len(message) < 5000
    if time.perf_counter() - start > 10:  # tracing takes several times as long as reading
        with at_most(10):
            attempt(path, dtype)
    return message


MOST = 2**18 - 100  # just below the limit of instructions
GPT_CONFIG = tw.name("m", "GPTConfig")
PARAMETER = tw.name("torch._utils", "_rebuild_parameter")


def laughs(empty: bytes, double: Callable[[bytes], bytes]) -> bytes:
    """Each level holds the one before twice: 2**300 leaves."""
    levels = [empty + tw.put(0)]
    levels += [double(tw.get(depth - 1)) + tw.put(depth) for depth in range(1, 300)]
    return b"".join(levels)


TUPLES = laughs(b")", lambda before: before * 2 + pickle.TUPLE2)
LISTS = laughs(b"]", lambda before: b"](" + before * 2 + pickle.APPENDS)
DICTS = laughs(b"}", lambda before: tw.dict_of([(tw.text("a"), before), (tw.text("b"), before)]))


def beside(junk: bytes) -> bytes:
    """A zip file with one weight, and something else."""
    return tw.torch_zip(
        tw.program(tw.value({"model": {"wte.weight": GOOD_TENSOR}, "x": junk})), DATA
    )


def arguments(junk: bytes) -> bytes:
    """The same in the config of nanoGPT."""
    whole = {"model": {"wte.weight": GOOD_TENSOR}, "model_args": {**ARGUMENTS, "n_layer": junk}}
    return tw.torch_zip(tw.program(tw.value(whole)), DATA)


def legacy(junk: bytes) -> bytes:
    """The same in the older format, as the object and as the machine."""
    whole = tw.program(tw.value({"wte.weight": tw.tensor(block(legacy=True), 0, (1,), (1,)),
                                 "x": junk}))  # fmt: skip
    return tw.torch_legacy(whole, LEGACY_DATA, machine={"little_endian": True, "x": junk})


def deep(kind: str) -> bytes:
    """100,000 levels and more."""
    return {
        "tuple": b")" + b"\x85" * 200_000,
        "list": b"]" * 120_000 + b"a" * 119_999,
        "dict": (b"}" + tw.text("a")) * 80_000 + b"N" + b"s" * 80_000,
        "record": (b"cm\nGPTConfig\n)\x81}" + tw.text("a")) * 30_000 + b"N" + b"sb" * 30_000,
        "parameter": PARAMETER * 50_000 + b"N" + b"\x85R" * 50_000,
    }[kind]


def self_model() -> bytes:
    items = tw.text("model") + tw.get(0) + tw.text("model_args") + tw.get(0)
    items += tw.text("config") + tw.get(0) + tw.text("wte.weight") + GOOD_TENSOR
    return tw.torch_zip(tw.program(b"}" + tw.put(0) + b"(" + items + b"u"), DATA)


def self_list() -> bytes:
    return beside(b"]" + tw.put(0) + tw.get(0) + b"a" + tw.get(0) + b"\x85a")


SMALL_BOMBS = {
    "lists in lists": lambda: beside(LISTS),
    "tuples in tuples": lambda: beside(TUPLES),
    "dicts in dicts": lambda: beside(DICTS),
    "lists in lists as a size": lambda: arguments(LISTS),
    "tuples in tuples as a size": lambda: arguments(TUPLES),
    "tuples in tuples as a key": lambda: beside(tw.dict_of([(TUPLES, b"N")])),
    "tuples in tuples as a weight": lambda: tw.torch_zip(
        tw.program(tw.dict_of([(tw.text("a"), GOOD_TENSOR), (tw.text("b"), TUPLES)])), DATA
    ),
    "tuples in tuples as a shape": lambda: tw.torch_zip(one(0, TUPLES, TUPLES), DATA),
    "tuples in tuples as a storage": lambda: tw.torch_zip(tw.program(TUPLES + b"Q")),
    "tuples in tuples as arguments": lambda: tw.torch_zip(tw.program(tw.REBUILD + TUPLES + b"R")),
    "tuples in tuples as the whole": lambda: tw.torch_zip(tw.program(TUPLES)),
    "tuples in tuples, legacy": lambda: legacy(TUPLES),
    "lists in lists, legacy": lambda: legacy(LISTS),
    "tuples in tuples as legacy keys": lambda: tw.torch_legacy(
        one(legacy=True), LEGACY_DATA, keys=TUPLES
    ),
    "tuples in tuples as the magic number": lambda: tw.program(TUPLES) + LEGACY_SOUND,
    "a dict that is its own model": self_model,
    "a list in itself": self_list,
    "a list in itself, legacy": lambda: legacy(b"]" + tw.put(0) + tw.get(0) + b"a"),
    "deep tuples as a size": lambda: arguments(deep("tuple")),
    "deep tuples as a key": lambda: beside(tw.dict_of([(deep("tuple"), b"N")])),
    "deep parameters": lambda: beside(deep("parameter")),
    "a stride of 0 over 2**40 rows": lambda: tw.torch_zip(one(0, (2**40, 1), (0, 1)), DATA),
    "a storage of 2**47": lambda: tw.torch_zip(one(0, (2**40,), (1,), 2**47), DATA),
}
# Bombs of many small things, which take time: each within 10 s.
TIME_BOMBS = {
    "deep tuples": lambda: beside(deep("tuple")),
    "deep lists": lambda: beside(deep("list")),
    "deep dicts": lambda: beside(deep("dict")),
    "deep records": lambda: beside(deep("record")),
    "deep tuples, legacy": lambda: legacy(deep("tuple")),
    "empty dicts": lambda: tw.torch_zip(tw.program(b"(" + b"}" * MOST + b"t")),
    "dicts with an item": lambda: tw.torch_zip(tw.program(b"}K\1K\1s" * (MOST // 4))),
    "letters": lambda: tw.torch_zip(
        tw.program(b"".join(tw.text(chr(256 + i % 40000)) for i in range(MOST)))
    ),
    "records": lambda: tw.torch_zip(
        tw.program(GPT_CONFIG + tw.put(0) + b"h\0)R" * (MOST // 3))
    ),
    "inert records": lambda: tw.torch_zip(
        tw.program(tw.name("pathlib._local", "PosixPath") + tw.put(0) + b"h\0)R" * (MOST // 3))
    ),
    "names": lambda: tw.torch_zip(
        tw.program(*(tw.name(f"{i:x}", "GPTConfig") for i in range(MOST)))
    ),
    "4 MiB of marks": lambda: tw.torch_zip(tw.program(b"(" * 2**22)),
    "4 MiB of frames": lambda: tw.torch_zip(tw.program(b"\x95" * 2**22)),
    "5 MiB of None": lambda: tw.torch_zip(tw.program(b"N" * (5 * MIB))),
    "five legacy pickles of junk": lambda: b"".join(
        tw.program(b"N" * MOST, content)
        for content in (tw.number(tw.MAGIC), tw.number(1001), tw.value({"little_endian": True}),
                        b"]", b"]")),
}  # fmt: skip
# Bombs of memory: each within twice its size and 64 MB.
MEMORY_BOMBS = {
    "dicts remembered": lambda: tw.torch_zip(tw.program(b"}\x94" * (MOST // 2), protocol=4)),
    "names beside a weight": lambda: tw.torch_zip(
        tw.program(
            b"(", *(tw.name(np.base_repr(i, 36), "CfgNode") for i in range(MOST)), b"t}",
            tw.text("wte.weight"), GOOD_TENSOR, b"s",
        ), DATA),
    "one letter of four bytes makes a text four times as long": lambda: tw.torch_zip(
        tw.program(
            tw.text("m" * 4_000_000 + "\U0001f600") + tw.put(0),
            *(tw.get(0) + tw.text(name) + b"\x93"
              for name in ("GPTConfig", "CfgNode", "Namespace", "SimpleNamespace")),
            b"}", tw.text("wte.weight"), GOOD_TENSOR, b"s",
        ), DATA),
    "a storage with a long key, seen from many places": lambda: tw.torch_zip(
        tw.program(
            tw.REBUILD, tw.put(0), tw.storage("FloatStorage", "k" * 3_000_000, 2000), tw.put(1),
            b"}(", *(tw.text(f"{i}") + tw.get(0) + b"(" + tw.get(1) + tw.value(i)
                     + tw.value((1,)) * 2 + b"tR" for i in range(80)), b"u",
        ), DATA),
    "bytes as a shape": lambda: tw.torch_zip(
        tw.program(tw.REBUILD, b"(", block(), b"K\0B", struct.pack("<I", 4_100_000),
                   b"a" * 4_100_000, tw.put(0), tw.get(0), b"tR")),
    "text as a shape": lambda: tw.torch_zip(
        tw.program(tw.REBUILD, b"(", block(), b"K\0", tw.text("\u0100" * 2_000_000), tw.put(0),
                   tw.get(0), b"tR")),
    "an integer of 4 MB": lambda: tw.torch_zip(
        tw.program(b"\x8b", struct.pack("<i", 4_100_000), b"\x11" * 4_100_000)),
    "three legacy pickles of dicts": lambda: tw.LEGACY_HEAD + b"".join(
        tw.program(content) for content in (
            tw.value({"little_endian": True, "x": b"(" + b"}" * (MOST - 20) + b"t"}),
            b"(" + b"}" * MOST + b"t", b"(" + b"}" * MOST + b"t")),
    "three legacy pickles of names": lambda: tw.LEGACY_HEAD + b"".join(
        tw.program(content) for content in (
            tw.value({"little_endian": True, "x": names_tuple(0)}),
            names_tuple(1), names_tuple(2))),
}  # fmt: skip


def names_tuple(start: int) -> bytes:
    return b"(" + b"".join(tw.name(f"{start}{i:x}", "CfgNode") for i in range(MOST - 50)) + b"t"


@pytest.mark.hostile
@pytest.mark.parametrize("make", SMALL_BOMBS.values(), ids=SMALL_BOMBS)
def test_small_bombs_are_cheap(tmp_path, make):
    assert assert_cheap(write(tmp_path, make(), "model.pt")) != ""


@pytest.mark.hostile
@pytest.mark.parametrize("make", TIME_BOMBS.values(), ids=TIME_BOMBS)
def test_bombs_of_many_parts_take_seconds(tmp_path, make):
    path = write(tmp_path, make(), "model.pt")
    with at_most(10):
        assert 0 < len(attempt(path)) < 5000
        gc.collect()


@pytest.mark.hostile
@pytest.mark.parametrize("make", MEMORY_BOMBS.values(), ids=MEMORY_BOMBS)
def test_bombs_of_memory_are_cheap(tmp_path, make):
    assert assert_cheap(write(tmp_path, make(), "model.pt")) != ""


def colliding_tuples(count: int) -> list[tuple[int, int]]:
    """Pairs below 2**48 whose tuples have one hash in CPython, by its published xxHash rounds."""
    prime_1, prime_2, prime_5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x27D4EB2F165667C5
    inverse, target = np.uint64(pow(prime_2, -1, 2**64)), np.uint64(0x123456789ABCDEF0)
    found: list[tuple[int, int]] = []
    start = 0
    while len(found) < count:
        first = np.arange(start, start + 2**20, dtype=np.uint64)
        start += 2**20
        lane = np.uint64(prime_5) + first * np.uint64(prime_2)
        lane = (lane << np.uint64(31) | lane >> np.uint64(33)) * np.uint64(prime_1)
        second = (target - lane) * inverse
        found += [(int(first[i]), int(second[i])) for i in np.flatnonzero(second < 2**48)]
    return found[:count]


def colliding_tensors() -> bytes:
    """29,000 different tensors of one hash, each of them one number."""
    pairs = colliding_tuples(165)
    shared = [tw.REBUILD + tw.put(0), block(29_000) + tw.put(1)]
    shared += [tw.value((1, 1, 1, 1)) + tw.put(2)]
    for i, (a, b) in enumerate(pairs):
        shared.append(tw.value((a, b, 0, 0)) + tw.put(10 + i))
        shared.append(tw.value((a, b, 0)) + tw.put(200 + i))
    items = []
    for i in range(165):
        for j in range(165):
            # Sizes with a zero take no room; their strides may be anything.
            arguments_ = tw.get(1) + b"K\0" + tw.get(200 + i) + tw.get(200 + j)
            items.append(tw.text(f"{i}.{j}") + tw.get(0) + b"(" + arguments_ + b"tR")
    return tw.torch_zip(tw.program(*shared, b"}(", *items, b"u"), {"0": bytes(4 * 29_000)})


def repeated(setup: bytes, step: bytes, count: int) -> bytes:
    return tw.torch_zip(tw.program(setup, step * count))


def many(count: int, old: bool) -> bytes:
    """Thousands of tensors of one number each."""
    names = (f"blocks.{i}.attn.query.weight" if old else f"h.{i}.attn.c_attn.weight"
             for i in range(count))  # fmt: skip
    first = "tok_emb.weight" if old else "wte.weight"
    items = [
        tw.text(name) + tw.get(0) + b"(" + tw.get(1) + tw.value(i) + tw.get(2) * 2 + b"tR"
        for i, name in enumerate([first, *names])
    ]
    setup = tw.REBUILD + tw.put(0) + block(count + 1) + tw.put(1) + tw.value((1,)) + tw.put(2)
    return tw.torch_zip(tw.program(setup, b"}(", *items, b"u"), {"0": bytes(4 * count + 4)})


# Each of these is linear to write and quadratic to follow without care.
SLOW_BOMBS = {
    "a state set again and again": lambda: repeated(
        b"}" + tw.put(0) + b"(" + b"".join(tw.number(i) + b"N" for i in range(40_000)) + b"u"
        + GPT_CONFIG + b")\x81", tw.get(0) + b"b", 88_000),
    "long arguments again and again": lambda: repeated(
        b"(" + b"N" * 130_000 + b"t" + tw.put(0) + PARAMETER + tw.put(1),
        b"h\1h\0R", 43_000),
    "integers of one hash as keys": lambda: tw.torch_zip(tw.program(
        b"}(", *(tw.number(i * (2**61 - 1)) + b"N" for i in range(130_000)), b"u")),
    "a long name again and again": lambda: repeated(
        tw.text("m" * 3_000_000) + tw.put(0) + tw.text("GPTConfig") + tw.put(1),
        b"h\0h\1\x93", 80_000),
    "tensors of one hash": colliding_tensors,
    "thousands of tensors": lambda: many(25_000, old=False),
    "thousands of tensors of old minGPT": lambda: many(25_000, old=True),
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize("make", SLOW_BOMBS.values(), ids=SLOW_BOMBS)
def test_no_file_takes_quadratic_time(tmp_path, make):
    path = write(tmp_path, make(), "model.pt")
    with at_most(5):  # a quarter of a million instructions take about 1 s
        assert attempt(path) != ""


def shared_layers(config: Config, old: bool) -> bytes:
    """A model whose layers are all one and the same, stored once: as small as one layer."""
    tensors = random_tensors(config, 0, np.float32)
    layer = {name[4:]: array for name, array in tensors.items() if name.startswith("h.0.")}
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    layer = {name: a.T.copy() if name.endswith(ends) else a for name, a in layer.items()}
    if old:
        for end in ("weight", "bias"):
            thirds = np.split(layer.pop(f"attn.c_attn.{end}"), 3)
            kinds = ("query", "key", "value")
            layer |= {f"attn.{k}.{end}": a.copy() for k, a in zip(kinds, thirds, strict=True)}
    arrays = {name: array for name, array in tensors.items() if not name.startswith("h.")}
    arrays |= {f"h.{i}.{n}": a for i in range(config.n_layer) for n, a in layer.items()}
    return tw.save({old_name(n): a for n, a in arrays.items()} if old else arrays)


def old_name(name: str) -> str:
    """What minGPT called an array before 2022."""
    words = {"ln_1": "ln1", "ln_2": "ln2", "c_fc": "0", "wte": "tok_emb", "lm_head": "head",
             "h": "blocks"}  # fmt: skip
    parts = [words.get(part, part) for part in name.split(".")]
    if "c_proj" in parts:
        parts[3] = "proj" if parts[2] == "attn" else "2"
    return ".".join(parts)


@pytest.mark.hostile
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_a_layer_stored_once_and_used_a_hundred_times_costs_no_memory_of_a_hundred(tmp_path, old):
    config = Config(vocab_size=8, n_ctx=4, n_embd=96, n_layer=150, n_head=2,
                    tie_word_embeddings=False, activation_function="gelu")  # fmt: skip
    path = write(tmp_path, shared_layers(config, old), "model.pt")
    assert path.stat().st_size < 1.5 * MIB
    assert_cheap(path, np.float64)


def test_views_of_one_storage_in_a_thousand_layers_are_refused(tmp_path):
    """Shifted by one number each, so that no two are the same."""
    setup = tw.REBUILD + tw.put(0) + block(10_000) + tw.put(1) + tw.value((96, 96)) + tw.put(2)
    setup += tw.value((96, 1)) + tw.put(3)
    items = [
        tw.text(f"h.{i}.attn.c_proj.weight") + tw.get(0) + b"(" + tw.get(1) + tw.value(i % 700)
        + tw.get(2) + tw.get(3) + b"tR"
        for i in range(1000)
    ]  # fmt: skip
    path = write(
        tmp_path, tw.torch_zip(tw.program(setup, b"}(", *items, b"u"), {"0": bytes(40_000)})
    )
    assert "tensors that overlap" in assert_cheap(path)


# -- zip archives as bombs ---------------------------------------------------------------------


def directory_of(count: int, name: str = "{:x}") -> bytes:
    """An archive whose directory lists the same empty member under many names."""
    local = b"PK\3\4" + struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    fixed = b"PK\1\2" + struct.pack("<HHHHHHIII", 20, 20, 0, 0, 0, 0, 0, 0, 0)
    entries = []
    for i in range(count):
        label = name.format(i).encode()
        entries.append(fixed + struct.pack("<HHHHHII", len(label), 0, 0, 0, 0, 0, 0) + label)
    listed = b"".join(entries)
    end = struct.pack("<HHHHIIH", 0, 0, count % 2**16, count % 2**16, len(listed), len(local), 0)
    return local + listed + b"PK\5\6" + end


def zip64(content: bytes, size: int, start: int, count: int) -> bytes:
    """The archive with an end record for 64 bits that claims what it likes."""
    end = content.rindex(b"PK\5\6")
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    told = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    return content[:end] + record + locator + told


ZIP_BOMBS = {
    "2 MiB of directory": lambda: directory_of(40_000),
    "2 MiB of long names": lambda: directory_of(32, "{:x}" + "a" * 65_000),
    "1.8 MB of names that are folders": lambda: directory_of(35_000, "{:x}/"),
    "100 MB of directory": lambda: directory_of(1) [:-22] + bytes(100_000_000)
    + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 100_000_000, 30, 0),
    "a directory of 4 GB": lambda: SOUND[:-22]
    + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**32 - 2, 0, 0),
    "zip64: a directory of 2**63": lambda: zip64(SOUND, 2**63, 0, 5),
    "zip64: a directory of 2**64 - 1": lambda: zip64(SOUND, 2**64 - 1, 0, 5),
    "zip64: a directory at 2**64 - 1": lambda: zip64(SOUND, 100, 2**64 - 1, 5),
    "zip64: 2**64 - 1 members": lambda: zip64(SOUND, 100, 0, 2**64 - 1),
    "zip64: a member of 2**63": lambda: tw.zip_file([
        tw.Entry(b"a/data.pkl", one(), size=2**32 - 1, packed=2**32 - 1,
                 extra=struct.pack("<HHQQ", 1, 16, 2**63, 2**63))]),
    "zip64: a member at 2**64 - 1": lambda: tw.zip_file([
        tw.Entry(b"a/data.pkl", one(), start=2**32 - 1,
                 extra=struct.pack("<HHQ", 1, 8, 2**64 - 1))]),
    "zip64: an extra field cut": lambda: tw.zip_file([
        tw.Entry(b"a/data.pkl", one(), size=2**32 - 1, packed=2**32 - 1,
                 extra=struct.pack("<HHQ", 1, 16, 1))]),
    "a comment of 64 KiB of end records": lambda: SOUND[:-2]
    + struct.pack("<H", 65_000) + b"PK\5\6" * 16_250,
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize("make", ZIP_BOMBS.values(), ids=ZIP_BOMBS)
def test_archives_with_absurd_directories_are_cheap(tmp_path, make):
    assert assert_cheap(write(tmp_path, make(), "model.pt")) != ""


def test_millions_of_members_are_refused_without_being_read(tmp_path):
    """2.2 million entries in 100 MB: as Python objects they would take 1.5 GB."""
    path = write(tmp_path, b"")
    entry = b"PK\1\2" + bytes(42)
    with path.open("wb") as file:
        file.write(b"PK\3\4" + bytes(26))
        for _ in range(220):
            file.write(entry * 10_000)
        end = (0, 0, 0, 0, len(entry) * 2_200_000, 30, 0)
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", *end))
    tracemalloc.start()
    try:
        with at_most(10), pytest.raises(CheckpointError, match="a directory of 101200000 bytes"):
            StoredZip(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MIB


# -- damage at large ---------------------------------------------------------------------------

TINY = nano(vocab_size=3, n_ctx=2, n_embd=2, n_layer=1, n_head=1, bias=False)
DAMAGED = {
    "zip": lambda: tw.zip_file(tiny_entries(), align=1),
    "legacy": lambda: tw.save(random_tensors(TINY, 0, np.float32), legacy=True),
}


def tiny_entries() -> list[tw.Entry]:
    state_, blocks = tw.saved(random_tensors(TINY, 0, np.float32))
    return tw.torch_entries(
        tw.program(state_), {key: data for key, (_, data) in blocks.items()}, "a"
    )


EIGHT = (1, 2, 4, 8, 16, 32, 64, 255)


@pytest.mark.hostile
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_cut_at_any_byte_is_refused(tmp_path, kind):
    path = write(tmp_path, DAMAGED[kind](), config=TINY)
    checkpoints.read(path)
    for size in tw.cuts(path):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            checkpoints.read(path)
        if size % 5 == 0:
            assert checkpoints.inspect(path).problems


@pytest.mark.hostile
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_with_any_byte_changed_is_a_model_or_refused(tmp_path, kind):
    """Every byte, with one of eight changes by turns."""
    content = DAMAGED[kind]()
    path = write(tmp_path, content, config=TINY)
    refused = 0
    for place in tw.changes(path, EIGHT):
        refused += attempt(path, n_head=1) != ""
        if place % 5 == 0:
            checkpoints.inspect(path)
    assert path.read_bytes() == content
    assert refused > len(content) // 3


@pytest.mark.hostile
def test_a_real_file_cut_or_changed_anywhere_is_a_model_or_refused(tmp_path):
    """Every 41st byte, so that it takes a second; the small files above go through all."""
    path = tmp_path / "model.pt"
    path.write_bytes((FIXTURES / "build_nanogpt" / "model_05000.pt").read_bytes())
    assert attempt(path) == ""
    for _ in tw.changes(path, EIGHT, step=41):
        attempt(path)
    for _ in tw.cuts(path, step=41):
        assert attempt(path) != ""


NUMBERS = st.one_of(
    st.integers(0, 8), st.sampled_from([-1, 2**31, 2**47, 2**48, 2**63, 2**64]), st.booleans()
)
TUPLE = st.lists(NUMBERS, max_size=4).map(tuple)
STORAGES = st.builds(
    tw.storage,
    st.sampled_from([*tw.STORAGES.values(), "UntypedStorage", "CharStorage"]),
    st.sampled_from(["0", "1", "2"]),
    NUMBERS,
    st.booleans(),
    st.one_of(st.none(), st.tuples(st.just("v"), NUMBERS, NUMBERS)),
)
SHAPED = st.sampled_from([(), (1,), (8,), (2, 3), (3, 2), (4, 2), (1, 2, 3), (0, 2), (0,)])
SANE = st.builds(
    lambda block, offset, shape, turned: tw.tensor(
        block, offset, shape[::-1] if turned else shape,
        tw.steps(shape)[::-1] if turned else tw.steps(shape),
    ),
    st.builds(tw.storage, st.sampled_from(["FloatStorage", "HalfStorage", "BFloat16Storage"]),
              st.sampled_from(["0", "1"]), st.integers(0, 16), st.booleans()),
    st.integers(0, 3), SHAPED, st.booleans(),
)  # fmt: skip
TENSORS = st.one_of(SANE, SANE, st.builds(tw.tensor, STORAGES, NUMBERS, TUPLE, TUPLE))
WRAPPED = st.one_of(
    TENSORS, TENSORS,
    TENSORS.map(lambda t: tw.call(PARAMETER, t, tw.value(True), tw.ORDERED_DICT)),
)  # fmt: skip
LAYERS = [
    f"{prefix}{name}"
    for prefix in ("", "transformer.", "_orig_mod.transformer.")
    for name in (
        "wte.weight", "wpe.weight", "ln_f.weight", "h.0.attn.c_attn.weight", "h.0.attn.bias", "h.",
        "h.0.mlp.c_fc.weight", "lm_head.weight", "tok_emb.weight", "pos_emb", "head.weight",
        "blocks.0.attn.query.weight", "blocks.0.attn.key.weight", "blocks.0.attn.value.weight",
        "blocks.0.attn.query.bias", "blocks.0.attn.key.bias", "blocks.0.attn.value.bias",
    )
]  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from([*ARGUMENTS, "dropout", "n_positions", "activation_function", "x"]),
    st.one_of(NUMBERS, st.floats(), st.text(max_size=3), st.none(), st.just(())),
)
RECORDS = FIELDS.map(lambda fields: GPT_CONFIG + b")\x81" + tw.value(fields) + b"b")
STATES = st.dictionaries(st.sampled_from(LAYERS), WRAPPED, max_size=8).map(
    lambda named: tw.dict_of((tw.text(k), v) for k, v in named.items())
)
ODD = st.sampled_from(
    [b"N", b"]", b")", tw.get(5), tw.name("os", "system"), b"0", b"(", b"t", b"."]
)
OTHER = st.one_of(STATES, RECORDS, FIELDS.map(tw.value), WRAPPED, ODD)
WHOLE = st.one_of(
    STATES,
    st.dictionaries(
        st.sampled_from(["model", "state_dict", "model_args", "config", "optimizer"]), OTHER
    ).map(tw.value),
    st.builds(
        lambda model, fields, kind: tw.value({"model": model, kind: fields}),
        STATES, st.one_of(FIELDS.map(tw.value), RECORDS), st.sampled_from(["model_args", "config"]),
    ),
)  # fmt: skip
BLOCKS = st.dictionaries(st.sampled_from(["0", "1", "2"]), st.integers(0, 16), min_size=1)


@given(WHOLE, BLOCKS, st.booleans(), st.integers(1, 64), st.booleans())
def test_random_files_are_a_model_or_refused(tmp_path_factory, whole, sizes, old, align, beside_):
    folder = tmp_path_factory.getbasetemp() / f"random{beside_}"
    folder.mkdir(exist_ok=True)
    pickled = tw.program(whole)
    if old:
        content = tw.torch_legacy(pickled, {k: (n, bytes(4 * n)) for k, n in sizes.items()})
    else:
        content = tw.torch_zip(pickled, {key: bytes(4 * n) for key, n in sizes.items()}, align)
    path = write(folder, content, "model.pt", nano() if beside_ else None)
    attempt(path)
    report = checkpoints.inspect(path)
    assert isinstance(repr(report.problems), str)
    try:
        tensors = TorchFile(path).tensors()
    except CheckpointError:
        return
    for tensor in tensors.values():
        if tensor.dtype in ("F64", "F32", "F16", "BF16"):
            assert tensor.read(FLOAT64).shape == tensor.shape
            assert tensor.read(FLOAT32).shape == tensor.shape


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete"]), st.integers(0, 2000), st.integers(1, 255)
    ),
    min_size=1,
    max_size=4,
)


@given(EDITS, st.sampled_from(list(DAMAGED)))
def test_edited_files_are_a_model_or_refused(tmp_path_factory, edits, kind):
    content = bytearray(DAMAGED[kind]())
    for what, at, change in edits:
        at %= len(content) + 1
        if what == "flip" and at < len(content):
            content[at] ^= change
        elif what == "insert":
            content[at:at] = bytes([change])
        elif what == "delete":
            del content[at : at + change % 40]
    path = write(tmp_path_factory.getbasetemp(), bytes(content), "pytorch_model.bin", TINY)
    attempt(path)
    checkpoints.inspect(path)
