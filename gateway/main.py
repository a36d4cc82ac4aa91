"""`verbatim serve`: settings and flags; then listening, taking over from another process, and stopping."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn
import uvloop
from starlette.types import ASGIApp

from gateway.background import background
from gateway.contracts.errors import (
    ConfigurationError,
    HandoverFailed,
)
from gateway.contracts.generation import Capability
from gateway.contracts.settings import load_settings, settings_toml
from gateway.contracts.telemetry import ready_line
from gateway.engine_kinds import EngineMaker, shipped_kinds
from gateway.handover.control import Place, bound_control, remove_control
from gateway.handover.predecessor import Predecessor
from gateway.handover.server import LAST_SECONDS, GatewayServer, Stop
from gateway.handover.succession import Estate, Succession
from gateway.parts import Gateway, build_app, open_gateway
from gateway.routes.access import Access, read_operator_keys
from gateway.routes.connections import BoundedConnection
from gateway.settings import (
    OPERATOR_KEY_VARIABLE,
    GatewaySettings,
    UnknownSessions,
)

_log = logging.getLogger(__name__)


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

    async with background(follow()), background(hand_on()):
        await server.serve()
        if not succession.is_under_way:  # else the name is the successor's
            remove_control(settings.control_path)
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


def _announce(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    sys.stdout.write(ready_line("serve", url) + "\n")
    sys.stdout.flush()
