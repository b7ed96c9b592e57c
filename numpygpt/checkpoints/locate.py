"""Where a checkpoint is: a path, a bundled model, or a download that is already on this machine."""

from __future__ import annotations

import os
import pathlib

from ..errors import ModelNotFoundError
from .detect import ENDINGS

__all__ = ["bundled", "find", "weights_directory"]

# Short names and the Hugging Face repositories they stand for.
KNOWN = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def weights_directory() -> pathlib.Path:
    """The ``weights`` directory: inside the package when installed, beside it in a checkout."""
    package = pathlib.Path(__file__).resolve().parent.parent
    inside, beside = package / "weights", package.parent / "weights"
    return inside if inside.is_dir() else beside


def bundled() -> list[str]:
    """Names of the models under :func:`weights_directory`."""
    return sorted(path.parent.name for path in weights_directory().glob("*/config.json"))


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """The checkpoint that a user means.

    Parameters
    ----------
    name : str or path
        A directory or file; the name of a bundled model; or a Hugging Face name such as
        ``"gpt2"`` or ``"org/model"`` that an earlier download has left in the local cache.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ModelNotFoundError
        With the nearest names, or the places searched.

    Examples
    --------
    >>> find("shakespeare").name
    'shakespeare'
    """
    text = os.fspath(name)
    if not text:
        raise ModelNotFoundError("the name of the model is empty")
    path = pathlib.Path(text)
    try:
        return _find(text, path)
    except ModelNotFoundError:  # an OSError itself
        raise
    except OSError as error:
        raise ModelNotFoundError(f"{text[:200]}: {error.strerror}") from None


def _find(text: str, path: pathlib.Path) -> pathlib.Path:
    if path.exists() and (text not in {*bundled(), *KNOWN} or _holds_a_model(path)):
        return path
    if text in bundled():
        return weights_directory() / text
    for repository in _repositories(text):
        if snapshot := _cached(repository):
            return snapshot
    if text in KNOWN or (text.count("/") == 1 and not path.parent.is_dir()):
        raise ModelNotFoundError(
            f"{text!r} is not on this machine: not in the Hugging Face cache {_cache_directory()}. "
            f"numpygpt never downloads; put config.json, model.safetensors, vocab.json and "
            f"merges.txt of {KNOWN.get(text, text)} into a directory of yours and name that"
        )
    import difflib

    near = difflib.get_close_matches(text.lower(), [*bundled(), *KNOWN], n=2)
    if not near and path.parent.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()]
        near = [str(path.with_name(n)) for n in difflib.get_close_matches(path.name, siblings, n=2)]
    hint = (
        f"Did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"Bundled models: {', '.join(bundled())}"
    )
    raise ModelNotFoundError(
        f"unknown model {text!r}: not a directory or file, not a known name. {hint}"
    )


def _holds_a_model(path: pathlib.Path) -> bool:
    """Whether a path that has the name of a known model really is one."""
    return path.is_file() or any(
        file.name == "config.json" or file.suffix in (*ENDINGS, ".index") for file in path.iterdir()
    )


def _repositories(name: str) -> list[str]:
    """The names under which a model may have been downloaded: ``gpt2`` still has two."""
    full, short = KNOWN.get(name, name), {repo: text for text, repo in KNOWN.items()}
    return [full, short.get(full, full)]


def _cache_directory() -> pathlib.Path:
    """Where huggingface_hub keeps downloads; its variables are read at each call."""

    def variable(name: str, otherwise: str) -> str:
        return os.path.expanduser(os.path.expandvars(os.environ.get(name) or otherwise))

    cache = variable("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = variable("HF_HOME", os.path.join(cache, "huggingface"))
    return pathlib.Path(variable("HF_HUB_CACHE", os.path.join(home, "hub")))


def _cached(repository: str) -> pathlib.Path | None:
    """The snapshot of a repository that a download left behind; nothing is ever written there."""
    folder = _cache_directory() / f"models--{repository.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / pathlib.PurePath(revision).name
    return snapshot if (snapshot / "config.json").exists() else None
