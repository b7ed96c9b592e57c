"""llm.c's checkpoints: a header of 256 integers, then every array, stacked by kind over layers.

The order is: token and position tables; then the gains of all first layer norms, their shifts,
all c_attn matrices, and so on; then the final norm. Matrices are (out, in), as ``nn.Linear`` has
them. The token table is filled up with rows of zeros to a multiple of 128, for the sake of GPUs.

The header tells sizes only. What it leaves out is fixed by llm.c's source: the tanh GELU, an
epsilon of 1e-5, an MLP of 4 C, every bias, and the token table as head.

======= ================================================================== ================
version arrays                                                             here
======= ================================================================== ================
1       float32, the token table not filled up                             read
2       float32, all layer norms at the end                                refused
3       bfloat16 with float32 norms at the end, no table rows in the header refused
3       float32                                                            read and written
5       bfloat16                                                           read and written
======= ================================================================== ================

Versions 2 and the first 3 are steps between 1 and today's format that were soon replaced.

References
----------
karpathy/llm.c: train_gpt2.py, functions write_model, write_tensors, write_state and pad_vocab;
train_gpt2.c, function gpt2_build_from_checkpoint; test_gpt2.c.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..ops import ACTIVATIONS
from ..params import Array, Config, check, shapes
from .arrays import FLOATS, DataFile, Sink, Tensor, write_array
from .names import LINEAR
from .source import AS_OPENAI, Source

__all__ = ["DebugState", "read", "read_debug_state", "write"]

MODEL, STATE = 20240326, 20240327
HEADER_BYTES = 256 * 4

KINDS = {1: "F32", 3: "F32", 5: "BF16"}
VERSIONS = {"F32": 3, "BF16": 5}

# The token table is filled up to a multiple of this.
PADDING = 128

# The largest GPT-2 has 48 layers. A file of 100 MB has room for a million layers of width 1, but
# their descriptions would take gigabytes.
MOST_LAYERS = 1000

# The arrays of a block, in the order in which they are stacked.
STACKED = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
    "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


class DebugState(NamedTuple):
    """What llm.c's PyTorch twin computed for one batch, to test an implementation against.

    ``x`` and ``y`` are (B, T) token ids and targets; ``logits`` is (B, T, V); ``loss`` the mean
    cross-entropy in nats, and ``grads`` its gradient by the names and in the orientation of the
    Hugging Face layout.
    """

    x: Array
    y: Array
    logits: Array
    loss: float
    grads: dict[str, Array]


def read(path: pathlib.Path) -> Source:
    """Describe a checkpoint that llm.c or its ``train_gpt2.py`` wrote.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Source

    Raises
    ------
    CheckpointError
        If the header is none of a model, or its sizes do not account for every byte of the file.
    """
    file = DataFile(path)
    header = _header(file, MODEL)
    kind, stored, vocab_size = _described(path, header)
    _check_size(file, _count(stored), kind)
    tensors = dict(_tensors(file, kind, HEADER_BYTES, stored, vocab_size))
    fields = {
        "vocab_size": vocab_size,
        "n_positions": stored.n_ctx,
        "n_embd": stored.n_embd,
        "n_layer": stored.n_layer,
        "n_head": stored.n_head,
        **AS_OPENAI,
    }
    notes = ["matrices stored (out, in), as nn.Linear has them: transposed"]
    if surplus := stored.vocab_size - vocab_size:
        notes.append(f"the last {surplus} of {stored.vocab_size} rows of wte only fill up: cut off")
    return Source("llm.c", path.parent, tensors, fields, notes=notes)


def read_debug_state(path: pathlib.Path, config: Config) -> DebugState:
    """Read a ``gpt2_124M_debug_state.bin`` or a file like it.

    Parameters
    ----------
    path : pathlib.Path
    config : Config
        Of the model it belongs to; the file itself holds only B and T.

    Returns
    -------
    DebugState
        Its arrays are views of the file where that is possible.

    Raises
    ------
    CheckpointError
        If it is damaged, or belongs to a model of another size.
    """
    if misfit := _misfit(config):
        raise CheckpointError(f"{path}: it cannot belong to this model: {misfit}")
    file = DataFile(path)
    _, version, batch, length, *rest = _header(file, STATE)
    if version not in (1, 2) or any(rest):
        raise CheckpointError(
            f"{path}: a debug state of version {version}, expected 1 or 2; write it again with "
            f"llm.c's train_gpt2.py"
        )
    if batch < 1 or not 1 <= length <= config.n_ctx:
        raise CheckpointError(
            f"{path}: expected B from 1 and T from 1 to n_positions = {config.n_ctx}, received "
            f"B = {batch} and T = {length}"
        )
    vocab_size, pairs = config.vocab_size, batch * length
    rows = vocab_size if version == 1 else _padded(vocab_size)
    stored = dataclasses.replace(config, vocab_size=rows, bias=True)
    _check_size(file, 2 * pairs + pairs * vocab_size + 1 + _count(stored), "F32")
    logits_at = HEADER_BYTES + 4 * 2 * pairs
    loss_at = logits_at + 4 * pairs * vocab_size
    ids = np.frombuffer(file.map, "<i4", 2 * pairs, HEADER_BYTES).reshape(2, batch, length)
    for what, found, least in (("x", ids[0], 0), ("y", ids[1], -1)):  # PyTorch ignores a target -1
        if found.min() < least or found.max() >= vocab_size:
            raise CheckpointError(
                f"{path}: {what} holds {found.min()} to {found.max()}, expected token ids from "
                f"{least} to {vocab_size - 1}"
            )
    grads = _tensors(file, "F32", loss_at + 4, stored, vocab_size)
    return DebugState(
        ids[0],
        ids[1],
        file.tensor("F32", logits_at, (batch, length, vocab_size)).read(np.float32),
        float(file.tensor("F32", loss_at, ()).read(np.float32)),
        {name: tensor.read(np.float32) for name, tensor in grads},
    )


def write(
    file: Sink,
    config: Config,
    tensors: Mapping[str, Tensor],
    kind: str,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a checkpoint for llm.c.

    Parameters
    ----------
    file : binary file
        Empty.
    config : Config
    tensors : mapping of str to Tensor
        By their names in the Hugging Face layout; the head is left out, since it is tied. Without
        biases zeros are written for them.
    kind : str
        ``"F32"`` (version 3) or ``"BF16"`` (version 5).
    advance : callable
        Told how many bytes of `tensors` were written; filling is not counted.

    Raises
    ------
    CheckpointError
        If llm.c would compute something else from the file than the config asks for, or a
        number is too large for `kind`.

    Examples
    --------
    >>> import io
    >>> from numpygpt.checkpoints import find
    >>> from numpygpt.checkpoints.config import read_config
    >>> from numpygpt.checkpoints.detect import open_source
    >>> directory, file = find("shakespeare"), io.BytesIO()
    >>> write(file, read_config(directory / "config.json"), open_source(directory).tensors, "BF16")
    >>> np.frombuffer(file.getbuffer()[:32], "<i4").tolist()
    [20240326, 5, 256, 3072, 4, 4, 256, 3072]
    """
    if kind not in VERSIONS:
        raise CheckpointError(f"llm.c stores {' or '.join(VERSIONS)}, not {kind}")
    if misfit := _misfit(config):
        raise CheckpointError(f"{misfit}; use another format, such as safetensors")
    stored = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    check(config, {name: tensor.shape for name, tensor in stored.items()})
    rows = _padded(config.vocab_size)
    header = np.zeros(256, "<i4")
    header[:8] = (
        MODEL, VERSIONS[kind], config.n_ctx, config.vocab_size,
        config.n_layer, config.n_head, config.n_embd, rows,
    )  # fmt: skip
    file.write(header.tobytes())
    item = FLOATS[kind].itemsize
    everything = shapes(dataclasses.replace(config, bias=True))
    for name in _order(config.n_layer):
        if name not in stored:  # a model without biases
            file.write(bytes(item * math.prod(everything[name][0])))
            continue
        tensor = stored[name].transposed() if LINEAR.fullmatch(name) else stored[name]
        write_array(file, tensor.read(tensor.exact), kind, advance, name)
        if name == "wte.weight":
            file.write(bytes(item * config.n_embd * (rows - config.vocab_size)))


def _header(file: DataFile, magic: int) -> list[int]:
    """The 256 integers at the start of a file of the kind that `magic` stands for."""
    if file.size < HEADER_BYTES:
        raise CheckpointError(
            f"{file.path}: {file.size} bytes, expected at least {HEADER_BYTES}, llm.c's header"
        )
    header: list[int] = np.frombuffer(file.map, "<i4", 256).tolist()
    if header[0] == magic:
        return header
    found = {
        MODEL: "an llm.c model, which numpygpt.load reads",
        STATE: "an llm.c debug state (inputs, logits, gradients), not a model; read it with "
        "numpygpt.checkpoints.llmc.read_debug_state",
    }.get(header[0], f"not of llm.c: it begins with {header[0]}, expected {magic}")
    raise CheckpointError(f"{file.path}: {found}")


def _described(path: pathlib.Path, header: list[int]) -> tuple[str, Config, int]:
    """The stored type, the config of what is stored, and the rows of wte that are tokens."""
    _, version, n_ctx, vocab_size, n_layer, n_head, n_embd, rows, *rest = header
    if version == 1 and rows == 0:
        rows = vocab_size
    if version not in KINDS or (version == 3 and rows == 0):
        raise CheckpointError(
            f"{path}: version {version}{' without padded size' * (version == 3)} of llm.c's "
            f"format, expected {', '.join(map(str, KINDS))}; write it again with a newer "
            f"train_gpt2.py"
        )
    if any(rest):
        raise CheckpointError(
            f"{path}: header numbers 8 to 255 should be 0, received "
            f"{next(number for number in rest if number)}; made by a variant of llm.c?"
        )
    sizes = {
        "n_positions": n_ctx, "vocab_size": vocab_size, "n_layer": n_layer,
        "n_head": n_head, "n_embd": n_embd, "padded vocab_size": rows,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise CheckpointError(f"{path}: expected a positive {name}, received {size}")
    if n_layer > MOST_LAYERS:
        raise CheckpointError(f"{path}: {n_layer} layers, expected at most {MOST_LAYERS}")
    if n_embd % n_head:
        raise CheckpointError(f"{path}: n_embd = {n_embd} is not a multiple of n_head = {n_head}")
    if rows < vocab_size or (version == 1 and rows != vocab_size):
        raise CheckpointError(
            f"{path}: a token table of {rows} rows does not fit a vocabulary of {vocab_size}"
        )
    stored = Config(
        vocab_size=rows, n_ctx=n_ctx, n_embd=n_embd, n_layer=n_layer, n_head=n_head, **AS_OPENAI
    )
    return KINDS[version], stored, vocab_size


def _misfit(config: Config) -> str:
    """What llm.c would compute otherwise than `config` asks for, if there is anything."""
    for name, value in AS_OPENAI.items():
        asked = getattr(config, name)
        if name == "activation_function" and ACTIVATIONS[asked] is ACTIVATIONS[value]:
            continue  # another name of the same function
        if name == "layer_norm_epsilon":  # a float32 in llm.c, and in files that it may come from
            asked, value = np.float32(asked).item(), np.float32(value).item()
        if asked != value:
            return f"{name} = {getattr(config, name)!r}, but llm.c has {AS_OPENAI[name]!r} only"
    if config.mlp_dim != 4 * config.n_embd:
        return f"n_inner = {config.n_inner}, but llm.c has 4 n_embd = {4 * config.n_embd} only"
    return ""


def _check_size(file: DataFile, count: int, kind: str) -> None:
    """Refuse a file that has not exactly `count` numbers after its header."""
    expected = HEADER_BYTES + count * FLOATS[kind].itemsize
    if file.size != expected:
        what = "truncated" if file.size < expected else "data that belongs to no array"
        raise CheckpointError(
            f"{file.path}: expected {expected} bytes for the sizes in its header and config, "
            f"received {file.size}: {what}, or of another model"
        )


def _count(config: Config) -> int:
    """How many numbers the arrays of a model have, without a loop over its layers."""
    width = config.n_embd
    block = 12 * width**2 + 13 * width
    return (config.vocab_size + config.n_ctx + 2) * width + config.n_layer * block


def _padded(rows: int) -> int:
    return -(-rows // PADDING) * PADDING


def _order(n_layer: int) -> Iterator[str]:
    """The names of all arrays, in the order of the file."""
    yield from ("wte.weight", "wpe.weight")
    for kind in STACKED:
        yield from (f"h.{layer}.{kind}" for layer in range(n_layer))
    yield from ("ln_f.weight", "ln_f.bias")


def _tensors(
    file: DataFile, kind: str, at: int, stored: Config, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and arrays from byte `at` on, matrices turned to (in, out) and wte cut."""
    expected = shapes(stored)
    for name in _order(stored.n_layer):
        shape, _ = expected[name]
        turned = LINEAR.fullmatch(name)
        tensor = file.tensor(kind, at, shape[::-1] if turned else shape)
        at += tensor.nbytes
        if turned:
            tensor = tensor.transposed()
        yield name, tensor.rows(vocab_size) if name == "wte.weight" else tensor
