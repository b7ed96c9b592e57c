"""GPT-2 checkpoints: where they are, what is in them, whether they are sound, and writing them.

:func:`find` turns a name into a path, :func:`read` turns a path of any format into a config and
learned arrays, :func:`inspect` says all that :func:`read` would object to, and :func:`save` writes
a model. Nothing in a file is ever executed, and nothing here uses the network.
"""

from .config import parse_config
from .locate import bundled, find
from .reading import Checkpoint, Report, inspect, read
from .saving import save

__all__ = ["Checkpoint", "Report", "bundled", "find", "inspect", "parse_config", "read", "save"]
