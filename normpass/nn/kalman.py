"""Batch Kalman normalization: a layer's statistics from its own batch and from the layer before.

With the batch's mean and var, a prediction (pre_mean, pre_var) and its weight p, per channel:

    mean' = p·pre_mean + (1 − p)·mean
    var'  = p·pre_var + (1 − p)·var + p·(1 − p)·(mean − pre_mean)²

and the batch's own where the average over the channels of pre_var/var is `largest_ratio` = 100 or more (arXiv
1802.03133 and the authors' code; the paper's gain q weights the observation, q = 1 − p). With two or three values a
channel that average is nearly always large, since some observed variance is nearly 0: there nothing is smoothed,
unless `largest_ratio` is infinite. (mean', var') normalize x and are the estimate that is passed
on. What is computed is this smoothing, no more: no covariance between channels, no noise terms. The estimate is
that of a norm's *input*, and it passes the norm's own scale and shift as it is: so the authors compute it.

Without a prediction, or with p = 0, it is batch norm. With `micro_batches` each equal part of the batch has
statistics and an estimate of its own. Running averages move towards the smoothed statistics, the mean over the
micro-batches; as in `nn.BatchNorm` the batch's part of the variance is corrected by m/(m − 1). Eval mode is batch
norm, with whatever statistics `nn.BatchNorm` would take.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normpass.errors import InvalidInputError
from normpass.nn.estimate import Estimate, batch_estimate
from normpass.nn.norm import (
    BatchNormLike,
    Buffers,
    adopt,
    batch_norm,
    buffers_of,
    check_count,
    dimension_of,
    normalize,
    options_of,
    update_running,
)
from normpass.onlookers import is_plain_eager


class _KalmanNorm(BatchNormLike):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        prediction_weight: float = 0.9,
        learn_weight: bool = False,
        micro_batches: int = 1,
        largest_ratio: float = 100.0,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        check_options(prediction_weight, learn_weight, micro_batches, largest_ratio)
        self.prediction_weight, self.micro_batches = float(prediction_weight), int(micro_batches)
        self.largest_ratio = float(largest_ratio)
        self.weight_logit: nn.Parameter | None = None
        if learn_weight:
            logit = math.log(prediction_weight / (1 - prediction_weight))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.weight_logit = nn.Parameter(torch.tensor(logit, device=device, dtype=wide))

    def forward(self, x: Tensor, prediction: Estimate | None = None, with_estimate: bool = False) -> Any:
        """Normalize `x` (N, C, *); with `with_estimate` also return the `Estimate` to pass on (None in eval mode)."""
        self._check_input_dim(x)
        if not self.training:
            y = batch_norm(self, x)
            return (y, None) if with_estimate else y
        tensors = self.weight, self.bias, *buffers_of(self), self.weight_logit
        options = self.momentum, self.eps, self.prediction_weight, self.micro_batches, self.largest_ratio
        return kalman_norm(x, prediction, *tensors, *options, with_estimate)

    def extra_repr(self) -> str:
        learned = ", learned" if self.weight_logit is not None else ""
        kalman = f", prediction_weight={self.prediction_weight}{learned}, micro_batches={self.micro_batches}"
        return super().extra_repr() + kalman


class KalmanNorm1d(_KalmanNorm):
    """Batch Kalman norm of (N, C) or (N, C, L). Arguments are those of `nn.BatchNorm1d`, and

    prediction_weight: p, the weight of the prediction, in [0, 1]; 0 is batch norm.
    learn_weight: learn p from there on, as the sigmoid of a parameter of the layer.
    micro_batches: into how many equal parts a batch is divided; each has its own statistics.
    largest_ratio: where the average of predicted/observed variance is as large, the prediction is not used;
        `math.inf` uses every prediction.

    Raises:
        InvalidInputError: an option outside its range.
        ValueError: a batch that does not divide into the micro-batches.
    """

    dims = (2, 3)


class KalmanNorm2d(_KalmanNorm):
    """Batch Kalman norm of (N, C, H, W); see `KalmanNorm1d`."""

    dims = (4,)


class KalmanNorm3d(_KalmanNorm):
    """Batch Kalman norm of (N, C, D, H, W); see `KalmanNorm1d`."""

    dims = (5,)


KALMAN_NORMS = (KalmanNorm1d, KalmanNorm2d, KalmanNorm3d)


def check_options(
    prediction_weight: float, learn_weight: bool, micro_batches: int, largest_ratio: float = 100.0
) -> None:
    """InvalidInputError for options outside their range."""
    numbers = {"largest_ratio": largest_ratio, "prediction_weight": prediction_weight, "micro_batches": micro_batches}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InvalidInputError(f"`{name}` must be a number, it is {value!r}")
    if not largest_ratio > 0:
        raise InvalidInputError(f"`largest_ratio` must be > 0, it is {largest_ratio}")
    if not 0 <= prediction_weight <= 1:
        raise InvalidInputError(f"`prediction_weight` must be in [0, 1], it is {prediction_weight}")
    if learn_weight and not 0 < prediction_weight < 1:
        raise InvalidInputError(f"`prediction_weight` must be inside (0, 1) to be learned, it is {prediction_weight}")
    if micro_batches < 1 or not float(micro_batches).is_integer():
        raise InvalidInputError(f"`micro_batches` must be a whole number from 1, it is {micro_batches}")


def kalman_from(norm: nn.Module, **options: Any) -> _KalmanNorm:
    """The Kalman norm that has a BatchNorm's very parameters and buffers, in its mode."""
    dimension = dimension_of(norm)
    if dimension is None:
        raise TypeError(f"`norm` must be an nn.BatchNorm1d, 2d or 3d, it is a {type(norm).__name__}")
    layer: _KalmanNorm = adopt(KALMAN_NORMS[dimension - 1](**options_of(norm), **options), norm)
    return layer


def kalman_norm(
    x: Tensor,
    prediction: Estimate | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight_logit: Tensor | None,
    momentum: float | None,
    eps: float,
    prediction_weight: float,
    micro_batches: int,
    largest_ratio: float,
    with_estimate: bool,
) -> Any:
    """One step of the filter, in training: the node of a captured graph.

    Returns y, or with `with_estimate` y and the `Estimate` to pass on. The running statistics move.
    """
    buffers = Buffers(running_mean, running_var, num_batches_tracked)
    if prediction_weight == 0.0:
        prediction = None
    alone = prediction is None and micro_batches == 1 and not with_estimate
    if alone and (momentum is not None or is_plain_eager()):
        return _batch_norm(x, weight, bias, buffers, momentum, eps)
    observed = batch_estimate(x, micro_batches)
    count = x.numel() // x.shape[1] // micro_batches
    check_count("KalmanNorm", x, count)
    estimate, unbiased = observed, observed.var
    if prediction is not None:
        p = prediction_weight if weight_logit is None else weight_logit.to(observed.mean.dtype).sigmoid()
        estimate, unbiased = _smoothed(p, largest_ratio, observed, Estimate(*prediction), count)
    update_running(buffers, momentum, estimate.mean.mean(0), unbiased.mean(0), count)
    mean, var = estimate
    if micro_batches > 1:
        mean, var = (v.repeat_interleave(x.shape[0] // micro_batches, 0) for v in estimate)
    y = normalize(x, mean, var, weight, bias, eps)
    return (y, estimate) if with_estimate else y


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, buffers: Buffers, momentum: float | None, eps: float
) -> Tensor:
    """What `nn.BatchNorm` computes in training, bit for bit."""
    running_mean, running_var, batches = buffers
    if batches is not None:
        batches.add_(1)
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / float(batches)
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)


def _smoothed(
    p: Any, largest_ratio: float, observed: Estimate, prediction: Estimate, count: int
) -> tuple[Estimate, Tensor]:
    """The smoothed statistics; and their variance such that ·m/(m − 1) corrects the batch's part alone."""
    mean = p * prediction.mean + (1 - p) * observed.mean
    of_batch = (1 - p) * observed.var
    of_prediction = p * prediction.var + p * (1 - p) * (observed.mean - prediction.mean).square()
    if largest_ratio == math.inf:
        with torch.no_grad():
            unbiased = of_batch + of_prediction * ((count - 1) / count)
        return Estimate(mean, of_batch + of_prediction), unbiased
    usable = (prediction.var / observed.var).mean() < largest_ratio  # False for NaN
    estimate = Estimate(
        torch.where(usable, mean, observed.mean),
        torch.where(usable, of_batch + of_prediction, observed.var),
    )
    with torch.no_grad():
        unbiased = torch.where(usable, of_batch + of_prediction * ((count - 1) / count), observed.var)
    return estimate, unbiased
