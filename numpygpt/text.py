"""Tokens in, text out, piece by piece, up to a stop string.

Both questions here are about bytes whose meaning depends on what follows: a character can take
several tokens, and a stop string can begin in one token and end in another. Such bytes are held
back until it is clear what they are.
"""

from __future__ import annotations

import codecs
import operator
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from .arguments import told
from .errors import ArgumentError, TokenError

__all__ = ["StopSearch", "TextStream", "stop_strings"]

UNKNOWN = "\ufffd".encode()


def stop_strings(stop: Iterable[str]) -> tuple[str, ...]:
    r"""Stop strings, checked.

    Raises
    ------
    ArgumentError
        If this is not a collection of strings, or one is empty or has no UTF-8.

    Examples
    --------
    >>> stop_strings(["\n\n", "END"])
    ('\n\n', 'END')
    """
    if isinstance(stop, str | bytes) or not isinstance(stop, Iterable):
        raise ArgumentError(f"stop must be a list of strings, not {told(stop)}")
    checked = tuple(stop)
    for text in checked:
        if not isinstance(text, str) or not text:
            raise ArgumentError(f"a stop string must be a non-empty text, not {told(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ArgumentError(
                f"a stop string must be UTF-8, but {text[:40]!r} has half of a surrogate pair"
            ) from None
    return checked


class StopSearch:
    """A search for several strings at once that reads every byte once.

    This is the automaton of Aho and Corasick ("Efficient string matching", 1975). Its states are
    the beginnings of stop strings. After any bytes it is in the state of the longest beginning
    that those bytes end with.

    Parameters
    ----------
    stop : sequence of str
        As :func:`stop_strings` returns them.

    Attributes
    ----------
    follow : list of dict of int to int
        For each state the bytes that make it longer, and the states they lead to; state 0 is the
        empty beginning.
    shorter : list of int
        For each state the longest shorter beginning that it ends with.
    depth : list of int
        How many bytes it has.
    found : list of (str or None)
        The longest stop string that it ends with.

    Examples
    --------
    >>> search = StopSearch(["he", "she"])
    >>> state = 0
    >>> for byte in b"ushe":
    ...     state = search.step(state, byte)
    >>> search.found[state], search.depth[state]
    ('she', 3)
    """

    def __init__(self, stop: Sequence[str]):
        self.follow: list[dict[int, int]] = [{}]
        self.shorter, self.depth = [0], [0]
        self.found: list[str | None] = [None]
        for text in stop:
            state = 0
            for depth, byte in enumerate(text.encode(), 1):
                if byte not in self.follow[state]:
                    self.follow[state][byte] = len(self.follow)
                    self.follow.append({})
                    self.shorter.append(0)
                    self.depth.append(depth)
                    self.found.append(None)
                state = self.follow[state][byte]
            self.found[state] = text
        waiting = deque(self.follow[0].values())
        while waiting:  # shorter states first
            state = waiting.popleft()
            self.found[state] = self.found[state] or self.found[self.shorter[state]]
            for byte, longer in self.follow[state].items():
                self.shorter[longer] = self.step(self.shorter[state], byte)
                waiting.append(longer)

    def step(self, state: int, byte: int) -> int:
        """The state after one more byte."""
        while state and byte not in self.follow[state]:
            state = self.shorter[state]
        return self.follow[state].get(byte, 0)

    def open(self, state: int) -> int:
        """The longest beginning of a longer stop string that this state ends with."""
        while state and not self.follow[state]:
            state = self.shorter[state]
        return state


class TextStream:
    r"""Tokens in, text out: never half a character, nothing from a stop string on.

    Bytes are held back only while they may still become a character or a stop string. How the
    bytes are cut into tokens changes when text comes out, never which.

    Parameters
    ----------
    token_bytes : mapping of int to bytes
        What each token stands for. An id without a token becomes U+FFFD.
    stop : iterable of str
        Texts that end the stream; they and what follows them never come out. The first that is
        complete counts; of those that end with the same byte, the longest. They are compared
        byte by byte, so U+FFFD in a stop string fits an id without a token, not a damaged
        character.

    Attributes
    ----------
    stopped : str or None
        The stop string that came.

    Raises
    ------
    ArgumentError
        If a stop string is not one.

    Examples
    --------
    >>> tokens = {0: b"Hel", 1: b"lo\xf0\x9f\x91", 2: b"\x8f EN", 3: b"D of"}
    >>> stream = TextStream(tokens, stop=["END"])
    >>> [stream.feed(token) for token in range(4)], stream.stopped
    (['Hel', 'lo', '👏 ', ''], 'END')
    """

    def __init__(self, token_bytes: Mapping[int, bytes], stop: Iterable[str] = ()):
        texts = stop_strings(stop)
        self.stopped: str | None = None
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._search = StopSearch(texts) if texts else None
        self._state, self._held = 0, b""

    def feed(self, token: int, may_stop: bool = True) -> str:
        """The text that this token makes certain; often the empty string.

        Parameters
        ----------
        token : int
        may_stop : bool
            Whether a stop string that this token completes counts. If not, it is text.

        Returns
        -------
        str

        Raises
        ------
        TokenError
            If the token is not an integer.
        """
        try:
            token = operator.index(token)
        except TypeError:
            raise TokenError(f"expected a token id, received {token!r}") from None
        data = self._token_bytes.get(token, UNKNOWN)
        if self._search is None:
            return self._decoder.decode(data)
        if self.stopped is not None:
            return ""
        return self._look(self._search, data, may_stop)

    def end(self) -> str:
        """What is left when no token follows: U+FFFD for an incomplete character."""
        data, self._state, self._held = self._held, 0, b""
        return self._decoder.decode(data, final=True)

    def _look(self, search: StopSearch, data: bytes, may_stop: bool) -> str:
        """The text of some bytes, without what is or may become a stop string."""
        state, known = self._state, self._held + data
        for i, byte in enumerate(data, len(self._held) + 1):
            state = search.step(state, byte)
            if may_stop and (found := search.found[state]) is not None:
                self.stopped, self._state, self._held = found, 0, b""
                return self._decoder.decode(known[: i - len(found.encode())], final=True)
        self._state = state = search.open(state)
        clear = len(known) - search.depth[state]
        self._held = known[clear:]
        # A stop string begins with a whole character, so one that was incomplete before it is over.
        return self._decoder.decode(known[:clear], final=state > 0)
