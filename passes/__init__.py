"""The passes over a captured graph: `normpass.pipeline` runs them, and has their order.

    sites/     rewrites of a norm with what stands around it; the first of SITES that matches is taken
    graph/     passes over a whole graph
    changes/   changes of the model's function, asked for by name

The contracts are in `normpass.rewrite.contract`. Adding one: a file in its folder, its test, a line below.
"""

from __future__ import annotations

from normpass.passes.changes.group_norm import GroupNorm
from normpass.passes.changes.kalman import Kalman
from normpass.passes.changes.leaky_relu import LeakyReLU
from normpass.passes.changes.sparse_switchable import SparseSwitchable
from normpass.passes.graph.convolution_kernels import ConvolutionKernels
from normpass.passes.graph.fuse_norm_convolution import FuseNormConvolution
from normpass.passes.graph.join_norms import JoinNorms
from normpass.passes.graph.normal_form import DropUnread, SpellPlainly, WriteOutOfPlace
from normpass.passes.graph.rebuild_values import RebuildValues
from normpass.passes.graph.release_values import ReleaseValues
from normpass.passes.graph.serialize_minibatch import SerializeMinibatch
from normpass.passes.graph.serialize_norms import SerializeNorms
from normpass.passes.graph.two_readers import TwoReaders
from normpass.passes.sites.fuse_norm_act import FuseNormAct
from normpass.passes.sites.inplace_abn import InplaceABN
from normpass.passes.sites.share_statistics import ShareStatistics
from normpass.passes.sites.split_bn import SplitBN
from normpass.passes.sites.split_norm import SplitNorm
from normpass.rewrite.contract import GraphPass, ModelChange, SiteRewrite

SITES: tuple[SiteRewrite, ...] = (  # the first that matches a site is taken
    InplaceABN(),  # keeps one tensor and rebuilds nothing; lossy, so tried only when that is allowed
    ShareStatistics(),  # as SplitBN, without the concatenation and its moments
    SplitBN(),  # keeps one tensor exactly
    SplitNorm(),  # the same for norms with a sample's own statistics
    FuseNormAct(),  # where z cannot be rebuilt: still one tensor fewer than separate layers keep
)
JOINS: tuple[GraphPass[set[str]], ...] = (  # of what runs: what is planned and reported is the graph before
    FuseNormConvolution(),  # first: it knows norms with one result
    JoinNorms(),  # before TwoReaders, which knows its joins too
    TwoReaders(),
)
CHANGES: dict[str, type[ModelChange]] = {  # option objects of `changes=`, by name
    "leaky_relu": LeakyReLU,
    "group_norm": GroupNorm,
    "kalman": Kalman,
    "sparse_switchable": SparseSwitchable,
}

__all__ = [
    "CHANGES",
    "JOINS",
    "SITES",
    "ConvolutionKernels",
    "DropUnread",
    "FuseNormAct",
    "FuseNormConvolution",
    "GroupNorm",
    "InplaceABN",
    "JoinNorms",
    "Kalman",
    "LeakyReLU",
    "RebuildValues",
    "ReleaseValues",
    "SerializeMinibatch",
    "SerializeNorms",
    "ShareStatistics",
    "SparseSwitchable",
    "SpellPlainly",
    "SplitBN",
    "SplitNorm",
    "TwoReaders",
    "WriteOutOfPlace",
]
