"""`optimize`, `explain`, `plan`, `restore`: what users call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normpass import passes
from normpass.budget.planning import check_plan, plan_step
from normpass.budget.step_plan import StepPlan
from normpass.copies.shared_copy import shared_copy
from normpass.copies.trial import call_arguments, copied_inputs, trial, trial_copy
from normpass.errors import InvalidInputError, InvalidModelError
from normpass.optimized import is_optimized, optimize_in_place, plain_copy
from normpass.options import check_paths, read_options, read_plan
from normpass.pipeline import Request
from normpass.report.explain import make_report
from normpass.report.summary import Report
from normpass.rewrite.verify import verify_state


def optimize(
    model: nn.Module,
    example_inputs: Tensor | tuple | dict | None = None,
    *,
    memory_budget: float | str | None = None,
    changes: Sequence[Any] = (),
    allow_lossy: bool = False,
    tune: bool = False,
    plan: Any = None,
    serialize: bool | passes.SerializeMinibatch | passes.SerializeNorms = False,
    winograd: bool = True,
) -> nn.Module:
    """A module that computes what `model` computes and keeps about half as much for backward.

    The result is an instance of the model's class and shares its parameters and buffers (the very same
    objects: an optimizer built before stays valid); `model` itself is not touched. Only rewrites that are
    exact up to rounding are made, unless others are asked for.

    With SyncBatchNorms all processes have to call this with the same model and arguments. Nothing is communicated here.

    Args:
        model: any `nn.Module`. What cannot be captured or rewritten is left as it is; `explain` says why.
        example_inputs: a tensor, or a tuple or dict of arguments, that the model accepts: checked, and what a budget
            is planned for. The graphs are captured at the first call, which takes some seconds.
        memory_budget: what may be kept for backward: a fraction of what `model` keeps (`0.5`), or bytes (`"12GB"`,
            `"800MiB"`). Needs `example_inputs`, of the shapes to train with. The fastest step within it is
            chosen: see `plan`.
        changes: rewrites that change the model's function, by name (`"leaky_relu"`, `"kalman"`,
            `"sparse_switchable"`) or as option objects (`normpass.passes.LeakyReLU(negative_slope=0.02)`,
            `normpass.passes.Kalman(prediction_weight=0.9)`). They may add parameters, which belong into the
            optimizer.
        allow_lossy: also allow in-place activated batch norm, whose backward reconstructs a value
            from a rounded one.
        tune: with a budget, measure how long each result takes to be made once more instead of estimating it.
        plan: a `StepPlan` made before, what its `to_json` returned, or the path of a JSON file of it.
        serialize: run chains of layers sub-batch by sub-batch where every sample is computed by itself (GroupNorm,
            LayerNorm, frozen batch norms, eval mode), so that what lies between them stays in the cache: less
            memory, more time on a CPU. True, or a `normpass.passes.SerializeMinibatch` with the buffer's size.
            What is chosen depends on the shapes of the first call. Or a `normpass.passes.SerializeNorms`: the
            convolutions that it names, between two norms in train mode, run block by block.
        winograd: 3×3 convolutions of stride 1 may run as Winograd's on a CPU, where that is faster. False: torch's.

    Returns:
        The optimized module, in the same train/eval mode.

    Raises:
        InvalidModelError: `model` is not an `nn.Module`, or is optimized already.
        InvalidInputError: `model` does not run on `example_inputs`, an unknown change is named, the plan or the
            budget is none, or the plan names what the model does not have.
        InfeasibleBudgetError: no plan keeps to the budget; the message has the smallest that can be kept.
    """
    _check_model(model)
    given = read_plan(plan)
    request = read_options(
        changes=changes,
        allow_lossy=allow_lossy,
        winograd=winograd,
        memory_budget=memory_budget,
        tune=tune,
        plan=given,
        serialize=serialize,
    )
    request, _ = _checked_and_planned(model, example_inputs, request, memory_budget, tune)
    if given is not None:
        arguments = None if example_inputs is None else call_arguments(example_inputs)
        check_plan(model, request, arguments, given.plain)
    return _optimized_copy(model, request)


def plan(
    model: nn.Module,
    example_inputs: Tensor | tuple | dict | None,
    memory_budget: float | str,
    *,
    changes: Sequence[Any] = (),
    allow_lossy: bool = False,
    tune: bool = False,
    winograd: bool = True,
) -> StepPlan:
    """What `optimize` would do for a memory budget: what is kept, what is rebuilt, and what that costs.

    Kept bytes and peak are worked out from shapes, after one forward of a copy that captures the graphs. The
    arguments and errors are those of `optimize`, which applies the plan: `optimize(model, plan=…)`.
    """
    _check_model(model)
    request = read_options(
        changes=changes, allow_lossy=allow_lossy, winograd=winograd, memory_budget=memory_budget, tune=tune
    )
    if request.changes:
        raise InvalidInputError(
            "`plan` takes no changes: give them with the budget, to `normpass.optimize` or `normpass.explain`"
        )
    arguments = _needed_inputs(example_inputs)
    check_example_inputs(model, example_inputs)
    return plan_step(model, arguments, memory_budget, request, tune)


def restore(optimized: nn.Module, *, keep_changes: bool = False) -> nn.Module:
    """The original structure of an optimized module, with its current parameters and buffers (shared).

    Where `changes=` replaced a layer, the original one stands again: a BatchNorm where a Kalman or switchable norm
    is. With `keep_changes` the replaced layers stay (a Kalman norm without predictions): what to optimize again
    once switchable layers have chosen.

    Raises:
        InvalidModelError: the module was not made by `optimize`.
    """
    if not is_optimized(optimized):
        raise InvalidModelError(
            f"{type(optimized).__name__} was not made by normpass.optimize; there is nothing to restore"
        )
    return plain_copy(optimized, keep_changes)


def explain(
    model: nn.Module,
    example_inputs: Tensor | tuple | dict | None = None,
    *,
    memory_budget: float | str | None = None,
    changes: Sequence[Any] = (),
    allow_lossy: bool = False,
    tune: bool = False,
    serialize: bool | passes.SerializeMinibatch | passes.SerializeNorms = False,
    winograd: bool = True,
) -> Report:
    """What `optimize` does to `model`: every norm with its rewrite or the reason it is left alone.

    With `example_inputs` a copy is run in train mode: the report has the graphs that were captured, where and why
    they break, every norm, what is kept and why, and the bytes kept for backward and the peak over a step, measured
    before and after on the device the model is on. Without them no graph is known: the norms are listed, no more.
    The model, its inputs and its Python state stay bit for bit as they were. An optimized model may be given as well.
    With a `memory_budget` the report has the plan for it, too.
    """
    arguments = None if example_inputs is None else call_arguments(example_inputs)
    if is_optimized(model):
        model = restore(model)
    _check_model(model)
    request = read_options(
        changes=changes,
        allow_lossy=allow_lossy,
        winograd=winograd,
        memory_budget=memory_budget,
        tune=tune,
        serialize=serialize,
    )
    request, found = _checked_and_planned(model, example_inputs, request, memory_budget, tune)
    return make_report(model, _optimized_copy(model, request), arguments, found)


def _checked_and_planned(
    model: nn.Module, example_inputs: Any, request: Request, memory_budget: float | str | None, tune: bool
) -> tuple[Request, StepPlan | None]:
    """The request with the decisions for the budget, and their plan; the model runs once to check its inputs."""
    check_paths(model, request.serialize)
    arguments = None if memory_budget is None else _needed_inputs(example_inputs)
    if example_inputs is not None:
        check_example_inputs(model, example_inputs)
    if memory_budget is None or arguments is None:
        return request, None
    found = plan_step(model, arguments, memory_budget, request, tune)
    return replace(request, decisions=found.decisions), found


def _optimized_copy(model: nn.Module, request: Request) -> nn.Module:
    optimized = optimize_in_place(shared_copy(model), request)
    verify_state(model, optimized, may_add=bool(request.changes))
    return optimized


def check_example_inputs(model: nn.Module, example_inputs: Any) -> None:
    """Run a copy of the plain model once, without gradients."""
    args, kwargs = call_arguments(example_inputs)
    with torch.no_grad(), trial(model):
        copied, (own, named) = trial_copy(model), copied_inputs((args, kwargs))
        try:
            copied(*own, **named)
        except Exception as error:
            raise InvalidInputError(_does_not_run(model, (*args, *kwargs.values()), error)) from error


def _does_not_run(model: nn.Module, given: tuple[Any, ...], error: Exception) -> str:
    """The advice, then the first line of what torch says, which may have a hundred."""
    shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in given]
    advice = "give a tensor, a tuple or a dict of arguments that the model itself accepts"
    if given and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
        advice = f"there is no tensor among them ({type(given[0]).__name__}): {advice}"
    line = next(iter(str(error).strip().splitlines()), "")
    return (
        f"`example_inputs`: {type(model).__name__} does not run on inputs of shape {shapes}; {advice} "
        f"({type(error).__name__}: {line:.300})"
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"`model` must be a torch.nn.Module, it is a {type(model).__name__}")
    if is_optimized(model):
        raise InvalidModelError(
            f"this {type(model).__name__} is optimized already; use it as it is, or optimize normpass.restore(model)"
        )
    if isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise InvalidModelError(
            f"`model` is a {type(model).__name__}; optimize the plain module first, then compile the result"
        )
    inside = next((path for path, m in model.named_modules() if is_optimized(m)), None)
    if inside is not None:
        raise InvalidModelError(f"`{inside}` is optimized already; optimize the whole model once, from plain parts")


def _needed_inputs(example_inputs: Any) -> tuple[tuple, dict]:
    if example_inputs is None:
        raise InvalidInputError("`memory_budget` needs `example_inputs`: what it does depends on their shapes")
    return call_arguments(example_inputs)
