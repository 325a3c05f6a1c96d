import pytest
import torch

from normpass.ops import memory_format_of


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 4, 1), (2, 3, 1, 4), (1, 3, 2, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_format_that_aten_goes_on_with(shape, layout):
    x = torch.empty_strided(shape, torch.empty(shape, memory_format=layout).stride()).zero_()
    assert memory_format_of(x) is layout
    one = torch.ones(3)
    for aten in (torch.relu(x), torch.native_batch_norm(x, one, one, one, one, False, 0.0, 1e-5)[0]):
        ours = torch.empty_like(x, memory_format=memory_format_of(x))
        strides = zip(ours.stride(), aten.stride(), shape, strict=True)
        assert all(a == b for a, b, size in strides if size > 1)  # a stride along one value means nothing


def test_three_dimensions_and_strides_that_are_neither():
    x = torch.zeros(2, 3, 4, 5, 6)
    assert memory_format_of(x) is torch.contiguous_format
    assert memory_format_of(x.to(memory_format=torch.channels_last_3d)) is torch.channels_last_3d
    assert memory_format_of(x.transpose(0, 1)) is torch.contiguous_format
    assert memory_format_of(torch.zeros(4, 3)) is torch.contiguous_format
    assert memory_format_of(torch.zeros(4, 6, 3).transpose(1, 2)) is torch.contiguous_format
