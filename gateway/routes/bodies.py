"""Reading requests and writing JSON replies, the same way on every route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from fastapi import Request
from fastapi.responses import Response

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue
from gateway.wire.json_text import dump_json, load_json_object


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body; raises InvalidRequest for one that is longer than `max_bytes`."""
    too_long = InvalidRequest(f"the body is longer than {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > max_bytes:
            raise too_long
        pieces.append(piece)
    return b"".join(pieces)


async def read_fields(request: Request, *, max_bytes: int, known: Sequence[str]) -> dict[str, JsonValue]:
    """A JSON object of `known` fields, {} for an empty body; raises InvalidRequest naming a field that is not known."""
    body = await read_body(request, max_bytes=max_bytes)
    fields = load_json_object(body) if body.strip() else {}
    unknown = sorted(fields.keys() - set(known))
    if unknown:
        raise InvalidRequest(f"unknown field {', '.join(unknown)}; known are {', '.join(known)}")
    return fields


def typed(fields: Mapping[str, JsonValue], name: str, kind: type | tuple[type, ...], words: str) -> JsonValue:
    """A field's value, None if absent or null; raises InvalidRequest if it is not `words`."""
    value = fields.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)):
        return value
    raise InvalidRequest(f"{name}: expected {words}")


def json_reply(value: JsonValue, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(dump_json(value), status, dict(headers or {}), media_type="application/json")


def path_id(request: Request, name: str = "session_id") -> str | None:
    """An id of the path, percent-decoded (see `SessionPaths`), or None where the route has none."""
    value = request.path_params.get(name)
    return None if value is None else unquote(value)
