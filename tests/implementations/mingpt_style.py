"""GPT-2 in torch as the first minGPT was built: separate key, query and value maps, a mask buffer.

Masked scores are the dtype's lowest number, not -inf, and there is no cache. `Seen` modules
stand where something is to be recorded, and pass it on.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from . import mistakes, weights
from .tape import Tape
from .torch_parts import HalfSumLinear, WrongLayerNorm, gelu_from_table, rounded, to_numpy


def build(source, dtype="float32", mistake=None) -> Program:
    """A program whose weights and activations are torch's `dtype`."""
    mistakes.check(mistakes.MIN, mistake)
    config, tensors = weights.load(source, dtype)
    return Program(GPT(config, mistake), tensors, getattr(torch, dtype))


class Program:
    """A model with its weights."""

    def __init__(self, model: GPT, tensors, dtype):
        self.model = model.to(dtype)
        self.model.load_state_dict(state_dict(model.config, tensors, model.mistake))
        self.model.train(model.mistake == "dropout_on")

    @torch.no_grad()
    def dump(self, ids, chunks=None):
        """Every activation by its public name."""
        if chunks is not None:
            raise ValueError("this program has no cache: chunks must be None")
        tape = Tape(len(ids))
        for name, module in self.model.named_modules():
            if isinstance(module, Seen):
                module.name, module.tape = public_name(name), tape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model(torch.tensor([list(map(int, ids))]))
        return tape.arrays()


class Seen(nn.Module):
    """Keeps what passes through."""

    def forward(self, x):
        self.tape.keep(self.name, to_numpy(x[0]))
        return x


def public_name(name):
    """blocks.0.attn.seen_pattern -> h.0.attn.pattern."""
    return name.replace("blocks.", "h.").replace("seen_", "")


# -- weights -----------------------------------------------------------------------------------

PARTS = {
    "ln1": "ln_1",
    "ln2": "ln_2",
    "attn.proj": "attn.c_proj",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}


def state_dict(config, tensors, mistake):
    """GPT-2's tensors by this program's names; its nn.Linear maps are (out, in)."""
    given = {
        name: rounded(torch.from_numpy(each.copy()), mistake) for name, each in tensors.items()
    }
    head = given.get("lm_head.weight", given["wte.weight"])
    if mistake == "stale_head":
        head = given["wte.weight"]
    if mistake == "vocabulary_padded_wrong":
        blank = torch.zeros(weights.padding_rows(len(head)), config.n_embd, dtype=head.dtype)
        head = torch.cat([blank, head])[: config.vocab_size]
    state = {
        "tok_emb.weight": given["wte.weight"],
        "pos_emb": given["wpe.weight"][None],
        "head.weight": head,
    }
    layers = [str(i) for i in range(config.n_layer)]
    if mistake == "layers_reordered":
        layers = sorted(layers)
    for i, layer in enumerate(layers):
        for ours, theirs in PARTS.items():
            if mistake == "ln_1_ln_2_swapped" and theirs.startswith("ln_"):
                theirs = {"ln_1": "ln_2", "ln_2": "ln_1"}[theirs]
            put(state, f"blocks.{i}.{ours}", given, f"h.{layer}.{theirs}", mistake)
        put_qkv(state, f"blocks.{i}.attn", given, f"h.{layer}.attn.c_attn", config, mistake)
    put(state, "ln_f", given, "ln_f", mistake)
    return state


def put(state, ours, given, theirs, mistake):
    """One map or layer norm; a bias that the checkpoint lacks is 0."""
    weight = given[f"{theirs}.weight"]
    bias = given.get(f"{theirs}.bias", torch.zeros(weight.shape[-1], dtype=weight.dtype))
    if mistake == "attention_biases_missing" and ".attn." in theirs:
        bias = torch.zeros_like(bias)
    if mistake == "mlp_biases_missing" and ".mlp." in theirs:
        bias = torch.zeros_like(bias)
    if mistake == "c_proj_transposed" and theirs.endswith("attn.c_proj"):
        state[f"{ours}.weight"] = weight
    else:
        state[f"{ours}.weight"] = weight.t() if weight.ndim == 2 else weight
    state[f"{ours}.bias"] = bias


def put_qkv(state, ours, given, theirs, config, mistake):
    """The three maps that c_attn holds side by side."""
    names = ["query", "key", "value"]
    if mistake == "kv_swapped":
        names = ["query", "value", "key"]
    if mistake == "qk_swapped":
        names = ["key", "query", "value"]
    for part, name in enumerate(names):
        for kind in ("weight", "bias"):
            columns = given.get(f"{theirs}.{kind}")
            if columns is None:
                columns = torch.zeros(3 * config.n_embd, dtype=given[f"{theirs}.weight"].dtype)
            if mistake == "qkv_interleaved":  # as if each head had its q, k and v together
                grouped = columns.unflatten(-1, (config.n_head, 3, -1))
                taken = grouped[..., part, :].flatten(-2)
            else:
                taken = columns.unflatten(-1, (3, -1))[..., part, :]
            if mistake == "attention_biases_missing" and kind == "bias":
                taken = torch.zeros_like(taken)
            state[f"{ours}.{name}.{kind}"] = taken.t() if taken.ndim == 2 else taken


# -- modules -----------------------------------------------------------------------------------


class NewGELU(nn.Module):
    """GPT-2's GELU, written out."""

    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class NoCubicGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * x))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TableGELU(nn.Module):
    def forward(self, x):
        return gelu_from_table(x)


def activation(config, mistake):
    """The module between the two maps of the MLP."""
    # fmt: off
    wrong = {
        "erf_gelu": nn.GELU, "relu": nn.ReLU, "quick_gelu": QuickGELU,
        "gelu_no_cubic": NoCubicGELU, "gelu_half_table": TableGELU,
    }
    # fmt: on
    right = {"gelu_new": NewGELU, "gelu": nn.GELU}[config.activation_function]
    return wrong.get(mistake, right)()


def layer_norm(config, mistake):
    """nn.LayerNorm or one that is wrong."""
    if mistake in ("eps_outside_root", "ddof_1", "rms_norm", "ln_no_shift"):
        norm = WrongLayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        norm.mistake = mistake
        return norm
    if mistake in ("eps_1e-6", "eps_1e-12"):
        return nn.LayerNorm(config.n_embd, eps=float(mistake.removeprefix("eps_")))
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


def linear(mistake, *sizes, **options):
    kind = HalfSumLinear if mistake == "float16_accumulation" else nn.Linear
    return kind(*sizes, **options)


class CausalSelfAttention(nn.Module):
    """Attention of all heads at once."""

    def __init__(self, config, i, mistake):
        super().__init__()
        self.config, self.i, self.mistake = config, i, mistake
        C, n = config.n_embd, config.n_ctx
        self.key, self.query, self.value = (linear(mistake, C, C) for _ in range(3))
        self.proj = linear(mistake, C, C)
        self.attn_drop, self.resid_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.n_head = config.n_head
        if mistake == "wrong_head_count":
            self.n_head = weights.another_head_count(config)
        mask = torch.tril(torch.ones(n, n))
        if mistake == "mask_missing":
            mask = torch.ones(n, n)
        if mistake == "mask_hides_itself":
            mask = torch.tril(torch.ones(n, n), diagonal=-1)
        if mistake == "mask_shows_next":
            mask = torch.tril(torch.ones(n, n), diagonal=1)
        if mistake == "mask_inverted":
            mask = 1 - mask
        self.register_buffer("mask", mask.view(1, 1, n, n), persistent=False)
        for name in ("qkv", "scores", "pattern", "heads", "out"):
            self.add_module(f"seen_{name}", Seen())

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.query(x), self.key(x), self.value(x)
        self.seen_qkv(torch.cat([q, k, v], dim=-1))
        q, k, v = self.split(q), self.split(k), self.split(v)

        att = self.scaled(q @ k.transpose(-2, -1))
        visible = self.mask[:, :, :T, :T]
        if self.mistake == "mask_minus_1e4":
            att = att - 1e4 * (1 - visible)
        elif self.mistake != "mask_after_softmax":
            att = att.masked_fill(visible == 0, torch.finfo(att.dtype).min)
        att = F.softmax(
            self.seen_scores(att), dim=2 if self.mistake == "softmax_over_queries" else 3
        )
        if self.mistake == "mask_after_softmax":
            att = att * visible
        y = self.seen_heads(self.attn_drop(self.seen_pattern(att)) @ v)

        if self.mistake == "heads_reversed":
            y = torch.cat(y.split(1, dim=1)[::-1], dim=1)
        if self.mistake == "heads_not_merged":
            y = y.reshape(B, T, C)
        else:
            y = y.transpose(1, 2).reshape(B, T, C)
        return self.seen_out(self.resid_drop(self.proj(y)))

    def split(self, x):
        """Rows (B, T, C) as heads (B, H, T, D)."""
        B, T, C = x.size()
        H, D = self.n_head, C // self.n_head
        if self.mistake == "head_features_first":
            return x.view(B, T, D, H).permute(0, 3, 1, 2)
        return x.view(B, T, H, D).transpose(1, 2)

    def scaled(self, att):
        config, D = self.config, self.config.n_embd // self.n_head
        if config.scale_attn_weights and self.mistake != "no_scale":
            att = att / math.sqrt(config.n_embd if self.mistake == "scale_by_width" else D)
        if self.mistake == "scale_twice":
            att = att / math.sqrt(D)
        by_layer = config.scale_attn_by_inverse_layer_idx
        if self.mistake == "inverse_layer_scale_ignored":
            by_layer = False
        if self.mistake == "inverse_layer_scale_added":
            by_layer = True
        return att / (self.i + 1) if by_layer else att


class MLP(nn.Module):
    def __init__(self, config, mistake):
        super().__init__()
        self.fc = linear(mistake, config.n_embd, config.mlp_dim)
        self.act = activation(config, mistake)
        self.proj = linear(mistake, config.mlp_dim, config.n_embd)
        self.drop = nn.Dropout(0.1)
        self.seen_pre, self.seen_post, self.seen_out = Seen(), Seen(), Seen()

    def forward(self, x):
        x = self.seen_post(self.act(self.seen_pre(self.fc(x))))
        return self.seen_out(self.drop(self.proj(x)))


class Block(nn.Module):
    def __init__(self, config, i, mistake):
        super().__init__()
        self.mistake = mistake
        self.ln1, self.ln2 = layer_norm(config, mistake), layer_norm(config, mistake)
        self.attn = CausalSelfAttention(config, i, mistake)
        self.mlp = MLP(config, mistake)
        for name in ("resid_pre", "ln_1", "resid_mid", "ln_2", "resid_post"):
            self.add_module(f"seen_{name}", Seen())

    def forward(self, x):
        self.seen_resid_pre(x)
        if self.mistake == "post_ln":
            x = self.seen_ln_1(self.ln1(self.seen_resid_mid(x + self.attn(x))))
            return self.seen_ln_2(self.ln2(self.seen_resid_post(x + self.mlp(x))))
        normed = self.seen_ln_1(self.ln1(x))
        if self.mistake == "parallel_block":
            beside = self.mlp(self.seen_ln_2(self.ln2(x)))
            return self.seen_resid_post(x + self.attn(normed) + beside)
        if self.mistake == "residual_from_normed":
            x = normed
        x = self.seen_resid_mid(x + self.attn(normed))
        normed = self.seen_ln_2(self.ln2(x))
        if self.mistake == "residual_from_normed":
            x = normed
        added = self.mlp(normed)
        if self.mistake == "mlp_not_added":
            added = 0
        return self.seen_resid_post(x + added)


class GPT(nn.Module):
    """The model; `mistake` reaches every part of it."""

    def __init__(self, config, mistake):
        super().__init__()
        self.config, self.mistake = config, mistake
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.n_ctx, config.n_embd))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(config, i, mistake) for i in range(config.n_layer))
        self.ln_f = layer_norm(config, mistake)
        self.head = linear(mistake, config.n_embd, config.vocab_size, bias=False)
        self.seen_embed, self.seen_ln_f, self.seen_logits = Seen(), Seen(), Seen()

    def forward(self, idx):
        x = self.drop(self.seen_embed(self.embed(idx)))
        depth = len(self.blocks)
        if self.mistake == "last_layer_skipped":
            depth = depth - 1
        for i in range(depth):
            x = self.blocks[i](x)
        if self.mistake != "no_ln_f":
            x = self.seen_ln_f(self.ln_f(x))
        logits = self.head(x)
        if self.mistake == "logits_scaled":
            logits = logits / math.sqrt(self.config.n_embd)
        return self.seen_logits(logits)

    def embed(self, idx):
        first = 1 if self.mistake == "positions_from_1" else 0
        positions = self.pos_emb[:, first : first + idx.size(1)]
        if self.mistake == "token_ids_shifted":
            idx = (idx + 1) % self.config.vocab_size
        tokens = self.tok_emb(idx)
        if self.mistake == "embedding_scaled":
            tokens = tokens * math.sqrt(self.config.n_embd)
        if self.mistake == "positions_missing":
            return tokens
        return tokens + positions
