"""Real speculative decoding, losslessness, baselines and what may be reported of them."""

from specforge_ext.evaluate.baselines import BigramDrafter
from specforge_ext.evaluate.decode import EvalResult, evaluate
from specforge_ext.evaluate.plain import (
    LosslessCheck,
    PlainResult,
    check_lossless,
    cyclic_share,
    plain_decode,
)
from specforge_ext.evaluate.report import (
    Acceptance,
    SpeedUp,
    acceptance_table,
    expected_speedup,
    render,
    speed_up,
    speed_up_line,
    summarise,
)
from specforge_ext.evaluate.walk import WalkEstimate, walk

__all__ = [
    "Acceptance",
    "BigramDrafter",
    "EvalResult",
    "LosslessCheck",
    "PlainResult",
    "SpeedUp",
    "WalkEstimate",
    "acceptance_table",
    "check_lossless",
    "cyclic_share",
    "evaluate",
    "expected_speedup",
    "plain_decode",
    "render",
    "speed_up",
    "speed_up_line",
    "summarise",
    "walk",
]
