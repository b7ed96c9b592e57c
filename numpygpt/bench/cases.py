"""The cases: what a contestant is asked to do, and what counts as one token of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError
from ..params import Config

__all__ = ["DEFAULT", "KINDS", "Case", "fitting"]

KINDS = {
    "decode": "one token at a time after a prompt of so many",
    "prefill": "a prompt of so many tokens, up to the logits of its last one",
    "batch": "so many prompts of 32 tokens, continued together",
    "score": "the log-probability of each token of a text of so many",
    "cold": "a new process, from its start to its first token",
}
DEFAULT = (
    "decode32", "decode512", "prefill512", "prefill1024", "batch8", "batch32", "score1024", "cold",
)  # fmt: skip
BATCH_PROMPT = 32


class Case(NamedTuple):
    """A kind of work, and its size.

    >>> case = Case.named("batch8")
    >>> case.kind, case.size, case.tokens(steps=10)
    ('batch', 8, 80)
    """

    kind: str
    size: int

    @classmethod
    def named(cls, name: str) -> Case:
        """A kind and a number, or "cold".

        Raises
        ------
        ArgumentError
            If it is not.
        """
        match = re.fullmatch(r"([a-z]+)([1-9]\d{0,6})?", name)
        kind, size = match.groups() if match else ("", None)
        if kind not in KINDS or (size is None) != (kind == "cold"):
            raise ArgumentError(
                f"there is no case {name!r}: expected one of {', '.join(DEFAULT)}, "
                "or another number in these"
            )
        if kind == "score" and size == "1":
            raise ArgumentError("case 'score1': the first token of a text has no log-probability")
        return cls(kind, int(size or 0))

    @property
    def name(self) -> str:
        """As :meth:`named` takes it."""
        return f"{self.kind}{self.size or ''}"

    def positions(self, steps: int) -> int:
        """How many positions of the context it takes."""
        return {
            "decode": self.size + steps,
            "batch": BATCH_PROMPT + steps,
            "prefill": self.size,
            "score": self.size,
            "cold": 8,
        }[self.kind]

    def tokens(self, steps: int) -> int:
        """How many tokens its time is divided by."""
        counts = {"decode": steps, "batch": self.size * steps, "cold": 1}
        return counts.get(self.kind, self.size)

    def arguments(self, vocab_size: int, steps: int) -> list[Any]:
        """What the method of a contestant is called with: random ids, the same every time."""
        rng = np.random.default_rng([self.size, len(self.kind)])
        if self.kind == "batch":
            return [rng.integers(0, vocab_size, (self.size, BATCH_PROMPT)).tolist(), steps]
        ids = rng.integers(0, vocab_size, self.size).tolist()
        return [ids, steps] if self.kind == "decode" else [ids]


def fitting(cases: Sequence[Case], config: Config, steps: int) -> list[Case]:
    """Those that the model has positions for."""
    return [case for case in cases if case.positions(steps) <= config.n_ctx]
