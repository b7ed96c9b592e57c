"""Parts that several torch programs use: mistaken modules, and the way back to NumPy."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def to_numpy(tensor):
    """An array; bfloat16 and float16, the first of which NumPy lacks, are widened to float32."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().numpy()


def rounded(tensor, mistake):
    """A weight as the file would hold it."""
    if mistake == "weights_float16":
        return tensor.half()
    if mistake == "weights_bfloat16":
        return tensor.bfloat16()
    return tensor


def half_sum(x, matrix, width=16):
    """x @ matrix, accumulated in half precision tile by tile, as tensor cores can be told to."""
    total = torch.zeros(*x.shape[:-1], matrix.shape[-1], dtype=torch.float16)
    for start in range(0, x.shape[-1], width):
        tile = slice(start, start + width)
        total += (x[..., tile] @ matrix[tile]).half()
    return total.to(x.dtype)


class HalfSumLinear(nn.Linear):
    """nn.Linear with :func:`half_sum`."""

    def forward(self, x):
        y = half_sum(x, self.weight.t())
        return y if self.bias is None else y + self.bias


def gelu_from_table(x):
    """GELU as ggml looks it up: of the half-precision input, in half precision."""
    value = F.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
    value = torch.where(x <= -10, torch.zeros_like(x), value)
    return torch.where(x >= 10, x, value)


def gelu_no_cubic(x):
    """GELU's tanh form without 0.044715 x³."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x))


class WrongLayerNorm(nn.LayerNorm):
    """nn.LayerNorm written out, with the mistake named in `mistake`."""

    mistake: str | None = None

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        if self.mistake == "rms_norm":
            centred = x
        count = x.size(-1) - 1 if self.mistake == "ddof_1" else x.size(-1)
        variance = centred.square().sum(-1, keepdim=True) / count
        if self.mistake == "eps_outside_root":
            normed = centred / (variance.sqrt() + self.eps)
        else:
            normed = centred / (variance + self.eps).sqrt()
        if self.mistake == "ln_no_shift":
            return normed * self.weight
        return normed * self.weight + self.bias
