#!/usr/bin/env python3
"""Make the conformance kit: small GPT-2 models and every number a right GPT-2 finds in them.

    python scripts/make_conformance_kit.py -o DIR
    python scripts/make_conformance_kit.py --check tests/golden/conformance

The first writes the kit anew. The second tells whether a kit is whole and right: it compares every
hash with the manifest, makes the weights, ids and configs again and compares their bytes, and
computes every trace again and compares the numbers. It prints the largest difference of each case;
it ends with status 1 where something differs and with 2 where the folder is no kit.

The kit that was made last lies in tests/golden/conformance, and its README.md says what is in it.
That README and the sampler vectors are written elsewhere and copied; only the table of cases is
made here. What a case is stands in CASES below and nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numpygpt.cache import Cache, segments
from numpygpt.checkpoints.atomic import new_directory
from numpygpt.checkpoints.config import parse_config
from numpygpt.checkpoints.json_files import parse_json
from numpygpt.checkpoints.safetensors import SafetensorsFile
from numpygpt.errors import CheckpointError, NumpyGPTError
from numpygpt.model import forward, unembed
from numpygpt.params import Array, Config, Params, pack, shapes
from numpygpt.plans import Traced
from numpygpt.records import weights_sha256

KIT_VERSION = "1"
FORMAT = {"format": "numpygpt-trace", "format_version": "1"}

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "tests" / "golden"
README = GOLDEN / "conformance" / "README.md"
VECTORS = GOLDEN / "sampler_vectors.json"

# Between these lines of the README stands the table of cases.
BEGIN, END = "<!-- cases -->", "<!-- end of cases -->"

# Files whose last bits depend on the machine.
COMPUTED = ("trace.safetensors", "logits.txt", "manifest.json")

# Half the distance from 1 to the next number, as a power of two.
UNIT = {"float64": -53, "float32": -24, "tf32": -11, "float16": -11, "bfloat16": -8}


# -- what the cases are ---------------------------------------------------------------------------

# The fields of a config.json that say which GPT-2 it is; a case changes some of them.
CONFIG: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 53,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}

# Kind of array -> (centre, scale): its numbers are centre + scale * (a number in [-1, 1)). Powers
# of two, so that every weight is exact in float32. Token vectors have about the spread of GPT-2's.
SCALES = {
    "wte.weight": (0.0, 2**-2),
    "wpe.weight": (0.0, 2**-3),
    "ln_1.weight": (1.0, 2**-2),
    "ln_1.bias": (0.0, 2**-2),
    "attn.c_attn.weight": (0.0, 2**-1),
    "attn.c_attn.bias": (0.0, 2**-2),
    "attn.c_proj.weight": (0.0, 2**-1),
    "attn.c_proj.bias": (0.0, 2**-2),
    "ln_2.weight": (1.0, 2**-2),
    "ln_2.bias": (0.0, 2**-2),
    "mlp.c_fc.weight": (0.0, 2**0),
    "mlp.c_fc.bias": (0.0, 2**-2),
    "mlp.c_proj.weight": (0.0, 2**-2),
    "mlp.c_proj.bias": (0.0, 2**-2),
    "ln_f.weight": (1.0, 2**-2),
    "ln_f.bias": (0.0, 2**-2),
    "lm_head.weight": (0.0, 2**-2),
}

# Repeated tokens, the first and the last row of the vocabulary, and all 16 positions.
IDS = (52, 7, 0, 7, 7, 31, 18, 44, 18, 2, 52, 52, 29, 11, 40, 7)


@dataclass(frozen=True)
class Case:
    """One model and one text.

    Attributes
    ----------
    name, about : str
    seed : int
        Where the weights begin.
    exposes : tuple of str
        Mistakes that move the logits by more than a thousand roundings of float32. What each is
        stands in tests/mistakes.py and tests/test_conformance_kit.py, which measure it.
    config, scales : mapping
        Changes to CONFIG and SCALES.
    ids : tuple of int
    chunks : tuple of int
        How many tokens each forward pass reads; the later ones use a cache.
    outlier : (str, int, float), optional
        An array, a place in it, and what stands there instead.
    bits : int
        Of the integers from which weights are made.
    rounding : int
        How far a right program may be off, in units of its rounding and of the largest number of
        an array. At least twice what was measured, see the README.
    """

    name: str
    about: str
    seed: int
    exposes: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = IDS[:8]
    chunks: tuple[int, ...] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outlier: tuple[str, int, float] | None = None
    bits: int = 16
    rounding: int = 64


# The first case exposes what any model shows, the others what only they do.
# New cases go to the end, with a seed of their own, so that the others stay what they are.
CASES = (
    Case(
        "plain",
        "GPT-2 as it is; the text fills all positions, repeats tokens, uses the first and last",
        seed=1,
        exposes=(
            "quick GELU",
            "GELU of halves",
            "GELU without its cubic term",
            "erf GELU",
            "variance over C - 1",
            "layer norm over tokens",
            "layer norm without shift",
            "scores not scaled",
            "scores scaled twice",
            "inverse-layer scale added",
            "qkv interleaved by head",
            "keys and values swapped",
            "queries and keys swapped",
            "wrong number of heads",
            "heads in reverse",
            "attention biases missing",
            "MLP bias missing",
            "mask missing",
            "mask hides the token itself",
            "mask shows the next token",
            "mask inverted",
            "mask multiplied",
            "mask after the softmax",
            "softmax over queries",
            "softmax over heads",
            "positions missing",
            "dropout left on",
            "final layer norm missing",
            "layer norm after the sum",
            "ln_1 and ln_2 swapped",
            "residual from the normalised stream",
            "attention and MLP in parallel",
            "MLP not added to the stream",
            "logits scaled by 1/sqrt(C)",
            "weights rounded to float16",
            "weights rounded to bfloat16",
            "last row of the vocabulary left out",
            "last position left out",
        ),
        ids=IDS,
    ),
    Case(
        "odd",
        "no two sizes are equal, a head has 5 features, the MLP is not four times as wide",
        seed=2,
        exposes=(
            "attn.c_proj transposed",
            "heads not merged by token",
            "head features first",
            "scores scaled by 1/8",
            "scores scaled by sqrt(C)",
            "positions from 1",
        ),
        config={"vocab_size": 31, "n_positions": 11, "n_embd": 15, "n_head": 3, "n_inner": 22},
        ids=(30, 4, 4, 19, 0, 30, 12),
    ),
    Case(
        "inverse_layer",
        "scale_attn_by_inverse_layer_idx: the scores of layer i are divided by i + 1, too",
        seed=3,
        exposes=("inverse-layer scale missing", "inverse-layer scale one layer late"),
        config={"n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
    ),
    Case(
        "untied",
        "tie_word_embeddings is false: the head is lm_head.weight",
        seed=4,
        exposes=("stale tied head",),
        config={"tie_word_embeddings": False},
    ),
    Case(
        "no_bias",
        "no linear map has a bias, no layer norm a shift, and the file holds none",
        seed=5,
        exposes=("absent biases not zero",),
        config={"bias": False},
    ),
    Case(
        "epsilon",
        "activations whose variance is about layer_norm_epsilon",
        seed=6,
        exposes=("epsilon 1e-6", "epsilon 1e-12", "epsilon outside the root"),
        config={"layer_norm_epsilon": 1e-3},
        scales={
            "wte.weight": (0.0, 2**-5),
            "wpe.weight": (0.0, 2**-6),
            "attn.c_proj.weight": (0.0, 2**-6),
            "attn.c_proj.bias": (0.0, 2**-6),
            "mlp.c_proj.weight": (0.0, 2**-7),
            "mlp.c_proj.bias": (0.0, 2**-6),
        },
    ),
    Case(
        "large",
        "scores of tens of thousands, and a feature ten times as large as the others",
        seed=7,
        exposes=("mask of -1e4", "softmax without the maximum"),
        scales={"attn.c_attn.weight": (0.0, 2**6), "attn.c_proj.weight": (0.0, 2**-6)},
        outlier=("h.0.mlp.c_proj.bias", 5, 64.0),
    ),
    Case(
        "offset",
        "a residual stream whose mean is 1000 or 2000 and whose standard deviation is about 3",
        seed=8,
        exposes=("mean not subtracted", "variance in one pass"),
        ids=IDS[:7],
        scales={"mlp.c_proj.bias": (1024.0, 2**2)},  # finer ones would not be exact in float32
        rounding=4096,
    ),
    Case(
        "gelu",
        "activation_function is gelu, the exact one",
        seed=9,
        exposes=("gelu_new for the exact GELU", "quick GELU"),
        config={"activation_function": "gelu"},
    ),
    Case(
        "decode",
        "a pass over five tokens, then three passes over one, with a cache",
        seed=10,
        exposes=(
            "positions start again with the cache",
            "mask aligned with the first query",
            "cache forgets the earlier passes",
        ),
        chunks=(5, 1, 1, 1),
    ),
    Case(
        "deep",
        "twelve layers: layers 10 and 11 come before layer 2 where names are sorted",
        seed=11,
        exposes=("layers sorted by name",),
        config={"n_layer": 12, "n_embd": 8, "n_head": 2},
        ids=IDS[:6],
        rounding=128,
    ),
    Case(
        "coarse",
        "bfloat16 and float16 hold every weight exactly, so only arithmetic rounds",
        seed=12,
        exposes=("products in float16",),
        bits=5,
    ),
)


# -- weights --------------------------------------------------------------------------------------


def numbers(seed: int, bits: int) -> Iterator[float]:
    """Multiples of 2**(1 - bits) from -1 to below 1: the leading bits of a linear congruence."""
    state = seed
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield ((state >> (32 - bits)) - 2 ** (bits - 1)) / 2 ** (bits - 1)


def kind(name: str) -> str:
    """The name of an array without its layer."""
    return re.sub(r"^h\.\d+\.", "", name)


def weights(case: Case) -> dict[str, Array]:
    """The arrays of a case in float32, in the order of the file."""
    stream = numbers(case.seed, case.bits)
    made = {}
    for name, (shape, _) in shapes(config(case)).items():
        centre, scale = {**SCALES, **case.scales}[kind(name)]
        values = [centre + scale * next(stream) for _ in range(math.prod(shape))]
        made[name] = np.array(values, np.float32).reshape(shape)
    if case.outlier:
        name, index, value = case.outlier
        made[name][index] = value
    return made


def fields(case: Case) -> dict[str, Any]:
    """What config.json holds."""
    return {**CONFIG, **case.config}


def config(case: Case) -> Config:
    """The model of a case."""
    return parse_config(fields(case), case.name)


# -- traces ---------------------------------------------------------------------------------------


def trace(
    config: Config, params: Params, ids: Sequence[int], chunks: Sequence[int]
) -> dict[str, Array]:
    """Every intermediate of some passes that share a cache, as if it had been one pass."""
    cache, passes = Cache(config, len(ids), params.dtype), []
    for stop, length in zip(itertools.accumulate(chunks), chunks, strict=True):
        laid = segments([length], [cache])
        planner = Traced(config, length, capacity=len(ids), dtype=params.dtype)
        plan = planner.fit(laid)
        hidden = forward(np.array(ids[stop - length : stop]), laid, params, config, plan)
        unembed(hidden, params, out=plan.logits)
        passes.append(planner.arrays)
    return {name: joined(name, [arrays[name] for arrays in passes]) for name in passes[0]}


def joined(name: str, parts: Sequence[Array]) -> Array:
    """The rows of several passes; what a pass did not see yet is masked."""
    if name.endswith(("scores", "pattern")):
        unseen, width = -np.inf if name.endswith("scores") else 0.0, parts[-1].shape[-1]
        parts = [
            np.pad(part, [(0, 0), (0, 0), (0, width - part.shape[-1])], constant_values=unseen)
            for part in parts
        ]
    return np.concatenate(parts, axis=parts[0].ndim - 2)  # (T, C) or (H, T, D)


def expected(case: Case, dtype: str = "float64") -> dict[str, Array]:
    """The trace of a case."""
    made = config(case)
    arrays = {name: array.astype(dtype) for name, array in weights(case).items()}
    return trace(made, pack(made, arrays), case.ids, case.chunks or (len(case.ids),))


# -- files ----------------------------------------------------------------------------------------


def kit() -> dict[str, bytes]:
    """Every file by its path, the manifest last."""
    files = {"sampler_vectors.json": VECTORS.read_bytes(), "README.md": readme()}
    for case in CASES:
        files |= {f"{case.name}/{name}": data for name, data in case_files(case).items()}
    return files | {"manifest.json": manifest(files)}


def case_files(case: Case) -> dict[str, bytes]:
    """The files of one case."""
    arrays, numbers = weights(case), expected(case)
    return {
        "config.json": (json.dumps(fields(case), indent=2) + "\n").encode(),
        "ids.json": (json.dumps(case.ids) + "\n").encode(),
        "model.safetensors": safetensors(arrays, {"format": "pt"}),  # transformers asks for it
        "trace.safetensors": safetensors(numbers, metadata(case, arrays)),
        "logits.txt": text(numbers["logits"]),
    }


def metadata(case: Case, arrays: Mapping[str, Array]) -> dict[str, str]:
    """What a trace says of itself."""
    chunks = {"chunks": json.dumps(case.chunks)} if case.chunks else {}
    return {
        **FORMAT,
        "ids": json.dumps(case.ids),
        "dtype": "float64",
        "weights": "float32",
        **chunks,
        "producer": f"numpygpt, conformance kit {KIT_VERSION}, {case.name}",
        "model_sha256": weights_sha256(config(case), pack(config(case), arrays)),
        "config": json.dumps(fields(case)),
    }


def safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; written out here because the bytes of a kit must never change."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, array in tensors.items():
        start, stop = stop, stop + array.nbytes
        dtype = {"float32": "F32", "float64": "F64"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned data can be used where it lies
    little = [array.astype(array.dtype.newbyteorder("<")) for array in tensors.values()]
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in little)


def text(logits: Array) -> bytes:
    """One line for each token; 17 digits are the same float64 everywhere."""
    return "".join(" ".join(f"{x:.17g}" for x in row) + "\n" for row in logits).encode()


def manifest(files: Mapping[str, bytes]) -> bytes:
    """What is in the kit, and the hash of each file but this one."""
    made = {
        "kit_version": KIT_VERSION,
        **FORMAT,
        "generator": "scripts/make_conformance_kit.py of numpygpt",
        "unit_roundoff": {name: 2.0**power for name, power in UNIT.items()},
        "cases": {case.name: description(case) for case in CASES},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in files.items()
        },
    }
    return (json.dumps(made, indent=1) + "\n").encode()


def description(case: Case) -> dict[str, Any]:
    """A case in the manifest."""
    return {
        "about": case.about,
        "exposes": case.exposes,
        "chunks": case.chunks or (len(case.ids),),
        "rounding": case.rounding,
        "seed": case.seed,
        "bits": case.bits,
        "scales": {
            name: {**SCALES, **case.scales}[name]
            for name in dict.fromkeys(map(kind, shapes(config(case))))
        },
        "outlier": case.outlier,
    }


def readme() -> bytes:
    """The README with its table of cases as CASES has them."""
    rows = ["| case | what it is | exposes |", "| --- | --- | --- |"]
    rows += [f"| `{case.name}` | {case.about} | {'; '.join(case.exposes)} |" for case in CASES]
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return (before + "\n".join([BEGIN, *rows, END]) + after).encode()


# -- checking -------------------------------------------------------------------------------------


def check(directory: pathlib.Path) -> list[str]:
    """Print how far each case is from what it should be; return everything that is wrong."""
    if not (directory / "manifest.json").is_file():
        raise CheckpointError(f"{directory}: holds no manifest.json, so it is no conformance kit")
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    wrong, made = hashes(found), kit()
    wrong += [f"{name}: missing" for name in made if name not in found]
    wrong += [f"{name}: belongs to no kit" for name in found if name not in made]
    wrong += unequal(found, made)
    for case in CASES:
        if f"{case.name}/trace.safetensors" in found:
            wrong += differences(case, directory, found.get(f"{case.name}/logits.txt"))
    return wrong


def hashes(found: Mapping[str, bytes]) -> list[str]:
    """Files that are not what their own manifest says."""
    told = parse_json(found["manifest.json"], "manifest.json", CheckpointError).get("files")
    if not isinstance(told, dict):
        return ["manifest.json: has no list of files"]
    return [
        f"{name}: not the bytes that the manifest lists"
        for name, data in found.items()
        if name != "manifest.json"
        and told.get(name) != {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    ]


def unequal(found: Mapping[str, bytes], made: Mapping[str, bytes]) -> list[str]:
    """Files that must have the same bytes on every machine, and have not."""
    wrong = [
        f"{name}: not the bytes that this script makes"
        for name in found.keys() & made.keys()
        if found[name] != made[name] and not name.endswith(COMPUTED)
    ]
    theirs, ours = (json.loads(files["manifest.json"]) for files in (found, made))
    keys = [key for key in ours if key != "files" and theirs.get(key) != ours[key]]
    return sorted(wrong) + [f"manifest.json: {key} is not what this script makes" for key in keys]


def differences(case: Case, directory: pathlib.Path, logits: bytes | None) -> list[str]:
    """What is wrong with a trace; another order of adding explains differences up to a limit."""
    name, ours = f"{case.name}/trace.safetensors", expected(case)
    try:
        file = SafetensorsFile(directory / name)
    except CheckpointError as error:
        return [str(error)]
    wrong = []
    if file.metadata != metadata(case, weights(case)):
        wrong.append(f"{name}: its metadata are not those of this case")
    found = {key: (entry.dtype, entry.shape) for key, entry in file.entries.items()}
    if found != {key: ("F64", array.shape) for key, array in ours.items()}:
        return [*wrong, f"{name}: its names, types or shapes are not those of this case"]
    theirs = {key: file.read(key, np.dtype(np.float64)) for key in ours}
    if logits is not None and logits != text(theirs["logits"]):
        wrong.append(f"{case.name}/logits.txt: not the logits of the trace")
    units = {key: distance(theirs[key], ours[key]) / unit("float64") for key in ours}
    worst = max(units, key=lambda key: units[key])
    print(f"{case.name:14}{units[worst]:7.1f} of {case.rounding:4} roundings, {worst}")
    return wrong + [
        f"{name}: {key} is off by {size:.3g} roundings, expected at most {case.rounding}"
        for key, size in units.items()
        if not size <= case.rounding
    ]


def distance(actual: Array, expected: Array) -> float:
    """The largest difference, as a fraction of the largest finite number expected."""
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite]):
        return math.inf
    gap = float(np.abs(actual[finite] - expected[finite]).max())
    return gap / float(np.abs(expected[finite]).max()) if gap == gap else math.inf


def unit(dtype: str) -> float:
    """The unit roundoff of a dtype."""
    return 2.0 ** UNIT[dtype]


# -- the command ----------------------------------------------------------------------------------


def write(directory: pathlib.Path) -> None:
    """Write a kit, whole or not at all."""
    files = kit()
    with new_directory(directory) as partial:
        for name, data in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(data)
    print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes in {directory}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("-o", "--output", metavar="DIR", type=pathlib.Path,
                        help="write the kit there; must not exist, or be empty")  # fmt: skip
    action.add_argument("--check", metavar="DIR", type=pathlib.Path,
                        help="compare the kit there with what this script makes")  # fmt: skip
    asked = parser.parse_args(arguments)
    try:
        if asked.output is not None:
            write(asked.output)
            return 0
        wrong = check(asked.check)
    except (NumpyGPTError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(wrong)} things are wrong" if wrong else "all is as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
