"""Draft checkpoints: atomic writer, strict reader, proof of equality, merge into a target."""

from specforge_ext.export.check import ExportCheck, Observed, parameters_sha256, verify_export
from specforge_ext.export.checkpoint import read_strict, write
from specforge_ext.export.merge import merge, merge_export

__all__ = [
    "ExportCheck",
    "Observed",
    "merge",
    "merge_export",
    "parameters_sha256",
    "read_strict",
    "verify_export",
    "write",
]
