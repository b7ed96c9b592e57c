"""What ``numpygpt perplexity`` says about one model; :mod:`.divergences` is for two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..scoring import Summary
from ..scoring import total as together

__all__ = ["print_table", "statistics", "together"]


def statistics(s: Summary) -> dict[str, Any]:
    """Everything, for a record."""
    return {
        **vars(s),
        "nats_per_token": s.nats_per_token,
        "perplexity": s.perplexity,
        "perplexity_error": s.perplexity_error,
        "bits_per_byte": s.bits_per_byte,
        "bits_per_token": s.bits_per_token,
    }


def print_table(names: Sequence[str], summaries: Sequence[Summary]) -> None:
    """A line for each text and, if there are several, one for all."""
    print(
        f"{'tokens':>10} {'bytes':>11} {'nats/token':>10} {'+-':>7} {'perplexity':>11} {'+-':>8} "
        f"{'bits/byte':>9} {'bits/token':>10}  text"
    )
    rows = list(zip(summaries, names, strict=True))
    if len(rows) > 1:
        rows.append((together(summaries), "total"))
    for s, name in rows:
        print(
            f"{s.count:>10,} {s.bytes:>11,} {_number(s.nats_per_token, 10)} "
            f"{_number(s.standard_error, 7)} {_number(s.perplexity, 11)} "
            f"{_number(s.perplexity_error, 8)} {_number(s.bits_per_byte, 9)} "
            f"{_number(s.bits_per_token, 10)}  {name}"
        )


def _number(value: float | None, width: int) -> str:
    """A number with four digits after the point; a dash if there is none."""
    return f"{'-' if value is None or math.isnan(value) else f'{value:,.4f}':>{width}}"
