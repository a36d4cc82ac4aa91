"""Running turns for agents, in whatever dialect: the session, the reply whole or streamed, and when it was delivered.

A reply counts as delivered when its last byte has left; a client that goes away earlier leaves turns that are sampled
on for a grace and recorded as not delivered.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.contracts.errors import Conflict, EngineUnavailable, NotFound, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import TokenIds, TopLogprob
from gateway.contracts.records import SessionOrigin, SessionRecord, TurnRecord
from gateway.routes.access import Access, session_of_key
from gateway.routes.bodies import JsonReply, checked_id, path_id, read_body, slices
from gateway.routes.connections import client_is_gone
from gateway.routes.quotas import Quotas
from gateway.sessions.idempotency import CallChoice, RetryHint
from gateway.sessions.media import num_prompt_tokens
from gateway.sessions.model import ServedModel
from gateway.sessions.recorded import WholeReply
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.tree import TurnTree
from gateway.sessions.turn import Turn, TurnEvent, TurnFinished, TurnProgress, TurnStarted
from gateway.sessions.turns import TurnRunner
from gateway.wire.json_text import json_text
from gateway.wire.protection import FieldRules
from gateway.wire.reply import FinishedChoice, ReplyTokens, ReplyWriter, Usage
from gateway.wire.request import TurnRequest, Wanted
from gateway.wire.token_texts import Spelling, spelling

T = TypeVar("T")

_CLIENT_GONE_STATUS = 499


class Calls:
    """Runs the calls of agents; `creates_unknown`: a call under an id that nobody made makes the session."""

    def __init__(
        self,
        runner: TurnRunner,
        registry: SessionRegistry,
        access: Access,
        *,
        creates_unknown: bool,
        rules: FieldRules,
        quotas: Quotas,
    ) -> None:
        self.runner = runner
        self._quotas = quotas
        self._rules = rules
        self._registry = registry
        self._access = access
        self._creates_unknown = creates_unknown

    @property
    def model(self) -> ServedModel:
        """The model that is served."""
        return self.runner.parts.model

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that every engine and the tokenizer have."""
        return self.runner.parts.vocab_size

    async def answer(
        self,
        request: Request,
        wanted: TurnRequest,
        make_writer: Callable[[str, str], ReplyWriter],
        *,
        session: Session | None = None,
    ) -> Response:
        """Run the turns that a request asks for. make_writer: (turn id, model name) → writer of this reply.

        session: where the caller has found and checked it already.
        Raises VerbatimError for what goes wrong before the first token.
        """
        return await self.answer_all(request, [wanted], make_writer, session=session)

    async def answer_all(
        self,
        request: Request,
        prompts: Sequence[TurnRequest],
        make_writer: Callable[[str, str], ReplyWriter],
        *,
        session: Session | None = None,
    ) -> Response:
        """As `answer`, for several prompts in one body, which differ in nothing else; choices in order of prompts."""
        wanted = prompts[0]
        session = session or await self.session(request, wanted)
        prompts = [self._rules.applied(one, session.record.sampling) for one in prompts]
        for one in prompts:
            self.runner.check(one)
        turns = await self._turns(request, session, prompts)
        writer = make_writer(turns[0].turn_id, wanted.model or self.model.name)
        client = _Client(request)
        try:
            if wanted.stream:
                return await self._streamed(client, session, wanted.wanted, turns, writer)
            return await self._whole(client, session, wanted.wanted, turns, writer)
        except _ClientGone:
            self._abandon(session, turns)
            return Response(status_code=_CLIENT_GONE_STATUS)
        except (asyncio.CancelledError, VerbatimError):  # one of several turns failed: nobody gets the others' replies
            self._abandon(session, turns)
            raise
        finally:
            client.release()

    async def _turns(self, request: Request, session: Session, prompts: Sequence[TurnRequest]) -> list[Turn]:
        """One for every choice of every prompt; if one of them cannot begin, none goes on."""
        endpoint, retry = _endpoint(request), _retry_hint(request)
        variants = [_variant(one, i) for one in prompts for i in range(one.num_choices)]
        turns: list[Turn] = []
        permit = self._quotas.permit(session.record.session_id, len(variants))
        try:
            for i, variant in enumerate(variants):
                call = CallChoice(endpoint, variant.digest, i)
                turns.append(await self.runner.answer(session, variant, call, retry, admit=permit.ask))
                permit.settle(turns[-1])
        except (asyncio.CancelledError, VerbatimError):
            self._abandon(session, turns)
            raise
        finally:
            permit.close()
        return turns

    async def body(self, request: Request, *, max_bytes: int) -> bytes:
        """The body of a call, read only for a caller who may make one; raises as `read_body` and `check_caller`."""
        await self.check_caller(request)
        return await read_body(request, max_bytes=max_bytes)

    async def check_caller(self, request: Request) -> None:
        """Raise Unauthorized, Forbidden or NotFound unless this caller may use the session that it names, or have a new
        one under that name. A finished session may still be read."""
        if await self.known_session(request) is None:
            self._check_new(request, named_session(request))

    async def session(self, request: Request, wanted: TurnRequest) -> Session:
        """Of the path, the header, the key, or made on the spot; the caller may use it."""
        return await self.known_session(request) or await self._make(request, wanted, named_session(request))

    async def known_session(self, request: Request) -> Session | None:
        """The session that a request names, where there is one; the caller may use it."""
        session_id = named_session(request)
        record = await self._registry.record(session_id) if session_id else None
        if record is None or session_id is None:
            return None
        self._access.check_agent(request, record)
        session = await self._registry.find(session_id)
        if session is not None and session.record != record:  # made anew meanwhile
            self._access.check_agent(request, session.record)
        return session

    async def reader(self, request: Request) -> Session:
        """The session of a call that reads what is recorded; raises Unauthorized, Forbidden, NotFound, and as
        `admit_read`."""
        session = await self.known_session(request)
        if session is None:
            self._access.check_newcomer(request, named_session(request))
            raise NotFound("no session has this id or key")
        self.admit_read(session)
        return session

    def admit_read(self, session: Session) -> None:
        """Count a call that reads what is recorded; raises TooManyRequests."""
        self._quotas.admit_call(session.record.session_id)

    async def caller(self, request: Request) -> str:
        """The id of the session that a call without a turn belongs to, "" for none; none is made for it.

        Raises SessionSealed for a finished session, Unauthorized, Forbidden or NotFound as a turn would.
        """
        session = await self.known_session(request)
        if session is not None:
            session.check_open()
        else:
            self._check_new(request, named_session(request))
        session_id = session.record.session_id if session is not None else named_session(request)
        self._quotas.admit_call(session_id or "")
        return session_id or ""

    async def count_prompt_tokens(self, request: Request, wanted: TurnRequest) -> int:
        """Length of the prompt that this call's turn would have."""
        return len(await self.prompt_token_ids(request, wanted))

    async def prompt_token_ids(self, request: Request, wanted: TurnRequest) -> TokenIds:
        """int32[P]: the prompt that this call's turn would have; no session is made for it, and no engine asked."""
        session = await self.known_session(request)
        if session is None:
            session = Session(self._new_record(request, wanted, named_session(request)), TurnTree(), None)
        self._quotas.admit_call(named_session(request) or "")
        return await self.runner.prompt_ids(session, self._rules.applied(wanted, session.record.sampling))

    async def _whole(
        self, client: _Client, session: Session, wanted: Wanted, turns: Sequence[Turn], writer: ReplyWriter
    ) -> Response:
        finished = await client.unless_gone(_all(turn.finished() for turn in turns))
        body = writer.whole([self._choice(turn, wanted) for turn in finished])

        def delivered() -> None:
            for turn in finished:
                self.runner.delivered(session, turn)

        return JsonReply(json_text(body), _headers(session), delivered, partial(self._abandon, session, turns))

    async def _streamed(
        self, client: _Client, session: Session, wanted: Wanted, turns: Sequence[Turn], writer: ReplyWriter
    ) -> Response:
        """Errors before the first token are plain HTTP errors; later ones are the dialect's error frame and no end."""
        events = _merged(turns)
        first = [await client.unless_gone(anext(events)) for _ in range(2)]

        async def frames() -> AsyncGenerator[bytes, None]:
            finished: dict[int, TurnFinished] = {}
            delivered = False
            try:
                async with _resumed(first, events) as items:
                    async for index, item in items:
                        if isinstance(item, TurnFinished):
                            finished[index] = item
                        for frame in self._frames(writer, index, item, wanted):
                            for piece in slices(frame):
                                yield piece
                for frame in writer.end([self._choice(finished[i], wanted) for i in sorted(finished)]):
                    for piece in slices(frame):
                        yield piece
                delivered = not client.is_gone
                for item in finished.values() if delivered else ():
                    # At once: who has read the end may finish the session before this response has wound up.
                    self.runner.delivered(session, item)
            except VerbatimError as error:
                for frame in writer.failure(error):
                    yield frame
            finally:
                if not delivered:
                    self._abandon(session, turns)

        headers = _headers(session) | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _ClosingStream(frames(), headers=headers, media_type="text/event-stream")

    def _frames(self, writer: ReplyWriter, index: int, item: TurnEvent, wanted: Wanted) -> Iterable[bytes]:
        if isinstance(item, TurnStarted):
            return writer.opening(index, item.prompt_token_ids)
        if isinstance(item, TurnProgress):
            tokens = self.reply_tokens(item.token_ids, item.logprobs, item.top_logprobs, with_texts=wanted.logprobs)
            return writer.progress(index, item.deltas, tokens)
        return writer.closing(index, self._choice(item, wanted))

    def choice(
        self, record: TurnRecord, whole: WholeReply, experts: RoutedExperts | None, *, with_texts: bool
    ) -> FinishedChoice:
        """A whole reply, for a writer. with_texts: what each token alone decodes to, needed for log-probs only."""
        return FinishedChoice(
            reply=whole.reply,
            finish=record.finish,
            prompt_token_ids=whole.prompt_token_ids,
            tokens=self.reply_tokens(whole.token_ids, whole.logprobs, whole.top_logprobs, with_texts=with_texts),
            experts=experts,
            meta_info=record.meta["engine"],
            reply_fields=record.meta["engine_reply"],
            usage=Usage(
                prompt_tokens=num_prompt_tokens(record, len(whole.prompt_token_ids)),
                completion_tokens=len(whole.token_ids),
                cached_tokens=record.cached_tokens,
                reasoning_tokens=whole.reply.num_reasoning_tokens,
            ),
            version_spans=whole.version_spans,
        )

    def _choice(self, turn: TurnFinished, wanted: Wanted) -> FinishedChoice:
        return self.choice(turn.record, turn.whole, turn.experts, with_texts=wanted.logprobs)

    def reply_tokens(
        self,
        token_ids: TokenIds,
        logprobs: npt.NDArray[np.float32],
        top_logprobs: Sequence[Sequence[TopLogprob]],
        *,
        with_texts: bool,
    ) -> ReplyTokens:
        """Captured arrays for a writer; what each token alone decodes to is needed for log-probs only."""
        texts = [self._spelling(token_id).text for token_id in token_ids.tolist()] if with_texts else []
        return ReplyTokens(token_ids, logprobs, texts, top_logprobs, self._spelling)

    def _spelling(self, token_id: int) -> Spelling:
        return spelling(self.model.tokenizer, token_id)

    def _abandon(self, session: Session, turns: Sequence[Turn]) -> None:
        for turn in turns:
            self.runner.abandon(session, turn)

    async def _make(self, request: Request, wanted: TurnRequest, session_id: str | None) -> Session:
        record = self._new_record(request, wanted, session_id)
        try:
            session, _ = await self._registry.create(record)
        except Conflict:  # another call of the same agent was faster
            session = await self._registry.get(record.session_id)
        self._access.check_agent(request, session.record)
        return session

    def _check_new(self, request: Request, session_id: str | None) -> None:
        """Raise unless this caller may have a session that nobody made."""
        self._access.check_newcomer(request, session_id)
        if session_id is not None and not self._creates_unknown:
            raise NotFound(f"no session {session_id!r}; make it with POST /sessions")

    def _new_record(self, request: Request, wanted: TurnRequest, session_id: str | None) -> SessionRecord:
        """Of a session that nobody made, if this caller may have one."""
        self._check_new(request, session_id)
        # A first request with replies that nobody here sampled belongs to a session whose record is gone.
        gaps = tuple(i for i, message in enumerate(wanted.messages) if message["role"] == "assistant")
        session_id = session_id or f"session-{uuid.uuid4().hex}"
        return new_session(
            session_id,
            key_hash="",  # nobody gets a key: its caller has the operator's, or keys are off
            origin=SessionOrigin.RECREATED if gaps else SessionOrigin.ON_THE_SPOT,
            gaps=gaps,
        )


def named_session(request: Request) -> str | None:
    """The session id that a request names: in its path, in X-Session-ID (percent-encoded), or by its key."""
    header = request.headers.get("x-session-id")
    named = path_id(request) or (unquote(header) if header else None) or session_of_key(request)
    return None if named is None else checked_id(named)


class _Indexed(NamedTuple):
    """An event of one choice of a reply."""

    choice: int
    event: TurnEvent


async def _merged(turns: Sequence[Turn]) -> AsyncGenerator[_Indexed, None]:
    """Events of all turns as they come; raises what ended one of them."""
    if len(turns) == 1:
        async for event in turns[0].events():
            yield _Indexed(0, event)
        return
    queue: asyncio.Queue[_Indexed | VerbatimError | None] = asyncio.Queue()

    async def follow(index: int, turn: Turn) -> None:
        try:
            async for event in turn.events():
                queue.put_nowait(_Indexed(index, event))
        except VerbatimError as error:
            queue.put_nowait(error)
        finally:
            queue.put_nowait(None)

    followers = [asyncio.create_task(follow(i, turn)) for i, turn in enumerate(turns)]
    try:
        for _ in turns:
            while (item := await queue.get()) is not None:
                if isinstance(item, VerbatimError):
                    raise item
                yield item
    finally:
        for follower in followers:
            follower.cancel()


@asynccontextmanager
async def _resumed(
    first: Sequence[_Indexed], events: AsyncGenerator[_Indexed, None]
) -> AsyncIterator[AsyncIterator[_Indexed]]:
    """Events that were taken already, then the others; closed at the end."""

    async def items() -> AsyncIterator[_Indexed]:
        for item in first:
            yield item
        async for item in events:
            yield item

    try:
        yield items()
    finally:
        await events.aclose()


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
        except StopAsyncIteration as error:
            raise EngineUnavailable("the turn ended before it began") from error
        finally:
            task.cancel()

    @property
    def is_gone(self) -> bool:
        """Whether the connection is closed: what was sent last may not have left."""
        return client_is_gone(self._request.scope)

    def release(self) -> None:
        """Stop listening."""
        if self._gone is not None:
            self._gone.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


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


def _variant(wanted: TurnRequest, i: int) -> TurnRequest:
    """Choice i of a request; with a seed every choice gets another one, or all would be the same."""
    seed = wanted.sampling.get("seed")
    if not i or seed is None:
        return wanted
    return replace(wanted, sampling={**wanted.sampling, "seed": seed + i})


def _endpoint(request: Request) -> str:
    """The path of a call without its session."""
    path = request.url.path
    return path if path_id(request) is None else "/" + path.split("/", 3)[3]


def _retry_hint(request: Request) -> RetryHint:
    count = request.headers.get("x-stainless-retry-count", "0")
    says_retry = count.isascii() and count.isdigit() and count.strip("0") != ""
    return RetryHint(request.headers.get("idempotency-key") or None, says_retry=says_retry)


def _headers(session: Session) -> dict[str, str]:
    return {"X-Session-ID": quote(session.record.session_id, safe="")}
