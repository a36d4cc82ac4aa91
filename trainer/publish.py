"""Bring the trainer's weights to the engines, and tell the gateway which policy the engines' new label means.

    backend ──export──▶ policies/policy-000003 ──transport──▶ engines ──label──▶ gateway (policy 3)

Generation is paused meanwhile. Running requests end with what they have, and the gateway goes on from those tokens
under the new weights: one reply to the agent, versions by token (I5), and no routing row from a cache of other weights.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.client import GatewayClient
from gateway.contracts.errors import TransportError
from gateway.contracts.ports import WeightTransport
from trainer.backends.protocol import TrainBackend
from trainer.checkpoint import retain_newest, write_folder

_PREFIX = "policy-"
_KEPT_POLICIES = 2
"""The one that engines serve, and the one before it that an engine may still be reading."""


class Publisher:
    """Publishes one backend's weights through one gateway."""

    def __init__(self, *, gateway: GatewayClient, transport: WeightTransport, folder: Path) -> None:
        self._gateway = gateway
        self._transport = transport
        self._folder = folder

    async def publish(self, backend: TrainBackend, *, policy_version: int) -> str:
        """Make every engine serve `policy_version`; returns the engines' label for it.

        Raises TransportError if an engine cannot be given the weights, or there is none. Generation goes on either way.
        """
        checkpoint = self._folder / f"{_PREFIX}{policy_version:06d}"
        await asyncio.to_thread(write_folder, checkpoint, backend.export)
        urls = [str(engine["url"]) for engine in await self._gateway.engines()]
        if not urls:
            raise TransportError(f"policy {policy_version}: the gateway has no engine to publish to")
        await self._gateway.pause("abort")
        try:
            label = await self._transport.publish(checkpoint, policy_version=policy_version, engine_urls=urls)
            await self._gateway.set_policy(policy_version, label)
        finally:
            await self._gateway.resume()
        retain_newest(self._folder, _PREFIX, _KEPT_POLICIES)
        return label
