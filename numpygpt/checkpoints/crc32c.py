"""CRC-32C, the checksum of TensorFlow's checkpoints, almost at the speed of memory.

Read the bits of a message as the coefficients of a polynomial M(x) over GF(2), where adding is
exclusive or. Its checksum is the remainder of M(x) x^32 divided by P(x), the polynomial of degree
32 that Castagnoli found. (Ones are added to the first and to the last 32 bits, so that zeros at
either end count.) The plain way reduces one byte at a time, by a table of 256 remainders.

A remainder does not change when a multiple of P is added to the message. Two multiples of P have
few terms, and nothing in the upper half of their degree but the first::

    Q(x) = x^5685 + x^1362 + x^426 + 1        R(x) = x^290 + x^136 + x^113 + x^107 + x^32 + 1

Over GF(2), (u + v)^2 = u^2 + v^2. So Q(x)^2 = Q(x^2), and every x^(5685 s) + x^(1362 s) +
x^(426 s) + 1 with s = 1, 2, 4, 8 ... is a multiple of P. From s = 8 on these are whole bytes: the
first bytes of a message may be added again 4323, 5259 and 5685 times s/8 bytes further on, and
then be left out. That is three exclusive ors of arrays of up to 4323 s/8 bytes. Steps with Q
shorten a message to 5685 bytes, steps with R to 290, and the table does the rest.

References
----------
RFC 3720, appendix B.4: the checksums of known messages.

G. Castagnoli, S. Braeuer and M. Herrmann, "Optimization of Cyclic Redundancy-Check Codes with 24
and 32 Parity Bits", IEEE Transactions on Communications 41, 1993.
"""

from __future__ import annotations

import numpy as np

from ..params import Array

__all__ = ["crc32c", "masked"]

# P(x) without its first term. The first bit of a message is the lowest bit of its first byte, so
# the highest power of x stands in the lowest bit here too.
POLYNOMIAL = 0x82F63B78

# The powers of x in Q and in R. 5685 is the lowest degree that a multiple of four terms and with a
# second power in the lower half can have; 290 the same for six. (All multiples have an even number
# of terms, because P is divisible by x + 1.)
MULTIPLES = ((5685, 1362, 426, 0), (290, 136, 113, 107, 32, 0))

# Bytes that are copied and shortened at a time: few enough to stay in the processor's cache.
PIECE_BYTES = 2**21


def _remainder(byte: int) -> int:
    """The remainder of 8 bits and 32 zeros."""
    for _ in range(8):
        byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
    return byte


TABLE = [_remainder(byte) for byte in range(256)]


def crc32c(data: bytes | memoryview, start: int = 0) -> int:
    """The CRC-32C of bytes.

    Parameters
    ----------
    data : bytes or memoryview
    start : int
        The checksum of what comes before `data`.

    Returns
    -------
    int
        32 bits.

    Examples
    --------
    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    >>> hex(crc32c(b"56789", start=crc32c(b"1234")))
    '0xe3069283'
    """
    state = start ^ 0xFFFFFFFF
    whole = np.frombuffer(data, np.uint8)
    for first in range(0, whole.size, PIECE_BYTES):
        piece = whole[first : first + PIECE_BYTES]
        if piece.size >= 4:
            piece = piece.copy()
            piece[:4] ^= np.frombuffer(state.to_bytes(4, "little"), np.uint8)
            state = 0
        for powers in MULTIPLES:
            piece = _shortened(piece, powers)
        for byte in piece.tolist():
            state = TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """A checksum as the files store it: rotated right by 15 bits, plus a constant.

    The files hold checksums of data that holds checksums, and those would tend to cancel.

    >>> hex(masked(0xE3069283))
    '0xc78ab0e5'
    """
    rotated = checksum >> 15 | checksum << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def _shortened(piece: Array, powers: tuple[int, ...]) -> Array:
    """Bytes with the same remainder, as few as the highest of the powers; `piece` is overwritten.

    (N,) uint8 -> (min(N, powers[0]),) uint8
    """
    degree, *lower = powers
    while piece.size > degree:
        scale = 1 << ((piece.size - 1) // degree).bit_length() - 1  # s / 8
        # No further than to the first place where something is added: that is not complete yet.
        count = min(scale * (degree - lower[0]), piece.size - scale * degree)
        for power in lower:
            at = scale * (degree - power)
            piece[at : at + count] ^= piece[:count]
        piece = piece[count:]
    return piece
