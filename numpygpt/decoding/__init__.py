"""Choosing the next token, again and again."""

from .filters import temperature, top_k
from .generate import Generation, Settings, Step, decode
from .sample import choose, log_probability

__all__ = [
    "Generation",
    "Settings",
    "Step",
    "choose",
    "decode",
    "log_probability",
    "temperature",
    "top_k",
]
