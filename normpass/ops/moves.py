"""Which writes to running statistics are a norm's own moves.

A norm in train mode moves its running statistics and does not read them in backward. `F.batch_norm` keeps them all the
same, so autograd refuses a backward before which somebody has written to them; another forward's move it does not see,
for that operator does not say that it writes. Ours does, or whoever reads the statistics would get other numbers than
forward had. So moves are counted, and

    somebody else has written   ⇔   the version has grown by more than the moves
"""

from __future__ import annotations

import threading
from typing import NoReturn

from torch import Tensor

from .operands import PLAIN_TYPES

move_lock = threading.RLock()
"""held from a move's count to its write, so that no other thread sees one without the other"""
_moves: dict[int, int] = {}
"""by storage; at an address that is used again it goes on, since only differences count"""


def count_move(tensor: Tensor) -> None:
    """A norm moves `tensor`, which makes its version greater by one. With `move_lock` held."""
    if type(tensor) in PLAIN_TYPES:
        key = tensor.untyped_storage()._cdata
        _moves[key] = _moves.get(key, 0) + 1


def moves_of(tensor: Tensor) -> int:
    """How often a norm has moved what lies where `tensor` does."""
    return _moves.get(tensor.untyped_storage()._cdata, 0)


class Watched:
    """A running statistic that a norm has moved and backward does not read."""

    __slots__ = ("moves", "tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        with move_lock:
            self.version, self.moves = tensor._version, moves_of(tensor)

    def check(self) -> None:
        """As autograd does before it hands out what it kept.

        Raises:
            RuntimeError: somebody else has written to it since; in autograd's words.
        """
        if self.tensor._version == self.version:
            return
        with move_lock:
            written, moves = self.tensor._version - self.version, moves_of(self.tensor) - self.moves
        if written > moves:
            raise RuntimeError(changed_in_place(self.tensor, self.version))


def refuse_changed(tensor: Tensor, version: int) -> NoReturn:
    """What is read is not what it was.

    Raises:
        RuntimeError: in autograd's words; of what norms move, with more.
    """
    raise RuntimeError(changed_in_place(tensor, version) + (_ADVICE if moves_of(tensor) else ""))


_ADVICE = (
    " These are running statistics: if a norm in eval mode has normalized with them and a forward in train mode has "
    "moved them since, torch would compute this gradient with the moved ones. Call backward of what was computed in "
    "eval mode before that forward, or compute it under torch.no_grad()."
)


def changed_in_place(tensor: Tensor, version: int) -> str:
    """What autograd says."""
    name = {"cpu": "torch", "cuda": "torch.cuda"}.get(tensor.device.type, f"torch.{tensor.device.type}")
    kind = tensor.type().rpartition(".")[2]
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{name}.{kind} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead. "
        "Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True, check_nan=False)."
    )
