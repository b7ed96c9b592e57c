"""``numpygpt verify``: the first operation in which another GPT-2 differs, and why."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import checkpoints
from .. import verify as verification
from ..api import Model
from ..checkpoints.atomic import new_file
from ..errors import ArgumentError, NumpyGPTError
from ..verify.arithmetic import ARITHMETICS
from ..verify.dumps.recording import check_dtype, check_weights
from ..verify.names import read_mapping
from ..verify.report import Report
from ..verify.reports import Unusable, as_html, as_json, as_junit, as_text
from .options import DEFAULT_DTYPE, ModelChoice, add_config, config_of, whole
from .recordings import chunks_of, ids_of, replacing, require_writable, silent
from .terminal import on_colour_terminal, one_line, tell

__all__ = ["add", "run"]

EXAMPLES = """\
examples:
  numpygpt verify run.safetensors --model gpt2
  numpygpt verify run.npz --model gpt2 --ids 15496,995 --as bfloat16 --html run.html
  numpygpt verify *.safetensors --model path/to/gpt2 --junit results.xml --overwrite

A dump is what a run of another program left behind: a safetensors file, an .npz, a folder of
.npy, or what README names. Any of its arrays may be missing; logits alone are enough for a
verdict. Each array is compared with what GPT-2 makes of the dump's own arrays before it, so the
first that differs is where the mistake is.
"""


def add(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="find where another GPT-2 goes wrong, and why",
        description="Compare the activations that another program recorded with GPT-2's. Named\n"
        "are the first operation that differs by more than rounding, how far, and the\n"
        "known mistake that gives the same numbers. The exit code is 0 if all is\n"
        "rounding, 1 if anything is suspicious or wrong, 2 if a dump is unusable.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dumps", nargs="+", metavar="DUMP", help="a recording of any kind")
    parser.add_argument(
        "--model", required=True, help="the weights it was made with: name, directory or file"
    )
    parser.add_argument(
        "--threads", type=whole(1), metavar="N", help="how many threads compute, from 1"
    )
    add_config(parser)
    _add_assumptions(parser.add_argument_group("what the dump does not say, or says wrongly"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_assumptions(group: Any) -> None:
    group.add_argument(
        "--mapping",
        metavar="FILE",
        help="JSON object: which name in the dump is which of ours, such as "
        '{"block.{i}.act": "h.{i}.mlp.post"}',
    )
    group.add_argument(
        "--ids",
        metavar="FILE-OR-LIST",
        help="the tokens: 15496,995 or the name of a file with them (JSON, text or .npy)",
    )
    group.add_argument(
        "--as",
        dest="computed_in",
        metavar="DTYPE",
        help=f"what the program computed in: {', '.join(ARITHMETICS)}",
    )
    group.add_argument(
        "--weights", metavar="DTYPE", help="how it stored its weights: one of these, or int8"
    )
    group.add_argument(
        "--chunks",
        metavar="N,N,...",
        help="how many tokens each of its forward passes read, with a cache",
    )


def _add_output(group: Any) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    group.add_argument(
        "--junit", metavar="FILE", help="write JUnit XML, a test case for each array"
    )
    group.add_argument("--html", metavar="FILE", help="write a page, which needs no network")
    group.add_argument(
        "--overwrite", action="store_true", help="replace these files if they are there"
    )
    group.add_argument(
        "--verbose", action="store_true", help="list every operation, explanation and match"
    )
    group.add_argument(
        "--no-explain",
        dest="explain",
        action="store_false",
        help="try no known mistakes on what differs, which is faster",
    )


def run(args: argparse.Namespace) -> int:
    """Verify each dump, print or write what was found."""
    writers = {as_junit: args.junit, as_html: args.html}
    outputs = {
        writer: require_writable(name, args.overwrite)
        for writer, name in writers.items()
        if name is not None
    }
    if len({path.absolute() for path in outputs.values()}) < len(outputs):
        raise ArgumentError("--junit and --html name the same file; give each its own")
    options = _options(args)
    model = _model(args)
    reports: list[Report] = []
    unusable: list[Unusable] = []
    for name in args.dumps:
        try:
            found = _verified(name, model, args, options)
        except NumpyGPTError as error:
            tell("error", error)
            unusable.append(Unusable(name, one_line(str(error))))
            continue
        if not args.json:
            _print(found, args.verbose, after=bool(reports))
        reports += found
    if args.json:
        print(as_json(reports, unusable))
    for writer, path in outputs.items():
        with replacing(path, args.overwrite) as place, new_file(place) as file:
            file.write(writer(reports, unusable).encode())
    if unusable:
        return 2
    return 0 if all(report.passed for report in reports) else 1


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What the dump does not say, checked before anything is read."""
    computed, weights, mapping = args.computed_in, args.weights, args.mapping
    return {
        "mapping": None if mapping is None else read_mapping(pathlib.Path(mapping)),
        "ids": None if args.ids is None else ids_of(args.ids),
        "dtype": None if computed is None else check_dtype(computed, "--as"),
        "weights": None if weights is None else check_weights(weights, "--weights"),
        "chunks": None if args.chunks is None else tuple(chunks_of(args.chunks)),
        "explain": args.explain,
    }


def _model(args: argparse.Namespace) -> Model:
    """The model, in a dtype that keeps its weights as they are."""
    fields = config_of(args.config)
    looked = checkpoints.inspect(checkpoints.find(args.model), fields)
    wide = any(tensor.dtype == "F64" for tensor in looked.tensors.values())
    return ModelChoice(
        args.model, "float64" if wide else DEFAULT_DTYPE, fields, args.threads
    ).load()


def _verified(
    name: str, model: Model, args: argparse.Namespace, options: dict[str, Any]
) -> list[Report]:
    with _progress(name) as on_progress:
        reports: list[Report] = verification.verify(name, model, on_progress=on_progress, **options)
    for report in reports:
        if not report.model.get("path"):  # a model in memory has none
            report.model["path"] = args.model
    return [_without_arrays(report) for report in reports]


def _without_arrays(report: Report) -> Report:
    """What is left of a report in memory while other dumps are verified."""
    return dataclasses.replace(report, dump=dataclasses.replace(report.dump, tensors={}))


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """What shows on standard error, if it is a terminal, which operation is being compared."""
    from tqdm import tqdm

    with tqdm(desc=one_line(name)[-30:], leave=False, disable=silent()) as bar:

        def on_progress(done: int, total: int, operation: str) -> None:
            bar.total = total
            bar.set_postfix_str(operation, refresh=False)
            bar.update(done - bar.n)

        yield on_progress


def _print(reports: list[Report], verbose: bool, after: bool) -> None:
    """Print reports as soon as they are there, a blank line between any two."""
    for report in reports:
        if after:
            print()
        print(as_text(report, verbose, on_colour_terminal()), flush=True)
        after = True
