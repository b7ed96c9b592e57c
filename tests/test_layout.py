"""Where matrices lie: the same numbers elsewhere, and a file's memory given back."""

from __future__ import annotations

import mmap
import pathlib
import re

import numpy as np
import pytest
from support import nano, random_ids, random_params, write_checkpoint

import numpygpt
from numpygpt.layout import _forget, _mapped, fast, order_of


def arrays(params):
    """Every learned array, in a fixed order."""
    for block in params.h:
        for part in (block.ln_1, *block.attn, block.ln_2, *block.mlp):
            yield from part
    yield from (params.wte, params.wpe, *params.ln_f, params.head)


@pytest.fixture(params=["tied", "untied"])
def model(request, tmp_path):
    """Weights that are mapped from a float32 file."""
    tied = request.param == "tied"
    config = nano(n_embd=80, n_head=4, n_ctx=120, tie_word_embeddings=tied)
    return numpygpt.load(write_checkpoint(tmp_path, config))


def test_the_numbers_are_the_same_and_lie_as_out_in(model):
    found = fast(model.params)
    for new, old in zip(arrays(found), arrays(model.params), strict=True):
        np.testing.assert_array_equal(new, old)
    for block in found.h:
        for w, _ in (*block.attn, *block.mlp):
            assert w.T.flags.c_contiguous
            assert w.flags.writeable  # so it is a copy, not the file
    assert found.wte.flags.writeable
    assert found.head.flags.writeable
    assert (found.head is found.wte) == model.config.tie_word_embeddings
    assert (order_of(model.params), order_of(found)) == ("C", "F")


def test_what_is_not_mapped_stays():
    params = random_params(nano())
    assert all(new is old for new, old in zip(arrays(fast(params)), arrays(params), strict=True))


def test_logits_agree_within_rounding(model):
    ids = random_ids(model.config, 100)
    turned = numpygpt.Model(model.config, fast(model.params)).logits(ids)
    plain = model.logits(ids)
    # Sums of 320 products in another order: 18 * 6e-8 = 1.1e-6 of the largest. Measured 3e-7.
    assert abs(turned - plain).max() <= 1.1e-6 * abs(plain).max()


def test_only_long_runs_copy_and_the_fixed_order_mode_never_does(model, monkeypatch):
    used = []
    monkeypatch.setattr(
        "numpygpt.api.decode", lambda prompts, settings, params, *_: used.append(params) or iter(())
    )
    for settings in ({"max_new_tokens": 63}, {"max_new_tokens": 100, "chunk": 1}):
        model.generate([1], stop_ids=(), **settings)
        assert used.pop() is model.params
    model.generate([1], stop_ids=(), max_new_tokens=64)
    model.generate([1], stop_ids=(), max_new_tokens=100)
    assert used[0] is used[1] is not model.params  # copied once
    assert order_of(used[0]) == "F"


def test_a_long_run_makes_the_tokens_of_a_short_one(model):
    """Its logits differ by rounding, its greedy tokens only where two of them are that close."""
    long = model.generate([1, 2], stop_ids=(), max_new_tokens=100)
    short = model.generate([1, 2], stop_ids=(), max_new_tokens=60)
    close = [m < 1e-5 for m in short.margins]
    until = close.index(True) if any(close) else len(close)
    assert until > 10
    assert long.ids[:until] == short.ids[:until]


# -- the file's memory ----------------------------------------------------------------------------


def resident(path: pathlib.Path) -> int:
    """Bytes of a mapped file that this process holds."""
    total, ours = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def mapped(tmp_path):
    """A file of a million numbers, mapped to be read, and an array over all but its beginning."""
    path = tmp_path / "numbers"
    np.arange(2**20, dtype=np.float32).tofile(path)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return path, np.frombuffer(memory, np.float32, offset=4096).reshape(-1, 1024)


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_what_is_copied_out_of_a_file_is_not_held_twice(mapped):
    path, array = mapped
    total = array.sum(dtype=np.float64)
    assert resident(path) > 0.9 * array.nbytes
    _forget(array, _mapped(array))
    assert resident(path) < 0.1 * array.nbytes
    assert array.sum(dtype=np.float64) == total  # it is read again


def test_memory_that_could_be_written_is_no_file_to_be_read(tmp_path):
    memory = mmap.mmap(-1, 2**20)
    array = np.frombuffer(memory, np.float32)
    array[:] = 7
    array.flags.writeable = False
    assert _mapped(array) is None
    assert _mapped(np.ones((64, 64))) is None
    assert _mapped(object()) is None
