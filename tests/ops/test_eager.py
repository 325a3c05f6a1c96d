"""`normpass.runtime.functional` without the dispatcher: when it is left out, and that it makes no difference."""

import copy
import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normpass.ops.eager import eager_device
from normpass.recipe import notes
from normpass.runtime.functional import FunctionalBatchNorm, fused_norm_act, inplace_abn, split_norm_act

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Ops(TorchDispatchMode):
    """The names of the ops of this package that go through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "normpass":
            self.names.append(func._schema.name.removeprefix("normpass::"))
        return func(*args, **(kwargs or {}))


class Looking(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WAYS = {
    "fused": partial(fused_norm_act, activation="silu"),
    "split": partial(split_norm_act, activation="silu"),
    "inplace": partial(inplace_abn, activation="leaky_relu", activation_args=(0.1,)),
}


@pytest.fixture(params=WAYS)
def way(request):
    function = WAYS[request.param]
    return lambda norm, x: function(functional(norm), x)


def functional(norm):
    """The call that a norm's module makes, as the captured graph has it."""
    of_batch = norm.training or norm.running_mean is None
    state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return FunctionalBatchNorm(*state, of_batch, norm.momentum, norm.eps)


def make_norm(**options):
    norm = nn.BatchNorm2d(3, **options)
    with torch.no_grad():
        if norm.affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    return norm


def draw(*shape, **options):
    return torch.randn(*(shape or (4, 3, 5, 6)), dtype=torch.float64, **options)


def step(norm, way, x, grad):
    """z, the gradients and the buffers of one call, with leaves of its own."""
    norm, x = copy.deepcopy(norm), x.detach().clone().requires_grad_()
    z = way(norm, x)
    parameters = [p for p in norm.parameters() if p.requires_grad]
    return [z, *torch.autograd.grad(z, [x, *parameters], grad), *norm.buffers()]


def test_what_hides_a_tensor_or_looks_on_is_noticed():
    x = torch.zeros(2, 3)
    assert eager_device(x) == eager_device(x, nn.Parameter(x), None) == "cpu"

    class Marked(torch.Tensor):
        pass

    for other in (
        x.as_subclass(Marked),
        x.to("meta"),
        x.to_sparse(),
        torch.zeros(2, 3, dtype=torch.cfloat).conj().imag,
    ):
        assert eager_device(other) is None and eager_device(x, other) is None
    with Ops():
        assert eager_device(x) is None
    with Looking():
        assert eager_device(x) is None
    with forward_ad.dual_level():
        assert eager_device(x) is None
    with torch.inference_mode():
        assert eager_device(x) == eager_device(torch.zeros(2)) == "cpu"
    with torch.device("cpu"):
        assert eager_device(x) == "cpu"
        with Looking():
            assert eager_device(x) is None
    seen = []
    torch.vmap(lambda t: seen.append(eager_device(t)) or t)(x)
    torch.func.grad(lambda t: seen.append(eager_device(t)) or t.sum())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace is deprecated, and still used
        assert seen == [None, None]
    assert eager_device(x) == "cpu"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, 0.0])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_it_is_what_the_dispatcher_gives(affine, momentum, training, way, error):
    norm = make_norm(affine=affine, momentum=momentum).double().train(training)
    x, grad = draw(), draw()
    with Ops() as ops:
        expected = step(norm, way, x, grad)
    got = step(norm, way, x, grad)
    assert ops.names[-2:] == [name for name in (ops.names[-2], f"{ops.names[-2]}_backward")]
    assert ("moments" in ops.names) == ("updated_running_stats" in ops.names) == training
    assert type(got[0].grad_fn).__name__ in ("NormActBackward", "InplaceAbnBackward")
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-14 and a.dtype == b.dtype and a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_running_statistics_are_batch_norms(layout, momentum, dtype, way, error, with_strides):
    norm = make_norm(momentum=momentum)
    plain = copy.deepcopy(norm)
    for _ in range(3):
        x = with_strides(draw().to(dtype), layout)
        moved = norm.running_mean, norm.running_var
        versions = [b._version for b in moved]
        way(norm, x)
        plain(x)
        assert [b._version for b in moved] == [version + 1 for version in versions]
    assert norm.num_batches_tracked == 0  # the graph counts by a node of its own
    assert error(norm.running_mean, plain.running_mean) < 1e-5
    assert error(norm.running_var, plain.running_var) < 1e-5


def test_running_statistics_that_moved_are_noticed(way):
    norm = make_norm().eval()
    z = way(norm, draw().float().requires_grad_())
    way(norm.train(), draw().float())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_running_statistics_in_inference_mode(way, error):
    norm = make_norm()
    plain = copy.deepcopy(norm)
    with torch.inference_mode():
        inside = make_norm()
        x = torch.randn(4, 3, 5, 6)
        way(norm, x)
        way(inside, x)
        plain(x)
    for other in (norm, inside):
        assert error(other.running_mean, plain.running_mean) < 1e-5
        assert error(other.running_var, plain.running_var) < 1e-5


def test_nothing_is_kept_without_gradients(way):
    norm, x = make_norm(), torch.randn(4, 3, 5, 6)
    with torch.no_grad():
        assert way(norm, x).grad_fn is None
    z = way(norm.requires_grad_(False), x)
    assert z.grad_fn is None and not z.requires_grad
    alive = weakref.ref(way(norm.requires_grad_(), x.requires_grad_()))
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["fused", "split"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_derivatives(training, residual, name):
    norm = make_norm(momentum=0.0).double().train(training)  # the function must not change between two calls
    inputs = [draw(3, 3, 2, 2, requires_grad=True) for _ in range(1 + residual)]

    def function(weight, bias, *tensors):
        given = FunctionalBatchNorm(norm.running_mean, norm.running_var, weight, bias, training, momentum=0.0)
        return WAYS[name](given, *tensors)

    leaves = (norm.weight, norm.bias, *inputs)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_an_identity_hands_its_gradient_to_the_residual(error):
    norm, x, residual = make_norm().double(), draw(requires_grad=True), draw(requires_grad=True)
    grad = draw()
    z = fused_norm_act(functional(norm), x, residual)
    dx, dresidual = torch.autograd.grad(z, (x, residual), grad, retain_graph=True)
    assert dresidual.data_ptr() == grad.data_ptr()
    (again,) = torch.autograd.grad(z, residual, grad, retain_graph=True)
    assert torch.equal(again, grad)
    torch.autograd.backward([z, residual.mul(3)], [grad, grad])
    torch.autograd.backward([fused_norm_act(functional(norm), x, residual)], [grad])
    assert error(residual.grad, 5 * grad) < 1e-14 and error(x.grad, 2 * dx) < 1e-12


def test_a_gradient_of_gradients_in_batches(way, error):
    """`is_grads_batched` runs backward under vmap, with batched gradients."""
    norm, x = make_norm().double(), draw(requires_grad=True)
    z = way(norm, x)
    grads = torch.stack([draw(), draw()])
    (together,) = torch.autograd.grad(z, x, grads, retain_graph=True, is_grads_batched=True)
    for grad, got in zip(grads, together, strict=True):
        (expected,) = torch.autograd.grad(z, x, grad, retain_graph=True)
        assert error(got, expected) < 1e-12


def test_a_mode_entered_for_backward_alone_sees_the_op(way):
    norm, x = make_norm().double(), draw(requires_grad=True)
    z = way(norm, x)
    with Ops() as ops:
        z.backward(draw())
    assert len(ops.names) == 1 and ops.names[0].endswith("_backward")


def test_a_mode_entered_for_backward_alone_sees_a_rebuild():
    norm, x = make_norm().double(), draw(requires_grad=True)
    with notes.recording():
        product = split_norm_act(functional(norm), x, None, "silu").square()
    with Ops() as ops:
        product.backward(draw())
    assert ops.names == ["norm_act", "norm_act_backward"]


def test_a_compiler_behind_dynamo_sees_the_ops(way, error):
    """AOTAutograd traces the rewritten graph with `make_fx`."""
    norm, x = make_norm(), torch.randn(4, 3, 5, 6)
    expected = way(copy.deepcopy(norm), x)
    again = copy.deepcopy(norm)
    traced = make_fx(lambda t: way(again, t), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    seen = [str(node.target) for node in traced.graph.nodes if "normpass" in str(node.target)]
    assert any("moments" in name for name in seen) and len(seen) == 3
    assert error(traced(x), expected) < 1e-6


@pytest.mark.filterwarnings("ignore")  # of jit.trace: that it is deprecated, and about shapes that it fixes
def test_a_trace_records_the_op(way, error):
    norm, x = make_norm().eval().requires_grad_(False), torch.randn(4, 3, 5, 6)
    traced = torch.jit.trace(lambda t: way(norm, t), (x,), check_trace=False)
    assert "normpass::" in str(traced.graph)
    other = torch.randn(4, 3, 5, 6)
    assert error(traced(other), way(norm, other)) < 1e-6


def test_fake_tensors_go_through_the_ops(way):
    mode, norm = FakeTensorMode(), make_norm()
    for store in (norm._parameters, norm._buffers):
        store.update({name: mode.from_tensor(t) for name, t in store.items()})
    x = mode.from_tensor(torch.randn(4, 3, 5, 6).requires_grad_())
    z = way(norm, x)
    (dx,) = torch.autograd.grad(z, x, mode.from_tensor(torch.randn(4, 3, 5, 6)))
    assert type(z) is type(dx) is FakeTensor and z.shape == dx.shape == x.shape


def test_a_tensor_in_the_place_of_a_parameter(way, error):
    norm, x = make_norm().double(), draw()
    expected = way(norm, x)
    weight = norm.weight.detach().clone()
    del norm.weight
    norm.weight = weight
    assert error(way(norm, x), expected) < 1e-14


def test_constant_statistics_with_a_gradient_are_refused(way):
    norm = make_norm().eval()
    norm.running_mean.requires_grad_()
    with pytest.raises(ValueError, match="with batch_statistics=False `mean` is a constant"):
        way(norm, torch.randn(4, 3, 5, 6, requires_grad=True))
