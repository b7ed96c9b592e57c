"""Any model in EleutherAI's lm-evaluation-harness: ``pip install "numpygpt[eval]"``.

On the command line, with every option of ``lm_eval run``::

    python -m numpygpt.evaluation --model_args pretrained=gpt2 --tasks lambada_openai --limit 100

In Python::

    import lm_eval, numpygpt
    from numpygpt.evaluation import Harness

    model = numpygpt.load("gpt2")
    lm_eval.simple_evaluate(model=Harness(model), tasks=["lambada_openai"])

lm-eval looks for models in its own list only, so ``lm_eval --model numpygpt`` cannot find this
one.

What is tokenised, cut off and scored is what the harness's own model ``hf`` does, so results can
be compared with published ones. PyTorch is not needed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .api import Model
from .cache import Cache
from .decoding import Generation
from .decoding.sample import choose, log_probability
from .errors import ArgumentError, ContextError, MissingPackageError, TokenError
from .feed import Feeder
from .loading import load
from .params import Array
from .tokenizer import END_OF_TEXT

__all__ = ["Requests", "main"]

# The settings of tasks that are passed on; without sampling only the last has an effect.
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class Requests:
    """How a model answers the requests of the harness.

    ``Harness`` is this on top of lm-eval's ``TemplateLM``, which cuts texts into the tokens of a
    context and a continuation.

    Parameters
    ----------
    pretrained : Model, str or path
        A model, or what :func:`numpygpt.load` takes.
    dtype : {"float32", "float64"}
        What to compute in, if `pretrained` is not a model yet.
    max_gen_toks : int
        Most new tokens where a task does not say.
    batch_size : int or str
        Prompts that are continued together, where that is greedy; "auto" is 8. With 124M
        parameters 8 together took a third of the time.
    max_batch_size, device : optional
        The harness passes them; they change nothing.

    Raises
    ------
    ArgumentError
        If `batch_size` is neither.
    """

    cache_hook: Any  # where the harness keeps answers; its base class sets it

    def __init__(
        self,
        pretrained: Any,
        dtype: str = "float32",
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        batch = "8" if str(batch_size).startswith("auto") else str(batch_size)
        if not batch.isdecimal() or int(batch) < 1:
            raise ArgumentError(f"batch_size must be 'auto' or from 1 up, not {batch_size!r}")
        self.batch_size, self.max_gen_toks = int(batch), max_gen_toks
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, dtype)
        config = self.model.config
        self.max_length = config.n_ctx
        self._feeder = Feeder(self.model.params, config, config.n_ctx, config.n_ctx)
        self._cache = Cache(config, dtype=self.model.dtype)
        self._read: Array = np.zeros(0, np.intp)  # what the cache holds, and perhaps more

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands before a text without context.

        Raises
        ------
        TokenError
            If the vocabulary has none.
        """
        token = self.model.tokenizer.end_of_text
        if token is None:
            raise TokenError(f"the harness needs a vocabulary with {END_OF_TEXT}; this has none")
        return token

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """The ids of a text; it may spell special tokens, as it may for ``hf``."""
        return self.model.tokenizer.encode(string, allowed_special="all")

    # -- log-likelihoods -----------------------------------------------------------------------

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in nats.

        A window is n_ctx tokens read. Each scores as many new ones as it can; the last one is
        filled up with tokens before them.
        """
        utils = importlib.import_module("lm_eval.utils")
        answers = []
        with _bar("loglikelihood_rolling", len(requests), disable_tqdm) as bar:
            for (text,) in [request.args for request in requests]:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(text), self.eot_token_id, self.max_length, context_len=1
                )
                scores = [self._score(*utils.make_disjoint_window(window)) for window in windows]
                answers.append(sum(logprob for logprob, _ in scores))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
                bar.update()
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is the greedy one."""
        answers = []
        with _bar("loglikelihood", len(requests), disable_tqdm) as bar:
            for texts, context, continuation in requests:
                if not context or not 1 <= len(continuation) <= self.max_length:
                    raise TokenError(
                        f"expected a context and 1 to {self.max_length} tokens after it, received "
                        f"{len(context)} and {len(continuation)}: {str(texts)[:200]}"
                    )
                answers.append(self._score(context, continuation))
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
                bar.update()
        return answers

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood in nats, and whether each token is the likeliest.

        The choices of one question share their context. What begins like the request before is
        therefore read from there on: with four choices of 8 tokens that took half the time after
        60 tokens of context, a third after 200.
        """
        ids = np.array(_end(context + continuation, self.max_length + 1))
        first = len(ids) - len(continuation)
        held = min(len(ids), self._cache.length)
        same = int((ids[:held] == self._read[:held]).cumprod().sum())
        start = min(same, first - 1)
        self._cache.truncate(start)
        self._read = ids
        total, greedy = 0.0, True
        for piece in self._feeder.pieces([ids[start:-1]], [self._cache]):
            after = start + piece.start + 1  # the token that the piece's first row predicts
            rows = self._feeder.logits(piece.hidden[max(0, first - after) :])
            for logits, token in zip(rows, ids[max(first, after) :].tolist(), strict=False):
                total += log_probability(logits, token)
                greedy = greedy and choose(logits) == token
        return total, greedy

    # -- new text ------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to one of its stop strings, which is left out.

        A sampled text takes its seed from NumPy's global generator, which the harness seeds
        (``--seed``): a run can be repeated, and repeats of one request differ.
        """
        utils = importlib.import_module("lm_eval.models.utils")
        pairs = [request.args for request in requests]
        answers: list[str] = []
        with _bar("generate_until", len(pairs), disable_tqdm) as bar:
            for given, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
                kwargs = utils.normalize_gen_kwargs(given, self.max_gen_toks)
                stop = utils.handle_stop_sequences(kwargs["until"], eos=END_OF_TEXT)
                settings = _settings(kwargs) | {"stop": [text for text in stop if text]}
                # The prompts of one call draw the same numbers, so sampling takes one at a time.
                size = 1 if "temperature" in settings else self.batch_size
                contexts = [context for context, _ in group]
                for i in range(0, len(contexts), size):
                    batch = contexts[i : i + size]
                    for context, text in zip(batch, self._continue(batch, settings), strict=True):
                        answers.append(text)
                        self.cache_hook.add_partial("generate_until", (context, given), text)
                    bar.update(len(batch))
        return answers

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """The new text after each context, of which the end is read that leaves room for it."""
        room = self.max_length - settings["max_new_tokens"]
        if room < 1:
            raise ContextError(
                f"{settings['max_new_tokens']} new tokens leave no room for a prompt in "
                f"{self.max_length} positions; ask for fewer, such as --gen_kwargs max_gen_toks="
                f"{self.max_length // 2}"
            )
        prompts = [_end(self.tok_encode(context), room) for context in contexts]
        prompts = [prompt or [self.eot_token_id] for prompt in prompts]
        if "temperature" in settings:
            settings = settings | {"seed": int(np.random.randint(2**31))}  # noqa: NPY002
        return [
            _until(result, settings["stop"]) for result in self.model.generate(prompts, **settings)
        ]


def _until(result: Generation, stop: Sequence[str]) -> str:
    """The new text, cut off as the harness does it: at the first of each stop string in turn."""
    text = (result.text or "") + (result.stop if isinstance(result.stop, str) else "")
    for term in stop:
        text = text.split(term)[0]
    return text


def _bar(kind: str, total: int, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=f"Running {kind} requests", disable=disable)


def _end(ids: list[int], room: int) -> list[int]:
    """The last `room` tokens. Like ``hf``, this says so if some are lost."""
    if len(ids) > room:
        logging.getLogger(__name__).warning(
            "a text of %d tokens loses its first %d: there is room for %d only",
            len(ids), len(ids) - room, room,
        )  # fmt: skip
    return ids[-room:]


def _settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task, as lm-eval's ``normalize_gen_kwargs`` settles them, in our words.

    Raises
    ------
    ArgumentError
        If one is unknown, or sampling lacks a temperature.
    """
    if unknown := kwargs.keys() - {*SETTINGS, "until", "max_gen_toks", "do_sample", "num_beams"}:
        raise ArgumentError(f"unknown setting {min(unknown)!r}; known are {', '.join(SETTINGS)}")
    if kwargs.get("num_beams", 1) != 1:
        raise ArgumentError("num_beams: beam search is not offered here")
    if kwargs["do_sample"] and not kwargs.get("temperature"):
        raise ArgumentError("do_sample=True needs a temperature above 0")
    names = SETTINGS if kwargs["do_sample"] else SETTINGS[-1:]
    settings = {name: kwargs[name] for name in names if name in kwargs}
    if kwargs["do_sample"]:
        settings.setdefault("top_k", 50)  # as transformers does
    if settings.get("top_k") == 0:  # the way to switch it off in transformers
        del settings["top_k"]
    return settings | {"max_new_tokens": kwargs["max_gen_toks"]}


# -- lm-eval ----------------------------------------------------------------------------------


@functools.cache
def _harness() -> type[Any]:
    """Made when it is first asked for, so that this module can be imported without lm-eval."""
    try:
        base = importlib.import_module("lm_eval.api.model").TemplateLM
        importlib.import_module("lm_eval.models.utils").normalize_gen_kwargs  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            f'this takes lm-eval 0.4.13 or later: pip install "numpygpt[eval]" ({error})'
        ) from None
    return type("Harness", (Requests, base), {"__doc__": Requests.__doc__, "__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "Harness":
        return _harness()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run ``lm_eval run --model numpygpt`` with the arguments of the command line."""
    try:
        harness = _harness()
    except MissingPackageError as error:
        sys.exit(str(error))
    importlib.import_module("lm_eval.models")  # fills the list, which is only done if it is empty
    importlib.import_module("lm_eval.api.registry").register_model("numpygpt")(harness)
    sys.argv[1:1] = ["run", "--model", "numpygpt"]
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
