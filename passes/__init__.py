"""The passes over a captured graph, and their order: `normpass.pipeline` runs them.

Adding one: a file here, its test, a line below.
"""

from __future__ import annotations

from normpass.passes.changes.group_norm import GroupNorm
from normpass.passes.changes.kalman import Kalman
from normpass.passes.changes.leaky_relu import LeakyReLU
from normpass.passes.changes.sparse_switchable import SparseSwitchable
from normpass.passes.graph.convolution_kernels import ConvolutionKernels
from normpass.passes.graph.fuse_norm_convolution import FuseNormConvolution
from normpass.passes.graph.join_norms import JoinNorms
from normpass.passes.graph.normal_form import NormalForm
from normpass.passes.graph.rebuild_values import RebuildValues
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch
from normpass.passes.graph.serialize_norms import SerializeNorms
from normpass.passes.graph.two_readers import TwoReaders
from normpass.passes.sites.fuse_norm_act import FuseNormAct
from normpass.passes.sites.inplace_abn import InplaceABN
from normpass.passes.sites.share_statistics import ShareStatistics
from normpass.passes.sites.split_bn import SplitBN
from normpass.rewrite.contract import Rewrite

NORMAL_FORM = NormalForm()  # first: what comes after knows one spelling of each thing
SITES: tuple[Rewrite, ...] = (  # the first that matches a site is taken
    InplaceABN(),  # keeps one tensor and rebuilds nothing; lossy, so tried only when that is allowed
    ShareStatistics(),  # as SplitBN, without the concatenation and its moments
    SplitBN(),  # keeps one tensor exactly
    FuseNormAct(),  # where z cannot be rebuilt: still one tensor fewer than separate layers keep
)
CONVOLUTIONS = ConvolutionKernels()
REBUILD = RebuildValues()  # after all that makes nodes: a plan says what is made again
JOINS = FuseNormConvolution()  # of what runs: what is planned and reported is the graph before
SHORTCUTS = JoinNorms()  # before TWO_READERS, which knows its joins too
TWO_READERS = TwoReaders()  # after JOINS, which knows norms with one result
CHANGES: dict[str, type] = {  # option objects of `changes=`, by name
    "leaky_relu": LeakyReLU,
    "group_norm": GroupNorm,
    "kalman": Kalman,
    "sparse_switchable": SparseSwitchable,
}

__all__ = [
    "CHANGES",
    "CONVOLUTIONS",
    "JOINS",
    "NORMAL_FORM",
    "REBUILD",
    "SHORTCUTS",
    "SITES",
    "TWO_READERS",
    "ConvolutionKernels",
    "FuseNormAct",
    "FuseNormConvolution",
    "GroupNorm",
    "InplaceABN",
    "JoinNorms",
    "Kalman",
    "LeakyReLU",
    "NormalForm",
    "RebuildValues",
    "SerializeMinibatch",
    "SerializeNorms",
    "ShareStatistics",
    "SparseSwitchable",
    "SplitBN",
    "TwoReaders",
]
