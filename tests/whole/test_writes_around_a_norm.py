"""Forwards that write in place around a norm: the plain model's numbers, or autograd's own refusal."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, C, Many, conv, rewrites_of, trains_alike_by
from torch import nn
from training import collected, image, loss_of, spread

import normpass
from normpass.measure import kept_bytes


def add_number(m, x, h):
    z = F.silu(m.bn(h))
    z.add_(1)
    return m.last(z)


def hardswish_later(m, x, h):
    z = F.silu(m.bn(h))
    return m.last(F.hardswish(z, inplace=True))


def write_through_a_view(m, x, h):
    z = F.silu(m.bn(h))
    z.view(-1).mul_(2)
    return m.last(z)


def write_a_slice(m, x, h):
    z = F.silu(m.bn(h))
    z[:, 1:3].add_(1)
    return m.last(z)


def write_one_of_two_views(m, x, h):
    z = F.silu(m.bn(h))
    first, second = z[:, :2], z.narrow(1, 2, 2)
    first.add_(second)
    return m.last(torch.cat([first, second], 1))


def write_an_unfolded_view(m, x, h):
    z = m.bn(h)
    z.unfold(2, 2, 2).mul_(3)
    return m.last(z)


def write_through_data(m, x, h):
    z = F.silu(m.bn(h))
    z.data.mul_(2)
    return m.last(z)


def write_the_norms_input(m, x, h):
    z = m.bn(h.clone()) + 1
    h.add_(2)
    return m.last(z) + h.mean()


def write_the_residual_before(m, x, h):
    r = h * 2
    y = m.bn(h)
    r.mul_(3)
    return m.last(F.relu(y + r))


def write_the_residual_later(m, x, h):
    r = h * 2
    z = F.relu(m.bn(h) + r)
    out = m.last(z)
    r.mul_(3)
    return out, r


def write_a_part_of_a_concatenation_later(m, x, h):
    z, w = F.relu(m.bn(h)), x * 2
    out = m.wide(torch.cat([z, w], 1))
    w.add_(1)
    return out, w


def write_a_term_of_a_sum_later(m, x, h):
    z, w = F.relu(m.bn(h)), h * 2
    out = m.last(z + w)
    w.add_(1)
    return out, w


def write_after_it_was_read(m, x, h):
    z = m.bn(h)
    pooled = z.mean((2, 3), keepdim=True)
    z += pooled
    return m.last(z)


def sum_into_the_residual(m, x, h):
    r = h * 2
    r += m.bn(h)
    return m.last(F.relu_(r))


def sum_into_the_norm(m, x, h):
    z = m.bn(h)
    z += h
    return m.last(F.relu_(z))


def product_into_the_norm(m, x, h):
    z = F.silu(m.bn(h))
    z *= h.sigmoid()
    return m.last(z)


def sum_into_a_view(m, x, h):
    z = F.silu(m.bn(h))
    v = z[:, :2]
    v += 1
    return m.last(z)


def sum_into_what_another_name_holds(m, x, h):
    z = F.silu(m.bn(h))
    kept = [z]
    z += h
    return m.last(kept[0])


def other_operators_into_what_another_name_holds(m, x, h):
    z = F.silu(m.bn(h))
    kept = [z]
    z -= 1
    z /= 3
    z **= 2
    return m.last(kept[0])


def running_sum(m, x, h):
    total = m.bn(h)
    kept = []
    for k in range(3):
        kept.append(total)
        total += h * k
    return m.last(sum(kept))


def set_an_item(m, x, h):
    z = F.silu(m.bn(h))
    z[:, 0] = 1
    z[:, 1:3] += 1
    return m.last(z)


def set_the_data(m, x, h):
    z = F.silu(m.bn(h))
    z.data = z.data * 2
    return m.last(z)


def out_argument(m, x, h):
    z = m.bn(h)
    with_out = torch.empty(2, C, 8, 8, dtype=torch.float64)
    return m.last(z), with_out.copy_(z.detach()).sum()


IN_PLACE = [
    add_number,
    hardswish_later,
    write_through_a_view,
    write_a_slice,
    write_one_of_two_views,
    write_an_unfolded_view,
    write_through_data,
    write_the_norms_input,
    write_the_residual_before,
    write_the_residual_later,
    write_a_part_of_a_concatenation_later,
    write_a_term_of_a_sum_later,
    write_after_it_was_read,
    sum_into_the_residual,
    sum_into_the_norm,
    product_into_the_norm,
    sum_into_a_view,
    sum_into_what_another_name_holds,
    other_operators_into_what_another_name_holds,
    running_sum,
    set_an_item,
    out_argument,
]


def test_in_place() -> None:
    model = Many(*(Block(after, wide=conv(C + 3, 2)) for after in IN_PLACE))
    rows = rewrites_of(trains_alike_by(model, image(requires_grad=True)))
    # What reads the storage that it writes to is not made again, nor is what it is made from.
    kept = "other_operators_into_what_another_name_holds", "set_an_item", "write_one_of_two_views"
    rewrites = {name: "fuse_norm_act" if name in kept else "split_bn" for name in model.blocks}
    assert rows == {f"blocks.{name}.bn": rewrite for name, rewrite in rewrites.items()}


def test_the_data_is_set() -> None:
    """Where Dynamo ends its graph."""
    model = Block(set_the_data)
    found = collected(model, image(requires_grad=True))
    assert not found.failures and len(found.graphs) > 1
    assert "data attribute" in found.graphs[0].ends and "test_writes_around_a_norm.py:" in found.graphs[0].ends
    trains_alike_by(model, image(requires_grad=True))


def refused_by_plain(m, x, h):
    z = m.bn(h).sigmoid()
    out = m.last(z)
    z.mul_(2)  # the convolution has kept z
    return out


def refused_with_an_index(m, x, h):
    z = F.relu(m.bn(h))
    out = m.last(z)
    z[z > 1] = 1
    return out


@pytest.mark.parametrize("after", [refused_by_plain, refused_with_an_index], ids=lambda f: f.__name__)
def test_what_autograd_refuses_is_refused(after) -> None:
    model = Block(after)
    for m in (model, normpass.optimize(model)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss_of(m(image())).backward()


def test_what_the_recipe_reads_may_not_change() -> None:
    """What plain keeps may not be written to, in autograd's words; what it does not keep may."""
    model = Block(lambda m, x, h: m.last(F.relu(m.bn(x))))
    model.bn, model.last = nn.BatchNorm2d(3), conv(3, 2)
    pair = spread(model), normpass.optimize(copy.deepcopy(model))
    for path in ("input", "bn.weight", "bn.running_mean"):  # the last plain keeps for nothing
        errors = []
        for m in pair:
            x = image(requires_grad=True) * 1
            out = m(x)
            with torch.no_grad():
                (x if path == "input" else m.get_parameter(path) if "weight" in path else m.get_buffer(path)).mul_(2)
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*expected version \d") as error:
                loss_of(out).backward()
            errors.append(type(error.value))
        assert errors[0] is errors[1]
    gradients = []
    for m in pair:
        x = image(requires_grad=True)
        out = m(x)
        with torch.no_grad():
            m.bn.bias.add_(1), m.last.bias.mul_(2)
        gradients.append(torch.autograd.grad(loss_of(out), [x, *m.bn.parameters(), *m.last.parameters()]))
    torch.testing.assert_close(*gradients)


def written_by_a_comparison(m, x, h):
    z = m.bn(h) + m.beside(h.contiguous(memory_format=torch.channels_last))
    return m.last(z.masked_fill_(z < -0.5, 0.3))


def added_in_place(m, x, h):
    z = m.bn(h)
    z += m.beside(h.contiguous(memory_format=torch.channels_last))
    return m.last(F.silu(z).mul_(2))


@pytest.mark.parametrize("beside", [nn.BatchNorm2d(C), nn.GroupNorm(2, C)], ids=["batch", "group"])
@pytest.mark.parametrize("after", [written_by_a_comparison, added_in_place], ids=lambda f: f.__name__)
def test_a_sum_of_two_layouts_is_made_again_layer_by_layer(after, beside) -> None:
    """No kernel takes a residual with other strides; what is planned to be made again is, all the same."""
    model = Block(after, beside=copy.deepcopy(beside))
    trains_alike_by(model, image())
    optimized = normpass.optimize(model)
    assert kept_bytes(optimized, image()) < 0.6 * kept_bytes(model, image())
