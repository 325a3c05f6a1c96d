"""What the kernels of a device are: the tensors they are given, how these lie, the activations, what each computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ACTIVATIONS = (
    "identity relu hardtanh leaky_relu elu selu celu silu gelu gelu_tanh "
    "hardswish hardsigmoid sigmoid tanh softplus mish "
    "softsign log_sigmoid hardshrink softshrink tanhshrink clamp open_clamp threshold squared_relu"
).split()
"""In the order of the codes in `include/activation.h`."""


DEPTHWISE_WIDTHS, DEPTHWISE_STRIDES = (3, 5, 7), (1, 2)
"""of the rows of a depthwise convolution's kernel, and of its steps along them: others are the vendor's"""
WINOGRAD_CHANNELS = 16
"""a 3×3 convolution with fewer is the vendor's"""


class Layout(NamedTuple):
    """How the values of a dense (N, C, *) tensor lie in memory: `outer` × `channels` × `inner`.

    Contiguous: (N, C, spatial). channels_last and two-dimensional: (N·spatial, C, 1).
    """

    outer: int
    channels: int
    inner: int


class Groups(NamedTuple):
    """How the values of a dense (N, C, *) tensor lie whose channels are normalized in groups, sample by sample."""

    samples: int
    groups: int
    channels: int
    spatial: int
    """values of one channel of one sample"""
    is_rows: bool
    """whether the channels lie side by side (channels_last, two-dimensional), not one behind the other"""


class Rows(NamedTuple):
    """How the values of a contiguous tensor lie whose last dimensions are normalized by themselves."""

    rows: int
    width: int
    is_centred: bool
    """whether a mean is subtracted; RMS norm has none: its mean is 0, and its variance the mean square"""


class Running(NamedTuple):
    """Running statistics, (C,) in the statistics dtype, to be updated in place with one batch."""

    mean: Tensor
    var: Tensor
    momentum: float


class Norm(NamedTuple):
    """A norm and its activation: z = act((x − mean)·rsqrt(var + eps)·weight + bias).

    weight, bias, mean, var: contiguous, (C,), in the statistics dtype.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    """None for `inplace_abn_backward` alone, which has x̂ from z, weight and bias, and reads neither x nor its mean"""
    var: Tensor
    eps: float
    activation: str
    activation_args: Sequence[float]
    slope: Tensor | None = None
    """(C,): a PReLU stands for the activation, for kernels that have `takes_slopes`; then there is no residual"""


class Depthwise(Protocol):
    """Convolutions with a kernel of their own for every channel: `ops.depthwise_conv2d`.

    x, y and grad: dense in one memory format. weight: (C, 1, kernel height, kernel width), contiguous. stride, padding:
    rows and columns.
    """

    def convolves(
        self,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> bool:
        """Whether `convolve` takes an x of this kind, or with `transposed` a gradient."""

    def has_input_gradient(
        self,
        x: Tensor,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> bool:
        """Whether `convolve` gives the gradient of x, in `memory_format`, faster than the vendor's."""

    def convolve(
        self,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        transposed: bool = False,
        norm: Norm | None = None,
    ) -> None:
        """y from x; with `norm` from z, which is computed while x is read and never written.

        `transposed`: x is the gradient of the result and y that of the input.
        """

    def has_weight_gradient(
        self,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        kernel_size: Sequence[int],
        stride: Sequence[int],
    ) -> bool:
        """Whether `weight_gradient` takes an x of this kind, and faster than the vendor's."""

    def weight_gradient(
        self,
        dweight: Tensor,
        grad: Tensor,
        x: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        memory_format: torch.memory_format,
    ) -> None:
        """dweight: in the statistics dtype."""

    def norm_act_backward(
        self,
        dx: Tensor | None,
        dnorm_weight: Tensor | None,
        dnorm_bias: Tensor | None,
        dweight: Tensor | None,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        norm: Norm,
        batch_statistics: bool,
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> None:
        """All gradients of `convolve` with a norm, for what `convolves` allows.

        dnorm_weight, dnorm_bias: (C,), of the norm's weight and bias. batch_statistics: mean and var are x's own, and
        dx goes through them.
        """


class SampleNorms(Protocol):
    """Norms whose statistics are a sample's own: `ops.group_norm_act` and `ops.row_norm_act`.

    mean, var: (N, groups) or (rows,), contiguous, in the statistics dtype; computed where `is_given` is False. weight,
    bias: (C,) or (width,). The activation-sized tensors lie as `Groups` or `Rows` say; all are of one dtype.
    """

    def group_norm_act(
        self, z: Tensor, x: Tensor, residual: Tensor | None, norm: Norm, is_given: bool, groups: Groups
    ) -> None: ...

    def group_norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        groups: Groups,
        dslope: Tensor | None = None,
    ) -> None: ...

    def row_norm_act(self, z: Tensor, x: Tensor, norm: Norm, is_given: bool, rows: Rows) -> None: ...

    def row_norm_act_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        norm: Norm,
        rows: Rows,
    ) -> None: ...


class Winograd(Protocol):
    """3×3 convolutions of stride 1 in float32 and float64, of fewer multiplications: `ops.winograd_conv2d`."""

    def pays(self, x: Tensor, channels: int, size: Sequence[int], of_weight: bool) -> bool:
        """Whether it is faster than the vendor's.

        x: (N, C, H, W), read in its own memory format. channels, size: of the result. of_weight: for the gradient of
        the weight; else for the convolution, transposed or not.
        """

    def convolve(
        self,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: Sequence[int],
        transposed: bool,
        memory_format: torch.memory_format,
        weight_format: torch.memory_format,
    ) -> Tensor | None:
        """x and y are dense in `memory_format`, the weight in `weight_format`; all of one dtype.

        Returns the numbers of the tiles of 2×2 results, counted row by row and sample by sample, whose values in y are
        not good enough and must be computed otherwise, in any order; None where those of y all must be.
        """

    def weight_gradient(
        self, dweight: Tensor, grad: Tensor, x: Tensor, padding: Sequence[int], memory_format: torch.memory_format
    ) -> bool:
        """All are dense in `memory_format` and of one dtype. Returns whether dweight is good enough."""


class Kernels(Protocol):
    """The kernels of one device.

    Every (N, C, *) tensor is not empty, of one dtype that `supports` allows, dense and in the one `layout`. Every
    per-channel tensor is contiguous, (C,), in the statistics dtype: float64 for float64, float32 for narrower ones.
    Results are written to the tensors named first, which share no memory with the others; None is one that is not
    needed. The formulas are in the docstrings of `normpass.ops`.
    """

    most_pieces: int
    """of a concatenation, in one call"""
    adds_gradients: bool
    """whether `norm_act_backward` takes a gradient in two parts, `grad` and `other`"""
    masks: frozenset[str]
    """activations for which `norm_act` writes a mask of a residual join, and `norm_act_backward` reads it"""
    takes_slopes: bool
    """whether the norms of batches and of groups may have a `slope`, and their backward gives its gradient"""
    normalizes_residuals: bool
    """whether `norm_act` takes a residual that a norm makes as that norm's input"""

    @property
    def failures(self) -> Sequence[str]:
        """What has turned out not to run as a kernel, and why."""

    def supports(self, dtype: torch.dtype) -> bool: ...

    def moments(self, mean: Tensor, var: Tensor, x: Tensor, layout: Layout, running: Running | None = None) -> None: ...

    def norm_act(
        self,
        z: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        layout: Layout,
        mask: Tensor | None = None,
        of_residual: Norm | None = None,
    ) -> None:
        """`mask` for an activation in `masks`, with a residual: memory for it (`masks.bytes_of_mask`), from `x` and
        `residual` whose addresses 16 divides.

        `of_residual`, for kernels that normalize residuals: `residual` is the input of this norm, without activation,
        whose result is added as if it had been stored.
        """

    def norm_act_backward(
        self,
        dx: Tensor | None,
        dresidual: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
        other: Tensor | None = None,
        mask: Tensor | None = None,
        dslope: Tensor | None = None,
    ) -> None:
        """`other` for kernels that have `adds_gradients` alone: like `grad`, whose sum is rounded as if stored.

        `mask`: what `norm_act` wrote, and then `residual` is None.
        """

    def cat_norm_act(
        self,
        z: Tensor,
        xs: Sequence[Tensor],
        norm: Norm,
        layout: Layout,
    ) -> None:
        """`norm_act` of the concatenation of `xs`, each dense for itself; `layout` is the concatenation's."""

    def cat_norm_act_backward(
        self,
        dxs: Sequence[Tensor | None],
        adds: Sequence[bool],
        totals: Sequence[Tensor | None],
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        xs: Sequence[Tensor],
        norm: Norm,
        layout: Layout,
    ) -> None:
        """a·dy to each of `dxs`, or added to it. What goes through the batch's statistics is added to `totals`.

        `totals`: (2, C) of each piece in float64, B and C of `add_statistics_gradient`. No two of `dxs` or `totals`
        share memory.
        """

    def add_statistics_gradient(self, dx: Tensor, x: Tensor, mean: Tensor, total: Tensor, layout: Layout) -> None:
        """dx += B·(x − mean) + C, in place; `total` is (2, C) in float64."""

    def inplace_abn_backward(
        self,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        grad: Tensor,
        z: Tensor,
        norm: Norm,
        batch_statistics: bool,
        layout: Layout,
    ) -> None: ...

    def running_stats(self, running: Running, mean: Tensor, var: Tensor, count: int) -> None: ...

    @property
    def depthwise(self) -> Depthwise | None:
        """None where the vendor's are to run."""

    @property
    def winograd(self) -> Winograd | None:
        """None where the vendor's convolutions are to run."""

    @property
    def sample_norms(self) -> SampleNorms | None:
        """None where ATen's are to run."""
