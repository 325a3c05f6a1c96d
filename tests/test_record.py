"""What one forward makes, reads and keeps: the same, whether it runs without memory or for real."""

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normpass.record import _fake_batch_norm, _native_batch_norm, recording, recording_for_real


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_parameters", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_of_tensors_without_memory_returns_what_a_real_one_does(dtype, has_parameters, training):
    for dims, memory_format in ((3, torch.contiguous_format), (4, torch.contiguous_format), (4, torch.channels_last)):
        x = torch.randn((2, 4, 5, 6)[:dims]).to(dtype).contiguous(memory_format=memory_format)
        one = torch.ones(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        given = [one if has_parameters else None] * 2 + [one if has_parameters or not training else None] * 2
        arguments = x, *given, training, 0.1, 1e-5
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            found = _fake_batch_norm(*fakes)
        for fake, real in zip(found, _native_batch_norm(*arguments), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
