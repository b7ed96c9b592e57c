"""The table of operations is the page: the same bits, in an order in which they can be computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import nano, random_ids, random_params, run_page

from numpygpt import storage
from numpygpt.api import Model
from numpygpt.checkpoints.arrays import to_bfloat16
from numpygpt.params import Config
from numpygpt.plans import INTERMEDIATES
from numpygpt.verify.gallery import gallery
from numpygpt.verify.operations import OPERATIONS, Program, future, kind_of, layer_of, run

# fmt: off
CONFIGS = {
    "nano": {}, "one layer": {"n_layer": 1}, "one head": {"n_head": 1},
    "heads of one": {"n_head": 8},
    "odd": {"vocab_size": 31, "n_ctx": 11, "n_embd": 15, "n_head": 3, "n_inner": 22},
    "no biases": {"bias": False}, "own head": {"tie_word_embeddings": False},
    "inverse layer": {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
    "no scale": {"scale_attn_weights": False}, "exact GELU": {"activation_function": "gelu"},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "long": {"vocab_size": 97, "n_ctx": 64, "n_embd": 48, "n_head": 3},
}
# fmt: on


def program(config: Config, length: int, seed: int = 0) -> Program:
    return Program(random_ids(config, length, seed), config, random_params(config, seed))


def computed(right: Program) -> dict[str, np.ndarray]:
    """Every intermediate, from the table in order."""
    arrays: dict[str, np.ndarray] = {}
    for name in right.names:
        arrays[name] = right.compute(name, arrays)
    return arrays


def trace(right: Program) -> dict[str, np.ndarray]:
    """The same, from the page."""
    return Model(right.config, right.params).trace(right.ids)


@pytest.mark.parametrize("length", [1, 2, None], ids=["one token", "two", "all"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=list(CONFIGS))
def test_the_table_in_order_is_the_page(changes, length):
    """Bit for bit, up to 64 tokens: a longer page is cut into tiles, which round otherwise."""
    config = nano(**changes)
    right = program(config, length or config.n_ctx)
    ours, page = computed(right), trace(right)
    assert list(ours) == list(page) == right.names
    for name, array in page.items():
        assert array.dtype == ours[name].dtype == np.float64
        if name.endswith("attn.scores"):  # the page masks them where they lie
            hidden = np.broadcast_to(future(len(right.ids)), array.shape)
            assert np.all(np.isneginf(array[hidden]))
            array, ours[name] = array[~hidden], ours[name][~hidden]
        assert array.shape == ours[name].shape
        assert array.tobytes() == ours[name].tobytes(), name


def test_the_table_has_the_rows_of_the_page():
    assert list(OPERATIONS) == [row.name for row in INTERMEDIATES]
    assert all(operation.words for operation in OPERATIONS.values())


@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_row_reads_only_what_comes_before_it(kind):
    right = program(nano(), 3)
    for name in right.names:
        before = right.names[: right.names.index(name)]
        if kind_of(name) == kind:
            assert set(right.operation(name).inputs) <= set(before)


def test_scores_that_are_masked_give_the_same_pattern():
    """A dump may record them before the mask or after it."""
    right = program(nano(), 9)
    arrays = computed(right)
    name = "h.1.attn.scores"
    masked = {**arrays, name: np.where(future(9), -np.inf, arrays[name])}
    expected = arrays["h.1.attn.pattern"]
    assert right.compute("h.1.attn.pattern", masked).tobytes() == expected.tobytes()


# -- names ----------------------------------------------------------------------------------------


def test_names_of_layers():
    right = program(nano(n_layer=12), 1)
    for name in right.names:
        layer = layer_of(name)
        assert kind_of(name).format(i=layer) == name
        assert kind_of(name) in OPERATIONS
        assert (layer == -1) == (name in ("embed", "ln_f", "logits"))
    assert layer_of("h.11.mlp.out") == 11


def test_a_layer_starts_where_the_one_before_it_ended():
    right = program(nano(n_layer=3), 1)
    assert right.operation("h.0.resid_pre").inputs == ("embed",)
    assert right.operation("h.2.resid_pre").inputs == ("h.1.resid_post",)
    assert right.operation("ln_f").inputs == ("h.2.resid_post",)
    assert right.operation("embed").inputs == ()


# -- their order ----------------------------------------------------------------------------------


def is_valid(order: list[str], right: Program, targets: set[str], given: set[str]) -> bool:
    """Whether it can be computed from front to back, ends with all targets, and repeats nothing."""
    known = set(given)
    for name in order:
        if not set(right.operation(name).inputs) <= known:
            return False
        known.add(name)
    return targets <= set(order) and len(set(order)) == len(order)


def test_orders_are_valid_and_hold_nothing_needless():
    right = program(nano(n_layer=3), 1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        targets, given = (set(rng.choice(right.names, rng.integers(0, 9))) for _ in range(2))
        order = run(right, targets, given)
        assert is_valid(order, right, targets, given)
        used = {key for name in order for key in right.operation(name).inputs}
        assert all(name in targets or (name in used and name not in given) for name in order)
        assert order == sorted(order, key=right.names.index)


def test_a_target_that_is_given_is_computed():
    right = program(nano(), 1)
    assert run(right, ["h.0.mlp.post"], ["h.0.mlp.post", "h.0.mlp.pre"]) == ["h.0.mlp.post"]


def test_nothing_is_asked_for():
    assert run(program(nano(), 1), []) == []


def test_every_mistake_can_be_ordered():
    """Post-LN reads ln_1 after attn.out, so the table's own order does not do."""
    right = dataclasses.replace(program(nano(n_layer=11), 6), chunks=(4, 2))
    wrong_order = 0
    for mistake in gallery(right):
        made = mistake.made(right)
        order = run(made, ["logits"])
        assert is_valid(order, made, {"logits"}, set()), mistake.name
        wrong_order += order != sorted(order, key=right.names.index)
    assert wrong_order >= 1


# -- weights --------------------------------------------------------------------------------------


STORED = {
    "bfloat16": lambda rows: storage.Bfloat16(to_bfloat16(rows)),
    "int8": storage.to_int8,
}


@pytest.mark.parametrize("store", STORED.values(), ids=list(STORED))
def test_stored_matrices_are_widened(store):
    """As they are kept, (I, O) or (V, C), they give the numbers that they multiply by."""
    config = nano()
    table, matrix = (np.random.default_rng(0).normal(size=(17, 8)).astype("f4") for _ in range(2))
    plain = random_params(config, dtype=np.float32)
    first = plain.h[0]
    attn = first.attn._replace(c_proj=first.attn.c_proj._replace(w=store(matrix).T))
    params = plain._replace(
        wte=store(table), head=store(table), h=(first._replace(attn=attn), plain.h[1])
    )
    right = Program(np.array([3, 16, 3]), config, params)
    for name, rows, shape in (
        ("wte", table, (17, 8)), ("head", table, (17, 8)), ("h.0.attn.c_proj.w", matrix, (8, 17))
    ):  # fmt: skip
        found = right.weight(name)
        seen = np.matmul(np.eye(8, dtype=np.float32), store(rows).T)  # what it multiplies by
        assert found.dtype == np.float64
        assert found.shape == shape
        assert np.array_equal(found if found.shape == seen.shape else found.T, seen)
        assert not np.array_equal(seen, rows.T)
    assert np.array_equal(right.rows("wte", right.ids), right.weight("wte")[[3, 16, 3]])
    assert right.rows("wte", right.ids).dtype == np.float64


def test_weights_that_are_not_there():
    right = program(nano(bias=False), 1)
    assert right.weight("h.0.mlp.c_fc.b") is None
    assert right.norm("ln_f")[1] is None
    assert right.map("h.1.attn.c_proj")[1] is None


def test_edits_are_made_in_order():
    right = program(nano(), 4)
    twice = dataclasses.replace(
        right, edits=(lambda p, name, x: x * 2, lambda p, name, x: x + 1 if name == "wte" else x)
    )
    assert np.array_equal(twice.weight("wte"), right.params.wte * 2 + 1)
    assert np.array_equal(twice.weight("ln_f.g"), right.params.ln_f.g * 2)
    assert np.array_equal(twice.rows("wpe", np.arange(4)), right.params.wpe[:4] * 2)


def test_float32_weights_are_computed_with_in_float64():
    """The sum of many float32 products would differ from its float64 one in the eighth digit."""
    config = nano()
    narrow = random_params(config, dtype=np.float32)
    right = Program(random_ids(config, 12), config, narrow)
    wide = type(narrow)(*_widened(narrow))
    expected = run_page(right.ids, wide, config)
    assert computed(right)["logits"].tobytes() == expected.tobytes()


def _widened(part):
    if isinstance(part, np.ndarray):
        return part.astype(np.float64)
    if part is None:
        return None
    parts = [_widened(each) for each in part]
    return tuple(parts) if type(part) is tuple else type(part)(*parts)
