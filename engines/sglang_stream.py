"""What SGLang streams, read into tokens: one event of `/generate` says all tokens so far, or only the new ones.

Each turn comes through here, perhaps an event for every token, so what an event costs must not grow with what was sent
before: of its arrays only the new end is parsed, the rest is compared as bytes or passed over, and what we do not know
stays text until the answer is over. Ids, log-probs, versions and routing rows are checked against each other (I2, I9).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter
from typing import Annotated, Any, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np

from engines.connection import EventStream, abort_quietly
from engines.likeliest import likeliest
from engines.refusals import failure, refused
from engines.routing_rows import Int32Layout, RoutingRows, decode_routing
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

_KNOWN_TOP = frozenset(("text", "output_ids", "meta_info", "index"))
_READ_AT_END = ("prompt_tokens", "weight_version", "weight_versions", "num_retractions", "cached_tokens")
_KNOWN_META = frozenset(
    (
        *_READ_AT_END,
        "id",
        "finish_reason",
        "input_token_logprobs",
        "output_token_logprobs",
        "output_token_logprobs_length",
        "input_top_logprobs",
        "output_top_logprobs",
        "completion_tokens",
        "routed_experts",
    )
)

Item = TypeVar("Item")
Fields: TypeAlias = dict[str, msgspec.Raw]
"""An object whose values are not parsed yet."""


class _Entry(msgspec.Struct, array_like=True, gc=False):
    """`[log-prob, token id, text]`; the text is not read."""

    logprob: float | None
    token_id: int


_WORTH_CUTTING = 64
"""Fewer tokens are parsed again as soon as they are cut out."""

_NULL = msgspec.Raw(b"null")
_token_id_of, _logprob_of = attrgetter("token_id"), attrgetter("logprob")
_REASONS = {reason.value: reason for reason in FinishReason}

_TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=np.iinfo(np.int32).max)]
_fields = msgspec.json.Decoder(Fields).decode
_ids = msgspec.json.Decoder(list[_TokenId]).decode
_number = msgspec.json.Decoder(int).decode
_parsed_entries = msgspec.json.Decoder(list[_Entry]).decode
_parsed_rows = msgspec.json.Decoder(list[list[_Entry] | None]).decode
_value = msgspec.json.Decoder().decode


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


class _Growing(Generic[Item]):
    """An array that a cumulative stream says from its start with every event; its new end is parsed.

    known_part ─▶ what is known is cut out ─▶ is_left ─▶ keep ─▶ newest

    Passing over what is known would be most of the work at a long reply, so it is cut out before anything is parsed.
    """

    __slots__ = ("_at", "_found", "_key", "_left", "_name", "_parse", "_stop", "_whole")

    def __init__(self, name: str, parse: Callable[[bytes], list[Item]]) -> None:
        self._name = name
        self._key = b'"%b":[' % name.encode()
        self._parse = parse
        self._at = 0
        """Not before here the array begins in the next event: in this one it began here, and events grow."""
        self._stop = 0
        """Where the array of the event before ended, from its bracket on; there a cumulative one goes on."""
        self._left = _NULL
        self._found: list[Item] = []
        """What is left of it in an event that was cut, and what that says."""
        self._whole = True
        """Whether nothing was cut out of this event."""

    def known_part(self, data: bytes) -> tuple[int, int] | None:
        """Where in an event the array's part stands that was there before; None where that cannot be told.

        It holds no quotation mark, so no other field begins in it; where the rest is JSON, has the array's name once,
        and the array holds just the new items, it was cut out of the array.
        """
        self._whole = True
        first = data.find(self._key, self._at) + len(self._key)
        end = first + self._stop - 1
        if first < len(self._key) or not self._is_known(data, first, end):
            return None
        match data[end : end + 1]:
            case b",":
                return first, end + 1
            case b"]":
                return first, end
        return None

    def _is_known(self, data: bytes, first: int, end: int) -> bool:
        return end > first and data.find(b'"', first, end) < 0

    def is_left(self, data: bytes, event: Fields, meta: Fields, number: int) -> bool:
        """Whether an event that was cut has so many items of this array left; raises DecodeError, KeyError."""
        self._left = self._told(event, meta)
        self._found = self._parse(self._left)
        return len(self._found) == number and data.count(self._key) == 1

    def _told(self, event: Fields, meta: Fields) -> msgspec.Raw:
        return meta[self._name]

    def keep(self, known_part: tuple[int, int]) -> None:
        """What is left is what is new: the array was cut where it should be."""
        self._whole = False
        self._at = known_part[0] - len(self._key)
        if self._found:
            self._add(bytes(self._left))

    def _add(self, told: bytes) -> None:
        self._stop += len(told) - 1  # its brackets are not added, a comma is

    def newest(self, told: msgspec.Raw) -> list[Item]:
        """The new items of the event, perhaps behind those of earlier ones."""
        if not self._whole:
            return self._found
        self._at = 0
        self._stop = len(memoryview(told)) - 1
        return self._parse(told)


class _GrowingIds(_Growing[int]):
    """The output ids, which an event must say as they were said before (I2)."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        super().__init__("output_ids", _ids)
        self._known = bytearray(b"[")
        """All so far as the engine spells them, without the closing bracket."""

    def _is_known(self, data: bytes, first: int, end: int) -> bool:
        return end > first and data.startswith(self._known, first - 1)

    def _told(self, event: Fields, meta: Fields) -> msgspec.Raw:
        return event[self._name]

    def new_ids(self, told: msgspec.Raw, seen: int, total: int, named: str) -> list[int]:
        """Those of an event that has `total` so far, `seen` of them before.

        Their number tells whether a stream says all of them or the new ones. Raises EngineProtocolError for what is no
        id, for other ids than before, and for an event that says neither all nor the new ones.
        """
        if not self._whole:
            return self._found
        text = bytes(told)
        try:
            ids = _ids(text)
        except msgspec.ValidationError as error:
            raise EngineProtocolError(f"{named}: token ids that are none, or out of range: {error}") from error
        self._at = 0
        if len(ids) == total:
            if ids[:seen] != _ids(self._known + b"]"):
                raise EngineProtocolError(f"{named}: the engine changed tokens that it had already sent")
            self._known[:] = text[:-1]
            self._stop = len(self._known)
            return ids[seen:]
        if len(ids) == total - seen:  # incremental
            if ids:
                self._add(text)
            return ids
        raise EngineProtocolError(f"{named}: {len(ids)} ids in an event that claims {total} tokens, {seen} seen before")

    def _add(self, told: bytes) -> None:
        self._known += b"," + told[1:-1] if len(self._known) > 1 else told[1:-1]
        self._stop = len(self._known)


class StreamReader:
    """One `/generate` stream as it is read; `end` is set by the event that finished the request.

    rows: takes its routing rows as they arrive, None where there will be none. failure_of: what an `error` inside the
    stream stands for.
    """

    __slots__ = (
        "_entries",
        "_failure_of",
        "_growing",
        "_ids",
        "_logprobs",
        "_num_output",
        "_policy_version_of",
        "_request",
        "_routing",
        "_shape",
        "_token_ids",
        "_top_logprobs",
        "_top_rows",
        "_unknown_meta",
        "_unknown_top",
        "_wanted_top",
        "_worth_cutting",
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
        worth_cutting: int = _WORTH_CUTTING,
    ) -> None:
        self._request = request
        self._wanted_top = request.num_top_logprobs
        self._routing = routing
        self._policy_version_of = policy_version_of
        self._failure_of = failure_of
        self._worth_cutting = max(1, worth_cutting)
        self.request_id = request.request_id
        self.pace = request.pace
        self.has_media = bool(request.media)
        self.named = f"engine {engine_id}, request {request.request_id}"
        wants_rows = request.routed_experts_start is not None
        self.rows = RoutingRows.of(request, routing, Int32Layout) if wants_rows else None
        self.end: GenerateEnd | None = None
        self._num_output = 0
        self._ids = _GrowingIds()
        self._entries = _Growing("output_token_logprobs", _parsed_entries)
        self._top_rows = _Growing("output_top_logprobs", _parsed_rows)
        arrays = (self._ids, self._entries, self._top_rows)
        self._growing: Sequence[_Growing[Any]] = arrays if self._wanted_top else arrays[:2]
        self._token_ids: list[int] = []
        self._logprobs: list[float | None] = []
        self._top_logprobs: list[Sequence[TopLogprob]] = []
        self._shape: _Shape | None = None
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
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            return EngineProtocolError(f"{self.named}: unreadable event ({type(error).__name__}: {error})")
        return None

    def take(self) -> GenerateChunk | None:
        """The new tokens of all events since the last call, None if they brought none."""
        if not self._token_ids:
            return None
        top_logprobs = tuple(self._top_logprobs) if self._wanted_top and any(self._top_logprobs) else ()
        chunk = GenerateChunk(np.array(self._token_ids, np.int32), np.array(self._logprobs, np.float32), top_logprobs)
        self._token_ids, self._logprobs, self._top_logprobs = [], [], []
        return chunk

    def _read(self, data: bytes) -> None:
        """One event; raises, besides VerbatimError, what reading anything but such an event may raise."""
        event, meta = self._parsed(data)
        shape = _shape(tuple(event), tuple(meta))
        if shape.unknown_top or shape.unknown_meta:
            self._keep_unknown(event, meta, shape)
        experts = _value(meta["routed_experts"]) if "routed_experts" in meta else None
        if self.rows is not None:
            self.rows.note(experts)
        finish = None if (told := meta["finish_reason"]) == _NULL else _value(told)
        if finish is not None and finish["type"] == "abort":
            self._refuse_failed(finish)
        fresh = self._ids.new_ids(event["output_ids"], self._num_output, _number(meta["completion_tokens"]), self.named)
        logprobs = self._new_logprobs(fresh, meta.get("output_token_logprobs"))
        top_logprobs: Sequence[Sequence[TopLogprob]] = ()
        if fresh and self._wanted_top:  # I9: what an event does not give stays missing, at its own place
            top_logprobs = self._new_top_logprobs(fresh, logprobs, meta.get("output_top_logprobs")) or [()] * len(fresh)
        self._num_output += len(fresh)
        if finish is not None:
            self.end = self._ended(meta, finish, experts)
        # Last: of an event that contradicts itself nothing is kept.
        self._token_ids += fresh
        self._logprobs += logprobs
        self._top_logprobs += top_logprobs

    def _parsed(self, data: bytes) -> tuple[Fields, Fields]:
        """An event and its `meta_info`, whose arrays hold what is new at least."""
        if self._num_output >= self._worth_cutting and (parsed := self._parsed_end(data)) is not None:
            return parsed
        event = _fields(data)
        if "error" in event:
            raise self._failure_of(_value(event["error"]), self.named)
        return event, _fields(event["meta_info"])

    def _parsed_end(self, data: bytes) -> tuple[Fields, Fields] | None:
        """The same without what earlier events said of the arrays; None where that cannot be told apart."""
        cut, parts = [], []
        for array in self._growing:
            if (part := array.known_part(data)) is not None:
                cut.append(array)
                parts.append(part)
        if not cut:
            return None
        short = _without(parts, data)
        with suppress(msgspec.DecodeError, KeyError):
            event = _fields(short)
            meta = _fields(event["meta_info"])
            number = _number(meta["completion_tokens"]) - self._num_output
            if "error" not in event and all(array.is_left(short, event, meta, number) for array in cut):
                for array, part in zip(cut, parts, strict=True):
                    array.keep(part)
                return event, meta
        return None

    def _keep_unknown(self, event: Fields, meta: Fields, shape: _Shape) -> None:
        """I8: what we do not know of the latest event, and what only an earlier one says."""
        if shape is not self._shape:
            self._shape = shape
            self._unknown_top = _kept(self._unknown_top, event, shape.unknown_top)
            self._unknown_meta = _kept(self._unknown_meta, meta, shape.unknown_meta)
            return
        for name in shape.unknown_top:
            self._unknown_top[name] = bytes(event[name])
        for name in shape.unknown_meta:
            self._unknown_meta[name] = bytes(meta[name])

    def _refuse_failed(self, finish: Mapping[str, Any]) -> None:
        """SGLang reports some refusals as an abort with a status (an ordinary abort has none)."""
        status = finish.get("status_code")
        if status is None:
            return
        if int(status) >= 500:
            raise EngineUnavailable(f"{self.named}: {finish.get('message')}")
        raise refused(str(finish.get("message")), self.named)

    def _new_logprobs(self, fresh: list[int], told: msgspec.Raw | None) -> Sequence[float | None]:
        """One for each new id; None where the engine gave none (I9)."""
        if not fresh:
            return ()
        number = len(fresh)
        if told is None or told == _NULL:
            return [None] * number
        entries = self._entries.newest(told)
        if len(entries) < number:
            raise EngineProtocolError(f"{self.named}: {len(entries)} log-probs for {number} new tokens (I2)")
        newest = entries[-number:]
        if list(map(_token_id_of, newest)) != fresh:
            raise EngineProtocolError(f"{self.named}: log-probs are of other tokens than output_ids (I2)")
        return list(map(_logprob_of, newest))

    def _new_top_logprobs(
        self, fresh: list[int], logprobs: Sequence[float | None], told: msgspec.Raw | None
    ) -> tuple[tuple[TopLogprob, ...], ...]:
        """A row for each new token; () where the engine gave none (I9)."""
        if told is None or told == _NULL:
            return ()
        rows = self._top_rows.newest(told)[-len(fresh) :]
        pairs = [None if row is None else [(entry.token_id, entry.logprob) for entry in row] for row in rows]
        return likeliest(pairs, fresh, np.array(logprobs, np.float32), most=self._wanted_top, named=self.named)

    def _ended(self, fields: Fields, finish: Mapping[str, Any], experts: str | None) -> GenerateEnd:
        meta: dict[str, Any] = {}
        for name in _READ_AT_END:
            if name in fields:
                meta[name] = _value(fields[name])
        is_read = "prompt_tokens" in meta or finish["type"] != "abort" or self._num_output
        # Of a request that was aborted while it waited, SGLang says next to nothing: it was never read.
        prompt_tokens = int(meta["prompt_tokens"]) if is_read else len(self._request.token_ids)
        # SGLang writes media into the prompt itself: its ids are then its own, and the turn is marked so (I9).
        if prompt_tokens != len(self._request.token_ids) and not self._request.media:
            raise EngineProtocolError(
                f"{self.named}: the engine read {prompt_tokens} prompt tokens of {len(self._request.token_ids)} (I1)"
            )
        return GenerateEnd(
            finish=Finish(_REASONS.get(finish["type"]) or FinishReason(finish["type"]), finish.get("matched")),
            version_spans=self._version_spans(meta, self._num_output),
            routed_experts=(
                None
                if experts is None and self.rows is None
                else self._routed_experts(experts, prompt_tokens + self._num_output - 1)
            ),
            prompt_tokens=prompt_tokens,
            completion_tokens=self._num_output,
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


def _without(parts: Sequence[tuple[int, int]], data: bytes) -> bytes:
    """Data without some parts of it, none of which overlap."""
    kept, behind = [], 0
    for start, stop in sorted(parts):
        kept.append(data[behind:start])
        behind = stop
    kept.append(data[behind:])
    return b"".join(kept)


def _values(texts: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: _value(text) for name, text in texts.items()}


def _kept(before: dict[str, bytes], fields: Fields, unknown: Sequence[str]) -> dict[str, bytes]:
    """I8: what we do not know, also what only an earlier event says; the order of keys is the latest event's."""
    if not unknown:
        return before
    # As bytes of their own: a part of an event would keep all of it in memory until the next one.
    now = {name: bytes(fields[name]) for name in unknown}
    return {name: value for name, value in before.items() if name not in now} | now


class _Shape(NamedTuple):
    """What events of the same fields have that we do not know."""

    unknown_top: tuple[str, ...]
    unknown_meta: tuple[str, ...]


@lru_cache(maxsize=256)  # an engine's events are of two or three shapes
def _shape(top: tuple[str, ...], meta: tuple[str, ...]) -> _Shape:
    return _Shape(
        tuple(name for name in top if name not in _KNOWN_TOP), tuple(name for name in meta if name not in _KNOWN_META)
    )


_NOTHING: dict[str, bytes] = {}
