"""A batch norm with a cumulative average (`momentum=None`) as part of a captured graph.

    1 / float(num_batches_tracked)  ──Dynamo ends its graph here──►  one node  ⇒  a number, and F.batch_norm with it

PyTorch's layer makes a number of its counter, which Dynamo does not capture. While it captures for us, `forward`
stands for that of the layer; what that called is written out once the graph is ours (`passes.normal_form`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

plain_forward = nn.modules.batchnorm._BatchNorm.forward


def forward(self: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """What `plain_forward` does."""
    counter = self.num_batches_tracked
    if self.momentum is not None or not (self.training and self.track_running_stats) or counter is None:
        return plain_forward(self, input)
    self._check_input_dim(input)
    counter.add_(1)
    return cumulative_batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, counter, self.eps)


def cumulative_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    counter: Tensor,
    eps: float,
) -> Tensor:
    """Batch norm whose running statistics become the mean over all batches, `counter` of them with this one."""
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, share_of_batch(counter), eps)


def share_of_batch(counter: Tensor) -> float:
    """What part of the running statistics the last batch has."""
    return 1.0 if isinstance(counter, FakeTensor) else 1.0 / float(counter)
