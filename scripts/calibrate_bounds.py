#!/usr/bin/env python3
"""Measure how much of the bounds of rounding the usual ways of computing GPT-2 use up.

    python scripts/calibrate_bounds.py --quick
    python scripts/calibrate_bounds.py -o scripts/rounding-table.md

Every operation is computed in every arithmetic by every way that is in use, on random numbers of
several kinds and sizes, and compared with the operation in float64. What counts is the difference
in units of the two bounds of numpygpt/verify/bounds.py: a right program must stay below 1 of the
likely one. The report is the table that lies beside this script; it ends with what the numbers
mean for the constants in bounds.py.

The first takes some ten seconds and shows the way, the second a few minutes. The same seeds give
the same table wherever NumPy's BLAS and functions are the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numpygpt import load
from numpygpt.checkpoints.arrays import from_bfloat16, to_bfloat16
from numpygpt.params import MLP, Array, Attention, Block, Config, Linear, Norm, Params
from numpygpt.verify.arithmetic import ARITHMETICS, Arithmetic
from numpygpt.verify.bounds import SUMS, bound
from numpygpt.verify.comparison import apart
from numpygpt.verify.operations import Program, future, kind_of

# -- arithmetics ----------------------------------------------------------------------------------


class Machine:
    """Something that rounds as an arithmetic says.

    Parameters
    ----------
    name : str
        A key of :data:`numpygpt.verify.arithmetic.ARITHMETICS`.

    Attributes
    ----------
    arithmetic : Arithmetic
    wide : dtype
        What sums are added up in, and what every array is held in.
    """

    def __init__(self, name: str):
        self.arithmetic: Arithmetic = ARITHMETICS[name]
        self.wide: Any = np.float64 if name == "float64" else np.float32

    @property
    def narrow(self) -> bool:
        """Whether results are stored in fewer bits than sums are added up in."""
        return self.arithmetic.u > self.arithmetic.sums

    def store(self, x: Array) -> Array:
        """Each number as it is kept."""
        x = np.asarray(x, self.wide)
        if self.arithmetic.name == "bfloat16":
            return from_bfloat16(to_bfloat16(x))
        if self.arithmetic.name == "float16":
            return x.astype(np.float16).astype(np.float32)
        return x

    def read(self, x: Array, cut: bool = False) -> Array:
        """Each number as a product takes it, to the nearest or with its last bits cut off."""
        x = np.asarray(x, self.wide)
        if not self.arithmetic.factors:
            return x
        bits = x.view(np.uint32)
        if not cut:
            bits = bits + (0xFFF + (bits >> np.uint32(13) & np.uint32(1)))
        return (bits & ~np.uint32(0x1FFF)).view(np.float32)


# -- sums: (n, ...) -> (...) ----------------------------------------------------------------------


def chain(terms: Array) -> Array:
    """One after another."""
    return functools.reduce(np.add, terms)


def pairs(terms: Array) -> Array:
    """Neighbours first, then their sums, as a tree."""
    while len(terms) > 1:
        if len(terms) % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[:1])])
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def lanes(width: int) -> Callable[[Array], Array]:
    """Every `width`-th in a chain of its own, as vector units do, then the chains as a tree."""

    def added(terms: Array) -> Array:
        missing = -len(terms) % width
        padded = np.concatenate([terms, np.zeros_like(terms[:1]).repeat(missing, 0)])
        return pairs(chain(padded.reshape(-1, width, *terms.shape[1:])))

    return added


ORDERS = {
    "one chain": chain,
    **{f"{width} lanes": lanes(width) for width in (4, 8, 16)},
    "pairs": pairs,
}

# -- products: (N, n) and (n, M) -> (N, M) --------------------------------------------------------

Dot = Callable[[Machine, Array, Array], Array]


def in_order(order: Callable[[Array], Array]) -> Dot:
    """Each product rounded, then added up."""

    def dot(m: Machine, x: Array, w: Array) -> Array:
        x, w = m.read(x), m.read(w)
        return order(x.T[:, :, None] * w[:, None, :])

    return dot


def fused(m: Machine, x: Array, w: Array) -> Array:
    """One chain, each product and sum rounded together."""
    wider = np.longdouble if m.wide is np.float64 else np.float64
    x, w = (m.read(each).astype(wider) for each in (x, w))
    total = np.zeros((len(x), w.shape[1]), m.wide)
    for column, row in zip(x.T, w, strict=True):
        total = (total + column[:, None] * row).astype(m.wide)
    return total


def blas(m: Machine, x: Array, w: Array) -> Array:
    """NumPy's."""
    return np.matmul(m.read(x), m.read(w))


def split(m: Machine, x: Array, w: Array) -> Array:
    """In four parts that are stored before they are added up, as GPU libraries may do (split-K)."""
    parts = np.array_split(np.arange(x.shape[1]), 4 if x.shape[1] >= 256 else 1)
    stored = [m.store(np.matmul(x[:, part], w[part])) for part in parts]
    return functools.reduce(np.add, stored)


def unit(count: int, more_bits: int) -> Dot:
    """A matrix unit, which cuts off bits where others round.

    `count` exact products and the sum so far are each cut off a few bits below the last one of the
    largest of them, added, and cut off to a float32. What is known of NVIDIA's: 4 at once and no
    more bits (V100), 8 and 1 (A100), 16 and 2 (H100); they take the numbers of tf32 as if the last
    13 bits were not there.
    """

    def dot(m: Machine, x: Array, w: Array) -> Array:
        x, w = (m.read(each, cut=True).astype(np.float64) for each in (x, w))
        total = np.zeros((1, len(x), w.shape[1]))
        for k in range(0, x.shape[1], count):
            terms = x[:, k : k + count].T[:, :, None] * w[k : k + count, None, :]
            terms = np.concatenate([total, terms])
            exponent = np.frexp(np.abs(terms).max(0))[1]
            terms = np.trunc(np.ldexp(terms, 24 + more_bits - exponent))
            total = np.ldexp(terms.sum(0), exponent - 24 - more_bits)[None]
            total = cut(total)
        return total[0].astype(np.float32)

    return dot


def cut(x: Array) -> Array:
    """float64 cut off to the bits of a float32."""
    exponent = np.frexp(x)[1]
    return np.ldexp(np.trunc(np.ldexp(x, 24 - exponent)), exponent - 24)


DOTS: dict[str, Dot] = {
    **{name: in_order(order) for name, order in ORDERS.items()},
    "fused chain": fused,
    "BLAS": blas,
}
UNITS: dict[str, Dot] = {
    "matrix unit of 4": unit(4, 0),
    "matrix unit of 8": unit(8, 1),
    "matrix unit of 16": unit(16, 2),
}


def dots(m: Machine) -> dict[str, Dot]:
    """The ways of multiplying that are in use in an arithmetic."""
    units = UNITS if m.arithmetic.name in ("tf32", "float16", "bfloat16") else {}
    return DOTS | units | ({"four parts, stored": split} if m.narrow else {})


# -- numbers --------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Random numbers of a kind: ``make(rng, m, shape)``; the last axis is added up."""

    make: Callable[[np.random.Generator, Machine, tuple[int, ...]], Array]
    ordinary: bool = True


def outliers(rng: np.random.Generator, m: Machine, shape: tuple[int, ...]) -> Array:
    """A few features 100 to 3000 times as large as the others, as in GPT-2's stream."""
    factor = np.ones(shape[-1])
    count = min(4, 1 + shape[-1] // 200)
    places = rng.choice(shape[-1], count, replace=False)
    factor[places] = 10 ** rng.uniform(2, 3.5, count)
    return rng.standard_normal(shape) * factor


def outlier_first(rng: np.random.Generator, m: Machine, shape: tuple[int, ...]) -> Array:
    """One feature 3000 times as large as the others, where a sum begins."""
    x = rng.standard_normal(shape)
    x[..., 0] *= 3000
    return x


def cancelling(rng: np.random.Generator, m: Machine, shape: tuple[int, ...]) -> Array:
    """The second half undoes the first but for a thousandth."""
    half = rng.standard_normal((*shape[:-1], (shape[-1] + 1) // 2))
    both = np.concatenate([half, -half * (1 + rng.standard_normal(half.shape) / 1000)], -1)
    return both[..., : shape[-1]]


def tiny(rng: np.random.Generator, m: Machine, shape: tuple[int, ...]) -> Array:
    """About the smallest normal numbers of the format."""
    return rng.standard_normal(shape) * m.arithmetic.least * 64


KINDS = {
    "normal": Kind(lambda rng, m, shape: rng.standard_normal(shape)),
    "one sign": Kind(lambda rng, m, shape: np.abs(rng.standard_normal(shape))),
    "outliers": Kind(outliers),
    "offset": Kind(lambda rng, m, shape: rng.standard_normal(shape) + 16),
    "cancelling": Kind(cancelling),
    "tiny": Kind(tiny),
    "sorted": Kind(lambda rng, m, shape: np.sort(rng.standard_normal(shape)), ordinary=False),
    "outlier first": Kind(outlier_first, ordinary=False),
    "all equal": Kind(
        lambda rng, m, shape: np.repeat(rng.standard_normal((*shape[:-1], 1)), shape[-1], -1),
        ordinary=False,
    ),
}


def weights(rng: np.random.Generator, m: Machine, kind: str, n: int, columns: int) -> Array:
    """A matrix to go with numbers of a kind: one that keeps what is special about them."""
    w = rng.standard_normal((n, columns)) / math.sqrt(n)
    if kind in ("one sign", "cancelling", "sorted"):
        w = np.abs(w)
    if kind == "cancelling":
        w[(n + 1) // 2 :] = w[: n // 2]
    return m.store(np.repeat(w[:1], n, 0) if kind == "all equal" else w)


# -- operations, and the ways they are computed ---------------------------------------------------


class Trial(NamedTuple):
    """One operation of GPT-2 on some numbers, and what several ways make of it.

    `ways` yields (way, result); a result may be the last rows only.
    """

    program: Program
    name: str
    inputs: dict[str, Array]
    ways: Iterator[tuple[str, Array]]


def program(
    p: Mapping[str, tuple[Array, Array | None]], config: Mapping[str, Any], length: int = 1
) -> Program:
    """A program of one layer of which only what is in `p` is there."""
    made = Config(vocab_size=1, n_ctx=1, n_layer=1, **config)
    none = Linear(None, None)
    attn = Attention(none, Linear(*p.get("attn.c_proj", none)))
    norm = Norm(*p.get("ln_1", (None, None)))
    block = Block(norm, attn, norm, MLP(none, Linear(*p.get("mlp.c_proj", none))))
    params = Params(None, None, (block,), norm, p.get("head", (None, None))[0])  # type: ignore[arg-type]
    return Program(np.zeros(length, np.int64), made, params)


def linear(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """A linear map, its bias added last or first."""
    columns = max(16, min(256, 2**16 // n))
    x, w = m.store(KINDS[kind].make(rng, m, (rows, n))), weights(rng, m, kind, n, columns)
    b = m.store(rng.standard_normal(columns) * float(np.abs(x).max()) / 8)
    if kind == "all equal":
        b = b * 0

    def ways() -> Iterator[tuple[str, Array]]:
        for name, dot in dots(m).items():
            products = dot(m, x, w)
            yield name, m.store(products + b)
            yield f"{name}, stored", m.store(m.store(products) + b)
        terms = m.read(x).T[:, :, None] * m.read(w)[:, None, :]
        first = np.broadcast_to(b, (1, rows, columns))
        yield "one chain from the bias", m.store(chain(np.concatenate([first, terms])))

    config = {"n_embd": columns, "n_head": 1, "n_inner": n}
    return Trial(
        program({"mlp.c_proj": (w, b)}, config), "h.0.mlp.out", {"h.0.mlp.post": x}, ways()
    )


def unembedding(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """Products of hidden states with every token's vector."""
    columns = max(16, min(256, 2**16 // n))
    x, w = m.store(KINDS[kind].make(rng, m, (rows, n))), weights(rng, m, kind, n, columns)
    found = ((name, m.store(dot(m, x, w))) for name, dot in dots(m).items())
    config = {"n_embd": n, "n_head": 1}
    return Trial(program({"head": (w.T, None)}, config), "logits", {"ln_f": x}, found)


def scores(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """Queries and keys, scaled after, before, or half on either side."""
    q = m.store(KINDS[kind].make(rng, m, (rows, n)))
    # With outliers on both sides float16 overflows before it is scaled.
    with_q = {"outliers": "normal", "outlier first": "normal", "cancelling": "one sign"}
    k = m.store(KINDS[with_q.get(kind, kind)].make(rng, m, (rows, n)))
    qkv = np.concatenate([q, k, k], 1)
    scale = m.wide(1 / math.sqrt(n))

    def ways() -> Iterator[tuple[str, Array]]:
        root = m.wide(math.sqrt(scale))
        for name, dot in dots(m).items():
            after = m.store(m.store(dot(m, q, k.T)) * m.store(scale))
            before = m.store(dot(m, m.store(q * scale), k.T))
            both = m.store(dot(m, m.store(q * root), m.store(k * root).T))
            yield f"{name}, scaled after", after[None]
            yield f"{name}, scaled before", before[None]
            yield f"{name}, both scaled", both[None]
            yield f"{name}, scaled before it is stored", m.store(dot(m, q, k.T) * scale)[None]

    given = {"h.0.attn.qkv": qkv}
    return Trial(program({}, {"n_embd": n, "n_head": 1}), "h.0.attn.scores", given, ways())


def pattern_of(m: Machine, rng: np.random.Generator, kind: str, n: int) -> Array:
    """Rows of scores: (n, n)."""
    if kind == "all equal":
        return m.store(np.full((n, n), 1 / 3))
    size = {"normal": 4.0, "one sign": 25.0, "cancelling": 4.0, "sorted": 4.0}.get(kind, 1.0)
    return m.store(size * KINDS[kind].make(rng, m, (n, n)))


def softmax(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """Softmax: at once or as the scores come in, with what is in between stored or not."""
    all_scores = pattern_of(m, rng, kind, n)
    seen = np.where(future(n), m.wide(-np.inf), all_scores)[-rows:]
    below = seen - seen.max(-1, keepdims=True)

    def ways() -> Iterator[tuple[str, Array]]:
        for name, order in ORDERS.items():
            weight = np.exp(below)
            total = order(weight.T)[:, None]
            yield name, m.store(weight / total)[None]
            yield f"{name}, multiplied", m.store(weight * (1 / total))[None]
        if m.narrow:
            weight = m.store(np.exp(m.store(below)))
            total = m.store(pairs(weight.T))[:, None]
            yield "every step stored", m.store(weight / total)[None]
        doubled = np.exp2(below * m.wide(math.log2(math.e)))
        yield "powers of two", m.store(doubled / chain(doubled.T)[:, None])[None]
        for size in (1, 16):
            yield f"online, {size} at a time", m.store(online(seen, size))[None]

    given = {"h.0.attn.scores": all_scores[None]}
    config = {"n_embd": 1, "n_head": 1}
    return Trial(program({}, config, n), "h.0.attn.pattern", given, ways())


def online(x: Array, size: int) -> Array:
    """Softmax of scores that come in blocks: what there is, is rescaled when the maximum grows."""
    top = np.full((len(x), 1), -np.inf, x.dtype)
    total, weight = np.zeros_like(top), np.zeros_like(x)
    for start in range(0, x.shape[1], size):
        part = slice(start, start + size)
        new = np.maximum(top, x[:, part].max(-1, keepdims=True))
        factor = np.exp(top - new)
        weight[:, :start] *= factor
        weight[:, part] = np.exp(x[:, part] - new)
        total = total * factor + chain(weight[:, part].T)[:, None]
        top = new
    return weight / total


def mixing(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """Values mixed by a pattern."""
    width = 16
    seen = np.where(future(n), -np.inf, pattern_of(m, rng, "normal", n) / 4)
    weight = np.exp(seen - seen.max(-1, keepdims=True))
    if kind == "all equal":
        weight = np.where(future(n), 0.0, 1.0)
    p = m.store(weight / weight.sum(-1, keepdims=True))
    v = m.store(KINDS[kind].make(rng, m, (width, n)).T)
    found = ((name, m.store(dot(m, p[-rows:], v))[None]) for name, dot in dots(m).items())
    given = {"h.0.attn.pattern": p[None], "h.0.attn.qkv": np.concatenate([v, v, v], 1)}
    return Trial(program({}, {"n_embd": width, "n_head": 1}), "h.0.attn.heads", given, found)


def norm(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """Layer norm: in two passes, in one, by updates, with every step stored."""
    x = m.store(KINDS[kind].make(rng, m, (rows, n)))
    g, b = m.store(1 + 0.2 * rng.standard_normal(n)), m.store(0.2 * rng.standard_normal(n))
    eps, size = m.wide(1e-5), m.wide(n)

    def finished(mean: Array, variance: Array) -> Array:
        return m.store((x - mean[:, None]) / np.sqrt(variance + eps)[:, None] * g + b)

    def ways() -> Iterator[tuple[str, Array]]:
        for name, order in ORDERS.items():
            mean = order(x.T) / size
            variance = order(np.square(x - mean[:, None]).T) / size
            yield f"two passes, {name}", finished(mean, variance)
            root = (1 / np.sqrt(variance + eps))[:, None]
            yield f"two passes, {name}, multiplied", m.store((x - mean[:, None]) * root * g + b)
            both = np.maximum(order(np.square(x).T) / size - np.square(mean), 0)
            yield f"one pass, {name}", finished(mean, both)
        yield "updates", finished(*updated(x))
        if m.arithmetic.name == "bfloat16":
            yield "every step stored", stored_steps(m, x, g, b)

    config = {"n_embd": n, "n_head": 1}
    return Trial(program({"ln_1": (g, b)}, config), "ln_f", {"h.0.resid_post": x}, ways())


def updated(x: Array) -> tuple[Array, Array]:
    """Mean and variance, corrected with every number (Welford's)."""
    mean, squares = np.zeros_like(x[:, 0]), np.zeros_like(x[:, 0])
    for k, column in enumerate(x.T):
        before = column - mean
        mean = mean + before / x.dtype.type(k + 1)
        squares = squares + before * (column - mean)
    return mean, squares / x.dtype.type(x.shape[1])


def stored_steps(m: Machine, x: Array, g: Array, b: Array) -> Array:
    """The formula, each of its results kept in few bits; sums are still added up in more."""
    mean = m.store(x.mean(-1, keepdims=True))
    centred = m.store(x - mean)
    variance = m.store(m.store(np.square(centred)).mean(-1, keepdims=True))
    root = m.store(np.sqrt(m.store(variance + m.wide(1e-5))))
    return m.store(m.store(m.store(centred / root) * g) + b)


ACTIVATION_KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "large": lambda rng, shape: 30 * rng.standard_normal(shape),
    "negative": lambda rng, shape: -rng.uniform(0, 15, shape),
    "any size": lambda rng, shape: rng.choice([-1, 1], shape) * 2 ** rng.uniform(-14, 8, shape),
}


def activation(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """GELU by its tanh or as a logistic function."""
    x = m.store(ACTIVATION_KINDS[kind](rng, (rows, 4096)))
    config = {"n_embd": 1, "n_head": 1, "activation_function": "gelu_new"}
    given = {"h.0.mlp.pre": x}
    return Trial(program({}, config), "h.0.mlp.post", given, gelus(m, x))


def gelus(m: Machine, x: Array) -> Iterator[tuple[str, Array]]:
    """The formulas for gelu_new."""
    a, c, half, one = (m.wide(v) for v in (0.044715, math.sqrt(2 / math.pi), 0.5, 1))

    def by_tanh(cube: Array, s: Callable[[Array], Array]) -> Array:
        inner = s(s(c) * s(x + s(s(a) * s(cube))))
        return s(s(half * x) * s(one + s(np.tanh(inner))))

    def logistic(s: Callable[[Array], Array]) -> Array:
        inner = s(s(-2 * c) * s(x * s(one + s(s(a) * s(x * x)))))
        return s(x / s(one + s(np.exp(inner))))

    cubes = {"pow": np.power(x, m.wide(3)), "products": x * x * x}
    for name, cube in cubes.items():
        yield f"tanh, {name}", m.store(by_tanh(cube, lambda v: v))
        if m.narrow:
            yield f"tanh, {name}, every step stored", by_tanh(cube, m.store)
    yield "logistic", m.store(logistic(lambda v: v))
    if m.narrow:
        yield "logistic, every step stored", logistic(m.store)


def residual(m: Machine, rng: np.random.Generator, kind: str, n: int, rows: int) -> Trial:
    """The stream plus a branch that was stored first or not."""
    x = m.store(KINDS[kind].make(rng, m, (rows, n)))
    exact = KINDS[kind].make(rng, m, (rows, n)).astype(m.wide)
    branch = m.store(exact)
    found = iter([("stored", m.store(x + branch)), ("kept", m.store(x + exact))])
    given = {"h.0.resid_mid": x, "h.0.mlp.out": branch}
    return Trial(program({}, {"n_embd": n, "n_head": 1}), "h.0.resid_post", given, found)


# What is added up: the widths of GPT-2 and of its MLP, texts, the features of a head.
MODEL = (4, 48, 768, 1600, 6400)
NORM = MODEL[:-1]
CONTEXT = (4, 32, 256, 1024)
HEAD = (4, 20, 64, 128)
OPERATIONS: dict[str, tuple[Callable[..., Trial], Sequence[int], Iterable[str]]] = {
    "linear map": (linear, MODEL, KINDS),
    "logits": (unembedding, MODEL, KINDS),
    "scores": (scores, HEAD, KINDS),
    "softmax": (softmax, CONTEXT, KINDS),
    "mixed values": (mixing, CONTEXT, KINDS),
    "layer norm": (norm, NORM, KINDS),
    "GELU": (activation, (1,), ACTIVATION_KINDS),
    "residual stream": (residual, (768,), KINDS),
}

# -- measuring ------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One way of computing one operation in one arithmetic on numbers of one kind and size.

    `likely` and `certain` are errors in units of the two bounds, one for each number.
    """

    operation: str
    arithmetic: str
    kind: str
    n: int
    way: str
    likely: Array
    certain: Array

    @property
    def ordinary(self) -> bool:
        """Whether numbers of this kind come up in GPT-2."""
        return self.kind not in KINDS or KINDS[self.kind].ordinary

    @property
    def where(self) -> str:
        """What it is, for a table."""
        return f"{self.way}; {self.kind}; n = {self.n}"


def measured(trial: Trial, m: Machine) -> Iterator[tuple[str, Array, Array]]:
    """(way, error / likely, error / certain) of every way, flat and in float32."""
    with np.errstate(all="ignore"):
        inputs = {name: np.asarray(x, np.float64) for name, x in trial.inputs.items()}
        y = trial.program.compute(trial.name, inputs)
        bounds = bound(trial.program, trial.name, inputs, y, m.arithmetic)
        for way, found in trial.ways:
            rows = slice(y.shape[-2] - found.shape[-2], None)
            part, found = y[..., rows, :], np.asarray(found, np.float64)
            seen = np.ones(part.shape, bool)
            if trial.name.endswith("scores"):
                seen &= ~future(y.shape[-1])[rows]
            likely, certain = (
                apart("", found, part, each[..., rows, :], m.arithmetic)[seen].astype(np.float32)
                for each in bounds
            )
            yield way, likely, certain


def calibrate(rounds: int, sizes: int | None = None) -> Iterator[Cell]:
    """Everything that is to be measured, with `rounds` seeds each; `sizes` of the sizes, or all."""
    for operation, name in itertools.product(OPERATIONS, ARITHMETICS):
        make, all_sizes, kinds = OPERATIONS[operation]
        for kind, n in itertools.product(kinds, all_sizes[:sizes]):
            yield from cells(operation, Machine(name), kind, n, rounds, make)


def cells(
    operation: str, m: Machine, kind: str, n: int, rounds: int, make: Callable[..., Trial]
) -> Iterator[Cell]:
    """All ways of one operation on numbers of one kind and size."""
    found: dict[str, list[tuple[Array, Array]]] = {}
    for seed in range(rounds):
        rng = np.random.default_rng([seed, n, *kind.encode()])
        for way, *ratios in measured(make(m, rng, kind, n, 16), m):
            found.setdefault(way, []).append(tuple(ratios))
    for way, parts in found.items():
        likely, certain = (np.concatenate(each) for each in zip(*parts, strict=True))
        yield Cell(operation, m.arithmetic.name, kind, n, way, likely, certain)


class Sum(NamedTuple):
    """Errors of sums in float32, in units of sqrt(n) s A."""

    way: str
    kind: str
    n: int
    deviation: float
    largest: float


def sums(rounds: int, sizes: Iterable[int] = (48, 768, 6400)) -> Iterator[Sum]:
    """What c would have to be, by way and kind of numbers."""
    m = Machine("float32")
    for kind, n in itertools.product(KINDS, sizes):
        found: dict[str, list[Array]] = {}
        for seed in range(rounds if kind != "tiny" else 0):
            rng = np.random.default_rng([seed, n])
            x = m.store(KINDS[kind].make(rng, m, (16, n)))
            w = weights(rng, m, kind, n, max(16, min(256, 2**16 // n)))
            exact = np.matmul(x.astype(np.float64), w.astype(np.float64))
            size = np.matmul(np.abs(x).astype(np.float64), np.abs(w).astype(np.float64))
            for way, dot in DOTS.items():
                error = (dot(m, x, w) - exact) / (math.sqrt(n) * m.arithmetic.sums * size)
                found.setdefault(way, []).append(error)
        for way, errors in found.items():
            all_of = np.stack(errors)
            yield Sum(
                way, kind, n,
                float(np.sqrt(np.square(all_of).mean())), float(np.abs(all_of).max()),
            )  # fmt: skip


def trained(length: int = 64) -> Iterator[tuple[str, float, int]]:
    """The bundled model's own float32 trace: (kind, largest error / likely, how many numbers)."""
    model = load("shakespeare")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, length)
    trace, a = model.trace(ids), ARITHMETICS["float32"]
    right = Program(ids, model.config, model.params)
    worst: dict[str, tuple[float, int]] = {}
    given = {name: array.astype(np.float64) for name, array in trace.items()}
    for name, array in given.items():
        y = right.compute(name, given)
        likely = bound(right, name, given, y, a).likely
        largest, count = worst.get(kind_of(name), (0.0, 0))
        ratio = float(apart(name, array, y, likely, a).max())
        worst[kind_of(name)] = max(largest, ratio), count + array.size
    yield from ((kind, *each) for kind, each in worst.items())


# The standard deviation of n roundings of numbers as large as A, in sqrt(n) s A.
WALK = 1 / math.sqrt(3)

# Numbers in a dump of GPT-2 124M at 64 tokens: embedding, ln_f, logits; a layer's rows and heads.
DUMP = 64 * (2 * 768 + 50257 + 12 * ((8 + 3 + 2 * 4) * 768 + 2 * 12 * 64))

# -- the report -----------------------------------------------------------------------------------


class Row:
    """The ordinary cells of one operation in one arithmetic, as they come in."""

    def __init__(self) -> None:
        self.count, self.above = 0, 0
        self.worst: dict[bool, Cell] = {}
        self.certain: dict[bool, float] = {}

    def add(self, cell: Cell) -> None:
        """Take note of a cell; its numbers are kept only if they are the worst so far."""
        kind, largest = cell.ordinary, float(cell.certain.max())
        self.certain[kind] = max(largest, self.certain.get(kind, 0.0))
        if kind:
            self.count += cell.likely.size
            self.above += int((cell.likely > 1).sum())
        if kind not in self.worst or cell.likely.max() > self.worst[kind].likely.max():
            self.worst[kind] = cell


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 2) + ["---"], *rows]
    return ["| " + " | ".join(map(shown, line)) + " |" for line in lines]


def shown(value: Any) -> str:
    """A number with two digits behind the first."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def ordinary(rows: Mapping[tuple[str, str], Row]) -> Iterator[list[Any]]:
    """For each operation and arithmetic, the way that uses most of the bound."""
    for (operation, name), row in rows.items():
        cell = row.worst[True]
        middle, high = (float(np.quantile(cell.likely, q)) for q in (0.5, 0.999))
        largest = float(cell.likely.max())
        yield [
            f"{operation}, {name}", row.count, row.above,
            middle, high, largest, row.certain[True], cell.where,
        ]  # fmt: skip


def contrived(rows: Mapping[tuple[str, str], Row]) -> Iterator[list[Any]]:
    """The same for numbers that no GPT-2 has; only where they exceed the bound."""
    for (operation, name), row in rows.items():
        cell = row.worst.get(False)
        if cell is not None and cell.likely.max() > 1:
            largest = float(cell.likely.max())
            yield [f"{operation}, {name}", largest, row.certain[False], cell.where]


def constants(found: Sequence[Sum]) -> Iterator[list[Any]]:
    """For each way of adding, the largest c by kind of numbers."""
    for way in DOTS:
        most = {
            kind: max(each.largest for each in found if (each.way, each.kind) == (way, kind))
            for kind in KINDS
            if kind != "tiny"
        }
        usual = max(value for kind, value in most.items() if KINDS[kind].ordinary)
        yield [way, *most.values(), usual]


def beyond(deviation: float) -> float:
    """How often a normal number exceeds SUMS, in either direction."""
    return math.erfc(SUMS / deviation / math.sqrt(2))


def report(rounds: int, sizes: int | None, advance: Callable[[str], Any]) -> list[str]:
    """Measure everything; return the lines."""
    rows: dict[tuple[str, str], Row] = {}
    for cell in calibrate(rounds, sizes):
        key = cell.operation, cell.arithmetic
        if key not in rows:
            advance(", ".join(key))
        rows.setdefault(key, Row()).add(cell)
    advance("sums")
    added = list(sums(rounds))
    worst = max((s for s in added if KINDS[s.kind].ordinary), key=lambda s: s.deviation)
    numbers = sum(row.count for row in rows.values())
    above = sum(row.above for row in rows.values())
    kinds = [kind for kind in KINDS if kind != "tiny"]
    real = list(trained())
    return [
        "# How much of the bounds of rounding is used up",
        "",
        f"- Written by scripts/calibrate_bounds.py, {rounds} seeds; NumPy {np.__version__}, "
        f"{platform.machine()}",
        f"- c = {SUMS} (`SUMS` in numpygpt/verify/bounds.py)",
        f"- {numbers:,} ordinary numbers, {above:,} of them beyond the likely bound",
        "",
        "Errors in units of the bounds: likely must not be exceeded by a right program. "
        "Each row shows the way of computing that comes closest.",
        "",
        "## Ordinary numbers",
        "",
        *table(
            ["operation, arithmetic", "numbers", "beyond", "median", "99.9%", "largest / likely",
             "largest / certain", "way; numbers; size"],
            ordinary(rows),
        ),
        "",
        "## Numbers that GPT-2 does not have",
        "",
        "Equal terms, terms in rising order, and one feature 3000 times the others where a sum "
        "begins: roundings then have one sign and add up like n, not like sqrt(n). Where an "
        "operation is not listed, the likely bound holds here, too.",
        "",
        *table(
            ["operation, arithmetic", "largest / likely", "largest / certain",
             "way; numbers; size"],
            contrived(rows),
        ),
        "",
        "## The constant of sums",
        "",
        "The largest error of a product in float32, in units of sqrt(n) s A, n = 48, 768, 6400. "
        "c must lie above the last column.",
        "",
        *table(["way", *kinds, "ordinary"], constants(added)),
        "",
        "## False alarms",
        "",
        f"- Measured: {above:,} of {numbers:,} ordinary numbers. They share inputs, so they are "
        "fewer independent ones; were they independent, the rate would be below "
        f"{(above + 3) / numbers:.0e} with 95% confidence. What follows is no measurement.",
        f"- Sums: the standard deviation of their errors was at most {worst.deviation:.2g} "
        f"sqrt(n) s A ({worst.way}; {worst.kind}; n = {worst.n}). c is "
        f"{SUMS / worst.deviation:.1f} of these: normal numbers exceed that in "
        f"{beyond(worst.deviation):.0e} of all cases, {beyond(worst.deviation) * DUMP:.0e} times "
        f"in the {DUMP:,} numbers of a dump of GPT-2 124M at 64 tokens.",
        "- In one chain that begins with a term much larger than all others together, the standard "
        f"deviation is up to {WALK:.2g} (n roundings, each spread evenly over s A). c is "
        f"{SUMS / WALK:.1f} of these, exceeded by {beyond(WALK):.0e} of such sums.",
        "- Other errors are of a few roundings, which the bounds take at their largest; but the "
        "factors of tf32, sums in stored parts and scaled queries they take at several standard "
        "deviations, and of functions (exp, tanh) they take what NumPy and torch were seen to do.",
        "",
        "## A trained model",
        "",
        "The bundled model in float32, 64 tokens, every operation on the trace's own inputs.",
        "",
        *table(["operation", "numbers", "largest / likely", ""],
               ([kind, count, largest, ""] for kind, largest, count in real)),
        "",
    ]  # fmt: skip


# -- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=pathlib.Path,
                        help="write the table there, else to standard output")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one seed, and small sizes only")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="seeds (default: 3)")
    asked = parser.parse_args(arguments)
    rounds, sizes = (1, 2) if asked.quick else (asked.rounds, None)
    lines = report(rounds, sizes, lambda what: print(what, file=sys.stderr))
    text = "\n".join(lines)
    if asked.output is None:
        print(text)
    else:
        asked.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
