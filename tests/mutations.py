"""What the verification should say of each program's mistakes, and a way to ask it.

The programs are those of `implementations`, and our own with other ways to store weights. The truth
about a mistake is written down here by hand, from what the mistake is: its names in the gallery,
and the operations where it shows before anything else does. test_mutations.py and
scripts/mutation_benchmark.py hold the verification to it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from implementations import mistakes, weights
from implementations.mistakes import MISTAKES
from support import nano, random_ids, random_tensors

import numpygpt
from numpygpt.checkpoints.arrays import to_bfloat16
from numpygpt.params import Config, pack
from numpygpt.storage import Bfloat16, to_int8
from numpygpt.verify import Dump, Report, verify_dump
from numpygpt.verify.arithmetic import rounded
from numpygpt.verify.operations import kind_of
from numpygpt.verify.tracing import trace_chunks

Tensors = dict[str, np.ndarray]

# -- the truth ------------------------------------------------------------------------------------

NORMS = ("h.{i}.ln_1", "h.{i}.ln_2", "ln_f")
QKV, SCORES, PATTERN, HEADS, OUT = (
    f"h.{{i}}.attn.{name}" for name in ("qkv", "scores", "pattern", "heads", "out")
)
PRE, POST, MLP_OUT = (f"h.{{i}}.mlp.{name}" for name in ("pre", "post", "out"))
PRODUCTS = (QKV, SCORES, HEADS, OUT, PRE, MLP_OUT, "logits")
# Where weights are read.
READ = ("embed", *NORMS, QKV, OUT, PRE, MLP_OUT, "logits")
HALF_SUMS = "products or sums in about 11 bits (float16, tf32)"
DROPOUT = "dropout left on"


class Truth(NamedTuple):
    """What a mistake is called in the gallery, and where it is made: rows of the table.

    The first letters of a name are enough.
    """

    name: str
    kinds: tuple[str, ...]


def of(name: str, *kinds: str) -> Truth:
    return Truth(name, kinds)


# What is read wrongly from qkv shows in the scores; what is wrong in the file, in qkv itself. The
# programs differ in that, and `kinds` holds both.
TRUTHS = {
    "erf_gelu": of("exact (erf) GELU", POST),
    "quick_gelu": of("sigmoid GELU (quick_gelu)", POST),
    "gelu_half_table": of("GELU from a table of halves", POST),
    "gelu_no_cubic": of("GELU without its cubic term", POST),
    "relu": of("ReLU", POST),
    "eps_1e-6": of("layer norm epsilon 1e-06", *NORMS),
    "eps_1e-12": of("layer norm epsilon 1e-12", *NORMS),
    "eps_outside_root": of("layer norm epsilon outside the root", *NORMS),
    "ddof_1": of("layer norm variance over C - 1", *NORMS),
    "rms_norm": of("layer norm without subtracting the mean", *NORMS),
    "ln_no_shift": of("layer norm without its shift", *NORMS),
    "no_scale": of("scores not scaled", SCORES),
    "scale_by_width": of("scores scaled by sqrt(C)", SCORES),
    "scale_twice": of("scores scaled twice", SCORES),
    "inverse_layer_scale_ignored": of("inverse-layer scale ignored", SCORES),
    "inverse_layer_scale_added": of("inverse-layer scale added", SCORES),
    "c_proj_transposed": of("attn.c_proj transposed", OUT),
    "qkv_interleaved": of("q, k, v interleaved by head", QKV, SCORES),
    "kv_swapped": of("keys and values swapped", QKV, SCORES),
    "qk_swapped": of("queries and keys swapped", QKV, SCORES),
    "heads_not_merged": of("heads not merged by token", HEADS, OUT),
    "heads_reversed": of("heads in reverse order", SCORES, OUT),
    "head_features_first": of("head features first when heads are split", QKV, SCORES),
    "wrong_head_count": of("{wrong} heads instead of {right}", SCORES),
    "attention_biases_missing": of("attention biases missing", QKV, OUT),
    "mlp_biases_missing": of("MLP biases missing", PRE, MLP_OUT),
    "mask_missing": of("mask missing", SCORES, PATTERN),
    "mask_hides_itself": of("mask hides the token itself", SCORES, PATTERN),
    "mask_shows_next": of("mask shows the next token", SCORES, PATTERN),
    "mask_inverted": of("mask inverted", SCORES, PATTERN),
    "mask_minus_1e4": of("mask of -1e4", SCORES, PATTERN),
    "mask_top_left": of("mask aligned with the first query of a pass", SCORES, PATTERN),
    "mask_after_softmax": of("mask after the softmax", SCORES, PATTERN),
    "softmax_over_queries": of("softmax over queries", PATTERN),
    "positions_from_1": of("positions from 1", "embed"),
    "positions_restart": of("positions start again in each pass", "embed"),
    "positions_missing": of("positions missing", "embed"),
    "no_ln_f": of("final layer norm missing", "ln_f", "logits"),
    "post_ln": of("layer norm after the sum (post-LN)", "h.{i}.ln_1", QKV),
    "ln_1_ln_2_swapped": of("ln_1 and ln_2 swapped", *NORMS[:2]),
    "residual_from_normed": of("residual from the normalised stream", "h.{i}.resid_mid"),
    "parallel_block": of("attention and MLP in parallel", "h.{i}.resid_mid", "h.{i}.ln_2"),
    "mlp_not_added": of("MLP not added to the stream", "h.{i}.resid_post"),
    "last_layer_skipped": of("last block left out", "ln_f"),
    "layers_reordered": of("layers in the order of their names", *READ[1:-1]),
    "embedding_scaled": of("token vectors scaled by sqrt(C)", "embed"),
    "token_ids_shifted": of("token ids shifted by one", "embed"),
    "stale_head": of("token table instead of the head", "logits"),
    "logits_scaled": of("logits scaled by 1/sqrt(C)", "logits"),
    "vocabulary_padded_wrong": of("padding of the vocabulary in front", "logits"),
    "float16_accumulation": of(HALF_SUMS, *PRODUCTS),
    "weights_float16": of("weights rounded to float16", *READ),
    "weights_bfloat16": of("weights rounded to bfloat16", *READ),
    "dropout_on": of(DROPOUT, "embed", "h.{i}.resid_pre", HEADS, OUT, MLP_OUT),
}

# One or two of each part, for where there is no time for all.
SOME = (
    "erf_gelu", "eps_1e-6", "ddof_1", "no_scale", "inverse_layer_scale_added", "kv_swapped",
    "c_proj_transposed", "heads_reversed", "mask_shows_next", "mask_top_left", "positions_from_1",
    "parallel_block", "vocabulary_padded_wrong",
)  # fmt: skip


# -- programs -------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A program: a module of `implementations`, or "own"."""

    module: str
    options: Mapping[str, str] = {}
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    @property
    def mistakes(self) -> list[str]:
        """Those that it can make."""
        if self.module == "own":
            return list(IN_THE_FILE)
        inside = getattr(self.load(), "INSIDE_ATTENTION", ())
        limited = self.options.get("attention") in ("fused", "sdpa")
        return [each for each in mistakes.of(self.module) if not (limited and each in inside)]

    def declared(self, dtype: str) -> tuple[str, str | None]:
        """What a dump says: what is computed in, and how weights are stored if not so."""
        if self.module == "own" and dtype in ("bfloat16", "int8"):
            return "float32", dtype
        return dtype, None

    def load(self) -> Any:
        return importlib.import_module(f"implementations.{self.module}")

    def build(self, checkpoint: Checkpoint, dtype: str, mistake: str | None = None) -> Any:
        """What has a method ``dump(ids, chunks)``."""
        if self.module == "own":
            return Own(checkpoint, dtype, mistake)
        source = checkpoint.config, checkpoint.tensors
        return self.load().build(source, dtype, mistake, **self.options)

    def exact(self, checkpoint: Checkpoint, dtype: str, mistake: str | None = None) -> Any:
        """The same in float64, but for its weights, which have the numbers that `dtype` holds."""
        if self.module == "own":
            return Own(checkpoint, dtype, mistake, exact=True)
        tensors = checkpoint.tensors
        if mistake in ("weights_float16", "weights_bfloat16"):
            tensors, mistake = narrow(tensors, mistake.removeprefix("weights_")), None
        tensors = narrow(tensors, dtype)
        return self.build(checkpoint._replace(tensors=tensors), "float64", mistake)


STORAGES = ("float64", "float32", "bfloat16", "int8")
SUBJECTS = {
    "transformers eager": Subject("hooked_transformers", {"attention": "eager"}),
    "transformers sdpa": Subject("hooked_transformers", {"attention": "sdpa"}),
    "nanoGPT": Subject("nanogpt_style", {"attention": "manual"}),
    "nanoGPT fused": Subject("nanogpt_style", {"attention": "fused"}),
    "minGPT": Subject("mingpt_style"),
    "NumPy port": Subject("numpy_port", {}, ("float64", "float32")),
    "numpygpt": Subject("own", {}, STORAGES),
}


def narrow(tensors: Mapping[str, np.ndarray], dtype: str) -> Tensors:
    """Rounded to a dtype, as float64."""
    return {name: rounded(array, dtype) for name, array in tensors.items()}


class Both(str):
    """Two mistakes at once, for a program that compares names with ``==`` and ``in``."""

    __slots__ = ("parts",)
    parts: tuple[str, ...]

    def __new__(cls, *parts: str) -> Both:
        made = super().__new__(cls, " and ".join(parts))
        made.parts = parts
        return made

    def __eq__(self, other: object) -> bool:
        return other in self.parts

    def __ne__(self, other: object) -> bool:
        return other not in self.parts

    def __hash__(self) -> int:
        return super().__hash__()

    def removeprefix(self, prefix: str, /) -> str:
        return next(each for each in self.parts if each.startswith(prefix)).removeprefix(prefix)


# -- our own program, with mistakes in the file ---------------------------------------------------


class Own:
    """numpygpt itself, on a file or a config that is wrong."""

    def __init__(
        self, checkpoint: Checkpoint, storage: str, mistake: str | None, exact: bool = False
    ):
        config, tensors = checkpoint.config, dict(checkpoint.tensors)
        for each in getattr(mistake, "parts", (mistake,) if mistake else ()):
            config, tensors = IN_THE_FILE[each](config, tensors)
        stored = {name: store(name, array, storage) for name, array in tensors.items()}
        if exact:
            stored = {name: np.asarray(array, np.float64) for name, array in stored.items()}
        self.model = numpygpt.Model(config, pack(config, stored))

    def dump(self, ids: Iterable[int], chunks: Any = None) -> Tensors:
        ids = list(ids)
        return trace_chunks(self.model, ids, chunks) if chunks else self.model.trace(ids)


def store(name: str, array: np.ndarray, storage: str) -> Any:
    """One array as numpygpt keeps it: only matrices take bfloat16 and int8."""
    if storage in ("float32", "float64"):
        return array.astype(storage)
    narrow = array.astype(np.float32)
    if array.ndim < 2 or name == "wpe.weight":
        return narrow
    turned = not name.startswith(("wte", "lm_head"))
    rows = np.ascontiguousarray(narrow.T if turned else narrow)
    stored = to_int8(rows) if storage == "int8" else Bfloat16(to_bfloat16(rows))
    return stored.T if turned else stored


InTheFile = Callable[[Config, Tensors], tuple[Config, Tensors]]


def configured(**changes: Any) -> InTheFile:
    """Another config, and the same file."""
    return lambda config, tensors: (dataclasses.replace(config, **changes), tensors)


def edited(endings: str | tuple[str, ...], change: Callable[..., np.ndarray]) -> InTheFile:
    """``change(array, config)`` made of every array whose name ends so."""

    def edit(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        return config, {
            name: change(array, config) if name.endswith(endings) else array
            for name, array in tensors.items()
        }

    return edit


def columns(order: Callable[[np.ndarray], np.ndarray]) -> InTheFile:
    """c_attn's columns, which are laid out as (3, H, D), in another order."""

    def change(array: np.ndarray, config: Config) -> np.ndarray:
        numbers = np.arange(3 * config.n_embd).reshape(3, config.n_head, -1)
        return array[..., order(numbers).ravel()]

    return edited(("c_attn.weight", "c_attn.bias"), change)


def untied(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """With a head of its own, so that the table of tokens can be changed alone."""
    head = tensors.get("lm_head.weight", tensors["wte.weight"])
    config = dataclasses.replace(config, tie_word_embeddings=False)
    return config, {**tensors, "lm_head.weight": head}


def only(name: str, change: Callable[[np.ndarray, Config], np.ndarray]) -> InTheFile:
    """One of the tables changed, head and tokens apart."""

    def edit(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        config, tensors = untied(config, tensors)
        return config, {**tensors, name: change(tensors[name], config)}

    return edit


def norms_exchanged(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    other = {"ln_1": "ln_2", "ln_2": "ln_1"}
    return config, {
        ".".join(other.get(part, part) for part in name.split(".")): array
        for name, array in tensors.items()
    }


def sorted_as_strings(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    places = {layer: i for i, layer in enumerate(sorted(map(str, range(config.n_layer))))}

    def moved(name: str) -> str:
        h, layer, rest = name.split(".", 2)
        return f"{h}.{places[layer]}.{rest}"

    return config, {
        moved(name) if name.startswith("h.") else name: array for name, array in tensors.items()
    }


def without_last(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    last = f"h.{config.n_layer - 1}."
    fewer = dataclasses.replace(config, n_layer=config.n_layer - 1)
    return fewer, {name: each for name, each in tensors.items() if not name.startswith(last)}


def heads_backwards(array: np.ndarray, config: Config) -> np.ndarray:
    return array.reshape(config.n_head, -1, config.n_embd)[::-1].reshape(array.shape)


def padded(array: np.ndarray, config: Config) -> np.ndarray:
    rows = weights.padding_rows(len(array))
    return np.concatenate([np.zeros_like(array[:rows]), array])[: len(array)]


def tied(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    config = dataclasses.replace(config, tie_word_embeddings=True)
    return config, {name: tensors[name] for name in tensors if name != "lm_head.weight"}


def gone(array: np.ndarray, config: Config) -> np.ndarray:
    return np.zeros_like(array)


IN_THE_FILE: dict[str, InTheFile] = {
    "erf_gelu": configured(activation_function="gelu"),
    "quick_gelu": configured(activation_function="quick_gelu"),
    "relu": configured(activation_function="relu"),
    "eps_1e-6": configured(layer_norm_epsilon=1e-6),
    "eps_1e-12": configured(layer_norm_epsilon=1e-12),
    "ln_no_shift": edited(("ln_1.bias", "ln_2.bias", "ln_f.bias"), gone),
    "no_scale": configured(scale_attn_weights=False),
    "inverse_layer_scale_ignored": configured(scale_attn_by_inverse_layer_idx=False),
    "inverse_layer_scale_added": configured(scale_attn_by_inverse_layer_idx=True),
    "c_proj_transposed": edited("attn.c_proj.weight", lambda array, config: array.T),
    "qkv_interleaved": columns(lambda numbers: numbers.swapaxes(0, 1)),
    "kv_swapped": columns(lambda numbers: numbers[[0, 2, 1]]),
    "qk_swapped": columns(lambda numbers: numbers[[1, 0, 2]]),
    "heads_reversed": edited("attn.c_proj.weight", heads_backwards),
    "head_features_first": columns(
        lambda numbers: numbers.reshape(3, numbers.shape[2], -1).swapaxes(1, 2)
    ),
    "wrong_head_count": lambda config, tensors: (
        dataclasses.replace(config, n_head=weights.another_head_count(config)),
        tensors,
    ),
    "attention_biases_missing": edited(("c_attn.bias", "attn.c_proj.bias"), gone),
    "mlp_biases_missing": edited(("c_fc.bias", "mlp.c_proj.bias"), gone),
    "positions_from_1": edited("wpe.weight", lambda array, config: np.roll(array, -1, 0)),
    "positions_missing": edited("wpe.weight", gone),
    "ln_1_ln_2_swapped": norms_exchanged,
    "last_layer_skipped": without_last,
    "layers_reordered": sorted_as_strings,
    "embedding_scaled": only("wte.weight", lambda array, config: array * config.n_embd**0.5),
    "token_ids_shifted": only("wte.weight", lambda array, config: np.roll(array, -1, 0)),
    "stale_head": tied,
    "logits_scaled": only("lm_head.weight", lambda array, config: array / config.n_embd**0.5),
    "vocabulary_padded_wrong": only("lm_head.weight", padded),
    "weights_float16": edited("", lambda array, config: rounded(array, "float16")),
    "weights_bfloat16": edited("", lambda array, config: rounded(array, "bfloat16")),
}


# -- checkpoints ----------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A model, tokens, and how they are read."""

    name: str
    config: Config
    tensors: Mapping[str, np.ndarray]
    ids: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    key: tuple[Any, ...] = ()


# fmt: off
CONFIGS = {
    "nano": nano(),
    "odd": nano(vocab_size=29, n_ctx=21, n_embd=15, n_layer=3, n_head=3, n_inner=22),
    "wide": nano(vocab_size=300, n_ctx=64, n_embd=64, n_layer=4, n_head=4, n_inner=144),
    "outliers": nano(vocab_size=97, n_ctx=40, n_embd=48, n_layer=3, n_head=4),
}
# fmt: on
LENGTHS = {"nano": 8, "odd": 13, "wide": 24, "outliers": 17, "shakespeare": 24}
# What a config needs for a mistake to show (see `implementations.mistakes`).
NEEDED: dict[str, dict[str, Any]] = {
    mistakes.INVERSE_SCALE: {"scale_attn_by_inverse_layer_idx": True},
    mistakes.OWN_HEAD: {"tie_word_embeddings": False},
    mistakes.MANY_LAYERS: {"n_layer": 11},
}
TEXT = "KING RICHARD II:\nWhat must the king do now? must he submit?"


@functools.lru_cache(maxsize=64)
def checkpoint(name: str, length: int = 0, when: str = "", seed: int = 0) -> Checkpoint:
    """One of CONFIGS or "shakespeare", changed so that a mistake with this `when` shows.

    Raises
    ------
    LookupError
        If the trained weights cannot be changed so.
    """
    length = length or LENGTHS[name]
    if name == "shakespeare":
        config, tensors = shakespeare()
        if when in (mistakes.OWN_HEAD, mistakes.MANY_LAYERS):
            raise LookupError(f"{name} has not {when}")
        config = dataclasses.replace(config, **NEEDED.get(when, {}))
        ids = numpygpt.load(name).tokenizer.encode(TEXT * 8)[:length]
    else:
        config = dataclasses.replace(CONFIGS[name], **NEEDED.get(when, {}))
        tensors = random_tensors(config, seed)
        if name == "outliers":
            with_outliers(tensors)
        ids = random_ids(config, length, seed)
    if when == mistakes.LARGE_SCORES:
        for key in [key for key in tensors if "c_attn" in key]:
            tensors[key] = np.array(tensors[key])
            tensors[key][..., : 2 * config.n_embd] *= 120  # scores of some 10,000
    # Numbers of float32, as in real files: torch rounds float64 to it on the way to float16.
    tensors = narrow(tensors, "float32")
    chunks = split(length) if when == mistakes.CHUNKS else ()
    key = (name, length, when, seed)
    return Checkpoint(name, config, tensors, tuple(map(int, ids)), chunks, key)


def split(length: int) -> tuple[int, ...]:
    """Passes of a third, one token, and what is left."""
    first = max(length // 3, 1)
    return tuple(n for n in (first, min(1, length - first), length - first - 1) if n > 0)


def with_outliers(tensors: Tensors) -> None:
    """Features as trained GPT-2s have them: the first position's are beyond 100 in two columns.

    Gains are small there, so that the layer norms take them away again.
    """
    at = [3, 11]
    for name, array in tensors.items():
        if name == "wte.weight":
            array[:, at] += 3.0
        if name == "wpe.weight":
            array[0, at] += [150.0, -90.0]
        if name.endswith("c_proj.bias"):
            array[at] += 4.0
        if name.endswith(("ln_1.weight", "ln_2.weight")):
            array[at] *= 0.05


@functools.cache
def shakespeare() -> tuple[Config, Tensors]:
    """The bundled model's trained weights."""
    model = numpygpt.load("shakespeare", dtype="float64")
    return model.config, weights.named(model.config, model.params)


# -- asking ---------------------------------------------------------------------------------------

# What is in a dump: a test of a trace key. Hidden states are what transformers returns.
DUMPED: dict[str, Callable[[str], bool]] = {
    "everything": lambda name: True,
    "hidden states": lambda name: name.endswith("resid_pre") or name in ("ln_f", "logits"),
    "logits": lambda name: name == "logits",
}


def dump_of(
    arrays: Mapping[str, np.ndarray],
    where: Checkpoint,
    declared: tuple[str, str | None],
    kind: str = "everything",
) -> Dump:
    """A dump with some of a program's arrays. What has no place in the model is left out."""
    heads, length = where.config.n_head, len(where.ids)
    shapes = {
        SCORES: (heads, length, length),
        PATTERN: (heads, length, length),
        HEADS: (heads, length, where.config.head_dim),
    }
    fits = {
        name: array.shape == shapes.get(kind_of(name), array.shape)
        for name, array in arrays.items()
    }
    return Dump(
        np.array(where.ids),
        {name: arrays[name] for name in arrays if fits[name] and DUMPED[kind](name)},
        declared[0],
        weights=declared[1],
        chunks=where.chunks,
        unmatched=tuple(f"{name}: its shape" for name in arrays if not fits[name]),
    )


def ask(dump: Dump, where: Checkpoint, explain: bool = True) -> Report:
    """What the verification says."""
    return verify_dump(dump, where.config, params_of(where), explain=explain)


def params_of(where: Checkpoint) -> Any:
    """As the checkpoint has them: numbers of float32."""
    tensors = {name: array.astype(np.float32) for name, array in where.tensors.items()}
    return pack(where.config, tensors)


class Answer(NamedTuple):
    """What came of one mistake in one program, with one kind of dump.

    Attributes
    ----------
    effect : float
        The largest difference that the mistake makes, in units of the bound: that of the program in
        float64, whose own rounding is nothing beside it. Beyond 1 it must be found.
    visible : float
        The same by a measure that knows no bounds: how far the mistaken program is from the right
        one in the same dtype, at the first array that differs, over how far the right one is from
        float64 there (the largest of each). Beyond 4 it can be told from rounding.
    detected, located, named, among : bool
        The verdict is not "rounding"; the first finding is where the mistake is made; its first
        explanation is the mistake; or one of those that reproduce it.
    report : Report
    """

    effect: float
    visible: float
    detected: bool
    located: bool
    named: bool
    among: bool
    report: Report


@functools.lru_cache(maxsize=256)
def right_run(subject: str, dtype: str, key: tuple[Any, ...], exact: bool = False) -> Tensors:
    """The arrays of a program without a mistake; `exact` as for :meth:`Subject.exact`."""
    where = checkpoint(*key)
    program = SUBJECTS[subject].exact if exact else SUBJECTS[subject].build
    return program(where, dtype).dump(where.ids, list(where.chunks) or None)


def wrong_run(subject: str, dtype: str, where: Checkpoint, mistake: str | None) -> Tensors:
    """The arrays of a program with a mistake."""
    program = SUBJECTS[subject].build(where, dtype, mistake)
    return program.dump(where.ids, list(where.chunks) or None)


def judge(
    subject: str, dtype: str, where: Checkpoint, mistake: str, kinds: Iterable[str] = DUMPED
) -> Iterator[tuple[str, Answer]]:
    """Make a mistake and ask the verification about it, with each kind of dump."""
    program = SUBJECTS[subject]
    declared = program.declared(dtype)
    chunks = list(where.chunks) or None
    wrong = wrong_run(subject, dtype, where, mistake)
    exact = program.exact(where, dtype, mistake).dump(where.ids, chunks)
    right, pure = right_run(subject, dtype, where.key), right_run(subject, dtype, where.key, True)
    truth = truth_of(mistake, where.config)
    for kind in kinds:
        effects = ask(dump_of(exact, where, declared, kind), where, explain=False)
        report = ask(dump_of(wrong, where, declared, kind), where)
        ratios = {finding.name: finding.ratio for finding in effects.findings}
        shown = [name for name in exact if DUMPED[kind](name)]
        yield (
            kind,
            Answer(
                max(ratios.values()),
                visible(wrong, right, exact, pure, shown),
                report.first is not None,
                is_located(report, truth, ratios),
                *is_named(report, truth),
                report,
            ),
        )


def visible(wrong: Tensors, right: Tensors, exact: Tensors, pure: Tensors, names: list) -> float:
    """See :class:`Answer`. `exact` and `pure` are the wrong and the right program in float64."""
    for name in names:
        if kind_of(name) == SCORES:  # what stands for "masked" is free; the pattern shows it
            continue
        if name in right and name in wrong and far(exact[name], pure[name]) > 0:
            rounding = far(right[name], pure[name])
            apart = far(wrong[name], right[name])
            return apart / rounding if rounding else math.inf if apart else 0.0
    return math.inf if set(names) - set(right) else 0.0


def far(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays, where both are finite; inf where only one is.

    Masked scores, whatever a program writes there, count as infinite: float16 has -65504.
    """
    if a.shape != b.shape:
        return math.inf
    a, b = (np.where(np.abs(x) < 65000, x.astype(np.float64), np.inf) for x in (a, b))
    if (np.isinf(a) != np.isinf(b)).any():
        return math.inf
    finite = np.isfinite(a)
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def truth_of(mistake: str, config: Config) -> Truth:
    """The truth, with the numbers of a config filled in."""
    truth, heads = TRUTHS[mistake], weights.another_head_count(config)
    return truth._replace(name=truth.name.format(wrong=heads, right=config.n_head))


def is_located(report: Report, truth: Truth, effects: Mapping[str, float] | None = None) -> bool:
    """Whether the first finding is a place of the mistake, and none with an effect is earlier."""
    first = report.first
    if first is None:
        return False
    places = {kind_of(each) for each in (first.name, *first.through)}
    if not places & set(truth.kinds):
        return False
    if effects is None:
        return True
    # A difference of a few bounds and rounding of the other sign may be within the bound.
    before = list(effects)[: list(effects).index(first.name)]
    return all(effects[name] <= 2 for name in before)


def is_named(report: Report, truth: Truth) -> tuple[bool, bool]:
    """Whether the mistake is the first explanation; whether it is one that reproduces."""

    def right(explanation: Any) -> bool:
        return len(explanation.mistakes) == 1 and explanation.mistakes[0].startswith(truth.name)

    found = report.first.explanations if report.first else ()
    among = any(right(each) for each in found if each.reproduces)
    return bool(found) and right(found[0]), among


def situations(mistake: str, names: Iterable[str], length: int = 0) -> Iterator[Checkpoint]:
    """The checkpoints on which a mistake shows."""
    for name in names:
        try:
            yield checkpoint(name, length, MISTAKES[mistake].when)
        except LookupError:
            continue


def can_make(subject: str, dtype: str, mistake: str, where: Checkpoint) -> bool:
    """Whether a program can make a mistake there, and it is one."""
    if where.chunks and SUBJECTS[subject].module == "mingpt_style":
        return False
    if dtype == "float16" and MISTAKES[mistake].when == mistakes.LARGE_SCORES:
        return False  # it ends at 65504
    # Whoever says that weights are stored so may have rounded all of them, or the matrices alone.
    return not (subject == "numpygpt" and mistake == f"weights_{dtype}")


# -- correct programs on anything -----------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def any_checkpoint(seed: int, caches: bool = True) -> Checkpoint:
    """A checkpoint of random sizes and options, read in one pass or several."""
    rng = np.random.default_rng([6, seed])
    heads, layers = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    width, length = heads * int(rng.integers(2, 17)), int(rng.integers(1, 33))
    config = Config(
        vocab_size=int(rng.integers(5, 200)),
        n_ctx=length + int(rng.integers(0, 8)),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=int(rng.integers(1, 5 * width)) if rng.random() < 0.5 else None,
        activation_function="gelu" if rng.random() < 0.25 else "gelu_new",
        scale_attn_weights=bool(rng.random() < 0.9),
        scale_attn_by_inverse_layer_idx=bool(rng.random() < 0.2),
        tie_word_embeddings=bool(rng.random() < 0.7),
        bias=bool(rng.random() < 0.8),
    )
    tensors = random_tensors(config, seed)
    if width > 11 and rng.random() < 0.3:
        with_outliers(tensors)
    chunks = split(length) if caches and rng.random() < 0.3 else ()
    ids = rng.integers(0, config.vocab_size, length)
    return Checkpoint(
        f"seed {seed}", config, narrow(tensors, "float32"), tuple(map(int, ids)), chunks
    )


def right_answers(
    subject: str, dtype: str, seed: int, kinds: Iterable[str] = DUMPED
) -> Iterator[tuple[str, Report]]:
    """What the verification says of a program without a mistake."""
    program = SUBJECTS[subject]
    where = any_checkpoint(seed, program.module != "mingpt_style")
    arrays = wrong_run(subject, dtype, where, None)
    for kind in kinds:
        yield kind, ask(dump_of(arrays, where, program.declared(dtype), kind), where)


# -- two mistakes at once -------------------------------------------------------------------------


class PairAnswer(NamedTuple):
    """What came of two mistakes in the NumPy port.

    Attributes
    ----------
    located : bool
        The first finding is a place of one of them.
    named : bool
        Where they meet in one array: its first explanation is both. Otherwise the first finding is
        explained by one, and a later one by the other.
    """

    together: bool
    located: bool
    named: bool
    report: Report


def pairs(count: int, seed: int = 0) -> list[Both]:
    """Some pairs of mistakes that can be made together: half in one operation, half not."""
    rng = np.random.default_rng(seed)
    able = [each for each in mistakes.of(mistakes.NUMPY) if each not in UNPAIRED]
    every = [Both(a, b) for i, a in enumerate(able) for b in able[i + 1 :] if _apart(a, b)]
    shuffled = [every[i] for i in rng.permutation(len(every))]
    halves: dict[bool, list[Both]] = {True: [], False: []}
    for pair in shuffled:
        if len(halves[meet(pair)]) < (count + 1) // 2 and both_show(pair):
            halves[meet(pair)].append(pair)
        if all(len(half) == (count + 1) // 2 for half in halves.values()):
            break
    return [*halves[True], *halves[False]]


# Everything is wrong with these, so that a second mistake has no place of its own.
UNPAIRED = ("float16_accumulation", "dropout_on", "wrong_head_count", "weights_float16")


def _apart(a: str, b: str) -> bool:
    whens = {MISTAKES[a].when, MISTAKES[b].when} - {""}
    return len(whens) <= 1


def meet(pair: Both) -> bool:
    """Whether both are made in one operation."""
    first, second = (set(TRUTHS[each].kinds) for each in pair.parts)
    return bool(first & second)


def pair_checkpoint(pair: Both) -> Checkpoint:
    whens = {MISTAKES[each].when for each in pair.parts} - {""}
    return checkpoint("odd", when=whens.pop() if whens else "")


def both_show(pair: Both) -> bool:
    """Whether each of the two changes an array of its kinds though the other is made, too."""
    where = pair_checkpoint(pair)

    def run(mistake: str) -> Tensors:
        program = SUBJECTS["NumPy port"].exact(where, "float32", mistake)
        return program.dump(where.ids, list(where.chunks) or None)

    wrong = run(pair)
    for alone, other in (pair.parts, pair.parts[::-1]):
        without = run(alone)
        kinds = TRUTHS[other].kinds
        if not any(
            far(wrong[name], without[name]) > 1e-9
            for name in wrong
            if name in without and kind_of(name) in kinds
        ):
            return False
    return True


def judge_pair(pair: Both, dtype: str = "float32") -> PairAnswer:
    """Make both in the NumPy port and ask."""
    where = pair_checkpoint(pair)
    program = SUBJECTS["NumPy port"]
    wrong = wrong_run("NumPy port", dtype, where, pair)
    report = ask(dump_of(wrong, where, program.declared(dtype)), where)
    truths = [truth_of(each, where.config) for each in pair.parts]
    said = [each.explanations[0].mistakes for each in report.findings if each.explanations]
    first = report.first.explanations[:1] if report.first else ()

    def says(names: tuple[str, ...], truth: Truth) -> bool:
        return any(name.startswith(truth.name) for name in names)

    located = any(is_located(report, truth) for truth in truths)
    named = all(any(says(names, truth) for names in said) for truth in truths)
    named &= bool(first) and all(
        any(says((name,), truth) for truth in truths) for name in first[0].mistakes
    )
    return PairAnswer(meet(pair), located, named, report)
