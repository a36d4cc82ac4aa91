"""TOML into frozen dataclasses: unknown keys fail with the nearest name, `--set a.b=c` overrides, the result prints.

A settings class is a frozen dataclass whose fields are bool, int, float, str, Path, enums, `X | None`, tuples or dicts
of these, or other such dataclasses. Each lives beside the class that it configures.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from gateway.contracts.errors import ConfigurationError

Settings = TypeVar("Settings")

ENGINE_KEY_VARIABLE = "VERBATIM_ENGINE_KEY"
"""Environment variable with the key that engines were started with (`--api-key`); it is sent to engines only."""


def load_settings(kind: type[Settings], *, file: Path | None, overrides: Iterable[str] = ()) -> Settings:
    """Read `file` (None: defaults only), apply `key.path=value` overrides, and build `kind`.

    An override's value is read as TOML where it parses as such, else as a bare string.
    Raises ConfigurationError naming the file, the key and the nearest known name.
    """
    values = _read_toml(file) if file is not None else {}
    where = str(file) if file is not None else "settings"
    for override in overrides:
        _apply_override(values, override)
    return build_settings(kind, values, where=where)


def build_settings(kind: type[Settings], values: Mapping[str, Any], *, where: str) -> Settings:
    """Build one settings dataclass from plain values; `where` is named in errors."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # kind is a dataclass by contract
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where}: unknown key {key!r}{hint}")
    hints = typing.get_type_hints(kind)
    arguments = {key: _convert(hints[key], value, where=f"{where}: {key}") for key, value in values.items()}
    for name, f in known.items():
        if name not in arguments and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigurationError(f"{where}: {name!r} is required")
    return kind(**arguments)


def engine_key() -> str | None:
    """The engines' key, which is not among the settings; raises ConfigurationError if no header can carry it."""
    key = os.environ.get(ENGINE_KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(f"{ENGINE_KEY_VARIABLE} must be printable ASCII: it is sent in a header")
    return key or None


def settings_toml(settings: Any) -> str:
    """The settings as TOML text (what `--print-config` shows); None is left out, as TOML has no null."""
    lines: list[str] = []
    tables: list[tuple[str, Any]] = [("", settings)]
    while tables:
        prefix, table = tables.pop(0)
        if prefix:
            lines += ["", f"[{prefix}]"]
        for f in fields(table):
            value = getattr(table, f.name)
            if is_dataclass(value):
                tables.append((f"{prefix}.{f.name}" if prefix else f.name, value))
            elif value is not None:
                lines.append(f"{f.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{file}: no such settings file") from error
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: not valid TOML: {error}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigurationError(f"--set {override!r}: write it as key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = path.strip().split(".")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"--set {override!r}: {parent!r} is a value, not a table")
    table[leaf] = value


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(options[0], value, where=where)
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{where}: expected a table, got {value!r}")
        return build_settings(hint, value, where=where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, entry, where=f"{where}[{i}]") for i, entry in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{where}: expected a table, got {value!r}")
        item = typing.get_args(hint)[1]
        return {str(key): _convert(item, entry, where=f"{where}.{key}") for key, entry in value.items()}
    return _convert_scalar(hint, value, where=where)


def _convert_scalar(hint: Any, value: Any, *, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError as error:
            names = ", ".join(str(member.value) for member in hint)
            raise ConfigurationError(f"{where}: {value!r} is none of {names}") from error
    if hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigurationError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return _toml_value(value.value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(entry)}" for key, entry in value.items()) + "}"
    return json.dumps(str(value), ensure_ascii=False)
