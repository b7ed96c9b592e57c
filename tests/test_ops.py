"""The primitives: pencil values, the loop oracle, `out=`, dtypes, and the edges of the floats."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

from numpygpt import ops

RNG = np.random.default_rng(5)
ROWS = RNG.normal(size=(7, 12)) * 3
GAIN, SHIFT = RNG.normal(1, 0.2, size=12), RNG.normal(size=12)
MATRIX, BIAS = RNG.normal(size=(12, 5)), RNG.normal(size=5)

FORMULAS = {
    function.__name__: function
    for function in [*ops.ACTIVATIONS.values(), ops.erf, ops.softmax, ops.solu]
}
# Everything with an `out`, as a function of rows (7, 12) and out, parameters in the rows' dtype.
CALLS = {
    **FORMULAS,
    "linear": lambda x, out=None: ops.linear(x, *cast(x, MATRIX, BIAS), out=out),
    "linear without bias": lambda x, out=None: ops.linear(x, *cast(x, MATRIX), out=out),
    "layer_norm": lambda x, out=None: ops.layer_norm(x, *cast(x, GAIN, SHIFT), out=out),
    "layer_norm without shift": lambda x, out=None: ops.layer_norm(x, *cast(x, GAIN), out=out),
}
IN_PLACE = ["layer_norm", "layer_norm without shift", "softmax", "relu", "tanh"]


def cast(x, *arrays):
    return [array.astype(x.dtype) for array in arrays]


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


# -- pencil values --------------------------------------------------------------------------------

LOG3 = math.log(3)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        # [1, 2] @ [[1, 0, 3], [0, 10, 4]] = [1, 20, 11], plus [5, 5, 5]
        (ops.linear(np.array([1.0, 2]), np.array([[1.0, 0, 3], [0, 10, 4]]), np.full(3, 5.0)),
         [6, 25, 16]),
        (ops.linear(np.array([1.0, 2]), np.array([[1.0, 0, 3], [0, 10, 4]])), [1, 20, 11]),
        # mean 2, variance 1
        (ops.layer_norm(np.array([1.0, 3]), np.ones(2), eps=0.0), [-1, 1]),
        # mean 2, variance 1, and the root of 1 + 3 halves it; then gain 10, shift [0, 1]
        (ops.layer_norm(np.array([1.0, 3]), np.full(2, 10.0), np.array([0.0, 1]), eps=3.0),
         [-5, 6]),
        # dividing by C - 1 would give variance 2 and 1/sqrt(2)
        (ops.layer_norm(np.array([[0.0, 2], [5, 5]]), np.ones(2), eps=1e-300),
         [[-1, 1], [0, 0]]),
        # exp gives 1 and 3
        (ops.softmax(np.array([0.0, LOG3])), [0.25, 0.75]),
        (ops.softmax(np.array([[7.0, 7, 7, 7], [0, -np.inf, -np.inf, LOG3]])),
         [[0.25] * 4, [0.25, 0, 0, 0.75]]),
        (ops.solu(np.array([4 * LOG3, 5 * LOG3])), [LOG3, 3.75 * LOG3]),
        (ops.relu(np.array([-2.0, 0, 3])), [0, 0, 3]),
        # tanh(log 3) = (3 - 1/3) / (3 + 1/3)
        (ops.tanh(np.array([-LOG3, 0, LOG3])), [-0.8, 0, 0.8]),
        # sigmoid(log 3) = 3 / 4
        (ops.silu(np.array([-LOG3, 0, LOG3])), [-LOG3 / 4, 0, 0.75 * LOG3]),
        (ops.quick_gelu(np.array([LOG3 / 1.702])), [0.75 * LOG3 / 1.702]),
        # far out, every GELU is the identity or zero
        *[(f(np.array([-40.0, 0, 40])), [0, 0, 40]) for f in (ops.gelu, ops.gelu_new)],
        (ops.erf(np.array([-9.0, 0, 9])), [-1, 0, 1]),
        # 68.27 % of a normal distribution lies within one standard deviation
        (ops.erf(np.array([math.sqrt(0.5)])), [0.6826894921370859]),
    ],
)  # fmt: skip
def test_pencil_values(actual, expected):
    # Three roundings of numbers below 16 at most: 3 * 16 * 1.1e-16.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5.4e-15)


# -- the loop oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations_agree_with_the_oracle(name):
    x = np.concatenate([np.linspace(-12, 12, 2001), [1e-300, -1e-9, 1e3, -1e3]])
    expected = [oracle.ACTIVATIONS[name](value) for value in x.tolist()]
    # 1 + tanh, 1 + erf: absolute error of a few u = 1.1e-16, then times |x|. Measured 3.7e-16 |x|.
    np.testing.assert_array_less(
        np.abs(ops.ACTIVATIONS[name](x) - expected), 1e-15 * np.abs(x) + 5e-324
    )


@pytest.mark.parametrize("bias", [None, BIAS])
def test_linear_agrees_with_the_oracle(bias):
    expected = [oracle.linear(row, MATRIX.tolist(), bias) for row in ROWS.tolist()]
    # (n + 1) u sum |x||w| with n = 12 terms of size about 3.
    bound = 13 * 1.2e-16 * (np.abs(ROWS) @ np.abs(MATRIX) + np.abs(BIAS))
    np.testing.assert_array_less(np.abs(ops.linear(ROWS, MATRIX, bias) - expected), bound)


@pytest.mark.parametrize("shift", [None, SHIFT])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_agrees_with_the_oracle(eps, shift):
    expected = [oracle.layer_norm(row, GAIN.tolist(), shift, eps) for row in ROWS.tolist()]
    # About ten roundings of numbers below 8: 10 * 8 * 1.1e-16. Measured 4.5e-16.
    np.testing.assert_allclose(ops.layer_norm(ROWS, GAIN, shift, eps), expected, rtol=0, atol=9e-15)


@pytest.mark.parametrize("name", ["softmax", "solu"])
def test_softmax_and_solu_agree_with_the_oracle(name):
    x = np.concatenate([ROWS, ROWS * 100])
    x[3, 4:] = -1e6 if name == "solu" else -np.inf
    expected = [getattr(oracle, name)(row) for row in x.tolist()]
    # x - max is rounded once, and exp turns its absolute error into a relative one:
    # |x - max| u <= 2000 * 1.1e-16 = 2.2e-13 at worst, 30 u = 3e-15 where scores are ordinary.
    np.testing.assert_allclose(getattr(ops, name)(x), expected, rtol=2.2e-13, atol=1e-300)


# -- out=, dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_out_gives_the_same_bits_and_leaves_the_input_alone(name, dtype):
    x = ROWS.astype(dtype)
    expected = CALLS[name](x)
    out = np.full_like(expected, np.nan)
    assert CALLS[name](x, out=out) is out
    assert_same_bits(out, expected)
    assert_same_bits(x, ROWS.astype(dtype))


@pytest.mark.parametrize("name", CALLS)
def test_out_may_be_a_view_with_gaps(name):
    expected = CALLS[name](ROWS)
    room = np.full((7, 2 * expected.shape[1]), -1.0)
    CALLS[name](ROWS, out=room[:, ::2])
    # Strided loops take other SIMD paths for exp and tanh, and products without BLAS add in another
    # order: a few units of 1.1e-16 of the largest number. Measured 1.3e-15 of 16.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(room[:, ::2], expected, rtol=1e-15, atol=1e-15 * scale)
    np.testing.assert_array_equal(room[:, 1::2], -1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_where_it_is_documented_out_may_be_the_input(name, dtype):
    x = ROWS.astype(dtype)
    expected = CALLS[name](x)
    assert_same_bits(CALLS[name](x, out=x), expected)


@pytest.mark.parametrize("name", [*FORMULAS, "linear", "layer_norm"])
def test_every_op_documents_whether_out_may_be_the_input(name):
    doc = getattr(ops, name).__doc__
    assert ("May be `x` itself" in doc) == (name in IN_PLACE)
    assert ("Must not overlap `x`" in doc) == (name not in IN_PLACE)


@pytest.mark.parametrize("name", CALLS)
def test_float32_stays_float32_and_is_the_rounded_float64_result(name):
    exact, single = CALLS[name](ROWS), CALLS[name](ROWS.astype(np.float32))
    assert single.dtype == np.float32
    # Inputs below 12 rounded to 24 bits, then a few roundings; measured 9.3e-8 of the largest.
    np.testing.assert_allclose(single, exact, rtol=0, atol=5e-7 * np.abs(exact).max())


# -- erf ------------------------------------------------------------------------------------------

GRID = np.concatenate([np.linspace(-6.5, 6.5, 200_001), np.arange(-96.5, 97) / 16])


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # The bounds of erf's docstring.
    [("float64", 1.2e-16), ("float32", 6e-8)],
)
def test_erf_keeps_the_bound_of_its_docstring(dtype, bound):
    x = GRID.astype(dtype)
    exact = np.array([math.erf(value) for value in x.tolist()])
    np.testing.assert_array_less(np.abs(ops.erf(x).astype(np.float64) - exact), bound)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-15), ("float32", 5e-7)])
def test_erf_is_accurate_relative_to_itself_near_zero(dtype, rtol):
    # A few roundings; measured 2.3e-16 and 1.4e-7.
    tiny = np.finfo(dtype).tiny
    x = np.geomspace(tiny * 2, 0.5, 5000, dtype=dtype)
    exact = np.array([math.erf(value) for value in x.tolist()])
    np.testing.assert_allclose(ops.erf(x).astype(np.float64), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf_is_odd_and_has_its_limits(dtype):
    x = GRID.astype(dtype)
    np.testing.assert_array_equal(ops.erf(-x), -ops.erf(x))
    np.testing.assert_array_equal(
        ops.erf(np.array([-np.inf, -1e30, 0, 1e30, np.inf], dtype)), [-1, -1, 0, 1, 1]
    )
    assert np.isnan(ops.erf(np.array([np.nan], dtype))).all()
    assert ops.erf(x[:0]).shape == (0,)


# -- the edges of the floats ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"softmax", "solu"}))
def test_nan_stays_nan_and_infinity_has_its_limit(name, dtype):
    nan, infinite = FORMULAS[name](np.array([np.nan, np.inf], dtype))
    assert np.isnan(nan)
    assert infinite == (1 if name in ("tanh", "erf") else np.inf)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_of_huge_scores_neither_overflows_nor_warns(dtype):
    x = np.array([[1e30, 1e30, -1e30], [-1e30, -1e30, -np.inf], [900, 0, -900]], dtype)
    np.testing.assert_array_equal(
        ops.softmax(x), np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [1, math.exp(-900), 0]], dtype)
    )


def test_softmax_of_one_score_is_one():
    np.testing.assert_array_equal(ops.softmax(np.array([[-5.0], [1e9]])), [[1.0], [1.0]])


def test_layer_norm_of_a_constant_row_is_its_shift():
    np.testing.assert_array_equal(ops.layer_norm(np.full((2, 12), 3.0), GAIN, SHIFT), [SHIFT] * 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer_norm_of_a_large_mean_keeps_its_digits(dtype):
    # mean-of-squares minus square-of-mean would lose them: 1e4 ** 2 needs 8 digits already.
    x = np.array([1e4 - 1, 1e4 + 1] * 6, dtype)
    np.testing.assert_array_equal(
        ops.layer_norm(x, np.ones(12, dtype), eps=0.0), np.array([-1, 1] * 6, dtype)
    )


# -- the two GELUs --------------------------------------------------------------------------------


def test_tanh_gelu_is_at_most_474e_6_from_the_exact_one_and_gets_there_near_2_70():
    x = np.linspace(-8, 8, 160_001)
    gap = ops.gelu_new(x) - ops.gelu(x)
    assert 4.73e-4 < np.abs(gap).max() <= 4.74e-4
    assert abs(abs(x[np.abs(gap).argmax()]) - 2.70) < 0.005
    # An even function of x: x/2 * (odd - odd). Rounding of 1 + tanh times |x| / 2.
    np.testing.assert_allclose(gap, gap[::-1], rtol=0, atol=2e-15)
