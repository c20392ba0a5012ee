"""Compares our losses and gradients with recorded ones: `python tests/parity.py DIR...`.

Each folder is a case in the format of tests/data/golden/README.md. Prints a line per case and
variant with the worst relative error; exits with 1 if one is above tolerance, or unsupported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from specforge_ext.methods._block.plan import Anchors
from specforge_ext.methods.dflash import DFlashConfig, DFlashMethod
from specforge_ext.methods.domino import DominoConfig, DominoMethod
from specforge_ext.methods.dspark import DSparkConfig, DSparkMethod
from specforge_ext.methods.eagle3 import Eagle3Config, Eagle3Method
from specforge_ext.methods.peagle import PEagleConfig, PEagleMethod
from specforge_ext.records import (
    DraftVocab,
    PackedBatch,
    StepContext,
    StepLoss,
    TargetSpec,
    TargetWeights,
    lengths_to_cu_seqlens,
)

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
AT = StepContext(step=0, total_steps=1, seed=0)


class Unsupported(Exception):
    """A method or option that this project does not have."""


@dataclass(frozen=True)
class Case:
    name: str
    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with the prefix, without it."""
        n = len(prefix)
        return {key[n:]: value for key, value in self.tensors.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Errors:
    """Relative errors by name: of losses and metrics, and of gradients (of each tensor's
    maximum).
    """

    losses: dict[str, float]
    gradients: dict[str, float]

    @property
    def passed(self) -> bool:
        return (
            max(self.losses.values()) <= LOSS_TOLERANCE
            and max(self.gradients.values()) <= GRADIENT_TOLERANCE
        )


def read_case(folder: Path) -> Case:
    info = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    return Case(folder.name, info, load_file(folder / "tensors.safetensors"))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """max |got - expected| / max |expected|; 0 for two zeros, inf for other shapes or
    not-a-number.
    """
    if got.numel() != expected.numel():
        return float("inf")
    got, expected = got.detach().double().flatten(), expected.double().flatten()
    error, scale = float((got - expected).abs().max()), float(expected.abs().max())
    if error != error:
        return float("inf")
    return error / scale if scale else float(error > 0)


def eagle3_variants(case: Case) -> dict[str, Errors]:
    options = dict(case.info["options"])
    loss = options.pop("loss")
    if loss not in ("soft_ce", "lk_alpha"):
        raise Unsupported(f"option loss={loss!r} of method 'eagle3'")
    if options:
        raise Unsupported(f"option {min(options)!r} of method 'eagle3'")
    return {
        "compaction": eagle3_errors(case, compaction=True),
        "all rows": eagle3_errors(case, compaction=False),
    }


def eagle3_errors(case: Case, *, compaction: bool) -> Errors:
    weights, vocab = eagle3_target(case)
    method = Eagle3Method(
        Eagle3Config(
            ttt_length=case.info["ttt_length"],
            draft_vocab_size=vocab.size,
            denominator="all_positions_mean",
            compaction=compaction,
            loss=case.info["options"]["loss"],
        )
    )
    draft = method.build(weights, vocab, seed=0)
    stored = case.group("weight.")
    draft.load_state_dict({name: stored[name] for name, _ in draft.named_parameters()})
    result = method.step(draft, eagle3_batch(case), AT)
    loss = result.loss_sum / result.weight_sum
    loss.backward()
    expected = case.group("expect.")
    metrics = eagle3_metrics(result, is_mean_of_rows=case.info["options"]["loss"] == "lk_alpha")
    gradients = case.group("grad.")
    return Errors(
        losses={
            "loss": relative_error(loss, expected["loss"]),
            **{name: relative_error(metrics[name], expected[name]) for name in metrics},
        },
        gradients=gradient_errors(draft, gradients),
    )


def eagle3_metrics(result: StepLoss, *, is_mean_of_rows: bool) -> dict[str, Tensor]:
    sums = result.metrics
    per = sums["rows"].clamp_min(1) if is_mean_of_rows else result.weight_sum
    return {
        "step_losses": sums["loss"] / per,
        "step_correct": sums["correct"],
        "step_correct_denominator": sums["scored"],
        "step_accuracy": sums["correct"] / sums["scored"].clamp_min(1),
        "step_accept_rate": sums["accepted"] / sums["rows"].clamp_min(1),
    }


def eagle3_target(case: Case) -> tuple[TargetWeights, DraftVocab]:
    weights = target_weights(case, model_type="llama", num_layers=8)
    return weights, DraftVocab(t2d=case.tensors["weight.t2d"], d2t=case.tensors["weight.d2t"])


def target_weights(case: Case, *, model_type: str, num_layers: int) -> TargetWeights:
    config = case.info["config"]
    spec = TargetSpec(
        name=case.name,
        model_type=model_type,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=num_layers,
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        rope_scaling=None,
        max_position_embeddings=config["max_position_embeddings"],
        dtype="float32",
    )
    return TargetWeights(
        spec=spec,
        embed_tokens=case.tensors["target.embed_tokens.weight"],
        lm_head=case.tensors["target.lm_head.weight"],
        final_norm=torch.ones(spec.hidden_size),
    )


def eagle3_batch(case: Case) -> PackedBatch:
    return packed_batch(case, {"aux": "aux_hidden", "last": "last_hidden"})


def true_lengths(case: Case) -> tuple[int, ...]:
    """All of the padded length where the case names none."""
    samples, padded = case.tensors["input.input_ids"].shape
    return tuple(case.info.get("lengths", [padded] * samples))


def packed_batch(case: Case, features: dict[str, str]) -> PackedBatch:
    """The padded tensors of the case, packed by the true lengths. features: ours -> the case's."""
    lengths = true_lengths(case)

    def pack(name: str) -> Tensor:
        rows = case.tensors[f"input.{name}"]
        return torch.cat([rows[k, :n] for k, n in enumerate(lengths)])

    return PackedBatch(
        sample_ids=tuple(f"{case.name}:{k}" for k in range(len(lengths))),
        lengths=lengths,
        input_ids=pack("input_ids"),
        loss_mask=pack("loss_mask"),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        features={ours: pack(theirs) for ours, theirs in features.items()},
        cu_seqlens=lengths_to_cu_seqlens(lengths),
    )


DPACE = {
    "dpace": "suffix",
    "dpace-cumulative-confidence-only": "prefix",
    "dpace-continuation-value-only": "suffix_over_prefix",
}


def dflash_variants(case: Case) -> dict[str, Errors]:
    options = dict(case.info["options"])
    loss = options["loss_type"]
    if loss != "dflash" and loss not in DPACE:
        raise Unsupported(f"option loss_type={loss!r} of method 'dflash'")
    config = case.info["config"]
    weights = target_weights(case, model_type="qwen3", num_layers=config["num_target_layers"])
    method = DFlashMethod(
        DFlashConfig(
            block_size=config["block_size"],
            num_anchors=options["num_anchors"],
            num_layers=config["num_hidden_layers"],
            layer_ids=tuple(i + 1 for i in config["dflash_config"]["target_layer_ids"]),
            mask_token_id=config["dflash_config"]["mask_token_id"],
            gamma=options["loss_decay_gamma"],
            dpace=DPACE.get(loss),
            dpace_alpha=options["dpace_alpha"],
        )
    )
    draft = method.build(weights, DraftVocab.full(config["vocab_size"]), seed=0)
    draft.load_state_dict(case.group("weight."))
    result = method.step_at(draft, packed_batch(case, {"hidden": "hidden_states"}), anchors(case))
    loss_mean = result.loss_sum / result.weight_sum
    loss_mean.backward()
    rows = result.metrics["rows"].sum()
    return {
        "packed": Errors(
            losses={
                name: relative_error(got, torch.tensor(case.info["expected"][name]))
                for name, got in (
                    ("loss", loss_mean),
                    ("accuracy", result.metrics["correct"].sum() / rows),
                    ("accuracy_denom", rows),
                )
            },
            gradients=gradient_errors(draft, case.group("grad.")),
        )
    }


def domino_variants(case: Case) -> dict[str, Errors]:
    options, config = case.info["options"], case.info["config"]
    section = config["dflash_config"]
    if options["pure_draft_prefix_len"] != 1:
        raise Unsupported(
            f"option pure_draft_prefix_len={options['pure_draft_prefix_len']} of method 'domino'"
        )
    weights = target_weights(case, model_type="qwen3", num_layers=config["num_target_layers"])
    settings = DominoConfig(
        block_size=config["block_size"],
        num_anchors=options["num_anchors"],
        num_layers=config["num_hidden_layers"],
        layer_ids=tuple(i + 1 for i in section["target_layer_ids"]),
        mask_token_id=section["mask_token_id"],
        gamma=options["loss_decay_gamma"],
        shift_label=options["shift_label"],
        gru_hidden_dim=section["gru_hidden_dim"],
        emb_dim=section["emb_dim"],
        lambda_start=options["lambda_start"],
        lambda_decay_ratio=options["lambda_decay_ratio"],
    )
    variants = {"rows": settings}
    variants["micro batch"] = settings.model_copy(update={"denominator": "micro_batch_mean"})
    return {name: domino_errors(case, weights, one) for name, one in variants.items()}


def domino_errors(case: Case, weights: TargetWeights, config: DominoConfig) -> Errors:
    options, method = case.info["options"], DominoMethod(config)
    at = StepContext(step=options["global_step"], total_steps=options["total_steps"], seed=0)
    draft = method.build(weights, DraftVocab.full(weights.spec.vocab_size), seed=0)
    draft.load_state_dict(case.group("weight."))
    batch = packed_batch(case, {"hidden": "hidden_states"})
    result = method.step_at(draft, batch, at, anchors(case))
    loss = result.loss_sum / result.weight_sum
    loss.backward()
    sums = result.metrics
    rows, blocks = sums["rows"].sum(), sums["blocks"][0]
    got = {
        "loss": loss,
        "final_loss": sums["loss"].sum() / rows,  # this case has no decay
        "base_loss": sums["base_loss"].sum() / rows,
        "accuracy": sums["correct"].sum() / rows,
        "base_accuracy": sums["base_correct"].sum() / rows,
        "accuracy_denom": rows,
        "accept_len": 1 + sums["accepted"].sum() / blocks,
        "base_accept_len": 1 + sums["base_accepted"].sum() / blocks,
        "lambda_base": torch.tensor(config.base_share(at.step, at.total_steps)),
    }
    expected = case.info["expected"]
    return Errors(
        losses={
            name: relative_error(value, torch.tensor(expected[name])) for name, value in got.items()
        },
        gradients=gradient_errors(draft, case.group("grad.")),
    )


def dspark_variants(case: Case) -> dict[str, Errors]:
    options, config = case.info["options"], case.info["config"]
    own = config["dflash_config"]
    weights = target_weights(case, model_type="qwen3", num_layers=config["num_target_layers"])
    method = DSparkMethod(
        DSparkConfig(
            block_size=config["block_size"],
            num_anchors=options["num_anchors"],
            num_layers=config["num_hidden_layers"],
            layer_ids=tuple(i + 1 for i in own["target_layer_ids"]),
            mask_token_id=own["mask_token_id"],
            gamma=options["loss_decay_gamma"],
            markov_rank=own["markov_rank"],
            markov_head=options["markov_head_type"],
            ce_weight=options["ce_weight"],
            l1_weight=options["l1_weight"],
            confidence_weight=options["confidence_weight"],
        )
    )
    draft = method.build(weights, DraftVocab.full(config["vocab_size"]), seed=0)
    draft.load_state_dict(case.group("weight."))
    features = {"hidden": "hidden_states", "last": "target_last_hidden_states"}
    result = method.step_at(draft, packed_batch(case, features), anchors(case))
    loss_mean = result.loss_sum / result.weight_sum
    loss_mean.backward()
    sums, expected = result.metrics, case.info["expected"]
    rows, blocks = sums["rows"].sum(), sums["blocks"][0]
    found = {
        "loss": (loss_mean, expected["loss"]),
        "accuracy_denom": (rows, expected["accuracy_denom"]),
        "rows": (sums["rows"], expected["ratio.ce_position"][1]),
        "l1": (2 * (rows - sums["acceptance"].sum()), expected["ratio.l1_loss"][0]),
        "foretold": (sums["foretold_error"].sum(), expected["ratio.confidence_abs_error"][0]),
        "agreement": (sums["correct"].sum(), expected["ratio.teacher_agreement"][0]),
        "length": (blocks + sums["reached"].sum(), expected["ratio.tau_probabilistic"][0]),
    }
    return {
        "packed": Errors(
            losses={
                name: relative_error(got, torch.tensor(wanted))
                for name, (got, wanted) in found.items()
            },
            gradients=gradient_errors(draft, case.group("grad.")),
        )
    }


def anchors(case: Case) -> Anchors:
    """Those of the case, where kept, packed by the true lengths."""
    starts = lengths_to_cu_seqlens(true_lengths(case))
    keep = case.tensors["input.anchor_keep"].bool()
    places = case.tensors["input.anchors"] + starts[:-1, None]
    return Anchors(places[keep].int(), lengths_to_cu_seqlens(keep.sum(1).tolist()))


def gradient_errors(draft: torch.nn.Module, expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: relative_error(p.grad if p.grad is not None else torch.zeros(0), expected[name])
        for name, p in draft.named_parameters()
    }


def peagle_variants(case: Case) -> dict[str, Errors]:
    return {
        "compaction": peagle_errors(case, compaction=True),
        "all rows": peagle_errors(case, compaction=False),
    }


def peagle_errors(case: Case, *, compaction: bool) -> Errors:
    """Forward only, on the chains of the case. Ids and teacher are those of the next position."""
    config, options = case.info["config"], case.info["options"]
    vocab = DraftVocab(t2d=case.tensors["weight.t2d"], d2t=case.tensors["weight.d2t"])
    method = PEagleMethod(
        PEagleConfig(
            num_depths=options["num_depths"],
            num_layers=config["num_hidden_layers"],
            down_sample_ratio=options["down_sample_ratio"],
            down_sample_ratio_min=options["down_sample_ratio_min"],
            mask_token_id=options["mask_token_id"],
            draft_vocab_size=vocab.size,
            compaction=compaction,
        )
    )
    case.info["config"] = {"max_position_embeddings": 512, **config}
    stored = case.group("weight.")
    logits = case.tensors["input.target_logits"]
    # The case holds the target's logits: hidden states of a target whose head is the identity.
    case.tensors["target.lm_head.weight"] = torch.eye(config["vocab_size"])
    case.tensors["target.embed_tokens.weight"] = stored["embed_tokens.weight"]
    case.tensors["input.last_hidden"] = logits.roll(1, dims=1)
    batch = packed_batch(case, {"aux": "aux_hidden", "last": "last_hidden"})
    draft = method.build(target_weights(case, model_type="llama", num_layers=8), vocab, seed=0)
    draft.load_state_dict({name: stored[name] for name, _ in draft.named_parameters()})
    anchors, depth = case.tensors["input.cod_anchor"], case.tensors["input.cod_depth"]
    chains = [anchors[depth == d].int() for d in range(1, options["num_depths"])]
    with torch.no_grad():
        result = method.step_with(draft, replace(batch, input_ids=batch.input_ids.roll(1)), chains)
    expected = case.info["expected"]
    return Errors(
        losses={
            "loss": relative_error(
                result.loss_sum / result.weight_sum, torch.tensor(expected["loss"])
            ),
            **{
                f"{ours} at {d}": relative_error(
                    result.metrics[ours][d], torch.tensor(expected[f"position_{d}_acc_{theirs}"])
                )
                for d in range(options["num_depths"])
                for ours, theirs in (("correct", "sum"), ("rows", "total"))
            },
        },
        gradients={"none recorded": 0.0},
    )


VARIANTS: dict[str, Callable[[Case], dict[str, Errors]]] = {
    "dflash": dflash_variants,
    "domino": domino_variants,
    "dspark": dspark_variants,
    "eagle3": eagle3_variants,
    "peagle": peagle_variants,
}


def run(folder: Path) -> bool:
    """Prints the lines of one case; True if it passed."""
    case = read_case(folder)
    method = case.info["method"]
    try:
        if method not in VARIANTS:
            raise Unsupported(f"method {method!r}")
        results = VARIANTS[method](case)
    except Unsupported as reason:
        print(f"{case.name:18} FAIL  unsupported {reason}")
        return False
    for variant, errors in results.items():
        loss = max(errors.losses, key=errors.losses.__getitem__)
        gradient = max(errors.gradients, key=errors.gradients.__getitem__)
        print(
            f"{case.name:18} {'ok  ' if errors.passed else 'FAIL'}  {variant:12} "
            f"losses {errors.losses[loss]:.1e} ({loss})  "
            f"gradients {errors.gradients[gradient]:.1e} ({gradient})"
        )
    return all(errors.passed for errors in results.values())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    # A shell's DIR/* brings the page that lies beside the cases.
    folders = [path for path in parser.parse_args(arguments).folders if path.suffix != ".md"]
    if not folders:
        parser.error("DIR: wanted folders of cases, got pages only")
    return 0 if all([run(folder) for folder in folders]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
