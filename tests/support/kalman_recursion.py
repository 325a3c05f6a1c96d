"""The recursion of batch Kalman normalization, written down once more, for three small networks."""

import math

import torch
import torch.nn.functional as F
from torch import nn

P = 0.7


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Chain(nn.Module):
    """Three convolutions in a row."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 6, bias=False), conv(6, 4, groups=2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(4)])

    def forward(self, x):
        for conv_, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv_(x)))
        return x


class Residual(nn.Module):
    """A block whose shortcut is the stem's result, pooled, and a norm behind the sum."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 4), conv(4, 4), conv(4, 5, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(5)])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.relu(self.norms[0](self.convs[0](x))))
        y = self.relu(self.norms[1](self.convs[1](x)))
        y = self.norms[2](self.convs[2](y))
        y += x
        return self.norms[3](self.convs[3](self.relu(y)))


class Concat(nn.Module):
    """Two branches of one stem, joined."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv(3, 4), conv(4, 3), conv(4, 2, 1), conv(9, 4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = F.relu(self.norms[0](self.convs[0](x)))
        left = F.relu(self.norms[1](self.convs[1](x)))
        right = F.leaky_relu(self.norms[2](self.convs[2](x)), 0.1)
        return F.relu6(self.norms[3](self.convs[3](torch.cat((left, x, right), 1))))


def relu_moments(mean, var, slope=0.0):
    """Of relu(X) + slope·min(X, 0) by the textbook formulas."""
    sigma = var.sqrt()
    alpha = mean / sigma
    upper = 0.5 * (1 + torch.erf(alpha / math.sqrt(2)))
    density = torch.exp(-0.5 * alpha**2) / math.sqrt(2 * math.pi)
    first = mean * upper + sigma * density
    second = (mean**2 + var) * upper + mean * sigma * density
    low_first, low_second = mean - first, mean**2 + var - second
    first, second = first + slope * low_first, second + slope**2 * low_second
    return first, second - first**2


def conv_moments(layer, mean, var):
    groups = layer.groups
    weight = layer.weight.flatten(2)
    means, variances = [], []
    for index, part in enumerate(weight.chunk(groups)):
        channels = slice(index * part.shape[1], (index + 1) * part.shape[1])
        means.append(part.sum(2) @ mean[channels])
        variances.append(part.square().sum(2) @ var[channels])
    mean, var = torch.cat(means), torch.cat(variances)
    return (mean if layer.bias is None else mean + layer.bias), var


def filtered(norm, x, prediction, p=P):
    """Normalize x with the smoothed statistics; and these."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if prediction is not None:
        before, before_var = prediction
        var = p * before_var + (1 - p) * var + p * (1 - p) * (mean - before) ** 2
        mean = p * before + (1 - p) * mean
    y = (x - mean[:, None, None]) / torch.sqrt(var + norm.eps)[:, None, None]
    return y * norm.weight[:, None, None] + norm.bias[:, None, None], (mean, var)


def chain_recursion(m, x):
    prediction = estimate = None
    for index, (conv_, norm) in enumerate(zip(m.convs, m.norms, strict=True)):
        x = conv_(x)
        if index:
            prediction = conv_moments(conv_, *relu_moments(*estimate))
        x, estimate = filtered(norm, x, prediction)
        x = F.relu(x)
    return x


def residual_recursion(m, x):
    x, stem = filtered(m.norms[0], m.convs[0](x), None)
    x, stem = F.max_pool2d(F.relu(x), 2), relu_moments(*stem)
    y, one = filtered(m.norms[1], m.convs[1](x), conv_moments(m.convs[1], *stem))
    y = F.relu(y)
    y, two = filtered(m.norms[2], m.convs[2](y), conv_moments(m.convs[2], *relu_moments(*one)))
    total = two[0] + stem[0], two[1] + stem[1]
    return filtered(m.norms[3], m.convs[3](F.relu(y + x)), conv_moments(m.convs[3], *relu_moments(*total)))[0]


def clipped_moments(mean, var, high=6.0):
    """Of min(max(X, 0), high), by a fine sum."""
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    weight = torch.exp(-0.5 * t**2)
    values = (mean[:, None] + var.sqrt()[:, None] * t).clamp(0, high)
    first = (values * weight).sum(1) / weight.sum()
    return first, ((values - first[:, None]) ** 2 * weight).sum(1) / weight.sum()


def concat_recursion(m, x):
    x, stem = filtered(m.norms[0], m.convs[0](x), None)
    x, stem = F.relu(x), relu_moments(*stem)
    left, a = filtered(m.norms[1], m.convs[1](x), conv_moments(m.convs[1], *stem))
    right, b = filtered(m.norms[2], m.convs[2](x), conv_moments(m.convs[2], *stem))
    left, a, right, b = F.relu(left), relu_moments(*a), F.leaky_relu(right, 0.1), relu_moments(*b, 0.1)
    joined = torch.cat((a[0], stem[0], b[0])), torch.cat((a[1], stem[1], b[1]))
    z, _ = filtered(m.norms[3], m.convs[3](torch.cat((left, x, right), 1)), conv_moments(m.convs[3], *joined))
    return F.relu6(z)


RECURSIONS = [(Chain, chain_recursion), (Residual, residual_recursion), (Concat, concat_recursion)]


def prepared(kind, seed=0):
    torch.manual_seed(seed)
    model = kind().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model, torch.randn(4, 3, 8, 8, dtype=torch.float64)


def gradients(model, x, function):
    x = x.detach().requires_grad_()
    y = function(model, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return y, torch.autograd.grad(y, [x, *(p for p in model.parameters())], cotangent)
