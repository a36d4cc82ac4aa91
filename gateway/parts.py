"""The parts of one gateway process: chosen, wired, and closed in order; and the HTTP application around them."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp

from gateway.background import background
from gateway.contracts.errors import (
    ConfigurationError,
    EngineError,
    IdentityMismatch,
)
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Engine, Ledger
from gateway.contracts.records import SessionRecord
from gateway.engine_kinds import EngineMaker, default_engine_id, make_engine
from gateway.handover.chores import Chores
from gateway.handover.control import Place
from gateway.handover.estate import OwnEstate
from gateway.handover.predecessor import Holding, Origin, Predecessor
from gateway.handover.server import GatewayServer
from gateway.handover.state import NO_STATE, LiveState
from gateway.ledger.keeper import StorageKeeper
from gateway.ledger.reserve import SpaceReserve
from gateway.ledger.sqlite import SqliteLedger
from gateway.memory import collect_cycles
from gateway.replicas.health import watch_health
from gateway.replicas.operations import Operations
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.sources import EngineList, EngineSource
from gateway.routes.access import Access, HostCheck
from gateway.routes.admin import admin_router, status_router
from gateway.routes.audit import AuditLog, audit_path
from gateway.routes.blobs import blobs_router
from gateway.routes.chat import chat_router
from gateway.routes.completions import completions_router
from gateway.routes.errors import add_error_replies
from gateway.routes.feed import feed_router
from gateway.routes.forward import Observed, forward_router
from gateway.routes.generate import generate_router
from gateway.routes.hot_path import ModelCalls
from gateway.routes.leasing import LeaseQueue
from gateway.routes.limits import BodyBudget, RequestEdge
from gateway.routes.messages import messages_router
from gateway.routes.metrics import GatewayMetrics
from gateway.routes.openapi import add_document
from gateway.routes.paths import SessionPaths
from gateway.routes.quotas import Quotas
from gateway.routes.responses import responses_router
from gateway.routes.sessions import session_router
from gateway.routes.storage import storage_router
from gateway.routes.tokenize import tokenize_router
from gateway.routes.turns import Calls
from gateway.sessions.admission import Admission
from gateway.sessions.expiry import SessionExpiry
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import PickChoice
from gateway.sessions.registry import SessionRegistry
from gateway.sessions.report import Retokenisation
from gateway.sessions.siblings import ALONE, Siblings
from gateway.sessions.turns import TurnParts, TurnRunner
from gateway.settings import (
    GatewaySettings,
    UnknownSessions,
    split_engine,
)
from gateway.tito.proof import Prover
from gateway.wire.protection import FieldRules

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """All live parts of one gateway process. `policies`: the engines' labels and the versions they mean. `presence`:
    what each process does that takes requests, `chores`: what only one process of a folder does."""

    settings: GatewaySettings
    model: ServedModel
    ledger: Ledger
    pool: ReplicaPool
    registry: SessionRegistry
    runner: TurnRunner
    metrics: GatewayMetrics
    picks: PickChoice
    keeper: StorageKeeper
    audit: AuditLog | None
    lease_queue: LeaseQueue
    policies: dict[str, int]
    engines: EngineList
    operations: Operations
    presence: Chores
    chores: Chores
    siblings: Siblings

    def estate(self, server: GatewayServer, place: Place, predecessor: Predecessor | None) -> OwnEstate:
        """What of it a hand-over moves."""
        return OwnEstate(
            server=server,
            place=place,
            lock=self.lock,
            shared=self.share,
            runner=self.runner,
            operations=self.operations,
            presence=self.presence,
            chores=self.chores,
            live=self.state,
            drain_seconds=self.settings.replaced_drain_seconds,
            predecessor=predecessor,
        )

    def state(self) -> LiveState:
        """What a successor has to be told."""
        return LiveState(_configured(self.settings), self.engines.sources, self.pool.ordered_pause)

    def figures(self, *, with_counts: bool) -> dict[str, JsonValue]:
        """What this process has at the moment, and what it has counted, for the other workers of the same gateway."""
        counts = {"counts": self.metrics.counts(self.model.prompts.audits)} if with_counts else {}
        return {
            "turns_running": self.runner.num_running,
            "sessions_in_memory": len(self.registry.loaded),
            "engines": {replica.engine.engine_id: replica.running for replica in self.pool.replicas},
            **counts,
        }

    async def inherit(self, state: LiveState) -> None:
        """Become what a predecessor was at last; its earlier state is known already."""
        wanted = state.engines_for(_configured(self.settings))
        for source in set(self.engines.sources) - set(wanted):
            await self.engines.remove(source.engine_id, drain=False)
        await self.engines.inherit(set(wanted) - set(self.engines.sources))
        if (policies := await self.ledger.policies()) != self.policies:
            self.policies.update(policies)
            await self.pool.refresh_identities()
        if state.paused is not None:
            await self.pool.hold(state.paused)

    def begin_to_stop(self) -> None:
        """No request comes any more, so none can end a pause: what a pause holds is told so, the rest may end."""
        self.lease_queue.close()
        if self.pool.is_pausing:
            self.cut()

    def cut(self) -> None:
        """End what still runs; it is recorded, and a retry goes on from it."""
        self.runner.stop()

    @property
    def lock(self) -> int | None:
        """The descriptor that holds the ledger for this process, None where nothing has to."""
        return self.ledger.lock_descriptor if isinstance(self.ledger, SqliteLedger) else None

    def share(self, is_shared: bool) -> None:
        """Tell the ledger whether another process writes to it too; one that is always shared knows."""
        if isinstance(self.ledger, SqliteLedger):
            self.ledger.share(is_shared)


@asynccontextmanager
async def open_gateway(
    settings: GatewaySettings,
    kinds: Mapping[str, EngineMaker],
    origin: Origin | None = None,
    siblings: Siblings = ALONE,
) -> AsyncIterator[Gateway]:
    """Build all parts, check the engines, watch their health; on the way out every turn is settled first.

    origin: the process that this one gets its place from. siblings: the other workers of the same gateway.
    """
    if settings.model is None:
        raise ConfigurationError("the gateway needs a model folder (tokenizer and chat template): give --model PATH")
    picks = PickChoice.load(settings.pick)
    model = ServedModel.load(
        settings.model,
        history_policy=settings.history_policy,
        name=settings.served_name,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        tokenizer_backend=settings.tokenizer_backend,
    )
    metrics = GatewayMetrics(feed_consumer=settings.feed_consumer)
    pool = ReplicaPool(
        settings.replicas,
        check_identity=Admission(model, settings.require).check,
        stop_token_ids=frozenset(model.tokenizer.eos_token_ids),
        on_interruption=metrics.observe_interruption,
    )
    audit_file = audit_path(settings.audit, settings.data)
    audit = None if audit_file is None else AuditLog(audit_file, observe=metrics.observe_audit)
    policies: dict[str, int] = {}

    def connect(kind: str, url: str, engine_id: str | None) -> Engine:
        return make_engine(kinds, kind, url, model, policies, engine_id=engine_id)

    engines = EngineList(pool, connect)
    async with AsyncExitStack() as stack:
        if audit is not None:
            stack.push_async_callback(asyncio.to_thread, audit.close)
        stack.push_async_callback(pool.aclose)
        state = NO_STATE if origin is None else origin.state
        if origin is None or not origin.serves:
            holding = None if origin is None else await origin.hold()
            ledger, reserve = open_ledger(settings, holding)
            stack.push_async_callback(ledger.aclose)
            if origin is not None:
                await origin.opened()
            policies.update(await ledger.policies())
            await _connect_engines(engines, settings, state)
        else:  # all that takes time, or may fail, comes before anything is taken
            policies.update(await _stored_policies(settings))
            await _connect_engines(engines, settings, state)
            await asyncio.to_thread(model.prompts.prepare, Prover(niceness=0).prove)
            ledger, reserve = open_ledger(settings, await origin.hold())
            stack.push_async_callback(ledger.aclose)
            await origin.opened()

        async def learn_policy(policy_version: int, weight_version: str) -> None:
            await ledger.set_policy(policy_version, weight_version)  # on disk first
            policies[weight_version] = policy_version

        keeper = StorageKeeper(ledger, settings.storage, reserve)
        queue = LeaseQueue(ledger)
        observe = metrics.observe_turn
        parts = TurnParts(model, pool, ledger, settings.turns, observe, keeper.admit, queue.rollout_finished, siblings)
        runner = TurnRunner(parts)
        stack.push_async_callback(runner.aclose)
        if origin is None or not origin.serves:  # else it was done before anything was taken
            runner.prepare()

        def rollout_finished(session: SessionRecord) -> None:
            queue.rollout_finished(session)
            siblings.rollout_finished()

        registry = SessionRegistry(
            ledger, capacity=settings.sessions_in_memory, on_finish=rollout_finished, siblings=siblings
        )
        expiry = SessionExpiry(registry, ledger, settings.turns, settings.expiry_sweep_seconds, siblings)
        async with background(watch_health(pool)), background(keeper.watch()):
            yield Gateway(
                settings=settings,
                model=model,
                ledger=ledger,
                pool=pool,
                registry=registry,
                runner=runner,
                metrics=metrics,
                picks=picks,
                keeper=keeper,
                audit=audit,
                lease_queue=queue,
                policies=policies,
                engines=engines,
                operations=Operations(pool, engines, learn_policy),
                presence=Chores([queue.serve, partial(collect_cycles, lambda: runner.num_running)]),
                chores=Chores([keeper.sweep_regularly, expiry.watch]),
                siblings=siblings,
            )


def open_ledger(settings: GatewaySettings, holding: Holding | None = None) -> tuple[Ledger, SpaceReserve | None]:
    """The ledger that the settings name, and the reserve of its disk where that is ours; blocks for a moment.

    holding: how an embedded ledger's folder is held, where another process holds it already.
    """
    holding = holding or Holding(None, is_alone=True)
    storage = settings.storage
    if settings.ledger:
        full_wait = storage.full_wait_seconds
        from gateway.ledger.postgres import PostgresLedger  # its libraries are 12 MB that the embedded ledger needs not

        return PostgresLedger.open(settings.ledger, settings.objects, full_wait_seconds=full_wait), None
    reserve = SpaceReserve(settings.data, min_free_bytes=storage.min_free_bytes, reserve_bytes=storage.reserve_bytes)
    ledger = SqliteLedger.open(
        settings.data,
        lock=holding.lock,
        is_alone=holding.is_alone,
        reserve=reserve,
        full_wait_seconds=storage.full_wait_seconds,
    )
    return ledger, reserve


def build_app(gateway: Gateway, access: Access) -> ASGIApp:
    """The HTTP application around a gateway's parts."""
    settings, max_bytes = gateway.settings, gateway.settings.max_body_bytes
    app = FastAPI(title="Verbatim gateway", docs_url=None, redoc_url=None)
    creates_unknown = settings.unknown_sessions is UnknownSessions.CREATE
    rules = FieldRules(settings.fields)
    quotas = Quotas(settings.limits, on_refused=gateway.metrics.observe_refusal)
    calls = Calls(gateway.runner, gateway.registry, access, creates_unknown=creates_unknown, rules=rules, quotas=quotas)
    observed = Observed(gateway.metrics.observe_forward, gateway.metrics.observe_refused_path)
    routers = [  # the last one takes what no other takes
        status_router(
            gateway.pool,
            gateway.ledger,
            gateway.runner,
            gateway.registry,
            gateway.metrics,
            gateway.keeper,
            gateway.siblings,
            access,
        ),
        session_router(
            gateway.registry,
            gateway.ledger,
            access,
            picks=gateway.picks,
            retokenisation=Retokenisation.of_model(gateway.model),
            max_body_bytes=max_bytes,
            public_url=settings.public_url,
        ),
        feed_router(gateway.ledger, gateway.lease_queue, authorize=access.check_operator, picks=gateway.picks),
        admin_router(
            gateway.pool,
            gateway.model,
            access,
            required=settings.require,
            operations=gateway.operations,
            siblings=gateway.siblings,
        ),
        storage_router(gateway.keeper, access),
        blobs_router(calls, gateway.ledger),
        messages_router(calls, max_body_bytes=max_bytes),
        responses_router(calls, gateway.registry, access, max_body_bytes=max_bytes),
        completions_router(calls, max_body_bytes=max_bytes),
        generate_router(calls, max_body_bytes=max_bytes),
        tokenize_router(calls, max_body_bytes=max_bytes),
        chat_router(calls, max_body_bytes=max_bytes),
        forward_router(
            calls, mode=settings.forward, own=settings.forward_paths, max_body_bytes=max_bytes, observed=observed
        ),
    ]
    for router in routers:
        app.include_router(router)
    app.add_middleware(SessionPaths)
    add_error_replies(app)
    add_document(app)
    # Both stand around the framework itself, whose own 500 has an id too; `add_middleware` would put them inside that.
    return RequestEdge(
        ModelCalls(app, itertools.chain.from_iterable(router.routes for router in routers)),
        budget=BodyBudget(settings.bodies_in_flight_bytes),
        read_timeout_seconds=settings.read_timeout_seconds,
        hosts=None if access.keys_are_on else HostCheck((settings.host, *settings.allowed_hosts)),
        on_refused=gateway.metrics.observe_refusal,
        audit=gateway.audit,
    )


def _configured(settings: GatewaySettings) -> tuple[EngineSource, ...]:
    return tuple(EngineSource(default_engine_id(*split_engine(text)), *split_engine(text)) for text in settings.engines)


async def _connect_engines(engines: EngineList, settings: GatewaySettings, state: LiveState) -> None:
    """Those that another process uses already, and those that only the settings name."""
    wanted = state.engines_for(_configured(settings))
    for source in wanted:
        if source not in state.engines:
            await _connect_engine(engines, source)
    await engines.inherit(set(wanted) & set(state.engines))
    if not wanted:
        _log.warning("no engine yet: turns wait until one is added with POST /admin/engines")


async def _connect_engine(engines: EngineList, source: EngineSource) -> None:
    try:
        await engines.add_or_expect(source)
    except (EngineError, IdentityMismatch) as error:
        raise ConfigurationError(f"engine {source.kind}={source.url}: {error.message}") from error


async def _stored_policies(settings: GatewaySettings) -> Mapping[str, int]:
    """Read beside the gateway that writes; raises SchemaMismatch for a store that only a stopped gateway may change."""
    if settings.ledger:
        ledger, _ = open_ledger(settings)
    else:
        ledger = SqliteLedger.open(settings.data, read_only=True)
    try:
        return await ledger.policies()
    finally:
        await ledger.aclose()
