"""`GET /sessions/{id}/blobs/{sha256}`: the bytes that a session's messages refer to, for its agent and for operators.

They came from an agent, so a browser must not run them: they are an attachment, sandboxed, under a type of picture,
sound or film at most.
"""

from __future__ import annotations

import re

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.contracts.errors import NotFound
from gateway.contracts.ports import Ledger
from gateway.routes import openapi
from gateway.routes.bodies import path_id
from gateway.routes.turns import Calls

_SHOWN_TYPES = re.compile(r"(?:image|audio|video)/(?!svg)[a-z0-9.+-]+")
_HEADERS = {
    "Cache-Control": "private, immutable",
    "Content-Disposition": "attachment",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
}


def blobs_router(calls: Calls, ledger: Ledger) -> APIRouter:
    """The route; to be included before routes that take any path."""
    router = APIRouter(tags=["agents"])

    async def blob(request: Request) -> Response:
        """One content, under the media type that its message names."""
        session = await calls.reader(request)
        sha256 = path_id(request, "sha256") or ""
        found = await ledger.blob(session.record.session_id, sha256)
        if found is None:
            raise NotFound(f"no message of this session refers to {sha256[:64]!r}")
        is_shown = _SHOWN_TYPES.fullmatch(found.media_type) is not None
        media_type = found.media_type if is_shown else "application/octet-stream"
        return Response(found.content, headers=_HEADERS, media_type=media_type)

    router.add_api_route("/sessions/{session_id}/blobs/{sha256}", blob, methods=["GET"], openapi_extra=openapi.BLOB)
    return router
