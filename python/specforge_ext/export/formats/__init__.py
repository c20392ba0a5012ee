"""Checkpoint formats of drafts: each read into, and written from, a portable one."""

from specforge_ext.export.formats.portable import Portable, Target
from specforge_ext.export.formats.source import FORMATS, interpret, module_of, read_files

__all__ = ["FORMATS", "Portable", "Target", "interpret", "module_of", "read_files"]
