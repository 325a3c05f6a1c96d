"""Norm layers to place by hand, or with `normpass.optimize(model, changes=…)`."""

from normpass.nn.radius_schedule import RadiusSchedule, parameter_groups
from normpass.nn.switchable import (
    SparseSwitchableNorm1d,
    SparseSwitchableNorm2d,
    SparseSwitchableNorm3d,
    freeze_decided,
    usage,
)

__all__ = [
    "RadiusSchedule",
    "SparseSwitchableNorm1d",
    "SparseSwitchableNorm2d",
    "SparseSwitchableNorm3d",
    "freeze_decided",
    "parameter_groups",
    "usage",
]
