"""The switchable norm by itself: its formula, its decisions, what a decided layer computes and keeps."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import image as values

from normpass.measure import kept_bytes
from normpass.nn import (
    SparseSwitchableNorm1d,
    SparseSwitchableNorm2d,
    SparseSwitchableNorm3d,
    freeze_decided,
    usage,
)
from normpass.nn.switchable import NORMS, switchable_from
from normpass.ops import sparsest_max

LAYERS = [
    (SparseSwitchableNorm1d, nn.BatchNorm1d, (6, 4)),
    (SparseSwitchableNorm1d, nn.BatchNorm1d, (6, 4, 5)),
    (SparseSwitchableNorm2d, nn.BatchNorm2d, (6, 4, 3, 2)),
    (SparseSwitchableNorm2d, nn.BatchNorm2d, (6, 4, 1, 1)),
    (SparseSwitchableNorm3d, nn.BatchNorm3d, (6, 4, 2, 3, 2)),
]
PAIRS = list(itertools.product(NORMS, repeat=2))


def layer(kind=SparseSwitchableNorm2d, radius=0.3, channels=4, **options):
    """An undecided layer, away from its initial values."""
    norm = kind(channels, **options).double()
    with torch.no_grad():
        norm.weight.copy_(values(channels, seed=1))
        norm.bias.copy_(values(channels, seed=2))
        norm.running_mean.copy_(values(channels, seed=3))
        norm.running_var.copy_(values(channels, seed=4).square() + 0.5)
        norm.mean_logits.copy_(torch.tensor([0.9, 1.0, 0.8]))
        norm.var_logits.copy_(torch.tensor([0.7, 0.85, 1.0]))
        norm.radius.fill_(radius)
    return norm


def decided(kind, mean_of, var_of, **options):
    norm = layer(kind, radius=1.0, **options)
    with torch.no_grad():
        norm.mean_logits[NORMS.index(mean_of)] = 2.0
        norm.var_logits[NORMS.index(var_of)] = 2.0
    freeze_decided(norm)
    assert norm.chosen == (mean_of, var_of)
    return norm


def formula(norm, x):
    """y = weight·(x − Σ p·mean)/√(Σ q·var + eps) + bias, each norm's moments taken by itself."""
    spatial = list(range(2, x.dim()))
    dims = {"instance": spatial, "layer": [1, *spatial], "batch": [0, *spatial]}
    means, variances = {}, {}
    for name, over in dims.items():
        means[name] = x.mean(over, keepdim=True) if over else x
        variances[name] = x.var(over, correction=0, keepdim=True) if over else torch.zeros_like(x)
    shape = (1, -1, *[1] * len(spatial))
    if not norm.training:
        means["batch"], variances["batch"] = norm.running_mean.view(shape), norm.running_var.view(shape)
    p, q = sparsest_max(norm.mean_logits, norm.radius), sparsest_max(norm.var_logits, norm.radius)
    mean = sum(p[k] * means[name] for k, name in enumerate(NORMS))
    var = sum(q[k] * variances[name] for k, name in enumerate(NORMS))
    return norm.weight.view(shape) * (x - mean) / torch.sqrt(var + norm.eps) + norm.bias.view(shape)


def assert_alike(norm, x, expected_function):
    """Values and the gradients of the input and of every parameter agree."""
    tensors = [x.requires_grad_(), *(p for p in norm.parameters() if p.requires_grad)]
    expected, found = expected_function(norm, x), norm(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    cotangent = values(*x.shape, seed=7)
    for a, b in zip(
        torch.autograd.grad(found, tensors, cotangent, allow_unused=True),
        torch.autograd.grad(expected, tensors, cotangent, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("kind, plain, shape", LAYERS)
def test_formula(kind, plain, shape, radius, training):
    assert_alike(layer(kind, radius).train(training), values(*shape), formula)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean_of, var_of", PAIRS)
@pytest.mark.parametrize("kind, plain, shape", LAYERS)
def test_decided_layers_are_what_they_chose(kind, plain, shape, mean_of, var_of, training):
    norm = decided(kind, mean_of, var_of).train(training)
    if mean_of != var_of or (mean_of == "instance" and len(shape) == 2):
        assert_alike(norm, values(*shape), formula)  # there is no plain layer of that kind
    else:
        assert_alike(norm, values(*shape), PLAIN[mean_of])


def plain_instance_norm(norm, x):
    return torch.instance_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps, False)


def plain_layer_norm(norm, x):
    return F.group_norm(x, 1, norm.weight, norm.bias, norm.eps)


def plain_batch_norm(norm, x):
    running = norm.running_mean.clone(), norm.running_var.clone()
    return F.batch_norm(x, *running, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


PLAIN = {"instance": plain_instance_norm, "layer": plain_layer_norm, "batch": plain_batch_norm}


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind, plain, shape", LAYERS)
def test_running_averages_are_batch_norms(kind, plain, shape, momentum):
    norm, batch_norm = layer(kind, momentum=momentum), plain(4, momentum=momentum).double()
    batch_norm.load_state_dict({k: v for k, v in norm.state_dict().items() if k in batch_norm.state_dict()})
    for step in range(2):
        x = values(*shape, seed=step)
        norm(x)
        batch_norm(x)
    for name, buffer in batch_norm.named_buffers():
        torch.testing.assert_close(getattr(norm, name), buffer, rtol=0, atol=1e-14)


def test_gradcheck():
    norm = layer()
    parameters = dict(norm.named_parameters())

    def run(x, *tensors):
        return torch.func.functional_call(norm, dict(zip(parameters, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (values(3, 4, 2, 2).requires_grad_(), *parameters.values()))


def test_far_from_zero():
    norm = layer().float()
    x = (values(4, 4, 16, 16) + 1000.0).float()
    exact = formula(layer(), x.double())
    assert ((norm(x) - exact).abs() / (1 + exact.abs())).max() < 1e-3


def test_bfloat16_keeps_the_logits_wide():
    norm = SparseSwitchableNorm2d(4, dtype=torch.bfloat16)
    assert norm.mean_logits.dtype == norm.radius.dtype == torch.float32
    y = norm(values(2, 4, 3, 3).to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        wide = SparseSwitchableNorm2d(4)
        wide(values(2, 4, 3, 3).float()).sum().backward()
    assert wide.mean_logits.grad.dtype == torch.float32


# --- what a decided layer costs ---------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts the reductions of a forward that read an activation."""

    REDUCTIONS = ("var_mean", "native_batch_norm", "cudnn_batch_norm", "native_group_norm", "moments")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.count += any(word in name for word in self.REDUCTIONS)
        return func(*args, **(kwargs or {}))


def reductions(function):
    with Counter() as counter, torch.no_grad():
        function()
    return counter.count


@pytest.mark.parametrize("mean_of, var_of", PAIRS)
def test_a_decided_layer_keeps_and_computes_no_more_than_the_plain_norm(mean_of, var_of):
    norm, x = decided(SparseSwitchableNorm2d, mean_of, var_of).float(), values(4, 4, 16, 16).float()
    plain = {"instance": nn.InstanceNorm2d(4, affine=True), "layer": nn.GroupNorm(1, 4), "batch": nn.BatchNorm2d(4)}
    inner = x.clone().requires_grad_()
    head = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    costs = [
        (kept_bytes(nn.Sequential(head[0], p), inner), reductions(lambda p=p: p(x)))
        for p in (plain[mean_of], plain[var_of])
    ]
    kept, count = kept_bytes(head, inner), reductions(lambda: norm(x))
    assert count == 1 == max(c for _, c in costs)
    small = 4 * (4 * 4 * 4 + 4)  # a mixed pair keeps statistics of samples where a batch norm keeps the batch's
    assert kept <= max(k for k, _ in costs) + (small if mean_of != var_of else 0)


def test_an_undecided_layer_takes_its_moments_once_and_keeps_its_input_alone():
    norm, x = layer().float(), values(4, 4, 16, 16).float()
    assert reductions(lambda: norm(x)) <= 2  # one op, which may count as two where it calls another
    kept = kept_bytes(nn.Sequential(nn.Conv2d(4, 4, 1), norm), x)
    assert kept < 1.2 * kept_bytes(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), x)


def test_a_decided_layer_reads_no_logits():
    norm = decided(SparseSwitchableNorm2d, "batch", "batch")
    norm(values(2, 4, 3, 3)).sum().backward()
    assert norm.mean_logits.grad is None and not norm.mean_logits.requires_grad


# --- decisions, states, copies ----------------------------------------------------------------------


def test_freezing():
    model = nn.Sequential(layer(radius=1.0), nn.Conv2d(4, 4, 1).double(), layer(radius=0.1))
    model(values(2, 4, 3, 3)).sum().backward()
    assert model[0].mean_logits.grad is not None
    assert freeze_decided(model) == ["0"]
    assert model[0].chosen == ("layer", "batch") and model[2].chosen is None
    assert model[0].mean_logits.grad is None and model[2].mean_logits.requires_grad
    assert freeze_decided(model) == ["0"]


def test_momentum_does_not_move_a_decided_layer():
    norm = layer(radius=0.3)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    norm(values(4, 4, 3, 3)).square().mul(values(4, 4, 3, 3, seed=6)).sum().backward()
    optimizer.step()
    norm.radius.fill_(1.0)
    freeze_decided(norm)
    before = norm.mean_logits.clone(), norm.var_logits.clone()
    optimizer.zero_grad(set_to_none=False)
    norm(values(4, 4, 3, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(norm.mean_logits, before[0]) and torch.equal(norm.var_logits, before[1])


def test_loading_decides():
    source, target = decided(SparseSwitchableNorm2d, "layer", "layer"), layer()
    x = values(2, 4, 3, 3)
    target.load_state_dict(source.state_dict())
    assert target.chosen == ("layer", "layer") and not target.mean_logits.requires_grad
    assert torch.equal(target(x), source(x))
    target.load_state_dict(layer().state_dict())
    assert target.chosen is None and target.mean_logits.requires_grad
    assert torch.equal(target(x), layer()(x))


def test_copies_keep_the_decision():
    norm = decided(SparseSwitchableNorm2d, "instance", "batch")
    assert copy.deepcopy(norm).chosen == ("instance", "batch")
    assert "chosen=('instance', 'batch')" in repr(norm)


def test_it_takes_over_a_batch_norm():
    batch_norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3).double()
    batch_norm(values(4, 4, 3, 3))
    norm = switchable_from(batch_norm.eval())
    assert norm.weight is batch_norm.weight and norm.running_var is batch_norm.running_var
    assert (norm.eps, norm.momentum, norm.training) == (1e-3, 0.3, False)
    with torch.no_grad():
        norm.mean_logits[2] = norm.var_logits[2] = 3.0
    torch.testing.assert_close(norm(values(2, 4, 3, 3)), batch_norm(values(2, 4, 3, 3)), rtol=0, atol=1e-13)
    with pytest.raises(TypeError, match="`norm` must be an nn.BatchNorm1d, 2d or 3d, it is a GroupNorm"):
        switchable_from(nn.GroupNorm(1, 4))


def test_usage():
    model = nn.Sequential(decided(SparseSwitchableNorm2d, "batch", "layer"), SparseSwitchableNorm2d(4))
    used = usage(model)
    assert used["mean"] == pytest.approx({"instance": 1 / 6, "layer": 1 / 6, "batch": 4 / 6})
    assert used["var"] == pytest.approx({"instance": 1 / 6, "layer": 4 / 6, "batch": 1 / 6})
    assert usage(nn.Conv2d(1, 1, 1)) == {}


def test_one_value_per_channel_is_refused_in_training():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer()(values(1, 4, 1, 1))
    assert layer().eval()(values(1, 4, 1, 1)).isfinite().all()
