"""Beam search: against trying every continuation, by laws, and on chains worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import nano, random_ids, random_params, random_tensors, run_page

import numpygpt
from numpygpt.cache import Cache
from numpygpt.decoding import Beams, Settings, beam, beam_search, require_usable
from numpygpt.errors import ArgumentError, ContextError, Interrupted, NumpyGPTError
from numpygpt.params import pack

FIVE = nano(vocab_size=5, tie_word_embeddings=False)
SMALL = nano(vocab_size=23, n_ctx=24, tie_word_embeddings=False)

# Seven log-probabilities of up to 10 nats, added up in float64 (u = 1.1e-16), from logits whose own
# sums may be in another order: 7 * 10 * a dozen u is 1e-13. Measured: 7e-15. The mildest mistake
# in a score, one token too many in its length, is 0.07 here.
ROUNDING = 1e-13


def both(chosen) -> tuple[Settings, Beams]:
    """The settings, and those that only a beam search has."""
    own = {"beams", "n", "length_penalty", "early_stopping"}
    beams = Beams(**{name: value for name, value in chosen.items() if name in own})
    return Settings(**{k: v for k, v in chosen.items() if k not in own}), beams


def search(prompt, params, config, **chosen):
    return beam_search(np.array(prompt), *both(chosen), params, config)


def undecided(config, seed=0, dtype=np.float64):
    """Random weights that leave several tokens likely, so that there is something to search."""
    params = random_params(config, seed, dtype)
    return params._replace(head=params.head * dtype(0.3))


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def whole(result) -> tuple[int, ...]:
    """The new tokens with the one that stopped them."""
    return tuple(result.ids) + (() if result.stop is None else (result.stop,))


def recomputed(result, params, config, penalty) -> float:
    """The score of a result, from logits of its whole text."""
    new = whole(result)
    logits = run_page(np.array([*result.prompt_ids, *new]), params, config)
    rows = logits[len(result.prompt_ids) - 1 : -1]
    total = sum(log_softmax(row)[i] for row, i in zip(rows, new, strict=True))
    return total / len(new) ** penalty


# -- trying everything ----------------------------------------------------------------------------


def every_text(prompt, params, config, steps, stop_ids):
    """All texts that end within so many steps, and their log-probabilities."""
    found, running = [], [((), 0.0)]
    while running:
        ids, total = running.pop()
        if len(ids) == steps or (ids and ids[-1] in stop_ids):
            found.append((ids, total))
        else:
            row = log_softmax(run_page(np.array([*prompt, *ids]), params, config)[-1])
            running += [((*ids, i), total + row[i]) for i in range(config.vocab_size)]
    return found


@pytest.mark.parametrize("penalty", [0, 0.6, 1, 2, -1])
@pytest.mark.parametrize("stop_ids", [(), (0,), (0, 3)], ids=str)
def test_with_room_for_everything_it_finds_the_best_of_all_texts(stop_ids, penalty):
    params, prompt = undecided(FIVE, seed=3), [2, 1]
    texts = every_text(prompt, params, FIVE, 4, stop_ids)
    assert len(texts) == {0: 625, 1: 1 + 4 + 16 + 64 * 5, 2: 2 + 6 + 18 + 27 * 5}[len(stop_ids)]
    ranked = sorted(texts, key=lambda text: -text[1] / len(text[0]) ** penalty)
    results = search(
        prompt, params, FIVE, max_new_tokens=4, beams=625, n=20, stop_ids=stop_ids,
        length_penalty=penalty, early_stopping="never",
    )  # fmt: skip
    assert [whole(result) for result in results] == [ids for ids, _ in ranked[:20]]
    np.testing.assert_allclose(
        [result.score for result in results],
        [total / len(ids) ** penalty for ids, total in ranked[:20]],
        rtol=0,
        atol=ROUNDING,
    )


def test_refuted_few_beams_find_the_best_text():
    params, misses = undecided(FIVE, seed=3), 0
    for prompt in itertools.product(range(5), repeat=2):
        best, wide = (
            search(prompt, params, FIVE, max_new_tokens=4, beams=beams)[0].score
            for beams in (1, 125)
        )
        assert best <= wide + ROUNDING
        misses += best < wide - ROUNDING
    assert misses  # 3 of 25


# -- laws -----------------------------------------------------------------------------------------

LAWFUL = {
    "prompt": st.lists(st.integers(0, 22), min_size=1, max_size=6),
    "beams": st.integers(1, 6),
    "penalty": st.sampled_from([0.0, 0.6, 1.0, 2.0, -1.0]),
    "early": st.sampled_from([False, True, "never"]),
    "stop_ids": st.lists(st.integers(0, 22), max_size=4, unique=True),
    "seed": st.integers(0, 3),
}


@given(**LAWFUL)
@settings(max_examples=25)
def test_results_are_sorted_different_and_score_what_their_logits_say(
    prompt, beams, penalty, early, stop_ids, seed
):
    params = undecided(SMALL, seed)
    results = search(
        prompt, params, SMALL, max_new_tokens=7, beams=beams, n=beams, length_penalty=penalty,
        early_stopping=early, stop_ids=stop_ids,
    )  # fmt: skip
    assert len(results) == beams
    scores = [result.score for result in results]
    assert scores == sorted(scores, reverse=True)
    assert len({whole(result) for result in results}) == beams
    for result in results:
        assert abs(result.score - recomputed(result, params, SMALL, penalty)) <= ROUNDING * (
            7 ** max(0, -penalty)  # what multiplies the sum multiplies its rounding
        )
        assert result.prompt_ids == prompt
        assert (result.finish_reason == "stop") == (result.stop in stop_ids)
        assert not set(result.ids) & set(stop_ids)
        assert len(whole(result)) == 7 or result.stop is not None
        logits = run_page(np.array([*prompt, *result.ids]), params, SMALL)[len(prompt) - 1 :]
        for row, token, logprob in zip(logits, result.ids, result.logprobs, strict=False):
            assert abs(log_softmax(row)[token] - logprob) <= ROUNDING


@given(**{k: v for k, v in LAWFUL.items() if k != "beams"})
@settings(max_examples=25)
def test_one_beam_is_greedy(prompt, penalty, early, stop_ids, seed):
    params = undecided(SMALL, seed)
    model = numpygpt.Model(SMALL, params)
    greedy = model.generate(prompt, max_new_tokens=7, stop_ids=stop_ids, chunk=1)
    (result,) = search(
        prompt, params, SMALL, max_new_tokens=7, beams=1, length_penalty=penalty, chunk=1,
        early_stopping=early and early != "never", stop_ids=stop_ids,
    )  # fmt: skip
    assert (result.ids, result.stop, result.finish_reason) == (
        greedy.ids, greedy.stop, greedy.finish_reason,
    )  # fmt: skip
    np.testing.assert_allclose(result.logprobs, greedy.logprobs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_with_chunk_1_a_text_scores_the_same_bits_whatever_runs_beside_it(dtype):
    params = undecided(SMALL, seed=5, dtype=dtype)
    model, prompt = numpygpt.Model(SMALL, params), random_ids(SMALL, 9).tolist()
    found: dict[tuple[int, ...], float] = {}
    for beams in range(1, 8):
        chosen = {"max_new_tokens": 10, "beams": beams, "n": beams}
        results = search(prompt, params, SMALL, chunk=1, **chosen)
        for result in results:
            assert found.setdefault(whole(result), result.score) == result.score
            logits = model.logits(prompt + result.ids, chunk=1)[8:-1]
            own = [log_softmax(row)[i] for row, i in zip(logits, result.ids, strict=True)]
            assert result.logprobs == own
        together = search(prompt, params, SMALL, **chosen)
        assert [result.ids for result in together] == [result.ids for result in results]
    assert 7 < len(found) < sum(range(1, 8))  # some were found more than once


def test_every_beam_that_runs_has_a_cache_and_only_branching_copies(monkeypatch):
    made, copied = [], []
    init, copy_from = Cache.__init__, Cache.copy_from
    monkeypatch.setattr(Cache, "__init__", lambda self, *a: (made.append(1), init(self, *a))[1])
    monkeypatch.setattr(
        Cache, "copy_from", lambda self, other: (copied.append(1), copy_from(self, other))[1]
    )
    params = undecided(SMALL)
    search([1, 2], params, SMALL, max_new_tokens=12, beams=1)
    assert (len(made), len(copied)) == (1, 0)
    made.clear()
    search([1, 2], params, SMALL, max_new_tokens=12, beams=5)
    assert len(made) == 5
    # Of 11 times 5 beams that go on, 4 branch off at the first step, and later never all of them.
    assert 4 < len(copied) < 4 * 11


@given(prompt=LAWFUL["prompt"], ngram=st.integers(1, 3), banned=st.sets(st.integers(0, 22)))
@settings(max_examples=20)
def test_what_is_ruled_out_does_not_come(prompt, ngram, banned):
    banned = sorted(banned)[:6]
    params = undecided(SMALL)
    results = search(
        prompt, params, SMALL, max_new_tokens=6, min_new_tokens=3, beams=4, n=4, stop_ids=[2, 5],
        no_repeat_ngram=ngram, banned=[*banned, (7, 8)], early_stopping=True,
    )  # fmt: skip
    for result in results:
        new = whole(result)
        assert len(result.ids) >= 3
        assert not set(new) & set(banned)
        assert (7, 8) not in itertools.pairwise([prompt[-1], *new])
        text = (*prompt, *new)
        grams = [text[i : i + ngram] for i in range(len(text) - ngram + 1)]
        newer = grams[max(0, len(prompt) - ngram + 1) :]
        assert all(grams.count(gram) == 1 for gram in newer)
        # What is ruled out changes no log-probability of the rest.
        assert abs(result.score - recomputed(result, params, SMALL, 1.0)) <= ROUNDING


# -- chains worked out by hand --------------------------------------------------------------------

STOP, A, B, C, D = range(5)


def chain(table: dict[int, dict[int, float]]):
    """A model whose next token depends on the last one only, by a table of probabilities.

    The blocks add nothing, so the last hidden state is the normalised vector of the last token.
    These vectors are independent, so some head turns them into any table.
    """
    config = nano(vocab_size=5, n_layer=1, tie_word_embeddings=False)
    tensors = {name: 0 * array for name, array in random_tensors(config).items()}
    tensors["wte.weight"] = np.eye(5, 8)
    tensors["ln_f.weight"] = np.ones(8)
    hidden = np.eye(5, 8) - 1 / 8
    hidden /= np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + config.layer_norm_epsilon)
    rows = np.full((5, 5), 1e-6)  # the rest is nearly impossible
    for token, following in table.items():
        for other, probability in following.items():
            rows[token, other] = probability
    tensors["lm_head.weight"] = (np.linalg.pinv(hidden) @ np.log(rows)).T
    return pack(config, tensors), config


# The impossible tokens take 3e-6 of the probability, which moves a logarithm by as much; a sum of
# up to four of them by 12e-6.
TABLE = 2e-5


def test_two_beams_find_what_a_greedy_choice_walks_past():
    """B is likelier than C at first, but what follows C is certain."""
    params, config = chain({A: {B: 0.6, C: 0.4}, B: {A: 0.4, B: 0.3, D: 0.3}, C: {D: 1.0}})
    (greedy,) = search([A], params, config, max_new_tokens=2, beams=1)
    assert greedy.ids == [B, A]
    (best,) = search([A], params, config, max_new_tokens=2, beams=2)
    assert best.ids == [C, D]
    assert best.score == pytest.approx(math.log(0.4) / 2, abs=TABLE)
    assert greedy.score == pytest.approx(math.log(0.6 * 0.4) / 2, abs=TABLE)


@pytest.mark.parametrize(
    ("penalty", "ids", "score"),
    [
        (0, [], math.log(0.4)),  # -0.92 against -1.02
        (1, [B], math.log(0.6 * 0.6) / 2),  # -0.92 against -0.51
        (-1, [], math.log(0.4)),  # -0.92 against -2.04
    ],
)
def test_the_length_penalty_decides_between_a_short_and_a_long_text(penalty, ids, score):
    params, config = chain({A: {STOP: 0.4, B: 0.6}, B: {STOP: 0.6, C: 0.4}})
    (best,) = search(
        [A], params, config, max_new_tokens=2, beams=2, length_penalty=penalty, stop_ids=[STOP],
        early_stopping="never",
    )  # fmt: skip
    assert (best.ids, best.stop, best.finish_reason) == (ids, STOP, "stop")
    assert best.score == pytest.approx(score, abs=TABLE)


LONG = {A: {STOP: 0.3, B: 0.7}, B: {STOP: 0.02, C: 0.98}, C: {STOP: 1.0}}
LATE = {A: {STOP: 0.5, B: 0.4, D: 0.1}, B: {C: 1.0}, C: {STOP: 1.0}}


@pytest.mark.parametrize(
    ("table", "beams", "early", "ids"),
    [
        # STOP (-1.20) and B STOP (-4.27 / 2) are two finished texts: enough at once if True. But
        # B C, still running, has -0.38 / 2, which beats B STOP, and ends as B C STOP.
        (LONG, 2, True, []),
        (LONG, 2, False, [B, C]),
        (LONG, 2, "never", [B, C]),
        # STOP has -0.69, B at its present length -0.92; but B C STOP has -0.92 / 3, and no text
        # of four tokens could have more than -0.92 / 4.
        (LATE, 1, True, []),
        (LATE, 1, False, []),
        (LATE, 1, "never", [B, C]),
    ],
)
def test_early_stopping_decides_when_running_beams_are_given_up(table, beams, early, ids):
    params, config = chain(table)
    (best,) = search(
        [A], params, config, max_new_tokens=4, beams=beams, early_stopping=early, stop_ids=[STOP]
    )
    assert (best.ids, best.stop) == (ids, STOP)


@pytest.mark.parametrize("early", [False, "never"])
def test_a_running_beam_goes_on_as_long_as_it_can_beat_the_worst_finished_one(early):
    """Sums times lengths, p = -1: the longer the worse, so nothing is hoped from more length."""
    params, config = chain({A: {STOP: 0.4, B: 0.6}, B: {STOP: 0.2, C: 0.8}, C: {STOP: 1.0}})
    best, second = search(
        [A], params, config, max_new_tokens=12, beams=2, n=2, length_penalty=-1, stop_ids=[STOP],
        early_stopping=early,
    )  # fmt: skip
    # B C has -0.73 * 2 when STOP, -0.92, and B STOP, -2.12 * 2, are finished; then -0.73 * 3.
    assert (best.ids, second.ids) == ([], [B, C])
    assert second.score == pytest.approx(3 * math.log(0.48), abs=3 * TABLE)


def test_only_the_best_candidates_finish_and_those_behind_them_run_on():
    """With one beam and two stop tokens the third candidate runs on; the second is dropped."""
    params, config = chain({A: {STOP: 0.5, D: 0.3, B: 0.2}, B: {C: 1.0}, C: {C: 1.0}})
    (best,) = search(
        [A], params, config, max_new_tokens=5, beams=1, stop_ids=[STOP, D], early_stopping="never"
    )
    assert (best.ids, best.stop) == ([B, C, C, C, C], None)  # -1.61 / 5 beats -0.69 and -1.20
    assert best.score == pytest.approx(math.log(0.2) / 5, abs=TABLE)


def test_among_equals_the_lower_beam_and_then_the_lower_id_come_first():
    params = random_params(FIVE)
    params = params._replace(head=np.zeros_like(params.head))
    results = search([1], params, FIVE, max_new_tokens=2, beams=3, n=3)
    assert [result.ids for result in results] == [[0, 0], [0, 1], [0, 2]]
    results = search([1], params, FIVE, max_new_tokens=2, beams=7, n=7)
    assert [result.ids for result in results] == [
        [0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 0], [1, 1],
    ]  # fmt: skip


# -- borders and refusals -------------------------------------------------------------------------


def test_there_may_be_fewer_texts_than_asked_for():
    params, config = chain({A: {B: 1.0}})
    chosen = {"max_new_tokens": 1, "beams": 9, "n": 9}
    assert len(search([A], params, config, **chosen)) == 5
    assert len(search([A], params, config, banned=[A, (A, B)], **chosen)) == 3
    (empty,) = search([A], params, config, max_new_tokens=0, beams=9, n=9)
    assert (empty.ids, empty.score, empty.finish_reason) == ([], 0.0, "length")


def test_if_everything_is_ruled_out_it_says_so():
    params, config = chain({A: {B: 1.0}})
    with pytest.raises(ArgumentError, match="rule out every token"):
        search([A], params, config, banned=range(5), max_new_tokens=3)
    # A beam that can go no further is lost; one that has finished before counts.
    chosen = {"max_new_tokens": 3, "beams": 2, "n": 2, "stop_ids": [STOP]}
    (result,) = search([A], params, config, banned=[A, C, D, (B, B), (B, STOP)], **chosen)
    assert (result.ids, result.stop) == ([], STOP)
    with pytest.raises(ArgumentError, match="rule out every token"):
        search([A], params, config, banned=[STOP, A, C, D, (B, B)], **chosen)


@pytest.mark.parametrize("length", [1, 5, 12])
def test_prompt_and_new_tokens_may_have_one_token_more_than_there_are_positions(length):
    params, prompt = random_params(FIVE), random_ids(FIVE, length)
    (result,) = search(prompt, params, FIVE, max_new_tokens=13 - length, beams=3)
    assert len(result.ids) == 13 - length
    with pytest.raises(ContextError, match=rf"{length} prompt \+ {14 - length} new tokens"):
        search(prompt, params, FIVE, max_new_tokens=14 - length, beams=3)


def test_weights_that_are_no_numbers_are_an_error():
    params = random_params(FIVE)
    params = params._replace(head=params.head * np.nan)
    with pytest.raises(NumpyGPTError, match="logits are nan"):
        search([1], params, FIVE, max_new_tokens=2)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"beams": 0}, "beams must be an integer from 1 to 10000, not 0"),
        ({"beams": True}, "beams must be"),
        ({"beams": 2.0}, "beams must be"),
        ({"beams": None}, "beams must be"),
        ({"n": 0}, r"n must be an integer from 1 to 4 \(beams\), not 0"),
        ({"n": 5}, r"n must be an integer from 1 to 4 \(beams\), not 5"),
        ({"n": 10**5000}, "n must be"),
        ({"length_penalty": math.inf}, "length_penalty must be a number from -50 to 50, not inf"),
        ({"length_penalty": math.nan}, "length_penalty must be"),
        ({"length_penalty": 51}, "length_penalty must be"),
        ({"length_penalty": "1"}, "length_penalty must be"),
        ({"length_penalty": True}, "length_penalty must be"),
        ({"length_penalty": 1j}, "length_penalty must be"),
        ({"length_penalty": np.complex128(1)}, "length_penalty must be"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never'"),
        ({"early_stopping": 1}, "early_stopping must be"),
        ({"early_stopping": None}, "early_stopping must be"),
        ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens = 4 is more than"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"banned": 7}, "banned must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_out_of_range_are_refused(chosen, message):
    with pytest.raises(ArgumentError, match=message):
        both(chosen)


@pytest.mark.parametrize(
    "chosen",
    [{"temperature": 1.0}, {"seed": 3}, {"stop": "a"}, {"lookup": 2}, {"top_logprobs": 2},
     {"overflow": "slide"}, {"repetition_penalty": 2.0}, {"logit_bias": {1: 2.0}},
     {"forced": {0: 1}}],
    ids=str,
)  # fmt: skip
def test_settings_that_have_no_effect_on_a_search_are_refused(chosen):
    with pytest.raises(ArgumentError, match=rf"{next(iter(chosen))} has no effect on beam search"):
        require_usable(Settings(**chosen))
    with pytest.raises(ArgumentError, match="has no effect on beam search"):
        numpygpt.Model(FIVE, random_params(FIVE)).beam_search([1], **chosen)


@pytest.mark.parametrize("penalty", [-50, 50])
def test_the_steepest_length_penalties_give_numbers(penalty):
    (result,) = search(
        [1], random_params(FIVE), FIVE, max_new_tokens=12, beams=2, length_penalty=penalty
    )
    assert math.isfinite(result.score)
    assert math.pow(1e6, penalty) * 1e7 not in (0, math.inf)  # a million tokens of ten nats


def test_ctrl_c_keeps_the_best_so_far(monkeypatch):
    real, passes = beam.Feeder.last, []

    def last(self, *args):
        passes.append(1)
        if len(passes) > 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(beam.Feeder, "last", last)
    model = numpygpt.Model(nano(), random_params(nano()))
    with pytest.raises(Interrupted) as stopped:
        model.beam_search([1, 2], beams=3, n=2, max_new_tokens=8)
    passes.clear()
    best = stopped.value.results
    assert [len(each.ids) for each in best] == [3, 3]
    assert [each.finish_reason for each in best] == ["interrupted"] * 2
    monkeypatch.undo()
    # With so few steps every beam is finished at its present length, so the ranking is the same.
    shorter = model.beam_search([1, 2], beams=3, n=2, max_new_tokens=3)
    assert [each.ids for each in best] == [each.ids for each in shorter]


def test_ctrl_c_keeps_what_had_finished(monkeypatch):
    """The best first token ends a text, so one is finished when the others run on."""
    model = numpygpt.Model(SMALL, undecided(SMALL))
    stop = int(model.logits([1, 2], last=True).argmax())
    real, passes = beam.Feeder.last, []

    def last(self, *args):
        passes.append(1)
        if len(passes) > 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(beam.Feeder, "last", last)
    with pytest.raises(Interrupted) as stopped:
        model.beam_search([1, 2], beams=6, n=6, max_new_tokens=8, stop_ids=[stop])
    reasons = {each.finish_reason for each in stopped.value.results}
    assert reasons == {"stop", "interrupted"}
    ended = next(each for each in stopped.value.results if each.finish_reason == "stop")
    assert (ended.stop, ended.passes) == (stop, len(ended.ids) + 1)
