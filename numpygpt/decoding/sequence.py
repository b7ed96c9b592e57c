"""One continuation, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..cache import Cache
from ..errors import ArgumentError
from ..params import Array, Config
from ..text import TextStream
from .lookup import Lookup
from .order import Filter, History, filtered
from .sample import choose, log_probability, margin, require_finite, top_logprobs
from .settings import Settings

__all__ = ["FinishReason", "Generation", "Likeliest", "Running", "Step", "kept"]

FinishReason: TypeAlias = Literal["stop", "length", "interrupted"]


class Step(NamedTuple):
    """One new token.

    Attributes
    ----------
    sequence : int
        Whose: number of the prompt times n plus number of the sample.
    token : int
    logprob : float
        Under the model itself (temperature 1, no filter), in nats.
    margin : float or None
        Greedy only: how far its logit stands above the best other one, in nats.
    top_logprobs : list of (int, float)
        The likeliest tokens under the model itself.
    drafted : int or None
        At the first token of each forward pass: how many proposed tokens the pass read.
    accepted : bool
        Whether this token had been proposed.
    text : str
        What has become certain of the text.
    finish : {"stop", "length"} or None
        None while it goes on.
    stop : int, str or None
        The stop id or stop string that fired. A stop id is not part of the result, the token
        that completes a stop string is.
    """

    sequence: int
    token: int
    logprob: float
    margin: float | None
    top_logprobs: list[tuple[int, float]]
    drafted: int | None
    accepted: bool
    text: str
    finish: FinishReason | None
    stop: int | str | None


@dataclass
class Generation:
    """One continuation.

    Attributes
    ----------
    prompt_ids : list of int
        The prompt; without what ``overflow="truncate-left"`` cut off.
    ids : list of int
        The new tokens, without a stop id, with the token that completed a stop string.
    logprobs : list of float
        Of each new token under the model itself (temperature 1, no filter), in nats.
    margins : list of float
        Greedy decoding only: how far each token's logit stood above the best other one after the
        filters, in nats. Where this is smaller than rounding, another implementation may choose
        the other token.
    top_logprobs : list of list of (int, float)
        The likeliest tokens at each place and their log-probabilities, if asked for.
    finish_reason : {"stop", "length", "interrupted"} or None
        A stop id or stop string came, `max_new_tokens` were made, or Ctrl-C came; None while it
        goes on.
    stop : int, str or None
        The stop id or stop string that fired.
    text : str or None
        The new text, without a stop string; None without a tokenizer.
    passes, drafted, accepted : int
        Forward passes that made these tokens; of prompt lookup, how many tokens were proposed
        and how many of these were right.
    score : float or None
        Beam search only: what the beams are ranked by.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: int | str | None = None
    text: str | None = None
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    score: float | None = None

    def add(self, step: Step) -> None:
        """Take one more token."""
        if step.drafted is not None:
            self.passes += 1
            self.drafted += step.drafted
        self.accepted += step.accepted
        if self.text is not None:
            self.text += step.text
        if step.finish is not None:
            self.finish_reason, self.stop = step.finish, step.stop
        if isinstance(step.stop, int):
            return
        self.ids.append(step.token)
        self.logprobs.append(step.logprob)
        if step.margin is not None:
            self.margins.append(step.margin)
        if step.top_logprobs:
            self.top_logprobs.append(step.top_logprobs)


class Likeliest(NamedTuple):
    """The greedy choice, and how far it stands above the best other token, in nats."""

    token: int
    margin: float


class Running:
    """One continuation: its tokens so far, its randomness, its text, and while it runs its cache.

    Parameters
    ----------
    number : int
        See :class:`Step`.
    prompt : (T,) ndarray of int
    settings : Settings
    filters : sequence of Filter
        Those of the settings.
    config : Config
    text : TextStream or None
    """

    cache: Cache  # there is none before its turn comes

    def __init__(
        self,
        number: int,
        prompt: Array,
        settings: Settings,
        filters: Sequence[Filter],
        config: Config,
        text: TextStream | None,
    ):
        self.number, self.settings, self.filters, self.text = number, settings, filters, text
        self.of, sample = divmod(number, settings.n)  # which prompt it continues
        self.prompt = self.length = len(prompt)
        self.positions = min(config.n_ctx, len(prompt) + settings.max_new_tokens - 1)
        self.buffer = prompt  # grows as tokens come; max_new_tokens may be any number
        # The place of the token that stands at position 0; more than 0 once the window has slid.
        self.start = self.begin = max(0, len(prompt) - config.n_ctx)
        self.keep = kept(settings, config)
        # Greedy decoding draws nothing. A generator of its own for each sample: what is drawn
        # never depends on the batch around it.
        self.rng = _generator(settings.seed, sample) if settings.temperature else None
        self.lookup = Lookup() if settings.lookup else None
        self.finished = False

    @property
    def ids(self) -> Array:
        """The prompt and the new tokens."""
        return self.buffer[: self.length]

    @property
    def made(self) -> int:
        """How many new tokens there are."""
        return self.length - self.prompt

    @property
    def unread(self) -> Array:
        """The tokens that are not in the cache; at least the last one."""
        return self.ids[self.start + self.cache.length :]

    @property
    def common(self) -> int:
        """How many tokens all samples of its prompt read: all of it but the last."""
        return self.prompt - self.begin - 1

    @property
    def holds_prompt(self) -> bool:
        """Whether its cache begins with these."""
        return self.start == self.begin and self.cache.length >= self.common

    def propose(self) -> Array:
        """Make room to read on, and guess what comes."""
        if self.length - self.start > self.positions:
            self.start = self.length - self.keep
            # Positions are learned and baked into the keys, so the window is read anew.
            self.cache.truncate(0)
        if self.lookup is None:
            return self.buffer[:0]
        most = min(
            self.settings.lookup,
            self.settings.max_new_tokens - self.made - 1,
            self.positions - (self.length - self.start),
        )
        return self.lookup.propose(self.ids, most)

    def take(
        self,
        logits: Array,
        proposed: Array,
        likeliest: Sequence[Likeliest] | None,
        normalizers: Sequence[tuple[float, float]] | None = None,
    ) -> list[Step]:
        """Choose a token from each row of logits for as long as the proposals turn out right.

        Row 0 follows the text so far, row k the k-th proposed token; so it counts only if that
        token is the one that was chosen. Each token is chosen, or drawn, exactly as it would
        have been without proposals, and so the result is the same.

        Parameters
        ----------
        logits : (1 + K, V) ndarray
        proposed : (K,) ndarray of int
        likeliest : sequence of Likeliest or None
            What is chosen from each row, if that is known already.
        normalizers : sequence of (float, float) or None
            Of each row, if they are known already.

        Returns
        -------
        list of Step
        """
        steps: list[Step] = []
        for k, row in enumerate(logits):
            token, above = self._next(row) if likeliest is None else likeliest[k]
            self._append(token)
            accepted = k < len(proposed) and token == int(proposed[k])
            drafted = len(proposed) if k == 0 else None
            logprob = log_probability(row, token, normalizers[k] if normalizers else None)
            steps.append(self._step(row, token, logprob, above, drafted, accepted))
            if self.finished or not accepted:
                break
        self.cache.truncate(self.length - 1 - self.start)
        return steps

    def _append(self, token: int) -> None:
        if self.length == len(self.buffer):
            self.buffer = np.concatenate([self.buffer, np.empty(self.length + 64, np.intp)])
        self.buffer[self.length] = token
        self.length += 1
        if self.lookup is not None:
            self.lookup.see(token)

    def _next(self, logits: Array) -> tuple[int, float | None]:
        """The token that comes next, and how clear that is."""
        if self.filters or self.rng is not None:
            require_finite(logits)  # before a filter can hide what is not a number
            logits = logits.astype(np.float64)  # a low temperature would overflow float32
            logits = filtered(self.filters, logits, History(self.ids, self.prompt))
            if logits.max() == -np.inf:
                names = ", ".join(filter.name for filter in self.filters)
                raise ArgumentError(f"the settings rule out every token ({names}); allow more")
        token = choose(logits, self.rng)
        return token, margin(logits, token) if self.rng is None else None

    def _step(
        self,
        logits: Array,
        token: int,
        logprob: float,
        above: float | None,
        drafted: int | None,
        accepted: bool,
    ) -> Step:
        """What is to be said about a token; whether it is the last one."""
        settings, text, made = self.settings, "", self.made
        stop: int | str | None = token if token in settings.stop_ids else None
        if self.text is not None and stop is None:
            text = self.text.feed(token, may_stop=made >= settings.min_new_tokens)
            stop = self.text.stopped
        finish: FinishReason | None = "length" if made == settings.max_new_tokens else None
        finish = finish if stop is None else "stop"
        self.finished = finish is not None
        if self.finished and self.text is not None:
            text += self.text.end()
        return Step(
            self.number,
            token,
            logprob,
            above,
            top_logprobs(logits, settings.top_logprobs) if settings.top_logprobs else [],
            drafted,
            accepted,
            text,
            finish,
            stop,
        )


def kept(settings: Settings, config: Config) -> int:
    """With how many tokens a window that has slid begins."""
    return settings.keep or max(1, config.n_ctx // 2)


def _generator(seed: int | None, sample: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(sample,)))
