"""Laws of GPT-2 and of decoding: those that hold, and those that people expect and that fail."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import random_ids, random_params, random_tensors, run_page

import numpygpt
from numpygpt import ops
from numpygpt.api import Model
from numpygpt.cache import Cache, segments
from numpygpt.decoding import choose, log_probability
from numpygpt.decoding.filters import temperature, top_k
from numpygpt.errors import ContextError
from numpygpt.model import attend, forward, split_heads, unembed
from numpygpt.params import Config, Linear, pack
from numpygpt.plans import Fresh, Tile

SMALL = Config(vocab_size=29, n_ctx=24, n_embd=16, n_layer=2, n_head=4)

# Largest difference of logits in float64, as a fraction of the largest logit, when only the order
# of sums changes. Products of at most 64 terms in two blocks: sqrt(64) u = 9e-16 for each, and
# about ten of them on the way. Measured: 9.4e-16.
ROUNDING = 1e-14
# What is refuted must miss by this much; measured: 0.13 to 0.57.
WIDE = 0.05


def numbers(size, least=-30.0, most=30.0):
    return hnp.arrays(np.float64, size, elements=st.floats(least, most, width=32))


def gap(actual, expected) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@pytest.fixture(scope="module", params=["float32", "float64"])
def model(request):
    return Model(SMALL, random_params(SMALL, dtype=request.param))


@pytest.fixture(scope="module")
def double():
    return random_params(SMALL)


# -- the primitives -------------------------------------------------------------------------------


@given(numbers((3, 7)), st.floats(-1e3, 1e3))
def test_softmax_is_blind_to_a_shift(x, shift):
    # x + shift is rounded: an error of 1e3 u in the exponent is the same relative error outside.
    np.testing.assert_allclose(ops.softmax(x + shift), ops.softmax(x), rtol=1e-12, atol=0)


@given(hnp.arrays(np.float64, (3, 7), elements=st.floats(-1e300, 1e300)))
def test_softmax_rows_are_distributions(x):
    pattern = ops.softmax(x)
    assert (pattern >= 0).all()
    # Seven numbers, each divided with one rounding of u = 1.1e-16 by a sum with a few.
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=0, atol=1e-15)


@given(numbers(9, -1e3, 1e3))
@pytest.mark.parametrize("gelu", [ops.gelu, ops.gelu_new])
def test_gelu_of_x_less_gelu_of_minus_x_is_x(gelu, x):
    # The halves of 1 + tanh have errors of u, times x.
    np.testing.assert_allclose(gelu(x) - gelu(-x), x, rtol=5e-16, atol=5e-324)


@given(numbers((2, 8)), st.floats(-100, 100))
def test_layer_norm_is_blind_to_a_shift(x, shift):
    assume((x.std(axis=-1) > 1e-2).all())
    shifted, plain = (ops.layer_norm(rows, np.ones(8)) for rows in (x + shift, x))
    # x + shift is rounded by at most 130 u = 1.5e-14, divided by a deviation of at least 1e-2.
    np.testing.assert_allclose(shifted, plain, rtol=0, atol=5e-12)


@given(numbers((2, 8)), st.floats(0.1, 10))
def test_layer_norm_is_blind_to_a_positive_scale_up_to_epsilon(x, scale):
    variance = x.var(axis=-1, keepdims=True)
    assume((variance > 0.1).all())
    eps = 1e-5
    scaled, plain = (ops.layer_norm(rows, np.ones(8), eps=eps) for rows in (x * scale, x))
    # x / sqrt(v + eps) against x / sqrt(v + eps / scale**2): to first order eps / (2 v) of it.
    bound = np.abs(plain) * eps / (2 * variance) * max(1, scale**-2)
    assert (np.abs(scaled - plain) <= bound * 1.01 + 1e-13).all()


# -- attention ------------------------------------------------------------------------------------


class Unmasked(Fresh):
    """Every token sees every token: the same page, with another plan."""

    def fit(self, segments):
        plan = super().fit(segments)
        ((tile,),) = plan.h[0].attn.tiles
        tile = tile._replace(future=np.zeros_like(tile.future))
        return plan._replace(h=[h._replace(attn=h.attn._replace(tiles=[[tile]])) for h in plan.h])


def placeless(params):
    """The same model without position vectors."""
    return params._replace(wpe=np.zeros_like(params.wpe))


IDS = random_ids(SMALL, 9)
ORDER = np.array([3, 0, 7, 1, 5, 2, 6, 4, 8])  # leaves the last token where it is


def test_without_mask_and_positions_the_model_is_permutation_equivariant(double):
    plain, permuted = (
        run_page(ids, placeless(double), SMALL, Unmasked(SMALL)) for ids in (IDS, IDS[ORDER])
    )
    assert gap(permuted, plain[ORDER]) <= ROUNDING


@pytest.mark.parametrize(
    ("positions", "planner"), [(False, Fresh), (True, Unmasked)], ids=["mask", "positions"]
)
def test_refuted_equivariance_with_the_mask_or_with_positions(double, positions, planner):
    params = double if positions else placeless(double)
    plain, permuted = (run_page(ids, params, SMALL, planner(SMALL)) for ids in (IDS, IDS[ORDER]))
    assert gap(permuted, plain[ORDER]) > WIDE


def last_rows(params, layers):
    """The last row of logits for two orders of the earlier tokens, without positions."""
    params = placeless(params)._replace(h=params.h[:layers])
    return [run_page(ids, params, SMALL)[-1] for ids in (IDS[ORDER], IDS)]


def test_in_one_block_the_last_row_ignores_the_order_of_the_earlier_tokens(double):
    assert gap(*last_rows(double, layers=1)) <= ROUNDING


def test_refuted_in_two_blocks_the_last_row_ignores_the_order_of_the_earlier_tokens(double):
    assert gap(*last_rows(double, layers=2)) > WIDE


def test_heads_may_be_renamed(double):
    """A permutation of the heads, with the matching rows of c_proj, changes nothing."""
    heads = np.arange(16).reshape(4, 4)[[2, 0, 3, 1]].ravel()
    columns = np.concatenate([part * 16 + heads for part in range(3)])

    def rename(attn):
        (w, b), (w_out, b_out) = attn
        return attn._replace(
            c_attn=Linear(w[:, columns], b[columns]), c_proj=Linear(w_out[heads], b_out)
        )

    renamed = double._replace(h=tuple(p._replace(attn=rename(p.attn)) for p in double.h))
    assert gap(run_page(IDS, renamed, SMALL), run_page(IDS, double, SMALL)) <= ROUNDING


def test_equal_keys_give_the_mean_of_the_visible_values():
    rng = np.random.default_rng(0)
    q, values = rng.normal(size=(2, 4, 5, 3))
    keys = np.broadcast_to(rng.normal(size=(4, 1, 3)), (4, 5, 3))
    tile = Tile(slice(0, 1), slice(0, 5), 5, np.triu(np.ones((5, 5), bool), 1))
    means = np.cumsum(values, axis=1) / np.arange(1, 6)[:, None]
    # Five numbers near 1, a few roundings.
    (mixed,) = attend(q[None], keys[None], values[None], 0.5, tile)
    np.testing.assert_allclose(mixed, means, rtol=0, atol=2e-15)


def test_each_head_stays_inside_the_values_it_mixes(double):
    laid = segments([9], [Cache(SMALL, 9, np.float64)])
    plan = Fresh(SMALL).fit(laid)
    ((tile,),) = plan.h[0].attn.tiles
    q, k, v = split_heads(np.random.default_rng(1).normal(size=(9, 48)), 3, 9, 4)
    mixed = attend(q, k, v, 0.5, tile)
    assert (mixed <= np.maximum.accumulate(v, axis=2) + 1e-15).all()
    assert (mixed >= np.minimum.accumulate(v, axis=2) - 1e-15).all()


# -- blocks and positions -------------------------------------------------------------------------


def test_a_block_whose_projections_are_zero_is_the_identity():
    tensors = random_tensors(SMALL)
    for name in ("attn.c_proj", "mlp.c_proj"):
        for part in ("weight", "bias"):
            tensors[f"h.1.{name}.{part}"] *= 0
    params = pack(SMALL, tensors)
    without = params._replace(h=params.h[:1])
    assert_same_bits(run_page(IDS, params, SMALL), run_page(IDS, without, SMALL))


@given(st.floats(-2, 2))
def test_a_position_code_equal_in_all_features_is_invisible(step):
    """The naive code e_i = (i, ..., i): every layer norm subtracts it."""
    params = random_params(SMALL)
    code = step * np.arange(24.0)[:, None] * np.ones(16)
    naive = run_page(IDS, params._replace(wpe=code), SMALL)
    # The stream is up to 16 times larger than without, and so is its rounding.
    assert gap(naive, run_page(IDS, placeless(params), SMALL)) <= 16 * ROUNDING


def test_refuted_a_position_code_that_differs_between_features_is_invisible(double):
    assert gap(run_page(IDS, double, SMALL), run_page(IDS, placeless(double), SMALL)) > WIDE


# -- no look-ahead, chunks, batches ---------------------------------------------------------------


@given(data=st.data())
def test_a_later_token_changes_no_earlier_bit(model, data):
    """Holds bitwise at any chunk size: a masked score is -inf, its weight exactly 0."""
    length = data.draw(st.integers(2, 24))
    at = data.draw(st.integers(1, length - 1))
    chunk = data.draw(st.sampled_from([1, 5, 256]))
    ids = random_ids(SMALL, length)
    edited = ids.copy()
    edited[at:] = data.draw(hnp.arrays(int, length - at, elements=st.integers(0, 28)))
    assert_same_bits(model.logits(edited, chunk=chunk)[:at], model.logits(ids, chunk=chunk)[:at])


@given(data=st.data())
def test_leaving_out_the_later_tokens_changes_earlier_rows_only_by_rounding(double, data):
    """Another number of rows may make BLAS add in another order; with chunk=1 it cannot."""
    kept = data.draw(st.integers(1, 23))
    model, ids = Model(SMALL, double), random_ids(SMALL, 24)
    assert gap(model.logits(ids[:kept]), model.logits(ids)[:kept]) <= ROUNDING
    assert_same_bits(model.logits(ids[:kept], chunk=1), model.logits(ids, chunk=1)[:kept])


@given(cuts=st.sets(st.integers(1, 22)), tile_rows=st.sampled_from([1, 3, 128]))
def test_any_split_into_chunks_gives_the_same_logits_within_rounding(double, cuts, tile_rows):
    ids, cache, rows = random_ids(SMALL, 23), Cache(SMALL, dtype=np.float64), []
    for start, stop in itertools.pairwise([0, *sorted(cuts), 23]):
        laid = segments([stop - start], [cache])
        plan = Fresh(SMALL, tile_rows).fit(laid)
        rows.append(unembed(forward(ids[start:stop], laid, double, SMALL, plan), double))
    assert gap(np.concatenate(rows), run_page(ids, double, SMALL)) <= ROUNDING


@given(chunk=st.integers(1, 30))
def test_any_chunk_size_gives_the_same_logits_within_rounding(double, chunk):
    model, ids = Model(SMALL, double), random_ids(SMALL, 24)
    expected = run_page(ids, double, SMALL)
    assert gap(model.logits(ids, chunk=chunk), expected) <= ROUNDING
    assert gap(model.logits(ids, last=True, chunk=chunk), expected[-1]) <= ROUNDING


def test_with_chunk_1_full_cached_batched_and_single_runs_give_the_same_bits(model):
    prompts = [random_ids(SMALL, length, length).tolist() for length in (3, 1, 9, 5)]
    chosen = {"max_new_tokens": 10, "chunk": 1}
    batch = model.generate(prompts, **chosen)
    for prompt, row in zip(prompts, batch, strict=True):
        single = model.generate(prompt, **chosen)
        assert (single.ids, single.logprobs) == (row.ids, row.logprobs)
        # Uncached: the whole text read again for every token.
        text = prompt + row.ids
        for i, (token, logprob) in enumerate(zip(row.ids, row.logprobs, strict=True)):
            last = model.logits(text[: len(prompt) + i], last=True, chunk=1)
            assert_same_bits(last, model.logits(text[:-1], chunk=1)[len(prompt) + i - 1])
            assert (choose(last), log_probability(last, token)) == (token, logprob)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_real_sizes_chunk_1_gives_the_same_bits_and_no_token_looks_ahead(dtype):
    config = Config(vocab_size=60, n_ctx=160, n_layer=1)
    model = Model(config, random_params(config, dtype=dtype))
    ids = random_ids(config, 140)
    batch = [ids[:20].tolist(), ids[:3].tolist(), ids[40:41].tolist()]
    for prompt, row in zip(batch, model.generate(batch, max_new_tokens=5, chunk=1), strict=True):
        single = model.generate(prompt, max_new_tokens=5, chunk=1)
        assert (single.ids, single.logprobs) == (row.ids, row.logprobs)
        full = model.logits(prompt + row.ids, chunk=1)[len(prompt) - 1 : -1]
        assert row.logprobs == [
            log_probability(logits, token) for logits, token in zip(full, row.ids, strict=True)
        ]
    edited = np.append(ids[:130], (ids[130:] + 1) % 60)
    assert_same_bits(model.logits(edited)[:130], model.logits(ids)[:130])


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_batch_chooses_greedily_what_its_rows_choose_alone(double, lengths, seed):
    model = Model(SMALL, double)
    prompts = [random_ids(SMALL, length, seed + i).tolist() for i, length in enumerate(lengths)]
    for prompt, row in zip(prompts, model.generate(prompts, max_new_tokens=6), strict=True):
        single = model.generate(prompt, max_new_tokens=6)
        logits = model.logits(prompt + row.ids[:-1])[len(prompt) - 1 :]
        second, first = np.sort(logits, axis=-1)[:, -2:].T
        # Where the two best are closer than rounding, either may be chosen. Never seen here.
        decided = first - second > 2 * ROUNDING * np.abs(logits).max()
        until = len(row.ids) if decided.all() else int(decided.argmin())
        assert single.ids[:until] == row.ids[:until]
        np.testing.assert_allclose(
            single.logprobs[:until], row.logprobs[:until], atol=ROUNDING * np.abs(logits).max()
        )


@given(data=st.data())
def test_a_truncated_cache_reads_on_with_the_same_bits(model, data):
    params = model.params
    length = data.draw(st.integers(1, 20))
    kept = data.draw(st.integers(0, length))
    more = random_ids(SMALL, data.draw(st.integers(1, 24 - kept)), seed=1)
    fresh, used = (Cache(SMALL, dtype=model.dtype) for _ in range(2))

    def read(cache, ids):
        laid = segments([len(ids)], [cache])
        return forward(ids, laid, params, SMALL, Fresh(SMALL).fit(laid))

    for token in random_ids(SMALL, length)[:kept]:
        read(fresh, np.array([token]))
    for token in random_ids(SMALL, length):
        read(used, np.array([token]))
    used.truncate(kept)
    assert used.length == fresh.length == kept
    assert_same_bits(read(used, more), read(fresh, more))


@pytest.mark.parametrize("length", [-1, 4, 100])
def test_a_cache_is_truncated_only_to_what_it_has(length):
    cache = Cache(SMALL)
    cache.lengths[...] = 3
    with pytest.raises(ContextError, match="cannot truncate"):
        cache.truncate(length)
    assert cache.length == 3


# -- filters --------------------------------------------------------------------------------------

LOGITS = numbers(st.integers(1, 12)) | hnp.arrays(
    np.float64, st.integers(1, 12), elements=st.sampled_from([-1.0, 0.0, 2.0])
)


@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_exactly_k_and_lower_ids_among_equals(logits, k):
    kept = np.flatnonzero(np.isfinite(top_k(logits, k)))
    by_rank = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert kept.tolist() == sorted(by_rank[:k])
    np.testing.assert_array_equal(top_k(logits, k)[kept], logits[kept])


@given(LOGITS, st.integers(1, 12))
def test_top_k_is_nested_in_k(logits, k):
    few, more = (np.isfinite(top_k(logits, size)) for size in (k, k + 1))
    assert (few <= more).all()


@given(LOGITS, st.integers(1, 12), st.integers(1, 12))
def test_top_k_twice_is_the_smaller_top_k(logits, j, k):
    np.testing.assert_array_equal(top_k(top_k(logits, j), k), top_k(logits, min(j, k)))


def entropy(logits):
    p = ops.softmax(logits)
    return -float(np.sum(p * np.log(np.where(p > 0, p, 1))))


@given(LOGITS, st.floats(0.05, 20), st.floats(1, 50))
def test_entropy_never_falls_with_the_temperature(logits, t, factor):
    cold, hot = (entropy(temperature(logits, value)) for value in (t, t * factor))
    # Entropies are below log 12 = 2.5, with the rounding of exponents up to 1200.
    assert hot >= cold - 1e-12


@given(LOGITS, st.floats(0.05, 20))
def test_temperature_keeps_the_choice_and_1_keeps_everything(logits, t):
    top = logits[choose(temperature(logits, t))]
    # Dividing may round two neighbours to one number, and the lower id wins then.
    assert top >= logits.max() - 1e-14 * abs(logits.max())
    assert_same_bits(temperature(logits, 1.0), logits)


# -- choosing -------------------------------------------------------------------------------------


class Fixed:
    """A generator that always draws the same number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


UNIFORM = st.floats(0, 1, exclude_max=True) | st.sampled_from(
    [0.0, math.nextafter(0, 1), math.nextafter(1, 0), 0.5]
)


@given(LOGITS, st.data(), UNIFORM)
def test_choose_never_picks_what_is_ruled_out(logits, data, number):
    out = data.draw(hnp.arrays(bool, len(logits)))
    assume(not out.all())
    token = choose(np.where(out, -np.inf, logits), Fixed(number))
    assert not out[token]


@pytest.mark.parametrize("size", [3, 1000, 50257])
def test_the_largest_float_below_1_picks_the_last_token_that_is_possible(size):
    logits = np.random.default_rng(size).normal(size=size) - 5
    logits[-size // 3 :] = -np.inf
    token = choose(logits, Fixed(math.nextafter(1, 0)))
    assert np.isfinite(logits[token])
    assert token >= size // 2


@given(LOGITS)
def test_greedy_takes_the_lowest_id_among_the_likeliest(logits):
    assert choose(logits) == logits.tolist().index(max(logits))


def test_choose_reads_a_token_off_the_cumulative_distribution():
    logits = np.log([0.1, 0.2, 0.3, 0.4])
    drawn = [choose(logits, Fixed(u)) for u in (0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, 0.99)]
    assert drawn == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sampled_frequencies_are_the_probabilities():
    p, n = np.array([0.5, 0.3, 0.15, 0.05]), 4000
    rng = np.random.default_rng(7)
    counts = np.bincount([choose(np.log(p), rng) for _ in range(n)], minlength=4)
    # Chi-square with three degrees of freedom exceeds 16.27 once in a thousand seeds.
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 16.27


def test_one_uniform_number_is_drawn_for_each_token():
    logits = np.zeros(50)
    drawn, plain = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(5):
        choose(logits, drawn)
        plain.random()
    assert drawn.random() == plain.random()


@given(LOGITS)
def test_log_probabilities_are_those_of_a_distribution(logits):
    logprobs = [log_probability(logits, token) for token in range(len(logits))]
    assert max(logprobs) <= 1e-15
    # Twelve exponentials of numbers below 61, each with an error of 61 u.
    assert abs(math.fsum(math.exp(value) for value in logprobs) - 1) < 1e-13


# -- decoding -------------------------------------------------------------------------------------

SAMPLED = {"temperature": 1.3, "top_k": 12, "max_new_tokens": 8, "chunk": 1}


@given(lengths=st.lists(st.integers(1, 12), max_size=4), at=st.integers(0, 4), seed=st.integers(0))
@settings(max_examples=20)
def test_the_same_seed_gives_the_same_sample_whatever_batch_is_around_it(model, lengths, at, seed):
    prompt = [3, 1, 4]
    batch = [random_ids(SMALL, length, i).tolist() for i, length in enumerate(lengths)]
    at = min(at, len(batch))
    batch.insert(at, prompt)
    alone = model.generate(prompt, seed=seed, **SAMPLED)
    assert model.generate(batch, seed=seed, **SAMPLED)[at] == alone


def test_another_seed_gives_another_sample(model):
    samples = {tuple(model.generate([3], seed=seed, **SAMPLED).ids) for seed in range(20)}
    assert len(samples) > 15


def test_greedy_is_top_1_and_the_limit_of_low_temperature(model):
    greedy = model.generate([3, 1, 4], max_new_tokens=12)
    for chosen in (
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 1e-9},
        {"temperature": 1e-100},  # a float32 would overflow
        {"temperature": 0},
        {"temperature": None},
    ):
        assert model.generate([3, 1, 4], max_new_tokens=12, seed=5, **chosen).ids == greedy.ids


@pytest.mark.parametrize("length", [1, 10, 24])
def test_prompt_and_continuation_may_have_one_token_more_than_there_are_positions(model, length):
    ids = random_ids(SMALL, length).tolist()
    result = model.generate(ids, max_new_tokens=25 - length)
    assert len(result.ids) == 25 - length
    with pytest.raises(ContextError, match=rf"{length} prompt \+ {26 - length} new tokens"):
        model.generate(ids, max_new_tokens=26 - length)


def test_finish_reason_says_whether_a_stop_token_came(model):
    free = model.generate([3, 1, 4], max_new_tokens=10)
    assert (free.finish_reason, len(free.ids), len(free.logprobs)) == ("length", 10, 10)
    stop = free.ids[6]
    first = free.ids.index(stop)
    stopped = model.generate([3, 1, 4], max_new_tokens=10, stop_ids=[stop])
    assert (stopped.finish_reason, stopped.ids) == ("stop", free.ids[:first])
    assert stopped.logprobs == free.logprobs[:first]
    # The very last token that was allowed may be the one that stops.
    last = model.generate([3, 1, 4], max_new_tokens=first + 1, stop_ids=[stop])
    assert (last.finish_reason, last.ids) == ("stop", free.ids[:first])


def test_a_sequence_that_stops_leaves_the_batch_and_the_others_go_on(model):
    prompts = [[3, 1, 4], [5], [9, 2]]
    free = model.generate(prompts, max_new_tokens=10, chunk=1)
    stop = free[0].ids[2]
    stopped = model.generate(prompts, max_new_tokens=10, chunk=1, stop_ids=[stop])
    for before, after in zip(free, stopped, strict=True):
        end = before.ids.index(stop) if stop in before.ids else 10
        assert after.ids == before.ids[:end]
        assert after.finish_reason == ("stop" if end < 10 else "length")


def test_on_step_sees_the_new_token_of_each_running_sequence(model):
    prompts, seen = [[3, 1, 4], [5], [9, 2]], []
    free = model.generate(prompts, max_new_tokens=6, chunk=1, on_step=seen.append)
    tokens = [[step.token for step in steps] for steps in seen]
    assert tokens == [list(step) for step in zip(*(row.ids for row in free), strict=True)]
    assert [[step.sequence for step in steps] for steps in seen] == [[0, 1, 2]] * 6
    stop, seen = free[1].ids[0], []
    rows = model.generate(prompts, max_new_tokens=6, chunk=1, stop_ids=[stop], on_step=seen.append)
    lengths = [len(row.ids) + (row.finish_reason == "stop") for row in rows]
    assert [len(step) for step in seen] == [
        sum(length > step for length in lengths) for step in range(max(lengths))
    ]


def test_no_new_tokens_are_an_empty_continuation(model):
    result = model.generate([1, 2], max_new_tokens=0)
    assert (result.ids, result.logprobs, result.finish_reason) == ([], [], "length")


# -- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare():
    return numpygpt.load("shakespeare")


def test_generation_stops_at_end_of_text(shakespeare):
    """A model made to say nothing else: hidden states of ones, and one row of the head."""
    end, params = shakespeare.tokenizer.end_of_text, shakespeare.params
    norm = params.ln_f._replace(g=params.ln_f.g * 0, b=params.ln_f.b * 0 + 1)
    head = np.zeros_like(params.head)
    head[end] = 1
    mute = Model(shakespeare.config, params._replace(ln_f=norm, head=head), shakespeare.tokenizer)
    silent = mute.generate("ROMEO:", max_new_tokens=3)
    assert (silent.ids, silent.text, silent.finish_reason) == ([], "", "stop")
    assert list(mute.stream("ROMEO:", max_new_tokens=3)) == []
    assert mute.generate("ROMEO:", max_new_tokens=3, stop_ids=()).ids == [end] * 3


@pytest.mark.parametrize("chosen", [{}, {"temperature": 1.0, "seed": 4}])
def test_the_pieces_of_a_stream_are_the_text(shakespeare, chosen):
    chosen = {"max_new_tokens": 24, **chosen}
    result = shakespeare.generate("ROMEO:", **chosen)
    pieces = list(shakespeare.stream("ROMEO:", **chosen))
    assert len(pieces) > 10
    assert "".join(pieces) == result.text == shakespeare.tokenizer.decode(result.ids)


def test_a_model_without_tokenizer_generates_ids_alone(model):
    result = model.generate([1, 2], max_new_tokens=3)
    assert (result.text, len(result.ids)) == (None, 3)
