"""GPT-2, once, from top to bottom.

Rows are tokens. The new tokens of one or more sequences lie one after another on N rows, without
padding; only attention looks at which rows belong together (`segments`, each with the cache of
earlier keys and values). Every statement that makes an array names its place in `plan`
(see :mod:`numpygpt.plans`): ``None`` there means "allocate".

Letters: N rows now; B sequences in a segment, T new tokens of each, S positions visible to them;
C width of the residual stream, H heads of width D = C/H, F width of the MLP, V size of the
vocabulary.

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
    positions = np.concatenate([segment.positions for segment in segments])        # (N,)
    x = embed(ids, positions, params, plan)                                        # (N, C)
    for layer, p in enumerate(params.h):
        x = block(x, p, layer, segments, config, plan.h[layer])                    # (N, C)
    for segment in segments:
        segment.cache.lengths += segment.length
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
    tasks = []
    for segment, tiles in zip(segments, plan.tiles, strict=True):
        q, k, v = split_heads(qkv[segment.rows], 3, segment.length, config.n_head)  # (B, H, T, D)
        keys, values = segment.cache.append(layer, k, v)                           # (B, H, S, D)
        tasks += [(q, keys, values, scale, tile) for tile in tiles]
    heads = [merge_heads(mixed) for mixed in plan.each(attend, tasks)]
    # They are parts of plan.heads where there is one; then nothing is copied.
    mixed = np.concatenate(heads, out=plan.heads)                                  # (N, C)
    return linear(mixed, *p.c_proj, out=plan.out)                                  # (N, C)


def attend(q: Array, keys: Array, values: Array, scale: float, tile: Tile) -> Array:
    """Mix the visible values by how well their keys fit the tile's queries."""
    q = q[tile.sequences, :, tile.tokens]                                          # (B, H, T, D)
    keys, values = (x[tile.sequences, :, : tile.visible] for x in (keys, values))  # (B, H, S, D)
    scores = np.matmul(q * scale, keys.mT, out=tile.scores)                        # (B, H, T, S)
    newest = scores[..., scores.shape[-1] - tile.future.shape[-1] :]
    np.copyto(newest, -np.inf, where=tile.future)
    pattern = softmax(scores, out=tile.pattern)                                    # (B, H, T, S)
    return np.matmul(pattern, values, out=tile.heads)                              # (B, H, T, D)


def mlp(x: Array, p: MLP, config: Config, plan: MLPPlan) -> Array:
    """Transform each row by itself: (N, C) -> (N, C)."""
    pre = linear(x, *p.c_fc, out=plan.pre)                                         # (N, F)
    post = config.activation(pre, out=plan.post)                                   # (N, F)
    return linear(post, *p.c_proj, out=plan.out)                                   # (N, C)


def unembed(hidden: Array, params: Params, out: Array | None = None) -> Array:
    """Compare hidden states with every token's vector: (N, C) -> logits (N, V), in nats."""
    return np.matmul(hidden, params.head.T, out=out)                               # (N, V)


def split_heads(x: Array, parts: int, length: int, n_head: int) -> Array:
    """Part rows by sequence and columns by head: (B * T, parts * H * D) -> (parts, B, H, T, D)."""
    return x.reshape(-1, length, parts, n_head, x.shape[1] // parts // n_head).transpose(
        2, 0, 3, 1, 4
    )


def merge_heads(x: Array) -> Array:
    """Put the heads of a token side by side: (B, H, T, D) -> (B * T, H * D)."""
    b, h, t, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * t, h * d)
