"""Run a recipe: `accelerate launch recipes/compress.py RECIPE.yaml [--key value …]`."""

from __future__ import annotations

import logging
import os
import sys

from hfslim.distill.teacher import UntrainedTeacherError
from hfslim.manifest import OutputError
from hfslim.pipeline import run
from hfslim.prune import UnreachableTargetError, UnusableScoresError
from hfslim.recipe import RecipeError, load_recipe

MISTAKES = (
    FileNotFoundError,
    OutputError,
    RecipeError,
    UnreachableTargetError,
    UntrainedTeacherError,
    UnusableScoresError,
)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: accelerate launch recipes/compress.py RECIPE.yaml [--key value …]")
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hfslim").setLevel(logging.INFO if first else logging.WARNING)
    try:
        run(load_recipe(sys.argv[1], sys.argv[2:]))
    except MISTAKES as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
