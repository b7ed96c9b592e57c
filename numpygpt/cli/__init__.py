"""The command line: ``numpygpt <verb>``, one file for each verb."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import CheckpointWarning, NumpyGPTError
from .options import restore_dashes
from .terminal import INTERRUPTED, tell

__all__ = ["main"]

# Each is a module here with `add(subparsers)`, which declares its options, and `run(args)`.
VERBS = ("generate", "score", "perplexity", "inspect", "convert", "trace", "verify", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Parameters
    ----------
    argv : sequence of str, optional
        ``sys.argv[1:]`` if None.

    Returns
    -------
    int
        0 if all went well, 1 if a proof failed, a replay differed or a verification found more
        than rounding, 2 if the input was unusable, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="numpygpt",
        description="GPT-2 in NumPy: generate text, score it, look at checkpoints, convert them, "
        "verify other implementations.",
        epilog="exit codes: 0 if all went well, 1 if a proof failed, a replay differed or a "
        "verification found more than rounding, 2 if the input was unusable, "
        f"{INTERRUPTED} after Ctrl-C",
    )
    parser.add_argument("--version", action="version", version=f"numpygpt {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    argv = list(sys.argv[1:] if argv is None else argv)
    # Importing a verb takes time, so only the one that is asked for is, if one is.
    for verb in VERBS if not argv or argv[0] not in VERBS else argv[:1]:
        module = importlib.import_module(f".{verb}", __name__)
        declared = module.add(subparsers)
        declared.set_defaults(run=module.run, declared=declared)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = lambda message, *_, **__: tell("warning", message)
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """The exit code of a verb, once every error has been told."""
    try:
        restore_dashes(args)
        status: int = args.run(args)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status
    except NumpyGPTError as error:
        tell("error", error)
        return 2
    except MemoryError as error:
        tell("error", f"out of memory: {error}")
        return 2
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print(file=sys.stderr)  # after the terminal's own ^C
        return INTERRUPTED
    except OSError as error:
        # What is read has its own errors, so this is the output. Python would complain once more
        # when it flushes at its end.
        sys.stdout = io.StringIO()
        if isinstance(error, BrokenPipeError):  # whoever read it has had enough
            return 0
        tell("error", f"cannot write the output: {error.strerror or error}")
        return 2
