"""What several tests need: small configs, random weights, and a checkpoint writer.

The writer follows the format's description and shares no code with the reader under test.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from numpygpt.cache import Cache, segments
from numpygpt.model import forward, unembed
from numpygpt.params import Config, Params, pack, shapes
from numpygpt.plans import Fresh, Planner

# fmt: off
TYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "bool": "BOOL",
    "uint8": "U8", "int64": "I64",
}
# fmt: on


def nano(**changes: Any) -> Config:
    """A config small enough for loops: two layers, two heads of four."""
    values = {"vocab_size": 17, "n_ctx": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return Config(**{**values, **changes})


def random_tensors(config: Config, seed: int = 0, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Weights with GPT-2's proportions; gains near 1, biases far enough from 0 to matter.

    The matrices are scaled so that activations stay near unit size at any width.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (shape, _) in shapes(config).items():
        if name.startswith(("wte", "wpe", "lm_head")):
            scale, centre = (0.2 if name.startswith("wpe") else 0.5), 0.0
        elif len(shape) == 2:
            scale, centre = shape[0] ** -0.5, 0.0
        else:
            scale, centre = 0.2, float("ln_" in name and name.endswith("weight"))
        tensors[name] = (centre + scale * rng.standard_normal(shape)).astype(dtype)
    return tensors


def random_params(config: Config, seed: int = 0, dtype: Any = np.float64) -> Params:
    """:func:`random_tensors`, packed."""
    return pack(config, random_tensors(config, seed, dtype))


def random_ids(config: Config, length: int, seed: int = 0) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng([seed, length]).integers(0, config.vocab_size, length)


def run_page(
    ids: np.ndarray, params: Params, config: Config, planner: Planner | None = None
) -> np.ndarray:
    """Logits (T, V) of one sequence in one forward pass."""
    cache = Cache(config, max(len(ids), 1), params.dtype)
    laid = segments([len(ids)], [cache])
    plan = (planner or Fresh(config)).fit(laid)
    return unembed(forward(ids, laid, params, config, plan), params, out=plan.logits)


def safetensors_bytes(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None, pad: int = 8
) -> bytes:
    """A safetensors file. uint16 arrays are written as BF16; the header is padded to `pad`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, array in tensors.items():
        stop = start + array.nbytes
        header[name] = {
            "dtype": TYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def config_json(config: Config, **changes: Any) -> dict[str, Any]:
    """The fields of a config.json for `config`."""
    fields = {**vars(config), "n_positions": config.n_ctx, "model_type": "gpt2"}
    if config.bias:
        del fields["bias"]
    return {**fields, **changes}


def write_checkpoint(
    directory: pathlib.Path,
    config: Config,
    tensors: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> pathlib.Path:
    """A directory with config.json and model.safetensors; `changes` go into config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = random_tensors(config, dtype=np.float32)
    (directory / "config.json").write_text(json.dumps(config_json(config, **changes)))
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory
