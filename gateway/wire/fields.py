"""Fields of a JSON object, read with their type; what is wrong is an InvalidRequest that names the field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue

_MAX_NESTING = 200
_CONTAINERS = frozenset((dict, list))
_NAMES: Mapping[type, str] = {str: "a string", int: "an integer", bool: "true or false"}

T = TypeVar("T")


def check_nesting(fields: Mapping[str, JsonValue], body: bytes | None = None) -> None:
    """Raise InvalidRequest for a field nested so deep that what reads it would run out of stack somewhere later. body:
    the JSON of the fields; few have brackets enough for that."""
    if body is not None and is_shallow_text(body):
        return
    for name, value in fields.items():
        if not _is_shallow(value):
            raise InvalidRequest(f"{name}: is nested too deeply: at most {_MAX_NESTING} levels")


def is_shallow_text(text: bytes) -> bool:
    """Whether JSON cannot be nested too deeply, because it has not enough brackets for that."""
    return text.count(b"[") + text.count(b"{") <= _MAX_NESTING


def _is_shallow(value: JsonValue) -> bool:
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [inner for item in level if isinstance(item, dict | list) for inner in _nested(item)]
        if not level:
            return True
    return False


def _nested(value: JsonValue) -> Iterable[JsonValue]:
    """Lists and objects in a list or an object; millions of ids are looked at without a step of Python for each."""
    inner = value.values() if isinstance(value, dict) else value
    if _CONTAINERS.isdisjoint(map(type, inner)):
        return ()
    return (item for item in inner if isinstance(item, dict | list))


@contextmanager
def inside(path: str) -> Iterator[None]:
    """Fields that are read here are those of `path`: an InvalidRequest names them so."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}.{error.message}") from error


def objects(fields: Mapping[str, JsonValue], name: str) -> tuple[JsonValue, ...]:
    """A list of objects, () where absent or null."""
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise InvalidRequest(f"{name}: expected a list, got {kind_of(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name}[{i}]: expected an object, got {kind_of(value)}")
    return tuple(values)


def flag(fields: Mapping[str, JsonValue], name: str) -> bool:
    """A boolean, False where absent or null."""
    return name in fields and bool(optional(fields, name, bool))


def number(fields: Mapping[str, JsonValue], name: str) -> float | None:
    """A number of ordinary size, None where absent or null."""
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: expected a number, got {kind_of(value)}")
    if abs(value) > 1e9:
        raise InvalidRequest(f"{name}: {value} is out of range")
    return float(value)


def optional(fields: Mapping[str, JsonValue], name: str, kind: type[T]) -> T | None:
    """A string, 64-bit integer or boolean, None where absent or null."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"{name}: expected {_NAMES[kind]}, got {kind_of(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name}: {value} is out of range")
    return value


def within(fields: Mapping[str, JsonValue], name: str, least: int, most: int) -> int | None:
    """An integer from `least` to `most`, None where absent or null."""
    value = optional(fields, name, int)
    if value is not None and not least <= value <= most:
        raise InvalidRequest(f"{name}: expected {least} to {most}, got {value}")
    return value


def kind_of(value: JsonValue) -> str:
    """What a JSON value is, in words."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
