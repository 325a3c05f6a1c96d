"""One forward of a captured graph on tensors without memory, which tells its facts.

    facts_of(graph_module, inputs) -> Facts

Running the graph under `FakeTensorMode` computes no number, but storages are shared, written and saved as they always
are: views alias, operators announce what they write, autograd saves what it saves. So who aliases, who writes and what
is kept follow from what torch does, for any operator, and from no list of names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks

from normpass.analysis.facts import SMALL, Facts, Step
from normpass.analysis.fake_inputs import FakeInputs
from normpass.analysis.fake_operators import Operators, groups_of, scratch_of
from normpass.copies.untouched import function_of, tensors_in
from normpass.graph.nodes import is_state, key_of, name_of
from normpass.recipe.notes import Copier

_VALUES = (Tensor, tuple, list, dict, str, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype)


def _is_switch(node: fx.Node, result: Any) -> bool:
    """Whether a call is there for what it does to the calls behind it: it makes no value."""
    is_value = isinstance(result, (*_VALUES, torch.device)) or dataclasses.is_dataclass(result)
    return node.op == "call_function" and not is_value


def _functions_of(tensors: Iterable[Tensor]) -> list[Any]:
    """What backward goes through on its way from any of `tensors`, or from what they are views of."""
    alive = [t for t in tensors if t.requires_grad]
    return [function_of(t) for t in (*alive, *(t._base for t in alive if t._base is not None))]


def facts_of(
    graph_module: fx.GraphModule, inputs: FakeInputs, stand_ins: Mapping[Any, Callable[..., Any]] | None = None
) -> Facts:
    """One forward of a graph whose parameters and buffers are inputs like the others.

    Runs with gradients, autocast and the like as they are when this is called.

    Args:
        stand_ins: function -> what gives its result and the tensors it writes to, without computing anything.
    """
    with inputs.mode:
        recorder = _Recorder(tensors_in(inputs.values))
        with recorder.watching():
            interpreter = _Interpreter(recorder, graph_module, stand_ins or {}, inputs.numbers)
            output = interpreter.run(*inputs.values)
    inputs.restore()
    return recorder.finish(output, interpreter.results)


class _Recorder(Copier):
    def __init__(self, outside: Sequence[Tensor]):
        self.facts = Facts(device=next((t.device.type for t in outside), "cpu"))
        self.operators = Operators()
        self._alive: list[Any] = []  # storages, so that no identity is used twice
        self._outside = {self.identity(t): t.untyped_storage().nbytes() for t in outside}
        self._version: dict[int, int] = {}
        self._value_of: dict[tuple[int, int], int] = {}
        self._saved: list[tuple[Step, int, int, int]] = []
        self._inputs = outside
        self._functions: list[tuple[Step, list[Any]]] = []
        self._packed: list[Tensor] = []
        self._to_copy: set[int] = set()
        self._copied: set[int] = set()
        self._copies = 0
        self._unseen: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what autograd saves and what operators do is noted."""
        with saved_tensors_hooks(self._pack, lambda saved: saved), self.operators:
            yield

    def _pack(self, tensor: Tensor) -> None:
        storage = self.identity(tensor)
        if storage in self._to_copy:
            self._copied.add(storage)
            self._copies += tensor.nbytes
        else:
            self._packed.append(tensor)  # nothing to keep: there is no backward

    def copy(self, tensor: Tensor) -> None:
        self._to_copy.add(self.identity(tensor))

    def ignore(self, tensor: Tensor) -> None:
        pass

    def forget(self, tensor: Tensor) -> None:
        self._to_copy.discard(self.identity(tensor))

    def before(self) -> None:
        self._packed.clear()
        self._copies = 0
        self.operators.clear()

    def read(self, step: Step, arguments: Any) -> dict[int, int]:
        """Note what the step reads; the versions its arguments had, by storage."""
        read: dict[int, int] = {}
        outside: dict[int, None] = {}
        versions: dict[int, int] = {}
        for tensor in tensors_in(arguments):
            storage = self.identity(tensor)
            versions[storage] = tensor._version
            value = self._value(storage)
            if storage in self._outside:
                outside[storage] = None
                step.weights += tensor.nbytes if tensor.requires_grad else 0
            elif value is not None:
                read[value] = min(read.get(value, 0) + tensor.nbytes, self.facts.sizes[value])
        step.reads, step.read_sizes, step.reads_outside = tuple(read), tuple(read.values()), tuple(outside)
        return versions

    def made(self, step: Step, result: Any, arguments: Any, versions: dict[int, int]) -> None:
        """Note what the step wrote, saved and returned."""
        written = {self.identity(t): t for t in tensors_in(arguments) if t._version != versions[self.identity(t)]}
        announced = {self.identity(t) for t in self.operators.written} & (versions.keys() | self._outside.keys())
        self._unseen |= announced - written.keys() - self._outside.keys()
        before = {s: self._value(s) for s in (*written, *announced)}
        step.writes = tuple(dict.fromkeys((*written, *announced)))
        makes: list[int] = []
        for storage in step.writes:
            self._version[storage] = self._version.get(storage, 0) + 1
            old = before[storage]
            if old is not None:
                makes.append(self._new(storage, self.facts.sizes[old]))
        for tensor in tensors_in(result):
            step.differentiable |= tensor.requires_grad
            storage = self.identity(tensor)
            if self._value(storage) is None and storage not in self._outside:
                makes.append(self._new(storage, tensor.untyped_storage().nbytes()))
            else:
                step.passes |= self._value(storage) not in makes or storage in before
        step.makes = tuple(makes)
        self._functions.append((step, _functions_of((*tensors_in(result), *written.values()))))
        if isinstance(result, Tensor) and (value := self._value(self.identity(result))) is not None:
            self.facts.values[step.node] = value
        self._note_saved(step, written)
        seen = self.operators
        step.is_random, step.is_foreign, step.flops = seen.random, seen.foreign, seen.flops
        self.facts.steps.append(step)

    def _new(self, storage: int, size: int) -> int:
        value = len(self.facts.sizes)
        self._value_of[storage, self._version.get(storage, 0)] = value
        self.facts.sizes.append(size)
        return value

    def _note_saved(self, step: Step, written: dict[int, Tensor]) -> None:
        step.internals += self._copies
        overwritten = {(t.shape, t.dtype) for t in written.values()}
        for tensor in self._packed:
            storage = self.identity(tensor)
            known = storage in self._outside or self._value(storage) is not None
            step.copies |= not known and (tensor.shape, tensor.dtype) in overwritten
            version = self._version.get(storage, 0)
            self._saved.append((step, storage, version, tensor.untyped_storage().nbytes()))

    def _value(self, storage: int) -> int | None:
        return self._value_of.get((storage, self._version.get(storage, 0)))

    def finish(self, output: Any, results: dict[fx.Node, Any]) -> Facts:
        """Sort what was saved into values and internals."""
        facts = self.facts
        facts.results = results
        writers = {step.node for step in facts.steps if step.writes}
        switches = (node not in writers and _is_switch(node, result) for node, result in results.items())
        facts.modes = dict(zip(results, itertools.accumulate(switches, initial=0), strict=False))
        facts.storages = {n: frozenset(self.identity(t) for t in tensors_in(r)) for n, r in results.items()}
        states = (s for n, s in facts.storages.items() if n.op == "placeholder" and is_state(n))
        facts.state = frozenset().union(*states)
        returned = {self.identity(t) for t in tensors_in(output)}
        facts.outputs = frozenset(v for s in returned if (v := self._value(s)) is not None)
        facts.overwritten = frozenset(v for (s, n), v in self._value_of.items() if n < self._version.get(s, 0))
        facts.unseen = frozenset(v for (s, _), v in self._value_of.items() if s in self._unseen)
        facts.written_outside = frozenset(s for s in self._outside if self._version.get(s, 0))
        facts.small_outside = {s: size for s, size in self._outside.items() if size <= SMALL}
        counted, outside = set(returned), set()
        without_backward = self._without_backward(output)
        for step, storage, version, size in self._saved:
            if id(step) in without_backward:
                continue
            value = self._value_of.get((storage, version))
            if storage in self._outside:
                outside.add(storage)
            elif value is not None:
                step.saves = tuple(dict.fromkeys((*step.saves, value)))
            elif storage not in counted:
                counted.add(storage)
                step.internals += size
        facts.saved_outside, facts.copied_outside = frozenset(outside), frozenset(self._copied)
        return facts

    def _without_backward(self, output: Any) -> set[int]:
        """The identities of steps that no backward from the results reaches: what they save is freed at once."""
        waiting = [function_of(t) for t in (*tensors_in(output), *self._inputs)]
        reached: set[Any] = {None}
        while waiting:
            function = waiting.pop()
            if function not in reached:
                reached.add(function)
                waiting += [next_function for next_function, _ in function.next_functions]
        unread = (step for step, functions in self._functions if functions and reached.isdisjoint(functions))
        others = self._outside.keys() - self.facts.state  # the caller may have views of these
        return {id(step) for step in unread if others.isdisjoint(step.writes)}

    def identity(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return int(storage._cdata)


class _Interpreter(fx.Interpreter):
    def __init__(self, recorder: _Recorder, graph_module: fx.GraphModule, stand_ins: Mapping, numbers: Mapping):
        super().__init__(graph_module, garbage_collect_values=False)
        self._recorder, self._stand_ins, self._numbers = recorder, stand_ins, numbers
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self._run(n) if n.op in ("call_function", "call_method") else super().run_node(n)
        if n.op != "output":
            self.results[n] = result
        return result

    def _run(self, n: fx.Node) -> Any:
        recorder, step = self._recorder, Step(n, key_of(n))
        arguments = self.fetch_args_kwargs_from_env(n)
        versions = recorder.read(step, arguments)
        recorder.before()
        stand_in = self._stand_ins.get(n.target)
        found = None if stand_in is None else stand_in(*arguments[0], **arguments[1])
        if n.target == "item" and id(arguments[0][0]) in self._numbers:
            with unset_fake_temporarily():
                result = self._numbers[id(arguments[0][0])].item()
        elif found is None:
            result = super().run_node(n)
        else:
            result, recorder.operators.written = found
        recorder.made(step, result, arguments, versions)
        if name_of(n.target) == "convolution_function" and not step.flops:  # an operator of ours
            step.flops = 2 * result.numel() * arguments[0][1][0].numel()
        if step.flops:
            step.groups = groups_of(arguments[0])
        step.scratch = scratch_of(step, arguments[0], result)
        return result
