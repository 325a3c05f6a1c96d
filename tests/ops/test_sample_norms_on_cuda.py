"""Norms with a sample's own statistics on CUDA, by tensors without memory: where results lie, what is refused."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from normpass.ops.group_norm_act import GroupNormOptions, format_of, keeps_channels_last_on_cuda
from normpass.runtime.sample_norms import FunctionalGroupNorm, FunctionalRowNorm, is_fusible

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs(size, dtype=torch.float32):
    x = torch.empty(size, device="cuda", dtype=dtype)
    yield x
    if len(size) > 3:
        yield x.contiguous(memory_format=LAST[len(size)])
    yield torch.empty(*size, 2, device="cuda", dtype=dtype)[..., 0]


@pytest.mark.parametrize(
    "size", [(2, 8), (2, 8, 5), (2, 8, 4, 3), (1, 8, 4, 4), (2, 8, 3, 1), (2, 8, 2, 3, 4)], ids=str
)
def test_results_lie_as_those_of_aten(size) -> None:
    with FakeTensorMode():
        for x, is_instance in itertools.product(inputs(size), (False, True)):
            if is_instance and len(size) == 2:
                continue
            y = F.instance_norm(x) if is_instance else F.group_norm(x, 2)
            found = torch.empty_like(x, memory_format=format_of(x, GroupNormOptions(2, 1e-5, "silu", (), is_instance)))
            strides = zip(size, found.stride(), y.stride(), strict=True)
            assert all(a == b for length, a, b in strides if length > 1), (x.stride(), found.stride(), y.stride())


def test_channels_last_is_refused_where_aten_keeps_it() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last)
        assert is_fusible(FunctionalGroupNorm(2), x, None, "relu") != keeps_channels_last_on_cuda()
        assert is_fusible(FunctionalGroupNorm(2), x.contiguous(), None, "relu")
        assert is_fusible(FunctionalGroupNorm(None), x, None, "relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype_are_aten_s_error_where_it_has_one(dtype) -> None:
    """Its instance norm is a batch norm, which takes them; on a CPU all do."""
    for device, same in itertools.product(("cuda", "cpu"), (True, False)):
        with FakeTensorMode():
            x = torch.empty(2, 8, 4, 8, device=device, dtype=dtype)
            weight = torch.empty(8, device=device, dtype=dtype if same else torch.float32)
            wanted = same or device == "cpu"
            assert is_fusible(FunctionalGroupNorm(2, weight), x, None, "relu") == wanted
            assert is_fusible(FunctionalRowNorm((8,), weight), x, None, "relu") == wanted
            assert is_fusible(FunctionalGroupNorm(None, weight), x, None, "relu")
