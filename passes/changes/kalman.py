"""norm₁ → activation → conv → norm₂  ⇒  norm₂ also reads what norm₁ estimated  (changes the model)

    (y₁, e₁) = norm₁(x₁)      e₂⁻ = predicted(conv, activated(e₁))      (y₂, e₂) = norm₂(x₂, e₂⁻)

Batch Kalman normalization (arXiv 1802.03133), for small batches; only by name: `changes=("kalman",)`. Every BatchNorm
becomes a `normpass.nn.KalmanNorm`. From each of them the estimate is followed along the captured graph's edges through
activations, convolutions, linear layers, additions, concatenations, pooling, dropout, flattening and zero padding; it
is lost where one of several operands has none, at any other operation, and where the graph breaks. A norm that none
reaches is the batch norm that it was, and one that passes nothing on either (and has no micro-batches) is one for every
other rewrite too. `normpass.nn.estimate` has the algebra, `normpass.nn.kalman` the norm's.

Refuses (leaves as it is): a norm that has hooks or a parametrisation, or is of another class. One that is called twice
in a graph takes and gives no estimate there. In eval mode nothing of it is computed.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn

from normpass.errors import InvalidInputError
from normpass.graph.nodes import bound, path_of, replace_layers
from normpass.nn.estimate import activated, concatenated, padded, predicted, predicted_by_sample, summed, through_norm
from normpass.nn.kalman import check_options, kalman_from, kalman_norm
from normpass.nn.norm import is_replaceable
from normpass.ops import Activation
from normpass.passes.changes.estimates import (
    Activated,
    Estimates,
    Expression,
    Joined,
    Layer,
    Padded,
    Predicted,
    Source,
)

SEVERAL = {"sum": summed, "cat": concatenated}


@dataclass(frozen=True)
class Kalman:
    """Option object of `changes=`."""

    prediction_weight: float = 0.9
    """weight of the prediction against the batch's own statistics, in [0, 1]; 0 is batch norm. The authors take
    0.9 for micro-batches of 2 samples and 0.05 for large batches"""
    learn_weight: bool = False
    """learn the weight, a parameter of every norm that starts at `prediction_weight`. Where no prediction arrives its
    gradient is None"""
    transition: str = "closed_form"
    """how an estimate passes activations and convolutions: `"closed_form"`, deterministic, or `"sampled"`, the
    authors': by a random draw"""
    state: str = "input"
    """whose statistics are followed behind a norm: `"input"`, as the authors do, those of its input, as if it did
    not scale and shift; `"output"` those that its input's estimate has once it is normalized, scaled and shifted"""
    micro_batches: int = 1
    """into how many equal parts a batch is divided; each has statistics of its own"""

    largest_ratio: float = 100.0
    """a norm uses no prediction whose variance is so many times the observed one, averaged over the channels; with
    few values a channel, as in maps of 1×1, take `math.inf`, which uses all"""

    replaces: ClassVar[str] = "batch norms"
    applies_to_graph: ClassVar[bool] = True
    changes_eval: ClassVar[bool] = False
    """in eval mode the changed layers are batch norms by themselves"""

    def __post_init__(self) -> None:
        check_options(self.prediction_weight, self.learn_weight, self.micro_batches, self.largest_ratio)
        if self.transition not in ("closed_form", "sampled"):
            raise InvalidInputError(f'`transition` must be "closed_form" or "sampled", it is "{self.transition}"')
        if self.state not in ("input", "output"):
            raise InvalidInputError(f'`state` must be "input" or "output", it is "{self.state}"')

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put a Kalman norm in the place of every BatchNorm; returns path -> the layer that stood there."""
        if self.prediction_weight == 0 and self.micro_batches == 1:
            return {}  # it is batch norm
        options = {
            "prediction_weight": self.prediction_weight,
            "learn_weight": self.learn_weight,
            "micro_batches": self.micro_batches,
            "largest_ratio": self.largest_ratio,
        }
        return replace_layers(model, lambda layer: kalman_from(layer, **options) if is_replaceable(layer) else None)

    def change_graph(self, graph: fx.Graph) -> None:
        """Wire the estimates along the edges of `graph`."""
        calls = [node for node in graph.nodes if node.op == "call_function" and node.target is kalman_norm]
        if self.prediction_weight != 0:  # else nothing would read them
            self._wire(graph, Estimates(graph, _filters(calls).__contains__))
        for node in calls:
            _as_batch_norm(graph, node)

    def _wire(self, graph: fx.Graph, estimates: Estimates) -> None:
        sources = {source for expression in estimates.predictions.values() for source in expression.sources()}
        values = _Values(graph, self.transition == "sampled")
        for node in estimates.norms:
            if node in estimates.predictions:
                node.update_arg(_PREDICTION, values.of(estimates.predictions[node]))
            if node in sources:
                estimate = _estimate_of(graph, node)
                values.sources[node] = _behind_norm(graph, node, estimate) if self.state == "output" else estimate


_PREDICTION, _WITH_ESTIMATE = 1, 13
"""places among the arguments of `kalman_norm`, which its layer gives by position"""


def _filters(calls: list[fx.Node]) -> set[fx.Node]:
    """The calls of norms that nobody has given a prediction by hand, and that run once."""
    times = Counter(_norm_of(node) for node in calls)
    free = [node for node in calls if node.args[_PREDICTION] is None and not node.args[_WITH_ESTIMATE]]
    return {node for node in free if times[_norm_of(node)] == 1}


def _norm_of(node: fx.Node) -> Any:
    """What tells the norm that `node` calls from others: a tensor of its own, or its path."""
    arguments = bound(kalman_norm, node) or {}
    tensors = (arguments.get(name) for name in ("running_mean", "weight"))
    return next((t for t in tensors if t is not None), path_of(node) or node)


def _estimate_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Let the norm `node` return its estimate beside its result: that estimate."""
    with graph.inserting_after(node):
        estimate = graph.call_function(operator.getitem, (node, 1))
        y = graph.call_function(operator.getitem, (node, 0))
    y.meta = {name: value for name, value in node.meta.items() if name != "key"}
    node.replace_all_uses_with(y, lambda user: user not in (y, estimate))
    node.update_arg(_WITH_ESTIMATE, True)
    node.meta.pop("example_value", None)  # it was that of y
    return estimate


def _behind_norm(graph: fx.Graph, node: fx.Node, estimate: fx.Node) -> fx.Node:
    norm = bound(kalman_norm, node)
    assert norm is not None  # it is called by its layer
    with graph.inserting_after(estimate):
        return graph.call_function(through_norm, (estimate, norm["weight"], norm["bias"], norm["eps"]))


def _as_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Make an ordinary batch norm of a Kalman norm that reads no prediction and passes on no estimate.

    The cumulative average (`momentum=None`) stays: its share is no constant.
    """
    norm = bound(kalman_norm, node)
    assert norm is not None  # it is called by its layer
    if norm["prediction"] is not None or norm["with_estimate"] or norm["micro_batches"] > 1 or norm["momentum"] is None:
        return
    batches = norm["num_batches_tracked"]
    if batches is not None:
        with graph.inserting_before(node):
            graph.call_method("add_", (batches, 1)).meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    running = norm["running_mean"], norm["running_var"]
    node.target, node.kwargs = F.batch_norm, {}
    node.args = (norm["x"], *running, norm["weight"], norm["bias"], True, norm["momentum"], norm["eps"])


class _Values:
    """Turns expressions into nodes, each once, right behind what they describe."""

    def __init__(self, graph: fx.Graph, sampled: bool):
        self.graph = graph
        self.sampled = sampled
        self.sources: dict[fx.Node, fx.Node] = {}
        self._made: dict[Any, fx.Node] = {}

    def of(self, expression: Expression) -> fx.Node:
        if isinstance(expression, Source):
            return self.sources[expression.norm]
        if expression not in self._made:
            self._made[expression] = self._make(expression)
        return self._made[expression]

    def _make(self, expression: Expression) -> fx.Node:
        function, args, kwargs = self._call(expression)
        behind = max(expression.at, *(a for a in args if isinstance(a, fx.Node)))
        with self.graph.inserting_after(behind):
            return self.graph.call_function(function, args, kwargs)

    def _call(self, expression: Expression) -> tuple[Any, tuple, dict]:
        if isinstance(expression, Joined):
            return SEVERAL[expression.how], tuple(self.of(e) for e in expression.parts), {}
        if isinstance(expression, Activated):
            of_activation = expression.activation.name, list(expression.activation.args)
            return activated, (self.of(expression.source), *of_activation), {"sampled": self.sampled}
        if isinstance(expression, Padded):
            return padded, (self.of(expression.source), expression.before, expression.after), {}
        assert isinstance(expression, Predicted)
        return self._predicted(expression.source, expression.layer)

    def _predicted(self, source: Expression, layer: Layer) -> tuple[Any, tuple, dict]:
        if not self.sampled:
            return predicted, (self.of(source), layer.weight, layer.bias, layer.groups), {}
        activation = source.activation if isinstance(source, Activated) else Activation("identity")
        drawn = source.source if isinstance(source, Activated) else source  # the draw itself goes through it
        tensors = self.of(drawn), layer.x, layer.weight, layer.bias
        options = layer.stride, layer.dilation, layer.groups, activation.name, list(activation.args)
        return predicted_by_sample, (*tensors, *options), {}
