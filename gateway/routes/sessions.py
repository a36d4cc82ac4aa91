"""Sessions for operators: make, look, finish, forget."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gateway.contracts.errors import InvalidRequest, NotFound
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Ledger
from gateway.contracts.records import FinishRecord, Outcome, SessionOrigin, SessionRecord, TurnRecord
from gateway.contracts.samples import Segment
from gateway.routes import openapi
from gateway.routes.access import Access
from gateway.routes.audit import note_change
from gateway.routes.bodies import checked_id, json_reply, path_id, read_fields, typed
from gateway.sessions.picks import PickChoice
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.report import Retokenisation, session_report
from gateway.sessions.segments import load_segments, sealed_turns, tree_reports
from gateway.wire.protection import check_pins

_CREATE_FIELDS = (
    "session_id", "group", "group_size", "task", "labels", "metadata", "sampling", "ttl_seconds",
)  # fmt: skip
_FINISH_FIELDS = ("reward", "outcome", "metadata")
_MAX_PAGE = 10_000
_MAX_SECONDS = 1e9
_MIN_IDEMPOTENCY_KEY = 32
"""A session's key is made from it."""


def session_router(
    registry: SessionRegistry,
    ledger: Ledger,
    access: Access,
    *,
    picks: PickChoice,
    retokenisation: Retokenisation,
    max_body_bytes: int,
    public_url: str,
) -> APIRouter:
    """The operators' routes about sessions. public_url: how agents reach the gateway; empty: as the caller did."""
    routes = _SessionRoutes(
        registry, ledger, access, picks, retokenisation, max_body_bytes=max_body_bytes, public_url=public_url
    )
    router = APIRouter(tags=["sessions"], dependencies=[Depends(access.check_operator)])
    router.add_api_route("/sessions", routes.create, methods=["POST"], openapi_extra=openapi.CREATE_SESSION)
    router.add_api_route("/sessions", routes.list, methods=["GET"], openapi_extra=openapi.LIST_SESSIONS)
    router.add_api_route("/sessions/{session_id}", routes.show, methods=["GET"], openapi_extra=openapi.SHOW_SESSION)
    router.add_api_route(
        "/sessions/{session_id}", routes.delete, methods=["DELETE"], openapi_extra=openapi.DELETE_SESSION
    )
    router.add_api_route(
        "/sessions/{session_id}/finish", routes.finish, methods=["POST"], openapi_extra=openapi.FINISH_SESSION
    )
    router.add_api_route(
        "/sessions/{session_id}/turns", routes.turns, methods=["GET"], openapi_extra=openapi.SESSION_TURNS
    )
    router.add_api_route(
        "/sessions/{session_id}/segments", routes.segments, methods=["GET"], openapi_extra=openapi.SESSION_SEGMENTS
    )
    router.add_api_route(
        "/sessions/{session_id}/report", routes.report, methods=["GET"], openapi_extra=openapi.SESSION_REPORT
    )
    return router


class _SessionRoutes:
    """The routes' functions."""

    def __init__(
        self,
        registry: SessionRegistry,
        ledger: Ledger,
        access: Access,
        picks: PickChoice,
        retokenisation: Retokenisation,
        *,
        max_body_bytes: int,
        public_url: str,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._access = access
        self._picks = picks
        self._retokenisation = retokenisation
        self._max_body_bytes = max_body_bytes
        self._public_url = public_url

    async def create(self, request: Request) -> Response:
        """201 with a new session; 200 with one of equal properties that exists.

        Its key is told again only to a call with the `Idempotency-Key` of the one that made it: a reply was lost.
        """
        fields = await read_fields(request, max_bytes=self._max_body_bytes, known=_CREATE_FIELDS)
        session_id = _session_id(fields)
        key = self._access.new_key(session_id, seed=_idempotency_key(request))
        session, is_new = await self._registry.create(_wanted(session_id, fields, key_hash=key.stored))
        note_change(request.scope, session_id=session_id, is_new=is_new)
        is_same_call = key.stored == session.record.key_hash
        api_key = key.text if is_new or not self._access.keys_are_on or is_same_call else None
        reply = {"base_url": self._base_url(request, session_id), "api_key": api_key, **_session_json(session.record)}
        return json_reply(reply, status=201 if is_new else 200)

    async def list(self, request: Request) -> Response:
        """`{"sessions": […]}` in order of id, each with `state`, `outcome` and `reward`.

        Query: `label=key:value` (repeatable), `limit`, `after`.
        """
        labels = dict(_label(text) for text in request.query_params.getlist("label"))
        limit = request.query_params.get("limit", "100")
        if not limit.isdecimal() or not 1 <= int(limit) <= _MAX_PAGE:
            raise InvalidRequest(f"limit: expected 1 to {_MAX_PAGE}")
        after = request.query_params.get("after")
        records = await self._ledger.sessions(labels=labels or None, limit=int(limit), after=after)
        finishes = [await self._ledger.finish_record(record.session_id) for record in records]
        return json_reply(
            {"sessions": [_session_json(r) | _state_json(f) for r, f in zip(records, finishes, strict=True)]}
        )

    async def show(self, request: Request) -> Response:
        """One session with the figures of its turn tree."""
        session = await self._registry.get(_required_id(request))
        return json_reply(
            {
                "base_url": self._base_url(request, session.record.session_id),
                **_session_json(session.record),
                "finish": None if session.finish is None else asdict(session.finish),
                "num_running_turns": len(session.running),
                "reports": tree_reports(session.tree.records),
            }
        )

    async def finish(self, request: Request) -> Response:
        """Seal a session; the reply is its FinishRecord."""
        fields = await read_fields(request, max_bytes=self._max_body_bytes, known=_FINISH_FIELDS)
        reward = typed(fields, "reward", (int, float), "a number or null")
        finish = await self._registry.finish(
            _required_id(request),
            reward=None if reward is None else float(reward),
            outcome=typed(fields, "outcome", str, "a word") or Outcome.COMPLETED.value,
            metadata=typed(fields, "metadata", dict, "an object") or {},
        )
        note_change(request.scope, outcome=finish.outcome, reward=finish.reward, snapshot=finish.snapshot)
        return json_reply(asdict(finish))

    async def delete(self, request: Request) -> Response:
        """Forget a session."""
        session_id = _required_id(request)
        await self._registry.delete(session_id)
        return json_reply({"session_id": session_id})

    async def turns(self, request: Request) -> Response:
        """All turns as recorded; `arrays=1` adds token ids and log-probs."""
        session_id = _required_id(request)
        await self._noted(session_id)
        arrays = _wants_arrays(request)
        turns = await self._ledger.turns(session_id)
        return json_reply({"turns": [_turn_json(turn, arrays=arrays) for turn in turns]})

    async def segments(self, request: Request) -> Response:
        """What a trainer would read now, under `pick`; `arrays=1` adds the segments' arrays."""
        session_id = _required_id(request)
        pick = self._picks.named(request.query_params.get("pick"))
        await self._noted(session_id)
        picked, segments = await load_segments(self._ledger, session_id, pick)
        arrays = _wants_arrays(request)
        return json_reply(
            {
                "pick": asdict(picked.report),
                "segments": [_segment_json(segment, arrays=arrays) for segment in segments],
            }
        )

    async def report(self, request: Request) -> Response:
        """What happened to a session's tokens, and what re-tokenising would have made of them; made on demand."""
        session_id = _required_id(request)
        pick = self._picks.named(request.query_params.get("pick"))
        session = await self._noted(session_id)
        turns = sealed_turns(await self._ledger.turns(session_id), await self._ledger.finish_record(session_id))
        report = await asyncio.to_thread(session_report, session.record, turns, pick, self._retokenisation)
        return json_reply(asdict(report))

    async def _noted(self, session_id: str) -> Session:
        """Whoever has read a reply finds it delivered; raises NotFound for a session that nobody made."""
        session = await self._registry.get(session_id)
        await session.deliveries_noted()
        return session

    def _base_url(self, request: Request, session_id: str) -> str:
        root = self._public_url or str(request.base_url)
        return f"{root.rstrip('/')}/sessions/{quote(session_id, safe='')}/v1"


def _wanted(session_id: str, fields: Mapping[str, JsonValue], *, key_hash: str) -> SessionRecord:
    labels = typed(fields, "labels", dict, "an object of strings") or {}
    if not all(isinstance(value, str) for value in labels.values()):
        raise InvalidRequest("labels: expected an object of strings")
    sampling = typed(fields, "sampling", dict, "an object") or {}
    check_pins(sampling)  # what is wrong is told to the operator, not to every agent
    ttl_seconds = typed(fields, "ttl_seconds", (int, float), "a number of seconds")
    if ttl_seconds is not None and not 0 <= ttl_seconds < _MAX_SECONDS:
        raise InvalidRequest(f"ttl_seconds: expected 0 (for ever) to {_MAX_SECONDS:g} seconds")
    group_size = typed(fields, "group_size", int, "a whole number")
    if group_size is not None and group_size < 1:
        raise InvalidRequest("group_size: expected at least 1")
    return new_session(
        session_id,
        key_hash=key_hash,
        origin=SessionOrigin.CREATED,
        group=typed(fields, "group", str, "a string"),
        group_size=group_size,
        task=fields.get("task"),
        labels=labels,
        metadata=typed(fields, "metadata", dict, "an object"),
        sampling=sampling,
        ttl_seconds=None if ttl_seconds is None else float(ttl_seconds),
    )


def _session_id(fields: Mapping[str, JsonValue]) -> str:
    session_id = typed(fields, "session_id", str, "a string")
    if session_id is None:
        return f"session-{uuid.uuid4().hex}"
    return checked_id(str(session_id))


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and len(key) < _MIN_IDEMPOTENCY_KEY:
        raise InvalidRequest(
            f"Idempotency-Key: expected at least {_MIN_IDEMPOTENCY_KEY} characters, as of a random UUID"
        )
    return key


def _required_id(request: Request) -> str:
    session_id = path_id(request)
    if session_id is None:
        raise NotFound("the path names no session")
    return session_id


def _label(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise InvalidRequest(f"label {text!r}: write it as key:value")
    return key, value


def _wants_arrays(request: Request) -> bool:
    return request.query_params.get("arrays", "0") in ("1", "true")


def _session_json(record: SessionRecord) -> dict[str, JsonValue]:
    fields = asdict(record)
    del fields["key_hash"]
    return fields


def _state_json(finish: FinishRecord | None) -> dict[str, JsonValue]:
    if finish is None:
        return {"state": "open", "outcome": None, "reward": None}
    return {"state": "finished", "outcome": finish.outcome, "reward": finish.reward}


def _turn_json(turn: TurnRecord, *, arrays: bool) -> dict[str, JsonValue]:
    return _without_arrays(
        {
            "session_id": turn.session_id,
            "turn_id": turn.turn_id,
            "index": turn.index,
            "attachment": asdict(turn.attachment),
            "root": None if turn.root is None else asdict(turn.root),
            "added_messages": turn.added_messages,
            "reply": turn.reply,
            "num_prompt_tokens_added": len(turn.prompt_token_ids),
            "num_output_tokens": len(turn.output_token_ids),
            "prompt_token_ids": turn.prompt_token_ids,
            "output_token_ids": turn.output_token_ids,
            "output_logprobs": turn.output_logprobs,
            "version_spans": [asdict(span) for span in turn.version_spans],
            "finish": asdict(turn.finish),
            "logprob_kind": turn.logprob_kind,
            "sampling": turn.sampling,
            "num_layers": turn.num_layers,
            "num_experts": turn.num_experts,
            "top_k": turn.top_k,
            "experts_start": turn.experts_start,
            "experts_stop": turn.experts_stop,
            "engine_id": turn.engine_id,
            "model": turn.model,
            "request_digest": turn.request_digest,
            "cached_tokens": turn.cached_tokens,
            "num_retractions": turn.num_retractions,
            "meta": {k: v for k, v in turn.meta.items() if arrays or k != "top_logprobs"},
            "trainable": turn.trainable,
            "untrainable_reason": turn.untrainable_reason,
            "created_at": turn.created_at,
            "delivered_at": turn.delivered_at,
        },
        arrays=arrays,
    )


def _segment_json(segment: Segment, *, arrays: bool) -> dict[str, JsonValue]:
    return _without_arrays(
        {
            "segment_id": segment.segment_id,
            "num_tokens": segment.num_tokens,
            "num_trained_tokens": int(segment.loss_mask.sum()),
            "num_routed_rows": int(segment.routed_valid.sum()),
            "logprob_kind": segment.logprob_kind,
            "turns": [asdict(turn) for turn in segment.turns],
            "token_ids": segment.token_ids,
            "loss_mask": segment.loss_mask,
            "rollout_logprobs": segment.rollout_logprobs,
            "policy_version": segment.policy_version,
            "routed_experts": segment.routed_experts,
            "routed_valid": segment.routed_valid,
        },
        arrays=arrays,
    )


def _without_arrays(fields: dict[str, Any], *, arrays: bool) -> dict[str, JsonValue]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
        if arrays or not isinstance(value, np.ndarray)
    }
