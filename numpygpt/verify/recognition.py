"""What an array is by its values, where its name or its shape do not say so.

* Of several layouts that fit, the nearest to our own run is taken. Where it is not
  :data:`~.nearness.CLEAR` times nearer than the next, the commonest layout is taken instead, and
  the report says that the values did not decide.
* An array without a known name is taken for the intermediate that it is nearest to, if it is
  within :data:`~.nearness.CLOSE` of it and :data:`~.nearness.CLEAR` times nearer to it than to any
  other. So what is badly wrong is not recognised; but what it was computed from, and what is
  computed from it, is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from ..params import Array, Config, shown
from ..plans import trace_names
from .layouts import Placed, Sizes, fitting, kind
from .names import part_names, source_of
from .nearness import CLOSE, Reference, is_clear

__all__ = ["Found", "Notes", "choose", "recognised"]


class Found(NamedTuple):
    """An array that belongs to a trace key or to a part of qkv."""

    sources: tuple[str, ...]
    how: str
    placed: Placed
    given: bool = False

    @property
    def label(self) -> str:
        """Its name in the file, for a message."""
        return " and ".join(map(shown, self.sources))


class Claim(NamedTuple):
    """An array that is near a key: how near, and how near it is to the next."""

    distance: float
    second: float
    name: str
    placed: Placed


class Notes(NamedTuple):
    """What the reader of a report should know."""

    unmatched: dict[str, str]
    notes: list[str]


def choose(
    name: str, options: list[tuple[str, Placed]], reference: Reference, notes: Notes
) -> tuple[str, Placed]:
    """The one option whose values are the nearest to ours; the first if they do not tell."""
    if len(options) == 1:
        return options[0]
    reference.prepare(key for key, _ in options)
    far = [reference.distance(key, placed.array[0]) for key, placed in options]
    nearest, second = sorted(range(len(options)), key=far.__getitem__)[:2]
    decided = is_clear(far[nearest], far[second])
    key, placed = options[nearest if decided else 0]
    readings = f"{len(options)} readings fit its shape"
    chosen = f"{key} {placed.layout or 'as it is'}"
    notes.notes.append(
        f"{shown(name)}: {readings}; by its values {chosen} (off by {far[nearest]:.1e}, the next "
        f"by {far[second]:.1e})"
        if decided
        else f"{shown(name)}: {readings}, and its values do not decide; taken as {chosen}"
    )
    return key, placed


def recognised(
    loose: Mapping[str, Array],
    settled: Collection[str],
    sizes: Sizes,
    reference: Reference,
    notes: Notes,
) -> dict[str, Found]:
    """The intermediates that arrays without a known name must be, judging by their values."""
    free = _free(settled, sizes.config)
    fits: dict[str, list[tuple[str, Placed]]] = {}
    for name, array in loose.items():
        placings = ((axes, fitting(array, axes, sizes)) for axes in free)
        fits[name] = [(key, one) for axes, found in placings for one in found for key in free[axes]]
    reference.prepare(key for options in fits.values() for key, _ in options)
    claims: dict[str, list[Claim]] = {}
    for name, options in fits.items():
        if not options:
            shape = loose[name].shape
            notes.unmatched[name] = f"its shape {shape} fits nothing that is still unnamed"
            continue
        far = sorted(
            ((reference.distance(key, placed.array[0]), key, placed) for key, placed in options),
            key=lambda option: option[0],
        )
        distance, key, placed = far[0]
        second = far[1][0] if len(far) > 1 else math.inf
        if not distance <= CLOSE:
            notes.unmatched[name] = (
                f"nearest is {key}, from which it differs by {distance:.2g} of its size"
            )
        elif not is_clear(distance, second):
            notes.unmatched[name] = f"{key} and {far[1][1]} are both near its values"
        else:
            claims.setdefault(key, []).append(Claim(distance, second, name, placed))
    return {key: found for key, claim in claims.items() if (found := _nearest(key, claim, notes))}


def _free(settled: Collection[str], config: Config) -> dict[str, list[str]]:
    """The keys without an array, by their axes."""
    free: dict[str, list[str]] = {}
    for key in (*trace_names(config.n_layer), *part_names(config.n_layer)):
        # What stands before a block is what came out of the one before it.
        if key not in settled and (source_of(key) == key or source_of(key) in settled):
            free.setdefault(kind(key), []).append(key)
    return free


def _nearest(key: str, claims: list[Claim], notes: Notes) -> Found | None:
    """The one of several arrays whose values are those of one key."""
    first, *others = sorted(claims, key=lambda claim: claim.distance)
    for other in others:
        if np.array_equal(first.placed.array, other.placed.array, equal_nan=True):
            notes.unmatched[other.name] = f"the same numbers as {shown(first.name)}"
        elif is_clear(first.distance, other.distance):
            notes.unmatched[other.name] = f"{shown(first.name)} is nearer to {key}"
        else:
            for each in claims:
                names = [shown(one.name) for one in claims if one is not each]
                notes.unmatched[each.name] = f"as near to {key} as {' and '.join(names)}"
            return None
    notes.notes.append(
        f"{shown(first.name)}: {key} by its values (off by {first.distance:.1e}, the next by "
        f"{first.second:.1e})"
    )
    return Found((first.name,), "values", first.placed)
