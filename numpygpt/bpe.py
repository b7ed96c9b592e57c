"""Byte-pair encoding in Python, for texts too short to be worth waiting for tiktoken.

tiktoken needs every token before it encodes a word. To import it and hand it GPT-2's 50,256 takes
nearly as long as importing NumPy; a prompt of a few words needs a few tokens. Here each is looked
up when it is needed, in the text of the vocabulary file. The ids are tiktoken's.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

__all__ = ["BYTE_ALPHABET", "STAND_INS", "TO_LATIN_1", "WORDS", "ShortTexts", "TokenFile", "merge"]

# How GPT-2 cuts text into words before it merges bytes: contractions, letters, digits, other
# marks (each with one space before it), white space. The possessive forms (++) match what the
# original pattern of openai/gpt-2 matches, faster.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?[{letters}]++| ?[{digits}]++| ?[^{spaces}{letters}{digits}]++"
    r"|[{spaces}]++$|[{spaces}]+(?![^{spaces}])|[{spaces}]"
)
WORDS = PATTERN.format(letters=r"\p{L}", digits=r"\p{N}", spaces=r"\s")

# Python's `re` knows no \p{L}, and the Unicode of Python and that of tiktoken have different years.
# So texts in the letters and marks of Western Europe are the only ones that are cut here: their
# classes can be written out, and no version of Unicode has changed them.
WESTERN = "[\0-\u024f\u2010-\u2027\u2030-\u205e\u20ac]*"
WESTERN_CLASSES = {
    "letters": "A-Za-zªµºÀ-ÖØ-öø-\u024f",
    "digits": "0-9²³¹¼-¾",
    "spaces": "\t-\r \x85\xa0",
}
WESTERN_WORDS = PATTERN.format(**WESTERN_CLASSES)

# Characters of the longest text that is looked at here.
SHORT = 2**12


def _byte_alphabet() -> list[tuple[int, str]]:
    """GPT-2's printable stand-in for each byte, in the order of the ids 0 to 255.

    Bytes that print well stand for themselves and come first; the others are shifted to
    characters from 256 on, so that a vocabulary file has no control characters or spaces.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(b, chr(b)) for b in printable] + [(b, chr(256 + i)) for i, b in enumerate(others)]


BYTE_ALPHABET = _byte_alphabet()
STAND_INS = dict(BYTE_ALPHABET)
TO_LATIN_1 = {ord(stand_in): byte for byte, stand_in in BYTE_ALPHABET}


def merge(word: bytes, find: Callable[[bytes], int | None]) -> list[int]:
    """Merge the bytes of a word: always the two neighbours of lowest rank, the first of equals.

    Parameters
    ----------
    word : bytes
    find : callable
        From the bytes of a token to its rank in the order of merging; None if there is no such
        token. Every byte has a rank.

    Returns
    -------
    list of int
        The ranks of the tokens that are left when no two neighbours make another.

    Examples
    --------
    >>> merge(b"abab", {b"a": 0, b"b": 1, b"ba": 2, b"ab": 3}.get)
    [0, 2, 1]
    """

    def rank(token: bytes) -> float:
        found = find(token)
        return math.inf if found is None else found

    parts = [word[i : i + 1] for i in range(len(word))]
    pairs = [rank(a + b) for a, b in itertools.pairwise(parts)]
    while pairs and (lowest := min(pairs)) < math.inf:
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        for i in range(max(0, at - 1), min(at + 1, len(pairs))):  # those with the new part
            pairs[i] = rank(parts[i] + parts[i + 1])
    return [int(rank(part)) for part in parts]


class ShortTexts:
    """An encoder of short texts that gives up where tiktoken would be done sooner.

    Parameters
    ----------
    find : callable
        As for :func:`merge`.
    patience : int
        How often, in all texts together, `find` may be asked.

    Examples
    --------
    >>> ranks = {b"a": 0, b"b": 1, b" ": 2, b"ab": 3}
    >>> encoder = ShortTexts(ranks.get, patience=50)
    >>> encoder.encode("abba ab")
    [3, 1, 0, 2, 3]
    >>> encoder.encode("ab" * 20) is None
    True
    """

    def __init__(self, find: Callable[[bytes], int | None], patience: int):
        self.patience = patience
        self._find = find
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int] | None:
        """The ranks of the tokens of a text; None if that is work for tiktoken."""
        if len(text) > SHORT or not re.fullmatch(WESTERN, text):
            return None
        ranks: list[int] = []
        for word in re.findall(WESTERN_WORDS, text):
            found = self._known.get(word) or self._encoded(word.encode())
            if found is None:
                return None
            self._known[word] = found
            ranks += found
        return ranks

    def _encoded(self, word: bytes) -> list[int] | None:
        """The ranks of the tokens of a word; None if it would take too long."""
        self.patience -= 1
        if self.patience >= 0 and (whole := self._find(word)) is not None:
            return [whole]  # whatever the merges before it make of its bytes; so does tiktoken
        self.patience -= 3 * len(word)  # each pair, and two new ones after each merger
        return merge(word, functools.cache(self._find)) if self.patience >= 0 else None


class TokenFile(Mapping[int, bytes]):
    r"""The tokens of a GPT-2 by their ids, in the text of its file ``vocab.bpe``.

    To find one, all of the text is searched, half a megabyte: 0.2 to 0.4 ms, without preparation.

    Parameters
    ----------
    merges : bytes
        The file: a line that names its version, then on each line two tokens to merge.
    special : str
        A token after them, which can be seen but not found.

    Examples
    --------
    >>> tokens = TokenFile("#version: 0.2\nĠ t\nh e\n".encode(), "<|endoftext|>")
    >>> len(tokens), tokens[0], tokens[256], tokens[258]
    (259, b'!', b' t', b'<|endoftext|>')
    >>> tokens.find(b" t"), tokens.find(b"t "), tokens.find(b"<|endoftext|>")
    (256, None, None)
    """

    def __init__(self, merges: bytes, special: str):
        spelled = "\n".join(["", *STAND_INS.values(), ""]).encode()
        # A token is its line without the space (and without what Windows ends lines with).
        self._ordinary = spelled + merges.partition(b"\n")[2].translate(None, b" \r")
        self._text = self._ordinary + special.encode() + b"\n"

    def find(self, token: bytes) -> int | None:
        """The id of an ordinary token; None if there is no such token."""
        line = "".join([STAND_INS[byte] for byte in token])
        at = self._ordinary.find(f"\n{line}\n".encode())
        return None if at < 0 else int(np.searchsorted(self._ends, at))

    def ordinary(self) -> list[bytes]:
        """All tokens but the special one."""
        # One look-up for every character is much faster than one `translate` for every token.
        codes = np.frombuffer(self._ordinary.decode().encode("utf-16-le"), "<u2")
        table = np.zeros(max(TO_LATIN_1) + 1, np.uint8)
        table[[*TO_LATIN_1]] = [*TO_LATIN_1.values()]
        data, ends = table[codes].tobytes(), np.flatnonzero(codes == ord("\n")).tolist()
        return [data[start + 1 : stop] for start, stop in itertools.pairwise(ends)]

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise KeyError(i)
        line = self._text[self._ends[i] + 1 : self._ends[i + 1]]
        return line.decode().translate(TO_LATIN_1).encode("latin-1")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    @functools.cached_property
    def _ends(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """Where lines end; token i lies between numbers i and i + 1."""
        return np.flatnonzero(np.frombuffer(self._text, np.uint8) == ord("\n"))
