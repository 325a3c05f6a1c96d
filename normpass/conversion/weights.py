"""Weights from a file into a model: `.safetensors`, or a `torch.save`d state_dict.

Nothing in the file is run: pickles are read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normpass.errors import InvalidInputError
from normpass.extras import needed
from normpass.files import path_of

_INNER = ("state_dict", "model_state_dict", "model", "net")
"""Under which names training scripts put the state_dict among other things."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_SHOWN = 5


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the state_dict in the file `path` into `model`, every name of it.

    Args:
        path: `.safetensors`, or what `torch.save` wrote of a state_dict or of a dict that has it under
            `state_dict`, `model_state_dict`, `model` or `net`. The prefixes of DistributedDataParallel and
            torch.compile are taken off.

    Raises:
        InvalidInputError: no such file, not such a file, or names or shapes that are not the model's.
    """
    path = path_of(path, "path")
    found = _without_wrappers(read_weights(path))
    expected = model.state_dict()
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    if missing or extra:
        parts = [f"{what} {_names(keys)}" for what, keys in (("no", missing), ("extra", extra)) if keys]
        raise InvalidInputError(
            f"`{path}` has {' and '.join(parts)}: give the weights of a {type(model).__name__}, of the very model named"
        )
    for key, value in expected.items():
        if found[key].shape != value.shape:
            raise InvalidInputError(
                f"`{path}`: `{key}` has shape {tuple(found[key].shape)}, the model's {tuple(value.shape)}: "
                "give the weights of the very model named"
            )
    model.load_state_dict(found)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file, on the CPU.

    Raises:
        InvalidInputError: as for `load_weights`.
    """
    if not path.is_file():
        raise InvalidInputError(f"no file `{path}`: name the weights as .safetensors or a torch.save'd state_dict")
    try:
        if path.suffix == ".safetensors":
            return needed("safetensors.torch").load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"`{path}` holds objects that are no tensors, or is no file of torch.save; it is not loaded, since that "
            "would run its code: save `model.state_dict()` with torch.save or as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise _unreadable(path, error) from error
    return _state_dict_in(path, content)


def _unreadable(path: Path, error: Exception) -> InvalidInputError:
    first = (str(error).splitlines() or [""])[0]
    return InvalidInputError(
        f"`{path}` cannot be read as weights ({type(error).__name__}: {first}): save `model.state_dict()` again"
    )


def _state_dict_in(path: Path, content: Any) -> dict[str, Tensor]:
    for candidate in (content, *(content.get(name) for name in _INNER if isinstance(content, Mapping))):
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return dict(candidate)
    raise InvalidInputError(
        f"`{path}` has no state_dict (names with tensors), neither by itself nor under {', '.join(_INNER)}: "
        "save `model.state_dict()`"
    )


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:  # either may be around the other
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _names(keys: list[str]) -> str:
    shown = ", ".join(f"`{key}`" for key in keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
