"""Settings: what is refused, in which words, and before any work."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import functools
import inspect
import math
import re

import numpy as np
import pytest
from support import random_params

import numpygpt
from numpygpt.api import Model
from numpygpt.decoding import ORDERS, Options, Settings
from numpygpt.errors import ArgumentError, ContextError, NumpyGPTError, TokenError
from numpygpt.params import Config

CONFIG = Config(vocab_size=29, n_ctx=24, n_embd=16, n_layer=2, n_head=4)
MODEL = Model(CONFIG, random_params(CONFIG))
NAMES = [field.name for field in dataclasses.fields(Settings)]
# Python refuses to print an integer of more than 4300 digits, unless it is told otherwise.
GIANT = 10**5000
HUGE = 2**128 - 1  # the largest number that is allowed
# Beside what the setting needs, so that it is not refused for another reason.
COMPANY = {
    **{name: {"temperature": 1.0} for name in ("top_k", "top_p", "min_p", "typical_p", "n")},
    "penalty_window": {"repetition_penalty": 2.0},
    "keep": {"overflow": "slide"},
}


class Silent:
    """What cannot even be printed."""

    def __repr__(self):
        raise ValueError


@pytest.fixture
def no_work(monkeypatch):
    """A forward pass, or a cache, fails the test."""

    def refuse(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr(numpygpt.feed, "forward", refuse)
    monkeypatch.setattr(numpygpt.decoding.generate, "Cache", refuse)


def assert_refused(name, value, words, error=ArgumentError):
    """By Settings and, with the same words, by everything that takes settings."""
    o = {**COMPANY.get(name, {}), name: value}
    with pytest.raises(error) as caught:
        Settings(**o)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 300
    for call in (MODEL.settings, lambda **o: MODEL.generate([1], **o)):
        if value is None and name == "stop_ids":
            continue  # the tokenizer's end-of-text
        with pytest.raises(error) as again:
            call(**o)
        assert str(again.value) == str(caught.value)


# -- whole numbers --------------------------------------------------------------------------------

LEAST = {
    "max_new_tokens": 0, "min_new_tokens": 0, "top_k": 1, "penalty_window": 1,
    "no_repeat_ngram": 1, "seed": 0, "n": 1, "top_logprobs": 0, "lookup": 0, "keep": 1, "batch": 1,
    "chunk": 1,
}  # fmt: skip


def up_to(name):
    return "to 10000" if name in ("n", "batch") else "up"


NO_INTEGERS = [
    True, False, np.True_, 2.0, 2.5, math.nan, math.inf, "2", b"2", [2], (2,), {}, {2: 3}, 2 + 0j,
    np.float64(2), np.float32(math.nan), np.array(2.0), np.array([2, 3]), fractions.Fraction(2),
    decimal.Decimal(2), object, Silent(), np.timedelta64(2, "s"), slice(2),
]  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_what_is_no_whole_number_is_refused(name, no_work):
    for value in NO_INTEGERS:
        assert_refused(
            name, value, rf"{name} must be an integer from {LEAST[name]} {up_to(name)}, not "
        )


@pytest.mark.parametrize("name", LEAST)
def test_whole_numbers_start_somewhere(name, no_work):
    least = LEAST[name]
    for value in (least - 1, -7, -GIANT, np.int8(-3)):
        assert_refused(name, value, rf"{name} must be an integer from {least} {up_to(name)}, not ")
    for value in (2**128, GIANT):
        assert_refused(name, value, rf"{name} must be an integer from {least} to 2\*\*128 - 1")
    needed = {**COMPANY.get(name, {}), name: least}
    assert getattr(Settings(**needed), name) == least


@pytest.mark.parametrize("name", LEAST)
def test_none_is_off_where_there_is_such_a_thing(name, no_work):
    if Settings.__dataclass_fields__[name].default is None:
        assert getattr(Settings(**{name: None}), name) is None
    else:
        assert_refused(name, None, "must be an integer")


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64])
def test_numpys_integers_become_pythons(name, kind):
    value = getattr(Settings(**{"max_new_tokens": 9, **COMPANY.get(name, {}), name: kind(3)}), name)
    assert type(value) is int
    assert value == 3


# Any size is fine where a larger number asks for no more than all there is.
@pytest.mark.parametrize(
    "name",
    ["top_k", "penalty_window", "no_repeat_ngram", "seed", "top_logprobs", "lookup", "chunk"],
)
@pytest.mark.parametrize("value", [2**63, HUGE], ids=["2**63", "2**128 - 1"])
def test_giants_ask_for_all_there_is(name, value):
    o = {**COMPANY.get(name, {}), "max_new_tokens": 5, name: value}
    everything = {} if name == "seed" else {"seed": 1}
    result = MODEL.generate([1, 2, 1, 2, 1, 2], stop_ids=(), **everything, **o)
    assert len(result.ids) == 5


def test_lookup_and_chunk_may_be_giants_together():
    result = MODEL.generate([1, 2], max_new_tokens=5, lookup=HUGE, chunk=HUGE, stop_ids=())
    assert len(result.ids) == 5


@pytest.mark.parametrize("value", [2**63, HUGE], ids=["2**63", "2**128 - 1"])
def test_giants_that_do_not_fit_are_refused(value, no_work):
    for overflow in ("error", "truncate-left"):
        with pytest.raises(ContextError, match="new tokens"):
            MODEL.generate([1], max_new_tokens=value, overflow=overflow)
    with pytest.raises(ArgumentError, match="keep must be from 1 to n_ctx = 24"):
        MODEL.generate([1], overflow="slide", keep=value)
    with pytest.raises(ArgumentError, match=r"min_new_tokens = .* is more than max_new_tokens"):
        MODEL.generate([1], min_new_tokens=value)


def test_a_giant_number_of_tokens_may_slide_until_a_stop():
    free = MODEL.generate([1, 2], max_new_tokens=60, overflow="slide", stop_ids=(), temperature=2.0,
                          seed=1)  # fmt: skip
    stop = free.ids[50]
    result = MODEL.generate([1, 2], max_new_tokens=HUGE, overflow="slide", temperature=2.0, seed=1,
                            stop_ids=[stop])  # fmt: skip
    assert result.ids == free.ids[: free.ids.index(stop)]


# -- real numbers ---------------------------------------------------------------------------------

REALS = {  # too small, smallest, largest, too large, in words
    "temperature": (1e-101, 1e-100, 1e308, 1.01e308, r"0 \(greedy\) or from 1e-100 to 1e308"),
    "top_p": (0.0, 5e-324, 1.0, 1.0000001, "above 0 and at most 1"),
    "min_p": (-1e-9, 0.0, 1.0, 1.0000001, "from 0 to 1"),
    "typical_p": (0.0, 5e-324, 1.0, 1.0000001, "above 0 and at most 1"),
    "repetition_penalty": (0.0, 1e-100, 1e100, 1.1e100, "from 1e-100 to 1e100"),
    "presence_penalty": (-1.1e9, -1e9, 1e9, 1.1e9, "from -1e9 to 1e9"),
    "frequency_penalty": (-1.1e9, -1e9, 1e9, 1.1e9, "from -1e9 to 1e9"),
}
NO_REALS = [
    True, np.False_, "1", b"1", [1.0], (1.0,), {}, 1 + 0j, np.complex64(1), np.array(0.5), math.nan,
    np.float32(math.nan), np.float16(math.nan), math.inf, -math.inf, np.float64(-math.inf), GIANT,
    -GIANT, -0.5e10, fractions.Fraction(1, 2), decimal.Decimal("0.5"), object, Silent(),
]  # fmt: skip


@pytest.mark.parametrize("name", REALS)
def test_what_is_no_number_or_out_of_range_is_refused(name, no_work):
    low, _, _, high, words = REALS[name]
    for value in (*NO_REALS, low, high):
        assert_refused(name, value, rf"{name} must be {words}.*, not ")


@pytest.mark.parametrize("name", REALS)
def test_the_ends_of_the_ranges_work(name):
    for value in REALS[name][1:3]:
        o = {**COMPANY.get(name, {}), name: value}
        assert getattr(Settings(**o), name) == value
        result = MODEL.generate([1, 2], max_new_tokens=4, seed=1, stop_ids=(), **o)
        assert len(result.ids) == 4


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, int])
def test_numpys_numbers_become_pythons(name, kind):
    value = getattr(Settings(**{**COMPANY.get(name, {}), name: kind(1)}), name)
    assert type(value) is float
    assert value == 1.0


# -- ids ------------------------------------------------------------------------------------------

NO_IDS = [1.0, True, np.True_, "1", "a", b"a", None, math.nan, np.float64(1), object, Silent()]


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("stop_ids", lambda i: [i]),
        ("stop_ids", lambda i: (3, i)),
        ("banned", lambda i: [i]),
        ("banned", lambda i: [(3, i)]),
        ("logit_bias", lambda i: {i: 1.0}),
        ("forced", lambda i: {0: i}),
        ("forced", lambda i: {i: 0}),
    ],
    ids=["stop_ids", "second stop_id", "banned", "in a sequence", "logit_bias", "forced", "number"],
)
def test_what_is_no_id_is_refused(name, wrapped, no_work):
    for value in NO_IDS:
        assert_refused(name, wrapped(value), "token ids must be integers, not ", TokenError)


@pytest.mark.parametrize(
    "o",
    [
        {"stop_ids": [3, None]},
        {"banned": [None]},
        {"banned": [3, (2, None)]},
        {"logit_bias": {None: 1.0}},
        {"forced": {0: None}},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "wrong", [-1, 29, 10**18, 2**63, 2**64, -GIANT, GIANT], ids=lambda i: hex(i)[:20]
)
def test_ids_outside_the_vocabulary_are_refused(o, wrong, no_work):
    """Where the model is known; Settings alone know of no vocabulary."""

    def put(value):
        if isinstance(value, dict):
            return {put(key): put(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(put, value))
        return wrong if value is None else value

    Settings(**put(o))
    for call in (MODEL.generate, MODEL.stream):
        with pytest.raises(TokenError, match=r"outside the vocabulary, 0 to 28") as caught:
            call([1], max_new_tokens=1, **put(o))
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("stop_ids", [5, "abc", b"ab", 1.5, Silent(), np.array(5)], "must be token ids"),
        ("banned", [5, "abc", b"ab", {1: 2}, 1.5, None, Silent(), np.array(5)],
         "must be token ids or sequences of them"),
        ("logit_bias", [5, [1], [(1, 2.0)], "ab", None, {1}, Silent(), np.array(5)],
         "must be a mapping from token id to a number"),
        ("forced", [5, [1], [(1, 2)], "ab", None, {1}, Silent(), np.array(5)],
         "must be a mapping from number of a new token to id"),
    ],
    ids=["stop_ids", "banned", "logit_bias", "forced"],
)  # fmt: skip
def test_what_is_no_collection_of_ids_is_refused(name, values, words, no_work):
    for value in values:
        assert_refused(name, value, words)


def test_a_banned_sequence_of_nothing_is_refused(no_work):
    for value in ([()], [3, []], [np.array([], int)]):
        assert_refused("banned", value, "a sequence of no tokens")


@pytest.mark.parametrize(
    "value", [True, "1", None, math.nan, math.inf, np.float32(math.inf), 1.1e9, -1.1e9, GIANT,
              -GIANT, 1j, [1.0], Silent()], ids=lambda value: type(value).__name__
)  # fmt: skip
def test_biases_are_finite_numbers_or_minus_infinity(value, no_work):
    assert_refused("logit_bias", {3: value}, "must be numbers from -1e9 to 1e9, or -inf, not ")


def test_all_that_may_be_ids():
    o = Settings(
        stop_ids=np.array([1, 2], np.uint8),
        banned=[np.int64(3), np.array([4, 5]), range(6, 8), [9], np.array(10)],
        logit_bias={np.int16(3): np.float32(0.5), 4: -math.inf, 5: 2},
        forced={np.int8(-1): np.uint8(7)},
        max_new_tokens=10,
    )
    assert o.stop_ids == (1, 2)
    assert o.banned == ((3,), (4, 5), (6, 7), (9,), (10,))
    assert o.logit_bias == {3: 0.5, 4: -math.inf, 5: 2.0}
    assert o.forced == {9: 7}
    numbers = [*o.stop_ids, *sum(o.banned, ()), *o.logit_bias, *o.forced, *o.forced.values()]
    assert {type(number) for number in numbers} == {int}
    assert {type(value) for value in o.logit_bias.values()} == {float}


@pytest.mark.parametrize("number", [10, -11, GIANT, -GIANT], ids=lambda i: hex(i)[:9])
def test_only_tokens_that_come_can_be_forced(number, no_work):
    o = {"max_new_tokens": 10, "forced": {number: 1}}
    with pytest.raises(ArgumentError, match=r"forced: there is no new token .* = 10"):
        Settings(**o)


def test_one_place_cannot_have_two_tokens(no_work):
    with pytest.raises(ArgumentError, match="forced: two ids for the new token 9"):
        Settings(max_new_tokens=10, forced={9: 1, -1: 2})
    assert Settings(max_new_tokens=10, forced={9: 1, -1: 1}).forced == {9: 1}


# -- words ----------------------------------------------------------------------------------------

NO_WORDS = [5, None, True, b"slide", ["error"], Silent(), GIANT, np.array(["error", "slide"]),
            "", "Slide", "x" * 1000]  # fmt: skip


def test_overflow_is_one_of_three_words(no_work):
    for value in NO_WORDS:
        assert_refused("overflow", value, "must be 'error', 'truncate-left' or 'slide', not ")


def test_orders_are_names_or_filters(no_work):
    for value in (5, None, True, 1.5, Silent(), GIANT, object, np.array("a"), b"ab"):
        assert_refused("order", value, "must be a name or a sequence of filter names, not ")
    for value in ([5], ["top_k", None], [["top_k"]], [Silent()], [GIANT]):
        assert_refused("order", value, "must be a name or a sequence of filter names, not ")
    for value in ("", "huggingface", "x" * 1000):
        assert_refused("order", value, "unknown order")
    for value in (["top_kk"], ("temperature", "x" * 1000), {"top_q": 1}):
        assert_refused("order", value, "unknown filter")


def test_every_order_can_be_named():
    for name, filters in ORDERS.items():
        assert Settings(order=name).filters == Settings(order=list(filters)).filters == ()


def test_stop_strings_are_texts_that_are_not_empty(no_work):
    for value in (5, None, b"ab", 1.5):
        assert_refused("stop", value, "must be a list of strings")
    for value in ("", [""], ["a", ""], [5], [b"a"], [None], [["a"]], ["\ud800"]):
        with pytest.raises(ArgumentError, match="stop string must be"):
            Settings(stop=value)


@pytest.mark.parametrize("kind", [list, tuple, set, iter, dict.fromkeys])
def test_stop_strings_may_be_any_collection(kind):
    assert Settings(stop=kind(["a"])).stop == ("a",)


# -- contradictions -------------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"min_new_tokens": 6, "max_new_tokens": 5},
     "min_new_tokens = 6 is more than max_new_tokens = 5"),
    ({"top_k": 3}, "top_k = 3 has no effect on greedy decoding; give a temperature"),
    ({"top_p": 0.5, "temperature": 0}, "top_p = 0.5 has no effect on greedy decoding"),
    ({"min_p": 0.5, "temperature": 0.0}, "min_p = 0.5 has no effect on greedy decoding"),
    ({"typical_p": 0.5}, "typical_p = 0.5 has no effect on greedy decoding"),
    ({"top_k": HUGE}, "top_k = .* has no effect on greedy decoding"),
    ({"n": 2}, "n = 2 greedy continuations would be equal"),
    ({"n": 10_000}, "n = 10000 greedy continuations would be equal"),
    ({"penalty_window": 5}, "penalty_window has no effect without a penalty"),
    ({"keep": 5}, "keep = 5 has no effect without overflow='slide'"),
    ({"keep": HUGE, "overflow": "error"}, "keep = .* has no effect without overflow='slide'"),
    ({"order": "openai", "repetition_penalty": 2.0}, "no filter for repetition_penalty"),
    ({"order": ["top_k"], "temperature": 2.0, "top_k": 3}, "no filter for temperature"),
]  # fmt: skip


@pytest.mark.parametrize(("o", "message"), CONTRADICTIONS, ids=[m for _, m in CONTRADICTIONS])
def test_what_would_have_no_effect_is_refused(o, message, no_work):
    generate, stream = (functools.partial(call, [1]) for call in (MODEL.generate, MODEL.stream))
    for call in (Settings, generate, stream):
        with pytest.raises(ArgumentError, match=message):
            call(**o)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [MODEL.generate, MODEL.stream])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("topk", "top_k"), ("max_tokens", "max_new_tokens"),
     ("stop_id", "stop_ids"), ("logits_bias", "logit_bias"), ("onstep", "on_step")],
)  # fmt: skip
def test_a_misspelt_setting_is_refused_with_the_one_that_is_meant(call, name, meant, no_work):
    with pytest.raises(ArgumentError, match=f"no setting '{name}'; did you mean {meant}[?]"):
        call([1], **{name: 1})


def test_a_setting_like_no_other_is_refused_with_all_there_are(no_work):
    with pytest.raises(ArgumentError, match="there is no setting 'zzz'; there are") as caught:
        MODEL.generate([1], zzz=1)
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("wrong", [5, "f", [print], True])
def test_a_listener_must_be_a_function(wrong, no_work):
    for call in (MODEL.generate, MODEL.stream):
        with pytest.raises(ArgumentError, match="on_step must be a function, not "):
            call([1], max_new_tokens=1, on_step=wrong)


def test_the_options_are_the_settings_and_the_listener():
    without_n = [name for name in NAMES if name != "n"]  # which has overloads of its own
    assert list(Options.__annotations__) == [*without_n, "on_step"]


def test_every_setting_is_explained_and_in_this_order():
    doc = inspect.getdoc(Settings)
    parameters = doc[doc.index("Parameters\n") : doc.index("Raises\n")]
    explained = re.findall(r"^(\w+) : ", parameters, re.MULTILINE)
    assert explained == NAMES


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().top_k = 3


def test_settings_can_be_made_from_settings():
    """What was checked is accepted again: the records of runs rely on it."""
    order = ["temperature", "ban", "force"]
    o = Settings(
        temperature=0.5, stop="a", banned=[1, (2, 3)], forced={-1: 5}, stop_ids=[7], order=order
    )
    again = Settings(**{name: getattr(o, name) for name in NAMES})
    assert again == o
    assert dataclasses.replace(o) == o


def test_the_defaults_are_greedy_and_have_no_filters():
    o = Settings()
    assert (o.max_new_tokens, o.temperature, o.overflow, o.filters) == (100, None, "error", ())


def test_what_is_given_is_not_kept_nor_changed():
    """A caller may go on using what it passed."""
    bias, banned, forced = {1: 0.5}, [[2, 3]], {-1: 4}
    o = Settings(logit_bias=bias, banned=banned, forced=forced)
    bias[2] = 1.0
    banned.append([5])
    forced[0] = 5
    assert (o.logit_bias, o.banned, o.forced) == ({1: 0.5}, ((2, 3),), {99: 4})


def test_every_refusal_is_an_error_of_ours():
    assert issubclass(ArgumentError, NumpyGPTError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(TokenError, ValueError)
