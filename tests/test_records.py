"""Run records: what is hashed, what is recorded, and that every difference is found."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_params, random_tensors, write_checkpoint

import numpygpt
from numpygpt import records
from numpygpt.convert import convert
from numpygpt.errors import ArgumentError
from numpygpt.params import pack, shapes
from numpygpt.records import Difference, compare, describe, differences, environment, plain

CONFIG = nano()


# -- the hash of the weights -------------------------------------------------------------------


def hash_by_hand(config: Any, tensors: dict[str, np.ndarray]) -> str:
    """The documented bytes, one number at a time."""
    data = b""
    for name in shapes(config):
        array = tensors[name]
        data += f"{name} {list(array.shape)}\n".encode()
        for row in array.reshape(-1).tolist():
            data += struct.pack("<f", row)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"bias": False}], ids=str)
def test_the_hash_is_that_of_the_documented_bytes(changes, kind):
    config = nano(**changes)
    tensors = random_tensors(config, dtype=kind)
    expected = hash_by_hand(config, tensors)
    assert records.weights_sha256(config, pack(config, tensors)) == expected


@pytest.mark.parametrize("piece", [1, 100, 2**24])
@pytest.mark.parametrize("layout", ["transposed", "strided", "big-endian"])
def test_the_hash_does_not_depend_on_how_arrays_lie_in_memory(monkeypatch, layout, piece):
    tensors = random_tensors(CONFIG, dtype="float32")
    expected = records.weights_sha256(CONFIG, pack(CONFIG, tensors))
    change = {
        "transposed": np.asfortranarray,
        "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        "big-endian": lambda a: a.astype(">f4"),
    }[layout]
    monkeypatch.setattr(records, "PIECE_BYTES", piece)
    changed = pack(CONFIG, {name: change(array) for name, array in tensors.items()})
    assert records.weights_sha256(CONFIG, changed) == expected


def test_the_hash_is_the_same_for_one_model_in_every_format(tmp_path):
    # GGUF and llm.c store the matrices transposed.
    source = write_checkpoint(tmp_path / "source", CONFIG)
    found = set()
    for name in ("copy", "copy.npz", "copy.gguf", "copy.bin"):
        convert(source, tmp_path / name)
        model = numpygpt.load(tmp_path / name)
        found.add(records.weights_sha256(model.config, model.params))
    model = numpygpt.load(source)
    assert found == {records.weights_sha256(model.config, model.params)}


@pytest.mark.parametrize("name", list(shapes(CONFIG)))
def test_the_last_bit_of_any_number_changes_the_hash(name):
    tensors = random_tensors(CONFIG, dtype="float32")
    before = records.weights_sha256(CONFIG, pack(CONFIG, tensors))
    tensors[name].flat[-1] = np.nextafter(tensors[name].flat[-1], np.float32(9))
    assert records.weights_sha256(CONFIG, pack(CONFIG, tensors)) != before


def test_arrays_that_change_places_change_the_hash():
    tensors = random_tensors(CONFIG, dtype="float32")
    before = records.weights_sha256(CONFIG, pack(CONFIG, tensors))
    tensors["ln_f.weight"], tensors["ln_f.bias"] = tensors["ln_f.bias"], tensors["ln_f.weight"]
    assert records.weights_sha256(CONFIG, pack(CONFIG, tensors)) != before


# -- what is recorded --------------------------------------------------------------------------


def test_the_environment_has_versions_blas_and_threads(monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_TOKEN", "do not record")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    found = environment()
    assert found["numpy"] == np.__version__
    assert found["numpygpt"] == numpygpt.__version__
    assert found["blas"]["name"] == np.show_config("dicts")["Build Dependencies"]["blas"]["name"]
    assert found["variables"]["OPENBLAS_CORETYPE"] == "Haswell"
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in found["variables"]
    assert found["cpus"] == os.cpu_count()
    assert found["bit_generator"] == "PCG64"  # of NumPy 1.17 to 2.4; another would change draws
    assert "do not record" not in json.dumps(found)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(records, "_version", lambda name, real=records._version: real("no-such"))
    assert environment()["tiktoken"] is None


def test_plain_values_are_json_without_nan():
    value = {
        1: np.float32(0.5),
        "array": np.array([[1.0, np.nan], [np.inf, -0.0]]),
        "flags": (np.True_, False),
        "path": pathlib.PurePosixPath("a/b"),
        "none": None,
        "ids": np.array([3, 4], np.uint16),
        "config": nano(),
    }
    found = plain(value)
    assert found == {
        "1": 0.5,
        "array": [[1.0, None], [None, 0.0]],
        "flags": [True, False],
        "path": "a/b",
        "none": None,
        "ids": [3, 4],
        "config": vars(nano()),
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def made(**changes: Any) -> dict[str, Any]:
    """A record of a run that never was."""
    model = describe("nano", CONFIG, random_params(CONFIG))
    results = {"ids": [3, 1], "logprobs": [-0.25, float("nan")], "text": "ab"}
    return records.record("test", model, {"seed": 7}, results | changes, ["top_k 2"])


def save(path: pathlib.Path, value: Any) -> pathlib.Path:
    path.write_text(json.dumps(value, allow_nan=False))
    return path


def test_a_record_survives_its_file(tmp_path):
    record = made()
    found = records.read(save(tmp_path / "r.json", record), "test")
    assert found == record
    assert found["results"]["logprobs"] == [-0.25, None]
    assert found["filters"] == ["top_k 2"]
    assert found["model"]["config"]["n_layer"] == CONFIG.n_layer
    assert compare(found, made()) == (None, 0, None, [])


# -- comparing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "path", "before", "after"),
    [
        ({"ids": [3, 2]}, "results.ids[1]", 1, 2),
        ({"ids": [3]}, "results.ids[1]", 1, records.ABSENT),
        ({"ids": [3, 1, 4]}, "results.ids[2]", records.ABSENT, 4),
        ({"logprobs": [-0.25, -1.0]}, "results.logprobs[1]", None, -1.0),
        ({"logprobs": [np.nextafter(-0.25, 0), None]}, "results.logprobs[0]", -0.25, None),
        ({"text": "ac"}, "results.text", "ab", "ac"),
        ({"text": None}, "results.text", "ab", None),
        ({"more": 1}, "results.more", records.ABSENT, 1),
        ({"ids": {"0": 3}}, "results.ids", [3, 1], {"0": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_difference_of_the_results_is_named(changes, path, before, after):
    comparison = compare(made(), made(**changes))
    if path == "results.logprobs[0]":
        after = float(changes["logprobs"][0])
    both = isinstance(before, float) and isinstance(after, float)
    apart = abs(before - after) if both else None
    assert comparison == (Difference(path, before, after), 1, apart, [])


def test_all_places_are_counted():
    assert compare(made(), made(ids=[0, 0, 0], text="")).places == 4


def test_the_largest_of_several_differences_is_told_if_only_numbers_differ():
    before, after = made(logprobs=[-1.0, -2.0, -3.0]), made(logprobs=[-1.5, -2.0, -3.25])
    assert compare(before, after).largest == 0.5
    assert compare(before, made(logprobs=[-1.5, -2.0, -3.25], text="ac")).largest is None


def test_what_differs_around_the_results_is_listed(monkeypatch):
    before = made()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "17")
    after = made()
    after["model"]["weights_sha256"] = "0" * 64
    after["environment"]["blas"]["version"] = "0.0"
    comparison = compare(before, after)
    assert comparison.result is None
    assert [difference.path for difference in comparison.around] == [
        "model.weights_sha256",
        "environment.blas.version",
        "environment.variables.OPENBLAS_NUM_THREADS",
    ]


def test_true_is_not_1_and_1_is_1_point_0():
    assert len(list(differences([True, 1, False, 0.0], [1, True, 0, False], "x"))) == 4
    assert list(differences([1, 0.0, -0.0], [1.0, 0, 0.0], "x")) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_two_values_differ_in_no_place_exactly_if_they_are_equal(a, b):
    # Python takes True for 1; JSON does not. Spelling numbers as floats leaves only that apart.
    def spelled(value: Any) -> str:
        return json.dumps(value, sort_keys=True)

    def floats(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: floats(item) for name, item in value.items()}
        if isinstance(value, list):
            return [floats(item) for item in value]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) + 0.0 if number else value  # -0.0 + 0.0 is 0.0

    assert list(differences(a, a, "x")) == []
    same = spelled(floats(a)) == spelled(floats(b))
    assert (list(differences(a, b, "x")) == []) is same


# -- damaged records ---------------------------------------------------------------------------


def test_a_key_that_is_missing_or_of_another_type_is_named(tmp_path):
    for name in records.KEYS:
        for value in (None, 3, [3] if name != "filters" else "x"):
            changed = {**made(), name: value}
            with pytest.raises(ArgumentError, match=f"expected a .* as {name}, found"):
                records.read(save(tmp_path / "r.json", changed), "test")
    for name in records.MODEL_KEYS:
        changed = made()
        del changed["model"][name]
        with pytest.raises(ArgumentError, match=rf"as model\.{name}, found nothing"):
            records.read(save(tmp_path / "r.json", changed), "test")


BAD = {
    "empty": (b"", "expected JSON"),
    "text": (b"hello", "expected JSON"),
    "a list": (b"[1]", "expected a JSON object, received list"),
    "not UTF-8": (b'{"a": "\xff"}', "expected JSON"),
    "a key twice": (b'{"verb": "a", "verb": "b"}', "'verb' stands in it twice"),
    "deep": (b'{"results":' * 100_000, "nested too deeply|expected JSON"),
    "a large number": (b'{"results": ' + b"9" * 5000 + b"}", "expected JSON"),
    "another verb": (b"", "a record of 'other', expected one of 'test'"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_damaged_record_is_refused(tmp_path, how):
    data, message = BAD[how]
    path = tmp_path / "r.json"
    path.write_bytes(json.dumps({**made(), "verb": "other"}).encode() if how[:3] == "ano" else data)
    with pytest.raises(ArgumentError, match=message):
        records.read(path, "test")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ArgumentError, match="not a regular file"):
        records.read(tmp_path / "fifo", "test")


def test_what_is_no_file_is_refused(tmp_path):
    for path, message in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "not a regular file"),
        ("a\0b", "null byte|null character"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            records.read(path, "test")


def test_no_more_than_the_largest_record_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "r.json", made())
    monkeypatch.setattr(records, "LARGEST", path.stat().st_size)
    assert records.read(path, "test") == made()
    monkeypatch.setattr(records, "LARGEST", path.stat().st_size - 1)
    with pytest.raises(ArgumentError, match="a record has at most"):
        records.read(path, "test")


@given(st.data())
def test_a_changed_byte_is_an_error_or_another_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "r.json"
    whole = json.dumps(made()).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    byte = data.draw(st.binary(min_size=1, max_size=1))
    path.write_bytes(whole[:at] if cut else whole[:at] + byte + whole[at + 1 :])
    try:
        found = records.read(path, "test")
    except ArgumentError:
        return
    assert not cut
    compare(found, made())  # must not crash
