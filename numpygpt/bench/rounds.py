"""All contestants take turns: each is checked, warmed up, and then timed in every round.

A machine that is busy for a while slows all of them; so ratios are taken within a round, and the
limits of the machine have their turn in it, too.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoints.config import read_config
from ..errors import NumpyGPTError
from ..params import Array, Config
from . import machine
from .cases import Case
from .contestant import Contestant, find
from .process import ContestantFailed, Lacks, Process, cold_start

__all__ = ["Entrant", "Settings", "WrongResultsError", "distance", "measure"]

EXACT = "numpygpt float64"
LIMITS = f"{machine.__name__}:Limits"
PROFILE = f"{__package__}.profile:Profile"

# Tokens of the text on which logits are compared.
CHECKED = 32

# Before every turn. Libraries let their threads spin for up to 0.2 s after a call, in case there
# is another one, and so would take part in the next contestant's time.
PAUSE = 0.2


class WrongResultsError(NumpyGPTError):
    """The first contestant's logits are not those of float64, so nothing is worth timing."""


@dataclass
class Settings:
    """What is measured.

    Attributes
    ----------
    contestants : list of str
        The first is the one that the others are compared with.
    cases : list of Case
    threads, rounds, steps : int
    timeout : float
        Seconds that a contestant may take to answer.
    profile : str or None
        The dtype of numpygpt whose operations are timed.
    """

    contestants: list[str]
    cases: list[Case]
    threads: int
    rounds: int = 5
    steps: int = 128
    timeout: float = 600.0
    profile: str | None = None

    @property
    def turns(self) -> int:
        """At most so many times :func:`measure` calls ``on_turn``."""
        each = 1 + len(self.cases) * (self.rounds + 1)
        return 1 + len(self.contestants) * each + bool(self.profile)


@dataclass
class Entrant:
    """A contestant in this run.

    Attributes
    ----------
    spelled : str
        As it was asked for.
    kind : type of Contestant
    process : Process or None
        None once it is out.
    error : float or None
        Distance of its logits from the float64 ones.
    cases : dict of str to dict
        Case -> what was measured; without the cases that it lacks or failed.
    notes : list of str
        What went wrong.
    """

    spelled: str
    kind: type[Contestant]
    process: Process | None = None
    version: str = ""
    error: float | None = None
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask its process; None if it cannot, which is noted. Once it has ended it is out."""
        if self.process is None:
            return None
        try:
            return self.process.ask(method, *arguments)
        except Lacks:
            return None
        except ContestantFailed as error:
            self.notes.append(str(error))
            if not self.process.alive:
                self.leave()
            return None

    def leave(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.close()
        self.process = None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.kind.name,
            "version": self.version,
            "error": self.error,
            "bound": self.kind.bound,
            "bound_reason": self.kind.bound_reason,
            "cases": self.cases,
            "notes": self.notes,
        }


def measure(
    directory: pathlib.Path,
    settings: Settings,
    on_turn: Callable[[str], object] = lambda what: None,
) -> dict[str, Any]:
    """Check and time every contestant.

    Parameters
    ----------
    directory : pathlib.Path
        The weights: ``config.json`` and ``model.safetensors`` in float32.
    settings : Settings
    on_turn : callable
        Told before each turn what comes.

    Returns
    -------
    dict
        The record that :mod:`numpygpt.bench.report` reads.

    Raises
    ------
    WrongResultsError
        If the first contestant does not load, or its logits are wrong.
    """
    machine_record = machine.describe()
    config = read_config(directory / "config.json")
    ids = np.random.default_rng(2).integers(0, config.vocab_size, min(CHECKED, config.n_ctx))
    on_turn(f"{EXACT}: logits")
    exact = _exact(directory, settings, ids.tolist())
    entrants = [Entrant(name, find(name)) for name in settings.contestants]
    limits = Process(LIMITS, directory, settings.threads, settings.timeout)
    try:
        for entrant in entrants:
            on_turn(f"{entrant.kind.name}: load and check")
            _enter(entrant, directory, settings, ids.tolist(), exact)
            if entrant is entrants[0] and entrant.process is None:
                raise WrongResultsError(f"{entrant.kind.name}: {'; '.join(entrant.notes)}")
        measured = {
            case.name: _case(case, entrants, limits, directory, settings, config, on_turn)
            for case in settings.cases
        }
        machine_record |= limits.ask("describe")
    finally:
        for entrant in entrants:
            entrant.leave()
        limits.close()
    record = {
        "machine": machine_record,
        "settings": {
            "threads": settings.threads,
            "rounds": settings.rounds,
            "steps": settings.steps,
        },
        "config": dict(vars(config)),
        "limits": measured,
        "contestants": [entrant.record() for entrant in entrants],
    }
    if settings.profile:
        on_turn("profile")
        record["profile"] = _profile(directory, settings)
    return record


def distance(got: Array, want: Array) -> float:
    """The largest difference of logits, as a share of the largest of them; NaN if any is NaN.

    Parameters
    ----------
    got : (N, V) or (V,) ndarray
        The last N rows of the text, or fewer than `want` has.
    want : (T, V) ndarray

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> float(distance(np.array([3.0, -3.5]), np.array([[9.0, 9.0], [3.0, -4.0]])))
    0.125
    """
    got = np.atleast_2d(got)
    if got.ndim != 2 or not 1 <= len(got) <= len(want) or got.shape[1] != want.shape[1]:
        raise ValueError(f"logits have the shape {got.shape}, expected {want.shape}, or its end")
    want = want[-len(got) :]
    return float(abs(got - want).max() / abs(want).max())


def _exact(directory: pathlib.Path, settings: Settings, ids: list[int]) -> Array:
    """The float64 logits, from a process that has ended before anything is timed."""
    try:
        process = Process(EXACT, directory, settings.threads, settings.timeout)
        with contextlib.closing(process):
            logits: Array = process.ask("logits", ids)
            return logits
    except ContestantFailed as error:
        raise WrongResultsError(f"{EXACT}: {error}") from None


def _enter(
    entrant: Entrant, directory: pathlib.Path, settings: Settings, ids: list[int], exact: Array
) -> None:
    """Start a contestant and compare its logits; if they are wrong it is out."""
    try:
        process = Process(entrant.spelled, directory, settings.threads, settings.timeout)
    except ContestantFailed as error:
        entrant.notes.append(str(error))
        return
    entrant.process, entrant.version = process, process.version
    got = entrant.ask("logits", ids)
    if got is None:
        entrant.notes.append("it has no logits to check, so it is not timed")
        return entrant.leave()
    try:
        entrant.error = distance(got, exact)
    except ValueError as error:
        entrant.notes.append(str(error))
        return entrant.leave()
    bound = entrant.kind.bound
    if not entrant.error <= bound:  # NaN, too
        entrant.notes.append(
            f"wrong results: its logits are {entrant.error:.1e} of their scale away from the "
            f"float64 ones, more than {bound:.0e} ({entrant.kind.bound_reason})"
        )
        entrant.leave()


def _case(
    case: Case,
    entrants: Sequence[Entrant],
    limits: Process,
    directory: pathlib.Path,
    settings: Settings,
    config: Config,
    on_turn: Callable[[str], object],
) -> dict[str, list[float]]:
    """Measure one case into ``cases`` of every entrant; return the limits of each round."""
    for entrant in entrants:  # what is loaded or compiled at the first call
        if entrant.process is not None and case.kind != "cold":
            on_turn(f"{case.name}: {entrant.kind.name}, warming up")
            warm = min(settings.steps, 4)
            _turn(case, entrant, directory, settings, case.arguments(config.vocab_size, warm))
    arguments = case.arguments(config.vocab_size, settings.steps)
    found: dict[str, list[dict[str, Any]]] = {entrant.spelled: [] for entrant in entrants}
    bounds: dict[str, list[float]] = {}
    for number in range(settings.rounds):
        for name, value in _limits_of(case, limits):
            bounds.setdefault(name, []).append(value)
        for entrant in _rotated(entrants, number):
            if entrant.process is None or len(found[entrant.spelled]) < number:
                continue
            on_turn(f"{case.name}: {entrant.kind.name}, round {number + 1} of {settings.rounds}")
            time.sleep(PAUSE)
            measured = _turn(case, entrant, directory, settings, arguments)
            if measured is not None:
                found[entrant.spelled].append(measured)
    for entrant in entrants:
        rounds = found[entrant.spelled]
        if len(rounds) == settings.rounds:
            entrant.cases[case.name] = {key: [each[key] for each in rounds] for key in rounds[0]}
    return bounds


def _turn(
    case: Case,
    entrant: Entrant,
    directory: pathlib.Path,
    settings: Settings,
    arguments: list[Any],
) -> dict[str, Any] | None:
    """One measurement, or None."""
    if case.kind == "cold":
        try:
            command = entrant.kind.cold(directory, settings.threads)
            seconds, peak = cold_start(command, settings.threads, settings.timeout)
        except NotImplementedError:
            return None
        except ContestantFailed as error:
            entrant.notes.append(str(error))
            return None
        return {"seconds": seconds, "peak": peak}
    answer = entrant.ask(case.kind, *arguments)
    if answer is None:
        return None
    return {"seconds": sum(answer) if isinstance(answer, list) else answer}


def _limits_of(case: Case, limits: Process) -> Iterator[tuple[str, float]]:
    """What bounds a case on this machine, measured now."""
    if case.kind == "decode":
        yield "bandwidth", limits.ask("bandwidth")
    if case.kind in ("prefill", "score"):
        yield "peak", limits.ask("peak")
        yield "products", limits.ask("products", case.size)


def _rotated(entrants: Sequence[Entrant], number: int) -> list[Entrant]:
    """Another one begins in each round, so that nobody always follows the same one."""
    first = number % len(entrants)
    return [*entrants[first:], *entrants[:first]]


def _profile(directory: pathlib.Path, settings: Settings) -> dict[str, Any]:
    try:
        process = Process(PROFILE, directory, settings.threads, settings.timeout)
        with contextlib.closing(process):
            profile: dict[str, Any] = process.ask("profile", settings.profile, settings.steps)
            return profile
    except ContestantFailed as error:
        raise WrongResultsError(str(error)) from None
