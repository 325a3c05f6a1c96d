"""cheap functions of rebuilt tensors  ⇒  recipes as well

    cat(z₁, …, zₙ), z·gate, z₁ + z₂, act(s), pad(z), upsample(z), pool(z) of stride 1, views of z

A consumer behind one of these would keep its result. Where everything the function reads is rebuilt or
kept anyway, its result need not be kept: it becomes a recipe over recipes. A function that would newly
keep as much as it saves is left alone. So the concatenations of DenseNet, Inception and U-Net, the
squeeze-and-excite product and the channel shuffle cost nothing between forward and backward.

A free-standing ReLU saves its own result before it could be tagged; it is written as
`threshold(s, 0, 0)`, the same function with the same backward kernel, which saves s, a recipe.

Refuses (leaves the node as it is): a result that is changed in place later; random functions.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from normpass import concatenation
from normpass.functional import fused_norm_act, inplace_abn, product_as_first, split_norm_act, sum_as_first
from normpass.graph import (
    VIEW_FUNCTIONS,
    VIEW_METHODS,
    Storage,
    key_of,
    module_of,
    owns_result,
    replace_node,
    written_nodes,
)
from normpass.ops.activation import activate
from normpass.passes.specialise_switchable import is_rebuilt_norm
from normpass.recipe import derived, derived_function, method_function
from normpass.sharing import KEEPING, producer_statistics, shared_norm_act
from normpass.sites import activation_of, is_add

CAT = concatenation.CAT | {torch.stack}
MUL = frozenset({operator.mul, torch.mul, product_as_first})
PAD = frozenset({F.pad})
UPSAMPLE = frozenset({F.interpolate, F.upsample, F.pixel_shuffle, torch.pixel_shuffle, torch.channel_shuffle})
_PAD_MODULES = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
_POOL_MODULES = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)
_POOL_FUNCTIONS = frozenset({F.max_pool2d, F.avg_pool2d, torch.max_pool2d, F.max_pool1d, F.max_pool3d})
_KEEPING_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    *_POOL_MODULES,
)
_KEEPING_FUNCTIONS = _POOL_FUNCTIONS | {
    F.linear,
    torch.matmul,
    operator.matmul,
    torch.bmm,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose2d,
    torch.conv2d,
}
_OWN = frozenset({split_norm_act, shared_norm_act, fused_norm_act, inplace_abn, sum_as_first, product_as_first})
_SAVES_RESULT = ("relu", "sigmoid", "tanh")
_SMOOTH_OR_INPUT_SAVING = (
    "relu",
    "hardtanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "gelu",
    "gelu_tanh",
    "hardswish",
    "hardsigmoid",
    "softplus",
    "mish",
)


@dataclass(frozen=True)
class DeriveRecipes:
    name: str = "derive_recipes"

    def apply(self, graph: fx.Graph, root: nn.Module, kept: frozenset[str] = frozenset()) -> dict[str, str]:
        """Rewrite `graph` in place; returns node name -> kind for each derived node.

        The nodes whose keys are in `kept` stay as they are, and their results are kept.
        """
        storage = Storage(graph, root)
        rebuilt = {n for n in graph.nodes if n.target in KEEPING or is_rebuilt_norm(n, root)}
        saved = {n for n in graph.nodes if _is_kept(n, root)} - rebuilt
        chosen: dict[fx.Node, str] = {}
        for node in graph.nodes:
            kind = kind_of(node, root)
            if kind is None or not _is_worth_it(node, kind, rebuilt, saved):
                continue
            read = [node, *(n for n in node.all_input_nodes if n not in rebuilt)]
            if any(_is_changed_later(n, node, storage, root) for n in read):
                continue  # what is kept must not change between forward and backward
            if not _may_be_functional(node, root):
                continue
            chosen[node] = kind
            rebuilt.add(node)
            saved.discard(node)
            saved.update(n for n in node.all_input_nodes if n not in rebuilt)
            rebuilt.update(user for user in node.users if _is_item(user))
        wanted = {node: kind for node, kind in chosen.items() if key_of(node) not in kept}
        return {_replace(graph, node, kind, root).name: kind for node, kind in wanted.items()}


def kind_of(node: fx.Node, root: nn.Module) -> str | None:
    """Which kind of cheap function `node` is, or None."""
    if node.op == "call_module":
        return _kind_of_module(node, root)
    if node.op == "call_method":
        return _kind_of_method(node, root)
    if node.op != "call_function" or "out" in node.kwargs:
        return None
    if node.target in CAT:
        return "cat"
    if node.target in MUL and all(isinstance(a, fx.Node) for a in node.args) and not node.kwargs:
        return "mul"
    if is_add(node) and node.target is not operator.iadd:
        return "add"
    if node.target in PAD:
        return "pad"
    if node.target in UPSAMPLE:
        return "upsample"
    if node.target in _POOL_FUNCTIONS:
        return "pool" if _strides(node, None) == {1} else None
    if node.target in VIEW_FUNCTIONS:
        return "view" if node.target is not getattr and not _is_item_of_tuple(node) else None
    return _kind_of_activation(node, root)


def _kind_of_module(node: fx.Node, root: nn.Module) -> str | None:
    module = module_of(node, root)
    if isinstance(module, _PAD_MODULES):
        return "pad"
    if isinstance(module, (nn.Upsample, nn.PixelShuffle, nn.ChannelShuffle)):
        return "upsample"
    if isinstance(module, _POOL_MODULES):
        return "pool" if _strides(node, module) == {1} else None
    if type(module) is nn.Flatten:
        return "view"
    return _kind_of_activation(node, root)


def _kind_of_method(node: fx.Node, root: nn.Module) -> str | None:
    name = str(node.target)
    if name in VIEW_METHODS and name not in (
        "type_as",
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "detach",
    ):
        return "view"
    if name in ("mul", "add") and len(node.args) == 2 and isinstance(node.args[1], fx.Node) and not node.kwargs:
        return name
    return _kind_of_activation(node, root)


def _kind_of_activation(node: fx.Node, root: nn.Module) -> str | None:
    activation = activation_of(node, root)
    return "activation" if activation is not None and activation.name in _SMOOTH_OR_INPUT_SAVING else None


def _strides(node: fx.Node, module: nn.Module | None) -> set:
    """The strides of a pooling; its kernel size where no stride is given. Indices must not be asked for."""
    stride: Any
    if module is not None:
        stride, indices = module.stride, getattr(module, "return_indices", False)
    else:
        stride = node.kwargs.get("stride", node.args[2] if len(node.args) > 2 else None)
        if stride is None:
            stride = node.kwargs.get("kernel_size", node.args[1] if len(node.args) > 1 else None)
        indices = node.kwargs.get("return_indices", False)
    if indices or isinstance(stride, fx.Node):
        return set()
    return set(stride) if isinstance(stride, (tuple, list)) else {stride}


def _is_kept(node: fx.Node, root: nn.Module) -> bool:
    """Whether autograd keeps the value of `node` as things stand: a user saves it, or it saves itself."""
    activation = activation_of(node, root)
    if activation is not None and activation.name in _SAVES_RESULT:
        return True
    return any(_keeps(user, node, root) for user in node.users)


def _keeps(user: fx.Node, node: fx.Node, root: nn.Module) -> bool:
    if user.op == "call_module":
        module = module_of(user, root)
        if isinstance(module, _KEEPING_MODULES):
            return True
    elif user.target in (split_norm_act, fused_norm_act):
        return user.args[1] is node or user.args[2] is node
    elif user.target is producer_statistics:
        return True
    elif user.target is inplace_abn:
        return False
    elif user.target in MUL:  # an operand is saved for the gradient of the other
        return any(n is not node and n.op != "placeholder" for n in user.all_input_nodes)
    elif user.target in _KEEPING_FUNCTIONS:
        return True
    activation = activation_of(user, root)
    return activation is not None and activation.name not in (*_SAVES_RESULT, "identity")


def _is_worth_it(node: fx.Node, kind: str, rebuilt: set, kept: set) -> bool:
    """Whether tagging keeps less than keeping the result: nothing new, or the parts of a concatenation."""
    inputs = [n for n in node.all_input_nodes if n in rebuilt or n in kept]
    if kind == "view":
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        return first in rebuilt
    if kind == "cat":  # its parts take no more than it does, and others may read them too
        return bool(inputs) or any(len(n.users) > 1 for n in node.all_input_nodes)
    new = [n for n in node.all_input_nodes if n not in rebuilt and n not in kept]
    return not new and (any(n in rebuilt for n in inputs) or kind in ("add", "activation", "mul"))


def _is_changed_later(node: fx.Node, after: fx.Node, storage: Storage, root: nn.Module) -> bool:
    """Whether the value of `node` is written to behind `after`, but by an activation that becomes a recipe too."""
    writer = storage.writer_after(node, after)
    if writer is None:
        return False
    alone = node is after and list(node.users) == [writer]
    return not (alone and kind_of(writer, root) == "activation" and _may_be_functional(writer, root))


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and _is_item_of_tuple(node)


def _is_item_of_tuple(node: fx.Node) -> bool:
    """Whether `node` takes an item of a tuple of tensors (of a chunk, a split), not a slice of a tensor."""
    if node.target is not operator.getitem:
        return False
    source = node.args[0]
    name = str(getattr(source.target, "__name__", source.target))
    return name in ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")


def _may_be_functional(node: fx.Node, root: nn.Module) -> bool:
    """An in-place activation may run out of place where nobody else sees what it overwrites."""
    return all(
        len(target.users) == 1 and (owns_result(target, root, _OWN) or is_rebuilt_norm(target, root))
        for target in written_nodes(node, root)
    )


def _replace(graph: fx.Graph, node: fx.Node, kind: str, root: nn.Module) -> fx.Node:
    with graph.inserting_before(node):
        if kind == "activation":
            new = _derived_activation(graph, node, root)
        elif node.op == "call_module":
            module = graph.get_attr(str(node.target))
            new = graph.call_function(derived, (module, *node.args), node.kwargs)
        elif node.op == "call_method":
            function = method_function(str(node.target))
            new = graph.call_function(derived_function(function), node.args, node.kwargs)
        else:
            new = graph.call_function(derived_function(node.target), node.args, node.kwargs)
    return replace_node(graph, node, new)


def _derived_activation(graph: fx.Graph, node: fx.Node, root: nn.Module) -> fx.Node:
    activation = activation_of(node, root)
    source = node.all_input_nodes[0]
    if activation.name == "relu":
        return graph.call_function(derived_function(F.threshold), (source, 0.0, 0.0))
    return graph.call_function(derived_function(activate), (source, activation.name, activation.args))
