"""Errors as replies: ours, those of paths and methods that are not served, and bugs."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from gateway.contracts.errors import MethodNotAllowed, NotFound, RequestError, VerbatimError
from gateway.routes.bodies import json_reply
from gateway.wire.errors import error_body, error_headers

_log = logging.getLogger(__name__)


def add_error_replies(app: FastAPI) -> None:
    """Have every error answered with OpenAI's error body, where a route does not speak another dialect."""
    app.add_exception_handler(VerbatimError, _verbatim_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


def error_reply(request: Request, error: VerbatimError) -> Response:
    """OpenAI's error body."""
    if error.http_status >= 500:
        _log.warning("%s %s: %s", request.method, request.scope["path"], error)
    return json_reply(error_body(error), status=error.http_status, headers=error_headers(error))


def bug_reply(error: Exception) -> Response:
    """The trace goes to the log (uvicorn writes it), not to the client."""
    return json_reply(error_body(VerbatimError(f"internal error: {type(error).__name__}")), status=500)


async def _verbatim_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, VerbatimError):
        raise error
    return error_reply(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}"
    ours: RequestError = NotFound(message)
    if error.status_code == MethodNotAllowed.http_status:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        ours = MethodNotAllowed(message, allowed=allowed)
    return json_reply(error_body(ours), status=ours.http_status, headers=error_headers(ours))


async def _bug(request: Request, error: Exception) -> Response:
    return bug_reply(error)
