"""Streams of text: characters and stop strings across the borders of tokens."""

from __future__ import annotations

import codecs
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numpygpt.errors import ArgumentError, TokenError
from numpygpt.text import StopSearch, TextStream, stop_strings
from numpygpt.tokenizer import Tokenizer

# Few letters, so that stop strings overlap, contain each other and nearly come. The characters
# share first bytes (é and è) and have two, three and four bytes.
LETTERS = "abéè€👏"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=4)
# Whole characters, pieces of characters, and bytes that no UTF-8 has.
PIECES = [*(c.encode() for c in LETTERS), b"\xc3", b"\xe2\x82", b"\xf0\x9f", b"\x80", b"\xff"]
TOKENS = st.lists(st.lists(st.sampled_from(PIECES) | st.binary(max_size=2)).map(b"".join))


def run(tokens: list[bytes], stop=(), may_stop=None) -> tuple[str, str | None]:
    """All the text of some tokens, and what stopped it."""
    stream = TextStream(dict(enumerate(tokens)), stop)
    may_stop = [True] * len(tokens) if may_stop is None else may_stop
    text = "".join([stream.feed(i, may) for i, may in enumerate(may_stop)])
    return text + stream.end(), stream.stopped


def slow_run(tokens: list[bytes], stop, may_stop=None) -> tuple[str, str | None]:
    """The same by definition: try every end of a stop string, from the first on."""
    data, end = b"".join(tokens), 0
    for i, token in enumerate(tokens):
        for _ in token:
            end += 1
            if may_stop is None or may_stop[i]:
                found = [text for text in stop if data[:end].endswith(text.encode())]
                if found:
                    longest = max(found, key=lambda text: len(text.encode()))
                    before = data[: end - len(longest.encode())]
                    return before.decode("utf-8", "replace"), longest
    return data.decode("utf-8", "replace"), None


def cut(data: bytes, at) -> list[bytes]:
    places = [0, *sorted(min(place, len(data)) for place in at), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


def common(texts: list[str]) -> str:
    """The beginning that all of them have."""
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join([a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])


# -- laws -----------------------------------------------------------------------------------------


@given(TOKENS, STOPS, st.data())
def test_the_text_and_what_stops_it_are_those_of_the_definition(tokens, stop, data):
    assert run(tokens, stop) == slow_run(tokens, stop)
    may_stop = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    assert run(tokens, stop, may_stop) == slow_run(tokens, stop, may_stop)


@given(TOKENS, STOPS, st.lists(st.integers(0, 60)))
def test_how_the_bytes_are_cut_into_tokens_changes_nothing(tokens, stop, at):
    data = b"".join(tokens)
    whole = run([data], stop)
    assert run(cut(data, at), stop) == whole
    assert run([bytes([byte]) for byte in data], stop) == whole


@given(TOKENS, STOPS, st.data())
def test_what_is_held_back_is_the_beginning_of_a_stop_string_or_a_character(tokens, stop, data):
    """And never less: the longest end of the bytes that may still become a stop string."""
    stream, seen, shown = TextStream(dict(enumerate(tokens)), stop), b"", ""
    for i, token in enumerate(tokens):
        shown += stream.feed(i, may_stop=data.draw(st.booleans()))
        if stream.stopped is not None:
            break
        seen += token
        beginnings = {text.encode()[:k] for text in stop for k in range(len(text.encode()))}
        held = max((len(part) for part in beginnings if seen.endswith(part)), default=0)
        # Bytes before a stop string are no half character: it begins with a whole one.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert shown == decoder.decode(seen[: len(seen) - held], final=held > 0)


FOLLOWING = [
    b"",
    b"a",
    b"\x80",
    b"\x80\x80",
    b"\x80\x80\x80",
    b"\x90\x80\x80",
    b"\xa0",
    b"\xa0\x80",
    b"\xbd",
]


@given(TOKENS, st.text(LETTERS, min_size=1, max_size=5))
@example([b"\xc3"], "é")
@example([b"\xf4"], "a")  # only 80 to 8f may follow
@example([b"a\xf0\x9f", b"a"], "ab")
def test_what_is_shown_is_all_that_is_certain_and_no_more(tokens, stop):
    """What every continuation has in common is shown, with one stop string to look for."""
    stream, seen, shown = TextStream(dict(enumerate(tokens)), [stop]), b"", ""
    goal = stop.encode()
    for i, token in enumerate(tokens):
        shown, seen = shown + stream.feed(i), seen + token
        more = [*FOLLOWING, *(goal[k:] for k in range(len(goal)) if seen.endswith(goal[:k]))]
        possible = [slow_run([seen + following], [stop])[0] for following in more]
        assert common(possible) == shown
        if stream.stopped is not None:
            break


@given(TOKENS, STOPS, TOKENS)
def test_after_a_stop_string_nothing_comes_out(tokens, stop, more):
    stream = TextStream(dict(enumerate(tokens + more)), stop)
    for i in range(len(tokens)):
        stream.feed(i)
    if stopped := stream.stopped:
        rest = [stream.feed(len(tokens) + i) for i in range(len(more))]
        assert [*rest, stream.end()] == [""] * (len(more) + 1)
        assert stream.stopped == stopped


@given(STOPS, st.randoms())
def test_the_order_of_stop_strings_and_one_given_twice_change_nothing(stop, random):
    tokens = [text.encode()[:3] for text in stop] + [text.encode() for text in stop]
    shuffled = stop + stop[:1]
    random.shuffle(shuffled)
    assert run(tokens, shuffled) == run(tokens, stop)


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=9), max_size=6))
@example("abaabac", ["abac"])  # two steps back
@example("abab", ["ababb", "bab"])
def test_every_state_is_the_longest_beginning_that_the_bytes_end_with(text, stop):
    """With two letters nearly every beginning ends with another one."""
    search, state, data = StopSearch(stop), 0, text.encode()
    beginnings = {text.encode()[:k] for text in stop for k in range(len(text.encode()) + 1)}
    for end, byte in enumerate(data, 1):
        state = search.step(state, byte)
        fitting = [part for part in beginnings if data[:end].endswith(part)]
        assert search.depth[state] == max(map(len, fitting), default=0)
        whole = [text for text in stop if data[:end].endswith(text.encode())]
        assert search.found[state] == max(whole, key=lambda t: len(t.encode()), default=None)


# -- cases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces", "stopped"),
    [
        # Across tokens; what only looked like a stop string comes out later.
        ([b"x EN", b"D"], ["END"], ["x ", ""], "END"),
        ([b"x EN", b"Dx"], ["END"], ["x ", ""], "END"),
        ([b"x EN", b"T"], ["END"], ["x ", "ENT"], None),
        ([b"EEN", b"EN", b"D"], ["END"], ["E", "EN", ""], "END"),
        ([b"\n", b"\n", b"a"], ["\n\n"], ["", "", ""], "\n\n"),
        # The first that is complete; at the same byte the longest.
        ([b"abcde"], ["abcde", "cd"], ["ab"], "cd"),
        ([b"xabc"], ["bc", "abc", "c"], ["x"], "abc"),
        ([b"ab"], ["a", "ab"], [""], "a"),
        # A failed beginning that holds another.
        ([b"aab", b"aab", b"b"], ["aabb", "abaaa"], ["", "aab", ""], "aabb"),
        # Inside a character: é is c3 a9, è is c3 a8.
        ([b"a\xc3", b"\xa9"], ["é"], ["a", ""], "é"),
        ([b"a\xc3", b"\xa8"], ["é"], ["a", "è"], None),
        ([b"a\xc3", b"E"], ["E"], ["a", "\ufffd"], "E"),
        ([b"a\xf0\x9f", b"E", b"x"], ["END"], ["a", "\ufffd", "Ex"], None),
        ([b"\xe2\x82"], ["€uro"], [""], None),
    ],
)
def test_pieces_of_text(tokens, stop, pieces, stopped):
    stream = TextStream(dict(enumerate(tokens)), stop)
    assert [stream.feed(i) for i in range(len(tokens))] == pieces
    assert stream.stopped == stopped


def test_the_end_shows_what_was_held_back():
    for data, stop, text in [(b"x EN", ["END"], "EN"), (b"\xe2\x82", ["€"], "\ufffd")]:
        stream = TextStream({0: data}, stop)
        stream.feed(0)
        assert (stream.end(), stream.end(), stream.stopped) == (text, "", None)


def test_a_stop_string_that_may_not_stop_yet_is_text_but_may_begin_a_later_one():
    tokens = {0: b"END", 1: b"EN", 2: b"D", 3: b"E", 4: b"S"}
    stream = TextStream(tokens, ["END", "ENDES"])
    assert stream.feed(0, may_stop=False) == ""  # ENDES may still come
    assert stream.feed(1, may_stop=False) == "END"  # EN may become END
    assert (stream.feed(2, may_stop=False), stream.stopped) == ("", None)
    assert (stream.feed(3), stream.feed(4), stream.stopped) == ("", "", "ENDES")


def test_an_id_without_a_token_is_the_replacement_character_and_can_stop():
    assert TextStream({0: b"a"}).feed(7) == "\ufffd"
    stream = TextStream({0: b"a", 1: b"\xff"}, ["\ufffd"])
    assert (stream.feed(1) + stream.feed(0), stream.stopped) == ("\ufffda", None)
    assert (stream.feed(-1), stream.stopped) == ("", "\ufffd")
    for token in (1.0, "1", None):
        with pytest.raises(TokenError, match="expected a token id"):
            stream.feed(token)


def test_a_tokenizers_stream_stops_across_gpt2s_tokens():
    gpt2 = Tokenizer.gpt2()
    ids = gpt2.encode("Yes.\n\nUser: no")
    stream = gpt2.stream(stop=["\nUser:"])
    pieces = [stream.feed(i) for i in ids]
    assert ("".join(pieces), stream.stopped) == ("Yes.\n", "\nUser:")


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("END", "a list of strings, not 'END'"),
        (b"END", "a list of strings"),
        (None, "a list of strings"),
        (7, "a list of strings, not 7"),
        (["a", ""], "non-empty text, not ''"),
        ([b"END"], "non-empty text"),
        ([None], "non-empty text, not None"),
        (["a\ud800"], "half of a surrogate pair"),
    ],
)
def test_unusable_stop_strings_are_refused(stop, message):
    with pytest.raises(ArgumentError, match=message):
        TextStream({}, stop)
    with pytest.raises(ArgumentError, match=message):
        stop_strings(stop)


def test_the_steps_grow_with_the_bytes_not_with_the_stop_strings():
    """The worst case: nearly every byte goes on a hundred long stop strings, which never come."""
    asked = 0

    class Counted(dict):
        def __contains__(self, byte):
            nonlocal asked
            asked += 1
            return super().__contains__(byte)

    search = StopSearch(["a" * length + "b" for length in range(200, 600, 4)])
    search.follow = [Counted(following) for following in search.follow]
    data, state = b"a" * 20_000 + b"c" + b"aab" * 1000, 0
    for byte in data:
        state = search.step(state, byte)
    # One question a byte, and one for each step back: a byte makes the state longer by one, a
    # step back shorter. Beginning anew at every place would ask some 600 times as often.
    assert len(data) / 2 < asked <= 2 * len(data)
