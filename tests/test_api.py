"""``Model``: what it refuses, and that chunks, batches and streams are the same text."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from support import random_ids, random_params, write_checkpoint

import numpygpt
from numpygpt.api import Model
from numpygpt.cache import Cache, segments
from numpygpt.decoding import Settings, log_probability
from numpygpt.errors import ArgumentError, ContextError, NumpyGPTError, TokenError, TokenizerError
from numpygpt.feed import Feeder
from numpygpt.params import Config
from numpygpt.tokenizer import Tokenizer

CONFIG = Config(vocab_size=29, n_ctx=24, n_embd=16, n_layer=2, n_head=4)
PARAMS = random_params(CONFIG)
MODEL = Model(CONFIG, PARAMS)

WRONG_IDS = {
    "negative": ([3, -1], "token id -1 is outside the vocabulary, 0 to 28"),
    "too large": ([3, 29], "token id 29 is outside the vocabulary, 0 to 28"),
    "floats": ([1.0, 2.0], "must be integers, not float64"),
    "truth values": ([True], "must be integers, not bool"),
    "text": ("abc", "received the text 'abc'"),
    "none": ([], r"received shape \(0,\)"),
    "two rows": ([[1, 2], [3, 4]], r"received shape \(2, 2\)"),
}
CALLS = {
    "logits": MODEL.logits,
    "last": lambda ids: MODEL.logits(ids, last=True),
    "trace": MODEL.trace,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("ids", "message"), WRONG_IDS.values(), ids=WRONG_IDS)
def test_ids_that_are_none_are_refused(call, ids, message):
    with pytest.raises(TokenError, match=message):
        CALLS[call](ids)


@pytest.mark.parametrize("bad", [[3, -1], [29], [1.0], [True], np.array([[1, 2], [3, 4]])])
def test_a_prompt_of_wrong_ids_is_refused(bad):
    with pytest.raises(TokenError):
        MODEL.generate(bad, max_new_tokens=1)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.uint8)])
def test_ids_may_come_in_any_sequence(kind):
    np.testing.assert_array_equal(MODEL.logits(kind([0, 28])), MODEL.logits([0, 28]))


@pytest.mark.parametrize("call", ["logits", "last", "trace"])
def test_the_context_may_be_full_but_not_fuller(call):
    CALLS[call]([1] * 24)
    with pytest.raises(ContextError, match="25 tokens are more than the model's 24 positions"):
        CALLS[call]([1] * 25)


def test_a_prompt_that_cannot_fit_is_refused_even_without_new_tokens():
    with pytest.raises(ContextError):
        MODEL.generate([1] * 26, max_new_tokens=0)


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(TokenError, match="in a row"):
        MODEL.logits([[1], [2, 3]])


@pytest.mark.parametrize("stop", [[3, -1], [29], [1.0], [True], [[1]]])
def test_stop_ids_that_are_none_are_refused(stop):
    with pytest.raises(TokenError):
        MODEL.generate([1], max_new_tokens=1, stop_ids=stop)


@pytest.mark.parametrize("stop", [5, "abc", b"ab"])
def test_stop_ids_that_are_no_ids_are_refused(stop):
    with pytest.raises(ArgumentError, match="stop_ids"):
        MODEL.generate([1], max_new_tokens=1, stop_ids=stop)


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, iter])
def test_stop_ids_may_be_any_collection(kind):
    first = MODEL.generate([1], max_new_tokens=1, stop_ids=()).ids
    result = MODEL.generate([1], max_new_tokens=1, stop_ids=kind(first))
    assert (result.ids, result.finish_reason) == ([], "stop")


@pytest.mark.parametrize(
    "prompt",
    [None, 5, b"ab", bytearray(b"ab"), {1: 2}, 1.5, [[[1], [2, 3]]], np.array(5), [[]], np.ones(0)],
    ids=repr,
)
def test_what_is_neither_text_nor_ids_is_refused(prompt):
    with pytest.raises(TokenError):
        MODEL.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize("prompt", [[1, "a"], ["a", 1], [np.array(5), "a"]])
def test_numbers_and_texts_do_not_mix_in_one_prompt(prompt):
    with pytest.raises(TokenError):
        MODEL.generate(prompt, max_new_tokens=1)


def test_no_prompts_give_no_results():
    assert MODEL.generate([]) == []


def test_a_batch_may_mix_kinds_of_sequences():
    rows = MODEL.generate([np.array([1]), [2], (3,)], max_new_tokens=1)
    assert [row.prompt_ids for row in rows] == [[1], [2], [3]]


def test_a_stream_is_refused_when_it_is_asked_for():
    model = numpygpt.load("shakespeare")
    with pytest.raises(ContextError):
        model.stream("a" * 2000)
    with pytest.raises(ArgumentError):
        model.stream("a", temperature=-1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64])
def test_settings_of_small_numpy_types_do_not_wrap_around(dtype):
    def ids(k):
        settings = {"temperature": 1.0, "seed": 3, "top_k": k, "max_new_tokens": dtype(20)}
        return MODEL.generate([1, 2, 3], chunk=dtype(100), **settings).ids

    assert ids(dtype(10)) == ids(10)


def test_a_loaded_model_can_be_pickled():
    model = numpygpt.load("shakespeare")
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.logits([1, 2]), model.logits([1, 2]))


def test_a_vocabulary_that_is_incomplete_is_not_replaced_by_gpt2s(tmp_path):
    config = Config(vocab_size=50304, n_ctx=4, n_embd=4, n_layer=1, n_head=1)
    model = numpygpt.load(write_checkpoint(tmp_path, config))
    assert model.tokenizer.encode("Hello world") == [15496, 995]
    (tmp_path / "merges.txt").write_text("t h\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: .*more files"):
        numpygpt.load(tmp_path).generate("a")


def test_a_seed_that_is_not_used_changes_nothing():
    assert MODEL.generate([1], max_new_tokens=5, seed=1) == MODEL.generate([1], max_new_tokens=5)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": True}, {"max_new_tokens": 2.0}, {"chunk": 0}, {"seed": True},
     {"temperature": True}, {"temperature": "1"}, {"top_k": True, "temperature": 1.0}],
    ids=str,
)  # fmt: skip
def test_settings_of_the_wrong_kind_are_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Settings(**wrong)


def test_settings_may_be_numpy_integers():
    assert MODEL.generate([1], max_new_tokens=np.int64(2)) == MODEL.generate([1], max_new_tokens=2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 100])
def test_sequences_that_straddle_chunks_keep_their_hidden_states(chunk):
    lengths = [3, 9, 1, 6]
    prompts = [random_ids(CONFIG, n, n) for n in lengths]
    caches = [Cache(CONFIG, n, np.float64) for n in lengths]
    feeder = Feeder(PARAMS, CONFIG, sum(lengths), max(lengths), chunk)
    hidden = [np.full((n, 16), np.nan) for n in lengths]
    passes = []
    for piece in feeder.pieces(prompts, caches):
        rows = slice(piece.start, piece.start + len(piece.hidden))
        hidden[piece.sequence][rows] = piece.hidden
        passes.append(len(piece.hidden))
    assert sum(passes) == sum(lengths)
    for ids, states in zip(prompts, hidden, strict=True):
        np.testing.assert_allclose(feeder.logits(states), MODEL.logits(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 5, 7])
def test_a_batch_read_in_chunks_is_its_single_runs(chunk):
    prompts = [random_ids(CONFIG, n, n).tolist() for n in (3, 9, 1, 6)]
    batch = MODEL.generate(prompts, max_new_tokens=4, chunk=chunk)
    for prompt, row in zip(prompts, batch, strict=True):
        single = MODEL.generate(prompt, max_new_tokens=4)
        assert (row.prompt_ids, row.ids) == (prompt, single.ids)
        np.testing.assert_allclose(row.logprobs, single.logprobs, rtol=0, atol=1e-12)


def test_rows_of_several_sequences_share_a_pass(monkeypatch):
    seen = []
    real = numpygpt.feed.forward
    monkeypatch.setattr(
        numpygpt.feed, "forward", lambda ids, *rest: seen.append(len(ids)) or real(ids, *rest)
    )
    MODEL.generate([[1, 2, 3], [4], [5, 6]], max_new_tokens=2, chunk=4)
    assert seen == [4, 2, 3]


def test_every_pass_but_the_last_is_full(monkeypatch):
    seen = []
    real = numpygpt.feed.forward
    monkeypatch.setattr(
        numpygpt.feed, "forward", lambda ids, *rest: seen.append(len(ids)) or real(ids, *rest)
    )
    MODEL.logits(list(range(9)), chunk=4)
    assert seen == [4, 4, 1]


def test_buffers_are_no_larger_than_the_run_needs():
    feeder = Feeder(PARAMS, CONFIG, rows=3, capacity=10, chunk=256)
    assert feeder.planner.buffers["qkv"].size == 3 * 3 * 16
    assert feeder.planner.buffers["scores"].size == 4 * 3 * 10


def test_log_probabilities_are_summed_in_float64():
    logits = np.random.default_rng(0).standard_normal(50257).astype(np.float32)
    exact = logits[7] - np.log(np.exp(logits.astype(np.float64)).sum())
    # Each float32 exp is off by up to 2 ulp = 1.2e-7, either way, so 50257 of them nearly cancel:
    # measured 1e-9. The subtraction of the maximum, once, rounds at 6e-8 of 4.
    assert abs(log_probability(logits, 7) - exact) < 5e-7


@pytest.mark.parametrize("extra", [0, 1])
def test_a_cache_holds_its_capacity_and_no_more(extra):
    cache = Cache(CONFIG, 5)
    assert cache.keys.shape == (2, 1, 4, 5, 4)
    cache.lengths[...] = 3
    if extra:
        with pytest.raises(ContextError, match="3 tokens read and 3 new ones"):
            segments([3], [cache])
    else:
        assert segments([2], [cache])[0].length == 2


def test_each_text_of_a_batch_is_its_own_and_logprobs_are_the_models():
    model = numpygpt.load("shakespeare")
    rows = model.generate(["ROMEO:", "To be"], max_new_tokens=6, temperature=0.7, top_k=5, seed=2)
    for row in rows:
        assert row.text == model.tokenizer.decode(row.ids)
        logits = model.logits(row.prompt_ids + row.ids[:-1])[len(row.prompt_ids) - 1 :]
        expected = [log_probability(scores, i) for scores, i in zip(logits, row.ids, strict=True)]
        np.testing.assert_allclose(row.logprobs, expected, rtol=0, atol=1e-4)


def test_a_stream_that_ends_inside_a_character_shows_it():
    model = numpygpt.load("shakespeare")
    half = model.tokenizer.encode("\N{CLAPPING HANDS SIGN}")[0]
    head = np.zeros_like(model.params.head)
    head[half] = 1
    norm = model.params.ln_f
    norm = norm._replace(g=norm.g * 0, b=norm.b * 0 + 1)
    mute = Model(model.config, model.params._replace(ln_f=norm, head=head), model.tokenizer)
    text = mute.generate("a", max_new_tokens=1).text
    assert text == "\ufffd" == "".join(mute.stream("a", max_new_tokens=1))


def test_a_single_name_of_a_trace_may_be_a_string():
    assert list(MODEL.trace([1, 2], names="logits")) == ["logits"]


@pytest.mark.parametrize(
    "chosen", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}], ids=str
)
@pytest.mark.parametrize("rows", [slice(4, 5), slice(None)], ids=["one", "all"])
def test_logits_that_are_nan_are_an_error(chosen, rows):
    head = PARAMS.head.copy()
    head[rows] = math.nan
    model = Model(CONFIG, PARAMS._replace(head=head))
    with pytest.raises(NumpyGPTError, match="logits are nan"):
        model.generate([1], max_new_tokens=2, seed=0, **chosen)


def test_a_mixed_batch_of_text_and_ids():
    model = numpygpt.load("shakespeare")
    text, ids = model.generate(["ROMEO:", [1, 2]], max_new_tokens=2)
    assert (text.prompt_ids, ids.prompt_ids) == (model.tokenizer.encode("ROMEO:"), [1, 2])


def test_numpy_integers_can_be_decoded():
    assert Tokenizer.gpt2().decode(np.array([15496, 995])) == "Hello world"


def test_end_of_text_with_the_id_0_stops_too(tmp_path):
    tokenizer = Tokenizer([bytes([b]) for b in range(256)], range(1, 257), {"<|endoftext|>": 0})
    config = Config(vocab_size=257, n_ctx=8, n_embd=4, n_layer=1, n_head=1)
    params = random_params(config)
    head = np.zeros_like(params.head)
    head[0] = 1
    norm = params.ln_f._replace(g=params.ln_f.g * 0, b=params.ln_f.b * 0 + 1)
    model = Model(config, params._replace(ln_f=norm, head=head), tokenizer)
    assert model.generate("a", max_new_tokens=3).finish_reason == "stop"


@pytest.mark.parametrize("spare", [-1, 0, 1, 5])
def test_a_continuation_is_read_after_all_the_context_that_fits(spare):
    """Greedy decoding's own token is greedy, also where context and token just fit, or do not."""
    context = random_ids(CONFIG, CONFIG.n_ctx + spare).tolist()
    read = context[-CONFIG.n_ctx :]
    chosen = MODEL.generate(read, max_new_tokens=1)
    score = MODEL.score(context, chosen.ids)
    assert (score.is_greedy, score.ids.tolist()) == (True, chosen.ids)
    # Half the context changes this log-probability by 0.01 and more, rounding by 1e-14.
    np.testing.assert_allclose(score.logprobs, chosen.logprobs, rtol=0, atol=1e-12)


def test_a_long_continuation_is_scored_in_windows():
    ids = random_ids(CONFIG, 60).tolist()
    whole = MODEL.score(ids, window=CONFIG.n_ctx + 1)
    split = MODEL.score(ids[:5], ids[5:])
    np.testing.assert_array_equal(split.logprobs, whole.logprobs[5:])
    assert (split.window, split.stride) == (25, 12)


def test_underflow_is_no_error_even_where_the_user_made_it_one():
    block = PARAMS.h[0]
    sharp = block.attn.c_attn._replace(w=block.attn.c_attn.w * 300)
    attn = block.attn._replace(c_attn=sharp)
    model = Model(CONFIG, PARAMS._replace(h=(block._replace(attn=attn), *PARAMS.h[1:])))
    ids = random_ids(CONFIG, 12)
    pattern = model.trace(ids, names=["h.0.attn.pattern"])["h.0.attn.pattern"]
    assert (pattern[:, -1, :] == 0).any()  # some did underflow
    with np.errstate(all="raise"):
        model.trace(ids)
        model.generate(ids, max_new_tokens=3, temperature=1.0, seed=0)
        assert model.score(ids).count == 11


def test_a_stream_loses_no_text_to_a_listener_that_raises():
    model = numpygpt.load("shakespeare")
    calls = []

    def listen(_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError

    stream, pieces = model.stream("ROMEO:", max_new_tokens=6, on_step=listen), []
    with pytest.raises(RuntimeError):
        pieces.extend(stream)
    pieces.extend(stream)
    # A generator whose step was interrupted outside goes on; one that raised itself would not.
    assert "".join(pieces) == stream.result.text
    assert len(stream.result.ids) == 6


def test_an_odd_context_keeps_its_smaller_half():
    config = Config(vocab_size=29, n_ctx=7, n_embd=8, n_layer=1, n_head=2)
    model = Model(config, random_params(config))
    default = model.generate([1] * 7, max_new_tokens=12, overflow="slide")
    assert default == model.generate([1] * 7, max_new_tokens=12, overflow="slide", keep=3)
    other = model.generate([1] * 7, max_new_tokens=12, overflow="slide", keep=4)
    assert default.logprobs != other.logprobs


@pytest.mark.parametrize("stop", [(), "and so on"], ids=["held for a character", "for a stop"])
def test_what_is_held_back_comes_out_when_a_stop_id_ends_the_text(stop):
    model = numpygpt.load("shakespeare")
    half = model.tokenizer.encode("\N{CLAPPING HANDS SIGN}")[0]
    held, text = (half, "\ufffd") if not stop else (model.tokenizer.encode("and")[0], "and")
    forced = {0: held, 1: model.tokenizer.end_of_text}
    options = {"max_new_tokens": 3, "forced": forced, "stop": stop}
    result = model.generate("a", **options)
    assert (result.text, result.finish_reason) == (text, "stop")
    assert "".join(model.stream("a", **options)) == text
