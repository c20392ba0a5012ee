"""Checkpoints of drafts: writer, strict reader, proof of equality, other formats, merging."""

from specforge_ext.export.check import ExportCheck, Observed, parameters_sha256, verify_export
from specforge_ext.export.checkpoint import read_strict, write
from specforge_ext.export.convert import Converted, convert
from specforge_ext.export.formats import FORMATS
from specforge_ext.export.merge import merge, merge_export

__all__ = [
    "FORMATS",
    "Converted",
    "ExportCheck",
    "Observed",
    "convert",
    "merge",
    "merge_export",
    "parameters_sha256",
    "read_strict",
    "verify_export",
    "write",
]
