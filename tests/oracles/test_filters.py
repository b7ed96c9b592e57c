"""Filters against the logits processors of transformers: 30 000 random rows, in float64.

And for each difference that numpygpt.decoding.filters documents, a case that shows it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("transformers", reason="needs transformers")

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402
from transformers.generation import logits_process as hf  # noqa: E402

from numpygpt.decoding import (  # noqa: E402
    History,
    Settings,
)
from numpygpt.decoding import filters as f  # noqa: E402

pytestmark = pytest.mark.oracle

ROWS = 500
# Largest relative difference of a logit that stays. Each is divided, multiplied or shifted once,
# in float64, by the same number. Measured: 0 for all but the chain, 0 there, too. A float32 on the
# way would leave 6e-8.
ROUNDING = 1e-15


def rows(seed, size=40, grid=None):
    """Logits as a model has them; with `grid`, many are equal."""
    logits = np.random.default_rng(seed).normal(0, 2.5, (ROWS, size))
    return logits if grid is None else np.round(logits / grid) * grid


def texts(seed, size=40, length=24):
    """Ids of a few tokens, so that they repeat."""
    return np.random.default_rng(seed).integers(0, min(size, 6), (ROWS, length))


def theirs(processor, logits, ids=None):
    ids = np.zeros((len(logits), 1), int) if ids is None else ids
    return processor(torch.tensor(ids), torch.tensor(logits)).numpy()


def assert_same(actual, expected):
    np.testing.assert_array_equal(actual > -np.inf, expected > -np.inf)
    left = actual > -np.inf
    np.testing.assert_allclose(actual[left], expected[left], rtol=ROUNDING, atol=0)
    return left.sum(axis=1)


def ours(apply, logits, *more):
    return np.array([apply(*row) for row in zip(logits, *more, strict=True)])


# -- where both do the same -----------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 0.7, 1.0, 1.9])
def test_temperature(t):
    logits = rows(1)
    assert_same(
        ours(lambda x: f.temperature(x, t), logits), theirs(hf.TemperatureLogitsWarper(t), logits)
    )


@pytest.mark.parametrize("k", [1, 2, 7, 39, 40, 60])
@pytest.mark.parametrize("grid", [None, 0.5])
def test_top_k_ties(k, grid):
    logits = rows(2, grid=grid)
    sizes = assert_same(
        ours(lambda x: f.top_k_ties(x, k), logits), theirs(hf.TopKLogitsWarper(k), logits)
    )
    assert (sizes >= min(k, 40)).all()
    assert (grid is not None and k < 40) == (sizes > k).any()  # equals were among them


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9, 0.99])
def test_top_p(p):
    logits = rows(3)
    sizes = assert_same(
        ours(lambda x: f.top_p(x, p), logits), theirs(hf.TopPLogitsWarper(p), logits)
    )
    assert len(set(sizes)) > 2


@pytest.mark.parametrize("p", [0.0, 0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("grid", [None, 0.5])
def test_min_p(p, grid):
    logits = rows(4, grid=grid)
    assert_same(ours(lambda x: f.min_p(x, p), logits), theirs(hf.MinPLogitsWarper(p), logits))


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("grid", [None, 0.5])
def test_typical_p_ties(p, grid):
    logits = rows(5, grid=grid)
    sizes = assert_same(
        ours(lambda x: f.typical_p_ties(x, p), logits), theirs(hf.TypicalLogitsWarper(p), logits)
    )
    assert len(set(sizes)) > 2
    if grid is None:  # and then typical_p is the same
        assert_same(
            ours(lambda x: f.typical_p(x, p), logits), theirs(hf.TypicalLogitsWarper(p), logits)
        )


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty(penalty):
    logits, ids = rows(6), texts(6)
    assert_same(
        ours(lambda x, i: f.repetition_penalty(x, i, penalty), logits, ids),
        theirs(hf.RepetitionPenaltyLogitsProcessor(penalty), logits, ids),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 24, 25, 30])
def test_no_repeat_ngram(n):
    logits, ids = rows(7), texts(7)
    if n >= 24:
        ids[:] = 3  # so that even the longest run repeats
    sizes = assert_same(
        ours(lambda x, i: f.no_repeat_ngram(x, i, n), logits, ids),
        theirs(hf.NoRepeatNGramLogitsProcessor(n), logits, ids),
    )
    assert (sizes < 40).any() == (n <= 24)


def test_banned_sequences():
    logits, ids = rows(8), texts(8)
    rng = np.random.default_rng(8)
    banned = [rng.integers(0, 6, size).tolist() for size in (1, 2, 2, 3, 3, 3, 4, 30)]
    sizes = assert_same(
        ours(lambda x, i: f.ban(x, i, banned), logits, ids),
        theirs(hf.NoBadWordsLogitsProcessor(banned), logits, ids),
    )
    assert len(set(sizes)) > 2


def test_logit_bias():
    logits = rows(9)
    bias = {3: 2.5, 7: -1.25, 30: 100.0}
    processor = hf.SequenceBiasLogitsProcessor({(i,): value for i, value in bias.items()})
    assert_same(ours(lambda x: f.logit_bias(x, bias), logits), theirs(processor, logits))


@pytest.mark.parametrize("made", [0, 3, 4, 5])
def test_min_new_tokens(made):
    logits, ids = rows(10), texts(10)
    prompt = ids.shape[1] - made
    settings = Settings(min_new_tokens=4, stop_ids=(2, 9))
    processor = hf.MinNewTokensLengthLogitsProcessor(prompt, 4, [2, 9])
    (item,) = settings.filters
    sizes = assert_same(
        ours(lambda x, i: item.apply(x, History(i, prompt)), logits, ids),
        theirs(processor, logits, ids),
    )
    assert set(sizes) == {38 if made < 4 else 40}


@pytest.mark.parametrize("made", [8, 9])
def test_a_forced_end(made):
    logits, ids = rows(11), texts(11)
    prompt = ids.shape[1] - made
    (item,) = Settings(max_new_tokens=10, forced={-1: 5}).filters
    sizes = assert_same(
        ours(lambda x, i: item.apply(x, History(i, prompt)), logits, ids),
        theirs(hf.ForcedEOSTokenLogitsProcessor(prompt + 10, 5), logits, ids),
    )
    assert set(sizes) == {1 if made == 9 else 40}


# -- chains ---------------------------------------------------------------------------------------

CHOSEN = {
    "temperature": 0.8,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "no_repeat_ngram": 3,
}


@pytest.fixture(scope="module")
def model():
    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    return GPT2LMHeadModel(config)


def their_chain(model, prompt, **chosen):
    """What ``generate`` applies, in its order. Its default is a top_k of 50; 0 is off."""
    fields = {"no_repeat_ngram": "no_repeat_ngram_size"}
    chosen = {fields.get(name, name): value for name, value in chosen.items()}
    config, _ = model._prepare_generation_config(
        None, do_sample=True, eos_token_id=39, pad_token_id=39, **{"top_k": 0, **chosen}
    )
    model._prepare_special_tokens(config)
    return model._get_logits_processor(config, input_ids_seq_length=prompt)


@pytest.mark.parametrize("left_out", [None, *list(CHOSEN)[1:]])
def test_the_order_of_transformers(model, left_out):
    chosen = {name: value for name, value in CHOSEN.items() if name != left_out}
    logits, ids = rows(12), texts(12)
    processors = their_chain(
        model, 20, **chosen, min_new_tokens=9, bad_words_ids=[[4], [2, 7]],
        sequence_bias=[[[8], 1.5]],
    )  # fmt: skip
    settings = Settings(
        **chosen, min_new_tokens=9, stop_ids=[39], banned=[[4], [2, 7]], logit_bias={8: 1.5},
        order="transformers",
    )  # fmt: skip
    assert [type(item).__name__ for item in processors] == [
        THEIR[item.name] for item in settings.filters
    ]

    def apply(row, text):
        for item in settings.filters:
            row = item.apply(row, History(text, 20))
        return row

    sizes = assert_same(ours(apply, logits, ids), theirs(processors, logits, ids))
    assert len(set(sizes)) > 2


THEIR = {
    "logit_bias": "SequenceBiasLogitsProcessor",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "no_repeat_ngram": "NoRepeatNGramLogitsProcessor",
    "ban": "NoBadWordsLogitsProcessor",
    "min_new_tokens": "MinNewTokensLengthLogitsProcessor",
    "temperature": "TemperatureLogitsWarper",
    "top_k_ties": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "typical_p_ties": "TypicalLogitsWarper",
}


# -- where they differ ----------------------------------------------------------------------------


def kept(logits):
    return np.flatnonzero(np.ravel(logits) > -np.inf).tolist()


def test_they_draw_from_50_tokens_unless_told_otherwise(model):
    config, _ = model._prepare_generation_config(None, do_sample=True)
    model._prepare_special_tokens(config)
    (only,) = model._get_logits_processor(config, input_ids_seq_length=1)
    assert (type(only), only.top_k) == (hf.TopKLogitsWarper, 50)
    assert Settings(temperature=1.0).filters == ()


def test_top_k_keeps_exactly_k_and_they_keep_ties():
    logits = np.array([0.0, 2.0, 1.0, 1.0])
    assert kept(f.top_k(logits, 2)) == [1, 2]
    assert kept(theirs(hf.TopKLogitsWarper(2), logits[None])) == [1, 2, 3]


def test_top_p_keeps_the_lower_of_equals_and_they_the_higher():
    logits = np.log([0.2, 0.4, 0.2, 0.2])
    assert kept(f.top_p(logits, 0.5)) == [0, 1]
    assert kept(theirs(hf.TopPLogitsWarper(0.5), logits[None])) == [1, 3]


def test_typical_p_keeps_the_lower_of_equals_and_they_keep_all():
    logits = np.array([2.0, 0.0, 0.0, 0.0, 0.0])
    assert kept(f.typical_p(logits, 0.2)) == [0]  # 0.65: the likeliest is nearest
    assert kept(f.typical_p(np.zeros(4), 0.5)) == [0, 1]
    assert kept(theirs(hf.TypicalLogitsWarper(0.5), np.zeros((1, 4)))) == [0, 1, 2, 3]


def test_they_ignore_a_ban_of_the_end_of_text_token_alone(model):
    logits, ids = np.zeros((1, 40)), np.array([[1, 2]])
    assert 39 not in kept(f.ban(logits[0], ids[0], [[39], [5]]))
    processors = their_chain(model, 2, bad_words_ids=[[39], [5]])
    left = kept(theirs(processors, logits, ids))
    assert 39 in left
    assert 5 not in left


def test_rounding_decides_at_a_boundary_there():
    """Shares of decimal fractions are rounded. Here a slack of 1e-12 makes up for that."""
    wrong = 0
    for n in range(40, 100):
        logits = np.log([n / 100, (100 - n) / 200, (100 - n) / 200])
        assert kept(f.top_p(logits, n / 100)) == [0]
        wrong += kept(theirs(hf.TopPLogitsWarper(n / 100), logits[None])) != [0]
    assert wrong > 0


def test_everything_ruled_out_is_an_error_here_and_nan_there():
    logits = np.zeros((1, 2))
    banned = theirs(hf.NoBadWordsLogitsProcessor([[0], [1]]), logits)
    assert math.isnan(torch.softmax(torch.tensor(banned), -1)[0, 0])
    assert kept(f.ban(logits[0], np.array([0]), [[0], [1]])) == []  # choose() refuses that
