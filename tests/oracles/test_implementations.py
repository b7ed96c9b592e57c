"""The torch programs that others are verified with: right when they should be, wrong when told.

``pytest tests/oracles/test_implementations.py -s`` prints what each mistake does to the logits.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from implementations import (  # noqa: E402
    hooked_transformers,
    mingpt_style,
    nanogpt_style,
    numpy_port,
)
from implementations.mistakes import CHUNKS, MISTAKES, of  # noqa: E402
from implementations.situations import (  # noqa: E402
    IDS,
    Situation,
    dump,
    gap,
    logits_gap,
    right_logits,
    situation,
    unit,
)
from support import nano, random_params, random_tensors, write_checkpoint  # noqa: E402

import numpygpt  # noqa: E402

pytestmark = pytest.mark.oracle

# float64 rounds at 1.1e-16. Measured: 1.6e-15. The mildest mistake moves the logits by 8e-5.
SAME = 1e-12

# fmt: off
PROGRAMS = {
    "nanoGPT manual": (nanogpt_style, {"attention": "manual"}),
    "nanoGPT fused": (nanogpt_style, {"attention": "fused"}),
    "minGPT": (mingpt_style, {}),
    "transformers eager": (hooked_transformers, {"attention": "eager"}),
    "transformers sdpa": (hooked_transformers, {"attention": "sdpa"}),
}
# What a program cannot show: torch's own attention keeps it inside, hooks see no scores.
HIDDEN = {
    "nanoGPT fused": {"scores", "pattern"}, "transformers eager": {"scores"},
    "transformers sdpa": {"scores", "pattern"},
}
CONFIGS = {
    "nano": {}, "n_inner": {"n_inner": 20, "n_head": 4}, "no bias": {"bias": False},
    "own head, layer scale": {
        "tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True
    },
    "no scale": {"scale_attn_weights": False}, "exact": {"activation_function": "gelu"},
}
# fmt: on


def mistakes_of(name: str) -> list[str]:
    """The mistakes that one of PROGRAMS can make."""
    program, options = PROGRAMS[name]
    inside = getattr(program, "INSIDE_ATTENTION", ())
    limited = options.get("attention") in ("fused", "sdpa")
    own = of(program.__name__.rpartition(".")[2])
    return [each for each in own if not (limited and each in inside)]


MADE = [(name, mistake) for name in PROGRAMS for mistake in mistakes_of(name)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("chunks", [None, [3, 1, 4]], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_array_is_the_trace(name, config, chunks):
    program, options = PROGRAMS[name]
    config = nano(**CONFIGS[config])
    where = Situation(config, random_tensors(config), chunks)
    if program is mingpt_style and chunks:
        with pytest.raises(ValueError, match="no cache"):
            dump(program, where)
        return
    expected = numpygpt.Model(config, random_params(config)).trace(IDS)
    arrays = dump(program, where, **options)
    missing = {key.rpartition(".")[2] for key in expected.keys() - arrays.keys()}
    assert missing == HIDDEN.get(name, set())
    for key, array in arrays.items():
        assert array.dtype == np.float64
        assert gap(array, expected[key]) < SAME, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lower_dtypes_from_a_file(name, dtype, tmp_path):
    """Activations are in the dtype, widened: rounding them to it again changes nothing."""
    program, options = PROGRAMS[name]
    path = write_checkpoint(tmp_path / "model", nano())
    arrays = program.build(path, dtype, **options).dump(IDS)
    assert {array.dtype.name for array in arrays.values()} == {"float32"}
    kind = getattr(torch, dtype)
    for key, array in arrays.items():
        again = torch.from_numpy(array).to(kind).float().numpy()
        assert np.array_equal(array, again), key
    expected = numpygpt.load(path, dtype="float64").logits(IDS)
    assert unit(dtype) / 100 < gap(arrays["logits"], expected) < 100 * unit(dtype)


@functools.cache
def ported(mistake):
    """The logits of the NumPy program with a mistake."""
    return dump(numpy_port, situation(MISTAKES[mistake].when), mistake=mistake)["logits"]


@pytest.mark.parametrize(("name", "mistake"), MADE)
def test_a_mistake_moves_the_logits_to_where_it_does_in_numpy(name, mistake):
    """Written four times from one line, it gives the same logits, unless it has variants."""
    program, options = PROGRAMS[name]
    when, variants = MISTAKES[mistake].when, MISTAKES[mistake].variants
    wrong = dump(program, situation(when), mistake=mistake, **options)["logits"]
    size = gap(wrong, right_logits(program, when, tuple(options.items())))
    print(f"{name:20} {mistake:28} {size:.1e}")
    assert size > 100 * unit("float64")
    assert variants or gap(wrong, ported(mistake)) < SAME


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name, mistake in MADE if MISTAKES[mistake].when]
)
def test_without_its_condition_it_does_not(name, mistake):
    program, options = PROGRAMS[name]
    assert logits_gap(program, mistake, "", **options) < SAME


@pytest.mark.parametrize("name", PROGRAMS)
def test_dropout_is_the_same_every_time(name):
    program, options = PROGRAMS[name]
    model = program.build(situation()[:2], mistake="dropout_on", **options)
    assert np.array_equal(model.dump(IDS)["logits"], model.dump(IDS)["logits"])


def test_what_a_program_cannot_do_is_refused():
    source = situation(CHUNKS)[:2]
    for program in (nanogpt_style, mingpt_style, hooked_transformers):
        with pytest.raises(ValueError, match="cannot make the mistake 'gelo'"):
            program.build(source, mistake="gelo")
    with pytest.raises(ValueError, match="fused attention cannot make"):
        nanogpt_style.build(source, mistake="mask_after_softmax", attention="fused")
    with pytest.raises(ValueError, match="sdpa attention cannot make"):
        hooked_transformers.build(source, mistake="mask_after_softmax", attention="sdpa")
    with pytest.raises(ValueError, match="mingpt_style cannot make"):
        mingpt_style.build(source, mistake="positions_restart")
