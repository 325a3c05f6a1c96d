"""What a training script may do with a model goes on working with the optimized one, with the plain model's numbers."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conv_blocks import C
from torch import nn
from training import ConvNet, assert_equal, image, loss_of, spread, train

import normpass
from normpass.recipe import recipes as recipe

# --- state and structure -----------------------------------------------------------------------------


def test_state_dict_loads_both_ways(model: nn.Module) -> None:
    optimized = normpass.optimize(model)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert all(optimized.state_dict(keep_vars=True)[k] is v for k, v in model.state_dict(keep_vars=True).items())
    assert [n for n, _ in optimized.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in optimized.named_modules()] == [n for n, _ in model.named_modules()]
    torch.manual_seed(5)
    other = spread(ConvNet())
    optimized(image())
    optimized.load_state_dict(other.state_dict(), strict=True)
    copied = ConvNet().double()
    copied.load_state_dict(optimized.state_dict(), strict=True)
    numbers = train(other, (image(),))
    assert_equal(numbers, train(optimized, (image(),)))
    assert_equal(numbers, train(copied, (image(),)))


def test_the_given_model_is_untouched(model: nn.Module) -> None:
    model.stem[0].register_forward_hook(lambda *_: None)
    model.note = ["list"]

    def snapshot() -> list:
        return [
            (type(m), sorted(vars(m)), {k: id(v) for k, v in vars(m).items()}, dict(m._modules), dict(m._forward_hooks))
            for m in model.modules()
        ]

    before, state = snapshot(), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    optimized = normpass.optimize(model, image())
    normpass.explain(model, image())
    assert snapshot() == before
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert optimized.note is model.note


def test_restore_gives_the_plain_model_with_current_values(pair) -> None:
    plain, optimized = pair
    assert_equal(train(plain, (image(),)), train(optimized, (image(),)))
    restored = normpass.restore(optimized)
    assert type(restored) is ConvNet and not any(isinstance(m, normpass.Optimized) for m in restored.modules())
    assert all(a is b for a, b in zip(restored.parameters(), optimized.parameters(), strict=True))
    assert_equal(train(plain, (image(),)), train(restored, (image(),)))
    assert isinstance(normpass.optimize(restored), normpass.Optimized)


def test_norms_are_found_and_converted(pair) -> None:
    plain, optimized = pair
    assert sum(isinstance(m, nn.BatchNorm2d) for m in optimized.modules()) == 2
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(optimized).eval()
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 2
    torch.testing.assert_close(converted(image()), plain.eval()(image()))


def test_an_optimizer_built_before(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    results = []
    for m, change in ((plain, lambda m: m), (model, normpass.optimize)):
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        trained = change(m)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(trained(image())).backward()
            optimizer.step()
        results.append([p.detach() for p in m.parameters()])
    torch.testing.assert_close(results[1], results[0])


# --- parts, attributes, classes -------------------------------------------------------------------


def test_a_part_called_alone(pair) -> None:
    for path in ("stem", "bn", "act", "conv"):
        x = image(2, 3 if path == "stem" else C, 8, 8)
        numbers = []
        for m in pair:
            part = m.get_submodule(path)
            z = part(x.clone().requires_grad_() * 1)
            z.sum().backward()
            numbers.append([z, *(p.grad for p in part.parameters()), *part.buffers()])
        torch.testing.assert_close(numbers[1], numbers[0])


def test_layers_that_are_replaced_later(pair) -> None:
    for m in pair:
        m(image())
        torch.manual_seed(1)
        m.fc = nn.Linear(C, 3).double()
        m.stem = nn.Sequential(nn.Conv2d(3, C, 1), nn.GroupNorm(2, C), nn.GELU()).double()
    assert_equal(*(train(m, (image(requires_grad=True),)) for m in pair))


def test_timm_methods() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=4, drop_rate=0.2).double()
    optimized = normpass.optimize(copy.deepcopy(plain))
    x = image(2, 3, 32, 32)
    torch.testing.assert_close(optimized.forward_features(x), plain.forward_features(x))
    for m in (plain, optimized):
        torch.manual_seed(1)
        m.reset_classifier(3)
        m.double()
    assert optimized.num_classes == 3
    assert_equal(train(plain, (x,), steps=1), train(optimized, (x,), steps=1))


def test_dtype_and_memory_format(pair) -> None:
    plain, optimized = (m.float() for m in pair)
    x = image().float()
    torch.testing.assert_close(optimized(x), plain(x))
    for m in pair:
        m.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    expected, found = plain.stem(x), optimized.stem(x)
    assert found.is_contiguous(memory_format=torch.channels_last) and found.stride() == expected.stride()
    torch.testing.assert_close(optimized(x), plain(x))
    expected, found = plain.bfloat16()(x.bfloat16()), optimized.bfloat16()(x.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(pair, context) -> None:
    plain, optimized = pair
    with context():
        expected, found = plain(image()), optimized(image())
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad and found.is_inference() == expected.is_inference() and not vars(found)
    torch.testing.assert_close(optimized(image()), plain(image()))


# --- memory ---------------------------------------------------------------------------------------


def test_repeated_steps_leave_nothing(pair) -> None:
    _, optimized = pair
    for _ in range(2):
        optimized.train()
        loss_of(optimized(image())).backward()
        optimized.eval()(image())
    before = tensors_and_recipes()
    for _ in range(5):
        optimized.train()
        loss_of(optimized(image())).backward()
        optimized.eval()(image())
    assert tensors_and_recipes() <= before


def tensors_and_recipes() -> int:
    gc.collect()
    return sum(type(o) in (torch.Tensor, recipe.Recipe, recipe.Kept) for o in gc.get_objects())


# --- DistributedDataParallel ----------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    worker = Path(__file__).parents[1] / "support" / "ddp_worker.py"
    path = os.pathsep.join([str(worker.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "same gradients" in output
