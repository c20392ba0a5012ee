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
        assert isinstance(draft, ToyDraft)
        return (draft.mix,)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        ends = torch.tensor(batch.lengths).cumsum(0)[batch.positions.new_tensor(
            [k for k, n in enumerate(batch.lengths) for _ in range(n)]
        )]  # fmt: skip
        rows = torch.arange(batch.num_tokens)
        rows = rows[(rows + 2 < ends) & batch.loss_mask[(rows + 1).clamp_max(len(rows) - 1)].bool()]
        logits = draft(batch.features["near"][rows], batch.input_ids[rows + 1])
        labels = batch.input_ids[rows + 2]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum().double()
        count = torch.tensor(float(len(rows)))
        return StepLoss(
            loss, count, {"correct": right, "rows": count.double()}, {"correct": "rows"}
        )

    def drafter(self, draft: nn.Module) -> ToyDrafter:
        assert isinstance(draft, ToyDraft)
        return ToyDrafter(draft)

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        assert isinstance(draft, ToyDraft)
        tensors = {"mix.weight": draft.mix.weight.detach().to(dtype).clone()}
        width = target.hidden_size
        config = {"hidden_size": width, "scale": draft.scale, "torch_dtype": DTYPE_NAMES[dtype]}
        return DraftCheckpoint(tensors, config)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        return {"": config}

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        width = config["hidden_size"]
        assert isinstance(width, int)
        return {"mix.weight": ((width, width), None)}

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> ToyDraft:
        draft = ToyDraft(weights, self.config.scale)
        draft.load_state_dict({name: t.float() for name, t in checkpoint.tensors.items()})
        return draft


class ToyDrafter:
    def __init__(self, draft: ToyDraft) -> None:
        self.draft = draft
        self.left = -1

    def start(self, num_sequences: int, capacity: int) -> None:
        width = self.draft.mix.in_features
        self.feature = torch.zeros(num_sequences, width)
        self.token = torch.full((num_sequences,), -1)
        self.left = capacity

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        self.left -= valid.shape[1]
        if self.left < 0:
            raise ValueError(f"toy drafter: wanted {-self.left} columns fewer")
        for column in range(valid.shape[1]):
            take = valid[:, column]
            feature = features["near"][:, column].float()
            self.feature = torch.where(take[:, None], feature, self.feature)
            self.token = torch.where(take, next_tokens[:, column], self.token)

    def select(self, rows: Tensor) -> None:
        self.feature, self.token = self.feature[rows], self.token[rows]

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        if self.left < 0 or bool((self.token < 0).any()):
            raise ValueError("toy drafter: a sequence has no row")
        token, tokens, probs = self.token, [], []
        for _ in range(depth):
            logits = self.draft(self.feature, token)
            token = logits.argmax(-1)
            if temperature > 0:
                probs.append(torch.softmax(logits / temperature, -1))
                token = torch.multinomial(probs[-1], 1, generator=generator)[:, 0]
            tokens.append(token)
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None)
