"""Blocks wired in another order, and what comes after the last one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...params import Array
from ..operations import OPERATIONS, Compute, Operation, Program, added, same
from .mistake import Mistake, exchanged, rewired

__all__ = ["HEAD", "structures"]


def _normed_sum(name: str) -> Compute:
    """A layer norm of the stream after a branch."""
    norm = OPERATIONS[name].compute
    return lambda program, layer, x, y: norm(program, layer, x + y)


def _last_skipped(program: Program, layer: int, x: Array) -> Array:
    """ln_f of what the last block began with."""
    return OPERATIONS["ln_f"].compute(program, layer, x)


def _post_ln_recorded_before_its_norms() -> Mistake:
    """Post-LN where the stream's names stand for the sums, which the norms then read."""
    norm_1, norm_2, last = (OPERATIONS[key] for key in ("h.{i}.ln_1", "h.{i}.ln_2", "ln_f"))
    qkv, pre = (OPERATIONS[key] for key in ("h.{i}.attn.qkv", "h.{i}.mlp.pre"))
    operations = {
        "h.{i}.resid_pre": Operation(("h.{i-1}.ln_2",), same, "what the block before left"),
        "h.{i}.attn.qkv": qkv._replace(inputs=("h.{i}.resid_pre",)),
        "h.{i}.ln_1": norm_1._replace(inputs=("h.{i}.resid_mid",)),
        "h.{i}.mlp.pre": pre._replace(inputs=("h.{i}.ln_1",)),
        "h.{i}.resid_post": Operation(("h.{i}.ln_1", "h.{i}.mlp.out"), added, "MLP added"),
        "h.{i}.ln_2": norm_2._replace(inputs=("h.{i}.resid_post",)),
        "ln_f": last._replace(inputs=("h.{i-1}.ln_2",)),
    }
    name, why = "layer norm after the sum (post-LN)", "GPT-1's and BERT's order"
    return Mistake(name, why, tuple(operations), operations)


def structures() -> list[Mistake]:
    """Other orders of the same operations."""
    keep: Compute = same
    return [
        rewired(
            "layer norm after the sum (post-LN)",
            "GPT-1's and BERT's order",
            ln_1=(("resid_pre", "attn.out"), _normed_sum("h.{i}.ln_1")),
            attn__qkv=(("resid_pre",), OPERATIONS["h.{i}.attn.qkv"].compute),
            resid_mid=(("ln_1",), keep),
            ln_2=(("resid_mid", "mlp.out"), _normed_sum("h.{i}.ln_2")),
            mlp__pre=(("resid_mid",), OPERATIONS["h.{i}.mlp.pre"].compute),
            resid_post=(("ln_2",), keep),
        ),
        _post_ln_recorded_before_its_norms(),
        rewired(
            "residual from the normalised stream",
            "x = ln(x) written over x",
            resid_mid=(("ln_1", "attn.out"), added),
            resid_post=(("ln_2", "mlp.out"), added),
        ),
        rewired(
            "attention and MLP in parallel",
            "GPT-J's and GPT-NeoX's block",
            ln_2=(("resid_pre",), OPERATIONS["h.{i}.ln_2"].compute),
            resid_post=(
                ("resid_pre", "attn.out", "mlp.out"),
                lambda program, layer, x, y, z: x + y + z,
            ),
        ),
        rewired(  # where the middle of the stream is what ln_2 reads
            "attention and MLP in parallel",
            "GPT-J's and GPT-NeoX's block",
            resid_mid=(("resid_pre",), keep),
            resid_post=(
                ("resid_pre", "attn.out", "mlp.out"),
                lambda program, layer, x, y, z: x + y + z,
            ),
        ),
        rewired(
            "MLP not added to the stream",
            "its result computed and dropped",
            resid_post=(("resid_mid",), keep),
        ),
        rewired(
            "MLP in place of the stream",
            "x = mlp(...) for x = x + mlp(...)",
            resid_post=(("mlp.out",), keep),
        ),
        rewired(
            "attention not added to the stream",
            "its result computed and dropped",
            resid_mid=(("resid_pre",), keep),
        ),
        rewired(
            "attention in place of the stream",
            "x = attention(...) for x = x + attention(...)",
            resid_mid=(("attn.out",), keep),
        ),
        rewired(
            "one layer norm for both branches",
            "GPT-J's block",
            mlp__pre=(("ln_1",), OPERATIONS["h.{i}.mlp.pre"].compute),
        ),
        Mistake(
            "final layer norm missing",
            "GPT-1 and BERT have none",
            ("ln_f", "logits"),
            {"ln_f": OPERATIONS["ln_f"]._replace(compute=same)},
        ),
        Mistake(
            "last block left out",
            "a range that ends one too early",
            ("ln_f",),
            {"ln_f": Operation(("h.{i-2}.resid_post",), _last_skipped, "ln_f")},
        ),
    ]


def _rolled(to: int) -> tuple[str, Compute]:
    """Logits that stand too far back, by what fills the vocabulary up to a multiple of `to`."""

    def compute(program: Program, layer: int, hidden: Array) -> Array:
        right = OPERATIONS["logits"].compute(program, layer, hidden)
        padding = np.zeros((len(right), -right.shape[1] % to))
        return np.concatenate([padding, right], axis=1)[:, : right.shape[1]]

    return "logits", compute


def _ragged(to: int) -> Callable[[Program], bool]:
    return lambda program: program.config.vocab_size % to > 0


def _by_wte(program: Program, layer: int, hidden: Array) -> Array:
    """The token table in the place of the head."""
    table = program.weight("wte")
    assert table is not None
    return np.asarray(hidden @ table.T)


def _scaled(program: Program, layer: int, hidden: Array) -> Array:
    right = OPERATIONS["logits"].compute(program, layer, hidden)
    return np.asarray(right * program.config.n_embd**-0.5)


HEAD = (
    exchanged(
        "token table instead of the head",
        "lm_head.weight in the file, wte used",
        ("logits", _by_wte),
        when=lambda program: not program.config.tie_word_embeddings,
    ),
    exchanged(
        "logits scaled by 1/sqrt(C)", "T5 does so when its head is tied", ("logits", _scaled)
    ),
    *(
        exchanged(
            "padding of the vocabulary in front",
            "rows added at the wrong end",
            _rolled(to),
            when=_ragged(to),
        )
        for to in (8, 64, 128)
    ),
)
