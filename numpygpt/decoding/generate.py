"""The decoding loop: read, choose, append, repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..cache import Cache
from ..errors import ArgumentError, ContextError
from ..feed import Feeder
from ..params import Array, Config, Params
from ..text import TextStream
from .lookup import draft
from .order import History, filtered
from .sample import choose, log_probability, margin, require_finite, top_logprobs
from .settings import Settings

__all__ = ["FinishReason", "Generation", "Step", "decode", "fitted"]

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


def decode(
    prompts: Sequence[Array],
    settings: Settings,
    params: Params,
    config: Config,
    new_text: Callable[[], TextStream] | None = None,
) -> Iterator[list[Step]]:
    """Continue some prompts together.

    The prompts need not have one length: rows are packed, nothing is padded, and a sequence that
    is finished leaves. The last token of a sequence is never read, so a prompt and its
    continuation may together have ``n_ctx + 1`` tokens.

    Parameters
    ----------
    prompts : sequence of (T,) ndarray of int
        At least one id each. They must fit; see :func:`fitted`.
    settings : Settings
    params : Params
    config : Config
    new_text : function, optional
        Makes the decoder of one sequence's text. Stop strings need it.

    Returns
    -------
    iterator of list of Step
        Each list has the new tokens of every sequence that was running: one each, or more where
        a forward pass confirmed proposed ones.
    """
    if not settings.max_new_tokens or not prompts:
        return
    running = [
        _Sequence(i * settings.n + sample, prompt, sample, settings, config, params, new_text)
        for i, prompt in enumerate(prompts)
        for sample in range(settings.n)
    ]
    rows = sum(sequence.most_rows for sequence in running)
    capacity = max(sequence.cache.capacity for sequence in running)
    feeder = Feeder(params, config, rows, capacity, settings.chunk)
    if settings.n > 1:
        _share(running, settings.n, feeder)
    while running:
        proposals = [sequence.propose() for sequence in running]
        new = [
            np.concatenate([sequence.unread, proposed])
            for sequence, proposed in zip(running, proposals, strict=True)
        ]
        counts = [1 + len(proposed) for proposed in proposals]
        caches = [sequence.cache for sequence in running]
        logits = feeder.logits(feeder.last(new, caches, counts))
        parts = np.split(logits, np.cumsum(counts)[:-1])
        yield [
            step
            for sequence, part, proposed in zip(running, parts, proposals, strict=True)
            for step in sequence.take(part, proposed)
        ]
        running = [sequence for sequence in running if not sequence.finished]


def fitted(prompt: Array, settings: Settings, config: Config) -> Array:
    """The prompt, or as much of it as ``settings.overflow`` leaves.

    Parameters
    ----------
    prompt : (T,) ndarray of int
    settings : Settings
    config : Config

    Returns
    -------
    (T,) ndarray of int

    Raises
    ------
    ContextError
        If it and the new tokens do not fit, and must.
    ArgumentError
        If `keep` is more than n_ctx.
    """
    new_tokens, most = settings.max_new_tokens, config.n_ctx + 1
    if settings.keep is not None and settings.keep > config.n_ctx:
        raise ArgumentError(f"keep must be from 1 to n_ctx = {config.n_ctx}, not {settings.keep}")
    room = most - new_tokens
    if settings.overflow == "slide" or len(prompt) <= room:
        return prompt
    if settings.overflow == "truncate-left":
        if room < 1:
            raise ContextError(
                f"{new_tokens} new tokens leave no room for a prompt in {config.n_ctx} positions; "
                f"ask for at most {config.n_ctx}, or let the window slide (overflow='slide')"
            )
        return prompt[-room:]
    fits = most - len(prompt)
    raise ContextError(
        f"{len(prompt)} prompt + {new_tokens} new tokens are more than the {most} that "
        f"{config.n_ctx} positions allow; shorten the prompt"
        + (f", ask for at most {fits}" if fits > 0 else "")
        + ", or choose what gives way: overflow='truncate-left' or 'slide'"
    )


class _Sequence:
    """One running continuation: its tokens so far, its cache, its randomness, its text."""

    def __init__(
        self,
        number: int,
        prompt: Array,
        sample: int,
        settings: Settings,
        config: Config,
        params: Params,
        new_text: Callable[[], TextStream] | None,
    ):
        self.number, self.settings, self.prompt = number, settings, len(prompt)
        self.filters = settings.filters
        self.positions = min(config.n_ctx, len(prompt) + settings.max_new_tokens - 1)
        self.cache = Cache(config, self.positions, params.dtype)
        self.buffer = prompt  # grows as tokens come; max_new_tokens may be any number
        self.length = len(prompt)
        # The place of the token that stands at position 0; more than 0 once the window has slid.
        self.start = max(0, len(prompt) - config.n_ctx)
        self.keep = settings.keep or max(1, config.n_ctx // 2)
        # The first pass reads the prompt, later ones a token, or what is kept of a window.
        longest = max(len(prompt), self.keep) if settings.overflow == "slide" else len(prompt)
        self.most_rows = min(self.positions, longest + settings.lookup)
        # Greedy decoding draws nothing. A generator of its own for each sample: what is drawn
        # never depends on the batch around it.
        self.rng = _generator(settings.seed, sample) if settings.temperature else None
        self.text = new_text() if new_text is not None else None
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

    def propose(self) -> Array:
        """Make room to read on, and guess what comes."""
        if self.length - self.start > self.positions:
            self.start = self.length - self.keep
            # Positions are learned and baked into the keys, so the window is read anew.
            self.cache.truncate(0)
        most = min(
            self.settings.lookup,
            self.settings.max_new_tokens - self.made - 1,
            self.positions - (self.length - self.start),
        )
        return draft(self.ids, most) if most > 0 else self.buffer[:0]

    def take(self, logits: Array, proposed: Array) -> Iterator[Step]:
        """Choose a token from each row of logits for as long as the proposals turn out right.

        Row 0 follows the text so far, row k the k-th proposed token; so it counts only if that
        token is the one that was chosen. Each token is chosen, or drawn, exactly as it would
        have been without proposals, and so the result is the same.
        """
        for k, row in enumerate(logits):
            token = self._next(row)
            self._append(token)
            accepted = k < len(proposed) and token == int(proposed[k])
            yield self._step(row, token, len(proposed) if k == 0 else None, accepted)
            if self.finished or not accepted:
                break
        self.cache.truncate(self.length - 1 - self.start)

    def _append(self, token: int) -> None:
        if self.length == len(self.buffer):
            self.buffer = np.concatenate([self.buffer, np.empty(self.length + 64, np.intp)])
        self.buffer[self.length] = token
        self.length += 1

    def _next(self, logits: Array) -> int:
        """The token that comes next."""
        if self.filters or self.rng is not None:
            require_finite(logits)  # before a filter can hide what is not a number
            logits = logits.astype(np.float64)  # a low temperature would overflow float32
            logits = filtered(self.filters, logits, History(self.ids, self.prompt))
            if logits.max() == -np.inf:
                names = ", ".join(filter.name for filter in self.filters)
                raise ArgumentError(f"the settings rule out every token ({names}); allow more")
        token = choose(logits, self.rng)
        self.margin = margin(logits, token) if self.rng is None else None
        return token

    def _step(self, logits: Array, token: int, drafted: int | None, accepted: bool) -> Step:
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
            log_probability(logits, token),
            self.margin,
            top_logprobs(logits, settings.top_logprobs) if settings.top_logprobs else [],
            drafted,
            accepted,
            text,
            finish,
            stop,
        )


def _generator(seed: int | None, sample: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(sample,)))


def _share(running: Sequence[_Sequence], n: int, feeder: Feeder) -> None:
    """Read every prompt but its last token once, for all its samples."""
    first = [sequence for sequence in running[::n] if len(sequence.unread) > 1]
    if first:
        feeder.last(
            [sequence.unread[:-1] for sequence in first], [sequence.cache for sequence in first]
        )
    for i, sequence in enumerate(running):
        if i % n:
            sequence.cache.copy_from(running[i - i % n].cache)
