"""Model calls below the framework: every route that runs turns is found by its path, and nothing else is."""

from __future__ import annotations

import json

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gateway.contracts.errors import SessionSealed
from gateway.routes.bodies import path_id
from gateway.routes.hot_path import ModelCalls, ModelRequest, ModelRoute
from gateway.routes.paths import path_in_session


async def answered(request: Request) -> Response:
    """Who was asked for, and how."""
    if request.headers.get("x-fail") == "sealed":
        raise SessionSealed("it is finished")
    if request.headers.get("x-fail") == "bug":
        raise ZeroDivisionError
    what = [path_id(request), path_in_session(request.scope), request.headers.get("x-session-id")]
    return Response(json.dumps(what))


async def framework(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("framework")(scope, receive, send)


def calls() -> ModelCalls:
    router = APIRouter()
    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(prefix + "/v1/x", answered, methods=["POST"], route_class_override=ModelRoute)
        router.add_api_route(prefix + "/v1/other", answered, methods=["POST"])
    app = FastAPI()
    app.include_router(router)
    assert set(app.openapi()["paths"]) >= {"/v1/x", "/sessions/{session_id}/v1/x"}
    return ModelCalls(framework, router.routes)


async def asked(method: str, raw_path: str, path: str | None = None, **headers: str) -> tuple[int, str]:
    """Status and body of a call; path: as the server decodes it."""
    sent: list[Message] = []
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path or raw_path,
        "raw_path": raw_path.encode(),
        "query_string": b"",
        "headers": fields,
    }

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await calls()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.mark.parametrize(
    ("raw_path", "path", "session"),
    [
        ("/v1/x", "/v1/x", None),
        ("/v1%2Fx", "/v1/x", None),
        ("/sessions/a/v1/x", "/sessions/a/v1/x", "a"),
        ("/sessions/a%2Fv1%2Fx/v1/x", "/sessions/a/v1/x/v1/x", "a/v1/x"),
        ("/sessions/%C3%BC/v1/x", "/sessions/ü/v1/x", "ü"),
    ],
)
async def test_a_model_call_is_answered_in_its_session(raw_path: str, path: str, session: str | None) -> None:
    assert await asked("POST", raw_path, path) == (200, json.dumps([session, "/v1/x", None]))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/x"),
        ("GET", "/sessions/a/v1/x"),
        ("POST", "/v1/other"),
        ("POST", "/sessions/a/v1/other"),
        ("POST", "/v1/x/"),
        ("POST", "/sessions/a/v1/x/"),
        ("POST", "/sessions//v1/x"),
        ("POST", "/sessions/v1/x"),
        ("POST", "/sessions/a"),
        ("POST", "/sessions/"),
        ("POST", "/sessions/a%2Fv1/x"),
        ("POST", "/sessions/a/v1%2Fx"),
    ],
)
async def test_everything_else_is_the_frameworks(method: str, path: str) -> None:
    assert await asked(method, path) == (200, "framework")


async def test_of_a_header_that_came_twice_the_first_counts() -> None:
    """As the framework reads them."""
    scope = {"type": "http", "headers": [(b"a", b"1"), (b"A", b"3"), (b"a", b"2")]}
    assert ModelRequest(scope).headers.get("a") == Request(scope).headers.get("a") == "1"


async def test_errors_have_openais_body() -> None:
    status, body = await asked("POST", "/sessions/a/v1/x", x_fail="sealed")
    assert (status, json.loads(body)["error"]["message"]) == (409, "it is finished")


async def test_a_bug_is_raised_for_the_log() -> None:
    with pytest.raises(ZeroDivisionError):
        await asked("POST", "/v1/x", x_fail="bug")
