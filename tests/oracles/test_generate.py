"""Decoding against transformers' ``generate``, on checkpoints that transformers wrote.

``pytest tests/oracles/test_generate.py -s`` prints where the two chose differently, and how close
the two best tokens were there.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

import numpy as np  # noqa: E402
from transformers_writer import write  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt.checkpoints import find  # noqa: E402
from numpygpt.decoding import History  # noqa: E402

pytestmark = pytest.mark.oracle

V, NEW = 300, 40
# Untied: with tied vectors, random models say one token for ever.
FIELDS = {"vocab_size": V, "n_positions": 48, "n_embd": 64, "n_layer": 3, "n_head": 4,
          "tie_word_embeddings": False}  # fmt: skip
# float32 logits up to 10 differ by some 1e-5 between the two (tests/oracles/test_transformers.py
# measures 1.2e-6 of the largest). Where the two best are closer than ten times that, either may
# come. Margins are 0.3 on average, so one choice in some thousands is that close.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three checkpoints, each in float32 on both sides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are only slowed down by more
    made = []
    for seed in range(3):
        directory = tmp_path_factory.mktemp("generate")
        write(directory, seed=seed, **FIELDS)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
        made.append((numpygpt.load(directory), theirs))
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def free(pairs):
    """What each checkpoint says after the usual prompts without any setting."""
    return [mine.generate(prompts(8), max_new_tokens=NEW) for mine, _ in pairs]


def prompts(length, count=4):
    """Prompts that begin by repeating themselves."""
    rng = np.random.default_rng(length)
    return [(3 * rng.integers(0, V, (length + 2) // 3).tolist())[:length] for _ in range(count)]


def their_ids(model, ids, **options):
    """The new tokens of each row, up to and with the end-of-text, from a left-padded batch."""
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    rows = model.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()
    ends = options.get("eos_token_id", [])
    cut = [next((i + 1 for i, token in enumerate(row) if token in ends), NEW) for row in rows]
    return [row[:end] for row, end in zip(rows, cut, strict=True)]


def assert_same_choices(result, expected, label):
    """Equal ids; after a choice that was too close to call, texts go apart."""
    made = result.ids + [result.stop] * isinstance(result.stop, int)
    for i, (mine, other) in enumerate(zip(made, expected, strict=False)):
        if mine != other:
            print(f"{label}: token {i} is {mine}, theirs {other}, margin {result.margins[i]:.1e}")
            assert result.margins[i] < CLOSE
            return
    assert made == expected


GREEDY = {  # ours, theirs
    "plain": ({}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "reward": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "no_repeat_ngram": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "lookup": ({"lookup": 5}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), GREEDY.values(), ids=GREEDY)
def test_greedy_ids(pairs, free, ours, theirs):
    """Twelve texts of 40 tokens."""
    different = 0
    for seed, (mine, other) in enumerate(pairs):
        ids = prompts(8)
        expected = their_ids(other, ids, **theirs)
        rows = mine.generate(ids, max_new_tokens=NEW, **ours)
        for row, tokens in zip(rows, expected, strict=True):
            assert_same_choices(row, tokens, f"{ours}, checkpoint {seed}")
        different += [row.ids for row in rows] != [row.ids for row in free[seed]]
    assert different >= 3 or not theirs  # the setting did something


def test_greedy_ids_with_what_is_banned_and_where_it_ends(pairs, free):
    """The likeliest tokens are banned, alone or after another; one of the rest ends the text."""
    ended = 0
    for seed, (mine, other) in enumerate(pairs):
        ids, made = prompts(8), [row.ids for row in free[seed]]
        banned = [[made[0][0]], made[0][3:5], made[1][1:4], [ids[2][-1], made[2][0]]]
        chosen = mine.generate(ids, max_new_tokens=NEW, banned=banned)
        end = chosen[0].ids[7]
        for least in (0, 9):
            expected = their_ids(
                other, ids, bad_words_ids=banned, eos_token_id=[end], min_new_tokens=least
            )
            rows = mine.generate(
                ids, max_new_tokens=NEW, banned=banned, stop_ids=[end], min_new_tokens=least
            )
            for row, tokens in zip(rows, expected, strict=True):
                assert_same_choices(row, tokens, f"least {least}, checkpoint {seed}")
                ended += row.finish_reason == "stop"
    assert ended >= 8


def test_everything_greedy_at_once(pairs, free):
    for seed, (mine, other) in enumerate(pairs):
        ids, made = prompts(8), [row.ids for row in free[seed]]
        end, banned = made[1][20], [[made[0][0]], made[2][1:3]]
        expected = their_ids(
            other, ids, repetition_penalty=1.2, no_repeat_ngram_size=3, bad_words_ids=banned,
            min_new_tokens=5, eos_token_id=[end],
        )  # fmt: skip
        rows = mine.generate(
            ids, max_new_tokens=NEW, repetition_penalty=1.2, no_repeat_ngram=3, banned=banned,
            min_new_tokens=5, stop_ids=[end], lookup=3, order="transformers",
        )  # fmt: skip
        for row, tokens in zip(rows, expected, strict=True):
            assert_same_choices(row, tokens, f"everything, checkpoint {seed}")


def test_their_left_padded_batch_is_our_ragged_one(pairs):
    for seed, (mine, other) in enumerate(pairs):
        ids = [prompts(length, 1)[0] for length in (1, 8, 3, 5)]
        rows = mine.generate(ids, max_new_tokens=NEW)
        for row, tokens in zip(rows, their_ids(other, ids), strict=True):
            assert_same_choices(row, tokens, f"padded, checkpoint {seed}")


def test_prompt_lookup_on_both_sides(pairs):
    """transformers takes one prompt at a time, and has other rules for what to propose.

    It proposes beyond the last position, and fails; so the texts end before.
    """
    accepted = 0
    for seed, (mine, other) in enumerate(pairs):
        for ids in prompts(8, 3):
            result = mine.generate(ids, max_new_tokens=30, lookup=4)
            expected = their_ids(other, [ids], prompt_lookup_num_tokens=4, max_new_tokens=30)
            assert_same_choices(result, expected[0], f"lookup, checkpoint {seed}")
            accepted += result.accepted
    assert accepted > 0


SAMPLED = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram": {"no_repeat_ngram": 1},
    "all": {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9,
            "repetition_penalty": 1.2, "no_repeat_ngram": 2},
}  # fmt: skip


@pytest.mark.parametrize("order", ["transformers", "numpygpt"])
@pytest.mark.parametrize("chosen", SAMPLED.values(), ids=SAMPLED)
def test_the_distribution_after_all_filters(pairs, chosen, order):
    """Their sampled text, forced on us; the processed scores of every step."""
    chosen = {"temperature": 1.0, **chosen}
    theirs = dict(chosen)
    theirs["no_repeat_ngram_size"] = theirs.pop("no_repeat_ngram", 0)
    theirs.setdefault("top_k", 0)  # or it would be 50
    mine, other = pairs[0]
    ids = prompts(8, 1)[0]
    torch.manual_seed(0)
    out = other.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 8, dtype=torch.long), do_sample=True,
        max_new_tokens=NEW, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        output_logits=True, **theirs,
    )  # fmt: skip
    text = out.sequences[0].tolist()
    made = text[8:]
    assert len(set(made)) > 5
    result = mine.generate(ids, max_new_tokens=NEW, forced=dict(enumerate(made)), stop_ids=())
    logprobs = torch.log_softmax(torch.cat(out.logits).double(), -1).numpy()
    np.testing.assert_allclose(result.logprobs, logprobs[range(NEW), made], rtol=0, atol=CLOSE)
    settings = mine.settings(**chosen, order=order, max_new_tokens=NEW)
    rows = mine.logits(text[:-1])[7:].astype(np.float64)
    for i, (logits, scores) in enumerate(zip(rows, out.scores, strict=True)):
        for step in settings.filters:
            logits = step.apply(logits, History(np.array(text[: 8 + i]), 8))
        scores = scores[0].double().numpy()
        kept = np.isfinite(scores)
        np.testing.assert_array_equal(np.isfinite(logits), kept)
        # Scores are logits over a temperature of at least 0.7.
        np.testing.assert_allclose(logits[kept], scores[kept], rtol=0, atol=CLOSE)


def test_stop_strings_end_the_text_at_the_same_token():
    directory = find("shakespeare")
    ours = numpygpt.load(directory)
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = ours.tokenizer.encode("ROMEO:")
    free = ours.generate(ids, max_new_tokens=NEW)
    phrases = [free.text[start:stop] for start, stop in ((5, 9), (20, 22), (33, 60), (50, 51))]
    for stop in ([phrase] for phrase in phrases):
        result = ours.generate(ids, max_new_tokens=NEW, stop=stop)
        expected = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False, max_new_tokens=NEW, pad_token_id=0, stop_strings=stop,
            tokenizer=tokenizer,
        )[0, len(ids) :].tolist()  # fmt: skip
        assert result.finish_reason == "stop"
        assert_same_choices(result, expected, f"stop {stop}")
        assert len(result.ids) < len(free.ids)
