"""DFlash (arXiv 2602.06036)."""

from specforge_ext.methods.dflash.config import DFlashConfig
from specforge_ext.methods.dflash.method import DFlashMethod

__all__ = ["DFlashConfig", "DFlashMethod"]
