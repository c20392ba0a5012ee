"""Multi-token prediction of the DeepSeek-V3 form (arXiv 2412.19437, section 2.2)."""

from specforge_ext.methods.mtp.config import MtpConfig
from specforge_ext.methods.mtp.method import MtpMethod

__all__ = ["MtpConfig", "MtpMethod"]
