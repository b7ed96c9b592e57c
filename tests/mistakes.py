"""Known ways to get GPT-2 wrong, as data: what, why people do it, and how large the effect is.

A mistake replaces functions of the page, fields of the config, or what is made of the weights.
Some cannot be seen on every model; those say which model shows them. ``effect`` is the largest
change of a logit as a fraction of the largest logit, on the model of test_mistakes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from numpygpt import model, ops

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mistake:
    name: str
    why: str
    effect: float
    # What the wrong implementation has instead:
    page: Mapping[str, Callable] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = dict
    activation: Callable = ops.gelu_new
    # The model that shows it, where not every model does:
    shown_by: Mapping[str, Any] = field(default_factory=dict)
    large_scores: bool = False

    def patch(self, monkeypatch) -> None:
        for name, function in self.page.items():
            monkeypatch.setattr(model, name, function)
        monkeypatch.setitem(ops.ACTIVATIONS, "gelu_new", self.activation)


# -- what is done to the weights ------------------------------------------------------------------


def edit(ending: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], Tensors]:
    """A change to every array whose name ends so."""
    return lambda tensors: {
        name: change(array) if name.endswith(ending) else array for name, array in tensors.items()
    }


def parts(*order: int) -> Callable[[np.ndarray], np.ndarray]:
    """The thirds of the columns of c_attn in another order."""
    return lambda w: np.concatenate([np.split(w, 3, axis=-1)[i] for i in order], axis=-1)


def interleaved(w, n_head=4):
    """Columns by head first and q, k, v second, read as if by q, k, v first."""
    by_part = w.reshape(*w.shape[:-1], 3, n_head, -1)
    return by_part.swapaxes(-2, -3).reshape(w.shape)


def swapped_norms(tensors):
    other = {"ln_1": "ln_2", "ln_2": "ln_1"}
    return {
        name: tensors[name.replace(part, other[part])] if (part := name[4:8]) in other else array
        for name, array in tensors.items()
    }


def bfloat16(array):
    """Rounded to the nearest of the floats with eight significant bits."""
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(array.dtype)


def float16(array):
    return array.astype(np.float16).astype(array.dtype)


# -- what is done to the page ---------------------------------------------------------------------


def layer_norm(x, g, b=None, eps=1e-5, out=None, *, ddof=0, outside=False, axis=-1, centred=True):
    mean = x.mean(axis=axis, keepdims=True)
    variance = np.square(x - mean).sum(axis=axis, keepdims=True) / max(x.shape[axis] - ddof, 1)
    if not centred:
        mean, variance = 0.0, np.square(x).mean(axis=axis, keepdims=True)
    root = np.sqrt(variance) + eps if outside else np.sqrt(variance + eps)
    return (x - mean) / root * g + b


def attend(
    q, keys, values, scale, tile, *, sees=np.less_equal, fill=-1e10, aligned="end", how="add"
):
    """Attention with its mask spelt out: key s, query t, positions counted in the whole text."""
    q = q[tile.sequences, :, tile.tokens]
    keys, values = (x[tile.sequences, :, : tile.visible] for x in (keys, values))
    scores = q @ keys.mT * scale
    rows = q.shape[2]
    t = np.arange(rows)[:, None] + (tile.visible - rows if aligned == "end" else 0)
    seen = sees(np.arange(tile.visible), t)
    if how == "set":
        scores = np.where(seen, scores, fill)
    elif how == "add":
        scores = scores + np.where(seen, 0.0, fill).astype(q.dtype)
    elif how == "multiply":
        scores = scores * seen
    pattern = ops.softmax(scores)
    return (pattern * seen if how == "after" else pattern) @ values


def rescaled(factor):
    """The right attention with another factor on the scores, a function of a head's width."""

    def attend(q, keys, values, scale, tile, right=model.attend):
        return right(q, keys, values, scale * factor(q.shape[-1]), tile)

    return attend


def softmax_over(axis):
    def softmax(x, out=None):
        weights = np.exp(x - x.max())
        total = weights.sum(axis=axis, keepdims=True)
        return weights / np.where(total > 0, total, 1)

    return softmax


def bare_softmax(x, out=None):
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(x)
        return weights / weights.sum(axis=-1, keepdims=True)


def embed_at(place, right=model.embed):
    """Positions changed on their way into the embedding."""

    def embed(ids, positions, params, plan):
        return right(ids, place(positions), params, plan)

    return embed


def embed_without_positions(ids, positions, params, plan):
    return params.wte[ids]


def embed_with_dropout(ids, positions, params, plan, right=model.embed):
    x = right(ids, positions, params, plan)
    kept = np.random.default_rng(0).random(x.shape) > 0.1
    return (x * kept / 0.9).astype(x.dtype)


def forward_without_ln_f(ids, segments, params, config, plan):
    positions = np.concatenate([segment.positions for segment in segments])
    x = model.embed(ids, positions, params, plan)
    for layer, p in enumerate(params.h):
        x = model.block(x, p, layer, segments, config, plan.h[layer])
    for segment in segments:
        segment.cache.lengths += segment.length
    return x


def block(x, p, layer, segments, config, plan, *, kind):
    def norm(x, ln):
        return ops.layer_norm(x, *ln, config.layer_norm_epsilon)

    def attention(x):
        return model.attention(x, p.attn, layer, segments, config, plan.attn)

    def mlp(x):
        return model.mlp(x, p.mlp, config, plan.mlp)

    if kind == "post-LN":
        x = norm(x + attention(x), p.ln_1)
        return norm(x + mlp(x), p.ln_2)
    if kind == "residual from the norm":
        x = norm(x, p.ln_1)
        x = norm(x + attention(x), p.ln_2)
        return x + mlp(x)
    if kind == "parallel":
        return x + attention(norm(x, p.ln_1)) + mlp(norm(x, p.ln_2))
    if kind == "no residual":
        x = x + attention(norm(x, p.ln_1))
        return mlp(norm(x, p.ln_2))
    raise ValueError(kind)


def half_linear(x, w, b=None, out=None):
    y = float16(x) @ float16(w)
    return float16(y if b is None else y + b)


def half_gelu(x, out=None):
    return float16(ops.gelu_new(float16(x)))


# -- the gallery ----------------------------------------------------------------------------------

MISTAKES = [
    # activation
    Mistake("erf GELU", "torch.nn.GELU() is the exact one; nanoGPT uses it since 2023", 1.3e-4,
            config={"activation_function": "gelu"}),
    Mistake("quick GELU", "CLIP's text model is a GPT-2 with this one", 7.6e-3,
            config={"activation_function": "quick_gelu"}),
    Mistake("GELU of halves", "ggml looks it up in a table of 65536 half-precision inputs", 2.3e-4,
            activation=half_gelu),
    Mistake("GELU without its cubic term", "the 0.044715 looks like noise", 1.5e-2,
            activation=lambda x, out=None: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * x))),
    # layer norm
    Mistake("epsilon 1e-6", "the default of Flax and of T5", 1.9e-4,
            config={"layer_norm_epsilon": 1e-6}),
    Mistake("epsilon 1e-12", "BERT's", 2.1e-4, config={"layer_norm_epsilon": 1e-12}),
    Mistake("epsilon outside the root", "the formula with a standard deviation in it", 1.5e-4,
            page={"layer_norm": partial(layer_norm, outside=True)}),
    Mistake("variance over C - 1", "torch.var and pandas divide so by default", 1.1e-2,
            page={"layer_norm": partial(layer_norm, ddof=1)}),
    Mistake("layer norm over tokens", "batch norm, or axis=0 on unbatched rows", 1.49,
            page={"layer_norm": partial(layer_norm, axis=0)}),
    Mistake("mean not subtracted", "LLaMA's RMSNorm", 0.18,
            page={"layer_norm": partial(layer_norm, centred=False)}),
    Mistake("layer norm without shift", "bias=False carried over from a nanoGPT config", 0.31,
            tensors=edit(("ln_1.bias", "ln_2.bias", "ln_f.bias"), np.zeros_like)),
    # scale of the scores
    Mistake("scores not scaled", "T5 has the factor in its initial weights instead", 0.41,
            config={"scale_attn_weights": False}),
    Mistake("scores scaled by sqrt(C)", "the width of the model taken for that of a head", 0.14,
            page={"attend": rescaled(lambda d: (d / 64) ** 0.5)}),
    Mistake("scores scaled twice", "once by hand, once inside the library's attention", 0.21,
            page={"attend": rescaled(lambda d: d**-0.5)}),
    Mistake("inverse-layer scale missing", "transformers ignored the flag until March 2026", 5.5e-2,
            config={"scale_attn_by_inverse_layer_idx": False},
            shown_by={"scale_attn_by_inverse_layer_idx": True}),
    Mistake("inverse-layer scale added", "Megatron has it, and undoes it in its softmax", 5.4e-2,
            config={"scale_attn_by_inverse_layer_idx": True}),
    # layout of the weights
    Mistake("attn.c_proj transposed", "square, so nn.Linear loads a Conv1D without complaint", 1.29,
            tensors=edit("attn.c_proj.weight", np.transpose)),
    Mistake("qkv interleaved by head", "Megatron's and GPT-NeoX's layout", 1.00,
            tensors=edit(("c_attn.weight", "c_attn.bias"), interleaved)),
    Mistake("keys and values swapped", "two of three slices in the wrong order", 1.07,
            tensors=edit(("c_attn.weight", "c_attn.bias"), parts(0, 2, 1))),
    Mistake("queries and keys swapped", "the scores come out transposed, and look alike", 0.54,
            tensors=edit(("c_attn.weight", "c_attn.bias"), parts(1, 0, 2))),
    Mistake("wrong number of heads", "every shape fits any divisor of C", 0.32,
            config={"n_head": 8}),
    Mistake("heads not merged by token", "a reshape without its transpose", 1.28,
            page={"merge_heads": lambda x: x.reshape(x.shape[2], -1)}),
    Mistake("heads in reverse", "an axis counted from the other end", 1.12,
            page={"merge_heads": lambda x, right=model.merge_heads: right(x[:, ::-1])}),
    Mistake("head features first", "(D, H) for (H, D) when heads are split and merged", 1.33,
            page={"merge_heads": lambda x: x[0].transpose(1, 2, 0).reshape(x.shape[2], -1)}),
    Mistake("attention biases missing", "LLaMA-style layers have none", 0.33,
            tensors=edit(("attn.c_attn.bias", "attn.c_proj.bias"), np.zeros_like)),
    Mistake("MLP bias missing", "bias=False as a default", 0.14,
            tensors=edit("c_fc.bias", np.zeros_like)),
    # mask
    Mistake("mask missing", "BERT has none", 0.86,
            page={"attend": partial(attend, how="none")}),
    Mistake("mask hides the token itself", "tril(-1) for tril(0)", 0.61,
            page={"attend": partial(attend, sees=np.less, how="set")}),
    Mistake("mask shows the next token", "triu(2) for triu(1)", 0.55,
            page={"attend": partial(attend, sees=lambda s, t: s <= t + 1)}),
    Mistake("mask inverted", "True means masked in one API and allowed in the next", 0.99,
            page={"attend": partial(attend, sees=np.greater, how="set")}),
    Mistake("mask multiplied", "a masked score of 0 is not a weight of 0", 0.66,
            page={"attend": partial(attend, how="multiply")}),
    Mistake("mask after the softmax", "rows no longer sum to 1", 0.67,
            page={"attend": partial(attend, how="after")}),
    Mistake("mask of -1e4", "fits into float16, and leaks where scores are large", 1.45,
            page={"attend": partial(attend, fill=-1e4)}, large_scores=True),
    Mistake("mask aligned with the first query", "is_causal=True with a cache", 0.73,
            page={"attend": partial(attend, aligned="start")}),
    # softmax
    Mistake("softmax over queries", "axis=-2, or a transposed score matrix", 0.64,
            page={"softmax": softmax_over(-2)}),
    Mistake("softmax over heads", "dim=0 on unbatched scores", 0.78,
            page={"softmax": softmax_over(-3)}),
    Mistake("softmax without the maximum", "the textbook's formula overflows", math.inf,
            page={"softmax": bare_softmax}, large_scores=True),
    # positions
    Mistake("positions from 1", "a begin marker or a pad token counted along", 0.33,
            page={"embed": embed_at(lambda positions: positions + 1)}),
    Mistake("positions start again with the cache", "arange(T) of the new tokens", 0.16,
            page={"embed": embed_at(lambda positions: positions - positions[0])}),
    Mistake("positions missing", "rotary models add none here", 0.25,
            page={"embed": embed_without_positions}),
    Mistake("dropout left on", "model.eval() forgotten", 0.21,
            page={"embed": embed_with_dropout}),
    # structure
    Mistake("final layer norm missing", "GPT-1 and BERT have none", 1.21,
            page={"forward": forward_without_ln_f}),
    Mistake("layer norm after the sum", "GPT-1's and BERT's order", 0.88,
            page={"block": partial(block, kind="post-LN")}),
    Mistake("ln_1 and ln_2 swapped", "the names do not say what they belong to", 0.51,
            tensors=swapped_norms),
    Mistake("residual from the normalised stream", "x = ln(x) written over x", 0.90,
            page={"block": partial(block, kind="residual from the norm")}),
    Mistake("attention and MLP in parallel", "GPT-J's and GPT-NeoX's block", 0.58,
            page={"block": partial(block, kind="parallel")}),
    Mistake("MLP not added to the stream", "x = mlp(...) for x = x + mlp(...)", 0.98,
            page={"block": partial(block, kind="no residual")}),
    # head
    Mistake("stale tied head", "lm_head.weight in the file, wte used", 1.19,
            config={"tie_word_embeddings": True}, shown_by={"tie_word_embeddings": False}),
    Mistake("logits scaled by 1/sqrt(C)", "T5 does so when its head is tied", 0.88,
            page={"unembed": lambda hidden, params, out=None:
                  hidden @ params.head.T * hidden.shape[-1] ** -0.5}),
    # precision
    Mistake("weights rounded to float16", "half the memory", 5.1e-4, tensors=edit("", float16)),
    Mistake("weights rounded to bfloat16", "half the memory", 4.9e-3, tensors=edit("", bfloat16)),
    Mistake("products in float16", "autocast", 6.1e-4, page={"linear": half_linear}),
]  # fmt: skip
