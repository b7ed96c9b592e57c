"""A checkpoint writer for the oracles: transformers itself, with weights that matter.

It needs PyTorch and transformers, so only tests in ``tests/oracles`` import it.
"""

from __future__ import annotations

import torch
import transformers


def write(directory, seed=0, dtype=torch.float32, shard="5GB", **fields) -> None:
    """A checkpoint with GPT-2's proportions, written by transformers.

    Token and position vectors have GPT-2's standard deviation; matrices keep activations near
    unit size; gains, shifts and biases are far enough from 1 and 0 to matter.
    """
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "wte" in name or "wpe" in name or "lm_head" in name:
                values.normal_(0, 0.14)
            elif values.ndim == 2:
                values.normal_(0, values.shape[0] ** -0.5)
            else:
                values.normal_(float("ln_" in name and name.endswith("weight")), 0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
