"""Norm layers to place by hand, or with `normpass.optimize(model, changes=…)`.

KalmanNorm1d, 2d, 3d               statistics from the batch and from the norm before
SparseSwitchableNorm1d, 2d, 3d     learns to be instance, layer or batch norm
RadiusSchedule, parameter_groups   what a switchable norm needs in training
freeze_decided, usage              which have chosen, and what
as_plain_norms                     a copy with torch's own layers, for folding and export
NORM_NODES, register_with_dynamo   what they are in a captured graph
"""

from normpass.nn.estimate import Estimate
from normpass.nn.kalman import KalmanNorm1d, KalmanNorm2d, KalmanNorm3d
from normpass.nn.nodes import NORM_NODES, register_with_dynamo
from normpass.nn.plain import as_plain_norms
from normpass.nn.radius_schedule import RadiusSchedule, parameter_groups
from normpass.nn.switchable import (
    SparseSwitchableNorm1d,
    SparseSwitchableNorm2d,
    SparseSwitchableNorm3d,
    freeze_decided,
    usage,
)

__all__ = [
    "NORM_NODES",
    "Estimate",
    "KalmanNorm1d",
    "KalmanNorm2d",
    "KalmanNorm3d",
    "RadiusSchedule",
    "SparseSwitchableNorm1d",
    "SparseSwitchableNorm2d",
    "SparseSwitchableNorm3d",
    "as_plain_norms",
    "freeze_decided",
    "parameter_groups",
    "register_with_dynamo",
    "usage",
]
