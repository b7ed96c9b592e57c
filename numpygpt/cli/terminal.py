"""What goes to a terminal: one line, nothing that could steer it; colours only where wanted."""

from __future__ import annotations

import os
import sys

__all__ = ["INTERRUPTED", "on_colour_terminal", "one_line", "spelled", "tell"]

# The exit code after Ctrl-C, by the custom of shells: 128 and the number of the signal.
INTERRUPTED = 130


def spelled(text: str) -> str:
    r"""The text with everything that does not print spelled out.

    >>> spelled("a\nb \x1b[31m")
    'a\\nb \\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    r"""The text on one line, with control characters spelled out.

    >>> one_line("a\nb \x1b[31m")
    'a b \\x1b[31m'
    """
    return spelled(" ".join(text.split()))


def tell(kind: str, message: object) -> None:
    """A message for the user, on standard error if there is one."""
    if sys.stderr is not None:
        print(f"numpygpt: {kind}:", one_line(str(message)), file=sys.stderr)


def on_colour_terminal() -> bool:
    """Whether standard output is a terminal whose owner has nothing against colours.

    The variable NO_COLOR, if it is set and not empty, says no (https://no-color.org).
    """
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
