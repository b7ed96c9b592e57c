"""Which filters a run asks for, and in which order they act."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ArgumentError
from ..params import Array
from .filters import (
    ban,
    force,
    frequency_penalty,
    llama_penalties,
    logit_bias,
    min_p,
    no_repeat_ngram,
    presence_penalty,
    repetition_penalty,
    temperature,
    top_k,
    top_k_ties,
    top_p,
    top_p_below,
    typical_p,
    typical_p_ties,
)

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["ORDERS", "Filter", "History", "chain", "filtered"]


class History(NamedTuple):
    """What a filter may know of the sequence.

    Attributes
    ----------
    ids : (T,) ndarray of int
        Prompt and new tokens.
    prompt : int
        How many of them are the prompt.
    """

    ids: Array
    prompt: int


class Filter(NamedTuple):
    """One step of a chain.

    Attributes
    ----------
    name : str
        As in :data:`ORDERS`.
    values : str
        Its settings, to print.
    apply : function
        From logits and :class:`History` to logits.
    """

    name: str
    values: str
    apply: Callable[[Array, History], Array]


def filtered(filters: Sequence[Filter], logits: Array, history: History) -> Array:
    """Logits (V,) after all filters, one after the other."""
    for filter in filters:
        logits = filter.apply(logits, history)
    return logits


# fmt: off
ORDERS: dict[str, tuple[str, ...]] = {
    # That of transformers, which puts temperature and truncation behind everything else.
    "numpygpt": (
        "logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "no_repeat_ngram", "ban", "min_new_tokens", "force",
        "temperature", "top_k", "top_p", "min_p", "typical_p",
    ),
    # generation/utils.py, _get_logits_processor.
    "transformers": (
        "logit_bias", "repetition_penalty", "no_repeat_ngram", "ban", "min_new_tokens", "force",
        "temperature", "top_k_ties", "top_p", "min_p", "typical_p_ties",
    ),
    # common/sampling.cpp puts the bias first; common/common.h has the order of the others.
    "llama.cpp": (
        "logit_bias", "llama_penalties", "top_k", "typical_p", "top_p", "min_p", "temperature",
    ),
    # openai/gpt-2, src/sample.py.
    "openai": ("temperature", "top_k_ties", "top_p_below"),
}
# fmt: on

LLAMA_WINDOW = 64  # penalty_last_n in common/common.h

# The values of each setting, beside None, that leave its filter out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram": (),
    "banned": ((),),
    "min_new_tokens": (0,),
    "forced": ({},),
    "temperature": (0, 1),
    "top_k": (),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
}


class _Kind(NamedTuple):
    """A filter by name: the settings it carries out, and how."""

    settings: tuple[str, ...]
    apply: Callable[[Any, Array, History], Array]


def _seen(s: Any, history: History, window: int | None = None) -> Array:
    """The ids that a penalty on prompt and new tokens looks at."""
    return history.ids[-(s.penalty_window or window or len(history.ids)) :]


def _made(s: Any, history: History) -> Array:
    """The ids that a penalty on new tokens looks at."""
    return history.ids[history.prompt :][-(s.penalty_window or len(history.ids)) :]


def _min_new_tokens(s: Any, logits: Array, history: History) -> Array:
    if len(history.ids) - history.prompt >= s.min_new_tokens:
        return logits
    return ban(logits, history.ids, [(i,) for i in s.stop_ids])


def _force(s: Any, logits: Array, history: History) -> Array:
    token = s.forced.get(len(history.ids) - history.prompt)  # Settings counts from the start
    return logits if token is None else force(logits, token)


def _llama_penalties(s: Any, logits: Array, history: History) -> Array:
    values = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
    repetition, frequency, presence = values
    return llama_penalties(
        logits,
        _seen(s, history, LLAMA_WINDOW),
        1 if repetition is None else repetition,
        frequency or 0,
        presence or 0,
    )


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

KINDS: dict[str, _Kind] = {
    "logit_bias": _Kind(("logit_bias",), lambda s, x, h: logit_bias(x, s.logit_bias)),
    "repetition_penalty": _Kind(
        ("repetition_penalty",),
        lambda s, x, h: repetition_penalty(x, _seen(s, h), s.repetition_penalty),
    ),
    "presence_penalty": _Kind(
        ("presence_penalty",),
        lambda s, x, h: presence_penalty(x, _made(s, h), s.presence_penalty),
    ),
    "frequency_penalty": _Kind(
        ("frequency_penalty",),
        lambda s, x, h: frequency_penalty(x, _made(s, h), s.frequency_penalty),
    ),
    "llama_penalties": _Kind(PENALTIES, _llama_penalties),
    "no_repeat_ngram": _Kind(
        ("no_repeat_ngram",), lambda s, x, h: no_repeat_ngram(x, h.ids, s.no_repeat_ngram)
    ),
    "ban": _Kind(("banned",), lambda s, x, h: ban(x, h.ids, s.banned)),
    "min_new_tokens": _Kind(("min_new_tokens",), _min_new_tokens),
    "force": _Kind(("forced",), _force),
    "temperature": _Kind(("temperature",), lambda s, x, h: temperature(x, s.temperature)),
    "top_k": _Kind(("top_k",), lambda s, x, h: top_k(x, s.top_k)),
    "top_k_ties": _Kind(("top_k",), lambda s, x, h: top_k_ties(x, s.top_k)),
    "top_p": _Kind(("top_p",), lambda s, x, h: top_p(x, s.top_p)),
    "top_p_below": _Kind(("top_p",), lambda s, x, h: top_p_below(x, s.top_p)),
    "min_p": _Kind(("min_p",), lambda s, x, h: min_p(x, s.min_p)),
    "typical_p": _Kind(("typical_p",), lambda s, x, h: typical_p(x, s.typical_p)),
    "typical_p_ties": _Kind(("typical_p",), lambda s, x, h: typical_p_ties(x, s.typical_p)),
}


def chain(settings: Settings) -> tuple[Filter, ...]:
    """The filters that some settings ask for, in their order.

    What is off or neutral (temperature 1, top_p 1, min_p 0, a penalty that changes nothing) is
    left out.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    tuple of Filter

    Raises
    ------
    ArgumentError
        If the order has an unknown filter, one twice, two for one setting, or none for a setting
        that is on and would have no effect.

    Examples
    --------
    >>> from numpygpt.decoding import Settings
    >>> settings = Settings(temperature=0.7, top_p=0.9, order="llama.cpp")
    >>> [(filter.name, filter.values) for filter in chain(settings)]
    [('top_p', '0.9'), ('temperature', '0.7')]
    """
    asked = [name for name, neutral in NEUTRAL.items() if _is_on(settings, name, neutral)]
    filters, done = [], set()
    for name in _order(settings.order):
        mine = [field for field in KINDS[name].settings if field in asked]
        if mine:
            filters.append(Filter(name, _values(settings, name, mine), _bound(settings, name)))
            done.update(mine)
    for field in asked:
        if field not in done:
            carry = " or ".join(name for name, kind in KINDS.items() if field in kind.settings)
            raise ArgumentError(
                f"the order {settings.order!r} has no filter for {field}, which would have no "
                f"effect; leave {field} off, or give the names of the filters, {carry} among them"
            )
    return tuple(filters)


def _is_on(settings: Any, name: str, neutral: tuple[Any, ...]) -> bool:
    if name == "min_new_tokens" and not settings.stop_ids:
        return False
    value = getattr(settings, name)
    return value is not None and value not in neutral


def _order(order: Any) -> tuple[str, ...]:
    """The names of the filters, checked."""
    known = ", ".join(map(repr, ORDERS))
    if isinstance(order, str):
        if order not in ORDERS:
            raise ArgumentError(
                f"unknown order {order[:40]!r}; expected {known}, or a sequence of filter names"
            )
        return ORDERS[order]
    owners: dict[str, str] = {}
    for name in order:
        if name not in KINDS:
            raise ArgumentError(
                f"unknown filter {name[:40]!r} in the order; expected {', '.join(KINDS)}"
            )
        for field in KINDS[name].settings:
            if field in owners:
                raise ArgumentError(
                    f"the order applies {field} twice, by {owners[field]} and by {name}; "
                    f"leave one out"
                )
            owners[field] = name
    return tuple(order)


def _bound(settings: Any, name: str) -> Callable[[Array, History], Array]:
    apply = KINDS[name].apply
    return lambda logits, history: apply(settings, logits, history)


def _values(settings: Any, name: str, fields: Sequence[str]) -> str:
    """What a run record prints: numbers as they are, collections by their size."""
    shown = []
    for field in fields:
        value = getattr(settings, field)
        text = str(len(value)) if field in ("logit_bias", "banned", "forced") else str(value)
        shown.append(text if len(KINDS[name].settings) == 1 else f"{field} {text}")
    if set(fields) & set(PENALTIES):
        window = settings.penalty_window or (LLAMA_WINDOW if name == "llama_penalties" else None)
        shown += [f"last {window}"] if window else []
    return ", ".join(shown)
