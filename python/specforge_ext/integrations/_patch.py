"""Replacing a function of an installed package by ours, and putting it back."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import TracebackType
from typing import Any, TypeVar

import torch


class PatchError(RuntimeError):
    """A peer could not be patched or restored; what was there before is still in place."""


class PeerMissing(PatchError):
    """The peer, or a package that it imports, is not installed."""


class PeerVersion(PatchError):
    """The installed version of the peer is not one that was tested."""


class PeerUnsupported(PatchError):
    """There is nothing of this peer that can be installed and tested against."""


class ParityFailed(PatchError):
    """Our loss does not give the peer's value and gradient on the self-test's inputs."""


@dataclass(frozen=True)
class Parity:
    """One case of the self-test: errors of ours against the peer's own function.

    value_error: relative to the peer's value. gradient_error: largest difference, relative to the
    largest entry of the peer's gradient.
    """

    case: str
    value_error: float
    gradient_error: float


Function = TypeVar("Function", bound=Callable[..., Any])

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Both float32. Sums over a vocabulary of some hundred tokens, in different orders."""


@dataclass(frozen=True)
class Target:
    """What is to be replaced: an attribute of a module, or of a class in it ("Class.name").

    replacement: makes ours, given the original as it is called.
    """

    module: str
    attribute: str
    replacement: Callable[[Any], Any]


@dataclass(frozen=True)
class Peer:
    """A package that `patch` knows. parity: runs the self-test with (originals, ours), by name."""

    name: str
    versions: tuple[str, ...]
    targets: tuple[Target, ...]
    parity: Callable[[dict[str, Any], dict[str, Any], torch.device], Sequence[Parity]]


@dataclass(frozen=True)
class Replaced:
    """One attribute that holds ours: the object it is of, its public name, and what it held."""

    owner: Any
    name: str
    label: str
    original: Any
    ours: Any


@dataclass
class Patch:
    """A patch in place. As a context manager it is undone at the end of the block.

    version: of the peer. parity: what the self-test found. replaced: what holds ours now.
    """

    peer: str
    version: str
    parity: tuple[Parity, ...]
    replaced: tuple[Replaced, ...] = field(repr=False)

    def __repr__(self) -> str:
        names = ", ".join(sorted(item.label for item in self.replaced))
        return f"Patch({self.peer} {self.version}: {names})"

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        undo(self)


def installed_version(peer: Peer, *, allow_untested: bool) -> str:
    """PeerMissing or PeerVersion unless a tested version is installed. Imports nothing."""
    wanted = " or ".join(peer.versions)
    try:
        version = metadata.version(peer.name)
    except metadata.PackageNotFoundError:
        raise PeerMissing(f"{peer.name} is not installed: wanted version {wanted}") from None
    if version not in peer.versions and not allow_untested:
        raise PeerVersion(
            f"{peer.name}: wanted version {wanted}, found {version}; "
            f"allow_untested_version=True tries all the same"
        )
    return version


def apply(peer: Peer, version: str, device: torch.device) -> Patch:
    """Imports the peer, runs the self-test, and only then replaces anything."""
    originals: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    places: list[tuple[Target, Any, str]] = []
    for target in peer.targets:
        owner, name = _owner(peer, version, target)
        originals[name] = getattr(owner, name)
        ours[name] = target.replacement(originals[name])
        places.append((target, owner, name))
    parity = tuple(peer.parity(originals, ours, device))
    _require(peer, version, parity)
    replaced: list[Replaced] = []
    for target, owner, name in places:
        replaced += _replace(peer, target, owner, name, ours[name])
    return Patch(peer.name, version, parity, tuple(replaced))


def undo(done: Patch) -> None:
    """Puts every original back, also into modules that took ours from a patched one since.

    PatchError, with nothing restored, if something else has been put in the place of ours.
    """
    if _active.get(done.peer) is not done:
        return
    for item in done.replaced:
        if vars(item.owner).get(item.name) is not item.ours:
            raise PatchError(
                f"{done.peer}: wanted our replacement in {item.label}, found "
                f"{vars(item.owner).get(item.name)!r}: undo what was patched after us first"
            )
    for item in done.replaced:
        setattr(item.owner, item.name, item.original)
        for module in _modules_with(done.peer, item.name, item.ours):
            setattr(module, item.name, item.original)
    del _active[done.peer]


def active(name: str) -> Patch | None:
    return _active.get(name)


def activate(done: Patch) -> None:
    _active[done.peer] = done


_active: dict[str, Patch] = {}


def _owner(peer: Peer, version: str, target: Target) -> tuple[Any, str]:
    *classes, name = target.attribute.split(".")
    try:
        owner: Any = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == target.module or target.module.startswith(f"{missing}."):
            raise PeerVersion(f"{peer.name} {version} has no module {missing}") from error
        raise PeerMissing(f"{peer.name} imports {missing}, which is not installed") from error
    for attribute in (*classes, name):
        if not hasattr(owner, attribute):
            raise PeerVersion(f"{peer.name} {version} has no {target.module}.{target.attribute}")
        owner = getattr(owner, attribute) if attribute is not name else owner
    return owner, name


def _replace(peer: Peer, target: Target, owner: Any, name: str, ours: Any) -> list[Replaced]:
    original = vars(owner)[name]  # a staticmethod stays one: getattr would unwrap it
    if isinstance(original, staticmethod):
        ours = staticmethod(ours)
    holders = [(owner, f"{target.module}.{target.attribute}")]
    if "." not in target.attribute:
        others = _modules_with(peer.name, name, original)
        holders += [(m, f"{m.__name__}.{name}") for m in others if m is not owner]
    for holder, _ in holders:
        setattr(holder, name, ours)
    return [Replaced(holder, name, label, original, ours) for holder, label in holders]


def _modules_with(package: str, name: str, value: Any) -> list[Any]:
    """Loaded modules of the package that hold this very object under this name."""
    return [
        module
        for key, module in list(sys.modules.items())
        if (key == package or key.startswith(f"{package}."))
        and module is not None
        and vars(module).get(name) is value
    ]


def _require(peer: Peer, version: str, parity: Sequence[Parity]) -> None:
    for item in parity:
        fits = item.value_error <= VALUE_TOLERANCE and item.gradient_error <= GRADIENT_TOLERANCE
        if not fits:  # NaN fits nothing
            raise ParityFailed(
                f"{peer.name} {version}: {item.case} must agree to {VALUE_TOLERANCE:g} in value "
                f"and {GRADIENT_TOLERANCE:g} in gradient, got {item.value_error:.1e} and "
                f"{item.gradient_error:.1e}; nothing was patched"
            )


def not_compiled(function: Function) -> Function:
    """Keeps a replacement out of the graphs of torch.compile, in which peers may call it."""
    kept: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return kept


def compare(
    case: str,
    peers: tuple[torch.Tensor, torch.Tensor],
    ours: tuple[torch.Tensor, torch.Tensor],
) -> Parity:
    """Errors of (value, gradient) against the peer's."""
    value, gradient = (tensor.detach().double() for tensor in peers)
    our_value, our_gradient = (tensor.detach().double() for tensor in ours)
    value_error = (our_value - value).abs().max() / value.abs().max()
    gradient_error = (our_gradient - gradient).abs().max() / gradient.abs().max()
    return Parity(case, float(value_error), float(gradient_error))
