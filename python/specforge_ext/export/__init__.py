"""Draft checkpoints: atomic writer, strict reader, proof of equality."""

from specforge_ext.export.check import ExportCheck, Observed, parameters_sha256, verify_export
from specforge_ext.export.checkpoint import read_strict, write

__all__ = [
    "ExportCheck",
    "Observed",
    "parameters_sha256",
    "read_strict",
    "verify_export",
    "write",
]
