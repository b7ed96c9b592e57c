#!/usr/bin/env python3
"""Turn a GPT-2 checkpoint of any format into safetensors, .npz, llm.c's .bin or GGUF.

The same as ``numpygpt convert``; ``--help`` lists the options. Needs neither PyTorch nor
TensorFlow.
"""

from __future__ import annotations

import sys

from numpygpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
