"""JSON bytes ↔ values without loss (I8): integers of any size, `1.0` is not `1`, order and nulls stay.

The standard library's codec, because the faster ones turn integers beyond 64 bits into floats.
"""

from __future__ import annotations

import json
from typing import NoReturn

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue


def load_json_object(body: bytes) -> dict[str, JsonValue]:
    """A request body as a JSON object; raises InvalidRequest saying what is wrong with it."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in body or b"\\uD" in body:
            value = _mended(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise InvalidRequest("the body holds a number of more than 4300 digits") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def dump_json(value: JsonValue) -> bytes:
    """Compact UTF-8 JSON; floats that JSON has no name for become null."""
    try:
        return _encode(value, allow_nan=False)
    except ValueError:
        return _encode(_without_nan(value), allow_nan=False)


def _encode(value: JsonValue, *, allow_nan: bool) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=allow_nan).encode()


def _without_nan(value: JsonValue) -> JsonValue:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body is not JSON: {name} is no JSON number")


def _mended(value: JsonValue) -> JsonValue:
    """Halves of surrogate pairs, which tools that read bytes as text produce, become U+FFFD: no text holds them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return value
