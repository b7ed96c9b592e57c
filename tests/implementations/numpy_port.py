"""GPT-2 in NumPy for one sequence, head by head, with a key/value cache."""

from __future__ import annotations

import functools
import math

import numpy as np

from . import mistakes, weights
from .tape import Tape


def build(source: weights.Source, dtype: str = "float32", mistake: str | None = None) -> Program:
    """A program that computes in `dtype`, "float32" or "float64"."""
    return Program(*weights.load(source, dtype), dtype, mistake)


class Program:
    """GPT-2 with at most one mistake."""

    def __init__(self, config, tensors, dtype, mistake):
        mistakes.check(mistakes.NUMPY, mistake)
        self.config, self.mistake = config, mistake
        self.tensors = {name: self.stored(array).astype(dtype) for name, array in tensors.items()}
        self.heads = config.n_head
        if mistake == "wrong_head_count":
            self.heads = weights.another_head_count(config)

    def stored(self, array):
        """The weight as a file would hold it."""
        if self.mistake == "weights_float16":
            return array.astype(np.float16)
        if self.mistake == "weights_bfloat16":
            bits = array.astype(np.float32).view(np.uint32).astype(np.uint64)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
            return bits.astype(np.uint32).view(np.float32)
        return array

    def dump(self, ids, chunks=None):
        """Every activation by its public name."""
        self.tape, self.random = Tape(len(ids)), np.random.default_rng(0)
        self.cache = {}
        for past, piece in weights.passes(ids, chunks):
            self.forward(np.array(piece), past)
        return self.tape.arrays()

    def keep(self, name, array):
        self.tape.keep(name, array)
        return array

    # -- the model ---------------------------------------------------------------------------

    def forward(self, ids, past):
        x = self.dropout(self.keep("embed", self.embed(ids, past)))
        layers = list(range(self.config.n_layer))
        if self.mistake == "last_layer_skipped":
            layers = list(range(self.config.n_layer - 1))
        if self.mistake == "layers_reordered":
            layers = sorted(layers, key=str)
        for i, layer in enumerate(layers):
            x = self.block(x, i, layer, past)
        if self.mistake != "no_ln_f":
            x = self.keep("ln_f", self.layer_norm(x, "ln_f"))
        self.keep("logits", self.unembed(x))

    def embed(self, ids, past):
        wte, wpe = self.tensors["wte.weight"], self.tensors["wpe.weight"]
        places = np.arange(past, past + len(ids))
        if self.mistake == "positions_from_1":
            places = np.arange(past + 1, past + 1 + len(ids))
        if self.mistake == "positions_restart":
            places = np.arange(len(ids))
        if self.mistake == "token_ids_shifted":
            ids = (ids + 1) % len(wte)
        if self.mistake == "positions_missing":
            return wte[ids]
        if self.mistake == "embedding_scaled":
            return wte[ids] * math.sqrt(self.config.n_embd) + wpe[places]
        return wte[ids] + wpe[places]

    def block(self, x, i, layer, past):
        name, mistake = f"h.{i}", self.mistake
        first, second = f"h.{layer}.ln_1", f"h.{layer}.ln_2"
        if mistake == "ln_1_ln_2_swapped":
            first, second = second, first

        self.keep(f"{name}.resid_pre", x)
        if mistake == "post_ln":
            x = self.keep(f"{name}.resid_mid", x + self.attention(x, i, layer, past))
            x = self.keep(f"{name}.ln_1", self.layer_norm(x, first))
            x = self.keep(f"{name}.resid_post", x + self.mlp(x, i, layer))
            return self.keep(f"{name}.ln_2", self.layer_norm(x, second))

        normed = self.keep(f"{name}.ln_1", self.layer_norm(x, first))
        stream = normed if mistake == "residual_from_normed" else x
        middle = stream + self.attention(normed, i, layer, past)
        self.keep(f"{name}.resid_mid", middle)

        read = x if mistake == "parallel_block" else middle
        normed = self.keep(f"{name}.ln_2", self.layer_norm(read, second))
        stream = normed if mistake == "residual_from_normed" else middle
        added = self.mlp(normed, i, layer)
        if mistake == "mlp_not_added":
            return self.keep(f"{name}.resid_post", stream)
        return self.keep(f"{name}.resid_post", stream + added)

    def unembed(self, x):
        head = self.tensors["wte.weight"]
        if not self.config.tie_word_embeddings and self.mistake != "stale_head":
            head = self.tensors["lm_head.weight"]
        if self.mistake == "vocabulary_padded_wrong":
            rows = weights.padding_rows(len(head))
            head = np.pad(head, ((rows, 0), (0, 0)))[: len(head)]
        logits = self.matmul(x, head.T)
        if self.mistake == "logits_scaled":
            logits = logits / math.sqrt(self.config.n_embd)
        return logits

    # -- attention -----------------------------------------------------------------------------

    def attention(self, x, i, layer, past):
        name = f"h.{i}.attn"
        qkv = self.keep(f"{name}.qkv", self.linear(x, f"h.{layer}.attn.c_attn"))
        q, k, v = self.split(qkv)
        if i in self.cache:
            k = np.concatenate([self.cache[i][0], k])
            v = np.concatenate([self.cache[i][1], v])
        self.cache[i] = k, v

        scores, patterns, heads = [], [], []
        visible = self.visible(len(x), len(k), past)
        for h in range(self.heads):
            columns = self.columns_of(h)
            score = self.matmul(q[:, columns], k[:, columns].T) * self.scale(i)
            if self.mistake == "mask_after_softmax":
                pattern = self.softmax(score) * visible
            else:
                hidden = -1e4 if self.mistake == "mask_minus_1e4" else -np.inf
                score = np.where(visible, score, x.dtype.type(hidden))
                pattern = self.softmax(score)
            mixed = self.matmul(self.dropout(pattern), v[:, columns])
            place = 0 if self.mistake == "heads_reversed" else len(heads)
            for made, one in ((scores, score), (patterns, pattern), (heads, mixed)):
                made.insert(place, one)
        self.keep(f"{name}.scores", np.stack(scores))
        self.keep(f"{name}.pattern", np.stack(patterns))
        self.keep(f"{name}.heads", np.stack(heads))

        rows = np.hstack(heads)
        if self.mistake == "heads_not_merged":
            rows = np.stack(heads).reshape(x.shape)
        out = self.dropout(self.linear(rows, f"h.{layer}.attn.c_proj"))
        return self.keep(f"{name}.out", out)

    def split(self, qkv):
        q, k, v = np.split(qkv, 3, axis=1)
        if self.mistake == "qkv_interleaved":
            by_head = qkv.reshape(len(qkv), self.heads, 3, -1)
            q, k, v = (by_head[:, :, part].reshape(q.shape) for part in range(3))
        if self.mistake == "kv_swapped":
            q, v, k = np.split(qkv, 3, axis=1)
        if self.mistake == "qk_swapped":
            k, q, v = np.split(qkv, 3, axis=1)
        return q, k, v

    def columns_of(self, h):
        width = self.config.n_embd // self.heads
        if self.mistake == "head_features_first":
            return slice(h, None, self.heads)
        return slice(h * width, (h + 1) * width)

    def scale(self, i):
        """The factor on the scores of layer i."""
        config = self.config
        root = math.sqrt(config.n_embd // self.heads) if config.scale_attn_weights else 1.0
        if self.mistake == "no_scale":
            root = 1.0
        if self.mistake == "scale_by_width":
            root = math.sqrt(config.n_embd)
        if self.mistake == "scale_twice":
            root = root * root
        by_layer = config.scale_attn_by_inverse_layer_idx
        if self.mistake == "inverse_layer_scale_ignored":
            by_layer = False
        if self.mistake == "inverse_layer_scale_added":
            by_layer = True
        return 1 / (root * (i + 1)) if by_layer else 1 / root

    def visible(self, rows, columns, past):
        """Which keys each query of this pass may look at, (t, S)."""
        query, key = np.arange(past, past + rows)[:, None], np.arange(columns)
        if self.mistake == "mask_missing":
            return np.full((rows, columns), True)
        if self.mistake == "mask_hides_itself":  # but the first token has no other
            return (key < query) | (key + query == 0)
        if self.mistake == "mask_shows_next":
            return key <= query + 1
        if self.mistake == "mask_inverted":  # the other triangle
            return key >= query
        if self.mistake == "mask_top_left":
            return np.tri(rows, columns, dtype=bool)
        return key <= query

    def softmax(self, x):
        axis = 0 if self.mistake == "softmax_over_queries" else 1
        powers = np.exp(x - x.max(axis, keepdims=True))
        return powers / powers.sum(axis, keepdims=True)

    # -- parts ---------------------------------------------------------------------------------

    def mlp(self, x, i, layer):
        name = f"h.{i}.mlp"
        x = self.keep(f"{name}.pre", self.linear(x, f"h.{layer}.mlp.c_fc"))
        x = self.keep(f"{name}.post", self.activation(x).astype(x.dtype))
        return self.keep(f"{name}.out", self.dropout(self.linear(x, f"h.{layer}.mlp.c_proj")))

    def activation(self, x):
        if self.mistake == "quick_gelu":
            return x * 0.5 * (1 + np.tanh(0.851 * x))  # the same as x sigmoid(1.702 x)
        if self.mistake == "relu":
            return np.maximum(x, 0)
        if self.mistake == "gelu_half_table":
            return gelu_from_table(x)
        if self.mistake == "gelu_no_cubic":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x))
        if self.mistake == "erf_gelu" or self.config.activation_function == "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        if self.config.activation_function != "gelu_new":
            raise ValueError(f"no {self.config.activation_function} here")
        return gelu(x)

    def layer_norm(self, x, name):
        epsilon, width = self.config.layer_norm_epsilon, x.shape[-1]
        if self.mistake in ("eps_1e-6", "eps_1e-12"):
            epsilon = float(self.mistake.removeprefix("eps_"))
        if self.mistake != "rms_norm":
            x = x - x.mean(-1, keepdims=True)
        count = width - 1 if self.mistake == "ddof_1" else width
        variance = (x * x).sum(-1, keepdims=True) / count
        deviation = np.sqrt(variance + epsilon)
        if self.mistake == "eps_outside_root":
            deviation = np.sqrt(variance) + epsilon
        y = x / deviation * self.tensors[f"{name}.weight"]
        if self.mistake == "ln_no_shift":
            return y
        return y + self.tensors.get(f"{name}.bias", 0)

    def linear(self, x, name):
        matrix = self.tensors[f"{name}.weight"]
        if self.mistake == "c_proj_transposed" and name.endswith("attn.c_proj"):
            matrix = matrix.T
        product = self.matmul(x, matrix)
        if self.mistake == "attention_biases_missing" and ".attn." in name:
            return product
        if self.mistake == "mlp_biases_missing" and ".mlp." in name:
            return product
        return product + self.tensors.get(f"{name}.bias", 0)

    def matmul(self, a, b):
        if self.mistake == "float16_accumulation":  # of every product, one term at a time
            total = np.zeros((a.shape[0], b.shape[1]), np.float16)
            for column, row in zip(a.T, b, strict=True):
                total += np.outer(column, row).astype(np.float16)
            return total.astype(a.dtype)
        return a @ b

    def dropout(self, x):
        if self.mistake == "dropout_on":
            return x * (self.random.random(x.shape) >= 0.1) / x.dtype.type(0.9)
        return x


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


@functools.cache
def table():
    """GELU of each of the 65,536 half-precision numbers, in half precision."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):  # infinities and NaN are among them
        return gelu(every).astype(np.float16)


def gelu_from_table(x):
    """GELU as ggml looks it up; beyond 10 it is 0 or x."""
    looked_up = table()[np.clip(x, -16, 16).astype(np.float16).view(np.uint16)]
    return np.where(x <= -10, 0, np.where(x >= 10, x, looked_up))
