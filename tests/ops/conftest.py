"""What the op tests share: sites to try, the plain formulas to hold against, and a distance of tensors."""

import math
import warnings
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normpass import kernels as library
from normpass import ops
from normpass.kernels.cpu import winograd as cpu_winograd
from normpass.ops import Activation
from normpass.ops.eager import eager_device
from normpass.ops.inplace_abn import inplace_abn_on
from normpass.ops.norm_act import rebuild_norm_act

EPS = 1e-5

SMOOTH = ("identity", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "softplus", "mish", "log_sigmoid", "tanhshrink")
INVERTIBLE = [
    Activation("identity"),
    Activation("leaky_relu", (0.1,)),
    Activation("elu", (1.0,)),
    Activation("elu", (0.7,)),
    Activation("selu"),
    Activation("celu", (0.5,)),  # ATen rounds 1/alpha to float32 in the derivative
]
ACTIVATIONS = [
    *INVERTIBLE,
    Activation("relu"),
    Activation("hardtanh", (0, 6)),
    Activation("hardtanh", (-1, 1)),
    Activation("leaky_relu", (0.0,)),
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("hardswish"),
    Activation("hardsigmoid"),
    Activation("sigmoid"),
    Activation("tanh"),
    Activation("softplus", (1.0, 20.0)),
    Activation("softplus", (2.0, 20.0)),
    Activation("mish"),
    Activation("softsign"),
    Activation("log_sigmoid"),
    Activation("hardshrink", (0.5,)),
    Activation("softshrink", (0.5,)),
    Activation("tanhshrink"),
    Activation("clamp", (-1.01, 1.51)),
    Activation("clamp", (0.01, float("inf"))),
    Activation("open_clamp", (-1.01, 1.51)),
    Activation("open_clamp", (-float("inf"), 0.51)),
    Activation("threshold", (0.2, -1.0)),
    Activation("squared_relu"),
]

_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)

FORMULAS = {
    "identity": lambda y: y * 1,
    "relu": lambda y: torch.where(y > 0, y, 0.0),
    "hardtanh": lambda y, low, high: torch.where(y < low, low, torch.where(y > high, high, y)),
    "leaky_relu": lambda y, slope: torch.where(y > 0, y, slope * y),
    "elu": lambda y, alpha: torch.where(y > 0, y, alpha * (y.exp() - 1)),
    "selu": lambda y: _SELU[1] * torch.where(y > 0, y, _SELU[0] * (y.exp() - 1)),
    "celu": lambda y, alpha: torch.where(y > 0, y, alpha * ((y / alpha).exp() - 1)),
    "silu": lambda y: y / (1 + (-y).exp()),
    "gelu": lambda y: y * (1 + torch.erf(y / math.sqrt(2))) / 2,
    "gelu_tanh": lambda y: y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2,
    "hardswish": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda y: (y + 3).clamp(0, 6) / 6,
    "sigmoid": lambda y: 1 / (1 + (-y).exp()),
    "tanh": lambda y: 1 - 2 / ((2 * y).exp() + 1),
    "softplus": lambda y, beta, threshold: (1 + (beta * y).exp()).log() / beta,
    "mish": lambda y: y * torch.tanh((1 + y.exp()).log()),
    "softsign": lambda y: y / (1 + y.abs()),
    "log_sigmoid": lambda y: -(1 + (-y).exp()).log(),
    "hardshrink": lambda y, lambd: torch.where(y.abs() > lambd, y, 0.0),
    "softshrink": lambda y, lambd: torch.where(y.abs() > lambd, y - lambd * y.sign(), 0.0),
    "tanhshrink": lambda y: y - torch.tanh(y),
    "clamp": lambda y, low, high: torch.where(y < low, low, torch.where(y > high, high, y)),
    "open_clamp": lambda y, low, high: torch.where(y < low, low, torch.where(y > high, high, y)),
    "threshold": lambda y, threshold, value: torch.where(y > threshold, y, value),
    "squared_relu": lambda y: torch.where(y > 0, y * y, 0.0),
}


@dataclass(frozen=True)
class Site:
    """The arguments of one norm-activation call, in the order of the op's schema, and dL/d(its result)."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    batch_statistics: bool
    activation: Activation
    grad: Tensor
    eps: float = field(default=EPS)

    @property
    def options(self):
        return self.eps, self.batch_statistics, self.activation.name, list(self.activation.args)

    @property
    def norm_act_args(self):
        return self.x, self.residual, self.weight, self.bias, self.mean, self.var, *self.options

    @property
    def inplace_abn_args(self):
        return self.x, self.weight, self.bias, self.mean, self.var, *self.options

    @property
    def inputs(self):
        """What has a gradient, without what is absent."""
        return [t for t in (self.x, self.residual, self.weight, self.bias) if t is not None]

    def value_and_gradients(self, z):
        return [z, *torch.autograd.grad(z, self.inputs, self.grad)]

    def in_double(self):
        """The same site in float64, with leaves of its own."""

        def wide(t):
            return t if t is None else t.detach().double().requires_grad_(t.requires_grad)

        names = ("x", "residual", "weight", "bias", "mean", "var", "grad")
        return replace(self, **{name: wide(getattr(self, name)) for name in names})


def plain(site):
    """z by the plain formula, the statistics of the batch inside the graph: what every op is held against."""
    x = site.x
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var = site.mean, site.var
    if site.batch_statistics:
        dims = [0, *range(2, x.dim())]
        mean = x.mean(dims)
        var = ((x - mean.view(shape)) ** 2).mean(dims)
    y = (x - mean.view(shape)) / (var.view(shape) + site.eps).sqrt()
    if site.weight is not None:
        y = y * site.weight.view(shape)
    if site.bias is not None:
        y = y + site.bias.view(shape)
    if site.residual is not None:
        y = y + site.residual
    return FORMULAS[site.activation.name](y, *site.activation.args)


def strided(t, layout):
    """`t` with the strides that `layout` names, and the same values."""
    if layout == "channels_last":
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[t.dim()]
        return t.contiguous(memory_format=memory_format)
    if layout == "every_other":
        return torch.stack([t, t], -1)[..., 0]
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    assert layout == "contiguous", layout
    return t.contiguous()


def build_site(
    shape=(4, 3, 5, 6),
    *,
    dtype=torch.float64,
    layout="contiguous",
    grad_layout="contiguous",
    residual=True,
    affine=True,
    batch_statistics=True,
    activation=None,
    requires_grad=True,
    offset=0.0,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = strided((1.5 * draw(*shape) + 0.3 + offset).to(dtype), layout)
    channels = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if batch_statistics:
        dims = [0, *range(2, len(shape))]
        var, mean = torch.var_mean(x.double(), dims, correction=0)
    else:
        mean, var = 0.2 * draw(channels) + offset, 0.5 + draw(channels) ** 2
    site = Site(
        x=x,
        residual=strided(draw(*shape).to(dtype), grad_layout) if residual else None,
        weight=(1 + 0.5 * draw(channels)).to(wide) if affine else None,
        bias=draw(channels).to(wide) if affine else None,
        mean=mean.to(wide),
        var=var.to(wide),
        batch_statistics=batch_statistics,
        activation=activation or Activation("relu"),
        grad=strided(draw(*shape).to(dtype), grad_layout),
    )
    if requires_grad:
        for t in site.inputs:
            t.requires_grad_()
    return site


def distance(a, b):
    """max |a − b| over the largest |b|: the error that counts, as against a scale."""
    if a.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    scale = b.double().abs().max().clamp(min=1e-300)
    return ((a.double() - b.double()).abs().max() / scale).item()


def check_op(op, args):
    """`torch.library.opcheck`, whose own look at `.grad` warns in torch 2.15."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        torch.library.opcheck(op, args)


class LiveTensors(TorchDispatchMode):
    """Counts how many tensors of one size made inside are alive at once, in `peak`."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive, self.peak = numel, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in args if isinstance(t, Tensor)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.numel() == self.numel and t.data_ptr() not in given:
                self.alive.append(weakref.ref(t))
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.peak = max(self.peak, len({ref().data_ptr() for ref in self.alive}))
        return result


@pytest.fixture(params=["reference", "kernels"])
def kernels(request):
    """The CPU's kernels, and then None with all of them switched off."""
    if request.param == "reference":
        with library.disabled():
            yield None
        return
    found = library.kernels_for("cpu")
    if found is None:
        pytest.skip(library.status()[0].words)
    yield found


@pytest.fixture(params=["op", "eager"])
def norm_act(request):
    """`norm_act` through the dispatcher and without it."""
    return ops.norm_act if request.param == "op" else rebuild_norm_act


@pytest.fixture(params=["op", "eager"])
def inplace_abn(request):
    """`inplace_abn` through the dispatcher and without it."""
    return ops.inplace_abn if request.param == "op" else lambda x, *args: inplace_abn_on(eager_device(x), x, *args)


@pytest.fixture
def activations():
    return ACTIVATIONS


@pytest.fixture(params=ACTIVATIONS, ids=str)
def activation(request):
    return request.param


@pytest.fixture(params=[a for a in ACTIVATIONS if a.name in SMOOTH], ids=str)
def smooth_activation(request):
    return request.param


@pytest.fixture(params=INVERTIBLE, ids=str)
def invertible_activation(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["batch", "running"])
def batch_statistics(request):
    return request.param


@pytest.fixture
def formulas():
    return FORMULAS


@pytest.fixture
def make_site():
    return build_site


@pytest.fixture
def plain_formula():
    return plain


@pytest.fixture
def with_strides():
    return strided


@pytest.fixture
def error():
    return distance


@pytest.fixture
def opcheck():
    return check_op


@pytest.fixture
def live_tensors():
    return LiveTensors


@pytest.fixture
def saved_sizes():
    """Run a function; the storages, one size each, that autograd keeps for its backward."""

    def run(function):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = function()
        return result, kept

    return run


@pytest.fixture
def always(monkeypatch):
    """Winograd's convolutions run whether they pay or not."""
    monkeypatch.setattr(cpu_winograd.CpuWinograd, "pays", lambda *args: True)
