"""What stands around a norm: the plain model's numbers, and the rewrite that is to be expected."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from blocks import Block, C, Many, conv, rewrites_of, trains_alike_by
from torch import nn
from training import image

import normpass


def broadcast_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + h.mean((2, 3), keepdim=True)))


def broadcast_norm(m, x, h):
    return m.last(F.relu(m.bn(h.mean((2, 3), keepdim=True)) + h))


def residual_number(m, x, h):
    return m.last(F.relu(m.bn(h) + 0.5))


def residual_parameter(m, x, h):
    return m.last(F.relu(m.bn(h) + m.last.weight.mean()))


def scaled_residual(m, x, h):
    return m.last(F.relu(torch.add(m.bn(h), h, alpha=0.3)))


def narrow_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + h.float()).double())


def doubled(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y + y))


def doubled_activation(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z + z)


def norms_on_both_sides(m, x, h):
    return m.last(F.relu(m.bn(h) + m.bn2(m.conv2(x))))


def norms_on_both_sides_in_place(m, x, h):
    z = m.bn(h)
    z += m.bn2(m.conv2(x))
    return m.last(F.relu_(z))


def norm_of_the_input_as_residual(m, x, h):
    return m.last(F.relu(m.bn(h) + m.bn2(h)))


def norm_used_twice(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y)) * y.mean()


def norm_returned(m, x, h):
    y = m.bn(h)
    return m.last(F.relu(y)), y


def activation_returned(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z), z, [z]


def norm_of_norm(m, x, h):
    return m.last(F.relu(m.bn2(m.bn(h))))


def activation_of_activation(m, x, h):
    return m.last(F.silu(F.relu(m.bn(h))))


def views(m, x, h):
    z = F.relu(m.bn(h))
    first, second = z.chunk(2, 1)
    z = torch.cat([second, first, z[:, :1], z[:, 1:]], 1)
    z = z.permute(0, 2, 3, 1).reshape(-1, 8).t().reshape(8, 2, 8, 8).transpose(0, 1)
    return m.last(z[:, 2:6])


def matrix_products(m, x, h):
    z = F.gelu(m.bn(h)).flatten(2)
    return m.last((z @ z.mT @ z).view_as(h)), z.bmm(z.transpose(1, 2))


def einsum_and_attention(m, x, h):
    z = F.relu(m.bn(h)).flatten(2).mT
    return F.scaled_dot_product_attention(z, z, z), torch.einsum("bij,bij->b", z, z)


def gate(m, x, h):
    z = F.silu(m.bn(h))
    return m.last(z * torch.sigmoid(z.mean((2, 3), keepdim=True)))


def pools(m, x, h):
    z = F.relu(m.bn(h))
    parts = [F.max_pool2d(z, 3, 1, 1), F.avg_pool2d(z, 3, 1, 1), F.max_pool2d(F.interpolate(z, scale_factor=2), 2)]
    return m.last(sum(parts)), F.max_pool2d(z, 2, return_indices=True)


def pads_and_shuffles(m, x, h):
    z = F.pad(F.relu(m.bn(h)), (1, 0, 0, 1))
    return m.last(F.pixel_shuffle(z, 1)), F.unfold(z, 2)


def where_and_masks(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(torch.where(h > 0, z, z * 2).masked_fill(h > 1, 0.5)), z.clamp(max=1), z.pow(2), z.sqrt().sum()


def detached(m, x, h):
    z = F.relu(m.bn(h))
    return m.last(z) + z.detach().mean()


def custom_function(m, x, h):
    return m.last(Cube.apply(F.relu(m.bn(h))))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return -g * 3 * x**2  # reversed, as in adversarial training


def functional_norm(m, x, h):
    h = F.batch_norm(h, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, m.training, 0.2, 1e-3)
    return m.last(F.relu(h))


def functional_norm_of_the_batch(m, x, h):
    return m.last(F.relu(F.batch_norm(h, None, None, training=True)))


def no_consumer(m, x, h):
    m.bn(h)
    return m.last(h)


AROUND = [
    broadcast_residual,
    broadcast_norm,
    residual_number,
    residual_parameter,
    scaled_residual,
    narrow_residual,
    doubled,
    doubled_activation,
    norms_on_both_sides,
    norms_on_both_sides_in_place,
    norm_of_the_input_as_residual,
    norm_used_twice,
    norm_returned,
    activation_returned,
    norm_of_norm,
    activation_of_activation,
    views,
    matrix_products,
    einsum_and_attention,
    gate,
    pools,
    pads_and_shuffles,
    where_and_masks,
    detached,
    custom_function,
    functional_norm,
    functional_norm_of_the_batch,
    no_consumer,
]


def test_around_a_norm() -> None:
    model = Many(*(Block(after, conv2=conv(), bn2=nn.BatchNorm2d(C)) for after in AROUND))
    rows = rewrites_of(trains_alike_by(model, image(requires_grad=True)))
    found = {name: [rewrite for path, rewrite in rows.items() if path.split(".")[1] == name] for name in model.blocks}
    called = {name: [rewrite for rewrite in done if rewrite is not None] for name, done in found.items()}
    fused = {"broadcast_norm", "activation_returned", "no_consumer"}  # kept all the same, or read by nobody
    two = {"norms_on_both_sides", "norms_on_both_sides_in_place", "norm_of_the_input_as_residual", "norm_of_norm"}
    for name, done in called.items():
        expected = "fuse_norm_act" if name in fused else "split_bn"
        assert done == [expected] * (2 if name in two else 1), name


def test_a_sum_in_place_has_the_first_dtype() -> None:
    def after(m, x, h):
        z = m.bn(h)
        z += h.double()
        return F.relu_(z)

    model = Block(after).float()
    optimized = normpass.optimize(model)
    expected, found = model(image().float()), optimized(image().float())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
