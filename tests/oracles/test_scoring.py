"""Against transformers: the loop of its page on the perplexity of fixed-length models.

``pytest tests/oracles/test_scoring.py -s`` prints the largest differences.

The loop reads tokens begin to end - 1 of each window and takes the loss of those that no earlier
window had. It reads a window's last token, too, which changes nothing, and so cannot have a window
of n_ctx + 1 tokens. Two conventions on the page are others than ours:

- It multiplies each window's mean loss by one token less than the window has targets. That is
  right for the first window, whose first token is no target, and off by one for the others, whose
  first target has a token before it. The mean thus has slightly other weights (1e-4 to 2e-3 nats
  at ordinary strides); with a stride of 1 every window but the first has the weight 0. Older
  versions of the page multiplied by the stride instead. Here each window's loss is multiplied by
  how many targets it has, which is the mean over tokens.
- With a stride of a whole window, the first token of every window is not scored at all. Here the
  stride is at most a window less one, so every token but the first of the text is.
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import numpygpt  # noqa: E402
from numpygpt.checkpoints import find  # noqa: E402
from numpygpt.divergence import divergence  # noqa: E402
from numpygpt.scoring import score  # noqa: E402

pytestmark = pytest.mark.oracle

# Differences of log-probabilities, in nats: the largest of a token, and of the mean over tokens.
# float32 logits near 20 are rounded at 1e-6 and come from sums that multiply this; of the bundled
# model both tools are up to 9e-6 away from float64, and 2e-6 in the root mean square. The losses
# are float32 in transformers whatever the model is in.
# Measured: 2.1e-14 and 1.3e-5 for a token, 6e-7 in the mean.
LARGEST = {"float64": 1e-12, "float32": 4e-5}
MEAN = 1e-5

WAYS = [(64, 32), (64, 63), (64, 1), (17, 5), (2, 1)]


@pytest.fixture(scope="module")
def random_checkpoint():
    """GPT-2's proportions at a sixteenth, with biases and gains that matter; seeded."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "wte" in name or "wpe" in name:
                values.normal_(0, 0.14)
            elif values.ndim == 2:
                values.normal_(0, values.shape[0] ** -0.5)
            else:
                values.normal_(float("ln_" in name and name.endswith("weight")), 0.2)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        yield pathlib.Path(name)


def load(path, dtype):
    return transformers.GPT2LMHeadModel.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def page(model, ids, window, stride) -> tuple[np.ndarray, float, float]:
    """The page's loop: log-probabilities, the total of the losses, and the page's own mean."""
    logprobs = np.full(len(ids), np.nan)
    total = page_sum = page_count = previous = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        fresh = end - previous
        inputs = torch.tensor(ids[begin:end])[None]
        labels = inputs.clone()
        labels[:, :-fresh] = -100
        with torch.no_grad():
            out = model(inputs, labels=labels)
        targets = int((labels[:, 1:] != -100).sum())
        valid = int((labels != -100).sum())
        total += float(out.loss) * targets
        page_sum += float(out.loss) * (valid - 1)
        page_count += valid - 1
        log_p = torch.log_softmax(out.logits[0].double(), -1).numpy()
        places = np.arange(len(ids))[end - targets : end]
        logprobs[places] = log_p[places - 1 - begin, ids[places]]
        previous = end
        if end == len(ids):
            break
    return logprobs[1:], total, page_sum / page_count


def assert_agree(path, ids, window, stride, dtype) -> float:
    ours = numpygpt.load(path, dtype=dtype)
    rows = score(ids, 1, ours.params, ours.config, window=window, stride=stride)
    expected, total, page_mean = page(load(path, dtype), ids, window, stride)
    gap = np.abs(rows.logprobs - expected).max()
    mean = -rows.logprobs.mean()
    in_total = abs(mean - total / len(expected))
    print(
        f"{path.name[:12]:12} {dtype} window {window:3} stride {stride:3}: {gap:.1e} a token, "
        f"{in_total:.1e} in the mean; the page's weights: {abs(page_mean - mean):.1e}"
    )
    assert gap <= LARGEST[dtype]
    assert np.sqrt(np.mean((rows.logprobs - expected) ** 2)) <= MEAN
    assert in_total <= MEAN
    return abs(page_mean - mean)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("window", "stride"), WAYS)
def test_a_random_checkpoint(random_checkpoint, window, stride, dtype):
    ids = np.random.default_rng(1).integers(0, 300, 200)
    assert_agree(random_checkpoint, ids, window, stride, dtype)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("window", "stride"), [(256, 128), (100, 75)])
def test_the_bundled_model(window, stride, dtype):
    path = find("shakespeare")
    text = (path / "README.md").read_text(encoding="utf-8")  # as good as any
    ids = np.array(numpygpt.load(path).tokenizer.encode(text))[:700]
    assert len(ids) == 700
    off = assert_agree(path, ids, window, stride, dtype)
    # What the page's weights change is not rounding. Measured: 1.8e-4 and 1.9e-3.
    assert off > 10 * MEAN


def test_entropy_and_divergence(random_checkpoint):
    """Against torch's own distributions, in float64."""
    ids = np.random.default_rng(2).integers(0, 300, 60)
    ours = numpygpt.load(random_checkpoint, dtype="float64")
    rounded = numpygpt.load(random_checkpoint, dtype="float32")
    shaken = ours.params._replace(wpe=ours.params.wpe * 1.5)
    theirs = load(random_checkpoint, "float64")
    other = load(random_checkpoint, "float64")
    with torch.no_grad():
        other.transformer.wpe.weight.mul_(1.5)
        p, q = (
            torch.distributions.Categorical(logits=model(torch.tensor(ids)[None]).logits[0, :-1])
            for model in (theirs, other)
        )
        entropy = p.entropy().numpy()
        kl = torch.distributions.kl_divergence(p, q).numpy()
    rows = score(ids, 1, ours.params, ours.config, window=64)
    found = divergence(ids, 1, (ours.params, ours.config), (shaken, ours.config), window=64)
    gaps = [np.abs(a - b).max() for a, b in ((rows.entropies, entropy), (found.kl, kl))]
    print(f"entropy {gaps[0]:.1e}, KL {gaps[1]:.1e} of {kl.min():.1e} to {kl.max():.1e}")
    assert kl.min() > 1e-3
    np.testing.assert_allclose(rows.entropies, entropy, rtol=0, atol=LARGEST["float64"])
    np.testing.assert_allclose(found.kl, kl, rtol=0, atol=LARGEST["float64"])
    # The same model in float32: errors of the logits enter squared.
    near = divergence(
        ids, 1, (ours.params, ours.config), (rounded.params, rounded.config), window=64
    )
    print(f"float32 against float64: KL {near.mean_kl:.1e}")
    assert 0 < near.mean_kl < MEAN**2
