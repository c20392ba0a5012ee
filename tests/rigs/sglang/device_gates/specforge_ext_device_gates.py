"""SGLang plugin for tests: lets its block drafts (DFLASH with Domino, DSPARK) run on the CPU
engine.

SGLang 0.5.23 refuses them where there is no CUDA, NPU or XPU. What is lifted here: three refusals
of the device, and Domino's of other dtypes than bfloat16; the list of attention backends that a
draft may use, a word that the CPU's attention backend wants of a verify input, and streams. One
value is kept from being rounded: SGLang casts a block's embeddings to bfloat16 whatever dtype it
serves in, which a float32 layer cannot take; for a target whose checkpoint is bfloat16 that cast
changes nothing. All else is SGLang's own.

Loaded through the entry point of the folder beside this file, when the folder is on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKEND = "intel_amx"
"""The one backend of the CPU engine that knows verify steps; its kernels are the stand-in's."""

RESOLUTION = "sglang.srt.arg_groups.speculative_hook"
AMX = "sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend"
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
DOMINO = "sglang.srt.speculative.domino_utils.validate_domino_runtime"


class AnyPlatform:
    """Answers as the platform of another vendor would: their algorithms are its own business."""

    def is_out_of_tree(self) -> bool:
        return True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return True

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return BACKEND


class SaysXpu:
    """A view of the server's arguments in which the device reads "xpu"."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Any:
        return "xpu" if name == "device" else getattr(self._view, name)


@contextmanager
def swapped(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def resolve_dflash(original: Callable[..., None], server_args: Any) -> None:
    import sglang.srt.arg_groups.speculative_hook as resolution

    with swapped(resolution, "current_platform", AnyPlatform()):
        original(server_args)


def resolve_dspark(original: Callable[..., None], server_args: Any) -> None:
    import sglang.srt.arg_groups.speculative_hook as resolution

    real = resolution.resolving_view
    with swapped(resolution, "resolving_view", lambda given: SaysXpu(real(given))):
        original(server_args)
    resolution.declare_resolution(
        server_args, "specforge_ext_device_gates", speculative_draft_attention_backend=BACKEND
    )


def check_domino(original: Callable[..., None], *, device: torch.device, **rest: Any) -> None:
    """All of the check but the device and the dtype: while it looks, weights are bfloat16."""
    modules = (rest[name] for name in ("target_embedding", "lm_head", "prefix_gru", "embed_proj"))
    held = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    try:
        for parameter, data in held:
            parameter.data = data.bfloat16()
        original(device=torch.device("cuda"), **rest)
    finally:
        for parameter, data in held:
            parameter.data = data


def chain_metadata(original: Callable[..., Any], backend: Any, batch: Any) -> Any:
    """A block is a chain, verified under the causal mask. Its verify input does not say so."""
    if batch.spec_info is not None and not hasattr(batch.spec_info, "tree_topk"):
        type(batch.spec_info).tree_topk = 1
    return original(backend, batch)


def embeddings_in_own_dtype(
    original: Callable[..., dict[str, Any]], runner: Any, batch: Any, *rest: Any
) -> dict[str, Any]:
    arguments = original(runner, batch, *rest)
    if batch.input_embeds is not None and batch.replace_embeds is None:
        arguments["input_embeds"] = batch.input_embeds.to(runner.dtype)
    return arguments


def register() -> None:
    """The entry point."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if BACKEND not in choices.DRAFT_ATTENTION_BACKEND_CHOICES:
        choices.add_draft_attention_backend_choices([BACKEND])
    # The CPU's streams are no torch.Stream, and its memory is not reused behind a stream's back.
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    for target, hook in {
        f"{RESOLUTION}._handle_dflash": resolve_dflash,
        f"{RESOLUTION}._handle_dspark": resolve_dspark,
        f"{AMX}._build_extend_metadata": chain_metadata,
        DOMINO: check_domino,
        f"{RUNNER}._extend_forward_kwargs": embeddings_in_own_dtype,
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)
