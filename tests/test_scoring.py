"""Scoring against loops, its windows, its statistics, and what two models are compared by."""

from __future__ import annotations

import decimal
import itertools
import math
import statistics
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_ids, random_params, random_tensors

import numpygpt
from numpygpt import scoring
from numpygpt.api import Model
from numpygpt.divergence import Divergence, divergence
from numpygpt.errors import ArgumentError, Interrupted, NumpyGPTError
from numpygpt.params import pack
from numpygpt.scoring import Score, Summary, score, total, window_and_stride, windows

CONFIG = nano()  # 17 tokens, 12 positions
PARAMS = random_params(CONFIG)
OTHER = random_params(CONFIG, seed=1)
MODEL = Model(CONFIG, PARAMS)
IDS = random_ids(CONFIG, 40)
WAYS = [(12, 6), (13, 12), (13, 1), (5, 3), (2, 1), (7, 6)]

# Two ways to the same log-probability in float64: logits near 1, sums of at most 17 terms in
# another order. Measured: 2.7e-15. The mildest mistake below changes a token by 0.4.
ROUNDING = 1e-13


def log_softmax(logits) -> list[float]:
    """By the formula, one row, exactly summed."""
    top = float(max(logits))
    total = math.log(math.fsum(math.exp(float(x) - top) for x in logits))
    return [float(x) - top - total for x in logits]


def window_of(token: int, window: int, stride: int) -> int:
    """Where the first window that holds a token begins: no window but the first to reach it."""
    return next(begin for begin in itertools.count(0, stride) if begin + window > token)


def naive(ids, window, stride, model=MODEL) -> list[list[float]]:
    """The distribution at each token but the first: one forward pass for each."""
    return [
        log_softmax(model.logits(ids[window_of(t, window, stride) : t], last=True))
        for t in range(1, len(ids))
    ]


# -- windows --------------------------------------------------------------------------------------


@st.composite
def cuts(draw):
    total = draw(st.integers(1, 120))
    window = draw(st.integers(2, 40))
    return total, draw(st.integers(1, total)), window, draw(st.integers(1, window - 1))


@given(cuts())
def test_every_token_is_scored_once_with_the_promised_context(cut):
    total, start, window, stride = cut
    laid = list(windows(*cut))
    assert [t for w in laid for t in range(w.first, w.end)] == list(range(start, total))
    for begin, end, first in laid:
        assert 0 <= begin < first < end <= total
        assert end - begin <= window
        assert begin % stride == 0
        assert all(t - begin >= min(t, window - stride) for t in range(first, end))
        assert all(begin == window_of(t, window, stride) for t in range(first, end))


def test_windows_of_the_transformers_page():
    """2100 tokens at GPT-2's size: what its loop reads."""
    assert list(windows(2100, 1, 1024, 512)) == [
        (0, 1024, 1),
        (512, 1536, 1024),
        (1024, 2048, 1536),
        (1536, 2100, 2048),
    ]
    assert list(windows(2100, 1600, 1024, 512)) == [(1024, 2048, 1600), (1536, 2100, 2048)]
    assert list(windows(1024, 1, 1024, 512)) == [(0, 1024, 1)]
    assert list(windows(1, 1, 1024, 512)) == list(windows(5, 5, 4, 2)) == []


@pytest.mark.parametrize(
    ("n_ctx", "window", "stride", "expected"),
    [
        (1024, None, None, (1024, 512)),
        (1024, None, 1, (1024, 1)),
        (1024, 1025, None, (1025, 512)),
        (1024, 2, None, (2, 1)),
        (1024, np.int64(3), np.uint8(2), (3, 2)),
        (2, None, None, (2, 1)),
        (1, None, None, (2, 1)),
    ],
)
def test_defaults_of_window_and_stride(n_ctx, window, stride, expected):
    settled = window_and_stride(window, stride, n_ctx)
    assert settled == expected
    assert {type(value) for value in settled} == {int}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 14}, r"window must be an integer from 2 to 13 \(.*12 positions\), not 14"),
        ({"window": 1}, "window must be .* not 1"),
        ({"window": 6.0}, "window must be .* not 6.0"),
        ({"window": True}, "window must be .* not True"),
        ({"window": "6"}, "window must be .* not '6'"),
        ({"stride": 0}, r"stride must be an integer from 1 to 11 \(.*\), not 0"),
        ({"stride": True}, "stride must be .* not True"),
        ({"stride": 12}, "stride must be .* not 12"),
        ({"window": 5, "stride": 5}, "stride must be an integer from 1 to 4 .* not 5"),
        ({"start": 0}, r"start must be an integer from 1 to 40 \(there are 40 tokens\), not 0"),
        ({"start": 41}, "start must be .* not 41"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    start = arguments.pop("start", 1)
    with pytest.raises(ArgumentError, match=message):
        score(IDS, start, PARAMS, CONFIG, **arguments)
    with pytest.raises(ArgumentError, match=message):
        divergence(IDS, start, (PARAMS, CONFIG), (OTHER, CONFIG), **arguments)


# -- one model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), WAYS)
def test_scores_are_those_of_a_loop(window, stride):
    rows = score(IDS, 1, PARAMS, CONFIG, window=window, stride=stride)
    expected = naive(IDS, window, stride)
    came = list(zip(expected, IDS[1:].tolist(), strict=True))
    np.testing.assert_allclose(rows.logprobs, [p[t] for p, t in came], rtol=0, atol=ROUNDING)
    entropies = [-math.fsum(math.exp(x) * x for x in p) for p in expected]
    np.testing.assert_allclose(rows.entropies, entropies, rtol=0, atol=ROUNDING)
    assert rows.ranks.tolist() == [sorted(p, reverse=True).index(p[t]) + 1 for p, t in came]


@pytest.mark.parametrize("window", [12, 13])
def test_a_text_of_one_window_is_one_pass(window):
    ids = IDS[:window]
    expected = [
        log_softmax(row)[t] for row, t in zip(MODEL.logits(ids[:12]), ids[1:], strict=False)
    ]
    rows = score(ids, 1, PARAMS, CONFIG, window=window)
    np.testing.assert_allclose(rows.logprobs, expected, rtol=0, atol=ROUNDING)


MISTAKES = {
    "the target is the token just read": lambda p, t: p[t - 1][IDS[t - 1]],
    "the target is one further": lambda p, t: p[t - 1][IDS[min(t + 1, 39)]],
    "one row late": lambda p, t: p[min(t, 38)][IDS[t]],
    "one token less of context": lambda p, t: log_softmax(
        MODEL.logits(IDS[window_of(t, 12, 6) + (t > 1) : t], last=True)
    )[IDS[t]],
    "windows one token longer": lambda p, t: log_softmax(
        MODEL.logits(IDS[window_of(t, 13, 6) : t], last=True)
    )[IDS[t]],
    "a window's first token is scored": lambda p, t: (
        p[t - 1][IDS[t]] if t % 6 else log_softmax(MODEL.logits(IDS[t : t + 1], last=True))[IDS[t]]
    ),
    "log of base 2": lambda p, t: p[t - 1][IDS[t]] / math.log(2),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_tolerance_tells_mistakes(mistake):
    expected = naive(IDS, 12, 6)
    wrong = [mistake(expected, t) for t in range(1, len(IDS))]
    right = score(IDS, 1, PARAMS, CONFIG, window=12, stride=6).logprobs
    gap = float(np.abs(wrong - right).max())
    assert gap > 0.1 > 1e10 * ROUNDING, gap


@pytest.mark.parametrize("chunk", [1, 2, 5, 256])
@pytest.mark.parametrize(("block", "part"), [(1, 1), (17 * 3, 17 * 2), (17 * 5, 10**9)])
def test_blocks_and_chunks_change_nothing_but_rounding(monkeypatch, chunk, block, part):
    expected = score(IDS, 1, PARAMS, CONFIG, window=9, stride=4)
    monkeypatch.setattr(scoring, "BLOCK", block)
    monkeypatch.setattr(scoring, "PART", part)
    rows = score(IDS, 1, PARAMS, CONFIG, window=9, stride=4, chunk=chunk)
    np.testing.assert_allclose(rows.logprobs, expected.logprobs, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(rows.entropies, expected.entropies, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(rows.ranks, expected.ranks)


@pytest.mark.parametrize("start", [1, 2, 6, 7, 12, 13, 39, 40])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_continuation_is_a_slice_of_the_whole(start, dtype):
    """With chunk=1, to the last bit: the context of a token does not depend on the start."""
    params = random_params(CONFIG, dtype=dtype)
    whole = score(IDS, 1, params, CONFIG, chunk=1)
    part = score(IDS, start, params, CONFIG, chunk=1)
    for all_of_it, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(some, all_of_it[start - 1 :])


def test_the_last_token_is_never_read(monkeypatch):
    read = []

    def spy(self, new, caches):
        read.extend(np.concatenate(new).tolist())
        return pieces(self, new, caches)

    pieces = scoring.Feeder.pieces
    monkeypatch.setattr(scoring.Feeder, "pieces", spy)
    rows = score(np.array([3, 4, 5, 16]), 1, PARAMS, CONFIG)
    assert read == [3, 4, 5]
    assert len(rows.logprobs) == 3


def test_a_float32_model_loses_nothing_beyond_its_logits():
    """The row of a big vocabulary, with the same logits: only the normalising is compared."""
    config = nano(vocab_size=50257, n_layer=1)
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, 4)
    logits = Model(config, params).logits(ids[:3], chunk=1)
    assert logits.dtype == np.float32
    expected = [log_softmax(row)[t] for row, t in zip(logits, ids[1:], strict=True)]
    rows = score(ids, 1, params, config, chunk=1)
    # Each float32 exponential is off by up to 2 ulp = 1.2e-7, either way; 50257 of them nearly
    # cancel in a float64 sum. Measured: 1.2e-8. The logits themselves are off by 1e-5.
    np.testing.assert_allclose(rows.logprobs, expected, rtol=0, atol=5e-8)
    # With the difference of two logits and the logarithm in float32 it is wrong by far more.
    shifted = logits - logits.max(axis=-1, keepdims=True)
    single = np.log(np.exp(shifted).sum(axis=-1))
    wrong = shifted[np.arange(3), ids[1:]] - single
    assert np.abs(wrong - expected).max() > 2e-7


def test_a_model_that_knows_nothing():
    """All logits are 0: every token has probability 1/17, and ties go to the lower id."""
    config = nano(tie_word_embeddings=False)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] *= 0
    rows = score(IDS, 1, pack(config, tensors), config)
    # exp, sum and log round once or twice each, at numbers up to log 17 = 2.8.
    np.testing.assert_allclose(rows.logprobs, -math.log(17), rtol=0, atol=2e-15)
    np.testing.assert_allclose(rows.entropies, math.log(17), rtol=0, atol=2e-15)
    assert rows.ranks.tolist() == (IDS[1:] + 1).tolist()
    result = Score(IDS[1:], *rows, None, 12, 6)
    assert result.perplexity == pytest.approx(17, rel=4e-15)


def test_ranks_with_ties():
    logits = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]] * 6)
    assert scoring._ranks(logits, np.arange(6)).tolist() == [4, 1, 2, 6, 3, 5]


def test_a_certain_token_has_no_entropy():
    """Others at -1000 have the probability 0 in float64, and no warning is raised."""
    config = nano(vocab_size=3, n_ctx=2, n_layer=1, tie_word_embeddings=False)
    tensors = random_tensors(config)
    tensors["ln_f.weight"] *= 0
    tensors["ln_f.bias"][:] = 1
    tensors["lm_head.weight"][:] = np.array([[1000.0], [0.0], [0.0]]) / 8
    with np.errstate(all="raise"):
        rows = score(np.array([1, 0, 2]), 1, pack(config, tensors), config)
    assert rows.logprobs.tolist() == [0.0, -1000.0]
    assert rows.ranks.tolist() == [1, 3]
    assert [math.copysign(1, x) for x in rows.entropies] == [1, 1]
    assert not rows.entropies.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    config = nano(tie_word_embeddings=False)
    tensors = random_tensors(config)
    tensors["lm_head.weight"][3, 0] = bad
    params = pack(config, tensors)
    with pytest.raises(NumpyGPTError, match="its weights are damaged or too large"):
        score(IDS[:2], 1, params, config)
    with pytest.raises(NumpyGPTError, match="its weights are damaged or too large"):
        divergence(IDS[:2], 1, (PARAMS, CONFIG), (params, config))


def test_ctrl_c_keeps_what_was_scored():
    done = []

    def stop(tokens):
        done.append(tokens)
        if len(done) == 3:
            raise KeyboardInterrupt

    whole = score(IDS, 5, PARAMS, CONFIG)
    with pytest.raises(Interrupted) as caught:
        score(IDS, 5, PARAMS, CONFIG, on_tokens=stop)
    part, count = caught.value.results, sum(done)
    assert 0 < count < 35
    for some, full in zip(part, whole, strict=True):
        np.testing.assert_array_equal(some[:count], full[:count])
    assert np.isnan(part.logprobs[count:]).all()
    assert np.isnan(part.entropies[count:]).all()
    assert not part.ranks[count:].any()
    result = Score(IDS[5:], *part, 100, 12, 6)
    assert result.count == count
    assert result.perplexity == pytest.approx(math.exp(-whole.logprobs[:count].mean()), rel=1e-14)

    done.clear()
    with pytest.raises(Interrupted) as caught:
        divergence(IDS, 5, (PARAMS, CONFIG), (OTHER, CONFIG), on_tokens=stop)
    half = caught.value.results
    assert half.count == count
    assert half.top_1_agreement == half.same_top[:count].mean()
    np.testing.assert_array_equal(half.logprobs[:count], whole.logprobs[:count])


@pytest.mark.parametrize("first_token", ["skip", "end-of-text"])
def test_a_divergence_says_what_the_first_token_was(first_token):
    assert compare(PARAMS, OTHER, first_token=first_token).first_token == first_token

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        compare(PARAMS, OTHER, first_token=first_token, on_tokens=stop)
    assert caught.value.results.first_token == first_token


def test_progress_counts_every_scored_token_once():
    for start, expected in [(1, 39), (20, 20), (40, 0)]:
        seen = []
        score(IDS, start, PARAMS, CONFIG, chunk=4, on_tokens=seen.append)
        assert sum(seen) == expected
        assert all(seen)


def test_memory_does_not_grow_with_the_text(monkeypatch):
    config = nano(vocab_size=50257, n_ctx=1024, n_layer=1)
    params = random_params(config, dtype=np.float32)
    ids = random_ids(config, 1500)
    monkeypatch.setattr(scoring, "get_threads", lambda: 2)  # each has memory of its own
    tracemalloc.start()
    try:
        rows = score(ids, 1, params, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not np.isnan(rows.logprobs).any()
    # The logits of 333 tokens and, for each of two threads, two arrays for a part: 67 + 8 MB; the
    # rest is this small model. Measured: 77.5 MB. All logits would be 301 MB.
    assert peak < 90e6


# -- statistics of one model ----------------------------------------------------------------------


def result(logprobs, size=None, ranks=None, **changes) -> Score:
    """A Score of these log-probabilities."""
    n = len(logprobs)
    ranks = np.where(np.isnan(logprobs), 0, 1) if ranks is None else np.array(ranks)
    way = {"window": 12, "stride": 6, **changes}
    return Score(np.arange(n), np.array(logprobs), ranks, np.ones(n), size, **way)


def test_the_statistics_by_hand():
    """Probabilities 1/2, 1/4, 1/8 are 1, 2, 3 bits; the first token is not scored."""
    s = result([math.nan, *np.log([1 / 2, 1 / 4, 1 / 8])], size=4)
    # A few roundings of 1.1e-16 each.
    assert s.count == 3
    assert s.nll == pytest.approx(6 * math.log(2), rel=1e-15)
    assert s.bits_per_token == pytest.approx(2, rel=1e-15)
    assert s.bits_per_byte == pytest.approx(6 / 4, rel=1e-15)
    assert s.perplexity == pytest.approx(4, rel=1e-15)
    # The standard deviation of 1, 2, 3 is 1.
    assert s.standard_error == pytest.approx(math.log(2) / math.sqrt(3), rel=1e-15)
    assert s.perplexity_error == pytest.approx(4 * math.log(2) / math.sqrt(3), rel=1e-15)
    assert str(s) == (
        "3 tokens: perplexity 4 +- 1.6, 1.5000 bits per byte "
        "(window 12, stride 6, first token: skip)"
    )
    assert repr(s) == f"<Score of {s}>"
    assert s.summary == Summary(s.count, s.bytes, s.nll, s.standard_error)


def test_statistics_of_nothing_are_not_numbers():
    for empty in (result([]), result([math.nan, math.nan])):
        assert (empty.count, empty.nll, empty.is_greedy) == (0, 0, False)
        for name in ("nats_per_token", "perplexity", "bits_per_token", "standard_error"):
            assert math.isnan(getattr(empty, name))
        assert empty.bits_per_byte is None
    assert math.isnan(result([math.nan], size=0).bits_per_byte)
    single = result([-1.0])
    assert single.perplexity == pytest.approx(math.e, rel=1e-15)
    assert math.isnan(single.standard_error)
    assert result([-1e6]).perplexity == math.inf
    assert "bits per byte" not in str(single)


def test_greedy_is_rank_one_everywhere():
    assert result([math.nan, -1.0, -2.0]).is_greedy
    assert not result([-1.0, -2.0], ranks=[1, 2]).is_greedy


LOGPROBS = st.lists(st.lists(st.floats(-30, 0), max_size=8), min_size=1, max_size=5)


@given(LOGPROBS)
def test_several_texts_together_are_as_if_they_were_one(parts):
    found = total([result(part, size=3 * len(part)).summary for part in parts])
    logprobs = [logprob for part in parts for logprob in part]
    expected = result(logprobs, size=3 * len(logprobs)).summary
    assert (found.count, found.bytes) == (expected.count, expected.bytes)
    # Sums of at most 40 numbers up to 30, each rounded by 2**-53 of at most 1200.
    assert found.nll == pytest.approx(expected.nll, abs=40 * 1200 * 2**-53)
    # The error of a standard error near 0 is the root of the rounding of its square; 1e-6 is far
    # below the smallest effect of a wrong formula, such as n for n - 1: 1 part in 80.
    if expected.count > 1:
        assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-9, abs=1e-6)
    else:
        assert math.isnan(found.standard_error)


def test_a_text_without_a_size_leaves_all_without():
    known, unknown = result([-1.0], size=1).summary, result([-1.0]).summary
    assert total([known, known]).bytes == 2
    assert total([known, unknown]).bytes is None
    assert total([known, unknown]).bits_per_byte is None
    # Of nothing at all there is nothing, and that is known.
    empty = total([])
    assert (empty.count, empty.bytes, empty.nll) == (0, 0, 0.0)
    assert np.isnan([empty.perplexity, empty.standard_error, empty.bits_per_byte]).all()


# From a play that the bundled model was not trained on (The Two Gentlemen of Verona, III.1).
UNSEEN = """VALENTINE:
What light is light, if Silvia be not seen?
What joy is joy, if Silvia be not by?
Unless it be to think that she is by
And feed upon the shadow of perfection.
Except I be by Silvia in the night,
There is no music in the nightingale;
Unless I look on Silvia in the day,
There is no day for me to look upon;
She is my essence, and I leave to be,
If I be not by her fair influence
Foster'd, illumined, cherish'd, kept alive.
"""


def test_the_bundled_model_by_the_convention_of_its_card():
    """An end-of-text token, then passes of 256 tokens that move by 128: windows of 257."""
    model = numpygpt.load("shakespeare")
    ids = np.array([model.tokenizer.end_of_text, *model.tokenizer.encode(UNSEEN * 2)])
    assert len(ids) > 300
    nats, scored = 0.0, 0
    while scored < len(ids) - 1:
        begin = max(0, scored - 128)
        window = ids[begin : begin + 257].tolist()
        logits = model.logits(window[:-1])
        nats -= sum(
            log_softmax(logits[i])[window[i + 1]] for i in range(scored - begin, len(logits))
        )
        scored = begin + len(window) - 1
    size = len(UNSEEN * 2)
    rows = score(ids, 1, model.params, model.config, window=257, stride=128)
    s = Score(ids[1:], *rows, size, 257, 128, "end-of-text")
    # float32 logits near 20 of other products: 2e-6 each, less in the mean. Measured: 2e-9.
    assert s.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    # Of the two whole plays the card says 1.848; of this passage it is 1.82, give or take a
    # standard error of 0.19 nats a token: 0.1 bits a byte. The card's best n-gram has 2.27.
    once = rows.logprobs[: len(model.tokenizer.encode(UNSEEN))].sum() / -math.log(2) / len(UNSEEN)
    assert 1.7 < once < 2.0


# -- two models -----------------------------------------------------------------------------------


def compare(p, q, ids=IDS, start=1, **arguments) -> Divergence:
    return divergence(ids, start, (p, CONFIG), (q, CONFIG), **arguments)


@pytest.mark.parametrize(("window", "stride"), WAYS)
@pytest.mark.parametrize("chunk", [3, 256])
def test_divergence_is_that_of_a_loop(window, stride, chunk):
    d = compare(PARAMS, OTHER, window=window, stride=stride, chunk=chunk)
    ps, qs = (naive(IDS, window, stride, Model(CONFIG, params)) for params in (PARAMS, OTHER))
    kl = [
        math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        for p, q in zip(ps, qs, strict=True)
    ]
    np.testing.assert_allclose(d.kl, kl, rtol=0, atol=ROUNDING)
    assert min(kl) > 1e6 * ROUNDING
    assert d.same_top.tolist() == [
        p.index(max(p)) == q.index(max(q)) for p, q in zip(ps, qs, strict=True)
    ]
    for params, column in [(PARAMS, d.logprobs), (OTHER, d.other_logprobs)]:
        rows = score(IDS, 1, params, CONFIG, window=window, stride=stride, chunk=chunk)
        np.testing.assert_array_equal(column, rows.logprobs)
    np.testing.assert_array_equal(d.ids, IDS[1:])


def test_a_model_does_not_diverge_from_itself():
    """Exactly: the logits are the same to the last bit, so every difference is 0."""
    for dtype in (np.float32, np.float64):
        params = random_params(CONFIG, dtype=dtype)
        d = compare(params, params)
        assert not d.kl.any()
        assert d.same_top.all()
        assert (d.perplexity_ratio, d.perplexity_ratio_error) == (1, 0)
        assert (d.rms_change, d.rms_change_error, d.mean_kl_error) == (0, 0, 0)


def test_the_order_of_the_models_matters():
    forth, back = compare(PARAMS, OTHER), compare(OTHER, PARAMS)
    # Two numbers that would differ by rounding if KL were symmetric.
    assert abs(forth.mean_kl - back.mean_kl) > 1e-3
    assert forth.perplexity_ratio == pytest.approx(1 / back.perplexity_ratio, rel=1e-14)
    np.testing.assert_array_equal(forth.same_top, back.same_top)


def test_divergence_from_a_model_that_knows_nothing():
    """KL(p || uniform) = log V - entropy of p."""
    config = nano(tie_word_embeddings=False)
    tensors = {**random_tensors(config), "lm_head.weight": np.zeros((17, 8))}
    rows = score(IDS, 1, PARAMS, CONFIG)
    d = divergence(IDS, 1, (PARAMS, CONFIG), (pack(config, tensors), config))
    np.testing.assert_allclose(d.kl, math.log(17) - rows.entropies, rtol=0, atol=2e-15)


def exact_kl(p, q) -> decimal.Decimal:
    """In 50 digits."""
    with decimal.localcontext(prec=50):
        rows = [[decimal.Decimal(float(x)) for x in row] for row in (p, q)]
        logs = [sum(x.exp() for x in row).ln() for row in rows]
        p, q = ([x - total for x in row] for row, total in zip(rows, logs, strict=True))
        return sum(a.exp() * (a - b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("change", [1e-9, 1e-7, 1e-3, 1.0])
def test_the_error_of_a_divergence(change):
    """Of two models that are nearly one the result is its rounding, and may be negative."""
    rng = np.random.default_rng(0)
    p = 5 * rng.standard_normal((200, 17))
    q = p + change * rng.standard_normal(p.shape)
    (log_p, probabilities), (log_q, _) = (
        scoring.log_softmax(x, np.empty((2, *x.shape))) for x in (p, q)
    )
    found = scoring.expected(log_p - log_q, probabilities)
    exact = [exact_kl(*rows) for rows in zip(p, q, strict=True)]
    errors = [float(decimal.Decimal(x) - y) for x, y in zip(found, exact, strict=True)]
    # Log-probabilities of a few nats are rounded at 4e-16 to 9e-16, their mean hardly more.
    # Measured: 6e-16; 44 and 10 % of the rows of the two smallest changes come out below 0.
    assert np.abs(errors).max() < 3e-15
    assert (found < 0).any() == (change <= 1e-7)


def test_other_sizes_and_types():
    """A shorter context and float32: the window must fit both, and the default does."""
    small = nano(n_ctx=6)
    q = random_params(small, dtype=np.float32)
    d = divergence(IDS, 1, (PARAMS, CONFIG), (q, small))
    assert (d.window, d.stride) == (6, 3)
    own = score(IDS, 1, PARAMS, CONFIG, window=6)
    np.testing.assert_allclose(d.logprobs, own.logprobs, rtol=0, atol=ROUNDING)
    with pytest.raises(ArgumentError, match="window must be an integer from 2 to 7"):
        divergence(IDS, 1, (q, small), (PARAMS, CONFIG), window=8)
    larger = nano(vocab_size=18)
    with pytest.raises(ArgumentError, match="these have 17 and 18"):
        divergence(IDS, 1, (PARAMS, CONFIG), (random_params(larger), larger))


def by_running_sums(p, q, kl, same) -> dict[str, float]:
    """The statistics of llama.cpp's perplexity tool, from sums of powers as it keeps them."""
    n = len(kl)

    def spread(a, b):
        return (np.mean(a * b) - np.mean(a) * np.mean(b)) / (n - 1)

    change = (np.exp(q) - np.exp(p)) ** 2
    ratio, agreement = math.exp(np.mean(p) - np.mean(q)), np.mean(same)
    return {
        "mean_kl": np.mean(kl),
        "mean_kl_error": math.sqrt(spread(kl, kl)),
        "perplexity": math.exp(-np.mean(p)),
        "other_perplexity": math.exp(-np.mean(q)),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * math.sqrt(spread(p, p) + spread(q, q) - 2 * spread(p, q)),
        "top_1_agreement": agreement,
        "top_1_agreement_error": math.sqrt(agreement * (1 - agreement) / (n - 1)),
        "rms_change": math.sqrt(np.mean(change)),
        "rms_change_error": math.sqrt(spread(change, change)) / (2 * math.sqrt(np.mean(change))),
    }


def test_the_statistics_of_a_divergence():
    rng = np.random.default_rng(0)
    p = np.log(rng.random(50))
    q, kl = p + 0.1 * rng.standard_normal(50), rng.random(50)
    same = rng.random(50) < 0.8
    padded = [np.append(x, math.nan) for x in (kl, p, q)]
    d = Divergence(np.arange(51), padded[0], np.append(same, False), *padded[1:], 12, 6)
    assert d.count == 50
    for name, expected in by_running_sums(p, q, kl, same).items():
        # Differences of sums of squares lose two or three digits of 16. Measured: 2e-14.
        assert getattr(d, name) == pytest.approx(expected, rel=1e-12), name
    assert d.kl_quantile(0.5) == pytest.approx(statistics.median(kl), rel=1e-15)
    assert d.kl_quantile(1) == kl.max()
    # Between the 45th and the 46th of 50: 0.9 * 49 = 44.1.
    low, high = np.sort(kl)[44:46]
    assert d.kl_quantile(0.9) == pytest.approx(0.9 * low + 0.1 * high, rel=1e-14)
    assert str(d).startswith("50 tokens: KL 0.")
    assert repr(d) == f"<Divergence on {d}>"
    for fraction in (-0.1, 1.1, 50, math.nan):
        with pytest.raises(ArgumentError, match="a fraction must be from 0 to 1"):
            d.kl_quantile(fraction)


def test_a_divergence_on_nothing():
    d = compare(PARAMS, OTHER, start=len(IDS))
    assert d.count == 0
    for name in ("mean_kl", "top_1_agreement", "perplexity", "perplexity_ratio", "rms_change"):
        assert math.isnan(getattr(d, name))
    assert math.isnan(d.kl_quantile(0.5))
