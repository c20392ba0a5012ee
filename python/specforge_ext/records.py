"""The records that cross the walls between layers.

Legend of shapes: S tokens of one sample, T tokens of a packed batch of N samples, H hidden size.
Every record is frozen; none of them knows where it came from or where it goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
"""Names of the dtypes that may travel; the only spelling used in refs, layouts and configs."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

Encoding = Literal["none", "fp8_e4m3_row"]
"""How a feature's values lie in a store.

none: as they are. fp8_e4m3_row: e4m3fn codes, and a float32 scale per token and layer
(csrc/wire/fp8_rows.h); half the bytes of bfloat16.
"""

ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
FP8_DTYPES = ("float32", "bfloat16", "float16")
"""What fp8_e4m3_row encodes, and decodes to."""


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of a token: the concatenation of residual streams of some target layers.

    name: key of the tensor in samples and batches.
    layer_ids: HF `hidden_states` indices in order of concatenation: k is the residual stream after
        k layers, 0 the embedding. Index L (the number of layers) is the last one.
    final_norm: the target's final norm has been applied (only with layer_ids == (L,)).
    width: values per token, len(layer_ids) * hidden size.
    dtype: a key of DTYPES.
    """

    name: str
    layer_ids: tuple[int, ...]
    width: int
    dtype: str
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"FeatureSpec.dtype: wanted one of {sorted(DTYPES)}, got {self.dtype!r}"
            )
        if not self.layer_ids or self.width <= 0 or self.width % len(self.layer_ids):
            raise ValueError(
                f"FeatureSpec.width: wanted a positive multiple of {len(self.layer_ids)} layer "
                f"ids, got {self.width} for {self.name!r}"
            )


@dataclass(frozen=True)
class FeatureLayout:
    """What a method needs of the target: the only agreement between methods and engines."""

    features: tuple[FeatureSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.features]
        if len(set(names)) != len(names):
            raise ValueError(f"FeatureLayout: feature names must be unique, got {names}")

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that change when anything in the layout does."""
        text = json.dumps([asdict(spec) for spec in self.features], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.width * DTYPES[spec.dtype].itemsize for spec in self.features)

    def stored_bytes_per_token(self, encoding: Encoding) -> int:
        """Bytes in a store; scales included, alignment not."""
        if encoding == "none":
            return self.bytes_per_token
        return sum(spec.width + 4 * len(spec.layer_ids) for spec in self.features)

    @property
    def layers(self) -> dict[str, int]:
        """Layers of each feature: what stores want to know to encode it."""
        return {spec.name: len(spec.layer_ids) for spec in self.features}

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Every layer that must be captured, sorted, each once (HF `hidden_states` indices)."""
        return tuple(sorted({i for spec in self.features for i in spec.layer_ids}))


@dataclass(frozen=True)
class Prompt:
    """Token ids of one training text and which of them are scored.

    sample_id: unique and stable in its data set (a content hash), the same on every run.
    input_ids: [S] int32, CPU.
    loss_mask: [S] uint8, CPU; 1 where the token was written by the assistant (or the target).
    """

    sample_id: str
    input_ids: Tensor
    loss_mask: Tensor

    def __post_init__(self) -> None:
        for name, tensor, dtype in (
            ("input_ids", self.input_ids, torch.int32),
            ("loss_mask", self.loss_mask, torch.uint8),
        ):
            if tensor.dim() != 1 or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"Prompt.{name}: wanted [S] {dtype} on the CPU, "
                    f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
        if self.input_ids.shape != self.loss_mask.shape:
            raise ValueError(
                f"Prompt.loss_mask: wanted the length of input_ids, {len(self.input_ids)}, "
                f"got {len(self.loss_mask)}"
            )

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class Sample:
    """A prompt with its features: `features[name]` is [S, width] of the layout's dtype."""

    prompt: Prompt
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class EncodedFeature:
    """A feature [S, width] in encoding fp8_e4m3_row, L layers beside each other.

    codes: [S, width] uint8, the bits of float8_e4m3fn. scales: [S, L] float32.
    dtype: of the feature once decoded: float(code) * scale, rounded to nearest even.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in a store: `features[name]` is [S, width], as it is or encoded."""

    prompt: Prompt
    features: Mapping[str, Tensor | EncodedFeature]


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor of a sample lies: `nbytes` at `offset` in the sample's extent.

    dtype, shape: of the tensor once decoded; `nbytes` is what it has in its encoding.
    checksum: crc32c of those bytes, then of the scales'.
    num_scales: float32 scales of each token, [S, num_scales] at `scales_offset` in the extent; both
        0 with encoding none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    encoding: str = "none"
    checksum: int | None = None
    num_scales: int = 0
    scales_offset: int = 0

    @property
    def scales_nbytes(self) -> int:
        return 4 * self.num_scales * self.shape[0]

    @property
    def end(self) -> int:
        """Where its last byte in the sample's extent ends."""
        return max(self.offset + self.nbytes, self.scales_offset + self.scales_nbytes)


@dataclass(frozen=True)
class SampleRef:
    """A sample that lies in a store; never a tensor. Small enough for a line of text.

    store: kind and identity of the store ("shm:<epoch>"); a ref of another epoch is stale.
    slot, generation: locator; a reader whose generation is not the slot's gets StaleRef.
    tensors: input_ids, loss_mask and every feature of the layout.
    """

    sample_id: str
    store: str
    slot: int
    generation: int
    layout_hash: str
    num_tokens: int
    nbytes: int
    tensors: tuple[TensorRef, ...]


@dataclass(frozen=True)
class PackedBatch:
    """N samples laid end to end, without padding. What is computed equals N separate samples.

    input_ids: [T] int64. loss_mask: [T] uint8. positions: [T] int64, from 0 in each sample.
    features[name]: [T, width]. cu_seqlens: [N + 1] int32 on the batch's device; `lengths` is the
    same on the host, so that no step has to synchronise to know it.
    """

    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    input_ids: Tensor
    loss_mask: Tensor
    positions: Tensor
    features: Mapping[str, Tensor]
    cu_seqlens: Tensor

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def to(self, device: torch.device) -> PackedBatch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return PackedBatch(
            sample_ids=self.sample_ids,
            lengths=self.lengths,
            input_ids=move(self.input_ids),
            loss_mask=move(self.loss_mask),
            positions=move(self.positions),
            features={name: move(tensor) for name, tensor in self.features.items()},
            cu_seqlens=move(self.cu_seqlens),
        )


@dataclass(frozen=True)
class StepContext:
    """Where in a run a step is: what a method may depend on beside the draft and the batch.

    step: index, from 0. total_steps: of the run, at least 1. seed: of the run; with the step and a
    sample's id it keys whatever a method draws, so that packing and ranks do not change the draw.
    """

    step: int
    total_steps: int
    seed: int


@dataclass(frozen=True)
class StepLoss:
    """Sums over the rows of one micro-batch; only `trainer/step.py` divides.

    loss_sum: [] float32, differentiable, nats. weight_sum: [] float32, what the trainer divides by.
    metrics: detached float64 sums, [] or [K] (K the depth). By convention a metric `x` whose
    denominator is `y` is reported as the ratio named in `ratios[x] = y`.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    ratios: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetSpec:
    """Shape of a target model, as far as drafts depend on it.

    partial_rotary_factor: share of a head's columns, the first ones, that RoPE turns.
    """

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, object] | None
    max_position_embeddings: int
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class TargetWeights:
    """What methods take from the target, frozen, on the trainer's device.

    spec: the target's shape. embed_tokens, lm_head: [V, H], may be one. final_norm: [H],
    what the norm multiplies by (some targets store it less one).
    last_layer: state dict of the last decoder layer under its own names ("mlp.up_proj.weight"),
    its norms as factors too, for warm starts; empty where it is not wanted; may read a tensor when
    it is asked for.
    checkpoint: the tensors of the target's files under their public names, those that the model has
    no place for too (multi-token prediction); may read a tensor when it is asked for.
    """

    spec: TargetSpec
    embed_tokens: Tensor
    lm_head: Tensor
    final_norm: Tensor
    last_layer: Mapping[str, Tensor] = field(default_factory=dict)
    checkpoint: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftVocab:
    """The part of the target's vocabulary that the draft can say.

    t2d: [V] bool, True where the target id is in the draft's vocabulary.
    d2t: [Vd] int64 OFFSETS: target id = i + d2t[i]; nonzero(t2d) == d2t + arange(Vd).
    """

    t2d: Tensor
    d2t: Tensor

    @classmethod
    def full(cls, size: int) -> DraftVocab:
        """Every one of the target's `size` tokens."""
        return cls(t2d=torch.ones(size, dtype=torch.bool), d2t=torch.zeros(size, dtype=torch.int64))

    @property
    def target_ids(self) -> Tensor:
        """[Vd] int64, ascending target ids."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    @property
    def size(self) -> int:
        return int(self.d2t.numel())

    @property
    def is_full(self) -> bool:
        return self.size == int(self.t2d.numel())


def lengths_to_cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """[N + 1] int32, exclusive prefix sums of the lengths, CPU."""
    out = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    out[1:] = torch.tensor(list(lengths), dtype=torch.int64).cumsum(0).to(torch.int32)
    return out


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft as engines load it: tensors under their public names, and config.json."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, object]


@dataclass(frozen=True)
class Proposal:
    """What a draft proposes for B sequences: K tokens each, and the distributions behind them.

    tokens: [B, K] int64, target ids. probs: [B, K, V] float32 over the target's vocabulary
    (0 outside the draft's), at the temperature asked for; None when greedy.
    lengths: [B] int64 in 0..K, how many of the tokens are proposed: the columns from there on hold
    any ids, and their probs are not looked at; None: all. Whether a token is proposed may depend on
    those before it, not on itself, or sampling is not exact.
    """

    tokens: Tensor
    probs: Tensor | None
    lengths: Tensor | None = None

    def proposed(self) -> Tensor:
        """[B, K] bool, which of the tokens are proposed."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        if self.lengths is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return columns < self.lengths[:, None]
