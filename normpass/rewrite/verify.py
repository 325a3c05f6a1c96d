"""What must hold after a rewrite. A failure is a bug of normpass, and is raised before anything runs."""

from __future__ import annotations

from torch import nn

from normpass.errors import VerificationError

_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def verify_state(plain: nn.Module, optimized: nn.Module, may_add: bool = False) -> None:
    """Same state_dict keys in the same order, and the very same parameters and buffers.

    `may_add`: a change of the model may add keys of its own between them, and put a norm that has no running
    statistics where one that had them stood.
    """
    before, after = plain.state_dict(keep_vars=True), optimized.state_dict(keep_vars=True)
    if may_add:
        before = {k: v for k, v in before.items() if k in after or k.rpartition(".")[2] not in _RUNNING}
    if list(before) != [key for key in after if key in before or not may_add]:
        differ = sorted(set(before) ^ set(after))[:5]
        raise VerificationError(f"state_dict keys changed (first differences: {differ}); please report this model")
    for key, tensor in before.items():
        if after[key] is not tensor:
            raise VerificationError(f"`{key}` is no longer the given model's tensor; please report this model")
