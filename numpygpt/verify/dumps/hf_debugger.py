"""The tree that transformers' ``model_addition_debugger_context`` leaves in a folder.

A JSON file tells which module called which, with shapes; the tensors themselves lie beside it, one
safetensors file each with a single entry ``data`` (``use_repr=False``). By default only their
printed digits stand in the JSON; four of them are too few to verify anything, so these are
reported and left alone.

Outputs are kept of modules without children only, so what blocks and their halves return is found
as what the next module was given.

References
----------
transformers, model_debugging_utils.py.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...checkpoints.arrays import DataFile
from ...checkpoints.json_files import parse_json
from ...checkpoints.safetensors import SafetensorsFile
from ...errors import DumpError
from ...params import shown
from .files import Keeper, read_text, stored
from .recording import Recording, Stored, recording

__all__ = ["find", "read"]

# The tree of gpt2-xl with all layers takes 4 MB. As Python objects JSON takes up to 28 times its
# size.
LARGEST_TREE = 2**24

FULL, SUMMARY = "_FULL_TENSORS.json", "_SUMMARY.json"

# How the names of its files end, and what that means.
SPELLED = {"inputs_args_0": ".input", "outputs": "", "outputs_0": ".0"}

PRINTED = (
    "only its printed digits were recorded; run again with "
    "model_addition_debugger_context(..., use_repr=False)"
)


def find(folder: pathlib.Path) -> pathlib.Path | None:
    """The tree in a folder, if there is one.

    Raises
    ------
    DumpError
        If there are trees of several models.
    """
    trees = sorted(folder.glob(f"*_debug_tree{FULL}"))
    if len(trees) > 1:
        raise DumpError(f"{folder}: trees of {len(trees)} models; name one: {trees[0].name} ...")
    return trees[0] if trees else None


def read(path: pathlib.Path) -> Recording:
    """Read a tree and the tensors beside it.

    Modules are named without the class of the model: ``transformer.h.0.ln_1``; what they were
    given is ``transformer.h.0.ln_1.input``.

    Parameters
    ----------
    path : pathlib.Path
        The JSON file.

    Raises
    ------
    DumpError
        If the tree or a tensor is damaged, or no tensor was saved.
    """
    path = path.with_name(path.name.replace(SUMMARY, FULL))
    tree = parse_json(read_text(path, LARGEST_TREE), str(path), DumpError)
    model = tree.get("module_path")
    if not isinstance(model, str):
        raise DumpError(f"{path}: has no module_path, so it is no tree of transformers' debugger")
    keeper = Keeper()
    arrays: dict[str, Stored] = {}
    others: dict[str, str] = {}
    notes: dict[str, None] = {}
    for name, value in _listed(path, tree, model):
        if name in arrays or name in others:
            notes[f"{shown(name)} was called more than once: its file holds the last call"] = None
        elif isinstance(value, str):
            arrays[name] = keeper.keep(_array(path, name, value.removeprefix("./")))
        else:
            others[name] = PRINTED
    pruned = {
        name: keeper.keep(_array(path, name, file))
        for name, file in _beside(path.parent, model)
        if not others and name not in arrays  # what lies beside printed digits is of another run
    }
    if pruned:
        notes[f"{len(pruned)} tensors beside the tree that it leaves out (pruned layers)"] = None
    metadata = {"producer": f"transformers, {shown(model)}"}
    return recording(path, {**arrays, **pruned}, metadata, others, notes)


def _listed(path: pathlib.Path, tree: Mapping[str, Any], model: str) -> list[tuple[str, object]]:
    """Name and recorded value of every tensor, in the order of the calls."""
    try:
        return list(_tensors(path, tree, model))
    except RecursionError:
        raise DumpError(f"{path}: nested too deeply to be read") from None


def _tensors(
    path: pathlib.Path, tree: Mapping[str, Any], model: str
) -> Iterator[tuple[str, object]]:
    nodes: list[Any] = [tree]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict) or not isinstance(node.get("module_path"), str):
            raise DumpError(f"{path}: a node of the tree has no module_path")
        children = node.get("children", [])
        if not isinstance(children, list):
            raise DumpError(f"{path}: {shown(node['module_path'])}: children must be a list")
        module = node["module_path"].removeprefix(model).removeprefix(".")
        for name, value in _leaves(node.get("inputs"), ""):
            yield _input(module, name), value
        for name, value in _leaves(node.get("outputs"), ""):
            yield f"{module}{name}", value
        nodes.extend(reversed(children))


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """The tensors in a nest of lists and objects, each by its way there."""
    match value:
        case {"shape": str(), "dtype": str(), "value": recorded}:
            yield name, recorded
        case dict():
            for key, each in value.items():
                yield from _leaves(each, f"{name}.{key}")
        case list():
            for index, each in enumerate(value):
                yield from _leaves(each, f"{name}.{index}")


def _input(module: str, way: str) -> str:
    """The name of something a module was given; the first argument is what it works on."""
    first = way in (".args.0", ".kwargs.hidden_states")
    return f"{module}.input{'' if first else way}".removeprefix(".")


def _array(path: pathlib.Path, name: str, file: str) -> Stored:
    """The one tensor of a file beside the tree; nothing outside the folder is opened."""
    if set(file) & set("/\\\0") or not file.endswith(".safetensors"):
        raise DumpError(f"{path}: {shown(name)} names {shown(file)!r}, expected a file beside it")
    place = path.parent / file
    entries = SafetensorsFile(place).entries
    if list(entries) != ["data"]:
        raise DumpError(f"{place}: expected one tensor called data for {shown(name)}")
    entry = entries["data"]

    def load() -> Any:
        return stored(DataFile(place), entry.dtype, entry.start, entry.shape).read()

    return Stored(entry.dtype, entry.shape, load)


def _beside(folder: pathlib.Path, model: str) -> Iterator[tuple[str, str]]:
    """Name and file of every tensor in a folder that is spelled as the debugger spells them."""
    spelled = re.compile(rf"{re.escape(model)}\.([\w.]+?)_({'|'.join(SPELLED)})\.safetensors")
    for place in sorted(folder.iterdir()):
        if found := spelled.fullmatch(place.name):
            yield found[1] + SPELLED[found[2]], place.name
