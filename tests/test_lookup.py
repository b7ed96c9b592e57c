"""Prompt lookup: what is guessed, against a search in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpygpt.decoding.lookup import NGRAM, draft


def slow_draft(ids: list[int], most: int, ngram: int) -> list[int]:
    """Try every earlier place, the latest first."""
    for start in range(len(ids) - ngram - 1, -1, -1):
        if ids[start : start + ngram] == ids[-ngram:]:
            return ids[start + ngram :][:most]
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
        ([7, 7, 7, 7], [7]),  # it may overlap the end, but not be the end
        ([1, 2, 3, 1, 2, 3], [1, 2, 3]),
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
