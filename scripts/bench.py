"""Measure numpygpt on this machine, beside the machine's own limits in the same run.

Results are checked before anything is timed: the float32 logits must agree with the float64 ones.
Every figure is a median over rounds in which all contestants take turns, so that a machine that
is busy for a while slows all of them. Quote the ratios.

    python scripts/bench.py                      # a 124M model with random weights
    python scripts/bench.py --model DIR          # a model of yours
    python scripts/bench.py --json

decode
    One token at a time after a prompt. Each token reads every weight once, so it is compared with
    the *sweep*: nothing but one ``W @ x`` for every matrix of the model.
prefill
    A prompt at once, compared with the floating-point rate of one large matrix product.
cold start
    A new process up to its first token with the weights in the page cache, and the most memory it
    had; compared with the size of the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

import numpygpt
from numpygpt.params import Config, shapes

# Settings that pin OpenBLAS to the kernels of another processor. Users do not have them.
PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

SHAPES = {
    "nano": {"n_layer": 2, "n_head": 2, "n_embd": 128},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "355M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "774M": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "1558M": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

COLD = """
import json, pathlib, re, sys, time
import numpygpt
model = numpygpt.load(sys.argv[1])
model.generate(sys.argv[2], max_new_tokens=1, stop_ids=())
now = time.time()
peak = None
if pathlib.Path("/proc/self/status").exists():
    status = pathlib.Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])
print(json.dumps({"now": now, "peak": peak}))
"""


def write_random_checkpoint(directory: pathlib.Path, shape: dict[str, int]) -> None:
    """A checkpoint with GPT-2's proportions and seeded random float32 weights."""
    config = Config(**shape)
    fields = {**dataclasses.asdict(config), "n_positions": config.n_ctx, "model_type": "gpt2"}
    del fields["bias"]
    (directory / "config.json").write_text(json.dumps(fields))
    header: dict[str, Any] = {}
    start = 0
    for name, (size, _) in shapes(config).items():
        stop = start + 4 * int(np.prod(size))
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (size, _) in shapes(config).items():
            values = rng.standard_normal(size, np.float32) * np.float32(0.02)
            if name.endswith("weight") and "ln_" in name:
                values += 1
            file.write(values.tobytes())


def check(model: numpygpt.Model, exact: numpygpt.Model) -> float:
    """Largest difference from the float64 logits over their scale; refuses to go on over 2e-5."""
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, min(64, model.config.n_ctx))
    want, got = exact.logits(ids), model.logits(ids)
    error = float(abs(got - want).max() / abs(want).max())
    if not error < 2e-5:
        raise SystemExit(f"wrong results: the logits are off by {error:.1e} of their scale")
    return error


def matrices(model: numpygpt.Model) -> list[Any]:
    """Every matrix that a decode step multiplies by, as the model stores it."""
    found = [model.params.head.T]
    for p in model.params.h:
        found += [p.attn.c_attn.w, p.attn.c_proj.w, p.mlp.c_fc.w, p.mlp.c_proj.w]
    return found


def decode(model: numpygpt.Model, prompt: int, steps: int) -> dict[str, float]:
    """Decode steps and sweeps in turn: after every token, one ``W @ x`` for each matrix."""
    jobs = [
        (w, np.ones((1, w.shape[0]), model.dtype), np.empty((1, w.shape[1]), model.dtype))
        for w in matrices(model)
    ]
    step, sweep = [], []
    last = time.perf_counter()

    def on_step(_: object) -> None:
        nonlocal last
        made = time.perf_counter()
        step.append(made - last)
        for w, x, out in jobs:
            np.matmul(x, w, out=out)
        last = time.perf_counter()
        sweep.append(last - made)

    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, prompt)
    model.generate(ids, max_new_tokens=steps + 3, stop_ids=(), on_step=on_step)
    step, sweep = step[3:], sweep[3:]  # the first contains the prefill, the next warm up
    size = sum(w.nbytes for w in matrices(model))
    return {
        "tokens_per_second": 1 / statistics.median(step),
        "fastest": 1 / min(step),
        "slowest": 1 / max(step),
        "sweeps_per_second": 1 / statistics.median(sweep),
        "sweep_gb_per_second": size / statistics.median(sweep) / 1e9,
        "share_of_sweep": statistics.median(w / d for w, d in zip(sweep, step, strict=True)),
    }


def prefill(model: numpygpt.Model, length: int, rounds: int) -> dict[str, float]:
    """Read a prompt at once, in turn with one large product."""
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, length)
    square = np.ones((1024, 1024), model.dtype)
    read, product = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        model.logits(ids, last=True)
        between = time.perf_counter()
        square @ square
        read.append(between - began)
        product.append(time.perf_counter() - between)
    # Two operations for each weight and token; causal attention adds 4 C (T + 1) / 2 per layer.
    c = model.config
    weights = sum(w.size for w in matrices(model)[1:])
    work = (
        length * (2 * weights + c.n_layer * 2 * c.n_embd * (length + 1))
        + 2 * c.n_embd * c.vocab_size
    )
    rate, peak = work / statistics.median(read[1:]), 2 * 1024**3 / statistics.median(product[1:])
    return {
        "tokens_per_second": length / statistics.median(read[1:]),
        "gflop_per_second": rate / 1e9,
        "product_gflop_per_second": peak / 1e9,
        "share_of_product": rate / peak,
    }


def cold_start(path: str, prompt: str, rounds: int) -> dict[str, float | None]:
    """New processes, from their start to their first token, weights in the page cache."""
    seconds, peaks = [], []
    for _ in range(rounds + 1):
        began = time.time()
        command = [sys.executable, "-c", COLD, path, prompt]
        done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        seconds.append(done["now"] - began)
        peaks.append(done["peak"])
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak_mib": None if peaks[0] is None else max(peaks) / 2**20,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    blas: dict[str, Any] = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[call-overload]
    record = {
        "numpygpt": numpygpt.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "blas": f"{blas['name']} {blas['version']}",
        "environment": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
    }
    try:
        import threadpoolctl
    except ImportError:
        return record
    pools = threadpoolctl.threadpool_info()
    return record | {
        "kernel": [pool.get("architecture") for pool in pools],
        "threads": [pool["num_threads"] for pool in pools],
    }


def measure(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """All cases on one model."""
    model = numpygpt.load(path)
    record: dict[str, Any] = {"machine": machine(), "model": repr(model)}
    record["error"] = check(model, numpygpt.load(path, dtype="float64"))
    size = model.config.parameter_count * model.dtype.itemsize
    longest = model.config.n_ctx
    for prompt in (length for length in (32, 512) if length + args.steps + 3 <= longest):
        record[f"decode{prompt}"] = decode(model, prompt, args.steps)
    for length in (length for length in (128, 512) if length <= longest):
        record[f"prefill{length}"] = prefill(model, length, args.rounds)
    record["cold"] = cold_start(path, args.prompt, args.rounds)
    record["cold"]["weights_mib"] = size / 2**20
    return record


def report(record: dict[str, Any]) -> str:
    """The record as lines to read."""
    lines = [record["model"], ", ".join(f"{k} {v}" for k, v in record["machine"].items() if v)]
    lines.append(f"float32 logits differ from float64 by {record['error']:.1e} of their scale")
    for name, case in record.items():
        if name.startswith("decode"):
            lines.append(
                f"{name:<11} {case['tokens_per_second']:7.1f} tokens/s "
                f"({case['slowest']:.1f} to {case['fastest']:.1f}); "
                f"{case['share_of_sweep']:.0%} of a bare sweep over the weights "
                f"({case['sweeps_per_second']:.1f}/s, {case['sweep_gb_per_second']:.1f} GB/s)"
            )
        if name.startswith("prefill"):
            lines.append(
                f"{name:<11} {case['tokens_per_second']:7.1f} tokens/s; "
                f"{case['gflop_per_second']:.0f} GFLOP/s, {case['share_of_product']:.0%} of one "
                f"large product ({case['product_gflop_per_second']:.0f})"
            )
    cold = record["cold"]
    peak = "unknown" if cold["peak_mib"] is None else f"{cold['peak_mib']:.0f} MiB"
    lines.append(
        f"cold start  {cold['seconds']:7.2f} s to the first token; peak memory {peak}, "
        f"of which weights {cold['weights_mib']:.0f} MiB"
    )
    return "\n".join(lines)


def at_least_one(text: str) -> int:
    """A count of something that is measured."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="124M", help="default: %(default)s")
    parser.add_argument("--model", help="a model instead of random weights")
    parser.add_argument(
        "--steps", type=at_least_one, default=64, help="tokens decoded in each case"
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, help="of prefill and of cold starts"
    )
    parser.add_argument("--prompt", default="Hello, world", help="for the cold start")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if any(pin in os.environ for pin in PINS):
        clean = {k: v for k, v in os.environ.items() if k not in PINS}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=clean).returncode)
    with tempfile.TemporaryDirectory() as directory:
        path = args.model or directory
        if not args.model:
            write_random_checkpoint(pathlib.Path(directory), SHAPES[args.size])
        try:
            record = measure(path, args)
        except numpygpt.errors.NumpyGPTError as error:
            sys.exit(f"bench: error: {error}")
    print(json.dumps(record, indent=2) if args.json else report(record))


if __name__ == "__main__":
    main()
