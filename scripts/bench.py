"""Measure numpygpt on this machine: ``numpygpt bench``, from a checkout.

Random weights in the shape of GPT-2's smallest, or beside other libraries:

    python scripts/bench.py
    python scripts/bench.py --peers all --markdown results.md

``--help`` says what else there is.
"""

from __future__ import annotations

import sys

from numpygpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
