"""Against lm-eval's own `hf` model: the same tasks, from local files, on the same checkpoint.

``pytest tests/oracles/test_evaluation.py -s`` prints the largest differences.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
pytest.importorskip("transformers", reason="needs transformers")
datasets = pytest.importorskip("datasets", reason="comes with lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt import evaluation  # noqa: E402
from numpygpt.checkpoints import find  # noqa: E402

pytestmark = pytest.mark.oracle

FILES = pathlib.Path(__file__).parents[1] / "fixtures" / "evaluation"
TASKS = [f"numpygpt_{name}" for name in ("choice", "last_word", "rolling", "continue")]

# Largest difference to `hf` in float32, in nats per scored token. float32 holds a log-probability
# of -8 to 5e-7, and `hf` also sums them in float32. Measured: 3.0e-6. The mildest of the
# mistakes below: 0.15.
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def _local(scratch, monkeypatch):
    """Task files name their data relative to themselves; prepared data goes nowhere lasting."""
    monkeypatch.chdir(FILES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", scratch)
    # It describes the machine for the report, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda report: None)


@functools.cache
def manager():
    return TaskManager(include_path=".", include_defaults=False)


def run(model, tasks=TASKS):
    return lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager(), bootstrap_iters=0
    )


@functools.cache
def theirs():
    return run(hf())


@functools.cache
def shakespeare():
    return numpygpt.load("shakespeare")


def metrics(results) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, values in results["results"].items()
        for name, value in values.items()
        if "," in name and "stderr" not in name
    }


def answers(results, task) -> list:
    """What the model said to each request of a task, in order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answers in sample["resps"] for answer in answers]


def per_token(results) -> np.ndarray:
    """Log-likelihoods of all requests, each divided by how many tokens it scores."""
    numbers = []
    for task in TASKS[:3]:
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        texts = [pair[-1] for sample in samples for pair in sample["arguments"]]
        for text, answer in zip(texts, answers(results, task), strict=True):
            total = answer[0] if isinstance(answer, tuple) else answer
            numbers.append(total / len(shakespeare().tokenizer.encode(text)))
    return np.array(numbers)


def gap(ours) -> float:
    """The largest difference to `hf`, in nats per token."""
    return float(np.abs(per_token(ours) - per_token(theirs())).max())


def flags(results) -> list[bool]:
    """Whether each continuation is the greedy one."""
    return [greedy for task in TASKS[:2] for _, greedy in answers(results, task)]


@functools.cache
def ours():
    return run(evaluation.Harness(shakespeare()))


# -- what must be equal ---------------------------------------------------------------------------


def test_log_likelihoods():
    print(f"largest difference: {gap(ours()):.1e} nats per token")
    assert gap(ours()) <= TOLERANCE


def test_greedy_flags():
    assert flags(ours()) == flags(theirs())
    assert set(flags(ours())) == {True, False}


def test_generated_texts():
    assert answers(ours(), TASKS[3]) == answers(theirs(), TASKS[3])
    assert all(answers(ours(), TASKS[3]))


@functools.cache
def hf():
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(find("shakespeare")), device="cpu", dtype="float32")


def continued(model, prompts, **settings) -> list[str]:
    requests = [
        Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)
    ]
    return model.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    "until",
    [["will not", "I will not"], ["lord", "my lord"], ["not", "will"], ["\n\n", "\n"]],
    ids=str,
)
def test_stop_strings_that_overlap_end_the_text_where_hf_ends_it(until):
    prompts = ["ROMEO:", "HAMLET:\nWhat", "KING:"]
    chosen = {"until": until, "max_gen_toks": 24, "do_sample": False}
    texts = [continued(model, prompts, **chosen) for model in (hf(), ours_alone())]
    assert texts[0] == texts[1]


def ours_alone():
    return evaluation.Harness(shakespeare())


def test_sampling_draws_from_the_tokens_that_hf_draws_from():
    """transformers keeps the 50 likeliest unless it is told otherwise."""
    model = shakespeare()
    likely = np.argsort(-model.logits(model.tokenizer.encode("ROMEO:"), last=True))[:50]
    allowed = {model.tokenizer.decode([i]) for i in likely} | {""}  # end-of-text, cut off
    chosen = {"until": [], "max_gen_toks": 1, "do_sample": True, "temperature": 50.0}
    for harness in (hf(), ours_alone()):
        drawn = set(continued(harness, ["ROMEO:"] * 200, **chosen))
        # At nearly even odds; of the other 3022 tokens none may come.
        assert len(drawn) > 35
        assert drawn <= allowed


def test_batches_change_no_text():
    together = run(evaluation.Harness("shakespeare", batch_size="3"), TASKS[3:])
    assert answers(together, TASKS[3]) == answers(theirs(), TASKS[3])


def test_metrics():
    actual, expected = metrics(ours()), metrics(theirs())
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        exact = "acc" in name or "exact_match" in name
        # The relative change of a perplexity is the change of its logarithm, in nats per word,
        # and a word has fewer than ten tokens.
        assert actual[name] == pytest.approx(value, rel=0 if exact else 10 * TOLERANCE), name
    for name in ("choice acc", "last_word acc", "continue exact_match"):
        assert 0 < actual[f"numpygpt_{name},none"] < 1  # some right, some wrong


# -- what must not pass ---------------------------------------------------------------------------


class Early(evaluation.Requests):
    def _score(self, context, continuation):
        return super()._score(context[:-1] or context, [context[-1], *continuation[:-1]])


class Shorter(evaluation.Requests):
    def _score(self, context, continuation):
        room = max(1, self.max_length - len(continuation))
        return super()._score(context[-room:], continuation)


class CutAtTheEnd(evaluation.Requests):
    def _score(self, context, continuation):
        return super()._score(context[: self.max_length + 1 - len(continuation)], continuation)


class EncodedApart(evaluation.Requests):
    def _encode_pair(self, context, continuation):
        return self.tok_encode(context), self.tok_encode(continuation)


class PlainText(evaluation.Requests):
    def tok_encode(self, string, *_, **__):
        return self.model.tokenizer.encode(string)


class OtherPrefix(evaluation.Requests):
    eot_token_id = 0


class StaleCache(evaluation.Requests):
    def _score(self, context, continuation):
        self._read = np.array((context + continuation)[-self.max_length - 1 :])
        return super()._score(context, continuation)


class LessRoom(evaluation.Requests):
    def _continue(self, contexts, settings):
        self.max_length -= 30
        return super()._continue(contexts, settings)


@pytest.mark.parametrize(
    "mistake",
    [Early, Shorter, CutAtTheEnd, EncodedApart, PlainText, OtherPrefix, StaleCache],
)
def test_mistakes_are_outside_the_tolerance(mistake):
    harness = type(mistake.__name__, (mistake, evaluation.Harness), {})
    size = gap(run(harness(shakespeare()), TASKS[:3]))
    print(f"{mistake.__name__}: {size:.1e} nats per token")
    assert size > 1000 * TOLERANCE


def test_a_prompt_that_is_cut_too_short_shows_in_the_text():
    harness = type("Wrong", (LessRoom, evaluation.Harness), {})
    assert answers(run(harness(shakespeare()), TASKS[3:]), TASKS[3]) != answers(theirs(), TASKS[3])


# -- the command line -----------------------------------------------------------------------------


def test_the_command_line(monkeypatch, capsys, tmp_path):
    # Without its own 14,000 task files, which take it half a minute to list.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **settings: TaskManager(
        include_defaults=False, **settings
    ))  # fmt: skip
    arguments = (
        "--model_args pretrained=shakespeare,max_gen_toks=50 --tasks numpygpt_choice "
        f"--include_path . --output_path {tmp_path}"
    )
    monkeypatch.setattr(sys, "argv", ["evaluation", *arguments.split()])
    evaluation.main()
    assert "numpygpt ({'pretrained': 'shakespeare'" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["config"]["model"] == "numpygpt"
    accuracy = report["results"]["numpygpt_choice"]["acc,none"]
    assert accuracy == metrics(theirs())["numpygpt_choice acc,none"]
