import torch

from normpass.ops import memory_format_of


def test_three_dimensions_and_strides_that_are_neither():
    """What ATen goes on with is compared for every input in `tests/whole/test_strides.py`."""
    x = torch.zeros(2, 3, 4, 5, 6)
    assert memory_format_of(x) is torch.contiguous_format
    assert memory_format_of(x.to(memory_format=torch.channels_last_3d)) is torch.channels_last_3d
    assert memory_format_of(x.transpose(0, 1)) is torch.contiguous_format
    assert memory_format_of(torch.zeros(2, 3, 4, 5, 6)[:, ::2]) is torch.contiguous_format
    assert memory_format_of(torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2)[:, 1:]) is torch.channels_last
    assert memory_format_of(torch.zeros(4, 3)) is torch.contiguous_format
    assert memory_format_of(torch.zeros(4, 6, 3).transpose(1, 2)) is torch.contiguous_format
