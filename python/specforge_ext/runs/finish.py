"""After training: export, prove the export, decode with it, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_ext.engines import ENGINES, Engine
from specforge_ext.evaluate import (
    Acceptance,
    BigramDrafter,
    EvalResult,
    LosslessCheck,
    PlainResult,
    acceptance_table,
    check_lossless,
    cyclic_share,
    evaluate,
    plain_decode,
    render,
    speed_up,
    speed_up_line,
    summarise,
)
from specforge_ext.export import Observed, parameters_sha256, read_strict, verify_export, write
from specforge_ext.methods import Drafter, Method
from specforge_ext.records import (
    DTYPES,
    DraftCheckpoint,
    DraftVocab,
    FeatureLayout,
    Prompt,
    TargetWeights,
)
from specforge_ext.runs.data import Dataset
from specforge_ext.runs.recipe import Recipe
from specforge_ext.runs.say import Say


@dataclass(frozen=True)
class Finished:
    """The second half of summary.json."""

    export: Path
    export_check: bool
    parameters_sha256: str
    acceptance: tuple[Acceptance, ...] = ()
    lossless: bool | None = None
    cyclic_greedy_share: float | None = None
    speed_up: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "export": str(self.export),
            "export_check": self.export_check,
            "parameters_sha256": self.parameters_sha256,
            "acceptance": [row.to_dict() for row in self.acceptance],
            "lossless": self.lossless,
            "cyclic_greedy_share": self.cyclic_greedy_share,
            "speed_up": self.speed_up,
        }


def finish(
    recipe: Recipe,
    method: Method,
    draft: nn.Module,
    weights: TargetWeights,
    vocab: DraftVocab,
    dataset: Dataset,
    say: Say,
) -> Finished:
    """Export the trained draft, read the export back, and measure what was read.

    draft: the trainer's parameters in plain float32 tensors.
    """
    engine: Engine = ENGINES.get(recipe.engine[0]).open(recipe.engine[1])
    dtype = DTYPES[recipe.export.dtype]
    directory = _write_export(method, draft, weights, recipe.output_dir / "export", dtype)
    layout = method.layout(engine.spec)
    prompts = list(dataset.heldout)[: recipe.evaluate.num_prompts]
    probe = prompts or [dataset.train[i].input_ids for i in range(min(4, len(dataset.train)))]
    check = verify_export(
        method,
        draft,
        directory,
        weights,
        _observe(engine, layout, probe, device=weights.embed_tokens.device),
        depth=recipe.evaluate.depth,
        dtype=dtype,
    )
    say(str(check))
    say(f"export: {directory}")
    fingerprint = parameters_sha256(draft)
    if len(prompts) < recipe.evaluate.num_prompts:
        say(
            f"evaluate.num_prompts: wanted {recipe.evaluate.num_prompts}, data.heldout has "
            f"{len(prompts)}{'' if prompts else ': nothing is evaluated'}"
        )
    if not prompts:
        return Finished(directory, check.ok, fingerprint)
    served = method.restore(read_strict(directory, method), weights)
    drafters = {"trained": method.drafter(served)}
    if recipe.evaluate.baselines:
        untrained = method.build(weights, vocab, seed=recipe.run.seed)
        drafters["untrained"] = method.drafter(untrained)
        drafters["bigram"] = BigramDrafter(
            [p.input_ids for p in dataset.train],
            engine.spec.vocab_size,
            text_temperature=recipe.text_temperature,
            device=weights.embed_tokens.device,
        )
    measured = _Measurement(recipe, engine, layout, prompts, weights.embed_tokens.device)
    return measured.report(drafters, say, directory, check.ok, fingerprint)


def _write_export(
    method: Method, draft: nn.Module, weights: TargetWeights, directory: Path, dtype: torch.dtype
) -> Path:
    """One directory, or one an engine below it; the first of them, to be read back."""
    checkpoint = method.export(draft, weights.spec, dtype=dtype)
    configs = method.engine_configs(checkpoint.config, weights.spec)
    for engine, config in configs.items():
        write(DraftCheckpoint(checkpoint.tensors, config), directory / engine)
    return directory / next(iter(configs))


def _observe(
    engine: Engine, layout: FeatureLayout, prompts: Sequence[Tensor], *, device: torch.device
) -> Observed:
    """Rows of real text, with the target's features, for comparing two drafts."""
    length = min(len(p) for p in prompts)
    unscored = torch.zeros(length, dtype=torch.uint8)
    texts = [
        Prompt(f"probe-{i}", ids[:length].to("cpu", torch.int32), unscored)
        for i, ids in enumerate(prompts)
    ]
    # Not the engine's decoder: of some targets it has features alone.
    samples = list(engine.features(texts, layout))
    ids = torch.stack([text.input_ids for text in texts]).long().to(device)
    return Observed(
        next_tokens=ids[:, 1:],
        features={
            spec.name: torch.stack([s.features[spec.name][:-1] for s in samples]).to(device)
            for spec in layout.features
        },
        positions=torch.arange(length - 1, device=device).expand(len(texts), -1),
        valid=torch.ones(len(texts), length - 1, dtype=torch.bool, device=device),
    )


class _Measurement:
    """Every draft at every temperature, on the same prompts, and plain decoding beside them."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        layout: FeatureLayout,
        prompts: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._config = recipe.evaluate
        self._engine = engine
        self._layout = layout
        self._prompts = prompts
        self._device = device

    def report(
        self,
        drafters: dict[str, Drafter],
        say: Say,
        directory: Path,
        export_check: bool,
        fingerprint: str,
    ) -> Finished:
        rows: list[Acceptance] = []
        speed: dict[str, Any] = {}
        lossless: LosslessCheck | None = None
        cyclic: float | None = None
        for temperature in self._config.temperatures:
            plain = self._plain(temperature)
            for name, drafter in drafters.items():
                result = self._speculative(drafter, temperature)
                row = summarise(result, draft=name, seed=self._config.seed)
                rows.append(row)
                if name == "trained":
                    speed[f"T={temperature:g}"] = self._speed(plain, result, row, say)
                    if temperature == 0:
                        lossless = check_lossless(result.tokens, plain)
                        say(f"lossless: {lossless}")
            if temperature == 0:
                cyclic = cyclic_share(plain.tokens)
                say(f"greedy text of the target that ends in a cycle: {cyclic:.0%}")
        say.block(render(acceptance_table(rows)))
        return Finished(
            export=directory,
            export_check=export_check,
            parameters_sha256=fingerprint,
            acceptance=tuple(rows),
            lossless=None if lossless is None else lossless.lossless,
            cyclic_greedy_share=cyclic,
            speed_up=speed,
        )

    def _plain(self, temperature: float) -> PlainResult:
        return plain_decode(
            self._engine.decoder(),
            self._prompts,
            max_new_tokens=self._config.max_new_tokens,
            temperature=temperature,
            seed=self._config.seed,
            eos_ids=self._engine.spec.eos_token_ids,
            device=self._device,
        )

    def _speculative(self, drafter: Drafter, temperature: float) -> EvalResult:
        return evaluate(
            self._engine.decoder(),
            drafter,
            self._prompts,
            self._layout,
            depth=self._config.depth,
            max_new_tokens=self._config.max_new_tokens,
            temperature=temperature,
            seed=self._config.seed,
            eos_ids=self._engine.spec.eos_token_ids,
            device=self._device,
        )

    def _speed(
        self, plain: PlainResult, result: EvalResult, row: Acceptance, say: Say
    ) -> dict[str, Any]:
        speed = speed_up(plain, result, row)
        say(f"T = {row.temperature:g}: {speed_up_line(speed)}")
        return {
            "measured": speed.measured,
            "plain_tokens_per_s": speed.plain_tokens_per_s,
            "speculative_tokens_per_s": speed.speculative_tokens_per_s,
            "expected": {f"{cost:g}": gain for cost, gain in speed.expected.items()},
        }
