"""Recordings of every kind are read to the bit, ours are written, and damage is named."""

from __future__ import annotations

import ast
import io
import json
import os
import pathlib
import re
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nano, random_ids, safetensors_bytes

import numpygpt
from numpygpt.errors import DumpError, OutputError
from numpygpt.verify import dumps
from numpygpt.verify.dump import Dump
from numpygpt.verify.dumps import files

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
RECIPES = pathlib.Path(numpygpt.__file__).parent / "lessons" / "dump_recipes.md"

IDS = np.array([[3, 1, 4], [1, 5, 9]])
ARRAYS = {
    "h.0.ln_1": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32),
    "their/name": np.random.default_rng(1).standard_normal((2, 3, 17)),
    "half": np.array([1.5, np.nan, -np.inf, 6e-8], np.float16),
}
METADATA = {
    "dtype": "float32",
    "weights": "int8",
    "chunks": [2, 1],
    "producer": "a port",
    "config": {"n_layer": 2},
    "model_sha256": "ab" * 32,
}


def equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# -- every kind --------------------------------------------------------------------------------


def write_safetensors(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **more: Any) -> Any:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in more.items()}
    path = folder / "run.bin"  # what it is, is seen by what stands in it
    path.write_bytes(safetensors_bytes({"ids": IDS, **arrays}, texts))
    return path


def write_npz(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **more: Any) -> Any:
    path = folder / "run.data"
    with path.open("wb") as file:
        np.savez(file, input_ids=IDS.astype(np.int32), **arrays)
    if more:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("dump.json", json.dumps(more))
    return path


def write_folder(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **more: Any) -> Any:
    for name, array in {"ids": IDS.astype(np.uint16), **arrays}.items():
        (folder / f"{name}.npy").write_bytes(npy(array))
    if more:
        (folder / "dump.json").write_text(json.dumps(more))
    return folder


def write_raw(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], **more: Any) -> Any:
    entries = []
    with (folder / "run.f32").open("wb") as file:
        for name, array in arrays.items():
            at = {"offset": file.tell(), "dtype": array.dtype.name}
            entries.append({"name": name, "shape": array.shape, **at})
            file.write(array.tobytes())
    told = {"file": "run.f32", "ids": IDS.tolist(), "tensors": entries, **more}
    (folder / "run.json").write_text(json.dumps(told))
    return folder / "run.json"


WRITERS: dict[str, Callable[..., Any]] = {
    "safetensors": write_safetensors,
    "npz": write_npz,
    "folder": write_folder,
    "raw": write_raw,
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def plain(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under names that files can have."""
    return {name.replace("/", "."): array for name, array in arrays.items()}


def test_arrays_and_metadata_of_every_kind(tmp_path, writer):
    path = writer(tmp_path, plain(ARRAYS), **METADATA)
    found = dumps.read(path)
    equal(dict(sorted(found.tensors.items())), dict(sorted(plain(ARRAYS).items())))
    np.testing.assert_array_equal(found.ids, IDS, strict=True)
    assert (found.dtype, found.weights, found.chunks) == ("float32", "int8", (2, 1))
    assert (found.producer, found.config) == ("a port", {"n_layer": 2})
    assert (found.model_sha256, found.source) == ("ab" * 32, str(path))
    assert (found.notes, found.others) == ((), {})


def test_without_metadata_the_coarsest_type_says_what_was_computed_in(tmp_path, writer):
    found = dumps.read(writer(tmp_path, {"a": ARRAYS["half"], "b": np.ones((2, 2))}))
    assert (found.dtype, found.stored) == (None, "float16")
    assert (found.weights, found.chunks, found.producer) == (None, (), "")
    assert (found.config, found.model_sha256) == (None, None)


def test_integers_are_ids_or_left_out(tmp_path, writer):
    found = dumps.read(writer(tmp_path, {"mask": np.ones(3, np.int64), "a": np.ones(2)}))
    assert found.others == {"mask": "I64, not floating point"}
    assert list(found.tensors) == ["a"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float8", "dtype must be one of .*, not 'float8'"),
        ("weights", "q4", "weights must be one of"),
        ("chunks", [0], "chunks must be a list of positive integers"),
        ("chunks", "[1", "chunks is no JSON"),
        ("chunks", "[" * 100_000, "chunks is no JSON"),
        ("config", [1], "config must be a JSON object"),
        ("ids", [[1], [2, 3]], "unequal lengths"),
        ("ids", "12", "expected ids as integers"),
    ],
)
def test_metadata_of_the_wrong_type(tmp_path, writer, field, value, message):
    path = writer(tmp_path, {"a": np.ones(2)}, **{field: value})
    with pytest.raises(DumpError, match=message):
        dumps.read(path)


@pytest.mark.parametrize("field", ["producer", "model_sha256"])
def test_texts_must_be_texts(tmp_path, field):
    with pytest.raises(DumpError, match=f"{field} must be text, not 1"):
        dumps.read(write_npz(tmp_path, {"a": np.ones(2)}, **{field: 1}))


def test_a_recording_without_numbers(tmp_path, writer):
    with pytest.raises(DumpError, match="no floating-point arrays"):
        dumps.read(writer(tmp_path, {"mask": np.ones(3, np.int64)}))


def test_an_array_without_elements(tmp_path, writer):
    equal(dumps.read(writer(tmp_path, {"a": np.ones((0, 3))})).tensors, {"a": np.ones((0, 3))})


def test_arrays_are_mapped_not_read(tmp_path, writer):
    path = writer(tmp_path, {"a": np.ones((1000, 1000))})  # 8 MB
    tracemalloc.start()
    found = dumps.read(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Bookkeeping: 60 KB measured. NumPy aligns nothing in an .npz, so arrays are read from it.
    read = 8_000_000 * (writer is write_npz)
    assert read <= most < read + 2**20
    assert found.tensors["a"].flags.writeable == bool(read)


# -- ours --------------------------------------------------------------------------------------


def a_dump(**changes: Any) -> Dump:
    tensors = {"embed": ARRAYS["h.0.ln_1"][0], "logits": ARRAYS["their/name"][0]}
    return Dump(**{"ids": IDS[0], "tensors": tensors, "dtype": "float32", **changes})


def test_what_is_written_is_read_to_the_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    dump = a_dump(weights="bfloat16", chunks=(2, 1), producer="numpygpt, ü")
    sizes: list[int] = []
    dumps.write(path, dump, model_sha256="cd" * 32, config={"n_layer": 1}, advance=sizes.append)
    found = dumps.read(path)
    equal(found.tensors, dump.tensors)
    np.testing.assert_array_equal(found.ids, IDS[:1], strict=True)
    assert (found.dtype, found.weights, found.chunks) == ("float32", "bfloat16", (2, 1))
    assert (found.producer, found.config) == ("numpygpt, ü", {"n_layer": 1})
    assert found.model_sha256 == "cd" * 32
    assert sum(sizes) == sum(array.nbytes for array in dump.tensors.values())


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([np.float16, np.float32, np.float64]),
            st.lists(st.integers(0, 3), max_size=4),
            st.sampled_from("CF"),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_arrays_are_written_and_read_to_the_bit(described):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (dtype, shape, order) in described.items():
        bits = np.frombuffer(rng.bytes(8 * int(np.prod(shape))), np.uint8)
        array = bits[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype)
        tensors[name] = np.array(array.reshape(shape), order=order)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "run")
        if "__metadata__" in tensors:
            return
        dumps.write(path, a_dump(tensors=tensors))
        found = dumps.read(path).tensors
        assert list(found) == list(tensors)
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()  # of NaNs, too


def test_safetensors_itself_would_read_the_header(tmp_path):
    dumps.write(path := tmp_path / "run.safetensors", a_dump())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {
        "format": "numpygpt-trace", "format_version": "1", "ids": "[3, 1, 4]",
        "dtype": "float32", "producer": "",
    }  # fmt: skip
    assert header["embed"] == {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]}
    assert (8 + length) % 64 == 0


def test_nothing_is_written_over(tmp_path):
    (path := tmp_path / "run.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="there already"):
        dumps.write(path, a_dump())
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"ln_f": np.ones(3, np.int64)}}, "ln_f is int64; expected float64"),
        ({"dtype": "half"}, "dtype must be one of"),
        ({"weights": "half"}, "weights must be one of"),
        ({"chunks": (0, 3)}, "chunks must be a list"),
    ],
)
def test_a_dump_that_cannot_be_written(tmp_path, changes, message):
    with pytest.raises(DumpError, match=message):
        dumps.write(tmp_path / "run.safetensors", a_dump(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_version_of_the_future(tmp_path):
    future = {"format": "numpygpt-trace", "format_version": "2"}
    path = write_safetensors(tmp_path, {"a": np.ones(2)}, **future)
    with pytest.raises(DumpError, match="version 2 of the format numpygpt-trace, expected 1"):
        dumps.read(path)


# -- safetensors of others ---------------------------------------------------------------------


def test_bfloat16_is_widened(tmp_path):
    path = tmp_path / "run.safetensors"
    bits = np.array([0x3F80, 0xC049, 0x7FC0], np.uint16)
    path.write_bytes(safetensors_bytes({"a": bits}, {"format": "pt"}))
    found = dumps.read(path)
    equal(found.tensors, {"a": np.array([1, -3.140625, np.nan], np.float32)})
    assert (found.stored, found.ids) == ("bfloat16", None)


def test_several_arrays_of_ids(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(
        safetensors_bytes({"transformer.idx": IDS + 1, "input_ids": IDS, "a": np.ones(2)})
    )
    np.testing.assert_array_equal(dumps.read(path).ids, IDS)


def test_numbers_that_are_no_numbers_of_ours(tmp_path):
    arrays = {"seen": np.ones(3, bool), "bytes": np.ones(3, np.uint8), "a": np.ones(2)}
    (path := tmp_path / "run.safetensors").write_bytes(safetensors_bytes(arrays))
    found = dumps.read(path)
    assert found.others == {"seen": "BOOL, not floating point", "bytes": "U8, not floating point"}


# -- NumPy's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_orders_and_integers_of_numpy(tmp_path, order):
    arrays = {"a": np.asarray(ARRAYS["h.0.ln_1"], order=order)}
    with (path := tmp_path / "x").open("wb") as file:
        np.savez(file, ids=np.asfortranarray(IDS), **arrays)
    found = dumps.read(path)
    equal(found.tensors, arrays)
    np.testing.assert_array_equal(found.ids, IDS, strict=True)


@pytest.mark.parametrize("name", ["<V2", "|V2"])
def test_the_bfloat16_of_jax(tmp_path, name):
    content = npy(np.array([0x3F80, 0xC049], np.uint16)).replace(b"'<u2'", f"'{name}'".encode())
    (tmp_path / "a.npy").write_bytes(content)
    found = dumps.read(tmp_path)
    equal(found.tensors, {"a": np.array([1, -3.140625], np.float32)})
    assert found.stored == "bfloat16"


def test_one_array_in_a_file(tmp_path):
    (path := tmp_path / "logits.npy").write_bytes(npy(ARRAYS["their/name"]))
    found = dumps.read(path)
    equal(found.tensors, {"logits": ARRAYS["their/name"]})
    assert found.ids is None


NPY = npy(np.ones((2, 3), np.float32))


def headed(old: bytes, new: bytes) -> bytes:
    """NPY with another header of the same length."""
    changed = NPY.replace(old, new)
    grown, end = len(changed) - len(NPY), changed.index(b"}") + 1
    return changed[:end] + b" " * -grown + changed[end + max(0, grown) :]


DAMAGED_NPY = {
    "cut": (NPY[:-1], "23 bytes of numbers, expected 24"),
    "longer": (NPY + b"\0", "25 bytes of numbers"),
    "no header": (NPY[:40], "no NumPy array"),
    "another magic": (b"\x93NUMPX" + NPY[6:], "no NumPy array"),
    "a program for a header": (headed(b"'<f4'", b"f4()"), "no NumPy array"),
    "an object": (headed(b"'<f4'", b"'|O'"), "'|O'; expected one of"),
    "the other byte order": (headed(b"'<f4'", b"'>f4'"), "'>f4'"),
    "complex": (headed(b"'<f4'", b"'<c8'"), "'<c8'"),
    "a shape of no number": (headed(b"(2, 3)", b"(2,,3)"), "impossible shape"),
    "nine axes": (headed(b"(2, 3)", b"(1, 1, 1, 1, 1, 1, 1, 1, 6)"), "shape"),
    "empty": (b"", "holds no|no NumPy array"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED_NPY.values(), ids=DAMAGED_NPY)
def test_damaged_arrays_of_numpy_are_named(tmp_path, content, message):
    (folder := tmp_path / "folder").mkdir()
    (folder / "their_array.npy").write_bytes(content)
    with pytest.raises(DumpError, match=f"their_array.*({message})"):
        dumps.read(folder)
    with zipfile.ZipFile(path := tmp_path / "x.npz", "w") as archive:
        archive.writestr("their_array.npy", content)
    with pytest.raises(DumpError, match=f"their_array.*({message})"):
        dumps.read(path)


def test_archives_that_are_not_read(tmp_path):
    np.savez_compressed(path := tmp_path / "a.npz", a=np.ones(3))
    with pytest.raises(DumpError, match="compressed"):
        dumps.read(path)
    with zipfile.ZipFile(path := tmp_path / "model.pt", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    with pytest.raises(DumpError, match=r"torch\.save, whose pickles are not opened"):
        dumps.read(path)
    with zipfile.ZipFile(path := tmp_path / "none.npz", "w"):
        pass
    with pytest.raises(DumpError, match="without NumPy arrays"):
        dumps.read(path)


def test_a_folder_of_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_MAPPED", 3)
    monkeypatch.setattr(files, "SMALL", 100)
    arrays = {f"a{i}": np.full(20, i, np.float64) for i in range(6)} | {"z": np.ones(2)}
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    found = dumps.read(write_folder(tmp_path, arrays))
    equal(found.tensors, arrays)
    assert [a.flags.writeable for a in found.tensors.values()] == [False] * 3 + [True] * 4
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 3


# -- raw ---------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path) -> Callable[..., pathlib.Path]:
    """A side JSON with one tensor, some of whose fields are changed."""
    (tmp_path / "a.bin").write_bytes(np.arange(6, dtype="<f4").tobytes())

    def write(entry: Any = None, **fields: Any) -> pathlib.Path:
        told = {"name": "a", "file": "a.bin", "shape": [2, 3], **(entry or {})}
        told = {name: value for name, value in told.items() if value is not None}
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"tensors": [told], **fields}))
        return path

    return write


def test_raw_numbers_are_float32_from_the_start(raw):
    equal(dumps.read(raw()).tensors, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_raw_numbers_are_found_from_the_file_itself(raw):
    path = raw().with_name("a.bin")
    assert dumps.read(path).source == str(path.with_suffix(".json"))


def test_raw_numbers_of_a_folder(raw):
    path = raw()
    path.rename(path.with_name("dump.json"))
    assert list(dumps.read(path.parent).tensors) == ["a"]


def test_raw_ids_and_other_types(tmp_path):
    bits = np.array([0x3F80, 0xC049], "<u2")
    (tmp_path / "x").write_bytes(b"\0" * 3 + IDS.astype("<i4").tobytes() + bits.tobytes())
    entries = [
        {"name": "ids", "shape": [2, 3], "dtype": "int32", "offset": 3},
        {"name": "a", "shape": [2], "dtype": "bfloat16", "offset": 27},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"file": "x", "tensors": entries}))
    found = dumps.read(tmp_path / "x.json")
    np.testing.assert_array_equal(found.ids, IDS, strict=True)
    equal(found.tensors, {"a": np.array([1, -3.140625], np.float32)})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2, 4]}, r"a would end at byte 32 of a\.bin, which has 24"),
        ({"offset": 1}, "a would end at byte 25"),
        ({"offset": -1}, "a needs a shape"),
        ({"shape": [-2, -3]}, "a needs a shape"),
        ({"shape": [2.0, 3]}, "a needs a shape"),
        ({"shape": [True]}, "a needs a shape"),
        ({"shape": 6}, "a needs a shape"),
        ({"shape": [2**47] * 3}, "a would end"),
        ({"shape": [1] * 9}, "a needs a shape"),
        ({"shape": None}, "a needs a shape"),
        ({"dtype": "float8"}, "a has the dtype 'float8'; known are"),
        ({"dtype": ["float32"]}, "a has the dtype"),
        ({"file": "../a.bin"}, "a needs the name of a file in the same folder"),
        ({"file": ".."}, "same folder"),
        ({"file": "/etc/passwd"}, "same folder"),
        ({"file": None}, "same folder"),
        ({"file": "b.bin"}, "No such file"),
        ({"name": None}, "a name is missing"),
        ({"name": 3}, "a name is missing"),
    ],
)
def test_descriptions_of_raw_numbers_that_are_not_true(raw, entry, message):
    with pytest.raises(DumpError, match=message):
        dumps.read(raw(entry))


def test_a_list_of_raw_tensors_that_is_none(raw):
    for tensors in ({}, [1], "a"):
        with pytest.raises(DumpError, match="tensors must be a list of objects"):
            dumps.read(raw(tensors=tensors))
    entry = {"name": "a", "file": "a.bin", "shape": [1]}
    with pytest.raises(DumpError, match="twice"):
        dumps.read(raw(tensors=[entry, entry]))
    with pytest.raises(DumpError, match="no floating-point arrays"):
        dumps.read(raw(tensors=[]))


# -- llm.c -------------------------------------------------------------------------------------


def test_llm_cs_debug_state():
    path, config = FIXTURES / "llmc" / "debug_state.bin", nano()
    state = numpygpt.checkpoints.llmc.read_debug_state(path, config)
    found = dumps.read(path, config)
    equal(found.tensors, {"logits": state.logits})
    np.testing.assert_array_equal(found.ids, state.x)
    assert found.stored == "float32"
    with pytest.raises(DumpError, match="only with its model's config"):
        dumps.read(path)
    with pytest.raises(DumpError, match="of another model"):
        dumps.read(path, nano(vocab_size=16))


# -- the tree of transformers' debugger --------------------------------------------------------


def leaf(name: str, shape: str = "torch.Size([1, 3, 8])") -> dict[str, Any]:
    return {"shape": shape, "dtype": "torch.float32", "value": f"./{name}.safetensors"}


def tree(folder: pathlib.Path) -> dict[str, Any]:
    """A tree as transformers 5.23 writes it, and the tensors beside it."""
    tensors = {
        "M_inputs_kwargs_input_ids": IDS[:1],
        "M.transformer.drop_outputs": np.full((1, 3, 8), 1.0),
        "M.transformer.h.0_inputs_args_0": np.full((1, 3, 8), 2.0),
        "M.transformer.h.0.attn_inputs_kwargs_hidden_states": np.full((1, 3, 8), 3.0),
        "M.transformer.h.0.attn.c_proj_outputs_0": np.full((1, 3, 8), 4.0),
        "M.transformer.h.1.ln_1_outputs": np.full((1, 3, 8), 5.0),  # of a layer pruned from it
        "M.transformer.h.1.ln_1_inputs_args_0": np.full((1, 3, 8), 6.0),
    }
    for name, array in tensors.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors_bytes({"data": array}))
    c_proj = {"outputs": [leaf("M.transformer.h.0.attn.c_proj_outputs_0"), "None"]}
    given = {"kwargs": {"hidden_states": leaf(list(tensors)[3]), "past": "DynamicCache(...)"}}
    block = {
        "module_path": "M.transformer.h.0",
        "inputs": {"args": [leaf("M.transformer.h.0_inputs_args_0"), "None"]},
        "children": [
            {
                "module_path": "M.transformer.h.0.attn",
                "inputs": given,
                "children": [{"module_path": "M.transformer.h.0.attn.c_proj", **c_proj}],
            }
        ],
    }
    drop = {"module_path": "M.transformer.drop", "outputs": leaf("M.transformer.drop_outputs")}
    ids = leaf("M_inputs_kwargs_input_ids", "torch.Size([1, 3])")
    return {
        "module_path": "M",
        "inputs": {"args": [], "kwargs": {"input_ids": ids}},
        "children": [{"module_path": "M.transformer", "children": [drop, block]}],
    }


def write_tree(folder: pathlib.Path, told: Any) -> pathlib.Path:
    path = folder / "M_debug_tree_FULL_TENSORS.json"
    path.write_text(json.dumps(told))
    return path


def test_a_tree_of_modules(tmp_path):
    path = write_tree(tmp_path, tree(tmp_path))
    (tmp_path / "M_debug_tree_SUMMARY.json").write_text("{}")
    for place in (tmp_path, path, tmp_path / "M_debug_tree_SUMMARY.json"):
        found = dumps.read(place)
        assert [(name, array.flat[0]) for name, array in found.tensors.items()] == [
            ("transformer.drop", 1.0),  # in the order of the calls
            ("transformer.h.0.input", 2.0),
            ("transformer.h.0.attn.input", 3.0),
            ("transformer.h.0.attn.c_proj.0", 4.0),
            ("transformer.h.1.ln_1.input", 6.0),
            ("transformer.h.1.ln_1", 5.0),
        ]
        np.testing.assert_array_equal(found.ids, IDS[:1])
        assert found.producer == "transformers, M"
        assert found.notes == ("2 tensors beside the tree that it leaves out (pruned layers)",)


def test_a_tree_under_another_name(tmp_path):
    path = write_tree(tmp_path, tree(tmp_path))
    path.rename(path := tmp_path / "tree.json")
    assert len(dumps.read(path).tensors) == 6


def test_a_module_called_twice(tmp_path):
    told = tree(tmp_path)
    told["children"].append(told["children"][0]["children"][0])
    found = dumps.read(write_tree(tmp_path, told))
    assert "transformer.drop was called more than once: its file holds the last call" in found.notes


def test_a_tree_with_printed_digits_only(tmp_path):
    told = tree(tmp_path)
    drop = told["children"][0]["children"][0]["outputs"]
    drop["value"] = ["tensor([[1.0000e+00, 2.0000e+00]])"]
    found = dumps.read(write_tree(tmp_path, told))
    assert "use_repr=False" in found.others["transformer.drop"]
    told["children"][0]["children"].pop()
    with pytest.raises(DumpError, match="use_repr=False"):
        dumps.read(write_tree(tmp_path, told))


TREES: dict[str, tuple[Any, str]] = {
    "no path": ({"children": []}, "no module_path"),
    "a child of no kind": ({"module_path": "M", "children": [3]}, "node of the tree"),
    "a child without a path": ({"module_path": "M", "children": [{}]}, "node of the tree"),
    "children that are none": ({"module_path": "M", "children": {}}, "M: children must be a list"),
    "a file elsewhere": ({"module_path": "M", "outputs": leaf("../x")}, "expected a file beside"),
    "a file that is none": (
        {"module_path": "M", "outputs": {**leaf("x"), "value": "x.bin"}},
        "expected a file beside",
    ),
    "a file that is missing": (
        {"module_path": "M", "outputs": leaf("x")},
        "x.safetensors: No such",
    ),
    "nothing": ({"module_path": "M"}, "no floating-point"),
    "a list": ([], "JSON object"),
}


@pytest.mark.parametrize(("told", "message"), TREES.values(), ids=TREES)
def test_trees_that_are_not_sound(tmp_path, told, message):
    with pytest.raises(DumpError, match=message):
        dumps.read(write_tree(tmp_path, told))


def test_a_tensor_of_a_tree_that_is_not_sound(tmp_path):
    path = write_tree(tmp_path, tree(tmp_path))
    place = tmp_path / "M.transformer.drop_outputs.safetensors"
    place.write_bytes(safetensors_bytes({"other": np.ones(3)}))
    with pytest.raises(DumpError, match=r"drop_outputs.*called data for transformer\.drop"):
        dumps.read(path)
    place.write_bytes(b"")
    with pytest.raises(DumpError, match="drop_outputs"):
        dumps.read(path)


def test_a_tree_as_deep_as_it_gets(tmp_path):
    path = tmp_path / "M_debug_tree_FULL_TENSORS.json"
    for depth in (900, 100_000):
        nest = '{"a":' * depth + "1" + "}" * depth
        path.write_text('{"module_path": "M", "inputs": ' + nest + "}")
        with pytest.raises(DumpError, match=r"nested too deeply|no floating-point"):
            dumps.read(path)


def test_a_tree_that_json_reads_and_python_cannot_walk(tmp_path):
    nest: dict[str, Any] = {}
    for _ in range(10_000):  # newer versions of Python read so many levels
        nest = {"a": nest}
    told = {"module_path": "M", "inputs": nest}
    with pytest.raises(DumpError, match="nested too deeply"):
        dumps.hf_debugger._listed(tmp_path, told, "M")
    while nest:  # taking it down level by level: its own end would overflow the stack
        nest = nest["a"]


def test_trees_of_two_models(tmp_path):
    write_tree(tmp_path, {})
    (tmp_path / "N_debug_tree_FULL_TENSORS.json").write_text("{}")
    with pytest.raises(DumpError, match="trees of 2 models; name one"):
        dumps.read(tmp_path)


def test_a_tree_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(dumps.hf_debugger, "LARGEST_TREE", 2**20)
    (tmp_path / "M_debug_tree_FULL_TENSORS.json").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(DumpError, match="expected at most 1048576"):
        dumps.read(tmp_path)


# -- what a path is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x80\x04\x95abc.", "a pickle"),
        (b"GGUF\3\0\0\0", "a GGUF model"),
        ((20240326).to_bytes(4, "little"), "an llm.c model"),
        (b"\x89HDF\r\n\x1a\n....", "HDF5"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"12345678", "begins with the bytes 31 32 33 34 35 36 37 38; raw numbers need a JSON"),
        (b"{", "expected JSON"),
        (b"{}", "received the keys of nothing"),
        (b'{"a": 1}', "expected a JSON object with tensors"),
        (b'{"a": 1, "a": 2}', "twice"),
    ],
)
def test_files_that_are_no_recording(tmp_path, content, message):
    (path := tmp_path / "run").write_bytes(content)
    with pytest.raises(DumpError, match=message):
        dumps.read(path)


def test_a_damaged_safetensors_file_is_called_one(tmp_path):
    (path := tmp_path / "run.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(DumpError, match="header claims"):
        dumps.read(path)


def test_paths_that_are_no_recording(tmp_path):
    with pytest.raises(DumpError, match="no such file"):
        dumps.read(tmp_path / "nothing")
    with pytest.raises(DumpError, match="empty"):
        dumps.read(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DumpError, match=r"found notes\.txt"):
        dumps.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DumpError, match="not a regular file"):
        dumps.read(tmp_path / "pipe")


@pytest.mark.parametrize("write", [write_safetensors, write_npz])
def test_a_folder_with_one_recording(tmp_path, write):
    path = write(tmp_path, {"a": np.ones(2)})
    ending = ".safetensors" if write is write_safetensors else ".npz"
    path.rename(tmp_path / f"only{ending}")
    assert list(dumps.read(tmp_path).tensors) == ["a"]


def damaged_files() -> dict[str, tuple[str, bytes]]:
    """Name and content of one small file of each kind."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        arrays = {"a": np.ones((2, 3), np.float32)}
        return {
            "safetensors": ("x", write_safetensors(folder, arrays, ids="[1]").read_bytes()),
            "npz": ("x", write_npz(folder, arrays, dtype="float32").read_bytes()),
            "npy": ("x", npy(arrays["a"])),
            "raw": ("x.json", write_raw(folder, arrays).read_bytes()),
            "tree": ("x.json", json.dumps(tree(folder)).encode()),
        }


SMALL_FILES = damaged_files()


@given(st.sampled_from([*SMALL_FILES]), st.data())
@settings(deadline=None, max_examples=300)
def test_any_damage_is_a_typed_error_or_other_numbers(kind, data):
    name, content = SMALL_FILES[kind]
    spot = data.draw(st.integers(0, len(content) - 1))
    what = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if what == "flip":
        damage = bytes([content[spot] ^ data.draw(st.integers(1, 255))])
        content = content[:spot] + damage + content[spot + 1 :]
    elif what == "cut":
        content = content[:spot]
    else:
        content = content[:spot] + data.draw(st.binary(min_size=1, max_size=9)) + content[spot:]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(content)
        pathlib.Path(folder, "run.f32").write_bytes(bytes(24))
        try:
            found = dumps.read(path)
        except DumpError:  # any other error fails the test
            return
        assert sum(array.nbytes for array in found.tensors.values()) <= 2 * len(content) + 24


# -- recipes -----------------------------------------------------------------------------------


def recipes() -> dict[str, list[tuple[str, str]]]:
    """Heading -> language and text of each of its blocks."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in RECIPES.read_text().split("\n## ")[1:]:
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
        found[part.partition("\n")[0]] = blocks
    return found


def test_every_program_has_a_recipe():
    assert {"transformers", "nanoGPT", "TransformerLens", "JAX and Flax", "C", "llama.cpp"} <= set(
        recipes()
    )


@pytest.mark.parametrize(
    "text", [text for blocks in recipes().values() for kind, text in blocks if kind == "python"]
)
def test_recipes_in_python_are_python(text):
    assert ast.parse(text).body


def test_the_shortest_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ((_, text),) = recipes()["Any Python"]
    post, logits = np.ones((3, 8)), np.ones((3, 17))
    exec(text, {"ids": random_ids(nano(), 3), "post": post, "logits": logits})
    found = dumps.read(tmp_path / "run.npz")
    equal(found.tensors, {"h.0.mlp.post": post, "logits": logits})
    np.testing.assert_array_equal(found.ids, [random_ids(nano(), 3)])


def test_the_example_of_a_mapping_is_one():
    from numpygpt.verify.names import mapped

    (text,) = re.findall(r"^```json\n(.*?)^```$", RECIPES.read_text(), re.DOTALL | re.MULTILINE)
    assert len(mapped(json.loads(text), 2)) == 3
