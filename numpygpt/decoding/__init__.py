"""Choosing the next token, again and again."""

from .beam import Beams, beam_search, require_usable
from .generate import Generation, Step, decode, fitted
from .order import ORDERS, History, chain
from .sample import choose, log_probability
from .settings import Options, Settings

__all__ = [
    "ORDERS",
    "Beams",
    "Generation",
    "History",
    "Options",
    "Settings",
    "Step",
    "beam_search",
    "chain",
    "choose",
    "decode",
    "fitted",
    "log_probability",
    "require_usable",
]
