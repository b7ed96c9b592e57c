"""A text on a terminal, each token on a background that says how likely it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ..scoring import Score
from .terminal import spelled

__all__ = ["coloured", "legend"]

# The least probability of each class, its background among the 256 colours of a terminal, and its
# name. From cream to red, so that what surprised the model stands out; lightness falls from class
# to class, for those who do not see the hue. The letters are black on each, whatever the
# terminal's own colours: the weakest contrast, on the last, is 7 to 1.
CLASSES = (
    (0.5, 230, "50 % or more"),
    (0.1, 223, "10 %"),
    (0.01, 216, "1 %"),
    (0.001, 209, "0.1 %"),
    (0.0, 203, "less"),
)
RESET = "\x1b[0m"


def legend() -> str:
    """A line that explains the colours."""
    shown = " ".join(f"{_on(colour)} {name} {RESET}" for _, colour, name in CLASSES)
    return f"probability of a token: {shown}  no colour: not scored"


def coloured(score: Score, token_bytes: Mapping[int, bytes]) -> Iterator[str]:
    r"""The text of the scored ids, with colours.

    A character that takes several tokens has the colour of their joint probability. What does
    not print is spelled out, such as ``\n``, which also breaks the line.

    Parameters
    ----------
    score : Score
    token_bytes : mapping of int to bytes
        What each token stands for; an id without a token becomes U+FFFD.

    Yields
    ------
    str
    """
    held, logprob = b"", 0.0
    last = len(score.ids) - 1
    for i, token in enumerate(score.ids.tolist()):
        held += token_bytes.get(token, b"\xef\xbf\xbd")
        logprob += score.logprobs[i].item()  # NaN if not scored, and then the sum is
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and i < last:
                continue  # the next token goes on with this character
            text = held.decode(errors="replace")
        yield from _painted(text, logprob)
        held, logprob = b"", 0.0


def _painted(text: str, logprob: float) -> Iterator[str]:
    """A piece of text on its background; each line by itself, so that no colour runs on."""
    start = "" if math.isnan(logprob) else _on(_colour(logprob))
    for line in text.splitlines(keepends=True):
        broken = "\n" if line.endswith("\n") else ""
        yield f"{start}{spelled(line)}{RESET if start else ''}{broken}"


def _colour(logprob: float) -> int:
    return next(colour for least, colour, _ in CLASSES if math.exp(logprob) >= least)


def _on(colour: int) -> str:
    return f"\x1b[38;5;16;48;5;{colour}m"
