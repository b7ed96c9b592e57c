"""Reading and inspecting a checkpoint of any format: one config, one set of checked arrays."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError, CheckpointWarning, ConfigError, ModelNotFoundError
from ..params import Array, Config, Params, check, listing, pack, shown
from ..storage import STORAGES, Bfloat16, Stored
from .arrays import FLOATS, QUANTISED, Tensor
from .config import FIELDS, INT8, parse_config, read_fields
from .detect import open_source
from .names import LINEAR, MASK_BUFFER, sizes
from .narrowing import is_matrix, narrowed
from .source import Assumption, Source, Vocabulary

__all__ = ["Checkpoint", "Report", "inspect", "read", "settle"]


class Checkpoint(NamedTuple):
    """A checkpoint in memory.

    ``directory`` is where its vocabulary files would be; ``vocabulary`` is the one that its file
    carries, or None.
    """

    config: Config
    params: Params
    directory: pathlib.Path
    vocabulary: Vocabulary | None


@dataclasses.dataclass
class Report:
    """What :func:`inspect` found.

    Attributes
    ----------
    path : pathlib.Path
    directory : pathlib.Path
    format : str
        Empty if it was not recognised.
    config : Config or None
        None if it would be refused.
    tensors : dict of str to Tensor
        By their names in the Hugging Face layout, in file order; mask buffers included.
    vocabulary : Vocabulary or None
        The one inside the file.
    notes : list of str
        What numpygpt decides about it, and takes for granted because it is not said.
    problems : list of str
        Each reason for which :func:`read` would refuse this checkpoint.
    """

    path: pathlib.Path
    directory: pathlib.Path
    format: str = ""
    config: Config | None = None
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def read(
    path: pathlib.Path,
    dtype: Any = np.float32,
    config: Mapping[str, Any] | None = None,
    scan: bool = True,
) -> Checkpoint:
    """Read a checkpoint, checking every name, shape and size.

    Parameters
    ----------
    path : pathlib.Path
        A file of any format that :mod:`numpygpt.checkpoints.detect` knows, or its directory.
    dtype : dtype or str
        float32 or float64: what to compute in. float32 stored as float32 is not copied but
        mapped. Or a key of :data:`numpygpt.storage.STORAGES`: how to keep the matrices of a
        model that computes in float32; int8 stored as int8 is mapped.
    config : mapping, optional
        Config fields that override the checkpoint's.
    scan : bool
        Look at every weight now, to warn of NaN. Otherwise they show when they are used: no
        log-probability comes out of them but an error.

    Returns
    -------
    Checkpoint

    Raises
    ------
    ModelNotFoundError
        If a file is missing.
    CheckpointError
        If a file is damaged, or config and tensors do not fit each other.

    Warns
    -----
    CheckpointWarning
        If weights are NaN or infinite, or the format leaves open what changes the model.
    """
    source = open_source(path)
    settled = settle(path, source, config or {})
    for text in settled.doubtful:
        warnings.warn(f"{path}: {text}", CheckpointWarning, stacklevel=3)
    # What is one tensor in the file is read and looked at once, whatever its names.
    tensors: dict[str, Any] = {}
    first_names: dict[int, str] = {}
    odd: list[str] = []
    storage = dtype if isinstance(dtype, str) and dtype in STORAGES else None
    for name, tensor in without_tied_head(path, settled).items():
        first = first_names.setdefault(id(tensor), name)
        if first in tensors:
            tensors[name] = tensors[first]
        elif storage and is_matrix(name):
            tensors[name] = _narrowed(path, name, tensor, storage)
        elif storage:
            tensors[name] = _copied(tensor)
        else:
            tensors[name] = tensor.read(dtype)
        if first in odd or (scan and first == name and not _finite(tensors[name])):
            odd.append(name)
    if odd:
        warnings.warn(
            f"{path}: NaN or infinite weights in {listing(odd)}", CheckpointWarning, stacklevel=3
        )
    params = pack(settled.config, tensors)
    return Checkpoint(settled.config, params, source.directory, source.vocabulary)


def inspect(path: pathlib.Path, config: Mapping[str, Any] | None = None) -> Report:
    """Look at a checkpoint without reading its weights, and collect what would be refused.

    Only what needs the weights themselves is left to :func:`read`: whether a head that is stored
    although it is tied equals the token table, whether checksums hold, and whether weights are
    NaN.

    Parameters
    ----------
    path : pathlib.Path
    config : mapping, optional
        As for :func:`read`.

    Returns
    -------
    Report

    Raises
    ------
    ModelNotFoundError
        If there is nothing to look at.
    """
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    report = Report(path, path if path.is_dir() else path.parent)
    source = Source("", report.directory, {})
    try:
        source = open_source(path)
    except (CheckpointError, ModelNotFoundError) as error:
        report.problems.append(str(error))
    report.format, report.tensors = source.format, source.tensors
    report.directory, report.vocabulary = source.directory, source.vocabulary
    if report.problems and not (report.directory / "config.json").exists():
        return report  # one problem hides the other
    report.notes = source.notes
    try:
        report.config = _config(path, source, config or {})
        report.notes = [*source.notes, *_assumptions(source, config or {})]
    except (CheckpointError, ModelNotFoundError) as error:
        report.problems.append(str(error))
    quantised = {tensor.dtype for tensor in source.tensors.values()} & QUANTISED
    if quantised and importlib.util.find_spec("gguf") is None:
        report.problems.append(
            f"{path}: to read {', '.join(sorted(quantised))} takes the package gguf: pip install "
            f'"numpygpt[gguf]"'
        )
    if report.config and source.tensors:
        try:
            _fit(path, source, config or {}, report.config)
        except CheckpointError as error:
            report.problems.append(str(error))
    return report


class Settled(NamedTuple):
    """Config and tensors that fit each other.

    A tied head is among the tensors if one is stored. ``assumptions`` says what was taken for
    granted, and ``doubtful`` which of that may be wrong.
    """

    config: Config
    tensors: dict[str, Tensor]
    assumptions: list[str]
    doubtful: list[str]


def settle(path: pathlib.Path, source: Source, given: Mapping[str, Any]) -> Settled:
    """Make config and tensors of a source fit each other, before any tensor is read.

    Parameters
    ----------
    path : pathlib.Path
        Names the checkpoint in messages.
    source : Source
    given : mapping
        Config fields that override the checkpoint's.

    Returns
    -------
    Settled

    Raises
    ------
    CheckpointError
        If they do not fit, or a tensor is of a type that cannot be read.
    """
    return _fit(path, source, given, _config(path, source, given))


def _fit(path: pathlib.Path, source: Source, given: Mapping[str, Any], config: Config) -> Settled:
    """The tensors of a source, checked against a config."""
    assumptions = _assumptions(source, given)
    used = {name: t for name, t in source.tensors.items() if not MASK_BUFFER.fullmatch(name)}
    if "vocab_size" in given:  # a padded vocabulary may be cut
        for name in {"wte.weight", "lm_head.weight"} & used.keys():
            if len(used[name].shape) == 2 and used[name].shape[0] > config.vocab_size:
                surplus = used[name].shape[0] - config.vocab_size
                assumptions.append(f"the last {surplus} rows of {name} are cut off, as asked for")
                used[name] = used[name].rows(config.vocab_size)
    # A tied head may be stored too; then it must have a head's shape.
    stored_head = config.tie_word_embeddings and "lm_head.weight" in used
    told = dataclasses.replace(config, tie_word_embeddings=False) if stored_head else config
    try:
        check(told, {name: tensor.shape for name, tensor in used.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    declared = _declares_int8(source)
    for name, tensor in used.items():
        if problem := _wrong_type(name, tensor, declared):
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}{problem}")
    doubtful = _assumptions(source, given, doubtful=True)
    return Settled(config, used, assumptions, doubtful)


def _declares_int8(source: Source) -> bool:
    """Whether the config says that the matrices are int8 with scales."""
    fields, file = source.fields, source.directory / "config.json"
    if fields is None and file.exists():
        fields = read_fields(file)
    return (fields or {}).get("quantization_config") == INT8


def _wrong_type(name: str, tensor: Tensor, int8: bool) -> str:
    """What is wrong with the type of a tensor, if its config says `int8` or not; or nothing."""
    if int8 and is_matrix(name):
        if tensor.stored is None:
            without = ", without scales" if tensor.dtype == "I8" else ""
            return f"{without}; its config says that matrices are int8 (I8) with scales (F32)"
        if LINEAR.fullmatch(name) and tensor.turned is None:
            return " and stored (in, out); expected (out, in), with a scale for each row"
    elif tensor.stored is not None and is_matrix(name):
        return " with scales; expected a config with the quantization_config that says so"
    elif tensor.dtype not in FLOATS and tensor.dtype not in QUANTISED:
        return f"; expected one of {', '.join(FLOATS)}"
    return ""


def without_tied_head(path: pathlib.Path, settled: Settled) -> dict[str, Tensor]:
    """The tensors without a stored head that repeats the token table.

    Raises
    ------
    CheckpointError
        If it does not repeat it, although the config ties the two.
    """
    tensors = dict(settled.tensors)
    if settled.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head, table = tensors.pop("lm_head.weight"), tensors["wte.weight"]
        if head is not table and not _same(head, table):
            raise CheckpointError(
                f"{path}: lm_head.weight differs from wte.weight, but the config ties them; set "
                f"tie_word_embeddings to false if the model was trained with a head of its own"
            )
    return tensors


def _same(head: Tensor, table: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    exact = np.result_type(head.exact, table.exact)
    pairs = zip(head.pieces(exact), table.pieces(exact), strict=True)
    return all(np.array_equal(mine, other, equal_nan=True) for (_, mine), (_, other) in pairs)


def _config(path: pathlib.Path, source: Source, given: Mapping[str, Any]) -> Config:
    """The config of a source: what is given overrides what it says, and that what is assumed."""
    if unknown := sorted(map(str, given.keys() - FIELDS - {"n_positions"})):
        import difflib

        near = difflib.get_close_matches(unknown[0], FIELDS, n=1)
        raise ConfigError(
            f"config: unknown field {shown(repr(unknown[0]))}"
            + (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; known are {', '.join(sorted(FIELDS))}"
            )
        )
    told, where = source.fields, str(path)
    if told is None:
        file = source.directory / "config.json"
        if file.exists() or not given:
            told, where = read_fields(file), str(file)
        else:
            told = _from_shapes(source)
    assumed = {name: assumption.value for name, assumption in source.assumed.items()}
    fields = {**assumed, **told, **given}
    for name, other in (("n_ctx", "n_positions"), ("n_positions", "n_ctx")):
        if name in given and other not in given:  # two names of one field
            fields.pop(other, None)
    config = parse_config(fields, where)
    stored = [name for name in source.tensors if not MASK_BUFFER.fullmatch(name)]
    if config.bias and stored and not any(name.endswith(".bias") for name in stored):
        if "bias" in fields:
            raise CheckpointError(
                f"{path}: not one bias is stored, but its config says bias = true"
            )
        why = "not one bias is stored; if the model had some, they were lost"
        source.assumed["bias"] = Assumption(False, why, doubtful=True)
        return dataclasses.replace(config, bias=False)
    return config


def _from_shapes(source: Source) -> dict[str, Any]:
    """What shapes tell of the config: all sizes but the number of heads."""
    why = "there is no config.json; a model of nanoGPT may need 'gelu'"
    source.assumed.setdefault("activation_function", Assumption("gelu_new", why, doubtful=True))
    return sizes(source.tensors)


def _assumptions(source: Source, given: Mapping[str, Any], doubtful: bool = False) -> list[str]:
    """What is taken for granted because neither the checkpoint nor the caller says it."""
    return [
        f"{name} = {value!r} is assumed: {why}"
        for name, (value, why, doubt) in source.assumed.items()
        if name not in {**given, **(source.fields or {})} and doubt >= doubtful
    ]


def _copied(tensor: Tensor) -> Array:
    """A small array: of the mapped file, the pages around it would be in memory with it."""
    array = np.empty(tensor.shape, np.float32)
    for rows, numbers in tensor.pieces(np.float32):
        array[rows] = numbers
    return array


def _narrowed(path: pathlib.Path, name: str, tensor: Tensor, storage: str) -> Stored:
    try:
        return narrowed(name, tensor, storage)
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if str(path) in told else f"{path}: {told}") from None


def _finite(array: Any) -> bool:
    """Whether no element is NaN or infinite: one pass over the memory if none is."""
    if isinstance(array, Bfloat16):  # all bits of the exponent are set in those that are
        return all((rows & 0x7F80).max() < 0x7F80 for rows in _blocks(array.numbers))
    if isinstance(array, Stored):  # integers, and scales that were looked at
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def _blocks(array: Array) -> Iterator[Array]:
    """Some rows at a time, so that what is computed from them is small."""
    return (array[start : start + 1024] for start in range(0, len(array), 1024))
