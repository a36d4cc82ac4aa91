"""Records as stored columns and back: JSON for facts, little-endian blobs for arrays, one checksum a row.

JSON is read by the standard library's codec, which carries every integer and float back unchanged (I8) and takes the
lone surrogates that models can emit. It is written by orjson (ten times faster) where that says the same, which is
nearly always. Reading checks the checksum first, so that a damaged row is named, never misread.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from gateway.contracts.errors import ExpertsMismatch, LedgerCorrupt
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason, JsonValue, LogprobKind
from gateway.contracts.records import (
    Attachment,
    FinishRecord,
    MatchTier,
    RootContext,
    SegmentReason,
    SessionOrigin,
    SessionRecord,
    TurnRecord,
)
from gateway.contracts.versions import VersionSpan

_TOKEN_IDS = np.dtype("<i4")
_LOGPROBS = np.dtype("<f4")
_LENGTHS = struct.Struct("<3Q").pack


class SessionRow(NamedTuple):
    """One row of `sessions`."""

    session_id: str
    group_name: str | None
    group_size: int | None
    facts: bytes
    checksum: int
    created_at: float
    ttl_seconds: float | None


class LabelRow(NamedTuple):
    """One row of `session_labels`."""

    session_id: str
    name: bytes
    value: bytes


class TurnRow(NamedTuple):
    """The part of a row of `turns` that never changes."""

    session_id: str
    turn_id: str
    turn_index: int
    facts: bytes
    prompt_token_ids: bytes
    output_token_ids: bytes
    output_logprobs: bytes
    checksum: int
    num_tokens: int
    num_trainable_tokens: int


TURN_BYTES = (
    "length(facts) + length(prompt_token_ids) + length(output_token_ids) + length(output_logprobs) "
    "+ coalesce(experts_bytes, 0)"
)
"""SQL: what a row of `turns` and its routing rows take."""


class FinishRow(NamedTuple):
    """The part of a row of `finishes` that comes from its record."""

    session_id: str
    snapshot: str
    finished_at: float
    facts: bytes
    checksum: int


def session_row(session: SessionRecord) -> SessionRow:
    """A session as stored; its labels stand once more in rows of their own (`label_rows`)."""
    facts = encode_json(_fields(session) | {"origin": session.origin.value})
    return SessionRow(
        session.session_id,
        session.group,
        session.group_size,
        facts,
        zlib.crc32(facts),
        session.created_at,
        session.ttl_seconds,
    )


def label_rows(session: SessionRecord) -> list[LabelRow]:
    """Its rows of `session_labels`."""
    return [
        LabelRow(session.session_id, label_bytes(name), label_bytes(value)) for name, value in session.labels.items()
    ]


def label_bytes(text: str) -> bytes:
    """A label's name or value as stored; lone surrogates pass."""
    return text.encode("utf-8", "surrogatepass")


def read_session(session_id: str, facts: bytes, checksum: int) -> SessionRecord:
    """Raises LedgerCorrupt naming the session."""
    _check(zlib.crc32(facts), checksum, f"session {session_id}")
    values = decode_json(facts)
    typed = {"origin": SessionOrigin(values["origin"]), "gaps": tuple(values.get("gaps", ()))}
    return SessionRecord(**(values | typed))


def says_complete(facts: bytes, checksum: int) -> bool:
    """`complete` of a session's stored facts; False where they are damaged: who reads the session is told."""
    return zlib.crc32(facts) == checksum and bool(decode_json(facts)["complete"])


def same_session(one: SessionRecord, other: SessionRecord) -> bool:
    """Whether two records ask for the same session: all but `created_at`, so that a repeated creation is fine."""
    ignored = {"created_at": 0.0}
    return encode_json(_fields(one) | ignored, sort_keys=True) == encode_json(_fields(other) | ignored, sort_keys=True)


def turn_row(turn: TurnRecord) -> TurnRow:
    """A turn as stored, without its routing rows."""
    facts = encode_json(_turn_facts(turn))
    ids, output_ids, floats = turn.prompt_token_ids, turn.output_token_ids, turn.output_logprobs
    prompt = (ids if ids.dtype == _TOKEN_IDS else ids.astype(_TOKEN_IDS)).tobytes()
    output = (output_ids if output_ids.dtype == _TOKEN_IDS else output_ids.astype(_TOKEN_IDS)).tobytes()
    logprobs = (floats if floats.dtype == _LOGPROBS else floats.astype(_LOGPROBS)).tobytes()
    # A flag is a byte; numpy's own ways to count them go through Python.
    num_trainable = np.isfinite(turn.output_logprobs).tobytes().count(1) if turn.untrainable_reason is None else 0
    return TurnRow(
        turn.session_id,
        turn.turn_id,
        turn.index,
        facts,
        prompt,
        output,
        logprobs,
        checksum=_turn_checksum(facts, prompt, output, logprobs),
        num_tokens=len(turn.prompt_token_ids) + len(turn.output_token_ids),
        num_trainable_tokens=num_trainable,
    )


def read_turn(row: TurnRow, delivered_at: float | None) -> TurnRecord:
    """Raises LedgerCorrupt naming session and turn."""
    name = f"session {row.session_id} turn {row.turn_id}"
    blobs = (row.prompt_token_ids, row.output_token_ids, row.output_logprobs)
    _check(_turn_checksum(row.facts, *blobs), row.checksum, name)
    facts = decode_json(row.facts)
    return TurnRecord(
        **(
            facts
            | {
                "attachment": _attachment(facts["attachment"]),
                "root": None if facts["root"] is None else _root(facts["root"]),
                "added_messages": tuple(facts["added_messages"]),
                "version_spans": tuple(VersionSpan(*span) for span in facts["version_spans"]),
                "finish": Finish(FinishReason(facts["finish"]["reason"]), facts["finish"]["matched"]),
                "logprob_kind": LogprobKind(facts["logprob_kind"]),
                "prompt_token_ids": np.frombuffer(row.prompt_token_ids, _TOKEN_IDS).astype(np.int32, copy=False),
                "output_token_ids": np.frombuffer(row.output_token_ids, _TOKEN_IDS).astype(np.int32, copy=False),
                "output_logprobs": np.frombuffer(row.output_logprobs, _LOGPROBS).astype(np.float32, copy=False),
                "delivered_at": delivered_at,
            }
        )
    )


def check_experts(turn: TurnRecord, experts: RoutedExperts | None) -> RoutedExperts | None:
    """The rows to store with a turn (None where there are none); raises ExpertsMismatch unless they are those that the
    turn's own record speaks of."""
    name = f"session {turn.session_id} turn {turn.index}"
    if experts is None or not len(experts.ids):
        if turn.experts_start != turn.experts_stop:
            raise ExpertsMismatch(
                f"{name}: its record says rows [{turn.experts_start}, {turn.experts_stop}), none were given"
            )
        return None
    if (experts.start, experts.stop) != (turn.experts_start, turn.experts_stop):
        raise ExpertsMismatch(
            f"{name}: its record says rows [{turn.experts_start}, {turn.experts_stop}), "
            f"given were [{experts.start}, {experts.stop}) (engine {turn.engine_id})"
        )
    if experts.ids.shape[1:] != (turn.num_layers, turn.top_k):
        raise ExpertsMismatch(
            f"{name}: its record says {turn.num_layers} layers and top {turn.top_k}, "
            f"the rows have {experts.ids.shape[1:]} (engine {turn.engine_id})"
        )
    return experts


def finish_row(finish: FinishRecord) -> FinishRow:
    """A finish as stored."""
    facts = encode_json({name: value for name, value in _fields(finish).items() if name != "dropped_at"})
    return FinishRow(finish.session_id, finish.snapshot, finish.finished_at, facts, zlib.crc32(facts))


def read_finish(session_id: str, facts: bytes, checksum: int, dropped_at: float | None) -> FinishRecord:
    """Raises LedgerCorrupt naming the session."""
    _check(zlib.crc32(facts), checksum, f"finish of session {session_id}")
    return FinishRecord(**decode_json(facts), dropped_at=dropped_at)


def finish_is_whole(facts: bytes, checksum: int) -> bool:
    """Whether `read_finish` can read it."""
    return zlib.crc32(facts) == checksum


def same_finish(one: FinishRecord, other: FinishRecord) -> bool:
    """Whether two records say the same of a session: reward, outcome and metadata; times and snapshots are ours."""
    said = [encode_json([f.reward, f.outcome, dict(f.metadata)], sort_keys=True) for f in (one, other)]
    return said[0] == said[1]


def encode_json(value: JsonValue, *, sort_keys: bool = False) -> bytes:
    """JSON bytes that `decode_json` reads back equal; lone surrogates, which UTF-8 has no place for, pass too."""
    if not sort_keys:
        # orjson refuses long integers and lone surrogates, but writes null for what is not finite. MessagePack, which
        # costs about as little, shows whether there is such a number.
        try:
            encoded = orjson.dumps(value, _plain, _QUICK_OPTIONS)
            if _NOT_FINITE.search(msgspec.msgpack.encode(value, enc_hook=_plain)) is None:
                return encoded
        except (TypeError, OverflowError, ValueError):
            pass
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys, default=_plain)
    return text.encode("utf-8", "surrogatepass")


_QUICK_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")
"""A NaN or an infinity in MessagePack: a float64 whose exponent is all ones. Other bytes may look like one."""


def decode_json(data: bytes) -> JsonValue:
    """What `encode_json` wrote."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def _fields(record: SessionRecord | FinishRecord) -> dict[str, Any]:
    """The record's fields without a deep copy (messages may be large; they are only read)."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


_STORED_APART = {"prompt_token_ids", "output_token_ids", "output_logprobs", "delivered_at"}
_FACTS = tuple(field.name for field in fields(TurnRecord) if field.name not in _STORED_APART)
_facts_of = attrgetter(*_FACTS)
_bounds_of = attrgetter("start", "stop", "policy_version")


def _turn_facts(turn: TurnRecord) -> dict[str, JsonValue]:
    # `_value_`: of an enum's member without the two calls of Python that its `value` makes.
    facts = dict(zip(_FACTS, _facts_of(turn), strict=True))
    attachment, root = turn.attachment, turn.root
    reason = attachment.segment_reason
    facts["attachment"] = {
        "parent_id": attachment.parent_id,
        "follows_id": attachment.follows_id,
        "tier": attachment.tier._value_,
        "segment_reason": None if reason is None else reason._value_,
        "continues": attachment.continues,
    }
    if root is not None:
        facts["root"] = {"tools": list(root.tools), "template_arguments": dict(root.template_arguments)}
    facts["version_spans"] = list(map(_bounds_of, turn.version_spans))
    facts["finish"] = {"reason": turn.finish.reason._value_, "matched": turn.finish.matched}
    facts["logprob_kind"] = turn.logprob_kind._value_
    return facts


def _attachment(facts: Mapping[str, Any]) -> Attachment:
    reason = facts["segment_reason"]
    return Attachment(
        parent_id=facts["parent_id"],
        follows_id=facts["follows_id"],
        tier=MatchTier(facts["tier"]),
        segment_reason=None if reason is None else SegmentReason(reason),
        continues=facts.get("continues", False),  # absent in version 1
    )


def _root(facts: Mapping[str, Any]) -> RootContext:
    return RootContext(tools=tuple(facts["tools"]), template_arguments=facts["template_arguments"])


def _turn_checksum(facts: bytes, prompt: bytes, output: bytes, logprobs: bytes) -> int:
    # The lengths too, so that bytes cannot move from one array to its neighbour unseen.
    lengths = _LENGTHS(len(prompt), len(output), len(logprobs))
    return zlib.crc32(b"".join((facts, lengths[:8], prompt, lengths[8:16], output, lengths[16:], logprobs)))


def _check(found: int, recorded: int, name: str) -> None:
    if found != recorded:
        raise LedgerCorrupt(f"{name}: checksum {found:08x} found, {recorded:08x} recorded; the ledger is damaged there")


def _plain(value: object) -> JsonValue:
    """Mappings, tuples of mappings and numpy scalars as JSON; anything else is a caller's mistake."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def experts_facts(experts: RoutedExperts) -> dict[str, JsonValue]:
    """What must stand beside the bytes of routing rows to read them: type, shape, first row."""
    return {"dtype": experts.ids.dtype.name, "shape": list(experts.ids.shape), "start": experts.start}


def experts_bytes(experts: RoutedExperts) -> memoryview:
    """Routing rows as little-endian bytes in C order; the rows themselves where they are so already."""
    ids: npt.NDArray[Any] = experts.ids
    return np.ascontiguousarray(ids, ids.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def read_experts(facts: Mapping[str, Any], payload: bytes | memoryview) -> RoutedExperts:
    """What `experts_facts` and `experts_bytes` describe."""
    dtype = np.dtype(np.uint8) if facts["dtype"] == "uint8" else np.dtype("<u2")
    ids = np.frombuffer(payload, dtype).reshape(facts["shape"])
    narrow = ids if ids.dtype == np.uint8 else ids.astype(np.uint16, copy=False)
    return RoutedExperts(ids=narrow, start=facts["start"])
