"""llama.cpp through its bindings, llama-cpp-python: float32, bfloat16 and 8-bit blocks.

The file of float32 is written by :mod:`numpygpt.convert`; llama.cpp makes the narrow ones from it.
Cached keys and values are float32 too. GELU is a table of half-precision numbers whatever the
weights are, so its float32 is less exact than others'.

Only the thin layer over the C functions is used, and only that is imported: the package's own
``__init__`` would bring in a template engine, a disk cache and more, a quarter of a second.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..contestant import COLD_IDS, Array, Contestant, cold_command
from .making import config_of, log_probabilities, made


class LlamaCpp(Contestant):
    """Float32: what the others are derived from.

    Attributes
    ----------
    tokens : list of list of int
        What the last ``decode`` or ``batch`` made: a row for each token of every sequence.
    """

    name = "llama.cpp f32"
    requires = ("llama_cpp",)
    bound = 1e-3
    bound_reason = "GELU from a table of half-precision numbers"
    file = "f32.gguf"
    tokens: list[list[int]]
    quantised: int | None = None  # the LLAMA_FTYPE that llama.cpp makes out of float32

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        self._c = bindings()
        self._log = self._c.llama_log_callback(lambda level, text, data: None)
        self._c.llama_log_set(self._log, None)
        self._c.llama_backend_init()
        self.config = config_of(directory)
        path = made(directory, "f32.gguf", self._convert)
        if self.quantised is not None:
            path = made(directory, self.file, self._quantise)
        params = self._c.llama_model_default_params()
        params.load_mode = 0  # read into memory; mapping the file was no faster
        self._model = self._c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._context: Any = None
        self._made_for: tuple[int, int, int, bool] | None = None

    def _convert(self, path: pathlib.Path) -> None:
        from ...convert import convert

        convert(self.directory, path, format="gguf", dtype="float32")

    def _quantise(self, path: pathlib.Path) -> None:
        params = self._c.llama_model_quantize_default_params()
        params.ftype, params.nthread = self.quantised, self.threads
        source = self.directory / "peers" / "f32.gguf"
        if self._c.llama_model_quantize(str(source).encode(), str(path).encode(), params):
            raise RuntimeError(f"llama.cpp cannot quantise {source}")

    def version(self) -> str:
        """The bindings': llama.cpp has no other number there."""
        return "llama-cpp-python " + importlib.metadata.version("llama-cpp-python")

    def _open(self, sequences: int, length: int, rows: int, flash: bool) -> Any:
        """An empty context for so many sequences of a length, with logits for so many rows."""
        if self._made_for != (sequences, length, rows, flash):
            if self._context is not None:
                self._c.llama_free(self._context)
            c = self._c
            params = c.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * length, sequences
            params.n_batch = max(length, sequences)
            params.n_ubatch = min(512, params.n_batch)
            params.n_outputs_max = max(rows, sequences)
            params.n_threads = params.n_threads_batch = self.threads
            params.flash_attn_type = int(flash)
            params.type_k = params.type_v = 0  # float32
            # One cache for all, or one for each: 6 % faster with 8 sequences, 26 % slower with 32.
            params.kv_unified = sequences <= 8
            params.no_perf = True
            self._context = c.llama_init_from_model(self._model, params)
            if not self._context:
                raise RuntimeError("llama.cpp cannot make a context")
            self._made_for = sequences, length, rows, flash
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        return self._context

    def _read(self, context: Any, batch: Batch) -> None:
        if self._c.llama_decode(context, batch.struct):
            raise RuntimeError("llama_decode failed")

    def _rows(self, context: Any, count: int) -> Array:
        """The logits that the last call made, (count, V): a view of llama.cpp's memory."""
        first = self._c.llama_get_logits(context)
        size = count * self.config.vocab_size
        numbers = (ctypes.c_float * size).from_address(ctypes.addressof(first.contents))
        return np.ctypeslib.as_array(numbers).reshape(count, -1)

    def logits(self, ids: Sequence[int]) -> Array:
        """All rows."""
        context = self._open(1, self.config.n_ctx, self.config.n_ctx, True)
        self._read(context, Batch(self._c, [ids], every=True))
        return self._rows(context, len(ids)).copy()

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """Without flash attention, which takes a third longer here, and twice as long after 512."""
        context = self._open(1, self.config.n_ctx, 1, False)
        self._read(context, Batch(self._c, [ids]))
        batch = Batch(self._c, [[0]])
        batch.position[0] = len(ids)
        batch.token[0] = self._rows(context, 1)[0].argmax()
        self.tokens, seconds = [batch.token.tolist()], []
        for _ in range(steps):
            began = time.perf_counter()
            self._step(context, batch)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _step(self, context: Any, batch: Batch) -> None:
        """Read one token of each sequence, and put the most likely ones after them there."""
        self._read(context, batch)
        batch.token[:] = self._rows(context, len(batch.token)).argmax(axis=1)
        batch.position += 1
        self.tokens.append(batch.token.tolist())

    def prefill(self, ids: Sequence[int]) -> float:
        """With flash attention, which saves a fifth; pieces of 512 rows are as fast as any."""
        context, batch = self._open(1, self.config.n_ctx, 1, True), Batch(self._c, [ids])
        began = time.perf_counter()
        self._read(context, batch)
        self._rows(context, 1)
        return time.perf_counter() - began

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """A stream of the cache for each sequence, all tokens in one call."""
        count = len(prompts)
        # A multiple of 256, as llama.cpp pads it, for each sequence.
        length = -(-(max(map(len, prompts)) + steps) // 256) * 256
        context = self._open(count, length, count, False)
        batch = Batch(self._c, [[0]] * count)
        for i, ids in enumerate(prompts):
            self._read(context, Batch(self._c, [ids], first=i))
            batch.token[i] = self._rows(context, 1)[0].argmax()
            batch.position[i] = len(ids)
        self.tokens = [batch.token.tolist()]
        began = time.perf_counter()
        for _ in range(steps):
            self._step(context, batch)
        return time.perf_counter() - began

    def score(self, ids: Sequence[int]) -> float:
        """All logits, then what llama.cpp's own perplexity tool does with them."""
        context = self._open(1, self.config.n_ctx, self.config.n_ctx, True)
        batch = Batch(self._c, [ids], every=True)
        began = time.perf_counter()
        self._read(context, batch)
        log_probabilities(self._rows(context, len(ids)), ids)
        return time.perf_counter() - began

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """Mapped weights, a short cache, and the bindings alone."""
        package = importlib.util.find_spec("llama_cpp")
        assert package is not None
        assert package.submodule_search_locations
        folder = package.submodule_search_locations[0]
        ids = ",".join(map(str, COLD_IDS))
        path = str(directory / "peers" / cls.file)
        return cold_command(COLD, folder, path, str(threads), ids)


class LlamaCppBfloat16(LlamaCpp):
    """Matrices in bfloat16."""

    name = "llama.cpp bf16"
    bound = 2e-2
    bound_reason = "weights and activations rounded to 8 bits of precision"
    file, quantised = "bf16.gguf", 32  # LLAMA_FTYPE_MOSTLY_BF16


class LlamaCppQ8(LlamaCpp):
    """Matrices in blocks of 32 numbers of 8 bits and a scale."""

    name = "llama.cpp q8_0"
    bound = 5e-2
    bound_reason = "weights and activations of 8 bits"
    file, quantised = "q8_0.gguf", 7  # LLAMA_FTYPE_MOSTLY_Q8_0


CONTESTANTS = (LlamaCpp, LlamaCppBfloat16, LlamaCppQ8)


def bindings() -> Any:
    """The module ``llama_cpp.llama_cpp`` without what the package itself would import."""
    if "llama_cpp" not in sys.modules:
        found = importlib.util.find_spec("llama_cpp")
        if found is not None and found.submodule_search_locations:
            package = types.ModuleType("llama_cpp")
            package.__path__ = list(found.submodule_search_locations)
            package.__spec__ = found
            sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


class Batch:
    """Tokens of several sequences for one call, as NumPy arrays over llama.cpp's memory."""

    def __init__(
        self, c: Any, sequences: Sequence[Sequence[int]], every: bool = False, first: int = 0
    ):
        lengths = [len(ids) for ids in sequences]
        count = sum(lengths)
        self.token = np.concatenate(sequences).astype(np.int32)
        self.position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        self._sequence = np.repeat(np.arange(first, first + len(lengths), dtype=np.int32), lengths)
        self._each_in_one = np.ones(count, np.int32)
        # llama.cpp wants a list of sequences for each token: here they are of one number each.
        self._lists = self._sequence.ctypes.data + 4 * np.arange(count, dtype=np.uintp)
        self._wanted = np.full(count, every, np.int8)
        self._wanted[np.cumsum(lengths) - 1] = 1
        arrays = {
            "token": self.token,
            "pos": self.position,
            "n_seq_id": self._each_in_one,
            "seq_id": self._lists,
            "logits": self._wanted,
        }
        kinds = dict(c.llama_batch._fields_)
        self.struct = c.llama_batch(n_tokens=count)
        for name, array in arrays.items():
            setattr(self.struct, name, array.ctypes.data_as(kinds[name]))


COLD = """
import sys
import types

folder, path, threads, ids = sys.argv[1:]
package = types.ModuleType("llama_cpp")
package.__path__ = [folder]
sys.modules["llama_cpp"] = package
import ctypes

import llama_cpp.llama_cpp as c

log = c.llama_log_callback(lambda level, text, data: None)
c.llama_log_set(log, None)
c.llama_backend_init()
model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
params = c.llama_context_default_params()
params.n_ctx = params.n_batch = 256
params.n_ubatch = 32
params.n_threads = params.n_threads_batch = int(threads)
params.type_k = params.type_v = 0
context = c.llama_init_from_model(model, params)
ids = [int(i) for i in ids.split(",")]
tokens = (c.llama_token * len(ids))(*ids)
assert c.llama_decode(context, c.llama_batch_get_one(tokens, len(ids))) == 0
logits = c.llama_get_logits_ith(context, -1)
size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
values = (ctypes.c_float * size).from_address(ctypes.addressof(logits.contents))[:]
values.index(max(values))
"""
