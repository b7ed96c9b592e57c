"""GPT-2 in torch as nanoGPT is built: one c_attn, transposed copies of the matrices, a tied head.

``attention="fused"`` takes torch's own attention, which shows neither scores nor pattern. The
cache, which nanoGPT lacks, is what people add: keys and values put behind those of earlier passes.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import mistakes, weights
from .tape import Tape
from .torch_parts import HalfSumLinear, gelu_from_table, rounded, to_numpy

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What torch's own attention leaves no room for.
INSIDE_ATTENTION = ("mask_after_softmax", "softmax_over_queries")


def build(source, dtype="float32", mistake=None, attention="manual") -> Program:
    """A program whose weights and activations are torch's `dtype`."""
    mistakes.check(mistakes.NANO, mistake)
    if attention == "fused" and mistake in INSIDE_ATTENTION:
        raise ValueError(f"fused attention cannot make the mistake {mistake!r}")
    config, tensors = weights.load(source, dtype)
    return Program(GPT(config, mistake, attention == "fused"), tensors, getattr(torch, dtype))


class Program:
    """A model with its weights."""

    def __init__(self, model: GPT, tensors, dtype):
        model.load(tensors)
        self.model = model.to(dtype).train(model.mistake == "dropout_on")

    @torch.no_grad()
    def dump(self, ids, chunks=None):
        """Every activation by its public name."""
        tape = Tape(len(ids))

        def keep(name, tensor):
            tape.keep(name, to_numpy(tensor[0]))
            return tensor

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model.forget()
            for past, piece in weights.passes(ids, chunks):
                self.model(torch.tensor([piece]), past, keep)
        return tape.arrays()


class LayerNorm(nn.Module):
    """Layer norm whose shift is optional."""

    def __init__(self, config, mistake):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps, self.mistake = config.layer_norm_epsilon, mistake
        if mistake == "eps_1e-6":
            self.eps = 1e-6
        if mistake == "eps_1e-12":
            self.eps = 1e-12

    def forward(self, x):
        bias = self.bias
        if self.mistake == "ln_no_shift":
            bias = None
        if self.mistake in ("eps_outside_root", "ddof_1", "rms_norm"):
            return self.by_hand(x)
        return F.layer_norm(x, self.weight.shape, self.weight, bias, self.eps)

    def by_hand(self, x):
        if self.mistake == "rms_norm":
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        else:
            mean = x.mean(-1, keepdim=True)
            variance = x.var(-1, unbiased=self.mistake == "ddof_1", keepdim=True)
            if self.mistake == "eps_outside_root":
                y = (x - mean) / (variance.sqrt() + self.eps)
            else:
                y = (x - mean) / (variance + self.eps).sqrt()
        y = y * self.weight
        return y if self.bias is None else y + self.bias


class CausalSelfAttention(nn.Module):
    """Attention over this pass and what the cache holds."""

    def __init__(self, config, i, mistake, fused):
        super().__init__()
        self.config, self.i, self.mistake, self.fused = config, i, mistake, fused
        linear = HalfSumLinear if mistake == "float16_accumulation" else nn.Linear
        bias = config.bias and mistake != "attention_biases_missing"
        self.c_attn = linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = linear(config.n_embd, config.n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(0.1)
        self.resid_dropout = nn.Dropout(0.1)
        self.n_head = config.n_head
        if mistake == "wrong_head_count":
            self.n_head = weights.another_head_count(config)
        self.past = None

    def forward(self, x, past, keep):
        B, T, C = x.shape
        qkv = keep("attn.qkv", self.c_attn(x))
        q, k, v = self.split(qkv)
        if self.past is not None:
            k = torch.cat([self.past[0], k], dim=2)
            v = torch.cat([self.past[1], v], dim=2)
        self.past = k, v

        visible = self.visible(T, k.size(2), past)
        y = self.mix_fused(q, k, v, visible) if self.fused else self.mix(q, k, v, visible, keep)
        keep("attn.heads", y)

        if self.mistake == "heads_reversed":
            y = y.flip(1)
        if self.mistake == "heads_not_merged":
            y = y.contiguous().view(B, T, C)
        else:
            y = y.transpose(1, 2).contiguous().view(B, T, C)
        return keep("attn.out", self.resid_dropout(self.c_proj(y)))

    def split(self, qkv):
        """Queries, keys, values (B, H, T, D)."""
        B, T, width = qkv.shape
        H, D = self.n_head, width // 3 // self.n_head
        if self.mistake == "qkv_interleaved":
            return qkv.view(B, T, H, 3 * D).transpose(1, 2).split(D, dim=-1)
        q, k, v = qkv.split(width // 3, dim=2)
        if self.mistake == "kv_swapped":
            k, v = v, k
        if self.mistake == "qk_swapped":
            q, k = k, q
        if self.mistake == "head_features_first":
            return tuple(part.view(B, T, D, H).permute(0, 3, 1, 2) for part in (q, k, v))
        return tuple(part.view(B, T, H, D).transpose(1, 2) for part in (q, k, v))

    def scale(self):
        """The factor on the scores."""
        config, D = self.config, self.config.n_embd // self.n_head
        scale = D**-0.5 if config.scale_attn_weights else 1.0
        if self.mistake == "no_scale":
            scale = 1.0
        if self.mistake == "scale_by_width":
            scale = config.n_embd**-0.5
        if self.mistake == "scale_twice":
            scale = scale * D**-0.5
        by_layer = config.scale_attn_by_inverse_layer_idx
        if self.mistake == "inverse_layer_scale_ignored":
            by_layer = False
        if self.mistake == "inverse_layer_scale_added":
            by_layer = True
        return scale / (self.i + 1) if by_layer else scale

    def visible(self, T, S, past):
        """Which of S keys each of T queries may look at."""
        if self.mistake == "mask_missing":
            return torch.ones(T, S, dtype=torch.bool)
        diagonal = past  # the first query is at position `past`
        if self.mistake == "mask_top_left":
            diagonal = 0
        if self.mistake == "mask_hides_itself":
            diagonal = past - 1
        if self.mistake == "mask_shows_next":
            diagonal = past + 1
        if self.mistake == "mask_inverted":
            return torch.ones(T, S, dtype=torch.bool).triu(diagonal)
        visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal)
        if past == 0:  # without any key the first row would be NaN
            visible[0, 0] = True
        return visible

    def mix(self, q, k, v, visible, keep):
        scores = (q @ k.transpose(-2, -1)) * self.scale()
        if self.mistake == "mask_minus_1e4":
            scores = scores.masked_fill(~visible, -1e4)
        elif self.mistake != "mask_after_softmax":
            scores = scores.masked_fill(~visible, float("-inf"))
        keep("attn.scores", scores)
        pattern = F.softmax(scores, dim=-2 if self.mistake == "softmax_over_queries" else -1)
        if self.mistake == "mask_after_softmax":
            pattern = pattern * visible
        keep("attn.pattern", pattern)
        return self.attn_dropout(pattern) @ v

    def mix_fused(self, q, k, v, visible):
        mask = visible
        if self.mistake == "mask_minus_1e4":  # here it can only be added
            mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -1e4)
        dropout = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale()
        )


class MLP(nn.Module):
    """Two linear maps and GELU between them."""

    def __init__(self, config, mistake):
        super().__init__()
        self.mistake, self.kind = mistake, config.activation_function
        linear = HalfSumLinear if mistake == "float16_accumulation" else nn.Linear
        bias = config.bias and mistake != "mlp_biases_missing"
        self.c_fc = linear(config.n_embd, config.mlp_dim, bias=bias)
        self.c_proj = linear(config.mlp_dim, config.n_embd, bias=bias)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, keep):
        x = keep("mlp.pre", self.c_fc(x))
        x = keep("mlp.post", self.activation(x))
        return keep("mlp.out", self.dropout(self.c_proj(x)))

    def activation(self, x):
        if self.mistake == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        if self.mistake == "relu":
            return F.relu(x)
        if self.mistake == "gelu_half_table":
            return gelu_from_table(x)
        if self.mistake == "gelu_no_cubic":
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x))
        if self.mistake == "erf_gelu":
            return F.gelu(x)
        return {"gelu": F.gelu, "gelu_new": gelu_tanh}[self.kind](x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """Attention and MLP, each behind its layer norm, added to the stream."""

    def __init__(self, config, i, mistake, fused):
        super().__init__()
        self.mistake = mistake
        self.ln_1 = LayerNorm(config, mistake)
        self.attn = CausalSelfAttention(config, i, mistake, fused)
        self.ln_2 = LayerNorm(config, mistake)
        self.mlp = MLP(config, mistake)

    def forward(self, x, past, keep):
        ln_1, ln_2 = self.ln_1, self.ln_2
        if self.mistake == "ln_1_ln_2_swapped":
            ln_1, ln_2 = ln_2, ln_1
        keep("resid_pre", x)

        if self.mistake == "post_ln":
            x = keep("ln_1", ln_1(keep("resid_mid", x + self.attn(x, past, keep))))
            return keep("ln_2", ln_2(keep("resid_post", x + self.mlp(x, keep))))
        if self.mistake == "residual_from_normed":
            x = keep("ln_1", ln_1(x))
            x = keep("resid_mid", x + self.attn(x, past, keep))
            x = keep("ln_2", ln_2(x))
            return keep("resid_post", x + self.mlp(x, keep))
        if self.mistake == "parallel_block":
            attended = self.attn(keep("ln_1", ln_1(x)), past, keep)
            return keep("resid_post", x + attended + self.mlp(keep("ln_2", ln_2(x)), keep))

        x = keep("resid_mid", x + self.attn(keep("ln_1", ln_1(x)), past, keep))
        added = self.mlp(keep("ln_2", ln_2(x)), keep)
        if self.mistake == "mlp_not_added":
            return keep("resid_post", x)
        return keep("resid_post", x + added)


class GPT(nn.Module):
    """The model; `mistake` reaches every part of it."""

    def __init__(self, config, mistake, fused):
        super().__init__()
        self.config, self.mistake = config, mistake
        linear = HalfSumLinear if mistake == "float16_accumulation" else nn.Linear
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_ctx, config.n_embd),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList(Block(config, i, mistake, fused) for i in range(config.n_layer)),
                "ln_f": LayerNorm(config, mistake),
            }
        )
        self.lm_head = linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings or mistake == "stale_head":
            self.lm_head.weight = self.transformer.wte.weight

    def load(self, tensors):
        """Copy the weights in; those of Conv1D are transposed for nn.Linear."""
        order = list(range(self.config.n_layer))
        if self.mistake == "layers_reordered":
            order.sort(key=str)
        own = self.to(getattr(torch, next(iter(tensors.values())).dtype.name)).state_dict()
        for name in own:
            key = name.removeprefix("transformer.")
            if key.startswith("h."):
                _, i, rest = key.split(".", 2)
                key = f"h.{order[int(i)]}.{rest}"
            if key == "lm_head.weight" and self.lm_head.weight is self.transformer.wte.weight:
                continue
            tensor = torch.from_numpy(tensors[key].copy())
            transposed = key.endswith(TRANSPOSED)
            if self.mistake == "c_proj_transposed" and key.endswith("attn.c_proj.weight"):
                transposed = False  # it is square, so nothing complains
            own[name].copy_(rounded(tensor.t() if transposed else tensor, self.mistake))

    def forget(self):
        """Empty the cache."""
        for block in self.transformer.h:
            block.attn.past = None

    def forward(self, ids, past, keep):
        x = self.transformer.drop(keep("embed", self.embed(ids, past)))
        blocks = list(self.transformer.h)
        if self.mistake == "last_layer_skipped":
            blocks = blocks[:-1]
        for i, block in enumerate(blocks):
            x = block(x, past, lambda name, tensor, i=i: keep(f"h.{i}.{name}", tensor))
        if self.mistake != "no_ln_f":
            x = keep("ln_f", self.transformer.ln_f(x))
        logits = self.lm_head(x)
        if self.mistake == "logits_scaled":
            logits = logits / self.config.n_embd**0.5
        if self.mistake == "vocabulary_padded_wrong":
            logits = F.pad(logits, (weights.padding_rows(logits.size(-1)), 0))
            logits = logits[..., : self.config.vocab_size]
        return keep("logits", logits)

    def embed(self, ids, past):
        places = torch.arange(past, past + ids.size(1))
        if self.mistake == "positions_from_1":
            places = places + 1
        if self.mistake == "positions_restart":
            places = torch.arange(ids.size(1))
        if self.mistake == "token_ids_shifted":
            ids = (ids + 1) % self.config.vocab_size
        tokens = self.transformer.wte(ids)
        if self.mistake == "embedding_scaled":
            tokens = tokens * self.config.n_embd**0.5
        if self.mistake == "positions_missing":
            return tokens
        return tokens + self.transformer.wpe(places)
