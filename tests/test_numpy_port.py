"""The NumPy program that others are verified with: right when it should be, wrong when told.

``pytest tests/test_numpy_port.py -s`` prints what each mistake does to the logits.
"""

from __future__ import annotations

import numpy as np
import pytest
from implementations import numpy_port
from implementations.mistakes import MISTAKES, NUMPY, of
from implementations.situations import IDS, Situation, dump, gap, logits_gap, situation, unit
from support import nano, random_params, random_tensors, write_checkpoint

import numpygpt

# float64 rounds at 1.1e-16. Measured: 7e-16. The mildest mistake moves the logits by 8e-5.
SAME = 1e-12

# fmt: off
CONFIGS = {
    "nano": {}, "n_inner": {"n_inner": 20, "n_head": 4}, "no bias": {"bias": False},
    "own head, layer scale": {
        "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True
    },
    "no scale": {"scale_attn_weights": False}, "exact": {"activation_function": "gelu"},
}
# fmt: on


@pytest.mark.parametrize("chunks", [None, [3, 1, 4], [1] * 8], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_array_is_the_trace(name, chunks):
    config = nano(**CONFIGS[name])
    expected = numpygpt.Model(config, random_params(config)).trace(IDS)
    arrays = dump(numpy_port, Situation(config, random_tensors(config), chunks))
    assert list(arrays) == list(expected)
    for key, array in arrays.items():
        assert array.dtype == np.float64
        assert gap(array, expected[key]) < SAME, key


def test_float32_from_a_file(tmp_path):
    config = nano()
    path = write_checkpoint(tmp_path / "model", config)
    arrays = numpy_port.build(path, "float32").dump(IDS)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}
    expected = numpygpt.load(path, dtype="float64").logits(IDS)
    assert 0 < gap(arrays["logits"], expected) < 100 * unit("float32")


@pytest.mark.parametrize("mistake", of(NUMPY))
def test_a_mistake_moves_the_logits(mistake):
    size = logits_gap(numpy_port, mistake, MISTAKES[mistake].when)
    print(f"{mistake:28} {size:.1e}")
    assert size > 100 * unit("float64")


@pytest.mark.parametrize("mistake", [name for name in of(NUMPY) if MISTAKES[name].when])
def test_without_its_condition_it_does_not(mistake):
    assert logits_gap(numpy_port, mistake, "") == 0


@pytest.mark.parametrize("mistake", of(NUMPY))
def test_float32_stays_float32(mistake):
    arrays = dump(numpy_port, situation(MISTAKES[mistake].when), "float32", mistake)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}


def test_the_table_has_half_precision_inputs():
    # Neighbours in half precision near 1 are 2^-10 apart: one entry serves all between.
    near = numpy_port.gelu_from_table(np.array([1, 1 + 2**-12, 1 + 2**-10]))
    assert near[0] == near[1] < near[2]
    assert numpy_port.gelu_from_table(np.array([-11.0, 11.1])).tolist() == [0, 11.1]


def test_bfloat16_rounds_to_nearest_even():
    stored = numpy_port.build(situation()[:2], mistake="weights_bfloat16").stored
    ulp = 2**-7
    halves = np.array([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2**-20, -1 - ulp / 2])
    assert stored(halves).tolist() == [1, 1 + 2 * ulp, 1 + ulp, -1]


def test_what_it_cannot_do_is_refused():
    config, tensors, _ = situation()
    with pytest.raises(ValueError, match="numpy_port cannot make the mistake 'gelo'"):
        numpy_port.build((config, tensors), mistake="gelo")
    with pytest.raises(ValueError, match=r"chunks \[3, 1\] do not make 8 ids"):
        numpy_port.build((config, tensors)).dump(IDS, [3, 1])
