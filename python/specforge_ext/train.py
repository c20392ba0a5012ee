"""`torchrun -m specforge_ext.train [RECIPE.yaml] [key.sub=value ...]`: from prompts to export.

Without a recipe: the demo (recipes/demo.yaml), which needs no server and no download.
"""

from __future__ import annotations

import os

# Idle OpenMP threads would spin on cores that the producer needs; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys

from specforge_ext.runs.local import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
