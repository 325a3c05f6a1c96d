"""What is odd, unsupported or wrong: the plain model's numbers, or a clear error or refusal, never a wrong number."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from training import ConvNet, assert_equal, assert_trains_alike, image, loss_of, reasons, rewrites, spread, train

import normpass
from normpass.passes import LeakyReLU

C = 4


def conv(inputs: int = 3, outputs: int = C) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def small(*layers: nn.Module) -> nn.Sequential:
    """A convolution, the layers, a convolution that keeps its input."""
    torch.manual_seed(0)
    return spread(nn.Sequential(conv(), *layers, conv(C, 2)))


class Block(nn.Module):
    """conv, norm and a function of (self, x, norm's result) that says what follows."""

    def __init__(self, after, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.last, self.after = conv(), nn.BatchNorm2d(C), conv(C, 2), after
        for name, layer in layers.items():
            setattr(self, name, layer)
        spread(self)

    def forward(self, x):
        return self.after(self, x, self.conv(x))


# --- what is not a model, or not an option --------------------------------------------------------


@pytest.mark.parametrize("thing", [None, 3, torch.relu, nn.BatchNorm2d, "resnet18", image()])
def test_not_a_module(thing: object) -> None:
    with pytest.raises(normpass.InvalidModelError, match=f"must be a torch.nn.Module, it is a {type(thing).__name__}"):
        normpass.optimize(thing)


def test_optimised_already() -> None:
    optimised = normpass.optimize(ConvNet())
    with pytest.raises(normpass.InvalidModelError, match="this ConvNet is optimised already; .* normpass.restore"):
        normpass.optimize(optimised)
    with pytest.raises(normpass.InvalidModelError, match="`1.0` is optimised already"):
        normpass.optimize(nn.Sequential(conv(), nn.Sequential(optimised)))
    assert normpass.explain(optimised).rewritten == 2


def test_restore_of_a_plain_model() -> None:
    with pytest.raises(normpass.InvalidModelError, match="was not made by normpass.optimize"):
        normpass.restore(ConvNet())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_compiled_and_scripted_models() -> None:
    with pytest.raises(normpass.InvalidModelError, match="optimise the plain module first"):
        normpass.optimize(torch.compile(ConvNet(), backend="eager"))
    with pytest.raises(normpass.InvalidModelError, match="optimise the plain module first"):
        normpass.optimize(torch.jit.script(conv()))


@pytest.mark.parametrize("inputs", [image(2, 5, 8, 8).float(), (), (1, 2), {"y": image()}, image().long()])
def test_example_inputs_of_another_kind(inputs: object) -> None:
    model = ConvNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(normpass.InvalidInputError, match="`example_inputs`: ConvNet does not run on inputs of shape"):
        normpass.optimize(model, inputs)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("leaky_relu", "is a sequence of names or option objects"),
        (("leaky",), '"leaky" is not known; known are "leaky_relu"'),
        ((3,), "3 is neither a name"),
        ((LeakyReLU,), "is neither a name"),
    ],
)
def test_wrong_changes(changes: object, words: str) -> None:
    with pytest.raises(normpass.InvalidInputError, match=words):
        normpass.optimize(ConvNet(), changes=changes)


class HasALock(ConvNet):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle a lock")


def test_a_model_that_cannot_be_copied() -> None:
    with pytest.raises(normpass.InvalidModelError, match="HasALock cannot be copied .* cannot pickle a lock"):
        normpass.optimize(HasALock())


# --- norms that are left alone --------------------------------------------------------------------


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.BatchNorm2d):
    """A subclass that changes nothing: unknown all the same."""


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, out: out * 2)
    return norm


def with_forward(norm: nn.Module) -> nn.Module:
    norm.forward = lambda x: F.batch_norm(x, None, None, training=True) * 3
    return norm


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrised(norm: nn.Module) -> nn.Module:
    parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


LEFT_ALONE = {
    "hooks": (lambda: hooked(nn.BatchNorm2d(C)), "it has hooks"),
    "instance_forward": (lambda: with_forward(nn.BatchNorm2d(C)), "its forward was replaced on the instance"),
    "own_class": (lambda: OwnNorm(C), "OwnNorm is not one of the norms that can be rewritten"),
    "renamed": (lambda: Renamed(C), "Renamed is not one of the norms"),
    "parametrised": (lambda: parametrised(nn.BatchNorm2d(C)), "it is parametrised"),
    "group": (lambda: nn.GroupNorm(2, C), "GroupNorm is not one of the norms"),
    "instance": (lambda: nn.InstanceNorm2d(C, affine=True), "InstanceNorm2d is not one of the norms"),
    "layer": (lambda: nn.LayerNorm(8), "LayerNorm is not one of the norms"),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "it has hooks"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_norm_that_is_left_alone(name: str) -> None:
    make, reason = LEFT_ALONE[name]
    model = small(make(), nn.ReLU(), conv(C, C), nn.BatchNorm2d(C), nn.SiLU())
    assert rewrites(model) == {"1": None, "4": "split_bn"}
    assert reason in reasons(model)["1"]
    if name == "lazy":
        model(image())
        assert set(rewrites(model).values()) == {"split_bn"}
    assert_trains_alike(model, image(requires_grad=True))


def test_sync_batch_norm_is_reported() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small(nn.BatchNorm2d(C), nn.ReLU())).eval()
    assert reasons(model) == {"1": "SyncBatchNorm is not supported yet"}
    torch.testing.assert_close(normpass.optimize(model)(image()), model(image()))


def test_lazy_layers_materialise_in_the_optimised_model() -> None:
    numbers = []
    for change in (lambda m: m, normpass.optimize):
        model = nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(2, 1)).double()
        trained = change(model)
        torch.manual_seed(1)
        trained(image())
        numbers.append(train(trained, (image(),)))
    assert_equal(*numbers)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, parametrizations.orthogonal])
def test_a_parametrised_convolution(wrap) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU())
    wrap(model[0])
    wrap(model[3])
    assert rewrites(model) == {"1": "split_bn"}
    assert_trains_alike(model, image(requires_grad=True))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
def test_convolutions_with_the_old_weight_norm() -> None:
    numbers = []
    for change in (lambda m: m, normpass.optimize):
        model = small(nn.BatchNorm2d(C), nn.ReLU())
        torch.nn.utils.weight_norm(model[0])
        torch.nn.utils.spectral_norm(model[3])
        numbers.append(train(change(model), (image(requires_grad=True),)))
    assert_equal(*numbers)


def test_a_parametrisation_registered_later() -> None:
    def register(m: nn.Module) -> None:
        parametrised(m[1])
        weight_norm(m[3])

    assert_trains_alike(small(nn.BatchNorm2d(C), nn.ReLU()), image(), after=register)


# --- norms and modules used more than once --------------------------------------------------------


def twice(m, x, h):
    return m.last(F.relu(m.bn(F.relu(m.bn(h)))))


def under_two_names(m, x, h):
    return m.last(F.relu(m.same(F.relu(m.bn(h)))))


def block_twice(m, x, h):
    return m.last(m.block(m.block(h)))


def test_a_norm_called_twice() -> None:
    model = Block(twice)
    assert reasons(model)["bn"] == "it is called 2 times in one forward"
    assert_trains_alike(model, image(requires_grad=True))


def test_a_norm_with_two_names() -> None:
    model = Block(under_two_names)
    model.same = model.bn
    assert "it is called 2 times in one forward" in reasons(model)["bn"]
    assert_trains_alike(model, image(requires_grad=True))


def test_a_shared_block() -> None:
    model = Block(block_twice, block=nn.Sequential(conv(C, C), nn.BatchNorm2d(C), nn.ReLU()))
    assert reasons(model)["block.1"] == "it is called 2 times in one forward"
    assert_trains_alike(model, image(requires_grad=True))


def test_a_shared_activation_and_a_shared_convolution() -> None:
    def after(m, x, h):
        h = m.act(m.bn(h))
        return m.last(m.act(m.bn2(m.inner(m.inner(h)))))

    model = Block(after, act=nn.ReLU(inplace=True), inner=conv(C, C), bn2=nn.BatchNorm2d(C))
    assert set(rewrites(model).values()) == {"split_bn"}
    assert_trains_alike(model, image(requires_grad=True))


def test_norms_that_share_parameters() -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU(), conv(C, C), nn.BatchNorm2d(C), nn.ReLU())
    model[4].weight, model[4].running_mean = model[1].weight, model[1].running_mean
    optimised = assert_trains_alike(model, image())
    assert optimised[4].weight is optimised[1].weight


# --- in place -------------------------------------------------------------------------------------


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
    set_the_data,
    out_argument,
]


@pytest.mark.parametrize("after", IN_PLACE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_in_place(after, training: bool) -> None:
    model = Block(after, wide=conv(C + 3, 2)).train(training)
    assert_trains_alike(model, image(requires_grad=True))


def test_what_autograd_refuses_is_refused() -> None:
    def after(m, x, h):
        z = m.bn(h).sigmoid()
        out = m.last(z)
        z.mul_(2)  # the convolution has kept z
        return out

    model = Block(after)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model(image())).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(normpass.optimize(model)(image())).backward()


@pytest.mark.parametrize("path", ["input", "weight"])
def test_what_the_recipe_reads_may_not_change(path: str) -> None:
    model = normpass.optimize(Block(lambda m, x, h: m.last(F.relu(m.bn(x)))))
    model.bn = nn.BatchNorm2d(3).double()
    model.last = conv(3, 2).double()
    x = image(requires_grad=True) * 1
    out = model(x)
    with torch.no_grad():
        (x if path == "input" else model.bn.weight).mul_(2)
    with pytest.raises(
        normpass.ModifiedInPlaceError, match=r"is at version \d; expected version \d. Make the operation"
    ):
        loss_of(out).backward()


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training: bool) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU()).train(training)
    assert_trains_alike(model, image(0, 3, 8, 8))


def test_one_value_per_channel() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()).double()
    optimised = normpass.optimize(model)
    for m in (model, optimised):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            m(image(1, 3))
    torch.testing.assert_close(optimised.eval()(image(1, 3)), model.eval()(image(1, 3)))


@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 8), (2, 3, 4, 8, 8), (2, 5, 8, 8)])
def test_a_wrong_shape_raises_what_plain_raises(shape: tuple[int, ...]) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU())
    errors = []
    for m in (model, normpass.optimize(model)):
        with pytest.raises((RuntimeError, ValueError)) as error:
            m(image(*shape))
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


def test_a_norm_of_another_width_raises_what_plain_raises() -> None:
    errors = []
    model = small(nn.BatchNorm2d(C + 1), nn.ReLU())
    for m in (model, normpass.optimize(model)):
        with pytest.raises(RuntimeError) as error:
            m(image())
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_not_a_number() -> None:
    x = image()
    x[0, 0, 0, 0] = float("nan")
    x[1, 1, 1, 1] = float("inf")
    assert_trains_alike(small(nn.BatchNorm2d(C), nn.ReLU()), x)


# --- norms of every kind --------------------------------------------------------------------------

KINDS = {
    "no_statistics": {"track_running_stats": False},
    "no_affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
    "cumulative": {"momentum": None},
    "no_momentum": {"momentum": 0.0},
    "all_momentum": {"momentum": 1.0},
    "large_eps": {"eps": 10.0},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_options_of_the_norm(options: dict, training: bool) -> None:
    model = small(nn.BatchNorm2d(C, **options), nn.ReLU()).train(training)
    assert rewrites(model) == {"1": "split_bn"}
    assert_trains_alike(model, image(requires_grad=True))


def drop_statistics(m: nn.Module) -> None:
    m[1].running_mean = m[1].running_var = None


def one_statistic(m: nn.Module) -> None:
    m[1].bias = None


LATER = {
    "eps": lambda m: setattr(m[1], "eps", 3.0),
    "momentum": lambda m: setattr(m[1], "momentum", None),
    "no_tracking": lambda m: setattr(m[1], "track_running_stats", False),
    "no_statistics": drop_statistics,
    "no_bias": one_statistic,
    "no_counter": lambda m: setattr(m[1], "num_batches_tracked", None),
    "no_counter_cumulative": lambda m: (setattr(m[1], "num_batches_tracked", None), setattr(m[1], "momentum", None)),
    "reset": lambda m: m[1].reset_running_stats(),
    "other_weight": lambda m: setattr(m[1], "weight", nn.Parameter(torch.zeros(C).double())),
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_norm_changes_later(change, training: bool) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU()).train(training)
    assert_trains_alike(model, image(requires_grad=True), after=change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float_norm_of_narrow_input(dtype: torch.dtype) -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU()).to(dtype)
    model[1].float()
    optimised = normpass.optimize(copy.deepcopy(model))
    gradients = []
    for m in (model, optimised):
        out = m(image().to(dtype))
        assert out.dtype == dtype
        out.float().sum().backward()
        gradients.append([out, *(p.grad for p in m.parameters()), m[1].running_var])
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=0.05, atol=0.05 * float(model[1].weight.grad.abs().max())
    )


def test_mixed_dtypes_that_plain_refuses() -> None:
    model = small(nn.BatchNorm2d(C), nn.ReLU()).float()
    model[1].double()
    errors = []
    for m in (model, normpass.optimize(model)):
        with pytest.raises(RuntimeError) as error:
            m(image().float())
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_complex_input_is_refused_as_plain_refuses_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1, dtype=torch.complex64), nn.BatchNorm2d(C), nn.ReLU())
    for m in (model, normpass.optimize(model)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            m(image().to(torch.complex64))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Linear(3, C), nn.BatchNorm1d(C), nn.ELU(), nn.Linear(C, 2)), (4, 3)),
        ((nn.Conv1d(3, C, 3), nn.BatchNorm1d(C), nn.ReLU(), nn.Conv1d(C, 2, 1)), (2, 3, 8)),
        ((nn.Conv3d(3, C, 1), nn.BatchNorm3d(C), nn.ReLU(), nn.Conv3d(C, 2, 1)), (2, 3, 2, 4, 4)),
        ((nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)), (2, 3, 8, 8)),
        ((nn.BatchNorm2d(3),), (2, 3, 8, 8)),
    ],
    ids=["linear", "1d", "3d", "first_layer", "alone"],
)
@pytest.mark.parametrize("input_grad", [False, True])
def test_dimensions(layers, shape, input_grad: bool) -> None:
    torch.manual_seed(0)
    model = spread(nn.Sequential(*layers))
    assert set(rewrites(model).values()) == {"split_bn"}
    assert_trains_alike(model, image(*shape, requires_grad=input_grad))


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_norm_in_a_subclass_of_sequential() -> None:
    model = spread(OwnSequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), conv(C, 2)))
    assert rewrites(model) == {"1": "split_bn"}
    assert_trains_alike(model, image())


# --- what stands around a norm --------------------------------------------------------------------


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


@pytest.mark.parametrize("after", AROUND, ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_around_a_norm(after, training: bool) -> None:
    model = Block(after, conv2=conv(), bn2=nn.BatchNorm2d(C)).train(training)
    assert_trains_alike(model, image(requires_grad=True))


def test_a_sum_in_place_has_the_first_dtype() -> None:
    def after(m, x, h):
        z = m.bn(h)
        z += h.double()
        return F.relu_(z)

    model = Block(after).float()
    optimised = normpass.optimize(model)
    expected, found = model(image().float()), optimised(image().float())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_the_users_own_checkpoint_is_kept() -> None:
    runs = []

    def after(m, x, h):
        def body(h):
            runs.append(1)
            return F.relu(m.bn(h))

        return m.last(checkpoint(body, h, use_reentrant=False))

    model = Block(after)
    assert "`checkpoint`" in normpass.explain(model).untraceable[""]
    assert "`checkpoint`" in reasons(model)["bn"]
    optimised = normpass.optimize(model)
    runs.clear()
    loss_of(optimised(image())).backward()
    assert len(runs) == 2  # in forward and in backward
    assert_trains_alike(Block(after), image(requires_grad=True))
