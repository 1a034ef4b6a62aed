"""`python -m qformer_jax`: the command `qformer`."""

import sys
from pathlib import Path

# `python -m` looks for modules in the working folder first, where somebody's file could stand in for a library.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from .cli import main

if __name__ == '__main__':
    main()
