"""Every figure of memory is checked where it is known in closed form."""

import dataclasses

import pytest
import torch
from measured import HIDDEN, IN, B, H, Lambda, conv_chain, images, linear_chain, rows
from torch import nn
from torch.utils.checkpoint import checkpoint

from normpass import measure


@dataclasses.dataclass
class Prediction:
    hidden: torch.Tensor
    name: str = "prediction"


# --- forward_peak_bytes -------------------------------------------------------------------------------


def test_the_peak_of_a_forward():
    """Without gradients input and output of a layer are alive at once; with them everything that is kept."""
    model = nn.Sequential(nn.Linear(IN, H), nn.Sigmoid(), nn.Linear(H, H))
    with torch.no_grad():
        assert measure.forward_peak_bytes(model, rows()) == 2 * HIDDEN
    assert measure.forward_peak_bytes(model, rows()) == 2 * HIDDEN  # sigmoid's result and the last layer's
    assert measure.forward_peak_bytes(nn.Sequential(model, nn.Sigmoid()), rows()) == 3 * HIDDEN


# --- kept_bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation, kept",
    [
        (nn.ReLU(), HIDDEN),  # the result serves relu and the next linear
        (nn.ReLU(inplace=True), HIDDEN),
        (nn.Sigmoid(), HIDDEN),
        (nn.GELU(), 2 * HIDDEN),  # needs its input; the next linear needs its result
        (nn.Identity(), HIDDEN),
    ],
)
def test_kept_of_a_linear_chain(activation, kept):
    assert measure.kept_bytes(linear_chain(activation), rows()) == kept


def test_kept_of_conv_norm_relu():
    activation, statistics = 2 * 8 * 16 * 16 * 4, 2 * 8 * 4
    # conv1's result (norm 1), relu's result (conv 2), conv 2's result (norm 2), two pairs of statistics
    assert measure.kept_bytes(conv_chain(), images()) == 3 * activation + 2 * statistics


def test_frozen_statistics_keep_no_batch_statistics():
    assert measure.kept_bytes(conv_chain().eval(), images()) == 3 * 2 * 8 * 16 * 16 * 4


@pytest.mark.parametrize("activation, kept", [(nn.Sigmoid(), 0), (nn.Identity(), 0), (nn.GELU(), HIDDEN)])
def test_the_output_is_not_counted(activation, kept):
    model = nn.Sequential(nn.Linear(IN, H), activation)
    assert measure.kept_bytes(model, rows()) == kept


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x,
        lambda m, x: x.view(-1)[:3],
        lambda m, x: m.layer.weight,
        lambda m, x: {"given": x, "weight": m.layer.weight.t(), "new": m.layer(x)},
        lambda m, x: (m.layer(x), [x[0], None, "text"]),
        lambda m, x: Prediction(m.layer(x)),
        lambda m, x: m.layer(x)[:, :2],
        lambda m, x: x.argmax(1),
    ],
)
def test_aliases_and_nested_outputs_keep_nothing(function):
    assert measure.kept_bytes(Lambda(function), rows()) == 0


def test_a_no_op_keeps_nothing_even_when_its_input_requires_grad():
    assert measure.kept_bytes(nn.Identity(), rows().requires_grad_()) == 0


def test_what_a_model_stores_on_itself_counts():
    def stash(module, x):
        module.last = module.layer(x).detach() + 1
        return module.layer(x)

    assert measure.kept_bytes(Lambda(stash), rows()) == HIDDEN


def test_a_stored_output_is_still_the_output():
    def stash(module, x):
        module.last = module.layer(x)
        return module.last

    assert measure.kept_bytes(Lambda(stash), rows()) == 0


def test_hooks_of_the_model_itself_are_respected():
    def halved(module, x):
        def pack(t):
            return t.half() if t.shape == (B, H) else t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
            return nn.functional.gelu(module.layer(x))

    assert measure.kept_bytes(Lambda(halved), rows()) == HIDDEN // 2


def test_checkpoint_keeps_only_the_random_state():
    chain = linear_chain(nn.GELU())
    model = Lambda(lambda m, x: checkpoint(chain, x, use_reentrant=False))
    assert measure.kept_bytes(model, rows()) == torch.get_rng_state().nbytes


def test_autocast_counts_the_cast_weights():
    model = nn.Sequential(nn.Linear(IN, H), nn.Linear(H, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = [measure.kept_bytes(model, rows()) for _ in range(2)]
    cast = 2 * (B * IN + B * H + 4 * H)  # x, the hidden activation and the weight that gets a gradient through
    assert kept[0] == kept[1]
    assert cast <= kept[0] <= cast + 2 * (IN * H + H + 4)


def test_keyword_arguments_reach_the_model():
    class Gated(nn.Linear):
        def forward(self, x, *, gate):
            return super().forward(x) * gate

    # the product needs both factors: the linear's result is new, the gate was there
    assert measure.kept_bytes(Gated(IN, H), rows(), gate=torch.ones(H)) == 0
    gate = torch.ones(H, requires_grad=True)
    assert measure.kept_bytes(Gated(IN, H), rows(), gate=gate) == HIDDEN
    assert measure.peak_bytes(Gated(IN, H), rows(), gate=gate) > HIDDEN
    assert gate.grad is None


# --- kept_by_layer ------------------------------------------------------------------------------------


def test_kept_by_layer_names_the_layer_that_saves_first():
    activation, statistics = 2 * 8 * 16 * 16 * 4, 2 * 8 * 4
    kept = measure.kept_by_layer(conv_chain(), images())
    assert kept == {"1": activation + statistics, "2": activation, "4": activation + statistics}


@pytest.mark.parametrize(
    "model, make",
    [
        (linear_chain(nn.GELU()), rows),
        (conv_chain(), images),
        (Lambda(lambda m, x: m.layer(x).exp().sin()), rows),
    ],
)
def test_kept_by_layer_sums_to_kept_bytes(model, make):
    x = make()
    assert sum(measure.kept_by_layer(model, x).values()) == measure.kept_bytes(model, x)


def test_kept_by_layer_leaves_no_hooks():
    model = Lambda(lambda m, x: m.layer(x).exp().sin())  # both need the result of exp
    assert measure.kept_by_layer(model, rows()) == {"": HIDDEN}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- peak_bytes and memory_timeline -------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_peak_of_a_chain_of_tanh(depth):
    x = torch.randn(64, 64, requires_grad=True)
    peak = measure.peak_bytes(nn.Sequential(*[nn.Tanh() for _ in range(depth)]), x, loss=torch.sum)
    # every result is alive at the end of forward; backward then holds one gradient more, from end to start
    # it swaps a result for a gradient, and the sum and its gradient are a number each
    assert (depth + 1) * x.nbytes <= peak <= (depth + 1) * x.nbytes + 64


def test_in_place_relu_lowers_memory_within_forward():
    tops = {}
    for inplace in (False, True):
        line = measure.memory_timeline(linear_chain(nn.ReLU(inplace)), rows())
        tops[inplace] = max(line.bytes[: line.forward_end + 1])
    assert tops == {False: 2 * HIDDEN, True: HIDDEN + B * 4 * 4}


def test_timeline():
    model, x = conv_chain(), images()
    line = measure.memory_timeline(model, x)
    assert len(line.seconds) == len(line.bytes)
    assert list(line.seconds) == sorted(line.seconds)
    assert (line.seconds[0], line.bytes[0], line.bytes[-1]) == (0.0, 0, 0)
    assert 0 < line.forward_end < len(line.bytes) - 1
    assert line.bytes[line.forward_end] == measure.kept_bytes(model, x) + model(x).nbytes
    assert line.peak == max(line.bytes) == measure.peak_bytes(model, x)


def test_gradients_that_exist_do_not_count():
    model = nn.Linear(512, 1, bias=False)
    x = torch.randn(1, 512)
    peak = measure.peak_bytes(model, x, loss=torch.sum)
    assert model.weight.nbytes <= peak <= model.weight.nbytes + 64  # the gradient on its way, not its place


def test_loss_may_read_a_dict():
    model = Lambda(lambda m, x: {"a": m.layer(x), "b": [x]})
    own = measure.peak_bytes(model, rows(), loss=lambda output: output["a"].square().mean() + output["b"][0].sum())
    assert own > 0
    assert measure.peak_bytes(model, rows()) > 0


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
def test_optimizer_is_undone(warm):
    model, x = linear_chain(nn.ReLU()), rows()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if warm:
        model(x).sum().backward()
        optimizer.step()
    parameters = [p.clone() for p in model.parameters()]
    state = {p: {k: v.clone() for k, v in values.items()} for p, values in optimizer.state.items()}
    peak = measure.peak_bytes(model, x, optimizer=optimizer)
    assert peak >= measure.peak_bytes(model, x)
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert state.keys() == optimizer.state.keys()
    assert all(torch.equal(state[p][k], v) for p in state for k, v in optimizer.state[p].items())
