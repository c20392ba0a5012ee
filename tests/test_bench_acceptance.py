"""The side-by-side benchmark: equal losses from equal starts, what it would see, its verdict."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import acceptance
import acceptance_sides as sides_of
from acceptance import Trained
from acceptance_compare import compare, loss_gap
from acceptance_sides import Batch, Setting, Side
from fp8_runs import Shared, share
from specforge_ext.evaluate import EvalResult
from specforge_ext.loader.stream import pack
from specforge_ext.records import Prompt, Sample
from specforge_ext.runs.recipe import Recipe, load
from specforge_ext.trainer import StepData, TrainerConfig, World, open_world
from specforge_ext.trainer.schedule import learning_rate

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("specforge") is None,
        reason="SpecForge is not installed: run `make peers` (benchmarks/peers.txt)",
    ),
]
TINY = (
    *acceptance.CUTS,
    "data.train.num_prompts=24",
    "data.heldout.num_prompts=4",
    "data.generate.max_new_tokens=24",
    "evaluate.num_prompts=4",
    "evaluate.max_new_tokens=12",
)
FEW_ANCHORS = {"eagle3": (), "dflash": ("method.num_anchors=6",)}
"""So few that there is a choice."""
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def specforge_as_it_was() -> Iterator[None]:
    """The benchmark puts a torch loss into SpecForge for good."""
    if importlib.util.find_spec("specforge") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patches:
        import specforge.algorithms.eagle3.model as model

        patches.setattr(model, "LogSoftmaxLoss", model.LogSoftmaxLoss)
        yield


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def tiny(method: str, *more: str) -> Recipe:
    return load(acceptance.RECIPES[method], [*TINY, *FEW_ANCHORS[method], *more])


@pytest.fixture(scope="module", params=["eagle3", "dflash"])
def setting(request: pytest.FixtureRequest, folder: Path, world: World) -> Setting:
    recipe = tiny(request.param)
    return Setting(share(recipe, folder), recipe, STEPS, folder, world)


def opened(setting: Setting, place: Path, recipe: Recipe | None = None) -> dict[str, Side]:
    """The sides of a setting, with a folder of their own."""
    own = replace(setting, folder=place, recipe=recipe or setting.recipe)
    return {side.name: side for side in sides_of.SIDES[setting.shared.method.name](own)}


def ragged_batches(shared: Shared) -> list[Batch]:
    """Samples of different lengths, so that SpecForge has to pad."""
    batches, ids = [], [prompt.sample_id for prompt in shared.dataset.train]
    for step in range(STEPS):
        chosen = [shared.samples[name] for name in ids[4 * step : 4 * step + 4]]
        samples = tuple(cut(s, len(s.prompt) - 5 * k) for k, s in enumerate(chosen))
        packed = pack(samples, shared.layout)
        batches.append(
            Batch(StepData(step, (packed,), 0.0, len(samples), packed.num_tokens), samples)
        )
    return batches


def cut(sample: Sample, length: int) -> Sample:
    prompt = sample.prompt
    return Sample(
        Prompt(prompt.sample_id, prompt.input_ids[:length], prompt.loss_mask[:length]),
        {name: feature[:length] for name, feature in sample.features.items()},
    )


def losses_of(sides: Sequence[Side], batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    trained = acceptance.train(sides, batches)
    return {name: torch.tensor(mine.losses, dtype=torch.float64) for name, mine in trained.items()}


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    theirs = dict(other.named_parameters())
    pairs = [(p, theirs[name]) for name, p in one.named_parameters()]
    return float(sum((p - q).double().square().sum() for p, q in pairs)) ** 0.5


def test_twins_have_the_same_losses_and_end_as_the_same_draft(
    setting: Setting, tmp_path: Path
) -> None:
    sides = opened(setting, tmp_path)
    start = setting.start()
    assert distance(sides["specforge"].draft(), start) == 0  # to SpecForge and back
    losses = losses_of(list(sides.values()), ragged_batches(setting.shared))
    assert (losses["specforge"].diff().abs() > 1e-2).all()  # other batches, other weights
    torch.testing.assert_close(losses["specforge_ext"], losses["specforge"], rtol=1e-4, atol=0)
    drafts = {name: side.draft() for name, side in sides.items()}
    moved = distance(drafts["specforge"], start)
    assert moved > 1e-2
    assert distance(drafts["specforge_ext"], drafts["specforge"]) < 0.01 * moved


def test_controls_are_specforge_with_little_changed(setting: Setting, tmp_path: Path) -> None:
    method = setting.shared.method.name
    theirs = opened(setting, tmp_path / "theirs")["specforge"]
    own = replace(setting, folder=tmp_path / "controls")
    controls = {side.name: side for side in sides_of.CONTROLS[method](own)}
    apart = distance(controls["specforge/nudged"].draft(), setting.start())
    assert 0 < apart < 1e-4
    losses = losses_of([theirs, *controls.values()], ragged_batches(setting.shared))
    torch.testing.assert_close(losses["specforge/nudged"], losses["specforge"], rtol=1e-4, atol=0)
    if method == "dflash":
        gaps = (losses["specforge/own-anchors"] / losses["specforge"] - 1).abs()
        assert (gaps > 1e-4).all() and (gaps < 0.3).all()


def test_another_learning_rate_shows_in_the_losses(setting: Setting, tmp_path: Path) -> None:
    faster = tiny(setting.shared.method.name, f"trainer.lr={1.2 * setting.recipe.trainer.lr}")
    theirs = opened(setting, tmp_path / "theirs")["specforge"]
    ours = opened(setting, tmp_path / "ours", faster)["specforge_ext"]
    losses = losses_of([theirs, ours], ragged_batches(setting.shared))
    gaps = (losses["specforge_ext"] / losses["specforge"] - 1).abs()
    assert gaps[0] < 1e-5 and (gaps[1:] > 1e-4).any()


def test_another_start_is_refused() -> None:
    done = {"specforge": Trained(True, [2.0]), "specforge_ext": Trained(True, [2.0001])}
    with pytest.raises(RuntimeError, match=r"first loss of specforge_ext: wanted .*, got 2\.0001"):
        acceptance.check_start(done)
    done["specforge_ext"] = Trained(False, [1.0])  # another loss by definition
    acceptance.check_start(done)
    with pytest.raises(RuntimeError, match="first loss"):
        acceptance.check_start({**done, "nan": Trained(True, [float("nan")])})


def test_specforges_update_has_our_settings() -> None:
    config = TrainerConfig(
        lr=0.5, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, warmup_ratio=0.3, clip_norm=0.3
    )
    drafts = [torch.nn.Linear(2, 2) for _ in range(2)]
    drafts[1].load_state_dict(drafts[0].state_dict())
    ours = torch.optim.AdamW(drafts[0].parameters(), betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    theirs = sides_of.specforge_optimizer(drafts[1], config, total_steps=7)
    for step in range(7):
        rate = learning_rate(config, step, 7)
        gradient = torch.tensor([[3.0, -step], [2.0, 1.0]])
        for draft in drafts:
            draft.weight.grad, draft.bias.grad = gradient.clone(), gradient[0].clone()
        torch.nn.utils.clip_grad_norm_(drafts[0].parameters(), 0.3)
        for group in ours.param_groups:
            group["lr"] = rate
        ours.step()
        sides_of.specforge_update(theirs, config, step, 7)
        torch.testing.assert_close(drafts[1].weight, drafts[0].weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(drafts[1].bias, drafts[0].bias, rtol=1e-5, atol=1e-6)


def decoded(tokens: list[int], rounds: list[int]) -> EvalResult:
    nothing = torch.zeros(len(tokens), dtype=torch.int64)
    return EvalResult(
        depth=1,
        temperature=0.0,
        tokens=tuple(torch.zeros(n, dtype=torch.int64) for n in tokens),
        steps=torch.tensor(rounds),
        rounds=torch.tensor(rounds),
        round_tokens=torch.tensor(tokens),
        accepted_at=nothing[:, None],
        proposed=nothing,
        wall_s=0.0,
        prefill_s=0.0,
        batch_size=1,
    )


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        ([10, 40, 9, 20], "equal within 2%"),
        ([12, 48, 10, 24], "better"),
        ([8, 32, 8, 18], "worse"),
        ([12, 32, 9, 20], "not told apart"),
    ],
)
def test_lengths_are_compared_by_prompt(tokens: list[int], verdict: str) -> None:
    rounds = [5, 10, 6, 10]
    ratio = compare([decoded([10, 40, 9, 20], rounds)] * 2, [decoded(tokens, rounds)] * 2)
    assert ratio.ratio == pytest.approx(sum(tokens) / 79)
    assert ratio.ci95[0] <= ratio.ratio <= ratio.ci95[1]
    assert ratio.verdict == verdict
    assert ratio.seeds95 == pytest.approx((ratio.ratio, ratio.ratio))
    rows = [
        {"impl": "specforge"},
        {"impl": "specforge/own-anchors", "verdict": "worse"},
        {"impl": "specforge_ext/recipe", "verdict": ratio.verdict},
    ]
    assert acceptance.is_worse(rows) == (verdict == "worse")


def test_gaps_between_losses() -> None:
    baseline = [2.0] * 20
    other = [2.0, 2.002, *[2.0] * 10, 2.2, *[2.0] * 5, 2.01, 2.03]
    gap = loss_gap(baseline, other)
    assert gap.first == 0 and gap.first_ten == pytest.approx(1e-3)
    assert gap.largest == pytest.approx(0.1) and gap.last_tenth == pytest.approx(0.01)
    assert gap.doubling == pytest.approx((0, 1e-3, 0, 0.1, 0.015))


def test_the_script(tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    cuts = [*TINY, *FEW_ANCHORS["dflash"], "order.max_steps=2"]
    arguments = ["--methods", "dflash", "--seeds", "3", "5", "--json", str(path), "--set", *cuts]
    assert acceptance.main(arguments) in (0, 1)
    out: dict[str, Any] = json.loads(path.read_text())
    rows = {(row["case"], row["impl"]): row for row in out["rows"]}
    names = ("specforge", "specforge_ext", "untrained")
    assert list(rows) == [(f"dflash, seed {seed}", name) for seed in (3, 5) for name in names]
    for seed in (3, 5):
        ours = rows[f"dflash, seed {seed}", "specforge_ext"]
        assert ours["steps"] == 2 and ours["cpu_s"] > 0 and ours["loss_gap"]["first"] < 1e-5
        assert all(1 <= ours[key]["length"] <= 5 for key in ("T=0", "T=0.8"))
    first, second = (rows[f"dflash, seed {seed}", "specforge"] for seed in (3, 5))
    assert first["last_loss"] != second["last_loss"]
    compared = {(row["impl"], row["temperature"]): row for row in out["compared"]}
    assert len(compared) == 6 and compared["specforge_ext", 0.0]["seeds"] == 2
    assert compared["specforge_ext", 0.8]["verdict"]
    assert "dflash  T=0.8  specforge_ext" in capsys.readouterr().out


def test_without_specforge_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="SpecForge is not installed: run `make peers`"):
        acceptance.main(["--quick"])
