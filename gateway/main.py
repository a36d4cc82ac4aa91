"""`verbatim serve`: the gateway's composition root. It chooses the classes, wires them, and owns their lives."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
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
from gateway.contracts.errors import ConfigurationError, EngineError, IdentityMismatch
from gateway.contracts.generation import Capability
from gateway.contracts.ports import Engine, Ledger
from gateway.contracts.settings import engine_key, load_settings, settings_toml
from gateway.contracts.telemetry import ready_line
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.health import watch_health
from gateway.replicas.pool import ReplicaPool
from gateway.routes.access import Access
from gateway.routes.admin import admin_router, status_router
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
from gateway.routes.responses import responses_router
from gateway.routes.sessions import session_router
from gateway.routes.tokenize import tokenize_router
from gateway.routes.turns import Calls
from gateway.sessions.admission import Admission
from gateway.sessions.model import ServedModel
from gateway.sessions.picks import PickChoice
from gateway.sessions.registry import SessionRegistry
from gateway.sessions.report import Retokenisation
from gateway.sessions.turns import TurnParts, TurnRunner
from gateway.settings import OPERATOR_KEY_VARIABLE, GatewaySettings, UnknownSessions, split_engine
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
    parser.add_argument("--pick", metavar="NAME", help="which turns train: all, delivered, final-path, module:function")
    parser.add_argument(
        "--require",
        action="append",
        choices=[capability.value for capability in Capability],
        metavar="CAPABILITY",
        help=f"refuse engines without it, repeatable: {', '.join(Capability)}",
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
    serve(settings, operator_key=os.environ.get(OPERATOR_KEY_VARIABLE) or None)
    return 0


def serve(
    settings: GatewaySettings, *, operator_key: str | None, engine_kinds: Mapping[str, EngineMaker] | None = None
) -> None:
    """Run the gateway in this process; `engine_kinds` adds kinds of engines to those that ship."""
    kinds = {**shipped_kinds(), **(engine_kinds or {})}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, operator_key, kinds))


async def _serve(settings: GatewaySettings, operator_key: str | None, kinds: Mapping[str, EngineMaker]) -> None:
    _check_exposure(settings, operator_key)
    with _listening_socket(settings) as listener:
        async with open_gateway(settings, kinds) as gateway:
            connection = partial(
                BoundedConnection,
                read_timeout_seconds=settings.read_timeout_seconds,
                write_timeout_seconds=settings.write_timeout_seconds,
            )
            config = uvicorn.Config(
                build_app(gateway, Access(operator_key)),
                http=cast("type[asyncio.Protocol]", connection),  # uvicorn only calls it
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=settings.drain_seconds,
            )
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            await _Server(config, on_ready=partial(_announce, url), on_exit=gateway.lease_queue.close).serve(
                sockets=[listener]
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
    lease_queue: LeaseQueue
    policies: dict[str, int]
    kinds: Mapping[str, EngineMaker]

    def connect(self, kind: str, url: str, engine_id: str | None = None) -> Engine:
        """A client of one engine; raises ConfigurationError for a kind that we do not know."""
        return make_engine(self.kinds, kind, url, self.model, self.policies, engine_id=engine_id)

    async def learn_policy(self, policy_version: int, weight_version: str) -> None:
        """Store what an engine's label means, on disk first."""
        await self.ledger.set_policy(policy_version, weight_version)
        self.policies[weight_version] = policy_version


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
async def open_gateway(settings: GatewaySettings, kinds: Mapping[str, EngineMaker]) -> AsyncIterator[Gateway]:
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
    ledger = SqliteLedger.open(settings.data)
    lease_queue = LeaseQueue(ledger)
    parts = TurnParts(model, pool, ledger, settings.turns, metrics.observe_turn)
    gateway = Gateway(
        settings=settings,
        model=model,
        ledger=ledger,
        pool=pool,
        registry=SessionRegistry(ledger, capacity=settings.sessions_in_memory, on_finish=lease_queue.rollout_finished),
        runner=TurnRunner(parts),
        metrics=metrics,
        picks=picks,
        lease_queue=lease_queue,
        policies={},
        kinds=kinds,
    )
    try:
        gateway.policies.update(await ledger.policies())
        await _connect_engines(gateway)
        gateway.runner.prepare()
        async with _background(watch_health(pool)):
            yield gateway
    finally:
        await gateway.runner.aclose()
        await pool.aclose()
        await ledger.aclose()


def build_app(gateway: Gateway, access: Access) -> ASGIApp:
    """The HTTP application around a gateway's parts."""
    settings, max_bytes = gateway.settings, gateway.settings.max_body_bytes
    app = FastAPI(title="Verbatim gateway", docs_url=None, redoc_url=None)
    creates_unknown = settings.unknown_sessions is UnknownSessions.CREATE
    rules = FieldRules(settings.fields)
    calls = Calls(gateway.runner, gateway.registry, access, creates_unknown=creates_unknown, rules=rules)
    observed = Observed(gateway.metrics.observe_forward, gateway.metrics.observe_refused_path)
    routers = [  # the last one takes what no other takes
        status_router(gateway.pool, gateway.ledger, gateway.runner, gateway.registry, gateway.metrics, access),
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
            connect=gateway.connect,
            learn_policy=gateway.learn_policy,
        ),
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
    )


class _Server(uvicorn.Server):
    """uvicorn that says when it takes requests, and for which SIGTERM is a regular end."""

    def __init__(self, config: uvicorn.Config, *, on_ready: Callable[[], None], on_exit: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_exit = on_exit

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what only waits, then wait for the rest."""
        self._on_exit()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop cleanly on a signal; uvicorn itself would raise it again afterwards."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


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
        "pick": arguments.pick,
        "require": None if arguments.require is None else tuple(map(Capability, arguments.require)),
    }
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})


def _check_exposure(settings: GatewaySettings, operator_key: str | None) -> None:
    if operator_key is None and not _is_loopback(settings.host):
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


async def _connect_engines(gateway: Gateway) -> None:
    for text in gateway.settings.engines:
        kind, url = split_engine(text)
        engine = gateway.connect(kind, url)
        try:
            await gateway.pool.add(engine)
        except (EngineError, IdentityMismatch) as error:
            await engine.aclose()
            raise ConfigurationError(f"engine {text}: {error.message}") from error
    if not gateway.settings.engines:
        _log.warning("no engine yet: turns wait until one is added with POST /admin/engines")


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


def shipped_kinds() -> Mapping[str, EngineMaker]:
    """The kinds of engines that ship; raises ConfigurationError for an unusable key of the engines."""
    api_key = engine_key()

    def token_engine(
        client: Callable[..., Engine], engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]
    ) -> Engine:
        return client(
            url,
            engine_id=engine_id,
            routing=model.routing,
            policy_version_of=partial(policy_version_of, known=policies),
            context_length=model.context_length,
            api_key=api_key,
        )

    def openai_text(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
        tokenizer = model.tokenizer
        return OpenAiTextEngine(
            url, engine_id=engine_id, decode=tokenizer.decode, encode=tokenizer.encode_after, api_key=api_key
        )

    clients: Mapping[str, Callable[..., Engine]] = {"sglang": SglangEngine, "smg": SmgRouter, "vllm": VllmEngine}
    return {kind: partial(token_engine, client) for kind, client in clients.items()} | {"openai": openai_text}


def _engine_id(kind: str, url: str) -> str:
    """The same engine has the same id in every gateway process (replica selection hashes it)."""
    return f"{kind}-{urlsplit(url).netloc or url}"


def _announce(url: str) -> None:
    sys.stdout.write(ready_line("serve", url) + "\n")
    sys.stdout.flush()
