"""The kernels of torch stay within the bounds of rounding, in float32, bfloat16 and float16.

``pytest tests/oracles/test_bounds.py -s`` prints how much of the bounds they use up.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch.nn import functional as F  # noqa: E402

from numpygpt.params import MLP, Attention, Block, Config, Linear, Norm, Params  # noqa: E402
from numpygpt.verify.arithmetic import arithmetic  # noqa: E402
from numpygpt.verify.bounds import bound  # noqa: E402
from numpygpt.verify.comparison import apart  # noqa: E402
from numpygpt.verify.operations import Program  # noqa: E402
from numpygpt.verify.propagation import expect  # noqa: E402

pytestmark = pytest.mark.oracle

DTYPES = ["float32", "bfloat16", "float16"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# Each operation sees some 10**5 numbers in each dtype: together 10**6 and more.
T, C, F_, H = 128, 768, 3072, 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(seed: int, *shape: int, dtype: str, scale: float = 1.0, outliers: bool = False):
    """Random numbers as a tensor of a dtype; some features 100 to 3000 times the others."""
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal(shape)
    if outliers:
        places = rng.choice(shape[-1], 4, replace=False)
        x[..., places] *= 10 ** rng.uniform(2, 3.4, 4)
    return torch.tensor(x, dtype=getattr(torch, dtype))


def wide(x) -> np.ndarray:
    return x.to(torch.float64).numpy()


def program(length: int = T, **arrays) -> Program:
    """The right program with the arrays of one operation."""
    config = Config(
        vocab_size=1, n_ctx=1, n_embd=C, n_layer=1, n_head=H,
        activation_function=arrays.get("activation", "gelu_new"),
    )  # fmt: skip
    none = Linear(None, None)
    block = Block(
        Norm(*arrays.get("ln_1", (None, None))),
        Attention(Linear(*arrays.get("c_attn", none)), none),
        Norm(None, None),
        MLP(none, Linear(*arrays.get("c_proj", none))),
    )
    params = Params(None, np.zeros(1), (block,), block.ln_1, arrays.get("head"))
    return Program(np.zeros(length, np.int64), config, params)


def used(right: Program, name: str, given: dict[str, np.ndarray], found, dtype: str) -> float:
    """The largest difference in likely bounds."""
    a, y = arithmetic(dtype), right.compute(name, given)
    likely = bound(right, name, given, y, a).likely
    ratio = apart("", wide(found).reshape(y.shape), y, likely, a)
    print(f"{name} {dtype} {ratio.size} numbers: {ratio.max():.3f}, median {np.median(ratio):.3f}")
    return float(ratio.max())


@every_dtype
@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
def test_linear(dtype, outliers):
    x = numbers(0, T, F_, dtype=dtype, outliers=outliers)
    w = numbers(1, C, F_, dtype=dtype, scale=0.02)
    b = numbers(2, C, dtype=dtype)
    right = program(c_proj=(wide(w).T, wide(b)))
    found = F.linear(x, w, b)
    assert used(right, "h.0.mlp.out", {"h.0.mlp.post": wide(x)}, found, dtype) <= 1


@every_dtype
def test_linear_of_one_token(dtype):
    """Another kernel: a matrix times a vector."""
    w, b = numbers(1, C, F_, dtype=dtype, scale=0.02), numbers(2, C, dtype=dtype)
    right = program(c_proj=(wide(w).T, wide(b)))
    for seed in range(20):
        x = numbers(seed, 1, F_, dtype=dtype)
        found = F.linear(x, w, b)
        assert used(right, "h.0.mlp.out", {"h.0.mlp.post": wide(x)}, found, dtype) <= 1


@every_dtype
def test_unembedding(dtype):
    x, w = numbers(0, T, C, dtype=dtype), numbers(1, 1000, C, dtype=dtype, scale=0.14)
    assert used(program(head=wide(w)), "logits", {"ln_f": wide(x)}, x @ w.T, dtype) <= 1


@every_dtype
@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
def test_layer_norm(dtype, outliers):
    g, b = 1 + numbers(1, C, dtype=dtype, scale=0.2), numbers(2, C, dtype=dtype, scale=0.2)
    right = program(ln_1=(wide(g), wide(b)))
    for offset in (0.0, 5.0):
        x = numbers(3, T, C, dtype=dtype, outliers=outliers) + offset
        found = F.layer_norm(x, (C,), g, b, 1e-5)
        assert used(right, "ln_f", {"h.0.resid_post": wide(x)}, found, dtype) <= 1


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_softmax(dtype, scale):
    scores = numbers(0, H, T, T, dtype=dtype, scale=scale)
    hidden = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    found = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    given = {"h.0.attn.scores": wide(scores)}
    assert used(program(), "h.0.attn.pattern", given, found, dtype) <= 1


@every_dtype
@pytest.mark.parametrize(
    ("name", "function"),
    [("gelu_new", lambda x: F.gelu(x, approximate="tanh")), ("gelu", F.gelu), ("silu", F.silu)],
    ids=["gelu_new", "gelu", "silu"],
)
def test_activations(dtype, name, function):
    right = program(activation=name)
    for scale in (1.0, 10.0, 1e-3):
        x = numbers(0, T, F_, dtype=dtype, scale=scale)
        given = {"h.0.mlp.pre": wide(x)}
        assert used(right, "h.0.mlp.post", given, function(x), dtype) <= 1


@every_dtype
def test_gelu_in_single_steps(dtype):
    """As transformers writes it, each step a tensor of the dtype."""
    x = numbers(0, T, F_, dtype=dtype, scale=2.0)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    found = 0.5 * x * (1.0 + torch.tanh(inner))
    assert used(program(), "h.0.mlp.post", {"h.0.mlp.pre": wide(x)}, found, dtype) <= 1


@every_dtype
def test_products_of_attention(dtype):
    q, k, v = (numbers(seed, H, T, C // H, dtype=dtype) for seed in range(3))
    scores = q @ k.mT / math.sqrt(C // H)
    qkv = np.concatenate([wide(x).transpose(1, 0, 2).reshape(T, C) for x in (q, k, v)], 1)
    given = {"h.0.attn.qkv": qkv}
    assert used(program(), "h.0.attn.scores", given, scores, dtype) <= 1
    hidden = torch.triu(torch.ones(T, T, dtype=torch.bool), 1)
    pattern = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
    given |= {"h.0.attn.pattern": wide(pattern)}
    assert used(program(), "h.0.attn.heads", given, pattern @ v, dtype) <= 1


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["usual scores", "scores of 40"])
def test_attention_in_one_piece(dtype, scale):
    """Scores and pattern stay inside: the reach over three operations. Measured: 0.1 to 0.3."""
    q, k, v = (numbers(seed, H, T, C // H, dtype=dtype, scale=scale) for seed in range(3))
    heads = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    qkv = np.concatenate([wide(x).transpose(1, 0, 2).reshape(T, C) for x in (q, k, v)], 1)
    a = arithmetic(dtype)
    (each,) = expect(program(), ["h.0.attn.heads"], {"h.0.attn.qkv": qkv}, a)
    ratio = apart("", wide(heads), each.value, each.bound.likely, a)
    print(f"attention {dtype} {ratio.size} numbers: {ratio.max():.3f}")
    assert ratio.max() <= 1


@every_dtype
def test_mistakes_lie_beyond(dtype):
    """The test of these tests: the epsilon outside the root, where the variance is 1e-4."""
    x = numbers(3, T, C, dtype=dtype, scale=0.01)
    g, b = torch.ones(C, dtype=x.dtype), torch.zeros(C, dtype=x.dtype)
    deviation = x.double().std(-1, keepdim=True, unbiased=False)
    found = (x.double() - x.double().mean(-1, keepdim=True)) / (deviation + 1e-5)
    right = program(ln_1=(wide(g), wide(b)))
    assert used(right, "ln_f", {"h.0.resid_post": wide(x)}, found, dtype) > 1
