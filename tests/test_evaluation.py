"""How a model answers lm-evaluation-harness, as far as that can be told without lm-eval.

tests/oracles/test_evaluation.py runs tasks with the real package.
"""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import nano, random_params

import numpygpt
from numpygpt import evaluation, scoring
from numpygpt.errors import ArgumentError, ContextError, MissingPackageError, TokenError

CONFIG = nano(vocab_size=5)
PARAMS = random_params(CONFIG)
N = CONFIG.n_ctx

# In float64, summed over at most 12 tokens. Rounding is 1.1e-16 of logits below 10, times some
# hundred operations: 1e-13. Measured: 7e-15. One token of context less changes 7e-4 or more.
TOLERANCE = 1e-11


class Harness(evaluation.Requests):
    """Without its base class: with a list for the harness's store of answers."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.kept = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *what: self.kept.append(what))


def scored(harness, pairs):
    return harness._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)


def alone(context, continuation):
    """The same from `scoring`, which keeps no cache between texts."""
    ids = np.array((context + continuation)[-(N + 1) :])
    rows = scoring.score(ids, len(ids) - len(continuation), PARAMS, CONFIG, window=N + 1)
    return rows.logprobs.sum(), bool((rows.ranks == 1).all())


# -- log-likelihoods ------------------------------------------------------------------------------

# Few different tokens and short texts, so that many begin alike.
tokens = st.integers(0, 1)
pairs = st.tuples(st.lists(tokens, min_size=1, max_size=2 * N), st.lists(tokens, min_size=1,
                  max_size=N))  # fmt: skip


@given(st.lists(pairs, min_size=1, max_size=6))
def test_each_answer_is_the_one_it_would_have_had_alone(pairs):
    harness = Harness(numpygpt.Model(CONFIG, PARAMS))
    for (logprob, greedy), pair in zip(scored(harness, pairs), pairs, strict=True):
        expected = alone(*pair)
        assert abs(logprob - expected[0]) <= TOLERANCE
        assert greedy == expected[1]


def test_greedy_continuations_are_greedy_and_others_are_not():
    model = numpygpt.Model(CONFIG, PARAMS)
    best = model.generate([1, 2, 3], max_new_tokens=4).ids
    other = [*best[:3], (best[3] + 1) % 5]
    answers = scored(Harness(model), [([1, 2, 3], best), ([1, 2, 3], other), ([1, 2, 3], best)])
    assert [greedy for _, greedy in answers] == [True, False, True]


def test_a_shared_context_is_read_once(monkeypatch):
    harness = Harness(numpygpt.Model(CONFIG, PARAMS))
    read, pieces = [], harness._feeder.pieces

    def counted(new, caches):
        read.append(len(new[0]))
        return pieces(new, caches)

    monkeypatch.setattr(harness._feeder, "pieces", counted)
    scored(harness, [([0] * 6, [1, 2]), ([0] * 6, [2, 1]), ([0] * 6, [3]), ([1] * 6, [3])])
    # All but the last token are read: 7; then from the one that predicts the continuation.
    assert read == [7, 2, 1, 6]


def test_after_an_interruption_the_answers_are_right(monkeypatch):
    harness = Harness(numpygpt.Model(CONFIG, PARAMS))
    scored(harness, [([0] * 6, [1, 2])])
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "log_probability", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scored(harness, [([1] * 6, [1, 2])])
    ((logprob, _),) = scored(harness, [([0] * 6, [1, 2])])
    assert abs(logprob - alone([0] * 6, [1, 2])[0]) <= TOLERANCE


def test_a_beginning_that_is_cut_off_is_said(caplog):
    harness = Harness(numpygpt.Model(CONFIG, PARAMS))
    scored(harness, [([0] * N, [1])])  # just fits: the last token is not read
    assert not caplog.messages
    scored(harness, [([0] * N, [1, 2])])
    assert caplog.messages == ["a text of 14 tokens loses its first 1: there is room for 13 only"]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (N + 1))])
def test_what_cannot_be_scored_is_refused(pair):
    with pytest.raises(TokenError, match="1 to 12 tokens after it"):
        scored(Harness(numpygpt.Model(CONFIG, PARAMS)), [pair])


def test_answers_are_kept_for_the_harness():
    harness = Harness(numpygpt.Model(CONFIG, PARAMS))
    (answer,) = harness._loglikelihood_tokens([(("a", "b"), [1], [2])], disable_tqdm=True)
    assert harness.kept == [("loglikelihood", ("a", "b"), answer)]


# -- new text -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare():
    return numpygpt.load("shakespeare")


@pytest.fixture
def _lm_eval(monkeypatch):
    """What generate_until takes from lm-eval, in a few words."""

    def normalize_gen_kwargs(kwargs, default):
        return {"do_sample": bool(kwargs.get("temperature")), "max_gen_toks": default} | kwargs

    utils = types.ModuleType("lm_eval.models.utils")
    utils.normalize_gen_kwargs = normalize_gen_kwargs
    utils.handle_stop_sequences = lambda until, eos: [*until, eos]
    monkeypatch.setitem(sys.modules, "lm_eval.models.utils", utils)


def continued(harness, contexts, **kwargs):
    requests = [types.SimpleNamespace(args=(text, {"until": [], **kwargs})) for text in contexts]
    return harness.generate_until(requests, disable_tqdm=True)


PROMPTS = ["ROMEO:", "The king", "", "<|endoftext|>", "ROMEO:"]


@pytest.mark.usefixtures("_lm_eval")
@pytest.mark.parametrize("batch_size", [1, "2", "auto"])
def test_texts_are_those_of_generate(shakespeare, batch_size):
    harness = Harness(shakespeare, max_gen_toks=20, batch_size=batch_size)
    texts = continued(harness, PROMPTS, until=["", "\n\n"])
    end = [shakespeare.tokenizer.end_of_text]
    ids = [shakespeare.tokenizer.encode(text) or end for text in PROMPTS]
    ids[3] = end  # a special token may be spelled
    expected = [shakespeare.generate(i, max_new_tokens=20, stop="\n\n").text for i in ids]
    assert texts == expected
    assert [what[1][0] for what in harness.kept] == PROMPTS


@pytest.mark.usefixtures("_lm_eval")
def test_each_request_has_its_own_settings(shakespeare):
    harness = Harness(shakespeare, batch_size=8)
    lengths = [3, 3, 7, 3]
    texts = harness.generate_until(
        [
            types.SimpleNamespace(args=("The king", {"until": [], "max_gen_toks": n}))
            for n in lengths
        ],
        disable_tqdm=True,
    )
    expected = {n: shakespeare.generate("The king", max_new_tokens=n).text for n in (3, 7)}
    assert texts == [expected[n] for n in lengths]


@pytest.mark.usefixtures("_lm_eval")
def test_samples_can_be_repeated_and_differ_from_each_other(shakespeare):
    harness = Harness(shakespeare, max_gen_toks=20, batch_size=8)
    runs = []
    for seed in (1, 1, 2):
        np.random.seed(seed)  # noqa: NPY002  # as the harness does
        runs.append(continued(harness, ["ROMEO:"] * 3, temperature=1.0, top_k=0))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3


@pytest.mark.usefixtures("_lm_eval")
def test_prompts_leave_room_for_the_new_tokens(shakespeare):
    harness = Harness(shakespeare)
    text = "My good lord, " * 100
    room = shakespeare.config.n_ctx - 50
    (found,) = continued(harness, [text], max_gen_toks=50)
    ids = shakespeare.tokenizer.encode(text)
    assert found == shakespeare.generate(ids[-room:], max_new_tokens=50).text
    with pytest.raises(ContextError, match="256 new tokens leave no room for a prompt in 256"):
        continued(harness, [text])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {}),
        ({"do_sample": False, "num_beams": 1, "repetition_penalty": 1.2},
         {"repetition_penalty": 1.2}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
         {"temperature": 0.7, "top_k": 5, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 0}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7, "top_k": 50}),
    ],
)  # fmt: skip
def test_settings(kwargs, expected):
    found = evaluation._settings({"max_gen_toks": 3, "until": [], **kwargs})
    assert found == {"max_new_tokens": 3, **expected}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"do_sample": False, "penalty_alpha": 0.6}, "unknown setting 'penalty_alpha'; known are"),
        ({"do_sample": False, "num_beams": 4}, "beam search is not offered"),
        ({"do_sample": True}, "needs a temperature above 0"),
        ({"do_sample": True, "temperature": 0.0}, "needs a temperature above 0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        evaluation._settings({"max_gen_toks": 3, **kwargs})


# -- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [0, -1, "many", "", 1.5])
def test_batch_sizes_that_are_none(shakespeare, batch_size):
    with pytest.raises(ArgumentError, match="batch_size must be 'auto' or from 1 up"):
        Harness(shakespeare, batch_size=batch_size)


def test_a_name_is_loaded():
    assert Harness("shakespeare", dtype="float64").model.dtype == np.float64


def test_a_vocabulary_without_end_of_text_is_refused():
    tokenizer = numpygpt.tokenizer.Tokenizer([bytes([i]) for i in range(256)])
    model = numpygpt.Model(nano(vocab_size=256), random_params(nano(vocab_size=256)), tokenizer)
    with pytest.raises(TokenError, match=r"a vocabulary with <\|endoftext\|>; this has none"):
        Harness(model).eot_token_id  # noqa: B018


# -- without lm-eval ------------------------------------------------------------------------------


@pytest.fixture
def _no_lm_eval(monkeypatch):
    evaluation._harness.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    yield
    evaluation._harness.cache_clear()


@pytest.mark.usefixtures("_no_lm_eval")
def test_without_lm_eval_the_message_says_what_to_install():
    with pytest.raises(MissingPackageError, match=r"pip install .numpygpt\[eval\]"):
        evaluation.Harness  # noqa: B018
    with pytest.raises(SystemExit, match=r"pip install .numpygpt\[eval\]"):
        evaluation.main()


def test_names_that_are_none():
    with pytest.raises(AttributeError, match="no attribute 'Hamlet'"):
        evaluation.Hamlet  # noqa: B018


def test_the_module_imports_without_lm_eval():
    code = "import sys; sys.modules['lm_eval'] = None; import numpygpt.evaluation; print('ready')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "ready\n"
