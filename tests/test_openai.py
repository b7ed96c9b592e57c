"""OpenAI's TensorFlow checkpoints: exact numbers, every refusal, and damage of all kinds.

The writer below follows the descriptions of LevelDB's tables and of protocol buffers and shares no
code with the reader. What TensorFlow itself writes lies in tests/fixtures/openai.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import pathlib
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_tensors

from numpygpt import checkpoints
from numpygpt.checkpoints import openai
from numpygpt.checkpoints.crc32c import crc32c, masked
from numpygpt.checkpoints.tensor_bundle import read_bundle
from numpygpt.errors import CheckpointError, ConfigError, ModelNotFoundError

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "openai"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
MIB = 2**20

# -- a writer -------------------------------------------------------------------------------------

NUMBERS = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19, "uint16": 14}
MAGIC = bytes.fromhex("57fb808b247547db")


def checksum(data: bytes) -> bytes:
    """The masked CRC-32C, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ 0x82F63B78 * (state & 1)
    state ^= 0xFFFFFFFF
    return ((state // 2**15 + state * 2**17 + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def varint(value: int) -> bytes:
    groups = []
    while True:
        groups.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(groups)


def message(fields: Iterable[tuple[int, Any]]) -> bytes:
    """A protocol buffer: integers as varints, `bytearray` as a fixed 32, other bytes by length.

    Zeros are left out, as version 3 of the language has it.
    """
    parts = []
    for number, value in fields:
        if value == 0:
            continue
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        elif isinstance(value, bytearray):
            parts.append(varint(number << 3 | 5) + bytes(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def shape_of(*sizes: int) -> bytes:
    return message((2, message([(1, size)])) for size in sizes)


HEADER = {1: 1, 3: message([(1, 1)])}
HEADER_BYTES = message(HEADER.items())


def entry(data: bytes, **changes: Any) -> bytes:
    """The description of one float32 array of `data`, with changed fields."""
    keys = {"dtype": 1, "shape": 2, "shard": 3, "start": 4, "size": 5, "checksum": 6, "slices": 7}
    fields = {1: 1, 2: shape_of(len(data) // 4), 5: len(data), 6: bytearray(checksum(data))}
    fields |= {keys[name]: value for name, value in changes.items()}
    return message(sorted(fields.items()))


def block(records: Iterable[tuple[bytes, bytes]], interval: int = 16) -> bytes:
    """Keys and values; every `interval` of them one key stands in full."""
    content, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(records):
        if i % interval == 0:
            restarts.append(len(content))
            before = b""
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        before = key
    restarts = restarts or [0]
    numbers = [*restarts, len(restarts)]
    return content + b"".join(number.to_bytes(4, "little") for number in numbers)


def sealed(content: bytes, kind: bytes = b"\0") -> bytes:
    return content + kind + checksum(content + kind)


def table_of(blocks: list[bytes], last: list[bytes], kind: bytes = b"\0") -> bytes:
    """A table of finished blocks, whose last keys are given too."""
    table, handles = b"", []
    for content in blocks:
        handles.append(varint(len(table)) + varint(len(content)))
        table += sealed(content, kind)
    footer = b""
    for content in (block([]), block(zip(last, handles, strict=True), interval=1)):
        footer += varint(len(table)) + varint(len(content))
        table += sealed(content)
    return table + footer + bytes(40 - len(footer)) + MAGIC


def table(records: Mapping[bytes, bytes], each: int = 10**6) -> bytes:
    """A table with `each` records to a block.

    The index names the last block by a short key after its last one, as LevelDB does.
    """
    pairs = list(records.items())
    parts = [pairs[i : i + each] for i in range(0, len(pairs), each)]
    last = [part[-1][0] for part in parts]
    if last and last[-1]:
        last[-1] = bytes([min(last[-1][0] + 1, 255)])
    return table_of([block(part) for part in parts], last)


def bundle(
    arrays: Mapping[str, np.ndarray], shards: int = 1, each: int = 10**6
) -> dict[str, bytes]:
    """The files of a checkpoint, arrays in turns in one or several files of data."""
    data = [b""] * shards
    records = {b"": message({**HEADER, 1: shards}.items())}
    for i, (name, array) in enumerate(sorted(arrays.items())):
        held, shard = array.tobytes(), i % shards
        records[name.encode()] = entry(
            held, dtype=NUMBERS[array.dtype.name], shape=shape_of(*array.shape),
            shard=shard, start=len(data[shard]),
        )  # fmt: skip
        data[shard] += held
    files = {f"model.ckpt.data-{i:05d}-of-{shards:05d}": held for i, held in enumerate(data)}
    return {INDEX: table(records, each), **files}


def openai_names(tensors: Mapping[str, np.ndarray], prefix: str = "model/") -> dict[str, Any]:
    """The variables of OpenAI's code, spelled out rather than derived."""
    named = {"wte": tensors["wte.weight"], "wpe": tensors["wpe.weight"]}
    named |= {"ln_f/g": tensors["ln_f.weight"], "ln_f/b": tensors["ln_f.bias"]}
    for i in range(sum(name.endswith("ln_1.bias") for name in tensors)):
        for norm in ("ln_1", "ln_2"):
            named[f"h{i}/{norm}/g"] = tensors[f"h.{i}.{norm}.weight"]
            named[f"h{i}/{norm}/b"] = tensors[f"h.{i}.{norm}.bias"]
        for part, linear in (
            ("attn", "c_attn"),
            ("attn", "c_proj"),
            ("mlp", "c_fc"),
            ("mlp", "c_proj"),
        ):
            weight = tensors[f"h.{i}.{part}.{linear}.weight"]
            named[f"h{i}/{part}/{linear}/w"] = weight.reshape(1, *weight.shape)
            named[f"h{i}/{part}/{linear}/b"] = tensors[f"h.{i}.{part}.{linear}.bias"]
    return {prefix + name: array for name, array in named.items()}


HPARAMS = {"n_vocab": 17, "n_ctx": 12, "n_embd": 8, "n_head": 2, "n_layer": 2}


@functools.cache
def weights(dtype: str = "float32") -> dict[str, np.ndarray]:
    return random_tensors(nano(), seed=0, dtype=np.dtype(dtype))


@functools.cache
def ours(**options: Any) -> dict[str, bytes]:
    """The files of the nano model, but for hparams.json."""
    return bundle(openai_names(weights()), **options)


def put(
    directory: pathlib.Path, files: Mapping[str, bytes], hparams: Any = HPARAMS
) -> pathlib.Path:
    """Write files into a directory; `hparams` may be bytes, or None for no such file."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    if hparams is not None:
        text = hparams if isinstance(hparams, bytes) else json.dumps(hparams).encode()
        (directory / "hparams.json").write_bytes(text)
    return directory


def assert_nano(directory: pathlib.Path, dtype: str = "float32", **options: Any) -> None:
    """The directory holds the nano model, every number of it."""
    assert checkpoints.read(directory, **options).config == nano()
    tensors = openai.read(directory / INDEX).tensors
    assert tensors.keys() == weights().keys()
    for name, expected in weights(dtype).items():
        np.testing.assert_array_equal(
            tensors[name].read(np.float32), expected.astype(np.float32), strict=True
        )


# -- what is read ---------------------------------------------------------------------------------


def test_what_tensorflow_wrote_is_read():
    assert_nano(FIXTURE)
    source = openai.read(FIXTURE / INDEX)
    assert (source.format, source.directory) == ("OpenAI TensorFlow", FIXTURE)
    assert source.notes == []
    assert source.assumed == {}
    assert source.fields == {
        "vocab_size": 17,
        "n_positions": 12,
        "n_embd": 8,
        "n_head": 2,
        "n_layer": 2,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }


def test_the_writer_of_these_tests_writes_what_tensorflow_writes():
    for name, content in ours().items():
        assert content == (FIXTURE / name).read_bytes()


def test_float32_is_a_view_of_the_mapped_file():
    source = openai.read(FIXTURE / INDEX)
    for name in ("wte.weight", "h.0.attn.c_attn.weight"):
        array = source.tensors[name].read(np.float32)
        assert np.shares_memory(array, source.tensors[name].read(np.float32))
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert isinstance(array.base.obj, mmap.mmap)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("each", [1, 2, 7, 10**6])
def test_any_number_of_blocks_and_of_files_of_data(tmp_path, shards, each):
    assert_nano(put(tmp_path, ours(shards=shards, each=each)))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_types_of_variables(tmp_path, dtype):
    assert_nano(put(tmp_path, bundle(openai_names(weights(dtype)))), dtype)


def test_bfloat16_and_misaligned_float32(tmp_path):
    bits, values = np.array([0x3F80, 0xC049, 0x7F80], np.uint16), np.arange(3, dtype=np.float32)
    tensors = read_bundle(put(tmp_path, bundle({"a": bits, "b": values})) / INDEX)
    assert (tensors["a"].dtype, tensors["a"].nbytes) == ("BF16", 6)
    np.testing.assert_array_equal(
        tensors["a"].read(np.float32), np.array([1, -3.140625, np.inf], np.float32), strict=True
    )
    array = tensors["b"].read(np.float32)  # 6 bytes from the start
    np.testing.assert_array_equal(array, values, strict=True)
    assert array.flags.aligned


def test_empty_arrays_scalars_and_unknown_types_are_described(tmp_path):
    arrays = {"empty": np.zeros((0, 3), np.float32), "one": np.array(7, np.float32)}
    tensors = read_bundle(put(tmp_path, bundle(arrays)) / INDEX)
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].read(np.float32), array, strict=True)
    records = {b"": HEADER_BYTES, b"a": entry(b"abc", dtype=7, shape=b"")}
    path = put(tmp_path, {INDEX: table(records), DATA: b"abc"}) / INDEX
    text = read_bundle(path)["a"]
    assert (text.dtype, text.shape, text.nbytes) == ("text", (), 3)
    with pytest.raises(CheckpointError, match="a is text; expected one of F64"):
        text.read(np.float32)


@pytest.mark.parametrize("prefix", ["", "model/", "gpt2/model/"])
def test_any_one_prefix_is_taken_off(tmp_path, prefix):
    assert_nano(put(tmp_path, bundle(openai_names(weights(), prefix))))


def test_variables_of_the_training_are_left_out_with_a_note(tmp_path):
    variables = openai_names(weights())
    slots = {
        f"{name}/{slot}": array for name, array in variables.items() for slot in ("Adam", "Adam_1")
    }
    steps = {
        "beta1_power": np.array(0.9, np.float32),
        "train/beta2_power_1": np.array(0.9, np.float32),
        "global_step": np.array(7, np.int64),
        "model/wte/adam_m": variables["model/wte"],
        "model/wpe/Momentum": variables["model/wpe"],
    }
    assert_nano(put(tmp_path, bundle({**variables, **slots, **steps})))
    (note,) = openai.read(tmp_path / INDEX).notes
    assert note.startswith(f"{len(slots) + 5} variables of the training left out: beta1_power, ")


def test_other_variables_are_refused_by_name(tmp_path):
    arrays = openai_names(weights())
    for name in ("model/h0/attn/c_attn/w/ema", "model/h00/ln_1/g", "model/h0/ln_1/w", "lm_head/w"):
        put(tmp_path, bundle({**arrays, name: np.ones(3, np.float32)}))
        with pytest.raises(CheckpointError, match=f"no use for: {name.removeprefix('model/')}"):
            checkpoints.read(tmp_path)


def test_a_head_of_its_own_is_refused(tmp_path):
    arrays = openai_names(weights())
    put(tmp_path, bundle({**arrays, "lm_head.weight": arrays["model/wte"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        checkpoints.read(tmp_path)


def test_an_integer_among_the_weights_is_refused(tmp_path):
    arrays = openai_names(weights())
    arrays["model/ln_f/g"] = np.ones(8, np.int32)
    put(tmp_path, bundle(arrays))
    with pytest.raises(CheckpointError, match=r"ln_f\.weight is I32; expected one of F64"):
        checkpoints.read(tmp_path)


def test_a_matrix_of_another_shape_is_refused_with_its_shape(tmp_path):
    for shape in ((2, 4, 24), (8, 1, 24), (1, 1, 8, 24), (1, 24, 8)):
        arrays = openai_names(weights())
        arrays["model/h0/attn/c_attn/w"] = arrays["model/h0/attn/c_attn/w"].reshape(shape)
        put(tmp_path, bundle(arrays))
        shown = shape[1:] if shape == (1, 24, 8) else shape
        with pytest.raises(CheckpointError) as caught:
            checkpoints.read(tmp_path)
        assert f"received {shown}" in str(caught.value)


ONE = np.ones((17, 8), np.float32)
NO_MODEL = {
    "nothing": ({}, "token table called model/wte, as in OpenAI's GPT-2, but it is empty"),
    "another program's": ({"a": ONE, "b": ONE}, "model/wte, as in OpenAI's GPT-2, found a, b"),
    "two tables": ({"model/wte": ONE, "wte": ONE}, "found 2: model/wte, wte"),
    "one array twice": ({"model/wte": ONE, "wte.weight": ONE}, "wte.weight stands in it twice"),
    "objects": ({"_CHECKPOINTABLE_OBJECT_GRAPH": ONE, "model/wte": ONE}, "tf.train.Checkpoint"),
}


@pytest.mark.parametrize(("arrays", "expected"), NO_MODEL.values(), ids=NO_MODEL)
def test_what_is_not_openais_is_refused(tmp_path, arrays, expected):
    put(tmp_path, bundle(arrays))
    with pytest.raises(CheckpointError) as caught:
        openai.read(tmp_path / INDEX)
    assert expected in str(caught.value)
    assert str(tmp_path / INDEX) in str(caught.value)


# -- hparams.json ---------------------------------------------------------------------------------


def test_without_hparams_only_the_heads_are_missing(tmp_path):
    put(tmp_path, ours(), hparams=None)
    assert_nano(tmp_path, config={"n_head": 2})
    assert openai.read(tmp_path / INDEX).notes == ["no hparams.json: sizes are those of the arrays"]
    with pytest.raises(ConfigError, match="missing n_head"):
        checkpoints.read(tmp_path)


def test_keys_that_hparams_lacks_are_told_by_the_arrays(tmp_path):
    assert_nano(put(tmp_path, ours(), {"n_head": 2, "res_dropout": 0.1, "attn_dropout": 0.1}))


def test_hparams_that_contradict_the_arrays_are_refused(tmp_path):
    put(tmp_path, ours(), {**HPARAMS, "n_ctx": 13})
    with pytest.raises(CheckpointError, match=r"wpe\.weight expected shape \(13, 8\)"):
        checkpoints.read(tmp_path)
    put(tmp_path, ours(), {**HPARAMS, "n_layer": 10**9})
    with pytest.raises(CheckpointError, match="n_layer = 1000000000, but there are tensors of 2"):
        checkpoints.read(tmp_path)


BAD_HPARAMS = {
    "no JSON": (b"{", "expected JSON"),
    "a list": (b"[]", "expected a JSON object, received list"),
    "nested": (b'{"n_head":' + b"[" * 10**5, "nested too deeply"),
    "long": (b" " * (MIB + 1), "over 1 MiB"),
    "twice": (b'{"n_head": 2, "n_head": 4}', "the key 'n_head' stands in it twice"),
    "unknown key": ({**HPARAMS, "n_inner": 9}, "unknown key 'n_inner'"),
    "long key": ({"k" * 10**5: 1}, f"unknown key '{'k' * 80}'; numpygpt"),
    "unknown nested": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "unknown key 'a'"),
    **{
        f"n_head {str(value)[:9]}": (
            {**HPARAMS, "n_head": value},
            "n_head must be a positive integer, not ",
        )
        for value in (0, -1, 2.0, True, "2", None, [2], {}, 2**31, 10**4000, 1e300)
    },
}


@pytest.mark.parametrize(("hparams", "expected"), BAD_HPARAMS.values(), ids=BAD_HPARAMS)
def test_bad_hparams_are_refused(tmp_path, hparams, expected):
    put(tmp_path, ours(), hparams)
    with pytest.raises(ConfigError) as caught:
        openai.read(tmp_path / INDEX)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'hparams.json'}: ")
    assert len(str(caught.value)) < 500


# -- refusals of the container --------------------------------------------------------------------

FOUR = bytes(4)


def with_header(**changes: Any) -> bytes:
    keys = {"shards": 1, "endianness": 2, "version": 3}
    fields = HEADER | {keys[name]: value for name, value in changes.items()}
    return table({b"": message(sorted(fields.items())), b"a": entry(FOUR)})


def one(value: bytes, key: bytes = b"a") -> bytes:
    """An index of one array, which `value` describes."""
    return table({b"": HEADER_BYTES, key: value})


def of_block(content: bytes) -> bytes:
    """An index of one block, whose checksum is right."""
    return table_of([content], [b"\xff"])


def record(shared: int, own: bytes, value: bytes = b"", length: int | None = None) -> bytes:
    size = varint(len(value) if length is None else length)
    return varint(shared) + varint(len(own)) + size + own + value


RESTARTS = bytes(4) + (1).to_bytes(4, "little")
FIRST = record(0, b"", HEADER_BYTES)
GOOD = one(entry(FOUR))
META = GOOD[:-48].rindex(sealed(block([])))  # where the empty block of metadata starts


def with_footer(*numbers: int, end: bytes = MAGIC) -> bytes:
    """A sound index with another footer: place and size of the metadata and of the index block."""
    footer = b"".join(map(varint, numbers))
    return GOOD[:-48] + footer.ljust(40, b"\0") + end


RECORD = block([(b"", HEADER_BYTES), (b"a", entry(FOUR))])


def handle(start: int, longer: int = 0) -> bytes:
    """Where the one block of `indexed` is said to lie."""
    return varint(start) + varint(len(RECORD) + longer)


def indexed(*handles: bytes, more: bytes = b"") -> bytes:
    """A table of one block, and perhaps another, whose index may say something else."""
    content = sealed(RECORD) + (sealed(more) if more else b"")
    listed = block([(bytes([0x80 + i]), value) for i, value in enumerate(handles)], interval=1)
    footer = b"".join(map(varint, (len(content), 8, len(content) + 13, len(listed))))
    return content + sealed(block([])) + sealed(listed) + footer.ljust(40, b"\0") + MAGIC


END = len(sealed(RECORD))
TRUE_FOOTER = (META, 8, META + 13, len(GOOD) - 48 - 5 - META - 13)
HUGE = 2**63
REFUSED = {
    "empty": (b"", "0 bytes, expected a table"),
    "magic only": (MAGIC, "8 bytes, expected a table"),
    "no magic": (GOOD[:-1], "expected a table with its magic number"),
    "no blocks": (bytes(40) + MAGIC, "do not fill the file"),
    "cut in front": (GOOD[1:], "do not fill the file"),
    "index beyond the end": (with_footer(*TRUE_FOOTER[:3], 10**6), "do not fill the file"),
    "index at 2**63": (with_footer(*TRUE_FOOTER[:2], HUGE, 1), "do not fill the file"),
    "metadata elsewhere": (with_footer(0, 8, *TRUE_FOOTER[2:]), "do not fill the file"),
    "a footer of endless numbers": (GOOD[:-48] + b"\xff" * 40 + MAGIC, "has no end"),
    "padding not zero": (GOOD[:-9] + b"\1" + MAGIC, "do not fill the file"),
    "compressed": (table_of([b"?"], [b"a"], b"\1"), "compressed with snappy; TensorFlow's Saver"),
    "compressed otherwise": (table_of([b"?"], [b"a"], b"\2"), "the unknown method 2"),
    "no header": (table({b"a": entry(FOUR)}), "expected a header under the empty name"),
    "no blocks of records": (table({}), "a block of 8 bytes with 1 places to start at has no"),
    "no records": (of_block(RESTARTS), "a block of 8 bytes with 1 places to start at has no rec"),
    "an empty block": (of_block(b""), "a block of 0 bytes with 0 places"),
    "restarts longer than the block": (of_block(FIRST + b"\xff" * 4), "places to start at"),
    "a shared beginning of nothing": (
        of_block(record(1, b"") + RESTARTS),
        "a name of 1 + 0 bytes",
    ),
    "a value beyond the block": (
        of_block(FIRST + record(0, b"a", b"", length=99) + RESTARTS),
        "a name of 0 + 1 bytes with 99 bytes of value",
    ),
    "a value of 2**63 bytes": (
        of_block(FIRST + record(0, b"a", b"", length=HUGE) + RESTARTS),
        f"with {HUGE} bytes of value",
    ),
    "a long name": (one(entry(FOUR), b"a" * 1001), "a name of 0 + 1001 bytes"),
    "a long name, mostly shared": (
        of_block(FIRST + record(0, b"a" * 900) + record(900, b"a" * 101) + RESTARTS),
        "a name of 900 + 101 bytes",
    ),
    "a record cut": (of_block(FIRST + b"\0" + RESTARTS), "a name of 0 + 0 bytes with"),
    "names in disorder": (
        of_block(FIRST + record(0, b"b", entry(FOUR)) + record(0, b"a") + RESTARTS),
        "b'a' stands in the wrong place, or twice",
    ),
    "a name twice": (
        of_block(FIRST + record(0, b"a", entry(FOUR)) + record(1, b"") + RESTARTS),
        "b'a' stands in the wrong place, or twice",
    ),
    "a name after the block's last": (
        table_of([block([(b"", HEADER_BYTES), (b"b", entry(FOUR))])], [b"a"]),
        "b'b' stands in the wrong place",
    ),
    "blocks in disorder": (
        table_of([block([(b"", HEADER_BYTES), (b"b", b"")]), block([(b"a", b"")])], [b"b"] * 2),
        "b'a' stands in the wrong place",
    ),
    "more behind a handle": (indexed(handle(0) + b"\0"), "expected a block at byte 0, found 0"),
    "a block not at the start": (indexed(handle(1, -1)), "expected a block at byte 0, found 1"),
    "a block into the metadata": (indexed(handle(0, 1)), "expected a block at byte 0, found 0"),
    "one block twice": (indexed(handle(0), handle(0)), f"expected a block at byte {END}, found 0"),
    "a block that is not listed": (indexed(handle(0), more=b"?"), f"blocks end at byte {END}, "),
    "not UTF-8": (one(entry(FOUR), b"\xff"), r"the name b'\xff' is no text"),
    "a control character": (one(entry(FOUR), b"\x1b[2J"), r"the name b'\x1b[2J' is no text"),
    "a slice's key": (one(entry(FOUR), b"\0w"), "a slice of a partitioned variable? Save the"),
    "big-endian": (with_header(endianness=1), "its numbers are big-endian"),
    "no files": (with_header(shards=0), "expected 1 to 99999 files of data, received 0"),
    "too many files": (with_header(shards=10**5), "files of data, received 100000"),
    "2**63 files": (with_header(shards=HUGE), f"files of data, received {HUGE}"),
    "a later version": (
        with_header(version=message([(1, 2), (2, 2)])),
        "needs a reader of version 2, and this is one of version 1",
    ),
    "version a number": (with_header(version=1), "field 3 of a description is repeated, or of"),
    "shards twice": (
        table({b"": HEADER_BYTES * 2, b"a": entry(FOUR)}),
        "field 1 of a description is repeated",
    ),
    "slices": (one(entry(FOUR, slices=b"")), "a: a partitioned variable, stored in slices"),
    "dtype a text": (one(entry(FOUR, dtype=b"")), "a: field 1 of a description is repeated, or of"),
    "shape a number": (one(entry(FOUR, shape=1)), "a: field 2 of a description"),
    "shape over data": (one(entry(FOUR, shape=shape_of(2))), "4 bytes, but F32 of shape [2] takes"),
    "data over shape": (one(entry(FOUR, shape=shape_of(0))), "of shape [0] takes 0"),
    "size under the type": (one(entry(FOUR, dtype=2)), "but F64 of shape [1] takes 8"),
    "negative size": (one(entry(FOUR, shape=shape_of(2**64 - 1))), "a: has an impossible shape"),
    "shape 2**48": (one(entry(b"", shape=shape_of(2**24, 2**24))), "a: has an impossible shape"),
    "0 by 2**62": (one(entry(b"", shape=shape_of(0, 2**62))), "a: has an impossible shape"),
    "nine axes": (one(entry(FOUR, shape=shape_of(*[1] * 9))), "a: has an impossible shape"),
    "unknown rank": (one(entry(FOUR, shape=message([(3, 1)]))), "a: has a shape of unknown rank"),
    "an axis under another number": (one(entry(FOUR, shape=message([(4, b"")]))), "unknown rank"),
    "an axis a number": (one(entry(FOUR, shape=message([(2, 1)]))), "a shape of unknown rank"),
    "a shard too many": (one(entry(FOUR, shard=1)), "a: is in file of data 1, but there"),
    "shard 2**64 - 1": (one(entry(FOUR, shard=2**64 - 1)), "there are only 1"),
    "start 2**63": (one(entry(FOUR, start=HUGE)), f"a: impossible place: 4 bytes from byte {HUGE}"),
    "size 2**64 - 1": (one(entry(FOUR, dtype=7, size=2**64 - 1)), "a: impossible place"),
    "a field beyond the end": (one(b"\x12\x7f"), "a: a field of 127 bytes where 0 are left"),
    "a field of 2**63 bytes": (one(b"\x12" + varint(HUGE)), f"a: a field of {HUGE} bytes"),
    "a fixed number cut": (one(b"\x35\0"), "a: a field of 4 bytes where 1 are left"),
    "an endless number": (one(b"\x08" + b"\x80" * 10), "a: a number that has no end"),
    "a number too long": (one(b"\x08\x81\0"), "a: a number that has no end, or is longer"),
    "a group": (one(b"\x0b"), "a: expected a field, found one of the unknown kind 3"),
}  # fmt: skip


@pytest.mark.parametrize(("index", "expected"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_index_is_refused_with_the_reason(tmp_path, index, expected):
    put(tmp_path, {INDEX: index, DATA: FOUR})
    with pytest.raises(CheckpointError) as caught:
        openai.read(tmp_path / INDEX)
    assert type(caught.value) is CheckpointError
    assert str(caught.value).startswith(f"{tmp_path / INDEX}: ")
    assert expected in str(caught.value)


def test_fields_that_are_not_known_are_passed_over(tmp_path):
    extra = message([(9, 7), (10, b"text"), (11, bytearray(4))]) + b"\x61" + b"\xff" * 8
    put(tmp_path, {INDEX: one(entry(FOUR) + extra), DATA: FOUR})
    np.testing.assert_array_equal(
        read_bundle(tmp_path / INDEX)["a"].read(np.float32), np.zeros(1, np.float32), strict=True
    )


def two(start: int, size: int = 4) -> bytes:
    """An index of an array in bytes 0 to 4, and one more."""
    return table({b"": HEADER_BYTES, b"a": entry(FOUR), b"b": entry(bytes(size), start=start)})


TILING = {
    "truncated": (two(4), bytes(7), "arrays end at byte 8, the file at byte 7: truncated"),
    "no data at all": (one(entry(FOUR)), b"", "the file at byte 0: truncated"),
    "trailing data": (two(4), bytes(9), "the file at byte 9: data that belongs to no array"),
    "a hole": (two(8), bytes(12), "b starts at byte 8, expected 4: it leaves a hole"),
    "a hole in front": (one(entry(FOUR, start=4)), bytes(8), "a starts at byte 4, expected 0"),
    "overlap": (two(2), bytes(6), "b starts at byte 2, expected 4: it overlaps"),
    "one place twice": (two(0), bytes(4), "b starts at byte 0, expected 4: it overlaps"),
    "far away": (two(2**61), bytes(8), f"b starts at byte {2**61}, expected 4"),
}


def test_an_empty_array_may_share_its_place(tmp_path):
    empty = entry(b"", shape=shape_of(0))
    put(tmp_path, {INDEX: table({b"": HEADER_BYTES, b"a": entry(FOUR), b"b": empty}), DATA: FOUR})
    assert [tensor.nbytes for tensor in read_bundle(tmp_path / INDEX).values()] == [4, 0]


@pytest.mark.parametrize(("index", "data", "expected"), TILING.values(), ids=TILING)
def test_arrays_must_tile_the_data(tmp_path, index, data, expected):
    put(tmp_path, {INDEX: index, DATA: data})
    with pytest.raises(CheckpointError) as caught:
        openai.read(tmp_path / INDEX)
    assert str(caught.value).startswith(f"{tmp_path / DATA}: ")
    assert expected in str(caught.value)


def test_a_missing_file_of_data_is_named(tmp_path):
    put(tmp_path, ours(shards=2))
    (tmp_path / "model.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(
        ModelNotFoundError, match=r"data-00001-of-00002: not found, but model\.ckpt"
    ):
        openai.read(tmp_path / INDEX)


def test_a_name_too_long_for_its_files_of_data_is_refused(tmp_path):
    path = tmp_path / ("m" * 249 + ".index")
    path.write_bytes(GOOD)
    with pytest.raises(ModelNotFoundError, match="data-00000-of-00001: not found"):
        openai.read(path)


def test_a_path_that_is_no_index_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"expected a name that ends in \.index"):
        checkpoints.read(tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="No such file"):
        openai.read(tmp_path / INDEX)
    (tmp_path / INDEX).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        openai.read(tmp_path / INDEX)


# -- damage at large ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [INDEX, DATA])
def test_a_file_cut_at_any_byte_is_refused(tmp_path, name):
    put(tmp_path, bundle({"a": np.ones((3, 2), np.float32), "b": np.ones(5, np.float16)}))
    read_bundle(tmp_path / INDEX)
    for size in reversed(range((tmp_path / name).stat().st_size)):
        os.truncate(tmp_path / name, size)
        with pytest.raises(CheckpointError, match=rf"{name}.*(truncated|magic)"):
            read_bundle(tmp_path / INDEX)


def test_the_fixture_cut_at_any_byte_is_refused(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    for size in reversed(range((tmp_path / INDEX).stat().st_size)):
        os.truncate(tmp_path / INDEX, size)
        with pytest.raises(CheckpointError, match=INDEX):
            openai.read(tmp_path / INDEX)


def changed(path: pathlib.Path, change: int) -> Iterator[int]:
    """Every place of a file in turn, with the bits of `change` flipped in its byte."""
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(path.read_bytes()):
            for value in (byte ^ change, byte):
                file.seek(at)
                file.write(bytes([value]))
                if value != byte:
                    yield at


@pytest.mark.hostile
@pytest.mark.parametrize("change", [1, 0x80, 0xFF])
def test_any_changed_byte_of_the_index_is_noticed(tmp_path, change):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    for _ in changed(tmp_path / INDEX, change):
        with pytest.raises(CheckpointError, match=INDEX):
            openai.read(tmp_path / INDEX)
    assert_nano(tmp_path)


def test_any_changed_byte_of_the_data_is_noticed_when_its_array_is_read(tmp_path):
    arrays = {"a": np.ones((3, 2), np.float32), "b": np.ones(5, np.float16), "c": ONE[:2]}
    put(tmp_path, bundle(arrays))
    for at in changed(tmp_path / DATA, 4):
        tensors = read_bundle(tmp_path / INDEX)  # opening reads no weights
        damaged = "a" if at < 24 else "b" if at < 34 else "c"
        with pytest.raises(CheckpointError, match=f"{DATA}: {damaged} is damaged: its checksum is"):
            tensors[damaged].read(np.float32)
        for name in arrays.keys() - {damaged}:
            read = tensors[name].read(arrays[name].dtype)
            np.testing.assert_array_equal(read, arrays[name], strict=True)


def test_inspect_leaves_checksums_of_arrays_to_read(tmp_path):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    content = bytearray((FIXTURE / DATA).read_bytes())
    content[-1] ^= 1
    (tmp_path / DATA).write_bytes(content)
    report = checkpoints.inspect(tmp_path)
    assert (report.config, report.problems) == (nano(), [])
    with pytest.raises(CheckpointError, match="model/wte is damaged"):
        checkpoints.read(tmp_path)


def outcome(directory: pathlib.Path, index: bytes) -> str:
    """Why an index beside the fixture's data is refused; empty if it loads."""
    (directory / INDEX).write_bytes(index)
    try:
        source = openai.read(directory / INDEX)
        for tensor in source.tensors.values():
            assert tensor.read(np.float64).shape == tensor.shape
    except (CheckpointError, ModelNotFoundError) as error:
        return str(error)
    held = sum(tensor.nbytes for tensor in read_bundle(directory / INDEX).values())
    assert held == (directory / DATA).stat().st_size
    return ""


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("beside")
    shutil.copytree(FIXTURE, directory, dirs_exist_ok=True)
    return directory


# The one block of records, and the footer, of the index that TensorFlow wrote.
TAIL = FIXTURE.joinpath(INDEX).read_bytes()[-48:]
RECORDS = FIXTURE.joinpath(INDEX).read_bytes()
RECORDS = RECORDS[: RECORDS[:-48].rindex(sealed(block([]))) - 5]
EDIT = st.tuples(st.integers(0, len(RECORDS)), st.integers(0, 3), st.binary(max_size=3))


@given(st.lists(EDIT, max_size=3))
def test_an_edited_index_with_right_checksums_loads_or_is_refused_and_nothing_else(beside, edits):
    content = RECORDS
    for at, count, new in edits:
        content = content[:at] + new + content[at + count :]
    refusal = outcome(beside, of_block(content))
    assert str(beside) in refusal or not refusal


@given(st.binary(max_size=60))
def test_any_description_of_an_array_is_refused_and_nothing_else(beside, value):
    assert str(beside) in outcome(beside, one(value))


@given(st.binary(max_size=40), st.binary(max_size=60))
def test_any_header_and_any_block_is_refused_and_nothing_else(beside, header, content):
    assert INDEX in outcome(beside, table({b"": header}))
    assert str(beside) in outcome(beside, of_block(FIRST + content + RESTARTS))


@given(st.binary(max_size=300), st.integers(0, len(RECORDS)))
def test_random_bytes_after_a_sound_beginning_are_refused(beside, junk, kept):
    assert INDEX in outcome(beside, RECORDS[:kept] + junk)
    assert INDEX in outcome(beside, RECORDS[:kept] + junk + TAIL)


# -- hostile sizes --------------------------------------------------------------------------------

# Their checksums are right, and computed by the code under test: bit by bit takes too long.


def quickly_sealed(content: bytes) -> bytes:
    return content + b"\0" + masked(crc32c(content + b"\0")).to_bytes(4, "little")


def large_table(contents: list[bytes]) -> bytes:
    """A table of blocks that need not be sound."""
    parts, at, records = [], 0, b""
    for i, content in enumerate(contents):
        handle = varint(at) + varint(len(content))
        records += record(0, b"\xff" + i.to_bytes(4, "big"), handle)
        parts.append(quickly_sealed(content))
        at += len(parts[-1])
    footer = b""
    for content in (RESTARTS, records + RESTARTS):
        footer += varint(at) + varint(len(content))
        parts.append(quickly_sealed(content))
        at += len(parts[-1])
    return b"".join(parts) + footer.ljust(40, b"\0") + MAGIC


def long_names(count: int) -> bytes:
    """A block of names of 990 bytes, of which all but the last five are shared: 8 bytes each."""
    rest = [record(985, b"%05d" % i) for i in range(1, count)]
    return FIRST + record(0, b"/" * 985 + b"00000") + b"".join(rest) + RESTARTS


# A description of 990 bytes: fields that are not known.
LONG = b"\x48\1" * 495
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "over 1 MiB": (lambda: bytes(MIB) + MAGIC, "over 1 MiB"),
    "shared names": (lambda: large_table([long_names(100_000)]), "over 10000 arrays"),
    "as many shared names as may be": (lambda: large_table([long_names(10_000)]), "token table"),
    "a name of 1 MB": (
        lambda: large_table([FIRST + record(0, b"a" * 10**6) + RESTARTS]),
        "a name of 0 + 1000000 bytes",
    ),
    "a description of 1 MB": (
        lambda: large_table([FIRST + record(0, b"a", LONG * 1000) + RESTARTS]),
        "with 990000 bytes of value",
    ),
    "long descriptions": (
        lambda: large_table(
            [block([(b"", HEADER_BYTES)] + [(b"%03d" % i, LONG) for i in range(250)])]
        ),
        "token table",
    ),
    "blocks of one array": (
        lambda: large_table(
            [FIRST + RESTARTS, *(record(0, b"%05d" % i) + RESTARTS for i in range(10**4))]
        ),
        "token table",
    ),
    "blocks of nothing": (
        lambda: large_table([FIRST + RESTARTS] + [RESTARTS] * 35_000), "no records"
    ),
    "terabytes": (
        lambda: one(entry(FOUR, shape=shape_of(2**40), size=2**42)),
        "its arrays end at byte 4398046511104, the file at byte 4: truncated",
    ),
}  # fmt: skip


@pytest.mark.hostile
@pytest.mark.parametrize(("make", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_takes_little_time_and_memory(tmp_path, make, expected):
    index = make()
    put(tmp_path, {INDEX: index, DATA: FOUR if "truncated" in expected else b""})
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            openai.read(tmp_path / INDEX)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Tracing takes several times as long as reading, which may take 10 s.
    assert time.process_time() - started < 20
    assert expected in str(caught.value)
    assert peak < 2 * len(index) + 64 * MIB
