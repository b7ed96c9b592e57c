"""The errors numpygpt raises on purpose.

Each message says what was expected, what was received and, where there is one, what to do about
it. Each class also inherits the built-in exception a caller would guess, so ``except ValueError``
keeps working.

>>> import numpygpt
>>> try:
...     numpygpt.load("shakespear")
... except numpygpt.errors.NumpyGPTError as error:
...     print(error)
unknown model 'shakespear': not a directory or file, not a known name. Did you mean 'shakespeare'?
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CheckpointWarning",
    "ConfigError",
    "ContextError",
    "DumpError",
    "Interrupted",
    "MissingPackageError",
    "ModelNotFoundError",
    "NumpyGPTError",
    "OutputError",
    "TokenError",
    "TokenizerError",
]


class NumpyGPTError(Exception):
    """Base class of every error below."""


class ArgumentError(NumpyGPTError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class CheckpointError(NumpyGPTError, ValueError):
    """A checkpoint file is damaged, incomplete, or not what its config says."""


class ConfigError(CheckpointError):
    """A config asks for something that is not GPT-2 or that numpygpt does not know."""


class DumpError(NumpyGPTError, ValueError):
    """A recording of activations is damaged, incomplete, or cannot be of this model."""


class MissingPackageError(NumpyGPTError, ImportError):
    """An optional package is needed that is not installed, or too old."""


class ModelNotFoundError(NumpyGPTError, FileNotFoundError):
    """No checkpoint is where the caller pointed."""


class OutputError(NumpyGPTError, OSError):
    """Something cannot be written where the caller asked; what was there is as it was."""


class TokenError(NumpyGPTError, ValueError):
    """Token ids are not integers inside the vocabulary."""


class ContextError(NumpyGPTError, ValueError):
    """More tokens than the model has positions for."""


class TokenizerError(NumpyGPTError, ValueError):
    """Vocabulary files are damaged or missing, or text is needed where only ids are possible."""


class CheckpointWarning(UserWarning):
    """A checkpoint loads but holds something its owner should look at, such as NaN weights."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came while results were being made. What was made is kept.

    Not a :class:`NumpyGPTError`: like every ``KeyboardInterrupt`` it passes ``except Exception``.

    Attributes
    ----------
    results : object
        What the call would have returned, as far as it had come.
    """

    def __init__(self, results: Any):
        super().__init__()
        self.results = results
