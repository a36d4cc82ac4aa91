"""Argument values that a model wrote as bare text, typed by the tool's JSON schema, as JSON text."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence

from gateway.contracts.generation import JsonValue
from gateway.tito.parsing.json_text import strict_json

_CLASSES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}
_WORDS = {"true": "boolean", "false": "boolean", "null": "null", "none": "null"}
_MAX_SCHEMA_DEPTH = 8


def arguments_text(values: Sequence[tuple[str, str]], tools: Sequence[JsonValue], *, function: str) -> str | None:
    """JSON text of the object with these (key, bare text) members, in order; None if a key stands twice.

    A value becomes what the function's schema says of its key; it stays text where the schema allows text, does not
    know the key, or where the value does not fit. Numbers are kept as written.
    """
    if len({key for key, _ in values}) != len(values):
        return None
    parameters = _parameters(tools, function)
    properties = parameters.get("properties")
    schemas = properties if isinstance(properties, Mapping) else {}
    members = [
        f"{json.dumps(key, ensure_ascii=False)}: {_value_text(text, set(_types(schemas.get(key), parameters)))}"
        for key, text in values
    ]
    return "{" + ", ".join(members) + "}"


def _parameters(tools: Sequence[JsonValue], function: str) -> Mapping[str, JsonValue]:
    for tool in tools:
        definition = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(definition, Mapping) and definition.get("name") == function:
            parameters = definition.get("parameters", definition.get("input_schema"))
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def _types(schema: JsonValue, root: Mapping[str, JsonValue], depth: int = 0) -> Iterator[str]:
    """Names of the types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping) or depth > _MAX_SCHEMA_DEPTH:
        return
    declared = schema.get("type")
    yield from [declared] if isinstance(declared, str) else _strings(declared)
    if schema.get("nullable") is True:
        yield "null"
    for value in schema["enum"] if isinstance(schema.get("enum"), list) else ():
        yield "string" if isinstance(value, str) else _name_of(value)
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema[key] if isinstance(schema.get(key), list) else ():
            yield from _types(option, root, depth + 1)
    if isinstance(schema.get("$ref"), str):
        yield from _types(_referenced(schema["$ref"], root), root, depth + 1)


def _strings(value: JsonValue) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _name_of(value: JsonValue) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return next((name for name, classes in _CLASSES.items() if isinstance(value, classes)), "string")


def _referenced(reference: str, root: Mapping[str, JsonValue]) -> JsonValue:
    """What `#/…` points at in the same schema; None for all else."""
    place: JsonValue = dict(root) if reference.startswith("#/") else None
    for part in reference.removeprefix("#/").split("/"):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _value_text(text: str, types: set[str]) -> str:
    bare = text.strip()
    if "string" in types:
        # Of text that may be anything, only this word is taken for more than text.
        return "null" if bare == "null" and "null" in types else json.dumps(text, ensure_ascii=False)
    word = _WORDS.get(bare.lower())
    if word in types:
        return "null" if word == "null" else bare.lower()
    for name in types & _CLASSES.keys():
        written = _json_of(bare, _CLASSES[name])
        if written is not None:
            return written
    return json.dumps(text, ensure_ascii=False)


def _json_of(text: str, classes: tuple[type, ...]) -> str | None:
    """JSON text of a value of one of `classes`: as written, or re-spelled where a template prints Python's form."""
    try:
        value = strict_json(text)
    except (ValueError, RecursionError):
        return _json_of_python(text, classes)
    return text if isinstance(value, classes) and not isinstance(value, bool) else None


def _json_of_python(text: str, classes: tuple[type, ...]) -> str | None:
    if text[:1] not in ("{", "["):
        return None
    try:
        value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, classes) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
