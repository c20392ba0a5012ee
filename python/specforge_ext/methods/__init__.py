"""Draft algorithms. A new one is a folder and a line here."""

from specforge_ext.methods.base import Drafter, EstimatesWork, LimitsDepth, Method, StepWork
from specforge_ext.registry import Registry

METHODS = Registry("method")
METHODS.add("eagle3", "specforge_ext.methods.eagle3:Eagle3Method")
METHODS.add("peagle", "specforge_ext.methods.peagle:PEagleMethod")
METHODS.add("dflash", "specforge_ext.methods.dflash:DFlashMethod")
METHODS.add("mtp", "specforge_ext.methods.mtp:MtpMethod")
METHODS.add("domino", "specforge_ext.methods.domino:DominoMethod")
METHODS.add("dspark", "specforge_ext.methods.dspark:DSparkMethod")

__all__ = ["METHODS", "Drafter", "EstimatesWork", "LimitsDepth", "Method", "StepWork"]
