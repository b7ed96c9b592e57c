"""Makes sampler_vectors.json: what each filter, and chains of them, must do. Version 1.

``python tests/golden/make_sampler_vectors.py`` writes the file anew. It is meant for whoever
writes a sampler, in any language: the expected values come from the loops below, in decimal
arithmetic of 60 digits, which share nothing with numpygpt.

The file is one JSON object. ``version`` counts changes of the format, ``slack`` is explained
below, ``cases`` is a list of objects:

name
    Says what is tested.
logits
    One number for each token, in nats; the string "-inf" rules a token out. Numbers have the 17
    digits that make them the same float64 everywhere.
ids, prompt
    The tokens so far, and how many of them are the prompt. The others are new.
settings
    The filters and their values. ``logit_bias`` is a list of [id, nats or "-inf"]; ``forced`` a
    list of [number of the new token, id], where negative numbers count from the end of
    ``max_new_tokens``; ``banned`` a list of lists of ids; ``min_new_tokens`` rules out
    ``stop_ids``. What is absent is off. ``order`` is a key of ``orders`` or a list of filters.
kept
    The ids that are not ruled out, ascending.
probabilities
    One float64 for each token, of the exact value; 0 for what is ruled out. Compare with a
    relative tolerance: 1e-12 for a sampler in float64.
draws
    [u, id]: the token that a uniform number u chooses, reading ids upwards: the first whose
    cumulative probability exceeds u.

``orders`` holds the filters of each named order, in their order.

Shares of the probability are compared with p, and some cases lie exactly on p. So that rounding
does not decide, what misses p by at most ``slack`` = 1e-12 counts as p. All other comparisons are
clear by 1e-9, which this script checks: a sampler in float32 can pass with tolerances of 1e-6 if
it has a slack of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Iterable
from decimal import Decimal, getcontext
from typing import Any

getcontext().prec = 60

PATH = pathlib.Path(__file__).with_name("sampler_vectors.json")
SLACK = Decimal("1e-12")
ZERO = Decimal(0)

# A logit, or None for a token that is ruled out.
Row = list[Decimal | None]

ORDERS = {
    "numpygpt": "logit_bias repetition_penalty presence_penalty frequency_penalty no_repeat_ngram "
    "ban min_new_tokens force temperature top_k top_p min_p typical_p",
    "transformers": "logit_bias repetition_penalty no_repeat_ngram ban min_new_tokens force "
    "temperature top_k_ties top_p min_p typical_p_ties",
    "llama.cpp": "logit_bias llama_penalties top_k typical_p top_p min_p temperature",
    "openai": "temperature top_k_ties top_p_below",
}


# -- arithmetic -----------------------------------------------------------------------------------


def probabilities(row: Row) -> list[Decimal]:
    """Softmax of what is not ruled out."""
    top = max(x for x in row if x is not None)
    masses = []
    for x in row:
        # exp(-5000) is 0 in any float.
        masses.append(ZERO if x is None or x - top < -5000 else (x - top).exp())
    total = sum(masses, ZERO)
    return [mass / total for mass in masses]


def below(a: Decimal, b: Decimal) -> bool:
    """Whether a < b, where a is no more than the slack off if it is meant to be b."""
    gap = abs(a - b)
    assert gap < Decimal("1e-14") or gap > Decimal("1e-9"), f"{gap} would depend on rounding"
    return a < b - SLACK


def by_likelihood(row: Row) -> list[int]:
    """The ids that are not ruled out, the likeliest first, the lower id among equals."""
    ids = [i for i, x in enumerate(row) if x is not None]
    return sorted(ids, key=lambda i: (-row[i], i))


def only(row: Row, kept: Iterable[int]) -> Row:
    kept = set(kept)
    return [x if i in kept else None for i, x in enumerate(row)]


def until(row: Row, order: list[int], p: Decimal) -> list[int]:
    """The first ids of an order that have a probability of p together."""
    shares, kept, total = probabilities(row), [], ZERO
    for i in order:
        kept.append(i)
        total += shares[i]
        if not below(total, p):
            break
    return kept


# -- filters --------------------------------------------------------------------------------------


def temperature(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    return [None if x is None else x / Decimal(s["temperature"]) for x in row]


def top_k(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    return only(row, by_likelihood(row)[: s["top_k"]])


def top_k_ties(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    kth = by_likelihood(row)[: s["top_k"]][-1]
    return [x if x is not None and x >= row[kth] else None for x in row]


def top_p(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    p = Decimal(s["top_p"])
    return row if p == 1 else only(row, until(row, by_likelihood(row), p))


def top_p_below(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    p = Decimal(s["top_p"])
    if p == 1:
        return row
    shares, total, last = probabilities(row), ZERO, None
    for i in by_likelihood(row):
        total += shares[i]
        if last is not None and below(p, total):
            break
        last = i
    return [x if x is not None and x >= row[last] else None for x in row]


def min_p(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    if s["min_p"] == 0:
        return row
    top = max(x for x in row if x is not None)
    least = Decimal(s["min_p"]).ln()
    return [x if x is not None and not below(x - top, least) else None for x in row]


def distances(row: Row) -> dict[int, Decimal]:
    """|-log p - H| of each token that is not ruled out."""
    shares = probabilities(row)
    top = max(x for x in row if x is not None)
    log_total = -max(shares).ln()
    surprise = {i: log_total - (x - top) for i, x in enumerate(row) if x is not None}
    entropy = sum((shares[i] * surprise[i] for i in surprise), ZERO)
    far = {i: abs(surprise[i] - entropy) for i in surprise}
    ordered = sorted(far.values())
    for a, b in itertools.pairwise(ordered):
        assert a == b or b - a > Decimal("1e-9"), "two distances that rounding would decide"
    return far


def typical_p(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    p = Decimal(s["typical_p"])
    if p == 1:
        return row
    far = distances(row)
    return only(row, until(row, sorted(far, key=lambda i: (far[i], i)), p))


def typical_p_ties(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    p = Decimal(s["typical_p"])
    if p == 1:
        return row
    far = distances(row)
    last = until(row, sorted(far, key=lambda i: (far[i], i)), p)[-1]
    return only(row, [i for i in far if far[i] <= far[last]])


def window(s: dict[str, Any], ids: list[int], default: int | None = None) -> list[int]:
    size = s.get("penalty_window", default)
    return ids if size is None else ids[max(0, len(ids) - size) :]


def penalised(x: Decimal, penalty: float) -> Decimal:
    return x / Decimal(penalty) if x > 0 else x * Decimal(penalty)


def repetition_penalty(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    seen = set(window(s, ids))
    return [
        penalised(x, s["repetition_penalty"]) if i in seen and x is not None else x
        for i, x in enumerate(row)
    ]


def presence_penalty(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    seen = window(s, ids[prompt:])
    return [
        x - Decimal(s["presence_penalty"]) if i in seen and x is not None else x
        for i, x in enumerate(row)
    ]


def frequency_penalty(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    seen = window(s, ids[prompt:])
    return [
        None if x is None else x - seen.count(i) * Decimal(s["frequency_penalty"])
        for i, x in enumerate(row)
    ]


def llama_penalties(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    seen, result = window(s, ids, 64), []
    for i, x in enumerate(row):
        if x is not None and i in seen:
            x = penalised(x, s.get("repetition_penalty", 1.0))
            x -= seen.count(i) * Decimal(s.get("frequency_penalty", 0.0))
            x -= Decimal(s.get("presence_penalty", 0.0))
        result.append(x)
    return result


def no_repeat_ngram(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    n = s["no_repeat_ngram"]
    runs = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
    begun = tuple(ids[len(ids) - n + 1 :])
    return [None if len(ids) >= n and (*begun, i) in runs else x for i, x in enumerate(row)]


def logit_bias(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    row = list(row)
    for i, bias in s["logit_bias"]:
        row[i] = None if bias == "-inf" or row[i] is None else row[i] + Decimal(bias)
    return row


def ban(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    out = set()
    for sequence in s["banned"]:
        so_far = [*ids]
        matches = len(sequence) - 1 <= len(so_far)
        for back in range(1, len(sequence)):
            matches = matches and so_far[-back] == sequence[-1 - back]
        if matches:
            out.add(sequence[-1])
    return [None if i in out else x for i, x in enumerate(row)]


def min_new_tokens(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    early = len(ids) - prompt < s["min_new_tokens"]
    return [None if early and i in s["stop_ids"] else x for i, x in enumerate(row)]


def force(row: Row, s: dict[str, Any], ids: list[int], prompt: int) -> Row:
    for number, token in s["forced"]:
        if number < 0:
            number += s["max_new_tokens"]
        if number == len(ids) - prompt:
            return [ZERO if i == token else None for i in range(len(row))]
    return row


FILTERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "temperature": (temperature, ("temperature",)),
    "top_k": (top_k, ("top_k",)),
    "top_k_ties": (top_k_ties, ("top_k",)),
    "top_p": (top_p, ("top_p",)),
    "top_p_below": (top_p_below, ("top_p",)),
    "min_p": (min_p, ("min_p",)),
    "typical_p": (typical_p, ("typical_p",)),
    "typical_p_ties": (typical_p_ties, ("typical_p",)),
    "repetition_penalty": (repetition_penalty, ("repetition_penalty",)),
    "presence_penalty": (presence_penalty, ("presence_penalty",)),
    "frequency_penalty": (frequency_penalty, ("frequency_penalty",)),
    "llama_penalties": (
        llama_penalties,
        ("repetition_penalty", "frequency_penalty", "presence_penalty"),
    ),
    "no_repeat_ngram": (no_repeat_ngram, ("no_repeat_ngram",)),
    "logit_bias": (logit_bias, ("logit_bias",)),
    "ban": (ban, ("banned",)),
    "min_new_tokens": (min_new_tokens, ("min_new_tokens",)),
    "force": (force, ("forced",)),
}


# -- cases ----------------------------------------------------------------------------------------


def case(
    name: str, logits: list[float], ids: Iterable[int] = (), prompt: int = 0, **settings: Any
) -> dict[str, Any]:
    """A case with its expected values."""
    ids = list(ids)
    settings = {"temperature": 1.0, "order": "numpygpt", **settings}
    order = settings["order"]
    row: Row = [None if x == -math.inf else Decimal(x) for x in logits]
    for filter_name in ORDERS[order].split() if isinstance(order, str) else order:
        apply, fields = FILTERS[filter_name]
        if any(field in settings for field in fields):
            row = apply(row, settings, ids, prompt)
    shares = probabilities(row)
    return {
        "name": name,
        "logits": ["-inf" if x == -math.inf else x for x in logits],
        "ids": ids,
        "prompt": prompt,
        "settings": settings,
        "kept": [i for i, x in enumerate(row) if x is not None],
        "probabilities": [float(share) for share in shares],
        "draws": draws(shares),
    }


def draws(shares: list[Decimal]) -> list[list[float | int]]:
    """0, and uniform numbers in the middle of each token's stretch and just inside its ends."""
    result: list[list[float | int]] = [[0.0, next(i for i, share in enumerate(shares) if share)]]
    start = ZERO
    for i, share in enumerate(shares):
        if share > Decimal("1e-6"):
            for part in ("0.001", "0.5", "0.999"):
                u = float(start + share * Decimal(part))
                result.append([u, i])
        start += share
    return result


def logs(*values: float) -> list[float]:
    """Logits of given probabilities."""
    return [math.log(value) for value in values]


INF = math.inf
# Exact binary fractions in no order, with two pairs of equals: 1/2, 1/8, 1/8, 1/8, 1/16, 1/16.
HALVES = logs(0.0625, 0.125, 0.5, 0.125, 0.0625, 0.125)
# Plain numbers without equals.
PLAIN = [0.3, -1.2, 2.5, 1.1, -0.4, 1.9, 0.0, -3.0]
TEXT = [2, 5, 2, 7, 2, 5]  # a prompt of three and three new tokens
ALL = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
}


def cases() -> list[dict[str, Any]]:
    many = [math.sin(7.0 * i * i) * 3 for i in range(40)]
    result = [
        case("nothing but softmax", PLAIN),
        case("one token", [4.0], temperature=0.5, top_k=3, top_p=0.1, min_p=1.0, typical_p=0.1),
        # temperature
        case("temperature below 1", PLAIN, temperature=0.5),
        case("temperature above 1", PLAIN, temperature=2.5),
        case("temperature near 0 is greedy", PLAIN, temperature=1e-9),
        case("temperature near 0 shares among equals", [1.0, 3.0, 3.0], temperature=1e-9),
        case("a large temperature makes all equal", PLAIN, temperature=1e9),
        case("temperature with a token ruled out", [1.0, -INF, 0.0], temperature=0.7),
        case("temperature of huge logits", [1e300, -1e300, 1e300, 0.0], temperature=0.5),
        case("temperature of logits near the largest float", [1.7e308, -1.7e308], temperature=1.5),
        # top_k
        case("top_k", PLAIN, top_k=3),
        case("top_k of 1 is greedy", PLAIN, top_k=1),
        case("top_k of 1 among equals is the lowest id", [1.0, 2.0, 2.0], top_k=1),
        case("top_k cuts through equals: lower ids stay", HALVES, top_k=3),
        case("top_k ends at equals: all of them stay", HALVES, top_k=4),
        case("top_k is V", PLAIN, top_k=8),
        case("top_k is more than V", PLAIN, top_k=50),
        case("top_k of all equal", [0.5] * 5, top_k=2),
        case("top_k is more than what is not ruled out", [-INF, 1.0, -INF, 0.0], top_k=3),
        case("top_k_ties cuts through equals: all stay", HALVES, top_k=3, order=["top_k_ties"]),
        case("top_k_ties of all equal", [0.5] * 5, top_k=2, order=["top_k_ties"]),
        case("top_k_ties without equals", PLAIN, top_k=3, order=["top_k_ties"]),
        case("top_k_ties is more than V", PLAIN, top_k=50, order=["top_k_ties"]),
        case(
            "top_k_ties is more than what is not ruled out",
            [-INF, 1.0, -INF, 0.0],
            top_k=3,
            order=["top_k_ties"],
        ),
        # top_p
        case("top_p keeps the token that crosses", PLAIN, top_p=0.75),
        case("top_p exactly at the first token", HALVES, top_p=0.5),
        case("top_p exactly at the second: the lower of equals", HALVES, top_p=0.625),
        case("top_p exactly at the fourth", HALVES, top_p=0.875),
        case("top_p exactly at decimal fractions", logs(0.05, 0.5, 0.15, 0.3), top_p=0.95),
        case("top_p just above a boundary", HALVES, top_p=0.6251),
        case("top_p just below a boundary", HALVES, top_p=0.6249),
        case("top_p near 0 keeps the likeliest", HALVES, top_p=1e-6),
        case("top_p near 0 among equals keeps the lowest id", [1.0, 2.0, 2.0], top_p=1e-6),
        case("top_p of 1 keeps all, however unlikely", [0.0, -100.0, -700.0], top_p=1.0),
        case("top_p rules out what adds less than 1 - p", [0.0, -20.0, -30.0], top_p=0.99),
        case("top_p of all equal, on the boundary", [0.5] * 8, top_p=0.375),
        case("top_p of all equal, off the boundary", [0.5] * 8, top_p=0.4),
        case("top_p counts what is left only", [-INF, *HALVES], top_p=0.625),
        case("top_p of huge logits", [1e300, -1e300, 1e300, 0.0], top_p=0.9),
        case("top_p of many", many, top_p=0.8),
        case("top_p_below drops the token that crosses", PLAIN, top_p=0.75, order=["top_p_below"]),
        case("top_p_below on the boundary keeps", HALVES, top_p=0.5, order=["top_p_below"]),
        case(
            "top_p_below keeps what equals the last kept",
            HALVES,
            top_p=0.625,
            order=["top_p_below"],
        ),
        case("top_p_below just below", HALVES, top_p=0.6249, order=["top_p_below"]),
        case("top_p_below keeps at least one", HALVES, top_p=0.1, order=["top_p_below"]),
        case("top_p_below of all equal", [0.5] * 8, top_p=0.4, order=["top_p_below"]),
        case("top_p_below of all equal, below one", [0.5] * 8, top_p=0.1, order=["top_p_below"]),
        case("top_p_below of 1", [0.0, -100.0, -700.0], top_p=1.0, order=["top_p_below"]),
        case("top_p_below of many", many, top_p=0.8, order=["top_p_below"]),
        # min_p
        case("min_p", PLAIN, min_p=0.2),
        case("min_p exactly on a token keeps it", HALVES, min_p=0.25),
        case("min_p just above a token", HALVES, min_p=0.2501),
        case("min_p just below a token", HALVES, min_p=0.2499),
        case("min_p of 1 keeps what equals the likeliest", [1.0, 3.0, 3.0], min_p=1.0),
        case("min_p of 0 keeps all", [0.0, -100.0, -700.0], min_p=0.0),
        case("min_p of all equal", [0.5] * 4, min_p=0.9),
        case("min_p with a token ruled out", [-INF, 0.0, -1.0], min_p=0.3),
        case("min_p of huge logits", [1e300, -1e300, 1e300, 0.0], min_p=0.01),
        # typical_p
        case("typical_p", PLAIN, typical_p=0.5),
        case("typical_p leaves the likeliest out", logs(0.4, 0.3, 0.2, 0.1), typical_p=0.3),
        case("typical_p on the boundary", logs(0.1, 0.2, 0.3, 0.4), typical_p=0.5),
        case("typical_p just above the boundary", logs(0.1, 0.2, 0.3, 0.4), typical_p=0.5001),
        case("typical_p cuts through equals", [2.0, 0.0, 0.0, 0.0, 0.0], typical_p=0.2),
        case("typical_p near 0 keeps one", PLAIN, typical_p=1e-6),
        case("typical_p of 1 keeps all", [0.0, -100.0, -700.0], typical_p=1.0),
        case("typical_p of all equal", [0.5] * 8, typical_p=0.375),
        case("typical_p with a token ruled out", [-INF, *PLAIN], typical_p=0.5),
        case("typical_p of huge logits", [1e300, -1e300, 1e299, 0.0], typical_p=0.9),
        case("typical_p of many", many, typical_p=0.6),
        case(
            "typical_p_ties keeps all at the distance of the last",
            [2.0, 0.0, 0.0, 0.0, 0.0],
            typical_p=0.2,
            order=["typical_p_ties"],
        ),
        case("typical_p_ties of all equal", [0.5] * 8, typical_p=0.375, order=["typical_p_ties"]),
        case("typical_p_ties without equals", PLAIN, typical_p=0.5, order=["typical_p_ties"]),
        # penalties
        case("repetition_penalty", PLAIN, TEXT, 3, repetition_penalty=1.5),
        case("repetition_penalty of negative logits", PLAIN, [1, 4, 7, 1], 1,
             repetition_penalty=1.5),
        case("repetition_penalty counts once and the prompt", PLAIN, [2, 2, 2, 3], 3,
             repetition_penalty=2.0),
        case("repetition_penalty below 1 rewards", PLAIN, TEXT, 3, repetition_penalty=0.5),
        case("repetition_penalty of what is ruled out", [-INF, 1.0, -1.0], [0, 1], 1,
             repetition_penalty=2.0),
        case("repetition_penalty of nothing", PLAIN, repetition_penalty=1.5),
        case("repetition_penalty in a window", PLAIN, TEXT, 3, repetition_penalty=1.5,
             penalty_window=2),
        case("repetition_penalty in a window longer than the text", PLAIN, TEXT, 3,
             repetition_penalty=1.5, penalty_window=99),
        case("presence_penalty: new tokens only, once", PLAIN, [3, 2, 5, 5, 5], 2,
             presence_penalty=0.7),
        case("presence_penalty below 0 rewards", PLAIN, TEXT, 3, presence_penalty=-0.7),
        case("presence_penalty in a window", PLAIN, TEXT, 3, presence_penalty=0.7,
             penalty_window=1),
        case("presence_penalty before the first new token", PLAIN, [2, 5], 2,
             presence_penalty=0.7),
        case("frequency_penalty: new tokens only, each time", PLAIN, [3, 2, 5, 5, 5], 2,
             frequency_penalty=0.7),
        case("frequency_penalty in a window", PLAIN, [3, 2, 5, 5, 5], 2, frequency_penalty=0.7,
             penalty_window=2),
        case("frequency_penalty in a window over the prompt", PLAIN, TEXT, 3,
             frequency_penalty=0.7, penalty_window=5),
        case("frequency_penalty with a token ruled out", [-INF, 1.0, 0.0], [0, 0, 1], 0,
             frequency_penalty=0.5),
        case("all penalties", PLAIN, TEXT, 3, **ALL),
        case("all penalties in a window", PLAIN, TEXT, 3, **ALL, penalty_window=4),
        case("llama_penalties: prompt and new tokens", PLAIN, TEXT, 3, **ALL, order="llama.cpp"),
        case("llama_penalties look at the last 64", PLAIN, [5] * 5 + [2] * 62 + [3, 3], 60, **ALL,
             order="llama.cpp"),
        case("llama_penalties in a window", PLAIN, TEXT, 3, **ALL, penalty_window=4,
             order="llama.cpp"),
        case("llama_penalties with one of the three", PLAIN, TEXT, 3, presence_penalty=0.5,
             order="llama.cpp"),
        # constraints
        case("no_repeat_ngram of 1: no token twice", PLAIN, TEXT, 3, no_repeat_ngram=1),
        case("no_repeat_ngram of 2", PLAIN, [1, 2, 3, 1, 4, 1], 3, no_repeat_ngram=2),
        case("no_repeat_ngram of 3", PLAIN, [1, 2, 3, 0, 1, 2], 3, no_repeat_ngram=3),
        case("no_repeat_ngram that overlaps itself", PLAIN, [2, 2, 2], 1, no_repeat_ngram=3),
        case("no_repeat_ngram longer than the text", PLAIN, [1, 2], 1, no_repeat_ngram=4),
        case("no_repeat_ngram as long as the text", PLAIN, [1, 1], 1, no_repeat_ngram=2),
        case("no_repeat_ngram longer by one", PLAIN, [1, 2], 1, no_repeat_ngram=3),
        case("no_repeat_ngram of 2 after nothing", PLAIN, no_repeat_ngram=2),
        case("logit_bias", PLAIN, logit_bias=[[7, 6.0], [2, -1.5]]),
        case("logit_bias of -inf", PLAIN, logit_bias=[[2, "-inf"]]),
        case("logit_bias does not bring back", [-INF, 0.0, 1.0], logit_bias=[[0, 5.0]]),
        case("banned tokens", PLAIN, TEXT, 3, banned=[[2], [5]]),
        case("banned sequences", PLAIN, TEXT, 3, banned=[[5, 3], [2, 6], [2, 5, 1], [7, 5, 0]]),
        case("a banned sequence longer than the text", PLAIN, [5], 0, banned=[[2, 5, 3]]),
        case("a banned sequence as long as the text and one", PLAIN, [2, 5], 0,
             banned=[[2, 5, 3]]),
        case("a banned sequence across prompt and new tokens", PLAIN, [4, 2, 5], 2,
             banned=[[2, 5, 3]]),
        case("min_new_tokens: not yet", PLAIN, TEXT, 3, min_new_tokens=4, stop_ids=[2, 3]),
        case("min_new_tokens: enough", PLAIN, TEXT, 3, min_new_tokens=3, stop_ids=[2, 3]),
        case("min_new_tokens counts no prompt", PLAIN, TEXT, 6, min_new_tokens=1, stop_ids=[2]),
        case("forced, the first new token", PLAIN, TEXT, 6, forced=[[0, 7]], max_new_tokens=5),
        case("forced, another number", PLAIN, TEXT, 5, forced=[[0, 7]], max_new_tokens=5),
        case("forced, the last new token", PLAIN, TEXT, 2, forced=[[-1, 4]], max_new_tokens=5),
        case("forced, not the last yet", PLAIN, TEXT, 3, forced=[[-1, 4]], max_new_tokens=5),
        case("forced wins over banned", PLAIN, TEXT, 6, forced=[[0, 7]], banned=[[7]],
             max_new_tokens=5, temperature=0.5, top_k=1),
    ]  # fmt: skip
    chained = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    everything = {**chained, **ALL, "min_p": 0.02, "typical_p": 0.95, "no_repeat_ngram": 3,
                  "banned": [[4], [5, 1]], "logit_bias": [[7, 4.0]], "min_new_tokens": 9,
                  "stop_ids": [6], "forced": [[0, 1]], "max_new_tokens": 20}  # fmt: skip
    shared = {key: everything[key] for key in
              ("temperature", "top_k", "top_p", "min_p", "typical_p", "logit_bias")}  # fmt: skip
    tied = logs(0.3, 0.1, 0.25, 0.1, 0.1, 0.15)
    ngrams = [1, 3, 0, 2, 1, 3]
    result += [
        case("chain: temperature, top_k, top_p", PLAIN, **chained),
        case("chain: top_p after top_k", PLAIN, top_k=3, top_p=0.8),
        case("chain: top_k after top_p", PLAIN, top_k=3, top_p=0.8, order=["top_p", "top_k"]),
        case("chain: everything", PLAIN, ngrams, 3, **everything),
    ]
    for order in ORDERS:
        hot = {"temperature": 2.0, "top_p": 0.8}
        result.append(case(f"orders differ: hot top_p, {order}", PLAIN, **hot, order=order))
        hot = {"temperature": 2.0, "top_k": 4, "top_p": 0.7}
        result.append(case(f"orders differ: top_k and top_p, {order}", PLAIN, **hot, order=order))
        result.append(
            case(f"orders differ: equals, {order}", tied, temperature=0.9, top_k=4, order=order)
        )
        if order != "openai":
            result.append(
                case(f"orders differ: hot min_p, {order}", PLAIN, temperature=3.0, min_p=0.3,
                     order=order)
            )  # fmt: skip
            result.append(
                case(f"orders differ: hot typical_p, {order}", PLAIN, temperature=3.0,
                     typical_p=0.5, order=order)
            )  # fmt: skip
            result.append(case(f"orders: what three share, {order}", PLAIN, **shared, order=order))
        if order in ("numpygpt", "llama.cpp"):
            result.append(case(f"orders differ: penalties, {order}", PLAIN, TEXT, 3, **ALL,
                               temperature=0.7, top_p=0.9, order=order))  # fmt: skip
    names = [item["name"] for item in result]
    assert len(set(names)) == len(names), "two cases of one name"
    return result


def document() -> str:
    """The text of the file: one case a line."""
    orders = {name: filters.split() for name, filters in ORDERS.items()}
    head = {"version": 1, "slack": float(SLACK), "orders": orders}
    lines = ",\n".join(json.dumps(item) for item in cases())
    return json.dumps(head, indent=1)[:-2] + ',\n "cases": [\n' + lines + "\n]}\n"


if __name__ == "__main__":
    PATH.write_text(document())
    print(f"{len(cases())} cases in {PATH}")
