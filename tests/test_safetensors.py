"""The safetensors reader: exact numbers, no copies where none are needed, and every refusal."""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import TYPE_NAMES, nano, safetensors_bytes, write_checkpoint

from numpygpt import checkpoints
from numpygpt.checkpoints.arrays import Tensor
from numpygpt.checkpoints.safetensors import SafetensorsFile
from numpygpt.errors import CheckpointError

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
MIB = 2**20


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "x.safetensors"


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header (JSON text or what becomes it), data, and the length it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """A sound description of one float32 in bytes 0 to 4."""
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def open_bytes(path: pathlib.Path, content: bytes) -> SafetensorsFile:
    path.write_bytes(content)
    return SafetensorsFile(path)


def owner(array: np.ndarray) -> Any:
    """What holds the memory that `array` looks at."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_what_is_written_is_aligned_and_says_whom_it_is_for(path):
    from numpygpt.checkpoints.safetensors import write

    array = np.arange(3, dtype=np.float32)
    stored = Tensor("F32", array.shape, array.nbytes, array.astype)
    for name in ("x", "a name of another length"):
        with path.open("wb") as file:
            write(file, {name: stored}, {name: "F32"}, lambda count: None)
        written = SafetensorsFile(path)
        assert written.metadata == {"format": "pt"}  # transformers refuses a file without it
        assert written.entries[name].start % 64 == 0
        np.testing.assert_array_equal(written.read(name, FLOAT32), array, strict=True)


# -- numbers -----------------------------------------------------------------------------------


def test_aligned_float32_is_a_read_only_view_of_the_mapped_file(path):
    stored = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = open_bytes(path, safetensors_bytes({"a": stored, "b": stored + 6}))
    first, again = file.read("b", FLOAT32), file.read("b", FLOAT32)
    np.testing.assert_array_equal(first, stored + 6, strict=True)
    assert np.shares_memory(first, again)
    assert isinstance(owner(first), mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


def misaligned(tensors: dict[str, np.ndarray]) -> bytes:
    """A file whose data starts at an odd byte, as the data of OpenAI's own file does."""
    for extra in range(4):
        content = safetensors_bytes(tensors, {"note": "x" * extra}, pad=1)
        if int.from_bytes(content[:8], "little") % 4 == 3:
            return content
    raise AssertionError("one of four lengths in a row is 3 modulo 4")


def test_misaligned_float32_becomes_an_aligned_copy(path):
    stored = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = open_bytes(path, misaligned({"a": stored, "b": stored + 6})).read("b", FLOAT32)
    np.testing.assert_array_equal(array, stored + 6, strict=True)
    assert array.flags.aligned
    assert not isinstance(owner(array), mmap.mmap)


@pytest.mark.parametrize("content", [safetensors_bytes, misaligned])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("stored", ["float64", "float32", "float16"])
def test_all_floating_types_are_read_whatever_the_alignment(path, content, dtype, stored):
    # Multiples of 1/8 below 2**7 are exact in all three types.
    values = (np.arange(-500, 500) / 8).reshape(20, 50)
    array = open_bytes(path, content({"a": values.astype(stored)})).read("a", dtype)
    np.testing.assert_array_equal(array, values.astype(dtype), strict=True)
    assert array.flags.aligned
    assert array.flags.c_contiguous


def as_float(pattern: int, exponent_bits: int, fraction_bits: int) -> float:
    """What a 16-bit pattern stands for, by IEEE 754's definition."""
    fraction = pattern % 2**fraction_bits
    exponent = pattern >> fraction_bits & (2**exponent_bits - 1)
    sign = -1.0 if pattern >> 15 else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - fraction_bits)
    return sign * (2**fraction_bits + fraction) * 2.0 ** (exponent - bias - fraction_bits)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize(
    ("view", "exponent_bits", "fraction_bits"), [("<f2", 5, 10), ("<u2", 8, 7)], ids=["F16", "BF16"]
)
def test_every_16_bit_pattern_widens_exactly(path, dtype, view, exponent_bits, fraction_bits):
    patterns = np.arange(2**16, dtype="<u2")
    array = open_bytes(path, safetensors_bytes({"a": patterns.view(view)})).read("a", dtype)
    expected = np.array([as_float(p, exponent_bits, fraction_bits) for p in range(2**16)])
    np.testing.assert_array_equal(array, expected.astype(dtype), strict=True)  # NaN equals NaN
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(array[numbers]), np.signbit(expected[numbers]))


def test_float64_rounds_to_float32_as_numpy_does_and_survives_as_float64(path):
    values = np.array([0.1, -1 / 3, 1e-46, 2.0**24 + 1, 3.4e38, -0.0])
    file = open_bytes(path, safetensors_bytes({"a": values}))
    np.testing.assert_array_equal(file.read("a", FLOAT64), values, strict=True)
    np.testing.assert_array_equal(file.read("a", FLOAT32), values.astype(np.float32), strict=True)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64"])
def test_a_tensor_that_holds_no_floats_is_refused_when_it_is_read(path, dtype):
    file = open_bytes(path, safetensors_bytes({"mask": np.ones(3, dtype)}))
    with pytest.raises(CheckpointError, match=f"x.safetensors: mask is {TYPE_NAMES[dtype]}"):
        file.read("mask", FLOAT32)


def test_scalars_empty_tensors_metadata_and_no_tensors_at_all_are_sound(path):
    tensors = {"none": np.zeros((0, 4), np.float32), "one": np.array(7, np.float32)}
    file = open_bytes(path, safetensors_bytes(tensors, {"format": "pt"}))
    assert file.metadata == {"format": "pt"}
    assert {name: e.shape for name, e in file.entries.items()} == {"none": (0, 4), "one": ()}
    for name, expected in tensors.items():
        np.testing.assert_array_equal(file.read(name, FLOAT32), expected, strict=True)
    assert open_bytes(path, raw({})).entries == {}


def test_a_file_that_shrinks_after_it_was_opened_is_refused(path):
    file = open_bytes(path, safetensors_bytes({"a": np.ones(8, np.float16)}))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        file.read("a", FLOAT32)


# -- refusals ----------------------------------------------------------------------------------

DATA = bytes(4)
REFUSED = {
    "empty": (b"", "0 bytes, too short"),
    "7 bytes": (bytes(7), "7 bytes, too short"),
    "header cut": (raw({"a": entry()})[:-1], "header claims"),
    "header longer than file": (raw({}, length=3), "claims 3 bytes, more than the 2 possible"),
    "header 2**63": (raw({}, length=2**63), f"claims {2**63} bytes"),
    "header 2**64 - 1": (raw({}, length=2**64 - 1), f"claims {2**64 - 1} bytes"),
    "header over 256 KiB": (raw(b"{}" + b" " * MIB), f"more than the {MIB // 4} possible"),
    "no header": (raw(b""), "expected JSON"),
    "no JSON": (raw(b'{"a":'), "expected JSON"),
    "two JSON values": (raw(b"{}{}"), "expected JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "expected JSON"),
    "a list": (raw([]), "expected a JSON object, received list"),
    "nested lists": (raw(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "nested objects": (raw(b'{"a":' * 40_000), "nested too deeply"),
    "one key twice": (raw(b'{"a": 1, "a": 2}'), "the key 'a' stands in it twice"),
    "one field twice": (raw(b'{"b": {"dtype": 1, "dtype": 2}}'), "the key 'dtype' stands"),
    "5000 digits": (raw(b'{"a": %s}' % (b"9" * 5000)), "expected JSON"),
    "an entry that is a number": (raw({"a": 1}), "a needs dtype, shape and two data_offsets"),
    "no dtype": (raw({"a": {"shape": [], "data_offsets": [0, 4]}}, DATA), "a needs dtype"),
    "dtype a number": (raw({"a": entry(dtype=4)}, DATA), "a needs dtype"),
    "shape a number": (raw({"a": entry(shape=1)}, DATA), "a needs dtype, shape"),
    "one offset": (raw({"a": entry(data_offsets=[0])}, DATA), "two data_offsets"),
    "three offsets": (raw({"a": entry(data_offsets=[0, 4, 4])}, DATA), "two data_offsets"),
    "unknown dtype": (raw({"a": entry(dtype="F4")}, DATA), "a has the unknown dtype 'F4'"),
    "nine axes": (raw({"a": entry(shape=[1] * 9)}, DATA), "a has an impossible shape"),
    "backwards": (raw({"a": entry(data_offsets=[4, 0])}, DATA), "a has -4 bytes"),
    "shape over data": (
        raw({"a": entry(shape=[2])}, DATA),
        r"a has 4 bytes, but .* takes 8",
    ),
    "data over shape": (
        raw({"a": entry(shape=[0])}, DATA),
        r"a has 4 bytes, but .* takes 0",
    ),
    "shape 2**62": (raw({"a": entry(shape=[2**62])}, DATA), "a has 4 bytes, but F32"),
    "out of range": (
        raw({"a": entry(shape=[2], data_offsets=[0, 8])}, DATA),
        "tensors end at byte .*: truncated",
    ),
    "far out of range": (
        raw({"a": entry(shape=[2**60], data_offsets=[0, 2**62])}, DATA),
        "tensors end at byte .*: truncated",
    ),
    "trailing data": (raw({"a": entry()}, bytes(5)), "data that belongs to no tensor"),
    "data of nothing": (raw({}, DATA), "data that belongs to no tensor"),
    "hole at the start": (
        raw({"a": entry(data_offsets=[4, 8])}, bytes(8)),
        "a starts at data byte 4, expected 0: it leaves a hole",
    ),
    "hole between": (
        raw({"a": entry(), "b": entry(data_offsets=[8, 12])}, bytes(12)),
        "b starts at data byte 8, expected 4: it leaves a hole",
    ),
    "overlap": (
        raw({"a": entry(), "b": entry(data_offsets=[2, 6])}, bytes(6)),
        "b starts at data byte 2, expected 4: it overlaps",
    ),
    "the same place": (raw({"a": entry(), "b": entry()}, DATA), "b starts .* it overlaps"),
    "metadata a list": (raw({"__metadata__": ["pt"]}), "__metadata__ must map strings to strings"),
    "metadata null": (raw({"__metadata__": None}), "__metadata__ must map strings to strings"),
    "metadata a number": (raw({"__metadata__": {"a": 1}}), "__metadata__ must map strings"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damage_is_refused_with_the_name_of_the_file(path, content, message):
    with pytest.raises(CheckpointError, match=f"x.safetensors: .*{message}"):
        open_bytes(path, content)


def test_a_refusal_is_not_taken_for_one_of_the_config(path):
    with pytest.raises(CheckpointError) as caught:
        open_bytes(path, raw(b"{"))
    assert type(caught.value) is CheckpointError


IMPOSSIBLE = [-1, True, False, 1.0, "1", None, [], 2**63, 10**30, 10**4000]


@pytest.mark.parametrize("number", IMPOSSIBLE, ids=lambda n: str(n)[:12])
@pytest.mark.parametrize("place", ["shape", "start", "stop"])
def test_a_number_that_is_no_size_is_refused(path, number, place):
    change = {
        "shape": {"shape": [number]},
        "start": {"data_offsets": [number, 4]},
        "stop": {"data_offsets": [0, number]},
    }[place]
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a has an impossible shape"):
        open_bytes(path, raw({"a": entry(**change)}, DATA))


def test_a_path_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=tmp_path.name):
        SafetensorsFile(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        SafetensorsFile(tmp_path / "nowhere")


# -- damage at large ---------------------------------------------------------------------------


def test_a_checkpoint_cut_at_any_byte_is_refused(tmp_path):
    directory = write_checkpoint(
        tmp_path, nano(vocab_size=3, n_ctx=2, n_embd=2, n_layer=1, n_head=1)
    )
    file = directory / "model.safetensors"
    checkpoints.read(directory)
    for size in reversed(range(file.stat().st_size)):
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            checkpoints.read(directory)


SMALL = safetensors_bytes(
    {
        "a": np.arange(3, dtype=np.float32),
        "b": np.arange(4, dtype=np.uint16).reshape(2, 2),
        "c": np.zeros((0, 2), np.float64),
    },
    {"format": "pt"},
)
PLACES = st.integers(0, len(SMALL) - 1)
EDITS = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("delete"), PLACES, st.integers(1, 40)),
)


@given(st.lists(EDITS, min_size=1, max_size=4))
def test_an_edited_file_loads_or_is_refused_but_nothing_else(tmp_path_factory, edits):
    content = bytearray(SMALL)
    for kind, at, what in edits:
        at = min(at, len(content))
        if kind == "flip" and at < len(content):
            content[at] ^= what
        elif kind == "insert":
            content[at:at] = what
        elif kind == "delete":
            del content[at : at + what]
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    try:
        file = open_bytes(path, bytes(content))
    except CheckpointError:
        return
    held = 0
    for name, described in file.entries.items():
        held += described.stop - described.start
        if described.dtype in ("F64", "F32", "F16", "BF16"):
            assert file.read(name, FLOAT64).shape == described.shape
    assert 8 + int.from_bytes(content[:8], "little") + held == len(content)


# JSON of nothing but brackets becomes Python objects of many times its size (measured: 24 times
# for "[],[],[]...", 27 times for "{},{},{}..."). A header of up to 256 KiB is always read, so 7 MiB
# may be taken besides the file's size; a longer one takes at most 28/32 of that.
SLACK = 7 * MIB
HOSTILE = {
    "header length 2**40": raw({}, length=2**40),
    "shape 2**62": raw({"a": entry(shape=[2**62])}, DATA),
    "2**62 bytes": raw({"a": entry(shape=[2**60], data_offsets=[0, 2**62])}, DATA),
    "lists": raw(b'{"a":[' + b"[]," * (MIB // 12 - 9) + b"[]]}"),
    "objects": raw(b'{"a":[' + b"{}," * (MIB // 12 - 9) + b"{}]}"),
    "a long header": raw(b'{"a":[' + b"{}," * (2 * MIB // 3 - 9) + b"{}]}"),
    "a long header in a large file": raw(
        b'{"a":[' + b"{}," * (MIB // 6 - 9) + b"{}]}", bytes(16 * MIB)
    ),
}


@pytest.mark.hostile
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_cannot_make_the_reader_allocate(path, content):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    slack = SLACK if len(content) > MIB // 8 else 64 * 1024  # the short ones: messages, tracebacks
    assert peak < len(content) + slack


@pytest.mark.hostile
def test_finding_a_repeated_key_among_many_takes_seconds_not_hours(path):
    # Counting each of 200,000 keys would take minutes; a set finds the second one at once.
    keys = [f'"{i:x}":0' for i in range(200_000)]
    header = b"{" + ",".join([*keys, keys[-1]]).encode() + b"}"
    path.write_bytes(raw(header, bytes(32 * len(header))))
    code = "import pathlib, sys; from numpygpt.checkpoints.safetensors import SafetensorsFile;"
    code += "SafetensorsFile(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    # It runs apart so that it can be stopped: 60 s are a hundred times what it should take.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CheckpointError" in done.stderr
    assert "the key '30d3f' stands in it twice" in done.stderr
