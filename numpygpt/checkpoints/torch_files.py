"""What torch.save writes: its zip format, its older format, and the checkpoints made with them.

Hugging Face's ``pytorch_model.bin``, nanoGPT's ``ckpt.pt`` and minGPT's ``model.pt`` are one
pickle that describes tensors, and blocks of numbers beside it. :mod:`.pickles` follows the pickle
without executing anything.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..params import Array, listing, shown
from .archives import StoredZip
from .arrays import FLOATS, DataFile, Tensor
from .names import MASK_BUFFER, canonical, sizes
from .pickles import ITEM_BYTES, Budget, Record, StoredTensor, Stream, interpret
from .source import Assumption, Source

__all__ = ["TorchFile", "read"]

# torch.save before version 1.6: five pickles, the first two are these numbers.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

# Where a training program keeps the weights beside its other state.
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")

# Heads of the sizes that minGPT names, by layers and width.
MINGPT_HEADS = {
    (3, 48): 3, (4, 128): 4, (6, 192): 6, (8, 512): 16,
    (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25,
}  # fmt: skip

NANOGPT_GELU = (
    "nanoGPT does not record it, and has the exact GELU since June 2023; a model trained before, "
    "or with OpenAI's weights as they are, needs 'gelu_new'"
)


class TorchFile:
    """A file that torch.save wrote.

    Parameters
    ----------
    path : pathlib.Path

    Attributes
    ----------
    path : pathlib.Path
    format : str
        ``"PyTorch (zip)"`` or ``"PyTorch (legacy)"``.
    names : list of str
        The globals that its pickle asks for, none of which was imported.
    top : object
        What was saved, with :class:`~.pickles.StoredTensor` for tensors.

    Raises
    ------
    CheckpointError
        If it is damaged, or asks for code to be run.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.names: list[str] = []
        # By what describes them, as text: tuples of numbers can be made to have the same hash.
        self._tensors: dict[str, Tensor] = {}
        # Storage key -> first byte, and bytes.
        self._blocks: dict[str, tuple[int, int]] = {}
        with path.open("rb") as file:
            self._zipped = file.read(4) == b"PK\3\4"
        self.format = "PyTorch (zip)" if self._zipped else "PyTorch (legacy)"
        (self._open_zip if self._zipped else self._open_legacy)()

    def tensors(self) -> dict[str, Tensor]:
        """The weights: a state dict that was saved alone, or beside other state.

        Raises
        ------
        CheckpointError
            If there is none.
        """
        state = self._state_dict()
        used: dict[str, dict[str, int]] = {}
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise CheckpointError(
                    f"{self.path}: {shown(name)!r} among the weights is no tensor but a "
                    f"{type(value).__name__}"
                )
            size = math.prod(value.shape) * ITEM_BYTES[value.storage.kind]
            used.setdefault(value.storage.key, {})[str(value)] = size
        # Tied weights are the same tensor twice. Different ones that share numbers would let a
        # small file become a large model.
        for key, views in used.items():
            room = self._blocks[key][1] if key in self._blocks else 0
            if sum(views.values()) > room:
                raise CheckpointError(
                    f"{self.path}: storage {shown(key)!r} has {room} bytes, fewer than the tensors "
                    f"in it: truncated, or tensors that overlap"
                )
        return {name: self._tensor(name, value) for name, value in state.items()}

    def _state_dict(self) -> Mapping[Any, Any]:
        top = self.top
        if isinstance(top, Mapping):
            for key in STATE_KEYS:
                inner = top.get(key)
                if isinstance(inner, Mapping):
                    if "language_model" in inner:
                        raise CheckpointError(
                            f"{self.path}: Megatron-LM's layout, which numpygpt does not read; "
                            f"convert it with transformers' Megatron converter"
                        )
                    if any(isinstance(value, StoredTensor) for value in inner.values()):
                        return inner
            if any(isinstance(value, StoredTensor) for value in top.values()):
                return top
            keys = listing([str(key) for key in top])
            raise CheckpointError(f"{self.path}: no weights in it, only {keys or 'an empty dict'}")
        raise CheckpointError(
            f"{self.path}: holds a {type(top).__name__}, expected a state dict of tensors"
        )

    def _tensor(self, name: str, stored: StoredTensor) -> Tensor:
        """The description of one tensor, the same one for tied weights."""
        described = str(stored)
        if described in self._tensors:
            return self._tensors[described]
        storage, size = stored.storage, ITEM_BYTES[stored.storage.kind]
        last = sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
        if 0 not in stored.shape and stored.offset + last >= storage.length:
            raise CheckpointError(f"{self.path}: {shown(name)!r} reaches beyond its storage")
        begin, room = self._blocks.get(storage.key, (0, -1))
        needed = (storage.first + storage.length) * size
        # In legacy files a storage may be a part of a block.
        if needed > room or (needed < room and self._zipped):
            raise CheckpointError(
                f"{self.path}: storage {shown(storage.key)!r} of {shown(name)!r} has "
                f"{max(room, 0)} bytes, expected {storage.length} elements of {size}"
            )
        start = begin + (storage.first + stored.offset) * size
        strides = None if _is_c_order(stored) else stored.strides
        if storage.kind in FLOATS:
            tensor = self._file.tensor(storage.kind, start, stored.shape, strides)
        else:
            nbytes = math.prod(stored.shape) * size
            load = functools.partial(self._no_floats, name, storage.kind)
            tensor = Tensor(storage.kind, stored.shape, nbytes, load)
        self._tensors[described] = tensor
        return tensor

    def _no_floats(self, name: str, kind: str, dtype: np.dtype[Any]) -> Array:
        raise CheckpointError(f"{self.path}: {name} is {kind}; expected one of {', '.join(FLOATS)}")

    def _open_zip(self) -> None:
        archive = StoredZip(self.path)
        self._file = archive.file
        tops = [name for name in archive.names if name.rpartition("/")[2] == "data.pkl"]
        if len(tops) != 1:
            raise CheckpointError(
                f"{self.path}: a zip archive with {len(tops)} data.pkl, expected one: not written "
                f"by torch.save"
            )
        root = tops[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in archive.names:
            raise CheckpointError(
                f"{self.path}: a TorchScript archive, which holds code; save its state_dict with "
                f"torch.save"
            )
        archive.require_stored()
        order = f"{root}byteorder"
        if order in archive.members and archive.read(order, 64) != b"little":
            raise CheckpointError(f"{self.path}: written on a big-endian machine")
        for name, member in archive.members.items():
            if name.startswith(f"{root}data/"):
                self._blocks[name.removeprefix(f"{root}data/")] = member
        start, size = archive.members[tops[0]]
        stream = Stream(self._file.map, start, start + size)
        self.top, self.names = interpret(stream, self.path)
        if stream.tell() != start + size:
            raise CheckpointError(f"{self.path}: bytes behind its pickle that belong to nothing")

    def _open_legacy(self) -> None:
        self._file = DataFile(self.path)
        stream = Stream(self._file.map, 0, self._file.size)
        budget = Budget()

        def pickled() -> Any:
            nonlocal stream
            value, names = interpret(stream, self.path, budget)
            stream = Stream(self._file.map, stream.tell(), self._file.size)
            self.names = list(dict.fromkeys([*self.names, *names]))
            return value

        if pickled() != LEGACY_MAGIC or pickled() != LEGACY_VERSION:
            raise CheckpointError(f"{self.path}: a pickle, but not one of torch.save")
        machine = pickled()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise CheckpointError(f"{self.path}: not written on a little-endian machine")
        self.top = pickled()
        keys = pickled()
        kinds = budget.storages
        position = stream.tell()
        for key in keys if isinstance(keys, list) else [None]:
            count = int.from_bytes(self._file.map[position : position + 8], "little")
            if not isinstance(key, str) or key in self._blocks or key not in kinds:
                raise CheckpointError(f"{self.path}: its list of storages is damaged")
            size = count * ITEM_BYTES[kinds[key]]
            if position + 8 + size > self._file.size:
                raise CheckpointError(
                    f"{self.path}: storage {shown(key)!r} ends at byte {position + 8 + size}, the "
                    f"file at byte {self._file.size}: truncated"
                )
            self._blocks[key] = (position + 8, size)
            position += 8 + size
        if position != self._file.size:
            raise CheckpointError(
                f"{self.path}: its storages end at byte {position}, the file at byte "
                f"{self._file.size}: data that belongs to no tensor"
            )


def read(path: pathlib.Path) -> Source:
    """Describe a checkpoint that torch.save wrote.

    Parameters
    ----------
    path : pathlib.Path

    Returns
    -------
    Source

    Raises
    ------
    CheckpointError
        As :class:`TorchFile` does.
    """
    file = TorchFile(path)
    stored = file.tensors()
    tensors, notes = canonical(stored, path)
    turned = bool(notes)
    source = Source(file.format, path.parent, tensors, notes=notes)
    source.notes.append(f"its pickle names {', '.join(file.names)}; none was imported or called")
    top = file.top if isinstance(file.top, Mapping) else {}
    arguments, config = top.get("model_args"), top.get("config")
    if isinstance(arguments, Mapping):
        _nanogpt(path, source, arguments, Assumption("gelu", NANOGPT_GELU, doubtful=True))
    elif isinstance(config, Record) and config.name == "GPTConfig":
        why = (
            "checkpoints with a GPTConfig object come from build-nanogpt, which has the tanh GELU; "
            "from another descendant of nanoGPT it may be 'gelu'"
        )
        _nanogpt(path, source, config.fields, Assumption("gelu_new", why, doubtful=True))
    elif turned and not (path.parent / "config.json").exists():
        _mingpt(source, old=any(key.endswith("tok_emb.weight") for key in stored))
    return source


def _nanogpt(
    path: pathlib.Path, source: Source, arguments: Mapping[Any, Any], gelu: Assumption
) -> None:
    """The config that nanoGPT and its descendants save beside the weights."""
    fields = {str(name): value for name, value in arguments.items()}
    for name, value in fields.items():
        if not isinstance(value, int | float | str | None):
            raise CheckpointError(
                f"{path}: {shown(name)} of its config is a {type(value).__name__}"
            )
    fields.pop("dropout", None)
    if "block_size" in fields:
        fields["n_positions"] = fields.pop("block_size")
    source.format = f"nanoGPT, {source.format}"
    source.fields = fields
    source.assumed["activation_function"] = gelu


def _mingpt(source: Source, old: bool) -> None:
    """The config of minGPT, which saves none: shapes tell most of it, and its code the rest."""
    fields = sizes(source.tensors)
    source.fields = fields
    masks = any(MASK_BUFFER.fullmatch(name) for name in source.tensors)
    if fields["tie_word_embeddings"] or not masks:  # minGPT has a head of its own, and masks
        source.format = f"nanoGPT weights, {source.format}"
        gelu = Assumption("gelu", NANOGPT_GELU, doubtful=True)
    else:
        source.format = f"minGPT{' before 2022' if old else ''}, {source.format}"
        gelu = Assumption("gelu" if old else "gelu_new", "what minGPT's code has")
    source.assumed["activation_function"] = gelu
    heads = MINGPT_HEADS.get((fields.get("n_layer", 0), fields.get("n_embd", 0)))
    if heads is not None:
        why = "the file does not say it; minGPT's model of this size has so many"
        source.assumed["n_head"] = Assumption(heads, why, doubtful=True)


def _is_c_order(stored: StoredTensor) -> bool:
    """Whether the numbers lie as NumPy would lay them by itself."""
    step = 1
    for size, stride in zip(stored.shape[::-1], stored.strides[::-1], strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
