"""Where results go never changes what they are: the three plans, bit for bit, at real sizes."""

from __future__ import annotations

import fnmatch
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nano, random_ids, random_params

from numpygpt.cache import Cache, segments
from numpygpt.errors import ArgumentError
from numpygpt.model import forward, unembed
from numpygpt.params import Config
from numpygpt.plans import INTERMEDIATES, Fresh, Reused, Traced, trace_names

# GPT-2 small's width and heads; two layers and a small vocabulary keep it quick.
REAL = Config(vocab_size=97, n_ctx=1024, n_embd=768, n_layer=2, n_head=12)

# A sum of n products in another order differs by about sqrt(n) u of its size; the longest has
# n = 3072: 55 * 6e-8 = 3.3e-6 in float32, 55 * 1.1e-16 = 6e-15 in float64, as fractions of the
# largest logit. Measured, across memory orders and tile sizes: 6.8e-7 and 1.1e-15.
ROUNDING = {"float32": 3.3e-6, "float64": 6e-15}


@pytest.fixture(scope="module")
def real_params():
    double = random_params(REAL)
    return {"float64": double, "float32": random_params(REAL, dtype=np.float32)}


def run(planner, params, config, lengths, before=()):
    """Logits of the new tokens of sequences, some of which have earlier keys and values."""
    dtype = params.dtype
    caches = []
    for seed, length in enumerate(lengths):
        old = before[seed] if before else 0
        cache = Cache(config, old + length, dtype)
        rng = np.random.default_rng(seed)
        for slab in (cache.keys, cache.values):
            slab[:, :, :, :old] = rng.normal(size=slab[:, :, :, :old].shape)
        cache.lengths[...] = old
        caches.append(cache)
    laid = segments(lengths, caches)
    ids = np.concatenate([random_ids(config, length, seed) for seed, length in enumerate(lengths)])
    plan = planner.fit(laid)
    return unembed(forward(ids, laid, params, config, plan), params, out=plan.logits)


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


def gap(actual, expected) -> float:
    """The largest difference, as a fraction of the largest number expected."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# -- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "length", "before"),
    [
        ("float32", 1, 0),
        ("float32", 1, 70),
        ("float32", 7, 70),
        ("float32", 260, 70),
        ("float64", 1, 70),
        ("float64", 7, 0),
        ("float64", 129, 0),
    ],
)
def test_fresh_reused_and_traced_give_the_same_bits(real_params, dtype, length, before):
    params = real_params[dtype]
    expected = run(Fresh(REAL), params, REAL, [length], [before])
    room = {"rows": 261, "capacity": 340, "dtype": dtype}
    for planner in (
        Reused(REAL, **room),
        Traced(REAL, **room),
        Traced(REAL, names=["h.1.attn.scores", "h.0.mlp.*", "h.1.resid_pre"], **room),
    ):
        assert_same_bits(run(planner, params, REAL, [length], [before]), expected)


@pytest.mark.parametrize(
    ("dtype", "lengths", "before"),
    [
        ("float32", [3, 1, 140], [0, 9, 0]),
        ("float32", [1, 1, 1, 1], [5, 60, 0, 200]),
        ("float64", [2, 5], [0, 7]),
    ],
)
def test_fresh_and_reused_give_the_same_bits_for_several_segments(
    real_params, dtype, lengths, before
):
    params = real_params[dtype]
    reused = Reused(REAL, rows=150, capacity=300, dtype=dtype)
    assert_same_bits(
        run(reused, params, REAL, lengths, before), run(Fresh(REAL), params, REAL, lengths, before)
    )


@pytest.mark.parametrize(("dtype", "length"), [("float32", 1), ("float32", 260), ("float64", 7)])
def test_in_fortran_order_reused_and_traced_give_the_same_bits(real_params, dtype, length):
    room = {"rows": length, "capacity": length, "dtype": dtype, "order": "F"}
    reused, traced = (
        run(planner(REAL, **room), real_params[dtype], REAL, [length])
        for planner in (Reused, Traced)
    )
    assert_same_bits(reused, traced)


def test_buffers_that_hold_the_last_call_change_nothing(real_params):
    params = real_params["float32"]
    planner = Reused(REAL, rows=130, capacity=130)
    first = run(planner, params, REAL, [40]).copy()
    run(planner, params, REAL, [130])
    for buffer in planner.buffers.values():
        buffer.fill(np.nan)
    assert_same_bits(run(planner, params, REAL, [40]), first)


@settings(max_examples=25)
@given(
    names=st.sets(st.sampled_from(trace_names(2)), min_size=1),
    length=st.integers(1, 9),
    tile_rows=st.sampled_from([1, 4, 128]),
)
def test_any_choice_of_names_gives_the_same_bits(names, length, tile_rows):
    config = nano()
    params = random_params(config)
    room = {"rows": length, "dtype": "float64", "tile_rows": tile_rows}
    full, some = Traced(config, **room), Traced(config, names=sorted(names), **room)
    expected = run(Fresh(config, tile_rows), params, config, [length])
    assert_same_bits(run(full, params, config, [length]), expected)
    assert_same_bits(run(some, params, config, [length]), expected)
    assert list(some.arrays) == [name for name in trace_names(2) if name in names]
    for name in names:
        assert_same_bits(some.arrays[name], full.arrays[name])


# -- the same within rounding ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [1, 129])
def test_memory_orders_agree_within_rounding(real_params, length, dtype):
    c, f = (
        run(Reused(REAL, length, length, dtype, order), real_params[dtype], REAL, [length])
        for order in "CF"
    )
    assert gap(f, c) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tile_rows", [1, 7])
def test_tile_sizes_agree_within_rounding(real_params, tile_rows, dtype):
    tiled, whole = (
        run(Reused(REAL, 129, 160, dtype, tile_rows=rows), real_params[dtype], REAL, [129], [31])
        for rows in (tile_rows, 128)
    )
    assert gap(tiled, whole) <= ROUNDING[dtype]


# -- traces ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["C", "F"])
def trace(request):
    """Four tokens after three earlier ones, in tiles of three rows."""
    config = nano(n_inner=20)
    planner = Traced(config, rows=4, capacity=7, dtype="float64", order=request.param, tile_rows=3)
    run(planner, random_params(config), config, [4], [3])
    return planner.arrays


def test_the_keys_of_a_trace_are_the_names_in_order_of_execution(trace):
    assert list(trace) == trace_names(2)
    assert trace_names(2)[:3] == ["embed", "h.0.resid_pre", "h.0.ln_1"]
    assert trace_names(2)[-3:] == ["h.1.resid_post", "ln_f", "logits"]


def test_the_shapes_of_a_trace_are_those_of_the_table(trace):
    sizes = {"N": 4, "T": 4, "S": 7, "C": 8, "3C": 24, "H": 2, "D": 4, "F": 20, "V": 17}
    for row in INTERMEDIATES:
        for name in {row.name.format(i=i) for i in range(2)}:
            assert trace[name].shape == tuple(sizes[axis] for axis in row.axes), name


def test_scores_are_minus_infinity_exactly_where_a_key_comes_later(trace):
    later = np.arange(7) > 3 + np.arange(4)[:, None]
    for i in range(2):
        scores = trace[f"h.{i}.attn.scores"]
        np.testing.assert_array_equal(np.isneginf(scores), np.broadcast_to(later, (2, 4, 7)))
        assert np.isfinite(scores[:, ~later]).all()


def test_pattern_rows_are_the_softmax_of_the_scores_and_sum_to_1(trace):
    for i in range(2):
        weights = np.exp(trace[f"h.{i}.attn.scores"])
        pattern = trace[f"h.{i}.attn.pattern"]
        # Seven positive numbers, each with a few roundings of 1.1e-16.
        np.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=0, atol=1e-15)
        np.testing.assert_allclose(
            pattern, weights / weights.sum(axis=-1, keepdims=True), rtol=1e-14, atol=0
        )


def test_each_block_begins_where_the_last_one_ended(trace):
    assert_same_bits(trace["h.0.resid_pre"], trace["embed"])
    assert_same_bits(trace["h.1.resid_pre"], trace["h.0.resid_post"])


def test_the_stream_is_the_sum_of_what_was_written_to_it(trace):
    for i in range(2):
        h = f"h.{i}"
        pre, mid, post = (trace[f"{h}.resid_{part}"] for part in ("pre", "mid", "post"))
        assert_same_bits(mid, pre + trace[f"{h}.attn.out"])
        assert_same_bits(post, mid + trace[f"{h}.mlp.out"])


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["h.*.attn.pattern"], ["h.0.attn.pattern", "h.1.attn.pattern"]),
        (["logits", "embed"], ["embed", "logits"]),
        (["h.1.resid_*"], ["h.1.resid_pre", "h.1.resid_mid", "h.1.resid_post"]),
        (["h.0.resid_post", "h.0.resid_post"], ["h.0.resid_post"]),
        (["ln_?"], ["ln_f"]),
        (["*"], trace_names(2)),
        ([], []),
    ],
)
def test_names_choose_what_is_kept(patterns, expected):
    config = nano()
    planner = Traced(config, rows=5, names=patterns, dtype="float64")
    run(planner, random_params(config), config, [5])
    assert list(planner.arrays) == expected
    assert all(any(fnmatch.fnmatch(name, p) for p in patterns) for name in planner.arrays)


@pytest.mark.parametrize("name", ["h.2.ln_1", "H.0.ln_1", "attn", "", "h.*.attn.score"])
def test_a_name_that_matches_nothing_is_refused(name):
    with pytest.raises(ArgumentError, match="no intermediate is called"):
        Traced(nano(), rows=5, names=["logits", name])


def test_a_trace_follows_one_sequence():
    config = nano()
    laid = segments([1, 2], [Cache(config), Cache(config)])
    with pytest.raises(ArgumentError, match="one sequence, not 2"):
        Traced(config, rows=3).fit(laid)


# -- memory ---------------------------------------------------------------------------------------


def peak_of(call) -> int:
    """The most bytes that `call` held at one time."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_decode_step_allocates_nothing_but_a_few_rows(real_params):
    params = real_params["float32"]
    planner, cache = Reused(REAL, rows=1, capacity=600), Cache(REAL, 600)
    cache.lengths[...] = 500  # what was read does not matter
    cache.keys[...] = cache.values[...] = 0

    def step():
        laid = segments([1], [cache])
        forward(np.array([3]), laid, params, REAL, planner.fit(laid))

    step()
    # NumPy divides (H, T, S) by (H, T, 1) through a buffer of 8192 elements: 33 KB at most.
    # Measured 27 KB; the buffers that it did not allocate take 200 KB.
    assert peak_of(step) < 40_000


def test_a_long_prompt_never_holds_all_scores_at_once(real_params):
    length = 1024
    params = real_params["float32"]._replace(h=real_params["float32"].h[:1])
    cache = Cache(REAL, length)
    laid = segments([length], [cache])
    ids = random_ids(REAL, length)
    all_scores = REAL.n_head * length * length * 4  # (H, T, T): 50 MB
    stream = length * REAL.n_embd * 4  # (N, C): 3 MB
    planner = Reused(REAL, rows=length, capacity=length)
    kept = sum(buffer.nbytes for buffer in planner.buffers.values())
    peak = peak_of(lambda: forward(ids, laid, params, REAL, planner.fit(laid)))
    # Four tiles of 64 rows, and rows as wide as 7 streams (three of them qkv) and 2 * 4.
    assert kept == all_scores / 4 + 15 * stream
    # On top of them: the squares in layer_norm, one (N, C). Measured 3.2 MB.
    assert peak < 1.5 * stream < all_scores / 8
