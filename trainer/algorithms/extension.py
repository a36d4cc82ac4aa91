"""Functions of the user's, named as `FILE.py:NAME` in the settings: found at start, their results checked at each call.

A file is run as Python when the trainer starts, in its process and with its rights.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss


def load_function(reference: str, *, key: str, takes: tuple[str, ...]) -> Callable[..., Any]:
    """The function NAME of the file FILE.py; a relative path is taken from the working directory.

    Raises ConfigurationError in one line, naming `key` (the setting): no such file, a file that does not run, no such
    name, or a function that cannot be called with the arguments `takes`.
    """
    path, _, name = reference.rpartition(":")
    module = _run(Path(path).expanduser(), where=f"{key} {reference!r}")
    function = vars(module).get(name)
    if function is None:
        there = ", ".join(each for each, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise ConfigurationError(f"{key} {reference!r}: {path} has no {name!r}; functions there: {there}")
    if not callable(function):
        raise ConfigurationError(f"{key} {reference!r}: {name} is a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        raise ConfigurationError(
            f"{key} {reference!r}: must be callable as {name}({', '.join(takes)}): {error}"
        ) from error
    return function


def checked_tensor(result: object, *, what: str, like: Tensor, inputs_finite: bool = True) -> Tensor:
    """`result` if it is a floating tensor of the shape of `like`, finite where `inputs_finite`.

    Raises ConfigurationError naming `what`, or NonFiniteLoss for a value that is not finite.
    """
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ConfigurationError(f"{what} returned {kind}; a floating tensor of shape {list(like.shape)} was expected")
    if result.shape != like.shape:
        raise ConfigurationError(f"{what} returned shape {list(result.shape)}; {list(like.shape)} was expected")
    if inputs_finite and not bool(torch.isfinite(result).all()):
        at = int((~torch.isfinite(result)).nonzero()[0, 0])
        raise NonFiniteLoss(f"{what} returned {float(result.detach()[at])} at [{at}], from inputs that are finite")
    return result


def _run(path: Path, *, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigurationError(f"{where}: there is no file {path} (seen from {Path.cwd()})")
    name = f"verbatim_extension_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{where}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(f"{where}: {path} does not run: {type(error).__name__}: {error}") from error
    return module
