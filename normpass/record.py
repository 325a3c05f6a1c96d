"""One training step's forward, run on tensors that have a shape and no memory: who makes what, and who keeps it.

    with recording(model, arguments) as (recorder, (args, kwargs)):
        output = …      # run the model, its parts through recorder.run
    recorder.finish(output) -> Record

The model is run under `FakeTensorMode`: no value is computed, but autograd saves what it always saves, which
saved-tensor hooks see. So the kept bytes follow from what torch does, op by op, and not from a table. The model is
left as it was; a network of a few hundred layers takes about a quarter of a second.

A *value* is one storage that a step makes. What a step saves is a value of its own or of another step, or its
*internals*: statistics, the indices of a pooling, the mask of a dropout. Parameters, buffers, the model's inputs and
outputs are no values: they exist anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from normpass.graph import join, key_of
from normpass.ops.layout import memory_format_of
from normpass.untouched import tensors_in, untouched


@dataclass
class Step:
    """One node of a recorded graph."""

    key: str
    """dotted path of the layer it calls, or the part's path and the node's name"""
    target: Any
    """what it calls: a function, a method's name, or the module of a `call_module` node"""
    makes: tuple[int, ...] = ()
    """values made here that it returns"""
    reads: tuple[int, ...] = ()
    """values among its arguments"""
    read_sizes: tuple[int, ...] = ()
    """bytes of the arguments that lie in them: fewer than the value's where it is read through a view"""
    saves: tuple[int, ...] = ()
    """values that autograd keeps for its backward"""
    internals: int = 0
    """bytes that autograd keeps for it beside values"""
    passes: bool = False
    """its result lies in the storage of an argument (a view, an operation in place)"""
    differentiable: bool = False
    flops: int = 0
    """multiplications and additions of its matrix products and convolutions, forward"""
    weights: int = 0
    """bytes of the parameters that it reads"""
    scratch: int = 0
    """bytes that its backward takes for a moment, beside the gradients of its arguments"""
    groups: int = 1
    """of a convolution"""


@dataclass
class Record:
    """The steps of one forward in order, with the bytes of every value."""

    steps: list[Step] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """bytes of each value"""
    outputs: frozenset[int] = frozenset()
    """values that the model returns"""
    device: str = "cpu"

    def maker(self) -> list[int]:
        """The index of the step that makes each value."""
        made = [-1] * len(self.sizes)
        for index, step in enumerate(self.steps):
            for value in step.makes:
                made[value] = index
        return made


class Recorder:
    """Runs graphs node by node while one forward is recorded; see `recording`."""

    def __init__(self, external: Sequence[Tensor], device: str):
        self._record = Record(device=device)
        self.flops = _Flops()
        self._alive: list[Any] = []  # storages, so that no identity is used twice
        self._external = {self._identity(t) for t in external}
        self._value_of: dict[int, int] = {}
        self._saved: list[tuple[Step, int, int]] = []
        self._rest = Step("(outside of the rewritten parts)", None)
        self._record.steps.append(self._rest)
        self._running = [self._rest]

    def run(self, graph: fx.Graph, module: nn.Module, path: str, tensors: Sequence[Any]) -> Any:
        """What `graph`, of the part at the dotted `path`, returns; its nodes become steps."""
        return _Interpreter(self, graph, module, path).run(*tensors)

    @contextlib.contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """What is saved inside belongs to `step`."""
        self._running.append(step)
        try:
            yield
        finally:
            self._running.pop()

    def external_bytes(self, arguments: Any) -> int:
        """Bytes of the parameters, buffers and inputs among the arguments of a function."""
        return sum(t.nbytes for t in tensors_in(arguments[1:]) if self._identity(t) in self._external)

    def made(self, step: Step, result: Any, arguments: Any) -> None:
        """Note what `step` returned and what it read."""
        read: dict[int, int] = {}
        for tensor in tensors_in(arguments):
            value = self._value_of.get(self._identity(tensor))
            if value is not None:
                read[value] = min(read.get(value, 0) + tensor.nbytes, self._record.sizes[value])
        step.reads, step.read_sizes = tuple(read), tuple(read.values())
        made = []
        for tensor in tensors_in(result):
            step.differentiable |= tensor.requires_grad
            storage = self._identity(tensor)
            if storage in self._value_of or storage in self._external:
                step.passes |= self._value_of.get(storage, -1) not in made
                continue
            self._value_of[storage] = len(self._record.sizes)
            made.append(len(self._record.sizes))
            self._record.sizes.append(tensor.untyped_storage().nbytes())
        step.makes = tuple(made)
        self._record.steps.append(step)

    def pack(self, tensor: Tensor) -> Tensor:
        """The hook that sees what autograd saves."""
        storage = self._identity(tensor)
        if storage not in self._external:
            self._saved.append((self._running[-1], storage, tensor.untyped_storage().nbytes()))
        return tensor if tensor.is_leaf else tensor.detach()  # detached: its own node may be what saves it

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what autograd saves and what is multiplied is noted."""
        with saved_tensors_hooks(self.pack, lambda saved: saved), self.flops:
            yield

    def finish(self, output: Any) -> Record:
        """Sort what was saved into values and internals."""
        returned = {self._identity(t) for t in tensors_in(output)}
        self._record.outputs = frozenset(self._value_of[s] for s in returned if s in self._value_of)
        counted = set(returned)
        for step, storage, size in self._saved:
            value = self._value_of.get(storage)
            if value is not None:
                step.saves = tuple(dict.fromkeys((*step.saves, value)))
            elif storage not in counted:
                counted.add(storage)
                step.internals += size
        return self._record

    def _identity(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)


def record_graph(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Record:
    """One forward of a graph whose parameters and buffers are inputs like the others.

    Args:
        inputs: for every placeholder a tensor, real or fake, of the shape and layout it is to have, or a number.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [_like(value) if isinstance(value, Tensor) else value for value in inputs]
        recorder = Recorder(tensors_in(fakes), next((t.device.type for t in tensors_in(fakes)), "cpu"))
        with torch.enable_grad(), recorder.watching():
            output = recorder.run(graph_module.graph, graph_module, "", fakes)
    return recorder.finish(output)


def _like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and dtype, of the mode that is entered."""
    sizes, strides = ([int(n) for n in values] for values in (tensor.shape, tensor.stride()))
    result = torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)
    return result.requires_grad_() if tensor.requires_grad else result


@contextlib.contextmanager
def recording(model: nn.Module, arguments: tuple[tuple, dict]) -> Iterator[tuple[Recorder, tuple[tuple, dict]]]:
    """A recorder, and the arguments without memory to call `model` with inside; afterwards the model is as before.

    Inside, its parameters and buffers have no memory either, but for the counters of its norms, which are copies.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Tensor] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = (
                value.clone() if value.dim() == 0 and not value.is_floating_point() else _fake(mode, value)
            )
        return memo[id(value)]

    registered: list[dict] = [d for m in model.modules() for d in (m._parameters, m._buffers)]
    before = [dict(d) for d in registered]
    try:
        for values in registered:
            values.update({name: fake(value) for name, value in values.items()})
        args, kwargs = pytree.tree_map(fake, arguments)
        device = next((t.device.type for t in tensors_in((args, kwargs))), "cpu")
        recorder = Recorder(list(memo.values()), device)
        with mode, torch.enable_grad(), recorder.watching():
            yield recorder, (args, kwargs)
    finally:
        for values, originals in zip(registered, before, strict=True):
            values.clear()
            values.update(originals)


@contextlib.contextmanager
def recording_for_real(
    model: nn.Module, arguments: tuple[tuple, dict]
) -> Iterator[tuple[Recorder, tuple[tuple, dict]]]:
    """The same with the tensors as they are: for what asks for values. Takes the memory of all results together."""
    existing = [*model.parameters(), *model.buffers(), *tensors_in(arguments)]
    device = next((t.device.type for t in tensors_in(arguments)), "cpu")
    recorder = Recorder(existing, device)
    with untouched(model, *arguments), torch.enable_grad(), recorder.watching():
        yield recorder, arguments


def _groups(layers: Sequence[nn.Module], args: tuple) -> int:
    """Of a convolution: the channels of its input over those of its weight."""
    if layers:
        return max(getattr(m, "groups", 1) for m in layers)
    tensors = tensors_in(args)
    if len(tensors) < 2 or tensors[1].dim() < 3:
        return 1
    return max(1, tensors[0].shape[1] // tensors[1].shape[1])


def _scratch(step: Step, layers: Sequence[nn.Module], args: tuple, result: Any) -> int:
    """Gradients of the weights; and what a convolution on the CPU takes to work on its arguments in another layout."""
    layer = next((m for m in layers if isinstance(m, nn.modules.conv._ConvNd)), None)
    x = next(iter(tensors_in(args)), None)
    if layer is None or x is None or x.device.type != "cpu" or not isinstance(result, Tensor):
        return step.weights
    if set(layer.kernel_size) == set(layer.stride) == {1} and layer.groups == 1:
        return step.weights
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return 3 * step.weights
    return 2 * step.weights + x.nbytes + result.nbytes


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    result: Tensor = mode.from_tensor(tensor)
    return result


class _Flops(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products and convolutions, by torch's own formulas.

    Batch norm of tensors without memory it answers itself, which is faster.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_norm = func is _native_batch_norm and isinstance(args[0], FakeTensor)
        result = _fake_batch_norm(*args) if is_norm else func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


_native_batch_norm = torch.ops.aten.native_batch_norm.default


def _fake_batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *others: Any) -> tuple:
    """What the operator returns, of tensors without memory; torch finds that out by twenty other operators."""
    dtype = next((t.dtype for t in (weight, bias, mean, var) if t is not None), x.dtype)
    statistics = (x.new_empty(x.shape[1] if training else 0, dtype=dtype) for _ in range(2))
    return torch.empty_like(x, memory_format=memory_format_of(x)), *statistics


class _Interpreter(fx.Interpreter):
    def __init__(self, recorder: Recorder, graph: fx.Graph, module: nn.Module, path: str):
        super().__init__(module, graph=graph)
        self._recorder, self._path = recorder, path

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        key = key_of(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        step = Step(join(self._path, key), module if module is not None else n.target)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        before = self._recorder.flops.total
        with self._recorder.running(step):
            result = super().run_node(n)
        step.flops = self._recorder.flops.total - before
        layers = [m for m in (module, *pytree.tree_leaves(args)) if isinstance(m, nn.Module)]
        step.weights = sum(p.nbytes for m in layers for p in m.parameters()) + self._recorder.external_bytes(args)
        step.scratch = _scratch(step, layers, args, result)
        step.groups = _groups(layers, args) if step.flops else 1
        self._recorder.made(step, result, (args, kwargs))
        return result
