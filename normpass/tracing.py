"""torch.fx tracing that refuses what a graph cannot say.

fx runs forward once with proxies for tensors and writes down the operations. What else happens meanwhile is
lost, so it is watched here: a part that runs without gradients or under saved-tensor hooks (`no_grad`,
`torch.utils.checkpoint`), autocast switched inside, random numbers drawn by Python or fixed as constants,
attributes and lists that are written, questions about the type of a value. Each raises `CaptureError`.
"""

from __future__ import annotations

import builtins
import functools
import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normpass.guard import BOOKKEEPING, SIMPLE, fingerprint, is_plain_attribute_of_class

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_immutable = fx.immutable_collections
_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size, _immutable.immutable_list, _immutable.immutable_dict)
_lock = threading.RLock()


class CaptureError(Exception):
    """Why a module could not be traced, in one line; `module` is the innermost one being traced."""

    def __init__(self, reason: str, module: nn.Module | None = None):
        super().__init__(reason)
        self.module = module


class Recorded:
    """What the modules of `root` read from themselves while forward was traced."""

    def __init__(self, root: nn.Module):
        self.members = {id(m) for m in root.modules()}
        self.reads: dict[tuple[int, str], tuple[dict, str, Any]] = {}
        self.contents: dict[tuple[int, str], tuple[dict, str, Any]] = {}
        self.inherited: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        self._before: dict[tuple[int, str], tuple[Any, Any]] = {}

    def note(self, module: nn.Module, attributes: dict, name: str, value: Any) -> None:
        key = (id(module), name)
        if name not in attributes:
            if is_plain_attribute_of_class(module, name):
                self.inherited.setdefault(key, (module, name, value))
        elif isinstance(value, SIMPLE):
            self.reads.setdefault(key, (attributes, name, value))
        elif key not in self.contents and not isinstance(value, (nn.Module, Tensor)):
            self.contents[key] = (attributes, name, fingerprint(value))
            kept = type(value) in (list, dict, set)
            self._before[key] = (value, value.copy() if kept else None)

    def refuse_changes(self) -> None:
        """CaptureError if forward changed a list, a dict or an object that it had read; lists are put back."""
        changed = [key for key, (at, name, content) in self.contents.items() if fingerprint(at.get(name)) != content]
        for value, before in (self._before[key] for key in changed):
            if isinstance(value, list) and before is not None:
                value[:] = before
            elif before is not None:
                value.clear()
                value.update(before)
        if changed:
            raise CaptureError(f"its forward changes `self.{changed[0][1]}`")


class TensorProxy(fx.Proxy):
    """A proxy that has what a tensor has, where it is known to be one (and not a tuple, a size, a number).

    `a += b` is recorded as what it is: fx makes `a = a + b` of it, and who else holds `a` would miss the change.
    """

    @property
    def is_known(self) -> bool:
        return _is_one_tensor(self.node)

    def __getattr__(self, name: str) -> Any:
        if self.is_known and not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise CaptureError(f"its forward sets `{name}` of a tensor")
        super().__setattr__(name, value)


_NOT_ONE_TENSOR = frozenset(
    "chunk split unbind tensor_split split_with_sizes hsplit vsplit dsplit max min topk sort aminmax median "
    "nanmedian mode kthvalue cummax cummin unique unique_consecutive nonzero var_mean std_mean meshgrid "
    "broadcast_tensors size stride dim ndimension numel nelement item tolist numpy shape is_contiguous type "
    "is_floating_point is_complex get_device data_ptr element_size getitem getattr histogram lstm gru "
    "multi_head_attention_forward frexp slogdet qr eig eigh svd".split()
)


def _is_one_tensor(node: fx.Node) -> bool:
    """Whether the value of `node` is certainly one tensor: no tuple, size or number."""
    if "is_tensor" not in node.meta:
        node.meta["is_tensor"] = _makes_one_tensor(node)
    return bool(node.meta["is_tensor"])


def _makes_one_tensor(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _NOT_ONE_TENSOR or node.kwargs.get("return_indices") or node.op == "call_module":
        return False
    origin = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    known = node.op == "call_method" or origin in ("torch", "_operator") or name == "stochastic_depth"
    return known and any(_is_one_tensor(source) for source in node.all_input_nodes)


def _returns_one_tensor(module: nn.Module) -> bool:
    """Whether a layer that is called as it is returns one tensor: a norm, most layers of torch."""
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
        return True
    several = isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss))
    of_torch = type(module).__module__.startswith("torch.nn.modules.")
    return of_torch and not several and not getattr(module, "return_indices", False)


def _in_place(name: str) -> Callable:
    function = getattr(operator, name)

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in fx.graph.inplace_methods:
    if _name != "setitem":
        setattr(TensorProxy, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """fx tracing that stops at the modules `is_kept_whole` names, and knows where it failed."""

    proxy_buffer_attributes = True

    def __init__(self, is_kept_whole: Callable[[nn.Module], Any]):
        super().__init__()
        self.is_kept_whole = is_kept_whole
        self.failed: nn.Module | None = None
        """the innermost module whose forward raised"""
        self.entered: list[nn.Module] = []
        self._attributes: dict[Tensor, fx.Proxy] = {}
        self._hooks = _top_hooks(False)
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(self.is_kept_whole(m)) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:  # fx replaces nn.Module's own methods, for every thread
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if not self.is_leaf_module(m, ""):
            self.entered.append(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = m
            raise
        if type(result) is TensorProxy and result.node.op == "call_module" and _returns_one_tensor(m):
            result.node.meta["is_tensor"] = True
        return result

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TensorProxy(node, self)

    def create_node(self, kind, *args, **kwargs):
        if not torch.is_grad_enabled():
            raise CaptureError("it runs a part of its forward without gradients (`no_grad`, a reentrant checkpoint)")
        if _top_hooks(False) is not self._hooks and _top_hooks(False) != self._hooks:
            raise CaptureError("it runs a part of its forward under `checkpoint` or other saved-tensor hooks")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any):
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:  # fx would make it a plain dict
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, (dict, list, tuple)) and type(a) not in _CONTAINERS and not hasattr(a, "_fields"):
            raise CaptureError(f"it makes a {type(a).__name__}, which a graph would turn into something else")
        return super().create_arg(a)

    def attribute(self, tensor: Tensor) -> Any:
        """The proxy of a tensor that is a plain attribute of a module (not a parameter or buffer)."""
        if tensor not in getattr(self, "tensor_attrs", ()):
            return tensor
        if tensor not in self._attributes:
            self._attributes[tensor] = self.create_proxy("get_attr", self.tensor_attrs[tensor], (), {})
        return self._attributes[tensor]


@contextmanager
def watched(root: nn.Module, tracer: Tracer) -> Iterator[Recorded]:
    """Everything that forward does to the world while it is traced: recorded, refused or undone."""
    recorded = Recorded(root)
    with ExitStack() as stack:
        stack.enter_context(_lock)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for context in (
            _reads(recorded, tracer),
            _no_switches(),
            _no_draws(),
            _types_of_proxies(),
            _own_functions(tracer),
        ):
            stack.enter_context(context)
        yield recorded
        recorded.refuse_changes()


@contextmanager
def _reads(recorded: Recorded, tracer: Tracer) -> Iterator[None]:
    """Record the plain values that modules read from themselves; refuse that they write any."""
    thread = threading.get_ident()
    get, plain_set = object.__getattribute__, nn.Module.__setattr__

    def getattribute(self, name):
        value = get(self, name)
        if name in BOOKKEEPING or name.startswith("__") or threading.get_ident() != thread:
            return value
        if id(self) not in recorded.members or isinstance(value, _METHODS):
            return value
        attributes = get(self, "__dict__")
        if isinstance(value, Tensor) and name in attributes:
            return tracer.attribute(value)
        recorded.note(self, attributes, name, value)
        return value

    def setattribute(self, name, value):
        if id(self) in recorded.members and threading.get_ident() == thread:
            raise CaptureError(f"its forward sets `self.{name}`", self)
        plain_set(self, name, value)

    nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign]
    nn.Module.__setattr__ = setattribute  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain_set  # type: ignore[method-assign]


_METHODS = (type(nn.Module.forward), type(nn.Module().forward), type(len), functools.partial, type)
_SWITCHES = (
    (torch.amp.autocast_mode.autocast, "__enter__", "switches autocast"),
    (torch, "is_grad_enabled", "asks whether gradients are on"),
    (torch, "is_autocast_enabled", "asks whether autocast is on"),
)


@contextmanager
def _no_switches() -> Iterator[None]:
    """Refuse that the model's own code switches autocast, or asks for a state that may differ at another call."""
    thread = threading.get_ident()

    def refusing(function: Callable, what: str) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            by_model = asking not in ("torch", "normpass") or function.__name__ == "__enter__"
            if threading.get_ident() == thread and by_model:
                raise CaptureError(f"its forward {what}")
            return function(*args, **kwargs)

        return call

    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in _SWITCHES]
    for (owner, name, function), (_, _, what) in zip(plain, _SWITCHES, strict=True):
        setattr(owner, name, refusing(function, what))
    try:
        yield
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)


@contextmanager
def _no_draws() -> Iterator[None]:
    """Refuse random numbers, which a graph would repeat for ever, and put the generators back."""
    before, of_python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        yield
        drawn = not torch.equal(before, torch.get_rng_state()) or of_python != random.getstate()
        if of_numpy is not None:
            now = numpy.random.get_state()
            drawn = drawn or now[2:] != of_numpy[2:] or bool((now[1] != of_numpy[1]).any())
        if drawn:
            raise CaptureError("its forward draws random numbers that do not come from its tensors")
    finally:
        torch.set_rng_state(before)
        random.setstate(of_python)
        if of_numpy is not None:
            numpy.random.set_state(of_numpy)


@contextmanager
def _types_of_proxies() -> Iterator[None]:
    """Let `isinstance` take the proxy of a tensor for a tensor; refuse the question where it is not known to be one.

    The built-in itself is replaced: a `__class__` that lies would deceive C++ code as well.
    """
    plain = builtins.isinstance

    def answering(value: Any, classes: Any) -> bool:
        if type(value) is not TensorProxy or plain(value, classes):
            return plain(value, classes)
        if value.is_known:
            return issubclass(Tensor, classes)
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if asking in ("torch", "normpass"):
            return False
        raise CaptureError(f"its forward asks for the type of `{value.node.name}`")

    builtins.isinstance = answering  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance = plain


@contextmanager
def _own_functions(tracer: Tracer) -> Iterator[None]:
    """Record a `torch.autograd.Function` as one call: traced into, its backward would be lost."""
    function = torch.autograd.Function
    plain = vars(function)["apply"]

    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        given = any(type(leaf) is TensorProxy for leaf in pytree.tree_leaves((args, kwargs)))
        if given and cls.__module__.partition(".")[0] != "torch":  # of torch's own: a reentrant checkpoint
            return tracer.create_proxy("call_function", _call_of(cls), args, kwargs)
        return plain.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        function.apply = plain  # type: ignore[method-assign]


@functools.cache
def _call_of(cls: type[torch.autograd.Function]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    call.__name__ = f"apply_{cls.__name__}"
    return call
