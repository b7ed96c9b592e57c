"""The decoding loop: read, choose, append, repeat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..cache import Cache
from ..errors import ArgumentError, ContextError
from ..feed import CHUNK, Feeder
from ..params import Array, Config, Params
from .filters import temperature, top_k
from .sample import choose, log_probability, require_finite

__all__ = ["Generation", "Settings", "Step", "decode"]

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class Settings:
    """How to decode.

    Parameters
    ----------
    max_new_tokens : int
    temperature : float, optional
        Greedy if None or 0.
    top_k : int, optional
        Draw from the k likeliest tokens only.
    seed : int, optional
        Of the ``numpy.random.Generator`` that every sequence has for itself, so the same prompt
        twice in a batch gives the same text twice. Fresh randomness if None; greedy decoding
        draws nothing.
    stop_ids : tuple of int
        Tokens that end a sequence; they are not part of its text.
    chunk : int
        Most rows in one forward pass; 1 makes the result independent, bit for bit, of batches.

    Raises
    ------
    ArgumentError
        If a value is out of range, or `top_k` is given without a temperature.
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        for name, least in [("max_new_tokens", 0), ("top_k", 1), ("seed", 0), ("chunk", 1)]:
            value = getattr(self, name)
            if value is None and name in ("top_k", "seed"):
                continue
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name} must be an integer from {least} up, not {value!r}")
            # NumPy's integers wrap around in arithmetic; Python's do not.
            object.__setattr__(self, name, int(value))
        t = self.temperature
        if t is not None:
            number = isinstance(t, int | float | np.number) and not isinstance(t, bool)
            if not number or not (t == 0 or 1e-100 <= t <= 1e308):
                raise ArgumentError(
                    f"temperature must be 0 (greedy) or a positive number, not {str(t)[:40]}"
                )
            object.__setattr__(self, "temperature", float(t))
        if self.top_k is not None and not self.temperature:
            raise ArgumentError(
                f"top_k = {self.top_k} has no effect on greedy decoding; give a temperature too"
            )

    @property
    def filters(self) -> list[Callable[[Array], Array]]:
        """What is done to the logits before a token is drawn, in this order."""
        chain: list[Callable[[Array], Array]] = []
        if self.temperature:
            chain.append(functools.partial(temperature, t=self.temperature))
        if self.top_k:
            chain.append(functools.partial(top_k, k=self.top_k))
        return chain


@dataclass
class Generation:
    """One finished continuation.

    Attributes
    ----------
    prompt_ids : list of int
    ids : list of int
        The new tokens, without the one that stopped them.
    logprobs : list of float
        Of each new token under the model itself (temperature 1, no filter), in nats.
    finish_reason : {"stop", "length"}
        A stop token came, or `max_new_tokens` were made.
    text : str or None
        The new tokens as text; None without a tokenizer.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    text: str | None = None


class Step(NamedTuple):
    """One new token: whose, which, and its log-probability; ``finish`` is None while it goes on."""

    sequence: int
    token: int
    logprob: float
    finish: FinishReason | None


def decode(
    prompts: Sequence[Array], settings: Settings, params: Params, config: Config
) -> Iterator[list[Step]]:
    """Continue some prompts together.

    The prompts need not have one length: rows are packed, nothing is padded, and a sequence that
    is finished leaves. The last token of a sequence is never read, so a prompt and its
    continuation may together have ``n_ctx + 1`` tokens.

    Parameters
    ----------
    prompts : sequence of (T,) ndarray of int
        At least one id each.
    settings : Settings
    params : Params
    config : Config

    Returns
    -------
    iterator of list of Step
        Each list has the new token of every sequence that was running.

    Raises
    ------
    ContextError
        At once, if a prompt and its continuation do not fit.
    """
    new_tokens, most = settings.max_new_tokens, config.n_ctx + 1
    for prompt in prompts:
        if len(prompt) + new_tokens > most:
            room = most - len(prompt)
            raise ContextError(
                f"{len(prompt)} prompt + {new_tokens} new tokens are more than the {most} that "
                f"{config.n_ctx} positions allow; shorten the prompt"
                + (f" or ask for at most {room}" if room > 0 else "")
            )
    return _steps(prompts, settings, params, config) if new_tokens and prompts else iter(())


def _steps(
    prompts: Sequence[Array], settings: Settings, params: Params, config: Config
) -> Iterator[list[Step]]:
    new_tokens, filters = settings.max_new_tokens, settings.filters
    lengths = [len(prompt) for prompt in prompts]
    feeder = Feeder(params, config, sum(lengths), max(lengths) + new_tokens - 1, settings.chunk)
    # A generator of its own for each sequence: a sample never depends on the batch around it.
    sampling = bool(settings.temperature)
    rngs = [np.random.default_rng(settings.seed) if sampling else None for _ in prompts]
    caches = [Cache(config, length + new_tokens - 1, params.wpe.dtype) for length in lengths]
    running, new = list(range(len(prompts))), list(prompts)
    for made in range(1, new_tokens + 1):
        logits = feeder.logits(feeder.last(new, [caches[i] for i in running]))
        steps = []
        for i, row in zip(running, logits, strict=True):
            token = _next(row, filters, rngs[i])
            finish: FinishReason | None = "length" if made == new_tokens else None
            finish = "stop" if token in settings.stop_ids else finish
            steps.append(Step(i, token, log_probability(row, token), finish))
        yield steps
        running = [step.sequence for step in steps if step.finish is None]
        new = [np.array([step.token]) for step in steps if step.finish is None]
        if not running:
            return


def _next(
    logits: Array, filters: Sequence[Callable[[Array], Array]], rng: np.random.Generator | None
) -> int:
    if rng is not None:
        require_finite(logits)  # before a filter can hide what is not a number
        logits = logits.astype(np.float64)  # a low temperature would overflow float32
        for keep in filters:
            logits = keep(logits)
    return choose(logits, rng)
