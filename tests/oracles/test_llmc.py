"""Against PyTorch: llm.c files of models of transformers, written in PyTorch's own numbers.

``pytest tests/oracles/test_llmc.py -s`` prints the largest differences.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from support import nano, random_tensors

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("transformers", reason="needs transformers")

from fixtures import make_llmc  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt.checkpoints import llmc  # noqa: E402
from numpygpt.checkpoints.arrays import Tensor  # noqa: E402

pytestmark = pytest.mark.oracle

CONFIGS = {
    "nano": nano(),
    "one layer": nano(n_layer=1, n_head=1),
    "no filling needed": nano(vocab_size=256),
    "a quarter of small": nano(vocab_size=500, n_ctx=64, n_embd=192, n_layer=3, n_head=3),
    "twelve layers": nano(vocab_size=129, n_ctx=32, n_embd=96, n_layer=12, n_head=6),
}

# Largest difference as a fraction of the largest number of the same array. float64 rounds at
# 1.1e-16, and sums over hundreds of products in a dozen blocks multiply that by a few dozen.
# Measured: 2e-15. With one c_proj transposed: 0.2 and more.
TOLERANCE = 1e-13


def gap(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def tensors(config):
    return random_tensors(config, seed=11, dtype=np.float32)


@pytest.fixture
def model(config, tensors):
    return make_llmc.gpt2(config, tensors)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpt2.bin"


@pytest.mark.parametrize(
    ("dtype", "version"),
    [(torch.float32, 3), (torch.bfloat16, 5), (torch.float32, 1)],
    ids=["float32", "bfloat16", "version 1"],
)
def test_logits_are_those_of_the_weights_that_pytorch_wrote(path, config, model, dtype, version):
    path.write_bytes(make_llmc.model_bytes(model, dtype, version))
    ours = numpygpt.load(path, dtype="float64")
    assert ours.config == config
    ids = make_llmc.batch(config, 1, config.n_ctx)[0]
    with torch.no_grad():
        theirs = model.to(dtype).double()(ids).logits[0].numpy()
    difference = gap(ours.logits(ids[0].tolist()), theirs)
    print(f"version {version}, {config.n_layer} layers: {difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_both_write_the_same_bytes(config, tensors, model, kind):
    file = io.BytesIO()
    stored = {
        name: Tensor("F32", a.shape, a.nbytes, lambda dtype, a=a: a.astype(dtype))
        for name, a in tensors.items()
    }
    llmc.write(file, config, stored, kind)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[kind]
    assert file.getvalue() == make_llmc.model_bytes(model, dtype)


@pytest.mark.parametrize("version", [1, 2])
def test_a_debug_state_is_what_pytorch_computed(path, config, model, version):
    x, y = make_llmc.batch(config, 3, config.n_ctx - 1)
    path.write_bytes(make_llmc.state_bytes(model, x, y, version))
    state = llmc.read_debug_state(path, config)
    np.testing.assert_array_equal(state.x, x.numpy().astype(np.int32), strict=True)
    np.testing.assert_array_equal(state.y, y.numpy().astype(np.int32), strict=True)
    output = model(x)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), y.flatten())
    np.testing.assert_array_equal(state.logits, output.logits.detach().numpy(), strict=True)
    assert state.loss == loss.item()
    theirs = {n.removeprefix("transformer."): p.grad for n, p in model.named_parameters()}
    assert state.grads.keys() == theirs.keys()
    for name, gradient in theirs.items():
        np.testing.assert_array_equal(state.grads[name], gradient.numpy(), strict=True)
