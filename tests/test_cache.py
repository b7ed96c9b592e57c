"""Keys and values side by side: what several sequences in one slab share, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_ids, random_params

from numpygpt.cache import Cache, segments
from numpygpt.model import forward
from numpygpt.plans import Fresh, Reused

CONFIG = nano()
PARAMS = random_params(CONFIG)

# Products of another number of rows add in another order: some sqrt(32) roundings of 1.1e-16, in
# two layers. Measured over 2,000 examples: 4e-15 of hidden states near 1.
ROUNDING = 4e-14


def read(ids, caches, planner=None):
    """The hidden states of each sequence's new tokens."""
    laid = segments([len(each) for each in ids], caches)
    plan = (planner or Fresh(CONFIG)).fit(laid)
    hidden = forward(np.concatenate(ids), laid, PARAMS, CONFIG, plan)
    return np.split(hidden.copy(), np.cumsum([len(each) for each in ids])[:-1]), laid


def alone(tokens, new):
    """The hidden states of the last `new` tokens of a sequence that has its cache for itself."""
    cache = Cache(CONFIG, dtype=np.float64)
    for part in (tokens[:-new], tokens[-new:]):
        if len(part):
            (hidden,), _ = read([part], [cache])
    return hidden


@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    new=st.integers(1, 4),
    tile_rows=st.sampled_from([1, 2, 3, 64]),
    reused=st.booleans(),
)
def test_sequences_of_one_slab_are_what_they_are_alone(lengths, new, tile_rows, reused):
    slab = Cache(CONFIG, 12, np.float64, len(lengths))
    texts = [random_ids(CONFIG, length + new, seed) for seed, length in enumerate(lengths)]
    caches = [slab[b] for b in range(len(lengths))]
    for cache, text, length in zip(caches, texts, lengths, strict=True):
        if length:
            read([text[:length]], [cache])
    planner = (
        Reused(CONFIG, new * len(lengths), 12, np.float64, tile_rows=tile_rows)
        if reused
        else Fresh(CONFIG, tile_rows)
    )
    together, _ = read([text[-new:] for text in texts], caches, planner)
    assert slab.lengths.tolist() == [length + new for length in lengths]
    for found, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(found, alone(text, new), rtol=0, atol=ROUNDING)


def test_a_mask_that_ignores_the_lengths_would_be_seen():
    """The mistake that the test above is for: every sequence sees what the longest one sees."""
    slab = Cache(CONFIG, 12, np.float64, 2)
    texts = [random_ids(CONFIG, 9, 0), random_ids(CONFIG, 6, 1)]
    for b in range(2):
        read([texts[b][:-1]], [slab[b]])
    laid = segments([1, 1], [slab[0], slab[1]])
    plan = Fresh(CONFIG).fit(laid)
    ((tile,),) = plan.h[0].attn.tiles
    for block in plan.h:
        block.attn.tiles[0][0] = tile._replace(future=np.zeros_like(tile.future))
    hidden = forward(np.array([texts[0][-1], texts[1][-1]]), laid, PARAMS, CONFIG, plan)
    assert abs(hidden[0] - alone(texts[0], 1)[0]).max() <= ROUNDING
    assert abs(hidden[1] - alone(texts[1], 1)[0]).max() > 1e-3


def test_neighbours_of_a_slab_make_one_segment():
    slab = Cache(CONFIG, 8, sequences=5)
    laid = segments([1] * 5, [slab[b] for b in range(5)])
    assert [(each.rows, each.cache.place, each.length) for each in laid] == [
        (slice(0, 5), slice(0, 5), 1)
    ]


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ([1, 2], [0, 1]),  # another number of new tokens
        ([1, 1], [1, 0]),  # another order
        ([1, 1], [0, 2]),  # not side by side
    ],
)
def test_what_cannot_share_a_product_stays_apart(lengths, slots):
    slab = Cache(CONFIG, 8, sequences=3)
    assert len(segments(lengths, [slab[b] for b in slots])) == 2


def test_caches_of_two_slabs_stay_apart():
    laid = segments([1, 1], [Cache(CONFIG, 8), Cache(CONFIG, 8)])
    assert [len(each.cache.lengths) for each in laid] == [1, 1]


def test_a_short_sequence_does_not_share_the_products_of_a_long_one():
    config = nano(n_ctx=1024)
    slab = Cache(config, sequences=3)
    slab.lengths[:] = [1000, 1000, 10]
    laid = segments([1, 1, 1], [slab[b] for b in range(3)])
    assert [each.rows for each in laid] == [slice(0, 2), slice(2, 3)]


def test_a_part_shares_the_memory_of_the_whole():
    slab = Cache(CONFIG, 8, sequences=4)
    part = slab[1:3]
    part[1].truncate(0)
    part.lengths[1] = 5
    part[1].keys[...] = 3
    assert slab.lengths.tolist() == [0, 0, 5, 0]
    assert (slab.keys[:, 2] == 3).all()
    assert (slab.keys[:, [0, 1, 3]] == 0).all()
    assert part[1].place == slice(2, 3)


def test_a_sequence_is_copied_to_another_slot():
    slab = Cache(CONFIG, 8, np.float64, 2)
    text = random_ids(CONFIG, 6)
    read([text[:-1]], [slab[0]])
    slab[1].copy_from(slab[0])
    (first, second), laid = read([text[-1:]] * 2, [slab[0], slab[1]])
    assert len(laid) == 1
    assert first.tobytes() == second.tobytes()
