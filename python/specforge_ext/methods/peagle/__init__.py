"""P-EAGLE (arXiv 2602.01469)."""

from specforge_ext.methods.peagle.config import PEagleConfig
from specforge_ext.methods.peagle.method import PEagleMethod

__all__ = ["PEagleConfig", "PEagleMethod"]
