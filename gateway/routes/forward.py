"""Any other path of an agent's: sent to the session's engine as it is, or refused.

Method, path, query, status and bodies pass untouched, headers as far as they are the caller's and the engine's own and
not the connection's; keys and cookies stay here. What is sent on is counted and logged, and is no turn: so nothing that
samples may pass (I7), and nothing that shows or changes how an engine runs, for agents are not trusted.

    known       what is in `KNOWN`: reading, embedding, scoring; besides, what the operator lists (`forward_paths`)
    none        nothing
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import orjson
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send

from gateway.contracts.errors import ConfigurationError, EngineError, InvalidRequest, NotFound
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import ForwardingEngine, HttpHeaders, RawCall, RawReply
from gateway.replicas.pool import ReplicaPool
from gateway.routes.audit import audit_note
from gateway.routes.bodies import read_body
from gateway.routes.turns import Calls
from gateway.wire.errors import agents_error

_log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_READS = frozenset(("GET", "HEAD"))
_ASKS = frozenset(("POST",))

KNOWN: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        ("/get_model_info", "/health", "/model_info", "/ping", "/ready", "/tokenizer_info", "/version"), _READS
    ),
    **dict.fromkeys(
        (
            "/classify", "/encode", "/parse_function_call", "/pooling", "/rerank", "/score", "/separate_reasoning",
            "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/chat/completions/derender",
            "/v1/chat/completions/render", "/v1/classify", "/v1/completions/derender", "/v1/completions/render",
            "/v1/decisions", "/v1/embeddings", "/v1/messages/render", "/v1/moderations", "/v1/rerank",
            "/v1/responses/render", "/v1/score", "/v1/systemone", "/v2/embed", "/v2/rerank",
        ),
        _ASKS,
    ),
}  # fmt: skip
"""Path → methods, of SGLang, vLLM and OpenAI. None of them changes anything or returns what the policy sampled."""

_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_.~-]+)+")
_HOP_BY_HOP = frozenset(
    (
        "connection", "keep-alive", "proxy-authenticate", "proxy-authentication-info", "proxy-authorization",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    )
)  # fmt: skip
"""RFC 9110, section 7.6.1, and those that `Connection` names."""

_OURS_OF_REQUESTS = frozenset(("content-length", "expect", "forwarded", "host"))
_OURS_OF_REPLIES = frozenset(("date", "server", "set-cookie"))
_ROUTERS = "x-smg-"
"""How the names begin of headers in which a router says where its workers are."""
_MAX_LOGGED_CHARACTERS = 200
_PASSES_UNREAD = ("multipart/", "audio/")
_SCHEMAS = frozenset(("functions", "response_format", "tools"))
"""Fields whose lists hold an agent's own numbers (`enum`) and reach the model as text."""
_SECRET = re.compile(r"auth|cookie|credential|key|override|secret|session|token|^x-(?:forwarded|smg)-", re.IGNORECASE)
"""Names of headers that open something here, or would steer what stands between here and an engine."""


class Forward(StrEnum):
    """Which other paths of an engine agents reach."""

    KNOWN = "known"
    NONE = "none"


class Observed(NamedTuple):
    """Who hears of calls: of an answer (engine id, status), and of a refusal."""

    answered: Callable[[str, int], None]
    refused: Callable[[], None]


def own_path(text: str) -> str:
    """One of the operator's own paths, normalised: no `/` at its end, `*` only there, for whatever follows.

    Raises ConfigurationError for a path that no plainly written one can equal, and for a bare `*`.
    """
    if not _is_plain(text.removesuffix("*").removesuffix("/")):
        raise ConfigurationError(
            f"forward_paths: {text!r}: write a path as agents do, /name or /name/*, without escapes or dots"
        )
    return text.removesuffix("/")


def refusal(mode: Forward, method: str, path: str, *, own: Sequence[str] = ()) -> str | None:
    """Why a path does not pass, None if it does. path: as sent, percent-encoded, without the session and the query.
    own: the operator's paths as `own_path` writes them; they take every method."""
    if mode is Forward.NONE:
        return "is not served here, and no other path is forwarded"
    if method in KNOWN.get(path, ()):
        return None
    # One way to read it, or the engine might read another path than was checked.
    if _is_plain(path) and any(_is_of(path, entry) for entry in own):
        return None
    return "is not served here, and not among the paths that are forwarded"


def forward_router(
    calls: Calls, *, mode: Forward, own: Iterable[str], max_body_bytes: int, observed: Observed
) -> APIRouter:
    """The routes that take any path; to be included last. own: the operator's paths, as he wrote them."""
    routes = _ForwardRoutes(calls, mode, tuple(map(own_path, own)), max_body_bytes, observed)
    router = APIRouter(tags=["agents"])
    for path in ("/sessions/{session_id}/{rest:path}", "/{rest:path}"):
        router.add_api_route(path, routes.forward, methods=list(_METHODS), include_in_schema=False)
    return router


@dataclass(slots=True, eq=False)
class _ForwardRoutes:
    """The routes' functions."""

    calls: Calls
    mode: Forward
    own: Sequence[str]
    max_body_bytes: int
    observed: Observed
    served: Sequence[tuple[re.Pattern[str], frozenset[str]]] = ()

    async def forward(self, request: Request) -> Response:
        """The engine's answer, or a refusal."""
        if request.headers.get("upgrade", "").lower() == "websocket":
            raise NotFound("WebSockets are not forwarded; agents call over HTTP")
        self._check_method(request)
        path = _path(request)
        if (why := refusal(self.mode, request.method, path, own=self.own)) is not None:
            self.observed.refused()
            audit_note(request.scope).reach_operators_call({})
            _log.warning("%s %r is refused", request.method, path[:_MAX_LOGGED_CHARACTERS])
            raise NotFound(f"{request.method} {path} {why} (setting `forward` is {self.mode.value})")
        if "upgrade" in request.headers:
            raise InvalidRequest("Upgrade: other protocols than HTTP are not forwarded")
        session_id = await self.calls.caller(request)
        body = await read_body(request, max_bytes=self.max_body_bytes)
        _check_ids(request, body, vocab_size=self.calls.vocab_size)
        query = request.scope["query_string"].decode("latin-1")
        target = f"{path}?{query}" if query else path
        call = RawCall(request.method, target, _request_headers(request.headers.items()), body)
        return _Forwarded(self.calls.runner.parts.pool, session_id, call, self.observed)

    def _check_method(self, request: Request) -> None:
        """A path of ours, asked for in another way than it is served: 405 with what it takes."""
        self.served = self.served or _served(request.app)
        allowed = [methods for path, methods in self.served if path.match(request.scope["path"])]
        if allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(frozenset[str]().union(*allowed)))})


class _Forwarded(Response):
    """An engine's answer on its way; a client that goes away ends it at the engine too."""

    def __init__(self, pool: ReplicaPool, session_id: str, call: RawCall, observed: Observed) -> None:
        super().__init__(status_code=200)
        self._pool = pool
        self._session_id = session_id
        self._call = call
        self._observed = observed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay until the answer ends or nobody listens."""
        relay, gone = asyncio.create_task(self._relay(send)), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                await relay
        except EngineError as error:
            _log.warning("session %r: %s %s: %s", self._session_id, self._call.method, self._call.target, error)
            raise agents_error(error, f"{self._call.method} {self._call.target}") from error
        finally:
            gone.cancel()
            relay.cancel()
            await asyncio.wait({relay, gone})

    async def _relay(self, send: Send) -> None:
        """Raises EngineError before the answer begins; if it breaks off later, so does ours, unfinished."""
        async with self._pool.lend(self._session_id) as engine:
            if not isinstance(engine, ForwardingEngine):
                raise NotFound(f"{self._call.method} {self._call.target}: the engine takes turns only")
            async with engine.forward(self._call) as reply:
                self._observed.answered(engine.engine_id, reply.status)
                _log.info(
                    "session %r: %s %s is answered by %s with %d",
                    self._session_id, self._call.method, self._call.target, engine.engine_id, reply.status,
                )  # fmt: skip
                try:
                    await _send(reply, send)
                except EngineError as error:
                    _log.warning("%s %s broke off: %s", self._call.method, self._call.target, error)


async def _send(reply: RawReply, send: Send) -> None:
    """Piece by piece: the next one is read when the client has room."""
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in _reply_headers(reply)]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    async for piece in reply.body:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _path(request: Request) -> str:
    """As sent, without the session before it: what a router would decode, an engine must not be sent undecoded."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    path = raw.decode("latin-1")
    return "/" + path.split("/", 3)[3] if "session_id" in request.path_params else path


def _is_plain(path: str) -> bool:
    return _PLAIN_PATH.fullmatch(path) is not None and not any(segment in (".", "..") for segment in path.split("/"))


def _is_of(path: str, entry: str) -> bool:
    return path.startswith(entry[:-1]) if entry.endswith("*") else path == entry


def _served(app: FastAPI) -> list[tuple[re.Pattern[str], frozenset[str]]]:
    """Paths of the gateway's own and their methods, as the page about them says."""
    described = app.openapi()["paths"].items()
    return [(compile_path(path)[0], frozenset(map(str.upper, methods))) for path, methods in described]


def _check_ids(request: Request, body: bytes, *, vocab_size: int) -> None:
    """Raise InvalidRequest for a token id that the model does not have: some engines die of it.

    Engines read more as JSON than the standard has (NaN, lone surrogates, UTF-16), some of them whatever its type: so
    what passes unread is a form or audio by every Content-Type, and not JSON by Python's own reading either.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("Content-Encoding: send the body as it is; what cannot be read is not forwarded")
    kinds = request.headers.getlist("content-type")
    is_named_other = bool(kinds) and all(kind.lower().startswith(_PASSES_UNREAD) for kind in kinds)
    if not body or (is_named_other and not _is_json_to_engines(body)):
        return
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON as RFC 8259 has it: {error}") from error
    for name, value in content.items() if isinstance(content, dict) else (("body", content),):
        if name not in _SCHEMAS and (outside := _outside(value, vocab_size)) is not None:
            raise InvalidRequest(f"{name}: token id {outside:.0f} is outside [0, {vocab_size})")


def _is_json_to_engines(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    except RecursionError:
        return True
    return True


def _outside(value: JsonValue, vocab_size: int) -> float | None:
    """A number of a list, however deep the list is, that is no token id but could be read as one."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict):
            waiting += container.values()
            continue
        for item in container if isinstance(container, list) else ():
            if isinstance(item, dict | list):
                waiting.append(item)
            # A float too: orjson reads integers beyond 64 bits as such, and engines take 7.0 for 7.
            elif isinstance(item, int | float) and item == item // 1 and not 0 <= item < vocab_size:
                return item
    return None


def _request_headers(headers: Iterable[tuple[str, str]]) -> HttpHeaders:
    return [(name, value) for name, value in _end_to_end(headers, _OURS_OF_REQUESTS) if not _SECRET.search(name)]


def _reply_headers(reply: RawReply) -> HttpHeaders:
    headers = _end_to_end(reply.headers, _OURS_OF_REPLIES)
    return [(name, value) for name, value in headers if not name.lower().startswith(_ROUTERS)]


def _end_to_end(headers: Iterable[tuple[str, str]], ours: frozenset[str]) -> list[tuple[str, str]]:
    headers = list(headers)
    named = {
        option.strip().lower() for name, value in headers if name.lower() == "connection" for option in value.split(",")
    }
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP | named | ours]
