"""Do our drafts decode as well as SpecForge's? Both trained side by side, then decoded alike.

    python benchmarks/acceptance.py [--methods eagle3 dflash] [--seeds 0 1] [--quick] [--json FILE]

(after `make peers`). Per method and seed, the recipe `demo` or `demo-dflash`: the target's features
are captured once; every side starts from the same weights and sees the same samples in the same
order, for as many steps, with the same settings of AdamW, clipping and schedule. The steps are made
in turns. SpecForge runs its own model, loss, padding and optimizer, in float32 on the CPU. What it
trained comes back through our converter, and one evaluator decodes with all drafts.

`specforge` and `specforge_ext` have the same loss (DFlash: with the anchors that ours draws), which
is compared at every step. `specforge_ext/recipe` divides EAGLE-3's loss as the recipe says, by
scored rows. With --controls SpecForge is trained again beside itself: `specforge/nudged` from
weights changed in their last place, `specforge/own-anchors` with the anchors that it draws.

Intervals are 95 %, bootstrap over prompts; those of ratios take the same prompts for both. Ends
with 1 if ours is worse beyond its interval.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from acceptance_compare import compare, length_of, loss_gap
from acceptance_sides import CONTROLS, SIDES, Batch, Setting, Side
from common import commit, machine
from fp8_runs import Shared, share
from specforge_ext.evaluate import EvalResult, evaluate, summarise
from specforge_ext.loader import global_steps
from specforge_ext.loader.order import micro_batches
from specforge_ext.loader.stream import pack
from specforge_ext.runs.recipe import Recipe, load
from specforge_ext.trainer import StepData, World, open_world

RECIPES = {"eagle3": "demo", "dflash": "demo-dflash"}
BASELINE = "specforge"
OURS = "specforge_ext"
UNTRAINED = "untrained"
CUTS = (
    "engine.device=cpu",
    "trainer.tensorboard=false",
    "trainer.checkpoint.every_steps=1000000",
    "trainer.checkpoint.keep_best=false",
)
QUICK = (
    "data.train.num_prompts=40",
    "data.heldout.num_prompts=8",
    "data.generate.max_new_tokens=48",
    "order.epochs=2",
    "evaluate.num_prompts=8",
    "evaluate.max_new_tokens=24",
)
START_TOLERANCE = 1e-5
"""Of the first loss, relative: more is another start or another batch."""
TIMEOUT_S = 60.0


@dataclass
class Trained:
    """One side's training. losses, cpu_s, wall_s: of each step."""

    is_twin: bool
    losses: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    @property
    def last_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return statistics.mean(self.losses[-max(1, len(self.losses) // 10) :])


Decoded = dict[tuple[str, float], list[EvalResult]]
"""By side and temperature: a run for every seed."""


def make_batches(shared: Shared, recipe: Recipe) -> list[Batch]:
    """Every step of the recipe on one rank."""
    prompts = shared.dataset.train
    batches: list[Batch] = []
    for step in global_steps(prompts.lengths, recipe.order, seed=recipe.run.seed):
        (part,) = micro_batches(step, prompts.lengths, recipe.order, rank=0, world_size=1)
        samples = tuple(shared.samples[prompts[i].sample_id] for i in part)
        packed = pack(samples, shared.layout)
        data = StepData(step.step, (packed,), 0.0, len(samples), packed.num_tokens)
        batches.append(Batch(data, samples))
    return batches


def train(sides: Sequence[Side], batches: Sequence[Batch]) -> dict[str, Trained]:
    """All sides, in turns. RuntimeError if the twins' first losses differ."""
    done = {side.name: Trained(side.is_twin) for side in sides}
    for number, batch in enumerate(batches):
        for side in sides:
            step = side.prepare(batch)
            gc.collect(0)
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            mine = done[side.name]
            mine.cpu_s.append(time.process_time() - cpu)
            mine.wall_s.append(time.perf_counter() - wall)
            mine.losses.append(loss)
        if number == 0:
            check_start(done)
    return done


def check_start(done: Mapping[str, Trained]) -> None:
    for name, mine in done.items():
        gap = loss_gap(done[BASELINE].losses, mine.losses).first
        if mine.is_twin and not gap <= START_TOLERANCE:
            raise RuntimeError(
                f"first loss of {name}: wanted {BASELINE}'s {done[BASELINE].losses[0]:.7g} within "
                f"{START_TOLERANCE:g}, got {mine.losses[0]:.7g}: another start, batch or loss"
            )


def decode(recipe: Recipe, shared: Shared, draft: nn.Module, temperature: float) -> EvalResult:
    config = recipe.evaluate
    return evaluate(
        shared.engine.decoder(),
        shared.method.drafter(draft),
        list(shared.dataset.heldout)[: config.num_prompts],
        shared.layout,
        depth=config.depth,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        seed=config.seed,
        eos_ids=shared.engine.spec.eos_token_ids,
    )


def run_seed(
    recipe: Recipe, shared: Shared, world: World, decoded: Decoded, *, controls: bool
) -> list[dict[str, Any]]:
    """Trains all sides and decodes with them; a row of results each."""
    method, batches = shared.method.name, make_batches(shared, recipe)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(shared, recipe, len(batches), Path(folder), world)
        sides = [*SIDES[method](setting), *(CONTROLS[method](setting) if controls else ())]
        trained = train(sides, batches)
        drafts = {side.name: side.draft() for side in sides}
    rows = []
    for name, draft in {**drafts, UNTRAINED: setting.start()}.items():
        row: dict[str, Any] = {"case": f"{method}, seed {recipe.run.seed}", "impl": name}
        if name in trained:
            row |= training_facts(trained, name)
        for temperature in recipe.evaluate.temperatures:
            result = decode(recipe, shared, draft, temperature)
            decoded.setdefault((name, temperature), []).append(result)
            seen = summarise(result, draft=name)
            row[f"T={temperature:g}"] = {"length": seen.length, "ci95": seen.ci95}
        rows.append(row)
        say(line_of(row))
    return rows


def training_facts(trained: Mapping[str, Trained], name: str) -> dict[str, Any]:
    mine, base = trained[name], trained[BASELINE]
    facts = {
        "steps": len(mine.losses),
        "median_s": statistics.median(mine.wall_s),
        "cpu_s": sum(mine.cpu_s),
        "first_loss": mine.losses[0],
        "last_loss": mine.last_loss,
        "cpu_ratio": statistics.median(a / b for a, b in zip(base.cpu_s, mine.cpu_s, strict=True)),
    }
    if mine.is_twin and name != BASELINE:
        facts["loss_gap"] = asdict(loss_gap(base.losses, mine.losses))
    return facts


def line_of(row: Mapping[str, Any]) -> str:
    text = f"{row['case']:<15} {row['impl']:<22}"
    for key in sorted(key for key in row if key.startswith("T=")):
        low, high = row[key]["ci95"]
        text += f" {key} {row[key]['length']:.3f} [{low:.3f}, {high:.3f}]"
    if "steps" in row:
        text += (
            f"  loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}  {row['steps']} steps  "
            f"cpu {row['cpu_s']:.1f} s, x{row['cpu_ratio']:.2f} of {BASELINE}"
        )
    if "loss_gap" in row:
        gap = row["loss_gap"]
        text += (
            f"  loss apart {gap['first']:.0e} at first, {gap['first_ten']:.0e} in ten steps, "
            f"{gap['last_tenth']:.0e} at last"
        )
    return text


def compare_all(method: str, decoded: Decoded) -> list[dict[str, Any]]:
    """A row for each side and temperature, all seeds together."""
    rows = []
    for (name, temperature), runs in decoded.items():
        length, ci95 = length_of(runs)
        row: dict[str, Any] = {
            "method": method,
            "temperature": temperature,
            "impl": name,
            "seeds": len(runs),
            "length": length,
            "ci95": ci95,
        }
        if name not in (BASELINE, UNTRAINED):
            found = compare(decoded[BASELINE, temperature], runs)
            row |= {
                "ratio": found.ratio,
                "ratio_ci95": found.ci95,
                "ratio_ci95_seeds": found.seeds95,
                "verdict": found.verdict,
            }
        rows.append(row)
    return rows


def compared_line(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    text = (
        f"{row['method']:<7} T={row['temperature']:<4g} {row['impl']:<22} "
        f"{row['length']:.3f} [{low:.3f}, {high:.3f}]"
    )
    if "ratio" in row:
        low, high = row["ratio_ci95"]
        text += f"  / {BASELINE} {row['ratio']:.4f} [{low:.4f}, {high:.4f}]  {row['verdict']}"
        if row["ratio_ci95_seeds"]:
            low, high = row["ratio_ci95_seeds"]
            text += f"; over {row['seeds']} seeds [{low:.4f}, {high:.4f}]"
    return text


def is_worse(compared: Sequence[Mapping[str, Any]]) -> bool:
    """Any of ours, beyond its interval over prompts."""
    return any(
        row["impl"].startswith(OURS) and row["verdict"] == "worse"
        for row in compared
        if "verdict" in row
    )


def say(text: str) -> None:
    print(text, flush=True)


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--controls", action="store_true", help="SpecForge beside itself, too")
    parser.add_argument("--quick", action="store_true", help="few steps, within 40 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--set", nargs="*", default=[], help="more of the recipe: key.sub=value")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = arguments_of(arguments)
    if importlib.util.find_spec("specforge") is None:
        raise SystemExit("SpecForge is not installed: run `make peers` (benchmarks/peers.txt)")
    torch.set_num_threads(1)
    cuts = [*CUTS, *(QUICK if chosen.quick else ()), *chosen.set]
    content: dict[str, Any] = {
        "bench": "acceptance",
        "machine": machine(),
        "commit": commit(),
        "baseline": BASELINE,
        "cuts": cuts,
        "rows": [],
        "compared": [],
    }
    say(f"# acceptance | {content['machine']} | commit {content['commit']}")
    with (
        tempfile.TemporaryDirectory() as folder,
        open_world(device="cpu", timeout_s=TIMEOUT_S) as world,
    ):
        for method in chosen.methods:
            shared = share(load(RECIPES[method], cuts), Path(folder))
            say(f"{method}: {shared.dataset.describe()}")
            decoded: Decoded = {}
            before = content["compared"]
            for seed in chosen.seeds:
                own = [*cuts, f"run.seed={seed}", f"trainer.seed={seed}"]
                recipe = load(RECIPES[method], own)
                content["rows"] += run_seed(
                    recipe, shared, world, decoded, controls=chosen.controls
                )
                content["compared"] = before + compare_all(method, decoded)
                if chosen.json:
                    chosen.json.write_text(json.dumps(content, indent=1) + "\n")
    for row in content["compared"]:
        say(compared_line(row))
    return 1 if is_worse(content["compared"]) else 0


if __name__ == "__main__":
    sys.exit(main())
