"""The tokenizer: GPT-2's ids, every file layout, streams of text, and damaged vocabularies.

A text has the same ids whether Python or tiktoken encodes it, so both are tested, each alone.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from numpygpt import bpe, tokenizer
from numpygpt.bpe import ShortTexts, TokenFile, merge
from numpygpt.checkpoints.locate import weights_directory
from numpygpt.errors import TokenError, TokenizerError
from numpygpt.text import TextStream
from numpygpt.tokenizer import END_OF_TEXT, Tokenizer

GPT2 = Tokenizer.gpt2()
MERGES = weights_directory() / "gpt2" / "vocab.bpe"

# The pattern of openai/gpt-2, encoder.py.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

FRAGMENTS = [
    "'s", "'ll", "'LL", "don't", " the", "Ġ", "é", "e\u0301", "👏🏽", "👨‍👩‍👧", "中文", "\u00a0",
    "\u3000", "\u2028", "\r\n", "\n\n ", "  ", "\t", "12345", "½²", "٣", "<|endoftext|>", "_",
    "\0", "\ufeff",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8))).map("".join)

# Every character of the texts that Python encodes.
WESTERN = list("".join(regex.findall(bpe.WESTERN, "".join(map(chr, range(0x110000))))))
WESTERN_TEXTS = st.lists(
    st.sampled_from([f for f in FRAGMENTS if regex.fullmatch(bpe.WESTERN, f)])
    | st.text(WESTERN, max_size=8)
    | st.text("aeé 12\n", max_size=40)
).map("".join)


# -- GPT-2's vocabulary, read by code that shares nothing with the package ---------------------


def spelling() -> list[tuple[int, str]]:
    """openai/gpt-2's bytes_to_unicode: each byte, in the order of its id, and its stand-in."""
    visible = list(range(ord("!"), ord("~") + 1))
    visible += list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    pairs = [(byte, chr(byte)) for byte in visible]
    for byte in range(256):
        if byte not in visible:
            pairs.append((byte, chr(256 + len(pairs) - len(visible))))
    return pairs


SPELLING = spelling()
BYTE_OF = {stand_in: byte for byte, stand_in in SPELLING}
STAND_IN = dict(SPELLING)
BYTES = [stand_in for _, stand_in in SPELLING]


@functools.cache
def gpt2_merges() -> list[tuple[str, str]]:
    lines = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


@functools.cache
def gpt2_reference() -> tiktoken.Encoding:
    tokens = BYTES + [left + right for left, right in gpt2_merges()]
    ranks = {bytes(BYTE_OF[c] for c in token): i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "reference",
        pat_str=PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )


def slow_encode(text: str, merges: list[tuple[str, str]], ids: dict[str, int]) -> list[int]:
    """Byte-level BPE by its definition: merge the best pair everywhere, again and again."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    encoded = []
    for word in regex.findall(PATTERN, text):
        pieces = [STAND_IN[byte] for byte in word.encode("utf-8")]
        while pairs := [p for p in itertools.pairwise(pieces) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        encoded += [ids[piece] for piece in pieces]
    return encoded


# -- GPT-2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("a  b\n\n", [64, 220, 275, 628]),
        (" ", [220]),
        ("\n", [198]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_known_texts_have_their_published_ids(text, ids):
    assert GPT2.encode(text) == ids
    assert GPT2.decode(ids) == text


def test_the_vocabulary_is_gpt2s():
    assert (len(GPT2), GPT2.last_id, GPT2.end_of_text) == (50257, 50256, 50256)
    assert GPT2.special == {END_OF_TEXT: 50256}
    for token, i in gpt2_reference()._mergeable_ranks.items():
        assert GPT2.token_bytes[i] == token


def test_every_byte_has_a_token():
    assert {GPT2.token_bytes[i] for i in range(256)} == {bytes([b]) for b in range(256)}


@given(TEXTS)
def test_any_text_comes_back(text):
    assert GPT2.decode(GPT2.encode(text)) == text
    assert GPT2.decode_bytes(GPT2.encode(text)) == text.encode()


@given(st.binary())
def test_any_bytes_have_ids_and_come_back(data):
    ids = [BYTES.index(STAND_IN[byte]) for byte in data]
    assert GPT2.decode_bytes(ids) == data
    assert GPT2.decode(ids) == data.decode("utf-8", "replace")


@given(TEXTS)
def test_ids_are_those_of_an_encoding_built_here(text):
    reference = gpt2_reference()
    assert GPT2.encode(text) == reference.encode_ordinary(text)
    assert GPT2.encode(text, allowed_special="all") == reference.encode(text, allowed_special="all")


@given(TEXTS)
def test_ids_are_those_of_the_definition_in_loops(text):
    ids = {token: i for i, token in enumerate(BYTES + ["".join(p) for p in gpt2_merges()])}
    assert GPT2.encode(text) == slow_encode(text, gpt2_merges(), ids)


@given(st.lists(st.integers(0xD7FE, 0xE001).map(chr) | st.sampled_from("a\U0001f44f")).map("".join))
def test_a_lone_surrogate_becomes_the_replacement_character_and_a_pair_its_character(text):
    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert GPT2.decode(GPT2.encode(text)) == expected


@pytest.mark.parametrize("unit", ["a", "ab", " ", "\n", "1", "!", "'", "é", "中", " \n", "\ud800"])
def test_a_long_run_without_a_break_is_encoded(unit):
    text = unit * (200_000 // len(unit))
    assert GPT2.decode(GPT2.encode(text)) == text.replace("\ud800", "\ufffd")


# -- short texts, encoded in Python ------------------------------------------------------------

PATIENT = ShortTexts(gpt2_reference()._mergeable_ranks.get, patience=2**62)


@pytest.mark.parametrize(
    ("name", "of_unicode"), [("letters", r"\p{L}"), ("digits", r"\p{N}"), ("spaces", r"\s")]
)
def test_a_class_of_characters_is_that_of_unicode(name, of_unicode):
    own = {c for c in WESTERN if re.fullmatch(f"[{bpe.WESTERN_CLASSES[name]}]", c)}
    assert own == {c for c in WESTERN if regex.fullmatch(of_unicode, c)}


def test_each_character_has_the_ids_that_tiktoken_gives_it():
    assert len(WESTERN) == 0x250 + 24 + 47 + 1
    for c in WESTERN:
        for text in (f"a{c}b{c}", f"1{c}2", f" {c}{c} {c}a", f"!{c}!{c}", f"\n{c}\t", f"'{c}s"):
            assert PATIENT.encode(text) == gpt2_reference().encode_ordinary(text), repr(text)


@given(WESTERN_TEXTS)
def test_a_short_text_has_the_ids_that_tiktoken_gives_it(text):
    assert PATIENT.encode(text) == gpt2_reference().encode_ordinary(text)


@given(TEXTS)
def test_a_text_of_other_characters_is_left_to_tiktoken(text):
    left = PATIENT.encode(text) is None
    assert left == any(c not in WESTERN for c in text)


def test_words_of_every_length_have_the_ids_that_tiktoken_gives_them():
    # Beyond 100 bytes tiktoken merges by another algorithm.
    for unit in ("a", "ab", "=", "Hello", "é", "0123456789", "antidisestablishment"):
        for length in (1, 2, 3, 7, 50, 99, 100, 101, 102, 500, 2000):
            word = (unit * length)[:length]
            assert PATIENT.encode(word) == gpt2_reference().encode_ordinary(word), word


@given(st.text("aebnr", min_size=1, max_size=30))
def test_merging_is_that_of_the_definition(word):
    # Without the look at the whole word, which only pays.
    ids = {token: i for i, token in enumerate(BYTES + ["".join(p) for p in gpt2_merges()])}
    assert merge(word.encode(), gpt2_reference()._mergeable_ranks.get) == slow_encode(
        word, gpt2_merges(), ids
    )


def test_the_tokens_lie_in_their_file():
    file = TokenFile(MERGES.read_bytes(), END_OF_TEXT)
    ranks = gpt2_reference()._mergeable_ranks
    assert file.ordinary() == list(ranks)
    assert dict(file) == {**{i: token for token, i in ranks.items()}, 50256: END_OF_TEXT.encode()}
    # One search takes 0.3 ms: the first and last tokens, one of every 200, and what is none.
    for token in [*file.ordinary()[::200], *file.ordinary()[-3:], b"\n", b" ", b"\r", b"\xc4\xa0"]:
        assert file.find(token) == ranks.get(token), token
    for text in ("", "qq qq", "\n\n\n\n\n\n", "Ġt", "#version", END_OF_TEXT):
        assert file.find(text.encode()) == ranks.get(text.encode()), text
    for i in (-1, 50257, 10**30):
        assert i not in file


def test_windows_line_ends_change_no_token():
    data = MERGES.read_bytes()
    windows = TokenFile(data.replace(b"\n", b"\r\n"), END_OF_TEXT)
    assert windows.ordinary() == list(gpt2_reference()._mergeable_ranks)
    assert windows.find(b" the") == 262


TEXT = "How many words until it is worth building the engine? naïve Straße "


def test_patience_ends_and_then_there_are_no_ids():
    asked = []

    def find(token: bytes) -> int | None:
        asked.append(token)
        return gpt2_reference()._mergeable_ranks.get(token)

    for patience in (0, 1, 5, 30, 100):
        asked.clear()
        encoder = ShortTexts(find, patience)
        ids = encoder.encode(TEXT)
        assert len(asked) <= patience
        assert ids in (None, gpt2_reference().encode_ordinary(TEXT))
    assert ids is not None
    count = len(asked)
    assert encoder.encode(TEXT) == ids  # known words cost nothing
    assert encoder.encode(TEXT * bpe.SHORT) is None  # not even looked at
    assert len(asked) == count


def test_the_engine_takes_over_and_the_ids_stay_the_same():
    gpt2 = tokenizer._GPT2(MERGES.read_bytes())
    texts = [f"{TEXT} {number} {chr(97 + number % 26) * number}" for number in range(60)]
    built = []
    for text in texts:
        assert gpt2.encode(text) == gpt2_reference().encode_ordinary(text)
        built.append("_engine" in vars(gpt2))
    assert not built[0]
    assert built[-1]
    assert gpt2.token_bytes == TokenFile(MERGES.read_bytes(), END_OF_TEXT)


def test_text_that_may_spell_special_tokens_is_left_to_the_engine_if_it_does():
    gpt2 = tokenizer._GPT2(MERGES.read_bytes())
    assert gpt2.encode("Hello", allowed_special="all") == [15496]
    assert gpt2.encode(f"a{END_OF_TEXT}") == gpt2_reference().encode_ordinary(f"a{END_OF_TEXT}")
    assert "_engine" not in vars(gpt2)
    assert gpt2.encode(f"a{END_OF_TEXT}b", allowed_special="all") == [64, 50256, 65]


# -- special tokens ----------------------------------------------------------------------------


def test_special_tokens_are_text_unless_allowed():
    text = f"a{END_OF_TEXT}b"
    assert 50256 not in GPT2.encode(text)
    for allowed in ("all", {END_OF_TEXT}, [END_OF_TEXT]):
        assert GPT2.encode(text, allowed_special=allowed) == [64, 50256, 65]
    assert GPT2.decode([64, 50256, 65]) == text
    with pytest.raises(TokenizerError, match="no special token is called '<s>'"):
        GPT2.encode(text, allowed_special={"<s>"})


def test_each_special_token_is_allowed_for_itself(tmp_path):
    tokenizer = make_vocab_json(tmp_path, SMALL | {"<a>": 900, "<b>": 901})
    assert tokenizer.encode("<a><b>", allowed_special="all") == [900, 901]
    assert tokenizer.encode("<a><b>", allowed_special={"<b>"}) == [*tokenizer.encode("<a>"), 901]
    assert tokenizer.end_of_text is None


def test_an_id_without_a_token_has_no_bytes_but_can_be_shown():
    for i in (50257, -1, 10**30):
        with pytest.raises(TokenError, match=f"no token has the id {i}"):
            GPT2.decode_bytes([64, i])
        assert GPT2.decode([64, i, 65]) == "a\ufffdb"


# -- streams of text ---------------------------------------------------------------------------


def check_stream(ids: list[int]) -> None:
    stream, seen, text = TextStream(GPT2.token_bytes), b"", ""
    for i in ids:
        text += stream.feed(i)
        seen += GPT2.decode_bytes([i])
        # What is shown is final: nothing that follows can change it. At most the three first
        # bytes of a four-byte character are held back.
        for following in (b"", b"\x80", b"\xbf\xbf", b"\xf0", b"a"):
            assert (seen + following).decode("utf-8", "replace").startswith(text)
        assert any(text == seen[: len(seen) - held].decode("utf-8", "replace") for held in range(4))
    assert text + stream.end() == GPT2.decode(ids) == seen.decode("utf-8", "replace")


@given(st.lists(st.integers(0, 50256) | st.integers(0, 255), max_size=30))
def test_a_stream_of_any_ids_shows_only_what_is_final_and_joins_to_their_text(ids):
    check_stream(ids)


@given(TEXTS)
def test_a_stream_of_a_text_never_shows_half_a_character(text):
    shown, stream = "", GPT2.stream()
    for i in GPT2.encode(text):
        shown += stream.feed(i)
        assert text.startswith(shown)
    assert shown == text
    assert stream.end() == ""


def test_a_character_cut_short_is_shown_at_the_end():
    *first, _ = GPT2.encode("👏")
    stream = GPT2.stream()
    assert [stream.feed(i) for i in first] == [""] * len(first)
    assert stream.end() == "\ufffd"


# -- file layouts ------------------------------------------------------------------------------

# A small BPE: pairs in the order of merging, each made of what came before.
PAIRS = [("t", "h"), ("Ġ", "th"), ("th", "e"), ("Ġth", "e"), ("Ã", "©"), ("Ġ", "Ġ"), ("1", "2")]
PIECES = BYTES + [left + right for left, right in PAIRS]
SMALL = {piece: i for i, piece in enumerate(PIECES)}
MERGES_TEXT = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in PAIRS)
# The same vocabulary with other numbers: 257 is prime to the number of pieces.
PERMUTED = {piece: 3 + i * 257 % len(PIECES) for i, piece in enumerate(PIECES)}


def write(path: pathlib.Path, content: Any) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_vocab_json(directory, vocab=SMALL, merges=MERGES_TEXT, config=None) -> Tokenizer:
    write(directory / "vocab.json", vocab)
    write(directory / "merges.txt", merges)
    if config is not None:
        write(directory / "tokenizer_config.json", config)
    return Tokenizer.from_directory(directory)


def make_encoder_json(directory, vocab=SMALL, merges=MERGES_TEXT) -> Tokenizer:
    write(directory / "encoder.json", vocab)
    write(directory / "vocab.bpe", merges)
    return Tokenizer.from_directory(directory)


def make_vocab_bpe(directory, merges=MERGES_TEXT) -> Tokenizer:
    write(directory / "vocab.bpe", merges)
    return Tokenizer.from_directory(directory)


def ranks(vocab: dict[str, int]) -> list[bytes]:
    """The lines of a tiktoken file."""
    tokens = {base64.b64encode(bytes(BYTE_OF[c] for c in p)): i for p, i in vocab.items()}
    return [token + b" %d" % i for token, i in tokens.items()]


def make_tiktoken(directory, lines=None) -> Tokenizer:
    content = b"\n".join(ranks(SMALL) if lines is None else lines)
    write(directory / "small.tiktoken", content)
    return Tokenizer.from_directory(directory)


def make_tokenizer_json(directory, model=None, **changes) -> Tokenizer:
    fields = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": SMALL, "merges": PAIRS, **(model or {})},
    }
    write(directory / "tokenizer.json", {**fields, **changes})
    return Tokenizer.from_directory(directory)


LAYOUTS: dict[str, Callable[..., Tokenizer]] = {
    "vocab.json": lambda d: make_vocab_json(d, SMALL | {END_OF_TEXT: len(SMALL)}),
    "encoder.json": lambda d: make_encoder_json(d, SMALL | {END_OF_TEXT: len(SMALL)}),
    "vocab.bpe": make_vocab_bpe,
    "tiktoken": make_tiktoken,
    "tokenizer.json": lambda d: make_tokenizer_json(
        d, added_tokens=[{"id": len(SMALL), "content": END_OF_TEXT, "special": True}]
    ),
    "tokenizer.json with merges as text": lambda d: make_tokenizer_json(
        d,
        model={
            "merges": [f"{left} {right}" for left, right in PAIRS],
            "vocab": SMALL | {END_OF_TEXT: len(SMALL)},
        },
    ),
}
SAMPLE = "th   theé the 12 122 ththe\nthen"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_make_the_same_tokenizer(tmp_path, layout):
    tokenizer = LAYOUTS[layout](tmp_path)
    assert tokenizer.encode(SAMPLE) == slow_encode(SAMPLE, PAIRS, SMALL)
    assert len(set(tokenizer.encode(SAMPLE)) & set(range(256, 263))) == 7  # every merge is used
    assert tokenizer.decode(tokenizer.encode(SAMPLE)) == SAMPLE
    assert (len(tokenizer), tokenizer.end_of_text) == (len(SMALL) + 1, len(SMALL))
    assert tokenizer.special == {END_OF_TEXT: len(SMALL)}


PERMUTED_LAYOUTS = {
    "vocab.json": lambda d: make_vocab_json(d, PERMUTED | {"<pad>": 0, END_OF_TEXT: 1}),
    "encoder.json": lambda d: make_encoder_json(d, PERMUTED | {"<pad>": 0, END_OF_TEXT: 1}),
    "tokenizer.json": lambda d: make_tokenizer_json(
        d,
        model={"vocab": PERMUTED | {"<pad>": 0}},
        added_tokens=[{"id": 0, "content": "<pad>"}, {"id": 1, "content": END_OF_TEXT}],
    ),
}


@pytest.mark.parametrize("layout", PERMUTED_LAYOUTS)
def test_the_numbers_of_tokens_need_not_follow_the_merges(tmp_path_factory, layout):
    tokenizer = PERMUTED_LAYOUTS[layout](tmp_path_factory.mktemp("layout"))
    assert tokenizer.special == {"<pad>": 0, END_OF_TEXT: 1}
    assert tokenizer.encode(f"the{END_OF_TEXT}", allowed_special="all") == [PERMUTED["the"], 1]

    @given(TEXTS | st.text("the 12é\n"))
    def check(text):
        ids = tokenizer.encode(text)
        assert ids == slow_encode(text, PAIRS, PERMUTED)
        assert tokenizer.decode(ids) == text

    check()


def test_the_files_that_openai_published_are_known_and_any_other_is_read(tmp_path):
    merges = MERGES.read_bytes()
    ids = {piece: i for i, piece in enumerate(BYTES + ["".join(p) for p in gpt2_merges()])}
    numbers = json.dumps(ids | {END_OF_TEXT: 50256}).encode()
    for data, (size, sha256) in zip(
        (merges, numbers), (tokenizer.GPT2_MERGES, tokenizer.GPT2_NUMBERS), strict=True
    ):
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)
    assert make_vocab_bpe(tmp_path / "merges", merges) is GPT2
    assert make_vocab_json(tmp_path / "both", numbers, merges) is GPT2
    other = numbers.replace(b'"!": 0, "\\"": 1,', b'"!": 1, "\\"": 0,')  # of the same size
    assert len(other) == len(numbers)
    swapped = make_vocab_json(tmp_path / "other", other, merges)
    assert swapped.encode("Hello!") == [15496, 1]
    assert swapped.token_bytes == {**GPT2.token_bytes, 0: b'"', 1: b"!"}


def test_windows_line_ends_and_a_missing_version_change_nothing(tmp_path):
    for number, merges in enumerate([MERGES_TEXT.replace("\n", "\r\n"), MERGES_TEXT[14:]]):
        tokenizer = make_vocab_json(tmp_path / str(number), merges=merges)
        assert tokenizer.encode(SAMPLE) == slow_encode(SAMPLE, PAIRS, SMALL)


def test_the_layouts_have_an_order_and_none_is_an_error(tmp_path):
    with pytest.raises(TokenizerError, match=r"no vocabulary; expected vocab\.json and"):
        Tokenizer.from_directory(tmp_path)
    assert Tokenizer.locate(tmp_path) is None
    write(tmp_path / "tokenizer.json", "damaged")
    write(tmp_path / "vocab.json", SMALL)  # alone it is no vocabulary
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: expected JSON"):
        Tokenizer.from_directory(tmp_path)
    assert len(make_tiktoken(tmp_path)) == len(SMALL) + 1
    assert len(make_vocab_json(tmp_path)) == len(SMALL)


# -- damaged vocabularies ----------------------------------------------------------------------

LINES = ranks(SMALL)
WITHOUT_A = {piece: i for piece, i in SMALL.items() if piece != "a"}
REFUSED: dict[str, tuple[Callable[[pathlib.Path], Tokenizer], str]] = {
    # merges
    "three pieces": (
        lambda d: make_vocab_json(d, merges="t h e\n"),
        r"merges.txt: .*'t', 'h', 'e'",
    ),
    "one piece": (
        lambda d: make_vocab_json(d, merges="th\n"),
        "merges.txt: .* two tokens to merge",
    ),
    "two spaces": (
        lambda d: make_vocab_json(d, merges="t  h\n"),
        "merges.txt: .* two tokens to merge",
    ),
    "a tab": (lambda d: make_vocab_json(d, merges="t\th\n"), "merges.txt: .* two tokens to merge"),
    "an empty left": (lambda d: make_vocab_json(d, merges=" th\n"), "merges.txt"),
    "an empty right": (lambda d: make_vocab_json(d, merges="th \n"), "merges.txt"),
    "an empty piece alone": (lambda d: make_vocab_bpe(d, "t h\nt \n"), "vocab.bpe"),
    "no UTF-8": (lambda d: make_vocab_bpe(d, b"t h\nt \xff\n"), "vocab.bpe"),
    "Chinese": (lambda d: make_vocab_bpe(d, "t 中\n"), "vocab.bpe: .* two tokens to merge"),
    "a snowman": (lambda d: make_vocab_bpe(d, "t ☃\n"), "vocab.bpe: .* two tokens to merge"),
    "a space": (lambda d: make_vocab_bpe(d, "t \u00a0\n"), "vocab.bpe: .* two tokens to merge"),
    "a control": (lambda d: make_vocab_bpe(d, "t \x80\n"), "vocab.bpe: .* two tokens to merge"),
    # numbers
    "a byte missing": (lambda d: make_vocab_json(d, WITHOUT_A, ""), "vocab.json: no id for 'a'"),
    "a merge missing": (lambda d: make_vocab_json(d, merges="a b\n"), "json: no id for 'ab'"),
    "an id as text": (lambda d: make_vocab_json(d, SMALL | {"a": "64"}), "json: .* integer id"),
    "an id as float": (lambda d: make_vocab_json(d, SMALL | {"a": 64.0}), "json: .* integer id"),
    "an id as bool": (lambda d: make_vocab_json(d, SMALL | {"a": True}), "json: .* integer id"),
    "an id below 0": (lambda d: make_vocab_json(d, SMALL | {"a": -64}), "id"),
    "one id twice": (lambda d: make_vocab_json(d, SMALL | {"a": SMALL["b"]}), "one id to two"),
    "a special id twice": (lambda d: make_vocab_json(d, SMALL | {"<s>": 5}), "one id to two"),
    "one key twice": (lambda d: make_vocab_json(d, '{"a": 1, "a": 2}'), "vocab.json: .*'a'"),
    "cut JSON": (lambda d: make_vocab_json(d, '{"a": 1'), "vocab.json: expected JSON"),
    "a JSON list": (lambda d: make_encoder_json(d, []), "encoder.json: expected a JSON object"),
    "a nameless special": (lambda d: make_vocab_json(d, SMALL | {"": 900}), "special|empty"),
    "half a character": (lambda d: make_vocab_json(d, SMALL | {"\ud800": 900}), "special|surrog"),
    # tiktoken
    "no tokens": (lambda d: make_tiktoken(d, []), "small.tiktoken: holds no tokens"),
    "bad base64": (lambda d: make_tiktoken(d, [*LINES, b"!!!! 900"]), "small.tiktoken: .*!!!! 900"),
    "no padding": (lambda d: make_tiktoken(d, [*LINES, b"YWI 900"]), "small.tiktoken: .*YWI 900"),
    "no rank": (lambda d: make_tiktoken(d, [*LINES, b"YWI="]), "small.tiktoken: .*YWI="),
    "a rank as text": (lambda d: make_tiktoken(d, [*LINES, b"YWI= x"]), "small.tiktoken: .*= x"),
    "a rank below 0": (lambda d: make_tiktoken(d, [*LINES, b"YWI= -1"]), "-1|rank|id"),
    "three fields": (lambda d: make_tiktoken(d, [*LINES, b"YWI= 9 9"]), "small.tiktoken: .*9 9"),
    "a byte without rank": (lambda d: make_tiktoken(d, LINES[1:]), "no token for the byte 33"),
    "one rank twice": (lambda d: make_tiktoken(d, [*LINES, b"YWI= 64"]), "byte 97|twice|two"),
    # tokenizer.json
    "another model": (lambda d: make_tokenizer_json(d, {"type": "Unigram"}), "tokenizer.json: not"),
    "no vocabulary": (lambda d: make_tokenizer_json(d, {"vocab": []}), "tokenizer.json: not"),
    "a normalizer": (lambda d: make_tokenizer_json(d, normalizer={"type": "NFC"}), "json: not a"),
    "a space first": (
        lambda d: make_tokenizer_json(
            d, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}
        ),
        "tokenizer.json: add_prefix_space",
    ),
    "no cutting": (
        lambda d: make_tokenizer_json(
            d, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        ),
        "tokenizer.json",
    ),
    "a prefix": (lambda d: make_tokenizer_json(d, {"continuing_subword_prefix": "##"}), "json"),
    "a suffix": (lambda d: make_tokenizer_json(d, {"end_of_word_suffix": "</w>"}), "json"),
    "dropout": (lambda d: make_tokenizer_json(d, {"dropout": 0.1}), "tokenizer.json"),
    "merges of one": (lambda d: make_tokenizer_json(d, {"merges": ["th"]}), "tokenizer.json"),
    "merges of three": (
        lambda d: make_tokenizer_json(d, {"merges": [["t", "h", ""]]}),
        "tokenizer.json",
    ),
    "merges of numbers": (lambda d: make_tokenizer_json(d, {"merges": [1]}), "tokenizer.json"),
    "merges with a number": (
        lambda d: make_tokenizer_json(d, {"merges": [["t", 1]]}),
        "tokenizer.json",
    ),
    "merges as objects": (
        lambda d: make_tokenizer_json(d, {"merges": [{"t": 1, "h": 2}]}),
        "tokenizer.json",
    ),
    "an added text": (lambda d: make_tokenizer_json(d, added_tokens=["<s>"]), "tokenizer.json"),
    "an added number": (lambda d: make_tokenizer_json(d, added_tokens=7), "tokenizer.json"),
    "added without id": (
        lambda d: make_tokenizer_json(d, added_tokens=[{"content": "<s>"}]),
        "tokenizer.json",
    ),
    "added without text": (
        lambda d: make_tokenizer_json(d, added_tokens=[{"content": 1, "id": 900}]),
        "tokenizer.json",
    ),
    # tokenizer_config.json
    "settings with a space first": (
        lambda d: make_vocab_json(d, config={"add_prefix_space": True}),
        "tokenizer_config.json: add_prefix_space",
    ),
    "settings with a start": (
        lambda d: make_vocab_json(d, config={"add_bos_token": True}),
        "tokenizer_config.json: add_bos_token",
    ),
    "cut settings": (lambda d: make_vocab_json(d, config="{"), "tokenizer_config.json: expected"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_or_foreign_vocabulary_is_refused(tmp_path, make, message):
    with pytest.raises(TokenizerError, match=message):
        make(tmp_path)


@pytest.mark.parametrize("config", [{}, {"add_prefix_space": False, "model_max_length": 1024}])
def test_settings_that_change_no_id_are_accepted(tmp_path, config):
    assert len(make_vocab_json(tmp_path, config=config)) == len(SMALL)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_file_that_cannot_be_read_or_is_huge_is_refused(tmp_path, name):
    make_vocab_json(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / name).rmdir()
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(TokenizerError, match=f"{name}: over 64 MiB"):
        Tokenizer.from_directory(tmp_path)


# -- long runs of white space ------------------------------------------------------------------


@pytest.mark.parametrize("text", [" " * 1_200_000 + "a", " \n\t" * 400_000 + "x"], ids=["a", "x"])
def test_a_million_spaces_are_no_trouble(text):
    gpt2 = Tokenizer.gpt2()
    assert gpt2.decode(gpt2.encode(text)) == text


@given(st.lists(st.sampled_from([" ", "\n", "\t", "\r", "\u3000", "\x85", "a", "1", "!", "'s"])))
def test_cutting_inside_white_space_changes_no_ids(parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONG_RUN", re.compile(r"[ \t\n\r]{2,}"))
        assert GPT2._encode(text, set()) == gpt2_reference().encode_ordinary(text)
