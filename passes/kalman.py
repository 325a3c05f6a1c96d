"""norm₁ → activation → conv → norm₂  ⇒  norm₂ also reads what norm₁ estimated  (changes the model)

    (y₁, e₁) = norm₁(x₁)      e₂⁻ = predicted(conv, activated(e₁))      (y₂, e₂) = norm₂(x₂, e₂⁻)

Batch Kalman normalisation (arXiv 1802.03133), for small batches; only by name: `changes=("kalman",)`. From every
norm the estimate is followed along the graph's edges through activations, convolutions, linear layers, additions,
concatenations, pooling, dropout, flattening and zero padding; it is lost where one of several operands has none, or
at any other operation. A norm that it reaches becomes a `normpass.nn.KalmanNorm`; one that none reaches stays a
BatchNorm (with micro-batches: a Kalman norm without a prediction). `normpass.nn.estimate` has the algebra,
`normpass.nn.kalman` the norm's.

Refuses (leaves as it is): a norm that is called twice, has hooks or a parametrisation, or is of another class, and
the norms of modules that cannot be traced. In eval mode nothing of it is computed.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from normpass.capture import find_parts, reason_to_keep_whole
from normpass.graph import module_of, replace_layers
from normpass.nn.estimate import activated, concatenated, padded, predicted, predicted_by_sample, summed, through_norm
from normpass.nn.kalman import KALMAN_NORMS, batch_norm_with_estimate, check_options, kalman_from
from normpass.nn.norm import dimension_of
from normpass.passes.estimates import Activated, Estimates, Expression, Joined, Padded, Predicted, Source

SEVERAL = {"sum": summed, "cat": concatenated}


@dataclass(frozen=True)
class Kalman:
    """Option object of `changes=`."""

    prediction_weight: float = 0.9
    """weight of the prediction against the batch's own statistics, in [0, 1]; 0 is batch norm. The authors take
    0.9 for micro-batches of 2 samples and 0.05 for large batches"""
    learn_weight: bool = False
    """learn the weight, a parameter of each norm that starts at `prediction_weight`"""
    transition: str = "closed_form"
    """how an estimate passes activations and convolutions: `"closed_form"`, deterministic, or `"sampled"`, the
    authors': by a random draw"""
    state: str = "input"
    """whose statistics are followed behind a norm: `"input"`, as the authors do, those of its input, as if it did
    not scale and shift; `"output"` those that its input's estimate has once it is normalised, scaled and shifted"""
    micro_batches: int = 1
    """into how many equal parts a batch is divided; each has statistics of its own"""

    largest_ratio: float = 100.0
    """a norm uses no prediction whose variance is so many times the observed one, averaged over the channels; with
    few values a channel, as in maps of 1×1, take `math.inf`, which uses all"""

    def __post_init__(self) -> None:
        check_options(self.prediction_weight, self.learn_weight, self.micro_batches, self.largest_ratio)
        if self.transition not in ("closed_form", "sampled"):
            raise ValueError(f'`transition` must be "closed_form" or "sampled", it is "{self.transition}"')
        if self.state not in ("input", "output"):
            raise ValueError(f'`state` must be "input" or "output", it is "{self.state}"')

    def change_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put a Kalman norm where an estimate arrives; returns path -> the BatchNorm that stood there."""
        if self.prediction_weight == 0 and self.micro_batches == 1:
            return {}  # it is batch norm
        options = {
            "prediction_weight": self.prediction_weight,
            "learn_weight": self.learn_weight,
            "largest_ratio": self.largest_ratio,
        }
        new: dict[int, nn.Module] = {}
        for captured in find_parts(model).captures.values():
            estimates = _estimates(captured.graph, captured.root)
            for node in estimates.norms:
                norm = module_of(node, captured.root)
                if norm is None or dimension_of(norm) is None:
                    continue  # a Kalman norm already
                if node in estimates.predictions:
                    new[id(norm)] = kalman_from(norm, micro_batches=self.micro_batches, **options)
                elif self.micro_batches > 1:
                    new[id(norm)] = kalman_from(norm, micro_batches=self.micro_batches, prediction_weight=0.0)
        return replace_layers(model, lambda layer: new.get(id(layer)))

    def change_graph(self, graph: fx.Graph, root: nn.Module) -> None:
        """Wire the estimates along the edges of `graph`."""
        estimates = _estimates(graph, root)
        kalman = [n for n in estimates.norms if isinstance(module_of(n, root), KALMAN_NORMS)]
        predicted_for = {n: estimates.predictions[n] for n in kalman if n in estimates.predictions}
        sources = {source for expression in predicted_for.values() for source in expression.sources()}
        if self.prediction_weight == 0:
            return  # nothing would read them
        values = _Values(graph, self.transition == "sampled")
        for node in estimates.norms:
            if node not in predicted_for and node not in sources:
                continue
            prediction = values.of(predicted_for[node]) if node in predicted_for else None
            estimate = _wire(graph, root, node, prediction, node in sources)
            if self.state == "output" and estimate is not None:
                estimate = _behind_norm(graph, str(node.target), estimate)
            values.sources[node] = estimate


def _estimates(graph: fx.Graph, root: nn.Module) -> Estimates:
    calls = Counter(id(module_of(n, root)) for n in graph.nodes if n.op == "call_module")

    def is_filter(node: fx.Node) -> bool:
        module = module_of(node, root)
        if module is None or (dimension_of(module) is None and not isinstance(module, KALMAN_NORMS)):
            return False
        once = calls[id(module)] == 1 and len(node.args) + len(node.kwargs) == 1
        return once and reason_to_keep_whole(module) is None

    return Estimates(graph, root, is_filter)


def _wire(graph: fx.Graph, root: nn.Module, node: fx.Node, prediction: fx.Node | None, feeds: bool) -> fx.Node | None:
    """Let the norm `node` read its prediction and, if it `feeds` others, return its estimate: that node."""
    x = node.all_input_nodes[0]
    with graph.inserting_before(node):
        if isinstance(module_of(node, root), KALMAN_NORMS):
            call = graph.call_module(str(node.target), (x, prediction, feeds))
        else:
            call = graph.call_function(batch_norm_with_estimate, (graph.get_attr(str(node.target)), x))
        y = graph.call_function(operator.getitem, (call, 0)) if feeds else call
        estimate = graph.call_function(operator.getitem, (call, 1)) if feeds else None
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return estimate


def _behind_norm(graph: fx.Graph, path: str, estimate: fx.Node) -> fx.Node:
    with graph.inserting_after(estimate):
        norm = graph.get_attr(path)
    with graph.inserting_after(norm):
        return graph.call_function(through_norm, (norm, estimate))


class _Values:
    """Turns expressions into nodes, each once, right behind what they describe."""

    def __init__(self, graph: fx.Graph, sampled: bool):
        self.graph = graph
        self.sampled = sampled
        self.sources: dict[fx.Node, fx.Node | None] = {}
        self._made: dict[Any, fx.Node] = {}

    def of(self, expression: Expression) -> fx.Node:
        if isinstance(expression, Source):
            estimate = self.sources[expression.norm]
            assert estimate is not None  # whoever is read was wired to give it
            return estimate
        if expression not in self._made:
            self._made[expression] = self._make(expression)
        return self._made[expression]

    def _make(self, expression: Expression) -> fx.Node:
        function, args, kwargs = self._call(expression)
        with self.graph.inserting_after(self._last(expression.at, args)):
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
        layer = self._layer(expression.at)
        if not self.sampled:
            return predicted, (layer, self.of(expression.source)), {}
        source, x = expression.source, expression.at.all_input_nodes[0]
        if not isinstance(source, Activated):
            return predicted_by_sample, (layer, self.of(source), x), {}
        activation = source.activation  # the draw itself goes through it
        args = (layer, self.of(source.source), x, activation.name, list(activation.args))
        return predicted_by_sample, args, {}

    def _layer(self, call: fx.Node) -> fx.Node:
        with self.graph.inserting_before(call):
            return self.graph.get_attr(str(call.target))

    def _last(self, at: fx.Node, args: tuple) -> fx.Node:
        """The later of `at` and the nodes among `args`; `at` itself may have been replaced."""
        candidates = [at, *(a for a in args if isinstance(a, fx.Node))]
        return max(candidates, key=_position)


def _position(node: fx.Node) -> int:
    position = 0
    while node.op != "root":
        node = node.prev
        position += 1
    return position
