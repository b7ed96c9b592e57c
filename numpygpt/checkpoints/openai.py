"""The checkpoints that OpenAI released, and what fine-tuning tools made of them.

A directory holds ``hparams.json``, ``encoder.json``, ``vocab.bpe`` and a TensorFlow checkpoint
called ``model.ckpt``. Its variables are ``model/wte``, ``model/h0/attn/c_attn/w`` and so on.
Matrices are (1, in, out), because OpenAI computed linear maps as convolutions of width one.

References
----------
openai/gpt-2, src/model.py (names, shapes, and what no file says) and download_model.py (files).
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from ..errors import CheckpointError, ConfigError
from ..params import listing
from .arrays import Tensor
from .json_files import parse_json, read_small
from .names import sizes
from .source import AS_OPENAI, Source
from .tensor_bundle import read_bundle

__all__ = ["read"]

# The keys of hparams.json, in the words of config.json.
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
# Keys that forks added for training.
HARMLESS = {"attn_dropout", "embd_dropout", "res_dropout"}

TABLE = re.compile(r"wte|wpe")
NORM = re.compile(r"(h(?:0|[1-9][0-9]*)/ln_[12]|ln_f)/([gb])")
LINEAR = re.compile(r"(h(?:0|[1-9][0-9]*)/(?:attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj))/([wb])")

# The last part of the names that TensorFlow's optimisers, and BERT's, give to what they keep for
# each variable and for the training as a whole.
TRAINING = re.compile(
    r"(Adam|Adadelta|Adagrad|Ftrl|Momentum|RMSProp|beta[12]_power)(_[0-9]+)?"
    r"|adam_[mv]|global_step"
)


def read(path: pathlib.Path) -> Source:
    """Describe a checkpoint in OpenAI's layout.

    Sizes that ``hparams.json`` does not tell, or all of them if there is no such file, are taken
    from the arrays. The number of heads is then the caller's to give.

    Parameters
    ----------
    path : pathlib.Path
        Its ``model.ckpt.index``.

    Returns
    -------
    Source

    Raises
    ------
    CheckpointError
        If a file is damaged, or the checkpoint is of another program.
    ModelNotFoundError
        If a file of data is missing.
    """
    tensors, notes = _canonical(read_bundle(path), path)
    told = _hparams(path.with_name("hparams.json"))
    if told is None:
        notes.append("no hparams.json: sizes are those of the arrays")
    fields = {**sizes(tensors), **AS_OPENAI, **(told or {})}
    return Source("OpenAI TensorFlow", path.parent, tensors, fields, notes=notes)


def _canonical(
    stored: Mapping[str, Tensor], path: pathlib.Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The arrays in the one layout, and what was done to them."""
    left_out = [name for name in stored if TRAINING.fullmatch(name.rpartition("/")[2])]
    used = dict(stored)
    for name in left_out:
        del used[name]
    prefix = _prefix(list(used), path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in used.items():
        own = name.removeprefix(prefix)
        ours = _renamed(own)
        if ours in tensors:
            raise CheckpointError(f"{path}: {ours} stands in it twice, once as {name}")
        if LINEAR.fullmatch(own) and len(tensor.shape) == 3 and tensor.shape[0] == 1:
            tensor = tensor.reshaped(*tensor.shape[1:])
        tensors[ours] = tensor
    notes = []
    if left_out:
        notes.append(f"{len(left_out)} variables of the training left out: {listing(left_out)}")
    return tensors, notes


def _prefix(names: list[str], path: pathlib.Path) -> str:
    """What stands before ``wte`` and, in OpenAI's code, before every name: ``model/``."""
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in names:
        raise CheckpointError(
            f"{path}: saved with tf.train.Checkpoint or Keras, expected OpenAI's names of "
            f"variables; save it with tf.compat.v1.train.Saver, or in another format"
        )
    prefixes = [name[:-3] for name in names if name == "wte" or name.endswith("/wte")]
    if len(prefixes) != 1:
        found = f"found {listing(names)}" if names else "but it is empty"
        if prefixes:
            found = f"found {len(prefixes)}: {listing([p + 'wte' for p in prefixes])}"
        raise CheckpointError(
            f"{path}: expected one token table called model/wte, as in OpenAI's GPT-2, {found}"
        )
    return prefixes[0]


def _renamed(name: str) -> str:
    """The one layout's name; an unknown one stays, for the check to refuse it.

    >>> _renamed("h11/mlp/c_fc/b"), _renamed("ln_f/g"), _renamed("wpe"), _renamed("h11/mlp/w")
    ('h.11.mlp.c_fc.bias', 'ln_f.weight', 'wpe.weight', 'h11/mlp/w')
    """
    if TABLE.fullmatch(name):
        return f"{name}.weight"
    if match := NORM.fullmatch(name) or LINEAR.fullmatch(name):
        place = match[1].replace("/", ".")
        if place.startswith("h"):
            place = f"h.{place[1:]}"
        return f"{place}.{'bias' if match[2] == 'b' else 'weight'}"
    return name


def _hparams(file: pathlib.Path) -> dict[str, int] | None:
    """The sizes in ``hparams.json``, in the words of config.json; None without such a file."""
    try:
        given = parse_json(read_small(file), str(file))
    except FileNotFoundError:
        return None
    if unknown := sorted(given.keys() - HPARAMS.keys() - HARMLESS):
        raise ConfigError(
            f"{file}: unknown key {unknown[0][:80]!r}; numpygpt refuses what it does not know, "
            f"because it may change the model"
        )
    told = {}
    for key, ours in HPARAMS.items():
        if key in given:
            value = given[key]
            if type(value) is not int or not 0 < value < 2**31:
                shown = str(value)[:40] if isinstance(value, int | float | str) else type(value)
                raise ConfigError(f"{file}: {key} must be a positive integer, not {shown}")
            told[ours] = value
    return told
