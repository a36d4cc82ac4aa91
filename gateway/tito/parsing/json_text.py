"""JSON that a model wrote, read strictly but kept as written: numbers, order and spacing of arguments stay."""

from __future__ import annotations

import json
import re

from msgspec import Struct

_SPACES = " \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_KEY = r'[ \t\r\n]*"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"[ \t\r\n]*:[ \t\r\n]*'
_CLOSING = r"[ \t\r\n]*\}"
_OPENING = re.compile(rf"[ \t\r\n]*\{{(?:{_KEY}|{_CLOSING})")
"""Up to where the first value begins, with its key as it is written; or the whole of an object that is empty."""

_NEXT = re.compile(rf"[ \t\r\n]*,{_KEY}|{_CLOSING}")
"""The same behind a value: up to the next one, or to the object's end."""


class Written(Struct, frozen=True):
    """A value, and its JSON text as it was written."""

    text: str
    value: object


def read_members(text: str) -> dict[str, Written]:
    """Key → value of the one object that `text` is.

    Raises ValueError for all else (a key that stands twice too), RecursionError for absurd nesting.
    """
    members, stop = members_at(text, 0)
    if text[stop:].strip(_SPACES):
        raise ValueError("text follows the object")
    return members


def members_at(text: str, at: int) -> tuple[dict[str, Written], int]:
    """As `read_members`, of the object that begins at `at`, white space before it or not; and where it ends."""
    members: dict[str, Written] = {}
    found = _OPENING.match(text, at)
    while found is not None:
        start, key = found.end(), found[1]
        if key is None:
            return members, start
        if "\\" in key:
            key = _DECODER.decode(f'"{key}"')
        if key in members:
            raise ValueError(f"key {key!r} stands twice")
        try:
            value, at = _scan(text, start)
        except StopIteration as error:
            raise ValueError(f"no value at {error.value}") from None
        members[key] = Written(text[start:at], value)
        found = _NEXT.match(text, at)
    raise ValueError(f"no object, or none that goes on, at {at}")


def read_items(text: str) -> list[dict[str, Written]]:
    """The members of each object of the one JSON array of objects that `text` is; raises as `read_members`."""
    items: list[dict[str, Written]] = []
    at = skip_space(text, expect(text, skip_space(text, 0), "["))
    while True:
        members, at = members_at(text, at)
        items.append(members)
        at = skip_space(text, at)
        if text[at : at + 1] != ",":
            break
        at = skip_space(text, at + 1)
    if skip_space(text, expect(text, at, "]")) != len(text):
        raise ValueError("text follows the array")
    return items


def object_text(text: str) -> str | None:
    """`text` without the space around it if it is a JSON object, else None."""
    text = text.strip()
    try:
        is_object = isinstance(strict_json(text), dict)
    except (ValueError, RecursionError):
        return None
    return text if is_object else None


def strict_json(text: str) -> object:
    """The value; raises ValueError for NaN and infinities too, which are not JSON."""
    return _DECODER.decode(text)


def skip_space(text: str, at: int) -> int:
    """The first place from `at` on that is not JSON's white space."""
    if text[at : at + 1] not in _SPACES:  # also true at the end, where "" is in every text
        return at
    match = _SPACE.match(text, at)
    return match.end() if match is not None else at


def expect(text: str, at: int, character: str) -> int:
    """The place behind `character`; raises ValueError if it does not stand there."""
    if text[at : at + 1] != character:
        raise ValueError(f"expected {character!r} at {at}")
    return at + 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_scan = _DECODER.scan_once  # type: ignore[attr-defined]  # what `raw_decode` calls; raises StopIteration
