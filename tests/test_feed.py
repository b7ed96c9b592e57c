"""Reading tokens on and on: what a decoding step takes, and gives back."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support import nano, random_params

import numpygpt
from numpygpt.cache import Cache
from numpygpt.feed import Feeder

resource = pytest.importorskip("resource", reason="Windows does not count page faults so")

CONFIG = nano(n_ctx=1024, n_embd=64, n_head=4, vocab_size=5000)
STEPS = 1000


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, dtype=np.float32)


def faults() -> int:
    """Pages that this process was given so far."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def test_a_thousand_steps_take_no_more_memory_than_a_hundred(params):
    feeder, cache = Feeder(params, CONFIG, 1, STEPS + 1), Cache(CONFIG, STEPS + 1)
    cache.keys.fill(0)  # or its pages would be given out while the cache fills
    cache.values.fill(0)
    logits = np.empty((1, CONFIG.vocab_size), np.float32)
    traced, pages = [], []
    tracemalloc.start()
    try:
        for step in range(STEPS):
            feeder.logits(feeder.last([np.array([step])], [cache]), out=logits)
            if step >= 100:
                traced.append(tracemalloc.get_traced_memory()[0])
                pages.append(faults())
    finally:
        tracemalloc.stop()
    # An array of a step's that stayed would take 256 bytes and its own 100; of logits 20 kB. What
    # is counted though it is free: Python keeps up to 2,000 small tuples, about one more each
    # step. Measured: 160 bytes a step, and 40 pages in all.
    assert (traced[-1] - traced[0]) / len(traced) < 250
    assert pages[-1] - pages[0] < 200


def test_generating_keeps_nothing_of_a_step_but_its_token(params):
    traced = []
    model = numpygpt.Model(CONFIG, params)
    tracemalloc.start()
    try:
        model.generate(
            [1],
            max_new_tokens=STEPS,
            stop_ids=(),
            on_step=lambda steps: traced.append(tracemalloc.get_traced_memory()[0]),
        )
    finally:
        tracemalloc.stop()
    # A token, its log-probability and its margin: three objects of 24 to 32 bytes and their places
    # in lists, which grow by an eighth; and tuples as above. A row of logits would be 20,000
    # bytes. Measured: 264.
    assert (traced[-1] - traced[100]) / (STEPS - 100) < 400
