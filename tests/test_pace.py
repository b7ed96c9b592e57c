"""The warning that decoding is far slower than memory: from steps whose times are given."""

from __future__ import annotations

import numpy as np
import pytest
from support import nano, random_params

import numpygpt
from numpygpt.cli import pace
from numpygpt.cli.pace import STEPS, Pace, read_speed, weight_bytes

CONFIG = nano(n_embd=64, n_head=4)


@pytest.fixture
def model(monkeypatch):
    """A model that counts as large, on a machine that reads 1 GB/s."""
    monkeypatch.setattr(pace, "LARGE", 1)
    monkeypatch.setattr(pace, "read_speed", lambda params: 1e9)
    return numpygpt.Model(CONFIG, random_params(CONFIG, dtype=np.float32))


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(pace, "get_threads", lambda: 2)


def after(model, share, steps=STEPS + 1):
    """What is told where each step but the first reached this share of the reading speed."""
    noted = Pace()
    step = weight_bytes(model.params) / (share * 1e9)
    noted.times = [0.0, *(60 + step * np.arange(1, steps)).tolist()]
    return noted.problem(model)


def test_a_step_reads_every_matrix_once(model):
    c = CONFIG
    block = c.n_embd * (3 * c.n_embd + c.n_embd + 2 * c.mlp_dim)
    assert weight_bytes(model.params) == 4 * (c.n_layer * block + c.vocab_size * c.n_embd)


@pytest.mark.parametrize(
    ("share", "told"), [(1.5, False), (0.26, False), (0.24, True), (0.05, True)]
)
def test_only_what_is_far_too_slow_is_told(model, share, told):
    found = after(model, share)
    assert (found is not None) == told
    if told:
        assert f"{1 / share:.0f} times what multiplying by the weights takes" in found
        assert "try --threads 1" in found


def test_nothing_is_told_of_a_few_steps_or_a_small_model(model, monkeypatch):
    assert after(model, 0.05, STEPS) is None
    monkeypatch.setattr(pace, "LARGE", 2**27)
    assert after(model, 0.05) is None


def test_one_thread_waits_for_nobody(model, monkeypatch):
    monkeypatch.setattr(pace, "get_threads", lambda: 1)
    assert after(model, 0.05).endswith("something else uses the processors")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_speed_of_every_storage_is_one(kind):
    model = numpygpt.load("shakespeare", dtype=kind)
    assert 1e6 < read_speed(model.params) < 1e12  # 100 times below and above any machine of today
