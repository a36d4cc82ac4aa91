"""`/v1/chat/completions`, streamed and whole, with or without a session in the path.

The reply is told to be delivered when its last byte has left; a client that goes away earlier leaves a turn that is
sampled on for a grace and recorded as not delivered.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import quote, unquote

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.contracts.errors import Conflict, InvalidRequest, NotFound, Unauthorized, VerbatimError
from gateway.contracts.generation import FinishReason, JsonValue, TokenIds
from gateway.contracts.records import SessionOrigin
from gateway.routes.access import Access, session_of_key
from gateway.routes.bodies import json_reply, path_id, read_body
from gateway.sessions.model import ServedModel
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.turns import Turn, TurnFinished, TurnProgress, TurnRunner, TurnStarted
from gateway.tito.conversation import ContentDelta, ReasoningDelta, ReplyDelta
from gateway.wire.errors import error_body
from gateway.wire.json_text import dump_json
from gateway.wire.openai import (
    ChatRequest,
    Choice,
    ChunkWriter,
    ReplyTokens,
    Usage,
    Wanted,
    completion_body,
    content_delta,
    parse_chat_request,
    reasoning_delta,
    tool_call_delta,
)
from gateway.wire.sse import DONE, event

T = TypeVar("T")

_CLIENT_GONE_STATUS = 499
_ANY_METHOD = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def chat_router(
    runner: TurnRunner, registry: SessionRegistry, access: Access, *, creates_unknown: bool, max_body_bytes: int
) -> APIRouter:
    """The agents' routes; `creates_unknown`: a chat under an id that nobody made makes the session."""
    routes = _ChatRoutes(runner, registry, access, creates_unknown=creates_unknown, max_body_bytes=max_body_bytes)
    router = APIRouter(tags=["agents"])
    for prefix in ("", "/sessions/{session_id}"):
        router.add_api_route(prefix + "/v1/chat/completions", routes.chat, methods=["POST"])
        router.add_api_route(prefix + "/v1/models", routes.models, methods=["GET"])
    router.add_api_route(
        "/sessions/{session_id}/{rest:path}", routes.unknown, methods=_ANY_METHOD, include_in_schema=False
    )
    return router


class _ChatRoutes:
    """The routes' functions."""

    def __init__(
        self,
        runner: TurnRunner,
        registry: SessionRegistry,
        access: Access,
        *,
        creates_unknown: bool,
        max_body_bytes: int,
    ) -> None:
        self._runner = runner
        self._registry = registry
        self._access = access
        self._creates_unknown = creates_unknown
        self._max_body_bytes = max_body_bytes

    async def chat(self, request: Request) -> Response:
        """One chat completion."""
        chat = parse_chat_request(await read_body(request, max_bytes=self._max_body_bytes))
        if chat.stream and chat.num_choices > 1:
            raise InvalidRequest("n: streaming gives one choice; ask for n=1, or without stream")
        session = await self._session(request, chat)
        turns = [self._runner.start(session, _variant(chat, i)) for i in range(chat.num_choices)]
        client = _Client(request)
        try:
            if chat.stream:
                return await self._streamed(client, session, chat, turns[0])
            return await self._whole(client, session, chat, turns)
        except _ClientGone:
            self._abandon(turns)
            return Response(status_code=_CLIENT_GONE_STATUS)
        except asyncio.CancelledError:
            self._abandon(turns)
            raise
        finally:
            client.release()

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        model = self._runner.parts.model
        context = self._runner.parts.pool.context_length or model.context_length
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": "verbatim", "max_model_len": context}
        return json_reply({"object": "list", "data": [entry]})

    async def unknown(self, request: Request) -> Response:
        """Any other path of a session."""
        rest = request.path_params["rest"]
        raise NotFound(f"{request.method} /{rest} is not served under a session; agents call v1/chat/completions")

    async def _whole(self, client: _Client, session: Session, chat: ChatRequest, turns: Sequence[Turn]) -> Response:
        finished = await client.unless_gone(_all(turn.finished() for turn in turns))
        model = self._runner.parts.model
        choices = [_choice(model, turn, chat.wanted) for turn in finished]
        body = completion_body(
            _reply_id(finished[0].record.turn_id),
            chat.model or model.name,
            finished[0].prompt_token_ids,
            choices,
            chat.wanted,
        )

        def delivered() -> None:
            for turn in finished:
                self._runner.delivered(session, turn)

        return _RecordedReply(dump_json(body), _headers(session), delivered)

    async def _streamed(self, client: _Client, session: Session, chat: ChatRequest, turn: Turn) -> Response:
        """Errors before the first token are plain HTTP errors; later ones are an error frame and no [DONE]."""
        events = turn.events()
        started = await client.unless_gone(anext(events))
        first = await client.unless_gone(anext(events))
        model = self._runner.parts.model
        writer = ChunkWriter(_reply_id(turn.turn_id), chat.model or model.name, chat.wanted)

        async def frames() -> AsyncGenerator[bytes, None]:
            sent = False
            try:
                if isinstance(started, TurnStarted):
                    yield event(writer.opening(started.prompt_token_ids))
                item = first
                while True:
                    if isinstance(item, TurnFinished):
                        break
                    if isinstance(item, TurnProgress):
                        for chunk in writer.progress(_deltas(item.deltas), _tokens(model, item, chat.wanted)):
                            yield event(chunk)
                    item = await anext(events)
                for chunk in writer.closing(_choice(model, item, chat.wanted)):
                    yield event(chunk)
                yield DONE
                sent = True
                # At once: who has read [DONE] may finish the session before this response has wound up.
                self._runner.delivered(session, item)
            except VerbatimError as error:
                sent = True
                yield event(error_body(error))
            finally:
                if not sent:
                    self._runner.abandon(turn)

        headers = _headers(session) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _ClosingStream(frames(), headers=headers, media_type="text/event-stream")

    def _abandon(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            self._runner.abandon(turn)

    async def _session(self, request: Request, chat: ChatRequest) -> Session:
        """From the path, the header, the key, or made on the spot."""
        header = request.headers.get("x-session-id")
        session_id = path_id(request) or (unquote(header) if header else None) or session_of_key(request)
        session = await self._registry.find(session_id) if session_id else None
        if session is None:
            session = await self._make(request, chat, session_id)
        self._access.check_agent(request, session.record)
        return session

    async def _make(self, request: Request, chat: ChatRequest, session_id: str | None) -> Session:
        if session_id is not None and not self._creates_unknown:
            raise NotFound(f"no session {session_id!r}; make it with POST /sessions")
        try:
            await self._access.check_operator(request)
        except VerbatimError as error:
            raise Unauthorized("no session has this id or key; make one with POST /sessions") from error
        # A first request with replies that nobody here sampled belongs to a session whose record is gone.
        has_past = any(message["role"] == "assistant" for message in chat.messages)
        session_id = session_id or f"session-{uuid.uuid4().hex}"
        record = new_session(
            session_id,
            key_hash="",  # nobody gets a key: its caller has the operator's, or keys are off
            origin=SessionOrigin.RECREATED if has_past else SessionOrigin.ON_THE_SPOT,
            complete=not has_past,
        )
        try:
            session, _ = await self._registry.create(record)
        except Conflict:  # another call of the same agent was faster
            return await self._registry.get(session_id)
        return session


class _ClientGone(Exception):
    """The connection of a request was closed before its reply."""


class _Client:
    """Notices when the client of a request goes away; `release` before somebody else listens to the connection."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._gone: asyncio.Task[None] | None = None

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`; raises _ClientGone if the client goes first (work is then cancelled)."""
        if self._gone is None:
            self._gone = asyncio.create_task(self._watch())
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise _ClientGone
            return await task
        finally:
            task.cancel()

    def release(self) -> None:
        """Stop listening."""
        if self._gone is not None:
            self._gone.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


class _RecordedReply(Response):
    """A whole reply that runs `delivered` when its last byte has left."""

    def __init__(self, content: bytes, headers: dict[str, str], delivered: Callable[[], None]) -> None:
        super().__init__(content, headers=headers, media_type="application/json")
        self._delivered = delivered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then tell."""
        await super().__call__(scope, receive, send)
        self._delivered()


class _ClosingStream(StreamingResponse):
    """A streamed reply whose frames end with it, also those that nobody asked for any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then close the frames."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*work))


def _variant(chat: ChatRequest, i: int) -> ChatRequest:
    """Choice i of a request; with a seed every choice gets another one, or all would be the same."""
    seed = chat.sampling.get("seed")
    if not i or seed is None:
        return chat
    return replace(chat, sampling={**chat.sampling, "seed": seed + i})


def _deltas(deltas: Sequence[ReplyDelta]) -> list[dict[str, JsonValue]]:
    bodies: list[dict[str, JsonValue]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            bodies.append(content_delta(delta.text))
        elif isinstance(delta, ReasoningDelta):
            bodies.append(reasoning_delta(delta.text))
        else:
            bodies.append(tool_call_delta(delta.index, delta.call_id, delta.name, delta.arguments))
    return bodies


def _choice(model: ServedModel, turn: TurnFinished, wanted: Wanted) -> Choice:
    record = turn.record
    return Choice(
        message=turn.reply.message(),
        finish_reason=_finish_reason(turn),
        tokens=ReplyTokens(
            record.output_token_ids, record.output_logprobs, _texts(model, record.output_token_ids, wanted)
        ),
        experts=turn.experts,
        meta_info=record.meta["engine"],
        usage=Usage(
            prompt_tokens=len(turn.prompt_token_ids),
            completion_tokens=len(record.output_token_ids),
            cached_tokens=record.cached_tokens,
            reasoning_tokens=turn.reply.num_reasoning_tokens,
        ),
    )


def _finish_reason(turn: TurnFinished) -> str:
    if turn.record.finish.reason is not FinishReason.STOP:
        return "length"
    return "tool_calls" if turn.reply.tool_calls else "stop"


def _tokens(model: ServedModel, progress: TurnProgress, wanted: Wanted) -> ReplyTokens:
    return ReplyTokens(progress.token_ids, progress.logprobs, _texts(model, progress.token_ids, wanted))


def _texts(model: ServedModel, token_ids: TokenIds, wanted: Wanted) -> list[str]:
    """What each token alone decodes to, made only for log-probs that were asked for."""
    if not wanted.logprobs:
        return []
    return [model.tokenizer.decode([int(token_id)]) for token_id in np.asarray(token_ids)]


def _reply_id(turn_id: str) -> str:
    return f"chatcmpl-{turn_id}"


def _headers(session: Session) -> dict[str, str]:
    return {"X-Session-ID": quote(session.record.session_id, safe="")}
