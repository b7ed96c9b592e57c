"""The checksum of TensorFlow's checkpoints, against its definition and published values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpygpt.checkpoints import crc32c as module
from numpygpt.checkpoints.crc32c import MULTIPLES, PIECE_BYTES, crc32c, masked

# The powers of x in Castagnoli's polynomial, 0x11EDC6F41.
POWERS = [32, 28, 27, 26, 25, 23, 22, 20, 19, 18, 14, 13, 11, 10, 9, 8, 6, 0]


def by_definition(data: bytes) -> int:
    """The complement of (message, first 32 bits inverted) x^32 modulo P, by long division."""
    bits = [byte >> place & 1 for byte in data for place in range(8)] + [0] * 32
    bits[:32] = [1 - bit for bit in bits[:32]]
    for place in range(len(bits) - 32):
        if bits[place]:
            for power in POWERS:
                bits[place + 32 - power] ^= 1
    return sum((1 - bit) << place for place, bit in enumerate(bits[-32:]))


def random_bytes(length: int) -> bytes:
    return np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()


# RFC 3720, appendix B.4, and the usual check value.
PUBLISHED = {
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
}


@pytest.mark.parametrize("data", PUBLISHED, ids=bytes.hex)
def test_published_checksums(data):
    assert crc32c(data) == PUBLISHED[data] == by_definition(data)


@pytest.mark.parametrize("powers", MULTIPLES, ids=str)
def test_the_two_polynomials_are_multiples(powers):
    rest = sum(1 << power for power in powers)
    divisor = sum(1 << power for power in POWERS)
    while rest.bit_length() > 32:
        rest ^= divisor << rest.bit_length() - 33
    assert rest == 0


# Around the lengths where another step begins: 4 bytes, the degrees, and twice, four times those.
LENGTHS = [*range(10), *range(288, 300), 580, 581, 1160, 1161, 5684, 5685, 5686, 5700, 11371, 12000]


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_gives_what_the_definition_gives(length):
    data = random_bytes(length)
    assert crc32c(data) == by_definition(data)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 300, 7000])
def test_pieces_of_any_size_give_the_same(monkeypatch, size):
    data = random_bytes(20_000)
    expected = crc32c(data)
    monkeypatch.setattr(module, "PIECE_BYTES", size)
    assert crc32c(data) == expected


@given(st.binary(max_size=2000), st.integers(0, 2000), st.integers(0, 2000))
def test_any_split_gives_the_same(data, first, second):
    first, second = sorted((first, second))
    parts = data[:first], data[first:second], data[second:]
    checksum = 0
    for part in parts:
        checksum = crc32c(part, start=checksum)
    assert checksum == crc32c(data) == by_definition(data)


def test_more_than_one_piece():
    data = random_bytes(PIECE_BYTES + 5000)
    assert crc32c(data) == crc32c(data[-10_000:], start=crc32c(data[:-10_000]))
    changed = bytearray(data)
    changed[PIECE_BYTES // 2] ^= 1
    assert crc32c(bytes(changed)) != crc32c(data)


def test_a_view_at_an_odd_byte_is_read_and_not_changed():
    data = bytearray(random_bytes(6001))
    before = bytes(data)
    assert crc32c(memoryview(data)[1:]) == crc32c(before[1:])
    assert data == before


@pytest.mark.parametrize(("checksum", "stored"), [(0, 0xA282EAD8), (0x7FFF, 0xA280EAD8)])
def test_a_mask_rotates_by_15_bits_and_adds(checksum, stored):
    # 0x7FFF rotated right by 15 is 0x7FFF << 17 = 0xFFFE0000.
    assert masked(checksum) == stored
