"""ONNX Runtime in float32, with a graph of its fused operations.

The graph is written here from the weights, as the package's own optimiser leaves GPT-2, but for
attention: ``GroupQueryAttention`` adds to cached keys and values in place, where the optimiser's
``Attention`` copies all of them in every step. Inputs and outputs are bound to memory once, so
that a step copies nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..contestant import COLD_IDS, Array, Contestant, cold_command
from .making import arrays_of, config_of, log_probabilities, made, package


class OnnxRuntime(Contestant):
    """A session of ONNX Runtime.

    Attributes
    ----------
    tokens : list of list of int
        What the last ``decode`` or ``batch`` made: a row for each token of every sequence.
    """

    name = "ONNX Runtime f32"
    requires = ("onnx", "onnxruntime")
    tokens: list[list[int]]

    def __init__(self, directory: pathlib.Path, threads: int):
        super().__init__(directory, threads)
        runtime = package("onnxruntime")
        self.config = config_of(directory)
        self._path = made(directory, "onnx", self._convert) / "model.onnx"
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self._session = runtime.InferenceSession(
            str(self._path), options, providers=["CPUExecutionProvider"]
        )

    def _convert(self, folder: pathlib.Path) -> None:
        folder.mkdir()
        write_graph(folder / "model.onnx", self.config, arrays_of(self.directory))

    def version(self) -> str:
        """The package's."""
        return "onnxruntime " + importlib.metadata.version("onnxruntime")

    def logits(self, ids: Sequence[int]) -> Array:
        """All rows."""
        run = Run(self._session, self.config, 1, len(ids))
        return run.read([ids], range(len(ids)))

    def decode(self, ids: Sequence[int], steps: int) -> list[float]:
        """The cache stays where it is; a step changes a few bound numbers."""
        run = Run(self._session, self.config, 1, len(ids) + steps)
        following = run.read([ids], [len(ids) - 1]).argmax(axis=1)
        run.start_steps(1)
        self.tokens, seconds = [following.tolist()], []
        for _ in range(steps):
            began = time.perf_counter()
            following = run.step(following)
            seconds.append(time.perf_counter() - began)
            self.tokens.append(following.tolist())
        return seconds

    def prefill(self, ids: Sequence[int]) -> float:
        """Only the last row goes through the head."""
        run = Run(self._session, self.config, 1, len(ids))
        run.prepare([ids], [len(ids) - 1])
        began = time.perf_counter()
        run.go()
        return time.perf_counter() - began

    def batch(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """All sequences in one call; prompts may have several lengths."""
        longest = max(map(len, prompts))
        run = Run(self._session, self.config, len(prompts), longest + steps)
        last = [i * longest + len(ids) - 1 for i, ids in enumerate(prompts)]
        following = run.read(prompts, last).argmax(axis=1)
        run.start_steps(len(prompts))
        self.tokens = [following.tolist()]
        began = time.perf_counter()
        for _ in range(steps):
            following = run.step(following)
            self.tokens.append(following.tolist())
        return time.perf_counter() - began

    def score(self, ids: Sequence[int]) -> float:
        """All logits, and their logarithms outside the graph."""
        run = Run(self._session, self.config, 1, len(ids))
        run.prepare([ids], range(len(ids)))
        began = time.perf_counter()
        log_probabilities(run.go(), ids)
        return time.perf_counter() - began

    @classmethod
    def cold(cls, directory: pathlib.Path, threads: int) -> list[str]:
        """Without packing the weights, which costs more than it brings to one token."""
        config = config_of(directory)
        shape = [config.n_layer, config.n_head, config.head_dim]
        path = str(directory / "peers" / "onnx" / "model.onnx")
        return cold_command(COLD, path, json.dumps([threads, shape, COLD_IDS]))


CONTESTANTS = (OnnxRuntime,)


class Run:
    """Some sequences of tokens, their cached keys and values, and all of it bound to a session."""

    def __init__(self, session: Any, config: Any, count: int, length: int):
        self._session, self._vocab = session, config.vocab_size
        self._lengths = np.zeros(count, np.int32)
        shape = (count, config.n_head, length, config.head_dim)
        self._cache = {
            f"{part}.{i}": np.zeros(shape, np.float32)
            for i in range(config.n_layer)
            for part in ("key", "value")
        }
        self._binding = session.io_binding()
        self._arrays: dict[str, Array] = {}
        for name, array in self._cache.items():
            self._bind(f"past_{name}", array)
            self._bind(f"present_{name}", array, output=True)

    def _bind(self, name: str, array: Array, output: bool = False) -> None:
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._arrays[name] = array

    def prepare(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Bind what reading prompts takes; logits come for these of the rows (B * T)."""
        self._lengths[:] = [len(ids) for ids in prompts]
        longest = int(self._lengths.max())
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        self._bind("ids", ids)
        self._bind("positions", np.arange(longest)[None].repeat(len(prompts), axis=0))
        self._bind("last", self._lengths - 1)
        self._bind("total", np.array(longest, np.int32))
        self._bind("rows", np.array(rows, np.int64))
        self._bind("logits", np.empty((len(rows), self._vocab), np.float32), output=True)

    def go(self) -> Array:
        """The logits of what is bound."""
        self._session.run_with_iobinding(self._binding)
        return self._arrays["logits"]

    def read(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Array:
        """The logits of some rows of prompts."""
        self.prepare(prompts, rows)
        return self.go()

    def start_steps(self, count: int) -> None:
        """Bind what steps of one token for each sequence take."""
        self._bind("ids", np.zeros((count, 1), np.int64))
        self._bind("positions", np.zeros((count, 1), np.int64))
        self._bind("rows", np.arange(count))
        self._bind("logits", np.empty((count, self._vocab), np.float32), output=True)

    def step(self, following: Array) -> Array:
        """Read one token of each sequence; the most likely ones after them."""
        self._arrays["ids"][:, 0] = following
        self._arrays["positions"][:, 0] = self._lengths
        self._arrays["last"][:] = self._lengths
        self._lengths += 1
        self._arrays["total"][...] = self._lengths.max()
        most_likely: Array = self.go().argmax(axis=1)
        return most_likely


def write_graph(path: pathlib.Path, config: Any, arrays: dict[str, Array]) -> None:
    """A file with the graph, and one beside it with the weights."""
    onnx = package("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes: list[Any] = []
    c, heads = config.n_embd, config.n_head

    def node(kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> str:
        domain = settings.pop("domain", "")
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **settings))
        return outputs[0]

    def fused(kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> str:
        return node(kind, inputs, outputs, domain="com.microsoft", **settings)

    constants = {"flat": np.array([-1, c]), "three_c": np.array([3 * c])}
    node("Shape", ["ids"], ["shape"])
    node("Concat", ["shape", "three_c"], ["packed"], axis=0)  # (B, S, 3 C)
    epsilon = config.layer_norm_epsilon
    node("Gather", ["wte.weight", "ids"], ["tokens"])
    node("Gather", ["wpe.weight", "positions"], ["places"])
    node("Reshape", ["tokens", "flat"], ["tokens_flat"])
    node("Reshape", ["places", "flat"], ["places_flat"])

    def skip_norm(stream: str, branch: str, name: str, bias: str, out: str) -> str:
        inputs = [stream, branch, f"{name}.weight", f"{name}.bias", *([bias] if bias else [])]
        fused("SkipLayerNormalization", inputs, [f"{out}.norm", "", "", out], epsilon=epsilon)
        return f"{out}.norm"

    stream, branch, bias = "tokens_flat", "places_flat", ""
    for i in range(config.n_layer):
        h = f"h.{i}"
        x = skip_norm(stream, branch, f"{h}.ln_1", bias, f"{h}.a")
        stream = f"{h}.a"
        node("Gemm", [x, f"{h}.attn.c_attn.weight", f"{h}.attn.c_attn.bias"], [f"{h}.qkv"])
        node("Reshape", [f"{h}.qkv", "packed"], [f"{h}.qkv3"])
        fused(
            "GroupQueryAttention",
            [f"{h}.qkv3", "", "", f"past_key.{i}", f"past_value.{i}", "last", "total"],
            [f"{h}.mixed", f"present_key.{i}", f"present_value.{i}"],
            num_heads=heads, kv_num_heads=heads, scale=config.head_dim**-0.5,
        )  # fmt: skip
        node("Reshape", [f"{h}.mixed", "flat"], [f"{h}.mixed2"])
        node("MatMul", [f"{h}.mixed2", f"{h}.attn.c_proj.weight"], [f"{h}.attn"])
        x = skip_norm(stream, f"{h}.attn", f"{h}.ln_2", f"{h}.attn.c_proj.bias", f"{h}.b")
        stream = f"{h}.b"
        node("MatMul", [x, f"{h}.mlp.c_fc.weight"], [f"{h}.fc"])
        fused("FastGelu", [f"{h}.fc", f"{h}.mlp.c_fc.bias"], [f"{h}.gelu"])
        node("MatMul", [f"{h}.gelu", f"{h}.mlp.c_proj.weight"], [f"{h}.mlp"])
        branch, bias = f"{h}.mlp", f"{h}.mlp.c_proj.bias"
    # Only these rows go on: the last norm and the head are not needed for others.
    node("Gather", [stream, "rows"], ["stream_rows"])
    node("Gather", [branch, "rows"], ["branch_rows"])
    skip_norm("stream_rows", "branch_rows", "ln_f", bias, "end")
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    node("Gemm", ["end.norm", head], ["logits"], transB=1)

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["B", heads, "L", config.head_dim]
    parts = [f"{part}.{i}" for i in range(config.n_layer) for part in ("key", "value")]
    inputs = [
        value("ids", kinds.INT64, ["B", "S"]),
        value("positions", kinds.INT64, ["B", "S"]),
        value("last", kinds.INT32, ["B"]),
        value("total", kinds.INT32, []),
        value("rows", kinds.INT64, ["R"]),
        *(value(f"past_{part}", kinds.FLOAT, cache) for part in parts),
    ]
    outputs = [
        value("logits", kinds.FLOAT, ["R", config.vocab_size]),
        *(value(f"present_{part}", kinds.FLOAT, cache) for part in parts),
    ]
    weights = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in {**arrays, **constants}.items()
    ]
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save_model(
        model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=1024
    )


COLD = """
import json
import sys

import numpy as np
import onnxruntime

path, given = sys.argv[1:]
threads, (layers, heads, size), ids = json.loads(given)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
options.add_session_config_entry("session.disable_prepacking", "1")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
count = len(ids)
feed = {
    "ids": np.array([ids]),
    "positions": np.arange(count)[None],
    "last": np.array([count - 1], np.int32),
    "total": np.array(count, np.int32),
    "rows": np.array([count - 1]),
}
empty = np.zeros((1, heads, 0, size), np.float32)
for layer in range(layers):
    feed[f"past_key.{layer}"] = feed[f"past_value.{layer}"] = empty
session.run(["logits"], feed)[0].argmax()
"""
