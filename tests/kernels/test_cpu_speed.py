"""Every loop of the CPU's kernels is vectorized: none takes many times as long as norm_act with the identity.

A loop that the compiler leaves scalar computes the same numbers, five to twenty times slower, and no other test sees
it. So each op is timed with each activation, in one run and on data that lies in the caches, beside norm_act with the
identity: the best of several times, for noise is not there each time.
"""

import functools
import time
from pathlib import Path

import pytest
import torch

from normpass.kernels.contract import ACTIVATIONS, Layout, Norm
from normpass.kernels.cpu import library as cpu_library
from normpass.ops.activation import is_invertible

MOST = {"avx512": (6, 24), "avx2": (8, 40)}
"""times norm_act with the identity: for an activation that costs little, and for the others. Measured 3.6 and 16 with
AVX-512, 4.8 and 30 with AVX2; loops that the compiler had left scalar took 24 to 150."""
CHEAP = """
    identity relu hardtanh leaky_relu hardswish hardsigmoid softsign hardshrink softshrink clamp open_clamp threshold
    squared_relu
""".split()
SETS = [name for name in cpu_library.INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ()) if name in MOST]
SHAPE = (2, 64, 32, 32)
ARGUMENTS = {"hardtanh": (0.0, 6.0), "leaky_relu": (0.01,), "elu": (1.0,), "celu": (1.0,), "softplus": (1.0, 20.0)} | {
    "hardshrink": (0.5,),
    "softshrink": (0.5,),
    "clamp": (0.0, 6.0),
    "open_clamp": (0.0, 6.0),
    "threshold": (0.5, 0.0),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(call, rounds):
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def calls(kernels, memory_format):
    x, grad, result = (torch.randn(SHAPE).contiguous(memory_format=memory_format) for _ in range(3))
    channels, inner = SHAPE[1], SHAPE[2] * SHAPE[3]
    is_last = memory_format is torch.channels_last
    layout = Layout(SHAPE[0] * inner, channels, 1) if is_last else Layout(SHAPE[0], channels, inner)
    weight, bias, mean, var = torch.rand(4, channels) + 0.5
    dweight, dbias, totals = torch.empty(channels), torch.empty(channels), torch.zeros(2, channels).double()
    sums = dweight, dbias

    def norm_act(norm):
        kernels.norm_act(result, x, None, norm, layout)

    def norm_act_backward(norm):
        kernels.norm_act_backward(result, None, *sums, grad, x, None, norm, True, layout)

    def norm_act_backward_of_frozen(norm):
        kernels.norm_act_backward(result, None, None, None, grad, x, None, norm, False, layout)

    def cat_norm_act_backward(norm):
        kernels.cat_norm_act_backward([result], [False], [totals], *sums, grad, [x], norm, layout)

    def inplace_abn_backward(norm):
        kernels.inplace_abn_backward(result, *sums, grad, x, norm._replace(mean=None), True, layout)

    every = (norm_act, norm_act_backward, norm_act_backward_of_frozen, cat_norm_act_backward, inplace_abn_backward)
    return {
        (op.__name__, name): functools.partial(op, Norm(weight, bias, mean, var, 1e-5, name, ARGUMENTS.get(name, ())))
        for op in every
        for name in ACTIVATIONS
        if op is not inplace_abn_backward or is_invertible(name, ARGUMENTS.get(name, ()))
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_no_loop_is_scalar(name, memory_format):
    path = Path(cpu_library.__file__).with_name(f"_{name}.so")
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    ops = calls(cpu_library.CpuKernels(path), memory_format)

    def too_slow(op, activation):
        cheap, costly = MOST[name]
        unit = seconds(ops["norm_act", "identity"], 20)
        return seconds(ops[op, activation], 10) > (cheap if activation in CHEAP else costly) * unit

    slow = list(ops)
    for _ in range(5):
        slow = [key for key in slow if too_slow(*key)]
    assert not slow
