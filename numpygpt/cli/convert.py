"""``numpygpt convert``: write a checkpoint in another format."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from ..checkpoints.saving import FORMATS, KINDS
from ..convert import Conversion, convert
from .options import add_config, config_of
from .terminal import one_line, tell

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  numpygpt convert path/to/pytorch_model.bin gpt2          # a directory with safetensors
  numpygpt convert path/to/models/124M gpt2 --proof        # OpenAI's TensorFlow files
  numpygpt convert gpt2 gpt2-half --dtype bfloat16
  numpygpt convert gpt2 gpt2-quarter --dtype int8          # load it with --dtype int8
  numpygpt convert ckpt.pt mine.gguf --config activation_function=gelu_new
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="write a checkpoint in another format",
        description="Write a checkpoint in another format. DST is a directory with safetensors in\n"
        "the Hugging Face layout, or a file if it ends in .npz, .bin (llm.c) or .gguf.\n"
        "It must not exist, and is there whole or not at all. The exit code is 1 if the\n"
        "proof fails.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="name, directory or file of any format")
    parser.add_argument("destination", metavar="DST", help="what to write")
    parser.add_argument(
        "--format",
        metavar="{" + ",".join(FORMATS) + "}",
        help="output format, if the name of DST does not tell",
    )
    parser.add_argument(
        "--dtype",
        metavar="{" + ",".join(KINDS) + "}",
        help="what to store (default: as it is stored now; quantised numbers become float32, "
        "but int8 stays int8 in safetensors)",
    )
    add_config(parser)
    parser.add_argument(
        "--proof", action="store_true", help="read DST again and print the hash of every array"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was done. The exit code is 1 if the proof fails."""
    from tqdm import tqdm

    start = time.perf_counter()
    # None: only where standard error is a terminal. It may also be closed.
    silent = True if args.json or sys.stderr is None else None
    with tqdm(unit="B", unit_scale=True, leave=False, disable=silent) as bar:

        def on_bytes(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        done = convert(
            args.source,
            args.destination,
            format=args.format,
            dtype=args.dtype,
            config=config_of(args.config),
            proof=args.proof,
            on_bytes=on_bytes,
        )
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps(_record(done, seconds), default=str))
    else:
        _print(done, seconds)
    return 0 if all(array.before == array.after for array in done.proof) else 1


def _record(done: Conversion, seconds: float) -> dict[str, Any]:
    proof = [array._asdict() for array in done.proof]
    return {**dataclasses.asdict(done), "proof": proof, "seconds": round(seconds, 3)}


def _print(done: Conversion, seconds: float) -> None:
    print(f"read     {one_line(str(done.source))}: {done.source_format}, {_types(done.read)}")
    for note in done.notes:
        print(f"         {one_line(note)}")
    print(
        f"wrote    {one_line(str(done.destination))}: {done.format}, {_types(done.written)}, "
        f"{done.config.parameter_count:,} parameters, {done.bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    )
    if not done.proof:
        return
    print("\nSHA-256 of the numbers of every array, as read and, if it differs, as written")
    for name, before, after, _ in done.proof:
        print(f"{before}  {name}{'' if after == before else f': FOUND {after}'}")
    wrong = sum(array.before != array.after for array in done.proof)
    if wrong:
        tell("error", f"{done.destination}: {wrong} arrays differ from what was read; remove it")
        return
    rounding = max(array.rounding for array in done.proof)
    told = f"rounded by at most {rounding:.3g}" if rounding else "no number was changed"
    print(f"all {len(done.proof)} arrays are equal; {told}")


def _types(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + " arrays"
