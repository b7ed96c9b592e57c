"""Prompt lookup: guess that the text repeats itself.

A forward pass over a few tokens costs less than as many passes over one, because most of the time
goes into reading the weights. So it can pay to guess the next tokens, read them in one pass, and
keep those that the model would have chosen itself. The guess changes how many passes a text takes,
and nothing else but the rounding of logits (with ``chunk=1`` not even that).

Whether it pays depends on the text. A pass that reads a guess costs :data:`PRICE` passes more than
one without, whatever the guess is, and each right token saves one. A guess that is *not* read shows
as well, some tokens later, how much of it was right. So every guess is judged, and they are read
for as long as the mean of the latest ones is worth the price.
"""

from __future__ import annotations

import numpy as np

from ..params import Array

__all__ = ["NGRAM", "PRICE", "RATE", "Lookup", "draft"]

# On 114 recorded texts of 230 to 350 new tokens, with guesses of ten tokens and passes over them
# that cost three of one row, texts became faster by these factors:
#   tokens that agree     two   three  four
#   prose                 1.00  1.00   1.00
#   code                  1.13  1.15   1.13
#   lists                 1.19  1.18   1.14
#   edited copies         1.56  1.69   1.73
#   bundled model, greedy 1.97  2.03   2.08
#   at temperature 0.7    0.99  0.99   0.99
NGRAM = 3

# In passes over one row. At 124M parameters a pass over 2 to 16 rows took 1.9 to 3.6 times as long
# as one over a single row, without much of a trend (one and two threads, a quiet and a busy
# machine; 11 rows, an odd number to the BLAS, up to 5). Where guesses are wrong nobody should lose,
# so a dear one is taken.
PRICE = 2.5

# How much the latest guess counts. On those texts a fourth, an eighth and a sixteenth were equally
# fast within 2 %, edited copies within 4 %.
RATE = 1 / 8


def draft(ids: Array, most: int, ngram: int = NGRAM) -> Array:
    """The tokens that followed the last time the text had its last few tokens.

    Parameters
    ----------
    ids : (T,) ndarray of int
        The text so far.
    most : int
        How many tokens to guess. Where fewer have followed, the text went around in a circle
        since, and the guess goes around once more.
    ngram : int
        How many tokens at the end must have stood together before; at least 1.

    Returns
    -------
    (K,) ndarray of int
        K is `most`, or 0 if they have not.

    Examples
    --------
    >>> import numpy as np
    >>> draft(np.array([1, 2, 3, 4, 5, 9, 1, 2, 3]), most=2).tolist()
    [4, 5]
    >>> draft(np.array([1, 2, 3, 1, 2, 3]), most=5).tolist()
    [1, 2, 3, 1, 2]
    >>> draft(np.array([1, 2, 3, 4, 5, 9, 2, 2, 3]), most=2).tolist()
    []
    """
    places = len(ids) - ngram  # where they can have stood before, overlaps included
    if places < 1:
        return ids[:0]
    starts = np.flatnonzero(ids[:places] == ids[-ngram])
    for i in range(1, ngram):
        starts = starts[ids[starts + i] == ids[i - ngram]]
    if not starts.size:
        return ids[:0]
    after = starts[-1] + ngram
    return np.resize(ids[after : after + most], most)


class Lookup:
    """The guesses for one text, and whether to read them.

    It depends on the tokens of the text alone, so a run repeats, and a text in a batch has the
    guesses that it has alone.

    Attributes
    ----------
    worth : float
        How many tokens of a guess are right: a mean in which the latest counts for
        :data:`RATE`, and each one before it for less. It starts at the price, so that the first
        guess is read.
    guess : list of int
        What may come now; the rest of a guess that has been right so far.

    Examples
    --------
    >>> import numpy as np
    >>> lookup, ids = Lookup(), [7, 8, 9, 5, 7, 8, 9]
    >>> lookup.propose(np.array(ids), most=3).tolist()
    [5, 7, 8]
    >>> lookup.see(6)  # wrong
    >>> lookup.propose(np.array([*ids, 6, 7, 8, 9]), most=3).tolist()  # watched, but not read
    []
    >>> for token in lookup.guess:  # three right ones
    ...     lookup.see(token)
    >>> lookup.worth
    2.2890625
    """

    def __init__(self) -> None:
        self.worth = PRICE
        self.guess: list[int] = []
        self._right = 0

    def propose(self, ids: Array, most: int) -> Array:
        """The tokens to read beside the last one, (K,): a guess if it is worth it, or none.

        Parameters
        ----------
        ids : (T,) ndarray of int
            The text so far.
        most : int
            Guess at most so many tokens.
        """
        if self.guess or most < 1:  # one that is only watched has not ended
            return ids[:0]
        guess = draft(ids, most)
        self.guess, self._right = guess.tolist(), 0
        return guess if self.worth >= PRICE else ids[:0]

    def see(self, token: int) -> None:
        """Judge the guess by the token that came."""
        if not self.guess:
            return
        right = token == self.guess[0]
        self._right += right
        self.guess = self.guess[1:] if right else []
        if not self.guess:
            self.worth += (self._right - self.worth) * RATE
