"""Where matrices lie: the same numbers elsewhere, and a file's memory given back."""

from __future__ import annotations

import mmap
import pathlib
import re

import numpy as np
import pytest
from support import nano, random_ids, random_params

import numpygpt
from numpygpt.layout import _forget, fast, order_of


def arrays(params):
    """Every learned array, in a fixed order."""
    for block in params.h:
        for part in (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2):
            yield from part
        for part in (block.mlp.c_fc, block.mlp.c_proj):
            yield from part
    yield from (params.wte, params.wpe, *params.ln_f, params.head)


@pytest.mark.parametrize("tied", [True, False])
def test_the_numbers_are_the_same_and_lie_as_out_in(tied):
    params = random_params(nano(n_embd=80, n_head=4, tie_word_embeddings=tied))
    found = fast(params)
    for new, old in zip(arrays(found), arrays(params), strict=True):
        np.testing.assert_array_equal(new, old)
    for block in found.h:
        for w, _ in (*block.attn, *block.mlp):
            assert w.T.flags.c_contiguous
    assert (found.head is found.wte) == tied
    assert (order_of(params), order_of(found)) == ("C", "F")


def test_what_lies_well_already_is_not_copied():
    once = fast(random_params(nano()))
    twice = fast(once)
    assert all(new is old for new, old in zip(arrays(once), arrays(twice), strict=True))


def test_logits_agree_within_rounding(tmp_path):
    config = nano(n_embd=64, n_head=4, n_ctx=40)
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, 40)
    plain, turned = (numpygpt.Model(config, each).logits(ids) for each in (params, fast(params)))
    # Sums of 256 products in another order: 16 * 6e-8 = 1e-6 of the largest. Measured 3e-7.
    assert 0 <= abs(turned - plain).max() <= 1e-6 * abs(plain).max()


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
    _forget(array)
    assert resident(path) < 0.1 * array.nbytes
    assert array.sum(dtype=np.float64) == total  # it is read again


def test_memory_that_is_no_file_is_left_alone():
    memory = mmap.mmap(-1, 2**20)
    array = np.frombuffer(memory, np.float32)
    array[:] = 7
    array.flags.writeable = False
    _forget(array)
    assert (array == 7).all()


def test_arrays_that_are_not_mapped_are_left_alone():
    array = np.ones((64, 64))
    _forget(array[::2])
    assert (array == 1).all()
