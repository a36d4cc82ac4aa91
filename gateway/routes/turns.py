"""Running turns for agents, in whatever dialect: the session, the reply whole or streamed, and when it was delivered.

A reply counts as delivered when its last byte has left; a client that goes away earlier leaves turns that are sampled
on for a grace and recorded as not delivered.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import Response
from msgspec.structs import replace
from starlette.types import Scope

from gateway.contracts.errors import Conflict, EngineUnavailable, NotFound, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import TokenIds, TopLogprob
from gateway.contracts.records import SessionOrigin, SessionRecord, TurnRecord
from gateway.routes.access import Access, session_of_key
from gateway.routes.bodies import (
    PIECE_BYTES,
    Frame,
    FrameReply,
    JsonReply,
    awaited_body,
    body_at_hand,
    checked_id,
    gathered,
    path_id,
    slices,
)
from gateway.routes.exchange import exchange_of, is_there
from gateway.routes.paths import path_in_session
from gateway.routes.quotas import Quotas
from gateway.sessions.idempotency import NO_HINT, CallChoice, RetryHint
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
from gateway.wire.token_texts import MANY_TOKENS, spelling

T = TypeVar("T")

_MANY_SESSIONS = 4096
"""Whose names are kept as replies have them."""

_OF_STREAMS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


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
        self._spelling = lru_cache(MANY_TOKENS)(partial(spelling, runner.parts.model.tokenizer))

    @property
    def model(self) -> ServedModel:
        """The model that is served."""
        return self.runner.parts.model

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that every engine and the tokenizer have."""
        return self.runner.parts.vocab_size

    async def begin(
        self,
        request: Request,
        prompts: Sequence[TurnRequest],
        make_writer: Callable[[str, str], ReplyWriter],
        *,
        session: Session | None = None,
    ) -> Begun:
        """Begin the turns that a request asks for; what it asked for is not kept here while they are sampled.

        prompts: those of one body, which differ in nothing else; choices come in their order. make_writer: (turn id,
        model name) → writer of this reply. session: where the caller has found and checked it already.
        Raises VerbatimError.
        """
        wanted = prompts[0]
        session = session or await self.session(request, wanted)
        ruled = []
        for one in prompts:
            one = self._rules.applied(one, session.record.sampling)
            self.runner.check(one)
            ruled.append(one)
        turns = await self._turns(request, session, ruled)
        writer = make_writer(turns[0].turn_id, wanted.model or self.model.name)
        return Begun(self, request.scope, session, turns, writer, wanted.wanted, streams=wanted.stream)

    async def _turns(self, request: Request, session: Session, prompts: Sequence[TurnRequest]) -> list[Turn]:
        """One for every choice of every prompt; if one of them cannot begin, none goes on."""
        endpoint, retry = path_in_session(request.scope), _retry_hint(request)
        variants = prompts
        if len(prompts) > 1 or prompts[0].num_choices > 1:
            variants = [_variant(one, i) for one in prompts for i in range(one.num_choices)]
        turns: list[Turn] = []
        permit = self._quotas.permit(session.record.session_id, len(variants))
        admit = _freely if permit is None else permit.ask
        try:
            for i, variant in enumerate(variants):
                call = CallChoice(endpoint, variant.digest, i)
                turn = await self.runner.answer(session, variant, call, retry, admit=admit)
                turns.append(turn)
                if permit is not None:
                    permit.settle(turn)
        except (asyncio.CancelledError, VerbatimError):
            self.abandon(session, turns)
            raise
        finally:
            if permit is not None:
                permit.close()
        return turns

    async def receive(self, request: Request, *, max_bytes: int) -> tuple[bytes, Session | None]:
        """The body of a call, read only for a caller who may make one, and the session that it is for: None where that
        is to be made, or was not looked for yet. Raises as `read_body` and `check_caller`."""
        session_id = named_session(request)
        session = self._at_hand(request, session_id)
        if session is None and not self._needs_no_look(request, session_id):
            session = await self._checked_caller(request, session_id)
        body = body_at_hand(request, max_bytes=max_bytes)
        if body is None:
            body = await awaited_body(request, max_bytes=max_bytes)
            if session is not None:  # much may have happened to it since
                session = await self._known(request, session_id)
        return body, session

    async def body(self, request: Request, *, max_bytes: int) -> bytes:
        """As `receive`, for calls that find their session by themselves."""
        body, _ = await self.receive(request, max_bytes=max_bytes)
        return body

    async def check_caller(self, request: Request) -> None:
        """Raise Unauthorized, Forbidden or NotFound unless this caller may use the session that it names, or have a new
        one under that name. A finished session may still be read."""
        await self._checked_caller(request, named_session(request))

    async def _checked_caller(self, request: Request, session_id: str | None) -> Session | None:
        session = await self._known(request, session_id)
        if session is None:
            self._check_new(request, session_id)
        return session

    async def session(self, request: Request, wanted: TurnRequest) -> Session:
        """Of the path, the header, the key, or made on the spot; the caller may use it."""
        session_id = named_session(request)
        # Where nobody needs to look, the session's ledger does, should it be there after all.
        begins = not _replies(wanted) and self._needs_no_look(request, session_id)
        session = None if begins else await self._known(request, session_id)
        return session or await self._make(request, wanted, session_id)

    def _needs_no_look(self, request: Request, session_id: str | None) -> bool:
        """Whether a caller may use the session that it names whether it is there or not, and it is not in memory.

        A look into the ledger costs as much as half a turn, and all agents of a new batch begin at once.
        """
        known = session_id is not None and self._registry.holds(session_id)
        return not known and self._creates_unknown and self._access.opens_all(request)

    async def _known(self, request: Request, session_id: str | None) -> Session | None:
        """The session of this name, where there is one; the caller may use it."""
        if not session_id:
            return None
        if (session := self._at_hand(request, session_id)) is not None:
            return session
        record = await self._registry.record(session_id)
        if record is None:
            return None
        self._access.check_agent(request, record)
        session = await self._registry.find(session_id)
        if session is not None and session.record != record:  # made anew meanwhile
            self._access.check_agent(request, session.record)
        return session

    def _at_hand(self, request: Request, session_id: str | None) -> Session | None:
        """As `_known`, where nobody has to be asked: nearly always."""
        session = self._registry.unchanged(session_id) if session_id else None
        if session is not None:
            self._access.check_agent(request, session.record)
            self._registry.touch(session)
        return session

    async def reader(self, request: Request) -> Session:
        """The session of a call that reads what is recorded; raises Unauthorized, Forbidden, NotFound, and as
        `admit_read`."""
        session_id = named_session(request)
        session = await self._known(request, session_id)
        if session is None:
            self._access.check_newcomer(request, session_id)
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
        session_id = named_session(request)
        session = await self._known(request, session_id)
        if session is not None:
            session.check_open()
        else:
            self._check_new(request, session_id)
        self._quotas.admit_call(session_id or "")
        return session_id or ""

    async def count_prompt_tokens(self, request: Request, wanted: TurnRequest) -> int:
        """Length of the prompt that this call's turn would have."""
        return len(await self.prompt_token_ids(request, wanted))

    async def prompt_token_ids(self, request: Request, wanted: TurnRequest) -> TokenIds:
        """int32[P]: the prompt that this call's turn would have; no session is made for it, and no engine asked."""
        session_id = named_session(request)
        session = await self._known(request, session_id)
        if session is None:
            session = Session(self._new_record(request, wanted, session_id), TurnTree(), None)
        self._quotas.admit_call(session_id or "")
        return await self.runner.prompt_ids(session, self._rules.applied(wanted, session.record.sampling))

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

    def reply_tokens(
        self,
        token_ids: TokenIds,
        logprobs: npt.NDArray[np.float32],
        top_logprobs: Sequence[Sequence[TopLogprob]],
        *,
        with_texts: bool,
    ) -> ReplyTokens:
        """Captured arrays for a writer; what each token alone decodes to is needed for log-probs only."""
        texts = [spelled.text for spelled in map(self._spelling, token_ids.tolist())] if with_texts else []
        return ReplyTokens(token_ids, logprobs, texts, top_logprobs, self._spelling)

    def abandon(self, session: Session, turns: Sequence[Turn]) -> None:
        """Their client has gone."""
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
        gaps = _replies(wanted)
        session_id = session_id or f"session-{uuid.uuid4().hex}"
        return new_session(
            session_id,
            key_hash="",  # nobody gets a key: its caller has the operator's, or keys are off
            origin=SessionOrigin.RECREATED if gaps else SessionOrigin.ON_THE_SPOT,
            gaps=gaps,
        )


def _replies(wanted: TurnRequest) -> tuple[int, ...]:
    """Which of a request's messages are replies to earlier ones."""
    return tuple(i for i, message in enumerate(wanted.messages) if message["role"] == "assistant")


def named_session(request: Request) -> str | None:
    """The session id that a request names: in its path, in X-Session-ID (percent-encoded), or by its key."""
    named = path_id(request)
    if not named:
        header = request.headers.get("x-session-id")
        named = (unquote(header) if header else None) or session_of_key(request)
    return None if named is None else checked_id(named)


class Begun:
    """Turns that answer a call and are under way; `reply` waits for them."""

    __slots__ = ("_calls", "_scope", "_session", "_streams", "_turns", "_wanted", "_writer")

    def __init__(
        self,
        calls: Calls,
        scope: Scope,
        session: Session,
        turns: Sequence[Turn],
        writer: ReplyWriter,
        wanted: Wanted,
        *,
        streams: bool,
    ) -> None:
        self._calls = calls
        self._scope = scope
        self._session = session
        self._turns = turns
        self._writer = writer
        self._wanted = wanted
        self._streams = streams

    async def reply(self) -> Response:
        """Whole, or as far as its head when it is streamed; raises VerbatimError for what goes wrong before that.

        The task that calls is cancelled if the client goes (`Exchange.attend`): the turns then have nobody who waits.
        """
        try:
            exchange = exchange_of(self._scope)
            if exchange is not None:
                exchange.attend()
            if self._streams:
                return await self._streamed()
            turns = self._turns
            finished = [await turns[0].finished()] if len(turns) == 1 else await _all(turn.finished() for turn in turns)
            return self._whole(finished)
        except (asyncio.CancelledError, VerbatimError):  # one of several turns failed: nobody gets the others' replies
            self._abandon()
            raise

    def _whole(self, finished: Sequence[TurnFinished]) -> Response:
        body = self._writer.whole(list(map(self._choice, finished)))

        def delivered() -> None:
            for turn in finished:
                self._calls.runner.delivered(self._session, turn)

        headers = (_session_header(self._session.record.session_id),)
        return JsonReply(json_text(body), headers, delivered, self._abandon)

    async def _streamed(self) -> Response:
        """Errors before the first token are plain HTTP errors; later ones are the dialect's error frame and no end."""
        events = _merged(self._turns)
        try:
            first = [await anext(events) for _ in range(2)]
        except StopAsyncIteration as error:
            raise EngineUnavailable("the turn ended before it began") from error
        headers = (_session_header(self._session.record.session_id), *_OF_STREAMS)
        return FrameReply(self._frames(first, events), headers, self._abandon)

    async def _frames(
        self, first: Sequence[_Indexed], events: AsyncGenerator[_Indexed, None]
    ) -> AsyncGenerator[Frame, None]:
        """What to send of each event. first: those that were taken already."""
        finished: dict[int, TurnFinished] = {}
        closing: Iterable[bytes] = ()
        delivered = False
        try:
            is_all = sum(isinstance(event, TurnFinished) for _, event in first) == len(self._turns)
            opening = first[:-1] if is_all else first
            for piece in gathered(piece for known in opening for piece in self._pieces(*known, finished)):
                yield Frame(piece)
            if is_all:
                closing = self._pieces(*first[-1], finished)
            async for index, event in events:
                pieces = self._pieces(index, event, finished)
                if len(finished) == len(self._turns):
                    closing = pieces  # nothing comes behind it but the end
                    continue
                for piece in pieces:
                    yield Frame(piece)
            end = self._writer.end([self._choice(finished[i]) for i in sorted(finished)])
            last = b""
            for piece in gathered(itertools.chain(closing, end)):
                if last:
                    yield Frame(last)
                last = piece
            if is_there(self._scope):
                yield Frame(last, is_last=True)
                delivered = True
            for item in finished.values() if delivered else ():
                # At once: who has read the end may finish the session before this response has wound up.
                self._calls.runner.delivered(self._session, item)
        except VerbatimError as error:
            for piece in self._writer.failure(error):
                yield Frame(piece)
        finally:
            await events.aclose()
            if not delivered:
                self._abandon()

    def _pieces(self, index: int, event: TurnEvent, finished: dict[int, TurnFinished]) -> Iterable[bytes]:
        if isinstance(event, TurnProgress):
            tokens = self._calls.reply_tokens(
                event.token_ids, event.logprobs, event.top_logprobs, with_texts=self._wanted.logprobs
            )
            text = b"".join(self._writer.progress(index, event.deltas, tokens))
            return (text,) if len(text) <= PIECE_BYTES else slices(text)
        if isinstance(event, TurnStarted):
            return itertools.chain.from_iterable(map(slices, self._writer.opening(index, event.prompt_token_ids)))
        finished[index] = event
        return itertools.chain.from_iterable(map(slices, self._writer.closing(index, self._choice(event))))

    def _choice(self, turn: TurnFinished) -> FinishedChoice:
        return self._calls.choice(turn.record, turn.whole, turn.experts, with_texts=self._wanted.logprobs)

    def _abandon(self) -> None:
        self._calls.abandon(self._session, self._turns)


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


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*work))


def _variant(wanted: TurnRequest, i: int) -> TurnRequest:
    """Choice i of a request; with a seed every choice gets another one, or all would be the same."""
    seed = wanted.sampling.get("seed")
    if not i or seed is None:
        return wanted
    return replace(wanted, sampling={**wanted.sampling, "seed": seed + i})


def _freely() -> None:
    """A turn may begin."""


def _retry_hint(request: Request) -> RetryHint:
    key, count = request.headers.get("idempotency-key"), request.headers.get("x-stainless-retry-count", "0")
    says_retry = count != "0" and count.isascii() and count.isdigit() and count.strip("0") != ""
    return RetryHint(key or None, says_retry=says_retry) if key or says_retry else NO_HINT


@lru_cache(_MANY_SESSIONS)
def _session_header(session_id: str) -> tuple[bytes, bytes]:
    """Of every reply."""
    return b"x-session-id", quote(session_id, safe="").encode()
