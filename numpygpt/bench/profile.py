"""Where the time of a decode step and of a prefill goes, beside a lower bound of each operation.

The functions of the page are replaced, for as long as the measurement takes, by ones that note the
time, so the page is measured as it is. Each operation's time is without that of the operations
inside it, and without what the clock itself costs.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import model as page
from .. import ops
from ..loading import load
from ..params import Config, Params
from .machine import Limits
from .shapes import attention_flops, cache_bytes

__all__ = ["Profile", "Stopwatch", "bounds", "watching"]

# The prompt that is read in a prefill, and before the decode steps.
ROWS = 512
PASSES = 5

REST = "rest"

# Page function -> operation, what it calls in turn excepted: what remains of `mlp` without its
# products is the activation function.
OPERATIONS = {
    "layer_norm": "layer norm",
    "attention": "attention",
    "mlp": "GELU",
    "unembed": "logits",
}


class Stopwatch:
    """Adds up the time of functions, each without the watched functions that it calls.

    Only the thread that made it is watched; others work for one of its functions.

    Attributes
    ----------
    laps : list of dict
        Operation -> seconds between one call of :meth:`lap` and the next. ``"rest"`` is what no
        operation took.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.inside = self.outside = 0.0  # cost of a watched call, within its time and around it
        self.laps: list[dict[str, float]] = []
        self._calibrate()
        self.start()

    def watch(self, function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """The function, with its time added to the operation that `name` makes of its arguments."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            operation = name(*args, **kwargs)
            self._within.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                own = took - self._within.pop() - self.inside
                self._seconds[operation] = self._seconds.get(operation, 0.0) + own
                self._within[-1] += took + self.outside

        return watched

    def lap(self) -> None:
        """End a lap, and begin another."""
        total = time.perf_counter() - self._began
        self.laps.append(self._seconds | {REST: total - self._within[0]})
        self.start()

    def typical(self) -> dict[str, float]:
        """The mean of the faster half of the laps, in which nothing disturbed: they add up.

        Returns
        -------
        dict of str to float
            Operation -> seconds.
        """
        laps = sorted(self.laps, key=lambda lap: sum(lap.values()))
        laps = laps[: (len(laps) + 1) // 2]
        names = dict.fromkeys(name for lap in laps for name in lap)
        return {name: sum(lap.get(name, 0.0) for lap in laps) / len(laps) for name in names}

    def start(self) -> None:
        """Begin a lap now, and forget what was since the last one."""
        self._seconds: dict[str, float] = {}
        self._within = [0.0]  # seconds in watched calls, at each depth of calls
        self._began = time.perf_counter()

    def _calibrate(self, calls: int = 2000) -> None:
        """What is measured where there is nothing to measure: the least of some trials."""

        def nothing() -> None:
            pass

        watched = self.watch(nothing, lambda: "nothing")
        trials = []
        for _ in range(5):
            self.start()
            for _ in range(calls):
                watched()
            whole = (time.perf_counter() - self._began) / calls
            trials.append((whole, self._seconds["nothing"] / calls))
        whole, inside = min(trials)
        self.inside, self.outside = inside, whole - inside


@contextlib.contextmanager
def watching(stopwatch: Stopwatch, params: Params) -> Iterator[None]:
    """Watch the page's functions wherever numpygpt calls them."""
    block = params.h[0]
    # By shape, since a long run multiplies by copies of these matrices. An MLP that is as wide as
    # the stream has two of one shape: their time is found under the last name.
    names = {
        linear.w.shape: name
        for name, linear in (
            ("attn.c_attn", block.attn.c_attn),
            ("attn.c_proj", block.attn.c_proj),
            ("mlp.c_fc", block.mlp.c_fc),
            ("mlp.c_proj", block.mlp.c_proj),
        )
    }
    with contextlib.ExitStack() as stack:
        for function, operation in OPERATIONS.items():
            watched = stopwatch.watch(getattr(page, function), lambda *_, _o=operation, **__: _o)
            stack.enter_context(_replaced(getattr(page, function), watched))
        linear = stopwatch.watch(
            ops.linear, lambda x, w, *_, **__: names.get(w.shape, "other products")
        )
        stack.enter_context(_replaced(ops.linear, linear))
        yield


@contextlib.contextmanager
def _replaced(function: Any, other: Any) -> Iterator[None]:
    """Put `other` in the place of a function in every module of numpygpt that has it."""
    package = __package__.partition(".")[0]
    places = [
        (module, name)
        for title, module in list(sys.modules.items())
        if title.partition(".")[0] == package
        for name, value in list(vars(module).items())
        if value is function
    ]
    for module, name in places:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, function)


def bounds(
    params: Params, config: Config, rows: int, visible: int, speeds: dict[str, float]
) -> dict[str, float]:
    """The least time that each operation can take on this machine.

    Products take at least the time to read the matrix, and at least that of their arithmetic.
    Other operations apply at least one function to each number: a layer norm and the residual
    stream ``add``, attention and the MLP ``exp``.

    Parameters
    ----------
    params : Params
    config : Config
    rows : int
        N, tokens that are read together.
    visible : int
        Positions that the last of them sees. A prefill begins with an empty cache.
    speeds : dict of str to float
        ``bandwidth`` in bytes per second, ``peak`` in floating-point operations per second,
        ``add`` and ``exp`` in numbers per second.

    Returns
    -------
    dict of str to float
        Operation -> seconds.
    """
    layers, c = config.n_layer, config.n_embd

    def product(w: Any, n: int) -> float:
        return float(max(w.nbytes / speeds["bandwidth"], 2 * n * w.size / speeds["peak"]))

    def all_layers(name: str) -> float:
        part, _, matrix = name.partition(".")
        return sum(product(getattr(getattr(p, part), matrix).w, rows) for p in params.h)

    # Scores of row t of the new ones: the positions before all of them, and t of their own.
    before = visible - rows
    scores = config.n_head * layers * (rows * before + rows * (rows + 1) // 2)
    flops = attention_flops(config, rows) + 4 * c * layers * rows * before
    read = cache_bytes(config, visible) / speeds["bandwidth"]
    products = {
        name: all_layers(name) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    return products | {
        "attention": max(read, flops / speeds["peak"]) + scores / speeds["exp"],
        "layer norm": (2 * layers + 1) * rows * c / speeds["add"],
        "GELU": layers * rows * config.mlp_dim / speeds["exp"],
        "logits": product(params.head, 1),
        REST: (2 * layers + 1) * rows * c / speeds["add"],
    }


class Profile:
    """It is asked like a contestant, in a process of its own."""

    def __init__(self, directory: pathlib.Path, threads: int):
        self.directory, self.threads = directory, threads

    def version(self) -> str:
        """It has none."""
        return ""

    def profile(self, dtype: str, steps: int) -> dict[str, Any]:
        """Measure a decode step after a prompt, and reading the prompt.

        After every step there is one sweep over the matrices, and after every prompt one large
        product, so that what bounds them is measured at the same time.

        Parameters
        ----------
        dtype : str
            As for :func:`numpygpt.load`.
        steps : int
            Decode steps; fewer where the context is short.

        Returns
        -------
        dict
            ``decode`` and ``prefill``, each with the ``rows`` of the prompt and a list of
            ``operations``: name, seconds, bound in seconds.
        """
        model = load(self.directory, dtype=dtype)
        limits = Limits(self.directory, self.threads)
        speeds = {name: limits.elementwise(name) for name in ("add", "exp")}
        steps = min(steps, max(1, model.config.n_ctx // 2 - 3))
        rows = max(1, min(ROWS, model.config.n_ctx - steps - 2))
        ids = np.random.default_rng(1).integers(0, model.config.vocab_size, rows)
        decode, sweeps = Stopwatch(), list[float]()

        def on_step(_: object) -> None:
            decode.lap()
            sweeps.append(limits.bandwidth(least=0.0))
            decode.start()

        with watching(decode, model.params):
            model.generate(ids, max_new_tokens=steps + 3, stop_ids=(), on_step=on_step)
        del decode.laps[:2]  # the first read the prompt, the second warmed up
        prefill, products = Stopwatch(), list[float]()
        with watching(prefill, model.params):
            for _ in range(PASSES + 1):
                prefill.start()
                model.logits(ids, last=True)
                prefill.lap()
                products.append(limits.peak(least=0.0))
        del prefill.laps[:1]
        speeds |= {"bandwidth": _typical(sweeps), "peak": _typical(products)}
        middle = rows + steps // 2
        step = bounds(model.params, model.config, 1, middle, speeds)
        prompt = bounds(model.params, model.config, rows, rows, speeds)
        return {
            "dtype": dtype,
            "speeds": speeds,
            "decode": _section(rows, decode, step),
            "prefill": _section(rows, prefill, prompt),
        }


def _typical(speeds: list[float]) -> float:
    """The mean of the faster half, as :meth:`Stopwatch.typical` takes it of times."""
    fast = sorted(speeds, reverse=True)[: (len(speeds) + 1) // 2]
    return len(fast) / sum(1 / speed for speed in fast)


def _section(rows: int, watch: Stopwatch, least: dict[str, float]) -> dict[str, Any]:
    taken = watch.typical()
    names = [*(name for name in least if name != REST), *(taken.keys() - least.keys()), REST]
    return {
        "rows": rows,
        "operations": [
            {"name": name, "seconds": taken.get(name, 0.0), "bound": least.get(name, 0.0)}
            for name in names
        ],
    }
