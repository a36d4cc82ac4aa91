"""`verbatim serve`: the gateway's composition root. It chooses the classes, wires them, and owns their lives."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast
from urllib.parse import urlsplit

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.types import ASGIApp

from engines.openai_text import OpenAiTextEngine
from engines.sglang import SglangEngine
from engines.smg import SmgRouter
from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from gateway.contracts.errors import (
    ConfigurationError,
    EngineError,
    EngineUnavailable,
    HandoverFailed,
    IdentityMismatch,
)
from gateway.contracts.generation import Capability
from gateway.contracts.ports import Engine, Ledger
from gateway.contracts.settings import engine_key, load_settings, settings_toml
from gateway.contracts.telemetry import ready_line
from gateway.handover.chores import Chores
from gateway.handover.control import Place, bound_control
from gateway.handover.predecessor import Predecessor
from gateway.handover.server import LAST_SECONDS, GatewayServer, Stop
from gateway.handover.state import LiveState
from gateway.handover.succession import Estate, Succession
from gateway.ledger.keeper import StorageKeeper
from gateway.ledger.postgres import PostgresLedger
from gateway.ledger.reserve import SpaceReserve
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.health import watch_health
from gateway.replicas.operations import Operations
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.sources import EngineList, EngineSource
from gateway.routes.access import Access, HostCheck, read_operator_keys
from gateway.routes.admin import admin_router, status_router
from gateway.routes.audit import AuditLog, audit_path
from gateway.routes.blobs import blobs_router
from gateway.routes.chat import chat_router
from gateway.routes.completions import completions_router
from gateway.routes.connections import BoundedConnection
from gateway.routes.errors import add_error_replies
from gateway.routes.feed import feed_router
from gateway.routes.forward import Observed, forward_router
from gateway.routes.generate import generate_router
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
from gateway.sessions.turns import TurnParts, TurnRunner
from gateway.settings import (
    DEFAULT_TIMEOUTS,
    OPERATOR_KEY_VARIABLE,
    EngineTimeouts,
    GatewaySettings,
    UnknownSessions,
    split_engine,
)
from gateway.wire.protection import FieldRules

_log = logging.getLogger(__name__)

EngineMaker: TypeAlias = Callable[[str, str, ServedModel, Mapping[str, int]], Engine]
"""(engine_id, url, model, known policies) → a client of that engine."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim serve`."""
    parser.add_argument(
        "--engine",
        action="append",
        metavar="KIND=URL",
        help="an engine, repeatable: sglang=http://… (smg, vllm, openai)",
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="folder with tokenizer.json and the chat template")
    parser.add_argument(
        "--tool-call-parser", metavar="NAME", help="how tool calls are written (auto: see the template)"
    )
    parser.add_argument("--reasoning-parser", metavar="NAME", help="how reasoning is marked (auto: see the template)")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8600; 0 takes a free one)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the ledger's folder (verbatim-data)")
    parser.add_argument("--ledger", metavar="URL", help="postgresql://USER@HOST/DATABASE, for several gateways (none)")
    parser.add_argument("--objects", metavar="URL", help="arrays beside --ledger: s3://BUCKET/PREFIX or file:///FOLDER")
    parser.add_argument(
        "--unknown-sessions",
        choices=[each.value for each in UnknownSessions],
        help="what a call under an id that nobody made does (create)",
    )
    parser.add_argument("--pick", metavar="NAME", help="which turns train: all, delivered, final-path, module:function")
    parser.add_argument(
        "--require",
        action="append",
        choices=[capability.value for capability in Capability],
        metavar="CAPABILITY",
        help=f"refuse engines without it, repeatable: {', '.join(Capability)}",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="take over from the gateway that serves the same folder and address; no request of it is lost",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, repeatable")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; raises ConfigurationError for what must be set right first."""
    settings = _settings(arguments)
    if arguments.print_config:
        sys.stdout.write(settings_toml(settings))
        return 0
    # Taken out: no process that we start inherits it.
    operator_key = os.environ.pop(OPERATOR_KEY_VARIABLE, None)
    serve(settings, operator_key=operator_key, replace_running=arguments.replace)
    return 0


def serve(
    settings: GatewaySettings,
    *,
    operator_key: str | None,
    engine_kinds: Mapping[str, EngineMaker] | None = None,
    replace_running: bool = False,
) -> None:
    """Run the gateway in this process. operator_key: one or several, as `read_operator_keys` takes them. engine_kinds:
    kinds of engines beyond those that ship. replace_running: take over from the gateway that serves there, if any."""
    kinds = {**shipped_kinds(settings.timeouts), **(engine_kinds or {})}
    operator_digests = read_operator_keys(operator_key)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, operator_digests, kinds, replace_running=replace_running))


async def _serve(
    settings: GatewaySettings,
    operator_digests: Sequence[str],
    kinds: Mapping[str, EngineMaker],
    *,
    replace_running: bool,
) -> None:
    _check_exposure(settings, keys_are_on=bool(operator_digests))
    async with AsyncExitStack() as stack:
        predecessor = await Predecessor.find(settings.control_path) if replace_running else None
        if predecessor is not None:
            stack.callback(predecessor.close)
            predecessor.check_address(settings.host, settings.port)
        listener = stack.enter_context(_listening_socket(settings)) if predecessor is None else None
        succession = stack.enter_context(closing(Succession()))
        gateway = await stack.enter_async_context(open_gateway(settings, kinds, predecessor))
        if predecessor is not None and predecessor.given is not None:
            listener, control = predecessor.given.listener, predecessor.given.control
            await predecessor.leave()
            await gateway.inherit(predecessor.state)
        else:  # nobody was there, or it died while this one got ready
            listener = listener or stack.enter_context(_listening_socket(settings))
            control = bound_control(settings.control_path)
        place = Place(stack.enter_context(closing(listener)), stack.enter_context(closing(control)))
        access = Access(operator_digests, on_refused=gateway.metrics.observe_refusal)
        await _serve_place(gateway, place, build_app(gateway, access), succession, predecessor)


async def _serve_place(
    gateway: Gateway, place: Place, app: ASGIApp, succession: Succession, predecessor: Predecessor | None
) -> None:
    """Until told to stop, or replaced; meanwhile a predecessor ends its replies."""
    settings = gateway.settings
    stop = Stop(settings.drain_seconds, begin=gateway.begin_to_stop, cut=gateway.cut)
    server = GatewayServer(_server_config(settings, app), place.listener, stop)

    def share() -> None:
        gateway.share(succession.is_under_way or (predecessor is not None and not predecessor.is_gone))

    async def follow() -> None:
        if predecessor is None:
            return
        await server.accepts.wait()
        try:
            await predecessor.run(gateway.operations, server.adopt)
        except HandoverFailed:
            server.should_exit = True
            raise
        share()

    async def hand_on() -> None:
        await server.accepts.wait()
        gateway.chores.start()
        _announce(place.listener)
        await succession.run(
            Estate(
                server=server,
                place=place,
                lock=gateway.lock,
                share=share,
                runner=gateway.runner,
                operations=gateway.operations,
                chores=gateway.chores,
                state=gateway.state,
                drain_seconds=settings.replaced_drain_seconds,
                predecessor=predecessor,
            )
        )

    async with _background(follow()), _background(hand_on()):
        await server.serve()
        await gateway.chores.stop()
        if predecessor is not None:
            await predecessor.stop(timeout_seconds=settings.drain_seconds)


def _server_config(settings: GatewaySettings, app: ASGIApp) -> uvicorn.Config:
    connection = partial(
        BoundedConnection,
        read_timeout_seconds=settings.read_timeout_seconds,
        write_timeout_seconds=settings.write_timeout_seconds,
    )
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", connection),  # uvicorn only calls it
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # anybody could forge whose address is in the audit
        timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.drain_seconds + LAST_SECONDS,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Gateway:
    """All live parts of one gateway process. `policies`: the engines' labels and the versions they mean."""

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
    chores: Chores

    def state(self) -> LiveState:
        """What a successor has to be told."""
        return LiveState(_configured(self.settings), self.engines.sources, self.pool.ordered_pause)

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
        self.runner.cut(EngineUnavailable("the gateway stops; try again"))

    @property
    def lock(self) -> int | None:
        """The descriptor that holds the ledger for this process, None where nothing has to."""
        return self.ledger.lock_descriptor if isinstance(self.ledger, SqliteLedger) else None

    def share(self, is_shared: bool) -> None:
        """Tell the ledger whether another process writes to it too; one that is always shared knows."""
        if isinstance(self.ledger, SqliteLedger):
            self.ledger.share(is_shared)


def make_engine(
    kinds: Mapping[str, EngineMaker],
    kind: str,
    url: str,
    model: ServedModel,
    policies: Mapping[str, int],
    *,
    engine_id: str | None = None,
) -> Engine:
    """A client of one engine; raises ConfigurationError for a kind that we do not know."""
    if kind not in kinds:
        raise ConfigurationError(f"engine kind {kind!r} is none of {', '.join(sorted(kinds))}")
    return kinds[kind](engine_id or _engine_id(kind, url), url, model, policies)


@asynccontextmanager
async def open_gateway(
    settings: GatewaySettings, kinds: Mapping[str, EngineMaker], predecessor: Predecessor | None = None
) -> AsyncIterator[Gateway]:
    """Build all parts, check the engines, watch their health; on the way out every turn is settled first."""
    if settings.model is None:
        raise ConfigurationError("the gateway needs a model folder (tokenizer and chat template): give --model PATH")
    picks = PickChoice.load(settings.pick)
    model = ServedModel.load(
        settings.model,
        history_policy=settings.history_policy,
        name=settings.served_name,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
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
        if predecessor is None:
            ledger, reserve = open_ledger(settings)
            stack.push_async_callback(ledger.aclose)
            policies.update(await ledger.policies())
            await _connect_engines(engines, settings)
        else:  # all that takes time, or may fail, comes before anything is taken
            policies.update(await _stored_policies(settings))
            await _inherit_engines(engines, settings, predecessor.state)
            await asyncio.to_thread(model.prompts.prepare)
            given = await predecessor.take()
            ledger, reserve = open_ledger(settings, lock=None if given is None else given.lock)
            stack.push_async_callback(ledger.aclose)

        async def learn_policy(policy_version: int, weight_version: str) -> None:
            await ledger.set_policy(policy_version, weight_version)  # on disk first
            policies[weight_version] = policy_version

        keeper = StorageKeeper(ledger, settings.storage, reserve)
        queue = LeaseQueue(ledger)
        observe = metrics.observe_turn
        parts = TurnParts(model, pool, ledger, settings.turns, observe, keeper.admit, note_late=queue.rollout_finished)
        runner = TurnRunner(parts)
        stack.push_async_callback(runner.aclose)
        runner.prepare()
        registry = SessionRegistry(ledger, capacity=settings.sessions_in_memory, on_finish=queue.rollout_finished)
        expiry = SessionExpiry(registry, ledger, settings.turns, settings.expiry_sweep_seconds)
        async with _background(watch_health(pool)), _background(keeper.watch()):
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
                chores=Chores([queue.serve, keeper.sweep_regularly, expiry.watch]),
            )


def open_ledger(settings: GatewaySettings, *, lock: int | None = None) -> tuple[Ledger, SpaceReserve | None]:
    """The ledger that the settings name, and the reserve of its disk where that is ours; blocks for a moment.

    lock: the descriptor that holds an embedded ledger's folder, where a predecessor passed it on.
    """
    storage = settings.storage
    if settings.ledger:
        full_wait = storage.full_wait_seconds
        return PostgresLedger.open(settings.ledger, settings.objects, full_wait_seconds=full_wait), None
    reserve = SpaceReserve(settings.data, min_free_bytes=storage.min_free_bytes, reserve_bytes=storage.reserve_bytes)
    ledger = SqliteLedger.open(settings.data, lock=lock, reserve=reserve, full_wait_seconds=storage.full_wait_seconds)
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
            gateway.pool, gateway.ledger, gateway.runner, gateway.registry, gateway.metrics, gateway.keeper, access
        ),
        session_router(
            gateway.registry,
            gateway.ledger,
            access,
            picks=gateway.picks,
            retokenisation=Retokenisation.of_model(gateway.model),
            max_body_bytes=max_bytes,
        ),
        feed_router(gateway.ledger, gateway.lease_queue, authorize=access.check_operator, picks=gateway.picks),
        admin_router(
            gateway.pool,
            gateway.model,
            access,
            required=settings.require,
            operations=gateway.operations,
        ),
        storage_router(gateway.keeper, access),
        blobs_router(calls, gateway.ledger, access),
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
    # Around the framework itself, whose own 500 has an id too; not `add_middleware`, which would stand inside that.
    return RequestEdge(
        app,
        budget=BodyBudget(settings.bodies_in_flight_bytes),
        read_timeout_seconds=settings.read_timeout_seconds,
        hosts=None if access.keys_are_on else HostCheck((settings.host, *settings.allowed_hosts)),
        on_refused=gateway.metrics.observe_refusal,
        audit=gateway.audit,
    )


def _settings(arguments: argparse.Namespace) -> GatewaySettings:
    """File, then `--set`, then flags."""
    settings = load_settings(GatewaySettings, file=arguments.config, overrides=arguments.set)
    flags = {
        "engines": None if arguments.engine is None else tuple(arguments.engine),
        "model": arguments.model,
        "tool_call_parser": arguments.tool_call_parser,
        "reasoning_parser": arguments.reasoning_parser,
        "host": arguments.host,
        "port": arguments.port,
        "data": arguments.data,
        "ledger": arguments.ledger,
        "objects": arguments.objects,
        "unknown_sessions": arguments.unknown_sessions and UnknownSessions(arguments.unknown_sessions),
        "pick": arguments.pick,
        "require": None if arguments.require is None else tuple(map(Capability, arguments.require)),
    }
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})


def _check_exposure(settings: GatewaySettings, *, keys_are_on: bool) -> None:
    if not keys_are_on and not _is_loopback(settings.host):
        raise ConfigurationError(
            f"{settings.host} can be reached from outside: set {OPERATOR_KEY_VARIABLE}, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _listening_socket(settings: GatewaySettings) -> Iterator[socket.socket]:
    """Bound before anything else is opened, so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port"
            ) from error
        yield listener


def _configured(settings: GatewaySettings) -> tuple[EngineSource, ...]:
    return tuple(EngineSource(_engine_id(*split_engine(text)), *split_engine(text)) for text in settings.engines)


async def _connect_engines(engines: EngineList, settings: GatewaySettings) -> None:
    for source in _configured(settings):
        await _connect_engine(engines, source)
    if not settings.engines:
        _log.warning("no engine yet: turns wait until one is added with POST /admin/engines")


async def _inherit_engines(engines: EngineList, settings: GatewaySettings, state: LiveState) -> None:
    """Those that a predecessor uses, and new ones of the settings."""
    wanted = state.engines_for(_configured(settings))
    for source in set(wanted) - set(state.engines):
        await _connect_engine(engines, source)
    await engines.inherit(set(wanted) & set(state.engines))


async def _connect_engine(engines: EngineList, source: EngineSource) -> None:
    try:
        await engines.add_or_expect(source)
    except (EngineError, IdentityMismatch) as error:
        raise ConfigurationError(f"engine {source.kind}={source.url}: {error.message}") from error


async def _stored_policies(settings: GatewaySettings) -> Mapping[str, int]:
    """Read beside the gateway that writes; raises SchemaMismatch for a store that only a stopped gateway may change."""
    if settings.ledger:
        ledger: Ledger = PostgresLedger.open(settings.ledger, settings.objects)
    else:
        ledger = SqliteLedger.open(settings.data, read_only=True)
    try:
        return await ledger.policies()
    finally:
        await ledger.aclose()


@asynccontextmanager
async def _background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run a coroutine beside the body; it ends with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def shipped_kinds(timeouts: EngineTimeouts = DEFAULT_TIMEOUTS) -> Mapping[str, EngineMaker]:
    """The kinds of engines that ship; raises ConfigurationError for an unusable key of the engines."""
    api_key = engine_key()
    limits = {
        "connect_timeout_seconds": timeouts.connect_seconds,
        "idle_timeout_seconds": timeouts.between_bytes_seconds,
    }
    watched = limits | {
        "first_byte_timeout_seconds": timeouts.first_byte_seconds,
        "stall_timeout_seconds": timeouts.stall_seconds,
        "probe_timeout_seconds": timeouts.probe_seconds,
    }

    def token_engine(
        client: Callable[..., Engine],
        limits: Mapping[str, float],
        engine_id: str,
        url: str,
        model: ServedModel,
        policies: Mapping[str, int],
    ) -> Engine:
        return client(
            url,
            engine_id=engine_id,
            routing=model.routing,
            policy_version_of=partial(policy_version_of, known=policies),
            context_length=model.context_length,
            api_key=api_key,
            **limits,
        )

    def openai_text(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
        tokenizer = model.tokenizer
        return OpenAiTextEngine(
            url, engine_id=engine_id, decode=tokenizer.decode, encode=tokenizer.encode_after, api_key=api_key, **limits
        )

    return {
        "sglang": partial(token_engine, SglangEngine, watched),
        "smg": partial(token_engine, SmgRouter, watched),
        "vllm": partial(token_engine, VllmEngine, limits),
        "openai": openai_text,
    }


def _engine_id(kind: str, url: str) -> str:
    """The same engine has the same id in every gateway process (replica selection hashes it)."""
    return f"{kind}-{urlsplit(url).netloc or url}"


def _announce(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    sys.stdout.write(ready_line("serve", url) + "\n")
    sys.stdout.flush()
