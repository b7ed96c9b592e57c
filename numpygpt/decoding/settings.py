"""How to decode: every setting, its meaning and its range, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np

from ..arguments import MOST, as_float, as_integer, told, whole
from ..errors import ArgumentError, TokenError
from ..feed import CHUNK
from ..text import stop_strings
from .order import Filter, chain

if TYPE_CHECKING:
    from .generate import Step

__all__ = ["Options", "Overflow", "Settings"]

Overflow: TypeAlias = Literal["error", "truncate-left", "slide"]
OVERFLOWS = ("error", "truncate-left", "slide")

# All results of a prompt are returned together.
MOST_SAMPLES = 10_000

# Each sequence that runs has a cache of its own.
MOST_RUNNING = 10_000

# Whole numbers and their ranges. None is allowed where that is the default.
INTEGERS = {
    "max_new_tokens": (0, MOST),
    "min_new_tokens": (0, MOST),
    "top_k": (1, MOST),
    "penalty_window": (1, MOST),
    "no_repeat_ngram": (1, MOST),
    "seed": (0, MOST),
    "n": (1, MOST_SAMPLES),
    "top_logprobs": (0, MOST),
    "lookup": (0, MOST),
    "keep": (1, MOST),
    "batch": (1, MOST_RUNNING),
    "chunk": (1, MOST),
}


# Real numbers: what is allowed, and that in words. What is nearer to 0 or larger overflows.
REALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda t: t == 0 or 1e-100 <= t <= 1e308, "0 (greedy) or from 1e-100 to 1e308"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "min_p": (lambda p: 0 <= p <= 1, "from 0 to 1"),
    "typical_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "repetition_penalty": (lambda x: 1e-100 <= x <= 1e100, "from 1e-100 to 1e100"),
    "presence_penalty": (lambda x: abs(x) <= 1e9, "from -1e9 to 1e9"),
    "frequency_penalty": (lambda x: abs(x) <= 1e9, "from -1e9 to 1e9"),
}

# What rules out unlikely tokens has no effect on the likeliest one.
SAMPLING_ONLY = ("top_k", "top_p", "min_p", "typical_p")


class Options(TypedDict, total=False):
    """The settings as keyword arguments, for type checkers. :class:`Settings` explains them.

    ``n`` is not among them: what it changes is the type of the result.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_window: int | None
    no_repeat_ngram: int | None
    logit_bias: Mapping[int, float]
    banned: Iterable[int | Sequence[int]]
    forced: Mapping[int, int]
    order: str | Sequence[str]
    seed: int | None
    stop: str | Iterable[str]
    stop_ids: Iterable[int] | None
    top_logprobs: int
    lookup: int
    overflow: Overflow
    keep: int | None
    batch: int | None
    chunk: int
    on_step: Callable[[list[Step]], None] | None


@dataclass(frozen=True)
class Settings:
    """How to decode. None means off.

    Settings that cannot have an effect together, such as top_k without a temperature, are refused.

    Parameters
    ----------
    max_new_tokens : int
        Stop after so many tokens at the latest; from 0.
    min_new_tokens : int
        Until so many tokens are made, stop ids are ruled out and stop strings do not stop. From 0
        to `max_new_tokens`.
    temperature : float, optional
        Divides the logits before a token is drawn. None or 0 is greedy: the largest logit, the
        lowest id among equal ones. From 1e-100 to 1e308.
    top_k : int, optional
        Draw from the k likeliest tokens only; exactly k, among equals the lower ids. From 1.
    top_p : float, optional
        Draw from the smallest set of likeliest tokens whose probabilities reach p; the token
        that crosses p is kept. Above 0, at most 1.
    min_p : float, optional
        Draw from the tokens that are at least p times as likely as the likeliest. From 0 to 1.
    typical_p : float, optional
        Draw from the smallest set that reaches p of those whose surprise is nearest to the
        entropy. Above 0, at most 1.
    repetition_penalty : float, optional
        Divides the positive logits of tokens in the prompt or the new text, multiplies the
        negative ones. Above 0; 1 changes nothing.
    presence_penalty : float, optional
        Is subtracted from the logit of each token of the new text, in nats. From -1e9 to 1e9.
    frequency_penalty : float, optional
        Is subtracted from the logit of each token of the new text once for each time it occurs,
        in nats. From -1e9 to 1e9.
    penalty_window : int, optional
        The three penalties look at so many last tokens, from 1; at all of them if None (64 with
        ``order="llama.cpp"``).
    no_repeat_ngram : int, optional
        No run of n tokens comes twice, prompt included. From 1.
    logit_bias : mapping of int to float
        Is added to the logits of these tokens, in nats: from -1e9 to 1e9, or -inf, which rules
        one out.
    banned : iterable of int or sequence of int
        Tokens, or sequences of tokens, that never come.
    forced : mapping of int to int
        New tokens that are given: number of the new token (from 0; negative numbers count from
        the end of `max_new_tokens`) to its id.
    order : str or sequence of str
        In which order the filters act: a name in :data:`numpygpt.decoding.ORDERS`, or the names
        of filters.
    seed : int, optional
        Makes the draws repeatable; from 0. Every sample has a generator of its own, made from the
        seed and the number of the sample, so it never depends on the batch around it. Prompts of
        one list thus draw the same numbers, and the same prompt twice gives the same text twice;
        give `n`, or call again with another seed, where texts must be independent. Fresh
        randomness if None; greedy decoding draws nothing.
    n : int
        Samples for each prompt, each from a generator of its own; 1 to 10000.
    stop : str or iterable of str
        Texts that end a sequence. They are found across the borders of tokens and are not part
        of its text.
    stop_ids : iterable of int
        Tokens that end a sequence. They are not part of it.
    top_logprobs : int
        Keep so many likeliest tokens, with their log-probabilities, for each new token. From 0.
    lookup : int
        Propose up to so many tokens at a time from an earlier place of the text that goes on from
        the same three tokens, and read them in one pass. The result is the same, up to the
        rounding of the logits; with ``chunk=1``, exactly. Pays where text repeats itself; where
        it does not, guesses are only watched until they come true (see
        :mod:`numpygpt.decoding.lookup`). From 0, which is off; a pass with proposals takes as
        long as three or so without, so 10 is a good start, and 1 or 2 cannot pay.
    overflow : {"error", "truncate-left", "slide"}
        What to do if the prompt and `max_new_tokens` exceed the positions of the model: refuse,
        cut off the beginning of the prompt, or read the last `keep` tokens anew whenever all
        positions are taken.
    keep : int, optional
        How many, 1 to n_ctx; half of n_ctx if None. With n_ctx every token sees as much as
        it can, and costs a pass over all of it.
    batch : int, optional
        Most sequences that run together, 1 to 10000, samples counted one by one. Others wait
        until one is finished. Each that runs takes ``2 * n_layer * n_embd`` numbers for every
        position it needs: those of the longest prompt and the new tokens, or n_ctx where prompts
        come one by one. If None, as many as take 1 GiB, at least 1 and at most 32. Changes
        nothing but rounding; with ``chunk=1``, nothing.
    chunk : int
        Most rows in one forward pass, from 1; with 1 the result does not depend on the batch
        around it, to the last bit.

    Raises
    ------
    ArgumentError
        If a value is out of range, or would have no effect beside the others.
    TokenError
        If what should be a token id is none.

    Examples
    --------
    >>> settings = Settings(temperature=0.8, top_k=40, top_p=0.9)
    >>> [f"{filter.name} {filter.values}" for filter in settings.filters]
    ['temperature 0.8', 'top_k 40', 'top_p 0.9']
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_window: int | None = None
    no_repeat_ngram: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned: tuple[tuple[int, ...], ...] = ()
    forced: Mapping[int, int] = field(default_factory=dict)
    order: str | tuple[str, ...] = "numpygpt"
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    lookup: int = 0
    overflow: Overflow = "error"
    keep: int | None = None
    batch: int | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        for name, bounds in INTEGERS.items():
            value = getattr(self, name)
            if value is not None or self._default(name) is not None:
                self._set(name, whole(name, value, *bounds))
        for name, (allowed, words) in REALS.items():
            self._set(name, _real(name, getattr(self, name), allowed, words))
        if not isinstance(self.overflow, str) or self.overflow not in OVERFLOWS:
            raise ArgumentError(
                f"overflow must be 'error', 'truncate-left' or 'slide', not {told(self.overflow)}"
            )
        self._set("stop", stop_strings([self.stop] if isinstance(self.stop, str) else self.stop))
        self._set("stop_ids", tuple(_ids("stop_ids", self.stop_ids)))
        pairs = _pairs("logit_bias", self.logit_bias, "token id to a number", _bias)
        self._set("logit_bias", dict(pairs))
        self._set("banned", _sequences(self.banned))
        self._set("forced", self._forced())
        if not isinstance(self.order, str):
            self._set("order", _names(self.order))
        self._contradictions()
        chain(self)  # refuses an order that does not fit

    @property
    def filters(self) -> tuple[Filter, ...]:
        """What is done to the logits before a token is chosen, in this order."""
        return chain(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the way around `frozen`

    @classmethod
    def _default(cls, name: str) -> Any:
        return cls.__dataclass_fields__[name].default

    def _forced(self) -> dict[int, int]:
        """The forced tokens by their number from the start."""
        forced: dict[int, int] = {}
        for number, token in _pairs("forced", self.forced, "number of a new token to id"):
            i = number + self.max_new_tokens if number < 0 else number
            if not 0 <= i < self.max_new_tokens:
                raise ArgumentError(
                    f"forced: there is no new token {told(number)} among max_new_tokens = "
                    f"{self.max_new_tokens}"
                )
            if forced.setdefault(i, token) != token:
                raise ArgumentError(f"forced: two ids for the new token {i}")
        return forced

    def _contradictions(self) -> None:
        """Refuse what would have no effect: whoever set it expects one."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ArgumentError(
                f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = "
                f"{self.max_new_tokens}"
            )
        if not self.temperature:
            for name in SAMPLING_ONLY:
                if getattr(self, name) is not None:
                    raise ArgumentError(
                        f"{name} = {getattr(self, name)} has no effect on greedy decoding; give a "
                        f"temperature too"
                    )
            if self.n > 1:
                raise ArgumentError(
                    f"n = {self.n} greedy continuations would be equal; give a temperature too"
                )
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.penalty_window is not None and penalties == (None, None, None):
            raise ArgumentError("penalty_window has no effect without a penalty; give one too")
        if self.keep is not None and self.overflow != "slide":
            raise ArgumentError(f"keep = {self.keep} has no effect without overflow='slide'")


def _real(name: str, value: Any, allowed: Callable[[float], bool], words: str) -> float | None:
    if value is None:
        return None
    number = as_float(value)
    if not allowed(number):
        raise ArgumentError(f"{name} must be {words}, not {told(value)}")
    return number


def _ids(name: str, ids: Any) -> list[int]:
    if not _iterable(ids) or isinstance(ids, str | bytes):
        raise ArgumentError(f"{name} must be token ids, not {told(ids)}")
    return [_id(name, i) for i in ids]


def _id(name: str, value: Any) -> int:
    """A token id; whether the model has it is checked where the model is known."""
    number = as_integer(value)
    if number is None:
        raise TokenError(f"{name}: token ids must be integers, not {told(value)}")
    return number


def _sequences(banned: Any) -> tuple[tuple[int, ...], ...]:
    if not _iterable(banned) or isinstance(banned, str | bytes | Mapping):
        raise ArgumentError(f"banned must be token ids or sequences of them, not {told(banned)}")
    sequences = []
    for item in banned:
        nested = isinstance(item, list | tuple | range) or np.ndim(item) == 1
        ids = tuple(_ids("banned", item)) if nested else (_id("banned", item),)
        if not ids:
            raise ArgumentError("banned: a sequence of no tokens would rule out everything")
        sequences.append(ids)
    return tuple(sequences)


def _bias(name: str, value: Any) -> float:
    number = as_float(value)
    if not (number == -math.inf or abs(number) <= 1e9):
        raise ArgumentError(f"{name} must be numbers from -1e9 to 1e9, or -inf, not {told(value)}")
    return number


def _iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not (isinstance(value, np.ndarray) and not value.ndim)


def _names(order: Any) -> tuple[str, ...]:
    names = tuple(order) if _iterable(order) else (order,)
    for name in names:
        if not isinstance(name, str):
            raise ArgumentError(
                f"order must be a name or a sequence of filter names, not {told(order)}"
            )
    return names


def _pairs(
    name: str, mapping: Any, words: str, value: Callable[[str, Any], Any] = _id
) -> list[tuple[int, Any]]:
    if not isinstance(mapping, Mapping):
        raise ArgumentError(f"{name} must be a mapping from {words}, not {told(mapping)}")
    return [(_id(name, key), value(name, item)) for key, item in mapping.items()]
