"""The whole verification of a dump."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..api import Model
from ..errors import ArgumentError, DumpError
from ..loading import load
from ..params import Array, Config, Params
from ..plans import trace_names
from ..records import weights_sha256
from ..storage import STORAGES
from . import diagnosis, dumps
from .arithmetic import Arithmetic, arithmetic
from .comparison import Expectation, Given, OnProgress, compare, decide
from .dump import Dump
from .dumps.arrays import of_arrays
from .dumps.recording import Recording, check_weights
from .gallery import gallery, matrices_narrowed, matrices_to_int8, narrowed
from .layouts import Sizes
from .layouts import kind as layout_kind
from .matching import match
from .operations import Edit, Program, future, kind_of
from .propagation import evaluate
from .report import Finding, Report, Verdict

__all__ = ["verify", "verify_dump"]

# In how many layers an operation that no mistake explains is tried with all of them.
GIVEN_UP = 2

VERDICTS: tuple[Verdict, ...] = ("rounding", "suspicious", "wrong")


def verify(
    source: str | os.PathLike[str] | Dump | Recording | Mapping[str, Any],
    model: Model | str | os.PathLike[str],
    *,
    mapping: Mapping[str, str | None] | None = None,
    ids: Any = None,
    dtype: str | None = None,
    weights: str | None = None,
    chunks: Sequence[int] | None = None,
    explain: bool = True,
    on_progress: OnProgress | None = None,
) -> list[Report]:
    """Compare what another program computed with GPT-2.

    Parameters
    ----------
    source : path, mapping of str to ndarray, Recording or Dump
        A dump of any kind that :func:`numpygpt.verify.dumps.read` knows; or its arrays by name.
    model : Model or path
        The same weights. Best as they are in the file: loaded in float32, or in float64.
    mapping : mapping of str to str or None, optional
        Which of the source's names is which trace key; see :func:`.names.mapped`.
    ids : (T,) or (B, T) array of int, optional
        The tokens that were read, where the source does not say.
    dtype : str, optional
        What the program computed in: "float64", "float32", "tf32", "float16" or "bfloat16".
    weights : str, optional
        How its weights were stored, where that is not `dtype`; "int8", too.
    chunks : sequence of int, optional
        How many tokens each pass read, where it used a cache.
    explain : bool
        Look for known mistakes that explain what differs.
    on_progress : callable, optional
        ``on_progress(done, total, name)`` after each array.

    Returns
    -------
    list of Report
        One for each sequence of the source.

    Raises
    ------
    DumpError
        If the source is damaged, or nothing in it can be matched.
    ArgumentError
        If an option is unusable.

    Examples
    --------
    A port with the wrong GELU, and what is said about it:

    >>> import numpy as np, numpygpt
    >>> from numpygpt.ops import gelu
    >>> from numpygpt.verify import verify
    >>> model = numpygpt.load("shakespeare")
    >>> arrays = model.trace([46, 1, 2], names=["h.0.mlp.pre", "h.0.mlp.post"])
    >>> arrays["h.0.mlp.post"] = gelu(arrays["h.0.mlp.pre"])
    >>> (report,) = verify(arrays, model, ids=[46, 1, 2])
    >>> report.first.name, report.first.verdict, report.first.explanations[0].mistakes[0]
    ('h.0.mlp.post', 'wrong', 'exact (erf) GELU instead of gelu_new')
    """
    if not isinstance(model, Model):
        model = load(model)
    config, params = model.config, model.params
    about: dict[str, Any] = {"path": None, "sha256": None, "config": dataclasses.asdict(config)}
    if isinstance(source, Dump):
        options = {
            "mapping": mapping, "ids": ids, "dtype": dtype, "weights": weights, "chunks": chunks,
        }  # fmt: skip
        for name, value in options.items():
            if value is not None:
                raise ArgumentError(f"a Dump says itself what it is; set {name} there, not here")
        found = [source]
    else:
        recording = _recording(source, config)
        found = match(
            recording, config, reference(config, params), mapping, ids, dtype, weights, chunks
        )
        if recording.model_sha256 is not None:
            about["sha256"] = weights_sha256(config, params)
        notes = _doubts(recording, about, params.storage)
        found = [dataclasses.replace(dump, notes=(*dump.notes, *notes)) for dump in found]
    return [
        verify_dump(
            dump, config, params,
            explain=explain, on_progress=on_progress, model=dict(about), sequence=n,
        )
        for n, dump in enumerate(found)
    ]  # fmt: skip


def _recording(source: Any, config: Config) -> Recording:
    if isinstance(source, Recording):
        return source
    if isinstance(source, Mapping):
        return of_arrays(source)
    if not isinstance(source, str | os.PathLike):
        raise ArgumentError(
            f"expected the path of a dump, arrays by name or a Dump, not {type(source).__name__}"
        )
    return dumps.read(pathlib.Path(source), config)


def reference(config: Config, params: Params) -> Any:
    """Our own float64 run, as matching asks for it: from the ids and names to arrays."""

    def run(ids: Array, names: list[str]) -> dict[str, Array]:
        program = Program(np.asarray(ids, np.int64), config, params)
        return {
            name: np.where(future(len(ids)), -np.inf, array)
            if kind_of(name) == "h.{i}.attn.scores"
            else array
            for name, array in evaluate(program, names, {})
        }

    return run


def _doubts(recording: Recording, about: Mapping[str, Any], storage: str) -> list[str]:
    """What the source says about its model that is not so of ours."""
    notes = []
    if storage in STORAGES:
        notes.append(f"compared with a model loaded in {storage}; load it in float32 for its own")
    if recording.model_sha256 not in (None, about["sha256"]):
        notes.append(
            f"made with other weights: their sha256 is {str(recording.model_sha256)[:12]}..., "
            f"the model's {about['sha256'][:12]}..."
        )
    return notes


def verify_dump(
    dump: Dump,
    config: Config,
    params: Params,
    *,
    explain: bool = True,
    on_progress: OnProgress | None = None,
    model: dict[str, Any] | None = None,
    sequence: int = 0,
) -> Report:
    """Compare one sequence's arrays with GPT-2.

    Parameters
    ----------
    dump : Dump
    config : Config
    params : Params
        As the program's weights are said to be stored; float32 stands for itself.
    explain : bool
        Look for the mistakes that explain what differs.
    on_progress : callable, optional
        ``on_progress(done, total, name)``.
    model : dict, optional
        For the report.
    sequence : int
        For the report.

    Returns
    -------
    Report

    Raises
    ------
    ArgumentError
        If the dtype is not known or there is nothing to compare.
    """
    start = time.perf_counter()
    own = arithmetic(dump.dtype)
    _require_fitting(dump, config)
    program = Program(
        np.asarray(dump.ids, np.int64), config, params, dump.chunks or (len(dump.ids),),
        storage=as_stored(dump, config, params),
    )  # fmt: skip
    given = Given(dump.tensors, program.names)
    names = given.compared
    if not names:
        raise ArgumentError(
            "the dump holds none of the arrays of GPT-2, so nothing can be compared"
        )
    findings = []
    explaining = _Explaining(program, given, own)
    ours = None
    for finding, expected in compare(program, given, names, own, on_progress):
        if finding.name == "logits" and finding.inputs == ("ids",):
            ours = expected
        if explain:
            finding = explaining.finding(finding, Expectation(expected.value, expected.bound))
        findings.append(finding)
    decisions = decide(program, given["logits"], own, ours) if "logits" in given else []
    bad = [finding for finding in findings if finding.verdict != "rounding"]
    return Report(
        dump=dump,
        model=model or {},
        sequence=sequence,
        verdict=max((each.verdict for each in findings), key=VERDICTS.index),
        findings=tuple(findings),
        first=bad[0] if bad else None,
        decisions=tuple(decisions),
        seconds=time.perf_counter() - start,
    )


def _require_fitting(dump: Dump, config: Config) -> None:
    """A dump that was matched is sound; one that somebody put together may be anything."""
    ids = np.asarray(dump.ids)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise DumpError(f"the ids must be integers of shape (T,), not {ids.dtype} {ids.shape}")
    if ids.min() < 0 or ids.max() >= config.vocab_size or len(ids) > config.n_ctx:
        raise DumpError(
            f"expected at most {config.n_ctx} ids from 0 to {config.vocab_size - 1}, received "
            f"{len(ids)} from {ids.min()} to {ids.max()}"
        )
    if dump.chunks and sum(dump.chunks) != len(ids):
        raise DumpError(f"the passes read {sum(dump.chunks)} tokens, but there are {len(ids)}")
    if dump.weights is not None:
        check_weights(dump.weights, dump.source or "the dump")
    sizes = Sizes(config, 1, len(ids))
    for name in trace_names(config.n_layer):
        shape = tuple(sizes.of(axis) for axis in layout_kind(name).split())
        if name in dump.tensors and np.shape(dump.tensors[name]) != shape:
            received = np.shape(dump.tensors[name])
            raise DumpError(f"{name}: expected the shape {shape}, received {received}")


def as_stored(dump: Dump, config: Config, params: Params) -> Edit | None:
    """What a program that stores its weights as a dump says makes of ours.

    A program that computes in bfloat16 has all its weights in bfloat16. One that only stores them
    so may leave out vectors and positions, as :mod:`numpygpt.storage` does: its embedding tells.
    """
    dtype = dump.weights or dump.dtype
    if dtype == "int8":
        return None if params.storage == "int8" else matrices_to_int8
    if dtype not in ("float16", "bfloat16"):
        return None  # float32 as in the file, or as the model was loaded
    if dump.weights in (None, dump.dtype):
        return narrowed(dtype)
    readings = [matrices_narrowed(dtype), narrowed(dtype)]
    if "embed" not in dump.tensors:
        return readings[0]
    observed = np.asarray(dump.tensors["embed"], np.float64)
    right = Program(np.asarray(dump.ids, np.int64), config, params)

    def off(storage: Edit) -> float:
        made = dataclasses.replace(right, storage=storage, stored={})
        return float(np.abs(made.compute("embed", {}) - observed).max())

    return min(readings, key=off)


class _Explaining:
    """Explanations of one dump: what explained one layer is tried first in the next."""

    def __init__(self, program: Program, given: Given, own: Arithmetic):
        self.program, self.given, self.own = program, given, own
        self.known: dict[str, tuple[str, ...]] = {}
        self.unexplained: dict[str, int] = {}
        self.right: list[str] = []
        self.gallery = [each for each in gallery(program) if not 0 < each.roundoff <= own.u]

    def finding(self, finding: Finding, expected: Expectation) -> Finding:
        """With its explanations: wrong if one reproduces it, suspicious if one shows through."""
        if finding.verdict == "rounding":
            shown = diagnosis.hidden(
                self.program, self.given, finding, expected, self.own, self.gallery
            )
            if not shown:
                self.right.append(finding.name)
            return finding._replace(
                explanations=shown, verdict="suspicious" if shown else "rounding"
            )
        kind = kind_of(finding.name)
        found: tuple[Any, ...] = ()
        if kind in self.known:
            names = self.known[kind]
            again = [mistake for mistake in self.gallery if mistake.name in names]
            found = diagnosis.explain(
                self.program,
                self.given,
                finding,
                expected,
                self.own,
                again,
                len(names) > 1,
                self.right,
            )
        tries = self.unexplained.get(kind, 0)
        if not any(each.reproduces for each in found) and tries < GIVEN_UP:
            found = diagnosis.explain(
                self.program, self.given, finding, expected, self.own, self.gallery,
                pairs=kind not in self.known, right=self.right,
            )  # fmt: skip
            self.known[kind] = found[0].mistakes if found else ()
            self.unexplained[kind] = tries + (not any(each.reproduces for each in found))
        if any(each.reproduces for each in found):
            finding = finding._replace(verdict="wrong")
        return finding._replace(explanations=found)
