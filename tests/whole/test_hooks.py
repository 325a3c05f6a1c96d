"""Hooks that are registered later, on a module or on all of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module as global_hooks
from training import assert_equal, captures_of, image, loss_of, train

from normpass.measure import kept_bytes

HOOKS = {
    "forward_pre": lambda layer, change: layer.register_forward_pre_hook(lambda _, args: change(args)),
    "forward": lambda layer, change: layer.register_forward_hook(lambda _, args, out: change(out)),
    "full_backward_pre": lambda layer, change: layer.register_full_backward_pre_hook(lambda _, g: change(g)),
    "full_backward": lambda layer, change: layer.register_full_backward_hook(lambda _, g, out: change(g)),
}

X = image()


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_registered_later_run(pair, kind: str) -> None:
    """On every module of a model that has run; and no more once they are removed."""
    x = image(requires_grad=True)
    called: list[list[str]] = [[], []]
    handles = []
    for m, paths in zip(pair, called, strict=True):
        m.act.inplace = m.stem[2].inplace = False
        m(x)
        for path, layer in m.named_modules():

            def change(value, path=path, paths=paths):
                paths.append(path)
                if isinstance(value, tuple):
                    return tuple(None if v is None else v * 1.5 for v in value)
                return value * 1.5

            handles.append(HOOKS[kind](layer, change))
    assert_equal(*(train(m, (x,)) for m in pair))
    assert called[1] == called[0] and set(called[0]) == {path for path, _ in pair[0].named_modules()}
    for handle in handles:
        handle.remove()
    assert_equal(*(train(m.train(), (x,), steps=1) for m in pair))
    assert called[1] == called[0]


def test_a_hook_that_is_removed_again(pair) -> None:
    plain, optimized = pair
    handle = optimized.stem.register_forward_hook(lambda m, args, out: out * 0)
    assert optimized(image()).std(0).max() < 1e-12
    handle.remove()
    plain(image())
    torch.testing.assert_close(optimized(image()), plain(image()))
    assert kept_bytes(optimized, image()) < 0.8 * kept_bytes(plain, image())


def test_hooks_for_all_modules(pair) -> None:
    """They see every module of the plain model, also of one that was captured before; afterwards it is ours again."""
    for m in pair:
        m(X)
    kinds = {
        "forward_pre": (global_hooks.register_module_forward_pre_hook, lambda m, args: None),
        "forward": (global_hooks.register_module_forward_hook, lambda m, args, out: out * 1.5),
        "backward": (
            global_hooks.register_module_full_backward_hook,
            lambda m, g, out: tuple(v if v is None else v * 2 for v in g),
        ),
    }
    for m in pair:
        m.act.inplace = False
    for register, hook in kinds.values():
        results = []
        for m in pair:
            m.zero_grad()
            called: list[str] = []
            with register(
                lambda layer, *a, seen=called, hook=hook: seen.append(type(layer).__name__) or hook(layer, *a)
            ):
                loss_of(m(image(requires_grad=True))).backward()
            results.append([called, [p.grad for p in m.parameters()], list(m.buffers())])
        assert results[1][0] == results[0][0] and set(results[0][0]) >= {"Conv2d", "BatchNorm2d", "ConvNet"}
        torch.testing.assert_close(results[1][1:], results[0][1:])
    seen = captures_of(pair[1])
    torch.testing.assert_close(*(loss_of(m(X)) for m in pair))
    assert kept_bytes(pair[1], X) < 0.8 * kept_bytes(pair[0], X)
    assert len(seen) <= 1
