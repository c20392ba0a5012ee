"""Page-locking memory that is mapped already, so that a GPU copies from it by itself.

Through torch's own CUDA runtime (`torch.cuda.cudart`): the registration is then of the context
whose copies use it, and its errors have names. Only device attribute 113 is not to be had there; it
comes from the driver (`direct_facts`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from specforge_ext.store.base import StoreError
from specforge_ext.store.direct_facts import cuda_gpus, no_torch_cuda

log = logging.getLogger(__name__)

cuda: Any = torch.cuda
"""Parts of it have no types."""

PageLockMode = Literal["auto", "on", "off"]
PORTABLE, READ_ONLY = 0x01, 0x08
"""Flags of cudaHostRegister (driver_types.h)."""


def lock_pages(
    mode: PageLockMode, address: int, nbytes: int, *, what: str
) -> Callable[[], None] | None:
    """Register pages that are mapped read-only with CUDA; the function that takes it back.

    The caller keeps them mapped until it has called that. `auto` registers if this process uses
    CUDA already, and says in the log why not otherwise: then None. `on`: StoreError instead.
    """
    if mode == "off":
        return None
    reason = _why_not(mode) or _register(address, nbytes)
    if reason is None:
        log.info("%s: %d bytes are page-locked", what, nbytes)
        return lambda: _unregister(address, what)
    if mode == "on":
        raise StoreError(f"{what}: store.page_lock: wanted on, but {reason}")
    # Nobody misses it where CUDA is not in use.
    level = logging.INFO if cuda.is_initialized() else logging.DEBUG
    log.log(level, "%s: not page-locked: %s", what, reason)
    return None


def _why_not(mode: PageLockMode) -> str | None:
    if (reason := no_torch_cuda()) is not None:
        return reason
    if mode == "auto" and not cuda.is_initialized():
        return "this process does not use CUDA"  # and a context costs hundreds of MB
    gpus, reason = cuda_gpus()
    if reason is not None:
        return reason
    gpu = gpus[cuda.current_device()]
    if not gpu.read_only_register:
        return f"{gpu.name} registers no memory that is mapped read-only (attribute 113)"
    return None


def _register(address: int, nbytes: int) -> str | None:
    """Why it was refused, or None."""
    cudart = cuda.cudart()
    error = cudart.cudaHostRegister(address, nbytes, PORTABLE | READ_ONLY)
    if int(error) == 0:
        return None
    return f"cudaHostRegister of {nbytes} bytes: {cudart.cudaGetErrorString(error)}"


def _unregister(address: int, what: str) -> None:
    if sys.is_finalizing():
        return  # the driver takes back what a process leaves, and torch may be half gone
    # Nobody should copy from there any more, but a copy that does would fault the context.
    cuda.synchronize()
    cudart = cuda.cudart()
    error = cudart.cudaHostUnregister(address)
    if int(error) != 0:
        log.warning("%s: cudaHostUnregister: %s", what, cudart.cudaGetErrorString(error))
