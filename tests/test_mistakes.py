"""Every mistake of the gallery is caught, by the tolerances that correct code passes.

``pytest tests/test_mistakes.py -s`` prints the effect of each beside the tolerance.
"""

from __future__ import annotations

import functools
import math

import oracle
import pytest
from mistakes import MISTAKES
from support import random_ids, random_tensors

from numpygpt import model
from numpygpt.cache import Cache, segments
from numpygpt.params import Config, pack
from numpygpt.plans import Fresh

# GPT-2's proportions, small enough for loops: the first tokens in one pass, the others one by one.
CONFIG = Config(vocab_size=53, n_ctx=32, n_embd=64, n_layer=3, n_head=4)
IDS = random_ids(CONFIG, 20)
PREFILL = 13

# Largest difference to the loop oracle, as a fraction of the largest logit. float32 is held to
# what oracles/test_transformers.py holds it to, float64 to half of what test_model.py does.
# Measured for correct code: 5.8e-7 and 8.5e-16; for the mildest mistake, the erf GELU: 1.3e-4.
TOLERANCE = {"float32": 2e-5, "float64": 1e-14}


def weights(config, large_scores):
    """Token vectors with GPT-2's standard deviation of 0.14, which makes epsilon matter."""
    tensors = random_tensors(config)
    for name, array in tensors.items():
        if name.startswith(("wte", "wpe")):
            array *= 0.28
        if large_scores and name.endswith("c_attn.weight"):
            array *= 200
    return tensors


@functools.cache
def expected(config, large_scores):
    tensors = {name: array.tolist() for name, array in weights(config, large_scores).items()}
    return oracle.forward(IDS.tolist(), tensors, vars(config))["logits"]


def distance(config, tensors, dtype, expected):
    """How far the page is from the oracle."""
    if config.tie_word_embeddings:
        tensors = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    params = pack(config, {name: array.astype(dtype) for name, array in tensors.items()})
    cache, rows, read = Cache(config, dtype=dtype), [], 0
    for length in [PREFILL] + [1] * (len(IDS) - PREFILL):
        laid = segments([length], [cache])
        ids = IDS[read : read + length]
        hidden = model.forward(ids, laid, params, config, Fresh(config).fit(laid))
        rows += model.unembed(hidden, params).tolist()
        read += length
    return oracle.distance(rows, expected)


def changed(config, changes):
    return Config(**{**vars(config), **changes})


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_mistake_is_caught_where_correct_code_passes(mistake, dtype, monkeypatch):
    config = changed(CONFIG, mistake.shown_by)
    tensors, truth = weights(config, mistake.large_scores), expected(config, mistake.large_scores)
    right = distance(config, tensors, dtype, truth)
    mistake.patch(monkeypatch)
    wrong = distance(changed(config, mistake.config), mistake.tensors(tensors), dtype, truth)
    print(f"{mistake.name:40} {dtype} {wrong:.1e}, correct {right:.0e} <= {TOLERANCE[dtype]:.0e}")
    assert right <= TOLERANCE[dtype]
    assert wrong > 4 * TOLERANCE[dtype]
    # The gallery says how large the effect is, to a digit or two.
    assert wrong == mistake.effect or wrong == pytest.approx(mistake.effect, rel=0.25)


def test_no_two_mistakes_have_one_name_and_each_says_why():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 25
    assert all(mistake.why for mistake in MISTAKES)
    assert sum(math.isinf(mistake.effect) for mistake in MISTAKES) == 1
