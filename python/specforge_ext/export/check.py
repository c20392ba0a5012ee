"""Proof that what was exported is what was trained: fingerprints, and a bit-for-bit comparison."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specforge_ext.export.checkpoint import read_strict
from specforge_ext.methods.base import Method
from specforge_ext.records import DTYPE_NAMES, Proposal, TargetWeights


def parameters_sha256(parameters: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) of parameters: sorted names, each with its dtype, shape and bytes.

    A module stands for its named parameters; buffers do not count. Gather sharded tensors first.
    """
    if isinstance(parameters, nn.Module):
        parameters = dict(parameters.named_parameters())
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach()
        # A JSON line cannot run into the bytes before or after it: its length follows from itself.
        head = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    """[nbytes] uint8 on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(_bytes(left), _bytes(right))


@dataclass(frozen=True)
class Observed:
    """Rows for a drafter to observe before it proposes; shapes and dtypes as in
    `Drafter.observe`.
    """

    next_tokens: Tensor
    features: Mapping[str, Tensor]
    positions: Tensor
    valid: Tensor


@dataclass(frozen=True)
class ExportCheck:
    """differences: names of what is not bit-equal. parameters, outputs: tensors compared."""

    differences: tuple[str, ...]
    parameters: int
    outputs: int

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        what = f"{self.parameters} tensors and {self.outputs} outputs"
        if self.ok:
            return f"export: {what} bit-equal to the trainer's"
        return f"export: of {what}, these DIFFER from the trainer's: {', '.join(self.differences)}"


def verify_export(
    method: Method,
    draft: nn.Module,
    directory: Path,
    weights: TargetWeights,
    observed: Observed,
    *,
    depth: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> ExportCheck:
    """Restore an export through `read_strict` and compare it with the trainer's draft, bit for bit.

    draft: the trainer's, plain tensors, float32. dtype: what was exported; below float32 the
    comparison is with the draft rounded to it, since that is what the engines will run. Compared
    are all parameters and buffers, and what both propose from the same observed rows: tokens when
    greedy, tokens and distributions at temperature 1. Raises ValueError if the directory does not
    pass `read_strict`.
    """
    if dtype not in DTYPE_NAMES or not dtype.is_floating_point:
        raise ValueError(f"verify_export.dtype: wanted a floating-point dtype, got {dtype}")
    restored = method.restore(read_strict(directory, method), weights)
    wanted = _rounded(draft, dtype)
    trained, loaded = _tensors(wanted), _tensors(restored)
    differences = [
        name
        for name in sorted(trained.keys() | loaded.keys())
        if name not in trained or name not in loaded or not _same_bits(trained[name], loaded[name])
    ]
    ours = _outputs(method, wanted, observed, depth, seed)
    theirs = _outputs(method, restored, observed, depth, seed)
    differences += [name for name in ours if not _same_bits(ours[name], theirs[name])]
    return ExportCheck(tuple(differences), len(trained), len(ours))


def _rounded(draft: nn.Module, dtype: torch.dtype) -> nn.Module:
    rounded = copy.deepcopy(draft)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
    return rounded


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _outputs(
    method: Method, draft: nn.Module, observed: Observed, depth: int, seed: int
) -> dict[str, Tensor]:
    greedy = _propose(method, draft, observed, depth, temperature=0.0, generator=None)
    device = observed.next_tokens.device
    generator = torch.Generator(device).manual_seed(seed)
    sampled = _propose(method, draft, observed, depth, temperature=1.0, generator=generator)
    if sampled.probs is None:
        raise ValueError("Drafter.propose: wanted probs at temperature 1, got None")
    lengths = {} if sampled.lengths is None else {"lengths": sampled.lengths}
    return {
        "greedy tokens": greedy.tokens,
        "sampled tokens": sampled.tokens,
        "probabilities": sampled.probs,
        **lengths,
    }


def _propose(
    method: Method,
    draft: nn.Module,
    observed: Observed,
    depth: int,
    *,
    temperature: float,
    generator: torch.Generator | None,
) -> Proposal:
    drafter = method.drafter(draft)
    sequences, rows = observed.next_tokens.shape
    with torch.no_grad():
        drafter.start(sequences, rows)
        drafter.observe(observed.next_tokens, observed.features, observed.positions, observed.valid)
        return drafter.propose(depth, temperature=temperature, generator=generator)
