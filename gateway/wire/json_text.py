"""JSON bytes ↔ values without loss (I8): integers of any size, `1.0` is not `1`, order and nulls stay.

Read by msgspec, written by orjson, and both by the standard library where those will not: orjson, for one, refuses
integers beyond 64 bits. Arrays of numbers may stand in a value as they are, text
that is JSON already as `Spliced`, and large arrays as `Base64`: those are encoded while they leave, so that a reply of
hundreds of megabytes is never whole in memory.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue

_NOWHERE = "/"
_ENCODED_AT_ONCE = 3 * 2**15
"""Elements of an array: a multiple of three, so that pieces of base64 join without padding between them."""

_WHOLE_BYTES = 2**18
"""JSON up to here is one piece."""

_decode = msgspec.json.Decoder().decode

Spliced = orjson.Fragment
"""JSON text, as bytes, that stands in a value for what it says."""

_FAST = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_SERIALIZE_NUMPY
"""What has no JSON of its own is refused; else orjson would make up some."""

_PLAIN = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True, eq=False)
class Base64:
    """A JSON string: base64 of an array's elements as `dtype` (its own where None), in C order."""

    array: npt.NDArray[Any]
    dtype: npt.DTypeLike | None = None

    @property
    def num_characters(self) -> int:
        """Length of the base64 text."""
        return (self.array.size * self._type.itemsize + 2) // 3 * 4

    def pieces(self) -> Iterator[bytes]:
        """The text, piece by piece; no copy of the whole is made."""
        elements = self.array.reshape(-1)
        for start in range(0, len(elements), _ENCODED_AT_ONCE):
            part = elements[start : start + _ENCODED_AT_ONCE].astype(self._type, copy=False)
            yield pybase64.b64encode(part.tobytes())

    @property
    def _type(self) -> np.dtype[Any]:
        return np.dtype(self.array.dtype if self.dtype is None else self.dtype)


class JsonText(msgspec.Struct, frozen=True, eq=False):
    """JSON as it leaves: bytes, and arrays that are encoded only then."""

    parts: Sequence[bytes | Base64]

    @property
    def num_bytes(self) -> int:
        """Length of the whole."""
        num_bytes = 0
        for part in self.parts:
            num_bytes += part.num_characters if isinstance(part, Base64) else len(part)
        return num_bytes

    def pieces(self) -> Iterator[bytes]:
        """The text in order."""
        for part in self.parts:
            if isinstance(part, Base64):
                yield from part.pieces()
            else:
                yield part


def load_json_object(body: bytes) -> dict[str, JsonValue]:
    """A request body as a JSON object; raises InvalidRequest saying what is wrong with it."""
    value = _quickly(body)
    if isinstance(value, dict):
        return value
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in body and (b"\\ud" in body or b"\\uD" in body):
            value = _mended(value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except _OutOfRange as error:
        where = _path_of_infinity(json.loads(body))
        raise InvalidRequest(f"{where}: the number {error.digits} is out of range") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise InvalidRequest("the body holds a number of more than 4300 digits") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def load_json_list(text: bytes) -> list[JsonValue] | None:
    """JSON that may be a list; None where it is not, or where it must be read more slowly."""
    value = _quickly(text)
    return value if isinstance(value, list) else None


def _quickly(text: bytes) -> JsonValue | None:
    """What the standard library would read too, three times faster; None where that has to decide: halves of surrogate
    pairs, numbers beyond a float, and everything that is no JSON. Integers are exact at any size (I8)."""
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def dump_json(value: JsonValue) -> bytes:
    """Compact UTF-8 JSON; floats that JSON has no name for become null."""
    try:
        return orjson.dumps(value, option=_FAST)  # nearly all: a frame for every token
    except orjson.JSONEncodeError:  # a Base64, an integer beyond 64 bits, an array that is not in C order, …
        return b"".join(_text(value).pieces())


def json_text(value: JsonValue) -> JsonText:
    """As `dump_json`, for values that may hold `Base64`, which is not encoded yet."""
    try:
        return JsonText((orjson.dumps(value, option=_FAST),))
    except orjson.JSONEncodeError:
        return _text(value)


def _text(value: JsonValue) -> JsonText:
    """By the standard library, which has an answer to all that can be answered."""
    try:
        return JsonText((_PLAIN.encode(value).encode(),))
    except (TypeError, ValueError):  # a Base64, or a float without a name
        return _with_arrays(value)


def number_texts(numbers: npt.NDArray[np.float32]) -> list[bytes]:
    """The JSON of each of float32[N], as of the float64 that equals it; null for NaN."""
    text = orjson.dumps(numbers.astype(np.float64), option=_FAST)
    return text[1:-1].split(b",") if len(numbers) else []


def _with_arrays(value: JsonValue) -> JsonText:
    arrays: list[Base64 | bytes] = []
    mark = secrets.token_hex(16)  # no text that an agent sends can hold it

    def stand_in(item: object) -> str:
        if isinstance(item, np.ndarray):
            arrays.append(orjson.dumps(np.ascontiguousarray(item), option=_FAST))
        elif isinstance(item, Spliced):
            arrays.append(orjson.dumps(item))
        elif isinstance(item, Base64):
            arrays.append(item)
        else:
            raise TypeError(f"{type(item).__name__} is no JSON value")
        return mark

    try:
        text = _encode(value, stand_in)
    except ValueError:
        arrays.clear()
        text = _encode(_without_nan(value), stand_in)
    if not arrays:
        return JsonText((text.encode(),))
    first, *others = (part.encode() for part in text.split(mark))
    parts: list[Any] = [first]
    for array, part in zip(arrays, others, strict=True):
        if isinstance(array, bytes):  # no string: the quotes around the mark go
            parts = [*parts[:-1], parts[-1][:-1], array, part[1:]]
        else:
            parts += [array, part]
    found = JsonText(parts)
    return found if found.num_bytes > _WHOLE_BYTES else JsonText((b"".join(found.pieces()),))


def _encode(value: JsonValue, stand_in: Callable[[object], str]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=stand_in)


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


class _OutOfRange(ValueError):
    """A number beyond what a float holds; `digits`: how it is written, cut."""

    def __init__(self, digits: str) -> None:
        super().__init__(digits)
        self.digits = digits if len(digits) <= 40 else f"{digits[:40]}…"


def _finite(digits: str) -> float:
    """A float; one that Python has no number for would leave as another value than it came (I8)."""
    number = float(digits)
    if math.isinf(number):
        raise _OutOfRange(digits)
    return number


def _path_of_infinity(value: JsonValue) -> str:
    """Where the first number stands that is out of range: `messages[0].x`."""
    if isinstance(value, float):
        return "" if math.isinf(value) else _NOWHERE
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if (rest := _path_of_infinity(item)) != _NOWHERE:
            step = f"[{key}]" if isinstance(value, list) else str(key)
            return f"{step}.{rest}" if rest and not rest.startswith("[") else step + rest
    return _NOWHERE


def _mended(value: JsonValue) -> JsonValue:
    """Halves of surrogate pairs, which tools that read bytes as text produce, become U+FFFD: no text holds them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return value
