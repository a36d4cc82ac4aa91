"""The sandboxes that a command's rollouts run in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sandbox.drivers import make_driver
from sandbox.pool import SandboxPool
from trainer.settings import TrainSettings


@asynccontextmanager
async def open_sandboxes(settings: TrainSettings) -> AsyncIterator[SandboxPool]:
    """As many as there are rollouts at once; they end with the block."""
    driver = make_driver(settings.sandbox.driver)
    try:
        pool = SandboxPool(driver, size=settings.rollouts.concurrency)
        try:
            yield pool
        finally:
            await pool.aclose()
    finally:
        await driver.aclose()
