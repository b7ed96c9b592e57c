"""``numpygpt trace``: record every intermediate result of a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import __version__
from ..api import Model
from ..errors import ArgumentError, TokenError
from ..loading import DTYPES
from ..params import Array
from ..records import weights_sha256
from ..storage import STORAGES
from ..verify.dump import Dump
from ..verify.dumps import write
from ..verify.tracing import trace_chunks
from .options import DEFAULT_MODEL, ModelChoice, add_config, config_of, whole
from .recordings import chunks_of, ids_of, replacing, require_writable, silent
from .request import prompt_of
from .terminal import one_line

__all__ = ["add", "run"]

# The reference that others are compared with.
DEFAULT_DTYPE = "float64"

EXAMPLES = """\
examples:
  numpygpt trace "Alan Turing" --model gpt2 -o turing.safetensors
  numpygpt trace --ids 36235,39141 --model gpt2 -o pattern.safetensors --names "h.*.attn.pattern"
  numpygpt trace --ids ids.json --dtype float32 --chunks 5,1,1 -o cached.safetensors

The names are those of numpygpt.plans.INTERMEDIATES: embed, h.0.resid_pre, h.0.ln_1,
h.0.attn.qkv, h.0.attn.scores, h.0.attn.pattern, h.0.attn.heads, h.0.attn.out, h.0.resid_mid,
h.0.ln_2, h.0.mlp.pre, h.0.mlp.post, h.0.mlp.out, h.0.resid_post, ln_f and logits.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "trace",
        help="record every intermediate result of a run",
        description="Run a model on a text or on token ids, and write its intermediate results\n"
        "into a safetensors file, which numpygpt verify and others can read. All of\n"
        "them take much room for long texts: choose some with --names.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text; read from standard input when that is piped (one trailing newline is "
        "dropped)",
    )
    parser.add_argument(
        "--ids",
        metavar="FILE-OR-LIST",
        help="token ids instead of a text: 15496,995 or the name of a file with them (JSON, text "
        "or .npy)",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="what to write")
    parser.add_argument("--model", help=f"name, directory or file (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--dtype",
        default=DEFAULT_DTYPE,
        metavar="{" + ",".join(DTYPES) + "}",
        help="what to compute in, or how to keep the matrices of a model that computes in float32 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="PATTERN",
        help='only these arrays, such as logits or "h.*.attn.pattern" (default: all)',
    )
    parser.add_argument(
        "--chunks",
        metavar="N,N,...",
        help="how many tokens each forward pass reads, with a cache (default: all in one)",
    )
    parser.add_argument(
        "--threads", type=whole(1), metavar="N", help="how many threads compute, from 1"
    )
    add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    return parser


def run(args: argparse.Namespace) -> int:
    """Trace, write, and say what was written."""
    from tqdm import tqdm

    path = require_writable(args.output, args.overwrite)
    chunks = () if args.chunks is None else chunks_of(args.chunks)
    given = None if args.ids is None else ids_of(args.ids)
    if given is not None and args.prompt is not None:
        raise ArgumentError("give a text or --ids, not both")
    name = args.model or DEFAULT_MODEL
    model = ModelChoice(name, args.dtype, config_of(args.config), args.threads).load()
    dump = _traced(model, _tokens(model, args.prompt, given), chunks, args.names)
    size = sum(array.nbytes for array in dump.tensors.values())
    with (
        replacing(path, args.overwrite) as place,
        tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=silent()) as bar,
    ):

        def advance(count: int) -> None:
            bar.update(count)

        sha256 = weights_sha256(model.config, model.params)
        write(place, dump, sha256, dataclasses.asdict(model.config), advance)
    print(
        f"wrote {one_line(str(path))}: {len(dump.tensors)} arrays of {len(dump.ids)} tokens, "
        f"{model.params.storage}, {size / 1e6:,.1f} MB"
    )
    return 0


def _tokens(model: Model, prompt: str | None, given: list[Any] | None) -> list[int]:
    if given is not None:
        return given
    ids: list[int] = model.tokenizer.encode(prompt_of(prompt))
    if not ids:
        raise TokenError("there is nothing to trace: give a text or --ids")
    return ids


def _traced(
    model: Model, ids: list[int], chunks: Sequence[int], names: Sequence[str] | None
) -> Dump:
    """What one run leaves behind."""
    tensors: dict[str, Array]
    tensors = trace_chunks(model, ids, chunks, names) if chunks else model.trace(ids, names)
    storage = model.params.storage
    return Dump(
        np.asarray(ids),
        tensors,
        dtype=model.dtype.name,
        weights=storage if storage in STORAGES else None,
        chunks=tuple(chunks),
        producer=f"numpygpt {__version__}",
    )
