"""Beam search: keep the few most probable texts at every step instead of only the best one.

A beam is a continuation of the prompt with the sum of its log-probabilities. At each step every
running beam is continued by every token, and the best of all these candidates run on. A candidate
that ends with a stop token, or has all tokens it may have, is finished. Finished candidates are
ranked by ``sum / length ** length_penalty``, since a sum alone favours short texts.

In all that decides which texts are found this follows ``generate(num_beams=...)`` of Hugging
Face's transformers 5. That adds up in float32, so there two texts may change places whose scores
are equal but for rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..arguments import as_float, told, whole
from ..cache import Cache
from ..errors import ArgumentError, ContextError, Interrupted
from ..feed import Feeder
from ..params import Array, Config, Params
from .generate import FinishReason, Generation
from .order import Filter, History, filtered
from .sample import largest, require_finite
from .settings import Settings

__all__ = ["Beams", "beam_search", "require_usable"]

# A text of a million tokens to this power is still a float64.
STEEPEST = 50

# Each has a cache of its own.
MOST_BEAMS = 10_000

# The settings that a search along several paths has a use for.
USED = ("max_new_tokens", "min_new_tokens", "stop_ids", "no_repeat_ngram", "banned", "chunk")


class Beam(NamedTuple):
    """A continuation of the prompt.

    Attributes
    ----------
    ids : tuple of int
        The new tokens.
    logprobs : tuple of float
        Of each under the model itself, in nats.
    total : float
        Their sum.
    cache : Cache
        Has read everything but the last token. Candidates with the same parent share one.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    cache: Cache


@dataclass(frozen=True)
class Beams:
    """What a beam search has beside :class:`~numpygpt.decoding.Settings`.

    Parameters
    ----------
    beams : int
        How many beams run at a time, 1 to 10000, and how many finished ones are kept.
    n : int
        How many of these are returned, 1 to `beams`.
    length_penalty : float
        The power p in the score, sum of log-probabilities / length ** p. The sum is negative, so
        1, the mean, favours longer texts than 0 does. From -50 to 50.
    early_stopping : bool or "never"
        When to end the search once `beams` texts are finished. True: at once. False: when the
        best running beam, were it to end at its present length, would not beat the worst of
        them. ``"never"``: when it could not beat it at any length.

    Raises
    ------
    ArgumentError
        If a value is out of range.

    Examples
    --------
    >>> Beams(beams=4, n=2)
    Beams(beams=4, n=2, length_penalty=1.0, early_stopping=False)
    """

    beams: int = 4
    n: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "beams", whole("beams", self.beams, 1, MOST_BEAMS))
        object.__setattr__(self, "n", whole("n", self.n, 1, self.beams, "beams"))
        p, early = as_float(self.length_penalty), self.early_stopping
        if not abs(p) <= STEEPEST:
            raise ArgumentError(
                f"length_penalty must be a number from -{STEEPEST} to {STEEPEST}, "
                f"not {told(self.length_penalty)}"
            )
        object.__setattr__(self, "length_penalty", p)
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise ArgumentError(f"early_stopping must be True, False or 'never', not {told(early)}")

    def score(self, beam: Beam) -> float:
        """What finished beams are ranked by."""
        return beam.total / math.pow(len(beam.ids), self.length_penalty)


def require_usable(settings: Settings) -> None:
    """Refuse settings that would have no effect on a beam search.

    Raises
    ------
    ArgumentError
    """
    for field in dataclasses.fields(Settings):
        value = getattr(settings, field.name)
        if field.name not in USED and value not in (field.default, (), {}):
            raise ArgumentError(
                f"{field.name} has no effect on beam search, leave it out; these have: "
                f"{', '.join(USED)}"
            )


def beam_search(
    prompt: Array, settings: Settings, search: Beams, params: Params, config: Config
) -> list[Generation]:
    """Search for the continuations with the best scores.

    Parameters
    ----------
    prompt : (T,) ndarray of int
        At least one id.
    settings : Settings
        What these rule out is not a candidate. Those of sampling have no use here.
    search : Beams
    params : Params
    config : Config

    Returns
    -------
    list of Generation
        The `n` best, best first; fewer if there are not so many. ``score`` counts the stop token
        that ended a text, though ``ids`` and ``logprobs`` leave it out.

    Raises
    ------
    ContextError
        At once, if the prompt and the new tokens do not fit.
    ArgumentError
        If a setting would have no effect, or all together rule out every token of every beam.
    Interrupted
        After Ctrl-C; its ``results`` are the best so far, finished or not.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> prompt = np.array(model.tokenizer.encode("ROMEO:"))
    >>> settings, search = Settings(max_new_tokens=8), Beams(beams=3, n=2)
    >>> best, second = beam_search(prompt, settings, search, model.params, model.config)
    >>> best.score > second.score
    True
    """
    require_usable(settings)
    new_tokens, filters = settings.max_new_tokens, settings.filters
    capacity = len(prompt) + new_tokens - 1  # the last token is never read
    if capacity > config.n_ctx:
        raise ContextError(
            f"{len(prompt)} prompt + {new_tokens} new tokens are more than the "
            f"{config.n_ctx + 1} that {config.n_ctx} positions allow; shorten the prompt or ask "
            f"for fewer"
        )
    if not new_tokens:
        return [Generation(prompt.tolist(), finish_reason="length", score=0.0)]
    # So many candidates that `beams` of them do not end with a stop token.
    width = search.beams * (1 + len(set(settings.stop_ids)))
    feeder = Feeder(params, config, max(len(prompt), search.beams), capacity, settings.chunk)
    new_cache = functools.partial(Cache, config, capacity, params.dtype)
    running = [Beam((), (), 0.0, new_cache())]
    finished: list[Beam] = []
    try:
        for made in range(1, new_tokens + 1):
            candidates = _candidates(prompt, running, feeder, filters, width)
            over = [made == new_tokens or beam.ids[-1] in settings.stop_ids for beam in candidates]
            # Only the very best may finish. Those after them are there to run on in their place.
            best = zip(candidates[: search.beams], over, strict=False)
            finished += [beam for beam, is_over in best if is_over]
            finished = sorted(finished, key=search.score, reverse=True)[: search.beams]
            going = [beam for beam, is_over in zip(candidates, over, strict=True) if not is_over]
            if not going or _settled(going[0], finished, search, new_tokens):
                break
            running = _separate(going[: search.beams], running, new_cache)
    except KeyboardInterrupt:
        found = finished + [beam for beam in running if beam.ids]
        found = sorted(found, key=search.score, reverse=True)[: search.n]
        raise Interrupted([_generation(prompt, beam, settings, search) for beam in found]) from None
    if not finished:
        raise ArgumentError("the settings rule out every token of every beam; allow more")
    return [_generation(prompt, beam, settings, search) for beam in finished[: search.n]]


def _candidates(
    prompt: Array,
    running: Sequence[Beam],
    feeder: Feeder,
    filters: Sequence[Filter],
    width: int,
) -> list[Beam]:
    """The `width` best continuations of the running beams by one token, best first.

    Among equals those of the lower beam come first, then the lower ids. What the filters rule
    out is none.
    """
    new = [np.array(beam.ids[-1:]) if beam.ids else prompt for beam in running]
    logits = feeder.logits(feeder.last(new, [beam.cache for beam in running]))
    logprobs = np.stack([_log_softmax(row) for row in logits])  # (B, V)
    totals = np.stack(
        [
            beam.total + filtered(filters, row, _history(prompt, beam))
            for row, beam in zip(logprobs, running, strict=True)
        ]
    )  # (B, V)
    candidates = []
    for place in largest(totals.ravel(), min(width, totals.size)).tolist():
        row, token = divmod(place, totals.shape[1])
        parent, total = running[row], float(totals[row, token])
        if total > -math.inf:
            own = (*parent.logprobs, float(logprobs[row, token]))
            candidates.append(Beam((*parent.ids, token), own, total, parent.cache))
    return candidates


def _history(prompt: Array, beam: Beam) -> History:
    return History(np.concatenate([prompt, np.array(beam.ids, np.intp)]), len(prompt))


def _log_softmax(logits: Array) -> Array:
    """Logits (V,) -> log-probabilities (V,) in float64, in nats."""
    shifted: Array = logits.astype(np.float64) - require_finite(logits)
    with np.errstate(under="ignore"):  # a probability below 1e-308 is 0
        shifted -= np.log(np.exp(shifted).sum())
    return shifted


def _settled(best: Beam, finished: Sequence[Beam], search: Beams, new_tokens: int) -> bool:
    """Whether what is running, `best` first, need not run on."""
    if len(finished) < search.beams:
        return False
    if search.early_stopping is True:
        return True
    # A total only falls. What a long text divides it by makes up for that in part if p > 0.
    longest = search.early_stopping == "never" and search.length_penalty > 0
    length = new_tokens if longest else len(best.ids)
    return best.total / math.pow(length, search.length_penalty) <= search.score(finished[-1])


def _separate(
    going: Sequence[Beam], running: Sequence[Beam], new_cache: Callable[[], Cache]
) -> list[Beam]:
    """Give each beam a cache of its own.

    The first child of a beam goes on with its cache. Others need a copy, into the cache of a beam
    that has no children if there is one.
    """
    free = list({beam.cache for beam in running} - {beam.cache for beam in going})
    taken: set[Cache] = set()
    separate = []
    for beam in going:
        cache = beam.cache
        if cache in taken:
            cache = free.pop() if free else new_cache()
            cache.copy_from(beam.cache)
        taken.add(cache)
        separate.append(beam._replace(cache=cache))
    return separate


def _generation(prompt: Array, beam: Beam, settings: Settings, search: Beams) -> Generation:
    stopped = beam.ids[-1] in settings.stop_ids
    made = len(beam.ids) - stopped
    full = made == settings.max_new_tokens
    reason: FinishReason = "stop" if stopped else "length" if full else "interrupted"
    return Generation(
        prompt.tolist(),
        list(beam.ids[:made]),
        list(beam.logprobs[:made]),
        finish_reason=reason,
        stop=beam.ids[-1] if stopped else None,
        passes=len(beam.ids),
        score=search.score(beam),
    )
