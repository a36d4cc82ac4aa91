"""`/v1/responses`: create, read again, delete; with or without a session in the path.

A response is a recorded turn under another name, `resp_<turn id>`. It is found in the session that the request names,
or where it names none in any session in memory. Deleting hides a response from its agents until the gateway is started
again; the ledger keeps the turn (I3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gateway.contracts.errors import InvalidRequest, NotFound, UnknownPrevious
from gateway.contracts.generation import JsonValue
from gateway.routes import openapi
from gateway.routes.access import Access
from gateway.routes.bodies import json_reply, path_id
from gateway.routes.hot_path import ModelRoute
from gateway.routes.turns import Calls, named_session
from gateway.sessions.recorded import recorded_reply
from gateway.sessions.registry import Session, SessionRegistry
from gateway.sessions.tree import Node, TurnTree
from gateway.wire.request import Wanted
from gateway.wire.responses import LOGPROBS, parse_responses_request, turn_id_of
from gateway.wire.responses_reply import Asked, ResponsesWriter


def responses_router(calls: Calls, registry: SessionRegistry, access: Access, *, max_body_bytes: int) -> APIRouter:
    """The agents' routes for responses."""
    routes = _ResponsesRoutes(calls, registry, access, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("/v1/responses", "/sessions/{session_id}/v1/responses"):
        router.add_api_route(
            prefix,
            routes.create,
            methods=["POST"],
            openapi_extra=openapi.RESPONSES,
            route_class_override=ModelRoute,
        )
        router.add_api_route(
            prefix + "/{response_id}", routes.read, methods=["GET"], openapi_extra=openapi.READ_RESPONSE
        )
        router.add_api_route(
            prefix + "/{response_id}", routes.delete, methods=["DELETE"], openapi_extra=openapi.DELETE_RESPONSE
        )
    return router


class _Found(NamedTuple):
    """A stored response: its turn, in its session."""

    session: Session
    node: Node


class _ResponsesRoutes:
    """The routes' functions."""

    def __init__(self, calls: Calls, registry: SessionRegistry, access: Access, *, max_body_bytes: int) -> None:
        self._calls = calls
        self._registry = registry
        self._access = access
        self._max_body_bytes = max_body_bytes
        self._deleted: set[str] = set()

    async def create(self, request: Request) -> Response:
        """One response; what it continues is read from the session's record."""
        body, session = await self._calls.receive(request, max_bytes=self._max_body_bytes)
        wanted, history = parse_responses_request(body), list[JsonValue]()
        if wanted.previous_turn_id is not None:
            found = await self._find(request, wanted.previous_turn_id)
            if found is None:
                raise UnknownPrevious(f"Previous response with id 'resp_{wanted.previous_turn_id}' not found.")
            session, history = found.session, _conversation(found.node)
        turn = wanted.turn(history)
        make_writer = partial(ResponsesWriter, Asked.by(turn, wanted.instructions))
        return await (await self._calls.begin(request, [turn], make_writer, session=session)).reply()

    async def read(self, request: Request) -> Response:
        """A recorded response once more, whole."""
        if request.query_params.get("stream") == "true":
            raise InvalidRequest("stream: a recorded response is read whole")
        found = await self._recorded(request)
        return json_reply(self._body(found.node))

    async def delete(self, request: Request) -> Response:
        """Agents see it no more."""
        found = await self._recorded(request)
        self._deleted.add(found.node.record.turn_id)
        return json_reply({"id": path_id(request, "response_id"), "object": "response", "deleted": True})

    async def _recorded(self, request: Request) -> _Found:
        await self._calls.check_caller(request)
        response_id = path_id(request, "response_id") or ""
        found = await self._find(request, turn_id_of(response_id))
        if found is None:
            raise NotFound(f"Response with id '{response_id}' not found.")
        self._calls.admit_read(found.session)
        return found

    async def _find(self, request: Request, turn_id: str) -> _Found | None:
        """A stored response's turn and its session, which the caller may use; None for none."""
        name = named_session(request)
        named = await self._registry.find(name) if name else None
        sessions = self._registry.loaded if name is None else [] if named is None else [named]
        for session in sessions:
            node = _node(session.tree, turn_id)
            if node is not None:
                self._access.check_agent(request, session.record)
                return _Found(session, node) if _is_stored(node) and turn_id not in self._deleted else None
        return None

    def _body(self, node: Node) -> JsonValue:
        record, fields = node.record, _kept(node).get("fields", {})
        wanted = Wanted(
            token_ids=False, routed_experts=False, logprobs=LOGPROBS in fields.get("include", ()), usage_chunk=False
        )
        asked = Asked(_instructions(node), fields, node.root.tools, wanted)
        writer = ResponsesWriter(asked, record.turn_id, record.model, created_at=record.created_at)
        body = writer.whole([self._calls.choice(record, recorded_reply(node), None, with_texts=wanted.logprobs)])
        if (code := record.meta.get("error")) is not None:
            body |= {"status": "failed", "error": {"code": "server_error", "message": f"the turn broke off: {code}"}}
        return body


def _node(tree: TurnTree, turn_id: str) -> Node | None:
    try:
        return tree[turn_id]
    except KeyError:
        return None


def _kept(node: Node) -> Mapping[str, JsonValue]:
    """What this dialect kept of the request; a turn of another dialect has nothing of it."""
    kept: Mapping[str, JsonValue] = node.record.meta.get("request", {})
    return kept


def _is_stored(node: Node) -> bool:
    return _kept(node).get("fields", {}).get("store") is not False


def _instructions(node: Node) -> str | None:
    return node.messages()[0]["content"] if _kept(node).get("has_instructions") else None


def _conversation(node: Node) -> list[JsonValue]:
    """Messages up to a turn's reply, without the instructions, which were for that call only."""
    return node.messages()[1 if _kept(node).get("has_instructions") else 0 :]
