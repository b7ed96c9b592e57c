"""transformers' GPT2LMHeadModel, its activations caught by forward hooks.

Mistakes are made where a user can make them: in the config, in the weights, by other modules in
place of transformers' own, by another attention function, in what is passed to a call.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from . import mistakes, weights
from .tape import Tape
from .torch_parts import (
    WrongLayerNorm,
    gelu_from_table,
    gelu_no_cubic,
    half_sum,
    rounded,
    to_numpy,
)

# Made in the attention function, for which torch's own leaves no room.
INSIDE_ATTENTION = ("heads_not_merged", "mask_after_softmax", "softmax_over_queries")
MASKS = (
    "mask_missing",
    "mask_hides_itself",
    "mask_shows_next",
    "mask_inverted",
    "mask_minus_1e4",
    "mask_top_left",
)


def build(source, dtype="float32", mistake=None, attention="eager") -> Program:
    """A program in torch's `dtype`; `attention` is "eager" or "sdpa"."""
    mistakes.check(mistakes.HF, mistake)
    if attention != "eager" and mistake in INSIDE_ATTENTION:
        raise ValueError(f"{attention} attention cannot make the mistake {mistake!r}")
    config, tensors = weights.load(source, dtype)
    fields = config_fields(config, mistake)
    fields["attn_implementation"] = f"tests_{mistake}" if mistake in INSIDE_ATTENTION else attention
    with torch.device("meta"):  # no time spent on random weights
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    state = state_dict(config, tensors, mistake)
    model.load_state_dict(state, assign=True, strict=True)
    change_modules(model, mistake)
    return Program(model.to(getattr(torch, dtype)).train(mistake == "dropout_on"), mistake)


def config_fields(config, mistake):
    """What GPT2Config is given."""
    fields = {**vars(config), "n_positions": config.n_ctx}
    del fields["bias"], fields["n_ctx"]
    fields["tie_word_embeddings"] = False  # the state below always has both
    fields["bos_token_id"] = fields["eos_token_id"] = None
    activations = {"erf_gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu"}
    if mistake in activations:
        fields["activation_function"] = activations[mistake]
    if mistake in ("eps_1e-6", "eps_1e-12"):
        fields["layer_norm_epsilon"] = float(mistake.removeprefix("eps_"))
    if mistake == "no_scale":
        fields["scale_attn_weights"] = False
    if mistake == "inverse_layer_scale_ignored":
        fields["scale_attn_by_inverse_layer_idx"] = False
    if mistake == "inverse_layer_scale_added":
        fields["scale_attn_by_inverse_layer_idx"] = True
    if mistake == "wrong_head_count":
        fields["n_head"] = weights.another_head_count(config)
    if mistake == "last_layer_skipped":
        fields["n_layer"] = config.n_layer - 1
    return fields


# -- weights -----------------------------------------------------------------------------------


def state_dict(config, tensors, mistake):
    """The state of the model; biases that the checkpoint lacks are 0."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["wte.weight"])
    change_weights(config, tensors, mistake)
    if mistake == "last_layer_skipped":
        last = f"h.{config.n_layer - 1}."
        tensors = {name: each for name, each in tensors.items() if not name.startswith(last)}
    state = {}
    for name, tensor in tensors.items():
        own = name if name.startswith("lm_head") else f"transformer.{name}"
        state[own] = rounded(tensor.contiguous(), mistake)
    for name, tensor in list(state.items()):
        if name.endswith("weight") and (".h." in name or ".ln_f." in name):
            zeros = torch.zeros(tensor.shape[-1], dtype=tensor.dtype)
            state.setdefault(name.removesuffix("weight") + "bias", zeros)
    return state


def change_weights(config, tensors, mistake):
    """The mistakes that are made in a file, or on the way out of it."""
    wte, wpe, head = (tensors[f"{name}.weight"] for name in ("wte", "wpe", "lm_head"))
    if mistake == "embedding_scaled":
        tensors["wte.weight"] = wte * config.n_embd**0.5
    if mistake == "token_ids_shifted":
        tensors["wte.weight"] = wte.roll(-1, 0)
    if mistake == "positions_missing":
        tensors["wpe.weight"] = torch.zeros_like(wpe)
    if mistake == "positions_from_1":
        tensors["wpe.weight"] = wpe.roll(-1, 0)
    if mistake == "stale_head":
        tensors["lm_head.weight"] = wte
    if mistake == "logits_scaled":
        tensors["lm_head.weight"] = head / config.n_embd**0.5
    if mistake == "vocabulary_padded_wrong":
        padding = torch.zeros(weights.padding_rows(len(head)), config.n_embd, dtype=head.dtype)
        tensors["lm_head.weight"] = torch.cat([padding, head])[: len(head)]
    if mistake == "layers_reordered":
        read = dict(tensors)
        for i, layer in enumerate(sorted(range(config.n_layer), key=str)):
            of_layer = [name for name in read if name.startswith(f"h.{layer}.")]
            for name in of_layer:
                tensors[name.replace(f"h.{layer}.", f"h.{i}.", 1)] = read[name]
    for i in range(config.n_layer):
        block = {
            name: tensors[f"h.{i}.{name}"]
            for part in weights.BLOCK
            for name in (f"{part}.weight", f"{part}.bias")
            if f"h.{i}.{name}" in tensors
        }
        change_block(config, block, mistake)
        tensors |= {f"h.{i}.{name}": tensor for name, tensor in block.items()}
    if mistake == "ln_no_shift":
        for name in [name for name in tensors if "ln_" in name and name.endswith("bias")]:
            tensors[name] = torch.zeros_like(tensors[name])


def change_block(config, block, mistake):
    """The weights of one block."""
    H, C = config.n_head, config.n_embd
    columns = torch.arange(3 * C).view(3, H, C // H)  # of c_attn
    if mistake == "qkv_interleaved":  # a file of Megatron's, where each head has its q, k and v
        take_columns(block, columns.transpose(0, 1))
    if mistake == "kv_swapped":
        take_columns(block, columns[[0, 2, 1]])
    if mistake == "qk_swapped":
        take_columns(block, columns[[1, 0, 2]])
    if mistake == "head_features_first":
        take_columns(block, columns.view(3, C // H, H).transpose(1, 2))
    c_proj = block["attn.c_proj.weight"]
    if mistake == "heads_reversed":
        block["attn.c_proj.weight"] = c_proj.view(H, C // H, C).flip(0).reshape(C, C)
    if mistake == "c_proj_transposed":
        block["attn.c_proj.weight"] = c_proj.t()
    if mistake == "ln_1_ln_2_swapped":
        for kind in ("weight", "bias"):
            if f"ln_1.{kind}" in block:
                one, two = block[f"ln_1.{kind}"], block[f"ln_2.{kind}"]
                block[f"ln_1.{kind}"], block[f"ln_2.{kind}"] = two, one
    for part in ("attn", "mlp"):
        if mistake == {"attn": "attention", "mlp": "mlp"}[part] + "_biases_missing":
            for name in block:
                if name.startswith(part) and name.endswith("bias"):
                    block[name] = torch.zeros_like(block[name])


def take_columns(block, columns):
    """c_attn with its columns in another order."""
    for name in ("attn.c_attn.weight", "attn.c_attn.bias"):
        if name in block:
            block[name] = block[name][..., columns.flatten()]


# -- modules -----------------------------------------------------------------------------------


class Activation(nn.Module):
    """A function in place of transformers' activation module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class HalfSumConv1D(nn.Module):
    """Conv1D, or the head, with sums in half precision."""

    def __init__(self, matrix, bias):
        super().__init__()
        self.weight, self.bias = matrix, bias

    def forward(self, x):
        y = half_sum(x, self.weight)
        return y if self.bias is None else y + self.bias


class WrongBlock(GPT2Block):
    """GPT2Block with its parts put together in another way."""

    mistake: str | None = None

    def forward(self, x, *args, **kwargs):
        def attend(x):
            return self.attn(x, *args[:1], attention_mask=args[1], **kwargs)[0]

        kwargs.pop("encoder_attention_mask", None)
        if self.mistake == "post_ln":
            x = self.ln_1(x + attend(x))
            return self.ln_2(x + self.mlp(x))
        if self.mistake == "residual_from_normed":
            x = self.ln_1(x)
            x = self.ln_2(x + attend(x))
            return x + self.mlp(x)
        if self.mistake == "parallel_block":
            return x + attend(self.ln_1(x)) + self.mlp(self.ln_2(x))
        assert self.mistake == "mlp_not_added"
        x = x + attend(self.ln_1(x))
        self.mlp(self.ln_2(x))
        return x


def change_modules(model, mistake):
    """The mistakes of someone who writes modules of their own."""
    body = model.transformer
    if mistake == "no_ln_f":
        body.ln_f = nn.Identity()
    if mistake == "float16_accumulation":
        model.lm_head = HalfSumConv1D(nn.Parameter(model.lm_head.weight.t()), None)
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        if mistake in ("eps_outside_root", "ddof_1", "rms_norm"):
            norm.__class__, norm.mistake = WrongLayerNorm, mistake
    for block in body.h:
        if mistake == "gelu_half_table":
            block.mlp.act = Activation(gelu_from_table)
        if mistake == "gelu_no_cubic":
            block.mlp.act = Activation(gelu_no_cubic)
        if mistake == "scale_by_width":
            block.attn.scaling *= (body.embed_dim / block.attn.head_dim) ** -0.5
        if mistake == "scale_twice":
            block.attn.scaling *= block.attn.head_dim**-0.5
        if mistake == "float16_accumulation":
            for part in (block.attn, block.mlp):
                for name in ("c_attn", "c_fc", "c_proj"):
                    if old := getattr(part, name, None):
                        setattr(part, name, HalfSumConv1D(old.weight, old.bias))
        if mistake in ("post_ln", "residual_from_normed", "parallel_block", "mlp_not_added"):
            block.__class__, block.mistake = WrongBlock, mistake


# -- attention ---------------------------------------------------------------------------------


def wrong_attention(mistake):
    """An attention function of the kind that transformers lets its users register."""

    def attention(module, query, key, value, mask, scaling, **_):
        scores = query @ key.transpose(2, 3) * scaling
        if mistake == "mask_after_softmax":
            pattern = scores.softmax(-1)
            pattern = pattern if mask is None else pattern * (mask == 0)
        else:
            scores = scores if mask is None else scores + mask
            pattern = scores.softmax(-2 if mistake == "softmax_over_queries" else -1)
        heads = pattern @ value
        if mistake == "heads_not_merged":  # (B, H, T, D) should become (B, T, H, D)
            return heads.reshape(heads.shape[0], -1, heads.shape[1], heads.shape[3]), pattern
        return heads.transpose(1, 2), pattern

    return attention


for each in INSIDE_ATTENTION:
    AttentionInterface.register(f"tests_{each}", wrong_attention(each))
    AttentionMaskInterface.register(f"tests_{each}", eager_mask)


def wrong_mask(mistake, rows, past, dtype):
    """The mask (1, 1, t, S) of one pass, to be added to the scores."""
    columns = past + rows
    visible = torch.ones(rows, columns, dtype=torch.bool)
    if mistake == "mask_top_left":
        visible = visible.tril()
    if mistake == "mask_hides_itself":
        visible = visible.tril(past - 1)
    if mistake == "mask_shows_next":
        visible = visible.tril(past + 1)
    if mistake == "mask_inverted":
        visible = ~visible.tril(past)
    if mistake == "mask_minus_1e4":
        visible = visible.tril(past)
    hidden = -1e4 if mistake == "mask_minus_1e4" else torch.finfo(dtype).min
    return torch.zeros(1, 1, rows, columns, dtype=dtype).masked_fill(~visible, hidden)


# -- hooks -------------------------------------------------------------------------------------


class Program:
    """A model and the hooks that record it."""

    def __init__(self, model, mistake):
        self.model, self.mistake = model, mistake

    @torch.no_grad()
    def dump(self, ids, chunks=None):
        """What hooks can see, by its public name."""
        self.tape = Tape(len(ids))
        handles = self.hook()
        cache = transformers.DynamicCache(config=self.model.config) if chunks else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for past, piece in weights.passes(ids, chunks):
                self.model(**self.call(piece, past), past_key_values=cache, use_cache=bool(chunks))
        for handle in handles:
            handle.remove()
        return self.tape.arrays()

    def call(self, piece, past):
        """The arguments of one pass."""
        given = {"input_ids": torch.tensor([piece])}
        if self.mistake == "positions_restart":
            given["position_ids"] = torch.arange(len(piece))[None]
        if self.mistake in MASKS:
            given["attention_mask"] = wrong_mask(self.mistake, len(piece), past, self.model.dtype)
        return given

    def hook(self):
        """A hook on each module whose input or output has a public name."""
        body, handles = self.model.transformer, []

        def output(module, name):
            def record(_, __, out):
                self.keep(name, out)

            handles.append(module.register_forward_hook(record))

        def input_(module, name, heads=None):
            def record(_, given):
                self.keep(name, given[0], heads)

            handles.append(module.register_forward_pre_hook(record))

        input_(body.drop, "embed")
        for i, block in enumerate(body.h):
            h = f"h.{i}"
            input_(block, f"{h}.resid_pre")
            output(block.ln_1, f"{h}.ln_1")
            output(block.attn.c_attn, f"{h}.attn.qkv")
            input_(block.attn.c_proj, f"{h}.attn.heads", block.attn.num_heads)
            handles.append(block.attn.register_forward_hook(self.attention_hook(h)))
            input_(block.ln_2, f"{h}.resid_mid")
            output(block.ln_2, f"{h}.ln_2")
            output(block.mlp.c_fc, f"{h}.mlp.pre")
            input_(block.mlp.c_proj, f"{h}.mlp.post")
            output(block.mlp, f"{h}.mlp.out")
            output(block, f"{h}.resid_post")
        if self.mistake != "no_ln_f":
            output(body.ln_f, "ln_f")
        output(self.model.lm_head, "logits")
        return handles

    def attention_hook(self, h):
        """Records what attention returns: its output, and with "eager" the pattern."""

        def record(_, __, out):
            self.keep(f"{h}.attn.out", out[0])
            if out[1] is not None:
                self.keep(f"{h}.attn.pattern", out[1])

        return record

    def keep(self, name, tensor, heads=None):
        rows = tensor[0]
        if heads is not None:
            rows = rows.view(len(rows), heads, -1).transpose(0, 1)
        self.tape.keep(name, to_numpy(rows))
