"""NumPy in a forward that TorchDynamo captures is NumPy: Dynamo's own emulation of it is not used.

    np.f(tensor, array)  ⇒  a graph break: NumPy runs     np.sqrt(2)  ⇒  the number     an np.float64  ⇒  itself

Dynamo runs NumPy's functions as torch's (`torch._numpy`), and that is something else: `np.random.normal` and
`np.random.seed` draw from and seed torch's generator, `float(np.percentile(…))` raises, a scalar becomes an array of
no dimensions (`F.dropout` refuses it as a probability, it is no `float`), `torch.tensor(array)` warns.
`torch._dynamo.config.trace_numpy` switches it off. What would then break graphs for nothing is mended here: a function
of numbers is called while Dynamo traces, and an attribute that is an np.float64 or np.int64 is a number, of its class.
What Python computes from such a number is Python's: a float, an int, a bool.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch._dynamo import exc
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import NumpyVariable

SETTINGS: dict[str, Any] = {"trace_numpy": False}
_NUMBERS = (bool, int, float)


def replaced() -> tuple[tuple[Any, str, Any], ...]:
    """What is replaced in Dynamo while it captures for us; nothing where nobody has imported NumPy."""
    if "numpy" not in sys.modules:
        return ()
    return (
        (NumpyVariable, "call_function", _on_numbers(NumpyVariable.call_function)),
        (VariableBuilder, "wrap_numpy_ndarray", _as_number),
    )


class Number(ConstantVariable):
    """A NumPy number that is computed with as Python's, and still is what it is to whoever asks for its class."""

    def __init__(self, number: Any, **options: Any):
        super().__init__(number.item(), **options)
        self.number = number

    def python_type(self) -> type:
        return type(self.number)

    def reconstruct(self, codegen: Any) -> None:
        codegen.append_output(codegen.create_load_const_unchecked(self.number))


def _as_number(self: Any, value: Any) -> Any:
    """Of a scalar, which Dynamo hands over as an array."""
    import numpy as np

    number = value[()]
    if type(number) is np.float64:
        found = self.wrap_symfloat(number.item())
        if isinstance(found, ConstantVariable):
            return Number(number, source=found.source)
        found.python_type = lambda: np.float64  # one that has changed: a number that is an input of the graph
        return found
    if type(number) is np.int64:
        self.install_guards(GuardBuilder.EQUALS_MATCH)
        return Number(number, source=self.source)
    exc.unimplemented(
        gb_type="a NumPy scalar that is neither np.float64 nor np.int64",
        context=type(number).__name__,
        explanation="Dynamo has no arithmetic, and in torch 2.11 no truth, of such numbers",
        hints=[],
    )


def _on_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        found = None if kwargs else _computed(self.value, args)
        return original(self, tx, args, kwargs) if found is None else Number(found)

    return call_function


def _computed(function: Any, args: Any) -> Any:
    """A finite number other than 0 that a function of numbers gives without a warning; None otherwise."""
    import numpy as np

    if not (isinstance(function, np.ufunc) or function is np.prod) or not all(a.is_python_constant() for a in args):
        return None
    values = [a.as_python_constant() for a in args]
    if not all(_are_numbers(value) for value in values):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = function(*values)
        except Exception:
            return None
    return found if type(found) in (np.float64, np.int64) and found != 0 and np.isfinite(found) else None


def _are_numbers(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(type(item) in _NUMBERS for item in value)
    return type(value) in _NUMBERS


__all__ = ["SETTINGS", "Number", "replaced"]
