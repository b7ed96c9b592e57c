"""CTranslate2 in float32 and in 8-bit integers.

The model is written through the package's own description of a decoder, from the weights; its
converter for transformers would want a tokenizer. Tokens have names in CTranslate2: here a name
is the id in digits.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import ArgumentError
from ...ops import gelu_new
from ..contestant import COLD_IDS, Array, Contestant, cold_command
from .making import arrays_of, config_of, made, package


class CTranslate2(Contestant):
    """Float32: what the other is derived from.

    Attributes
    ----------
    tokens : list of list of int
        What the last ``decode`` or ``batch`` made: a row for each token of every sequence.
    """

    name = "CTranslate2 f32"
    requires = ("ctranslate2",)
    computing = "float32"
    tokens: list[list[int]]

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        library = package("ctranslate2")
        self.config = config_of(directory)
        path = made(directory, f"ctranslate2-{self.computing}", self._convert)
        self._model = library.Generator(
            str(path), intra_threads=threads, compute_type=self.computing
        )

    def _convert(self, folder: pathlib.Path) -> None:
        spec = described(self.config, arrays_of(self.directory))
        spec.validate()
        spec.optimize(quantization=self.computing)
        folder.mkdir()
        spec.save(str(folder))

    def version(self) -> str:
        """The package's."""
        return "ctranslate2 " + importlib.metadata.version("ctranslate2")

    def _generate(self, prompts: Sequence[Sequence[int]], steps: int, callback: Any = None) -> None:
        """So many greedy tokens after each prompt, which is read at once."""
        results = self._model.generate_batch(
            [list(map(str, ids)) for ids in prompts],
            min_length=steps,
            max_length=steps,
            include_prompt_in_result=False,
            callback=callback,
        )
        self.tokens = np.transpose([result.sequences_ids[0] for result in results]).tolist()

    def logits(self, ids: Sequence[int]) -> Array:
        """All rows."""
        result: Array = np.array(self._model.forward_batch([list(ids)]))[0]
        return result

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """The time from one token to the next, as a callback sees them."""
        made_at: list[float] = []

        def note(_: Any) -> bool:
            made_at.append(time.perf_counter())
            return False

        self._generate([ids], steps + 1, note)
        return np.diff(made_at).tolist()

    def prefill(self, ids: Sequence[int]) -> float:
        """``generate_batch`` of one token: it reads all but the last one, and then that."""
        began = time.perf_counter()
        self._generate([ids], 1)
        return time.perf_counter() - began

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """From the first token of all prompts to their last."""
        if len(set(map(len, prompts))) > 1:
            raise ArgumentError("CTranslate2 reads the end of longer prompts while it generates")
        first = 0.0

        def note(result: Any) -> bool:
            nonlocal first
            if result.step == 0:  # every sequence's first token comes from reading
                first = time.perf_counter()
            return False

        self._generate(prompts, steps + 1, note)
        return time.perf_counter() - first

    def score(self, ids: Sequence[int]) -> float:
        """``score_batch``."""
        tokens = list(map(str, ids))
        began = time.perf_counter()
        self._model.score_batch([tokens])
        return time.perf_counter() - began

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """``generate_batch`` of one token."""
        path = str(directory / "peers" / f"ctranslate2-{cls.computing}")
        ids = " ".join(map(str, COLD_IDS))
        return cold_command(COLD, path, cls.computing, str(threads), ids)


class CTranslate2Int8(CTranslate2):
    """Matrices in 8-bit integers, one scale a row.

    Seen on an AMD processor without VNNI: through oneDNN, which CTranslate2 chooses there, the
    logits of a random 124M model were 0.12 of their scale away, those of a small one 0.15; through
    MKL (CT2_USE_MKL=1) the latter 0.014, but decoding took fourteen times as long. Such results
    are refused and not timed.
    """

    name = "CTranslate2 int8"
    bound = 5e-2
    bound_reason = "weights and activations of 8 bits"
    computing = "int8"


CONTESTANTS = (CTranslate2, CTranslate2Int8)


def described(config: Any, arrays: dict[str, Array]) -> Any:
    """The model in CTranslate2's words."""
    specs = package("ctranslate2.specs")
    common = package("ctranslate2.specs.common_spec")
    if config.activation is not gelu_new:
        raise ArgumentError("only models with activation_function gelu_new are compared")
    spec = specs.TransformerDecoderModelSpec.from_config(
        config.n_layer, config.n_head, pre_norm=True, activation=common.Activation.GELUTanh
    )

    def norm(part: Any, name: str) -> None:
        part.gamma, part.beta = arrays[f"{name}.weight"], arrays[f"{name}.bias"]

    def linear(part: Any, name: str) -> None:
        part.weight = arrays[f"{name}.weight"].T.copy()
        part.bias = arrays[f"{name}.bias"]

    decoder = spec.decoder
    decoder.scale_embeddings = False
    # Copies, because quantising overwrites them, and so would scale one array twice.
    decoder.embeddings.weight = arrays["wte.weight"].copy()
    decoder.position_encodings.encodings = arrays["wpe.weight"].copy()
    norm(decoder.layer_norm, "ln_f")
    decoder.projection.weight = arrays.get("lm_head.weight", arrays["wte.weight"]).copy()
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    tokens = [str(i) for i in range(config.vocab_size)]
    spec.register_vocabulary(tokens)
    last = tokens[-1]
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = last
    return spec


COLD = """
import sys

import ctranslate2

path, computing, threads, ids = sys.argv[1:]
model = ctranslate2.Generator(path, intra_threads=int(threads), compute_type=computing)
model.generate_batch(
    [ids.split()], min_length=1, max_length=1, include_prompt_in_result=False
)
"""
