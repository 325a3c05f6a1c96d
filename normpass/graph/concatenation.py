"""Concatenations along the channels that only norms read: they can do with the pieces.

A concatenation *dissolves* if each of its users is a norm (of those given) or a concatenation that dissolves too.
Then its moments are those of its pieces, and so are the values that its norms read.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from normpass.graph.nodes import called
from normpass.graph.operators import CAT

NO_CONCATENATION = "its input is no concatenation along the channels"


def cat_arguments(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The tensors that `node` concatenates along the channels; None if it does no such thing."""
    if node.op != "call_function" or node.target not in CAT:
        return None
    tensors: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if dim != 1 or "out" in node.kwargs or not isinstance(tensors, (tuple, list)):
        return None
    return tuple(tensors) if tensors and all(isinstance(t, fx.Node) for t in tensors) else None


def dissolved(node: fx.Node, norms: Collection[fx.Node]) -> tuple[fx.Node, ...] | str:
    """The concatenations that dissolve behind the input `node` of a norm, `node` first; or why it does not."""
    if cat_arguments(node) is None:
        return NO_CONCATENATION
    other = _other_user(node, norms)
    if other is not None:
        return f"the concatenation that it reads has another consumer, `{called(other)}`"
    found = [node]
    for cat in found:
        for piece in cat_arguments(cat) or ():
            if cat_arguments(piece) is not None and piece not in found and _other_user(piece, norms) is None:
                found.append(piece)
    pieces = pieces_of(node, found)
    if len(set(pieces)) < len(pieces):
        return "the same tensor is twice in the concatenation that it reads"
    return tuple(found)


def pieces_of(node: fx.Node, cats: Collection[fx.Node]) -> list[fx.Node]:
    """What is concatenated in `node`, in order, looking through all of `cats`."""
    if node not in cats:
        return [node]
    return [piece for argument in cat_arguments(node) or () for piece in pieces_of(argument, cats)]


def _other_user(node: fx.Node, norms: Collection[fx.Node]) -> fx.Node | None:
    """A user, also of concatenations of `node`, that is neither a norm nor such a concatenation."""
    for user in node.users:
        if user in norms:
            continue
        if cat_arguments(user) is None:
            return user
        other = _other_user(user, norms)
        if other is not None:
            return other
    return None
