"""The errors normpass raises on purpose. Each message says what, where, and what to do."""

from __future__ import annotations


class NormpassError(Exception):
    """Base of every error that normpass raises on purpose."""


class InvalidModelError(NormpassError, TypeError):
    """The thing given is not a model that can be optimized (not an `nn.Module`, or optimized already)."""


class InvalidInputError(NormpassError, ValueError):
    """`example_inputs` do not fit the model, or an option has a value outside what is allowed."""


class InfeasibleBudgetError(InvalidInputError):
    """A memory budget that no plan keeps to; the message names the smallest that one does."""


class ModelSpecError(InvalidInputError):
    """A model's name that nothing can be built from; one line that says what to write instead."""


class NotAvailableError(NormpassError, NotImplementedError):
    """A package that something needs is not installed; the message says how to install it."""


class VerificationError(NormpassError, RuntimeError):
    """A rewritten graph broke a rule that every rewrite must keep: a bug of normpass, nothing was changed."""


class StaleChangeError(NormpassError, RuntimeError):
    """A model that was changed by name (`changes=`) can no longer be run in its changed form."""


class ConversionError(NormpassError, RuntimeError):
    """A converted model does not compute what the model does, or is no valid file; nothing was written."""
