"""What each rewrite makes of a site (golden graphs), when it refuses, and what it keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normpass
from normpass.capture import capture, required_arguments
from normpass.functional import fused_norm_act, inplace_abn, split_norm_act
from normpass.module import part_of
from normpass.passes import InplaceABN, LeakyReLU, SplitBN
from normpass.rewrite import Match, Refusal
from normpass.sites import find_sites


def chain(activation, depth=2):
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), activation()]
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 1))


def graph_of(optimised):
    return part_of(optimised).programs[0][1].graph


def targets(optimised):
    return [str(n.target) if isinstance(n.target, str) else n.target for n in graph_of(optimised).nodes]


def first_site(module):
    return find_sites(capture(module, required_arguments(module)))[0]


def step(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return (
        loss,
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
        [b.clone() for b in model.buffers()],
    )


def assert_same_step(plain, optimised, x, tolerance=1e-12):
    for a, b in zip(step(plain, x), step(optimised, x), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance)


def test_split_bn_is_the_default():
    optimised = normpass.optimize(chain(nn.ReLU))
    assert targets(optimised)[1:] == [
        "0",
        "1",
        split_norm_act,
        "3",
        "4",
        split_norm_act,
        "6",
        "output",
    ]


def test_fuse_norm_act_where_the_result_is_changed_later():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            z = F.relu(self.norm(self.conv(x)))
            z.mul_(2.0)
            return self.last(z)

    model = Late().double()
    plain = copy.deepcopy(model)
    optimised = normpass.optimize(model)
    assert fused_norm_act in targets(optimised) and split_norm_act not in targets(optimised)
    report = normpass.explain(plain)
    assert "changed in place later, by `mul_`" in report.rows[0].reason
    # plain ReLU refuses this in backward (it saved z); ours computes what the formula says
    optimised(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()


def test_inplace_abn_only_where_lossy_is_allowed():
    model = chain(lambda: nn.LeakyReLU(0.1)).double()
    plain = copy.deepcopy(model)
    assert inplace_abn not in targets(normpass.optimize(model))
    optimised = normpass.optimize(model, allow_lossy=True)
    assert targets(optimised).count(inplace_abn) == 2
    assert_same_step(plain, optimised, torch.randn(2, 3, 6, 6, dtype=torch.float64), tolerance=1e-10)


@pytest.mark.parametrize(
    "model, reason",
    [
        (chain(nn.ReLU), "relu has no inverse"),
        (chain(nn.SiLU), "silu has no inverse"),
    ],
)
def test_inplace_abn_refuses(model, reason):
    result = InplaceABN().match(first_site(model))
    assert isinstance(result, Refusal) and result.reason == reason


def test_inplace_abn_refuses_tiny_gamma():
    model = chain(nn.ELU)
    with torch.no_grad():
        model[1].weight[1] = 0.0
    result = InplaceABN().match(first_site(model))
    assert isinstance(result, Refusal) and "smallest |gamma| is 0" in result.reason
    with torch.no_grad():
        model[1].weight[1] = -1.0  # negative is fine
    assert isinstance(InplaceABN().match(first_site(model)), Match)


def test_inplace_abn_refuses_a_residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.leaky_relu(self.norm(self.conv(x)) + x)

    result = InplaceABN().match(first_site(Residual()))
    assert isinstance(result, Refusal) and result.reason == "a residual is added before the activation"
    assert isinstance(SplitBN().match(first_site(Residual())), Match)


# --- changes=("leaky_relu",) ------------------------------------------------------------------------


class Mixed(nn.Module):
    """ReLU as a layer, a function, a method."""

    def __init__(self, relu):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))
        self.act = nn.ReLU() if relu else nn.LeakyReLU(0.01)
        self.relu = F.relu if relu else F.leaky_relu

    def forward(self, x):
        x = self.act(self.norms[0](self.convs[0](x)))
        x = self.relu(self.norms[1](self.convs[1](x)))
        return self.norms[2](self.convs[2](x))


def test_leaky_relu_replaces_layers_and_functions():
    model = Mixed(relu=True).double()
    expected = Mixed(relu=False).double()
    expected.load_state_dict(model.state_dict())
    optimised = normpass.optimize(model, changes=("leaky_relu",))
    assert_same_step(expected, optimised, torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert type(model.act) is nn.ReLU and type(optimised.act) is nn.LeakyReLU
    assert type(normpass.restore(optimised).act) is nn.ReLU


def test_leaky_relu_option_object():
    optimised = normpass.optimize(chain(nn.ReLU), changes=(LeakyReLU(negative_slope=0.2),))
    assert optimised[2].negative_slope == 0.2
    with pytest.raises(ValueError, match="negative_slope"):
        LeakyReLU(negative_slope=0.0)


# --- recipes of consumers ---------------------------------------------------------------------------


class Consumers(nn.Module):
    """conv → norm → relu → `consume` → conv."""

    def __init__(self, consume, channels=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.gate = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(channels, 2, 1)
        self.consume = consume

    def forward(self, x):
        z = F.relu(self.norm(self.conv(x)))
        return self.last(self.consume(self, z)).square()


CONSUMERS = [
    ("cat", 6, lambda m, z: torch.cat((z, z.flip(0)), 1)),
    ("mul", 3, lambda m, z: z * m.gate(F.adaptive_avg_pool2d(z, 1)).sigmoid()),
    ("pad", 3, lambda m, z: F.pad(z, (1, 1, 1, 1))),
    ("upsample", 3, lambda m, z: F.interpolate(z, scale_factor=2)),
    ("pool", 3, lambda m, z: F.max_pool2d(z, 3, 1, 1)),
    ("view", 2, lambda m, z: z[:, 1:]),
    ("view", 1, lambda m, z: z.chunk(3, 1)[1]),
    ("activation", 3, lambda m, z: F.silu(z)),
    ("activation", 3, lambda m, z: F.relu(z + z)),
]


@pytest.mark.parametrize("kind, channels, consume", CONSUMERS)
def test_consumers_become_recipes(kind, channels, consume):
    model = Consumers(consume, channels).double()
    plain = copy.deepcopy(model)
    optimised = normpass.optimize(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert kind in part_of(optimised).programs[0][1].derived.values()
    assert_same_step(plain, optimised, x)
    assert normpass.measure.kept_bytes(optimised, x) < normpass.measure.kept_bytes(plain, x)


def test_a_concatenation_changed_in_place_is_left_alone():
    model = Consumers(lambda m, z: torch.cat((z, z.flip(0)), 1).mul_(2), 6).double()
    plain = copy.deepcopy(model)
    optimised = normpass.optimize(model)
    assert_same_step(plain, optimised, torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_random_functions_are_not_rebuilt():
    model = Consumers(lambda m, z: F.dropout(z, 0.5, m.training)).double()
    plain = copy.deepcopy(model)
    optimised = normpass.optimize(model)
    assert part_of(optimised).programs[0][1].derived == {}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    expected = step(plain, x)
    torch.manual_seed(0)
    torch.testing.assert_close(step(optimised, x), expected, rtol=0, atol=1e-12)


def test_stochastic_depth_draws_the_same_numbers():
    torchvision_ops = pytest.importorskip("torchvision.ops")

    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.drop = torchvision_ops.StochasticDepth(0.5, "row")
            self.last = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            result = self.drop(self.norm(self.conv(x)))
            result += x
            return self.last(result)

    model = Depth().double()
    plain = copy.deepcopy(model)
    optimised = normpass.optimize(model)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = step(plain, x)
        torch.manual_seed(seed)
        torch.testing.assert_close(step(optimised, x), expected, rtol=0, atol=1e-12)
    plain.eval(), optimised.eval()
    torch.testing.assert_close(optimised(x), plain(x), rtol=0, atol=1e-12)
