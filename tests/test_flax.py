"""Flax's MessagePack files: those of the real classes, and every refusal.

The fixtures were written by tests/fixtures/make_flax.py. The packer below follows the
specification of MessagePack and shares no code with the reader under test.
"""

from __future__ import annotations

import os
import pathlib
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_ids, random_tensors, run_page

from numpygpt.checkpoints import flax, msgpack, reading
from numpygpt.checkpoints.arrays import DataFile, encoded, from_bfloat16
from numpygpt.errors import CheckpointError, CheckpointWarning
from numpygpt.params import pack

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "flax"
MIB = 2**20


class Ext(NamedTuple):
    """An extension value."""

    code: int
    data: bytes


def sized(count: int, wide: int, short: range | None, first: int, codes: list[int | None]) -> bytes:
    """The start of a value with a length: in its first byte, or in 1, 2 or 4 bytes after it.

    `wide` asks for more bytes than needed: 0 for as few as possible, 1 for one step more, ...
    """
    forms = [bytes([first + count])] if short is not None and count in short else []
    for code, letter in zip(codes, "BHI", strict=True):
        if code is not None and count < 256 ** struct.calcsize(letter):
            forms.append(bytes([code]) + struct.pack(f">{letter}", count))
    return forms[min(wide, len(forms) - 1)]


def packed(value: Any, wide: int = 0) -> bytes:
    """MessagePack; with `wide`, lengths and numbers take more bytes than they need."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value < 0:
            return b"\xd0" + struct.pack(">b", value)
        case int() if value < 2**32 and wide < 4:
            return sized(value, wide, range(128), 0, [0xCC, 0xCD, 0xCE])
        case int():
            return b"\xcf" + struct.pack(">Q", value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogateescape")
            return sized(len(data), wide, range(32), 0xA0, [0xD9, 0xDA, 0xDB]) + data
        case bytes():
            return sized(len(value), wide, None, 0, [0xC4, 0xC5, 0xC6]) + value
        case Ext(code, data):
            short = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
            if len(data) in short and not wide:
                return bytes([short[len(data)], code]) + data
            return sized(len(data), wide, None, 0, [0xC7, 0xC8, 0xC9]) + bytes([code]) + data
        case list():
            start = sized(len(value), wide, range(16), 0x90, [None, 0xDC, 0xDD])
            return start + b"".join(packed(item, wide) for item in value)
        case dict():
            start = sized(len(value), wide, range(16), 0x80, [None, 0xDE, 0xDF])
            pairs = [packed(key, wide) + packed(item, wide) for key, item in value.items()]
            return start + b"".join(pairs)
    raise AssertionError(value)


def array(values: Any, name: str | None = None, wide: int = 0, code: int = 1) -> Ext:
    """An array as Flax packs it; uint16 stands for bfloat16."""
    values = np.asarray(values)
    name = name or {"uint16": "bfloat16"}.get(values.dtype.name, values.dtype.name)
    return Ext(code, packed([list(values.shape), name, values.tobytes()], wide))


def divided(values: np.ndarray, step: int) -> dict[str, Any]:
    """An array in pieces of `step` numbers."""
    flat = values.ravel()
    chunks = [array(flat[start : start + step]) for start in range(0, flat.size, step)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(values.shape)},
        "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def tree_of(tensors: dict[str, np.ndarray], leaf: Any = array) -> dict[str, Any]:
    """The tree of FlaxGPT2LMHeadModel; kernels of blocks are stored (out, in)."""
    tree: dict[str, Any] = {}
    for name, values in tensors.items():
        *place, last = name.split(".")
        if last == "weight":
            last = "embedding" if name[:2] == "wt" or name[:2] == "wp" else "scale"
            last = last if "ln_" in name or last == "embedding" else "kernel"
        node = tree if place[0] == "lm_head" else tree.setdefault("transformer", {})
        for part in place:
            node = node.setdefault(part, {})
        node[last] = leaf(values.T if last == "kernel" else values)
    return tree


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "flax_model.msgpack"


def read_bytes(path: pathlib.Path, content: bytes):
    path.write_bytes(content)
    return flax.read(path)


def assert_holds(source, tensors: dict[str, np.ndarray]) -> None:
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in source.tensors.items():
        stored = tensor.read(np.float32)
        assert tensor.shape == tensors[name].shape
        np.testing.assert_array_equal(stored, tensors[name], strict=True, err_msg=name)


# -- files that transformers wrote ---------------------------------------------------------------

UNTIED = {"tie_word_embeddings": False, "n_inner": 12}
MODELS = {"tied": (1, {}), "untied": (2, UNTIED), "divided": (4, {})}


@pytest.mark.parametrize("name", MODELS)
def test_every_array_of_a_file_that_flax_wrote_is_read_exactly(name):
    seed, changes = MODELS[name]
    source = flax.read(FIXTURES / name / "flax_model.msgpack")
    assert_holds(source, random_tensors(nano(**changes), seed, np.float32))
    assert {tensor.dtype for tensor in source.tensors.values()} == {"F32"}
    assert source.fields is None
    assert source.notes == ["kernels of the blocks stored (out, in): transposed"]


def test_a_base_model_in_bfloat16_is_read_exactly():
    source = flax.read(FIXTURES / "base_bfloat16" / "flax_model.msgpack")
    assert {tensor.dtype for tensor in source.tensors.values()} == {"BF16"}
    tensors = random_tensors(nano(), 3, np.float32)
    assert_holds(source, {n: from_bfloat16(encoded(a, "BF16")) for n, a in tensors.items()})


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_flax_model(name):
    checkpoint = reading.read(FIXTURES / name, np.float64)
    assert checkpoint.config == nano(**MODELS[name][1])
    ids = random_ids(checkpoint.config, checkpoint.config.n_ctx)
    theirs = np.load(FIXTURES / name / "logits.npy")
    ours = run_page(ids, checkpoint.params, checkpoint.config)
    # Both computed in float64, which rounds at 1.1e-16. Measured: 7e-16 of the largest logit; a
    # hundred times that leaves room for another order of the sums.
    assert theirs.shape == ours.shape
    assert np.abs(ours - theirs).max() < 1e-13 * np.abs(theirs).max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_c_proj_turned_the_wrong_way_would_be_noticed(name, layer):
    """It is square, so no shape tells."""
    seed, changes = MODELS[name]
    config = nano(**changes)
    tensors = random_tensors(config, seed)
    proj = f"h.{layer}.attn.c_proj.weight"
    turned = pack(config, {**tensors, proj: tensors[proj].T})
    theirs = np.load(FIXTURES / name / "logits.npy")
    wrong = run_page(random_ids(config, config.n_ctx), turned, config)
    assert np.abs(wrong - theirs).max() > 0.5 * np.abs(theirs).max()


# -- what may stand in a file --------------------------------------------------------------------


def tensors_of(**changes: Any) -> dict[str, np.ndarray]:
    return random_tensors(nano(**changes), dtype=np.float32)


@pytest.mark.parametrize("wide", [0, 1, 2, 3, 4])
def test_every_form_of_lengths_and_numbers_is_read(path, wide):
    tensors = tensors_of(tie_word_embeddings=False)
    tree = tree_of(tensors, lambda values: array(values, wide=wide))
    assert_holds(read_bytes(path, packed(tree, wide)), tensors)


@pytest.mark.parametrize("wrapper", [["params"], ["params", "transformer"], ["transformer"], []])
def test_the_tree_may_be_wrapped_or_a_base_model(path, wrapper):
    tensors = tensors_of()
    tree = tree_of(tensors)["transformer"]
    for key in reversed(wrapper):
        tree = {key: tree}
    assert_holds(read_bytes(path, packed(tree)), tensors)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_divided_arrays_are_joined_in_the_order_of_their_numbers(path, step):
    tensors = tensors_of(n_layer=1)  # the 136 numbers of wte: "10" comes after "9", not after "1"
    tree = tree_of(tensors)
    tree["transformer"]["wte"]["embedding"] = divided(tensors["wte.weight"], step)
    kernel = tensors["h.0.mlp.c_fc.weight"].T
    tree["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"] = divided(kernel, step)
    assert_holds(read_bytes(path, packed(tree)), tensors)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint16"])
def test_every_floating_type_is_read_exactly(path, dtype):
    values = np.arange(-60, 60, dtype=np.float64).reshape(10, 12) / 4  # exact in all four
    stored = encoded(values.astype(np.float32), "BF16") if dtype == "uint16" else values
    leaf = array(stored.astype(dtype))
    tensor = read_bytes(path, packed({"wte": {"embedding": leaf}})).tensors["wte.weight"]
    assert tensor.nbytes == stored.astype(dtype).nbytes
    for wanted in [np.float32, np.float64]:
        np.testing.assert_array_equal(tensor.read(wanted), values.astype(wanted), strict=True)


def test_unknown_names_are_kept_for_the_check_that_refuses_them(path):
    scalar = array(np.float32(2), code=3)
    other = {"h": {"0": {"ln_1": {"kernel": scalar}, "mlp": {"wi": {"kernel": scalar}}}}}
    tree = {"params": {"transformer": other, "transformer.x": scalar}, "extra": scalar}
    source = read_bytes(path, packed(tree))
    names = ["h.0.ln_1.kernel", "h.0.mlp.wi.kernel", "transformer.x", "extra"]
    assert list(source.tensors) == names
    for tensor in source.tensors.values():
        np.testing.assert_array_equal(tensor.read(np.float32), np.array(2, np.float32), strict=True)


@pytest.mark.parametrize("name", ["params", "transformer"])
def test_a_wrapper_that_is_an_array_is_an_unknown_name(path, name):
    assert list(read_bytes(path, packed({name: ONE})).tensors) == [name]
    assert list(read_bytes(path, packed({"params": {name: ONE}})).tensors) == [name]


def test_describing_reads_no_weights(monkeypatch):
    monkeypatch.setattr(DataFile, "array", None)
    for name in MODELS:
        assert reading.inspect(FIXTURES / name).problems == []


def test_a_config_beside_the_file_is_needed_and_given_fields_will_do(path):
    path.write_bytes(packed(tree_of(tensors_of())))
    report = reading.inspect(path)
    assert "config.json: not found" in report.problems[0]
    with pytest.warns(CheckpointWarning, match="activation_function = 'gelu_new' is assumed"):
        assert reading.read(path, config={"n_head": 2}).config == nano()


def test_a_tree_as_large_as_that_of_gpt2_xl_takes_a_tenth_of_the_values_allowed(path):
    tensors = random_tensors(nano(n_layer=48, n_embd=2, n_head=1), dtype=np.float32)
    assert_holds(read_bytes(path, packed({"params": tree_of(tensors)})), tensors)
    file = DataFile(path)
    msgpack.unpack(file, msgpack.Span(0, file.size), most=msgpack.MOST_VALUES // 10)


# -- refusals ------------------------------------------------------------------------------------

ONE = array(np.zeros(1, np.float32))
INNER = [[1], "float32", bytes(4)]


def leaf(value: Any) -> bytes:
    return packed({"a": {"b": value}})


def inner(*parts: Any, code: int = 1) -> bytes:
    return leaf(Ext(code, packed(list(parts))))


def pieces(**changes: Any) -> bytes:
    return leaf({**divided(np.zeros((2, 3), np.float32), 4), **changes})


TWO = {"0": array(np.zeros(4, np.float32)), "1": array(np.zeros(2, np.float32))}
REFUSED = {
    "empty": (b"", "byte 0: expected 1 more bytes, received 0"),
    "a number": (b"\x07", "expected a map of parameters, received int"),
    "a list": (b"\x90", "expected a map of parameters, received list"),
    "nothing": (b"\xc0", "expected a map of parameters, received NoneType"),
    "trailing": (packed({"a": ONE}) + b"\0", "expected the end, found 1 more bytes"),
    "two values": (b"\x80\x80", "byte 1: expected the end"),
    "a key twice": (b"\x82\xa1a\x80\xa1a\x80", "the key 'a' stands in one map twice"),
    "a number as key": (b"\x81\x07\x80", "expected text as a key, received int"),
    "nil as key": (b"\x81\xc0\x80", "expected text as a key, received NoneType"),
    "bytes as key": (packed({b"a": ONE}), "expected text as a key, received Span"),
    "a map as key": (b"\x81\x80\x80", "expected text as a key, received dict"),
    "a key not UTF-8": (b"\x81\xa1\xff\x80", "a text that is not UTF-8"),
    "a long key": (packed({"k" * 256: ONE}), "a text of 256 bytes, expected at most 255"),
    "a key cut": (b"\x81\xa5abc", "byte 2: expected 5 more bytes, received 3"),
    "a length cut": (b"\x81\xa1a\xc7", "expected 1 more bytes, received 0"),
    "a negative number": (leaf(-1), "a value of the type 0xd0, which no Flax"),
    "a small negative number": (b"\x81\xa1a\xff", "a value of the type 0xff"),
    "a float": (leaf(1.5), "a value of the type 0xcb"),
    "never used": (b"\x81\xa1a\xc1", "a value of the type 0xc1"),
    "17 maps": (b"\x81\xa1a" * 17 + packed(ONE), "maps are nested more than 16 deep"),
    "lists and lists": (b"\x81\xa1a" + b"\x91" * 9999, "maps are nested more than 16 deep"),
    "map of 2**32 - 1": (b"\xdf\xff\xff\xff\xff", "byte 5: expected 1 more bytes"),
    "list of 2**32 - 1": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "expected 1 more bytes"),
    "text of 2**32 - 1": (b"\xdb\xff\xff\xff\xff", f"a text of {2**32 - 1} bytes"),
    "bytes of 2**32 - 1": (b"\xc6\xff\xff\xff\xff", f"expected {2**32 - 1} more bytes, received 0"),
    "array of 2**32 - 1": (b"\xc9\xff\xff\xff\xff\1", f"expected {2**32 - 1} more bytes"),
    "25,000 values": (leaf([0] * 25_000), "expected at most 25000 values, found more"),
    "text": (leaf("text"), "a/b: expected an array, received text"),
    "an integer": (leaf(5), "a/b: expected an array, received 5"),
    "nil": (leaf(None), "a/b: expected an array, received None"),
    "true": (leaf(True), "a/b: expected an array, received True"),
    "bytes": (leaf(b"1234"), "a/b: expected an array, received Span"),
    "a list of arrays": (leaf([ONE]), r"a/b: expected an array, received \[Extension"),
    "a complex number": (leaf(Ext(2, packed([1, 2]))), r"received Extension\(code=2"),
    "another extension": (leaf(Ext(255, b"1234")), r"received Extension\(code=255"),
    "an empty array": (leaf(Ext(1, b"")), "expected 1 more bytes, received 0"),
    "an array's trailing byte": (leaf(Ext(1, packed(INNER) + b"\0")), "expected the end"),
    "an array of a number": (leaf(Ext(1, b"\7")), "a/b: expected shape, type and numbers"),
    "two parts": (inner(*INNER[:2]), "a/b: expected shape, type and numbers of an array, rec"),
    "four parts": (inner(*INNER, 1), "a/b: expected shape, type and numbers"),
    "text for numbers": (inner([1], "float32", "1234"), "a/b: expected shape, type and numbers"),
    "a shape that is a number": (inner(1, "float32", bytes(4)), "a/b: expected shape, type"),
    "a type that is bytes": (inner([1], b"float32", bytes(4)), "a/b: expected shape, type"),
    "integers": (inner([1], "int32", bytes(4)), "a/b is 'int32'; expected one of float64, floa"),
    "an unknown type": (inner([1], "t" * 255, bytes(4)), "a/b is 'tttttttttttttttttttt'; exp"),
    "nine axes": (inner([1] * 9, "float32", bytes(4)), "expected at most 12 values, found more"),
    "an axis of text": (inner(["1"], "float32", bytes(4)), "impossible shape: \\['1'\\]"),
    "an axis that is true": (inner([True], "float32", bytes(4)), "impossible shape: \\[True\\]"),
    "an axis of 2**63": (inner([2**63], "float32", bytes(4)), f"impossible shape: .{2**63}"),
    "an endless shape": (inner([2**62] * 8, "float32", b"1234"), "a/b has 4 bytes, but float32"),
    "too few numbers": (inner([2], "float32", bytes(4)), r"has 4 bytes, but float32 of .* takes 8"),
    "too many numbers": (inner([1], "float16", bytes(4)), "has 4 bytes, but float16 of .* takes 2"),
    "a scalar with axes missing": (inner([], "float64", bytes(4), code=3), "takes 8"),
    "a mark that is false": (pieces(__msgpack_chunked_array__=False), "a/b: expected an array"),
    "no pieces": (pieces(chunks={}), "a/b: expected flat pieces of one type"),
    "pieces in a list": (pieces(chunks=[ONE]), "a/b: expected an array, received {'__msgpack"),
    "a shape in a list": (pieces(shape=[2, 3]), "a/b: expected an array"),
    "a piece missing": (pieces(chunks={"0": TWO["0"], "2": TWO["1"]}), "a/b/chunks/1: expected an"),
    "a piece too few": (pieces(chunks={"0": TWO["0"]}), "received 1 with 4 numbers together"),
    "a piece too many": (pieces(chunks={**TWO, "2": ONE}), "received 3 with 7 numbers together"),
    "pieces of two types": (
        pieces(chunks={**TWO, "1": array(np.zeros(2))}),
        "expected flat pieces of one type that make up the shape",
    ),
    "pieces that are not flat": (
        pieces(chunks={"0": array(np.zeros((2, 3), np.float32))}),
        r"received 1 with 6 numbers together",
    ),
    "an axis missing": (pieces(shape={"0": 2, "2": 3}), "impossible shape: \\[2, None\\]"),
    "nine axes of pieces": (
        pieces(shape={str(axis): size for axis, size in enumerate([2, 3, *[1] * 7])}),
        "impossible shape: \\[2, 3, 1",
    ),
    "an axis that is nil": (pieces(shape={"0": None}), "impossible shape"),
    "twice, wrapped": (
        packed({"transformer": {"wte": {"embedding": ONE}}, "wte": {"embedding": ONE}}),
        "wte.weight stands in it twice",
    ),
    "twice, with dots": (packed({"a": {"b": ONE}, "a.b": ONE}), "a.b stands in it twice"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damage_is_refused_with_the_name_of_the_file(path, content, message):
    with pytest.raises(CheckpointError, match=rf"flax_model\.msgpack: .*({message})"):
        read_bytes(path, content)


def test_a_block_in_which_a_matrix_is_not_turned_is_refused(path):
    tensors = tensors_of()
    tree = tree_of(tensors)
    tree["transformer"]["h"]["1"]["mlp"]["c_fc"]["kernel"] = array(tensors["h.1.mlp.c_fc.weight"])
    path.write_bytes(packed(tree))
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight expected shape \(8, 32\)"):
        reading.read(path, config={"n_head": 2})


SMALL = packed(
    {
        "params": {
            "transformer": {
                "wte": {"embedding": divided(np.arange(6, dtype=np.float32).reshape(2, 3), 4)},
                "h": {"0": {"mlp": {"c_fc": {"kernel": array(np.ones((2, 3), np.float16))}}}},
                "ln_f": {"scale": array(np.arange(3.0)), "bias": array(np.ones(3, np.uint16))},
            },
            "lm_head": {"kernel": array(np.zeros((3, 2), np.float32))},
            "step": array(np.float32(1), code=3),
        }
    }
)


def test_a_file_cut_at_any_byte_is_refused(path):
    assert len(read_bytes(path, SMALL).tensors) == 6
    for size in reversed(range(len(SMALL))):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
            flax.read(path)


def assert_sound_or_refused(path: pathlib.Path) -> None:
    try:
        source = flax.read(path)
    except CheckpointError:
        return
    for tensor in source.tensors.values():
        assert tensor.read(np.float64).shape == tensor.shape


@pytest.mark.hostile
@pytest.mark.parametrize("flip", [0x01, 0x04, 0x10, 0x40, 0x80, 0xFF])
def test_a_changed_byte_is_read_or_refused_but_nothing_else(path, flip):
    path.write_bytes(SMALL)
    for place in range(len(SMALL)):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([SMALL[place] ^ flip]))
        assert_sound_or_refused(path)
        with path.open("r+b") as file:
            file.write(SMALL[: place + 1])


PLACES = st.integers(0, len(SMALL))


@given(PLACES, PLACES, st.binary(max_size=24))
def test_an_edited_file_is_read_or_refused_but_nothing_else(tmp_path_factory, start, stop, put):
    path = tmp_path_factory.getbasetemp() / "edited.msgpack"
    path.write_bytes(SMALL[:start] + put + SMALL[max(start, stop) :])
    assert_sound_or_refused(path)


@given(PLACES, st.binary(max_size=200))
def test_random_bytes_after_a_sound_start_are_read_or_refused(tmp_path_factory, stop, rest):
    path = tmp_path_factory.getbasetemp() / "random.msgpack"
    path.write_bytes(SMALL[:stop] + rest)
    assert_sound_or_refused(path)


def long_keys(count: int) -> bytes:
    return packed({f"{i:0255}": {} for i in range(count)}, wide=2)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a list of maps": lambda: b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x80" * MIB,
    "a list of lists": lambda: b"\x81\xa1a\xdd\xff\xff\xff\xff" + b"\x90" * MIB,
    "lists in lists": lambda: b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * MIB,
    "maps in maps": lambda: b"\xdf\xff\xff\xff\xff\xa0" * MIB,
    "short maps": lambda: b"\xdf\xff\xff\xff\xff" + b"".join(
        packed(f"{i:x}") + b"\x81\xa0\x80" for i in range(MIB // 8)
    ),
    "long keys": lambda: long_keys(12_498),
    "extensions": lambda: packed({f"{i:0255}": Ext(1, b"\xc0") for i in range(12_498)}),
    "pieces": lambda: packed({"a": divided(np.zeros(6_000, np.float32), 1)}),
    "a list shown in a message": lambda: leaf(["\x00" * 255] * 24_990),
    "text that claims to be long": lambda: b"\xdb\xff\xff\xff\xff" + b"a" * MIB,
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_cannot_make_the_reader_allocate(path, make):
    path.write_bytes(make())
    tracemalloc.start()
    try:
        assert_sound_or_refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # At most 25,000 values; a text of 255 bytes takes 304, a small dict 232, an extension 200,
    # and a list shown in a message 4 characters for each byte, in two copies.
    assert peak < 64 * MIB


def test_values_are_counted_where_arrays_are_described_too(path):
    many = packed([[0] * 10, "float32", b""])
    with pytest.raises(CheckpointError, match="expected at most 12 values"):
        read_bytes(path, leaf(Ext(1, many)))
