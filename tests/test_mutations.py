"""Mistakes made in other programs are found, located and named; right ones are not accused.

scripts/mutation_benchmark.py does the same on a larger scale, and oracles/test_mutations.py with
torch. ``pytest tests/test_mutations.py -s`` prints what was said of each mistake.
"""

from __future__ import annotations

import dataclasses
import functools

import mutations
import numpy as np
import pytest
from implementations.mistakes import MISTAKES, NUMPY, of
from implementations.situations import gap
from mutations import IN_THE_FILE, SOME, SUBJECTS, TRUTHS, Both

from numpygpt.verify.gallery import gallery
from numpygpt.verify.operations import OPERATIONS, Program, kind_of

# What float64 leaves of a difference that is none. Measured: 7e-16.
SAME = 1e-12

EVERY = [("NumPy port", "float32", mistake) for mistake in of(NUMPY)]
EVERY += [("NumPy port", "float64", mistake) for mistake in SOME[::3]]
EVERY += [
    ("numpygpt", storage, mistake)
    for storage, every in (("float64", 4), ("float32", 4), ("bfloat16", 1), ("int8", 2))
    for mistake in [each for each in SOME if each in IN_THE_FILE][::every]
]


@pytest.mark.parametrize(("subject", "dtype", "mistake"), EVERY)
def test_a_mistake_is_found_located_and_named(subject, dtype, mistake):
    (where,) = mutations.situations(mistake, ["nano"])
    arrays = mutations.wrong_run(subject, dtype, where, mistake)
    dump = mutations.dump_of(arrays, where, SUBJECTS[subject].declared(dtype))
    report = mutations.ask(dump, where)
    first, truth = report.first, mutations.truth_of(mistake, where.config)
    assert first is not None
    said = first.explanations[0].mistakes if first.explanations else ()
    print(f"{subject:10} {dtype:8} {mistake:28} {first.name:16} {first.ratio:.1e} {said}")
    assert report.verdict == "wrong"
    assert mutations.is_located(report, truth)
    assert mutations.is_named(report, truth) == (True, True)


@pytest.mark.parametrize("kind", ["hidden states", "logits"])
@pytest.mark.parametrize("mistake", SOME[::3])
def test_with_less_in_the_dump(mistake, kind):
    (where,) = mutations.situations(mistake, ["nano"])
    arrays = mutations.wrong_run("NumPy port", "float32", where, mistake)
    dump = mutations.dump_of(arrays, where, ("float32", None), kind)
    report = mutations.ask(dump, where)
    assert report.verdict == "wrong"
    assert mutations.is_located(report, TRUTHS[mistake])
    assert mutations.is_named(report, TRUTHS[mistake])[0]


@pytest.mark.parametrize(
    ("subject", "dtype"),
    [(name, dtype) for name in ("NumPy port", "numpygpt") for dtype in SUBJECTS[name].dtypes],
)
def test_no_false_alarm(subject, dtype):
    for kind, report in mutations.right_answers(subject, dtype, seed=1):
        largest = max(report.findings, key=lambda finding: finding.ratio)
        assert report.verdict == "rounding", (kind, report.first)
        assert report.first is None
        assert largest.ratio <= 1


PAIRS = [
    Both("erf_gelu", "no_scale"),
    Both("eps_1e-6", "positions_from_1"),
    Both("ddof_1", "ln_no_shift"),
    Both("heads_not_merged", "c_proj_transposed"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_mistakes_are_both_named(pair):
    answer = mutations.judge_pair(pair)
    assert mutations.both_show(pair)
    assert answer.located
    assert answer.named


# -- the truth itself -----------------------------------------------------------------------------


def test_there_is_a_truth_about_every_mistake():
    assert TRUTHS.keys() == MISTAKES.keys()
    assert set(SOME) <= TRUTHS.keys()
    assert all(kind in OPERATIONS for truth in TRUTHS.values() for kind in truth.kinds)


@functools.cache
def names_in_the_gallery():
    where = mutations.checkpoint("nano")
    found = set()
    for changes in ({}, {"scale_attn_by_inverse_layer_idx": True, "n_layer": 11}):
        config = dataclasses.replace(where.config, tie_word_embeddings=not changes, **changes)
        params = mutations.params_of(where)
        program = Program(np.array(where.ids), config, params, (3, 5))
        found |= {mistake.name for mistake in gallery(program)}
    return found


@pytest.mark.parametrize("mistake", TRUTHS)
def test_its_name_is_the_gallery_s(mistake):
    if mistake in ("float16_accumulation", "dropout_on"):
        return  # made out from the numbers alone, without a gallery
    truth = mutations.truth_of(mistake, mutations.checkpoint("nano").config)
    assert sum(name.startswith(truth.name) for name in names_in_the_gallery()) == 1


@pytest.mark.parametrize("mistake", of(NUMPY))
def test_its_place_is_the_first_array_that_it_changes(mistake):
    (where,) = mutations.situations(mistake, ["nano"])
    wrong = mutations.wrong_run("NumPy port", "float64", where, mistake)
    right = mutations.right_run("NumPy port", "float64", where.key)
    changed = next(
        name for name in right if name in wrong and mutations.far(wrong[name], right[name]) > SAME
    )
    # A program that skips a layer or a norm leaves arrays out; then it is the first that follows.
    assert kind_of(changed) in TRUTHS[mistake].kinds


# The other way round there: the file is grouped by head, here; the reading is, there.
@pytest.mark.parametrize("mistake", [each for each in IN_THE_FILE if each != "qkv_interleaved"])
def test_a_mistake_in_the_file_is_the_one_in_the_program(mistake):
    """Made twice: here in the file or the config, there in the code of another program."""
    (where,) = mutations.situations(mistake, ["nano"])
    ours = mutations.wrong_run("numpygpt", "float64", where, mistake)["logits"]
    theirs = mutations.wrong_run("NumPy port", "float64", where, mistake)["logits"]
    assert gap(ours, theirs) < SAME


def test_the_independent_measure_sees_a_mistake_and_no_rounding():
    where = mutations.checkpoint("nano")
    run = functools.partial(mutations.right_run, "NumPy port", "float32", where.key)
    right, truth = run(False), run(True)
    wrong = mutations.wrong_run("NumPy port", "float32", where, "relu")
    exact = SUBJECTS["NumPy port"].exact(where, "float32", "relu").dump(where.ids)
    assert mutations.visible(wrong, right, exact, truth, list(exact)) > 1000
    assert mutations.visible(right, right, truth, truth, list(truth)) == 0
