"""What a user names as `FILE.py:NAME` in the settings: a function or a class of a file of theirs, found at start.

A file is run as Python when the command starts, in its process and with its rights.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gateway.contracts.errors import ConfigurationError


def load_extension(reference: str, *, key: str, takes: tuple[str, ...]) -> Callable[..., Any]:
    """The function or class NAME of the file FILE.py; a relative path is taken from the working directory.

    Raises ConfigurationError in one line, naming `key` (the setting): no such file, a file that does not run, no such
    name, or one that cannot be called with the arguments `takes`.
    """
    path, _, name = reference.rpartition(":")
    module = _run(Path(path).expanduser(), where=f"{key} {reference!r}")
    found: object = vars(module).get(name)
    if found is None:
        there = ", ".join(each for each, value in vars(module).items() if _is_of(module, value)) or "none"
        raise ConfigurationError(f"{key} {reference!r}: {path} has no {name!r}; functions there: {there}")
    if not callable(found):
        raise ConfigurationError(f"{key} {reference!r}: {name} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind(*takes)
    except TypeError as error:
        raise ConfigurationError(
            f"{key} {reference!r}: must be callable as {name}({', '.join(takes)}): {error}"
        ) from error
    return found


def _is_of(module: ModuleType, value: object) -> bool:
    return (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__


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
