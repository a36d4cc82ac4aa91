"""What SGLang streams, read into tokens: one event of `/generate` says all tokens so far, or only the new ones.

Each turn comes through here, perhaps an event for every token: what an event costs must not grow with what was sent
before (`sglang_events`). Ids, log-probs, versions and routing rows are checked against each other (I2, I9).
"""

from __future__ import annotations

import asyncio
import logging
import reprlib
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from engines.connection import EventStream, abort_quietly
from engines.likeliest import likeliest
from engines.refusals import failure, refused
from engines.routing_rows import Int32Layout, RoutingRows, decode_routing
from engines.sglang_events import LOGPROBS, OUTPUT_IDS, READ_AT_END, TOP_LOGPROBS, EventParser, Fields
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineUnavailable,
    ExpertsMismatch,
    InvalidRequest,
    LengthMismatch,
    RequestError,
    VerbatimError,
)
from gateway.contracts.experts import RoutedExperts, RoutingShape
from gateway.contracts.generation import (
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    TopLogprob,
)
from gateway.contracts.versions import VersionSpan, join_spans

_log = logging.getLogger(__name__)

_KNOWN_TOP = frozenset(("text", OUTPUT_IDS, "meta_info", "index"))
_KNOWN_META = frozenset(
    (
        *READ_AT_END,
        "id",
        "finish_reason",
        "input_token_logprobs",
        LOGPROBS,
        "output_token_logprobs_length",
        "input_top_logprobs",
        TOP_LOGPROBS,
        "completion_tokens",
        "routed_experts",
    )
)
_NOTHING: dict[str, Any] = {}

_REASONS = {reason.value: reason for reason in FinishReason}
_TYPES_OF_IDS = frozenset((int,))
_TYPES_OF_LOGPROBS = frozenset((float, int, type(None)))
_value = msgspec.json.Decoder().decode


class _Entry(msgspec.Struct, array_like=True, gc=False):
    """`[log-prob, token id, text]`; the text is not read."""

    logprob: float | None
    token_id: int


async def read_generation(
    prepare: Callable[[], Awaitable[tuple[EventStream, StreamReader]]], *, abort: Callable[[str], Awaitable[None]]
) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
    """The items of one `/generate` stream; whatever ends it before its end, the request is aborted."""
    stream, reader = await prepare()
    ended = False
    unreadable: VerbatimError | None = None
    try:
        stream.pace = reader.pace
        try:
            async with stream:
                while reader.end is None:
                    events = await stream.next()
                    if not events:
                        break
                    unreadable = reader.read_all(events)
                    if (chunk := reader.take()) is not None:
                        yield chunk
                    if unreadable is not None:
                        raise unreadable
                if reader.end is not None:
                    stream.finish()
        except (EngineError, asyncio.CancelledError):
            if unreadable is None:
                reader.read_all(stream.unread())
            if (chunk := reader.take()) is not None:
                yield chunk  # I3: what came counts, though nobody had asked for it yet
            raise
        if reader.end is None:
            raise EngineUnavailable(f"{reader.named}: the stream ended before the request did")
        ended = True
        yield reader.end
    except (EngineRejected, RequestError) as error:
        ended = True
        if reader.has_media and isinstance(error, EngineRejected):  # nearly always one that it could not read
            raise InvalidRequest(error.reason) from error
        raise
    finally:
        if not ended:
            await abort_quietly(abort, reader.request_id)


class StreamReader:
    """One `/generate` stream as it is read; `end` is set by the event that finished the request.

    rows: takes its routing rows as they arrive, None where there will be none. failure_of: what an `error` inside the
    stream stands for.
    """

    __slots__ = (
        "_failure_of",
        "_known_ids",
        "_logprobs",
        "_num_taken",
        "_parser",
        "_policy_version_of",
        "_request",
        "_routing",
        "_top_logprobs",
        "_unknown_meta",
        "_unknown_top",
        "_wanted_top",
        "end",
        "has_media",
        "named",
        "pace",
        "request_id",
        "rows",
    )

    def __init__(
        self,
        request: GenerateRequest,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        engine_id: str,
        *,
        failure_of: Callable[[Any, str], VerbatimError] = failure,
        parser: EventParser | None = None,
    ) -> None:
        self._request = request
        self._wanted_top = request.num_top_logprobs
        self._routing = routing
        self._policy_version_of = policy_version_of
        self._failure_of = failure_of
        self.request_id = request.request_id
        self.pace = request.pace
        self.has_media = bool(request.media)
        self.named = f"engine {engine_id}, request {request.request_id}"
        wants_rows = request.routed_experts_start is not None
        self.rows = RoutingRows.of(request, routing, Int32Layout) if wants_rows else None
        self.end: GenerateEnd | None = None
        self._parser = parser or EventParser(with_top_logprobs=bool(self._wanted_top))
        self._known_ids = array("i")
        """All output ids so far."""
        self._num_taken = 0
        self._logprobs: list[float | None] = []
        self._top_logprobs: list[Sequence[TopLogprob]] = []
        self._unknown_top = _NOTHING
        self._unknown_meta = _NOTHING

    def read_all(self, events: Sequence[bytes]) -> VerbatimError | None:
        """Read events up to the end; the error of one that cannot be read, those before it stay."""
        data = b""
        try:
            for data in events:
                self._read(data)
                if self.end is not None:
                    break
        except (LengthMismatch, ExpertsMismatch) as error:
            return EngineProtocolError(f"{self.named}: {error.message}")
        except VerbatimError as error:
            return error
        except msgspec.ValidationError as error:
            return EngineProtocolError(f"{self.named}: unreadable event: {error}")
        except msgspec.DecodeError:
            return EngineProtocolError(f"{self.named}: the event is not JSON: {data[:80]!r}")
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            return EngineProtocolError(f"{self.named}: unreadable event ({type(error).__name__}: {error})")
        return None

    def take(self) -> GenerateChunk | None:
        """The new tokens of all events since the last call, None if they brought none."""
        if not self._logprobs:
            return None
        top_logprobs = tuple(self._top_logprobs) if self._wanted_top and any(self._top_logprobs) else ()
        token_ids = np.array(self._known_ids[self._num_taken :], np.int32)
        chunk = GenerateChunk(token_ids, np.array(self._logprobs, np.float32), top_logprobs)
        self._num_taken = len(self._known_ids)
        self._logprobs, self._top_logprobs = [], []
        return chunk

    def _read(self, data: bytes) -> None:
        """One event; raises, besides VerbatimError, what reading anything but such an event may raise."""
        event = self._parser.parse(data, len(self._known_ids))
        if "error" in event:
            raise self._failure_of(event["error"], self.named)
        meta = event["meta_info"]
        if not (_KNOWN_TOP.issuperset(event) and _KNOWN_META.issuperset(meta)):
            # I8: what we do not know of the latest event, and what only an earlier one says.
            self._unknown_top = _kept(self._unknown_top, event, _KNOWN_TOP)
            self._unknown_meta = _kept(self._unknown_meta, meta, _KNOWN_META)
        experts = meta.get("routed_experts")
        if self.rows is not None:
            self.rows.note(experts)
        finish = meta["finish_reason"]
        if finish is not None and finish["type"] == "abort":
            self._refuse_failed(finish)
        fresh = self._new_ids(event[OUTPUT_IDS], meta["completion_tokens"])
        logprobs = self._new_logprobs(fresh, meta.get(LOGPROBS))
        top_logprobs: Sequence[Sequence[TopLogprob]] = ()
        if fresh and self._wanted_top:  # I9: what an event does not give stays missing, at its own place
            top_logprobs = self._new_top_logprobs(fresh, logprobs, meta.get(TOP_LOGPROBS)) or [()] * len(fresh)
        if finish is not None:
            self.end = self._ended(meta, finish, experts, len(self._known_ids) + len(fresh))
        # Last: of an event that contradicts itself nothing is kept.
        self._known_ids += array("i", fresh)
        self._logprobs += logprobs
        self._top_logprobs += top_logprobs

    def _refuse_failed(self, finish: Mapping[str, Any]) -> None:
        """SGLang reports some refusals as an abort with a status (an ordinary abort has none)."""
        status = finish.get("status_code")
        if status is None:
            return
        if int(status) >= 500:
            raise EngineUnavailable(f"{self.named}: {finish.get('message')}")
        raise refused(str(finish.get("message")), self.named)

    def _new_ids(self, ids: list[int], total: int) -> list[int]:
        """The new ids of an event that has `total` so far; both kinds of stream are told by their number."""
        seen = len(self._known_ids)
        if ids and not (_TYPES_OF_IDS.issuperset(map(type, ids)) and min(ids) >= 0 and max(ids) < 2**31):
            raise EngineProtocolError(f"{self.named}: token ids that are none, or out of range: {reprlib.repr(ids)}")
        if len(ids) == total:
            if seen and array("i", ids[:seen]) != self._known_ids:
                raise EngineProtocolError(f"{self.named}: the engine changed tokens that it had already sent")
            return ids[seen:]
        if len(ids) == total - seen:  # incremental
            return ids
        raise EngineProtocolError(
            f"{self.named}: {len(ids)} ids in an event that claims {total} tokens, {seen} seen before"
        )

    def _new_logprobs(self, fresh: list[int], entries: list[Any] | None) -> list[float | None]:
        """One for each new id; None where the engine gave none (I9)."""
        number = len(fresh)
        if entries is None or not number:
            return [None] * number
        if len(entries) < number:
            raise EngineProtocolError(f"{self.named}: {len(entries)} log-probs for {number} new tokens (I2)")
        newest = entries if len(entries) == number else entries[-number:]
        logprobs = [entry[0] for entry in newest]
        if [entry[1] for entry in newest] != fresh:
            raise EngineProtocolError(f"{self.named}: log-probs are of other tokens than output_ids (I2)")
        if not _TYPES_OF_LOGPROBS.issuperset(map(type, logprobs)):
            raise EngineProtocolError(f"{self.named}: log-probs that are none: {reprlib.repr(logprobs)}")
        return logprobs

    def _new_top_logprobs(
        self, fresh: list[int], logprobs: Sequence[float | None], told: list[Any] | None
    ) -> tuple[tuple[TopLogprob, ...], ...]:
        """A row for each new token; () where the engine gave none (I9)."""
        if told is None:
            return ()
        rows = msgspec.convert(told[-len(fresh) :], list[list[_Entry] | None])
        pairs = [None if row is None else [(entry.token_id, entry.logprob) for entry in row] for row in rows]
        return likeliest(pairs, fresh, np.array(logprobs, np.float32), most=self._wanted_top, named=self.named)

    def _ended(self, meta: Fields, finish: Mapping[str, Any], experts: str | None, num_output: int) -> GenerateEnd:
        is_read = "prompt_tokens" in meta or finish["type"] != "abort" or num_output
        # Of a request that was aborted while it waited, SGLang says next to nothing: it was never read.
        prompt_tokens = int(meta["prompt_tokens"]) if is_read else len(self._request.token_ids)
        # SGLang writes media into the prompt itself: its ids are then its own, and the turn is marked so (I9).
        if prompt_tokens != len(self._request.token_ids) and not self._request.media:
            raise EngineProtocolError(
                f"{self.named}: the engine read {prompt_tokens} prompt tokens of {len(self._request.token_ids)} (I1)"
            )
        return GenerateEnd(
            finish=Finish(_REASONS.get(finish["type"]) or FinishReason(finish["type"]), finish.get("matched")),
            version_spans=self._version_spans(meta, num_output),
            routed_experts=(
                None
                if experts is None and self.rows is None
                else self._routed_experts(experts, prompt_tokens + num_output - 1)
            ),
            prompt_tokens=prompt_tokens,
            completion_tokens=num_output,
            cached_tokens=int(meta.get("cached_tokens") or 0),
            num_retractions=int(meta.get("num_retractions") or 0),
            meta_info=_values(self._unknown_meta) if self._unknown_meta else {},
            reply_fields=_values(self._unknown_top) if self._unknown_top else {},
        )

    def _version_spans(self, meta: Mapping[str, Any], num_output: int) -> tuple[VersionSpan, ...]:
        spans = meta.get("weight_versions")
        if spans is None:  # engines before spans: one label for the whole answer
            version = self._policy_version_of(str(meta["weight_version"]))
            return (VersionSpan(0, num_output, version),) if num_output else ()
        read = []
        for span in spans:
            version = self._policy_version_of(str(span["version"]))
            read.append(VersionSpan(int(span["start"]), int(span["end"]), version))
        return join_spans(read)

    def _routed_experts(self, encoded: str | None, stop: int) -> RoutedExperts | None:
        if self.rows is not None and self.rows.strayed:
            raise EngineProtocolError(f"{self.named}: a big routed_experts at an unknown place of an event")
        start = self._request.routed_experts_start
        if start is None or encoded is None:
            return None  # I9: missing stays missing
        if self._routing is None:
            raise EngineProtocolError(f"{self.named}: routing came, but the model's routing shape is not known")
        try:
            if self.rows is not None and encoded == self.rows.stand_in:
                return self.rows.rows(stop)
            return decode_routing(encoded, self._routing, Int32Layout, start=start, stop=stop)
        except ExpertsMismatch as error:  # I9: tokens and log-probs are sound; that its rows are missing is counted
            _log.warning("%s: %s; the turn is recorded without routing rows", self.named, error.message)
            return None


def _kept(before: dict[str, Any], fields: Fields, known: frozenset[str]) -> dict[str, Any]:
    """I8: what we do not know, also what only an earlier event says; the order of keys is the latest event's."""
    now = {name: value for name, value in fields.items() if name not in known}
    return {name: value for name, value in before.items() if name not in now} | now


def _values(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) if type(value) is bytes else value for name, value in kept.items()}
