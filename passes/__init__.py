"""The rewrites, in the order in which they are tried: the first that matches a site is taken.

Adding one: a file here, its test, a line in `ORDER` (or in `CHANGES`, if it changes the model).
"""

from __future__ import annotations

from normpass.passes.convolution_kernels import ConvolutionKernels
from normpass.passes.derive_recipes import DeriveRecipes
from normpass.passes.fuse_norm_act import FuseNormAct
from normpass.passes.fuse_norm_convolution import FuseNormConvolution
from normpass.passes.group_norm import GroupNorm
from normpass.passes.inplace_abn import InplaceABN
from normpass.passes.kalman import Kalman
from normpass.passes.leaky_relu import LeakyReLU
from normpass.passes.recompute_region import RecomputeRegion, Regions
from normpass.passes.serialize_minibatch import SerializeMinibatch
from normpass.passes.serialize_norms import SerializeNorms
from normpass.passes.share_statistics import ShareStatistics
from normpass.passes.sparse_switchable import SparseSwitchable
from normpass.passes.specialise_switchable import SpecialiseSwitchable
from normpass.passes.split_bn import SplitBN
from normpass.rewrite import Rewrite

ORDER: tuple[Rewrite, ...] = (
    InplaceABN(),  # keeps one tensor and rebuilds nothing; lossy, so tried only when that is allowed
    ShareStatistics(),  # as SplitBN, without the concatenation and its moments
    SplitBN(),  # keeps one tensor exactly
    FuseNormAct(),  # where z cannot be rebuilt: still one tensor fewer than separate layers keep
)
SPECIALISE = SpecialiseSwitchable()  # before the sites: it makes other nodes of some norms
AFTER_SITES = DeriveRecipes()  # needs to know which tensors the sites rebuild
CONVOLUTIONS = ConvolutionKernels()
REGIONS = RecomputeRegion()  # last, and only what a plan asks for
JOINS = FuseNormConvolution()  # of what runs: what is planned and reported is the graph before
CHANGES: dict[str, type] = {  # option objects of `changes=`, by name
    "leaky_relu": LeakyReLU,
    "group_norm": GroupNorm,
    "kalman": Kalman,
    "sparse_switchable": SparseSwitchable,
}

__all__ = [
    "AFTER_SITES",
    "CHANGES",
    "CONVOLUTIONS",
    "JOINS",
    "ORDER",
    "REGIONS",
    "SPECIALISE",
    "ConvolutionKernels",
    "DeriveRecipes",
    "FuseNormAct",
    "FuseNormConvolution",
    "GroupNorm",
    "InplaceABN",
    "Kalman",
    "LeakyReLU",
    "RecomputeRegion",
    "Regions",
    "ShareStatistics",
    "SerializeMinibatch",
    "SerializeNorms",
    "SparseSwitchable",
    "SpecialiseSwitchable",
    "SplitBN",
]
