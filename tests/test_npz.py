"""NumPy's .npz: what np.savez writes is read, what is written np.load reads, no object is made."""

from __future__ import annotations

import io
import json
import pathlib
import struct
import time
import tracemalloc
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
import torch_writer as tw
from hypothesis import given
from hypothesis import strategies as st
from support import config_json, nano, random_tensors

from numpygpt import checkpoints
from numpygpt.checkpoints import npz
from numpygpt.checkpoints.arrays import Tensor
from numpygpt.errors import CheckpointError, CheckpointWarning, NumpyGPTError
from numpygpt.params import Config, pack

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.npz"


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A .npy file from the text of its header, which need not be true."""
    text = header.encode("utf-8" if version == (3, 0) else "latin-1") if isinstance(
        header, str) else header  # fmt: skip
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def described(
    descr: str = "'<f4'", shape: str = "(1,)", fortran: str = "False", more: str = ""
) -> str:
    """The text of a header, spelled as NumPy does."""
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, {more}}}\n"


def archive(*members: tuple[str, bytes]) -> bytes:
    return tw.zip_file([tw.Entry(name.encode(), data) for name, data in members])


def only(path: pathlib.Path, content: bytes) -> Tensor:
    """The tensor of an archive with one member."""
    path.write_bytes(archive(("a.npy", content)))
    (tensor,) = npz.read(path).tensors.values()
    return tensor


def equal_params(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            equal_params(ours, theirs)
    elif expected is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, expected, strict=True)


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.transformer."])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_a_model_that_numpy_saved(tmp_path, path, prefix, stored, dtype):
    arrays = {k: v.astype(stored) for k, v in random_tensors(nano(), 1, np.float32).items()}
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    (tmp_path / "config.json").write_text(json.dumps(config_json(nano())))
    for place in (path, tmp_path):
        found = checkpoints.read(place, dtype)
        assert found.config == nano()
        expected = {name: array.astype(dtype) for name, array in arrays.items()}
        equal_params(found.params, pack(nano(), expected))
    report = checkpoints.inspect(path)
    assert report.format == "NumPy .npz"
    assert report.problems == report.notes == []


def test_a_model_without_config_needs_its_heads(path):
    np.savez(path, **random_tensors(nano(), 1, np.float32))
    with pytest.raises(NumpyGPTError, match="n_head"):
        checkpoints.read(path)
    found = checkpoints.read(path, config={"n_head": 2, "activation_function": "gelu_new"})
    assert found.config == nano()


def test_matrices_of_nn_linear_are_turned(tmp_path, path):
    arrays = random_tensors(nano(), 1, np.float32)
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    np.savez(path, **{k: v.T if k.endswith(ends) else v for k, v in arrays.items()})
    (tmp_path / "config.json").write_text(json.dumps(config_json(nano())))
    equal_params(checkpoints.read(path).params, pack(nano(), arrays))


ARRAYS = {
    "C order": np.arange(6.0).reshape(2, 3),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "Fortran order of three axes": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "a transposed view": np.arange(6.0).reshape(2, 3).T,
    "a sliced view": np.arange(24.0).reshape(4, 6)[::2, 1:4],
    "a row": np.arange(5.0),
    "a scalar": np.array(7.0),
    "nothing": np.zeros((0, 3)),
    "nothing in Fortran order": np.zeros((3, 0), order="F"),
    "one number in eight axes": np.ones((1,) * 8),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_every_order_and_shape_of_numpy(path, array, stored, dtype):
    np.savez(path, a=array.astype(stored))
    tensor = npz.read(path).tensors["a"]
    assert tensor.shape == array.shape
    assert tensor.nbytes == array.size * np.dtype(stored).itemsize
    found = tensor.read(dtype)
    np.testing.assert_array_equal(found, array.astype(dtype), strict=True)
    assert found.flags.aligned


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(path, version):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that only new NumPys can read 2 and 3
        np.lib.format.write_array(stream, array, version)
    np.testing.assert_array_equal(only(path, stream.getvalue()).read(FLOAT32), array, strict=True)


@pytest.mark.parametrize("pad", range(4))
def test_numbers_are_aligned_wherever_they_lie(path, pad):
    content = npy(
        described(shape="(3,)").strip() + " " * pad + "\n", np.float32([1, 2, 3]).tobytes()
    )
    found = only(path, content).read(FLOAT32)
    np.testing.assert_array_equal(found, np.float32([1, 2, 3]), strict=True)
    assert found.flags.aligned


def test_other_members_are_left_alone(path):
    content = npy(described(), np.float32([5]).tobytes())
    path.write_bytes(archive(("readme.txt", b"hello"), ("a.npy", content), ("b/", b"")))
    assert list(npz.read(path).tensors) == ["a"]


@pytest.mark.parametrize("name", ["ä", "層.0.重み", "h.0/attn", "\U0001f600", "a b", "a.npy"])
def test_unicode_names_are_kept(path, name):
    np.savez(path, **{name: np.ones(3, np.float32)})
    (found,) = npz.read(path).tensors
    assert found == name
    assert checkpoints.inspect(path, {"n_head": 2}).problems


# -- what is written ---------------------------------------------------------------------------


def described_tensors(arrays: dict[str, np.ndarray], kind: str = "F32") -> dict[str, Tensor]:
    return {
        name: Tensor(kind, array.shape, array.nbytes, lambda dtype, a=array: a.astype(dtype))
        for name, array in arrays.items()
    }


def written(config: Config, arrays: dict[str, np.ndarray], kind: str = "F32") -> bytes:
    stream, counts = io.BytesIO(), [0]
    text = json.dumps(config_json(config)).encode()
    source = {"float64": "F64", "float32": "F32", "float16": "F16"}
    stored = source[next(iter(arrays.values())).dtype.name]
    npz.write(stream, text, described_tensors(arrays, stored), dict.fromkeys(arrays, kind),
              counts.append)  # fmt: skip
    size = {"F64": 8, "F32": 4, "F16": 2}[kind]
    assert sum(counts) == size * sum(array.size for array in arrays.values())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["F64", "F32", "F16"])
def test_what_is_written_is_what_numpy_loads_and_what_is_read(path, kind):
    arrays = random_tensors(nano(), 2, np.float64)
    dtype = {"F64": "f8", "F32": "f4", "F16": "f2"}[kind]
    path.write_bytes(written(nano(), arrays, kind))
    with np.load(path, allow_pickle=False) as loaded:
        assert set(loaded.files) == {*arrays, "config.json"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array.astype(dtype), strict=True)
    with zipfile.ZipFile(path) as zipped:
        assert zipped.testzip() is None
        assert zipped.namelist()[0] == "config.json"
    found = checkpoints.read(path, np.float64)
    assert found.config == nano()
    expected = {name: array.astype(dtype).astype(np.float64) for name, array in arrays.items()}
    equal_params(found.params, pack(nano(), expected))
    assert checkpoints.inspect(path).problems == []


def test_the_same_model_gives_the_same_file(path):
    arrays = random_tensors(nano(), 2, np.float32)
    first = written(nano(), arrays)
    time.sleep(0.01)
    assert written(nano(), arrays) == first


def test_the_config_inside_goes_before_the_one_beside(tmp_path, path):
    path.write_bytes(written(nano(), random_tensors(nano(), 2, np.float32)))
    (tmp_path / "config.json").write_text(json.dumps(config_json(nano(n_layer=9))))
    assert checkpoints.read(path).config == nano()


def test_types_without_a_dtype_and_numbers_too_large_are_refused():
    arrays = {"a": np.array([1.0, 1e30])}
    with pytest.raises(
        CheckpointError, match="NumPy has no dtype for BF16; choose the dtype float32"
    ):
        npz.write(io.BytesIO(), b"{}", described_tensors(arrays, "F64"), {"a": "BF16"}, len)
    with pytest.raises(CheckpointError, match=r"1e\+30, which is too large for F16"):
        npz.write(io.BytesIO(), b"{}", described_tensors(arrays, "F64"), {"a": "F16"}, len)


def test_nothing_is_written_if_a_type_is_refused():
    stream = io.BytesIO()
    arrays = {"a": np.ones(2), "b": np.ones(2)}
    with pytest.raises(CheckpointError):
        npz.write(stream, b"{}", described_tensors(arrays), {"a": "F32", "b": "BF16"}, len)
    assert stream.getvalue() == b""


# -- refusals ----------------------------------------------------------------------------------


def refusal(path: pathlib.Path, content: bytes) -> str:
    """The message with which an archive is refused; `inspect` says the same."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path, config={"n_head": 2})
    assert checkpoints.inspect(path, {"n_head": 2}).problems[0] == str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (pathlib.Path("ran"),)


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_of_objects_are_pickles_and_refused(tmp_path, path, monkeypatch, compress):
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(stream, a=np.array([Bomb()], object))
    message = refusal(path, stream.getvalue())
    assert ("compressed" if compress else "'a.npy' is ") in message
    assert not (tmp_path / "ran").exists()
    with np.load(path, allow_pickle=True) as loaded:
        loaded["a"]
    assert (tmp_path / "ran").exists()  # the bomb is live


def test_compressed_archives_are_refused(path):
    stream = io.BytesIO()
    np.savez_compressed(stream, **random_tensors(nano(), 1, np.float32))
    assert "is compressed or encrypted; unpack the archive" in refusal(path, stream.getvalue())


DTYPES = {
    "big-endian float32": (np.ones(2, ">f4"), ">f4"),
    "big-endian float64": (np.ones(2, ">f8"), ">f8"),
    "int64": (np.ones(2, "<i8"), "<i8"),
    "uint16": (np.ones(2, "<u2"), "<u2"),
    "bool": (np.ones(2, "?"), "|b1"),
    "complex": (np.ones(2, "<c8"), "<c8"),
    "text": (np.array(["a"]), "U1"),
    "bytes": (np.array([b"a"]), "|S1"),
    "dates": (np.array(["2020-01-01"], "<M8[D]"), "<M8[D]"),
    "void": (np.zeros(2, "V4"), "|V4"),
}


@pytest.mark.parametrize(("array", "name"), DTYPES.values(), ids=DTYPES)
def test_other_types_are_refused_by_name(path, array, name):
    np.savez(path, a=array)
    message = refusal(path, path.read_bytes())
    assert message.startswith(f"{path}: 'a.npy' is '")
    assert name in message
    assert "expected one of" in message


def test_arrays_of_fields_are_refused(path):
    np.savez(path, a=np.zeros(2, "f4,f4"))
    assert refusal(path, path.read_bytes()).startswith(f"{path}: 'a.npy' is ")


FOUR = bytes(4)
HEADERS = {
    "nothing": b"",
    "no magic": b"abcdefgh",
    "half a magic": b"\x93NUM",
    "version 0": npy(described(), FOUR, (0, 0)),
    "version 9": npy(described(), FOUR, (9, 0)),
    "a header cut": npy(described())[:-9],
    "a header longer than the file": b"\x93NUMPY\1\0\xff\xff{}",
    "a header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff{}",
    "a header of 2**31": b"\x93NUMPY\2\0\0\0\0\x80{}",
    "an empty header": npy(""),
    "null bytes": npy("\0" * 50),
    "no UTF-8": npy(b"\xff\xfe", version=(3, 0)),
    "a list": npy("[]"),
    "a number": npy("5"),
    "a set": npy("{1}"),
    "an unhashable key": npy("{[]: 1}"),
    "no keys": npy("{}"),
    "a key too much": npy(described(more="'x': 1,"), FOUR),
    "keys of many types": npy("{1: 1, 'a': 2, None: 3}"),
    "unclosed": npy("{'descr': ("),
    "an unclosed string": npy("{'descr': '''"),
    "an unclosed quote": npy("{'descr': '"),
    "a backslash": npy("\\"),
    "an indent": npy("if 1:\n  1\n 2"),
    "a number of 5000 digits": npy("9" * 5000),
    "a shape of 5000 digits": npy(described(shape="(" + "9" * 5000 + ",)")),
    "9000 minus signs": npy("-" * 9000 + "1"),
    "9000 brackets": npy("[" * 9000),
    "4500 brackets closed": npy("[" * 4500 + "]" * 4500),
    "90 dicts": npy("{1:" * 90),
    "4900 attributes": npy("a" + ".a" * 4900),
    "4900 sums": npy("1" + "+1" * 4900),
    "2400 nots": npy("not " * 2400 + "1"),
    "2000 lambdas": npy("lambda:" * 1400 + "1"),
    "a header over NumPy's limit": npy(" " * 20_000 + described(), FOUR),
    "code": npy("__import__('os').system('touch ran')"),
    "code as type": npy(described("__import__('os').system('touch ran')")),
    "code in a comprehension": npy("{k: 1 for k in open('ran', 'w')}"),
    "code in an f-string": npy(described("f'{open(1)}'")),
    "an assignment": npy("(x := 1)"),
    "an unknown escape": npy(described(r"'\d'")),
    "Python 2 integers": npy(described(shape="(1L,)"), FOUR),
    "an empty type": npy(described("''")),
    "a type with a null byte": npy(described(r"'<f4\0'")),
    "no type": npy(described("None")),
    "a number as type": npy(described("5")),
    "an empty tuple as type": npy(described("()")),
    "a tuple of one as type": npy(described("('<f4',)")),
    "a tuple of two as type": npy(described("('<f4', (1,))"), FOUR),
    "2**100 of a type": npy(described(f"('<f4', {2**100})")),
    "a type of 2**40 bytes": npy(described("'V1099511627776'")),
    "a type of 2**100 bytes": npy(described(f"'V{2**100}'")),
    "an empty list as type": npy(described("[]")),
    "fields without type": npy(described("[('a',)]")),
    "fields that are numbers": npy(described("[1, 2]")),
    "fields of three names": npy(described("[(('a', 'b', 'c'), '<f4')]")),
    "fields twice": npy(described("[('a', '<f4'), ('a', '<f4')]")),
    "a dict as type": npy(described("{'names': ['a'], 'formats': ['<f4']}")),
    "an old name of a type": npy(described("'a'"), b"a"),
    "an unknown type": npy(described("'<q9'")),
    "a size that is text": npy(described(shape="('1',)")),
    "a size that is a float": npy(described(shape="(1.0,)")),
    "a shape that is a list": npy(described(shape="[1]")),
    "a shape that is a number": npy(described(shape="1")),
    "an order that is a number": npy(described(fortran="1"), FOUR),
    "a negative size": npy(described(shape="(-1,)"), FOUR),
    "two negative sizes": npy(described(shape="(-1, -1)"), FOUR),
    "2**48": npy(described(shape=f"({2**48},)"), FOUR),
    "2**40 x 2**40": npy(described(shape=f"({2**40}, {2**40})"), FOUR),
    "2**40 x 0": npy(described(shape=f"({2**40}, 0)"), FOUR),
    "nine axes": npy(described(shape="(1,) * 9")),
    "nine axes spelled out": npy(described(shape=str((1,) * 9)), FOUR),
    "1000 axes": npy(described(shape=str((1,) * 1000)), FOUR),
    "too little data": npy(described(shape="(2,)"), FOUR),
    "too much data": npy(described(), bytes(5)),
    "no data": npy(described()),
}  # fmt: skip


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_none_is_refused(tmp_path, path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    # What follows keeps a header that is too long from leaving the file.
    found = refusal(path, archive(("a.npy", content), ("z.npy", npy(described(), FOUR))))
    assert found.startswith(f"{path}: 'a.npy' ")
    assert not (tmp_path / "ran").exists()


ARCHIVES = {
    "a name twice": (archive(("a.npy", npy(described(), FOUR))) , "missing"),
    "two spellings of one name": (
        archive(("wte.weight.npy", npy(described(), FOUR)),
                ("transformer.wte.weight.npy", npy(described(), FOUR))),
        "wte.weight stands in it twice",
    ),
    "a config that is no JSON": (
        archive(("a.npy", npy(described(), FOUR)), ("config.json", b"{")), "expected JSON"
    ),
    "a config that is a list": (
        archive(("a.npy", npy(described(), FOUR)), ("config.json", b"[]")), "expected a JSON object"
    ),
    "a config of lists in lists": (
        archive(("a.npy", npy(described(), FOUR)), ("config.json", b'{"a":' + b"[" * 10**5)),
        "nested too deeply",
    ),
    "a config of 2 MiB": (
        archive(("a.npy", npy(described(), FOUR)), ("config.json", b" " * 2**21)),
        "has 2097152 bytes",
    ),
    "two that overlap": (
        tw.zip_file([tw.Entry(b"a.npy", npy(described(), FOUR)), tw.Entry(b"b.npy", b"", start=0)]),
        "overlaps",
    ),
    "larger than the file": (
        tw.zip_file([tw.Entry(b"a.npy", npy(described(), FOUR), size=2**31)]), "overlaps"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_is_odd_is_refused(path, content, message):
    assert message in refusal(path, content)


# -- damage at large ---------------------------------------------------------------------------

SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.float32)}


def attempt(path: pathlib.Path, n_head: int = 2) -> bool:
    """Whether `read` takes a file; a numpygpt error is the only other end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            checkpoints.read(path, config={"n_head": n_head})
        except CheckpointError:
            return False
    return True


def arrays_in(path: pathlib.Path) -> list[np.ndarray] | None:
    """The arrays of an archive; None if it is refused."""
    try:
        return [tensor.read(FLOAT32) for tensor in npz.read(path).tensors.values()]
    except CheckpointError:
        return None


@pytest.mark.hostile
def test_a_file_cut_at_any_byte_is_refused(path):
    path.write_bytes(written(nano(), SMALL))
    assert len(arrays_in(path)) == 2
    for size in tw.cuts(path):
        with pytest.raises(CheckpointError, match=r"model\.npz"):
            checkpoints.read(path)
        if size % 5 == 0:
            assert checkpoints.inspect(path).problems


@pytest.mark.parametrize("masks", [(1, 2, 4, 8), (16, 32, 64, 255)], ids=str)
def test_a_file_with_any_byte_changed_is_read_or_refused(path, masks):
    """Every byte, with one of four changes by turns."""
    content = written(nano(), SMALL)
    path.write_bytes(content)
    refused = 0
    for place in tw.changes(path, masks):
        refused += arrays_in(path) is None
        if place % 5 == 0:
            attempt(path)
            checkpoints.inspect(path)
    assert path.read_bytes() == content
    assert refused > len(content) // 4


@pytest.mark.hostile
def test_a_model_cut_or_changed_anywhere_is_a_model_or_refused(path):
    """Every 41st byte, so that it takes a second; the small file above goes through all."""
    path.write_bytes(written(nano(), random_tensors(nano(), 0, np.float32)))
    assert attempt(path)
    for _ in tw.changes(path, (1, 2, 4, 8, 16, 32, 64, 255), step=41):
        attempt(path)
    for _ in tw.cuts(path, step=41):
        assert not attempt(path)


TEXT = st.one_of(
    st.text(alphabet="{}[]()'\",:<f48L \n\\-+*#aTrueFalseN0\0", max_size=60),
    st.builds(
        described,
        st.sampled_from(["'<f4'", "'>f4'", "'|O'", "()", "('<f4', 2)", "[('a', '<f4')]", "'a'"]),
        st.sampled_from(["()", "(1,)", "(2, 3)", "(-1,)", "(0,)", "(True,)", "(1L,)", "x", "[1]"]),
        st.sampled_from(["True", "False", "None", "1"]),
        st.sampled_from(["", "'x': 1", ")", "#"]),
    ),
)


@given(TEXT, st.sampled_from([(1, 0), (2, 0), (3, 0), (4, 0)]), st.binary(max_size=24))
def test_random_headers_are_an_array_or_refused(tmp_path_factory, header, version, data):
    path = tmp_path_factory.getbasetemp() / "random.npz"
    try:
        tensor = only(path, npy(header, data, version))
    except CheckpointError:
        return
    assert tensor.read(FLOAT64).shape == tensor.shape


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.npz"
    with pytest.raises(CheckpointError):
        only(path, b"\x93NUMPY\1\0" + content)


def arrays_of_one_number(count: int) -> bytes:
    return archive(*((f"{i:x}.npy", npy(described(), FOUR)) for i in range(count)))


@pytest.mark.hostile
def test_twenty_thousand_arrays_take_seconds_and_little_memory(path):
    path.write_bytes(arrays_of_one_number(20_000))
    start = time.process_time()
    assert not attempt(path)
    assert time.process_time() - start < 10  # it takes 0.7 s
    # Tracing takes seven times as long: a quarter of the arrays for a quarter of 64 MB.
    path.write_bytes(arrays_of_one_number(5_000))
    tracemalloc.start()
    try:
        assert not attempt(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * path.stat().st_size + 16e6  # 6.2 MB


BOMBS = {
    "hundreds of long headers": lambda: archive(
        *((f"{i:x}.npy", npy("(" + "1," * 4900 + ")")) for i in range(400))
    ),
    "long types": lambda: archive(
        ("a.npy", npy(described("[" + "('a', '<f4')," * 600 + "]"))),
    ),
    "a type of many parts": lambda: archive(("a.npy", npy(described("'" + "f4," * 3000 + "'")))),
}


@pytest.mark.hostile
@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_bombs_are_cheap(path, make):
    path.write_bytes(make())
    tracemalloc.start()
    start = time.process_time()
    try:
        assert not attempt(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Tracing takes several times as long as reading, which may take 10 s.
    assert time.process_time() - start < 20
    assert peak <= 2 * path.stat().st_size + 64e6
