"""`torchrun -m specforge_ext.train [RECIPE.yaml] [key.sub=value ...]`: from prompts to export.

Without a recipe: the demo (recipes/demo.yaml), which needs no server and no download.
"""

from __future__ import annotations

import os

# Idle OpenMP threads would spin on cores that the producer needs; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys

from specforge_ext.runs.local import run
from specforge_ext.runs.recipe import load


def main(arguments: list[str] | None = None) -> int:
    """0 when the run finished or was stopped by SIGTERM after saving; 2 on a bad recipe."""
    arguments = sys.argv[1:] if arguments is None else arguments
    recipe = arguments[0] if arguments and "=" not in arguments[0] else None
    try:
        loaded = load(recipe, arguments[1:] if recipe else arguments)
    except ValueError as error:
        print(f"specforge_ext.train: {error}", file=sys.stderr)
        return 2
    run(loaded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
