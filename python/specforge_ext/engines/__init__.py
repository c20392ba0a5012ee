"""Target engines. A new one is a file and a line here."""

from specforge_ext.engines.base import Engine, Into, TargetDecoder, TargetOutput
from specforge_ext.registry import Registry

ENGINES = Registry("engine")
ENGINES.add("hf", "specforge_ext.engines.hf:HfEngine")

__all__ = ["ENGINES", "Engine", "Into", "TargetDecoder", "TargetOutput"]
