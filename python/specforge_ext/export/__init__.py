"""Draft checkpoints: atomic writer, strict reader, proof of equality, conversion of formats."""

from specforge_ext.export.check import ExportCheck, Observed, parameters_sha256, verify_export
from specforge_ext.export.checkpoint import read_strict, write
from specforge_ext.export.convert import Converted, convert
from specforge_ext.export.formats import FORMATS

__all__ = [
    "FORMATS",
    "Converted",
    "ExportCheck",
    "Observed",
    "convert",
    "parameters_sha256",
    "read_strict",
    "verify_export",
    "write",
]
