"""What a mistake is, and two ways to state one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..operations import OPERATIONS, Compute, Edit, Operation, Program

__all__ = ["Mistake", "exchanged", "has_bias", "rewired", "several_passes"]


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """One way to get GPT-2 wrong.

    Attributes
    ----------
    name : str
        What is wrong, in a few words; several forms of one mistake share it.
    why : str
        How people come to make it.
    kinds : tuple of str
        The rows of the table of intermediates where it shows, if their inputs are right.
    operations : mapping of str to Operation
        By row, what stands there instead.
    config : mapping of str to object
        Fields that differ.
    edit : callable, optional
        ``edit(program, name, array)`` -> array: what is made of the weights.
    when : callable
        ``when(program)`` -> whether it can be made with this model and these tokens.
    roundoff : float
        For a mistake that is only rounding: its unit. In an arithmetic that rounds as much it is
        none.
    slack : float
        What its numbers leave open, as a fraction of them: a table of halves is filled by
        functions that round differently.
    causal : bool
        Whether the first tokens come out the same whatever follows them.
    """

    name: str
    why: str
    kinds: tuple[str, ...]
    operations: Mapping[str, Operation] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None
    when: Callable[[Program], bool] = lambda program: True
    roundoff: float = 0.0
    slack: float = 0.0
    causal: bool = True

    def made(self, program: Program) -> Program:
        """The program with this mistake in it."""
        return dataclasses.replace(
            program,
            config=dataclasses.replace(program.config, **self.config),
            operations={**program.operations, **self.operations},
            edits=(*program.edits, self.edit) if self.edit else program.edits,
        )


def exchanged(
    name: str,
    why: str,
    *changes: tuple[str, Compute],
    when: Callable[[Program], bool] = lambda program: True,
    **more: Any,
) -> Mistake:
    """A mistake that computes some rows of the table otherwise, from the same inputs."""
    operations = {kind: OPERATIONS[kind]._replace(compute=compute) for kind, compute in changes}
    return Mistake(name, why, tuple(operations), operations, when=when, **more)


def rewired(name: str, why: str, **operations: tuple[tuple[str, ...], Compute]) -> Mistake:
    """A mistake in the order of a block. Keys are rows without ``h.{i}.``, dots as ``__``."""
    rows = {
        key if key in OPERATIONS else f"h.{{i}}.{key.replace('__', '.')}": Operation(
            tuple(f"h.{{i}}.{each}" for each in inputs), compute, key
        )
        for key, (inputs, compute) in operations.items()
    }
    return Mistake(name, why, tuple(rows), rows)


def has_bias(program: Program) -> bool:
    """Whether there are biases that could be forgotten."""
    return program.config.bias


def several_passes(program: Program) -> bool:
    """Whether the tokens were read with a cache."""
    return len(program.chunks) > 1
