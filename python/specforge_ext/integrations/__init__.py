"""Our losses inside other trainers: `patch("specforge" | "speculators" | "trl")`.

patch replaces the peer's draft or distillation loss, in the package as it is installed, after a
check of its version and a self-test: value and gradient of the peer's function and of ours on
small random inputs. unpatch puts back what was there. What is replaced, and at which level, is in
docs/embedding.md. Peers are imported when they are patched, not before.
"""

from __future__ import annotations

import torch

from specforge_ext.integrations import _patch, _specforge, _speculators, _trl
from specforge_ext.integrations._patch import (
    Parity,
    ParityFailed,
    Patch,
    PatchError,
    PeerMissing,
    PeerUnsupported,
    PeerVersion,
)

_PEERS = {peer.name: peer for peer in (_specforge.PEER, _speculators.PEER, _trl.PEER)}
_UNSUPPORTED = {
    "torchspec": "the only release of that name on PyPI, 0.0.1, is an empty placeholder, so there "
    "is no installed code to test a replacement against"
}


def patch(
    name: str, *, allow_untested_version: bool = False, device: torch.device | None = None
) -> Patch:
    """Puts our loss in the place of the peer's. A peer that is patched already stays as it is.

    device: where the self-test runs; None: CUDA if there is one, else the CPU.
    PeerMissing: not installed, or something that it imports is not. PeerVersion: not a tested
    version (allow_untested_version tries it: the self-test still decides), or it lacks what is to
    be replaced. ParityFailed: the self-test found another value or gradient. After an error
    nothing is patched. PeerUnsupported: torchspec. ValueError: a name that we do not know.
    """
    if name in _UNSUPPORTED:
        raise PeerUnsupported(f"{name} is not supported: {_UNSUPPORTED[name]}")
    if name not in _PEERS:
        known = ", ".join(sorted(_PEERS))
        raise ValueError(f"patch: name must be one of {known}, got {name!r}")
    done = _patch.active(name)
    if done is None:
        peer = _PEERS[name]
        version = _patch.installed_version(peer, allow_untested=allow_untested_version)
        where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        done = _patch.apply(peer, version, where)
        _patch.activate(done)
    return done


def unpatch(name: str) -> None:
    """Puts the peer's own functions back; a peer that is not patched is left alone.

    PatchError, with nothing restored, if someone has replaced ours since. ValueError: unknown name.
    """
    if name not in _PEERS and name not in _UNSUPPORTED:
        raise ValueError(f"unpatch: name must be one of {', '.join(sorted(_PEERS))}, got {name!r}")
    done = _patch.active(name)
    if done is not None:
        _patch.undo(done)


__all__ = [
    "Parity",
    "ParityFailed",
    "Patch",
    "PatchError",
    "PeerMissing",
    "PeerUnsupported",
    "PeerVersion",
    "patch",
    "unpatch",
]
