"""`verbatim serve`: settings and flags; then listening, taking over from another process, workers, and stopping."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path

import uvloop
from starlette.types import ASGIApp

from gateway.background import background
from gateway.contracts.errors import (
    HandoverFailed,
)
from gateway.contracts.generation import Capability
from gateway.contracts.settings import load_settings, settings_toml
from gateway.engine_kinds import EngineMaker, shipped_kinds
from gateway.handover.control import Place, bound_control, remove_control
from gateway.handover.predecessor import Predecessor
from gateway.handover.server import GatewayServer, Stop
from gateway.handover.succession import Succession
from gateway.listening import announce, check_exposure, listening_socket, server_config
from gateway.memory import prepare_memory, settle_memory
from gateway.parts import Gateway, build_app, open_gateway
from gateway.routes.access import Access, read_operator_keys
from gateway.settings import (
    OPERATOR_KEY_VARIABLE,
    GatewaySettings,
    UnknownSessions,
)
from gateway.workers import supervise

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
    parser.add_argument("--workers", type=int, metavar="N", help="processes that serve the port together (1)")
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
    """Run the gateway in this process, or in workers of it.

    operator_key: one or several, as `read_operator_keys` takes them. engine_kinds: kinds of engines beyond those that
    ship. replace_running: take over from the gateway that serves there, if any.
    """
    kinds = {**shipped_kinds(settings.timeouts), **(engine_kinds or {})}
    operator_digests = read_operator_keys(operator_key)
    check_exposure(settings, keys_are_on=bool(operator_digests))
    prepare_memory()
    if settings.workers > 1:
        supervise(settings, operator_digests, kinds, replace_running=replace_running)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, operator_digests, kinds, replace_running=replace_running))


async def _serve(
    settings: GatewaySettings,
    operator_digests: Sequence[str],
    kinds: Mapping[str, EngineMaker],
    *,
    replace_running: bool,
) -> None:
    async with AsyncExitStack() as stack:
        predecessor = await Predecessor.find(settings.control_path) if replace_running else None
        if predecessor is not None:
            stack.callback(predecessor.close)
            predecessor.check_address(settings.host, settings.port)
        listener = stack.enter_context(closing(listening_socket(settings))) if predecessor is None else None
        succession = stack.enter_context(closing(Succession()))
        gateway = await stack.enter_async_context(open_gateway(settings, kinds, predecessor))
        if predecessor is not None and predecessor.given is not None:
            listener, control = predecessor.given.listener, predecessor.given.control
            await predecessor.leave()
            await gateway.inherit(predecessor.state)
        else:  # nobody was there, or it died while this one got ready
            listener = listener or stack.enter_context(closing(listening_socket(settings)))
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
    server = GatewayServer(server_config(settings, app), place.listener, stop)

    estate = gateway.estate(server, place, predecessor)

    async def follow() -> None:
        if predecessor is None:
            return
        await server.accepts.wait()
        try:
            await predecessor.run(gateway.operations, server.adopt)
        except HandoverFailed:
            server.should_exit = True
            raise
        estate.share(succession.is_under_way)

    async def hand_on() -> None:
        await server.accepts.wait()
        gateway.presence.start()
        gateway.chores.start()
        settle_memory()
        announce(place.listener)
        await succession.run(estate)

    async with background(follow()), background(hand_on()):
        await server.serve()
        if not succession.is_under_way:  # else the name is the successor's
            remove_control(settings.control_path)
        await gateway.chores.stop()
        await gateway.presence.stop()
        if predecessor is not None:
            await predecessor.stop(timeout_seconds=settings.drain_seconds)


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
        "workers": arguments.workers,
        "data": arguments.data,
        "ledger": arguments.ledger,
        "objects": arguments.objects,
        "unknown_sessions": arguments.unknown_sessions and UnknownSessions(arguments.unknown_sessions),
        "pick": arguments.pick,
        "require": None if arguments.require is None else tuple(map(Capability, arguments.require)),
    }
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})
