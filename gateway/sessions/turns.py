"""One model call from request to record: attach → prompt → sample → record → reply.

`run_turn` reads as the algorithm and is the only place that knows the whole way. A turn runs in a task of its own
(`TurnRunner.answer`), so that a client that goes away takes nothing with it: what was sampled is recorded all the same,
and the same request joins it, gets its reply, or goes on from what it has (`sessions.idempotency`).
A turn is durable before its caller learns that it is finished (I4).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from urllib.parse import quote

import numpy as np
from msgspec import Struct, structs

from gateway.contracts.errors import (
    ConfigurationError,
    ContextOverflow,
    EngineError,
    EngineTimeout,
    EngineUnavailable,
    IntegrityError,
    LedgerError,
    RequestError,
    SessionSealed,
    TurnIndexTaken,
    VerbatimError,
)
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.fresh_ids import fresh_hex
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    JsonValue,
    LogprobKind,
    Media,
    SamplingParams,
    TokenIds,
    WrittenIds,
    kind_under,
)
from gateway.contracts.media import RAW_MEDIA, PlacedMedia, placed_media
from gateway.contracts.ports import Ledger
from gateway.contracts.records import (
    Attachment,
    RootContext,
    SegmentReason,
    SessionRecord,
    TurnRecord,
    recorded_top_logprobs,
)
from gateway.contracts.replies import ParsedReply
from gateway.replicas.continuation import Continuation, Generated
from gateway.replicas.pool import ReplicaPool
from gateway.sessions.attach import RAW, Place, attach, restore_reasoning
from gateway.sessions.deadlines import Deadlines
from gateway.sessions.idempotency import NO_HINT, CallChoice, RetryHint, can_go_on, is_whole
from gateway.sessions.media import UNTRAINABLE, check_placeholders, keep_media, load_media, shown_media
from gateway.sessions.model import ServedModel
from gateway.sessions.raw import FIELDS_WITH_IDS, attach_raw, check_ids, check_sampling_ids
from gateway.sessions.recent import RecentBudget
from gateway.sessions.recorded import WholeReply, joined_rows, recorded_reply, recorded_rows
from gateway.sessions.registry import Session
from gateway.sessions.siblings import ALONE, Siblings
from gateway.sessions.tree import NO_ROWS, Node
from gateway.sessions.turn import Turn, TurnFinished, TurnProgress, TurnStarted, TurnTimes
from gateway.sessions.upkeep import PromptUpkeep
from gateway.tito.conversation import BuiltPrompt, Conversation, ParentTurn
from gateway.tito.forced_calls import forced_calls
from gateway.wire.errors import agents_error
from gateway.wire.json_text import dump_json
from gateway.wire.request import RawPrompt, TurnRequest
from gateway.wire.sampling import DEFAULT_LENGTH, sampling_fields, sampling_params

_log = logging.getLogger(__name__)

_NOTICE_SECONDS = 0.02
"""Within which the end of a connection has been noticed."""

_USUAL_NOTE_SECONDS = 0.25
"""Within which a delivery is noted by another gateway, as a rule."""

_NOTE_PAUSES_SECONDS = (0.1, 0.5, 2.0, 5.0, 10.0)
"""Between tries to note a delivery, while the ledger cannot be written."""


_means_itself = re.compile(r"[A-Za-z0-9_.~-]*").fullmatch
"""Of a text in which `quote` would change nothing."""

_FEW_TOKENS = 128
"""Which Python has looked at before numpy begins."""

_engine_id = attrgetter("engine_id")

_NO_TOKENS: TokenIds = np.zeros(0, dtype=np.int32)
_NO_LOGPROBS = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """default_max_new_tokens: where neither request nor session says and no context length is known.

    disconnect_grace_seconds: how long a turn goes on whose client has gone. timeout_seconds: of sampling, waiting for
    engines included. inline_prompt_bytes: where more has to be read to build a prompt, a thread does it, off the event
    loop. recent_bytes: of what is kept of sessions' latest calls, all together, so that the next ones cost what they
    add. media_urls: whether engines may be sent the http(s) URLs of images that agents name, which they then fetch.
    stream_interval: tokens that an engine tells together, behind the first, while an agent streams their reply (0: as
    the engine likes).
    """

    default_max_new_tokens: int = 4096
    disconnect_grace_seconds: float = 10.0
    timeout_seconds: float = 3600.0
    inline_prompt_bytes: int = 65_536
    recent_bytes: int = 128 * 2**20
    media_urls: bool = True
    stream_interval: int = 8

    def __post_init__(self) -> None:
        if self.stream_interval < 0:
            raise ConfigurationError("turns.stream_interval must not be negative")


@dataclass(frozen=True, slots=True, eq=False)
class TurnParts:
    """What every turn needs, wired once. `observe` hears of every recorded turn. `admit` is given the number of turns
    under way and raises where there is no room to record another (LedgerFull). `note_late` hears of sessions whose
    rollout was frozen anew, with a turn that was recorded after their finish. `siblings` hear of all that is
    written."""

    model: ServedModel
    pool: ReplicaPool
    ledger: Ledger
    settings: TurnSettings
    observe: Callable[[TurnFinished, Generated, TurnTimes], None]
    admit: Callable[[int], None] = lambda num_running: None
    note_late: Callable[[SessionRecord], None] = lambda session: None
    siblings: Siblings = ALONE

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that every engine and the tokenizer have."""
        return self.pool.vocab_size or self.model.tokenizer.vocab_size

    @property
    def context_length(self) -> int:
        """In tokens, of the model and of every engine; 0 if nobody says."""
        engines, model = self.pool.context_length, self.model.context_length
        return min(engines, model) if engines and model else engines or model


class _Prompt(Struct, frozen=True, eq=False):
    """A built prompt with its place; `token_ids` is all of it. `messages`: as the template was given them, recorded
    reasoning restored; for a raw prompt one that stands for what it adds. media: of all of it, in order. begun: the
    reply as far as another turn sampled it before it broke off. extends: the turn whose recorded ids it begins with.
    written: `token_ids`, where the session keeps them so."""

    place: Place
    root: RootContext
    messages: tuple[JsonValue, ...]
    built: BuiltPrompt
    token_ids: TokenIds
    extends: Node | None
    media: tuple[PlacedMedia, ...] = ()
    begun: WholeReply | None = None
    written: WrittenIds | None = None

    @property
    def is_provable(self) -> bool:
        """Whether what the engine read are these ids: not where it had media to read, here or in recorded turns."""
        return not self.media and (self.extends is None or self.extends.record.untrainable_reason != UNTRAINABLE)


class _Sampled(Struct, frozen=True, eq=False):
    """`reply`: of all tokens, also of those that an earlier turn sampled."""

    generated: Generated
    reply: ParsedReply
    failure: VerbatimError | None


async def run_turn(
    parts: TurnParts,
    session: Session,
    request: TurnRequest,
    turn: Turn,
    deadlines: Deadlines,
    budget: RecentBudget,
    *,
    begun: Node | None = None,
) -> TurnFinished:
    """One call; events go to `turn`, the record to the ledger. begun: the turn with whose broken reply it goes on.

    Raises VerbatimError; what was sampled before is in the ledger.
    """
    prompt = await _build_prompt(parts, session, request) if begun is None else _begun_prompt(session, begun)
    sampling = _sampling(parts, session, request, prompt)
    if prompt.built.hidden_messages:
        _log.warning(
            "session %s: the chat template does not show the model messages %s",
            session.record.session_id,
            list(prompt.built.hidden_messages),
        )
    is_kept = request.prompt is None and begun is None
    if is_kept and (written := session.recent.write(prompt.extends, prompt.built.token_ids, prompt.token_ids)):
        prompt = structs.replace(prompt, written=written)
        budget.note(session.recent)  # before it waits for the engine, as thousands may
    turn.emit(TurnStarted(prompt.token_ids))
    sampled = await _sample(parts, session, request, prompt, sampling, turn, deadlines)
    record = _record(parts, session, request, prompt, sampling, sampled, turn)
    if request.has_media:
        await keep_media(parts.ledger, session.record.session_id, record.added_messages, request.blobs)
    record = await _append(parts, session, record, sampled.generated.experts)  # I4
    node = session.tree.add(record)
    if is_kept:
        session.recent.keep(node, prompt.token_ids)
    finished = await _finished(parts, prompt, sampled, record)
    parts.observe(finished, sampled.generated, turn.times())
    if sampled.failure is not None:
        raise sampled.failure
    return finished


async def give_again(parts: TurnParts, node: Node, turn: Turn) -> TurnFinished:
    """The reply of a recorded turn, as if it had just been sampled; raises LedgerCorrupt."""
    recorded, rows = recorded_reply(node), await recorded_rows(parts.ledger, node)
    turn.emit(TurnStarted(recorded.prompt_token_ids))
    turn.emit(TurnProgress(recorded.token_ids, recorded.logprobs, recorded.reply.deltas(), recorded.top_logprobs))
    return TurnFinished(node.record, recorded, rows)


class TurnRunner:
    """Starts turns, owns their tasks and waits for them at the end."""

    def __init__(self, parts: TurnParts) -> None:
        self.parts = parts
        self._turns: dict[Turn, asyncio.Task[TurnFinished]] = {}
        self._deliveries: set[asyncio.Future[None]] = set()
        self._deadlines = Deadlines(parts.settings.timeout_seconds)
        self._recent = RecentBudget(parts.settings.recent_bytes)
        self._upkeep = PromptUpkeep(parts.model.prompts)

    def prepare(self) -> None:
        """Have the shapes of ordinary turns certified in the background."""
        self._upkeep.prepare()

    @property
    def num_running(self) -> int:
        """Turns under way."""
        return len(self._turns)

    def check(self, request: TurnRequest) -> None:
        """Raise InvalidRequest for ids that the model does not have, before any turn of the same call begins."""
        if not FIELDS_WITH_IDS.isdisjoint(request.sampling):
            check_sampling_ids(request.sampling, vocab_size=self.parts.vocab_size)
        if request.prompt is not None and request.prompt.token_ids is not None:
            check_ids(request.prompt.token_ids, vocab_size=self.parts.vocab_size)

    async def prompt_ids(self, session: Session, request: TurnRequest) -> TokenIds:
        """int32[P]: the prompt that a turn of this request would have, recorded ids included; none is begun."""
        return (await _build_prompt(self.parts, session, request)).token_ids

    async def answer(
        self,
        session: Session,
        request: TurnRequest,
        call: CallChoice,
        retry: RetryHint = NO_HINT,
        *,
        admit: Callable[[], None] = lambda: None,
    ) -> Turn:
        """The turn that answers a request: a new one, or an earlier one whose reply nobody got (see `idempotency`).

        admit: called before a new one begins, which does not begin if it raises. Raises SessionSealed for a finished
        session, Conflict for an Idempotency-Key of another request.
        """
        session.check_open()
        if session.calls.is_waited_for(call):
            # That client may be this one: closing a connection and asking again come at nearly the same time.
            await asyncio.sleep(_NOTICE_SECONDS)
        while isinstance(found := session.calls.take(call, retry), Turn | Node):
            if isinstance(found, Turn):
                if found.rejoin():
                    return found
                session.calls.leave(found.turn_id)
                await found.settled()  # cut a moment ago: what it has is on disk then
                session.check_open()
            elif retry == NO_HINT and await self._is_delivered_elsewhere(session, found):
                session.calls.leave(found.record.turn_id)
            else:
                break
        if isinstance(found, Node) and is_whole(found.record):
            turn = Turn(found.record.turn_id, call, retry)
            return self._follow(session, turn, give_again(self.parts, found, turn))
        begun = found if isinstance(found, Node) and can_go_on(found.record) else None
        try:
            admit()
            return self.start(session, request, call, retry, begun=begun)
        except VerbatimError:
            if begun is not None:  # the next retry goes on from there
                session.calls.leave(begun.record.turn_id)
            raise

    async def _is_delivered_elsewhere(self, session: Session, node: Node) -> bool:
        """Whether another gateway, which recorded a turn, delivers its reply just now."""
        turn_id = node.record.turn_id
        if not self.parts.ledger.shared or session.calls.is_own(turn_id):
            return False
        await asyncio.sleep(_USUAL_NOTE_SECONDS)
        await session.catch_up(self.parts.ledger)
        return session.tree.delivered_at(turn_id) is not None

    def start(
        self,
        session: Session,
        request: TurnRequest,
        call: CallChoice | None = None,
        retry: RetryHint = NO_HINT,
        *,
        begun: Node | None = None,
    ) -> Turn:
        """Begin a new turn, which goes on with a `begun` one.

        Raises SessionSealed for a finished session, LedgerFull while there is no room to record it.
        """
        session.check_open()
        self.parts.admit(len(self._turns))
        call = call or CallChoice("", request.digest, 0)
        turn = Turn(f"turn-{fresh_hex(24)}", call, retry, live_interval=self.parts.settings.stream_interval or None)
        work = run_turn(self.parts, session, request, turn, self._deadlines, self._recent, begun=begun)
        self._follow(session, turn, work)
        self._upkeep.poke()  # not only at the end of a turn: the first ones may be long
        if begun is not None:  # if nothing came of it, the next retry goes on from there again
            turn.on_end(partial(session.calls.leave, begun.record.turn_id))
        return turn

    def _follow(self, session: Session, turn: Turn, work: Coroutine[None, None, TurnFinished]) -> Turn:
        task = asyncio.get_running_loop().create_task(work, name=turn.turn_id)
        self._turns[turn] = task
        session.calls.attend(turn)
        turn.run(task)
        task.add_done_callback(partial(self._forget, session, turn))
        return turn

    def abandon(self, session: Session, turn: Turn) -> None:
        """The client of a turn has gone."""
        session.calls.leave(turn.turn_id)
        session.hold(self.parts.settings.disconnect_grace_seconds)
        turn.abandon(grace_seconds=self.parts.settings.disconnect_grace_seconds)
        turn.on_end(lambda: self._note_lost(session, turn.turn_id))

    def delivered(self, session: Session, finished: TurnFinished) -> None:
        """The last byte of a reply has left; the session waits for the note where that matters."""
        delivered_at = time.time()
        session.calls.leave(finished.record.turn_id)
        session.hold(session.record.ttl_seconds or 0.0)  # since the client has the reply, which may have taken long
        session.tree.mark_delivered(finished.record.turn_id, delivered_at)
        mark = self.parts.ledger.mark_delivered
        self._note(session, partial(mark, finished.record.session_id, finished.record.turn_id, delivered_at))

    def _note_lost(self, session: Session, turn_id: str) -> None:
        """So that nobody takes the reply for delivered (`SessionRegistry.close`)."""
        if session.tree.delivered_at(turn_id) is None:
            self._note(session, partial(self.parts.ledger.mark_lost, session.record.session_id, turn_id, time.time()))

    def _note(self, session: Session, write: Callable[[], Awaitable[None]]) -> None:
        """Have something noted of a reply; the session waits for it where that matters."""
        self.parts.siblings.begin_change(session.record.session_id)
        try:
            noted = write()
            note = noted if isinstance(noted, asyncio.Future) else asyncio.ensure_future(noted)
            self._follow_note(session, note, write)
        except LedgerError:
            self._follow_note(session, asyncio.create_task(_insistently(write)), None)

    def _follow_note(
        self, session: Session, note: asyncio.Future[None], again: Callable[[], Awaitable[None]] | None
    ) -> None:
        """again: what is tried where the ledger could not be written; a task for every note would cost more than it."""
        session.deliveries.append(note)
        self._deliveries.add(note)

        def end(note: asyncio.Future[None]) -> None:
            session.deliveries.remove(note)
            self._deliveries.discard(note)
            error = None if note.cancelled() else note.exception()
            is_unwritten = error is not None and isinstance(error, LedgerError)
            if is_unwritten and again is not None:
                self._follow_note(session, asyncio.create_task(_insistently(again)), None)
                return
            self.parts.siblings.end_change(session.record.session_id)
            if is_unwritten:  # else nothing was sampled, or its session is gone
                _log.warning("session %s: what became of a reply is not noted: %s", session.record.session_id, error)

        note.add_done_callback(end)

    def cut(self, reason: VerbatimError) -> None:
        """End what runs now; it is recorded, and who waits for it is told `reason`."""
        for turn in list(self._turns):
            turn.cut(reason)

    def stop(self) -> None:
        """Cut what runs, as the gateway stops."""
        self.cut(EngineUnavailable("the gateway stops; try again"))

    async def deliveries_noted(self) -> None:
        """Wait until the ledger knows of every reply whose last byte has left."""
        while self._deliveries:
            await asyncio.wait(self._deliveries)

    async def aclose(self) -> None:
        """Cut what runs and wait until it is recorded."""
        self.stop()
        if self._turns:
            await asyncio.wait(list(self._turns.values()))
        self._deadlines.close()
        await self.deliveries_noted()
        await self._upkeep.aclose()

    def _forget(self, session: Session, turn: Turn, task: asyncio.Task[TurnFinished]) -> None:
        turn.tell_end()
        session.hold(session.record.ttl_seconds or 0.0)
        session.calls.end(turn.turn_id)
        self._recent.note(session.recent)
        self._upkeep.poke()
        del self._turns[turn]
        # Retrieved here too, because the reader may have gone; what is no VerbatimError is a bug and is logged as one.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, VerbatimError):
            _log.error("session %s %s failed", session.record.session_id, turn.turn_id, exc_info=error)


async def _build_prompt(parts: TurnParts, session: Session, request: TurnRequest) -> _Prompt:
    if request.prompt is None:
        return await _chat_prompt(parts, session, request)
    return await _raw_prompt(parts, session, request, request.prompt)


async def _chat_prompt(parts: TurnParts, session: Session, request: TurnRequest) -> _Prompt:
    root = RootContext(request.tools, request.template_arguments)
    place = attach(session.tree, request.messages, root, session.recent.ways)
    conversation = Conversation(restore_reasoning(place, request.messages), root.tools, root.template_arguments)
    media = shown_media(parts.model.template, conversation.messages) if request.has_media else ()
    recorded = () if place.parent is None else session.recent.token_ids(place.parent)
    parent = None if place.parent is None else _parent_turn(place.parent, recorded, place.num_matched)
    built = await _built(parts, conversation, parent, place.reason or SegmentReason.UNCERTIFIED, request.num_bytes)
    extends = place.parent if built.segment_reason is None else None
    token_ids = built.token_ids if extends is None else np.concatenate([*recorded, built.token_ids])
    _check_vocabulary(parts, built.token_ids)
    if media:
        await _check_placeholders(parts, media, token_ids)
    return _Prompt(place, root, conversation.messages, built, token_ids, extends, media)


async def _built(
    parts: TurnParts, conversation: Conversation, parent: ParentTurn | None, reason: SegmentReason, num_bytes: int
) -> BuiltPrompt:
    """Off the event loop where much has to be read: of a long request that may be its newest messages only."""
    prompts, most = parts.model.prompts, parts.settings.inline_prompt_bytes
    is_long = num_bytes > most
    built = prompts.build_short(conversation, parent, reason=reason, max_characters=most if is_long else None)
    if built is not None:
        return built
    if is_long:
        return await asyncio.to_thread(prompts.build, conversation, parent, reason=reason)
    return prompts.build_long(conversation, parent, reason=reason)


async def _raw_prompt(parts: TurnParts, session: Session, request: TurnRequest, raw: RawPrompt) -> _Prompt:
    """Recorded ids stay, what is new is added as it came (I1); no template has a say."""
    tokenizer = parts.model.tokenizer
    found = attach_raw(session.tree, session.token_paths, raw, tokenizer)

    def read() -> tuple[TokenIds, JsonValue]:
        return found.added_ids(tokenizer), found.message(tokenizer)

    inline = request.num_bytes <= parts.settings.inline_prompt_bytes
    added, message = read() if inline else await asyncio.to_thread(read)
    parent = found.place.parent
    token_ids = added if parent is None else np.concatenate([parent.token_ids(), added])
    if parent is None or len(added):
        check_ids(added, vocab_size=parts.vocab_size)
    built = BuiltPrompt(added, found.place.reason, RAW)
    if raw.media:
        message = {**message, RAW_MEDIA: list(raw.media)}
    media = tuple(placed_media([message]))
    if media:
        await _check_placeholders(parts, media, token_ids)
    extends = parent if built.segment_reason is None else None
    return _Prompt(found.place, RootContext((), {}), (message,), built, token_ids, extends, media)


async def _check_placeholders(parts: TurnParts, media: Sequence[PlacedMedia], token_ids: TokenIds) -> None:
    """Not on the event loop: the whole prompt is read again."""
    await asyncio.to_thread(check_placeholders, parts.model.tokenizer, parts.model.template, media, token_ids)


def _begun_prompt(session: Session, node: Node) -> _Prompt:
    """Of a reply that broke off: what its first part answered."""
    attachment, begun = node.record.attachment, recorded_reply(node)
    follows = None if attachment.follows_id is None else session.tree[attachment.follows_id]
    place = Place(node, follows, 0, attachment.tier, None)
    built = BuiltPrompt(np.zeros(0, dtype=np.int32), None, node.record.meta["certified_by"])
    is_raw = built.certified_by == RAW  # then each turn names all media of its prompt
    asked = node.reply_nodes()[0].record.added_messages if is_raw else node.messages()[:-1]
    media = tuple(placed_media(asked))
    return _Prompt(place, node.root, (), built, begun.prompt_token_ids, node, media, begun)


def _parent_turn(node: Node, recorded: Sequence[TokenIds], num_messages: int) -> ParentTurn:
    """recorded: all ids of its path. They are put together only where the long way wants to see them."""
    last = None
    for ids in reversed(recorded):
        if len(ids):
            last = int(ids[-1])
            break
    return ParentTurn(
        token_ids=partial(np.concatenate, recorded),
        num_output_tokens=node.num_reply_tokens(),
        num_messages=num_messages,
        finish=node.record.finish,
        num_tokens=node.num_tokens,
        last_token_id=last,
    )


def _check_vocabulary(parts: TurnParts, token_ids: TokenIds) -> None:
    """An id that the engine does not have kills some engines; it must never leave. What an engine sampled, it has."""
    vocab_size, num_tokens = parts.vocab_size, len(token_ids)
    # Without a sign a negative id is a large one.
    unsigned = token_ids.view(np.uint32)
    if num_tokens and int(unsigned.max() if num_tokens > _FEW_TOKENS else max(unsigned.tolist())) >= vocab_size:
        raise IntegrityError(f"a prompt holds ids outside [0, {vocab_size}): engine and tokenizer do not fit")


def _sampling(parts: TurnParts, session: Session, request: TurnRequest, prompt: _Prompt) -> SamplingParams:
    """Request, then the session's overrides; the rest of the context where nobody limits the reply."""
    num_prompt_tokens = len(prompt.token_ids)
    fields = (
        {**request.sampling, **sampling_fields(session.record.sampling)}
        if session.record.sampling
        else request.sampling
    )
    context_length = parts.context_length
    left = context_length - num_prompt_tokens if context_length else None
    asked = fields.get("max_new_tokens", fields.get(DEFAULT_LENGTH))
    if asked is None:
        asked = parts.settings.default_max_new_tokens if left is None else left
        if prompt.media and left is not None:  # of which media take a part that only the engine knows
            asked = min(parts.settings.default_max_new_tokens, left // 2)
    if left is not None and (left < 1 or asked > left):
        raise ContextOverflow(
            f"This model's maximum context length is {context_length} tokens. However, you requested "
            f"{num_prompt_tokens + max(asked, 1)} tokens ({num_prompt_tokens} in the messages, "
            f"{max(asked, 1)} in the completion). Please reduce the length of the messages or completion."
        )
    if prompt.begun is not None:
        asked -= len(prompt.begun.token_ids)
    params = sampling_params(fields, max_new_tokens=asked, stops=parts.model.tokenizer.eos_token_ids)
    return _with_forced_calls(parts, request, params) if request.required_calls else params


def _with_forced_calls(parts: TurnParts, request: TurnRequest, params: SamplingParams) -> SamplingParams:
    """The grammar of a reply that must be calls; a syntax that no grammar can ask for is left to the model."""
    tag = forced_calls(
        parts.model.template,
        request.tools,
        request.required_calls,
        stops=parts.model.prompts.turn_tokens.stops,
        several=request.several_calls,
    )
    if tag is None:
        return params
    return replace(params, extra={**params.extra, "structural_tag": dump_json(tag).decode()})


async def _sample(
    parts: TurnParts,
    session: Session,
    request: TurnRequest,
    prompt: _Prompt,
    sampling: SamplingParams,
    turn: Turn,
    deadlines: Deadlines,
) -> _Sampled:
    """Stream from the engines; whatever ends it, what was sampled comes back. If nothing was, the failure is raised."""
    parsing = parts.model.parsing if request.prompt is None else parts.model.plain_parsing
    parser = parsing.start(
        prompt_ids=prompt.token_ids,
        tools=request.tools if request.calls_tools else (),
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
    )
    session_id, media = session.record.session_id, tuple[Media, ...]()
    if prompt.media:
        takes_urls = parts.settings.media_urls
        media = await load_media(prompt.media, request.blobs, parts.ledger, session_id, takes_urls=takes_urls)
    if (begun := prompt.begun) is not None:
        deltas = parser.feed(begun.token_ids.tolist())
        turn.emit(TurnProgress(begun.token_ids, begun.logprobs, deltas, begun.top_logprobs))
    progress = Continuation(_generate_request(parts, session, request, prompt, sampling, media, turn))

    def hear(new: GenerateChunk) -> None:
        turn.emit(TurnProgress(new.token_ids, new.logprobs, parser.feed(new.token_ids.tolist()), new.top_logprobs))

    finish, failure = Finish(FinishReason.ABORT), None
    try:
        with deadlines.begin() as deadline:
            turn.limit(deadline)
            finish = await parts.pool.generate(progress, session_id=session_id, hear=hear)
    except TimeoutError:
        failure = _cut_or_timed_out(parts, turn)
    except EngineError as error:
        _log.warning("session %s %s: %s", session_id, turn.turn_id, error)
        failure = agents_error(error, turn.turn_id)
    except RequestError as error:  # of a replica that takes less than the one before: what that one gave is kept (I3)
        failure = error
    finally:
        turn.limit(None)
    generated = progress.generated(finish)
    if failure is not None and not len(generated.token_ids):
        raise failure
    late_deltas, reply = parser.finish(finish)
    if late_deltas:
        turn.emit(TurnProgress(_NO_TOKENS, _NO_LOGPROBS, late_deltas))
    return _Sampled(generated, reply, failure)


def _generate_request(
    parts: TurnParts,
    session: Session,
    request: TurnRequest,
    prompt: _Prompt,
    sampling: SamplingParams,
    media: tuple[Media, ...],
    turn: Turn,
) -> GenerateRequest:
    """Rows are wanted from the parent's last token on, which had none until now (I2), and what its path lacks."""
    session_id, begun = session.record.session_id, prompt.begun
    missing = NO_ROWS if prompt.extends is None else prompt.extends.missing_rows
    return GenerateRequest(
        request_id="",
        token_ids=prompt.token_ids if begun is None else np.concatenate([prompt.token_ids, begun.token_ids]),
        sampling=sampling,
        routed_experts_start=missing.first if prompt.is_provable else None,
        passthrough=request.passthrough,
        num_top_logprobs=request.wanted.num_top_logprobs,
        reasons_first="structural_tag" in sampling.extra and parts.model.parsing.opens_reasoning(prompt.token_ids),
        media=media,
        routing_key=session_id if _means_itself(session_id) else quote(session_id, safe=""),
        pace=turn.pace,
        written=prompt.written,
    )


def _cut_or_timed_out(parts: TurnParts, turn: Turn) -> VerbatimError:
    return turn.cut_reason() or EngineTimeout(f"no whole reply within {parts.settings.timeout_seconds:g} s")


def _record(
    parts: TurnParts,
    session: Session,
    request: TurnRequest,
    prompt: _Prompt,
    sampling: SamplingParams,
    sampled: _Sampled,
    turn: Turn,
) -> TurnRecord:
    generated, place = sampled.generated, prompt.place
    rows, sampler = generated.experts, generated.engines[-1]
    routing = None if rows is None else sampler.routing or parts.model.routing
    kind = kind_under(sampler.logprob_kind, sampling)
    return TurnRecord(
        session_id=session.record.session_id,
        turn_id=turn.turn_id,
        index=session.tree.take_index(),
        attachment=_attachment(prompt),
        root=prompt.root if prompt.extends is None else None,
        # As they are: a later replay must be rendered like this one.
        added_messages=prompt.messages if prompt.extends is None else prompt.messages[place.num_matched :],
        reply=sampled.reply.message(),
        prompt_token_ids=prompt.built.token_ids,
        output_token_ids=generated.token_ids,
        output_logprobs=generated.logprobs,
        version_spans=generated.version_spans,
        finish=generated.finish,
        logprob_kind=kind,
        sampling=_sampling_json(sampling, None if place.parent is None else place.parent.record.sampling),
        num_layers=0 if rows is None else rows.ids.shape[1],
        num_experts=0 if routing is None else routing.num_experts,
        top_k=0 if rows is None else rows.ids.shape[2],
        experts_start=0 if rows is None else rows.start,
        experts_stop=0 if rows is None else rows.stop,
        engine_id=sampler.engine_id,
        model=parts.model.name,
        request_digest=request.digest,
        cached_tokens=generated.cached_tokens,
        num_retractions=generated.num_retractions,
        meta=_meta(request, prompt, sampling, sampled, turn),
        untrainable_reason=_untrainable_reason(prompt, sampling, generated, kind),
        created_at=turn.started_at,
        delivered_at=None,
    )


async def _insistently(note: Callable[[], Awaitable[None]]) -> None:
    """Nobody is there to be told of a failure, and what trains depends on it; raises LedgerError after some tries."""
    for pause in _NOTE_PAUSES_SECONDS[:-1]:
        await asyncio.sleep(pause)
        with suppress(LedgerError):
            return await note()
    await asyncio.sleep(_NOTE_PAUSES_SECONDS[-1])
    return await note()


async def _append(parts: TurnParts, session: Session, record: TurnRecord, experts: RoutedExperts | None) -> TurnRecord:
    """Store a turn, as it is stored: another gateway may have taken its index, or finished its session, meanwhile."""
    is_late = False
    parts.siblings.begin_change(record.session_id)
    try:
        while True:
            try:
                if is_late:
                    session.finish = await parts.ledger.append_late_turn(record, experts)
                    parts.note_late(session.record)
                else:
                    await parts.ledger.append_turn(record, experts)
            except TurnIndexTaken:
                await session.catch_up(parts.ledger)
                record = replace(record, index=session.tree.take_index())
            except SessionSealed:
                if is_late:  # its rollout was dropped
                    raise
                is_late = True  # what was sampled is kept all the same (I3)
            else:
                return record
    finally:
        parts.siblings.end_change(record.session_id)


async def _finished(parts: TurnParts, prompt: _Prompt, sampled: _Sampled, record: TurnRecord) -> TurnFinished:
    generated, begun = sampled.generated, prompt.begun
    whole = WholeReply(
        prompt_token_ids=prompt.token_ids,
        token_ids=generated.token_ids,
        logprobs=generated.logprobs,
        version_spans=generated.version_spans,
        top_logprobs=generated.top_logprobs,
        reply=sampled.reply,
    )
    if begun is None or prompt.place.parent is None:
        return TurnFinished(record, whole, generated.experts)
    earlier = await recorded_rows(parts.ledger, prompt.place.parent)
    rows = joined_rows([part for part in (earlier, generated.experts) if part is not None])
    return TurnFinished(record, whole.behind(begun), rows)


def _attachment(prompt: _Prompt) -> Attachment:
    place = prompt.place
    follows_id = None if place.follows is None else place.follows.record.turn_id
    if prompt.extends is not None:
        parent_id = prompt.extends.record.turn_id
        return Attachment(parent_id, follows_id, place.tier, None, continues=prompt.begun is not None)
    return Attachment(None, follows_id, place.tier, prompt.built.segment_reason or place.reason)


def _sampling_json(sampling: SamplingParams, like: Mapping[str, JsonValue] | None) -> Mapping[str, JsonValue]:
    """`like` itself if it is that: a session keeps one of equal ones."""
    fields = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos,
        "extra": dict(sampling.extra),
    }
    return like if like is not None and like == fields else fields


def _meta(
    request: TurnRequest, prompt: _Prompt, sampling: SamplingParams, sampled: _Sampled, turn: Turn
) -> dict[str, JsonValue]:
    generated, reply = sampled.generated, sampled.reply
    meta = {
        "certified_by": prompt.built.certified_by,
        "hidden_messages": list(prompt.built.hidden_messages),
        "flags": [flag.value for flag in reply.flags] if reply.flags else [],
        "num_reasoning_tokens": reply.num_reasoning_tokens,
        "engine_ids": list(map(_engine_id, generated.engines)),
        "num_attempts": generated.num_attempts,
        "lost_attempts": generated.lost_attempts,
        "passthrough": dict(request.passthrough),
        "ignored_fields": list(request.ignored_fields),
        # Whether a grammar made the reply call what the agent wanted called; None where it wanted nothing.
        "tool_choice_enforced": "structural_tag" in sampling.extra if request.required_calls else None,
        "request": dict(request.kept),
        "error": None if sampled.failure is None else sampled.failure.code,
        "engine": dict(generated.meta_info),
        "engine_reply": dict(generated.reply_fields),
        "call": turn.call.facts(turn.retry),
    }
    if request.wanted.num_top_logprobs:
        meta["top_logprobs"] = recorded_top_logprobs(generated.top_logprobs)
    if prompt.media:
        meta["media"] = {"num_media": len(prompt.media), "engine_prompt_tokens": generated.prompt_tokens}
    late = None
    if prompt.extends is not None and prompt.extends.missing_rows.policy_versions:
        late = _late_rows(prompt.extends, generated)
    if late is not None or generated.recomputed_rows or generated.cache_flags:
        rows = [list(bounds) for bounds in generated.recomputed_rows]
        flags = [flag.value for flag in generated.cache_flags]
        # What `TurnRecord.cache_flags` and `recomputed_rows` read.
        meta["cache"] = {"flags": flags, "recomputed_rows": rows if late is None else [*rows, late]}
    return meta


def _late_rows(parent: Node, generated: Generated) -> list[int] | None:
    """I9: [start, stop) of the rows of earlier turns that came late, where other weights computed them."""
    missing = parent.missing_rows
    spans = generated.version_spans
    sampling_now = {spans[0].policy_version} if spans else set()
    return None if missing.policy_versions <= sampling_now else [missing.first, parent.num_tokens - 1]


def _untrainable_reason(
    prompt: _Prompt, sampling: SamplingParams, generated: Generated, kind: LogprobKind
) -> str | None:
    """I9: what cannot be proved is kept and answered, not trained (a missing log-prob excludes its token only).

    kind: of the last engine's log-probs.
    """
    if not prompt.is_provable:
        return UNTRAINABLE
    engines = generated.engines
    for engine in engines:
        if not engine.token_exact:
            return "text_only_engine"
    if not generated.versions_certain:
        return "policy_version_uncertain"
    if len(engines) > 1 and any(kind_under(engine.logprob_kind, sampling) is not kind for engine in engines):
        return "logprob_kinds_mixed"
    # A segment says top-k and top-p of its turns, so nobody could tell the set that min-p kept.
    return "kept_set_of_min_p" if kind is LogprobKind.KEPT_SET and sampling.min_p > 0 else None
