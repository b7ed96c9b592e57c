"""What is measured: a contestant, which runs in a process of its own and does as it is told.

``python -m numpygpt.bench.contestant NAME DIRECTORY --threads N`` loads one and answers every line
of JSON on standard input with one on standard output:

    {"method": "decode", "arguments": [[5, 6, 7], 16]}
    {"result": [0.011, 0.012, ...]}

``{"lacks": true}`` says that a contestant cannot do it, ``{"error": "..."}`` why it failed. The
first answer comes unasked, once the weights are loaded: its result is the version. Libraries print
what they like; during all of this their standard output is the error output.

A new contestant is a module in :mod:`numpygpt.bench.peers` with a subclass of :class:`Contestant`
in its list ``CONTESTANTS``. It imports the library it is about inside methods only, because every
module there is imported to learn its names.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import IO, Any, ClassVar

import numpy as np

from ..errors import ArgumentError

__all__ = [
    "COLD_IDS",
    "Contestant",
    "cold_command",
    "find",
    "known",
    "main",
    "missing",
    "packed",
    "serve",
    "unpacked",
]

Array = np.ndarray[Any, Any]


class Contestant:
    """A way to run GPT-2: the base class, which can do nothing.

    A method that a subclass leaves out raises NotImplementedError, and the table has a "-" there.
    Times are wall-clock seconds by ``time.perf_counter``. Everything is greedy; no method may
    stop early, whatever tokens come. The ids of a prompt are ints inside the vocabulary, and the
    prompt and all steps fit into the model's positions.

    Parameters
    ----------
    directory : pathlib.Path
        ``config.json`` and ``model.safetensors``, float32, in the Hugging Face layout. What a
        library needs in another form goes to ``directory / "peers"``, which may have to be made,
        and is found there the next time.
    threads : int
        How many threads it may use. OMP_NUM_THREADS and its kin are set to it, too.

    Attributes
    ----------
    name : str
        As the table shows it: library and dtype, such as ``"llama.cpp f32"``.
    requires : tuple of str
        Modules that must be importable. Without them it is left out.
    bound : float
        How far its logits may be from the float64 ones, as a share of their largest magnitude.
        Farther off it is not timed.
    bound_reason : str
        Why not the 2e-5 of float32, in a few words.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    bound: ClassVar[float] = 2e-5
    bound_reason: ClassVar[str] = "rounding of float32"

    def __init__(self, directory: pathlib.Path, threads: int):
        self.directory, self.threads = directory, threads

    def version(self) -> str:
        """The library's name and version, as ``"onnxruntime 1.20.1"``."""
        raise NotImplementedError

    def logits(self, ids: Sequence[int]) -> Array:
        """The scores after each token, (T, V); or of the last row only, (1, V), or (V,)."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """Seconds of each of `steps` greedy tokens, one at a time, after the prompt was read.

        The first one counted is the first that reads a single token: reading the prompt, which
        makes a token, too, is not part of it. A step ends when its token is known.
        """
        raise NotImplementedError

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to read a prompt, with an empty cache, until the last row's logits are there."""
        raise NotImplementedError

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Seconds of `steps` greedy tokens of all prompts together, reading them excluded."""
        raise NotImplementedError

    def score(self, ids: Sequence[int]) -> float:
        """Seconds until the T - 1 log-probabilities of a text's tokens are there, as numbers."""
        raise NotImplementedError

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """The command of a new process that loads, reads :data:`COLD_IDS` and makes one token.

        It is run after a contestant of this class was loaded from `directory`, so converted files
        are there. See :func:`cold_command`.
        """
        raise NotImplementedError


# The prompt of a cold start. Ids, since no vocabulary lies beside random weights; they are in every
# vocabulary.
COLD_IDS = (1, 2, 3)

_COLD_END = """
import time
now, peak = time.time(), None
import json, os, re
if os.path.exists("/proc/self/status"):
    with open("/proc/self/status") as status:
        peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read())[1])
print()
print(json.dumps({"now": now, "peak": peak}))
"""


def cold_command(code: str, *arguments: str) -> list[str]:
    """A process that runs `code`, then prints the time and its largest memory as JSON.

    Parameters
    ----------
    code : str
        Python that ends when the first token is known. It should import what it needs only.
    *arguments : str
        ``sys.argv[1:]`` there.

    Returns
    -------
    list of str
        The last line that it prints is ``{"now": time.time(), "peak": bytes or null}``; the peak
        is known on Linux (VmHWM).
    """
    return [sys.executable, "-c", code + _COLD_END, *arguments]


# -- names -----------------------------------------------------------------------------------------


def known() -> dict[str, type[Contestant]]:
    """Name -> class of every contestant in :mod:`numpygpt.bench.peers`, installed or not."""
    import pkgutil

    from . import peers

    found: dict[str, type[Contestant]] = {}
    for entry in pkgutil.iter_modules(peers.__path__):
        module = importlib.import_module(f"{peers.__name__}.{entry.name}")
        found |= {each.name: each for each in getattr(module, "CONTESTANTS", ())}
    return found


def find(name: str) -> type[Contestant]:
    """A contestant by its name, or ``module:class`` for one that is not part of numpygpt.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            kind: type[Contestant] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ArgumentError(f"there is no contestant {name!r}: {error}") from None
        if not isinstance(kind, type):
            raise ArgumentError(
                f"{name!r} is no contestant; expected a class such as "
                "numpygpt.bench.contestant.Contestant"
            )
        return kind
    names = known()
    if name not in names:
        raise ArgumentError(f"there is no contestant {name!r}; known are {', '.join(names)}")
    return names[name]


def missing(kind: type[Contestant]) -> list[str]:
    """The modules that a contestant needs and that cannot be imported here."""
    return [name for name in kind.requires if importlib.util.find_spec(name) is None]


# -- the process -----------------------------------------------------------------------------------


def serve(contestant: Contestant, requests: IO[str], answers: IO[str]) -> None:
    """Answer every request until there are no more."""
    for line in requests:
        request = json.loads(line)
        try:
            result = getattr(contestant, request["method"])(*request["arguments"])
            answer = {"result": packed(result) if isinstance(result, np.ndarray) else result}
        except NotImplementedError:
            answer = {"lacks": True}
        except Exception as error:  # of any library
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answers, answer)


def packed(array: Array) -> dict[str, Any]:
    """An array as JSON: its shape, and its numbers as float64 in base 64.

    >>> unpacked(packed(np.array([[1.0, 2.5]], np.float32)))
    array([[1. , 2.5]])
    """
    data = np.ascontiguousarray(array, "<f8").tobytes()
    return {"shape": array.shape, "data": base64.b64encode(data).decode()}


def unpacked(record: dict[str, Any]) -> Array:
    """The array of :func:`packed`."""
    return np.frombuffer(base64.b64decode(record["data"]), "<f8").reshape(record["shape"])


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Load a contestant and serve standard input."""
    parser = argparse.ArgumentParser(description="A contestant of numpygpt bench.")
    parser.add_argument("name")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(argv)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print, from C too, must not be taken for an answer
    sys.stdout = sys.stderr
    try:
        contestant = find(args.name)(args.directory, args.threads)
        version = contestant.version()
    except Exception as error:  # of any library
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _say(answers, {"result": version})
    serve(contestant, sys.stdin, answers)


if __name__ == "__main__":
    main()
