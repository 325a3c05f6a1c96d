"""Bytes that the norms of a step move on CUDA: what each site does, and ResNet-50's totals, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from normpass import kernels
from normpass.bench.norm_bytes import ByteRow, byte_rows
from normpass.bench.tables import byte_table
from normpass.cli import main as cli
from normpass.errors import InfeasibleBudgetError, InvalidInputError
from normpass.kernels.contract import Layout, Norm
from normpass.kernels.cuda.counting import CountingDevice
from normpass.kernels.cuda.kernels import CudaKernels
from normpass.kernels.cuda.library import GuardedKernels

CHANNELS = 8
SHAPE = (4, CHANNELS, 8, 8)
N = 4 * CHANNELS * 64 * 2
"""Bytes of one activation of these networks in bfloat16."""


class Site(nn.Module):
    def __init__(self, join: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return F.relu(y.add_(x) if self.join else y, inplace=True)


def chain(count: int, join: bool) -> nn.Module:
    head = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
    return nn.Sequential(head, *(Site(join) for _ in range(count)), nn.Conv2d(CHANNELS, 2, 1))


def arrays(join: bool, counts: tuple[int, int] = (2, 3)) -> dict[str, tuple[float, float, float]]:
    """By contender: what one site more moves, in arrays: forward, backward, additions."""
    shorter, longer = (byte_rows("net", chain(n, join), SHAPE, torch.bfloat16, budgets=()) for n in counts)
    return {
        b.contender: tuple((getattr(b, n) - getattr(a, n)) / N for n in ("forward", "backward", "additions"))
        for a, b in zip(shorter, longer, strict=True)
    }


def test_a_relu_site():
    assert arrays(join=False) == {"eager": (5, 8, 0), "ours": (3, 7, 0), "ours_kept": (3, 5, 0)}


def test_a_join():
    """Of 3 moves that autograd's addition of the two gradients takes 2 are saved, and one is within backward.

    In the place of the residual a bit an element is written and read, a sixteenth of an array.
    """
    bit = 1 / 16
    kept = (4 + bit, 7 + bit, 0)
    assert arrays(join=True) == {"eager": (8, 8, 3), "ours": (4 + bit, 10 + bit, 0), "ours_kept": kept}


@pytest.fixture(scope="module")
def resnet() -> dict[str, ByteRow]:
    """Batch 256 of 224×224: every map of 32×32 images is a 49th of these, and there are 49 times as many."""
    rows = byte_rows("resnet50", resnet50(), (256 * 49, 3, 32, 32), torch.bfloat16)
    return {row.contender: row for row in rows}


def test_resnet_50(resnet):
    gigabytes = {name: round(row.total * 1e-9, 1) for name, row in resnet.items()}
    assert gigabytes == {"eager": 87.2, "ours": 65.8, "ours_kept": 53.2, "ours@0.8": pytest.approx(56.6, abs=0.5)}
    assert resnet["eager"].additions * 1e-9 == pytest.approx(8.6, abs=0.05)
    assert max(row.additions for name, row in resnet.items() if name != "eager") * 1e-9 < 0.4
    first, *_ = byte_table(list(resnet.values())).columns
    assert list(first.cells) == list(resnet)


def test_at_four_fifths_of_the_bytes_widening_convolutions_run_again_and_no_join(resnet):
    """64 → 256: 1.25 moves for what is saved; a join 3, and a norm with its ReLU 2."""
    assert resnet["ours@0.8"].forward == resnet["ours_kept"].forward
    assert resnet["ours@0.8"].backward == resnet["ours_kept"].backward
    assert 3e9 < resnet["ours@0.8"].replays < 5e9


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(InvalidInputError, match=r"Sequential does not run on an input of shape \(4, 3, 8, 8\)"):
        byte_rows("net", chain(1, False), (4, 3, 8, 8), torch.bfloat16)
    with pytest.raises(InfeasibleBudgetError, match="`memory_budget=1e-06` is 0 B, and no plan keeps fewer"):
        byte_rows("net", chain(2, False), SHAPE, torch.bfloat16, budgets=(1e-6,))


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("normpass.models.load", lambda name: chain(1, True))
    path = tmp_path / "bytes.json"
    assert cli.main(["bench", "bytes", "tests:net", "--input", "4x8x8x8", "--budget", "0.9", "--json", str(path)]) == 0
    found = json.loads(path.read_text())["bytes"]
    assert [row["contender"] for row in found] == ["eager", "ours", "ours_kept", "ours@0.9"]
    assert "GB that a step moves" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["bench", "bytes", "tests:net", "--input", "4x3x8x8"]) == 2


# --- the counting device ------------------------------------------------------------------------------


def counted(call: Callable[[CudaKernels], None]) -> list[tuple[str, str, int]]:
    device = CountingDevice()
    call(CudaKernels(device))
    return [tuple(moved) for moved in device.launches]


@pytest.mark.parametrize("layout", [Layout(256, 8, 1), Layout(4, 8, 64)], ids=["rows", "planes"])
def test_each_launch_is_counted(layout):
    x, residual, grad, other, out, more = (torch.zeros(256 * 8 if layout.inner == 1 else 2048) for _ in range(6))
    size, values = x.nbytes, [torch.ones(8) for _ in range(4)]
    norm = Norm(*values, 1e-5, "relu", ())
    common = (norm, True, layout)
    backward = CudaKernels.norm_act_backward

    def join(k: CudaKernels, *parts: Tensor) -> None:
        backward(k, out, more, None, None, grad, x, residual, *common, *parts)

    assert counted(lambda k: k.moments(*values[:2], x, layout)) == [("moments", "moments", size)]
    found = counted(lambda k: k.norm_act(out, x, residual, norm, layout))
    assert [moved[2] for moved in found] == [3 * size]
    assert [moved[2] for moved in counted(join)] == [4 * size, 3 * size]
    assert [moved[2] for moved in counted(lambda k: join(k, other))] == [5 * size, 3 * size]
    mask = torch.zeros(size // 32, dtype=torch.uint8)
    found = counted(lambda k: k.norm_act(out, x, residual, norm, layout, mask))
    assert [moved[2] for moved in found] == [3 * size + mask.nbytes]
    found = counted(lambda k: backward(k, out, more, None, None, grad, x, None, *common, None, mask))
    assert [moved[2] for moved in found] == [3 * size + mask.nbytes, 3 * size]
    found = counted(lambda k: backward(k, out, None, None, None, grad, x, None, *common, None, mask))
    assert [moved[2] for moved in found] == [2 * size + mask.nbytes, 3 * size + mask.nbytes]
    alone = counted(lambda k: backward(k, out, None, None, None, grad, x, None, *common))
    assert [moved[1:] for moved in alone] == [("reduce", 2 * size), ("apply", 3 * size)]
    frozen = (norm._replace(activation="identity"), False, layout)
    assert [m[2] for m in counted(lambda k: backward(k, out, None, None, None, grad, x, None, *frozen))] == [2 * size]


def test_pieces_of_a_concatenation_are_counted():
    layout, norm = Layout(64, 8, 1), Norm(*[torch.ones(8) for _ in range(4)], 1e-5, "relu", ())
    grad = torch.zeros(64, 8)
    xs, dxs = ([torch.zeros(64, n) for n in (6, 2)] for _ in range(2))
    one = grad.nbytes
    for adds, dx, moved in (
        ((False, False), dxs, 3 * one),
        ((True, False), dxs, 3.75 * one),
        ((False, False), [None, dxs[1]], 2.25 * one),
    ):
        totals = [
            None if d is None else torch.zeros(2, n, dtype=torch.float64) for d, n in zip(dx, (6, 2), strict=True)
        ]
        call = (dx, adds, totals, None, None, grad, xs, norm, layout)
        assert [m[2] for m in counted(lambda k, call=call: k.cat_norm_act_backward(*call))] == [moved]


def test_other_kernels_are_there_for_a_while_only():
    before, other = kernels.kernels_for("cpu"), GuardedKernels(CudaKernels(CountingDevice()))
    with kernels.replaced("cpu", other):
        assert kernels.kernels_for("cpu") is other
    assert kernels.kernels_for("cpu") is before
