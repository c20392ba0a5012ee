"""One rank: trains every method named on the command line for a few steps, and saves the draft.

method_worker.py FOLDER LAYOUT NAME...        LAYOUT: JSON, see method_cases.Layout
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from method_cases import Source, subject
from specforge_ext.methods import METHODS
from specforge_ext.trainer.distributed import open_world
from specforge_ext.trainer.loop import Trainer
from trainer_toy import config

STEPS = 3


def main(folder: Path, layout: str, names: list[str]) -> None:
    if "toy" in names:
        METHODS.add("toy", "toy_method:ToyMethod")
    with open_world(device="cpu", timeout_s=60) as world:
        for name in names:
            one = subject(name)
            trainer = Trainer(
                config(lr=1e-3),
                one.method,
                one.draft(),
                Source(one, STEPS, json.loads(layout), world.rank),
                output_dir=folder / name,
                world=world,
            )
            trainer.fit()
            draft = trainer.full_state_dict()
            if world.rank == 0:
                torch.save(draft, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
