"""Run records: what ran, on what, with which settings, and what came out; and comparing two.

A record is a JSON object with these keys:

=============  ====================================================================================
numpygpt       the version
verb           what was run, such as ``"generate"``
environment    :func:`environment`
model          :func:`describe`: name as given, dtype as :func:`numpygpt.load` takes it, config,
               overrides, weights_sha256
options        every setting with its resolved value, the seed included; prompts and short piped
               texts themselves, of other texts the path, SHA-256 and size
filters        what was done to the logits, in order, such as ``"temperature 0.8"``
results        what came out; nothing in it depends on the clock
=============  ====================================================================================

Running a record again needs ``model`` and ``options`` only; :func:`compare` then says whether
``results`` are the same, exactly, and if not, what differs around them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .checkpoints.json_files import parse_json, require_regular
from .errors import ArgumentError
from .params import Config, Params, shapes, shown
from .storage import Stored
from .threads import blas as get_blas
from .threads import get_threads

__all__ = [
    "Comparison",
    "Difference",
    "compare",
    "describe",
    "differences",
    "environment",
    "plain",
    "read",
    "record",
    "weights_sha256",
]

# Variables by which a BLAS, OpenMP or NumPy is told how many threads or which instructions to use.
# Either can change the order of a sum, and so its last bits.
VARIABLES = ("OPENBLAS_", "GOTO_", "OMP_", "MKL_", "BLIS_", "VECLIB_", "NPY_")

# Bytes. It is read whole, and takes several times this in memory.
LARGEST = 2**28

# Bytes that are made contiguous and hashed at a time.
PIECE_BYTES = 2**24

# Where an array's name in files is not the name of its field.
FIELDS = {"lm_head": "head"}

# What a record must have, and of which type.
KEYS: dict[str, type] = {
    "numpygpt": str,
    "verb": str,
    "environment": dict,
    "model": dict,
    "options": dict,
    "filters": list,
    "results": dict,
}
MODEL_KEYS: dict[str, type] = {
    "name": str,
    "dtype": str,
    "config": dict,
    "overrides": dict,
    "weights_sha256": str,
}


# -- writing -----------------------------------------------------------------------------------


def record(
    verb: str,
    model: Mapping[str, Any],
    options: Mapping[str, Any],
    results: Mapping[str, Any],
    filters: Iterable[str] = (),
) -> dict[str, Any]:
    """A record of a run, ready for ``json.dumps(..., allow_nan=False)``.

    Parameters
    ----------
    verb : str
    model : mapping
        As :func:`describe` returns it.
    options : mapping
        Every setting with its resolved value.
    results : mapping
        Arrays, dataclasses and NumPy's numbers may stand in it; see :func:`plain`.
    filters : iterable of str

    Returns
    -------
    dict

    Examples
    --------
    >>> import numpygpt
    >>> m = numpygpt.load("shakespeare")
    >>> model = describe("shakespeare", m.config, m.params)
    >>> made = record("generate", model, {"seed": 7}, {"ids": [1, 2]}, ["temperature 0.8"])
    >>> list(made)
    ['numpygpt', 'verb', 'environment', 'model', 'options', 'filters', 'results']
    >>> compare(made, made | {"results": {"ids": [1, 3]}}).result
    Difference(path='results.ids[1]', recorded=2, found=3)
    """
    around = environment()
    made: dict[str, Any] = plain(
        {
            "numpygpt": around["numpygpt"],
            "verb": verb,
            "environment": around,
            "model": model,
            "options": options,
            "filters": list(filters),
            "results": results,
        }
    )
    return made


def describe(
    name: str, config: Config, params: Params, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The entry ``model`` of a record. It hashes all weights: 0.5 GB for GPT-2 in float32.

    Parameters
    ----------
    name : str
        As it was given to :func:`numpygpt.load`.
    config : Config
        The one in use.
    params : Params
    overrides : mapping, optional
        The fields that were given to :func:`numpygpt.load` beside the checkpoint's own.
    """
    return {
        "name": name,
        "dtype": params.storage,
        "config": dataclasses.asdict(config),
        "overrides": dict(overrides or {}),
        "weights_sha256": weights_sha256(config, params),
    }


def environment() -> dict[str, Any]:
    """What a result can depend on beside model and settings.

    Returns
    -------
    dict
        Versions of numpygpt, NumPy, tiktoken and Python; platform, machine and processor; name,
        version and configuration of the BLAS that NumPy was built with, and the vector
        instructions it found; the bit generator that draws random numbers; how many processors
        this process may use; how many threads it does use, and the kernels that the BLAS chose
        (None if that cannot be asked); the variables set for BLAS, OpenMP and NumPy.

    Examples
    --------
    >>> import numpy
    >>> environment()["numpy"] == numpy.__version__
    True
    """
    from . import __version__

    library = get_blas()
    built: Mapping[str, Any] = np.show_config(mode="dicts") or {}
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return {
        "numpygpt": __version__,
        "numpy": np.__version__,
        "tiktoken": _version("tiktoken"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "blas": {
            "name": blas.get("name"),
            "version": blas.get("version"),
            "configuration": blas.get("openblas configuration"),
        },
        "simd": built.get("SIMD Extensions", {}).get("found"),
        "bit_generator": type(np.random.default_rng().bit_generator).__name__,
        "cpus": os.cpu_count(),
        "usable_cpus": _usable_cpus(),
        "threads": get_threads(),
        "kernel": library.kernel if library else None,
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def weights_sha256(config: Config, params: Params) -> str:
    """SHA-256 over all learned arrays, the same whatever file they came from.

    Hashed are, for each array in the order of :func:`numpygpt.params.shapes`: a line of its name
    and shape, and its numbers as float32 in C order, little-endian. So the hash does not depend
    on what the model computes in, nor on the file's format; it is not the hash of a file. Of
    matrices kept in bfloat16 or int8 the numbers are hashed that they stand for.

    Parameters
    ----------
    config : Config
    params : Params

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> len(weights_sha256(model.config, model.params))
    64
    """
    import hashlib

    digest = hashlib.sha256()
    for name, array in _named(config, params):
        digest.update(f"{name} {list(array.shape)}\n".encode())
        if isinstance(array, Stored) and array.turned:
            array = array[:]  # no row of it lies in one place
        # Rows at a time, so that no matrix that lies in Fortran order is copied whole.
        step = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            with np.errstate(over="ignore"):  # of float64: infinite, then
                digest.update(np.ascontiguousarray(array[start : start + step], "<f4").data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON has it: what is not a finite number is null, arrays are lists.

    >>> plain({"a": np.array([0.5, np.nan]), 3: (np.int64(1), pathlib.PurePosixPath("x"))})
    {'a': [0.5, None], '3': [1, 'x']}
    """
    match value:
        case None | bool() | str():
            return value
        case np.ndarray():
            return plain(value.tolist())
        case np.generic():
            return plain(value.item())
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(name): plain(item) for name, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        case Iterable():
            return [plain(item) for item in value]
        case _:
            return str(value)


# -- reading and comparing ---------------------------------------------------------------------


def read(path: str | os.PathLike[str], verb: str) -> dict[str, Any]:
    """A record from a file, with the keys above checked; what ``options`` holds, its verb checks.

    Parameters
    ----------
    path : str or path
    verb : str
        The verb whose record it must be.

    Returns
    -------
    dict

    Raises
    ------
    ArgumentError
        If there is no such file, it is too large, damaged, or the record of another verb.
    """
    file = pathlib.Path(path)
    try:
        require_regular(file, ArgumentError)
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > LARGEST:
        raise ArgumentError(f"{path}: a record has at most {LARGEST:,} bytes")
    found = parse_json(text, str(path), ArgumentError)
    _require(found, KEYS, str(path), "")
    _require(found["model"], MODEL_KEYS, str(path), "model.")
    if found["verb"] != verb:
        raise ArgumentError(
            f"{path}: a record of {shown(found['verb'])!r}, expected one of {verb!r}"
        )
    return found


class Difference(NamedTuple):
    """A place in two records, such as ``results.ids[3]``, and what stands there."""

    path: str
    recorded: Any
    found: Any


class Absent:
    """Stands where one of two records has nothing."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()


class Comparison(NamedTuple):
    """How a run differs from its record.

    Attributes
    ----------
    result : Difference or None
        The first difference of ``results``; None if they are identical.
    places : int
        How many places of ``results`` differ.
    largest : float or None
        If only numbers with a fraction differ, such as log-probabilities, by how much at most.
    around : list of Difference
        All differences of ``model`` and ``environment``, which may be the reason.
    """

    result: Difference | None
    places: int
    largest: float | None
    around: list[Difference]


def compare(recorded: Mapping[str, Any], again: Mapping[str, Any]) -> Comparison:
    """Compare a run with its record, exactly.

    Parameters
    ----------
    recorded, again : mapping
        As :func:`record` and :func:`read` return them.

    Returns
    -------
    Comparison
    """
    first: Difference | None = None
    places, largest, rounding = 0, 0.0, True
    for difference in differences(recorded["results"], again["results"], "results"):
        first, places = first or difference, places + 1
        _, before, after = difference
        if isinstance(before, float) and isinstance(after, float):
            largest = max(largest, abs(before - after))
        else:
            rounding = False
    around = [
        difference
        for name in ("model", "environment")
        for difference in differences(recorded[name], again[name], name)
    ]
    return Comparison(first, places, largest if first and rounding else None, around)


def differences(recorded: Any, found: Any, path: str) -> Iterator[Difference]:
    """Every place where two JSON values differ, in the order of the first.

    Numbers are equal if their values are, so 1 and 1.0 are; true and 1 are not.

    >>> list(differences({"a": [1, 2]}, {"a": [1], "b": None}, "x"))
    [Difference(path='x.a[1]', recorded=2, found=nothing), \
Difference(path='x.b', recorded=nothing, found=None)]
    """
    if isinstance(recorded, dict) and isinstance(found, dict):
        for name in [*recorded, *(name for name in found if name not in recorded)]:
            yield from differences(
                recorded.get(name, ABSENT), found.get(name, ABSENT), f"{path}.{name}"
            )
    elif isinstance(recorded, list) and isinstance(found, list):
        for i in range(max(len(recorded), len(found))):
            yield from differences(
                recorded[i] if i < len(recorded) else ABSENT,
                found[i] if i < len(found) else ABSENT,
                f"{path}[{i}]",
            )
    elif not _same(recorded, found):
        yield Difference(path, recorded, found)


def _same(a: Any, b: Any) -> bool:
    number = isinstance(a, int | float) and isinstance(b, int | float)
    alike = type(a) is type(b) or (number and not isinstance(a, bool) and not isinstance(b, bool))
    return alike and bool(a == b)


def _require(found: Mapping[str, Any], keys: Mapping[str, type], path: str, above: str) -> None:
    """Refuse an object that lacks a key, or has something else there."""
    for name, kind in keys.items():
        if not isinstance(found.get(name), kind):
            said = f"{type(found[name]).__name__} there" if name in found else "nothing"
            raise ArgumentError(
                f"{path}: not a run record: expected a {kind.__name__} as {above}{name}, found "
                f"{said}"
            )


# -- what this machine is ----------------------------------------------------------------------


def _version(package: str) -> str | None:
    import importlib.metadata  # slow, and not every command needs it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name: which one it is decides which loops a BLAS takes."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:  # only Linux has that file
        pass
    return platform.processor()


def _usable_cpus() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count()


def _named(config: Config, params: Params) -> Iterator[tuple[str, Any]]:
    """Every learned array with its name in files: the inverse of :func:`numpygpt.params.pack`."""
    for name in shapes(config):
        *path, kind = name.split(".")
        part: Any = params
        for step in path:
            part = part[int(step)] if step.isdecimal() else getattr(part, FIELDS.get(step, step))
        whole = path[0] in ("wte", "wpe", "lm_head")
        yield name, part if whole else part[kind == "bias"]  # (w, b) or (g, b)
