"""``assert_matches_gpt2``: a verification as one line of a test."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..api import Model
    from .dump import Dump
    from .report import Report

__all__ = ["assert_matches_gpt2"]

Tensors: TypeAlias = "Mapping[str, Any]"
Candidate: TypeAlias = "str | os.PathLike[str] | Dump | Tensors | Callable[[Any], Tensors]"


def assert_matches_gpt2(
    candidate: Candidate,
    model: Model | str | os.PathLike[str],
    *,
    ids: Sequence[int] | None = None,
    verbose: bool = False,
    **options: Any,
) -> list[Report]:
    """Fail unless a candidate computes what GPT-2 does, within the rounding of its dtype.

    Parameters
    ----------
    candidate : path, Dump, mapping or callable
        A dump of any kind; or its arrays by name; or a function that makes these arrays from
        `ids`, which it gets as they are given here.
    model : Model or path
        The weights that the candidate has.
    ids : sequence of int, optional
        The tokens it has read, which a mapping and a function need.
    verbose : bool
        Say everything about what failed.
    **options
        As for :func:`numpygpt.verify.verify`, such as ``dtype="bfloat16"``.

    Returns
    -------
    list of Report
        One for each sequence; all of them passed.

    Raises
    ------
    AssertionError
        With the report as its message, of each sequence that did not pass.
    ArgumentError, DumpError
        If the candidate or an option is unusable.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> candidate = lambda ids: model.trace(ids, names=["h.0.*", "logits"])
    >>> (report,) = assert_matches_gpt2(candidate, model, ids=[46, 1, 2])
    >>> report.verdict
    'rounding'
    """
    __tracebackhide__ = True  # what pytest shows ends in the test that called this
    from numpygpt import verify

    from .reports import as_text

    if callable(candidate):
        if ids is None:
            raise ArgumentError("a candidate that is a function needs ids=, the tokens to run on")
        candidate = candidate(ids)
    reports = verify.verify(candidate, model, ids=ids, **options)
    failed = [as_text(report, verbose) for report in reports if not report.passed]
    if failed:
        raise AssertionError("\n\n".join(failed))
    return reports
