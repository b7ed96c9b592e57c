"""What ``score`` and ``perplexity`` share: texts, windows, one text after the other, Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..feed import CHUNK
from ..scoring import window_and_stride
from .options import whole
from .record import unfit
from .terminal import INTERRUPTED, one_line, tell
from .texts import Source, named

__all__ = [
    "add_texts",
    "add_windows",
    "in_turn",
    "progress",
    "settled",
    "status_of",
    "texts_and_windows",
    "windows_of",
]

T = TypeVar("T")


# -- options -----------------------------------------------------------------------------------


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Declare ``FILE``."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a text in UTF-8, at most 256 MiB; - is standard input, which is also read if it is "
        "piped and no FILE is given",
    )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Declare how a text is cut into windows that a model can read."""
    parser.add_argument(
        "--window",
        type=whole(2),
        metavar="W",
        help="tokens in a window, the scored ones included: 2 to n_ctx + 1 (default: n_ctx, or 2 "
        "if that is 1)",
    )
    parser.add_argument(
        "--stride",
        type=whole(1),
        metavar="S",
        help="how far each window stands from the one before: 1 to W - 1 (default: half of W). "
        "A window scores the tokens that none before it scored, so every token has at least W - S "
        "tokens of context where there are so many; a smaller S takes longer",
    )
    parser.add_argument(
        "--first-token",
        choices=("skip", "end-of-text"),
        metavar="{skip,end-of-text}",
        help="the first token of a text has no context: it is read but not scored, or the text is "
        "read after an end-of-text token (default: skip)",
    )
    parser.add_argument(
        "--chunk",
        type=whole(1),
        metavar="N",
        help="most tokens in one forward pass, 1 or more; changes nothing but rounding and speed "
        f"(default: {CHUNK})",
    )


def windows_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``Model.score`` that the options of :func:`add_windows` are.

    Raises
    ------
    ArgumentError
        If the stride is not smaller than the window.
    """
    if args.window is not None and args.stride is not None:
        # Whether the window fits the model is seen when that is loaded.
        window_and_stride(args.window, args.stride, n_ctx=args.window)
    return {
        "window": args.window,
        "stride": args.stride,
        "first_token": args.first_token or "skip",
        "chunk": args.chunk or CHUNK,
    }


def texts_and_windows(
    args: argparse.Namespace, old: Mapping[str, Any] | None
) -> tuple[list[Source], dict[str, Any]]:
    """Both from the command line, or from the record that is replayed.

    Raises
    ------
    ArgumentError
        If a text cannot be read, or the record is damaged.
    """
    if old is None:
        options = windows_of(args)
        return [Source.look(name) for name in named(args.files)], options
    match old["options"]:
        case {
            "texts": [_, *_] as texts,
            "window": int() as window,
            "stride": int() as stride,
            "first_token": str() as first_token,
            "chunk": int() as chunk,
        }:  # their values are checked where they go
            sources = [Source.from_record(text, args.replay) for text in texts]
            ways = {"window": window, "stride": stride, "first_token": first_token, "chunk": chunk}
            return sources, ways
    raise unfit(args)


def settled(options: Mapping[str, Any], n_ctx: int) -> dict[str, Any]:
    """The settings with their resolved values."""
    window, stride = window_and_stride(options["window"], options["stride"], n_ctx)
    return {**options, "window": window, "stride": stride}


# -- work --------------------------------------------------------------------------------------


def progress(source: Source, tokens: int, silent: bool) -> Any:
    """A progress bar on standard error if that is a terminal: to be entered, and updated."""
    from tqdm import tqdm

    disable = True if silent or sys.stderr is None else None  # None: unless it is a terminal
    name = one_line(source.name)[-30:]
    return tqdm(total=tokens, desc=name, unit="token", leave=False, disable=disable)


def in_turn(
    sources: Sequence[Source], work: Callable[[Source], T]
) -> Iterator[tuple[str, T, bool]]:
    """Do the work on each text, until Ctrl-C comes.

    Parameters
    ----------
    sources : sequence of Source
    work : function
        Returns a result that has a ``count`` of tokens. What its ``Interrupted`` holds is the
        last result, if that counts any.

    Yields
    ------
    name : str
        Of the text, on one line; an unfinished one is marked.
    result : object
    is_whole : bool
    """
    for source in sources:
        name = one_line(source.name)
        try:
            result = work(source)
        except KeyboardInterrupt as stopped:
            part: Any = getattr(stopped, "results", None)
            if part is not None and part.count:
                yield f"{name} (so far)", part, False
            return
        yield name, result, True


def status_of(finished: int, sources: Sequence[Source], status: int = 0) -> int:
    """The exit code; if Ctrl-C came, it is told."""
    if finished == len(sources):
        return status
    tell("interrupted", f"incomplete: {finished} of {len(sources)} texts were finished")
    return INTERRUPTED
