"""What ``numpygpt perplexity --against`` says about two models; :mod:`.summaries` is for one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..divergence import Divergence

__all__ = ["print_table", "statistics", "together"]

# Fractions of the tokens, from the largest divergence to the smallest.
QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.0)


def together(divergences: Sequence[Divergence]) -> Divergence:
    """All texts as one."""
    names = ("ids", "kl", "same_top", "logprobs", "other_logprobs")
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(d, name) for d in divergences]) for name in names
    }
    return dataclasses.replace(divergences[0], **columns)


def statistics(d: Divergence) -> dict[str, Any]:
    """Everything, for a record."""
    return {
        "count": d.count,
        "perplexity_reference": d.perplexity,
        "perplexity": d.other_perplexity,
        "perplexity_ratio": d.perplexity_ratio,
        "perplexity_ratio_error": d.perplexity_ratio_error,
        "mean_kl": d.mean_kl,
        "mean_kl_error": d.mean_kl_error,
        "kl_quantiles": {f"{q:g}": d.kl_quantile(q) for q in QUANTILES},
        "top_1_agreement": d.top_1_agreement,
        "top_1_agreement_error": d.top_1_agreement_error,
        "rms_change": d.rms_change,
        "rms_change_error": d.rms_change_error,
    }


def print_table(names: Sequence[str], divergences: Sequence[Divergence]) -> None:
    """A line for each text, and all statistics of all together."""
    print(
        f"{'tokens':>10} {'perplexity':>11} {'reference':>11} {'ratio':>9} {'mean KL':>10} "
        f"{'same top':>10}  text"
    )
    for d, name in zip(divergences, names, strict=True):
        print(
            f"{d.count:>10,} {d.other_perplexity:>11,.4f} {d.perplexity:>11,.4f} "
            f"{d.perplexity_ratio:>9.5f} {d.mean_kl:>10.4g} {d.top_1_agreement:>10.4%}  "
            f"{name}"
        )
    d = together(divergences)
    print(f"\nall {d.count:,} tokens; p is the reference, q the model")
    _print_pair("perplexity of q / of p", d.perplexity_ratio, d.perplexity_ratio_error)
    _print_pair("mean KL(p || q), nats", d.mean_kl, d.mean_kl_error)
    for q in QUANTILES:
        name = {1.0: "maximum", 0.5: "median", 0.0: "minimum"}.get(q, f"{q * 100:g} %")
        print(f"  {name:<28} {d.kl_quantile(q):>13.6g}")
    _print_pair("same likeliest token, %", 100 * d.top_1_agreement, 100 * d.top_1_agreement_error)
    _print_pair("rms change of p(token), %", 100 * d.rms_change, 100 * d.rms_change_error)


def _print_pair(name: str, value: float, error: float) -> None:
    print(f"{name:<30} {value:>13.6g} +- {error:.2g}")
