"""What goes to a terminal: one line, nothing that could steer it."""

from __future__ import annotations

import sys

__all__ = ["one_line", "tell"]


def one_line(text: str) -> str:
    r"""The text on one line, with control characters spelled out.

    >>> one_line("a\nb \x1b[31m")
    'a b \\x1b[31m'
    """
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def tell(kind: str, message: object) -> None:
    """A message for the user, on standard error if there is one."""
    if sys.stderr is not None:
        print(f"numpygpt: {kind}:", one_line(str(message)), file=sys.stderr)
