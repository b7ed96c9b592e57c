"""The bounds of rounding: nothing that is computed rightly lies beyond them, every mistake does.

The usual ways of computing come from scripts/calibrate_bounds.py, which measures them all.
"""

from __future__ import annotations

import decimal
import doctest
import importlib.util
import pathlib
import re
import sys
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import random_ids, random_params

import numpygpt
from numpygpt import ops
from numpygpt.api import Model
from numpygpt.params import Config
from numpygpt.verify.arithmetic import ARITHMETICS, arithmetic, rounded
from numpygpt.verify.bounds import SUMS, Bound, bound
from numpygpt.verify.comparison import apart
from numpygpt.verify.gallery import gallery
from numpygpt.verify.operations import OPERATIONS, Program, kind_of

ROOT = pathlib.Path(__file__).parents[1]
LESSON = ROOT / "numpygpt" / "lessons" / "rounding.md"


def load_script():
    path = ROOT / "scripts" / "calibrate_bounds.py"
    spec = importlib.util.spec_from_file_location("calibrate_bounds", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


calibrate = load_script()
every_arithmetic = pytest.mark.parametrize("name", ARITHMETICS)

# The bounds are of first order: n roundings of 2**-24 are (1 + n 2**-24) times as far as that.
# Sums here have at most 64 terms, and the float64 side errs by 2**-29 of a bound.
FIRST_ORDER = 1 + 1e-5


# -- every usual way of computing -----------------------------------------------------------------

# Of operations in float64, these are the same to the last bit on both sides.
EXACT = {("residual stream", "float64")}


@every_arithmetic
@pytest.mark.parametrize("operation", calibrate.OPERATIONS)
def test_the_usual_ways_stay_within(operation, name):
    """On all kinds of numbers of a middling size; and the worst of them comes near the bound."""
    make, sizes, kinds = calibrate.OPERATIONS[operation]
    machine, n, largest = calibrate.Machine(name), sizes[:2][-1], 0.0
    for kind in kinds:
        for cell in calibrate.cells(operation, machine, kind, n, 1, make):
            assert cell.certain.max() <= FIRST_ORDER, cell.where
            if cell.ordinary:
                assert cell.likely.max() <= 1, cell.where
                largest = max(largest, float(cell.likely.max()))
    # 30 times too wide would hide mistakes for nothing. Measured: 0.2 to 0.98.
    assert largest > 1 / 30 or (operation, name) in EXACT


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_long_sums_stay_within(name):
    """6400 terms: the MLP of the largest GPT-2."""
    make = calibrate.OPERATIONS["linear map"][0]
    for kind in ("normal", "one sign", "outliers"):
        for cell in calibrate.cells("linear map", calibrate.Machine(name), kind, 6400, 1, make):
            assert cell.likely.max() <= 1, cell.where


def test_equal_terms_in_one_chain_are_suspicious_and_not_wrong():
    """All roundings have one sign then: 6 times the likely bound, a quarter of the certain one."""
    make = calibrate.OPERATIONS["linear map"][0]
    machine = calibrate.Machine("float32")
    cells = list(calibrate.cells("linear map", machine, "all equal", 6400, 2, make))
    worst = max(cells, key=lambda cell: cell.likely.max())
    assert "chain" in worst.way
    assert worst.likely.max() > 1
    assert max(cell.certain.max() for cell in cells) < 1


# -- adversarial numbers, against exact results ---------------------------------------------------


def single(dtype: str, largest: float = 2.0**40) -> st.SearchStrategy[float]:
    """Numbers of a format, of every size."""
    return st.one_of(
        st.floats(-largest, largest, width=32),
        st.floats(-4, 4, width=32),
        st.sampled_from([0.0, 1.0, -1.0, 1 / 3, 2.0**-126, -(2.0**-149), 2.0**-24, 1 + 2.0**-23]),
    ).map(lambda x: float(rounded(np.array(x, np.float32), dtype)))


def rows(dtype: str, n: int, count: int = 1, largest: float = 2.0**40):
    return st.lists(single(dtype, largest), min_size=n * count, max_size=n * count).map(
        lambda values: np.array(values).reshape(count, n)
    )


def exactly(x: np.ndarray) -> list[Fraction]:
    return [Fraction(float(value)) for value in np.ravel(x)]


def is_within(found, exact: list[Fraction], limit: np.ndarray) -> bool:
    errors = [abs(one - other) for one, other in zip(exactly(found), exact, strict=True)]
    return all(
        error <= Fraction(float(most) * FIRST_ORDER)
        for error, most in zip(errors, np.ravel(limit), strict=True)
    )


def bounds_of(program: Program, name: str, dtype: str, **inputs: np.ndarray) -> Bound:
    arrays = {key.replace("__", "."): value for key, value in inputs.items()}
    y = program.compute(name, arrays)
    return bound(program, name, arrays, y, arithmetic(dtype))


NARROW = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("dtype", NARROW)
@given(data=st.data())
def test_no_order_of_adding_exceeds_the_certain_bound_of_a_linear_map(dtype, data):
    n = data.draw(st.integers(1, 12))
    largest = 100.0 if dtype == "float16" else 2.0**40
    x, w = (data.draw(rows(dtype, n, largest=largest)) for _ in range(2))
    b = data.draw(rows(dtype, 1, largest=largest))[0]
    order = data.draw(st.permutations(range(n + 1)))
    m = calibrate.Machine(dtype)
    terms = [*(x[0].astype(np.float32) * w[0].astype(np.float32)), np.float32(b[0])]
    found = m.store(calibrate.chain([terms[k] for k in order]))
    right = calibrate.program({"mlp.c_proj": (w.T, b)}, {"n_embd": 1, "n_head": 1, "n_inner": n})
    limit = bounds_of(right, "h.0.mlp.out", dtype, h__0__mlp__post=x)
    products = zip(exactly(x), exactly(w), strict=True)
    exact = sum((one * other for one, other in products), Fraction(float(b[0])))
    assert is_within(found, [exact], limit.certain)
    assert (limit.likely <= limit.certain).all()


@pytest.mark.parametrize("dtype", NARROW)
@given(data=st.data())
def test_no_layer_norm_in_two_passes_exceeds_the_certain_bound(dtype, data):
    """Also of constant rows, whose variance is 0, and of rows far from 0."""
    n = data.draw(st.integers(1, 12))
    offset = data.draw(st.sampled_from([0.0, 0.0, 1.0, -3.0, 1000.0]))
    spread = data.draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1.0]))
    noise = data.draw(rows(dtype, n, largest=1000.0))
    m = calibrate.Machine(dtype)
    x = m.store(offset + spread * noise).astype(np.float64)
    g, b = (data.draw(rows(dtype, n, largest=4.0))[0] for _ in range(2))
    single_x, single_g, single_b = (each.astype(np.float32) for each in (x, g, b))
    mean = calibrate.chain(list(single_x.T)) / np.float32(n)
    centred = single_x - mean[:, None]
    variance = calibrate.chain(list(np.square(centred).T)) / np.float32(n)
    root = np.sqrt(variance + np.float32(1e-5))
    found = m.store(centred / root[:, None] * single_g + single_b)
    right = calibrate.program({"ln_1": (g, b)}, {"n_embd": n, "n_head": 1})
    limit = bounds_of(right, "ln_f", dtype, h__0__resid_post=x)
    assert is_within(found, exact_norm(x, g, b), limit.certain)


def exact_norm(x, g, b) -> list[Fraction]:
    """With a root of 60 digits."""
    values = exactly(x)
    mean = sum(values, Fraction()) / len(values)
    variance = sum(((value - mean) ** 2 for value in values), Fraction()) / len(values)
    with decimal.localcontext() as context:
        context.prec = 60
        under = variance + Fraction(1e-5)
        root = Fraction((decimal.Decimal(under.numerator) / under.denominator).sqrt())
    return [
        (value - mean) / root * gain + shift
        for value, gain, shift in zip(values, exactly(g), exactly(b), strict=True)
    ]


@pytest.mark.parametrize("dtype", NARROW)
@given(data=st.data())
def test_no_softmax_exceeds_the_certain_bound(dtype, data):
    """Also of huge scores, of equal ones, and of one token."""
    n = data.draw(st.integers(1, 6))
    scores = data.draw(rows(dtype, n, n, data.draw(st.sampled_from([4.0, 100.0, 1e4]))))
    m = calibrate.Machine(dtype)
    with np.errstate(under="ignore"):
        narrow = np.where(calibrate.future(n), -np.inf, scores).astype(np.float32)
        weight = m.store(np.exp(m.store(narrow - narrow.max(-1, keepdims=True))))
        found = m.store(weight / m.store(calibrate.chain(list(weight.T)))[:, None])
    right = calibrate.program({}, {"n_embd": 1, "n_head": 1}, n)
    limit = bounds_of(right, "h.0.attn.pattern", dtype, h__0__attn__scores=scores[None])
    exact = [value for t in range(n) for value in exact_softmax(scores[t], t + 1)]
    assert is_within(found, exact, limit.certain)


def exact_softmax(scores, seen: int) -> list[Fraction]:
    """With exponentials of 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        values = [decimal.Decimal(float(score)) for score in scores[:seen]]
        powers = [(value - max(values)).exp() for value in values]
        return [Fraction(power / sum(powers)) for power in powers] + [Fraction()] * (
            len(scores) - seen
        )


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "quick_gelu", "silu", "relu", "tanh"])
@given(x=st.lists(single("float32", 2.0**100), min_size=1, max_size=8))
def test_no_activation_exceeds_the_likely_bound(name, x):
    config = {"n_embd": 1, "n_head": 1, "activation_function": name}
    right = calibrate.program({}, config)
    x = np.array([x])
    with np.errstate(all="ignore"):
        found = ops.ACTIVATIONS[name](x.astype(np.float32))
        limit = bounds_of(right, "h.0.mlp.post", "float32", h__0__mlp__pre=x)
        assert np.all(np.abs(found - ops.ACTIVATIONS[name](x)) <= limit.likely)


@pytest.mark.parametrize("dtype", NARROW)
@given(data=st.data())
def test_no_sum_of_the_stream_exceeds_the_likely_bound(dtype, data):
    """A branch may be rounded for the dump only: then its own rounding comes in."""
    x, kept = (data.draw(rows(dtype, 4, largest=1e4)) for _ in range(2))
    kept = (kept * (1 + data.draw(st.floats(-1e-3, 1e-3)))).astype(np.float32)
    m = calibrate.Machine(dtype)
    branch, found = m.store(kept), m.store(x.astype(np.float32) + kept)
    right = calibrate.program({}, {"n_embd": 4, "n_head": 1})
    limit = bounds_of(
        right, "h.0.resid_post", dtype, h__0__resid_mid=x, h__0__mlp__out=branch.astype(float)
    )
    exact = [a + b for a, b in zip(exactly(x), exactly(branch), strict=True)]
    assert is_within(found, exact, limit.likely)


# -- shapes and edges -----------------------------------------------------------------------------


def of_random(**changes) -> tuple[Program, dict[str, np.ndarray]]:
    """A random model's right program, and its float32 trace."""
    length = changes.pop("length", 9)
    values = {"vocab_size": 23, "n_ctx": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
    config = Config(**{**values, **changes})
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, length)
    trace = Model(config, params).trace(ids)
    return Program(ids, config, params), {k: v.astype(np.float64) for k, v in trace.items()}


@every_arithmetic
@pytest.mark.parametrize(
    "changes",
    [{}, {"length": 1}, {"n_embd": 1, "n_head": 1, "n_inner": 1}, {"bias": False},
     {"vocab_size": 1}, {"tie_word_embeddings": False}],
    ids=["usual", "one token", "widths of one", "no biases", "one word", "own head"],
)  # fmt: skip
def test_bounds_have_the_shape_of_the_result_and_are_numbers(changes, name):
    right, arrays = of_random(**changes)
    for key in right.names:
        y = right.compute(key, arrays)
        likely, certain = bound(right, key, arrays, y, arithmetic(name))
        assert likely.shape == certain.shape == y.shape
        assert np.isfinite(likely).all()
        assert (likely > 0).all()
        assert (certain >= likely).all()
        if name == "float32":  # it has been computed so
            assert apart(key, arrays[key], y, likely, arithmetic(name)).max() <= 1


def test_more_bits_have_smaller_bounds():
    right, arrays = of_random()
    for key in right.names:
        y = right.compute(key, arrays)
        sizes = [
            bound(right, key, arrays, y, arithmetic(name)).likely.mean()
            for name in ("float64", "float32", "float16", "bfloat16")
        ]
        assert sizes == sorted(sizes)
        assert sizes[-1] > 1e6 * sizes[0]


def test_numbers_that_are_not_finite_warn_of_nothing():
    right, arrays = of_random()
    arrays = {key: array.copy() for key, array in arrays.items()}
    for key, array in arrays.items():
        if not key.endswith("scores"):
            array.ravel()[:3] = np.nan, np.inf, -np.inf
    for key in right.names:
        y = right.compute(key, arrays)
        assert bound(right, key, arrays, y, arithmetic("float32")).likely.shape == y.shape


@pytest.mark.parametrize("key", ["ln_f", "h.0.mlp.out", "h.1.attn.pattern", "h.1.attn.heads"])
def test_a_constant_row_has_a_bound(key):
    """Zeros and ones: the variance is 0, all weights are alike."""
    right, arrays = of_random()
    for value in (0.0, 1.0):
        same = {name: np.full_like(array, value) for name, array in arrays.items()}
        y = right.compute(key, same)
        likely = bound(right, key, same, y, arithmetic("float32")).likely
        assert np.isfinite(likely).all()
        assert (likely >= 2.0**-126).all()


# -- mistakes -------------------------------------------------------------------------------------

# By row, the mistake that moves it least, and its largest difference in units of the likely bound
# of float32: the bundled model, 24 tokens in passes of 20 and 4. Its final stream has a variance
# of 7, so the three wrong epsilons show in ln_1 and ln_2, and not in ln_f.
MILDEST = {
    "embed": ("weights rounded to bfloat16", 1.2e8),
    "h.{i}.resid_pre": ("layer norm after the sum (post-LN)", 4.1e10),
    "h.{i}.ln_1": ("layer norm epsilon outside the root", 79),
    "h.{i}.attn.qkv": ("weights rounded to int8", 1.4e3),
    "h.{i}.attn.scores": ("scores scaled by sqrt(C) instead of sqrt(D)", 3.7e5),
    "h.{i}.attn.pattern": ("mask after the softmax", 1e6),
    "h.{i}.attn.heads": ("heads not merged by token", 5.5e8),
    "h.{i}.attn.out": ("weights rounded to bfloat16", 560),
    "h.{i}.resid_mid": ("attention and MLP in parallel", 8.4e6),
    "h.{i}.ln_2": ("layer norm epsilon outside the root", 74),
    "h.{i}.mlp.pre": ("weights rounded to bfloat16", 600),
    "h.{i}.mlp.post": ("exact (erf) GELU instead of gelu_new", 750),
    "h.{i}.mlp.out": ("weights rounded to bfloat16", 150),
    "h.{i}.resid_post": ("MLP in place of the stream", 8.4e6),
    "ln_f": ("layer norm variance over C - 1", 690),
    "logits": ("weights rounded to bfloat16", 440),
}

# These change nothing here: the weights are exact in float16, and no score is above 80.
HARMLESS = {
    "weights rounded to float16",
    "softmax without subtracting the maximum",
    "mask of -1e4",
}
EPSILON = re.compile("layer norm epsilon")


@pytest.fixture(scope="module")
def effects() -> dict[str, dict[str, float]]:
    """By row and mistake, the largest difference from the right result, in likely bounds."""
    model, a = numpygpt.load("shakespeare"), arithmetic("float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 24)
    right = Program(ids, model.config, model.params, (20, 4))
    arrays = {name: array.astype(np.float64) for name, array in model.trace(ids).items()}
    for name in arrays:
        if name.endswith("scores"):  # before the mask, where mistakes of the mask can be made
            arrays[name] = right.compute(name, arrays)
    expected = {name: right.compute(name, arrays) for name in arrays}
    likely = {name: bound(right, name, arrays, expected[name], a).likely for name in arrays}
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for mistake in gallery(right):
        wrong = mistake.made(right)
        for name in right.names:
            if kind_of(name) in mistake.kinds:
                y = wrong.compute(name, arrays)
                effect = float(apart(name, y, expected[name], likely[name], a).max())
                of = found[kind_of(name)]
                of[mistake.name] = max(of[mistake.name], effect)
    return found


def test_every_mistake_that_does_anything_lies_beyond_the_bounds(effects):
    names = {name for of in effects.values() for name in of}
    largest = {name: max(of.get(name, 0.0) for of in effects.values()) for name in names}
    mild = {name for name, effect in largest.items() if effect < 50}
    assert mild <= HARMLESS
    assert all(largest[name] < 1e-3 for name in mild)
    assert len(names) >= 50


@pytest.mark.parametrize("kind", OPERATIONS)
def test_in_every_row_the_mildest_mistake_lies_beyond_the_bound(effects, kind):
    """`largest` is less than half or more than twice what is stated only if a bound has changed."""
    found = {
        name: effect
        for name, effect in effects[kind].items()
        # Of the right inputs, some rows of a wrong program make what they should.
        if effect > 1 and not (kind == "ln_f" and EPSILON.match(name))
    }
    mildest, largest = MILDEST[kind]
    assert min(found.values()) == pytest.approx(largest, rel=0.6)
    assert found[mildest] < 1.2 * min(found.values())


@pytest.mark.parametrize(
    ("n", "least"), [(768, 8), (1600, 3), (3072, 1.5)], ids=["124M", "1.5B", "MLP of 124M"]
)
def test_weights_rounded_to_float16_lie_beyond_the_bound(n, least):
    """Random weights, 64 rows: 14, 5.6 and 2.6 times. Long sums hide it: at 6400 terms 1.6."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, n)), 0.02 * rng.standard_normal((n, 256))
    w = w.astype(np.float32).astype(np.float64)
    config = {"n_embd": 256, "n_head": 1, "n_inner": n}
    right = calibrate.program({"mlp.c_proj": (w, np.zeros(256))}, config)
    limit = bounds_of(right, "h.0.mlp.out", "float32", h__0__mlp__post=x)
    assert (np.abs(x @ rounded(w, "float16") - x @ w) / limit.likely).max() > least


# -- the script, its table, the lesson ------------------------------------------------------------


def test_the_script_writes_its_table(monkeypatch, tmp_path, capsys):
    some = {name: calibrate.OPERATIONS[name] for name in ("softmax", "residual stream")}
    monkeypatch.setattr(calibrate, "OPERATIONS", some)
    monkeypatch.setattr(calibrate.sums, "__defaults__", ((48,),))
    path = tmp_path / "table.md"
    assert calibrate.main(["--quick", "-o", str(path)]) == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "softmax, bfloat16" in capsys.readouterr().err
    tables = [line for line in lines if line.startswith("| softmax, float32")]
    assert tables
    assert 0 < float(tables[0].split("|")[6]) <= 1
    with pytest.raises(SystemExit):
        calibrate.main(["--help"])
    assert "--quick" in capsys.readouterr().out


TABLE = (ROOT / "scripts" / "rounding-table.md").read_text(encoding="utf-8")


def test_the_table_is_of_these_bounds():
    """Who changes a bound measures again: python scripts/calibrate_bounds.py -o ..."""
    assert f"c = {SUMS} " in TABLE
    numbers, beyond = re.search(r"- ([\d,]+) ordinary numbers, ([\d,]+) of them", TABLE).groups()
    assert int(numbers.replace(",", "")) > 10**8
    assert beyond == "0"
    for name in ARITHMETICS:
        for operation in calibrate.OPERATIONS:
            assert f"| {operation}, {name} |" in TABLE


def test_the_lesson_is_true():
    text = LESSON.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, LESSON.name, LESSON.name, 0)
    assert len(test.examples) > 20
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(test).failed == 0


def test_the_lesson_has_the_equations_of_the_code():
    """Every row of the table of operations, and the constant, are in it."""
    text = LESSON.read_text(encoding="utf-8")
    assert f"c = {SUMS}" in text
    for kind in OPERATIONS:
        assert f"`{kind}`" in text, kind
