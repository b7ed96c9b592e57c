"""GPT-2 in NumPy: forward pass only, no deep-learning framework.

>>> import numpygpt
>>> model = numpygpt.load("shakespeare")
>>> model.generate("ROMEO:", max_new_tokens=8, stop_ids=()).finish_reason
'length'

Start with :func:`load`; read :mod:`numpygpt.model`, which is GPT-2 from top to bottom.
"""

from . import errors
from .api import Model
from .cache import Cache
from .decoding import Generation, Settings
from .divergence import Divergence
from .loading import load
from .params import Config, Params
from .scoring import Score
from .threads import get_threads, set_threads

__all__ = [
    "Cache",
    "Config",
    "Divergence",
    "Generation",
    "Model",
    "Params",
    "Score",
    "Settings",
    "__version__",
    "errors",
    "get_threads",
    "load",
    "set_threads",
]

__version__ = "0.1.0"
