"""``--jsonl``: a JSON value on each line of the input, and answers that are JSON lines, too.

A verb reads with :func:`read_lines` and prints with :func:`print_answers`. A line that is wrong,
and one that cannot be read, is answered with what is wrong in its place among the others.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

from ..errors import ArgumentError
from ..records import plain
from .terminal import tell
from .texts import STANDARD_INPUT, open_input

__all__ = ["Line", "arriving", "exact", "print_answers", "read_lines"]

# Bytes of a line.
LONGEST = 2**24

# Lines that are read before somebody asks for them.
AHEAD = 64


class Line(NamedTuple):
    """A line of the input.

    Attributes
    ----------
    place : str
        Such as "line 3 of standard input".
    asked : dict
        Its object, which can be printed as JSON; empty if it has none.
    problem : str
        Why it cannot be answered, or nothing.
    """

    place: str
    asked: dict[str, Any]
    problem: str = ""


def read_lines(name: str, bare: str, reserved: Collection[str]) -> Iterator[Line]:
    """The lines of a file that are not blank, each as soon as it is there.

    Parameters
    ----------
    name : str
        A path, or "-" for standard input.
    bare : str
        The key under which a value stands that is no object.
    reserved : collection of str
        Keys that answers have. A line that has one of them, or "error", is wrong: its value would
        be lost.

    Yields
    ------
    Line
        After a line that is too long, or cannot be read, there is none.

    Raises
    ------
    ArgumentError
        If the file cannot be opened.
    """
    shown = "standard input" if name == STANDARD_INPUT else name
    with open_input(name) as file:
        yield from _lines(file, shown, bare, {*reserved, "error"})


def arriving(
    bare: str, reserved: Collection[str], may_wait: Callable[[], bool]
) -> Iterator[Line | None]:
    """The lines of standard input, for somebody who has other work while none is there.

    From a file they are read as they are asked for, so that a run repeats. A pipe or a terminal
    can keep its reader waiting, so a thread reads it, a few lines ahead.

    Parameters
    ----------
    bare, reserved
        As for :func:`read_lines`.
    may_wait : function
        Asked when there is no line yet.

    Yields
    ------
    Line or None
        None if there is no line yet and `may_wait` says no; there may be one later.

    Raises
    ------
    ArgumentError
        If there is no standard input.
    """
    with open_input(STANDARD_INPUT) as file:
        pipe = _pipe(file)
        lines = _lines(pipe or file, "standard input", bare, {*reserved, "error"})
        if pipe is None:
            yield from lines
            return
    arrived: queue.Queue[Line | Exception | None] = queue.Queue(AHEAD)
    threading.Thread(target=_read, args=[lines, arrived], daemon=True).start()
    while True:
        wait = may_wait()
        try:  # in Windows, Ctrl-C does not end a wait, but comes behind it
            item = arrived.get(wait, timeout=1)
        except queue.Empty:
            if not wait:
                yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        yield item


def _read(lines: Iterator[Line], arrived: queue.Queue[Line | Exception | None]) -> None:
    try:
        for line in lines:
            arrived.put(line)
    except Exception as error:
        arrived.put(error)
    else:
        arrived.put(None)


def print_answers(line: Line, answers: Iterable[Mapping[str, Any]] | str) -> bool:
    """Print each answer to a line, together with what the line has; say whether all was well.

    Parameters
    ----------
    line : Line
    answers : iterable of mapping, or str
        What :func:`numpygpt.records.plain` makes JSON of; or why there is no answer, which is
        printed on standard error, too.
    """
    if isinstance(answers, str):
        print(json.dumps(line.asked | {"error": answers}), flush=True)
        tell("error", f"{line.place}: {answers}")
        return False
    for answer in answers:
        print(json.dumps(line.asked | plain(answer)), flush=True)
    return True


def exact(text: str) -> str:
    r"""A text that has UTF-8: JSON can spell half of a surrogate pair, such as "\ud83d".

    Raises
    ------
    ArgumentError
        If it has none.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError("the text has half of a surrogate pair") from None
    return text


def _pipe(file: BinaryIO) -> BinaryIO | None:
    """Another reader of a pipe or a terminal; None for what never keeps its reader waiting.

    Python cannot end while a thread waits inside the reader of ``sys.stdin``.
    """
    try:
        number = file.fileno()
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(number).st_mode):
        return None
    return open(number, "rb", closefd=False)


def _lines(file: BinaryIO, shown: str, bare: str, reserved: Collection[str]) -> Iterator[Line]:
    for number in itertools.count(1):
        place = f"line {number} of {shown}"
        try:
            data = file.readline(LONGEST + 1)
        except OSError as error:
            yield Line(place, {}, f"cannot be read: {error.strerror}")
            return
        if not data:
            return
        if len(data) > LONGEST:
            problem = f"more than {LONGEST:,} bytes; nothing from here on was read"
            yield Line(place, {}, problem)
            return
        if data.strip():
            yield _line(place, data, bare, reserved)


def _line(place: str, data: bytes, bare: str, reserved: Collection[str]) -> Line:
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
        asked = value if isinstance(value, dict) else {bare: value}
        # What cannot be printed shows here: a number that Python reads as infinity, such as 1e999,
        # and what is nested too deeply (print_answers has more of the stack left than this).
        json.dumps(asked, allow_nan=False)
    except ValueError as error:  # not UTF-8, not JSON
        return Line(place, {}, f"expected JSON, but {error}")
    except RecursionError:
        return Line(place, {}, "nested too deeply")
    if taken := sorted(asked.keys() & reserved):
        return Line(place, {}, f"these keys are for the answer: {', '.join(taken)}; rename them")
    return Line(place, asked)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
