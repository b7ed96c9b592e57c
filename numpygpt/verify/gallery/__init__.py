"""Known ways to get GPT-2 wrong, each as a change to the right program.

A mistake exchanges operations of the page, fields of the config, or what is made of the weights.
Some come in several forms, because people make them in several places: the columns of c_attn can
be in a wrong order in the file, or be read in a wrong order. Forms of one mistake share its name.
"""

from __future__ import annotations

from ..operations import Program
from .activations import activations
from .embedding import EMBEDDING
from .heads import HEADS, head_counts
from .mistake import Mistake
from .norms import norms
from .scores import SCORES
from .structure import HEAD, structures
from .weights import WEIGHTS, matrices_narrowed, matrices_to_int8, narrowed

__all__ = ["Mistake", "gallery", "matrices_narrowed", "matrices_to_int8", "narrowed"]


def gallery(program: Program) -> list[Mistake]:
    """Every known mistake that can be made with a model and some tokens.

    Parameters
    ----------
    program : Program
        The right one.

    Returns
    -------
    list of Mistake

    Examples
    --------
    >>> import numpy as np, numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> right = Program(np.array([1, 2]), model.config, model.params)
    >>> print(gallery(right)[0].name)
    exact (erf) GELU instead of gelu_new
    """
    found = [
        *activations(program.config),
        *norms(program.config),
        *SCORES,
        *HEADS,
        *head_counts(program.config),
        *EMBEDDING,
        *structures(),
        *HEAD,
        *WEIGHTS,
    ]
    return [mistake for mistake in found if mistake.when(program)]
