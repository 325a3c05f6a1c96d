"""What one forward makes, reads and keeps: the same, whether it runs without memory or for real."""

import pytest
import torch
from torch import fx, nn

from normpass.record import recording, recording_for_real


@pytest.mark.parametrize("how", [recording, recording_for_real])
def test_a_record(how):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    graph, x = fx.symbolic_trace(model).graph, torch.randn(2, 3, 6, 6)
    with how(model, ((x,), {})) as (recorder, (args, _)):
        output = recorder.run(graph, model, "part", args)
    record = recorder.finish(output)
    _, conv, pool, flat, linear = record.steps
    assert [s.key for s in record.steps[1:]] == ["part.0", "part.1", "part.2", "part.3"]
    assert record.sizes == [2 * 4 * 4 * 4 * 4, 2 * 4 * 2 * 2 * 4, 2 * 5 * 4]
    assert (conv.flops, linear.flops) == (2 * 2 * 4 * 4 * 4 * 27, 2 * 2 * 16 * 5)
    assert (conv.saves, pool.saves, linear.saves) == ((), (0,), (1,))
    assert pool.internals == 2 * 4 * 2 * 2 * 8  # the indices
    assert flat.passes and record.outputs == {2}
    assert (conv.weights, conv.groups) == (3 * 4 * 9 * 4, 1)
