"""The per-channel tensors of one norm as its forward used them.

Autograd asks its hooks for each tensor that it keeps, and a recipe does for each that it reads: five calls of Python a
norm and direction, for tensors of a few hundred numbers. Where the hooks are our own, backward and recipe share one
`Vectors` instead, which does what the hooks would have done: it compares versions, and it has a copy of the bias, which
a plain norm does not keep, so that it may change before backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .moves import Watched, refuse_changed
from .operands import Values


class Vectors:
    """weight, bias, mean and var of a norm, each (C,)."""

    __slots__ = ("_bias", "_bias_now", "_mean", "_var", "_versions", "_watched", "_weight")

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        watched: tuple[Watched, ...] = (),
    ):
        # watched: what the plain norm keeps as well
        self._weight, self._mean, self._var, self._bias_now = weight, mean, var, bias
        self._watched = watched
        self._bias = None if bias is None else bias.detach().clone()
        self._versions = None if weight is None else weight._version, mean._version, var._version

    def read(self) -> Values:
        """The tensors as they were.

        Raises:
            RuntimeError: one that autograd would keep has been written to; in autograd's words.
        """
        weight, mean, var = self._weight, self._mean, self._var
        if (None if weight is None else weight._version, mean._version, var._version) != self._versions:
            self._refuse()
        for running in self._watched:
            running.check()
        return weight, self._bias, mean, var

    def read_attached(self) -> Values:
        """The same, with what the bias was computed from: for a backward that is differentiated itself."""
        weight, bias, mean, var = self.read()
        return weight, bias if bias is None else _As.apply(self._bias_now, bias), mean, var

    def own(self) -> None:
        """Have copies of all: nobody but this keeps them."""
        self._weight = None if self._weight is None else self._weight.detach().clone()
        self._mean, self._var = self._mean.clone(), self._var.clone()
        self._versions, self._watched = (None if self._weight is None else 0, 0, 0), ()

    def add_reader(self) -> None:
        """Nothing is made for a reader."""

    def _refuse(self) -> None:
        for tensor, version in zip((self._weight, self._mean, self._var), self._versions, strict=True):
            if tensor is not None and version is not None and tensor._version != version:
                refuse_changed(tensor, version)


class _As(torch.autograd.Function):
    """The numbers of one tensor, with the gradient going to another."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, numbers: Tensor) -> Tensor:
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
