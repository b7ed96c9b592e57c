"""GPT-2, once, from top to bottom.

Rows are tokens. The new tokens of one or more sequences lie one after another on N rows, without
padding; only attention looks at which rows belong together (`segments`, each with its cache of
earlier keys and values). Every statement that makes an array names its place in `plan`
(see :mod:`numpygpt.plans`): ``None`` there means "allocate".

Letters: N rows now, T new tokens of one segment, S positions visible to them, C width of the
residual stream, H heads of width D = C/H, F width of the MLP, V size of the vocabulary.

Checks of ids, lengths and shapes are made before this page is entered, by :mod:`numpygpt.api`
and by the checkpoint readers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cache import Segment
from .ops import layer_norm, linear, softmax
from .params import MLP, Array, Attention, Block, Config, Params
from .plans import AttentionPlan, BlockPlan, MLPPlan, Plan, Tile

__all__ = ["attend", "attention", "block", "embed", "forward", "mlp", "unembed"]


def forward(
    ids: Array, segments: Sequence[Segment], params: Params, config: Config, plan: Plan
) -> Array:
    """Read the tokens `ids` (N,) and return their hidden states (N, C), ready to unembed."""
    positions = np.concatenate([s.cache.length + np.arange(s.length) for s in segments])
    x = embed(ids, positions, params, plan)                                        # (N, C)
    for layer, p in enumerate(params.h):
        x = block(x, p, layer, segments, config, plan.h[layer])                    # (N, C)
    for segment in segments:
        segment.cache.length += segment.length
    return layer_norm(x, *params.ln_f, config.layer_norm_epsilon, out=plan.ln_f)   # (N, C)


def embed(ids: Array, positions: Array, params: Params, plan: Plan) -> Array:
    """What each token is, plus where it stands: (N,) and (N,) -> (N, C)."""
    x = np.take(params.wte, ids, axis=0, out=plan.embed)                           # (N, C)
    return np.add(x, params.wpe[positions], out=x)


def block(
    x: Array, p: Block, layer: int, segments: Sequence[Segment], config: Config, plan: BlockPlan
) -> Array:
    """Add to the residual stream what attention says, then what the MLP says: (N, C) -> (N, C)."""
    eps = config.layer_norm_epsilon
    normed = layer_norm(x, *p.ln_1, eps, out=plan.ln_1)                            # (N, C)
    attn_out = attention(normed, p.attn, layer, segments, config, plan.attn)       # (N, C)
    x = np.add(x, attn_out, out=plan.resid_mid)                                    # (N, C)
    normed = layer_norm(x, *p.ln_2, eps, out=plan.ln_2)                            # (N, C)
    mlp_out = mlp(normed, p.mlp, config, plan.mlp)                                 # (N, C)
    return np.add(x, mlp_out, out=plan.resid_post)                                 # (N, C)


def attention(
    x: Array, p: Attention, layer: int, segments: Sequence[Segment], config: Config,
    plan: AttentionPlan,
) -> Array:  # fmt: skip
    """Let every token gather from the tokens it may see: (N, C) -> (N, C)."""
    scale = config.attention_scale(layer)
    qkv = linear(x, *p.c_attn, out=plan.qkv)                                       # (N, 3C)
    q, k, v = split_heads(qkv, 3, config.n_head)                                   # (H, N, D)
    heads = []
    for (rows, cache), tiles in zip(segments, plan.tiles, strict=True):
        keys, values = cache.append(layer, k[:, rows], v[:, rows])                 # (H, S, D)
        heads += [attend(q[:, tile.rows], keys, values, scale, tile) for tile in tiles]
    # The tiles' heads are views of plan.heads where there is one; then nothing is copied.
    mixed = np.concatenate(heads, axis=1, out=plan.heads)                          # (H, N, D)
    return linear(merge_heads(mixed), *p.c_proj, out=plan.out)                     # (N, C)


def attend(q: Array, keys: Array, values: Array, scale: float, tile: Tile) -> Array:
    """Mix the visible values by how well their keys fit the tile's queries."""
    keys, values = keys[:, : tile.visible], values[:, : tile.visible]              # (H, S, D)
    scores = np.matmul(q, keys.mT, out=tile.scores)                                # (H, T, S)
    np.multiply(scores, scale, out=scores)
    own = scores[:, :, -q.shape[1] :]  # the newest keys are the tile's own tokens
    np.copyto(own, -np.inf, where=tile.future)
    pattern = softmax(scores, out=tile.pattern)                                    # (H, T, S)
    return np.matmul(pattern, values, out=tile.heads)                              # (H, T, D)


def mlp(x: Array, p: MLP, config: Config, plan: MLPPlan) -> Array:
    """Transform each row by itself: (N, C) -> (N, C)."""
    pre = linear(x, *p.c_fc, out=plan.pre)                                         # (N, F)
    post = config.activation(pre, out=plan.post)                                   # (N, F)
    return linear(post, *p.c_proj, out=plan.out)                                   # (N, C)


def unembed(hidden: Array, params: Params, out: Array | None = None) -> Array:
    """Compare hidden states with every token's vector: (N, C) -> logits (N, V), in nats."""
    return np.matmul(hidden, params.head.T, out=out)                               # (N, V)


def split_heads(x: Array, parts: int, n_head: int) -> Array:
    """Part the columns by head: (N, parts * H * D) -> (parts, H, N, D), a view."""
    return x.reshape(len(x), parts, n_head, -1).transpose(1, 2, 0, 3)


def merge_heads(x: Array) -> Array:
    """Put the heads of a token side by side: (H, N, D) -> (N, H * D), a view where they lie so."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)
