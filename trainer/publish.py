"""Bring the trainer's weights to the engines, and tell the gateway which policy the engines' new label means.

    backend ──export──▶ policies/policy-000003 ──transport──▶ engines ──label──▶ gateway (policy 3)

Generation is paused meanwhile. By default running requests end with what they have, and the gateway goes on from those
tokens under the new weights: one reply to the agent, versions by token (I5), and no routing row from a cache of other
weights. The gateway may be restarted in between: it is asked again, and finds the engines paused. Should this process
die in between, the gateway resumes generation by itself after `pause_seconds`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.client import GatewayClient
from gateway.contracts.errors import LedgerError, TransportError
from gateway.contracts.ports import WeightTransport
from trainer.backends.protocol import TrainBackend
from trainer.checkpoint import retain_newest
from trainer.durable import write_folder

_PREFIX = "policy-"
_RETRY_SECONDS = 0.5
_KEPT_POLICIES = 2
"""The one that engines serve, and the one before it that an engine may still be reading."""


class Publisher:
    """Publishes one backend's weights through one gateway.

    pause: abort, keep, retract or drain. pause_seconds: longest pause. reconnect_seconds: how long a gateway that does
    not answer is asked again.
    """

    def __init__(
        self,
        *,
        gateway: GatewayClient,
        transport: WeightTransport,
        folder: Path,
        pause: str = "abort",
        pause_seconds: float = 900.0,
        reconnect_seconds: float = 60.0,
    ) -> None:
        self._gateway = gateway
        self._transport = transport
        self._folder = folder
        self._pause = pause
        self._pause_seconds = pause_seconds
        self._reconnect_seconds = reconnect_seconds

    async def publish(self, backend: TrainBackend, *, policy_version: int) -> str:
        """Make every engine serve `policy_version`; returns the engines' label for it.

        Raises TransportError if an engine cannot be given the weights, or there is none; LedgerError if the gateway
        stays away. Generation goes on either way.
        """
        checkpoint = self._folder / f"{_PREFIX}{policy_version:06d}"
        await asyncio.to_thread(write_folder, checkpoint, backend.export)
        urls = [str(engine["url"]) for engine in await self._gateway.engines()]
        if not urls:
            raise TransportError(f"policy {policy_version}: the gateway has no engine to publish to")
        try:
            await self._gateway.pause(self._pause, max_seconds=self._pause_seconds)
            label = await self._transport.publish(checkpoint, policy_version=policy_version, engine_urls=urls)
            await self._persistently(lambda: self._gateway.set_policy(policy_version, label))
        finally:
            await self._persistently(self._gateway.resume)
        retain_newest(self._folder, _PREFIX, _KEPT_POLICIES)
        return label

    async def _persistently(self, call: Callable[[], Awaitable[None]]) -> None:
        """A call that may be repeated, until a gateway that is being restarted answers it."""
        deadline = time.monotonic() + self._reconnect_seconds
        while True:
            try:
                return await call()
            except LedgerError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_SECONDS)
