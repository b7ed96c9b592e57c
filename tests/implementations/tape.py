"""What a program records: its arrays by name, the rows of several passes put together."""

from __future__ import annotations

import numpy as np

# What stands where a query of an earlier pass has no column for a later key.
UNSEEN = {"scores": -np.inf, "pattern": 0.0}


class Tape:
    """The arrays of one sequence of `length` tokens."""

    def __init__(self, length: int):
        self.length = length
        self.pieces: dict[str, list[np.ndarray]] = {}

    def keep(self, name: str, array: np.ndarray) -> None:
        """A copy of one array of this pass: (t, ...) or (H, t, ...)."""
        self.pieces.setdefault(name, []).append(np.array(array))

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array with all its rows."""
        return {name: self._joined(name, pieces) for name, pieces in self.pieces.items()}

    def _joined(self, name: str, pieces: list[np.ndarray]) -> np.ndarray:
        unseen = UNSEEN.get(name.rpartition(".")[2])
        if unseen is not None:
            pieces = [
                np.pad(
                    piece,
                    ((0, 0), (0, 0), (0, self.length - piece.shape[2])),
                    constant_values=unseen,
                )
                for piece in pieces
            ]
        return np.concatenate(pieces, axis=pieces[0].ndim - 2)
