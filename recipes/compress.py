"""Run a recipe: `accelerate launch recipes/compress.py RECIPE.yaml [--key value …]`.

It is `hfslim run` as a script, which `accelerate launch` starts once for each process.
"""

from __future__ import annotations

import sys

from hfslim.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
