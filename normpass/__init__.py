"""A graph-level compiler pass for PyTorch that halves what conv-BatchNorm-activation networks keep for backward.

optimize   the rewritten model: same function, same gradients, same state_dict
explain    what optimize would do, and why not
plan       what optimize would do for a memory budget, as a file to keep and edit
restore    the original structure back
convert    an ONNX, torch.export or weights file, verified
measure    bytes kept, peak, step time: the one definition used everywhere
"""

from normpass import measure
from normpass._version import __version__
from normpass.api import explain, optimize, plan, restore
from normpass.budget.step_plan import StepPlan
from normpass.conversion.convert import Conversion, convert
from normpass.errors import (
    ConversionError,
    InfeasibleBudgetError,
    InvalidInputError,
    InvalidModelError,
    NormpassError,
    NotAvailableError,
    StaleChangeError,
    VerificationError,
)
from normpass.optimized import Optimized
from normpass.report.summary import Report

__all__ = [
    "Conversion",
    "ConversionError",
    "InfeasibleBudgetError",
    "InvalidInputError",
    "InvalidModelError",
    "NormpassError",
    "NotAvailableError",
    "Optimized",
    "Report",
    "StepPlan",
    "StaleChangeError",
    "VerificationError",
    "__version__",
    "convert",
    "explain",
    "measure",
    "optimize",
    "plan",
    "restore",
]
