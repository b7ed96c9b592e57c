"""transformers on PyTorch in float32, with both of its forms of attention.

The forward pass is called in a loop of our own, which costs less than ``generate``.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from ...errors import ArgumentError
from ..contestant import COLD_IDS, Array, Contestant, cold_command
from .making import package


class Eager(Contestant):
    """Attention spelled out in PyTorch's operations.

    Attributes
    ----------
    tokens : list of list of int
        What the last ``decode`` or ``batch`` made: a row for each token of every sequence.
    """

    name = "transformers f32 eager"
    requires = ("torch", "transformers")
    attention = "eager"
    tokens: list[list[int]]

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        self._torch = package("torch")
        self._torch.set_num_threads(threads)
        self._cache = package("transformers").DynamicCache
        kind = package("transformers").GPT2LMHeadModel
        self._model = kind.from_pretrained(
            directory, dtype=self._torch.float32, attn_implementation=self.attention
        ).eval()

    def version(self) -> str:
        """Both packages'."""
        return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in self.requires)

    def _read(self, ids: Any, rows: int, cache: Any = None) -> Any:
        """The logits (B, rows, V) of the last rows, 0 for all; only a given cache is filled."""
        with self._torch.inference_mode():
            return self._model(
                ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=rows
            ).logits

    def logits(self, ids: Sequence[int]) -> Array:
        """All rows."""
        result: Array = self._read(self._torch.tensor([list(ids)]), 0)[0].numpy()
        return result

    def _steps(self, prompts: Sequence[Sequence[int]], steps: int) -> list[float]:
        if len(set(map(len, prompts))) > 1:
            raise ArgumentError("prompts of one length are compared; others would need padding")
        cache = self._cache()
        ids = self._torch.tensor([list(prompt) for prompt in prompts])
        following = self._read(ids, 1, cache).argmax(-1)
        self.tokens, seconds = [following[:, 0].tolist()], []
        for _ in range(steps):
            began = time.perf_counter()
            following = self._read(following, 1, cache).argmax(-1)
            self.tokens.append(following[:, 0].tolist())
            seconds.append(time.perf_counter() - began)
        return seconds

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """One row at a time with a ``DynamicCache``."""
        return self._steps([ids], steps)

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """All prompts in one tensor."""
        return sum(self._steps(prompts, steps))

    def prefill(self, ids: Sequence[int]) -> float:
        """Only the last row goes through the head."""
        tensor, cache = self._torch.tensor([list(ids)]), self._cache()
        began = time.perf_counter()
        self._read(tensor, 1, cache)
        return time.perf_counter() - began

    def score(self, ids: Sequence[int]) -> float:
        """All logits, and the cross entropy of each row."""
        tensor = self._torch.tensor([list(ids)])
        began = time.perf_counter()
        logits = self._read(tensor, 0)[0, :-1]
        loss = self._torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="none")
        loss.numpy()
        return time.perf_counter() - began

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """The model's own module is imported, and none of the automatic ones."""
        ids = ",".join(map(str, COLD_IDS))
        return cold_command(COLD, str(directory), cls.attention, str(threads), ids)


class Sdpa(Eager):
    """Attention as one fused function, ``scaled_dot_product_attention``."""

    name = "transformers f32 sdpa"
    attention = "sdpa"


CONTESTANTS = (Eager, Sdpa)

COLD = """
import sys

import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

path, attention, threads, ids = sys.argv[1:]
torch.set_num_threads(int(threads))
model = GPT2LMHeadModel.from_pretrained(
    path, dtype=torch.float32, attn_implementation=attention
)
with torch.inference_mode():
    ids = torch.tensor([[int(i) for i in ids.split(",")]])
    model(ids, use_cache=False, logits_to_keep=1).logits.argmax().item()
"""
