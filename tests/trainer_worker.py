"""One rank of the trainer's tests: runs the specs of a JSON file one after the other.

A spec: {"name", "output_dir", "config", "total_steps", "layout", "masked_steps", "dropout",
"draft_seed": [of each rank], "poison", "faults": {rank: {step: what}}, "kill_at_publish": step,
"expect": name of an exception}.
Writes <output_dir>/<name>.pt: the whole draft, the moments, the result; <name>.stopped.pt after a
signal; <name>.error<rank> where the expected exception came.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import trainer_toy as toy
from specforge_ext.trainer import checkpoint
from specforge_ext.trainer.distributed import CollectiveError, World, open_world
from specforge_ext.trainer.loop import Trainer, TrainResult
from specforge_ext.trainer.step import NonFiniteError

EXPECTED = (NonFiniteError, CollectiveError, ValueError)


def main(path: str) -> int:
    for spec in json.loads(Path(path).read_text()):
        timeout_s = spec.get("config", {}).get("collective_timeout_s", 60.0)
        with open_world(device="cpu", timeout_s=timeout_s) as world:
            run(spec, world)
    return 0


def run(spec: dict[str, Any], world: World) -> None:
    if "kill_at_publish" in spec:
        kill_at_publish(spec["kill_at_publish"])
    faults = spec.get("faults", {}).get(str(world.rank), {})
    source = toy.ToySource(
        spec["total_steps"],
        spec["layout"],
        world.rank,
        spec.get("masked_steps", ()),
        {int(step): what for step, what in faults.items()},
    )
    draft = toy.make_draft(
        spec.get("draft_seed", [0] * world.size)[world.rank], spec.get("dropout", 0.0)
    )
    method = toy.ToyMethod(poison=spec.get("poison", {}))
    folder = Path(spec["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(
            toy.config(**spec.get("config", {})),
            method,
            draft,
            source,
            output_dir=folder,
            world=world,
        )
        result = trainer.fit()
    except EXPECTED as error:
        if spec.get("expect") != type(error).__name__:
            raise
        (folder / f"{spec['name']}.error{world.rank}").write_text(str(error))
        return
    write(spec["name"], folder, trainer, result, world)


def write(name: str, folder: Path, trainer: Trainer, result: TrainResult, world: World) -> None:
    draft = trainer.full_state_dict()
    moments = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in trainer._optimizer.state().items()
    }
    if world.rank == 0:
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}
        name = f"{name}.stopped" if result.stopped_by_signal else name
        torch.save({"draft": draft, "moments": moments, "result": plain}, folder / f"{name}.pt")


def kill_at_publish(step: int) -> None:
    """Die after everything of a checkpoint is written, before it gets its name."""
    publish = checkpoint.publish

    def killing(partial: Path, final: Path) -> None:
        if final.name == f"step_{step:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(partial, final)

    checkpoint.publish = killing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
