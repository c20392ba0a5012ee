"""A draft algorithm in one folder: all that the contract tests need to accept a new one.

Row t adds what it makes of the target's feature at t to the embedding of token t + 1, and predicts
token t + 2. Looking further ahead it feeds its own tokens, with the same feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.config import Config
from specforge_ext.methods._common import as_draft
from specforge_ext.methods._drafter import NewRows, check_room, check_seen, draw_tokens
from specforge_ext.methods._export import Schema, count, load_parameters, parameters_of
from specforge_ext.records import (
    DTYPE_NAMES,
    DraftCheckpoint,
    DraftVocab,
    FeatureLayout,
    FeatureSpec,
    PackedBatch,
    Prompt,
    Proposal,
    StepContext,
    StepLoss,
    TargetSpec,
    TargetWeights,
)


class ToyConfig(Config):
    """scale: of the feature's part."""

    scale: float = 1.0


class ToyDraft(nn.Module):
    embed_tokens: Tensor
    target_head: Tensor

    def __init__(self, weights: TargetWeights, scale: float) -> None:
        super().__init__()
        width = weights.spec.hidden_size
        self.scale = scale
        self.mix = nn.Linear(width, width, bias=False)
        self.register_buffer("embed_tokens", weights.embed_tokens.detach(), persistent=False)
        self.register_buffer("target_head", weights.lm_head.detach(), persistent=False)

    def forward(self, feature: Tensor, tokens: Tensor) -> Tensor:
        """[..., H], [...] -> logits [..., V], float32."""
        mixed = self.scale * self.mix(feature.to(self.mix.weight.dtype))
        state = torch.tanh(mixed + F.embedding(tokens, self.embed_tokens))
        return F.linear(state.to(self.target_head.dtype), self.target_head).float()


class ToyMethod:
    name = "toy"
    Config = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        spec = FeatureSpec("near", (target.num_layers - 1,), target.hidden_size, target.dtype)
        return FeatureLayout((spec,))

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> ToyDraft:
        draft = ToyDraft(weights, self.config.scale)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(draft.mix.weight, std=0.2, generator=generator)
        return draft

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        return DraftVocab.full(target.vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        return (as_draft(draft, ToyDraft, method="toy").mix,)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        lengths = torch.tensor(batch.lengths)
        inside = batch.positions + 2 < lengths.repeat_interleave(lengths)
        rows = (inside & batch.loss_mask.roll(-1).bool()).nonzero()[:, 0]
        logits = draft(batch.features["near"][rows], batch.input_ids[rows + 1])
        labels = batch.input_ids[rows + 2]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum().double()
        count = torch.tensor(float(len(rows)))
        return StepLoss(
            loss, count, {"correct": right, "rows": count.double()}, {"correct": "rows"}
        )

    def drafter(self, draft: nn.Module) -> ToyDrafter:
        return ToyDrafter(as_draft(draft, ToyDraft, method="toy"))

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        config = {"hidden_size": target.hidden_size, "torch_dtype": DTYPE_NAMES[dtype]}
        return DraftCheckpoint(parameters_of(draft, dtype), config)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        return {"": config}

    def schema(self, config: Mapping[str, object]) -> Schema:
        width = count(config, "hidden_size")
        return {"mix.weight": ((width, width), None)}

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> ToyDraft:
        draft = ToyDraft(weights, self.config.scale)
        load_parameters(draft, checkpoint.tensors)
        return draft


class ToyDrafter:
    def __init__(self, draft: ToyDraft) -> None:
        self.draft = draft
        self.start(1, 0)

    def start(self, num_sequences: int, capacity: int) -> None:
        self.feature = torch.zeros(num_sequences, self.draft.mix.in_features)
        self.token = torch.full((num_sequences,), -1)
        self.num_columns, self.capacity = 0, capacity

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        self.num_columns += valid.shape[1]
        check_room("toy", capacity=self.capacity, num_columns=self.num_columns)
        new = NewRows.of(next_tokens, positions, valid)
        last = new.sequences[new.last], new.columns[new.last]
        self.feature[last[0]] = features["near"][last].float()
        self.token[last[0]] = new.tokens[new.last]

    def select(self, rows: Tensor) -> None:
        self.feature, self.token = self.feature[rows], self.token[rows]

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        check_seen("toy", (self.token >= 0)[:, None])
        token, tokens, probs = self.token, [], []
        for _ in range(depth):
            logits = self.draft(self.feature, token)
            token, drawn = draw_tokens(logits, temperature=temperature, generator=generator)
            tokens.append(token)
            probs.append(drawn)
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if temperature else None)
