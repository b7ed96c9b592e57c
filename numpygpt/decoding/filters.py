"""Filters: pure functions from logits to logits.

A token is ruled out by the logit -inf. A filter never changes its input; where it has nothing to
do, it may return it. Logits are in nats; :func:`numpygpt.decoding.decode` passes them in float64,
where a low temperature does not overflow.

What rounding may not decide: a share of the probability that misses `p` by at most 1e-12 counts as
`p`. So does a token that misses ``p * largest`` by that fraction of it in :func:`min_p`. Equal
logits are equals; among them the lower id comes first.

The truncating filters (top_k, top_p, min_p, typical_p and their relatives) keep at least one
token. The others may rule out everything, and then :func:`numpygpt.decoding.sample.choose` says
so.

Where tools differ
------------------
The same settings give other distributions in other tools. :data:`numpygpt.decoding.ORDERS` has four
of them.

=================  ==============================  ===========================================
                   here                            elsewhere
=================  ==============================  ===========================================
temperature        before truncation               llama.cpp: last, so it does not move what
                                                   top_p, min_p and typical_p keep
top_k, default     none                            transformers: 50 whenever tokens are drawn;
                                                   llama.cpp: 40, beside top_p 0.95, min_p 0.05
                                                   and a temperature of 0.8
top_k, ties        exactly k, lower ids first      transformers, OpenAI's GPT-2, nanoGPT: all
                                                   that tie with the k-th (`top_k_ties`);
                                                   llama.cpp: exactly k, which ones is left to
                                                   the sort
top_p, crossing    the token that crosses p stays  transformers, llama.cpp: as here; OpenAI's
                                                   GPT-2: it goes (`top_p_below`)
top_p, ties        lower ids stay                  transformers sorts upwards, so higher ids
                                                   stay; OpenAI's GPT-2: all stay
min_p              at least p times the largest    transformers, llama.cpp: as here
typical_p          the token that crosses p stays  transformers: so do all at the same distance
                                                   (`typical_p_ties`); llama.cpp goes on until
                                                   the share is more than p
repetition         prompt and new tokens           transformers, vLLM: as here
presence,          new tokens                      vLLM: as here; transformers has neither
frequency
all three          the last `penalty_window`, if   llama.cpp: in one go, over the last 64 of
                   set                             prompt and new tokens (`llama_penalties`)
banned             as given                        transformers ignores a ban of the
                                                   end-of-text token alone
=================  ==============================  ===========================================

Read in the sources of transformers 5.23 (generation/utils.py, logits_process.py), llama.cpp
(src/llama-sampling.cpp, common/common.h, common/sampling.cpp), vLLM (apply_penalties), OpenAI's
GPT-2 (src/sample.py) and nanoGPT (model.py). What :data:`ORDERS` reproduces is shown by cases in
``tests/test_filters.py``, what transformers does by running it in
``tests/oracles/test_filters.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..params import Array

__all__ = [
    "ban",
    "force",
    "frequency_penalty",
    "llama_penalties",
    "logit_bias",
    "min_p",
    "no_repeat_ngram",
    "presence_penalty",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_k_ties",
    "top_p",
    "top_p_below",
    "typical_p",
    "typical_p_ties",
]

# A sum of 50257 probabilities is rounded by some 1e-14; nobody means a p this exactly.
SLACK = 1e-12


# -- temperature and truncation -------------------------------------------------------------------


def temperature(logits: Array, t: float) -> Array:
    """Divide by `t`: below 1 the likely becomes likelier, above 1 less so.

    Parameters
    ----------
    logits : (V,) ndarray
    t : float
        Above 0.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> temperature(np.array([1.0, 2.0]), 0.5)
    array([2., 4.])
    """
    top = logits.max()
    with np.errstate(over="ignore", under="ignore"):
        scaled: Array = logits / t
        if math.isinf(scaled.max()) and not math.isinf(top):
            # 1e300 / 1e-100 overflows. Only differences matter, so let the largest be 0.
            scaled = (logits - top) / t
    return scaled


def top_k(logits: Array, k: int) -> Array:
    """Keep exactly the `k` largest; among equals the lower ids.

    Parameters
    ----------
    logits : (V,) ndarray
    k : int
        At least 1. If it is V or more, nothing is ruled out.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> top_k(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    array([-inf,   3.,   2., -inf])
    """
    if k >= len(logits):
        return logits
    return _largest(logits, k, np.partition(logits, -k)[-k])


def top_k_ties(logits: Array, k: int) -> Array:
    """Keep the `k` largest and whatever equals the k-th.

    Parameters
    ----------
    logits : (V,) ndarray
    k : int
        At least 1. If it is V or more, nothing is ruled out.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> top_k_ties(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    array([-inf,   3.,   2.,   2.])
    """
    if k >= len(logits):
        return logits
    return np.where(logits >= np.partition(logits, -k)[-k], logits, -np.inf)


def top_p(logits: Array, p: float) -> Array:
    """Keep the smallest set of likeliest tokens whose probability reaches `p`.

    The token that crosses p is kept, so there is always one; among equals the lower ids are.

    Parameters
    ----------
    logits : (V,) ndarray
    p : float
        0 to 1; 1 rules out nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> top_p(np.log([0.5, 0.25, 0.125, 0.125]), 0.7).round(2)
    array([-0.69, -1.39,  -inf,  -inf])
    """
    if p >= 1 or logits.max() == -np.inf:
        return logits
    descending = _descending(logits)
    k = int(np.count_nonzero(_shares(descending) < p - SLACK)) + 1
    return _largest(logits, k, descending[k - 1])


def top_p_below(logits: Array, p: float) -> Array:
    """Keep the likeliest tokens as long as their probability does not exceed `p`.

    The token that crosses p goes, unless it is the likeliest of all; whatever equals the last
    that is kept stays.

    Parameters
    ----------
    logits : (V,) ndarray
    p : float
        0 to 1; 1 rules out nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    openai/gpt-2, src/sample.py, ``top_p_logits``, as released with the 1558M model; an earlier
    version of that file kept the token that crosses.

    Examples
    --------
    >>> import numpy as np
    >>> top_p_below(np.log([0.5, 0.25, 0.125, 0.125]), 0.7).round(2)
    array([-0.69,  -inf,  -inf,  -inf])
    """
    if logits.max() == -np.inf:
        return logits
    descending = _descending(logits)
    k = max(int(np.count_nonzero(_shares(descending) <= p + SLACK)), 1)
    return np.where(logits >= descending[k - 1], logits, -np.inf)


def min_p(logits: Array, p: float) -> Array:
    """Keep the tokens that are at least `p` times as likely as the likeliest.

    Parameters
    ----------
    logits : (V,) ndarray
    p : float
        0 to 1; 0 rules out nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> min_p(np.log([0.5, 0.25, 0.125, 0.125]), 0.5).round(2)
    array([-0.69, -1.39,  -inf,  -inf])
    """
    if p <= 0:
        return logits
    return np.where(logits >= logits.max() + math.log(p) - SLACK, logits, -np.inf)


def typical_p(logits: Array, p: float) -> Array:
    """Keep the smallest set that reaches `p` of the tokens whose surprise is nearest to average.

    The surprise of a token is -log(probability), its average the entropy. The token that crosses
    p is kept; among equals the lower ids are. The likeliest token need not be among them.

    Parameters
    ----------
    logits : (V,) ndarray
    p : float
        0 to 1; 1 rules out nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    Meister et al. 2023, Locally Typical Sampling, section 4 (arXiv 2202.00666).

    Examples
    --------
    >>> import numpy as np
    >>> typical_p(np.log([0.4, 0.3, 0.2, 0.1]), 0.3).round(2)
    array([-inf, -1.2, -inf, -inf])
    """
    if p >= 1 or logits.max() == -np.inf:
        return logits
    ids = _typical(_distances(logits), logits, p)
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def typical_p_ties(logits: Array, p: float) -> Array:
    """Keep what :func:`typical_p` keeps, and whatever is as far from average as its last.

    Parameters
    ----------
    logits : (V,) ndarray
    p : float
        0 to 1; 1 rules out nothing.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> typical_p_ties(np.zeros(3), 0.5)
    array([0., 0., 0.])
    """
    if p >= 1 or logits.max() == -np.inf:
        return logits
    distances = _distances(logits)
    last = _typical(distances, logits, p)[-1]
    return np.where(distances <= distances[last], logits, -np.inf)


def _largest(logits: Array, k: int, kth: float) -> Array:
    """Keep the `k` largest, lower ids first, where the k-th is known."""
    kept = logits > kth
    kept[np.flatnonzero(logits == kth)[: k - np.count_nonzero(kept)]] = True
    return np.where(kept, logits, -np.inf)


def _descending(logits: Array) -> Array:
    """The logits of what is not ruled out, sorted.

    Sorting numbers is several times faster than a stable order of their ids, and after top_k there
    are few.
    """
    return np.sort(logits[logits > -np.inf])[::-1]


def _shares(logits: Array) -> Array:
    """What share of the probability the first, the first two, ... of some tokens have."""
    with np.errstate(over="ignore", under="ignore"):
        masses: Array = np.cumsum(np.exp(logits - logits.max()))
        masses /= masses[-1]
    return masses


def _distances(logits: Array) -> Array:
    """How far the surprise of each token is from the entropy, in nats."""
    top = logits.max()
    with np.errstate(over="ignore", under="ignore"):
        masses = np.exp(logits - top)
        total = masses.sum()
        surprise = math.log(total) + (top - logits)
    entropy = np.sum(masses * np.where(masses > 0, surprise, 0.0)) / total
    distances: Array = np.abs(surprise - entropy)
    return distances


def _typical(distances: Array, logits: Array, p: float) -> Array:
    """The ids of the smallest set that reaches `p`, the nearest first."""
    ids = np.argsort(distances, kind="stable")
    return ids[: np.count_nonzero(_shares(logits[ids]) < p - SLACK) + 1]


# -- penalties and constraints --------------------------------------------------------------------


def repetition_penalty(logits: Array, ids: Array, penalty: float) -> Array:
    """Make the tokens among `ids` less likely, each once, however often it occurs.

    Positive logits are divided by the penalty, the others multiplied: the effect depends on
    where 0 is, not only on probabilities. Below 1 it rewards.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
    penalty : float
        Above 0; 1 changes nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    Keskar et al. 2019, CTRL, section 4.1, which divides negative logits too; every implementation
    multiplies them.

    Examples
    --------
    >>> import numpy as np
    >>> repetition_penalty(np.array([2.0, -2.0, 2.0]), np.array([0, 1, 0]), 2.0)
    array([ 1., -4.,  2.])
    """
    seen, changed = np.unique(ids), logits.copy()
    with np.errstate(over="ignore", under="ignore"):
        values = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    changed[seen] = np.minimum(values, np.finfo(logits.dtype).max)  # a reward may overflow, too
    return changed


def presence_penalty(logits: Array, ids: Array, penalty: float) -> Array:
    """Subtract the penalty from the logit of each token among `ids`, once.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
    penalty : float
        In nats; below 0 it rewards.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    OpenAI API reference, parameter details.

    Examples
    --------
    >>> import numpy as np
    >>> presence_penalty(np.zeros(3), np.array([2, 0, 2]), 0.5)
    array([-0.5,  0. , -0.5])
    """
    seen, changed = np.unique(ids), logits.copy()
    changed[seen] -= penalty
    return changed


def frequency_penalty(logits: Array, ids: Array, penalty: float) -> Array:
    """Subtract the penalty from a token's logit as many times as it occurs among `ids`.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
    penalty : float
        In nats; below 0 it rewards.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    OpenAI API reference, parameter details.

    Examples
    --------
    >>> import numpy as np
    >>> frequency_penalty(np.zeros(3), np.array([2, 0, 2]), 0.5)
    array([-0.5,  0. , -1. ])
    """
    seen, counts = np.unique(ids, return_counts=True)
    changed = logits.copy()
    changed[seen] -= counts * penalty
    return changed


def llama_penalties(
    logits: Array, ids: Array, repetition: float, frequency: float, presence: float
) -> Array:
    """All three penalties over the same ids, as llama.cpp has them.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
        There the last 64 of prompt and continuation.
    repetition : float
        Above 0; 1 changes nothing.
    frequency, presence : float
        In nats; 0 changes nothing.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    llama.cpp, src/llama-sampling.cpp, ``llama_sampler_penalties_apply``.

    Examples
    --------
    >>> import numpy as np
    >>> llama_penalties(np.array([2.0, 2.0]), np.array([1, 1]), 2.0, 0.5, 0.25)
    array([ 2.  , -0.25])
    """
    logits = repetition_penalty(logits, ids, repetition)
    return presence_penalty(frequency_penalty(logits, ids, frequency), ids, presence)


def no_repeat_ngram(logits: Array, ids: Array, n: int) -> Array:
    """Rule out the tokens that would make a run of `n` tokens a second time.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
        All so far.
    n : int
        At least 1, where no token comes twice.

    Returns
    -------
    (V,) ndarray

    References
    ----------
    Paulus et al. 2017, A Deep Reinforced Model for Abstractive Summarization, section 2.5.

    Examples
    --------
    >>> import numpy as np
    >>> no_repeat_ngram(np.zeros(4), np.array([1, 2, 3, 1]), 2)  # 1 was followed by 2
    array([  0.,   0., -inf,   0.])
    """
    if len(ids) < n:
        return logits
    runs = np.lib.stride_tricks.sliding_window_view(ids, n)
    begun = (runs[:, :-1] == ids[len(ids) - n + 1 :]).all(axis=1)
    changed = logits.copy()
    changed[runs[begun, -1]] = -np.inf
    return changed


def logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """Add to the logits of some tokens.

    Parameters
    ----------
    logits : (V,) ndarray
    bias : mapping of int to float
        In nats; -inf rules a token out.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> logit_bias(np.zeros(3), {0: -1.5, 2: 4.0})
    array([-1.5,  0. ,  4. ])
    """
    changed = logits.copy()
    changed[list(bias)] += list(bias.values())
    return changed


def ban(logits: Array, ids: Array, banned: Iterable[Sequence[int]]) -> Array:
    """Rule out the last token of every sequence whose others are the last of `ids`.

    Parameters
    ----------
    logits : (V,) ndarray
    ids : (T,) ndarray of int
        All so far.
    banned : iterable of sequence of int
        A sequence of one token rules that token out.

    Returns
    -------
    (V,) ndarray

    Examples
    --------
    >>> import numpy as np
    >>> ban(np.zeros(4), np.array([3, 1]), [(0,), (1, 2), (2, 3)])
    array([-inf,   0., -inf,   0.])
    """
    changed = logits.copy()
    for *others, last in banned:
        # If there are more others than ids, no slice of ids has their length.
        if ids[len(ids) - len(others) :].tolist() == others:
            changed[last] = -np.inf
    return changed


def force(logits: Array, token: int) -> Array:
    """Rule out every token but one, even if that was ruled out.

    Parameters
    ----------
    logits : (V,) ndarray
    token : int

    Returns
    -------
    (V,) ndarray
        0 for the token: the logarithm of its probability.

    Examples
    --------
    >>> import numpy as np
    >>> force(np.array([1.0, -np.inf, 2.0]), 1)
    array([-inf,   0., -inf])
    """
    forced = np.full_like(logits, -np.inf)
    forced[token] = 0.0
    return forced
