"""Files of torch.save against PyTorch: the same numbers, and the logits of the models they are of.

``pytest tests/oracles/test_torch_files.py -s`` prints the largest differences.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch_writer as tw
from support import config_json, nano, random_ids, random_tensors

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from fixtures import make_torch as models  # noqa: E402
from torch.utils.serialization import config as settings  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt import checkpoints  # noqa: E402
from numpygpt.checkpoints.torch_files import TorchFile  # noqa: E402
from numpygpt.errors import CheckpointError  # noqa: E402
from numpygpt.params import Config  # noqa: E402

pytestmark = pytest.mark.oracle

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "torch"
FLOATS = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}

# Both sides compute in float64 from the same float64 weights. Measured: at most 1.3e-15 of the
# largest logit; the other GELU moves the logits by 1.3e-4 of it and more.
TOLERANCE, OTHER_GELU = 1e-10, 1e-5

CONFIG = Config(vocab_size=53, n_ctx=32, n_embd=64, n_layer=3, n_head=4)
IDS = random_ids(CONFIG, 24).tolist()


def changed(**changes: Any) -> Config:
    return Config(**{**vars(CONFIG), **changes})


def theirs(model: Any) -> np.ndarray:
    """Logits (T, V) of a torch model."""
    with torch.no_grad():
        out = model.eval()(torch.tensor([IDS]))
    return (out.logits if hasattr(out, "logits") else out)[0].numpy()


def gap(path: pathlib.Path, expected: np.ndarray, fields: dict[str, Any]) -> float:
    """The largest difference of logits, as a fraction of the largest logit."""
    found = numpygpt.load(path, dtype="float64", config=fields).logits(IDS)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -- models ------------------------------------------------------------------------------------


def wrapped(config: Config) -> Any:
    """What a training program saves: nanoGPT's is a dict, minGPT's the state dict alone."""

    def nanogpt(state: Any) -> Any:
        return {"model": state, "model_args": models.model_args(config), "iter_num": 1}

    def build_nanogpt(state: Any) -> Any:
        told = models.GPTConfig(config.n_ctx, config.vocab_size, config.n_layer, config.n_head,
                                config.n_embd)  # fmt: skip
        return {"model": state, "config": told, "step": 1}

    return nanogpt, build_nanogpt


UNTIED = {"tie_word_embeddings": False}
KINDS = {
    "nanogpt": (models.nanogpt, changed(), "gelu", "gelu_new"),
    "nanogpt without biases": (models.nanogpt, changed(bias=False), "gelu", "gelu_new"),
    "build-nanogpt": (models.build_nanogpt, changed(), "gelu_new", "gelu"),
    "minGPT": (models.mingpt, changed(**UNTIED), "gelu_new", "gelu"),
    "minGPT before 2022": (models.OldMinGPT, changed(**UNTIED), "gelu", "gelu_new"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_that_was_saved(tmp_path, kind, zipped):
    build, config, gelu, other = KINDS[kind]
    model = models.fill(build(config).double(), random_tensors(config, 3))
    expected = theirs(model)
    content, fields = model.state_dict(), {"n_head": 4}
    nanogpt, build_nanogpt = wrapped(config)
    if "nano" in kind:
        content = (build_nanogpt if kind == "build-nanogpt" else nanogpt)(content)
        fields = {}
    path = tmp_path / "ckpt.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distance = gap(path, expected, fields)
    print(f"{kind}: {distance:.1e}")
    assert len(caught) == ("nano" in kind)
    assert distance <= TOLERANCE
    assert gap(path, expected, {**fields, "activation_function": gelu}) <= TOLERANCE
    wrong = gap(path, expected, {**fields, "activation_function": other})
    print(f"{kind} with {other}: {wrong:.1e}")
    assert wrong > OTHER_GELU


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("fields", [{}, UNTIED, {"activation_function": "gelu", "n_inner": 100}],
                         ids=["tied", "untied", "odd"])  # fmt: skip
def test_logits_of_transformers_from_its_state_dict(tmp_path, fields, zipped):
    config = changed(**fields)
    told = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.n_ctx, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager", **fields,
    )  # fmt: skip
    model = models.fill(transformers.GPT2LMHeadModel(told).double(), random_tensors(config, 4))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    told.save_pretrained(tmp_path)
    distance = gap(tmp_path, theirs(model), {})
    print(f"transformers {fields}: {distance:.1e}")
    assert distance <= TOLERANCE


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bfloat16_model_has_the_numbers_of_its_file(tmp_path, zipped):
    told = config_json(CONFIG)
    tensors = random_tensors(CONFIG, 5)
    state = {name: torch.tensor(array).bfloat16() for name, array in tensors.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.json").write_text(json.dumps(told))
    model = models.fill(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config.from_dict(told, attn_implementation="eager")
        ).double(),
        {name: tensor.double().numpy() for name, tensor in state.items()},
    )
    assert gap(tmp_path, theirs(model), {}) <= TOLERANCE


# -- files -------------------------------------------------------------------------------------


def as_numpy(tensor: Any) -> np.ndarray:
    """The exact numbers of a tensor, bfloat16 as float32."""
    plain = tensor.detach()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def assert_same(path: pathlib.Path, expected: dict[str, Any]) -> None:
    """Every tensor of a file has the numbers, the shape and the type that torch gave it."""
    found = TorchFile(path).tensors()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        if tensor.dtype in (torch.bool, torch.uint8, torch.int64):
            with pytest.raises(CheckpointError, match="expected one of"):
                found[name].read(np.float32)
            continue
        array = found[name].read(found[name].exact)
        np.testing.assert_array_equal(array, as_numpy(tensor), strict=True, err_msg=name)


@contextlib.contextmanager
def saving(**options: Any) -> Iterator[None]:
    """Set torch's options for saving for a while."""
    before = {name: getattr(settings.save, name) for name in options}
    try:
        for name, value in options.items():
            setattr(settings.save, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(settings.save, name, value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_protocol(tmp_path, protocol, zipped):
    expected = models.views()
    path = tmp_path / "views.pt"
    torch.save(expected, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(path, expected)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with _metadata
    whole = {"model": state, "args": models.GPTConfig(1, 2, 3, 4, 5), "loss": np.float64(2.5),
             "lr": np.float32(1), "betas": (0.9, 0.95), "path": pathlib.PosixPath("a"),
             "device": torch.device("cpu"), "dtype": torch.bfloat16,
             "size": torch.Size([2])}  # fmt: skip
    torch.save(whole, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(path, state)


@pytest.mark.parametrize("alignment", [1, 2, 4, 64, 512, 4096])
@pytest.mark.parametrize("crc", [True, False], ids=["crc32", "no crc32"])
def test_every_alignment_and_checksum(tmp_path, alignment, crc):
    expected = models.views()
    with saving(storage_alignment=alignment, compute_crc32=crc):
        torch.save(expected, tmp_path / "views.pt")
    assert_same(tmp_path / "views.pt", expected)


def test_files_without_a_record_of_their_byte_order(tmp_path):
    expected = models.views()
    torch.save(expected, tmp_path / "views.pt", _disable_byteorder_record=True)
    assert_same(tmp_path / "views.pt", expected)


def test_a_file_that_was_written_to_memory(tmp_path):
    expected = models.views()
    with (tmp_path / "views.pt").open("wb") as file:
        torch.save(expected, file)
    assert_same(tmp_path / "views.pt", expected)


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_the_committed_views_are_what_torch_loads(name):
    path = FIXTURES / "views" / f"{name}.pt"
    assert_same(path, torch.load(path, weights_only=True))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_loads_what_the_writer_of_the_base_tests_makes(tmp_path, legacy):
    """Otherwise those tests would be of a format of their own."""
    arrays = {**random_tensors(nano(), 6, np.float32), "half": np.arange(5, dtype=np.float16),
              "double": np.arange(5.0), "scalar": np.array(2.5), "mask": np.ones((2, 2), np.uint8),
              "empty": np.zeros((0, 3), np.float32), "flag": np.array([True, False])}  # fmt: skip
    path = tmp_path / "written.pt"
    path.write_bytes(tw.save(arrays, legacy))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array, strict=True)
    if not legacy:
        mapped = torch.load(path, weights_only=True, mmap=True)
        np.testing.assert_array_equal(mapped["wte.weight"].numpy(), arrays["wte.weight"])


def test_the_sign_of_a_negated_view_is_not_lost(tmp_path):
    view = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert view.is_neg()
    torch.save({"a": view}, tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [-2.0, 4.0]
    try:
        found = TorchFile(tmp_path / "a.pt").tensors()["a"].read(np.float32)
    except CheckpointError:
        return
    assert found.tolist() == [-2.0, 4.0]


class Subclass(torch.Tensor):
    """A tensor with a class of its own, which is not among those that are known."""


# What numpygpt has no use for is refused by name, not misread.
OTHERS = {
    "a module": (lambda: torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
    "a sparse tensor": (lambda: {"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
    "a quantised tensor": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, "asks for"
    ),
    "a complex tensor": (lambda: {"a": torch.ones(3, dtype=torch.complex64)}, "ComplexFloatStor"),
    "float8": (lambda: {"a": torch.ones(3).to(torch.float8_e4m3fn)}, "asks for"),
    "uint16": (lambda: {"a": torch.ones(3).to(torch.uint16)}, "asks for"),
    "a meta tensor": (lambda: {"a": torch.ones(3, device="meta")}, "asks for"),
    "a subclass": (lambda: {"a": torch.ones(3).as_subclass(Subclass)}, "asks for"),
    "a nested tensor": (
        lambda: {"a": torch._nested_tensor_from_tensor_list([torch.ones(2), torch.ones(3)])}, "asks"
    ),
    "a generator": (lambda: {"a": torch.ones(3), "rng": torch.Generator()}, "asks for"),
    "a function": (lambda: {"a": torch.ones(3), "f": torch.nn.functional.gelu}, "asks for"),
    "a lone tensor": (lambda: torch.ones(3), "holds a StoredTensor"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, about what it deprecates
def test_other_things_are_refused_by_name(tmp_path, kind, zipped):
    make, message = OTHERS[kind]
    path = tmp_path / "other.pt"
    torch.save(make(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message):
        TorchFile(path).tensors()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_storages_that_are_no_weights_are_left_alone(tmp_path, zipped):
    """A bare storage, and a tensor that is an attribute of a parameter."""
    odd = torch.nn.Parameter(torch.ones(3))
    odd.scale = torch.tensor(0.5)
    state = {"a": torch.arange(3.0), "odd": odd}
    whole = {"model": state, "raw": torch.ones(2).untyped_storage()}
    torch.save(whole, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert_same(tmp_path / "x.pt", state)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive, which holds code"):
        checkpoints.read(tmp_path / "script.pt")


@pytest.mark.parametrize("name", ["nanogpt", "nanogpt_padded", "build_nanogpt", "mingpt",
                                  "mingpt_old"])  # fmt: skip
def test_the_committed_models_compute_what_torch_does(name):
    """The fixtures have float32 weights; both sides compute in float64 from them."""
    build = {"nanogpt_padded": models.nanogpt, "mingpt_old": models.OldMinGPT}.get(
        name) or getattr(models, name)  # fmt: skip
    changes = {"nanogpt_padded": {"bias": False, "vocab_size": 24}, "mingpt": UNTIED,
               "mingpt_old": UNTIED}.get(name, {})  # fmt: skip
    config = nano(**changes)
    tensors = random_tensors(config, models.SEEDS[name], np.float32)
    model = models.fill(build(config).double(), tensors)
    ids = random_ids(config, 12).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    gelu = "gelu_new" if name in ("build_nanogpt", "mingpt") else "gelu"
    fields = {"activation_function": gelu, "n_head": 2}
    found = numpygpt.load(FIXTURES / name, dtype="float64", config=fields).logits(ids)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
