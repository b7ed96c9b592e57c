"""A result for people and for machines: text, JSON, JUnit XML, HTML.

What is said stands in :mod:`.words` and :mod:`.groups`; the others say how it is laid out. Names
of arrays come from files that nobody has checked, so all of them pass through
:func:`~.words.clean` and the escaping of their format.
"""

from .html import as_html
from .json_report import as_json
from .junit import as_junit
from .text import as_text
from .words import Unusable

__all__ = ["Unusable", "as_html", "as_json", "as_junit", "as_text"]
