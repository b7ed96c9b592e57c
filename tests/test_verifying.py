"""The whole verification: what passes, what is accused, and what is said about it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from support import nano, random_ids, random_params, write_checkpoint

import numpygpt
from numpygpt import ops
from numpygpt.api import Model
from numpygpt.errors import ArgumentError, DumpError
from numpygpt.verify import Dump, dumps, verify, verify_dump
from numpygpt.verify.arithmetic import ARITHMETICS, arithmetic, rounded
from numpygpt.verify.comparison import Given, margins
from numpygpt.verify.operations import OPERATIONS, Program
from numpygpt.verify.propagation import evaluate

CONFIG = nano(n_embd=24, n_head=4, n_layer=3, n_inner=40)
IDS = random_ids(CONFIG, 10)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(CONFIG, random_params(CONFIG, dtype=np.float32))


@pytest.fixture
def arrays(model) -> dict[str, np.ndarray]:
    return model.trace(IDS)


def names_of(report) -> list[str]:
    return [each.name for each in report.findings if each.verdict != "rounding"]


# -- what passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_our_own_run_passes_whole_and_in_part(model, dtype):
    own = model if dtype == "float32" else Model(CONFIG, widened(model.params))
    trace = own.trace(IDS)
    for pattern in (trace, ["logits"], ["embed", "h.1.resid_post"], ["h.1.attn.heads", "ln_f"]):
        (report,) = verify({name: trace[name] for name in pattern}, model, ids=IDS)
        assert report.passed, names_of(report)
        assert report.first is None


def widened(value: Any) -> Any:
    """The same parameters in float64."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    if isinstance(value, tuple):
        made = [widened(each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_narrow_weights_pass_if_the_dump_says_so_and_are_named_if_not(tmp_path, storage):
    path = write_checkpoint(tmp_path / "model", CONFIG)
    exact = numpygpt.load(path)
    trace = numpygpt.load(path, dtype=storage).trace(IDS)
    (report,) = verify(trace, exact, ids=IDS, weights=storage)
    assert report.passed, names_of(report)
    (report,) = verify(trace, exact, ids=IDS)
    assert report.first.name == "embed"
    told = f"weights rounded to {storage}"
    everywhere = {
        name for each in report.findings for e in each.explanations for name in e.mistakes
    }
    assert told in everywhere


def test_a_program_that_rounds_every_result_passes_as_what_it_is():
    """Each array stored in 8 bits, and the next one made of what was stored."""
    params = random_params(CONFIG, dtype=np.float32)
    right = Program(IDS, CONFIG, params, storage=lambda program, name, w: rounded(w, "bfloat16"))
    stored: dict[str, np.ndarray] = {}
    for name in right.names:
        stored[name] = rounded(right.compute(name, stored), "bfloat16")
    (report,) = verify(stored, Model(CONFIG, params), ids=IDS, dtype="bfloat16")
    assert report.passed, names_of(report)
    (report,) = verify(stored, Model(CONFIG, params), ids=IDS, dtype="float32")
    assert report.verdict == "wrong"


# -- what is accused ------------------------------------------------------------------------------


def test_an_error_is_found_where_it_is_made_and_nowhere_else(model):
    """All that follows inherits it; resynchronised, only the operation itself differs."""
    config = CONFIG
    program = Program(IDS, config, model.params)
    wrong = OPERATIONS["h.{i}.mlp.post"]._replace(
        compute=lambda program, layer, x: ops.gelu(x) if layer == 1 else ops.gelu_new(x)
    )
    operations = {**OPERATIONS, "h.{i}.mlp.post": wrong}
    made = dataclasses.replace(program, operations=operations)
    trace = {name: x.astype(np.float32) for name, x in evaluate(made, program.names, {})}
    (report,) = verify(trace, model, ids=IDS)
    assert names_of(report) == ["h.1.mlp.post"]
    free = {each.name: each.free_relative for each in report.findings}
    # gelu and gelu_new differ by up to 4.7e-4, which the logits inherit; float32 by 1e-6.
    assert free["h.1.mlp.pre"] < 1e-6 < 1e-5 < free["logits"]


def test_nan_is_wrong_where_it_appears_and_inherited_after_that(model, arrays):
    arrays["h.1.ln_1"] = arrays["h.1.ln_1"].copy()
    arrays["h.1.ln_1"][3, 5] = np.nan
    arrays["h.1.attn.qkv"] = arrays["h.1.attn.qkv"].copy()
    arrays["h.1.attn.qkv"][3] = np.nan
    (report,) = verify(arrays, model, ids=IDS)
    assert report.first.name == "h.1.ln_1"
    assert report.first.where == (3, 5)
    assert report.first.ratio == np.inf
    assert "h.1.attn.qkv" not in names_of(report)


def test_what_is_missing_is_passed_through(model, arrays):
    given = {name: arrays[name] for name in ("h.0.resid_pre", "h.0.attn.out", "h.0.resid_post")}
    (report,) = verify(given, model, ids=IDS)
    assert report.passed
    by_name = {each.name: each for each in report.findings}
    out = by_name["h.0.attn.out"]
    # The stream before the first block is the embedding, and is compared as that.
    assert by_name["embed"].inputs == ("ids",)
    assert out.inputs == ("h.0.resid_pre",) or out.inputs == ("embed",)
    assert out.through == (
        "h.0.ln_1", "h.0.attn.qkv", "h.0.attn.scores", "h.0.attn.pattern", "h.0.attn.heads",
    )  # fmt: skip


def test_an_array_is_never_compared_with_itself_under_another_name(model, arrays):
    given = {"h.0.resid_pre": arrays["h.0.resid_pre"] + 1e-3, "ln_f": arrays["ln_f"]}
    (report,) = verify(given, model, ids=IDS)
    assert "embed" in names_of(report)
    made = Given({"h.1.resid_pre": 1, "h.2.resid_post": 2}, list(arrays))
    assert made.compared == ["h.0.resid_post", "h.2.resid_post"]
    assert "h.1.resid_pre" in made
    assert "embed" not in made


@pytest.mark.parametrize("masked", [-np.inf, -1e9, float(np.finfo(np.float32).min), None])
def test_scores_may_be_recorded_with_any_mask_or_before_it(model, arrays, masked):
    future = np.triu(np.ones((10, 10), bool), 1)
    raw = dict(evaluate(Program(IDS, CONFIG, model.params), ["h.0.attn.scores"], {}))
    scores = raw["h.0.attn.scores"].astype(np.float32)
    arrays["h.0.attn.scores"] = scores if masked is None else np.where(future, masked, scores)
    (report,) = verify(arrays, model, ids=IDS)
    assert report.passed, names_of(report)
    arrays["h.0.attn.scores"] = np.where(future, 2.0, scores)
    (report,) = verify(arrays, model, ids=IDS)
    assert "h.0.attn.scores" in names_of(report)


def test_a_mistake_below_every_bound_is_found_where_all_numbers_show_it():
    """gelu for gelu_new in float16, whose bound is 20 times the difference; and nothing is found
    in the same program without it."""
    config = nano(n_embd=32, n_head=4, n_inner=256)
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, 12)
    right = Program(ids, config, params, storage=lambda program, name, w: rounded(w, "float16"))
    for function, expected in ((ops.gelu_new, "rounding"), (ops.gelu, "suspicious")):
        stored: dict[str, np.ndarray] = {}
        for name in right.names:
            value = right.compute(name, stored)
            if name.endswith("mlp.post"):
                value = function(stored[name.replace("post", "pre")])
            stored[name] = rounded(value, "float16")
        (report,) = verify(stored, Model(config, params), ids=ids, dtype="float16")
        assert report.verdict == expected, names_of(report)
        assert max(each.ratio for each in report.findings) <= 1
    assert report.first.name == "h.0.mlp.post"
    assert report.first.explanations[0].mistakes == ("exact (erf) GELU instead of gelu_new",)


def test_without_explanations_nothing_is_tried(model, arrays):
    arrays["h.0.mlp.post"] = ops.gelu(arrays["h.0.mlp.pre"])
    (report,) = verify(arrays, model, ids=IDS, explain=False)
    assert report.first.name == "h.0.mlp.post"
    assert report.first.explanations == ()


def test_dropout_is_recognised(model, arrays):
    rng = np.random.default_rng(0)
    kept = rng.random(arrays["h.0.attn.out"].shape) > 0.1
    arrays["h.0.attn.out"] = (arrays["h.0.attn.out"] * kept / np.float32(0.9)).astype(np.float32)
    (report,) = verify(arrays, model, ids=IDS)
    assert report.first.name == "h.0.attn.out"
    assert report.first.explanations[0].mistakes == ("dropout left on",)


@pytest.mark.parametrize("name", ["h.0.attn.qkv", "h.1.mlp.out"])
def test_results_stored_with_fewer_bits_are_named(model, arrays, name):
    arrays[name] = arrays[name].astype(np.float16).astype(np.float32)
    (report,) = verify(arrays, model, ids=IDS)
    assert report.first.name == name
    assert report.first.explanations[0].mistakes == ("results stored as float16",)


def test_what_nothing_explains_is_wrong_all_the_same(model, arrays):
    arrays["h.1.mlp.out"] = arrays["h.1.mlp.out"] + np.sin(
        np.arange(arrays["h.1.mlp.out"].size, dtype=np.float32)
    ).reshape(10, -1)
    (report,) = verify(arrays, model, ids=IDS)
    assert report.first.name == "h.1.mlp.out"
    assert report.verdict == "wrong"
    assert not any(each.reproduces for each in report.first.explanations)


# -- decisions ------------------------------------------------------------------------------------


def test_a_greedy_difference_is_a_tie_only_within_the_reach_of_rounding(model, arrays):
    (report,) = verify({"logits": arrays["logits"]}, model, ids=IDS)
    bound = report.decisions[2].bound
    exact = dict(evaluate(Program(IDS, CONFIG, model.params), ["logits"], {}))["logits"]
    assert [each.verdict for each in report.decisions] == ["same"] * len(IDS)
    first = int(exact[2].argmax())
    for gap, verdict in ((0.3 * bound, "tie within rounding"), (3 * bound, "real")):
        value = exact.copy()
        other = (first + 1) % exact.shape[1]
        value[2, other] = value[2, first] - gap  # ours: the two are so far apart
        theirs = value.copy()
        theirs[2, other] = value[2, first] + 1e-9
        moved = [value + sign * bound / 6 * (np.arange(17) == other) for sign in (-1, 1)]
        decision = margins(value, moved, theirs, 0 * value)[2]
        assert decision.verdict == verdict
        assert (decision.ours, decision.theirs) == (first, other)
        assert decision.margin == pytest.approx(gap)


def test_equal_logits_are_a_tie():
    value = np.zeros((1, 4))
    theirs = np.array([[0.0, 0.0, 1e-9, 0.0]])
    (decision,) = margins(value, [value], theirs, 0 * value + 1e-9)
    assert decision.verdict == "tie within rounding"


# -- sources and options --------------------------------------------------------------------------


def test_a_path_arrays_and_a_dump_give_the_same(tmp_path, model, arrays):
    np.savez(tmp_path / "run.npz", ids=IDS, **arrays)
    found = [
        verify(source, model, **options)[0]
        for source, options in (
            (tmp_path / "run.npz", {}),
            (str(tmp_path / "run.npz"), {}),
            (arrays, {"ids": IDS}),
            (dumps.read(tmp_path / "run.npz"), {}),
            (Dump(IDS, arrays), {}),
        )
    ]
    assert len({each.findings for each in found}) == 1
    assert found[0].dump.dtype == "float32"


def test_each_sequence_has_a_report(model):
    two = np.stack([IDS, IDS[::-1]])
    traces = [model.trace(ids) for ids in two]
    both = {name: np.stack([trace[name] for trace in traces]) for name in ("embed", "logits")}
    both["logits"][1, 4, 2] += 1
    reports = verify(both, model, ids=two)
    assert [each.sequence for each in reports] == [0, 1]
    assert [each.verdict for each in reports] == ["rounding", "wrong"]
    assert reports[1].first.where == (4, 2)


def test_a_dump_of_other_weights_says_so(tmp_path, model, arrays):
    path = tmp_path / "run.safetensors"
    dumps.write(path, Dump(IDS, {"logits": arrays["logits"]}), model_sha256="0" * 64)
    (report,) = verify(path, model)
    assert any("made with other weights" in note for note in report.dump.notes)


def test_progress_is_told(model, arrays):
    told = []
    verify(arrays, model, ids=IDS, on_progress=lambda *each: told.append(each))
    assert [done for done, _, _ in told] == list(range(1, len(arrays) + 1))
    assert {total for _, total, _ in told} == {len(arrays)}


def test_what_cannot_be_verified_is_refused(model, arrays):
    with pytest.raises(ArgumentError, match="must be one of float64"):
        verify_dump(Dump(IDS, arrays, dtype="float8"), CONFIG, model.params)
    with pytest.raises(ArgumentError, match="none of the arrays"):
        verify_dump(Dump(IDS, {}), CONFIG, model.params)
    with pytest.raises(DumpError, match="token ids"):
        verify(arrays, model)


def test_rounding_to_each_format_is_nearest():
    x = np.random.default_rng(0).standard_normal(1000)
    for name, each in ARITHMETICS.items():
        error = np.abs(rounded(x, name) - x) / np.abs(x)
        u = 2.0**-24 if name == "tf32" else each.u / (2 if name == "float64" else 1)
        assert error.max() <= u
        if name != "float64":
            assert error.max() > u / 2
        assert arithmetic(name) is each


def test_the_report_of_a_run_is_json(model, arrays):
    from numpygpt.verify.reports import as_json

    assert json.loads(as_json(verify(arrays, model, ids=IDS), []))


def test_a_dump_that_was_put_together_by_hand_is_checked(model, arrays):
    for dump, message in (
        (Dump(IDS[None], arrays), "shape"),
        (Dump(IDS + 17, arrays), "ids from 0 to 16"),
        (Dump(np.resize(IDS, 13), {}), "at most 12 ids"),
        (Dump(IDS, arrays, chunks=(4, 4)), "8 tokens, but there are 10"),
        (Dump(IDS, arrays, weights="int3"), "weights must be one of"),
        (Dump(IDS, {"ln_f": arrays["ln_f"][:, :4]}), "ln_f: expected the shape"),
    ):
        with pytest.raises(DumpError, match=message):
            verify(dump, model)
    with pytest.raises(ArgumentError, match="set dtype there"):
        verify(Dump(IDS, arrays), model, dtype="float32")
    with pytest.raises(ArgumentError, match="not NoneType"):
        verify(None, model)
    with pytest.raises(DumpError, match="logits: cannot be read as an array"):
        verify({"logits": [[1.0], [2.0, 3.0]]}, model, ids=IDS)


def test_a_stored_logit_that_is_far_from_zero_may_turn_a_greedy_token():
    """All logits lower by 100, as a real GPT-2's are; bfloat16 keeps every half of them."""
    config = nano(vocab_size=300, n_embd=24, n_head=4)
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, 12)
    program = Program(ids, config, params, storage=lambda program, name, w: rounded(w, "bfloat16"))
    value = dict(evaluate(program, ["logits"], {}))["logits"]
    lower = value - 100
    own = 2.0**-8 * np.abs(lower)
    decisions = margins(lower, [lower], rounded(lower, "bfloat16"), own)
    assert {each.verdict for each in decisions} <= {"same", "tie within rounding"}
    assert "tie within rounding" in {each.verdict for each in decisions}
