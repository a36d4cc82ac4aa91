"""For operators: engines, pausing, policies, identity, health and metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from gateway.contracts.errors import ConfigurationError, InvalidRequest
from gateway.contracts.generation import Capability, JsonValue
from gateway.contracts.ports import Ledger
from gateway.ledger.keeper import StorageKeeper
from gateway.ledger.reserve import SpaceState
from gateway.replicas.operations import Operations
from gateway.replicas.pause import GatewayPause
from gateway.replicas.pool import Replica, ReplicaPool
from gateway.routes import openapi
from gateway.routes.access import Access
from gateway.routes.audit import note_change
from gateway.routes.bodies import json_reply, read_fields, typed
from gateway.routes.metrics import GatewayMetrics
from gateway.sessions.model import ServedModel
from gateway.sessions.registry import SessionRegistry
from gateway.sessions.siblings import ALONE, Siblings
from gateway.sessions.turns import TurnRunner

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 2**20
_LONGEST_PAUSE_SECONDS = 7 * 24 * 3600
_ROOM = (None, SpaceState.OPEN)
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def admin_router(
    pool: ReplicaPool,
    model: ServedModel,
    access: Access,
    *,
    required: Sequence[Capability],
    operations: Operations,
    siblings: Siblings = ALONE,
) -> APIRouter:
    """Routes under `/admin`. required: what engines must be able to do."""
    routes = _AdminRoutes(pool, model, required, operations, siblings)
    router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(access.check_operator)])
    router.add_api_route("/engines", routes.engines, methods=["GET"], openapi_extra=openapi.ENGINES)
    router.add_api_route("/engines", routes.add_engine, methods=["POST"], openapi_extra=openapi.ADD_ENGINE)
    router.add_api_route(
        "/engines/{engine_id:path}", routes.remove_engine, methods=["DELETE"], openapi_extra=openapi.REMOVE_ENGINE
    )
    router.add_api_route("/generation", routes.generation, methods=["GET"], openapi_extra=openapi.GENERATION)
    router.add_api_route("/generation/pause", routes.pause, methods=["POST"], openapi_extra=openapi.PAUSE)
    router.add_api_route("/generation/resume", routes.resume, methods=["POST"], openapi_extra=openapi.RESUME)
    router.add_api_route("/policy", routes.policy, methods=["POST"], openapi_extra=openapi.POLICY)
    router.add_api_route("/identity", routes.identity, methods=["GET"], openapi_extra=openapi.IDENTITY)
    return router


def status_router(
    pool: ReplicaPool,
    ledger: Ledger,
    runner: TurnRunner,
    registry: SessionRegistry,
    metrics: GatewayMetrics,
    keeper: StorageKeeper,
    siblings: Siblings,
    access: Access,
) -> APIRouter:
    """`/health` and `/ready`, open to everybody, and `/metrics`, which names engines, for operators."""
    routes = _StatusRoutes(pool, ledger, runner, registry, metrics, keeper, siblings)
    router = APIRouter(tags=["status"])
    router.add_api_route("/health", routes.health, methods=["GET"], openapi_extra=openapi.HEALTH)
    router.add_api_route("/ready", routes.ready, methods=["GET"], openapi_extra=openapi.READY)
    router.add_api_route(
        "/metrics",
        routes.metrics,
        methods=["GET"],
        openapi_extra=openapi.METRICS,
        dependencies=[Depends(access.check_operator)],
    )
    return router


class _AdminRoutes:
    """The operators' functions."""

    def __init__(
        self,
        pool: ReplicaPool,
        model: ServedModel,
        required: Sequence[Capability],
        operations: Operations,
        siblings: Siblings,
    ) -> None:
        self._siblings = siblings
        self._pool = pool
        self._model = model
        self._required = tuple(required)
        self._operations = operations

    async def engines(self, request: Request) -> Response:
        """`{"engines": […], "paused": mode or null}`."""
        engines = [_replica_json(replica) for replica in self._pool.replicas]
        for figures in await self._siblings.figures():
            for engine in engines:
                engine["running"] += figures["engines"].get(engine["engine_id"], 0)
        return json_reply({"engines": engines, "paused": _paused_name(self._pool)})

    async def add_engine(self, request: Request) -> Response:
        """Take an engine in; a wrong or silent one is refused and says why."""
        fields = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=("kind", "url", "engine_id"))
        url = _engine_url(fields)
        kind = typed(fields, "kind", str, "a kind of engine") or "sglang"
        engine_id = typed(fields, "engine_id", str, "a string")
        try:
            replica = await self._operations.add_engine(kind, url.rstrip("/"), engine_id)
        except ConfigurationError as error:
            raise InvalidRequest(f"kind: {error.message}") from error
        _log.info("engine %s was added", replica.engine.engine_id)
        note_change(request.scope, added=urlsplit(url).hostname, port=urlsplit(url).port, kind=kind)
        return json_reply(_replica_json(replica), status=201)

    async def remove_engine(self, request: Request) -> Response:
        """Take an engine out; `drain=true` lets its running requests end first."""
        engine_id = request.path_params["engine_id"]
        drain = request.query_params.get("drain", "false") in ("1", "true")
        await self._operations.remove_engine(engine_id, drain=drain)
        _log.info("engine %s was removed", engine_id)
        return json_reply({"engine_id": engine_id})

    async def pause(self, request: Request) -> Response:
        """`{"mode": "abort" | "keep" | "retract" | "drain", "max_seconds": 900}`; returns when generation stands still.

        After `max_seconds` (null: never) generation goes on by itself.
        """
        fields = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=("mode", "max_seconds"))
        name = fields.get("mode", GatewayPause.ABORT.value)
        if name not in list(GatewayPause):
            raise InvalidRequest(f"mode: expected one of {', '.join(GatewayPause)}")
        await self._operations.pause(GatewayPause(name), max_seconds=_max_seconds(fields))
        note_change(request.scope, paused=name)
        return json_reply({"paused": name})

    async def generation(self, request: Request) -> Response:
        """Whether generation is paused, how, since when and for how long at most; and what each engine says of it."""
        pause = self._pool.paused
        engines = [
            {
                "engine_id": replica.engine.engine_id,
                "healthy": replica.healthy,
                "paused": replica.identity.paused,
                "found_paused_since": replica.held_since,
                "weight_version": replica.identity.weight_version,
                "policy_version": replica.identity.policy_version,
            }
            for replica in self._pool.replicas
        ]
        return json_reply(
            {
                "paused": _paused_name(self._pool),
                "since": None if pause is None else pause.since,
                "max_seconds": None if pause is None else pause.max_seconds,
                "engines": engines,
            }
        )

    async def resume(self, request: Request) -> Response:
        """Let generation go on."""
        await self._operations.resume()
        note_change(request.scope, paused=None)
        return json_reply({"paused": None})

    async def policy(self, request: Request) -> Response:
        """`{"policy_version": 4, "weight_version": "step-4"}`: what the engines' label means."""
        fields = await read_fields(request, max_bytes=_MAX_BODY_BYTES, known=("policy_version", "weight_version"))
        policy_version = typed(fields, "policy_version", int, "a whole number")
        weight_version = typed(fields, "weight_version", str, "the engines' label")
        if policy_version is None or policy_version < 0 or not weight_version:
            raise InvalidRequest("policy_version, weight_version: both are required, the number is 0 or more")
        await self._operations.set_policy(policy_version, weight_version)
        note_change(request.scope, policy_version=policy_version, weight_version=weight_version)
        return json_reply({"policy_version": policy_version, "weight_version": weight_version})

    async def identity(self, request: Request) -> Response:
        """Gateway and engines side by side, and how each part of each engine was verified."""
        engines = [{**_replica_json(replica), "unmet": self._unmet(replica)} for replica in self._pool.replicas]
        return json_reply({**identity_json(self._model), "required": list(self._required), "engines": engines})

    def _unmet(self, replica: Replica) -> list[str]:
        return [capability for capability in self._required if not replica.identity.can(capability)]


class _StatusRoutes:
    """The open functions."""

    def __init__(
        self,
        pool: ReplicaPool,
        ledger: Ledger,
        runner: TurnRunner,
        registry: SessionRegistry,
        metrics: GatewayMetrics,
        keeper: StorageKeeper,
        siblings: Siblings,
    ) -> None:
        self._siblings = siblings
        self._pool = pool
        self._ledger = ledger
        self._runner = runner
        self._registry = registry
        self._metrics = metrics
        self._keeper = keeper

    async def health(self, request: Request) -> Response:
        """200 while the process serves."""
        return json_reply(await self._status())

    async def ready(self, request: Request) -> Response:
        """200 if an engine can sample and there is room to record it, else 503."""
        status = await self._status()
        return json_reply(status, status=200 if status["engines_healthy"] and status["storage"] in _ROOM else 503)

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        others = await self._siblings.figures(with_counts=True)
        text = await self._metrics.exposition(
            self._ledger,
            self._pool,
            self._runner.parts.model.prompts.audits,
            self._keeper.space,
            num_running=self._runner.num_running + sum(each["turns_running"] for each in others),
            num_sessions=len(self._registry.loaded) + sum(each["sessions_in_memory"] for each in others),
            others=[each["counts"] for each in others],
        )
        return Response(text, media_type=_METRICS_TYPE)

    async def _status(self) -> dict[str, JsonValue]:
        others = await self._siblings.figures()
        return {
            "status": "ok",
            "engines": len(self._pool.replicas),
            "engines_healthy": sum(replica.healthy for replica in self._pool.replicas),
            "turns_running": self._runner.num_running + sum(each["turns_running"] for each in others),
            "paused": _paused_name(self._pool),
            "engines_found_paused": sum(replica.held_since is not None for replica in self._pool.replicas),
            "storage": None if (space := self._keeper.space) is None else space.state.value,
        }


def _paused_name(pool: ReplicaPool) -> str | None:
    return None if pool.paused is None else pool.paused.name


def _max_seconds(fields: Mapping[str, JsonValue]) -> float | None:
    seconds = fields.get("max_seconds")
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST_PAUSE_SECONDS:
        raise InvalidRequest(f"max_seconds: expected a number of seconds above 0, at most {_LONGEST_PAUSE_SECONDS}")
    return float(seconds)


def _engine_url(fields: Mapping[str, JsonValue]) -> str:
    url = typed(fields, "url", str, "the engine's address")
    if not url:
        raise InvalidRequest("url: is required")
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise InvalidRequest(f"url: {error}") from error
    return str(url)


def identity_json(model: ServedModel) -> dict[str, JsonValue]:
    """What the gateway itself knows of its model."""
    return {
        "model": model.name,
        "fingerprints": model.fingerprints,
        "parsing": model.parsing.name,
        "vocab_size": model.tokenizer.vocab_size,
        "tokenizer_backend": asdict(model.tokenizer.backend),
        "context_length": model.context_length,
        "routing": None if model.routing is None else asdict(model.routing),
        "dimensions": asdict(model.dimensions),
    }


def _replica_json(replica: Replica) -> dict[str, JsonValue]:
    identity = replica.identity
    return {
        **asdict(identity),
        "capabilities": [capability for capability in Capability if identity.can(capability)],
        "verified": asdict(replica.verification),
        "healthy": replica.healthy,
        "draining": replica.draining,
        "running": replica.running,
        "failures": replica.failures,
        "last_error": replica.last_error,
    }
