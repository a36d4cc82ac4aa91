"""Where a gateway listens: the socket, the server on it, and the line that says so."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.telemetry import ready_line
from gateway.handover.server import LAST_SECONDS
from gateway.routes.connections import BoundedConnection
from gateway.settings import OPERATOR_KEY_VARIABLE, GatewaySettings


def check_exposure(settings: GatewaySettings, *, keys_are_on: bool) -> None:
    """Raise ConfigurationError for a gateway without keys that others than this machine could reach."""
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


def listening_socket(settings: GatewaySettings) -> socket.socket:
    """Bound before anything else is opened, so that a taken port is told at once; raises ConfigurationError."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; choose another --port"
        ) from error
    return listener


def announce(listener: socket.socket) -> None:
    """Print the ready line (`ready_line`)."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    sys.stdout.write(ready_line("serve", url) + "\n")
    sys.stdout.flush()


def server_config(settings: GatewaySettings, app: ASGIApp) -> uvicorn.Config:
    """uvicorn's, for `GatewayServer`."""
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
