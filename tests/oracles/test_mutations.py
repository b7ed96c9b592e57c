"""Mistakes made in torch programs are found, located and named; right programs are not accused.

A part of scripts/mutation_benchmark.py. ``-s`` prints what was said of each mistake.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

import mutations  # noqa: E402
from mutations import SOME, SUBJECTS  # noqa: E402

pytestmark = pytest.mark.oracle

TORCH = [name for name, subject in SUBJECTS.items() if len(subject.dtypes) == 3]

# Those of SOME whose effect is beyond the bounds of 8 and 11 significant bits with nano weights.
# An epsilon moves a layer norm by 5e-6 of its size, exact GELU differs by 4.7e-4.
LARGE = ("no_scale", "kv_swapped", "c_proj_transposed", "mask_shows_next", "positions_from_1")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = [
    (subject, dtype, mistake)
    for subject in TORCH
    for dtype in SUBJECTS[subject].dtypes
    for mistake in (SOME if dtype == "float32" else LARGE)
    if mistake in SUBJECTS[subject].mistakes
]


@pytest.mark.parametrize(("subject", "dtype", "mistake"), CASES)
def test_a_mistake_is_found_located_and_named(subject, dtype, mistake):
    (where,) = mutations.situations(mistake, ["nano"])
    arrays = mutations.wrong_run(subject, dtype, where, mistake)
    report = mutations.ask(mutations.dump_of(arrays, where, (dtype, None)), where)
    first, truth = report.first, mutations.truth_of(mistake, where.config)
    assert first is not None
    said = first.explanations[0].mistakes if first.explanations else ()
    print(f"{subject:18} {dtype:8} {mistake:28} {first.name:16} {first.ratio:.1e} {said}")
    assert report.verdict == "wrong"
    assert mutations.is_located(report, truth)
    assert mutations.is_named(report, truth) == (True, True)


@pytest.mark.parametrize("subject", TORCH)
def test_hidden_states_are_enough(subject):
    for mistake in ("erf_gelu", "positions_from_1", "c_proj_transposed"):
        (where,) = mutations.situations(mistake, ["odd"])
        arrays = mutations.wrong_run(subject, "float32", where, mistake)
        dump = mutations.dump_of(arrays, where, ("float32", None), "hidden states")
        report = mutations.ask(dump, where)
        assert mutations.is_located(report, mutations.TRUTHS[mistake]), mistake
        assert mutations.is_named(report, mutations.TRUTHS[mistake])[0], mistake


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("subject", "dtype"), [(name, dtype) for name in TORCH for dtype in SUBJECTS[name].dtypes]
)
def test_no_false_alarm(subject, dtype, seed):
    for kind, report in mutations.right_answers(subject, dtype, seed):
        assert report.verdict == "rounding", (kind, report.first)
