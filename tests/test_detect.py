"""Formats are recognised by content; what is refused is refused with its reason."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from support import nano, random_tensors, safetensors_bytes, write_checkpoint

from numpygpt.checkpoints import inspect, read
from numpygpt.checkpoints.detect import READERS, REFUSED, identify, open_source
from numpygpt.errors import CheckpointError, ModelNotFoundError

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
KNOWN = {
    "flax/tied/flax_model.msgpack": "Flax",
    "gguf/F16.gguf": "GGUF",
    "llmc/model.bin": "llm.c",
    "llmc/debug_state.bin": "llm.c",
    "openai/model.ckpt.index": "TensorFlow",
    "torch/hugging_face_zip/pytorch_model.bin": "PyTorch",
    "torch/hugging_face_legacy/pytorch_model.bin": "PyTorch",
    "torch/hugging_face_shards/pytorch_model.bin.index.json": "index",
}


@pytest.mark.parametrize(("file", "format"), KNOWN.items(), ids=KNOWN)
def test_every_fixture_is_recognised(file, format):
    assert identify(FIXTURES / file) == format
    assert format in READERS


@pytest.mark.parametrize(
    "file", [name for name in KNOWN if KNOWN[name] not in ("index", "TensorFlow")]
)
def test_names_do_not_matter(tmp_path, file):
    for name in ("model.safetensors", "x.gguf", "x"):
        (tmp_path / name).write_bytes((FIXTURES / file).read_bytes())
        assert identify(tmp_path / name) == KNOWN[file]


def test_npz_and_safetensors_are_recognised(tmp_path):
    with (tmp_path / "x.pt").open("wb") as file:
        np.savez(file, a=np.ones(3))
    assert identify(tmp_path / "x.pt") == "npz"
    (tmp_path / "y.pt").write_bytes(safetensors_bytes({"a": np.ones(3)}))
    assert identify(tmp_path / "y.pt") == "safetensors"


@pytest.mark.parametrize("length", [0x3C, 0x81, 0x1F + 0x8B * 256, 0x80 + 2 * 256], ids=hex)
def test_a_header_may_have_any_length(tmp_path, length):
    """The first bytes of a safetensors file are a number, which can be another format's magic."""
    tensors = {"a": np.ones(1, np.float32)}
    header = safetensors_bytes(tensors, pad=1)[8:-4]
    path = tmp_path / "x"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    if length >= len(header):
        assert identify(path) == "safetensors"


@pytest.mark.parametrize("start", REFUSED, ids=ascii)
def test_formats_that_are_refused_are_named(tmp_path, start):
    (tmp_path / "x.bin").write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert REFUSED[start] in str(caught.value)
    assert inspect(tmp_path).problems == [str(caught.value)]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "the file is empty"),
        (b"\xff" * 8 + b"{" + bytes(20), "begins with the bytes ff ff"),
        (b"hello world", "begins with the bytes 68 65"),
        (b"\x80\x06.........", "begins with the bytes 80 06"),
    ],
)
def test_what_is_unknown_is_refused_with_its_first_bytes(tmp_path, content, part):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=part):
        read(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_any_protocol_with_a_header_is_given_to_its_reader(tmp_path, protocol):
    (tmp_path / "x.pt").write_bytes(bytes([0x80, protocol]) + b"N.")
    assert identify(tmp_path / "x.pt") == "PyTorch"


def test_the_preferred_file_of_a_directory_is_that_of_transformers(tmp_path):
    write_checkpoint(tmp_path, nano(), random_tensors(nano(), dtype=np.float32))
    for name in ("pytorch_model.bin", "flax_model.msgpack", "model.ckpt.index", "other.gguf"):
        (tmp_path / name).write_bytes(b"junk")
    assert open_source(tmp_path).format == "safetensors"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "model.ckpt.index"], "pytorch_model.bin"),
        (["model.ckpt.index", "flax_model.msgpack"], "model.ckpt.index"),
        (["flax_model.msgpack", "x.gguf"], "flax_model.msgpack"),
        (["x.gguf", "other.index"], "x.gguf"),
        (["other.index", "README.md"], "other.index"),
    ],
)
def test_one_file_of_a_directory_is_meant(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).write_bytes(b"junk of " + name.encode())
    with pytest.raises(CheckpointError, match=f"{chosen}: no checkpoint that numpygpt knows"):
        open_source(tmp_path)


def test_what_cannot_be_read_is_a_checkpoint_error(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, nano())

    def refuse(self: pathlib.Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: Permission denied"):
        open_source(tmp_path)


def test_several_files_of_one_kind_must_be_named(tmp_path):
    for name in ("a.gguf", "b.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFoundError, match=r"several files could be meant.*a\.gguf, b\.pt"):
        open_source(tmp_path)
