"""The page against the loop oracle, intermediate by intermediate; a golden model; its own shape.

``python tests/test_model.py`` writes the golden file again (by the oracle, not by the page).
"""

from __future__ import annotations

import ast
import json
import pathlib

import numpy as np
import oracle
import pytest
from support import nano, random_ids, random_tensors, run_page

from numpygpt import model
from numpygpt.ops import ACTIVATIONS
from numpygpt.params import Config, pack
from numpygpt.plans import Traced, trace_names

GOLDEN = pathlib.Path(__file__).parent / "golden" / "nano.npz"

# Largest difference to the oracle, as a fraction of the largest number of the same intermediate.
# A nano model is two blocks of sums over at most 32 products, u = 1.1e-16 each; measured 1.9e-15
# at most over everything below, where another BLAS may add in another order. The mildest mistake
# of mistakes.py moves the logits by 1.3e-4 of the largest.
TOLERANCE = 2e-14


def traced(ids, tensors, config: Config, dtype="float64", **options):
    """Every intermediate of the page: trace name -> array."""
    planner = Traced(config, len(ids), dtype=dtype, **options)
    params = pack(config, {name: array.astype(dtype) for name, array in tensors.items()})
    run_page(ids, params, config, planner)
    return planner.arrays


def by_loops(ids, tensors, config: Config):
    """The same of the oracle: trace name -> nested lists."""
    weights = {name: array.tolist() for name, array in tensors.items()}
    return oracle.forward(ids.tolist(), weights, vars(config))


def assert_traces_agree(actual, expected, tolerance=TOLERANCE):
    assert list(actual) == list(expected)
    errors = {name: oracle.distance(actual[name].tolist(), expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


# -- against the loops ----------------------------------------------------------------------------

CONFIGS = {
    "default": {},
    "n_inner below 4 C": {"n_inner": 5},
    "n_inner above 4 C": {"n_inner": 40},
    "inverse-layer scale": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "scale off": {"scale_attn_weights": False},
    "inverse-layer scale alone": {
        "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_layer": 3,
    },
    "no bias": {"bias": False},
    "untied head": {"tie_word_embeddings": False},
    "large epsilon": {"layer_norm_epsilon": 0.1},
    "one head": {"n_head": 1},
    "heads of one": {"n_head": 8},
    "one layer": {"n_layer": 1},
    "one feature": {"n_embd": 1, "n_head": 1},
    "one token to choose from": {"vocab_size": 1},
    **{f"activation {name}": {"activation_function": name} for name in ACTIVATIONS},
}  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_intermediate_agrees_with_the_oracle(changes):
    config = nano(**changes)
    ids, tensors = random_ids(config, 7), random_tensors(config)
    assert_traces_agree(traced(ids, tensors, config), by_loops(ids, tensors, config))


@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("tile_rows", [1, 5, 128])
def test_every_length_and_tile_size_agrees_with_the_oracle(length, tile_rows):
    config = nano()
    ids, tensors = random_ids(config, length), random_tensors(config)
    assert_traces_agree(
        traced(ids, tensors, config, tile_rows=tile_rows), by_loops(ids, tensors, config)
    )


@pytest.mark.parametrize("seed", range(3))
def test_in_float32_every_intermediate_agrees_within_its_rounding(seed):
    config = nano()
    ids, tensors = random_ids(config, 12, seed), random_tensors(config, seed)
    # float32 has 5.4e8 times the unit roundoff of float64: measured 5.4e-7.
    assert_traces_agree(
        traced(ids, tensors, config, "float32"), by_loops(ids, tensors, config), 4e-6
    )


def test_repeated_and_extreme_ids_are_looked_up_like_any_other():
    config = nano()
    ids, tensors = np.array([16, 16, 0, 0, 16]), random_tensors(config)
    assert_traces_agree(traced(ids, tensors, config), by_loops(ids, tensors, config))


# -- golden ---------------------------------------------------------------------------------------


def write_golden() -> None:
    """A nano model, ids, and every intermediate by the oracle, in one npz file."""
    config = nano(n_inner=12, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False)
    ids, tensors = random_ids(config, 6), random_tensors(config)
    trace = {name: np.array(value) for name, value in by_loops(ids, tensors, config).items()}
    arrays = {f"weights/{name}": array for name, array in tensors.items()}
    arrays |= {f"trace/{name}": array for name, array in trace.items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, config=json.dumps(vars(config)), ids=ids, **arrays)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        parts = {
            part: {
                name.removeprefix(part): file[name] for name in file.files if name.startswith(part)
            }
            for part in ("weights/", "trace/")
        }
        yield Config(**json.loads(str(file["config"]))), file["ids"], *parts.values()


def test_the_golden_model_still_gives_its_golden_intermediates(golden):
    config, ids, tensors, expected = golden
    assert list(expected) == trace_names(config.n_layer)
    actual = traced(ids, tensors, config)
    assert_traces_agree(actual, {name: array.tolist() for name, array in expected.items()})


def test_the_oracle_still_gives_the_golden_intermediates(golden):
    config, ids, tensors, expected = golden
    trace = {name: np.array(value) for name, value in by_loops(ids, tensors, config).items()}
    # Only exp, tanh and sqrt of the machine's mathematical library may differ, by an ulp.
    assert_traces_agree(trace, {name: array.tolist() for name, array in expected.items()}, 1e-14)


def test_the_golden_file_is_small():
    assert GOLDEN.stat().st_size < 100_000


# -- the page itself ------------------------------------------------------------------------------

SOURCE = pathlib.Path(model.__file__).read_text()
TREE = ast.parse(SOURCE)

# Array-making calls without `out=`, and why.
WITHOUT_OUT = {
    "np.concatenate([segment.positions for segment in segments])": "N integers, no activations",
    "np.copyto(newest, -np.inf, where=tile.future)": "writes into its argument",
}


def test_the_page_has_at_most_160_lines():
    assert len(SOURCE.splitlines()) <= 160


def test_the_page_has_no_branches():
    branches = (ast.If, ast.IfExp, ast.While, ast.Match, ast.Try, ast.BoolOp, ast.Assert, ast.Raise)
    assert [ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, branches)] == []


def test_the_page_has_no_strings_but_docstrings_and_its_list_of_names():
    documented = (ast.Module, ast.FunctionDef, ast.ClassDef)
    allowed = {id(n.body[0].value) for n in ast.walk(TREE) if isinstance(n, documented)}
    (names,) = [n for n in TREE.body if isinstance(n, ast.Assign)]
    assert ast.unparse(names.targets[0]) == "__all__"
    allowed |= {id(node) for node in ast.walk(names)}
    strings = [n for n in ast.walk(TREE) if isinstance(n, ast.Constant) and type(n.value) is str]
    assert [node.value for node in strings if id(node) not in allowed] == []


def test_every_call_of_the_page_that_makes_an_array_names_its_place():
    makers = ("np.", "linear", "layer_norm", "softmax", "config.activation")
    calls = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(makers)
    ]
    without = {
        ast.unparse(call) for call in calls if "out" not in [word.arg for word in call.keywords]
    }
    assert len(calls) > 15
    assert without == set(WITHOUT_OUT)


if __name__ == "__main__":
    write_golden()
