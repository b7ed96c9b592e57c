"""Filters, chains of them, and drawing from what they leave.

``golden/sampler_vectors.json`` holds expected values of loops in decimal arithmetic; its script
explains the format. Laws and refusals follow.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import timeit
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from numpygpt.decoding import filters as f
from numpygpt.decoding.order import KINDS, ORDERS, History
from numpygpt.decoding.sample import choose, log_probability, margin, top_logprobs
from numpygpt.decoding.settings import Settings
from numpygpt.errors import ArgumentError, NumpyGPTError

GOLDEN = pathlib.Path(__file__).with_name("golden")
VECTORS = json.loads((GOLDEN / "sampler_vectors.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cases"]}

# Relative, of one probability. Logits of the cases are below 10 but for those whose other tokens
# have none: an exponent of 10 is rounded by 1e-15, and a few sums of such follow. Measured:
# 1.4e-15. A token more or less, the mildest mistake, moves probabilities by 1e-6 or more.
RELATIVE = 1e-13

NOTHING = History(np.array([], int), 0)


def softmax(logits):
    with np.errstate(over="ignore", under="ignore"):
        masses = np.exp(logits - logits.max())
    return masses / masses.sum()


def kept(logits):
    return np.flatnonzero(logits > -np.inf).tolist()


# -- the table of vectors -------------------------------------------------------------------------


def number(value):
    return -math.inf if value == "-inf" else value


def from_json(case):
    """Logits, history and Settings of a case."""
    values = dict(case["settings"])
    if "logit_bias" in values:
        values["logit_bias"] = {i: number(bias) for i, bias in values["logit_bias"]}
    if "forced" in values:
        values["forced"] = dict(values["forced"])
    logits = np.array([number(value) for value in case["logits"]])
    return logits, History(np.array(case["ids"], int), case["prompt"]), Settings(**values)


def run(logits, history, settings):
    for item in settings.filters:
        before = logits.copy()
        after = item.apply(logits, history)
        assert logits.tobytes() == before.tobytes(), f"{item.name} changed its input"
        assert (after.shape, after.dtype) == (logits.shape, np.float64)
        logits = after
    return logits


@pytest.mark.parametrize("name", CASES)
def test_the_vectors(name):
    case = CASES[name]
    logits = run(*from_json(case))
    assert kept(logits) == case["kept"]
    np.testing.assert_allclose(softmax(logits), case["probabilities"], rtol=RELATIVE, atol=0)
    for u, token in case["draws"]:
        assert choose(logits, SimpleNamespace(random=lambda u=u: u)) == token


def test_the_vectors_are_what_their_script_makes():
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make_sampler_vectors.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.document() == make.PATH.read_text()
    assert {name: tuple(names) for name, names in VECTORS["orders"].items()} == ORDERS
    assert VECTORS["slack"] == f.SLACK


def test_the_vectors_cover_every_filter():
    """Each in a case of its own, where it is the only one and changes something."""
    alone = set()
    for case in CASES.values():
        logits, history, settings = from_json(case)
        changed = run(logits, history, settings).tobytes() != logits.tobytes()
        if len(settings.filters) == 1 and changed:
            alone.add(settings.filters[0].name)
    assert alone == set(KINDS)


def boundaries():
    """Rows of probabilities in hundredths, a p that some of them reach exactly, and how many."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        cuts = np.sort(rng.choice(np.arange(1, 100), 7, replace=False))
        hundredths = np.sort(np.diff([0, *cuts, 100]))[::-1]
        count = int(rng.integers(1, 8))
        if hundredths[count - 1] > hundredths[count]:
            yield np.log(hundredths / 100), int(hundredths[:count].sum()) / 100, count


@pytest.mark.parametrize("truncate", [f.top_p, f.top_p_below])
def test_rounding_does_not_decide_what_happens_exactly_at_p(truncate, monkeypatch):
    rows = list(boundaries())
    assert [len(kept(truncate(row, p))) for row, p, _ in rows] == [count for *_, count in rows]
    monkeypatch.setattr(f, "SLACK", 0.0)
    wrong = [len(kept(truncate(row, p))) != count for row, p, count in rows]
    assert 10 < sum(wrong) < len(rows)  # 63 and 47 of 262 where this was written


def test_rounding_does_not_decide_what_happens_exactly_at_min_p(monkeypatch):
    rows = [(np.log([0.5, n / 200]), n / 100) for n in range(1, 101)]
    assert all(len(kept(f.min_p(row, p))) == 2 for row, p in rows)
    monkeypatch.setattr(f, "SLACK", 0.0)
    assert 2 < sum(len(kept(f.min_p(row, p))) == 1 for row, p in rows) < 100  # 11, likewise


DIFFERENT = [
    # what, the two orders or cases, whose tokens differ
    ("orders differ: hot top_p", "numpygpt", "llama.cpp"),  # temperature first or last
    ("orders differ: hot min_p", "numpygpt", "llama.cpp"),
    ("orders differ: hot typical_p", "numpygpt", "llama.cpp"),
    ("orders differ: hot top_p", "numpygpt", "openai"),  # the token that crosses
    ("orders differ: top_k and top_p", "numpygpt", "llama.cpp"),
    ("orders differ: top_k and top_p", "numpygpt", "openai"),
    ("orders differ: equals", "numpygpt", "transformers"),  # ties with the k-th
    ("orders differ: equals", "numpygpt", "openai"),
]


@pytest.mark.parametrize(("what", "one", "other"), DIFFERENT)
def test_the_documented_differences_between_tools_show(what, one, other):
    assert CASES[f"{what}, {one}"]["kept"] != CASES[f"{what}, {other}"]["kept"]


def test_the_penalties_of_llama_cpp_differ_in_the_tokens_they_see():
    ours, theirs = (
        CASES[f"orders differ: penalties, {name}"] for name in ("numpygpt", "llama.cpp")
    )
    assert ours["probabilities"] != theirs["probabilities"]
    # Without a prompt, and with less than 64 tokens, they are the same.
    logits = np.array([0.5, -1.0, 2.0, 1.5])
    history = History(np.array([2, 1, 2, 0]), 0)
    chosen = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    one, two = (
        run(logits, history, Settings(**chosen, order=order)) for order in ("numpygpt", "llama.cpp")
    )
    # 1.0 / 1.3 - 0.4 - 0.4: the two subtractions change places.
    np.testing.assert_allclose(one, two, rtol=1e-15)


# -- laws -----------------------------------------------------------------------------------------


def numbers(size, least=-30.0, most=30.0):
    return hnp.arrays(np.float64, size, elements=st.floats(least, most, width=32))


SIZES = st.integers(1, 12)
FREE = numbers(SIZES)
EQUALS = hnp.arrays(np.float64, SIZES, elements=st.sampled_from([-1.0, 0.0, 2.0]))
RULED_OUT = hnp.arrays(np.float64, SIZES, elements=st.sampled_from([-np.inf, -1.0, 0.0, 2.0]))
EXTREME = hnp.arrays(
    np.float64, SIZES, elements=st.sampled_from([-1.7e308, -1e300, 0.0, 5e-324, 1e300, 1.7e308])
)
UNEQUAL = st.lists(st.integers(-300, 300), min_size=1, max_size=12, unique=True).map(
    lambda tenths: np.array(tenths) / 10
)
ANY = FREE | EQUALS | RULED_OUT | EXTREME
SHARES = st.floats(1e-6, 1) | st.sampled_from([0.25, 0.5, 0.75, 1.0])

TRUNCATING = {
    "top_k": lambda x, p: f.top_k(x, max(1, round(p * 12))),
    "top_k_ties": lambda x, p: f.top_k_ties(x, max(1, round(p * 12))),
    "top_p": f.top_p,
    "top_p_below": f.top_p_below,
    "min_p": f.min_p,
    "typical_p": f.typical_p,
    "typical_p_ties": f.typical_p_ties,
}


@pytest.mark.parametrize("name", TRUNCATING)
@given(logits=ANY, p=SHARES)
def test_truncation_keeps_at_least_one_and_its_logit_and_no_more_than_there_was(name, logits, p):
    before = logits.copy()
    after = TRUNCATING[name](logits, p)
    assert logits.tobytes() == before.tobytes()
    left = after > -np.inf
    np.testing.assert_array_equal(after[left], logits[left])  # so order and ratios are as before
    assert left.any() == (logits > -np.inf).any()
    if not name.startswith("typical"):
        assert left[logits.argmax()] == (logits.max() > -np.inf)  # the lowest of the likeliest


@pytest.mark.parametrize(
    "change",
    [
        lambda x: f.top_k(x, 3),
        lambda x: f.top_k_ties(x, 3),
        lambda x: f.top_p(x, 1.0),
        lambda x: f.top_p_below(x, 1.0),
        lambda x: f.min_p(x, 0.0),
        lambda x: f.typical_p(x, 1.0),
        lambda x: f.typical_p_ties(x, 1.0),
        lambda x: f.temperature(x, 1.0),
        lambda x: f.no_repeat_ngram(x, np.array([0, 1]), 2),
    ],
)
@pytest.mark.parametrize("logits", [[0.0, -100.0, -700.0], [-np.inf, 3.0, -800.0]])
def test_values_that_rule_out_nothing(change, logits):
    """A chain leaves such filters out; called by hand, they keep what has next to no chance."""
    np.testing.assert_array_equal(change(np.array(logits)), logits)


@pytest.mark.parametrize("name", [*TRUNCATING, "temperature"])
@pytest.mark.parametrize("size", [1, 3])
def test_where_everything_is_ruled_out_it_stays_so(name, size):
    nothing = np.full(size, -np.inf)
    change = {**TRUNCATING, "temperature": f.temperature}[name]
    for p in (1e-6, 0.5, 1.0):
        np.testing.assert_array_equal(change(nothing, p), nothing)


@pytest.mark.parametrize("name", TRUNCATING)
@given(logits=ANY, one=SHARES, other=SHARES)
def test_kept_sets_are_nested(name, logits, one, other):
    less, more = sorted([one, other], reverse=name == "min_p")
    few, many = (TRUNCATING[name](logits, p) > -np.inf for p in (less, more))
    assert (few <= many).all()


@pytest.mark.parametrize("name", TRUNCATING)
@given(logits=UNEQUAL, data=st.data())
def test_without_equals_truncation_does_not_look_at_ids(name, logits, data):
    """A permutation of the tokens permutes the result."""
    p = data.draw(SHARES)
    if name.startswith("typical"):  # two may be as far above the entropy as below
        shares = softmax(logits)
        distances = np.sort(np.abs(-np.log(shares) + shares @ np.log(shares)))
        assume((np.diff(distances) > 1e-9).all())
    order = np.array(data.draw(st.permutations(range(len(logits)))))
    np.testing.assert_array_equal(
        TRUNCATING[name](logits[order], p), TRUNCATING[name](logits, p)[order]
    )


@given(FREE | EQUALS, SHARES)
def test_top_p_keeps_a_minimal_set_of_the_likeliest(logits, p):
    shares = softmax(logits)
    ids = kept(f.top_p(logits, p))
    by_rank = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert ids == sorted(by_rank[: len(ids)])
    # Sums of twelve numbers are rounded by 1e-15, much less than the slack.
    assert math.fsum(shares[ids]) >= p - f.SLACK - 1e-14
    if p < 1:
        assert math.fsum(shares[by_rank[: len(ids) - 1]]) < p - f.SLACK + 1e-14


@given(UNEQUAL, SHARES)
def test_top_p_and_top_p_below_differ_by_the_token_that_crosses(logits, p):
    """Where no tokens are equal; and at least one stays."""
    above, under = kept(f.top_p(logits, p)), kept(f.top_p_below(logits, p))
    total = math.fsum(softmax(logits)[above])
    assume(abs(total - p) > 1e-9)
    crossing = min(above, key=lambda i: logits[i])
    assert under == ([i for i in above if i != crossing] or above if p < 1 else above)


@given(FREE | EQUALS, st.integers(1, 12))
def test_top_k_ties_is_top_k_and_whatever_equals_its_last(logits, k):
    exact = f.top_k(logits, k)
    expected = logits >= min(exact[exact > -np.inf])
    np.testing.assert_array_equal(f.top_k_ties(logits, k) > -np.inf, expected)


@given(FREE | EQUALS, st.floats(1e-6, 1))
def test_min_p_is_a_threshold_on_probabilities(logits, p):
    shares = softmax(logits)
    assume((np.abs(shares - p * shares.max()) > 1e-11 * p * shares.max()).all())
    expected = np.flatnonzero(shares >= p * shares.max()).tolist()
    assert kept(f.min_p(logits, p)) == expected


@given(FREE | RULED_OUT, SHARES, st.floats(-100, 100))
def test_truncation_is_blind_to_a_shift_of_all_logits(logits, p, shift):
    """Within rounding, so p and tokens at its boundary are avoided: logits of a grid of 1/8."""
    logits, shift = np.round(logits * 8) / 8, round(shift * 8) / 8  # then sums are exact
    for truncate in TRUNCATING.values():
        assert kept(truncate(logits + shift, p)) == kept(truncate(logits, p))


def entropy(logits):
    shares = softmax(logits)
    return -math.fsum(p * math.log(p) for p in shares if p > 0)


@given(FREE | EQUALS | RULED_OUT, st.floats(0.05, 20), st.floats(1, 50))
def test_entropy_never_falls_with_the_temperature(logits, t, factor):
    assume(logits.max() > -np.inf)
    cold, hot = (entropy(f.temperature(logits, value)) for value in (t, t * factor))
    # Entropies are below log 12 = 2.5, with the rounding of exponents up to 1200.
    assert hot >= cold - 1e-12


@given(ANY, st.floats(1e-100, 1e300))
def test_temperature_never_makes_another_token_likelier_than_the_likeliest(logits, t):
    assume(logits.max() > -np.inf)
    heated = f.temperature(logits, t)
    # Distinct logits may become equal by rounding, or by underflow of all of them to 0.
    assert heated[logits.argmax()] == heated.max() < math.inf
    assert (np.isneginf(heated) | (logits > -np.inf)).all()  # nothing comes back


@pytest.mark.parametrize("t", [1e-100, 1e-20, 0.5])
def test_a_temperature_at_which_floats_overflow_leaves_the_likeliest(t):
    """The only right answer: differences of 1e300 leave nothing to the others at any of these."""
    for logits in ([1.5e308, -1.5e308, 0.0], [0.0, -1.5e308, -1e300], [-1e300, -1.5e308, -np.inf]):
        assert softmax(f.temperature(np.array(logits), t)).tolist() == [1, 0, 0]


@given(ANY)
def test_greedy_is_top_1(logits):
    assume(logits.max() > -np.inf)
    assert kept(f.top_k(logits, 1)) == [choose(logits)]


IDS = st.lists(st.integers(0, 4), max_size=12).map(lambda ids: np.array(ids, int))
FIVE = numbers(5)


@given(FIVE, IDS, st.floats(0.1, 10), st.floats(-5, 5))
def test_penalties_touch_the_tokens_they_see_and_no_other(logits, ids, factor, nats):
    for after in (
        f.repetition_penalty(logits, ids, factor),
        f.presence_penalty(logits, ids, nats),
        f.frequency_penalty(logits, ids, nats),
        f.llama_penalties(logits, ids, factor, nats, nats),
    ):
        unseen = ~np.isin(np.arange(5), ids)
        np.testing.assert_array_equal(after[unseen], logits[unseen])
    after = f.repetition_penalty(logits, ids, factor)
    assert ((after <= logits) if factor >= 1 else (after >= logits)).all()


def test_a_reward_or_a_penalty_beyond_what_floats_hold():
    logits, ids = np.array([1e300, -1e300, 0.0]), np.array([0, 1, 2])
    largest = np.finfo(np.float64).max
    rewarded = f.repetition_penalty(logits, ids, 1e-100)
    assert rewarded.tolist() == [largest, -1e300 * 1e-100, 0]
    assert choose(rewarded, np.random.default_rng(0)) == 0
    assert f.repetition_penalty(logits, ids, 1e100).tolist() == [1e300 / 1e100, -np.inf, 0]


@given(FIVE, IDS, st.floats(-5, 5))
def test_one_frequency_penalty_is_a_presence_penalty_for_each_occurrence(logits, ids, nats):
    one_by_one = logits
    for i in ids:
        one_by_one = f.presence_penalty(one_by_one, np.array([i]), nats)
    # Up to twelve subtractions of 5 from 30, each rounded by 30 u = 3e-15 or twice that.
    np.testing.assert_allclose(f.frequency_penalty(logits, ids, nats), one_by_one, atol=2e-13)


@given(FIVE, st.dictionaries(st.integers(0, 4), st.integers(-80, 80).map(lambda x: x / 8)))
def test_a_bias_and_its_opposite_are_the_identity(logits, bias):
    logits = np.round(logits * 8) / 8  # then sums are exact
    back = {i: -x for i, x in bias.items()}
    np.testing.assert_array_equal(f.logit_bias(f.logit_bias(logits, bias), back), logits)


@given(IDS, st.integers(1, 5))
def test_no_run_of_n_tokens_comes_twice(ids, n):
    """Each token is ruled out exactly if the text would hold a run twice that ends with it."""
    after = f.no_repeat_ngram(np.zeros(5), ids, n)
    runs = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
    for token in range(5):
        text = (*ids, token)
        assert (after[token] == -np.inf) == (len(text) >= n and text[len(text) - n :] in runs)


@given(IDS, st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=6))
def test_banned_sequences_never_end_the_text(ids, banned):
    after = f.ban(np.zeros(5), ids, banned)
    for token in range(5):
        text = [*ids, token]
        assert (after[token] == -np.inf) == any(text[-len(item) :] == item for item in banned)


@given(ANY, st.data())
def test_force_leaves_one_token_whatever_was_ruled_out(logits, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    forced = f.force(logits, token)
    assert kept(forced) == [token]
    assert forced[token] == 0


# -- chains ---------------------------------------------------------------------------------------

ONLY = {"top_k": 5, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5}


def names(**chosen):
    return [(item.name, item.values) for item in Settings(**chosen).filters]


def test_a_chain_has_the_filters_that_are_on_in_their_order():
    assert names() == []
    assert names(temperature=0) == []
    assert names(temperature=0.7, top_p=0.9, top_k=40) == [
        ("temperature", "0.7"),
        ("top_k", "40"),
        ("top_p", "0.9"),
    ]
    assert names(temperature=0.7, top_p=0.9, top_k=40, order="llama.cpp") == [
        ("top_k", "40"),
        ("top_p", "0.9"),
        ("temperature", "0.7"),
    ]
    assert names(repetition_penalty=1.2, presence_penalty=0.5, penalty_window=9) == [
        ("repetition_penalty", "1.2, last 9"),
        ("presence_penalty", "0.5, last 9"),
    ]
    assert names(repetition_penalty=1.2, presence_penalty=0.5, order="llama.cpp") == [
        ("llama_penalties", "repetition_penalty 1.2, presence_penalty 0.5, last 64")
    ]
    assert names(logit_bias={3: 1.0, 4: -math.inf}, banned=[5, (6, 7)], forced={0: 1}) == [
        ("logit_bias", "2"),
        ("ban", "2"),
        ("force", "1"),
    ]


def test_what_is_neutral_is_left_out():
    neutral = {"top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    assert names(temperature=1.0, **neutral, order=("top_k",)) == []
    assert names(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0) == []
    assert names(min_new_tokens=3) == []  # there is no stop id to rule out
    assert names(min_new_tokens=3, stop_ids=[1, 2]) == [("min_new_tokens", "3")]
    assert names(logit_bias={}, banned=[], forced={}, order="openai") == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("field", ["temperature", *ONLY])
def test_a_named_order_does_what_is_asked_or_refuses(order, field):
    chosen = {"temperature": 0.5, "order": order}
    if field != "temperature":
        chosen[field] = ONLY[field]
    if order == "openai" and field in ("min_p", "typical_p"):
        with pytest.raises(ArgumentError, match=rf"'openai' has no filter for {field}"):
            Settings(**chosen)
    else:
        assert any(name.startswith(field) for name, _ in names(**chosen))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"order": "hugging"}, r"unknown order 'hugging'; expected 'numpygpt', 'transformers'"),
        ({"order": ("top_q",)}, r"unknown filter 'top_q' in the order; expected logit_bias, rep"),
        ({"order": (3,)}, r"order must be a name or a sequence of filter names, not \(3,\)"),
        ({"order": ("top_k", "top_k")}, r"applies top_k twice, by top_k and by top_k;"),
        ({"order": ("top_k", "top_k_ties")}, r"applies top_k twice, by top_k and by top_k_ties"),
        ({"order": ("llama_penalties", "presence_penalty")}, r"applies presence_penalty twice"),
        (
            {"temperature": 0.5, "order": ("top_k", "top_p")},
            r"no filter for temperature, which would have no effect; .* temperature among them",
        ),
        (
            {"temperature": 1, "top_k": 5, "order": ("top_p",)},
            r"no filter for top_k, .* top_k or top_k_ties among them",
        ),
        (
            {"repetition_penalty": 1.2, "order": "openai"},
            r"no filter for repetition_penalty, .* repetition_penalty or llama_penalties among",
        ),
        ({"presence_penalty": 1.2, "order": "transformers"}, r"no filter for presence_penalty"),
        ({"no_repeat_ngram": 2, "order": "llama.cpp"}, r"no filter for no_repeat_ngram"),
    ],
)
def test_orders_that_would_do_something_else_are_refused(chosen, message):
    with pytest.raises(ArgumentError, match=message):
        Settings(**chosen)


def test_a_history_is_prompt_and_new_tokens():
    """Each chain of one filter sees the ids that its tool sees."""
    history = History(np.array([0, 1, 2, 3]), 2)
    seen = {
        ("repetition_penalty", "numpygpt", None): [0, 1, 2, 3],
        ("repetition_penalty", "numpygpt", 3): [1, 2, 3],
        ("presence_penalty", "numpygpt", None): [2, 3],
        ("presence_penalty", "numpygpt", 3): [2, 3],
        ("presence_penalty", "numpygpt", 1): [3],
        ("frequency_penalty", "numpygpt", None): [2, 3],
        ("presence_penalty", "llama.cpp", None): [0, 1, 2, 3],
        ("frequency_penalty", "llama.cpp", 3): [1, 2, 3],
    }
    for (name, order, window), expected in seen.items():
        settings = Settings(**{name: 1.5}, order=order, penalty_window=window)
        changed = run(np.ones(6), history, settings) != 1
        assert np.flatnonzero(changed).tolist() == expected, (name, order, window)


def test_everything_ruled_out_is_an_error_that_says_so():
    settings = Settings(banned=[0, 1], temperature=1.0, top_k=1, top_p=0.5)
    for logits in (np.zeros(2), np.zeros(2, np.float32)):
        row = logits.astype(np.float64)
        for item in settings.filters:
            row = item.apply(row, NOTHING)
        for rng in (None, np.random.default_rng(0)):
            with pytest.raises(NumpyGPTError, match="all 2 tokens are ruled out"):
                choose(row, rng)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_logits_are_an_error(value):
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(NumpyGPTError, match=f"logits are {value}, not numbers to choose by"):
            choose(np.array([0.0, value]), rng)


def test_a_usual_chain_is_fast_at_the_size_of_gpt_2():
    """0.8 ms where this was written; a full sort by ids alone takes 5 ms there."""
    logits = np.random.default_rng(0).normal(size=50257) * 3
    settings = Settings(temperature=0.8, top_k=40, top_p=0.9)
    sort = min(timeit.repeat(lambda: np.argsort(-logits, kind="stable"), number=1, repeat=7))
    filters = min(timeit.repeat(lambda: run_only(logits, settings), number=1, repeat=7))
    assert filters < sort


def run_only(logits, settings):
    for item in settings.filters:
        logits = item.apply(logits, NOTHING)


# -- drawing --------------------------------------------------------------------------------------

DRAWS = 6_000
# A sampler that is right fails once in ten million seeds; the seed is fixed. Five tokens are
# left, so four degrees of freedom: the chi-square distribution exceeds 38 with a probability of
# exp(-19) (1 + 19) = 1.1e-7.
CRITICAL = 38.0
DRAWN = np.array([1.0, 0.2, -0.3, 2.0, 0.9, -1.5, 1.6, -4.0])
CHAIN = {"temperature": 0.8, "top_k": 6, "top_p": 0.97}


def chi_square(tokens, shares):
    """Infinite if a token came that cannot come."""
    counts = np.bincount(tokens, minlength=len(shares))
    if counts[shares == 0].any():
        return math.inf
    expected = len(tokens) * shares[shares > 0]
    return float(((counts[shares > 0] - expected) ** 2 / expected).sum())


def expected_shares():
    """Temperature 0.8, the six likeliest, then those that reach 0.97: by hand."""
    masses = [math.exp(x / 0.8) for x in DRAWN]
    order = sorted(range(8), key=lambda i: -masses[i])[:6]
    total = sum(masses[i] for i in order)
    running = [sum(masses[i] for i in order[: n + 1]) / total for n in range(6)]
    left = order[: sum(share < 0.97 for share in running) + 1]
    assert len(left) == 5
    return np.array([masses[i] if i in left else 0 for i in range(8)]) / sum(
        masses[i] for i in left
    )


def sample(choose_one, **chosen):
    rng = np.random.default_rng(11)
    logits = run(DRAWN, NOTHING, Settings(**chosen))
    return [choose_one(logits, rng) for _ in range(DRAWS)]


def test_a_chain_draws_with_the_probabilities_it_leaves():
    assert chi_square(sample(choose, **CHAIN), expected_shares()) < CRITICAL


def one_off(logits, rng):
    """A draw from the cumulative distribution without its first token."""
    cumulative = np.cumsum(softmax(logits))[:-1]
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")) + 1


WRONG = {
    "another temperature": (lambda x, rng: choose(f.temperature(x, 1.2), rng), CHAIN),
    "temperature last": (choose, {**CHAIN, "order": "llama.cpp"}),
    "without top_p": (choose, {**CHAIN, "top_p": 1.0}),
    "without the token that crosses": (choose, {**CHAIN, "order": "openai"}),
    "one off": (one_off, CHAIN),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sampler_fails_the_same_test(name):
    choose_one, chosen = WRONG[name]
    assert chi_square(sample(choose_one, **chosen), expected_shares()) > CRITICAL


# -- what is reported of a row --------------------------------------------------------------------


@given(FREE | EQUALS | RULED_OUT, st.integers(0, 14))
def test_top_logprobs_are_the_likeliest_with_lower_ids_first(logits, n):
    assume(logits.max() > -np.inf)
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:n]
    result = top_logprobs(logits, n)
    assert [i for i, _ in result] == ranked
    assert all(type(i) is int and type(value) is float for i, value in result)
    for i, value in result:
        assert value == log_probability(logits, i)


@given(FREE | EQUALS | RULED_OUT, st.data())
def test_margin_is_the_distance_to_the_best_other(logits, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    assume(logits[token] > -np.inf)
    others = [x for i, x in enumerate(logits) if i != token]
    assert margin(logits, token) == logits[token] - max(others, default=-math.inf)
    assert type(margin(logits, token)) is float


def test_the_margin_of_the_greedy_choice_is_never_negative_and_infinite_for_one_token():
    assert margin(np.array([2.0, 2.0]), 0) == 0
    assert margin(np.array([3.0]), 0) == math.inf
    assert margin(np.array([3.0, -np.inf]), 0) == math.inf
    assert margin(np.array([3.0, 5.0], np.float32), 0) == -2


def test_top_logprobs_are_summed_in_float64():
    logits = np.zeros(50257, np.float32)
    # The float32 logarithm would be rounded by 6e-7.
    assert abs(top_logprobs(logits, 1)[0][1] + math.log(50257)) < 1e-14


def test_equals_keep_the_lower_ids_in_long_rows_too():
    """Sorting algorithms keep short rows in order even where they promise nothing."""
    logits = np.log(np.tile([0.5, 0.25, 0.25], 200) / 200)
    kept = np.flatnonzero(f.typical_p(logits, 0.3) > -np.inf)
    nearest = np.flatnonzero(f._distances(logits) == f._distances(logits).min())
    assert len(nearest) > len(kept) > 50
    np.testing.assert_array_equal(kept, nearest[: len(kept)])
