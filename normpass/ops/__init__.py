"""The operators of normpass: `torch.ops.normpass.*`, each declared in the file of its name.

Importing this package registers them all. The functions below are the same operators with typed signatures.
"""

from .activation import Activation, activate, activate_, activation_backward, deactivate
from .cat_norm_act import cat_norm_act
from .cat_norm_act_backward import cat_norm_act_backward
from .depthwise_conv2d import depthwise_conv2d, depthwise_weight_gradient
from .inplace_abn import inplace_abn
from .inplace_abn_backward import inplace_abn_backward
from .instance_moments import instance_moments, merged_moments
from .layout import memory_format_of
from .moments import moments
from .norm_act import norm_act
from .norm_act_backward import norm_act_backward
from .running_stats import updated_running_stats
from .shift_scale import shift_scale
from .sparsest_max import sparsest_max
from .winograd_conv2d import winograd_conv2d, winograd_weight_gradient

__all__ = [
    "Activation",
    "activate",
    "activate_",
    "activation_backward",
    "cat_norm_act",
    "cat_norm_act_backward",
    "deactivate",
    "depthwise_conv2d",
    "depthwise_weight_gradient",
    "inplace_abn",
    "inplace_abn_backward",
    "instance_moments",
    "memory_format_of",
    "merged_moments",
    "moments",
    "norm_act",
    "norm_act_backward",
    "shift_scale",
    "sparsest_max",
    "updated_running_stats",
    "winograd_conv2d",
    "winograd_weight_gradient",
]
