"""Each mistake of the gallery, made, is found where it belongs and named first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import nano, random_ids, random_params

from numpygpt.api import Model
from numpygpt.verify import verify
from numpygpt.verify.gallery import Mistake, gallery
from numpygpt.verify.operations import OPERATIONS, Program, kind_of
from numpygpt.verify.propagation import evaluate

LENGTH = 10

# Models on which all mistakes can be made. The vocabulary is no multiple of 8, so it has padding;
# twelve layers have an order of names.
MODELS = {
    "plain": nano(n_embd=24, n_head=4, n_layer=3, n_inner=40),
    "other": nano(
        n_embd=24, n_head=4, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True,
        activation_function="gelu", layer_norm_epsilon=1e-12,
    ),
    "deep": nano(n_embd=24, n_head=4, n_layer=11),
}  # fmt: skip

# These only show where scores are large, on models of their own.
LARGE = ("mask of -1e4", "softmax without subtracting the maximum")


def program(name: str, factor: float = 1.0) -> Program:
    config = MODELS[name]
    params = random_params(config, seed=4)
    if factor != 1:
        for block in params.h:
            block.attn.c_attn.w[:, : 2 * config.n_embd] *= factor
    return Program(random_ids(config, LENGTH), config, params, chunks=(6, 3, 1))


RIGHT = {name: program(name) for name in MODELS} | {"large": program("plain", 150.0)}


def cases() -> list:
    found, seen = [], set()
    for model, right in RIGHT.items():
        names = {each.name for each in gallery(right)}
        for number, mistake in enumerate(gallery(right)):
            if (mistake.name in LARGE) == (model == "large") and (
                mistake.name not in seen or model == "large"
            ):
                found.append(pytest.param(model, number, id=f"{model}-{number}-{mistake.name}"))
        seen |= names
    return found


def run(wrong: Program) -> dict[str, np.ndarray]:
    """Everything a wrong program computes, as a program in float32 would have recorded it."""
    with np.errstate(all="ignore"):
        arrays = dict(evaluate(wrong, wrong.names, {}))
        return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize(("model", "number"), cases())
def test_each_is_found_in_its_place_and_named_first(model, number):
    right = RIGHT[model]
    mistake = gallery(right)[number]
    arrays = run(mistake.made(right))
    (report,) = verify(
        arrays, Model(right.config, right.params), ids=right.ids, chunks=right.chunks
    )
    assert report.verdict == "wrong"
    assert kind_of(report.first.name) in mistake.kinds
    best = report.first.explanations[0]
    assert best.mistakes == (mistake.name,)
    assert best.reproduces


@pytest.mark.parametrize("model", ["plain", "other", "large"])
def test_kinds_are_where_a_mistake_shows_and_nowhere_else(model):
    """With right inputs, every other operation gives what is right."""
    right = RIGHT[model]
    inputs = dict(evaluate(right, right.names, {}))
    for mistake in gallery(right):
        wrong = mistake.made(right)
        changed = set()
        for name in right.names:
            given = {key: array for key, array in inputs.items() if key != name}
            with np.errstate(all="ignore"):
                try:
                    ((_, value),) = evaluate(wrong, [name], given)
                except KeyError:
                    continue
            if not np.array_equal(value, inputs[name], equal_nan=True):
                changed.add(kind_of(name))
        assert changed <= set(mistake.kinds), mistake.name


def test_there_are_many_and_each_says_why():
    names = set()
    for right in RIGHT.values():
        for mistake in gallery(right):
            names.add(mistake.name)
            assert mistake.why
            assert mistake.kinds
            assert set(mistake.kinds) <= set(OPERATIONS)
    assert len(names) >= 65


def test_what_cannot_be_made_is_left_out():
    config = nano(bias=False, n_layer=1)
    right = Program(random_ids(config, 4), config, random_params(config), chunks=(4,))
    names = {mistake.name for mistake in gallery(right)}
    for name in (
        "MLP biases missing",
        "positions start again in each pass",
        "mask aligned with the first query of a pass",
        "inverse-layer scale added",
        "token table instead of the head",
        "layers in the order of their names",
    ):
        assert name not in names


def test_a_mistake_changes_the_weights_before_the_programs_own_storage_does():
    right = dataclasses.replace(RIGHT["plain"], storage=lambda program, name, array: array + 1)
    doubled = Mistake("doubled", "", ("embed",), edit=lambda program, name, array: 2 * array)
    raw = right.params.wpe
    assert np.array_equal(doubled.made(right).weight("wpe"), 2 * raw + 1)


def form(name: str, kind: str) -> Mistake:
    """The form of a mistake that shows at an operation."""
    return next(m for m in gallery(RIGHT["plain"]) if m.name == name and kind in m.kinds)


SCORES, PATTERN = "h.{i}.attn.scores", "h.{i}.attn.pattern"


@pytest.mark.parametrize(
    ("one", "other", "pair"),
    [
        (form("scores not scaled", SCORES), form("queries and keys swapped", SCORES), True),
        (
            form("attention biases missing", "h.{i}.attn.qkv"),
            form("weights rounded to bfloat16", "h.{i}.attn.qkv"),
            True,
        ),
        (form("mask shows the next token", PATTERN), form("scores scaled twice", SCORES), False),
        (
            form("positions from 1", "embed"),
            form("MLP not added to the stream", "h.{i}.resid_post"),
            False,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Mistake) else "",
)
def test_two_mistakes_are_named_where_they_are(one, other, pair):
    """In one operation as a pair, in two operations each at its own."""
    right = RIGHT["plain"]
    arrays = run(other.made(one.made(right)))
    (report,) = verify(
        arrays, Model(right.config, right.params), ids=right.ids, chunks=right.chunks
    )
    best = [each.explanations[0].mistakes for each in report.findings if each.explanations]
    if pair:
        assert {one.name, other.name} in map(set, best)
    else:
        assert (one.name,) in best
        assert (other.name,) in best


def test_with_logits_alone_the_mistake_is_named():
    """Through all operations; those that are not causal on all tokens."""
    right = RIGHT["plain"]
    model = Model(right.config, right.params)
    for name in ("exact (erf) GELU instead of gelu_new", "mask missing", "softmax over queries"):
        mistake = next(each for each in gallery(right) if each.name == name)
        logits = run(mistake.made(right))["logits"]
        (report,) = verify({"logits": logits}, model, ids=right.ids, chunks=right.chunks)
        assert report.first.name == "logits"
        assert report.first.inputs == ("ids",)
        assert report.first.explanations[0].mistakes == (name,)
