"""The verb ``trace``, and traces of several passes."""

# The fixtures of test_cli are arguments here, too.
# ruff: noqa: F811

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_ids, random_params
from test_cli import CONFIG, check_error, cli, model, pipe, terminal  # noqa: F401

import numpygpt
from numpygpt.checkpoints.safetensors import SafetensorsFile
from numpygpt.errors import ArgumentError, ContextError, TokenError
from numpygpt.plans import trace_names
from numpygpt.records import weights_sha256
from numpygpt.verify.tracing import trace_chunks

IDS = [3, 1, 4, 1, 5]


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a dump, values as JSON where they are."""
    file = SafetensorsFile(path)
    kinds = {"F32": "f4", "F64": "f8"}
    arrays = {n: file.read(n, np.dtype(kinds[e.dtype])) for n, e in file.entries.items()}
    metadata: dict[str, Any] = dict(file.metadata)
    for name in metadata.keys() & {"ids", "chunks", "config"}:
        metadata[name] = json.loads(metadata[name])
    return arrays, metadata


def trace(cli: Any, model: str, path: pathlib.Path, *options: str) -> Any:
    return cli("trace", "--ids", "3,1,4,1,5", "--model", model, "-o", str(path), *options)


# -- what it writes ----------------------------------------------------------------------------


def test_every_intermediate_is_written_in_float64(cli, model, tmp_path):
    path = tmp_path / "a.safetensors"
    result = trace(cli, model, path)
    exact = numpygpt.load(model, "float64")
    arrays, metadata = read(path)
    expected = exact.trace(IDS)
    assert (result.code, result.err) == (0, "")
    size = sum(array.nbytes for array in expected.values())
    assert result.out == (
        f"wrote {path}: {len(expected)} arrays of 5 tokens, float64, {size / 1e6:.1f} MB\n"
    )
    assert sorted(arrays) == sorted(trace_names(CONFIG.n_layer))
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
    assert metadata == {
        "format": "numpygpt-trace",
        "format_version": "1",
        "ids": IDS,
        "dtype": "float64",
        "producer": f"numpygpt {numpygpt.__version__}",
        "model_sha256": weights_sha256(exact.config, exact.params),
        "config": vars(exact.config),
    }


@pytest.mark.parametrize(
    ("dtype", "computed", "weights"),
    [
        ("float32", "float32", None),
        ("float64", "float64", None),
        ("bfloat16", "float32", "bfloat16"),
        ("int8", "float32", "int8"),
    ],
)
def test_a_storage_is_told_apart_from_what_is_computed_in(
    cli, model, tmp_path, dtype, computed, weights
):
    path = tmp_path / "a.safetensors"
    result = trace(cli, model, path, "--dtype", dtype)
    arrays, metadata = read(path)
    assert f", {dtype}, " in result.out
    assert (metadata["dtype"], metadata.get("weights")) == (computed, weights)
    assert {array.dtype.name for array in arrays.values()} == {computed}
    expected = numpygpt.load(model, dtype).trace(IDS)["logits"]
    np.testing.assert_array_equal(arrays["logits"], expected)


def test_names_choose_what_is_written(cli, model, tmp_path):
    path = tmp_path / "a.safetensors"
    trace(cli, model, path, "--names", "logits", "h.*.attn.pattern")
    assert sorted(read(path)[0]) == ["h.0.attn.pattern", "h.1.attn.pattern", "logits"]


@pytest.mark.parametrize("how", ["given", "piped"])
def test_a_text_is_encoded(cli, model, tmp_path, monkeypatch, how):
    if how == "piped":
        pipe(monkeypatch, b"the then\n")
    path = tmp_path / "a.safetensors"
    given = ["the then"] * (how == "given")
    assert cli("trace", *given, "--model", model, "-o", str(path), "--names", "ln_f").code == 0
    assert read(path)[1]["ids"] == numpygpt.load(model).tokenizer.encode("the then")


def test_config_fields_are_honoured(cli, model, tmp_path):
    path = tmp_path / "a.safetensors"
    trace(cli, model, path, "--config", "activation_function=relu", "--names", "h.0.mlp.post")
    arrays, metadata = read(path)
    assert (arrays["h.0.mlp.post"] == 0).any()
    assert metadata["config"]["activation_function"] == "relu"


def test_a_file_is_replaced_only_if_that_is_asked_for(cli, model, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("precious")
    check_error(trace(cli, model, path), "is there already; .* or give --overwrite")
    assert path.read_text() == "precious"
    assert trace(cli, model, path, "--overwrite").code == 0
    assert read(path)[1]["ids"] == IDS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.safetensors", "model"]


def test_a_full_disk_leaves_the_old_file(cli, model, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("precious")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    result = trace(cli, model, path, "--overwrite")
    assert (result.code, result.out) == (2, "")
    assert "No space left on device" in result.err
    assert path.read_text() == "precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.safetensors", "model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ids", "99999"], "token id 99999 is outside the vocabulary"),
        (["--ids", "[[1], [2]]"], "token ids in a row"),
        (["--ids", "1,2", "--chunks", "1"], "read 1 tokens together, but there are 2"),
        (["--ids", "1,2", "--chunks", "0,2"], "--chunks expects numbers from 1 up"),
        (["--ids", "1,2", "--names", "h.9.ln_1"], "no intermediate is called 'h.9.ln_1'"),
        (["--ids", "1,2", "--dtype", "float16"], "dtype must be one of"),
        (["--ids", "1,2", "the"], "give a text or --ids, not both"),
        (["--ids", ",".join("1" * 99)], "99 tokens are more than the model's 12 positions"),
        ([], "there is nothing to trace"),
        ([""], "there is nothing to trace"),
    ],
)
def test_what_is_unusable_is_told_in_one_line(cli, model, tmp_path, options, message):
    path = tmp_path / "a.safetensors"
    check_error(cli("trace", *options, "--model", model, "-o", str(path)), message)
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "model", "nowhere/a.safetensors"])
def test_what_cannot_become_a_file_is_refused_before_any_work(
    cli, model, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("numpygpt.cli.options.load", None)
    check_error(cli("trace", "--ids", "1", "-o", name), "expected the name|no directory")


# -- several passes ----------------------------------------------------------------------------

SMALL = nano()
PARAMS = random_params(SMALL)
MODEL = numpygpt.Model(SMALL, PARAMS)


def test_chunks_are_read_with_a_cache_and_recorded(cli, model, tmp_path):
    path = tmp_path / "a.safetensors"
    assert trace(cli, model, path, "--chunks", "3,1,1").code == 0
    arrays, metadata = read(path)
    assert metadata["chunks"] == [3, 1, 1]
    expected = trace_chunks(numpygpt.load(model, "float64"), IDS, [3, 1, 1])
    assert list(expected) == trace_names(CONFIG.n_layer)
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5).filter(lambda c: sum(c) <= 12))
def test_passes_make_the_same_arrays_as_one(chunks):
    ids = random_ids(SMALL, sum(chunks))
    once, passes = MODEL.trace(ids), trace_chunks(MODEL, ids, chunks)
    assert list(passes) == list(once)
    for name, array in once.items():
        # Activations are near 1, sums have at most 32 terms: 32 roundings of 1.1e-16, times the
        # depth of 2 blocks of 6 products, are 4e-14. A key that is missing changes 1e-2.
        np.testing.assert_allclose(passes[name], array, rtol=0, atol=1e-12, strict=True)


def test_one_pass_is_the_trace_itself():
    ids = random_ids(SMALL, 7)
    once, chunked = MODEL.trace(ids), trace_chunks(MODEL, ids, [7])
    for name, array in once.items():
        np.testing.assert_array_equal(chunked[name], array)


def test_each_pass_is_one_of_its_own():
    """Not one pass that was cut: after the first, keys come from the cache."""
    ids = random_ids(SMALL, 6)
    cut = trace_chunks(MODEL, ids, [4, 2], names=["h.0.attn.scores", "h.0.attn.pattern"])
    first = MODEL.trace(ids[:4], names=["h.0.attn.scores"])["h.0.attn.scores"]
    np.testing.assert_array_equal(cut["h.0.attn.scores"][:, :4, :4], first)
    assert np.isneginf(cut["h.0.attn.scores"][:, :4, 4:]).all()
    assert (cut["h.0.attn.pattern"][:, :4, 4:] == 0).all()
    assert np.isfinite(cut["h.0.attn.scores"][:, 5]).all()


def test_only_what_is_named_is_kept():
    made = trace_chunks(MODEL, [1, 2, 3], [2, 1], names=["h.*.mlp.post", "logits"])
    assert list(made) == ["h.0.mlp.post", "h.1.mlp.post", "logits"]
    assert list(trace_chunks(MODEL, [1, 2], [2], names="ln_f")) == ["ln_f"]


@pytest.mark.parametrize(
    ("ids", "chunks", "names", "kind"),
    [
        ([1, 2], [1], None, ArgumentError),
        ([1, 2], [2, 1], None, ArgumentError),
        ([1, 2], [0, 2], None, ArgumentError),
        ([1, 2], [-1, 3], None, ArgumentError),
        ([1, 2], [1.0, 1], None, ArgumentError),
        ([1, 2], [], None, ArgumentError),
        ([1, 2], [2], ["nothing"], ArgumentError),
        ([99], [1], None, TokenError),
        ([], [], None, TokenError),
        ([1] * 13, [13], None, ContextError),
    ],
)
def test_passes_that_cannot_be_are_refused(ids, chunks, names, kind):
    with pytest.raises(kind):
        trace_chunks(MODEL, ids, chunks, names)
