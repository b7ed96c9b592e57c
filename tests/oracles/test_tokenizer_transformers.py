"""Token ids against Hugging Face's tokenizers, on GPT-2's vocabulary and one trained here."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast

from numpygpt.checkpoints.locate import weights_directory
from numpygpt.errors import TokenizerError
from numpygpt.tokenizer import BYTE_ALPHABET, END_OF_TEXT, Tokenizer

pytestmark = pytest.mark.oracle

FRAGMENTS = [
    "'s", "'S", "'ll", "'re", "don't", "’t", " the", "The", "Ġ", "Ċ", "é", "e\u0301", "ﬁ", "ß", "İ",
    "👏🏽", "👨‍👩‍👧", "🇫🇷", "中文", "日本語", "עברית", "हिन्दी", "\u00a0", "\u3000",
    "\u2028", "\u0085", "\u200b", "\u180e", "\ufeff", "\x1c", "\r\n", "\n\n ", "  ", "   ", "\t",
    "\v",
    "12345", "½²",
    "٣", "Ⅷ", "_", "--", "...",
    "\0", "\x7f", "\ufffd", "aaaaaaaaa", "ababab", " a b", "{}();",
]  # fmt: skip
TEXTS = st.one_of(
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), max_size=12).map("".join),
    st.text("aeinorst' \n", max_size=60),
    st.text(max_size=40),
)

CORPUS = [
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n",
    "The slings and arrows of outrageous fortune,   or to take arms against a sea of troubles\n\n",
    "aaaa aaaaaaa ababababab banana bananas 1234 12 1212 3.14159 we'll they're don't it's\n",
    "été où çà naïve Ærøskøbing 中文字符 日本語 👏👏🏽 👨‍👩‍👧\n",
    "\t\t\tindent\r\n    if (a != b) { return; }\n",
] * 5


def read_pieces(path: pathlib.Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bundled merges in Hugging Face's layout."""
    directory = tmp_path_factory.mktemp("gpt2")
    merges = read_pieces(weights_directory() / "gpt2" / "vocab.bpe")
    pieces = [stand_in for _, stand_in in BYTE_ALPHABET] + ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate([*pieces, END_OF_TEXT])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    text = "".join(f"{left} {right}\n" for left, right in merges)
    (directory / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def gpt2(gpt2_directory: pathlib.Path) -> Any:
    """The same vocabulary in transformers."""
    return GPT2TokenizerFast.from_pretrained(str(gpt2_directory))


@pytest.fixture(scope="module", params=[300, 420, 600])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A BPE trained on the spot, and the directory it was saved to in both layouts."""
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(
        CORPUS,
        vocab_size=request.param,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<pad>", END_OF_TEXT],
    )
    directory = tmp_path_factory.mktemp("trained")
    (directory / "pieces").mkdir()
    (directory / "single").mkdir()
    theirs.save_model(str(directory / "pieces"))
    theirs.save(str(directory / "single" / "tokenizer.json"))
    return theirs, directory


@given(text=TEXTS)
@example(text="")
@example(text=" \n \n  a")
@example(text="  ")
def test_gpt2_ids_are_those_of_transformers(gpt2, text):
    ids = gpt2.encode(text, add_special_tokens=False)
    assert Tokenizer.gpt2().encode(text) == ids
    shown = gpt2.decode(ids, clean_up_tokenization_spaces=False)
    assert Tokenizer.gpt2().decode(ids) == shown


@given(ids=st.lists(st.integers(0, 50256), max_size=20))
def test_gpt2_text_of_any_ids_is_that_of_transformers(gpt2, ids):
    shown = gpt2.decode(ids, clean_up_tokenization_spaces=False)
    assert Tokenizer.gpt2().decode(ids) == shown


def test_the_layouts_of_gpt2_agree(gpt2_directory):
    ours, bundled = Tokenizer.from_directory(gpt2_directory), Tokenizer.gpt2()
    assert ours.token_bytes == bundled.token_bytes
    assert ours.special == bundled.special


@given(text=TEXTS)
def test_end_of_text_is_one_token_where_it_is_allowed(gpt2, text):
    text = f"{text}{END_OF_TEXT}{text}"
    ours = Tokenizer.gpt2().encode(text, allowed_special="all")
    assert ours == gpt2.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("layout", ["pieces", "single"])
@given(text=TEXTS)
def test_ids_of_a_trained_vocabulary_are_those_of_tokenizers(trained, layout, text):
    theirs, directory = trained
    ours = Tokenizer.from_directory(directory / layout)
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens_of_a_trained_vocabulary_keep_their_ids(trained):
    theirs, directory = trained
    theirs.add_special_tokens([AddedToken("<pad>"), AddedToken(END_OF_TEXT)])
    for layout in ("pieces", "single"):
        ours = Tokenizer.from_directory(directory / layout)
        assert ours.special == {"<pad>": 0, END_OF_TEXT: 1}
        assert ours.last_id == theirs.get_vocab_size() - 1
        text = f"be{END_OF_TEXT}<pad> not"
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


def test_what_transformers_saves_is_read(tmp_path):
    """transformers 5 writes a tokenizer.json alone, with a post-processor that adds nothing."""
    theirs = GPT2TokenizerFast.from_pretrained(weights_directory() / "shakespeare")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    text = "ROMEO:\nO, thou'rt 12  times\n\n"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.end_of_text == theirs.eos_token_id


def test_a_post_processor_that_adds_a_token_is_refused(tmp_path):
    theirs = GPT2TokenizerFast.from_pretrained(weights_directory() / "shakespeare")
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    token = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    fields["post_processor"]["single"].insert(0, token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(TokenizerError, match="not a byte-level BPE"):
        Tokenizer.from_directory(tmp_path)
