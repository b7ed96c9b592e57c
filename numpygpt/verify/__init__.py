"""Is it GPT-2? Compare another program's numbers with GPT-2's, operation by operation.

:func:`verify` takes a dump of a program's activations, or its logits alone, and says which
operation differs first by more than rounding allows, which known mistake explains it, and which
greedy decisions are ties. The files: :mod:`.dumps` reads recordings and :mod:`.matching` finds
out what is what in them; :mod:`.operations` is the page cut into operations; :mod:`.bounds` says
how far each may round, in an :mod:`.arithmetic`; :mod:`.comparison` compares; :mod:`.gallery`
holds the known mistakes, and :mod:`.diagnosis` tries them; :mod:`.report` is what comes out, and
:mod:`.reports` shows it.
"""

from .asserting import assert_matches_gpt2
from .dump import Dump, Match
from .dumps import read, write
from .report import Decision, Explanation, Finding, Report
from .verifying import verify, verify_dump

__all__ = [
    "Decision",
    "Dump",
    "Explanation",
    "Finding",
    "Match",
    "Report",
    "assert_matches_gpt2",
    "read",
    "verify",
    "verify_dump",
    "write",
]
