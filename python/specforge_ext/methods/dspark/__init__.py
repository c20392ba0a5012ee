"""DSpark (arXiv 2607.05147)."""

from specforge_ext.methods.dspark.config import DSparkConfig
from specforge_ext.methods.dspark.method import DSparkMethod

__all__ = ["DSparkConfig", "DSparkMethod"]
