"""Session ids in paths may hold "/" and unicode: their segment stays percent-encoded until a route decodes it."""

from __future__ import annotations

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

IN_SESSION = "verbatim.path_in_session"
"""Where a request's scope has what `path_in_session` tells, once that is known."""

_PREFIX = b"/sessions/"
_ID_AT = len(_PREFIX)


class SessionPaths:
    """ASGI middleware: routes under `/sessions/` see the path as it was sent, so that `%2F` is no separator."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the raw path under `/sessions/`."""
        if scope["type"] == "http" and (path := _raw_session_path(scope)) is not None:
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)


class SessionPath(msgspec.Struct, frozen=True):
    """A path under a session: its id as it was sent, percent-encoded, and the path after it."""

    session_id: str
    rest: str


def split_session(scope: Scope) -> SessionPath | None:
    """Of a request for something under a session; None for any other, and where the id is missing."""
    path = _raw_session_path(scope)
    if path is None:
        return None
    end = path.find("/", _ID_AT)
    return SessionPath(path[_ID_AT:end], path[end:]) if end > _ID_AT else None


def path_in_session(scope: Scope) -> str:
    """The path of a request without the session before it: decoded where there is none, as it was sent in one."""
    known: str | None = scope.get(IN_SESSION)
    if known is not None:
        return known
    found = split_session(scope)
    path: str = scope["path"]
    return path if found is None else found.rest


def _raw_session_path(scope: Scope) -> str | None:
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("ascii") if raw.startswith(_PREFIX) and raw.isascii() else None
