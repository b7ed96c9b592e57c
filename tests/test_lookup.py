"""Prompt lookup: what is guessed, against a search in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpygpt.decoding.lookup import NGRAM, PRICE, RATE, Lookup, draft


def slow_draft(ids: list[int], most: int, ngram: int) -> list[int]:
    """Try every earlier place, the latest first; then what followed, again and again."""
    for start in range(len(ids) - ngram - 1, -1, -1):
        if ids[start : start + ngram] == ids[-ngram:]:
            return (ids[start + ngram :] * most)[:most]
    return []


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 12), st.integers(1, 5))
def test_it_guesses_what_followed_the_latest_place_with_the_same_tokens(ids, most, ngram):
    guess = draft(np.array(ids, np.intp), most, ngram)
    assert guess.tolist() == slow_draft(ids, most, ngram)
    assert guess.dtype == np.intp


@pytest.mark.parametrize(
    ("ids", "guess"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5, 6, 7]),
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),  # the latest place
        ([7, 7, 7, 7], [7, 7, 7, 7]),  # it may overlap the end, but not be the end
        ([1, 2, 3, 1, 2, 3], [1, 2, 3, 1]),  # what followed goes around
        ([1, 2, 3, 4, 1, 2, 3], [4, 1, 2, 3]),
        ([9, 2, 3, 4, 1, 2, 3], []),  # two tokens are not enough
        ([1, 2, 3], []),
        ([1, 2], []),
        ([], []),
    ],
)
def test_guesses(ids, guess):
    assert NGRAM == 3
    assert draft(np.array(ids, np.intp), most=4).tolist() == guess
    assert draft(np.array(ids, np.intp), most=1).tolist() == guess[:1]
    assert draft(np.array(ids, np.intp), most=0).tolist() == []


def test_a_text_that_repeats_itself_is_guessed_to_its_end():
    ids = np.tile(np.arange(50), 2)
    for end in range(53, 91):
        np.testing.assert_array_equal(draft(ids[:end], most=10), ids[end:][:10])


# -- whether to read it ---------------------------------------------------------------------------


def follow(text: list[int], start: int, most: int) -> tuple[list[int], list[int], int]:
    """Decode a text that is known.

    Returns where guesses were read, how many tokens of each were right, and how many in those
    that were only watched.
    """
    lookup, place, watched = Lookup(), start, 0
    places: list[int] = []
    right: list[int] = []
    while place < len(text):
        proposed = lookup.propose(np.array(text[:place]), most).tolist()
        if proposed:
            places.append(place)
            right.append(0)
        for k in range(len(proposed) + 1):
            if place == len(text):
                break
            token, place = text[place], place + 1
            watched += not proposed and lookup.guess[:1] == [token]
            lookup.see(token)
            if k == len(proposed) or proposed[k] != token:
                break
            right[-1] += 1
    return places, right, watched


def test_the_first_guess_is_read_and_a_wrong_one_ends_it():
    text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3, 7]
    assert follow(text, 7, most=5) == ([7], [0], 0)
    lookup = Lookup()
    for end, worth in ((7, PRICE), (11, PRICE * 7 / 8), (15, PRICE * 49 / 64)):
        assert lookup.worth == worth
        proposed = lookup.propose(np.array(text[:end]), 5).tolist()
        assert proposed == ([4, 1, 2, 3, 4] if end == 7 else [])
        lookup.see(text[end])


def test_watched_guesses_show_that_it_pays_again():
    """Four bad guesses, then a text that goes around: each watched guess of ten is right."""
    bad = [token for i in range(5) for token in (1, 2, 3, 10 + i)]
    text = bad + [50, 51, 52, 53, 54] * 30
    places, right, seen = follow(text, 7, most=10)
    assert (places[0], right[0]) == (7, 0)
    worth, watched = PRICE * (1 - RATE) ** 4, 0
    while worth < PRICE:
        worth, watched = worth + (10 - worth) * RATE, watched + 1
    assert seen == 10 * watched
    # The circle shows after its first round and three tokens; guesses follow one another.
    assert places[1] == len(bad) + 5 + 3 + 10 * watched
    assert all(new == 10 for new in right[1:-1])
    assert places[1:] == list(range(places[1], len(text), 11))  # one more than ten in each pass


def test_guesses_that_are_half_right_are_not_read_for_long():
    """Two right tokens of each guess are not worth a pass that costs 2.5 more."""
    text = [token for i in range(100) for token in (1, 2, 3, 4, 5, 10 + i)]
    assert follow(text, 9, most=10) == ([9], [2], 98 * 2)


def test_guesses_that_are_worth_it_are_all_read():
    text = [token for i in range(100) for token in (1, 2, 3, 4, 5, 6, 10 + i)]
    assert follow(text, 10, most=10) == (list(range(10, len(text), 7)), [3] * 99, 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(1, 12))
def test_what_is_lost_is_bounded(text, most):
    """No text loses more passes than it had right tokens in guesses that were only watched.

    Plus the price of the first guess and of the last. A guess that is read at the worth w with a
    right tokens moves it by (a - w) / 8, so while guesses are read the loss, the sum of PRICE - a,
    is at most 8 times what w falls by: from where it began to PRICE * 7 / 8. It begins above PRICE
    by an eighth at most of what the last watched guess had right beyond it. So one such stretch
    loses no more than that guess had right; the first, which no guess came before, PRICE.
    """
    _, right, watched = follow(text, 1, most)
    lost = sum(PRICE - each for each in right)
    assert lost <= 2 * PRICE + watched
