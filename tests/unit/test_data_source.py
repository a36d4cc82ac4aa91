"""The source over a real feed: rollouts that vanish under a lease, and rollouts that are lent twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.client import GatewayClient
from gateway.contracts.examples import example_turn
from gateway.contracts.records import SessionOrigin, SessionRecord
from gateway.contracts.rollouts import Lease
from gateway.ledger.sqlite import SqliteLedger
from tests.feed_server import FeedServer, serve_feed
from trainer.data.source import RolloutSource

NAMES = ["a0", "a1", "b0", "b1"]


async def fill(data: Path) -> None:
    ledger = SqliteLedger.open(data)
    for number, name in enumerate(NAMES):
        labels = {"run": "r", "purpose": "train"}
        await ledger.create_session(
            SessionRecord(name, name[0], 2, None, labels, {}, {}, None, "", SessionOrigin.CREATED, True, 1.0)
        )
        await ledger.append_turn(example_turn(session_id=name, created_at=1.0, delivered_at=1.5), None)
        await ledger.finish(name, reward=1.0, outcome="completed", metadata={}, finished_at=2.0 + number)
    await ledger.aclose()


class Dropping(GatewayClient):
    """Somebody frees one rollout as soon as it is leased."""

    async def lease(self, **options: Any) -> Lease | None:
        lease = await super().lease(**options)
        for rollout in () if lease is None else lease.rollouts:
            if rollout.session_id == "a1":
                await self.drop(rollout.session_id, rollout.snapshot)
        return lease


def run(data: Path, story: Any) -> Any:
    async def told() -> Any:
        await fill(data)
        async with asyncio.timeout(30), serve_feed(data) as feed:
            return await story(feed)

    return asyncio.run(told())


def test_a_rollout_that_is_dropped_under_its_lease_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(feed: FeedServer) -> list[str]:
        async with Dropping(feed.url) as gateway:
            taken = await RolloutSource(gateway, run_name="r", group_size=2).take(2, wait_seconds=0.0)
            return [rollout.session.session_id for rollout in taken.rollouts]

    assert run(tmp_path / "ledger", story) == ["a0", "b0", "b1"]
    assert "session a1 was dropped; the step goes on without it" in caplog.text


def test_a_rollout_that_a_lost_lease_lends_again_is_in_the_step_once(tmp_path: Path) -> None:
    """I3."""

    async def story(feed: FeedServer) -> tuple[list[str], int]:
        async with GatewayClient(feed.url) as gateway:
            source = RolloutSource(gateway, run_name="r", group_size=2)
            taken = await source.take(1, wait_seconds=0.0)
            await gateway.release_consumer("r")
            taken += await source.take(2, wait_seconds=0.0)
            return [rollout.session.session_id for rollout in taken.rollouts], len(taken.lease_ids)

    assert run(tmp_path / "ledger", story) == (NAMES, 2)
