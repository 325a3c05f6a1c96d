"""Models and input shapes by name: what the command line and the benchmarks take as arguments."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import math
import operator
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import TypeVar

from torch import nn

from normpass.environment import memory_bytes
from normpass.errors import ModelSpecError

_FORMS = "`torchvision:NAME`, `timm:NAME` or `package.module:callable`"
_LIBRARY = sysconfig.get_path("stdlib")
T = TypeVar("T")
_WHERE = {
    "torchvision:": "`torchvision.models.list_models()` lists them",
    "timm:": "`timm.list_models()` lists them",
}
_DIGITS = 19
"""of a size that torch can hold, at most"""
_WARN_WITHOUT_INIT_WEIGHTS = ("googlenet", "inception_v3")


def load(spec: str) -> nn.Module:
    """Build the model that `spec` names, untrained.

    * `torchvision:resnet50`: any name that `torchvision.models.list_models()` has (classification,
      segmentation, detection, video);
    * `timm:resnet50`: any name that `timm.list_models()` has;
    * `package.module:callable`: imported with the current directory on the path, called without arguments.

    Raises:
        ModelSpecError: the form, the library, the name, the callable or its result is not as above.
    """
    source, separator, name = spec.partition(":")
    if not separator or not source or not name:
        raise ModelSpecError(f"`{spec}` is not a model: write {_FORMS}")
    if source == "torchvision":
        return _from_torchvision(name)
    if source == "timm":
        return _from_timm(name)
    return _from_callable(spec, source, name)


def default_input(spec: str, model: nn.Module) -> tuple[int, ...] | None:
    """The shape of the one input of two samples that a network of torchvision or timm takes; None for any other."""
    source, _, name = spec.partition(":")
    if source == "timm":
        return (2, *getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224)))
    if source != "torchvision" or ".detection" in type(model).__module__:
        return None
    if ".video" in type(model).__module__:
        return (2, 3, 16, 112, 112)
    side = 299 if name == "inception_v3" else 224  # at 224 its auxiliary head has less than a kernel to look at
    return (2, 3, side, side)


def parse_input(text: str) -> tuple[int, ...]:
    """`2x3x224x224` as (2, 3, 224, 224): the shape of one input, each size at least 1.

    Raises:
        ValueError: it does not read like that.
    """
    sizes = text.strip().lower().split("x")
    if not all(size.isascii() and size.isdigit() and len(size) < _DIGITS and int(size) for size in sizes):
        several = " (several inputs go through `parse_inputs`)" if "," in text else ""
        raise ValueError(f"`{text:.80}` is not a shape: write its sizes joined by x, like 2x3x224x224{several}")
    shape = tuple(map(int, sizes))
    _check_memory([shape], text)
    return shape


def _check_memory(shapes: Sequence[tuple[int, ...]], text: str) -> None:
    """Raise ValueError where the inputs alone, in float32, do not fit into this machine's memory."""
    needed, there = sum(4 * math.prod(shape) for shape in shapes), memory_bytes()
    if needed > there:
        raise ValueError(
            f"`{text:.80}` takes {needed / 2**30:.3g} GiB, and this machine has {there / 2**30:.3g}: name smaller sizes"
        )


def parse_inputs(text: str) -> list[tuple[int, ...]]:
    """`2x3x224x224,2x10` as [(2, 3, 224, 224), (2, 10)]: the shapes of several inputs.

    Raises:
        ValueError: one of them does not read as a shape.
    """
    shapes = [parse_input(part) for part in text.split(",")]
    _check_memory(shapes, text)
    return shapes


def _from_torchvision(name: str) -> nn.Module:
    zoo = _library("torchvision.models")
    if name not in zoo.list_models():
        raise ModelSpecError(f"torchvision has no model `{name}`{_hint(name, zoo.list_models(), 'torchvision:')}")
    builder = zoo.get_model_builder(name)
    options: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # a segmentation or detection net downloads its backbone otherwise
    if name.endswith(_WARN_WITHOUT_INIT_WEIGHTS):
        options["init_weights"] = True
    return builder(**options)


def _from_timm(name: str) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name.partition(".")[0]) or ":" in name:
        raise ModelSpecError(f"timm has no model `{name}`{_hint(name, timm.list_models(), 'timm:')}")
    try:
        return timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ModelSpecError(f"timm cannot build `{name}`: {error}; leave out what follows the dot") from error


def _from_callable(spec: str, module_name: str, name: str) -> nn.Module:
    with current_directory_on_path():
        build = _attribute(spec, _run_for(spec, lambda: _module(spec, module_name)), name)
        try:
            inspect.signature(build).bind()
        except TypeError as error:
            raise ModelSpecError(
                f"`{spec}` is called without arguments, but: {error}; name a function that needs none"
            ) from error
        model = _run_for(spec, build)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"`{spec}` returned a {type(model).__name__}: return a torch.nn.Module")
    return model


def _run_for(spec: str, call: Callable[[], T]) -> T:
    """What `call` returns; what code of the user's raises in it is said in one line, with the place."""
    try:
        return call()
    except ModelSpecError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<frozen", __file__))
        ]
        own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith(_LIBRARY)]
        place = "".join(f" ({f.filename}:{f.lineno})" for f in (own or frames)[-1:])
        raise ModelSpecError(f"`{spec}` raises {type(error).__name__}: {words}{place}") from error


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if error.name != top:
            raise
        raise ModelSpecError(f'{top} is not installed: pip install "normpass[nets]"') from error


def _module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ModelSpecError(
            f"`{spec}`: no module `{error.name}` in the current directory or installed; write {_FORMS}"
        ) from error
    except TypeError as error:
        raise ModelSpecError(f"`{spec}`: {error}; write {_FORMS}") from error


def _attribute(spec: str, module: ModuleType, name: str) -> Callable[[], object]:
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = _hint(name, public, f"{module.__name__}:")
        raise ModelSpecError(f"`{spec}`: module `{module.__name__}` has no `{name}`{hint}") from error
    if isinstance(found, nn.Module):
        raise ModelSpecError(f"`{spec}` is a {type(found).__name__} already: name a function that returns it")
    if not callable(found):
        raise ModelSpecError(f"`{spec}` is a {type(found).__name__}: name a function or class that builds the model")
    return found


def _hint(name: str, names: Iterable[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    if not close:
        return f"; {_WHERE.get(prefix, 'name a function or class that it defines')}"
    return f"; did you mean {' or '.join(f'`{prefix}{match}`' for match in close)}?"


@contextlib.contextmanager
def current_directory_on_path() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")
