"""Weights by way of a folder that engine and trainer both see: `/update_weights_from_disk`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import orjson

from engines.weights.delivery import Controls, absolute, deliver
from engines.weights.names import weight_label
from gateway.contracts.errors import EngineRejected
from gateway.contracts.ports import PauseMode


class DiskTransport:
    """Tells engines to load a checkpoint folder (implements `gateway.contracts.ports.WeightTransport`).

    pause: what happens to requests that run meanwhile. RETRACT: they wait and go on under the new weights with their
    cache computed anew. IN_PLACE: they go on with the old cache. ABORT: they end with what they have. None: the engine
    waits until they have ended (or, if someone else has paused it, loads at once and stays paused). api_key: of engines
    that were started with one.

    flush_cache: whether engines forget what the old weights computed; None: unless paused IN_PLACE, where an engine
    that still holds requests would refuse it.

    An address may be an smg router's: it stands for all of its workers, which are spoken to at their own addresses.
    """

    def __init__(
        self,
        *,
        pause: PauseMode | None = PauseMode.RETRACT,
        flush_cache: bool | None = None,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self._pause = pause
        self._flush_cache = pause is not PauseMode.IN_PLACE if flush_cache is None else flush_cache
        self._timeout_seconds = timeout_seconds
        self._api_key = api_key

    async def publish(self, checkpoint: Path, *, policy_version: int, engine_urls: Sequence[str]) -> str:
        """Load `checkpoint` into every engine at once and return their new label.

        Raises TransportError naming the first engine that failed, when all have answered.
        """
        label = weight_label(policy_version)
        await deliver(
            engine_urls,
            partial(self._update, checkpoint=absolute(checkpoint), label=label),
            label=label,
            timeout_seconds=self._timeout_seconds,
            api_key=self._api_key,
        )
        return label

    async def aclose(self) -> None:
        """Nothing is kept open between two publications."""

    async def _update(self, engine: Controls, *, checkpoint: Path, label: str) -> None:
        async with engine.paused(self._pause):
            body = {"model_path": str(checkpoint), "weight_version": label, "flush_cache": self._flush_cache}
            answer = orjson.loads(await engine.post("/update_weights_from_disk", body))
            if not answer.get("success"):
                raise EngineRejected(f"{engine.url}: {answer.get('message')}")
        await engine.verify(label, folder=checkpoint)
