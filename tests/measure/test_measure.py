"""What is measured is left untouched, and what cannot be measured is refused."""

import pytest
import torch
from measured import HIDDEN, IN, H, Lambda, conv_chain, images, linear_chain, rows
from torch import nn

from normpass import measure
from normpass.copies.untouched import untouched

# --- nothing changes ----------------------------------------------------------------------------------

CALLS = {
    "kept_bytes": measure.kept_bytes,
    "kept_by_layer": measure.kept_by_layer,
    "peak_bytes": measure.peak_bytes,
    "memory_timeline": measure.memory_timeline,
    "step_time": lambda model, x: measure.step_time({"a": model, "same": model}, x, rounds=2),
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("name", CALLS)
def test_the_model_is_untouched(name):
    model = nn.Sequential(conv_chain(), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 256, 3))
    model[0][1].eval()
    x = images().requires_grad_()
    model(x).sum().backward()
    model[3].bias.grad = None
    before = {k: bits(v) for k, v in model.state_dict().items()}
    grads = [(p, p.grad, None if p.grad is None else bits(p.grad)) for p in [*model.parameters(), x]]
    buffers = {k: id(v) for k, v in model.named_buffers()}
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()

    CALLS[name](model, x)

    assert {k: bits(v) for k, v in model.state_dict().items()} == before
    assert {k: id(v) for k, v in model.named_buffers()} == buffers
    assert all(p.grad is grad and (grad is None or bits(grad) == value) for p, grad, value in grads)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_untouched_restores_replaced_expanded_and_nan_buffers_after_an_error():
    model = nn.Module()
    model.register_buffer("odd", torch.tensor([float("nan"), -0.0, 1.0]))
    model.register_buffer("wide", torch.ones(1).expand(4))
    model.register_buffer("none", None)
    odd, value = model.odd, bits(model.odd)
    with pytest.raises(KeyError), untouched(model):
        model.odd.zero_()
        model.odd = torch.ones(5)
        model.wide[:1].fill_(7)
        model.none = torch.ones(2)
        model.eval()
        torch.rand(3)
        raise KeyError
    assert model.odd is odd
    assert bits(odd) == value
    assert model.wide.tolist() == [1.0] * 4
    assert model.none is None
    assert model.training


def test_a_failing_model_is_restored_too():
    def fails(module, x):
        module.seen.add_(1)
        raise RuntimeError("too large")

    model = Lambda(fails)
    model.register_buffer("seen", torch.zeros(()))
    for call in CALLS.values():
        with pytest.raises(RuntimeError, match="too large"):
            call(model, rows())
    assert model.seen == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_no_grad_is_refused(name):
    with torch.no_grad(), pytest.raises(ValueError, match="gradients are off"):
        CALLS[name](nn.Linear(IN, H), rows())


@pytest.mark.parametrize("name", CALLS)
def test_other_devices_are_refused(name):
    with pytest.raises(ValueError, match="only `cpu` and `cuda` are measured.*`meta`"):
        CALLS[name](nn.Linear(IN, H, device="meta"), rows())


@pytest.mark.parametrize(
    "loss, error, message",
    [
        (lambda y: 1.0, TypeError, "not float"),
        (lambda y: y, TypeError, "one number.*shape .16, 64."),
        (lambda y: y.detach().sum(), ValueError, "is the model frozen"),
    ],
)
def test_a_loss_that_cannot_be_trained_on(loss, error, message):
    with pytest.raises(error, match=message):
        measure.peak_bytes(nn.Linear(IN, H), rows(), loss=loss)


def test_an_output_without_floats_needs_a_loss():
    with pytest.raises(ValueError, match="pass `loss`"):
        measure.peak_bytes(Lambda(lambda m, x: x.argmax(1)), rows())


# --- CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    model, x = linear_chain(nn.GELU()).cuda(), rows().cuda()
    state = torch.cuda.get_rng_state()
    assert measure.kept_bytes(model, x) == 2 * HIDDEN
    assert measure.peak_bytes(model, x) >= 2 * HIDDEN
    assert len(measure.step_time({"a": model}, x, rounds=2)["a"].times) == 2
    assert torch.equal(torch.cuda.get_rng_state(), state)
    with pytest.raises(ValueError, match="on the CPU"):
        measure.memory_timeline(model, x)
