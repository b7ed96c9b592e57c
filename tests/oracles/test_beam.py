"""Beam search against transformers: the texts and their scores, on seeded random checkpoints.

``pytest tests/oracles/test_beam.py -s`` prints the largest difference of scores.

transformers takes log-softmax and adds up in float32, whatever the model is in. So two texts whose
totals differ by less than that rounds may change places; in 630 searches none did.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers_writer import write  # noqa: E402

import numpygpt  # noqa: E402

pytestmark = pytest.mark.oracle

# A head of its own leaves many tokens likely; with the token table the last one would come again.
TINY = {
    "vocab_size": 40, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
NEW_TOKENS = 8
STOPS = list(range(6))
PENALTIES = (0.0, 0.6, 1.0, 2.0, -1.0)
EARLY = (False, True, "never")

# As a fraction of the score. float32 rounds at u = 6e-8: each of at most 8 log-probabilities once
# relative to its size, and the sum each time, so at most 9 u = 5e-7. Measured: 1e-7. The mildest
# mistake, a length of 9 instead of 8 under the penalty 0.6, is 0.07.
TOLERANCE = 5e-7


@pytest.fixture(scope="module", params=[0, 4])  # seeds whose texts stop now and then
def models(request, tmp_path_factory):
    """The same weights in numpygpt and in transformers, and a prompt."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for a second thread
    directory = tmp_path_factory.mktemp("checkpoint")
    write(directory, seed=request.param, **TINY)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float64).eval()
    prompt = np.random.default_rng(request.param).integers(0, TINY["vocab_size"], 5)
    yield numpygpt.load(directory, dtype="float64"), theirs, prompt
    torch.set_num_threads(threads)


def ours(models, stop_ids, beams, **chosen):
    model, _, prompt = models
    results = model.beam_search(
        prompt, beams=beams, n=beams, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, **chosen
    )
    texts = [result.ids + [result.stop] * (result.stop is not None) for result in results]
    return texts, np.array([result.score for result in results])


def expected(models, stop_ids, beams, no_repeat_ngram=None, min_new_tokens=0, **chosen):
    _, model, prompt = models
    ids = torch.tensor(prompt)[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        num_beams=beams, num_return_sequences=beams, eos_token_id=stop_ids or None, pad_token_id=0,
        no_repeat_ngram_size=no_repeat_ngram or 0, min_new_tokens=min_new_tokens or None,
        return_dict_in_generate=True, output_scores=True, **chosen,
    )  # fmt: skip
    texts = []
    for row in out.sequences[:, len(prompt) :].tolist():  # shorter texts are filled up
        end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), NEW_TOKENS)
        texts.append(row[:end])
    return texts, out.sequences_scores.numpy()


def assert_agree(models, **chosen) -> tuple:
    """All texts in their order, and their scores; returns the texts."""
    texts, scores = ours(models, **chosen)
    their_texts, their_scores = expected(models, **chosen)
    assert texts == their_texts
    gap = np.abs(scores / their_scores - 1).max()
    print(f"{chosen}: {gap:.1e}")
    assert gap <= TOLERANCE
    return tuple(map(tuple, texts))


@pytest.mark.parametrize("beams", [2, 4, 5])
def test_texts_and_scores_are_those_of_transformers(models, beams):
    found = {
        (penalty, early): assert_agree(
            models, beams=beams, length_penalty=penalty, early_stopping=early, stop_ids=STOPS
        )
        for penalty, early in itertools.product(PENALTIES, EARLY)
    }
    # The settings matter here, so agreement says something about each.
    assert len({len(text) for texts in found.values() for text in texts}) >= 5
    assert len({found[penalty, False] for penalty in PENALTIES}) >= 3
    assert max(len({found[penalty, early] for early in EARLY}) for penalty in PENALTIES) >= 2


def test_texts_without_repeated_ngrams(models):
    chosen = {"beams": 4, "stop_ids": [], "length_penalty": 1.0, "early_stopping": False}
    found = {assert_agree(models, no_repeat_ngram=n, **chosen) for n in (None, 1, 2, 3)}
    assert len(found) >= 3  # the longest may not repeat anyway


def test_texts_of_a_least_length(models):
    chosen = {"beams": 4, "stop_ids": STOPS, "length_penalty": 0.0, "early_stopping": True}
    free = assert_agree(models, **chosen)
    bound = assert_agree(models, min_new_tokens=5, **chosen)
    assert min(map(len, free)) < 6 <= min(map(len, bound))


def test_one_beam_is_greedy_decoding(models):
    model, theirs, prompt = models
    ids = torch.tensor(prompt)[None]
    greedy = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    (text,), _ = ours(models, stop_ids=[], beams=1)
    assert text == greedy == model.generate(prompt, max_new_tokens=NEW_TOKENS).ids
