"""The harness finds what is wrong, passes what is right, and passes `normpass.optimize` on small networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from exactness import KINDS, Comparison, compare
from networks import SMALL, TINY_DENSENET, Network, network, random_inputs
from torch import nn

import normpass

QUICK = (
    *SMALL,
    TINY_DENSENET,
    replace(network("resnet18"), inputs=random_inputs(4, 3, 32, 32)),
    network("mobilenet_v3_small"),
)


def on_copy(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    """An `optimize` that gives a deep copy with one fault in it."""

    def optimize(model: nn.Module) -> nn.Module:
        wrong = copy.deepcopy(model)
        change(wrong)
        return wrong

    return optimize


def faulty(change: Callable[[nn.Module], object], name: str = "pre_activation") -> Comparison:
    entry = network(name)
    return compare(entry.build, entry.make_inputs, on_copy(change))


def failing_kinds(comparison: Comparison) -> set[str]:
    return {failure.split(":")[0] for failure in comparison.failures}


@pytest.mark.parametrize("entry", [*SMALL, TINY_DENSENET], ids=lambda entry: entry.name)
def test_a_copy_is_exact(entry: Network) -> None:
    comparison = compare(entry.build, entry.make_inputs, copy.deepcopy)
    assert comparison.ok, str(comparison)
    assert {result.difference for result in comparison.kinds} == {0.0}


@pytest.mark.parametrize("entry", QUICK, ids=lambda entry: entry.name)
def test_optimized_is_exact(entry: Network) -> None:
    comparison = compare(entry.build, entry.make_inputs, normpass.optimize)
    assert comparison.ok, str(comparison)


def test_finds_a_wrong_momentum_of_the_running_statistics() -> None:
    def change(model: nn.Module) -> None:
        model.norm.momentum *= 1 + 1e-6

    assert failing_kinds(faulty(change)) == {"buffers", "eval outputs"}


PARAMETERS = [name for name, _ in network("pre_activation").build().named_parameters()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_finds_a_wrong_gradient(name: str) -> None:
    def change(model: nn.Module) -> None:
        model.get_parameter(name).register_hook(lambda gradient: gradient * (1 + 1e-7))

    failures = faulty(change).failures
    assert any(failure.startswith(f"gradients: step 0: `{name}` differs by") for failure in failures)


def test_finds_another_order_of_the_state_dict() -> None:
    def change(model: nn.Module) -> None:
        model._modules["stem"] = model._modules.pop("stem")

    assert faulty(change).failures == (
        "state_dict: the same names in another order",
        "parameters: the same names in another order",
    )


def test_finds_a_buffer_updated_twice() -> None:
    def again(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if module.training:
            with torch.no_grad():
                module.forward(*inputs)

    failures = faulty(lambda model: model.norm.register_forward_hook(again)).failures
    text = "\n".join(failures)
    assert "buffers: `norm.num_batches_tracked`: 4 where plain gives 2; integers must be equal" in failures
    assert "buffers: `norm.running_mean` differs by" in text
    assert "buffers: `norm.running_var` differs by" in text


def test_finds_a_missing_gradient() -> None:
    def change(model: nn.Module) -> None:
        model.head.bias.register_post_accumulate_grad_hook(drop_gradient)

    failures = faulty(change).failures
    assert "gradients: step 0: `head.bias`: None, plain gives float64[4]" in failures


def drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def test_finds_another_type_of_output() -> None:
    def change(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, inputs, output: list(output.items()))

    failures = faulty(change, "shared").failures
    assert failures[0].startswith("outputs: step 0: structure: list(0: tuple(0: str('features'), 1: float64[")


def test_finds_other_random_numbers() -> None:
    def change(model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda module, inputs: torch.rand(1) and None)

    assert "outputs" in failing_kinds(faulty(change, "mlp"))


def test_finds_a_parameter_unfrozen() -> None:
    failures = faulty(lambda model: model.requires_grad_(True), "frozen").failures
    assert failures[0].startswith("parameters: not in both models: ['0.0.weight, requires_grad=False'")


@torch.no_grad()
def move_a_weight(model: nn.Module) -> None:
    weight = model.get_parameter("stem.weight").view(-1)
    weight[0] = torch.nextafter(weight[0], torch.ones((), dtype=weight.dtype))


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (move_a_weight, "the given model changed: the value of `stem.weight`"),
        (
            lambda model: model.blocks[1].norm1.eval(),
            "the given model changed: module `blocks.1.norm1` was BatchNorm2d, training=True, "
            "is BatchNorm2d, training=False",
        ),
        (
            lambda model: setattr(model, "norm", nn.SyncBatchNorm.convert_sync_batchnorm(model.norm)),
            "the given model changed: module `norm` was BatchNorm2d, training=True, is SyncBatchNorm, training=True",
        ),
    ],
)
def test_finds_a_change_of_the_given_model(change: Callable[[nn.Module], object], failure: str) -> None:
    def optimize(model: nn.Module) -> nn.Module:
        optimized = copy.deepcopy(model)
        change(model)
        return optimized

    entry = network("pre_activation")
    assert compare(entry.build, entry.make_inputs, optimize).failures == (failure,)


def test_a_plain_run_that_is_not_finite_fails() -> None:
    comparison = compare(
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Softplus(), nn.Linear(3, 1)),
        lambda step: (torch.full((4, 3), torch.inf if step == 2 else 1.0),),
        copy.deepcopy,
    )
    assert "eval outputs: eval: output is not finite in the plain run" in comparison.failures


def test_the_row_has_every_kind() -> None:
    entry = network("mlp")
    row = compare(entry.build, entry.make_inputs, copy.deepcopy).row()
    assert set(row) == {"ok", *KINDS, *(f"{kind} {what}" for kind in KINDS for what in ("noise", "ratio"))}
    assert row["ok"] is True
    assert all(0 < row[f"{kind} noise"] < 1e-14 for kind in KINDS)


def test_parameters_and_buffers_are_shared() -> None:
    entry = network("resnet18")
    model = entry.build()
    optimized = normpass.optimize(model)
    assert optimized is not model
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        assert {name: id(t) for name, t in named(optimized)} == {name: id(t) for name, t in named(model)}
