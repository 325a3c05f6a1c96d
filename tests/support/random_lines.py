"""The lines that `random_modules` makes modules of, and what is done with these between two lines of a training loop.

{a} is any value there is, {b} one of the same shape, {v} and {w} are new ones, {C} {H} {W} the sizes of {a}, {n} is a
batch norm that was called before, {m} a layer with a weight; `<nn.…>` is a layer, made in `__init__`.
"""

from __future__ import annotations

NORMS = """
{v} = <nn.BatchNorm2d({C})>({a})
{v} = <nn.BatchNorm2d({C})>({a})
{v} = <nn.BatchNorm2d({C})>({a})
{v} = <nn.BatchNorm2d({C}, affine=False)>({a})
{v} = <nn.BatchNorm2d({C}, track_running_stats=False)>({a})
{v} = <nn.BatchNorm2d({C}, momentum=None)>({a})
{v} = <Frozen({C})>({a})
{v} = <nn.InstanceNorm2d({C}, affine=True)>({a})
{v} = <nn.InstanceNorm2d({C}, affine=True, track_running_stats=True)>({a})
{v} = <nn.GroupNorm(2, {C})>({a})
{v} = <nn.LayerNorm([{C}, {H}, {W}])>({a})
{v} = <nn.LayerNorm({C})>({a}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
{v} = <nn.BatchNorm1d({C})>({a}.flatten(2)).view({a}.shape)
"""

BLOCKS = r"""
{v} = F.relu(<nn.BatchNorm2d({C})>({a}))
{v} = <nn.ReLU(inplace=True)>(<nn.BatchNorm2d({C})>({a}))
{v} = <nn.SiLU(inplace=True)>(<nn.BatchNorm2d({C})>({a}))
{v} = <nn.LeakyReLU(0.1, inplace=True)>(<nn.InstanceNorm2d({C}, affine=True)>({a}))
{v} = F.relu(<nn.BatchNorm2d({C})>({a}) + {b})
{v} = F.relu({b} + <nn.BatchNorm2d({C})>({a}))
{v} = <nn.BatchNorm2d({C})>({a})\n{v} += {b}\n{v} = F.relu_({v})
{v} = <nn.BatchNorm2d({C})>({a})\n{b} += {v}
{v} = <nn.BatchNorm2d({C})>({a}) + <nn.BatchNorm2d({C})>({b})
{v} = <nn.Conv2d({C}, {C}, 3, padding=1, bias=False)>(F.relu(<nn.BatchNorm2d({C})>({a}))) + {a}
{v} = <nn.Conv2d({C}, {C}, 3, padding=1, groups={C}, bias=False)>(<nn.ReLU6()>(<nn.BatchNorm2d({C})>({a})))
{v} = torch.cat([{a}, <nn.Conv2d({C}, 2, 3, padding=1)>(F.relu(<nn.BatchNorm2d({C})>({a})))], 1)
{v} = torch.cat([{b}, {a}], 1)\n{v} = F.relu(<nn.BatchNorm2d(2 * {C})>({v}))
{v} = <nn.SiLU()>(<nn.BatchNorm2d({C})>({a}))\n{v} = {v} * <nn.Conv2d({C}, {C}, 1)>({v}.mean((2, 3), True)).sigmoid()
{v} = <nn.BatchNorm2d({C})>({a})\n{v}[:, 1:].mul_({b}[:, 1:])\n{v} = <nn.Conv2d({C}, 4, 1)>({v})
{v} = <nn.BatchNorm2d({C})>({a})\n{w} = {v}.view(-1)\n{v}.add_(0.1)\n{v} = F.relu({v}) * {w}.view({v}.shape).sigmoid()
{v} = <nn.BatchNorm2d({C})>({a})\n{v}[{v} > 1] = 0.5\n{v} = <nn.Conv2d({C}, 4, 1)>({v})
{v} = <nn.BatchNorm2d({C})>({a})\n{v}.clamp_(-1, 1).mul_({b})\n{v} = <nn.Conv2d({C}, 4, 1)>({v})
{v} = <nn.BatchNorm2d({C})>({a})\ntorch._foreach_add_([{v}], [{b}])\n{v} = <nn.Conv2d({C}, 4, 1)>(F.gelu({v}))
{v} = F.max_pool2d(F.relu(<nn.BatchNorm2d({C})>(<nn.Conv2d({C}, 4, 3, padding=1)>({a}))), 3, 1, 1)
"""

CONVOLUTIONS = """
{v} = <nn.Conv2d({C}, 4, 1)>({a})
{v} = <nn.Conv2d({C}, 4, 1, bias=False)>({a})
{v} = <nn.Conv2d({C}, 4, 3, padding=1)>({a})
{v} = <nn.Conv2d({C}, 4, 3, padding=1, bias=False)>({a})
{v} = <nn.Conv2d({C}, {C}, 3, padding=1, groups={C})>({a})
{v} = <nn.Conv2d({C}, {C}, 3, padding=1, groups={C}, bias=False)>({a})
{v} = <nn.Conv2d({C}, {C}, 3, padding=1, groups=2)>({a})
{v} = <nn.Conv2d({C}, 4, 3, stride=2, padding=1)>({a})
{v} = <nn.Conv2d({C}, 4, 1, stride=2)>({a})
{v} = <nn.ConvTranspose2d({C}, 4, 2, stride=2)>({a})
{v} = <nn.Linear({W}, {W})>({a})
"""

ACTIVATIONS = """
{v} = F.relu({a})
{v} = <nn.ReLU()>({a})
{v} = <nn.ReLU(inplace=True)>({a})
{v} = <nn.SiLU()>({a})
{v} = <nn.SiLU(inplace=True)>({a})
{v} = <nn.Hardswish(inplace=True)>({a})
{v} = <nn.LeakyReLU(0.1, inplace=True)>({a})
{v} = <nn.ELU()>({a})
{v} = <nn.ReLU6(inplace=True)>({a})
{v} = <nn.PReLU()>({a})
{v} = <nn.PReLU({C})>({a})
{v} = <nn.Softsign()>({a})
{v} = <nn.LogSigmoid()>({a})
{v} = <nn.Hardshrink(0.3)>({a})
{v} = F.softshrink({a}, 0.2)
{v} = F.tanhshrink({a})
{v} = F.threshold({a}, 0.1, -0.2, inplace=True)
{v} = <nn.RReLU()>({a})
{v} = F.relu({a}) ** 2
{v} = {a} * torch.sigmoid({a})
{v} = {a} * F.relu6({a} + 3, inplace=True) / 6
{v} = {a}.mul_({a}.sigmoid())
{v} = {a} * F.softplus({a}).tanh()
{v} = {a}.clip(-0.5, 1.5)
{v} = F.gelu({a})
{v} = F.mish({a})
{v} = F.softplus({a})
{v} = F.hardsigmoid({a})
{v} = torch.sigmoid({a})
{v} = {a}.tanh()
{v} = {a}.relu_()
{v} = {a}.sigmoid_()
{v} = F.elu_({a})
{v} = F.relu({a}, inplace=True)
{v} = F.leaky_relu_({a}, 0.2)
torch.tanh_({a})
{a}.clamp_(-1, 1)
{v} = {a}.clamp(min=-0.1)
{v} = {a}.square()
{v} = {a}.abs()
{v} = {a}.softmax(1)
{v} = <nn.Identity()>({a})
"""

ARITHMETIC = """
{v} = {a} + {b}
{v} = {b} + {a}
{v} = {a} - {b}
{v} = {a} * {b}
{v} = {a} * 0.5
{v} = 1 - {a}
{v} = {a} / (1 + {b}.abs())
{v} = torch.add({a}, {b}, alpha=0.5)
{v} = torch.maximum({a}, {b})
{v} = torch.where({a} > 0.1, {a}, {b})
{v} = torch.lerp({a}, {b}, 0.3)
{v} = torch.addcmul({a}, {a}, {b})
{v} = {a} * {a}.mean((2, 3), keepdim=True)
{v} = {a} * <nn.Linear({C}, {C})>({a}.mean((2, 3))).sigmoid()[:, :, None, None]
{v} = {a} + F.adaptive_avg_pool2d({b}, 1)
{v} = {a} - {a}.detach().mean()
{v} = {a}.detach() + {b}
{v} = {a}.masked_fill({b} < 0, 0.3)
{v} = {a} + {a}.mean(1, keepdim=True).expand_as({a})
{v} = grad_scale({a})
"""

IN_PLACE = """
{a} += {b}
{a} -= {b}
{a} *= {b}
{a} += 0.5
{a} *= 0.7
{a} /= 1.5
{v} = {a}.add_({b})
{v} = {a}.add_({b}, alpha=0.3)
{v} = {a}.mul_({b})
{a}.sub_({b})
{a}.copy_({b})
{a}.lerp_({b}, 0.4)
{a}.addcmul_({b}, {b}, value=0.2)
{a}.fill_(0.3)
torch.add({a}, {b}, out={a})
torch._foreach_add_([{a}, {b}], 0.1)
torch._foreach_mul_([{a}, {b}], 0.9)
torch._foreach_add_([{a}], [{b}])
torch._foreach_mul_([{a}[:, :1], {a}[:, 1:]], 0.9)
{v} = {a}.masked_fill_({a} < -0.5, 0.3)
{a}[{a} > 1] = 0.25
{a}[{a} < 0] *= 0.5
{a}[:] = {b}
{a}[0] = 0.1
{a}[:, 1] = {b}[:, 0]
{a}[:, :2] += {b}[:, :2]
{a}[..., 1:] *= 0.5
{a}[:, 0].mul_(0.5)
{a}.index_put_((torch.tensor([0]),), torch.tensor(0.2, dtype={a}.dtype))
{a}.index_add_(1, torch.tensor([1, 0]), {b}[:, :2])
{a}.index_fill_(1, torch.tensor([1]), 0.1)
{a}.ravel().add_(0.2)
{a}.view(-1).mul_(0.8)
{a}.flatten(1).add_(0.2)
{a}.reshape(-1)[::2].mul_(0.6)
{a}.transpose(1, 2).add_({b}.transpose(1, 2))
{a}.permute(0, 2, 3, 1).mul_(0.7)
{a}.unsqueeze(1).sub_(0.2)
{a}.narrow(1, 1, 1).add_({b}.narrow(1, 0, 1))
{a}.diagonal(0, 2, 3).add_(0.2)
{a}.chunk(2, 1)[0].mul_(0.5)
{a}.unbind(1)[0].add_(0.1)
{a}.detach().mul_(0.9)
{a}.detach()[:, 0].add_(0.1)
{a}.view_as({b}).add_(0.1)
F.relu({a}[:, 1:], inplace=True)
{a}[:, :2].relu_()
"""

VIEWS = """
{v} = {a}[:, 1:]
{v} = {a}[:, :2]
{v} = {a}[:, ::2]
{v} = {a}[..., 1:-1]
{v} = {a}.transpose(2, 3)
{v} = {a}.view({a}.shape)
{v} = {a}.detach()
{v} = {a}.unsqueeze(0).squeeze(0)
{v} = {a}.flatten(1).unflatten(1, {a}.shape[1:])
{v} = {a}.contiguous()
{v} = {a}.clone()
{v} = {a}.contiguous(memory_format=torch.channels_last)
{v} = {a}.reshape({a}.size(0), 2, -1, {a}.size(2), {a}.size(3)).transpose(1, 2).flatten(1, 2)
{v}, {w} = {a}.chunk(2, 1)
{v}, {w} = torch.split({a}, [1, {C} - 1], 1)
{v} = {a}.unbind(1)[0].unsqueeze(1)
{v} = {a}.mean((2, 3), keepdim=True).expand({a}.shape)
{v} = {a}.flip(1)
{v} = {a}.contiguous().as_strided({a}.shape, ({C} * {H} * {W}, {H} * {W}, {W}, 1))
"""

JOINS = """
{v} = torch.cat(({a}, {b}), 1)
{v} = torch.cat([{a}, {a}[:, :1]], 1)
{v} = torch.cat(({a}[:, 1:], {b}[:, :1]), 1)
{v} = torch.cat(({a}, {b}, {a}), dim=1)
{v} = torch.stack(({a}, {b}), 1).flatten(1, 2)
{v} = torch.stack(({a}, {b})).sum(0)
{v} = torch.stack({a}.unbind(1)[::-1], 1)
{v} = torch.cat({a}.chunk(2, 1)[::-1], 1)
{v} = F.pad({a}, (1, 0, 0, 1))
{v} = F.pad({a}, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1]
{v} = F.interpolate({a}, scale_factor=2)
{v} = F.interpolate({a}, scale_factor=0.5, mode="bilinear")
{v} = F.max_pool2d({a}, 3, 1, 1)
{v} = F.max_pool2d({a}, 2)
{v} = <nn.MaxPool2d(3, 2, 1)>({a})
{v}, {w}_i = F.max_pool2d({a}, 2, return_indices=True)
{v} = F.avg_pool2d({a}, 3, 1, 1)
{v} = F.avg_pool2d({a}, 2)
{v} = F.adaptive_max_pool2d({a}, 2)
{v} = F.dropout({a}, 0.3, self.training)
{v} = F.dropout({a}, 0.3, self.training, inplace=True)
{v} = <nn.Dropout(0.3)>({a})
{v} = <nn.Dropout(0.0, inplace=True)>({a})
{v} = <nn.Dropout2d(0.3)>({a})
"""

PYTHON = r"""
if self.flag:\n    {v} = {a} * 0.5\nelse:\n    {v} = F.relu({a})
if {a}.square().mean() > 0.6:\n    {v} = {a} * 0.5\nelse:\n    {v} = F.relu({a})
if {a}.size(0) > 2:\n    {a} += 0.1
if self.training:\n    {v} = {a} * 0.9\nelse:\n    {v} = {a} + 0.1
{v} = {a} * self.alpha
{v} = {a}.add_(self.alpha)
{v} = {a}\nfor _ in range(self.depth):\n    {v} = F.silu({v}) + {a}
{v} = {a}\nfor scale in self.scales:\n    {v} = {v} * scale
{v} = (F.relu, torch.sigmoid, torch.tanh)[self.depth]({a})
{v} = {a} * float({a}.detach().square().mean())
self.seen = {a}
self.seen = {a}.detach()
{v} = {a} if self.seen is None else {a} + self.seen.detach().mean()
self.count += 1\n{v} = {a} / self.count
with torch.no_grad():\n    {v} = F.relu({a})
with torch.no_grad():\n    self.total.mul_(0.9).add_({a}.mean())
{v} = {a} * self.total
{v} = {a} * {n}.running_var[0]
{v} = {a} + {n}.running_mean.view(1, -1, 1, 1)
{v} = {a} * {n}.running_var.clone().view(1, -1, 1, 1)
{v} = {a} * {n}.weight.view(1, -1, 1, 1)
{v} = {a} + {n}.num_batches_tracked
{v} = F.batch_norm({a}, {n}.running_mean, {n}.running_var, {n}.weight, {n}.bias, False)
with torch.no_grad():\n    {n}.weight.mul_(0.9)
with torch.no_grad():\n    {n}.bias.add_(0.1)
with torch.no_grad():\n    {n}.running_mean.add_(0.1)
with torch.no_grad():\n    {m}.weight.mul_(0.9)
{v} = checkpoint(lambda t: F.relu({n}(t)), {a}, use_reentrant=False)
{v} = {n}({a})
{v} = {m}({a})
"""

WEIGHTS = {
    BLOCKS: 8,
    NORMS: 4,
    CONVOLUTIONS: 4,
    ACTIVATIONS: 5,
    ARITHMETIC: 5,
    IN_PLACE: 5,
    VIEWS: 3,
    JOINS: 4,
    PYTHON: 3,
}
"""How often a line is drawn from each of them."""
TEMPLATES = {text: tuple(line.replace(r"\n", "\n") for line in text.strip().splitlines()) for text in WEIGHTS}

BEFORE = """
model.alpha = 0.9
model.alpha = 2
model.depth = 2
model.depth = 0
model.flag = False
model.scales.append(1.25)
model.scales = [0.25]
{n}.eval()
{n}.momentum = 0.3
{n}.eps = 1e-3
{n}.weight.requires_grad_(False)
{n}.bias.requires_grad_(False)
{m}.weight.requires_grad_(False)
{m}.requires_grad_(False)
model.requires_grad_(False)
model.eval()
""".strip().splitlines()
"""What happens before a step."""

BETWEEN = """
{n}.weight.mul_(1.5)
{n}.bias.add_(0.5)
{n}.running_mean.add_(1)
{n}.running_var.mul_(2)
{m}.weight.mul_(0.9)
outputs[0].mul_(0.5)
outputs[-1].detach().add_(0.1)
args[0].add_(0.3)
outputs.extend(leaves(model(*arguments(step, 7))))
model(*(t.detach().clone() for t in args))
model.eval()
""".strip().splitlines()
"""What happens between forward and backward; what works on a parameter or a buffer does so in `no_grad`."""

BACKWARDS = ("squares", "squares", "sums", "strided", "each", "twice", "inputs", "second", "none")
LAYOUTS = ("contiguous", "contiguous", "contiguous", "channels_last", "channels_last", "transposed", "leaf", "constant")
SECONDS = ("other", "other", "same", "view", "detached")
